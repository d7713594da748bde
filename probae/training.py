"""Training a pair: ``fit``, stochastic variational inference with a torch optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from . import checkpoints, distributed
from .autoencoder import Autoencoder, Kind, local_parameters, seeded
from .batches import MappedRows, TrainingData
from .checks import is_grey, require_gradients, require_pair
from .compiling import Accelerator, CompiledStep, eager_seconds, operations
from .files import held
from .graphs import require_mode
from .interrupts import Interrupts
from .loop import Best, Training, part_streams, set_streams, streams_of_all
from .monitoring import bound_on, kind_of_loss
from .objectives import ELBO, PerDatumObjective
from .part import require_count, require_flag, require_positive
from .precision import float32_products, require_precision

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]
LARGE = 2e8  # operations of a step's products from which on oneDNN is faster than torch's default


class Run(NamedTuple):
    """What :func:`fit` did.

    ``history`` maps each column to one value per epoch; losses and bounds are nats per datum:
    ``epoch`` (from 1), ``loss`` (the objective on the training batches), ``val_loss`` (the
    objective on the validation data at its final KL weight; without ``val``, absent), ``elbo``,
    ``reconstruction``, ``kl`` and ``active_units`` (on ``monitored``, at KL weight 1, one sample of
    z per datum), ``beta``, ``lr`` (at the epoch's end), ``seconds`` (since the start) and, with
    ``on_fault="skip"``, ``skipped`` (batches left out).

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
    seconds: float  # of training; those before a resume too
    compile_seconds: float  # of these, spent on compiling the step
    eager_because: str  # why steps were not compiled; empty where they were
    skipped: int = 0  # batches left out for their faults, with on_fault="skip"
    interrupted: bool = False  # whether Ctrl-C, or SIGTERM at the command line, ended it

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
    compile: bool | str = "auto",
    precision: str = "float32",
    num_workers: int = 0,
    on_fault: str = "raise",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 300.0,
    resume: bool = False,
) -> Run:
    r"""Train a pair by stochastic variational inference.

    .. math:: \max_{\theta, \phi} \frac1N \sum_n L(x_n; \theta, \phi)

    with L the objective, by default the ELBO. The pair ends with the parameters of its best epoch
    where ``val`` is given (lowest ``val_loss`` once a KL warm-up is over), else of its last. Pyro's
    param store and torch's random stream are as they were. Call ``pair.initialize(x)`` first for
    starting values that fit the data, as the command line does: training is faster by epochs.

    Pyro's handlers and validation switch belong to the process, so train in one thread at a time.

    **Interrupts.** The first Ctrl-C ends training after the step under way, and ``fit`` returns
    what there is, with ``interrupted`` set and the pair as after any run: the best epoch so far, or
    the last whole one. A second Ctrl-C raises KeyboardInterrupt at once.

    **Checkpoints.** With ``checkpoint`` a folder, all that training goes on from is kept in one
    file there, written whole or not at all: at the start, at the end of every epoch, every
    ``checkpoint_seconds`` within one, and at an interrupt. With ``resume`` a later call goes on
    from it, and ends with the very bits of a run that was never stopped: on the same machine and
    library versions, with eager steps, for data that are the same at every pass (a map-style
    Dataset may draw from the global random streams of torch, NumPy and Python, which are put back,
    too).

    **Several processes.** Where torch.distributed is initialised, as by ``torchrun``, every process
    calls ``fit`` with the same arguments. Each takes its share of every batch of ``batch_size``,
    in eager steps, and draws its rows of the noise that one process would for the whole batch: so
    losses are those of one process, up to rounding. They are so in law only with a batch norm (its
    statistics are of a share), with codes drawn by rejection (of a Gamma, say) and for Datasets
    that may draw for their items. All return the same; the first process alone shows progress and
    writes.

    Args:
        pair: the pair to train; its parameters are changed in place.
        x: training data (N, *x_shape): a tensor, array, ``.npy``/``.npz`` path, or torch Dataset.
            A map-style Dataset is indexed anew at every presentation, so its augmentations live; a
            memory-mapped array or large ``.npy`` file stays on the disk; an IterableDataset is read
            in passes, in its own order.
        val: validation data of the same form, which have to fit into memory.
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
            same numbers up to rounding, in half the time or less once some seconds of compilation
            are over. True: all but the first, or raise; ``"auto"``: where the run would take more
            than some 30 seconds, no checkpoint is kept, and the step can be compiled, else with a
            warning that says why not. What a custom objective or part does in Python, beside
            computing from tensors, happens at the first steps alone: use False for such. Where
            something that the graph takes for constant changes while it is used, such as which
            parameters require gradients, the steps from there on are eager, with a warning.
        precision: ``"float32"``, or ``"bf16"`` to let layers multiply in bfloat16, for speed on
            hardware that has it; densities, losses and parameters stay float32. Autocast around
            ``fit`` has no effect.
        num_workers: processes that read a Dataset or a mapped file ahead.
        on_fault: what happens where the loss or a gradient of a batch is NaN or infinite, or a
            Dataset gives such data: ``"raise"``, or ``"skip"`` to go on without that batch,
            parameters, optimizer and batch-norm statistics as before it. Skipped batches are
            counted, and the first is warned of; more than 10 in a row raise. Without ``val``, what
            an epoch measures is NaN where the training data that are measured hold such a datum.
        checkpoint: folder for the checkpoint; None: none is written.
        checkpoint_seconds: seconds between two checkpoints within an epoch.
        resume: go on from the checkpoint in that folder; where there is none yet, begin, so that
            one command can be started again and again. Data, pair and arguments have to be those
            of the first call. ``patience`` may differ and ``epochs`` may grow, except under
            ``"cosine"``, which depends on the number of steps; so may what changes no figure.

    Returns:
        Run: history and facts of the run.

    Raises:
        ValueError: data of the wrong shape, dtype or support, empty, or not finite; an argument
            out of range; ``patience`` without ``val``; an objective that the pair does not allow;
            a checkpoint that is there although ``resume`` is False, is damaged, or is of another
            run, where the message names what differs.
        CannotCompile: ``compile=True``, and the step cannot be compiled; the message says why.
        FloatingPointError: the loss, a gradient, a parameter, or what an epoch measured became NaN
            or infinite. The message names site, step and datum. After this or any other error that
            training meets, the pair has the parameters of the last good epoch.
        ConnectionError: another process of the group has ended.

    Example:
        >>> import tempfile, torch, probae
        >>> x = torch.rand(256, 8).round()
        >>> run = probae.fit(probae.VAE(8, 2), x, epochs=2, progress=False)
        >>> len(run.history["elbo"])
        2
        >>> with tempfile.TemporaryDirectory() as folder:  # two epochs, and later two more
        ...     keep = {"checkpoint": folder, "resume": True, "progress": False}
        ...     _ = probae.fit(probae.VAE(8, 2), x, epochs=2, **keep)
        ...     len(probae.fit(probae.VAE(8, 2), x, epochs=4, **keep).history["elbo"])
        4
    """
    _check_arguments(pair, epochs, batch_size, lr, patience, clip_norm, val, on_fault)
    require_mode(compile)
    require_flag(progress, "progress")
    require_precision(precision, pair.dtype)
    require_gradients("fit")
    objective = ELBO() if objective is None else objective
    _check_objective(objective)
    kind = pair.kind  # here, so that replaced parts that do not fit are named
    if kind is Kind.ADVERSARIAL:
        raise ValueError(
            "pair is of kind ADVERSARIAL: it and its discriminator are trained by turns, which is "
            "not SVI; use probae.fit_adversarial(pair, x), or build it with discriminator=None"
        )
    file = _checkpoint(checkpoint, checkpoint_seconds, resume)
    device = pair.device
    distributed.require_alike(
        {
            "checkpoint": file is None,
            "resume": resume,
            "epochs": epochs,
            "patience": patience,
            "device": device.type,
            "seed": seed,
        }
    )
    with contextlib.ExitStack() as stack:
        if file is not None and distributed.is_main():
            stack.enter_context(held(file.parent, "checkpoint"))
        saved = None if file is None else _saved(file, resume)
        common = _common(seed)
        if common is not None:
            stack.enter_context(seeded(common, {device}))
        if saved is not None:  # so that what a Dataset draws for a first look is the same again
            set_streams(saved, "random_at_start", device, str(file))
        at_start = streams_of_all(device)
        with seeded(0, {device}):  # so that what is measured does not change what is trained
            skips = on_fault == "skip"
            data = TrainingData(pair, x, "x", binarize, num_workers, skips)
        held_out = None if val is None else TrainingData(pair, val, "val", binarize)
        with seeded(0, {device}):
            monitor = data.some(1000) if held_out is None else held_out.all()
        stack.enter_context(local_parameters())
        # autocast keeps copies of weights, which no step would change
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        if distributed.world_size() > 1 and data.size is None:
            raise ValueError("x must have a length to be trained on by several processes")
        parameters = [p for p in pair.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("pair has no parameters that require gradients: nothing to train")
        steps_per_epoch = None if data.size is None else math.ceil(data.size / batch_size)
        make = partial(torch.optim.Adam, fused=True) if optimizer is None else optimizer
        optim = _optimizer(make, parameters, lr)
        steps = None if steps_per_epoch is None else epochs * steps_per_epoch
        scheduler = _scheduler(schedule, optim, steps)
        settings: dict[str, Any] = {}
        if file is not None or distributed.world_size() > 1:  # to hash large data takes a while
            settings = {
                "batch_size": batch_size,
                "lr": float(lr),
                "objective": _describe(objective),
                "binarize": bool(binarize),
                "schedule": _describe_schedule(schedule, scheduler),
                "clip_norm": None if clip_norm is None else float(clip_norm),
                "optimizer": _describe_optimizer(optim),
                "seed": seed,
                "precision": precision,
                "on_fault": on_fault,
                "pair": checkpoints.structure(pair),
                "x": _describe_data(data),
            }
            shapes = [None, monitor.shape] if held_out is None else [monitor.shape, None]
            alike = {**settings, "val": shapes[0], "x": (settings["x"], shapes[1])}
            distributed.require_alike(alike)
            _make_equal(pair)
            monitor = distributed.from_main(monitor)
            settings["val"] = None if held_out is None else checkpoints.fingerprint(monitor)
        best = Best(pair)
        stack.enter_context(best.kept_on_error(file))
        if isinstance(objective, PerDatumObjective):
            stack.callback(setattr, objective, "epoch", math.inf)
        training = Training(pair, objective, data, optim, scheduler, best, clip_norm)
        training.epochs, training.batch_size = epochs, batch_size
        training.steps_per_epoch = steps_per_epoch
        training.precision, training.skips = precision, skips
        training.monitor, training.has_val = monitor, held_out is not None
        training.file, training.seconds_between = file, checkpoint_seconds
        training.settings = settings
        if saved is not None:
            training.restore(saved, cosine=schedule == "cosine")
        else:
            training.at_start = at_start
            if not training.shares_noise:
                part_streams()
            training.save()
        because = ""
        if distributed.world_size() > 1 and compile is not False:
            because = "several processes take their steps together"
            if compile is True and distributed.is_main():
                warnings.warn(f"fit takes its steps eagerly, because {because}", stacklevel=2)
        elif file is not None and compile == "auto":
            because = "a resumed run is to end in the bits of a whole one"
        rows = batch_size if data.size is None else min(batch_size, data.size)
        training.compiler = Accelerator(
            False if because else compile,
            lambda: CompiledStep(pair, objective, data, optim, clip_norm, precision),
            batch_size=rows,
            steps=steps,
            seconds=eager_seconds(pair, objective, rows),
        )
        stack.callback(training.compiler.leave)
        training.compiler.eager_because = because or training.compiler.eager_because
        training.interrupts = stack.enter_context(
            Interrupts(distributed.is_launched(), quiet=not distributed.is_main())
        )
        training.bar = stack.enter_context(
            tqdm(
                total=steps,
                initial=(training.epoch - 1) * (steps_per_epoch or 0) + training.step,
                disable=not progress or not distributed.is_main(),
                unit="step",
            )
        )
        if operations(pair, objective, rows) > LARGE:
            stack.enter_context(float32_products(pair.device))
        training.run(patience)
        best.restore()
    grey = is_grey(monitor) or (not binarize and data.is_grey())
    return Run(
        history=training.history,
        best_epoch=best.epoch,
        stopped_early=training.stopped_early,
        monitored="train" if held_out is None else "val",
        objective=type(objective).__name__,
        kl_method=training.kl_method(),
        kind=kind_of_loss(kind, objective),
        bound_on=bound_on(pair, grey=grey),
        seconds=training.seconds(),
        compile_seconds=training.compiler.seconds,
        eager_because=training.compiler.eager_because,
        skipped=training.skipped,
        interrupted=training.interrupted,
    )


def _common(seed: int | None) -> int | None:
    """Return the seed that all processes have in common."""
    if seed is not None or distributed.world_size() == 1:
        return seed
    return int(distributed.from_main(torch.randint(2**62, ())))


def _make_equal(pair: Autoencoder) -> None:
    """Start every process from the tensors of the main one."""
    if distributed.world_size() > 1:
        with torch.no_grad():
            for tensor in (*pair.parameters(), *pair.buffers()):
                tensor.copy_(distributed.from_main(tensor))


def _checkpoint(checkpoint: Any, seconds: Any, resume: Any) -> Path | None:
    """Return where the checkpoint is to be."""
    require_flag(resume, "resume")
    require_positive(seconds, "checkpoint_seconds")
    if checkpoint is None:
        if resume:
            raise ValueError("resume=True needs the folder of a checkpoint: pass checkpoint=FOLDER")
        return None
    return checkpoints.place(checkpoint)


def _saved(file: Path, resume: bool) -> checkpoints.State | None:
    """Return what is in the checkpoint, where there is one to go on from."""
    content = None
    if distributed.is_main():
        content = file.read_bytes() if file.exists() else None
    content = distributed.bytes_from_main(content)
    if content is not None and not resume:
        raise ValueError(
            f"checkpoint: {file} is there already; pass resume=True to go on from it, or take "
            "another folder"
        )
    return None if content is None else checkpoints.from_bytes(content, str(file))


def _describe(objective: Any) -> dict[str, Any]:
    """Return the name of an objective and its settings."""
    counted = ("epoch", "max_plate_nesting")  # which training changes
    settings = checkpoints.plain_attributes(objective, without=counted)
    schedule = getattr(objective, "schedule", None)
    if dataclasses.is_dataclass(schedule):
        settings["schedule"] = repr(schedule)
    elif schedule is not None:
        settings["schedule"] = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    return {"type": type(objective).__qualname__, **settings}


def _describe_schedule(schedule: str | Schedule, scheduler: LRScheduler | None) -> Any:
    """Return the name of a schedule, and what of one of a user's own are plain numbers."""
    if isinstance(schedule, str) or scheduler is None:
        return schedule
    return {"type": type(scheduler).__qualname__, **_plain(scheduler.state_dict())}


def _describe_optimizer(optim: torch.optim.Optimizer) -> dict[str, Any]:
    settings = [_plain({**group, "params": len(group["params"])}) for group in optim.param_groups]
    return {
        "type": type(optim).__qualname__,
        **{f"{name}{i or ''}": v for i, group in enumerate(settings) for name, v in group.items()},
    }


def _plain(settings: dict[str, Any]) -> dict[str, str]:
    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return value is None or isinstance(value, bool | int | float | str)

    return {name: repr(value) for name, value in settings.items() if is_plain(value)}


def _describe_data(data: TrainingData) -> dict[str, Any]:
    """Return the size of the data and, where they are the same at every look, a hash of them."""
    if data.dataset is None:
        return {"size": data.size, "hash": checkpoints.fingerprint(data.tensor)}
    if not isinstance(data.dataset, MappedRows) or data.size is None:
        found: dict[str, Any] = {"size": data.size, "type": type(data.dataset).__qualname__}
        if data.num_workers > 0:  # by which items draw otherwise, and passes have another order
            found["workers"] = "any" if data.size is not None else data.num_workers
        return found
    some = torch.linspace(0, data.size - 1, min(64, data.size), dtype=torch.float64).long()
    return {"size": data.size, "hash of some": checkpoints.fingerprint(data.rows(some))}


def _check_arguments(
    pair: Any,
    epochs: int,
    batch_size: int,
    lr: float,
    patience: int | None,
    clip_norm: float | None,
    val: Any,
    on_fault: str,
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
    if not isinstance(on_fault, str) or on_fault not in ("raise", "skip"):
        raise ValueError(f"on_fault must be 'raise' or 'skip', got {on_fault!r}")


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
    schedule: str | Schedule, optim: torch.optim.Optimizer, steps: int | None
) -> LRScheduler | None:
    if callable(schedule):
        scheduler = schedule(optim)
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "schedule must return a torch scheduler that steps without a metric, got "
                f"{type(scheduler).__name__}"
            )
        return scheduler
    if isinstance(schedule, str) and schedule == "constant":
        return None
    if isinstance(schedule, str) and schedule == "cosine":
        if steps is None:
            raise ValueError(
                "schedule='cosine' needs the number of steps, which an IterableDataset does not "
                "tell; pass a function of the optimizer"
            )
        return torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=steps)
    raise ValueError(
        f"schedule must be 'constant', 'cosine' or a function of the optimizer, got {schedule!r}"
    )
