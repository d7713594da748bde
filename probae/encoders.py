"""Encoders q(z|x): modules that map x of shape (..., *x_shape) to a distribution over z.

The returned distribution has batch shape (...) and event shape (z_dim,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .decoders import GaussianDecoder
from .networks import MLP
from .part import Part, require_positive, two_parameters

if TYPE_CHECKING:
    from torch.distributions import Distribution


class GaussianEncoder(Part):
    r"""Diagonal Gaussian encoder, :math:`q(z|x) = N(z; \mu(x), diag\,\sigma(x)^2)`.

    Args:
        network: maps (..., *x_shape) to (..., 2, z_dim): the mean, and the scale before
            softplus.
        scale_min: floor of the scale, added to it.

    Raises:
        ValueError: ``scale_min`` is not a finite number > 0.

    Reference:
        Kingma & Welling, Auto-encoding variational Bayes, 2013.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> GaussianEncoder(MLP(8, (2, 3)))(torch.rand(7, 8)).batch_shape
        torch.Size([7])
    """

    def __init__(self, network: nn.Module, scale_min: float = 1e-6) -> None:
        super().__init__()
        self.network = network
        self.scale_min = require_positive(scale_min, "scale_min")

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        loc, scale = two_parameters(self.network(x), -2, "(..., 2, z_dim)")
        return dist.Normal(loc, softplus(scale) + self.scale_min).to_event(1)


class LaplaceEncoder(Part):
    r"""Laplace encoder, :math:`q(z|x) = \prod_i \frac{1}{2 b_i} e^{-|z_i - \mu_i(x)| / b_i}`.

    The proper posterior of a sparse autoencoder: under a :class:`LaplacePrior` of rate λ the KL
    tends to its penalty :math:`\lambda |\mu|` plus a constant as b -> 0.

    Args:
        network: maps (..., *x_shape) to (..., 2, z_dim): μ, and b before softplus.
        scale_min: floor of the scale, added to it.

    Raises:
        ValueError: ``scale_min`` is not a finite number > 0.

    Reference:
        Barello, Charles & Pillow, Sparse-coding variational auto-encoders, 2018.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> LaplaceEncoder(MLP(8, (2, 3)))(torch.rand(7, 8)).event_shape
        torch.Size([3])
    """

    def __init__(self, network: nn.Module, scale_min: float = 1e-6) -> None:
        super().__init__()
        self.network = network
        self.scale_min = require_positive(scale_min, "scale_min")

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        loc, scale = two_parameters(self.network(x), -2, "(..., 2, z_dim)")
        return dist.Laplace(loc, softplus(scale) + self.scale_min).to_event(1)


class LogNormalEncoder(Part):
    r"""Encoder into positive codes, :math:`\log z \sim N(\mu(x), diag\,\sigma(x)^2)`.

    The proper posterior under an :class:`ExponentialPrior`.

    Args:
        network: maps (..., *x_shape) to (..., 2, z_dim): μ, and σ before softplus.
        scale_min: floor of σ, added to it.

    Raises:
        ValueError: ``scale_min`` is not a finite number > 0.

    Reference:
        Kingma & Welling, Auto-encoding variational Bayes, 2013.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> bool((LogNormalEncoder(MLP(8, (2, 3)))(torch.rand(7, 8)).sample() > 0).all())
        True
    """

    def __init__(self, network: nn.Module, scale_min: float = 1e-6) -> None:
        super().__init__()
        self.network = network
        self.scale_min = require_positive(scale_min, "scale_min")

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        loc, scale = two_parameters(self.network(x), -2, "(..., 2, z_dim)")
        return dist.LogNormal(loc, softplus(scale) + self.scale_min).to_event(1)


class PointEncoder(Part):
    r"""Deterministic encoder, :math:`q(z|x) = \delta(z - f(x))`.

    Args:
        network: maps (..., *x_shape) to (..., z_dim).

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> PointEncoder(MLP(8, 3))(torch.rand(7, 8)).mean.shape
        torch.Size([7, 3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Distribution:
        """Return the point mass at f(x), batch shape (...), event shape (z_dim,)."""
        return dist.Delta(self.network(x), event_dim=1)


class BernoulliEncoder(Part):
    r"""Encoder into bits, :math:`q(z|x) = \prod_i Bern(z_i; \sigma(a_i(x)))`.

    Args:
        network: maps (..., *x_shape) to the logits a, (..., z_dim).

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> BernoulliEncoder(MLP(8, 3))(torch.rand(7, 8)).event_shape
        torch.Size([3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        return dist.Bernoulli(logits=self.network(x)).to_event(1)


class CategoricalEncoder(Part):
    r"""Encoder into a one-hot code, :math:`q(z = e_c|x) = softmax_c\,a(x)`.

    Args:
        network: maps (..., *x_shape) to the logits a, (..., z_dim).

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> CategoricalEncoder(MLP(8, 3))(torch.rand(7, 8)).event_shape
        torch.Size([3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,)."""
        return dist.OneHotCategorical(logits=self.network(x))


class LinearGaussianPosterior(Part):
    r"""Exact posterior of a linear-Gaussian decoder under a standard normal prior.

    .. math:: p(z|x) = N(M^{-1} W^T (x - \mu),\; s^2 M^{-1}), \quad M = W^T W + s^2 I

    It has no parameters of its own: W, μ and s are the decoder's.

    Args:
        decoder: a :class:`GaussianDecoder` with a fixed or shared scale on an affine network.

    Raises:
        ValueError: the decoder is not affine with one scale.

    Reference:
        Tipping & Bishop, Probabilistic principal component analysis, 1999.

    Example:
        >>> import torch
        >>> from probae import MLP, GaussianDecoder
        >>> encoder = LinearGaussianPosterior(GaussianDecoder(MLP(3, 8), scale=0.5))
        >>> encoder(torch.rand(7, 8)).event_shape
        torch.Size([3])
    """

    def __init__(self, decoder: GaussianDecoder) -> None:
        super().__init__()
        affine = decoder.affine() if isinstance(decoder, GaussianDecoder) else None
        if affine is None or not isinstance(decoder.network, MLP):
            raise ValueError(
                "decoder must be a GaussianDecoder with a fixed or learned scale on an affine "
                "network (hidden=()); for any other decoder use GaussianEncoder"
            )
        self.decoder = decoder
        self.x_ndim = len(decoder.network.out_shape)

    def forward(self, x: Tensor) -> Distribution:
        """Return p(z|x), batch shape (...), event shape (z_dim,)."""
        affine = self.decoder.affine()
        assert affine is not None
        weight, bias, scale = affine  # (D, k), (D,), ()
        residual = x.flatten(-self.x_ndim) - bias  # (..., D)
        precision = weight.T @ weight / scale**2  # (k, k), then M / s²
        precision = precision + torch.eye(len(precision), dtype=x.dtype, device=x.device)
        cholesky = torch.linalg.cholesky(precision)
        loc = torch.cholesky_solve((residual @ weight / scale**2).unsqueeze(-1), cholesky)
        return dist.MultivariateNormal(loc.squeeze(-1), precision_matrix=precision)
