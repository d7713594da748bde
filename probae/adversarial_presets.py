"""The named adversarial pairs: each an ``__init__`` that picks parts and a discriminator."""

from __future__ import annotations

from typing import Any

from torch import nn

from .autoencoder import Autoencoder
from .discriminators import Discriminator, ImplicitEncoder, NoEncoder
from .encoders import GaussianEncoder, PointEncoder
from .networks import MLP, network_to_code
from .part import Shape, as_widths, numel, require_count
from .presets import _decoder, _dimensions, _prior


class GAN(Autoencoder):
    r"""Generative adversarial network: a decoder and a discriminator of data, and no encoder.

    .. math:: z \sim p(z),\quad x \sim N(g(z), \sigma^2 I),\qquad
              \min_g \max_T\; E_{data} \log \sigma(T(x)) + E_{p(z)} \log \sigma(-T(g(z)))

    :func:`probae.fit_adversarial` trains it; σ takes no part in the game. What has a density is the
    smoothed generator, g(z) with noise of that σ, and ``log_likelihood(pair, x, method="ais")``
    measures it (kind ADVERSARIAL: the game itself says nothing about log p(x)). Choose σ on
    validation data: ``pair.decoder.set_scale(σ)``. There are no codes of x: whatever needs an
    encoder is refused, or takes ``proposal=probae.fit_proposal(pair, x_train)``.

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        hidden: widths of the decoder's hidden layers, from the image to the code.
        channels: channels of transposed convolutions behind them, for images (C, H, W), from the
            image to the code.
        activation: of the decoder's hidden layers, see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``; the game is about its mean.
        likelihood_options: keywords of that decoder; by default the Gaussian has
            ``{"learn_scale": True}``, so that σ can be set.
        prior: ``"normal"`` or any prior module without parameters to learn.
        discriminator: widths of the discriminator's hidden layers, ReLU; or a
            :class:`Discriminator` with ``sees="data"``.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Goodfellow et al., Generative adversarial nets, 2014; Wu et al., On the quantitative
        analysis of decoder-based generative models, 2017, for its likelihood.

    Example:
        >>> import torch, probae
        >>> pair, x = probae.GAN(8, 2, hidden=(16,)), torch.randn(64, 8)
        >>> run = probae.fit_adversarial(pair, x, epochs=1, progress=False)
        >>> pair.decoder.set_scale(0.5)
        >>> probae.log_likelihood(pair, x[:4], "ais", annealing=probae.Annealing(20)).is_bound
        True
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
        prior: str | nn.Module = "normal",
        discriminator: Shape | nn.Module = (400,),
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        gaussian = isinstance(likelihood, str) and likelihood == "gaussian"
        if gaussian and likelihood_options is None:
            likelihood_options = {"learn_scale": True}
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        encoder = NoEncoder()
        judge = _discriminator(discriminator, x_shape, "data")
        prior = _prior(prior, z_dim, encoder, x_shape)
        super().__init__(prior, encoder, decoder, discriminator=judge)


class AdversarialAutoencoder(Autoencoder):
    r"""Adversarial autoencoder: a discriminator draws the codes of all data towards the prior.

    .. math:: loss = -E_{q(z|x)} \log p(x|z) + \lambda\,KL(q(z) \| p(z)),\quad
              q(z) = E_x\,q(z|x)

    with the KL estimated by a discriminator of codes, which :func:`probae.fit_adversarial` trains,
    λ being its ``weight``. Beside the ELBO this leaves out the mutual information of x and z, so it
    bounds nothing (kind ADVERSARIAL), and a point code can minimise it. The model p(z) p(x|z) has a
    likelihood all the same: ``log_likelihood(pair, x, method="ais")``.

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        posterior: ``"point"``, z = f(x); ``"gaussian"``; or ``"implicit"``, z = f(x, ε).
        noise_dim: dimension of ε of ``"implicit"``, by default ``z_dim``.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them, for images (C, H, W).
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``.
        likelihood_options: keywords of that decoder, such as ``{"learn_scale": True}``.
        prior: ``"normal"``, ``"laplace"`` or any prior module without parameters to learn.
        discriminator: widths of the discriminator's hidden layers, ReLU; or a
            :class:`Discriminator` with ``sees="code"``.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Makhzani et al., Adversarial autoencoders, 2015; Tolstikhin et al., Wasserstein
        auto-encoders, 2018.

    Example:
        >>> import torch, probae
        >>> pair = probae.AdversarialAutoencoder(8, 2, hidden=(16,))
        >>> run = probae.fit_adversarial(pair, torch.randn(64, 8), epochs=1, progress=False)
        >>> pair.kind.value, probae.reconstruct(pair, torch.randn(5, 8)).mean.shape
        ('ADVERSARIAL', torch.Size([5, 8]))
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        posterior: str = "point",
        noise_dim: int | None = None,
        hidden: Shape = (400,),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "gaussian",
        likelihood_options: dict[str, Any] | None = None,
        prior: str | nn.Module = "normal",
        discriminator: Shape | nn.Module = (400,),
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        if not isinstance(posterior, str):
            raise ValueError(f"posterior must be a name, a str, got {type(posterior).__name__}")
        if posterior not in ("point", "gaussian", "implicit"):
            raise ValueError(
                f"posterior must be 'point', 'gaussian' or 'implicit', got {posterior!r}"
            )
        if posterior != "implicit" and noise_dim is not None:
            raise ValueError(
                f"noise_dim goes with posterior='implicit', got posterior={posterior!r}"
            )
        encoder: nn.Module
        if posterior == "point":
            encoder = PointEncoder(network_to_code(x_shape, (z_dim,), hidden, channels, activation))
        elif posterior == "gaussian":
            encoder = GaussianEncoder(
                network_to_code(x_shape, (2, z_dim), hidden, channels, activation)
            )
        else:
            encoder = _implicit(x_shape, z_dim, noise_dim, hidden, channels, activation)
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        judge = _discriminator(discriminator, (z_dim,), "code")
        prior = _prior(prior, z_dim, encoder, x_shape)
        super().__init__(prior, encoder, decoder, discriminator=judge)


class AdversarialVariationalBayes(Autoencoder):
    r"""Adversarial variational Bayes: an encoder of any law, its KL from a discriminator.

    .. math:: z = f(x, \epsilon),\quad
              loss = E_{q(z|x)} [-\log p(x|z) + T(x, z)],\quad
              T^*(x, z) = \log q(z|x) - \log p(z)

    At the optimal discriminator T* this is the negative ELBO, and its gradient that of the ELBO, as
    the gradient of T* in the encoder's parameters has mean zero. At any other it is an estimate, so
    that the pair is of kind ADVERSARIAL: :func:`probae.fit_adversarial` trains it,
    :func:`probae.adversarial_elbo` returns the estimate.

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        noise_dim: dimension of ε ~ N(0, I), by default ``z_dim``.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: of transposed convolutions of the decoder; the encoder has none.
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``.
        likelihood_options: keywords of that decoder, such as ``{"learn_scale": True}``.
        prior: ``"normal"``, ``"laplace"`` or any prior module without parameters to learn.
        discriminator: widths of the discriminator's hidden layers, ReLU; or a
            :class:`Discriminator` with ``sees="joint"``.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Mescheder, Nowozin & Geiger, Adversarial variational Bayes: unifying variational
        autoencoders and generative adversarial networks, 2017.

    Example:
        >>> import torch, probae
        >>> pair = probae.AdversarialVariationalBayes(8, 2, hidden=(16,))
        >>> run = probae.fit_adversarial(pair, torch.randn(64, 8), epochs=1, progress=False)
        >>> pair.kind.value, sorted(run.history)[:2]
        ('ADVERSARIAL', ['accuracy', 'discriminator_loss'])
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        noise_dim: int | None = None,
        hidden: Shape = (400,),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "gaussian",
        likelihood_options: dict[str, Any] | None = None,
        prior: str | nn.Module = "normal",
        discriminator: Shape | nn.Module = (400,),
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        encoder = _implicit(x_shape, z_dim, noise_dim, hidden, (), activation)
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        judge = _discriminator(discriminator, (numel(x_shape) + z_dim,), "joint")
        prior = _prior(prior, z_dim, encoder, x_shape)
        super().__init__(prior, encoder, decoder, discriminator=judge)


def _implicit(
    x_shape: tuple[int, ...],
    z_dim: int,
    noise_dim: int | None,
    hidden: Shape,
    channels: Shape,
    activation: str,
) -> ImplicitEncoder:
    noise_dim = z_dim if noise_dim is None else require_count(noise_dim, "noise_dim")
    if channels not in ((), []):
        raise ValueError(
            "channels must be () for posterior='implicit', whose perceptron sees x and noise in "
            f"a row, got {channels!r}"
        )
    network = MLP(numel(x_shape) + noise_dim, z_dim, hidden, activation)
    return ImplicitEncoder(network, x_shape, z_dim, noise_dim)


def _discriminator(given: Shape | nn.Module, seen: tuple[int, ...], sees: str) -> nn.Module:
    """Return the discriminator given, or one of these widths for inputs of shape ``seen``."""
    if not isinstance(given, nn.Module):
        return Discriminator(MLP(seen, 1, as_widths(given, "discriminator")), sees)
    if not isinstance(given, Discriminator) or given.sees != sees:
        found = f" with sees={given.sees!r}" if isinstance(given, Discriminator) else ""
        raise ValueError(
            f"discriminator must be widths or a Discriminator with sees={sees!r}, got "
            f"{type(given).__name__}{found}"
        )
    return given
