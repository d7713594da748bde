"""How tensors lie in memory, which some kernels are faster for, and others do not look at.

torch's fused optimizers go through a parameter, its gradient and their state from the first number
to the last, wherever in the tensor these are.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .networks import MLP


@contextlib.contextmanager
def weights_transposed(module: nn.Module) -> Iterator[None]:
    """Let the weights W of perceptrons on a CPU lie in memory as Wᵀ inside.

    So x Wᵀ of a batch x is had a tenth sooner. Not for longer: Pyro trains copies of parameters
    that lie otherwise than usual, and modules would not see what it does. Weights whose memory is
    another's, too, stay as they are; so do those of networks not ours, which may look at strides.
    """
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    owners = Counter(storage_address(tensor) for tensor in tensors)
    weights = {
        id(layer.weight): layer.weight
        for network in module.modules()
        if isinstance(network, MLP)
        for layer in network.layers
        if type(layer) is nn.Linear and "weight" in layer._parameters
        if layer.weight.device.type == "cpu" and not layer.weight.is_shared()
        if layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
        if owners[storage_address(layer.weight)] == 1
    }.values()
    usual = [weight.data for weight in weights]
    for weight in weights:
        _put(weight, weight.data.t().contiguous().t())
    try:
        yield
    finally:
        for weight, data in zip(weights, usual, strict=True):
            _put(weight, data.copy_(weight.data))


class PackTheSmaller(TorchDispatchMode):
    """Multiplies matrices in the order in which oneDNN has less to lay out anew: B if by columns.

    .. math:: AB = (B^T A^T)^T
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Swap the factors of a product where that helps."""
        if function is torch.ops.aten.mm.default and _packs_the_larger(*args):
            return function(args[1].t(), args[0].t()).t()
        return function(*args, **(kwargs or {}))


def _packs_the_larger(a: Tensor, b: Tensor) -> bool:
    by_columns = b.stride(0) == 1 < b.stride(1) and a.stride(1) == 1
    return by_columns and a.numel() < b.numel() and a.device.type == "cpu"


def storage_address(tensor: Tensor) -> int:
    """Return where the memory of a tensor is, which tensors may share."""
    return tensor.untyped_storage().data_ptr()


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
        if gradient is not None and gradient.layout is torch.strided:
            gradient = laid_out(gradient, p.stride())
        p.grad = gradient


def lay_out_state(optim: torch.optim.Optimizer) -> None:
    """Lay the state of an optimizer out as its parameters are; checkpoints hold it contiguous."""
    for p in (p for group in optim.param_groups for p in group["params"]):
        for name, value in optim.state[p].items() if p in optim.state else ():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim() > 1:
                optim.state[p][name] = laid_out(value, p.stride())
