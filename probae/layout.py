"""How tensors lie in memory, which some kernels do not look at.

torch's fused optimizers go through a parameter, its gradient and their state from the first number
to the last, wherever in the tensor these are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def storage_address(tensor: Tensor) -> int:
    """Return where the memory of a tensor is, which tensors may share."""
    return tensor.untyped_storage().data_ptr()


def laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the tensor itself where it has these strides, or a copy that has."""
    if tensor.stride() == stride:
        return tensor
    there = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return there.copy_(tensor)


def set_gradients(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """Give parameters gradients that lie as they do, as those of ``backward`` always do."""
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and gradient.layout is torch.strided:
            gradient = laid_out(gradient, p.stride())
        p.grad = gradient


def lay_out_state(optim: torch.optim.Optimizer) -> None:
    """Lay the state of an optimizer out as its parameters are; checkpoints hold it contiguous."""
    for p in (p for group in optim.param_groups for p in group["params"]):
        for name, value in optim.state[p].items() if p in optim.state else ():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim() > 1:
                optim.state[p][name] = laid_out(value, p.stride())
