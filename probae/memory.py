"""Memory: how many codes may pass through a decoder at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .autoencoder import Autoencoder, frozen

CHUNK_BYTES = 4 * 2**20  # widest activation of one pass through the decoder; fits in cache
GPU_BYTES = 64 * CHUNK_BYTES  # the same on a GPU, which small passes leave idle


def rows_in_budget(pair: Autoencoder) -> int:
    """Return the number of codes whose widest activation takes that many bytes, at least 1."""
    size = torch.empty((), dtype=pair.dtype).element_size()
    budget = CHUNK_BYTES if pair.device.type == "cpu" else GPU_BYTES
    return max(1, budget // (size * _widest(pair)))


def _widest(pair: Autoencoder) -> int:
    """Elements of the widest activation of the decoder for one code."""
    widths = [math.prod(pair.x_shape)]
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output: (
                widths.append(output.numel()) if isinstance(output, Tensor) else None
            )
        )
        for module in pair.decoder.modules()
    ]
    try:
        with frozen(pair, seed=0):
            pair.decoder(pair.prior().sample(torch.Size((1,))))
    finally:
        for hook in hooks:
            hook.remove()
    return max(widths)


def counts(total: int, most: int) -> Iterator[int]:
    """Split ``total`` samples into blocks of at most ``most``."""
    for start in range(0, total, most):
        yield min(most, total - start)
