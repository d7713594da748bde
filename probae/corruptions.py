"""Corruptions C(x_tilde|x): modules that map x to a distribution over its corrupted version."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyro.distributions as dist

from .part import Part, require_positive, require_probability

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributions import Distribution


class GaussianNoise(Part):
    r"""Additive Gaussian noise, :math:`C(\tilde x|x) = N(\tilde x; x, \sigma^2 I)`.

    Args:
        scale: σ > 0, in units of x.

    Raises:
        ValueError: ``scale`` is not a finite number > 0.

    Reference:
        Vincent et al., Stacked denoising autoencoders, 2010.

    Example:
        >>> import torch
        >>> GaussianNoise(0.3)(torch.zeros(7, 2, 4)).event_shape
        torch.Size([2, 4])
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = require_positive(scale, "scale")

    def forward(self, x: Tensor) -> Distribution:
        """Return C(x_tilde|x), batch shape (N,), event shape x_shape."""
        return dist.Normal(x, self.scale).to_event(x.dim() - 1)


class BitFlip(Part):
    r"""Each bit flips independently, :math:`P(\tilde x_i = 1|x_i) = \rho + (1 - 2\rho) x_i`.

    Args:
        probability: flip probability ρ in (0, 1).

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1.

    Example:
        >>> import torch
        >>> BitFlip(0.1)(torch.zeros(7, 4)).mean[0]
        tensor([0.1000, 0.1000, 0.1000, 0.1000])
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = require_probability(probability, "probability")

    def forward(self, x: Tensor) -> Distribution:
        """Return C(x_tilde|x), batch shape (N,), event shape x_shape."""
        flipped = self.probability + (1 - 2 * self.probability) * x
        return dist.Bernoulli(flipped).to_event(x.dim() - 1)
