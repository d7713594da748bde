"""The noise of a whole batch, of which each process of a group keeps what its share needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class SharedNoise(TorchDispatchMode):
    """Lets a process draw what one process would for the whole batch, and keep its own rows.

    Processes whose random streams are in one state then draw the codes, corruptions and dropout of
    the batch that one process would, however many they are. Random operations are told by torch's
    own tag; the dimension of the batch is the first one of that size. Where none is (noise that all
    data share), nothing is cut. Operations that reject proposals (of a Gamma, say) read the stream
    as the parameters of all rows want, which no process has: their draws are right, but others.

    Args:
        first: place of the share's first datum within the batch.
        count: number of data of the share.
        size: number of data of the batch.
    """

    def __init__(self, first: int, count: int, size: int) -> None:
        super().__init__()
        self.first, self.count, self.size = first, count, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        shapes = [shape for value in args if (shape := _shape(value)) is not None]
        shape = torch.broadcast_shapes(*shapes)
        if self.count not in shape:
            return func(*args, **kwargs)
        place = shape.index(self.count) - len(shape)  # from the right, as shapes broadcast
        drawn = func(*(self._widened(value, place) for value in args), **kwargs)
        if func._schema.is_mutable:  # such as normal_
            return args[0].copy_(self._cut(drawn, place))
        if isinstance(drawn, Tensor):
            return self._cut(drawn, place)
        return type(drawn)(self._cut(part, place) for part in drawn)

    def _widened(self, value: Any, place: int) -> Any:
        """Return an argument as it is for the whole batch."""
        shape = _shape(value)
        if shape is None or len(shape) < -place or shape[place] != self.count:
            return value
        if not isinstance(value, Tensor):
            return [*shape[:place], self.size, *shape[len(shape) + place + 1 :]]
        rows = torch.arange(self.size, device=value.device) - self.first
        return value.index_select(place, rows.clamp(0, self.count - 1))

    def _cut(self, drawn: Tensor, place: int) -> Tensor:
        return drawn.narrow(place, self.first, self.count).clone()


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor, or the size that a factory of tensors was asked for."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    is_size = isinstance(value, list | tuple) and all(isinstance(n, int) for n in value)
    return tuple(value) if is_size else None
