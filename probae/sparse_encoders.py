"""Encoders of codes with exact zeros: spike-and-slab, k-subset, noisy gates, JumpReLU, TopK."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .hashing import probit_logit
from .part import Part, require_count, require_flag, require_positive
from .sparse import ConditionalBernoulli, SpikeAndSlab, top_k

if TYPE_CHECKING:
    from torch.distributions import Distribution

# name -> Bernoulli gate with probability F(u), the distribution function of a noisy threshold
KERNELS: dict[str, Callable[[Tensor], dist.Bernoulli]] = {
    "rectangle": lambda u: dist.Bernoulli(probs=(u + 0.5).clamp(0, 1)),
    "logistic": lambda u: dist.Bernoulli(logits=u),
    "gaussian": lambda u: dist.Bernoulli(logits=probit_logit(u)),
}


class SpikeAndSlabEncoder(Part):
    r"""Gates and Gaussian values: :math:`z = s \odot a`, :math:`s_i \sim Bern(\sigma(g_i(x)))`.

    .. math:: a_i \sim N(\mu_i(x), \sigma_i(x)^2) \text{ where } s_i = 1

    The proper posterior under a :class:`SpikeAndSlabPrior`; see :class:`SpikeAndSlab` for its base
    measure and gradient.

    Args:
        network: maps (..., *x_shape) to (..., 3, z_dim): the logits g of the gates, the mean of
            the slab, and its scale before softplus.
        scale_min: floor of the scale, added to it.

    Raises:
        ValueError: ``scale_min`` is not a finite number > 0.

    Reference:
        Tonolini, Jensen & Murray-Smith, Variational sparse coding, 2019.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> SpikeAndSlabEncoder(MLP(8, (3, 5)))(torch.rand(7, 8)).event_shape
        torch.Size([5])
    """

    def __init__(self, network: nn.Module, scale_min: float = 1e-6) -> None:
        super().__init__()
        self.network = network
        self.scale_min = require_positive(scale_min, "scale_min")

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        logits, loc, scale = _three_parameters(self.network(x))
        slab = dist.Normal(loc, softplus(scale) + self.scale_min)
        return SpikeAndSlab(dist.Bernoulli(logits=logits).to_event(1), slab)


class ConditionalBernoulliEncoder(Part):
    r"""Exactly k active entries, drawn at random: the proper posterior that TopK is a point of.

    .. math:: q(s|x) \propto \prod_i e^{s_i g_i(x)} \text{ on } \|s\|_0 = k,\quad
              a_i \sim N(\mu_i(x), \sigma_i(x)^2) \text{ where } s_i = 1

    Args:
        network: maps (..., *x_shape) to (..., 3, z_dim): the logits g of the gates, the mean of
            the slab, and its scale before softplus.
        num_active: number k of active entries; a :class:`SubsetPrior` needs the same.
        scale_min: floor of the scale, added to it.

    Raises:
        ValueError: ``num_active`` is no int >= 1 (or, from ``forward``, more than z_dim), or
            ``scale_min`` is not a finite number > 0.

    Reference:
        Chen & Liu, Statistical applications of the Poisson-binomial and conditional Bernoulli
        distributions, 1997.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> q = ConditionalBernoulliEncoder(MLP(8, (3, 5)), num_active=2)(torch.rand(7, 8))
        >>> (q.sample() != 0).sum(-1)
        tensor([2, 2, 2, 2, 2, 2, 2])
    """

    def __init__(self, network: nn.Module, num_active: int, scale_min: float = 1e-6) -> None:
        super().__init__()
        self.network = network
        self.num_active = require_count(num_active, "num_active")
        self.scale_min = require_positive(scale_min, "scale_min")

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        logits, loc, scale = _three_parameters(self.network(x))
        slab = dist.Normal(loc, softplus(scale) + self.scale_min)
        return SpikeAndSlab(ConditionalBernoulli(logits, self.num_active), slab)


class NoisyGateEncoder(Part):
    r"""JumpReLU with a noisy threshold: a proper posterior over which entries are on.

    .. math:: s_i \sim Bern\big(F((a_i(x) - \theta_i) / \varepsilon)\big),\quad
              z_i = s_i\, N(a_i(x), \sigma_i^2)

    where F is the distribution function of the kernel. The gradient of the expected L0 norm with
    respect to θ is :math:`-\frac1\varepsilon K((a - \theta)/\varepsilon)`: the pseudo-derivative
    that JumpReLU is trained with is the exact derivative of this gate.

    Args:
        network: maps (..., *x_shape) to the pre-activations a, (..., z_dim).
        z_dim: number of latent dimensions.
        threshold: where the learned thresholds θ > 0 start, one a dimension.
        bandwidth: ε > 0, width of the noise of the threshold.
        kernel: law of that noise: ``rectangle`` (uniform on [-½, ½], as in the paper),
            ``logistic`` or ``gaussian``.
        slab_scale: scale σ > 0 of the values, or None for z = s ⊙ a, a point code in the values.
        learn_scale: train σ, one a dimension, from ``slab_scale`` on.
        scale_min: floor of a learned σ.

    Raises:
        ValueError: a number is not finite and > 0, the kernel is unknown, or ``learn_scale`` is
            given without a scale.

    Reference:
        Rajamanoharan et al., Jumping ahead: improving reconstruction fidelity with JumpReLU sparse
        autoencoders, 2024.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> encoder = NoisyGateEncoder(MLP(8, 5), z_dim=5, threshold=0.1)
        >>> expected_l0 = encoder(torch.rand(7, 8)).gate.mean.sum(-1)
        >>> expected_l0.shape
        torch.Size([7])
    """

    def __init__(
        self,
        network: nn.Module,
        z_dim: int,
        threshold: float = 0.1,
        bandwidth: float = 0.1,
        kernel: str = "rectangle",
        slab_scale: float | None = 0.1,
        learn_scale: bool = False,
        scale_min: float = 1e-6,
    ) -> None:
        super().__init__()
        self.network = network
        self.log_threshold = _log_threshold(threshold, z_dim)
        self.bandwidth = require_positive(bandwidth, "bandwidth")
        self.kernel = _require_kernel(kernel)
        require_flag(learn_scale, "learn_scale")
        self.scale_min = require_positive(scale_min, "scale_min")
        if slab_scale is None and learn_scale:
            raise ValueError("learn_scale=True needs a slab_scale to start from, got None")
        self.slab_scale = None if slab_scale is None else require_positive(slab_scale, "slab_scale")
        self.log_scale = None
        if learn_scale and self.slab_scale is not None:
            self.log_scale = nn.Parameter(torch.full((z_dim,), math.log(self.slab_scale)))

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        value = self.network(x)
        u = (value - _threshold(self.log_threshold, value)) / self.bandwidth
        gate = KERNELS[self.kernel](u).to_event(1)
        if self.slab_scale is None:
            return SpikeAndSlab(gate, dist.Delta(value))
        scale: Tensor | float = self.slab_scale
        if self.log_scale is not None:
            scale = self.log_scale.exp().clamp(min=self.scale_min)
        return SpikeAndSlab(gate, dist.Normal(value, scale))


class JumpReLUEncoder(Part):
    r"""JumpReLU point code, :math:`z_i = a_i\,1[a_i > \theta_i]`, with learned thresholds.

    The thresholds get the straight-through pseudo-derivatives of the paper, K the kernel,

    .. math:: \frac{\partial z_i}{\partial \theta_i} :=
              -\frac{\theta_i}{\varepsilon} K\Big(\frac{a_i - \theta_i}{\varepsilon}\Big),\quad
              \frac{\partial \|z\|_0}{\partial \theta_i} :=
              -\frac1\varepsilon K\Big(\frac{a_i - \theta_i}{\varepsilon}\Big)

    The second is not seen by a prior, which is shown z alone: give the prior's ``rate`` and
    ``slab_scale`` τ here, too, and the encoder adds what switching an entry on costs,
    :math:`\lambda` under a flat slab and :math:`\lambda + \frac12\log 2\pi\tau^2 +
    \theta_i^2 / 2\tau^2` under a Gaussian one, as the gradient of a term that is zero (the
    ``log_density`` of the point). ``TraceMeanField_ELBO`` does not look at that term and would
    leave the thresholds untrained; use :class:`probae.ELBO` or ``Trace_ELBO``.
    :class:`NoisyGateEncoder` needs no such device.

    Args:
        network: maps (..., *x_shape) to the pre-activations a, (..., z_dim).
        z_dim: number of latent dimensions.
        threshold: where the learned thresholds θ > 0 start, one a dimension.
        bandwidth: ε > 0, width of the kernel.
        kernel: ``rectangle`` (as in the paper), ``logistic`` or ``gaussian``.
        rate: weight λ of the L0 price, the ``rate`` of the :class:`SpikeAndSlabPrior`, or None for
            a prior that does not price the number of active entries.
        slab_scale: that of the same prior, None for a flat slab.

    Raises:
        ValueError: a number is not finite and > 0, or the kernel is unknown.

    Reference:
        Rajamanoharan et al., Jumping ahead: improving reconstruction fidelity with JumpReLU sparse
        autoencoders, 2024.

    Example:
        >>> import torch
        >>> encoder = JumpReLUEncoder(torch.nn.Identity(), z_dim=3, threshold=0.5)
        >>> encoder(torch.tensor([-2.0, 0.4, 3.0])).mean.tolist()
        [0.0, 0.0, 3.0]
    """

    def __init__(
        self,
        network: nn.Module,
        z_dim: int,
        threshold: float = 0.1,
        bandwidth: float = 0.1,
        kernel: str = "rectangle",
        rate: float | None = None,
        slab_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.log_threshold = _log_threshold(threshold, z_dim)
        self.bandwidth = require_positive(bandwidth, "bandwidth")
        self.kernel = _require_kernel(kernel)
        self.rate = None if rate is None else require_positive(rate, "rate")
        self.slab_scale = None if slab_scale is None else require_positive(slab_scale, "slab_scale")

    def forward(self, x: Tensor) -> Distribution:
        """Return the point mass at z, batch shape (...), event shape (z_dim,)."""
        value = self.network(x)
        threshold = _threshold(self.log_threshold, value)
        smooth = KERNELS[self.kernel]((value.detach() - threshold) / self.bandwidth).probs
        jump = smooth - smooth.detach()  # zero, with the derivative -K/ε of the gate
        z = torch.where(value > threshold, value, 0.0) + threshold.detach() * jump
        log_density = 0.0 if self.rate is None else (self._price(z, threshold) * jump).sum(-1)
        return dist.Delta(z, log_density, event_dim=1)

    def _price(self, z: Tensor, threshold: Tensor) -> Tensor:
        """Cost of switching an entry on, less what its prior already sends through z."""
        assert self.rate is not None
        price = torch.full_like(z, self.rate)
        if self.slab_scale is not None:
            theta, variance = threshold.detach(), self.slab_scale**2
            price = price + 0.5 * math.log(2 * math.pi * variance) + theta**2 / (2 * variance)
            price = price - z.detach() * theta / variance
        return price


class TopKEncoder(Part):
    r"""TopK point code: all but the k largest pre-activations are set to zero.

    .. math:: z_i = a_i\,1[i \in S],\quad S = \text{the } k \text{ largest } |a_i|

    Args:
        network: maps (..., *x_shape) to the pre-activations a, (..., z_dim).
        num_active: number k of active entries; a :class:`SubsetPrior` needs the same.
        positive: nonnegative codes, ReLU after TopK: the k largest a, and what is not positive
            among them set to the smallest positive number, so that k stay active.

    Raises:
        ValueError: ``num_active`` is no int >= 1 (or, from ``forward``, more than z_dim).

    Reference:
        Makhzani & Frey, k-sparse autoencoders, 2013; Gao et al., Scaling and evaluating sparse
        autoencoders, 2024.

    Example:
        >>> import torch
        >>> encoder = TopKEncoder(torch.nn.Identity(), num_active=2)
        >>> encoder(torch.tensor([-2.0, 0.4, 3.0])).mean
        tensor([-2.,  0.,  3.])
    """

    def __init__(self, network: nn.Module, num_active: int, positive: bool = False) -> None:
        super().__init__()
        self.network = network
        self.num_active = require_count(num_active, "num_active")
        self.positive = require_flag(positive, "positive")

    def forward(self, x: Tensor) -> Distribution:
        """Return the point mass at z, batch shape (...), event shape (z_dim,)."""
        value = self.network(x)
        if value.shape[-1] < self.num_active:
            raise ValueError(
                f"num_active must be at most z_dim, {value.shape[-1]}, got {self.num_active}"
            )
        return dist.Delta(top_k(value, self.num_active, self.positive), event_dim=1)


def _three_parameters(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a network's output into gate logits, mean and scale before softplus."""
    if output.dim() < 2 or output.shape[-2] != 3:
        raise ValueError(
            f"network must have output of shape (..., 3, z_dim), got {tuple(output.shape)}"
        )
    logits, loc, scale = output.unbind(-2)
    return logits, loc, scale


def _log_threshold(threshold: float, z_dim: int) -> nn.Parameter:
    start = math.log(require_positive(threshold, "threshold"))
    return nn.Parameter(torch.full((require_count(z_dim, "z_dim"),), start))


def _threshold(log_threshold: Tensor, value: Tensor) -> Tensor:
    """Return the thresholds, (z_dim,), of pre-activations of that many dimensions."""
    if value.shape[-1:] != log_threshold.shape:
        raise ValueError(
            f"network must have output of shape (..., {len(log_threshold)}), as z_dim says, got "
            f"{tuple(value.shape)}"
        )
    return log_threshold.exp()


def _require_kernel(kernel: str) -> str:
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    return kernel
