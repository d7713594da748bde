"""Products of matrices: in bfloat16, with all else in float32, or in float32 by oneDNN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PRECISIONS = ("float32", "bf16")
PRODUCTS = frozenset(
    (
        functional.linear,
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )
)
# the setting of CPU products alone, from torch 2.9 on: the older one sets CUDA's too, for good, and
# fails where a user has set any of the newer
MATMUL: Any = getattr(torch.backends.mkldnn, "matmul", None)


class Bfloat16Products(TorchFunctionMode):
    """Lets linear and convolutional layers multiply in bfloat16, and return float32.

    Autocast leaves the outputs of layers in bfloat16, and with them the densities, whose sums over
    pixels would lose most of their digits; here all but the products themselves, forward and
    backward, stays float32: biases are added to what comes back. Parameters are float32, too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func not in PRODUCTS:
            return func(*args, **named)
        named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **named}
        x, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
        if x.dtype is not torch.float32:
            return func(x, weight, bias, *args[3:], **named)
        # with the bias a library rounds once, machine code by parts twice: other ReLUs are off
        product = func(x.bfloat16(), weight.bfloat16(), None, *args[3:], **named).float()
        return product if bias is None else product + bias.reshape(-1, *[1] * (weight.dim() - 2))


def require_precision(precision: Any, dtype: torch.dtype) -> None:
    """Raise a ValueError unless a pair of this dtype can be trained in that precision."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision must be 'float32' or 'bf16', got {precision!r}")
    if precision == "bf16" and dtype is not torch.float32:
        raise ValueError(
            f"precision='bf16' needs a pair of float32 parameters, got {dtype}; call pair.float()"
        )


def products_in(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which layers multiply in that precision."""
    return Bfloat16Products() if precision == "bf16" else contextlib.nullcontext()


@contextlib.contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices by oneDNN inside, where that is as exact as by torch's default."""
    if device.type == "cpu" and _is_free() and _onednn_keeps_float32():
        with _by_onednn():
            yield
    else:
        yield


def setting() -> str:
    """Return what torch is told of the precision of float32 products on CPUs."""
    return torch.get_float32_matmul_precision() if MATMUL is None else MATMUL.fp32_precision


def products_are_float32() -> bool:
    """Whether torch multiplies float32 matrices on CPUs without a loss of digits, as it is set."""
    return setting() in ("highest", "ieee", "none") or _onednn_keeps_float32()


def _is_free() -> bool:
    """Whether no lower precision is chosen, and the setting can be put back as it is."""
    if MATMUL is None:
        return setting() == "highest"
    # an inherited "ieee" reads like its own, and put back as that would be inherited no more
    inherited = torch.backends.mkldnn.fp32_precision
    return setting() == "none" or setting() == "ieee" != inherited


@contextlib.contextmanager
def _by_onednn() -> Iterator[None]:
    before = setting()
    try:
        _set("medium" if MATMUL is None else "bf16")
        yield
    finally:
        _set(before)


def _set(value: str) -> None:
    if MATMUL is None:
        torch.set_float32_matmul_precision(value)
    else:
        MATMUL.fp32_precision = value


@cache
def _onednn_keeps_float32() -> bool:
    """Whether "bf16" still multiplies in float32, as it does on chips without AMX."""
    a, b = torch.linspace(-1, 1, 512 * 512).cos().reshape(2, 512, 256)
    with _by_onednn():
        product = a @ b.T
    exact = a.double() @ b.double().T
    return bool((product - exact).norm() < 1e-5 * exact.norm())  # bfloat16: about 1e-3
