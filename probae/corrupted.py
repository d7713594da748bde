"""Distributions of corrupted data: with entries replaced, missing, flipped or thinned out.

Each holds the law of the clean entries as its ``component_distribution``, the name that mixtures
use, so that :func:`has_component` finds it.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.distributions import kl_divergence, register_kl

from .distributions import draw_bits


class Replacement(dist.TorchDistribution):
    r"""A draw from p, replaced with probability ν by one of a few values, all as likely.

    .. math:: (1 - \nu)\,p(x) + \frac{\nu}{A} \sum_a \delta(x - a)

    For a discrete p this is a mass function. For a density it is one with respect to Lebesgue
    measure and an atom at each value: at a value, the mass of the atom; elsewhere (1 - ν) p(x).

    Args:
        component_distribution: p, a distribution of scalars.
        values: the A values, numbers or tensors that broadcast with the batch shape.
        probability: ν in [0, 1], a number or a tensor that broadcasts with the batch shape.

    Example:
        >>> import torch
        >>> d = Replacement(dist.Poisson(torch.ones(2)), (0.0,), 0.5)
        >>> d.log_prob(torch.tensor([0.0, 1.0])).exp()
        tensor([0.6839, 0.1839])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        component_distribution: Any,
        values: tuple[float | Tensor, ...],
        probability: float | Tensor,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(probability, Tensor):  # a 0-dim tensor takes the dtype of what it meets
            probability = torch.tensor(probability, dtype=torch.float64)
        self.probability = probability
        self.values = values
        shapes = [torch.as_tensor(value).shape for value in values]
        shape = torch.broadcast_shapes(
            component_distribution.batch_shape, self.probability.shape, *shapes
        )
        self.component_distribution = component_distribution.expand(shape)
        super().__init__(shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether p has: the choice between p and the values has no parameter."""
        return self.component_distribution.has_rsample and not self.probability.requires_grad

    @property
    def support(self) -> constraints.Constraint:
        """The support of p and the values."""
        return _OneOf(self.values, self.component_distribution.support)

    @property
    def mean(self) -> Tensor:
        """Mean, (1 - ν) E[x] + ν times the mean of the values."""
        values = sum(self.values) / len(self.values)
        return (1 - self.probability) * self.component_distribution.mean + self.probability * values

    @property
    def variance(self) -> Tensor:
        """Variance: within p, within the values, and between their means."""
        p, center = self.component_distribution, sum(self.values) / len(self.values)
        spread = sum((value - center) ** 2 for value in self.values) / len(self.values)
        between = self.probability * (1 - self.probability) * (p.mean - center) ** 2
        return (1 - self.probability) * p.variance + self.probability * spread + between

    def log_replaced(self, value: Tensor) -> Tensor:
        """Return the log-probability of having been replaced, and by this value."""
        hits = sum((value == own).to(value.dtype) for own in self.values) / len(self.values)
        return (self.probability * hits).log()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density with respect to the measure of the class docstring."""
        if self._validate_args:
            self._validate_sample(value)
        replaced = self.log_replaced(value)
        kept = _log_prob(self.component_distribution, value)
        if not self.component_distribution.support.is_discrete:
            atom = getattr(self.component_distribution, "log_replaced", lambda x: -math.inf)(value)
            # of both, the mass of an atom counts alone: a density has none at a point
            kept = torch.where(
                replaced.isneginf() | ~torch.as_tensor(atom).isneginf(), kept, -math.inf
            )
        return torch.logaddexp(replaced, torch.log1p(-self.probability) + kept)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw with the gradients of p."""
        return self._replace(self.component_distribution.rsample(sample_shape))

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw without gradients."""
        with torch.no_grad():
            return self._replace(self.component_distribution.sample(sample_shape))

    def _replace(self, x: Tensor) -> Tensor:
        which = torch.randint(len(self.values), x.shape, device=x.device)
        replaced = torch.rand(x.shape, device=x.device) < self.probability
        for i, value in enumerate(self.values):
            x = torch.where(replaced & (which == i), value, x)
        return x

    def expand(self, batch_shape: Any, _instance: Any = None) -> Replacement:
        """Return the distribution with its batch shape expanded."""
        component = self.component_distribution.expand(Size(batch_shape))
        return Replacement(component, self.values, self.probability, self._validate_args)


class Seen(dist.TorchDistribution):
    r"""A draw from p of which each entry is seen with probability 1 - ν: (x∘m, m).

    .. math:: \log p(x \circ m, m) = \sum_{i: m_i = 1} \log[(1 - \nu)\,p(x_i)]
              + \sum_{i: m_i = 0} \log \nu

    Args:
        component_distribution: p of the entries, a distribution of scalars with batch shape
            (*batch_shape, *x_shape).
        probability: ν in (0, 1).
        x_ndim: number of dimensions of x_shape; the event shape is (2, *x_shape).

    Example:
        >>> import torch
        >>> d = Seen(dist.Normal(torch.zeros(7, 4), 1.0), 0.5, 1)
        >>> d.batch_shape, d.event_shape
        (torch.Size([7]), torch.Size([2, 4]))
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        component_distribution: Any,
        probability: float,
        x_ndim: int,
        validate_args: bool | None = None,
    ) -> None:
        self.component_distribution = component_distribution
        self.probability, self.x_ndim = probability, x_ndim
        shape = component_distribution.batch_shape
        split = len(shape) - x_ndim
        super().__init__(shape[:split], Size((2, *shape[split:])), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether p has: the mask has no parameter."""
        return bool(self.component_distribution.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """Values in the support of p where the mask is 1, and 0 where it is 0."""
        return _ValuesAndMask(self.component_distribution.support, self.x_ndim)

    @property
    def mean(self) -> Tensor:
        """Mean, (1 - ν) times (E[x], 1)."""
        mean = self.component_distribution.mean
        return (1 - self.probability) * torch.stack([mean, torch.ones_like(mean)], -self.x_ndim - 1)

    @property
    def variance(self) -> Tensor:
        """Variance, (1 - ν) times (V[x] + ν E[x]², ν)."""
        mean, variance = self.component_distribution.mean, self.component_distribution.variance
        of_mask = torch.full_like(mean, self.probability)
        values = variance + self.probability * mean**2
        return (1 - self.probability) * torch.stack([values, of_mask], -self.x_ndim - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of values and mask together."""
        if self._validate_args:
            self._validate_sample(value)
        x, mask = value.unbind(-self.x_ndim - 1)
        seen = math.log1p(-self.probability) + _log_prob(self.component_distribution, x)
        return sum_rightmost(torch.where(mask == 1, seen, math.log(self.probability)), self.x_ndim)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw with the gradients of p."""
        return self._hide(self.component_distribution.rsample(sample_shape))

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw without gradients."""
        with torch.no_grad():
            return self._hide(self.component_distribution.sample(sample_shape))

    def _hide(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape, device=x.device) >= self.probability
        return torch.stack([torch.where(mask, x, 0), mask.to(x.dtype)], -self.x_ndim - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Seen:
        """Return the distribution with its batch shape expanded."""
        component = self.component_distribution.expand(Size(batch_shape) + self.event_shape[1:])
        return Seen(component, self.probability, self.x_ndim, self._validate_args)


class ShiftedPoisson(dist.TorchDistribution):
    r"""A Poisson count on top of a known one, :math:`x - b \sim Poisson(\lambda)`.

    Args:
        rate: λ > 0.
        shift: b, whole numbers >= 0 in a shape that broadcasts with λ.

    Example:
        >>> import torch
        >>> ShiftedPoisson(torch.ones(2), torch.tensor([0.0, 3.0])).mean
        tensor([1., 4.])
    """

    arg_constraints = {  # noqa: RUF012
        "rate": constraints.nonnegative,
        "shift": constraints.nonnegative_integer,
    }
    support = constraints.nonnegative_integer

    def __init__(self, rate: Tensor, shift: Tensor, validate_args: bool | None = None) -> None:
        self.rate, self.shift = torch.broadcast_tensors(rate, shift)
        super().__init__(self.rate.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean, b + λ."""
        return self.shift + self.rate

    @property
    def variance(self) -> Tensor:
        """Variance, λ."""
        return self.rate

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability; -∞ below b, where 1/Γ is 0."""
        if self._validate_args:
            self._validate_sample(value)
        return dist.Poisson(self.rate, validate_args=False).log_prob(value - self.shift)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw without gradients."""
        with torch.no_grad():
            return self.shift + torch.poisson(self.rate.expand(self._extended_shape(sample_shape)))

    def expand(self, batch_shape: Any, _instance: Any = None) -> ShiftedPoisson:
        """Return the distribution with its batch shape expanded."""
        shape = Size(batch_shape)
        return ShiftedPoisson(
            self.rate.expand(shape), self.shift.expand(shape), self._validate_args
        )


class Point(dist.TorchDistribution):
    r"""All mass at x, a discrete law: :math:`P(\tilde x) = 1[\tilde x = x]`.

    Unlike Pyro's Delta it counts as discrete, and not as a point code.

    Args:
        x: where, any shape.

    Example:
        >>> import torch
        >>> Point(torch.zeros(2)).log_prob(torch.tensor([0.0, 1.0]))
        tensor([0., -inf])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, x: Tensor, validate_args: bool | None = None) -> None:
        self.x = x
        super().__init__(x.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The one value."""
        return _OneOf((self.x,))

    @property
    def mean(self) -> Tensor:
        """Mean, x."""
        return self.x

    @property
    def variance(self) -> Tensor:
        """Variance, 0."""
        return torch.zeros_like(self.x)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log 1 at x and log 0 elsewhere."""
        return (value == self.x).to(value.dtype).log()

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Return x."""
        return self.x.expand(self._extended_shape(sample_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Point:
        """Return the distribution with its batch shape expanded."""
        return Point(self.x.expand(Size(batch_shape)), self._validate_args)


class _OfData:
    """For laws whose parameters are data: with no gradient to lose, a draw is reparameterised."""

    @property
    def has_rsample(self) -> bool:
        """Whether no parameter requires a gradient, as is the case for data."""
        tensors = (value for value in vars(self).values() if isinstance(value, Tensor))
        return not any(tensor.requires_grad for tensor in tensors)

    def rsample(self: Any, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw; there is no gradient to carry."""
        sample: Tensor = self.sample(sample_shape)
        return sample


class Bits(_OfData, dist.Bernoulli):
    r"""Bernoulli of given probabilities, exact where they are 0 or 1, too.

    Without gradients in its parameters it counts as reparameterised, so that objectives which
    refuse other sites take it.

    Example:
        >>> import torch
        >>> bits = Bits(torch.tensor([0.0, 1.0]))
        >>> bits.has_rsample, bits.log_prob(torch.tensor([0.0, 0.0]))
        (True, tensor([0., -inf]))
    """

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw without gradients."""
        with torch.no_grad():
            return draw_bits(self.probs.expand(self._extended_shape(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return x log p + (1 - x) log(1 - p), with 0 log 0 = 0."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.xlogy(value, self.probs) + torch.xlogy(1 - value, 1 - self.probs)


@register_kl(Bits, Bits)
def _kl_bits(p: Bits, q: Bits) -> Tensor:
    """As torch's of two Bernoullis, but 0 without arithmetic where both read the same memory."""
    one, other = p.probs, q.probs
    if (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride()):
        return torch.zeros_like(one)
    bernoulli = torch.distributions.Bernoulli
    kl: Tensor = kl_divergence(bernoulli(one), bernoulli(other))
    return kl


class Thinned(_OfData, dist.Binomial):
    """Binomial of given counts; see :class:`Bits` for its gradients.

    Example:
        >>> import torch
        >>> Thinned(torch.tensor([4.0, 8.0]), torch.tensor(0.5)).mean
        tensor([2., 4.])
    """


@register_kl(Thinned, Thinned)
def _kl_thinned(p: Thinned, q: Thinned) -> Tensor:
    """As torch's of two binomials, without its branch: NaN where q has more counts than p."""
    kl = p.probs * (p.logits - q.logits) + (-p.probs).log1p() - (-q.probs).log1p()
    more = torch.where(p.total_count > q.total_count, math.inf, math.nan)
    return torch.where(p.total_count == q.total_count, p.total_count * kl, more)


class _OneOf(constraints.Constraint):
    """One of a few values, or what another constraint allows."""

    def __init__(self, values: tuple[Any, ...], other: Any = None) -> None:
        self.values, self.other = values, other

    @property
    def is_discrete(self) -> bool:
        return self.other is None or bool(self.other.is_discrete)

    def check(self, value: Tensor) -> Tensor:
        valid = torch.zeros_like(value, dtype=torch.bool)
        for own in self.values:
            valid = valid | (value == own)
        return valid if self.other is None else valid | self.other.check(value)

    def __repr__(self) -> str:
        names = ["data" if isinstance(v, Tensor) else f"{v:g}" for v in self.values]
        return " or ".join([*names, *([] if self.other is None else [str(self.other)])])


class _ValuesAndMask(constraints.Constraint):
    """Pairs (x∘m, m), stacked; the verdict is one for each entry, so that an error can name it."""

    def __init__(self, values: Any, x_ndim: int) -> None:
        self.values, self.x_ndim = values, x_ndim
        self.is_discrete = values.is_discrete

    def check(self, value: Tensor) -> Tensor:
        x, mask = value.unbind(-self.x_ndim - 1)
        right = torch.where(mask == 0, x == 0, self.values.check(x))
        return torch.stack([right, (mask == 0) | (mask == 1)], -self.x_ndim - 1)

    def __repr__(self) -> str:
        return f"pairs of values and mask: {self.values} where the mask is 1, 0 where it is 0"


def _log_prob(distribution: Any, value: Tensor) -> Tensor:
    """Log-probability; outside the support that at 1/2, without an error: callers replace it."""
    inside = distribution.support.check(value)
    return torch.where(inside, distribution.log_prob(torch.where(inside, value, 0.5)), -math.inf)
