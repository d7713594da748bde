"""Decoders p(x|z): modules that map z of shape (..., z_dim) to a distribution over x.

The returned distribution has batch shape (...) and event shape x_shape. Every decoder stands on a
network whose output has shape (..., parameters, *x_shape), or (..., *x_shape) where the likelihood
has one parameter; ``output_shape`` of the class says which.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .corruptions import Corruption, require_corruption
from .distributions import ContinuousBernoulli, DiscretizedLogistic, GreyBernoulli
from .networks import MLP, DeconvNet
from .part import Part, require_count, require_flag, require_positive, two_parameters

if TYPE_CHECKING:
    from torch.distributions import Distribution


class Decoder(Part):
    """What the decoders of this module share: a network, and the shape of its output.

    Example:
        >>> from probae import LIKELIHOODS
        >>> all(issubclass(decoder, Decoder) for decoder in LIKELIHOODS.values())
        True
    """

    num_parameters: int = 1

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def output_shape(cls, x_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the network's output must have for data of shape ``x_shape``."""
        return x_shape if cls.num_parameters == 1 else (cls.num_parameters, *x_shape)

    def initialize(self, x: Tensor) -> None:
        """Set the output bias to what fits ``x`` best where the network's weights add nothing.

        Does nothing where the network has no ``set_bias``.
        """
        set_bias = getattr(self.network, "set_bias", None)
        if isinstance(self.network, DeconvNet) and x.dim() == 4:  # it has one bias a channel
            x = x.movedim(1, -1).reshape(-1, x.shape[1], 1, 1)
        if callable(set_bias):
            set_bias(self.bias_for(x))

    def bias_for(self, x: Tensor) -> Tensor:
        """Return the network output that fits data ``x`` (N, *x_shape) when z says nothing."""
        raise TypeError(f"{type(self).__name__} has no data-dependent starting values")


class BernoulliDecoder(Decoder):
    r"""Bernoulli decoder, :math:`p(x|z) = \prod_i \pi_i^{x_i} (1-\pi_i)^{1-x_i}`, logits from z.

    Grey x in [0, 1] can be trained on; the ELBO then bounds the expected log-likelihood of x's
    stochastic binarisation, not a likelihood of x (see :class:`GreyBernoulli`).

    Args:
        network: maps (..., z_dim) to the logits, (..., *x_shape).

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> BernoulliDecoder(MLP(3, (8, 8)))(torch.randn(7, 3)).event_shape
        torch.Size([8, 8])
    """

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch shape (...), event shape x_shape."""
        logits = self.network(z)
        return GreyBernoulli(logits=logits).to_event(_event_dim(logits, z))

    def bias_for(self, x: Tensor) -> Tensor:
        """Return logits of the pixel means, these clipped to [0.001, 0.999]."""
        return torch.logit(x.mean(0).clamp(1e-3, 1 - 1e-3))


class ContinuousBernoulliDecoder(Decoder):
    r"""Decoder with a density on [0, 1], :math:`p(x_i|z) \propto \pi_i^x (1-\pi_i)^{1-x}`.

    Pixels of exactly 0 or 1 would be fitted by ever larger logits, and the density there would grow
    without limit; so the logit is :math:`l_{max} \tanh(a / l_{max})`. Quote l_max beside densities.

    Args:
        network: maps (..., z_dim) to a, (..., *x_shape).
        logit_max: bound of the logits; at 50 the density is at most 50 a pixel.

    Raises:
        ValueError: ``logit_max`` is not a finite number > 0.

    Reference:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli, 2019.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> ContinuousBernoulliDecoder(MLP(3, 8))(torch.randn(7, 3)).event_shape
        torch.Size([8])
    """

    def __init__(self, network: nn.Module, logit_max: float = 50.0) -> None:
        super().__init__(network)
        self.logit_max = require_positive(logit_max, "logit_max")

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch shape (...), event shape x_shape."""
        logits = self.logit_max * torch.tanh(self.network(z) / self.logit_max)
        return ContinuousBernoulli(logits).to_event(_event_dim(logits, z))

    def bias_for(self, x: Tensor) -> Tensor:
        """Return a for logits whose mean is the pixel mean, by bisection up to logit_max/2."""
        mean = x.mean(0)
        low = torch.full_like(mean, -self.logit_max / 2)
        high = -low
        for _ in range(50):
            middle = (low + high) / 2
            below = ContinuousBernoulli(middle).mean < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return self.logit_max * torch.atanh(middle / self.logit_max)


class GaussianDecoder(Decoder):
    r"""Gaussian decoder with one scale, :math:`p(x|z) = N(x; g(z), \sigma^2 I)`.

    A learned σ is :math:`\sigma_{min} + softplus(s)`: without the floor a deterministic code could
    send σ to 0 and the likelihood to infinity. Densities in nats compare only at equal scaling of
    x, so quote σ_min beside them.

    Args:
        network: maps (..., z_dim) to the mean, (..., *x_shape).
        scale: σ, or its starting value where it is learned.
        learn_scale: whether σ is a parameter.
        scale_min: floor of a learned σ.

    Raises:
        ValueError: ``scale`` or ``scale_min`` is not a finite number > 0, or a learned ``scale``
            does not start above its floor.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> GaussianDecoder(MLP(3, 8), scale=0.5)(torch.randn(7, 3)).event_shape
        torch.Size([8])
    """

    def __init__(
        self,
        network: nn.Module,
        scale: float = 1.0,
        learn_scale: bool = False,
        scale_min: float = 1e-3,
    ) -> None:
        super().__init__(network)
        if require_positive(scale, "scale") > 1e30:
            raise ValueError(f"scale must be below 1e30, in units of x, got {scale!r}")
        self.scale_min = require_positive(scale_min, "scale_min")
        self.learn_scale = require_flag(learn_scale, "learn_scale")
        if learn_scale:
            if scale <= scale_min:
                raise ValueError(
                    f"scale must start above scale_min={scale_min} when it is learned, got {scale}"
                )
            raw = torch.tensor(_inverse_softplus(scale - scale_min))
            self.raw_scale = nn.Parameter(raw)
        else:
            self.fixed_scale = float(scale)  # a buffer would be rounded to float32

    @property
    def scale(self) -> Tensor:
        """The standard deviation σ, a scalar tensor."""
        if self.learn_scale:
            return self.scale_min + softplus(self.raw_scale)
        like = next(self.network.parameters(), torch.empty(()))
        return torch.full((), self.fixed_scale, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def set_scale(self, value: float) -> None:
        """Set a learned σ; raise a ValueError where it is fixed or ``value`` is below its floor."""
        if not self.learn_scale:
            raise ValueError("scale is fixed: build the decoder with learn_scale=True, or scale=σ")
        if require_positive(value, "value") <= self.scale_min:
            raise ValueError(f"value must exceed scale_min={self.scale_min}, got {value}")
        self.raw_scale.fill_(_inverse_softplus(value - self.scale_min))

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch shape (...), event shape x_shape."""
        loc = self.network(z)
        scale = self.scale if self.learn_scale else self.fixed_scale
        return dist.Normal(loc, scale).to_event(_event_dim(loc, z))

    def bias_for(self, x: Tensor) -> Tensor:
        """Return the mean of the data."""
        return x.mean(0)

    def affine(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return ``(W, b, σ)`` with p(x|z) = N(Wz + b, σ²I) on flattened x, or None if not so."""
        affine = self.network.affine() if isinstance(self.network, MLP) else None
        return None if affine is None else (*affine, self.scale)


class HeteroscedasticGaussianDecoder(Decoder):
    r"""Gaussian decoder whose scale depends on z, :math:`N(x; \mu(z), diag\,\sigma(z)^2)`.

    Args:
        network: maps (..., z_dim) to (..., 2, *x_shape): the mean, and the scale before softplus.
        scale_min: floor of the scale, added to it.

    Reference:
        Mattei & Frellsen, Leveraging the exact likelihood of deep latent variable models, 2018, on
        why the floor is needed.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> HeteroscedasticGaussianDecoder(MLP(3, (2, 8)))(torch.randn(7, 3)).event_shape
        torch.Size([8])
    """

    num_parameters = 2

    def __init__(self, network: nn.Module, scale_min: float = 1e-3) -> None:
        super().__init__(network)
        self.scale_min = require_positive(scale_min, "scale_min")

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch shape (...), event shape x_shape."""
        loc, scale = two_parameters(self.network(z), z.dim() - 1, "(..., 2, *x_shape)")
        normal = dist.Normal(loc, softplus(scale) + self.scale_min)
        return normal.to_event(_event_dim(loc, z))

    def bias_for(self, x: Tensor) -> Tensor:
        """Return mean and pre-softplus scale of the data."""
        scale = (x.std(0, correction=0) - self.scale_min).clamp(min=0.01)
        return torch.stack([x.mean(0), _inverse_softplus_of(scale)])


class CategoricalDecoder(Decoder):
    r"""Categorical decoder, :math:`p(x_i = c|z) = softmax_c\,a_i(z)`; x holds classes 0 … C-1.

    x is given in the pair's floating dtype, as everywhere.

    Args:
        network: maps (..., z_dim) to the logits, (..., num_classes, *x_shape).

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> CategoricalDecoder(MLP(3, (5, 8)))(torch.randn(7, 3)).event_shape
        torch.Size([8])
    """

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch shape (...), event shape x_shape."""
        logits = self.network(z).movedim(z.dim() - 1, -1)  # (..., *x_shape, C)
        return dist.Categorical(logits=logits).to_event(logits.dim() - z.dim())

    @classmethod
    def output_shape(cls, x_shape: tuple[int, ...], num_classes: int = 2) -> tuple[int, ...]:
        """Return the shape of the network's output: (num_classes, *x_shape)."""
        return (require_count(num_classes, "num_classes", least=2), *x_shape)

    def initialize(self, x: Tensor) -> None:
        """Set the output bias to log-frequencies where the network says how many classes."""
        if isinstance(self.network, MLP | DeconvNet):
            super().initialize(x)

    def bias_for(self, x: Tensor) -> Tensor:
        """Return the log-frequencies of the classes at each position, with half a datum added."""
        assert isinstance(self.network, MLP | DeconvNet)
        num_classes = self.network.out_shape[0]
        counts = torch.stack([(x == c).sum(0) for c in range(num_classes)])  # (C, *x_shape)
        return torch.log((counts.to(x.dtype) + 0.5) / (len(x) + 0.5 * num_classes))


class DiscretizedLogisticDecoder(Decoder):
    r"""Decoder for ``levels`` grey levels on [0, 1], see :class:`DiscretizedLogistic`.

    Args:
        network: maps (..., z_dim) to (..., 2, *x_shape): the location, and the scale before
            softplus.
        levels: number of grey levels; x lies on {0, …, levels-1}/(levels-1).
        scale_min: floor of the scale; below about 1/20 of a step the mass sits in one bin anyway.

    Reference:
        Kingma et al., Improved variational inference with inverse autoregressive flow, 2016.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> DiscretizedLogisticDecoder(MLP(3, (2, 8)), levels=17)(torch.randn(7, 3)).event_shape
        torch.Size([8])
    """

    num_parameters = 2

    def __init__(self, network: nn.Module, levels: int = 256, scale_min: float = 1e-4) -> None:
        super().__init__(network)
        self.levels = require_count(levels, "levels", least=2)
        self.scale_min = require_positive(scale_min, "scale_min")

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch shape (...), event shape x_shape."""
        loc, scale = two_parameters(self.network(z), z.dim() - 1, "(..., 2, *x_shape)")
        logistic = DiscretizedLogistic(loc, softplus(scale) + self.scale_min, self.levels)
        return logistic.to_event(_event_dim(loc, z))

    def bias_for(self, x: Tensor) -> Tensor:
        """Return mean and pre-softplus scale of the data (variance of a logistic: π²s²/3)."""
        scale = (x.std(0, correction=0) * math.sqrt(3) / math.pi).clamp(min=0.01)
        return torch.stack([x.mean(0), _inverse_softplus_of(scale)])


class PoissonDecoder(Decoder):
    r"""Poisson decoder for counts, :math:`p(x|z) = \prod_i Poisson(x_i; softplus\,a_i(z))`.

    Args:
        network: maps (..., z_dim) to a, (..., *x_shape).

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> PoissonDecoder(MLP(3, 8))(torch.randn(7, 3)).event_shape
        torch.Size([8])
    """

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch shape (...), event shape x_shape."""
        rate = softplus(self.network(z)) + 1e-6  # a rate of exactly 0 would forbid any count
        return dist.Poisson(rate).to_event(_event_dim(rate, z))

    def bias_for(self, x: Tensor) -> Tensor:
        """Return the pre-softplus mean counts, these at least 0.01."""
        return _inverse_softplus_of(x.mean(0).clamp(min=0.01))


class CorruptedDecoder(Part):
    r"""Decoder of which only a corrupted x is ever seen, the clean x integrated out in closed form.

    .. math:: p(\tilde x|z) = \int C(\tilde x|x)\,p(x|z)\,dx

    The data of a pair with this decoder are the x_tilde, and what its ELBO bounds is
    **log p(x_tilde)**: nothing is said about the density of a clean x, though the model has one,
    p(x|z) = ``decoder(z)``; :func:`probae.denoise` returns p(x|x_tilde). With
    ``Masking(known=True)`` it learns from data with missing entries.

    Args:
        decoder: module, ``decoder(z)`` is p(x|z) of the clean x.
        corruption: a :class:`Corruption` with a closed form for that likelihood.

    Raises:
        ValueError: an argument is no such module; or, from ``forward``, the corruption has no
            closed form for the likelihood.

    Reference:
        Mattei & Frellsen, MIWAE: deep generative modelling and imputation of incomplete data sets,
        2019, for missing data.

    Example:
        >>> import torch, probae
        >>> pair = probae.Autoencoder(
        ...     probae.StandardNormalPrior(2),
        ...     probae.GaussianEncoder(probae.MLP((2, 8), (2, 2))),
        ...     CorruptedDecoder(
        ...         BernoulliDecoder(probae.MLP(2, 8)), probae.Masking(0.3, known=True)
        ...     ),
        ... )
        >>> x = probae.stack_missing(torch.tensor([[0.0, 1.0, float("nan"), 1.0] * 2] * 5))
        >>> probae.log_likelihood(pair, x, "iwae", 10).values.shape  # of log p(x_tilde)
        torch.Size([5])
    """

    def __init__(self, decoder: nn.Module, corruption: Corruption) -> None:
        super().__init__()
        if not isinstance(decoder, nn.Module):
            raise ValueError(
                f"decoder must be a torch.nn.Module whose forward returns p(x|z), got {decoder!r}"
            )
        self.decoder = decoder
        self.corruption = require_corruption(corruption)

    def forward(self, z: Tensor) -> Distribution:
        """Return p(x_tilde|z), batch shape (...), event shape that of x_tilde."""
        return self.corruption.marginal(self.decoder(z))

    def initialize(self, x: Tensor) -> None:
        """Set the decoder's starting values from data x_tilde, taken for clean, 0 if missing."""
        if isinstance(self.decoder, Part):
            self.decoder.initialize(self.corruption.as_clean(x))


LIKELIHOODS: dict[str, type[Decoder]] = {
    "bernoulli": BernoulliDecoder,
    "continuous-bernoulli": ContinuousBernoulliDecoder,
    "gaussian": GaussianDecoder,
    "heteroscedastic-gaussian": HeteroscedasticGaussianDecoder,
    "categorical": CategoricalDecoder,
    "discretized-logistic": DiscretizedLogisticDecoder,
    "poisson": PoissonDecoder,
}


def _event_dim(parameter: Tensor, z: Tensor) -> int:
    return parameter.dim() - z.dim() + 1


def _inverse_softplus_of(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
