"""The named autoencoders: each an ``__init__`` that picks parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .corruptions import GaussianNoise
from .datasets import as_tensor
from .decoders import LIKELIHOODS, Decoder, GaussianDecoder
from .distributions import is_point
from .encoders import (
    BernoulliEncoder,
    GaussianEncoder,
    LaplaceEncoder,
    LinearGaussianPosterior,
    LogNormalEncoder,
    PointEncoder,
)
from .factors import CodeCoupling, ContractivePenalty
from .hashing import NoisySigmoidEncoder, ProbitEncoder, ThresholdEncoder
from .networks import MLP, TransposedMLP, network_from_code, network_to_code
from .part import Shape, as_shape, require_count, require_flag, require_positive
from .priors import (
    BernoulliPrior,
    ExponentialPrior,
    FlatPrior,
    FlowPrior,
    GaussianMixturePrior,
    LaplacePrior,
    SpikeAndSlabPrior,
    StandardNormalPrior,
    StudentTPrior,
    SubsetPrior,
    VampPrior,
)
from .sparse_coding import SparseCodingEncoder
from .sparse_encoders import (
    ConditionalBernoulliEncoder,
    JumpReLUEncoder,
    NoisyGateEncoder,
    SpikeAndSlabEncoder,
    TopKEncoder,
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
        if not isinstance(posterior, str) or posterior not in ("exact", "diagonal"):
            raise ValueError(f"posterior must be 'exact' or 'diagonal', got {posterior!r}")
        if posterior == "exact":
            encoder = LinearGaussianPosterior(decoder)
        else:
            encoder = GaussianEncoder(MLP(x_shape, (2, z_dim)))
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


class SparseAutoencoder(Autoencoder):
    r"""Sparse autoencoder as approximate maximum likelihood: a sparse prior, any encoder.

    .. math:: z_i \sim Laplace(0, 1/\lambda),\quad x \sim p(x|g(z)),\quad
              loss = -\log p(x|g(f(x))) + \lambda \|f(x)\|_1 + k \log(2/\lambda)

    for the textbook's point code f. That loss is a joint density (kind MAP_JOINT) and certifies
    nothing; a posterior with a density makes it an ELBO. Prior and posterior go together so:

    ==================  ==========================================  =============================
    prior               posterior                                   -log p(z), up to a constant
    ==================  ==========================================  =============================
    ``laplace``         ``point``, ``laplace``, ``gaussian``        λ‖z‖₁
    ``exponential``     ``point`` (ReLU code), ``lognormal``        λ Σ z_i, z ≥ 0
    ``student-t``       ``point``, ``gaussian``                     Σ (ν+1)/2 log(1 + (λz_i)²/ν)
    ``spike-and-slab``  ``point`` (JumpReLU), ``noisy-gate``,       λ‖z‖₀ + slab
                        ``spike-and-slab``
    ``subset``          ``point`` (TopK), ``conditional-bernoulli``  log C(k, num_active) + slab
    ==================  ==========================================  =============================

    ``noisy-gate`` is the JumpReLU code as a proper guide: the gate opens with a probability that
    rises from 0 to 1 around a learned threshold.

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions, often more than x has.
        rate: λ > 0, by default 1: the penalty's weight in nats; not used by ``subset``.
        prior: a name of the table, or any prior module.
        posterior: a name of the table, ``"sparse-coding"`` (the exact MAP code of a linear Gaussian
            decoder under the Laplace prior), or any encoder module.
        num_active: number of active units, for ``subset``.
        slab_scale: standard deviation of the slab of ``spike-and-slab`` and ``subset``. None: flat,
            as in the textbook losses of JumpReLU and TopK; there is then no p(x) (kind ENERGY).
        bandwidth: width ε of the noise of the thresholds of ``spike-and-slab``'s gates, in units of
            the pre-activations; a threshold learns from data within that distance.
        unit_norm: give every weight matrix of the decoder columns of unit length. By default where
            the code is a point, whose penalty could otherwise be had for nothing by rescaling.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them, for images (C, H, W).
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``.
        likelihood_options: keywords of that decoder, such as ``{"scale": 0.1}``.

    Raises:
        ValueError: an argument is out of range or unknown, prior and posterior do not go together,
            or a prior that learns its scale meets a point code.

    Reference:
        Goodfellow, Bengio & Courville, Deep learning, 2016, section 14.2.1; Olshausen & Field,
        1997; Makhzani & Frey, k-sparse autoencoders, 2013; Rajamanoharan et al., JumpReLU sparse
        autoencoders, 2024.

    Example:
        >>> import probae
        >>> probae.SparseAutoencoder(64, 100, rate=0.5).kind.value
        'MAP_JOINT'
        >>> probae.SparseAutoencoder(64, 100, rate=0.5, posterior="laplace").kind.value
        'ELBO'
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        rate: float | None = None,
        prior: str | nn.Module = "laplace",
        posterior: str | nn.Module = "point",
        num_active: int | None = None,
        slab_scale: float | None = 1.0,
        bandwidth: float = 0.1,
        unit_norm: bool | None = None,
        hidden: Shape = (),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "gaussian",
        likelihood_options: dict[str, Any] | None = None,
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        named = isinstance(posterior, str)
        if isinstance(posterior, nn.Module):
            try:
                point = is_point(posterior(torch.zeros(1, *x_shape)))
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ValueError(
                    f"posterior must be an encoder that takes x of shape (N, *{x_shape}), got "
                    f"{type(posterior).__name__}: {error}"
                ) from error
        else:
            point = named and posterior in ("point", "sparse-coding")
        subset = isinstance(prior, str) and prior == "subset"
        if unit_norm is not None:
            require_flag(unit_norm, "unit_norm")
        if slab_scale is not None:
            require_positive(slab_scale, "slab_scale")
        require_positive(bandwidth, "bandwidth")
        decoder = _decoder(
            x_shape,
            z_dim,
            hidden,
            channels,
            activation,
            likelihood,
            likelihood_options,
            unit_norm=point if unit_norm is None else unit_norm,
        )
        if subset != (num_active is not None):
            raise ValueError(
                "num_active must be given for prior='subset', and for no other, got "
                f"num_active={num_active!r} with prior={prior!r}"
            )
        if rate is not None and (subset or isinstance(prior, nn.Module)):
            raise ValueError(
                "rate goes with a prior that is named and has one; leave it out for 'subset', and "
                "give it to a prior module itself"
            )
        penalty = 1.0 if rate is None else require_positive(rate, "rate")

        def network(*out_shape: int, out_activation: str | None = None) -> nn.Module:
            return network_to_code(
                x_shape, (*out_shape, z_dim), hidden, channels, activation, out_activation
            )

        encoder: nn.Module
        if isinstance(posterior, nn.Module):
            encoder = posterior
        else:
            active = num_active or z_dim  # not looked at but for prior="subset"
            makers = _sparse_encoders(prior, network, z_dim, penalty, active, slab_scale, bandwidth)
            if isinstance(prior, str) and prior == "laplace":
                linear = cast(GaussianDecoder, decoder)  # or the encoder says what is wrong
                makers["sparse-coding"] = lambda: SparseCodingEncoder(linear, penalty)
            if not named or posterior not in makers:
                raise ValueError(
                    f"posterior must be a module or, for prior={prior!r}, one of "
                    f"{', '.join(makers)}, got {posterior!r}"
                )
            encoder = makers[posterior]()
        super().__init__(
            _sparse_prior(prior, z_dim, penalty, num_active, slab_scale), encoder, decoder
        )


class DenoisingAutoencoder(Autoencoder):
    r"""Denoising autoencoder: reconstructs x from a corrupted copy of it.

    .. math:: loss = E_{C(\tilde x|x)} [-\log p(x|g(f(\tilde x)))]

    It is the exact conditional likelihood of p(x|x_tilde) (kind CONDITIONAL), at best the
    conditional entropy H(x|x_tilde). Read the other way round, ``pair.decoder(code)`` is an
    amortised inverse q(x|x_tilde) of the corruption, trained by the inclusive KL; see
    :func:`probae.denoise`. Under Gaussian noise it estimates a score; see :func:`probae.score`.

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions; more than x has is fine, as copying x does not pay.
        corruption: C(x_tilde|x), by default ``GaussianNoise(0.3)``.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them, for images (C, H, W).
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``.
        likelihood_options: keywords of that decoder.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Vincent et al., Extracting and composing robust features with denoising autoencoders, 2008;
        Bengio et al., Generalized denoising auto-encoders as generative models, 2013.

    Example:
        >>> import torch, probae
        >>> pair = probae.DenoisingAutoencoder(64, 100, corruption=probae.GaussianNoise(0.5))
        >>> probae.denoise(pair, torch.rand(5, 64)).mean.shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        corruption: nn.Module | None = None,
        hidden: Shape = (400,),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "gaussian",
        likelihood_options: dict[str, Any] | None = None,
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        corruption = GaussianNoise(0.3) if corruption is None else corruption
        network = network_to_code(
            _corrupted_shape(corruption, x_shape), (z_dim,), hidden, channels, activation
        )
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        super().__init__(FlatPrior(z_dim), PointEncoder(network), decoder, corruption)


class DenoisingVAE(Autoencoder):
    r"""VAE whose encoder sees a corrupted copy of x; the decoder explains the clean x.

    .. math:: \log p(x) \ge E_{C(\tilde x|x)} E_{q(z|\tilde x)}
              \log \frac{p(z)\, p(x|z)}{q(z|\tilde x)}

    x_tilde stands in both programs and cancels, so this stays a lower bound on log p(x), by the
    mutual information I(z; x_tilde | x) looser than the ELBO of the averaged encoder.

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        corruption: C(x_tilde|x), by default ``GaussianNoise(0.3)``.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them, for images (C, H, W).
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``.
        likelihood_options: keywords of that decoder.
        prior: see :class:`VAE`.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Im et al., Denoising criterion for variational auto-encoding framework, 2017.

    Example:
        >>> import probae
        >>> probae.DenoisingVAE(64, 8, corruption=probae.BitFlip(0.1)).kind.value
        'ELBO'
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        corruption: nn.Module | None = None,
        hidden: Shape = (400,),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
        prior: str | nn.Module = "normal",
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        corruption = GaussianNoise(0.3) if corruption is None else corruption
        in_shape = _corrupted_shape(corruption, x_shape)
        encoder = GaussianEncoder(
            network_to_code(in_shape, (2, z_dim), hidden, channels, activation)
        )
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        super().__init__(_prior(prior, z_dim, encoder, in_shape), encoder, decoder, corruption)


class ContractiveAutoencoder(Autoencoder):
    r"""Contractive autoencoder: the code resists small changes of x.

    .. math:: loss = -\log p(x|g(f(x))) + \lambda \|\partial f / \partial x\|_F^2

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        weight: λ > 0, in nats per unit of the squared norm.
        penalty: ``"exact"``; ``"hutchinson"``, an unbiased estimate from one random direction; or
            ``"noise"``, the probabilistic form: the encoder sees x + ε, ε ~ N(0, σ² I), and its
            code has to agree with f(x), z ~ N(f(x), s² I) with λ = σ² / 2s², to leading order in σ
            the same penalty.
        noise: σ > 0 of ``"noise"``.
        tied: give the decoder the encoder's weights, transposed. Without, the penalty can be had
            for nothing by scaling the encoder down and the decoder up.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them; needs ``tied=False``.
        activation: of the hidden layers and of the code, see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``.
        likelihood_options: keywords of that decoder.

    Raises:
        ValueError: an argument is out of range or unknown, or weights cannot be tied.

    Reference:
        Rifai et al., Contractive auto-encoders: explicit invariance during feature extraction,
        2011.

    Example:
        >>> import probae
        >>> probae.ContractiveAutoencoder(64, 32, weight=0.1).kind.value
        'ENERGY'
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        weight: float = 0.1,
        penalty: str = "exact",
        noise: float = 0.1,
        tied: bool = True,
        hidden: Shape = (),
        channels: Shape = (),
        activation: str = "sigmoid",
        likelihood: str = "gaussian",
        likelihood_options: dict[str, Any] | None = None,
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        network = network_to_code(x_shape, (z_dim,), hidden, channels, activation, activation)
        encoder = PointEncoder(network)
        require_positive(noise, "noise")
        decoder = _decoder(
            x_shape,
            z_dim,
            hidden,
            channels,
            activation,
            likelihood,
            likelihood_options,
            tied_to=network if require_flag(tied, "tied") else None,
        )
        corruption: nn.Module | None = None
        factor: nn.Module
        if not isinstance(penalty, str) or penalty not in ("exact", "hutchinson", "noise"):
            raise ValueError(f"penalty must be 'exact', 'hutchinson' or 'noise', got {penalty!r}")
        if penalty == "noise":
            corruption = GaussianNoise(noise)
            scale = noise / math.sqrt(2 * require_positive(weight, "weight"))
            factor = CodeCoupling(encoder, scale)
        else:
            factor = ContractivePenalty(encoder, weight, penalty)
        super().__init__(FlatPrior(z_dim), encoder, decoder, corruption, factor)


class PredictiveSparseDecomposition(Autoencoder):
    r"""Sparse coding with a network that learns to predict the code.

    .. math:: E(x, z) = \frac{\|x - Wz - b\|^2}{2\sigma^2} + \lambda \|z\|_1
              + \gamma \|z - f(x)\|^2

    The encoder of the pair minimises E over z by FISTA and passes no gradient; one step of SVI
    then trains W and f at that code. ``pair.predictor(x)`` is f alone, the fast inference of test
    time. The loss is E at that code (with ``couple=False``, not its minimum) plus :math:`(D/2)
    \log 2\pi\sigma^2 + k \log(2/\lambda) + (k/2) \log(\pi/\gamma)` (kind ENERGY: an observed value,
    f(x), is itself learned).

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions, often more than x has.
        rate: λ > 0, weight of the L1 penalty.
        coupling: γ > 0, weight of the prediction error.
        couple: whether the inference of z sees the prediction error, as E says. False: it is only
            started at f(x), as in the published code.
        scale: σ > 0; at the default √½ the squared error has weight 1.
        hidden: widths of the hidden layers of f; by default f is affine, and fastest.
        activation: see :class:`MLP`.
        tolerance: largest violation of the optimality conditions at which FISTA stops.
        max_iterations: of FISTA.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Kavukcuoglu, Ranzato & LeCun, Fast inference in sparse coding algorithms with applications
        to object recognition, 2010.

    Example:
        >>> import torch, probae
        >>> pair = probae.PredictiveSparseDecomposition(16, 32, rate=0.5, coupling=1.0)
        >>> pair.predictor(torch.rand(7, 16)).mean.shape
        torch.Size([7, 32])
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        rate: float = 1.0,
        coupling: float = 1.0,
        couple: bool = True,
        scale: float = math.sqrt(0.5),
        hidden: Shape = (),
        activation: str = "tanh",
        tolerance: float = 1e-4,
        max_iterations: int = 1000,
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        require_positive(coupling, "coupling")
        decoder = GaussianDecoder(MLP(z_dim, x_shape, unit_norm=True), scale=scale)
        network = MLP(x_shape, z_dim, hidden, activation)
        encoder = SparseCodingEncoder(
            decoder,
            rate,
            predictor=network,
            coupling=coupling if require_flag(couple, "couple") else 0.0,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        predictor = PointEncoder(network)
        factor = CodeCoupling(predictor, 1 / math.sqrt(2 * coupling))
        super().__init__(LaplacePrior(z_dim, rate), encoder, decoder, factor=factor)

    @property
    def predictor(self) -> PointEncoder:
        """The encoder f(x), the fast approximation of the sparse code."""
        predictor = getattr(self.factor, "predictor", None)
        if not isinstance(predictor, PointEncoder):
            raise ValueError("factor was replaced: the pair has no predictor any more")
        return predictor


class SemanticHashing(Autoencoder):
    r"""Semantic hashing: codes that noise makes binary.

    .. math:: z = \sigma(a(x) + s n),\; n \sim N(0, I),\quad loss = E_n[-\log p(x|z)]

    Only codes near 0 and 1 survive the noise, so that thresholding loses little at test time
    (:func:`probae.binary_codes`). The recipe has no prior (kind CONDITIONAL: z is a noisy channel);
    the Bernoulli readings have, and bound log p(x).

    Args:
        x_dim: dimension or shape of one datum.
        z_dim: number of bits.
        posterior: ``"noise"``, the recipe; ``"bernoulli"``, z ~ Bern(σ(a)); ``"probit"``,
            z ~ Bern(Φ(a/s)), its limit for saturated codes; or ``"threshold"``, z = 1[a > 0], whose
            loss is a bound, too, and which trains the decoder alone.
        noise: s > 0.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        channels: output channels of strided convolutions before them, for images (C, H, W).
        activation: see :class:`MLP`.
        likelihood: a name in ``probae.LIKELIHOODS``.
        likelihood_options: keywords of that decoder.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Salakhutdinov & Hinton, Semantic hashing, 2009.

    Example:
        >>> import torch, probae
        >>> pair = probae.SemanticHashing(64, 12)
        >>> probae.pack_codes(probae.binary_codes(pair, torch.rand(5, 64))).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        x_dim: Shape,
        z_dim: int,
        *,
        posterior: str = "noise",
        noise: float = 4.0,
        hidden: Shape = (400,),
        channels: Shape = (),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
    ) -> None:
        x_shape, z_dim = _dimensions(x_dim, z_dim)
        network = network_to_code(x_shape, (z_dim,), hidden, channels, activation)
        encoders: dict[str, Callable[[], nn.Module]] = {
            "noise": lambda: NoisySigmoidEncoder(network, noise),
            "bernoulli": lambda: BernoulliEncoder(network),
            "probit": lambda: ProbitEncoder(network, noise),
            "threshold": lambda: ThresholdEncoder(network),
        }
        require_positive(noise, "noise")
        if not isinstance(posterior, str) or posterior not in encoders:
            raise ValueError(f"posterior must be one of {', '.join(encoders)}, got {posterior!r}")
        prior = FlatPrior(z_dim) if posterior == "noise" else BernoulliPrior(z_dim)
        decoder = _decoder(
            x_shape, z_dim, hidden, channels, activation, likelihood, likelihood_options
        )
        super().__init__(prior, encoders[posterior](), decoder)


def _dimensions(x_dim: Shape, z_dim: int) -> tuple[tuple[int, ...], int]:
    return as_shape(x_dim, "x_dim"), require_count(z_dim, "z_dim")


def _prior(
    prior: str | nn.Module, z_dim: int, encoder: nn.Module, x_shape: tuple[int, ...]
) -> nn.Module:
    """Return the prior of that name, or the module itself."""
    if isinstance(prior, nn.Module):
        return prior
    if isinstance(prior, str) and prior == "vamp":
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
    unit_norm: bool = False,
    tied_to: nn.Module | None = None,
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
        if tied_to is None:
            network = network_from_code(z_dim, out_shape, hidden, channels, activation, unit_norm)
        elif out_shape == x_shape and isinstance(tied_to, MLP):
            network = TransposedMLP(tied_to)
        else:
            raise ValueError(
                "tied=True needs a perceptron (channels=()) and a likelihood with one parameter, "
                f"got channels={channels!r}, likelihood={likelihood!r}; use tied=False"
            )
        return decoder(network, **keywords)
    except TypeError as error:
        raise ValueError(
            f"likelihood_options do not fit likelihood={likelihood!r}: {error}"
        ) from error


def _corrupted_shape(corruption: nn.Module, x_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one corrupted datum, which the encoder sees."""
    if not isinstance(corruption, nn.Module):
        raise ValueError(
            "corruption must be a module such as probae.GaussianNoise(0.3), got "
            f"{type(corruption).__name__}"
        )
    try:
        corrupted = corruption(torch.zeros(1, *x_shape))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"corruption does not take x of shape (1, *{x_shape}): {error}") from error
    if not isinstance(corrupted, torch.distributions.Distribution):
        raise ValueError(
            "corruption(x) must return a torch.distributions.Distribution, got "
            f"{type(corrupted).__name__}"
        )
    return tuple(corrupted.event_shape)


def _sparse_prior(
    prior: str | nn.Module,
    z_dim: int,
    rate: float,
    num_active: int | None,
    slab_scale: float | None,
) -> nn.Module:
    """Return the sparse prior of that name, or the module itself."""
    if isinstance(prior, nn.Module):
        return prior
    if num_active is not None:
        return SubsetPrior(z_dim, num_active, slab_scale=slab_scale)
    if prior == "spike-and-slab":
        return SpikeAndSlabPrior(z_dim, rate, slab_scale=slab_scale)
    if prior == "student-t":
        return StudentTPrior(z_dim, scale=1 / rate)
    return {"laplace": LaplacePrior, "exponential": ExponentialPrior}[prior](z_dim, rate)


def _sparse_encoders(
    prior: str | nn.Module,
    network: Callable[..., nn.Module],
    z_dim: int,
    rate: float,
    num_active: int,
    slab_scale: float | None,
    bandwidth: float,
) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes the encoders that fit a sparse prior, by name."""
    # a kernel without bounded support gives every threshold a gradient; a posterior starts narrower
    # than its prior
    slab: dict[str, Any] = {"kernel": "logistic", "slab_scale": None}
    if slab_scale is not None:
        slab.update(slab_scale=0.1 * slab_scale, learn_scale=True)
    point = {"point": lambda: PointEncoder(network())}
    gaussian = {"gaussian": lambda: GaussianEncoder(network(2))}
    makers: dict[str, dict[str, Callable[[], nn.Module]]] = {
        "laplace": {**point, "laplace": lambda: LaplaceEncoder(network(2)), **gaussian},
        "exponential": {
            "point": lambda: PointEncoder(network(out_activation="relu")),
            "lognormal": lambda: LogNormalEncoder(network(2)),
        },
        "student-t": {**point, **gaussian},
        "spike-and-slab": {
            "point": lambda: JumpReLUEncoder(
                network(), z_dim, bandwidth=bandwidth, rate=rate, slab_scale=slab_scale
            ),
            "noisy-gate": lambda: NoisyGateEncoder(network(), z_dim, bandwidth=bandwidth, **slab),
            "spike-and-slab": lambda: SpikeAndSlabEncoder(network(3)),
        },
        "subset": {
            "point": lambda: TopKEncoder(network(), num_active),
            "conditional-bernoulli": lambda: ConditionalBernoulliEncoder(network(3), num_active),
        },
    }
    if isinstance(prior, nn.Module):
        return {**point, **gaussian}
    if not isinstance(prior, str) or prior not in makers:
        raise ValueError(f"prior must be a module or one of {', '.join(makers)}, got {prior!r}")
    return makers[prior]
