"""What every building block of a pair has in common."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

Shape = int | Sequence[int]


class Part(nn.Module):
    """A module that remembers the arguments it was built with.

    ``forward`` of a part of a pair returns a :class:`torch.distributions.Distribution`. The
    remembered arguments are what :func:`probae.save` writes as JSON, so they have to be plain
    values (numbers, strings, booleans, ``None``, sequences of these) or parts.
    """

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Part:
        """Remember the arguments of the constructor."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls).bind(*args, **kwargs)
        except TypeError:
            return self  # __init__ raises the same error, with the traceback users expect
        bound.apply_defaults()
        object.__setattr__(self, "_arguments", dict(bound.arguments))
        return self

    def initialize(self, x: Tensor) -> None:
        """Set starting values from training data ``x`` of shape (N, *x_shape); default: none."""


def as_shape(value: Shape, argument: str) -> tuple[int, ...]:
    """Return ``value`` as a tuple of positive ints, or raise a ValueError naming ``argument``."""
    shape = (value,) if isinstance(value, int) else tuple(value)
    if not shape or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise ValueError(
            f"{argument} must be a positive int or a non-empty tuple of them, got {value!r}"
        )
    if min(shape) < 1:
        raise ValueError(f"{argument} must have positive entries only, got {value!r}")
    return shape


def as_widths(value: Shape, argument: str) -> tuple[int, ...]:
    """Return layer widths as a tuple of positive ints; the empty tuple means no hidden layer."""
    if not isinstance(value, int) and len(value) == 0:
        return ()
    return as_shape(value, argument)


def numel(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of that shape."""
    return prod(shape)


def require_positive(value: float, argument: str) -> float:
    """Return ``value`` as a float if it is finite and > 0, or raise a ValueError."""
    if isinstance(value, bool) or not 0 < float(value) < float("inf"):
        raise ValueError(f"{argument} must be a finite number > 0, got {value!r}")
    return float(value)
