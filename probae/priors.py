"""Priors p(z): modules whose ``forward()`` returns a distribution with event shape (z_dim,)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .distributions import Flow, is_point
from .part import (
    Part,
    Shape,
    as_number,
    as_shape,
    require_count,
    require_flag,
    require_positive,
    require_probability,
)
from .sparse import ConditionalBernoulli, SpikeAndSlab

if TYPE_CHECKING:
    from torch.distributions import Distribution


class StandardNormalPrior(Part):
    r"""Standard normal prior, :math:`p(z) = N(z; 0, I)`.

    Args:
        z_dim: number of latent dimensions.

    Example:
        >>> StandardNormalPrior(3)().event_shape
        torch.Size([3])
    """

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        self.register_buffer("loc", torch.zeros(z_dim), persistent=False)
        self.register_buffer("scale", torch.ones(z_dim), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class FlatPrior(StandardNormalPrior):
    r"""Improper flat prior, :math:`p(z) \propto 1`: the prior of a plain autoencoder.

    Its log-density is 0 everywhere, so it adds nothing to a loss and nothing can be sampled from
    it: a pair with this prior is no generative model of x.

    Args:
        z_dim: number of latent dimensions.

    Example:
        >>> import torch
        >>> FlatPrior(3)().log_prob(torch.randn(3))
        tensor(0.)
    """

    def forward(self) -> Distribution:
        """Return the masked density, event shape (z_dim,)."""
        return dist.Normal(self.loc, self.scale).to_event(1).mask(False)


class LaplacePrior(Part):
    r"""Laplace prior, :math:`p(z) = \prod_i \frac{\lambda}{2} e^{-\lambda |z_i|}`.

    Args:
        z_dim: number of latent dimensions.
        rate: λ > 0, the weight of the L1 penalty that -log p(z) is.
        learn_rate: train λ, from ``rate`` on. Under a point code the loss then has no minimum of
            use: it falls as z -> 0 and λ grows, down to the floor of the scale.
        scale_min: floor of a learned scale 1/λ.

    Raises:
        ValueError: ``rate`` or ``scale_min`` is not a finite number > 0.

    Reference:
        Olshausen & Field, Sparse coding with an overcomplete basis set, 1997.

    Example:
        >>> LaplacePrior(3, rate=2.0)().event_shape
        torch.Size([3])
    """

    def __init__(
        self,
        z_dim: int,
        rate: float = 1.0,
        learn_rate: bool = False,
        scale_min: float = 1e-6,
    ) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        self.rate = require_positive(rate, "rate")
        self.scale_min = require_positive(scale_min, "scale_min")
        self.log_rate = (
            nn.Parameter(torch.tensor(math.log(self.rate)))
            if require_flag(learn_rate, "learn_rate")
            else None
        )
        self.register_buffer("loc", torch.zeros(z_dim), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        if self.log_rate is None:
            return dist.Laplace(self.loc, 1 / self.rate).to_event(1)
        return dist.Laplace(self.loc, (-self.log_rate).exp().clamp(min=self.scale_min)).to_event(1)


class ExponentialPrior(Part):
    r"""Exponential prior of nonnegative codes, :math:`p(z) = \prod_i \lambda e^{-\lambda z_i}`.

    The prior that fits a ReLU code: a Laplace prior puts half its mass where ReLU never goes.

    Args:
        z_dim: number of latent dimensions.
        rate: λ > 0, the weight of the L1 penalty that -log p(z) is.

    Raises:
        ValueError: ``rate`` is not a finite number > 0.

    Reference:
        Hoyer, Non-negative sparse coding, 2002.

    Example:
        >>> import torch
        >>> ExponentialPrior(3, rate=2.0)().log_prob(torch.tensor([0.0, 1.0, 0.5]))
        tensor(-0.9206)
    """

    zeros: Tensor

    def __init__(self, z_dim: int, rate: float = 1.0) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        self.rate = require_positive(rate, "rate")
        self.register_buffer("zeros", torch.zeros(z_dim), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        return dist.Exponential(self.zeros + self.rate).to_event(1)


class StudentTPrior(Part):
    r"""Student-t prior, :math:`-\log p(z) = \sum_i \frac{\nu+1}{2} \log(1 + z_i^2/(\nu s^2)) + c`.

    Args:
        z_dim: number of latent dimensions.
        degrees: ν > 0, degrees of freedom; the fewer, the sparser.
        scale: s > 0.

    Raises:
        ValueError: ``degrees`` or ``scale`` is not a finite number > 0.

    Reference:
        Welling, Hinton & Osindero, Learning sparse topographic representations with products of
        Student-t distributions, 2003.

    Example:
        >>> StudentTPrior(3, degrees=1.5)().event_shape
        torch.Size([3])
    """

    def __init__(self, z_dim: int, degrees: float = 3.0, scale: float = 1.0) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        self.degrees = require_positive(degrees, "degrees")
        self.scale = require_positive(scale, "scale")
        self.register_buffer("loc", torch.zeros(z_dim), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        return dist.StudentT(self.degrees, self.loc, self.scale).to_event(1)


class SpikeAndSlabPrior(Part):
    r"""Codes with exact zeros, each entry on with probability :math:`\pi = 1 / (1 + e^\lambda)`.

    .. math:: -\log p(z) = \lambda \|z\|_0 + K \log\frac{1}{1-\pi}
              - \sum_{i:\, z_i \ne 0} \log slab(z_i)

    With the improper flat slab the last term is 0 and -log p(z) is the L0 penalty of JumpReLU. A
    Gaussian slab makes p proper and adds :math:`\frac12 \log 2\pi\tau^2 + z_i^2 / (2 \tau^2)` to
    the price λ of an entry that is on. Densities are relative to :math:`(\delta_0 + Lebesgue)^K`,
    see :class:`SpikeAndSlab`.

    Args:
        z_dim: number K of latent dimensions.
        rate: λ, any finite number; at 0 half of the entries are on, above 0 fewer.
        slab_scale: scale τ > 0 of the Gaussian slab, or None for the flat one.

    Raises:
        ValueError: ``rate`` is not finite, or ``slab_scale`` is not a finite number > 0.

    Reference:
        Mitchell & Beauchamp, Bayesian variable selection in linear regression, 1988; Rajamanoharan
        et al., Jumping ahead: JumpReLU sparse autoencoders, 2024.

    Example:
        >>> import torch
        >>> prior = SpikeAndSlabPrior(3, rate=2.0, slab_scale=None)()
        >>> price = prior.log_prob(torch.zeros(3)) - prior.log_prob(torch.tensor([0.0, 7.0, -1.0]))
        >>> round(price.item(), 4)  # two active entries
        4.0
    """

    loc: Tensor

    def __init__(self, z_dim: int, rate: float = 1.0, slab_scale: float | None = 1.0) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        if not math.isfinite(as_number(rate)):
            raise ValueError(f"rate must be a finite number, got {rate!r}")
        self.rate = float(rate)
        self.slab_scale = _slab_scale(slab_scale)
        self.register_buffer("loc", torch.zeros(z_dim), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        gate = dist.Bernoulli(logits=self.loc - self.rate).to_event(1)
        return SpikeAndSlab(gate, _slab(self.loc, self.slab_scale))


class SubsetPrior(Part):
    r"""Codes with exactly k active entries, all k-subsets alike: the prior of TopK.

    .. math:: -\log p(z) = \log \tbinom{K}{k} - \sum_{i:\, z_i \ne 0} \log slab(z_i)

    where :math:`\|z\|_0 = k`, and ∞ elsewhere. Densities are relative to
    :math:`(\delta_0 + Lebesgue)^K`, see :class:`SpikeAndSlab`.

    Args:
        z_dim: number K of latent dimensions.
        num_active: number k of active entries, 1 to K.
        slab_scale: scale τ > 0 of a Gaussian slab, or None for the improper flat one.

    Raises:
        ValueError: ``num_active`` is no count between 1 and ``z_dim``, or ``slab_scale`` is not a
            finite number > 0.

    Reference:
        Makhzani & Frey, k-sparse autoencoders, 2013.

    Example:
        >>> import torch
        >>> SubsetPrior(4, num_active=2, slab_scale=None)().log_prob(torch.tensor([0.0, 5, 0, -1]))
        tensor(-1.7918)
    """

    loc: Tensor

    def __init__(self, z_dim: int, num_active: int, slab_scale: float | None = 1.0) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        self.num_active = require_count(num_active, "num_active")
        if self.num_active > z_dim:
            raise ValueError(f"num_active must be at most z_dim, {z_dim}, got {num_active!r}")
        self.slab_scale = _slab_scale(slab_scale)
        self.register_buffer("loc", torch.zeros(z_dim), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        gate = ConditionalBernoulli(self.loc, self.num_active)
        return SpikeAndSlab(gate, _slab(self.loc, self.slab_scale))


class GaussianMixturePrior(Part):
    r"""Learned mixture of Gaussians, :math:`p(z) = \sum_c \pi_c N(z; \mu_c, diag\,\sigma_c^2)`.

    Args:
        z_dim: number of latent dimensions.
        components: number of mixture components.
        scale_min: floor of σ: a component could else shrink onto one code.

    Raises:
        ValueError: ``scale_min`` is not a finite number > 0.

    Reference:
        Dilokthanakul et al., Deep unsupervised clustering with Gaussian mixture VAEs, 2016.

    Example:
        >>> GaussianMixturePrior(3, components=5)().event_shape
        torch.Size([3])
    """

    def __init__(self, z_dim: int, components: int = 10, scale_min: float = 1e-6) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        components = require_count(components, "components")
        self.scale_min = require_positive(scale_min, "scale_min")
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, z_dim))
        self.log_scale = nn.Parameter(torch.zeros(components, z_dim))

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        scale = self.log_scale.exp().clamp(min=self.scale_min)
        components = dist.Normal(self.loc, scale).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)


class VampPrior(Part):
    r"""Mixture of the encoder at learned pseudo-inputs, :math:`p(z) = \frac1C \sum_c q(z|u_c)`.

    Args:
        encoder: the encoder of the same pair; its parameters are shared, not copied.
        x_shape: shape of one datum.
        components: number C of pseudo-inputs; they start at U(0, 1) noise, or at random training
            data after :meth:`Autoencoder.initialize`.

    Raises:
        ValueError: ``components`` < 1; or, from ``forward``, the encoder is a point code, whose
            mixture is no density.

    Reference:
        Tomczak & Welling, VAE with a VampPrior, 2018.

    Example:
        >>> from probae import MLP, GaussianEncoder
        >>> encoder = GaussianEncoder(MLP(8, (2, 3)))
        >>> VampPrior(encoder, 8, components=5)().event_shape
        torch.Size([3])
    """

    def __init__(self, encoder: nn.Module, x_shape: Shape, components: int = 100) -> None:
        super().__init__()
        components = require_count(components, "components")
        self.encoder = encoder
        self.pseudo_inputs = nn.Parameter(torch.rand(components, *as_shape(x_shape, "x_shape")))
        self.register_buffer("logits", torch.zeros(components), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        components = self.encoder(self.pseudo_inputs)
        if is_point(components):
            raise ValueError(
                "encoder of a VampPrior must return a density, got a point code (Delta); use a "
                "GaussianEncoder, or another prior"
            )
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the pseudo-inputs to training data drawn without replacement where there is enough.

        Where there are fewer data than pseudo-inputs, data are repeated.
        """
        count = len(self.pseudo_inputs)
        order = torch.cat([torch.randperm(len(x)) for _ in range(math.ceil(count / len(x)))])
        self.pseudo_inputs.copy_(x[order[:count].to(x.device)])


class FlowPrior(Part):
    r"""Normalizing-flow prior, :math:`p(z) = N(f(z); 0, I)\,|\det \partial f / \partial z|`.

    A neural spline flow from zuko (the extra ``probae[flows]``), through Pyro's own bridge.

    Args:
        z_dim: number of latent dimensions, at least 2.
        transforms: number of autoregressive transformations.
        hidden: widths of the networks inside each transformation.

    Raises:
        ImportError: zuko is not installed; the message names the extra.

    Reference:
        Durkan et al., Neural spline flows, 2019; Chen et al., Variational lossy autoencoder, 2017.

    Example:
        >>> FlowPrior(3, transforms=2, hidden=(16,))().event_shape
        torch.Size([3])
    """

    def __init__(self, z_dim: int, transforms: int = 3, hidden: Shape = (64, 64)) -> None:
        super().__init__()
        try:
            import zuko
        except ImportError as error:
            raise ImportError("FlowPrior needs zuko: pip install 'probae[flows]'") from error
        z_dim = require_count(z_dim, "z_dim")
        transforms = require_count(transforms, "transforms")
        self.flow = zuko.flows.NSF(
            z_dim, transforms=transforms, hidden_features=as_shape(hidden, "hidden")
        )

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        return Flow(self.flow())


class BernoulliPrior(Part):
    r"""Binary codes, :math:`p(z) = \prod_i \rho^{z_i} (1 - \rho)^{1 - z_i}`.

    Args:
        z_dim: number of bits.
        probability: ρ in (0, 1).

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1.

    Example:
        >>> BernoulliPrior(3)().event_shape
        torch.Size([3])
    """

    zeros: Tensor

    def __init__(self, z_dim: int, probability: float = 0.5) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        self.probability = require_probability(probability, "probability")
        self.register_buffer("zeros", torch.zeros(z_dim), persistent=False)

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        return dist.Bernoulli(self.zeros + self.probability).to_event(1)


class CategoricalPrior(Part):
    r"""One learned discrete cause in one-hot code, :math:`p(z = e_c) = \pi_c`.

    Args:
        z_dim: number of categories.

    Example:
        >>> CategoricalPrior(3)().event_shape
        torch.Size([3])
    """

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        z_dim = require_count(z_dim, "z_dim")
        self.logits = nn.Parameter(torch.zeros(z_dim))

    def forward(self) -> Distribution:
        """Return p(z), event shape (z_dim,)."""
        return dist.OneHotCategorical(logits=self.logits)


def _slab_scale(value: float | None) -> float | None:
    return None if value is None else require_positive(value, "slab_scale")


def _slab(loc: Tensor, scale: float | None) -> Distribution:
    """Return the Gaussian slab, or the flat one."""
    return dist.Normal(loc, 1.0).mask(False) if scale is None else dist.Normal(loc, scale)
