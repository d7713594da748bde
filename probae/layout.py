"""How tensors lie in memory, which some kernels are faster for, and others do not look at.

torch's fused optimizers go through a parameter, its gradient and their state from the first number
to the last, wherever in the tensor these are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def weights_transposed(module: nn.Module) -> Iterator[None]:
    """Let the weights W of linear layers on a CPU lie in memory as Wᵀ inside.

    So x Wᵀ of a batch x is had a tenth sooner. Not for longer: Pyro trains copies of parameters
    that lie otherwise than usual, and modules would not see what it does.
    """
    layers = [m for m in module.modules() if type(m) is nn.Linear and "weight" in m._parameters]
    weights = {id(m.weight): m.weight for m in layers if m.weight.device.type == "cpu"}.values()
    usual = [weight.data for weight in weights]
    for weight in weights:
        _put(weight, weight.data.t().contiguous().t())
    try:
        yield
    finally:
        for weight, data in zip(weights, usual, strict=True):
            _put(weight, data.copy_(weight.data))


def _put(parameter: Tensor, data: Tensor) -> None:
    """Let a parameter, and its gradient, lie as these data do."""
    parameter.data = data
    if parameter.grad is not None:
        parameter.grad = laid_out(parameter.grad, data.stride())


def laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the tensor itself where it has these strides, or a copy that has."""
    if tensor.stride() == stride:
        return tensor
    there = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return there.copy_(tensor)


def set_gradients(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """Give parameters gradients that lie as they do, as those of ``backward`` always do."""
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = None if gradient is None else laid_out(gradient, p.stride())


def lay_out_state(optim: torch.optim.Optimizer) -> None:
    """Lay the state of an optimizer out as its parameters are; checkpoints hold it contiguous."""
    for p in (p for group in optim.param_groups for p in group["params"]):
        for name, value in optim.state[p].items() if p in optim.state else ():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim() > 1:
                optim.state[p][name] = laid_out(value, p.stride())
