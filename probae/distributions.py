"""Distributions that neither torch nor Pyro has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro  # imports no zuko
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import IndependentTransform
from torch.nn.functional import logsigmoid, softplus

from .part import RECORDING, require_count, require_parameter


class GreyBernoulli(dist.Bernoulli):
    r"""Bernoulli whose log-probability is extended linearly to grey values in [0, 1].

    .. math:: \ell(x) = x \log\pi + (1 - x) \log(1 - \pi) = E_{b \sim Bern(x)} \log p(b)

    On binary x it *is* Bernoulli. On grey x it is not a normalised density, but the expected
    log-probability of x's stochastic binarisation; so an ELBO built on it bounds that expectation,
    and nothing built on it may be called a log-likelihood of x. Values outside [0, 1] are refused
    wherever Pyro validates its arguments.

    Example:
        >>> import torch
        >>> GreyBernoulli(logits=torch.zeros(3)).log_prob(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-0.6931, -0.6931, -0.6931])
    """

    support = constraints.unit_interval
    has_enumerate_support = False

    def log_prob(self, value: Tensor) -> Tensor:
        """Return x·logit − softplus(logit): one pass less than cross-entropy, same value."""
        if self._validate_args:
            self._validate_sample(value)
        if RECORDING.get():
            return value * self.logits - _Softplus.apply(self.logits)
        return (value * self.logits).sub_(softplus(self.logits))


def draw_bits(probs: Tensor) -> Tensor:
    """Draw as :func:`torch.bernoulli` does, in a third of the time.

    On a processor torch draws by one thread, which gives three numbers of 21 bits at a time here;
    so probabilities are rounded to multiples of 2⁻²¹, but for those in double precision.
    """
    if probs.device.type == "cpu" and probs.dtype != torch.float64:
        *rows, width = probs.shape or (1,)
        words = torch.empty((*rows, -(-width // 3)), dtype=torch.int64, device=probs.device)
        words.random_()
        numbers = [words & 0x1FFFFF, (words >> 21) & 0x1FFFFF, words >> 42]
        uniform = torch.cat([number.to(torch.float32) for number in numbers], -1)
        uniform = uniform[..., :width].reshape(probs.shape)
        return (uniform < (probs.float() * 2.0**21).round()).to(probs.dtype)
    dtype = torch.promote_types(probs.dtype, torch.float32)
    uniform = torch.rand(probs.shape, dtype=dtype, device=probs.device)
    return (uniform < probs).to(probs.dtype)


class _Softplus(torch.autograd.Function):
    """Softplus by what machine code is fast at: it has vectors for all but the exponential.

    log(1 + e) = 2 artanh(s) with s = e / (2 + e) is a series in s² of at most 1/9, of which seven
    terms leave 2e-8 of it.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        e = (-x.abs()).exp()
        if x.dtype == torch.float64:
            return x.clamp(min=0) + e.log1p()
        s = e / (2 + e)
        square, tail = s.square(), torch.zeros_like(s)
        for k in (13, 11, 9, 7, 5, 3):
            tail = square * (tail + 1 / k)
        return x.clamp(min=0) + 2 * s * (1 + tail)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        e = (-x.abs()).exp()
        return gradients[0] * torch.where(x < 0, e, 1.0) / (1 + e)


class ContinuousBernoulli(dist.TorchDistribution):
    r"""Continuous Bernoulli with logit l: a density on [0, 1] that is exact at every logit.

    .. math:: \log p(x) = x l - \log \frac{e^l - 1}{l}
              = \big(x - \tfrac12\big) l - \log \frac{\sinh(l/2)}{l/2}

    (torch's own clips the normaliser beyond \|l\| of about 16 in float32, so that the mass of p
    falls short of one there.) At x in {0, 1} the density grows like \|l\|.

    Args:
        logits: l, any shape.

    Reference:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli, 2019.

    Example:
        >>> import torch
        >>> d = ContinuousBernoulli(torch.tensor(200.0))
        >>> round(float(d.log_prob(torch.linspace(0, 1, 100_001)).exp().mean()), 2)
        1.0
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = require_parameter(logits, "logits")
        super().__init__(logits.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean, ½ coth(l/2) − 1/l + ½."""
        small = self.logits.abs() < 0.05
        safe = torch.where(small, torch.ones_like(self.logits), self.logits)
        series = self.logits / 12 - self.logits**3 / 720
        return 0.5 + torch.where(small, series, 0.5 / torch.tanh(safe / 2) - 1 / safe)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(value), shape of ``value`` broadcast with the logits."""
        if self._validate_args:
            self._validate_sample(value)
        half = self.logits.abs() / 2
        small = half < 0.01
        safe = torch.where(small, torch.ones_like(half), half)
        log_sinhc = safe + torch.log(-torch.expm1(-2 * safe)) - torch.log(2 * safe)
        log_sinhc = torch.where(small, half**2 / 6 - half**4 / 180, log_sinhc)
        return (value - 0.5) * self.logits - log_sinhc

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw by inverting the distribution function."""
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        size = self.logits.abs()
        small = size < 1e-3
        safe = torch.where(small, torch.ones_like(size), size)
        x = 1 + torch.log(u + (1 - u) * torch.exp(-safe)) / safe  # for l > 0
        x = torch.where(small, u, x.clamp(0, 1))
        return torch.where(self.logits < 0, 1 - x, x)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ContinuousBernoulli:
        """Return the distribution with its batch shape expanded."""
        return ContinuousBernoulli(self.logits.expand(Size(batch_shape)), self._validate_args)


class DiscretizedLogistic(dist.TorchDistribution):
    r"""Logistic distribution rounded to ``levels`` equally spaced values on [0, 1].

    .. math:: P(x) = \sigma\Big(\frac{x + \Delta/2 - \mu}{s}\Big)
                   - \sigma\Big(\frac{x - \Delta/2 - \mu}{s}\Big),
              \quad \Delta = \frac{1}{levels - 1}

    with the two edge bins reaching to infinity, so the probabilities of the levels sum to one.

    Args:
        loc: location μ, any shape.
        scale: scale s > 0, same shape.
        levels: number of grey levels, at least 2; the support is {0, 1, …, levels-1}/(levels-1).

    Reference:
        Kingma et al., Improved variational inference with inverse autoregressive flow, 2016;
        Salimans et al., PixelCNN++, 2017.

    Example:
        >>> import torch
        >>> d = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.1), levels=17)
        >>> round(float(d.log_prob(torch.arange(17.0) / 16).exp().sum()), 5)
        1.0
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = False

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        self.levels = require_count(levels, "levels", least=2)
        require_parameter(loc, "loc")
        require_parameter(scale, "scale")
        try:
            self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        except RuntimeError as error:
            raise ValueError(
                f"loc and scale must have shapes that go together, got {tuple(loc.shape)} and "
                f"{tuple(scale.shape)}"
            ) from error
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The grid {0, 1, …, levels-1}/(levels-1), to within 1/1000 of a step."""
        return _Grid(self.levels)

    @property
    def mean(self) -> Tensor:
        """Mean over the levels, exact: Σ_{k≥1} P(X ≥ k/(levels-1)) / (levels-1)."""
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):  # one at a time: 256 levels of a batch may not fit memory
            total = total + torch.sigmoid((self.loc - (k - 0.5) / (self.levels - 1)) / self.scale)
        return total / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log P(value), shape of ``value`` broadcast with the parameters."""
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.levels - 1)
        upper = (value + half - self.loc) / self.scale
        lower = (value - half - self.loc) / self.scale
        # log[σ(u) − σ(l)] = log σ(u) + log σ(−l) + log(1 − e^{−(u−l)}), stable in both tails
        width = 2 * half / self.scale
        inner = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-width))
        inner = torch.where(value < half, logsigmoid(upper), inner)
        return torch.where(value > 1 - half, logsigmoid(-lower), inner)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw by rounding a logistic sample to the nearest level."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            tiny = torch.finfo(self.loc.dtype).tiny
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(min=tiny)
            x = self.loc + self.scale * (u.log() - torch.log1p(-u))
            return (x * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        """Return the distribution with its batch shape expanded."""
        shape = Size(batch_shape)
        return DiscretizedLogistic(
            self.loc.expand(shape), self.scale.expand(shape), self.levels, self._validate_args
        )


class Flow(ZukoToPyro):
    """Pyro's bridge to a zuko flow, with the ``sample`` and ``rsample`` that the bridge lacks."""

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw without gradients."""
        return self.dist.sample(sample_shape)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw with gradients."""
        return self.dist.rsample(sample_shape)

    @property
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flow:
        """Return the distribution with its batch shape expanded."""
        return Flow(self.dist.expand(batch_shape))


class _Grid(constraints.Constraint):
    """Values k/(levels-1), k = 0, …, levels-1."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        k = value * (self.levels - 1)
        return ((k - k.round()).abs() < 1e-3) & (k > -0.5) & (k < self.levels - 0.5)

    def __repr__(self) -> str:
        return f"multiples of 1/{self.levels - 1} in [0, 1]"


_WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
_INNER = ("base_dist", "component_distribution", "component0", "component1", "gate", "slab")


def base_distribution(distribution: Any) -> Any:
    """Strip ``Independent``, ``MaskedDistribution`` and ``ExpandedDistribution`` wrappers."""
    while isinstance(distribution, _WRAPPERS):
        distribution = distribution.base_dist
    return distribution


def to_support(distribution: Any) -> Transform:
    """Return the bijection from unconstrained values to the support, mixtures included.

    Raises:
        ValueError: the support is none that torch knows a way to.
    """
    if isinstance(distribution, dist.MaskedDistribution | dist.ExpandedDistribution):
        return to_support(distribution.base_dist)
    if isinstance(distribution, torch.distributions.Independent):
        inner = to_support(distribution.base_dist)
        return IndependentTransform(inner, distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, torch.distributions.MixtureSameFamily):
        return to_support(distribution.component_distribution)
    try:
        return biject_to(distribution.support)
    except NotImplementedError as error:
        raise ValueError(
            f"{type(distribution).__name__} must have a support that torch knows a bijection to, "
            f"got {distribution.support}: {error}"
        ) from error


def mean_of(distribution: Any, num_samples: int = 100) -> Tensor:
    """Return the mean, or that of ``num_samples`` draws where it has no closed form."""
    try:
        mean: Tensor = distribution.mean
    except NotImplementedError:
        mean = distribution.sample(Size((num_samples,))).mean(0)
    return mean


def has_component(distribution: Any, family: type | tuple[type, ...]) -> bool:
    """Whether the family stands anywhere below wrappers, transforms and mixtures."""
    return any(isinstance(piece, family) for piece in _pieces(distribution))


def is_point(distribution: Any) -> bool:
    """Whether the distribution puts its mass on points (a ``Delta``, also below a transform)."""
    return has_component(distribution, dist.Delta)


def weighs_points(distribution: Any) -> bool:
    """Whether a ``Delta`` below has a log-density, so that its mass is not one."""
    points = [piece for piece in _pieces(distribution) if isinstance(piece, dist.Delta)]
    return any(bool((piece.log_density != 0).any()) for piece in points)


def is_flat(distribution: Any) -> bool:
    """Whether part of the density was masked out, which makes it improper, flat in that part."""
    masks = (getattr(piece, "_mask", None) for piece in _pieces(distribution))
    return any(mask is not None and not torch.as_tensor(mask).all() for mask in masks)


def _pieces(distribution: Any) -> Iterator[Any]:
    """Yield a distribution and all that it is built on."""
    yield distribution
    for name in _INNER:
        if hasattr(distribution, name):
            yield from _pieces(getattr(distribution, name))


def is_discrete(distribution: Any) -> bool:
    """Whether the distribution lives on a countable set."""
    return bool(distribution.support.is_discrete)
