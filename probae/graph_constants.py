"""What the graph of a step takes for constant, and code of a user's own may change all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .objectives import is_known

PLAIN = (bool, int, float, str, type(None))
OF_TRAINING = ("epoch", "max_plate_nesting", "kl_method")  # attributes of objectives, set by fit
SWITCHES = ("amsgrad", "maximize", "differentiable", "capturable")  # of optimizers


class GraphConstants:
    """A note of numbers, switches and tensors as they are now, of which `changed` names another.

    Numbers inside of containers and of other objects are not seen.
    """

    def __init__(self, pair: Autoencoder, objective: Any, optim: torch.optim.Optimizer) -> None:
        self.optim, self.parameters = optim, dict(pair.named_parameters())
        self.noted = [
            (name, owner, key, value)
            for name, owner in _owners(pair, objective)
            for key, value in owner.items()
            if isinstance(value, (*PLAIN, Tensor)) and not (name == "" and key in OF_TRAINING)
        ]
        self.trained = [p.requires_grad for p in self.parameters.values()]
        self.groups = self._groups()

    def changed(self) -> str | None:
        """Name something that is not as it was; a tensor is the same only where its memory is."""
        for name, owner, key, value in self.noted:
            now = owner.get(key)
            if now is not value and (isinstance(value, Tensor) or now != value):
                return f"attribute {key} of {name or 'the objective'}"
        if self.trained != [p.requires_grad for p in self.parameters.values()]:
            return "which parameters require gradients"
        return None if self.groups == self._groups() else "groups of the optimizer"

    def put_back(self) -> None:
        """Let numbers and tensors be as they were noted, after calls that were no steps."""
        for _, owner, key, value in self.noted:
            owner[key] = value

    def _groups(self) -> list[Any]:
        groups = self.optim.param_groups
        return [
            ([bool(g.get(name)) for name in SWITCHES], [id(p) for p in g["params"]]) for g in groups
        ]


def _owners(pair: Autoencoder, objective: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what holds attributes, by name; the objective's is empty, and is left out if known."""
    for name, module in pair.named_modules():
        named = f"{type(module).__name__} {name}".rstrip()
        yield from ((named, owner) for owner in (vars(module), module._buffers, module._parameters))
    if not is_known(objective):
        yield "", vars(objective)
