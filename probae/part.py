"""What every building block of a pair has in common."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence, Sized
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Shape = int | Sequence[int]

MOST = 2**31  # that is counted, and of one dimension of a tensor

# whether operations are being recorded as a graph, so that no value can be looked at
RECORDING: ContextVar[bool] = ContextVar("probae_recording", default=False)
# laws of corrupted data that a guide made, for its model to take; None outside of objectives
LAWS: ContextVar[dict[Any, Any] | None] = ContextVar("probae_laws", default=None)


class Part(nn.Module):
    """A module that remembers the arguments it was built with.

    ``forward`` of a part of a pair returns a :class:`torch.distributions.Distribution`. The
    remembered arguments are what :func:`probae.save` writes as JSON, so they have to be plain
    values (numbers, strings, booleans, ``None``, sequences of these) or parts.

    Example:
        >>> import torch, probae
        >>> class Bits(probae.Part):
        ...     def __init__(self, z_dim: int) -> None:
        ...         super().__init__()
        ...         self.logits = torch.nn.Parameter(torch.zeros(z_dim))
        ...
        ...     def forward(self) -> torch.distributions.Distribution:
        ...         bits = torch.distributions.Bernoulli(logits=self.logits)
        ...         return torch.distributions.Independent(bits, 1)
        >>> Bits(3)().event_shape
        torch.Size([3])
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
    given = None if isinstance(value, Tensor) else listed(value)
    shape = tuple(given) if isinstance(given, Iterable) else (given,)
    if not shape or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in shape):
        raise ValueError(
            f"{argument} must be a positive int or a non-empty tuple of them, got {value!r}"
        )
    if min(shape) < 1:
        raise ValueError(f"{argument} must have positive entries only, got {value!r}")
    if max(shape) > MOST:
        raise ValueError(f"{argument} must have entries that fit into memory, got {value!r}")
    return tuple(int(n) for n in shape)


def as_widths(value: Shape, argument: str) -> tuple[int, ...]:
    """Return layer widths as a tuple of positive ints; the empty tuple means no hidden layer."""
    if isinstance(value, Sized) and not isinstance(value, Tensor | np.ndarray) and len(value) == 0:
        return ()
    return as_shape(value, argument)


def listed(value: Any) -> Any:
    """Return the numbers of an array or a tensor as Python's own; of one without numbers, None."""
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and not value.is_meta
        return value.tolist() if dense else None
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def numel(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of that shape."""
    return math.prod(shape)


def two_parameters(output: Tensor, dim: int, shape: str) -> tuple[Tensor, Tensor]:
    """Split a network's output into its two parameters, or say which shape it should have."""
    if not -output.dim() <= dim < output.dim() or output.shape[dim] != 2:
        raise ValueError(f"network must have output of shape {shape}, got {tuple(output.shape)}")
    first, second = output.unbind(dim)
    return first, second


def require_positive(value: float, argument: str) -> float:
    """Return ``value`` as a float if it is finite and > 0, or raise a ValueError."""
    if not 0 < as_number(value) < math.inf:
        raise ValueError(f"{argument} must be a finite number > 0, got {value!r}")
    return float(value)


def require_probability(value: float, argument: str) -> float:
    """Return ``value`` as a float if it is strictly between 0 and 1, or raise a ValueError."""
    if not 0 < as_number(value) < 1:
        raise ValueError(f"{argument} must be strictly in (0, 1), got {value!r}")
    return float(value)


def require_count(value: int, argument: str, least: int = 1) -> int:
    """Return ``value`` as an int if it is a whole number >= ``least``, or raise a ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{argument} must be an int >= {least}, got {value!r}")
    if value > MOST:
        raise ValueError(f"{argument} must be an int that a computer can count to, got {value!r}")
    return int(value)


def as_number(value: Any) -> float:
    """Return ``value`` as a float, NaN where it is no real number."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def require_flag(value: bool, argument: str) -> bool:
    """Return ``value`` if it is True or False, or raise a ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False, got {value!r}")
    return value


def require_parameter(value: Tensor, argument: str) -> Tensor:
    """Return ``value`` if it is a dense floating-point tensor, or raise a ValueError."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{argument} must be a floating-point tensor, got {found}")
    if value.is_meta or value.layout != torch.strided:
        raise ValueError(
            f"{argument} must be dense and hold numbers, got {value.layout} on '{value.device}'"
        )
    return value
