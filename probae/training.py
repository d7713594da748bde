"""Training a pair: ``fit``, stochastic variational inference with a torch optimizer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from .autoencoder import Autoencoder, Kind, local_parameters, seeded
from .checks import TrainingData, is_grey, require_gradients, require_pair
from .compiling import Accelerator, CompiledStep, require_mode
from .monitoring import (
    bound_on,
    broken_parameter,
    find_fault,
    kind_of_loss,
    measure,
    objective_loss,
)
from .objectives import ELBO, PerDatumObjective
from .part import require_count, require_positive

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]


class Run(NamedTuple):
    """What :func:`fit` did.

    ``history`` maps each column to one value per epoch; losses and bounds are nats per datum:
    ``epoch`` (from 1), ``loss`` (the objective on the training batches), ``val_loss`` (the
    objective on the validation data at its final KL weight; without ``val``, absent), ``elbo``,
    ``reconstruction``, ``kl`` and ``active_units`` (on ``monitored``, at KL weight 1, one sample of
    z per datum), ``beta``, ``lr`` (at the epoch's end), ``seconds`` (since the start).

    Example:
        >>> import torch, probae
        >>> run = probae.fit(probae.PPCA(5, 2), torch.randn(64, 5), epochs=3, progress=False)
        >>> run.best_epoch, run.monitored, run.bound_on, len(run.history["elbo"])
        (3, 'train', 'log p(x)', 3)
    """

    history: dict[str, list[float]]
    best_epoch: int  # epoch (from 1) whose parameters the pair has now; 0: the starting values
    stopped_early: bool
    monitored: str  # where elbo, reconstruction, kl, active_units were measured: "val", or "train"
    # for 1000 random training data
    objective: str
    kl_method: dict[str, str]  # site -> "analytic" or "monte carlo", in the objective
    kind: Kind  # what the loss certifies: the pair's kind, as the objective leaves it
    bound_on: str  # what the elbo column bounds, in words
    seconds: float
    compile_seconds: float  # of these, spent on compiling the step
    eager_because: str  # why steps were not compiled; empty where they were

    def __repr__(self) -> str:
        last = {name: round(values[-1], 4) for name, values in self.history.items()}
        return (
            f"Run({self.objective} on a pair of kind {self.kind.value}, best epoch "
            f"{self.best_epoch}, {self.seconds:.1f} s; elbo bounds {self.bound_on}; last epoch: "
            f"{last})"
        )

    def summary(self) -> str:
        """Return first, best and last epoch as a small table, and what its numbers are about."""
        from .rendering import summarize

        return summarize(self)


def fit(
    pair: Autoencoder,
    x: Tensor | Any,
    val: Tensor | Any | None = None,
    *,
    epochs: int = 50,
    batch_size: int = 128,
    lr: float = 1e-3,
    objective: pyro.infer.ELBO | None = None,
    binarize: bool = False,
    schedule: str | Schedule = "constant",
    patience: int | None = None,
    clip_norm: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    seed: int | None = 0,
    progress: bool = True,
    compile: bool | str = False,
) -> Run:
    r"""Train a pair by stochastic variational inference.

    .. math:: \max_{\theta, \phi} \frac1N \sum_n L(x_n; \theta, \phi)

    with L the objective, by default the ELBO. The pair ends with the parameters of its best epoch
    where ``val`` is given (lowest ``val_loss`` once a KL warm-up is over), else of its last. Pyro's
    param store and torch's random stream are as they were. Call ``pair.initialize(x)`` first for
    starting values that fit the data, as the command line does: training is faster by epochs.

    Pyro's handlers and validation switch belong to the process, so train in one thread at a time.

    Args:
        pair: the pair to train; its parameters are changed in place.
        x: training data (N, *x_shape): a tensor, array, ``.npy``/``.npz`` path, or torch Dataset.
            A map-style Dataset is indexed anew at every presentation, so its augmentations live.
        val: validation data of the same form.
        epochs: passes over the data.
        batch_size: data per step; the last, smaller batch of an epoch is used too.
        lr: learning rate at the start.
        objective: a :class:`pyro.infer.ELBO` with a ``differentiable_loss``, such as :class:`ELBO`,
            :class:`IWAE`, or Pyro's ``Trace_ELBO`` and ``TraceMeanField_ELBO``; default ``ELBO()``.
        binarize: draw x ~ Bernoulli(x) anew at every presentation (dynamic binarisation;
            Salakhutdinov & Murray, 2008); validation data are binarised once.
        schedule: ``"constant"``, ``"cosine"`` (to 0 over all steps), or a function of the optimizer
            that returns a torch scheduler, which is stepped after every batch.
        patience: stop after that many epochs without a lower ``val_loss``; never before a KL
            warm-up ends. Needs ``val``.
        clip_norm: clip the gradient to that norm.
        optimizer: called with the parameters and ``lr``; default torch's fused Adam.
        seed: of initial shuffling, noise and binarisation; None draws from the global stream.
        progress: show a progress bar.
        compile: take the steps as one compiled graph (:mod:`probae.compiling`), which computes the
            same numbers up to rounding, in about two thirds of the time once some seconds of
            compilation are over. True: always, or raise; ``"auto"``: where the rest of the run
            would take more than 30 seconds and the step can be compiled, else with a warning that
            says why not. What a custom objective does in Python, beside computing the loss from
            tensors, happens at the first steps alone.

    Returns:
        Run: history and facts of the run.

    Raises:
        ValueError: data of the wrong shape, dtype or support, empty, or not finite; an argument
            out of range; ``patience`` without ``val``; an objective that the pair does not allow.
        CannotCompile: ``compile=True``, and the step cannot be compiled; the message says why.
        FloatingPointError: the loss, a parameter, or what an epoch measured became NaN or infinite.
            The message names the site. After this or any other error that training meets, the pair
            has the parameters of the last good epoch.

    Example:
        >>> import torch, probae
        >>> x = torch.rand(256, 8).round()
        >>> run = probae.fit(probae.VAE(8, 2), x, epochs=2, progress=False)
        >>> len(run.history["elbo"])
        2
    """
    _check_arguments(pair, epochs, batch_size, lr, patience, clip_norm, val)
    require_mode(compile)
    require_gradients("fit")
    objective = ELBO() if objective is None else objective
    _check_objective(objective)
    kind = pair.kind  # here, so that replaced parts that do not fit are named
    warmup = getattr(objective, "warmup_epochs", 0.0)
    data = TrainingData(pair, x, "x", binarize)
    devices = {pair.device}
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(seeded(seed, devices))
        held_out = None if val is None else TrainingData(pair, val, "val", binarize)
        with seeded(0, devices):  # so that what is measured does not change what is trained
            monitor = _monitored(data, held_out)
        stack.enter_context(local_parameters())
        stack.enter_context(torch.enable_grad())
        steps_per_epoch = math.ceil(len(data) / batch_size)
        parameters = [p for p in pair.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("pair has no parameters that require gradients: nothing to train")
        optim = _optimizer(optimizer or partial(torch.optim.Adam, fused=True), parameters, lr)
        scheduler = _scheduler(schedule, optim, epochs * steps_per_epoch)
        best = _Best(pair)
        stack.enter_context(best.kept_on_error())
        if isinstance(objective, PerDatumObjective):
            stack.callback(setattr, objective, "epoch", math.inf)
        compiler = Accelerator(
            compile,
            lambda: CompiledStep(pair, objective, data, optim, clip_norm),
            batch_size=min(batch_size, len(data)),
            steps=epochs * steps_per_epoch,
        )
        columns = _columns(held_out is not None)
        history: dict[str, list[float]] = {name: [] for name in columns}
        stopped_early = False
        start = time.perf_counter()
        bar = stack.enter_context(
            tqdm(total=epochs * steps_per_epoch, disable=not progress, unit="step")
        )
        for epoch in range(1, epochs + 1):
            losses = []
            order = torch.randperm(len(data))
            for step, index in enumerate(order.split(batch_size)):
                if isinstance(objective, PerDatumObjective):
                    objective.epoch = epoch - 1 + step / steps_per_epoch
                batch = data.batch(index) if data.dataset is not None else None
                loss = compiler.step(index if batch is None else batch)
                if loss is None:
                    batch = data.batch(index) if batch is None else batch
                    random_state = torch.get_rng_state()
                    # the first step runs under Pyro's own checks, the others without their cost
                    loss = _eager_step(
                        pair, objective, batch, optim, clip_norm, check=epoch == 1 and step == 0
                    )
                    if not math.isfinite(loss):
                        torch.set_rng_state(random_state)
                        mean = loss / len(batch)
                        what = f"loss became {mean} at epoch {epoch}, step {step + 1}"
                        raise best.error(what, find_fault(pair, batch))
                losses.append(loss)
                if scheduler is not None:
                    scheduler.step()
                bar.update()
            if isinstance(objective, PerDatumObjective):
                objective.epoch = float(epoch)
            if (broken := broken_parameter(pair)) is not None:
                raise best.error(f"training diverged in epoch {epoch}", broken)
            row = {
                "epoch": epoch,
                "loss": sum(losses) / len(data),
                **measure(pair, monitor),
                "beta": getattr(objective, "beta", 1.0),
                "lr": optim.param_groups[0]["lr"],
                "seconds": time.perf_counter() - start,
            }
            if held_out is not None:
                row["val_loss"] = objective_loss(pair, objective, monitor)
            for name in ("elbo", "val_loss"):
                if not math.isfinite(row.get(name, 0.0)):
                    what = f"{name} became {row[name]} at the end of epoch {epoch}"
                    raise best.error(what, find_fault(pair, monitor))
            for name in columns:
                history[name].append(float(row[name]))
            bar.set_postfix_str(_progress_text(row))
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            best.update(epoch, row.get("val_loss"), counts=epoch >= warmup)
            if patience is not None and best.epochs_without_gain(epoch, warmup) >= patience:
                stopped_early = True
                break
        best.restore()
    return Run(
        history=history,
        best_epoch=best.epoch,
        stopped_early=stopped_early,
        monitored="train" if held_out is None else "val",
        objective=type(objective).__name__,
        kl_method=dict(getattr(objective, "kl_method", {})),
        kind=kind_of_loss(kind, objective),
        bound_on=bound_on(pair, grey=is_grey(monitor) or (not binarize and data.is_grey())),
        seconds=time.perf_counter() - start,
        compile_seconds=compiler.seconds,
        eager_because=compiler.eager_because,
    )


def _eager_step(
    pair: Autoencoder,
    objective: Any,
    batch: Tensor,
    optim: torch.optim.Optimizer,
    clip_norm: float | None,
    check: bool,
) -> float:
    """Take a step and return the loss, summed over data; no step where it is not finite."""
    random_state = torch.get_rng_state()
    try:
        with pyro.validation_enabled(check):
            loss = objective.differentiable_loss(pair.model, pair.guide, batch)
        value = float(loss.detach())
    except ValueError:  # those checks refuse NaN, but name no site
        torch.set_rng_state(random_state)
        if find_fault(pair, batch) is None:
            raise
        return math.nan
    if not math.isfinite(value):
        return value
    optim.zero_grad(set_to_none=True)
    (loss / len(batch)).backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_([p for g in optim.param_groups for p in g["params"]], clip_norm)
    optim.step()
    return value


class _Best:
    """The parameters of the best and of the last finite epoch."""

    def __init__(self, pair: Autoencoder) -> None:
        self.pair = pair
        self.epoch = self.last_epoch = 0
        self.val_loss = math.inf
        self.last = self.state = self._copy()

    def update(self, epoch: int, val_loss: float | None, counts: bool) -> None:
        """Take note of an epoch; ``counts`` is False while a KL warm-up goes on."""
        self.last, self.last_epoch = self._copy(), epoch
        if val_loss is None or not counts or val_loss < self.val_loss:
            self.state, self.epoch = self.last, epoch
            self.val_loss = math.inf if val_loss is None or not counts else val_loss

    def epochs_without_gain(self, epoch: int, warmup: float) -> float:
        """Number of epochs since the best one, counted from the end of a warm-up at the latest."""
        return epoch - max(self.epoch, math.ceil(warmup))

    def restore(self) -> None:
        self.pair.load_state_dict(self.state)

    @contextlib.contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Give the pair its parameters of the last good epoch again where training fails."""
        try:
            yield
        except torch.linalg.LinAlgError as error:
            fault = broken_parameter(self.pair) or str(error)
            self.pair.load_state_dict(self.last)
            raise self.error("a matrix lost its rank, or is not finite", fault) from error
        except BaseException:  # an interrupt too leaves a whole epoch
            self.pair.load_state_dict(self.last)
            raise

    def error(self, what: str, fault: str | None) -> FloatingPointError:
        """Return the error for a run that left the finite numbers."""
        fault = fault or "no single site is at fault on a second look; the objective overflowed"
        return FloatingPointError(
            f"{what}: {fault}. The pair has its parameters of epoch {self.last_epoch} again; lower "
            "lr, set clip_norm, or raise the floor of the scale"
        )

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.pair.state_dict().items()}


def _check_arguments(
    pair: Any,
    epochs: int,
    batch_size: int,
    lr: float,
    patience: int | None,
    clip_norm: float | None,
    val: Any,
) -> None:
    require_pair(pair)
    require_count(epochs, "epochs")
    require_count(batch_size, "batch_size")
    require_positive(lr, "lr")
    if clip_norm is not None:
        require_positive(clip_norm, "clip_norm")
    if patience is not None:
        require_count(patience, "patience")
        if val is None:
            raise ValueError("patience needs validation data: pass val, or leave patience=None")


def _check_objective(objective: Any) -> None:
    if not isinstance(objective, pyro.infer.ELBO):
        raise ValueError(
            "objective must be an instance of pyro.infer.ELBO, such as probae.ELBO(), got "
            f"{objective!r}"
        )
    if not hasattr(objective, "differentiable_loss"):
        raise ValueError(
            f"objective must have a differentiable_loss, which {type(objective).__name__} lacks; "
            "use probae.ELBO (any pair), probae.IWAE (for RenyiELBO), or train with pyro.infer.SVI"
        )
    unfit = (pyro.infer.TraceEnum_ELBO, pyro.infer.JitTrace_ELBO, pyro.infer.JitTraceMeanField_ELBO)
    if isinstance(objective, (*unfit, pyro.infer.TraceTailAdaptive_ELBO)):
        raise ValueError(
            f"objective {type(objective).__name__} cannot be differentiated here; use probae.ELBO, "
            "pyro.infer.Trace_ELBO or TraceMeanField_ELBO, or train with pyro.infer.SVI"
        )


def _optimizer(
    make: Callable[..., torch.optim.Optimizer], parameters: list[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    if not callable(make) or isinstance(make, pyro.optim.PyroOptim):
        raise ValueError(
            "optimizer must be called with parameters and lr, such as torch.optim.Adam or a "
            f"functools.partial of it, got {make!r}"
        )
    optim = make(parameters, lr=lr)
    if not isinstance(optim, torch.optim.Optimizer) or isinstance(optim, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must make a torch.optim.Optimizer that steps without a closure, got "
            f"{type(optim).__name__}"
        )
    return optim


def _scheduler(
    schedule: str | Schedule, optim: torch.optim.Optimizer, steps: int
) -> LRScheduler | None:
    if callable(schedule):
        scheduler = schedule(optim)
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "schedule must return a torch scheduler that steps without a metric, got "
                f"{type(scheduler).__name__}"
            )
        return scheduler
    if schedule == "constant":
        return None
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=steps)
    raise ValueError(
        f"schedule must be 'constant', 'cosine' or a function of the optimizer, got {schedule!r}"
    )


def _columns(with_val: bool) -> list[str]:
    measured = ["elbo", "reconstruction", "kl", "active_units"]
    val = ["val_loss"] if with_val else []
    return ["epoch", "loss", *val, *measured, "beta", "lr", "seconds"]


def _progress_text(row: dict[str, float]) -> str:
    text = f"loss {row['loss']:.2f}, elbo {row['elbo']:.2f} nats"
    return text + (f", val loss {row['val_loss']:.2f}" if "val_loss" in row else "")


def _monitored(data: TrainingData, val: TrainingData | None) -> Tensor:
    """Return data to measure on, binarised once: all of ``val``, or 1000 random training data."""
    if val is not None:
        return val.batch(torch.arange(len(val)))
    return data.batch(torch.randperm(len(data))[:1000])
