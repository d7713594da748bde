"""Encoders into binary codes: the noisy sigmoid of semantic hashing, its hard and probit limits.

All stand on a network whose output has shape (..., z_dim), one pre-activation a(x) per bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from .part import Part, require_positive

if TYPE_CHECKING:
    from torch.distributions import Distribution


class LogitNormal(dist.TransformedDistribution):
    r"""Logit-normal distribution on (0, 1), :math:`z = \sigma(a + s n),\; n \sim N(0, 1)`.

    Args:
        loc: a, any shape; the median of z is σ(a).
        scale: s > 0.

    Example:
        >>> import torch
        >>> LogitNormal(torch.tensor([-8.0, 0.0, 8.0]), 4.0).mean
        tensor([0.0343, 0.5000, 0.9657])
    """

    def __init__(self, loc: Tensor, scale: float, validate_args: bool | None = None) -> None:
        self.loc, self.scale = loc, scale
        sigmoid = dist.transforms.SigmoidTransform()
        super().__init__(dist.Normal(loc, scale), [sigmoid], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        r"""Mean, :math:`\frac12 + \int_0^\infty φ(n) [σ(sn + a) - σ(sn - a)] dn`, to 1e-8.

        As the differences have the sign of a, so has the mean less 1/2, also in floating point.
        """
        if self.scale > 100:  # σ is a step, smoothed by a logistic density of variance π²/3
            t = self.loc / self.scale
            density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
            return torch.special.ndtr(t) - math.pi**2 / 6 / self.scale**2 * t * density
        step = min(0.5, 1 / self.scale)  # trapezoid rule; the poles of σ are π/s from the real line
        mean = 0.5 + 0.5 * _weight(0.0, step) * (self.loc.sigmoid() - (-self.loc).sigmoid())
        for j in range(1, math.ceil(6 / step) + 1):
            shift = self.scale * j * step
            difference = (shift + self.loc).sigmoid() - (shift - self.loc).sigmoid()
            mean = mean + _weight(j * step, step) * difference
        return mean.clamp(0, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogitNormal:
        """Return the distribution with its batch shape expanded."""
        return LogitNormal(self.loc.expand(Size(batch_shape)), self.scale, self._validate_args)


class NoisySigmoidEncoder(Part):
    r"""Code of semantic hashing, :math:`z = \sigma(a(x) + s n),\; n \sim N(0, I)`.

    The noise makes values between 0 and 1 unreliable, so training drives a(x) away from 0 until the
    code is nearly binary. The recipe has no term for the entropy of the code: its density is masked
    out (log q = 0), and with a :class:`FlatPrior` the loss is :math:`-E_n \log p(x|z)`, of kind
    CONDITIONAL, with reparameterised gradients. The bit that is stored, 1 where a(x) > 0, is
    :class:`ThresholdEncoder`; it equals 1 where the mean of z exceeds 1/2.

    Args:
        network: maps (..., *x_shape) to a, (..., z_dim).
        noise: standard deviation s of the noise.

    Raises:
        ValueError: ``noise`` is not a finite number > 0.

    Reference:
        Salakhutdinov & Hinton, Semantic hashing, 2009.

    Example:
        >>> import torch
        >>> from probae import MLP, Autoencoder, BernoulliDecoder, FlatPrior
        >>> encoder = NoisySigmoidEncoder(MLP(8, 3))
        >>> encoder(torch.rand(7, 8)).log_prob(torch.rand(7, 3)).sum()
        tensor(0.)
        >>> Autoencoder(FlatPrior(3), encoder, BernoulliDecoder(MLP(3, 8))).kind.value
        'CONDITIONAL'
    """

    def __init__(self, network: nn.Module, noise: float = 4.0) -> None:
        super().__init__()
        self.network = network
        self.noise = require_positive(noise, "noise")

    def forward(self, x: Tensor) -> Distribution:
        """Return the code's law, density masked out, batch shape (...), event shape (z_dim,)."""
        return LogitNormal(self.network(x), self.noise).to_event(1).mask(False)


class ThresholdEncoder(Part):
    r"""Hard binary code, :math:`q(z|x) = \delta(z - b(x)),\; b_i(x) = 1[a_i(x) > 0]`.

    With a :class:`BernoulliPrior` the pair is of kind DISCRETE_POINT: -loss = log p(x|b) + log p(b)
    is a lower bound on log p(x). No gradient reaches the network: take it from a trained encoder
    to evaluate that, and train, if anything, the decoder.

    Args:
        network: maps (..., *x_shape) to a, (..., z_dim).

    Reference:
        Salakhutdinov & Hinton, Semantic hashing, 2009.

    Example:
        >>> import torch
        >>> ThresholdEncoder(torch.nn.Identity())(torch.tensor([[-2.0, 0.0, 3.0]])).mean
        tensor([[0., 0., 1.]])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Distribution:
        """Return the point mass at the bits, batch shape (...), event shape (z_dim,)."""
        a = self.network(x)
        return dist.Delta((a > 0).to(a.dtype), event_dim=1)


class ProbitEncoder(Part):
    r"""Encoder into bits by a probit gate, :math:`q(z|x) = \prod_i Bern(z_i; \Phi(a_i(x) / s))`.

    It is the law of the bits of a noisy sigmoid, :math:`1[\sigma(a + s n) > 1/2]`, and a proper
    encoder: with a :class:`BernoulliPrior` the pair is of kind ELBO.

    Args:
        network: maps (..., *x_shape) to a, (..., z_dim).
        noise: standard deviation s of the noise.

    Raises:
        ValueError: ``noise`` is not a finite number > 0.

    Example:
        >>> import torch
        >>> ProbitEncoder(torch.nn.Identity(), noise=4.0)(torch.tensor([[-4.0, 0.0, 4.0]])).mean
        tensor([[0.1587, 0.5000, 0.8413]])
    """

    def __init__(self, network: nn.Module, noise: float = 4.0) -> None:
        super().__init__()
        self.network = network
        self.noise = require_positive(noise, "noise")

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        return dist.Bernoulli(logits=probit_logit(self.network(x) / self.noise)).to_event(1)


def _weight(n: float, step: float) -> float:
    return step * math.exp(-n * n / 2) / math.sqrt(2 * math.pi)


def probit_logit(t: Tensor) -> Tensor:
    """Return log Φ(t) − log Φ(−t), whose gradient is about |t| far out.

    That of ``torch.special.log_ndtr`` is wrong there: it overflows from |t| of about 10⁵.
    """
    sign = torch.where(t < 0, -1.0, 1.0).to(t)  # the function is odd
    u = sign * t
    log_tail = torch.log(0.5 * torch.special.erfcx(u * math.sqrt(0.5))) - u**2 / 2  # log Φ(−u)
    return sign * (torch.log1p(-log_tail.exp()) - log_tail)
