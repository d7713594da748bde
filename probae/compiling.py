"""One SVI step as one compiled graph: what :func:`probae.fit` computes eagerly, only faster.

The graph holds the gather of the batch, the objective on the real Pyro programs, the gradients and
Adam's update (:mod:`probae.graphs` tells how graphs are recorded and compiled). What changes from
step to step (learning rate, weight of the KL, Adam's bias corrections) is a tensor that the graph
reads. Whatever the record does not show would be a constant, silently; so each new graph is first
compared with eager steps, on two batches and at two epochs.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .autoencoder import Autoencoder, RandomState, random_state, set_random_state
from .batches import TrainingData
from .checks import chunks
from .corruptions import Corruption
from .cuda_graphs import CannotCapture, CudaGraph
from .distributions import draw_bits
from .gradient_bounds import Products
from .graph_constants import SWITCHES, GraphConstants
from .graphs import CannotCompile, machine_code, record, require_equal
from .layout import set_gradients
from .objectives import ELBO, at_the_end
from .precision import products_in

WORTH = 30.0  # seconds that a run has to take eagerly for "auto" to compile
OVERHEAD, RATE = 4e-3, 1e11  # seconds of an eager step beside products, operations a second in them
MOMENTS = ("exp_avg", "exp_avg_sq")  # in the state of torch's Adam


class Accelerator:
    """Takes the steps that it can take as one compiled graph, and leaves the others to the caller.

    The first step is always the caller's (it runs under Pyro's checks and makes the optimizer's
    state); so are a batch of another size, such as the last of an epoch, and a step whose loss is
    not finite. Both kinds of step work on the same tensors. Once something that the graph takes for
    constant has changed, all steps are the caller's.

    Args:
        mode: True, False, or ``"auto"``: compile if the run would take longer than ``WORTH``
            seconds eagerly, by a rule of thumb: a clock would make results depend on it.
        make: makes the compiled step, once it is due.
        batch_size: number of data of the steps to compile.
        steps: number of steps of the run; None where it is not known: ``"auto"`` then compiles
            once it took ``WORTH`` seconds of steps eagerly.
        seconds: of an eager step, see :func:`eager_seconds`.
    """

    def __init__(
        self,
        mode: bool | str,
        make: Callable[[], CompiledStep],
        batch_size: int = 0,
        steps: int | None = 0,
        seconds: float = 0.0,
    ) -> None:
        if too_short := mode == "auto" and steps is not None and steps * seconds < WORTH:
            mode = False
        self.mode, self.make, self.batch_size = mode, make, batch_size
        self.eager_steps = 1  # to be taken before
        if mode == "auto" and steps is None:
            self.eager_steps = math.ceil(WORTH / seconds)
        self.compiled: CompiledStep | None = None
        self.seconds = 0.0  # spent on compiling
        self.eager_because = "the run is too short" if too_short or mode else "compile=False"

    def is_due(self, source: Tensor) -> bool:
        """Whether the next step is the one to be compiled, which takes a while."""
        waits = self.compiled is not None or self.mode is False or self.eager_steps > 0
        return not waits and len(source) == self.batch_size

    def step(self, source: Tensor) -> float | None:
        """Take a step and return its loss, summed over data, or None: it is the caller's to take.

        ``source`` holds the places of the data of the batch, or, of a Dataset, the batch.
        """
        if self.is_due(source):
            self._compile(source)
        self.eager_steps -= 1
        if self.compiled is None:
            return None
        if (changed := self.compiled.changed()) is not None:
            self.compiled.leave()
            self.compiled = None
            self._give_up(f"{changed} changed, which a graph takes for constant", stacklevel=8)
            return None
        if len(source) == self.batch_size:
            return self.compiled.step(source)
        self.compiled.leave()
        return None

    def watch_anew(self) -> None:
        """Wait for a whole eager step again, as after one that was left out with its gradients."""
        self.eager_steps = max(1, self.eager_steps)

    def leave(self) -> None:
        """Tell the optimizer how many steps there were."""
        if self.compiled is not None:
            self.compiled.leave()

    def _compile(self, source: Tensor) -> None:
        start = time.perf_counter()
        compiled = self.make()
        try:
            if compiled.compile(source):
                self.compiled, self.eager_because = compiled, ""
        except CannotCompile as error:
            if self.mode is True:
                raise
            self._give_up(str(error), stacklevel=9)
        finally:
            self.seconds += time.perf_counter() - start

    def _give_up(self, because: str, stacklevel: int) -> None:
        self.mode, self.eager_because = False, because
        warnings.warn(
            f"fit takes its steps eagerly, and so more slowly, because {because}; with "
            "compile=False it does not try",
            stacklevel=stacklevel + 1,  # of who called fit
        )


def eager_seconds(pair: Autoencoder, objective: Any, batch_size: int) -> float:
    """Guess how long an eager step takes: its products, and some overhead."""
    return OVERHEAD + operations(pair, objective, batch_size) / RATE


def operations(pair: Autoencoder, objective: Any, batch_size: int) -> int:
    """Guess how many operations the products of a step take: six a weight and datum."""
    weights = sum(p.numel() for p in pair.parameters())
    return 6 * weights * batch_size * getattr(objective, "num_particles", 1)


class CompiledStep:
    """One SVI step of a pair as one graph, on the tensors of the pair and of its optimizer.

    With Adam and AdamW the graph makes the update, too; any other optimizer gets the gradients.
    Make it after a first eager step, which tells what parameters have gradients, and use it where
    ``fit`` takes its steps: gradients on, parameters local.
    """

    def __init__(
        self,
        pair: Autoencoder,
        objective: Any,
        data: TrainingData,
        optim: torch.optim.Optimizer,
        clip_norm: float | None,
        precision: str = "float32",
    ) -> None:
        self.pair, self.objective, self.data, self.optim = pair, objective, data, optim
        self.clip_norm, self.precision, self.device = clip_norm, precision, pair.device
        groups = {id(p): k for k, g in enumerate(optim.param_groups) for p in g["params"]}
        # the optimizer leaves a parameter without a gradient alone
        trained = {
            name: p for name, p in pair.named_parameters() if id(p) in groups and p.grad is not None
        }
        tensors = dict([*pair.named_parameters(), *pair.named_buffers()])
        others = {name: tensor for name, tensor in tensors.items() if name not in trained}
        self.names, self.other_names = list(trained), list(others)  # others: buffers, mostly
        self.parameters = list(trained.values())
        self.groups = [groups[id(p)] for p in self.parameters]
        self.ids = [id(tensor) for tensor in (*trained.values(), *others.values())]
        self.others = [tensor.detach() for tensor in others.values()]
        self.adam = _is_plain_adam(optim, self.parameters)
        self.decays = [_decay(optim, k) for k in range(len(optim.param_groups) * self.adam)]
        moments = [optim.state[p][m] for m in MOMENTS for p in self.parameters if self.adam]
        # by the count of the graph
        self.steps = torch.zeros((), dtype=torch.float64, device=self.device)
        self.state = [*(p.detach() for p in self.parameters), *self.others, *moments, self.steps]
        self.rows = 0  # of the batches that the graph takes
        self.own_steps = 0  # of which the optimizer does not know
        self.counts = False  # whether the graph knows how many there were; on a GPU a look is slow
        self.settings: list[float] = []
        self.constants = GraphConstants(pair, self.objective, optim)
        self.addresses = self._addresses()
        self.captured: CudaGraph | None = None
        self.not_captured_because = "the pair is on the CPU"

    def compile(self, source: Tensor) -> bool:
        """Make the graph for batches of this size, and compare it with eager steps.

        Returns False where the batch at hand has a fault, so that it tells nothing.

        Raises:
            CannotCompile: a program branches on values; there is no compiler; results differ.
        """
        self._require_seen()
        noise, self.rows = random_state(self.device), len(source)
        if self._gathers and not self.data.binarize:
            for rows, _ in chunks(self.data.tensor):
                self._check_domain(rows)
        try:
            with pyro.validation_enabled(False):
                if not self._compile(source, noise):
                    return False
            if self.device.type == "cuda":
                self._capture(source)
        except CannotCompile:
            raise
        except Exception as error:  # of a user's own program, on other data or at another epoch
            raise CannotCompile(
                f"a look at other steps met {type(error).__name__}: {error}"
            ) from error
        finally:
            set_random_state(noise, self.device)
            self.constants.put_back()
        return True

    def _require_seen(self) -> None:
        """Refuse what the graph would leave out, and the comparison with eager steps, too."""
        named = dict(self.pair.named_parameters())
        own = {id(p) for p in named.values()}
        trained = [p for group in self.optim.param_groups for p in group["params"]]
        if any(p.grad is not None and id(p) not in own for p in trained):
            raise CannotCompile("the optimizer trains a parameter that is none of the pair's")
        for name, p in named.items():
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise CannotCompile(f"parameter {name} has a hook for its gradient")

    def _compile(self, source: Tensor, noise: RandomState) -> bool:
        try:
            first = self._eagerly(source)
        except torch.linalg.LinAlgError:
            return False
        if not first["loss"].isfinite():
            return False
        if (changed := self.constants.changed()) is not None:
            raise CannotCompile(f"{changed} changes from step to step, and is no tensor in place")
        self.written = [  # the statistics of a batch norm, say
            not torch.equal(first[name], tensor)
            for name, tensor in zip(self.other_names, self.others, strict=True)
        ]
        state = [tensor.clone() for tensor in self.state]  # recording a step takes it
        inputs = [*self._drawn_from(source), self._numbers(), *state]
        graph = record(self._computed, inputs)
        for node in graph.graph.find_nodes(op="get_attr"):
            constant = getattr(graph, str(node.target))
            if isinstance(constant, Tensor) and constant.requires_grad:
                raise CannotCompile(
                    "it reaches a tensor that requires gradients by another way than the pair's "
                    "parameters"
                )
        self.run = machine_code(graph, inputs)
        set_random_state(noise, self.device)
        self._require_equal(self._compiled(source), first)
        set_random_state(noise, self.device)
        with at_the_end(self.objective):
            for shift in range(1, 10):  # to a batch without a fault, too
                another = (source + shift) % len(self.data) if self._gathers else source.flip(0)
                with contextlib.suppress(torch.linalg.LinAlgError):
                    second = self._eagerly(another)
                    if second["loss"].isfinite():
                        self._require_equal(self._compiled(another), second)
                        return True
        raise CannotCompile("no other batch without a fault was found to compare it on")

    def _capture(self, source: Tensor) -> None:
        """Make one launch of the graph's many, where the GPU can do it all without the CPU."""
        run = partial(self.run, self.data.tensor) if self._gathers else self.run
        try:
            self.captured = CudaGraph(run, [source, self._numbers()], self.state)
        except CannotCapture as error:
            self.not_captured_because = str(error)
            warnings.warn(
                f"fit launches the operations of its compiled steps one by one, because {error}",
                stacklevel=11,  # of who called fit
            )
        else:
            self.not_captured_because = ""

    def step(self, source: Tensor) -> float | None:
        """Take a step and return the loss; None where an eager step is due, and all is as before.

        It is where the loss or a gradient is not finite, or a bound of gradients overflows.
        """
        value = self._taken(source, self._numbers())
        if value is None:
            self.leave()
        return value

    def go_on(self, sources: Iterator[Tensor], seconds: float) -> tuple[list[float], Tensor | None]:
        """Take steps for that long, at the settings of now; between them is next to nothing.

        Returns their losses, and a batch that is the caller's to take, where it came to one.
        """
        losses = list[float]()
        if self.changed() is not None:
            return losses, None
        until, numbers = time.perf_counter() + seconds, self._numbers()
        for source in sources:
            value = self._taken(source, numbers) if len(source) == self.rows else None
            if value is None:
                return losses, source
            losses.append(value)
            if time.perf_counter() > until:
                break
        return losses, None

    def _taken(self, source: Tensor, numbers: Tensor) -> float | None:
        """Take a step and return its loss; None where it is not finite, and all is as before."""
        noise = random_state(self.device)
        if not self.adam:  # an optimizer may give parameters other memory
            for p, taken in zip(self.parameters, self.state, strict=False):
                if p.data_ptr() != taken.data_ptr():
                    taken.copy_(p.detach())
        if self.captured is not None:
            loss, *gradients = self.captured(source, numbers)
        else:
            loss, *gradients = self.run(*self._drawn_from(source), numbers, *self.state)
        value = float(loss)
        if not math.isfinite(value):
            set_random_state(noise, self.device)
            return None
        self.own_steps += 1
        if not self.adam:
            set_gradients(self.parameters, gradients)
            self.optim.step()
        return value

    def leave(self) -> None:
        """Tell the optimizer how many steps there were, before it takes one of its own."""
        if self.adam:
            for parameter in self.parameters:
                if parameter in self.optim.state:  # a schedule may have begun it anew
                    self.optim.state[parameter]["step"] += self.own_steps
        self.own_steps, self.counts = 0, False

    def changed(self) -> str | None:
        """Name something that the graph takes for constant, and that has changed since."""
        if self.decays != [_decay(self.optim, k) for k in range(len(self.decays))]:
            return "whether weights decay"
        if self.addresses != self._addresses():
            return "the memory of parameters, or the state of the optimizer"
        return self.constants.changed()

    def _addresses(self) -> list[int]:
        """Return where the tensors are that the graph writes to, if it makes the update."""
        if not self.adam:
            return []
        states = [self.optim.state.get(p, {}) for p in self.parameters]
        moments = [state[m] for m in MOMENTS for state in states if m in state]
        return [tensor.data_ptr() for tensor in (*self.parameters, *moments)]

    @property
    def _gathers(self) -> bool:
        """Whether the graph gathers the batch; that of a Dataset is made outside."""
        return self.data.dataset is None

    def _check_domain(self, x: Tensor) -> None:
        """Refuse data that the corruption does not take; the graph does not look."""
        if isinstance(self.pair.corruption, Corruption):
            self.pair.corruption(x)

    def _drawn_from(self, source: Tensor) -> list[Tensor]:
        if self._gathers:
            return [self.data.tensor, source]
        self._check_domain(source)
        return [source.contiguous()]

    def _numbers(self, **replaced: Any) -> Tensor:
        """Return all that may change from step to step, in the order that `_computed` expects."""
        if self.adam and not self.counts:
            self.steps.fill_(float(self.optim.state[self.parameters[0]]["step"]))
            self.counts = True
        settings = [float(getattr(self.objective, "beta", 1.0)), self.clip_norm or math.inf]
        for group in self.optim.param_groups if self.adam else ():
            group = group | replaced if replaced else group
            values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            settings += map(float, values)
        if settings != self.settings:  # a new tensor takes longer than some kernels
            self.settings = settings
            self.numbers = torch.tensor(settings, dtype=torch.float64, device=self.device)
        return self.numbers

    def _computed(self, *inputs: Tensor) -> list[Tensor]:
        """Take a step as a function of tensors, which is what the graph holds."""
        if self._gathers:
            (x, index), inputs = inputs[:2], inputs[2:]
            batch = draw_bits(x[index]) if self.data.binarize else x[index]
        else:
            batch, inputs = inputs[0], inputs[1:]
        numbers, state, n = inputs[0], inputs[1:], len(self.parameters)
        parameters, others = state[:n], state[n : n + len(self.others)]
        m, v = state[n + len(others) :][:n], state[n + len(others) :][n:-1]

        leaves = [p.detach().requires_grad_() for p in parameters]
        used = [tensor.clone() for tensor in others]
        tensors = dict(zip(self.ids, (*leaves, *used), strict=True))
        objective = _with_weight(self.objective, numbers[0].to(batch.dtype))
        with _swapped(self.pair, tensors), products_in(self.precision):
            loss = objective.differentiable_loss(self.pair.model, self.pair.guide, batch)
        with Products() as products:
            gradients = list(torch.autograd.grad(loss / len(batch), leaves))
        finite = sum(products.bounds(gradients), start=loss.detach()).isfinite()
        loss = torch.where(finite, loss.detach(), math.nan)
        if self.clip_norm is not None:
            gradients = _clipped(gradients, numbers[1])

        def update(tensor: Tensor, value: Tensor) -> None:
            tensor.copy_(torch.where(finite, value, tensor))

        for tensor, value, written in zip(others, used, self.written, strict=True):
            if written:
                update(tensor, value)
        if not self.adam:
            return [loss, *gradients]
        steps = state[-1] + 1
        settings = numbers[2:].unflatten(0, (len(self.optim.param_groups), -1))
        rates = {dtype: _rates(settings, steps, dtype) for dtype in {p.dtype for p in parameters}}
        update(state[-1], steps)
        for k, p in enumerate(parameters):
            group = self.groups[k]
            new = _adam(p, gradients[k], m[k], v[k], rates[p.dtype][group], self.decays[group])
            for tensor, value in zip((p, m[k], v[k]), new, strict=True):
                update(tensor, value)
        return [loss]

    def _eagerly(self, source: Tensor) -> dict[str, Tensor]:
        """Return what a step computes, by name, without taking it."""
        noise, before = random_state(self.device), [tensor.clone() for tensor in self.others]
        batch = self.data.batch(source) if self._gathers else source
        try:
            with products_in(self.precision):
                loss = self.objective.differentiable_loss(self.pair.model, self.pair.guide, batch)
            gradients = list(torch.autograd.grad(loss / len(batch), self.parameters))
            if self.clip_norm is not None:
                gradients = _clipped(gradients, torch.tensor(self.clip_norm))
            after = [tensor.clone() for tensor in self.others]
        finally:
            for tensor, value in zip(self.others, before, strict=True):
                tensor.copy_(value)
            set_random_state(noise, self.device)
        return self._named(loss.detach(), gradients, after)

    def _compiled(self, source: Tensor) -> dict[str, Tensor]:
        """Return what the graph computes, by name, on copies of all tensors."""
        n, state = len(self.parameters), [tensor.clone() for tensor in self.state]
        for moment in state[n + len(self.others) : -1]:
            moment.zero_()
        # with these numbers the first moments become the gradients
        numbers = self._numbers(betas=(0.0, 0.0), weight_decay=0.0)
        loss, *gradients = self.run(*self._drawn_from(source), numbers, *state)
        if self.adam:
            gradients = state[n + len(self.others) :][:n]
        return self._named(loss, gradients, state[n:][: len(self.others)])

    def _require_equal(self, values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        coarse = 3e-2 if self.precision == "bf16" else 1e-3
        names = list(expected)
        require_equal([values[name] for name in names], list(expected.values()), names, coarse)

    def _named(
        self, loss: Tensor, gradients: list[Tensor], others: list[Tensor]
    ) -> dict[str, Tensor]:
        names = ["loss", *(f"gradient of {n}" for n in self.names), *self.other_names]
        return dict(zip(names, (loss, *gradients, *others), strict=True))


@contextlib.contextmanager
def _swapped(module: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Let a module use other parameters and buffers, given by the id of those that it has.

    Unlike :func:`torch.func.functional_call` this leaves a module that has two names as it was.
    """
    owners = [owner for m in module.modules() for owner in (m._parameters, m._buffers)]
    places: list[tuple[dict[str, Any], str, Any]] = [
        (owner, name, tensor)
        for owner in owners
        for name, tensor in owner.items()
        if id(tensor) in tensors
    ]
    try:
        for owner, name, tensor in places:
            owner[name] = tensors[id(tensor)]
        yield
    finally:
        for owner, name, tensor in places:
            owner[name] = tensor


def _with_weight(objective: Any, beta: Tensor) -> Any:
    """Return the objective with a tensor as the weight of the KL, where it has one."""
    if not isinstance(objective, ELBO):
        return objective
    objective = copy.copy(objective)
    objective.schedule, objective.constant_beta = None, beta
    return objective


def _rates(settings: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `_adam` multiplies by, of each group, from its settings and the steps so far.

    The correction of v is in lr and eps, where it costs no division (Kingma & Ba, 2015, section 2).
    """
    lr, beta1, beta2, eps, decay = settings.unbind(-1)
    correction1, correction2 = 1 - beta1**steps, (1 - beta2**steps).sqrt()
    step_size = lr * correction2 / correction1
    rates = (lr, step_size, 1 - beta1, 1 - beta2, eps * correction2, decay)
    return torch.stack([rate.to(dtype) for rate in rates], -1)


def _adam(
    p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, rates: Tensor, decay: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameter and moments after a step of Adam, or AdamW where decay is decoupled."""
    lr, step_size, rate1, rate2, eps, weight = rates.unbind()
    if decay == "decoupled":
        p = p - lr * weight * p
    elif decay == "in the gradient":  # adding a weight of 0 would cost a pass over the parameters
        gradient = gradient + weight * p
    m = _flushed(m + rate1 * (gradient - m))
    v = _flushed(v + rate2 * (gradient.square() - v))
    return p - step_size * m / (v.sqrt() + eps), m, v


def _flushed(moment: Tensor) -> Tensor:
    """Return the tensor without denormals, which are slow, and which moments at rest end in."""
    return torch.where(moment.abs() < torch.finfo(moment.dtype).tiny, 0.0, moment)


def _clipped(gradients: list[Tensor], max_norm: Tensor) -> list[Tensor]:
    """Return gradients clipped as by :func:`torch.nn.utils.clip_grad_norm_`."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor.to(gradient.dtype) for gradient in gradients]


def _is_plain_adam(optim: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether the graph can make the optimizer's update, from the state the optimizer has."""
    step = vars(optim).get("step")
    return (
        type(optim) in (torch.optim.Adam, torch.optim.AdamW)
        and not any(group.get(name) for group in optim.param_groups for name in SWITCHES)
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))  # as schedulers wrap it
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
        and not optim._optimizer_step_pre_hooks
        and not optim._optimizer_step_post_hooks
        and all(set(MOMENTS) < set(optim.state[p]) for p in parameters)
        and len({float(optim.state[p]["step"]) for p in parameters}) == 1
    )


def _decay(optim: torch.optim.Optimizer, group: int) -> str:
    """Return how the weights of a group decay."""
    settings = optim.param_groups[group]
    if settings["weight_decay"] == 0:
        return "none"
    default = isinstance(optim, torch.optim.AdamW)
    return "decoupled" if settings.get("decoupled_weight_decay", default) else "in the gradient"
