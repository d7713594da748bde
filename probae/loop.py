"""The steps of a training, and its state between two of them, which a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from . import checkpoints, distributed
from .autoencoder import Autoencoder, RandomState, random_state, set_random_state
from .batches import NOT_FINITE, MappedRows, TrainingData
from .compiling import Accelerator, CompiledStep
from .interrupts import Interrupts
from .layout import lay_out_state, set_gradients
from .monitoring import (
    broken_gradient,
    broken_parameter,
    find_fault,
    measure,
)
from .objectives import PerDatumObjective, is_known
from .precision import products_in
from .shared_noise import SharedNoise

MOST_FAULTS = 10  # batches in a row that may be skipped
WHILE = 0.05  # seconds for which an interrupt, and the progress bar, may wait for compiled steps


class _Fault(Exception):
    """A batch whose loss or gradient is not finite; ``find`` names the site and the datum.

    ``elsewhere`` tells that they are in the share of another process, which names them.
    """

    def __init__(self, what: str, find: Callable[[], str | None], elsewhere: bool = False) -> None:
        super().__init__(what)
        self.what, self.find, self.elsewhere = what, find, elsewhere


class Training:
    """A run between two steps, which is what a checkpoint holds, and the steps themselves."""

    epochs: int
    batch_size: int
    steps_per_epoch: int | None  # None: unknown, of an IterableDataset
    precision: str
    skips: bool
    monitor: Tensor
    has_val: bool
    file: Path | None
    seconds_between: float
    settings: dict[str, Any]
    at_start: list[dict[str, Tensor]]  # random streams of each process
    interrupts: Interrupts
    bar: Any

    def __init__(
        self,
        pair: Autoencoder,
        objective: Any,
        data: TrainingData,
        optim: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        best: Best,
        clip_norm: float | None,
    ) -> None:
        self.pair, self.objective, self.data = pair, objective, data
        self.optim, self.scheduler, self.best, self.clip_norm = optim, scheduler, best, clip_norm
        self.compiler = Accelerator(False, self._no_compiler)
        self.warmup = getattr(objective, "warmup_epochs", 0.0)
        # a Dataset may draw for its items, of which each process has others
        self.draws_itself = data.dataset is None or isinstance(data.dataset, MappedRows)
        self.is_alone = distributed.world_size() == 1
        self.shares_noise = self.draws_itself and not self.is_alone
        self.norms = [m for m in pair.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.epoch, self.step = 1, 0  # the epoch under way, and steps of it that were taken
        self.order: Tensor | None = None  # of the data in this epoch
        self.loss, self.seen = 0.0, 0  # sum and number of the data of this epoch so far
        self.steps_before: int | None = None  # of the epoch before
        self.skipped = self.skipped_now = self.skipped_in_a_row = 0
        self.history: dict[str, list[float]] = {}
        self.earlier_kl_method: dict[str, str] = {}
        self.earlier_seconds, self.start = 0.0, time.perf_counter()
        self.saved_at = self.start
        self.stopped_early = self.interrupted = False
        self.is_first = True  # the first step runs under Pyro's own checks
        self.wants_save = False

    def run(self, patience: int | None) -> None:
        """Train up to that epoch, or until there is no gain, or an interrupt."""
        columns = _columns(self.has_val, self.skips)
        self.history = {name: self.history.get(name, []) for name in columns}
        while self.epoch <= self.epochs:
            if patience is not None:
                waited = self.best.epochs_without_gain(self.epoch - 1, self.warmup)
                self.stopped_early = waited >= patience
            if self.stopped_early:
                return
            self.take_steps()
            if self.interrupted:
                return
            self.finish_epoch()
            self.save()

    def seconds(self) -> float:
        """Seconds of training, before a resume too."""
        return self.earlier_seconds + time.perf_counter() - self.start

    def kl_method(self) -> dict[str, str]:
        """How the objective got the KL of each site."""
        return dict(getattr(self.objective, "kl_method", {})) or self.earlier_kl_method

    def take_steps(self) -> None:
        """Take the steps of the epoch that are left."""
        if self.step == 0:
            order = self.data.order()
            self.order = None if order is None else distributed.from_main(order)
            if self.shares_noise:
                cpu, gpu = random_state(self.pair.device)
                gpu = None if gpu is None else distributed.from_main(gpu)
                set_random_state((distributed.from_main(cpu), gpu), self.pair.device)
        share = None if self.is_alone else distributed.share_of
        while not self.interrupted:  # once more after data that could not be read
            sources: Any = self.data.sources(
                self.batch_size, self.order, self.epoch, self.step, share=share
            )
            with contextlib.closing(sources):
                if self._took_all(sources):
                    return

    def _took_all(self, sources: Iterator[Tensor]) -> bool:
        """Take steps until the epoch is over, or an interrupt; False after data that are faulty."""
        while not self.interrupted:
            source: Tensor | _Fault | None = self.take_several(sources)
            try:
                source = next(sources) if source is None else source
            except StopIteration:
                return True
            except ValueError as error:  # of a Dataset, whose data are checked as they come
                if not self.skips or NOT_FINITE not in str(error):
                    raise
                source = _Fault(str(error), lambda: None)
            self.take(source)
            if isinstance(source, _Fault):
                return False
        return True

    def take_several(self, sources: Iterator[Tensor]) -> Tensor | None:
        """Take compiled steps for a while, and return a batch that is left to be taken.

        Only where steps differ by nothing but their data, and nobody is to hear of each.
        """
        compiled = self.compiler.compiled
        if compiled is None or not self.is_steady:
            return None
        losses, left = compiled.go_on(sources, seconds=WHILE)
        for loss in losses:  # one by one, as sum() may round otherwise
            self.loss += loss
        self.seen += len(losses) * compiled.rows
        self.step += len(losses)
        self.bar.update(len(losses))
        self.interrupted = self.interrupts.asked
        return left

    @property
    def is_steady(self) -> bool:
        """Whether settings stay as they are from step to step, and no checkpoint is kept."""
        changes = self.scheduler is not None or not is_known(self.objective)
        changes = changes or getattr(self.objective, "schedule", None) is not None
        waits = self.skips or self.file is not None or not self.is_alone
        return not changes and not waits

    def take(self, source: Tensor | _Fault) -> None:
        """Take a step, or leave its batch out."""
        if isinstance(self.objective, PerDatumObjective):
            of = self.steps_per_epoch or self.steps_before
            self.objective.epoch = self.epoch - 1 + (self.step / of if of else 0.0)
        if self.skips:  # what a batch that is left out must not change
            buffers = [b.clone() for b in self.pair.buffers()]
            streams = random_state(self.pair.device)
        try:
            loss, count = self.one_step(source)
        except (_Fault, torch.linalg.LinAlgError) as error:
            if isinstance(error, torch.linalg.LinAlgError) and not self.skips:
                raise
            self.optim.zero_grad(set_to_none=True)
            self.compiler.watch_anew()
            found = str(error)
            lost = _Fault("a matrix lost its rank, or is not finite", lambda: found)
            self.leave_out(error if isinstance(error, _Fault) else lost)
            with torch.no_grad():  # last, as a look for the fault changes them, too
                for buffer, before in zip(self.pair.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            # of which the process that met the fault has drawn more than others
            set_random_state(streams, self.pair.device)
        else:
            self.loss, self.seen = self.loss + loss, self.seen + count
            self.skipped_in_a_row = 0
        self.step_is_over()

    def one_step(self, source: Tensor | _Fault) -> tuple[float, int]:
        """Return the loss of a batch, summed over its data, and their number."""
        if isinstance(source, _Fault):
            if not self.is_alone:
                return self.common_step(source, None, random_state(self.pair.device))
            raise source
        if self.compiler.is_due(source):
            self.bar.set_postfix_str("compiling the step")
        loss = self.compiler.step(source)
        if loss is not None:
            return loss, len(source)
        with self.noise():
            batch = self.data.batch(source)
        places = self.places()
        streams = random_state(batch.device)
        if not self.is_alone:
            return self.common_step(batch, places, streams)
        value, loss_tensor = self.forward(batch, streams)
        if loss_tensor is None:
            raise self.fault_of_loss(value / len(batch), batch, places, streams)
        self.optim.zero_grad(set_to_none=True)
        (loss_tensor / len(batch)).backward()
        self.update(batch, places, streams)
        return value, len(batch)

    def places(self) -> Tensor | None:
        """Return where in the data this process's batch is; None where that is not known."""
        if self.order is None:
            return None
        first = self.step * self.batch_size
        return distributed.share_of(self.order[first : first + self.batch_size])

    def size(self) -> int:
        """Return the number of data of this step's batch, in all processes."""
        assert self.data.size is not None
        return min(self.batch_size, self.data.size - self.step * self.batch_size)

    def noise(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which this process draws its rows of the whole batch's noise."""
        if not self.shares_noise:
            return contextlib.nullcontext()
        rows = distributed.share_of(torch.arange(self.size()))
        return SharedNoise(int(rows[0]), len(rows), self.size())

    def forward(self, batch: Tensor, streams: RandomState) -> tuple[float, Tensor | None]:
        """Return the loss summed over data, also as a tensor where it is finite."""
        check, self.is_first = self.is_first, False
        try:
            with pyro.validation_enabled(check), products_in(self.precision), self.noise():
                loss = self.objective.differentiable_loss(self.pair.model, self.pair.guide, batch)
            value = float(loss.detach())
        except ValueError:  # those checks refuse NaN, but name no site
            if self.find_fault(batch, None, streams) is None:
                raise
            return math.nan, None
        return value, loss if math.isfinite(value) else None

    def fault_of_loss(
        self, value: float, batch: Tensor, places: Tensor | None, streams: RandomState
    ) -> _Fault:
        """Return the fault of a loss that is not finite."""

        return _Fault(f"loss became {value}", lambda: self.find_fault(batch, places, streams))

    def find_fault(self, batch: Tensor, places: Tensor | None, streams: RandomState) -> str | None:
        """Name the site and the datum at fault, under the noise that the step had."""
        set_random_state(streams, self.pair.device)
        with self.noise():
            return find_fault(self.pair, batch, places)

    def update(self, batch: Tensor, places: Tensor | None, streams: RandomState) -> None:
        """Let the optimizer make its step, if the gradients are finite."""
        owners = [p for g in self.optim.param_groups for p in g["params"] if p.grad is not None]
        gradients = [p.grad for p in owners if p.grad is not None]
        # a sum, as it is the cheapest look at all numbers; it may overflow where no gradient does
        total = torch.stack([g.sum() for g in gradients]).sum() if gradients else 0.0
        if not math.isfinite(total) and not all(g.isfinite().all() for g in gradients):
            broken = {id(p) for p in owners if p.grad is not None and not p.grad.isfinite().all()}
            names = [name for name, p in self.pair.named_parameters() if id(p) in broken]

            def find() -> str | None:
                set_random_state(streams, self.pair.device)
                with self.noise():
                    return broken_gradient(self.pair, self.objective, batch, places, names)

            raise _Fault("a gradient became NaN or infinite", find)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(owners, self.clip_norm)
        self.optim.step()

    def common_step(
        self, batch: Tensor | _Fault, places: Tensor | None, streams: RandomState
    ) -> tuple[float, int]:
        """Take a step with the other processes: one sum of gradients, loss, and what all ask for.

        A fault of one makes the sum NaN, and so becomes a fault of all, at the same step.
        """
        size = self.size()
        idle = distributed.rank() >= size  # more processes than data: its datum is another's
        value, loss = 0.0, None
        if isinstance(batch, _Fault):
            value = math.nan
        elif not idle:
            value, loss = self.forward(batch, streams)
        self.optim.zero_grad(set_to_none=True)
        if loss is not None:
            (loss / size).backward()
        statistics = [
            buffer
            for norm in self.norms
            for buffer in (norm.running_mean, norm.running_var)
            if norm.training and buffer is not None
        ]
        weight = 0.0 if idle or isinstance(batch, _Fault) else len(batch) / size
        owners = [p for g in self.optim.param_groups for p in g["params"]]
        flags = [self.interrupts.asked, self.is_due(), *(p.grad is not None for p in owners)]
        dtype, device = torch.promote_types(torch.float32, self.pair.dtype), self.pair.device
        parts = [
            torch.tensor([value, *map(float, flags)], dtype=dtype, device=device),
            *(weight * buffer.flatten().to(dtype) for buffer in statistics),
            *(torch.zeros_like(p) if p.grad is None else p.grad for p in owners),
        ]
        total = distributed.add_up(torch.cat([part.flatten().to(dtype) for part in parts]))
        summed, *sums = total[: 1 + len(flags)].tolist()
        self.interrupted, self.wants_save = sums[0] > 0, sums[1] > 0
        if not math.isfinite(summed):
            if isinstance(batch, _Fault):
                raise batch
            if not math.isfinite(value):
                raise self.fault_of_loss(value / len(batch), batch, places, streams)
            where = "in the share of another process"
            raise _Fault("loss became NaN or infinite", lambda: where, elsewhere=True)
        whole = [*statistics, *owners]
        means = total[1 + len(flags) :].split([tensor.numel() for tensor in whole])
        with torch.no_grad():
            for buffer, mean in zip(statistics, means, strict=False):
                buffer.copy_(mean.view_as(buffer))
            for norm in self.norms if idle else ():
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked += 1
            of_owners = zip(owners, sums[2:], means[len(statistics) :], strict=True)
            gradients = [
                mean.view_as(p).to(p.dtype, copy=True) if flag > 0 else None
                for p, flag, mean in of_owners
            ]
            set_gradients(owners, gradients)
        assert isinstance(batch, Tensor)
        self.update(batch, places, streams)
        return summed, size

    def leave_out(self, fault: _Fault) -> None:
        """Count a batch that is left out, or raise the error that says what was wrong with it."""
        where = f"{fault.what} at epoch {self.epoch}, step {self.step + 1}"
        self.skipped, self.skipped_now = self.skipped + 1, self.skipped_now + 1
        self.skipped_in_a_row += 1
        if not self.skips or self.skipped_in_a_row > MOST_FAULTS:
            if self.skips:
                where = f"{self.skipped_in_a_row} batches in a row had faults; the last: {where}"
            raise self.best.error(where, fault.find())
        if self.skipped == 1 and not fault.elsewhere:
            found = fault.find()
            text = f"fit leaves out a batch, as {where}" + (f": {found}" if found else "")
            warnings.warn(f"{text}; further ones are only counted", stacklevel=7)

    def step_is_over(self) -> None:
        """Move the schedule on, and save where that is due or asked for."""
        if self.scheduler is not None:
            with warnings.catch_warnings():  # it minds if the first batch was left out
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.scheduler.step()
        self.step += 1
        self.bar.update()
        if self.is_alone:
            self.interrupted, self.wants_save = self.interrupts.asked, self.is_due()
        if self.interrupted or self.wants_save:
            self.save()

    def is_due(self) -> bool:
        """Whether a checkpoint within the epoch is."""
        if self.file is None or not distributed.is_main():
            return False
        return time.perf_counter() - self.saved_at > self.seconds_between

    def finish_epoch(self) -> None:
        """Measure, keep what is best, and begin the next epoch."""
        if isinstance(self.objective, PerDatumObjective):
            self.objective.epoch = float(self.epoch)
        if (broken := broken_parameter(self.pair)) is not None:
            raise self.best.error(f"training diverged in epoch {self.epoch}", broken)
        if self.seen == 0:
            what = f"no batch of epoch {self.epoch} was fit to train on"
            raise self.best.error(what, f"{self.skipped_now} were left out")
        row = {
            "epoch": self.epoch,
            "loss": self.loss / self.seen,
            **measure(self.pair, self.monitor, self.objective if self.has_val else None),
            "beta": getattr(self.objective, "beta", 1.0),
            "lr": float(self.optim.param_groups[0]["lr"]),
            "skipped": self.skipped_now,
            "seconds": self.seconds(),
        }
        # training data may hold what is left out, which is then measured, too
        for name in () if self.skips and not self.has_val else ("elbo", "val_loss"):
            if not math.isfinite(row.get(name, 0.0)):
                what = f"{name} became {row[name]} at the end of epoch {self.epoch}"
                raise self.best.error(what, find_fault(self.pair, self.monitor))
        numbers = torch.tensor([float(row[name]) for name in self.history], dtype=torch.float64)
        for name, number in zip(self.history, distributed.from_main(numbers).tolist(), strict=True):
            self.history[name].append(number)
            row[name] = number
        self.bar.set_postfix_str(_progress_text(row))
        self.bar.set_description(f"epoch {self.epoch}/{self.epochs}", refresh=False)
        self.best.update(self.epoch, row.get("val_loss"), counts=self.epoch >= self.warmup)
        self.steps_before = self.step
        self.epoch, self.step, self.order = self.epoch + 1, 0, None
        self.loss, self.seen, self.skipped_now = 0.0, 0, 0

    def save(self) -> None:
        """Write a checkpoint, where there is a place for one."""
        if self.file is None:
            return
        if self.compiler.compiled is not None:
            self.compiler.compiled.leave()
        streams = streams_of_all(self.pair.device)
        if distributed.is_main():
            checkpoints.write(self.file, self.state(streams))
        self.saved_at, self.wants_save = time.perf_counter(), False

    def state(self, streams: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Return all that training goes on from."""
        plain = {name: getattr(self, name) for name in _COUNTED}
        return {
            **plain,
            "settings": self.settings,
            "epochs": self.epochs,
            "order": self.order,
            "history": self.history,
            "kl_method": self.kl_method(),
            # which Pyro's objectives find out at their first step, by drawing from the programs
            "max_plate_nesting": getattr(self.objective, "max_plate_nesting", None),
            "seconds": self.seconds(),
            "seen_grey": self.data.seen_grey,
            "pair": dict(self.pair.state_dict()),
            "best": self.best.state,
            "best_epoch": self.best.epoch,
            "best_val_loss": self.best.val_loss,
            "last": self.best.last,
            "last_epoch": self.best.last_epoch,
            "optimizer": self.optim.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random": streams,
            "random_at_start": self.at_start,
            "versions": versions(),
        }

    def restore(self, saved: dict[str, Any], cosine: bool) -> None:
        """Go on from the state in a checkpoint; nothing of the pair changes where it does not fit.

        Raises:
            ValueError: it is of another run.
        """
        assert self.file is not None
        with _as_written(self.file):
            checkpoints.require_same(self.file, saved["settings"], self.settings)
            if cosine and self.epochs != saved["epochs"]:
                raise ValueError(
                    f"epochs must be {saved['epochs']}, as in the checkpoint, got {self.epochs}: "
                    "with schedule='cosine' every step depends on how many there will be; take "
                    "'constant' to train on, or another folder"
                )
            begun = saved["epoch"] - (saved["step"] == 0)
            if self.epochs < begun:
                raise ValueError(
                    f"epochs must be at least {begun}, which the checkpoint has begun, got "
                    f"{self.epochs}; take another folder for a shorter run"
                )
            wanted = {name: (t.shape, t.dtype) for name, t in self.pair.state_dict().items()}
            for name in ("pair", "best", "last"):
                if {key: (t.shape, t.dtype) for key, t in saved[name].items()} != wanted:
                    raise ValueError(f"{self.file} does not fit the pair, in {name}")
            for name, kind in _KINDS.items():
                if type(saved[name]) not in kind or saved[name] != saved[name]:
                    raise TypeError(f"{name} is {saved[name]!r}")
            if min(saved["epoch"] - 1, saved["step"], saved["seen"]) < 0:
                raise TypeError(f"epoch {saved['epoch']}, step {saved['step']} are none")
            _require_state(self.optim, saved["optimizer"])
            self.optim.load_state_dict(saved["optimizer"])
            lay_out_state(self.optim)
            if self.scheduler is not None:
                hidden = [
                    key for key in saved["scheduler"] if callable(getattr(self.scheduler, key, 0))
                ]
                if hidden:
                    raise TypeError(f"scheduler holds {hidden[0]}, which is no number")
                self.scheduler.load_state_dict(saved["scheduler"])
            for name in _COUNTED:
                setattr(self, name, saved[name])
            self.order, self.history = saved["order"], saved["history"]
            if self.step > 0 and self.data.size is not None:
                places = torch.arange(self.data.size)
                is_long = self.order.dtype == places.dtype
                if not is_long or not torch.equal(self.order.sort().values, places):
                    raise TypeError(f"order is none of {self.data.size} data")
            columns = _columns(self.has_val, self.skips) if self.epoch > 1 else []
            if not {*columns} <= self.history.keys():
                raise TypeError(f"history has no more than {', '.join(self.history)}")
            for column in self.history.values():
                if len(column) != self.epoch - 1 or any(type(v) is not float for v in column):
                    raise TypeError("history is not as long as training was, or holds no numbers")
            self.earlier_kl_method, self.earlier_seconds = saved["kl_method"], saved["seconds"]
            self.data.seen_grey = saved["seen_grey"]
            if saved["max_plate_nesting"] is not None:
                self.objective.max_plate_nesting = saved["max_plate_nesting"]
            self.at_start = saved["random_at_start"]
            number = len(saved["random"])
            if distributed.rank() < number:
                set_streams(saved, "random", self.pair.device, str(self.file))
            elif self.draws_itself:
                checkpoints.set_random_states(saved["random"][0], self.pair.device)
            else:
                part_streams()
            self.best.epoch, self.best.last_epoch = saved["best_epoch"], saved["last_epoch"]
            self.best.val_loss = saved["best_val_loss"]
            self.best.state, self.best.last = saved["best"], saved["last"]
            then, now = saved.get("versions", {}), versions()
            changed = [f"{name} (was {then[name]}, is {now.get(name)})" for name in then
                       if then[name] != now.get(name)]  # fmt: skip
            self.pair.load_state_dict(saved["pair"])
        if not distributed.is_main():
            return
        if changed:
            warnings.warn(
                f"{self.file} was written with other versions: {', '.join(changed)}; training goes "
                "on, but may round otherwise from here on",
                stacklevel=3,
            )
        if not self.draws_itself and number != distributed.world_size():
            warnings.warn(
                f"the run had {number} processes and goes on with {distributed.world_size()}: its "
                "noise is another from here on",
                stacklevel=3,
            )

    @staticmethod
    def _no_compiler() -> CompiledStep:
        raise AssertionError("steps are eager")


_COUNTED = (
    "epoch",
    "step",
    "loss",
    "seen",
    "steps_before",
    "skipped",
    "skipped_now",
    "skipped_in_a_row",
)

_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("epoch", "step", "seen", "best_epoch", "last_epoch"), (int,)),
    **dict.fromkeys(("skipped", "skipped_now", "skipped_in_a_row"), (int,)),
    **dict.fromkeys(("loss", "seconds", "best_val_loss"), _NUMBER),
    "steps_before": (int, type(None)),
    "max_plate_nesting": (*_NUMBER, type(None)),
    "kl_method": (dict,),
    "seen_grey": (bool,),
}

# what kernels that fuse an optimizer's step keep of each parameter, and take to be of its size
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_KEPT = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"}


def streams_of_all(device: torch.device) -> list[dict[str, Tensor]]:
    """Return the states of the random streams of each process."""
    mine = checkpoints.random_states(device)
    every = {name: distributed.gathered(state) for name, state in mine.items()}
    return [
        {name: states[i] for name, states in every.items()} for i in range(distributed.world_size())
    ]


def set_streams(saved: dict[str, Any], name: str, device: torch.device, file: str) -> None:
    """Put the random streams of this process back, where the checkpoint has them."""
    with _as_written(file):
        if distributed.rank() < len(saved[name]):
            checkpoints.set_random_states(saved[name][distributed.rank()], device)


def part_streams() -> None:
    """Give each process but the main one noise of its own, for its items of a Dataset."""
    if distributed.rank() > 0:
        seed = torch.initial_seed() + distributed.rank() * 0x9E3779B97F4A7C15
        torch.manual_seed(seed % 2**63)


def _require_state(optim: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raise a TypeError where the state of an optimizer is none of its parameters."""
    for group, now in zip(saved["param_groups"], optim.state_dict()["param_groups"], strict=True):
        for name, value in now.items():
            fixed = name == "params" or value is None or isinstance(value, bool | str)
            if fixed and group[name] != value:
                raise TypeError(f"optimizer has {name} {group[name]!r}, not {value!r}")
            is_number = isinstance(value, int | float | np.generic)  # the last is saved as a float
            kinds = (*_NUMBER, Tensor) if is_number else type(value)
            is_size = isinstance(group[name], Tensor) and group[name].numel() != 1
            if not isinstance(group[name], kinds) or is_size:
                raise TypeError(f"optimizer has {name} {group[name]!r}, not like {value!r}")
    parameters = [p for group in optim.param_groups for p in group["params"]]
    for i, state in saved["state"].items():
        shape = parameters[range(len(parameters))[i]].shape
        if isinstance(optim, torch.optim.Adam) and None in map(state.get, _ADAM):
            raise TypeError(f"optimizer lacks {', '.join(_ADAM)} of parameter {i}")
        for name, value in state.items():
            size = shape if name in _KEPT else torch.Size() if name == "step" else None
            if size is None or value is None or (name == "step" and type(value) in _NUMBER):
                continue
            if not isinstance(value, Tensor) or value.shape != size:
                raise TypeError(f"optimizer has {name} of another shape than parameter {i}")


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    from . import __version__

    return {"probae": __version__, "torch": str(torch.__version__), "pyro": pyro.__version__}


@contextlib.contextmanager
def _as_written(file: Any) -> Iterator[None]:
    """Say of a checkpoint whose content is not what one holds that it is damaged."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{file} does not hold what a checkpoint does: {type(error).__name__}: {error}"
        ) from error


class Best:
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
        """Give the pair the parameters of its best epoch."""
        self.pair.load_state_dict(self.state)

    @contextlib.contextmanager
    def kept_on_error(self, file: Path | None = None) -> Iterator[None]:
        """Give the pair its parameters of the last good epoch again where training fails."""
        try:
            yield
        except torch.linalg.LinAlgError as error:
            fault = broken_parameter(self.pair) or str(error)
            self.pair.load_state_dict(self.last)
            raise self.error("a matrix lost its rank, or is not finite", fault) from error
        except ConnectionError as error:
            self.pair.load_state_dict(self.last)
            if distributed.world_size() == 1 or file is None:
                raise
            raise ConnectionError(
                f"{error}; training goes on from {file} where all processes are started again "
                "with resume"
            ) from error
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


def _columns(with_val: bool, skips: bool) -> list[str]:
    measured = ["elbo", "reconstruction", "kl", "active_units"]
    val, skipped = ["val_loss"] if with_val else [], ["skipped"] if skips else []
    return ["epoch", "loss", *val, *measured, "beta", "lr", *skipped, "seconds"]


def _progress_text(row: dict[str, float]) -> str:
    text = f"loss {row['loss']:.2f}, elbo {row['elbo']:.2f} nats"
    return text + (f", val loss {row['val_loss']:.2f}" if "val_loss" in row else "")
