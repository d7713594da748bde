"""The named autoencoders: each an ``__init__`` that picks parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .datasets import as_tensor
from .decoders import LIKELIHOODS, Decoder, GaussianDecoder
from .encoders import GaussianEncoder, LinearGaussianPosterior, PointEncoder
from .networks import MLP, network_from_code, network_to_code
from .part import Shape, as_shape, require_count
from .priors import (
    FlatPrior,
    FlowPrior,
    GaussianMixturePrior,
    LaplacePrior,
    StandardNormalPrior,
    VampPrior,
)


class PPCA(Autoencoder):
    r"""Probabilistic principal component analysis: the linear-Gaussian pair, with exact evidence.

    .. math:: z \sim N(0, I),\quad x|z \sim N(Wz + \mu, s^2 I),\quad x \sim N(\mu, WW^T + s^2 I)

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions, below that of x.
        posterior: ``"exact"``, the guide is p(z|x) itself and the ELBO is log p(x); or
            ``"diagonal"``, an affine encoder with a diagonal covariance (the linear VAE), which
            recovers the principal directions and not only their span (Lucas et al., 2019).
        scale: starting value of s, or its value where it is not learned.
        learn_scale: whether s is a parameter.

    Raises:
        ValueError: ``z_dim`` not below the dimension of x, unknown ``posterior``, ``scale`` <= 0.

    Reference:
        Tipping & Bishop, Probabilistic principal component analysis, 1999.

    Example:
        >>> import torch, probae
        >>> x = torch.randn(100, 5)
        >>> pair = probae.PPCA.maximum_likelihood(x, z_dim=2)
        >>> probae.log_likelihood(pair, x).method
        'exact'
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        posterior: str = "exact",
        scale: float = 1.0,
        learn_scale: bool = True,
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        if z_dim >= torch.Size(x_shape).numel():
            raise ValueError(f"z_dim must be below the dimension of x, {x_dim}, got {z_dim}")
        decoder = GaussianDecoder(MLP(z_dim, x_shape), scale=scale, learn_scale=learn_scale)
        encoder: nn.Module
        if posterior == "exact":
            encoder = LinearGaussianPosterior(decoder)
        elif posterior == "diagonal":
            encoder = GaussianEncoder(MLP(x_shape, (2, z_dim)))
        else:
            raise ValueError(f"posterior must be 'exact' or 'diagonal', got {posterior!r}")
        super().__init__(StandardNormalPrior(z_dim), encoder, decoder)

    @classmethod
    def maximum_likelihood(cls, x: Tensor, z_dim: int) -> PPCA:
        r"""Return the pair at its exact maximum of the likelihood of ``x`` (N, *x_shape).

        .. math:: W = U_k (\Lambda_k - s^2 I)^{1/2},\quad s^2 = \frac{1}{D-k}\sum_{j>k} \lambda_j

        with eigenvalues λ and eigenvectors U of the 1/N covariance (Tipping & Bishop, 1999).

        Raises:
            ValueError: ``x`` has the wrong shape or dtype, is empty or not finite, or has no
                variance beyond ``z_dim`` components, so that the likelihood is unbounded.
        """
        x = as_tensor(x, "x")
        if x.dim() < 2:
            raise ValueError(f"x must have shape (N, *x_shape), got {tuple(x.shape)}")
        pair = cls(tuple(x.shape[1:]), z_dim).to(x)
        flat = x.flatten(1).double()
        covariance = torch.cov(flat.T, correction=0)
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
        variance = eigenvalues[z_dim:].mean()
        assert isinstance(pair.decoder, GaussianDecoder)
        floor = pair.decoder.scale_min
        if variance <= floor**2:
            raise ValueError(
                f"x must vary beyond its first z_dim={z_dim} principal components by more than the "
                f"floor of the scale, {floor}, got a standard deviation of {variance.sqrt():.3g} "
                "there; rescale x, lower z_dim, or take more data"
            )
        weight = vectors[:, :z_dim] * (eigenvalues[:z_dim] - variance).clamp(min=0).sqrt()
        pair.set_parameters(weight, flat.mean(0), float(variance.sqrt()))
        return pair

    @torch.no_grad()
    def set_parameters(self, weight: Tensor, mean: Tensor, scale: float) -> None:
        """Set W of shape (D, k), μ of shape (D,) and s of the decoder.

        Raises:
            ValueError: a shape is wrong, a value is not finite, or ``scale`` is not above the
                decoder's floor.
        """
        assert isinstance(self.decoder, GaussianDecoder)
        affine = self.decoder.affine()
        assert affine is not None
        for argument, value, own in (("weight", weight, affine[0]), ("mean", mean, affine[1])):
            if as_tensor(value, argument).shape != own.shape:
                raise ValueError(
                    f"{argument} must have shape {tuple(own.shape)}, got {tuple(value.shape)}"
                )
        self.decoder.set_scale(scale)
        affine[0].copy_(weight)
        affine[1].copy_(mean)


class UndercompleteAutoencoder(Autoencoder):
    r"""The plain autoencoder with a code smaller than x: :math:`z = f(x),\; x \sim p(x|g(z))`.

    Its loss is -log p(x|g(f(x))): for a Gaussian likelihood with σ² = 1/2 the squared error plus
    (D/2) log π nats per datum. With the flat prior it says nothing about p(x) (kind
    RECONSTRUCTION).

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them, for images (C, H, W).
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS`` (``"gaussian"``, ``"bernoulli"``, …).
        likelihood_options: keywords of that decoder, such as ``{"scale": 0.1}``.
        prior: ``"flat"``, ``"normal"``, ``"laplace"`` or any prior module. With a proper prior the
            loss is the joint density log p(x, f(x)) (kind MAP_JOINT), no bound on log p(x).

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Goodfellow, Bengio & Courville, Deep learning, 2016, section 14.1.

    Example:
        >>> import probae
        >>> probae.UndercompleteAutoencoder(64, 8, hidden=(32,)).kind.value
        'RECONSTRUCTION'
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        hidden: Shape = (400,),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "gaussian",
        likelihood_options: dict[str, Any] | None = None,
        prior: str | nn.Module = "flat",
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        encoder = PointEncoder(network_to_code(x_shape, (z_dim,), hidden, channels, activation))
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        super().__init__(_prior(prior, z_dim, encoder, x_shape), encoder, decoder)


class VAE(Autoencoder):
    r"""Variational autoencoder: Gaussian encoder, any prior, any likelihood.

    .. math:: \log p(x) \ge E_{q(z|x)} \log p(x|z) - KL(q(z|x) \| p(z))

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them, for images (C, H, W).
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS`` (``"bernoulli"``, ``"gaussian"``, …).
        likelihood_options: keywords of that decoder, such as ``{"learn_scale": True}``.
        prior: ``"normal"``, ``"laplace"``, ``"mixture"``, ``"vamp"``, ``"flow"`` or any prior
            module.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Kingma & Welling, Auto-encoding variational Bayes, 2013; Rezende, Mohamed & Wierstra,
        Stochastic backpropagation, 2014.

    Example:
        >>> import torch, probae
        >>> pair = probae.VAE((1, 8, 8), 4, hidden=(64,))
        >>> run = probae.fit(pair, torch.rand(256, 1, 8, 8).round(), epochs=1, progress=False)
        >>> pair.kind.value
        'ELBO'
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        hidden: Shape = (400,),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
        prior: str | nn.Module = "normal",
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        encoder = GaussianEncoder(
            network_to_code(x_shape, (2, z_dim), hidden, channels, activation)
        )
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        super().__init__(_prior(prior, z_dim, encoder, x_shape), encoder, decoder)


def _dimensions(x_dim: Shape, z_dim: int) -> tuple[tuple[int, ...], int]:
    return as_shape(x_dim, "x_dim"), require_count(z_dim, "z_dim")


def _prior(
    prior: str | nn.Module, z_dim: int, encoder: nn.Module, x_shape: tuple[int, ...]
) -> nn.Module:
    """Return the prior of that name, or the module itself."""
    if isinstance(prior, nn.Module):
        return prior
    if prior == "vamp":
        return VampPrior(encoder, x_shape)
    named: dict[str, type[nn.Module]] = {
        "normal": StandardNormalPrior,
        "laplace": LaplacePrior,
        "mixture": GaussianMixturePrior,
        "flow": FlowPrior,
        "flat": FlatPrior,
    }
    if not isinstance(prior, str) or prior not in named:
        raise ValueError(
            f"prior must be a module or one of {', '.join([*named, 'vamp'])}, got {prior!r}"
        )
    return named[prior](z_dim)


def _decoder(
    x_shape: tuple[int, ...],
    z_dim: int,
    hidden: Shape,
    channels: Shape,
    activation: str,
    likelihood: str,
    options: dict[str, Any] | None,
) -> Decoder:
    """Return the decoder of that likelihood on the mirror image of the encoder's network."""
    if not isinstance(likelihood, str) or likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"likelihood_options must be a dict of keywords, got {options!r}")
    decoder, keywords = LIKELIHOODS[likelihood], dict(options or {})
    classes = (keywords.pop("num_classes"),) if "num_classes" in keywords else ()
    try:
        out_shape = decoder.output_shape(x_shape, *classes)
        network = network_from_code(z_dim, out_shape, hidden, channels, activation)
        return decoder(network, **keywords)
    except TypeError as error:
        raise ValueError(
            f"likelihood_options do not fit likelihood={likelihood!r}: {error}"
        ) from error
