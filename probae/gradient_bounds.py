"""Whether gradients are finite, at less than a look at each of their entries.

A gradient of a layer's weights is a product of matrices, often far smaller ones: what these are is
noted while autograd multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .layout import storage_address


class Products(TorchDispatchMode):
    """Knows of tensors made meanwhile what matrices they are the products of."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, tuple[Tensor, ...]] = {}  # by address: both factors, and the product

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take note of products, which are kept, as another tensor would get their memory."""
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.of[storage_address(result)] = (*args, result)
        elif function._schema.is_mutable:
            self._forget([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        return result

    def _forget(self, tensors: list[Tensor]) -> None:
        """Forget what may have changed, as a product or as a factor."""
        changed = {storage_address(tensor) for tensor in tensors}
        self.of = {
            address: known
            for address, known in self.of.items()
            if changed.isdisjoint(map(storage_address, known))
        }

    def bounds(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        """Yield a number of each tensor that is not finite where an entry is not.

        Of a product with more entries than its factors it is by Cauchy and Schwarz |AB| <= |A| |B|,
        where fewer numbers are read; of any other tensor its sum, in two steps, as Inductor is slow
        at long sums.
        """
        for tensor in tensors:
            *factors, product = self.of.get(storage_address(tensor), (tensor,))
            if factors and sum(factor.numel() for factor in factors) < product.numel():
                a, b = factors
                yield _squared_norm(a).sqrt() * _squared_norm(b).sqrt()
            else:
                yield tensor.sum(0).sum()


def _squared_norm(matrix: Tensor) -> Tensor:
    rows = matrix if matrix.is_contiguous() else matrix.t()
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.square().sum(-1).sum()
