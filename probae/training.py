"""Training a pair: ``fit``, stochastic variational inference with a torch optimizer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from .autoencoder import Autoencoder, Kind, frozen, local_parameters, seeded
from .checks import check_support, chunks, likelihood_of, require_pair
from .datasets import as_tensor
from .distributions import GreyBernoulli, mean_of
from .objectives import ELBO, PerDatumObjective, elbo_terms
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
    monitored: str  # "val" or "train": where elbo, reconstruction, kl, active_units were measured
    objective: str
    kl_method: dict[str, str]  # site -> "analytic" or "monte carlo", in the objective
    kind: Kind
    bound_on: str  # what the elbo column bounds, in words
    seconds: float

    def __repr__(self) -> str:
        last = {name: round(values[-1], 4) for name, values in self.history.items()}
        return (
            f"Run({self.objective} on a pair of kind {self.kind.value}, best epoch "
            f"{self.best_epoch}, {self.seconds:.1f} s; last epoch: {last})"
        )


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
) -> Run:
    r"""Train a pair by stochastic variational inference.

    .. math:: \max_{\theta, \phi} \frac1N \sum_n L(x_n; \theta, \phi)

    with L the objective, by default the ELBO. The pair ends with the parameters of its best epoch
    where ``val`` is given (lowest ``val_loss`` once a KL warm-up is over), else of its last. Pyro's
    param store and torch's random stream are as they were.

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

    Returns:
        Run: history and facts of the run.

    Raises:
        ValueError: data of the wrong shape, dtype or support, empty, or not finite; an argument
            out of range; ``patience`` without ``val``; an objective that the pair does not allow.
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
    objective = ELBO() if objective is None else objective
    _check_objective(objective)
    kind = pair.kind  # here, so that replaced parts that do not fit are named
    warmup = getattr(objective, "warmup_epochs", 0.0)
    data = _Data(pair, x, "x", binarize)
    devices = {pair.device}
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(seeded(seed, devices))
        held_out = None if val is None else _held_out(pair, val, "val", binarize)
        monitor = held_out if held_out is not None else _held_out(pair, data, "x", binarize, 1000)
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
                batch = data.batch(index)
                random_state = torch.get_rng_state()
                try:
                    # the first step runs under Pyro's own checks, the others without their cost
                    with pyro.validation_enabled(epoch == 1 and step == 0):
                        loss = objective.differentiable_loss(pair.model, pair.guide, batch)
                    losses.append(float(loss.detach()))
                except ValueError:  # those checks refuse NaN, but name no site
                    torch.set_rng_state(random_state)
                    if _fault(pair, batch) is None:
                        raise
                    losses.append(math.nan)
                if not math.isfinite(losses[-1]):
                    torch.set_rng_state(random_state)
                    mean = losses[-1] / len(batch)
                    what = f"loss became {mean} at epoch {epoch}, step {step + 1}"
                    raise best.error(what, _fault(pair, batch))
                loss = loss / len(batch)
                optim.zero_grad(set_to_none=True)
                loss.backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, clip_norm)
                optim.step()
                if scheduler is not None:
                    scheduler.step()
                bar.update()
            if isinstance(objective, PerDatumObjective):
                objective.epoch = float(epoch)
            if (broken := _broken_parameter(pair)) is not None:
                raise best.error(f"training diverged in epoch {epoch}", broken)
            row = {
                "epoch": epoch,
                "loss": sum(losses) / len(data),
                **_measure(pair, monitor),
                "beta": getattr(objective, "beta", 1.0),
                "lr": optim.param_groups[0]["lr"],
                "seconds": time.perf_counter() - start,
            }
            if held_out is not None:
                row["val_loss"] = _objective_loss(pair, objective, held_out)
            for name in ("elbo", "val_loss"):
                if not math.isfinite(row.get(name, 0.0)):
                    what = f"{name} became {row[name]} at the end of epoch {epoch}"
                    raise best.error(what, _fault(pair, monitor))
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
        kind=kind,
        bound_on=_bound_on(pair, monitor),
        seconds=time.perf_counter() - start,
    )


def active_units(pair: Autoencoder, x: Tensor, threshold: float = 0.01) -> int:
    r"""Number of latent dimensions that vary with x: :math:`Var_x\,E_{q(z|x)}[z_i] > threshold`.

    Raises:
        ValueError: ``x`` has the wrong shape or dtype, is empty, or is not finite.

    Reference:
        Burda, Grosse & Salakhutdinov, Importance weighted autoencoders, 2016.

    Example:
        >>> import torch, probae
        >>> probae.active_units(probae.VAE(8, 2), torch.rand(64, 8)) <= 2
        True
    """
    require_pair(pair)
    data = pair.check_input(_to_pair(pair, as_tensor(x, "x")))
    with frozen(pair, seed=0):
        return _active_units(pair, data, require_positive(threshold, "threshold"))


class _Data:
    """Training data that are indexed by batch: a tensor in memory, or a map-style Dataset."""

    def __init__(self, pair: Autoencoder, x: Any, argument: str, binarize: bool) -> None:
        self.pair, self.binarize, self.argument = pair, binarize, argument
        self.dataset: Dataset[Any] | None = x if _is_map_style(x) else None
        if self.dataset is not None:
            self.size = len(x)
            if self.size == 0:
                raise ValueError(f"{argument} is empty: expected at least one datum")
            self._check(self._items(torch.arange(min(self.size, 2))))
        else:
            self.tensor = _to_pair(pair, as_tensor(x, argument))
            self.size = len(self.tensor)
            self._check(self.tensor)

    def __len__(self) -> int:
        return self.size

    def batch(self, index: Tensor) -> Tensor:
        x = self.tensor[index] if self.dataset is None else self._items(index)
        if self.dataset is not None:
            self._check(x)
        return torch.bernoulli(x) if self.binarize else x

    def _items(self, index: Tensor) -> Tensor:
        dataset = self.dataset
        assert dataset is not None
        items = []
        for i in index.tolist():
            item = dataset[i]
            item = item[0] if isinstance(item, tuple | list) and item else item
            if not isinstance(item, Tensor | np.ndarray):
                raise ValueError(
                    f"{self.argument}[{i}] must be a tensor or a tuple that begins with one, got "
                    f"{type(item).__name__}; give the Dataset a transform to tensors"
                )
            items.append(torch.as_tensor(item))
            if tuple(items[-1].shape) != self.pair.x_shape:
                raise ValueError(
                    f"{self.argument}[{i}] must have the shape {self.pair.x_shape} of one datum, "
                    f"got {tuple(items[-1].shape)}"
                )
        return _to_pair(self.pair, as_tensor(torch.stack(items), self.argument))

    def _check(self, x: Tensor) -> None:
        check_support(self.pair, x, self.argument, binarize=self.binarize, strict=False)


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
            fault = _broken_parameter(self.pair) or str(error)
            self.pair.load_state_dict(self.last)
            raise self.error("a matrix lost its rank, or is not finite", fault) from error
        except Exception:
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


def _held_out(
    pair: Autoencoder, x: Any, argument: str, binarize: bool, limit: int | None = None
) -> Tensor:
    """Return data to measure on: checked, on the pair's device, binarised once."""
    data = x if isinstance(x, _Data) else _Data(pair, x, argument, binarize)
    size = len(data) if limit is None else min(limit, len(data))
    return data.batch(torch.arange(size))


def _measure(pair: Autoencoder, x: Tensor, rows: int = 1000) -> dict[str, float]:
    """Mean ELBO, reconstruction and KL in nats per datum, with the same noise at each call."""
    totals = {"reconstruction": 0.0, "kl": 0.0}
    with frozen(pair, seed=0):
        for chunk, _ in chunks(x, rows):
            terms = elbo_terms(pair.model, pair.guide, chunk)
            totals["reconstruction"] += float(terms.log_likelihood.sum())
            totals["kl"] += float(terms.kl.sum())
        means = {name: total / len(x) for name, total in totals.items()}
        active = _active_units(pair, x[:1000], 0.01)
    return {**means, "elbo": means["reconstruction"] - means["kl"], "active_units": active}


def _active_units(pair: Autoencoder, x: Tensor, threshold: float) -> int:
    code = mean_of(pair.encoder(x))  # (N, z_dim)
    return int((code.var(0, correction=0) > threshold).sum())


def _objective_loss(pair: Autoencoder, objective: pyro.infer.ELBO, x: Tensor) -> float:
    """Mean of the objective on held-out data at its final KL weight, same noise at each call."""
    epoch, total = getattr(objective, "epoch", None), 0.0
    rows = max(50, 1000 // objective.num_particles)
    if isinstance(objective, PerDatumObjective):
        objective.epoch = math.inf
    with frozen(pair, seed=0):
        for chunk, _ in chunks(x, rows):
            total += float(objective.differentiable_loss(pair.model, pair.guide, chunk))
    if isinstance(objective, PerDatumObjective) and epoch is not None:
        objective.epoch = epoch
    return total / len(x)


def _broken_parameter(pair: Autoencoder) -> str | None:
    """Name a parameter that is not finite, and the site of its part."""
    for name, parameter in pair.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} is not finite{_site_of(name)}"
    return None


def _fault(pair: Autoencoder, x: Tensor) -> str | None:
    """Name the parameter or the site where a loss stopped being finite."""
    if (broken := _broken_parameter(pair)) is not None:
        return broken
    with torch.no_grad(), pyro.validation_enabled(False):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    for program, trace in (("guide", guide), ("model", model)):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or name == "data":
                continue
            value, log_prob = site["value"], site["fn"].log_prob(site["value"])
            if not value.isfinite().all():
                return f"site {name!r} of the {program} drew a value that is not finite"
            if not torch.as_tensor(log_prob).isfinite().all():
                return f"site {name!r} of the {program} has a log-probability that is not finite"
    return None


def _site_of(parameter: str) -> str:
    """Name the site whose distribution a parameter belongs to."""
    sites = {"prior": "z", "encoder": "z", "decoder": "x", "corruption": "x_tilde"}
    part = parameter.split(".")[0]
    return f" (it belongs to the {part}, site {sites[part]!r})" if part in sites else ""


def _bound_on(pair: Autoencoder, x: Tensor) -> str:
    if not pair.kind.is_lower_bound:
        return f"nothing: {pair.kind.statement}"
    if isinstance(likelihood_of(pair), GreyBernoulli) and not ((x == 0) | (x == 1)).all():
        return "the expected log-likelihood of x's stochastic binarisation (x is grey)"
    return "log p(x)"


def _columns(with_val: bool) -> list[str]:
    measured = ["elbo", "reconstruction", "kl", "active_units"]
    val = ["val_loss"] if with_val else []
    return ["epoch", "loss", *val, *measured, "beta", "lr", "seconds"]


def _progress_text(row: dict[str, float]) -> str:
    text = f"loss {row['loss']:.2f}, elbo {row['elbo']:.2f} nats"
    return text + (f", val loss {row['val_loss']:.2f}" if "val_loss" in row else "")


def _is_map_style(x: Any) -> bool:
    return isinstance(x, Dataset) and not isinstance(x, IterableDataset) and hasattr(x, "__len__")


def _to_pair(pair: Autoencoder, x: Tensor) -> Tensor:
    return x.detach().to(pair.device, pair.dtype)
