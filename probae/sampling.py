"""Drawing from a pair: prior sampling, reconstruction, denoising, and the score of the data."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from .autoencoder import Autoencoder, Kind, frozen, seeded
from .checks import (
    check_support,
    likelihood_of,
    prior_of,
    require_density,
    require_pair,
    to_pair,
)
from .corruptions import Corruption, GaussianNoise, encoder_input, require_corruption
from .datasets import as_tensor
from .decoders import CorruptedDecoder
from .distributions import (
    GreyBernoulli,
    base_distribution,
    has_component,
    is_flat,
    is_point,
    mean_of,
)
from .part import require_count


class Samples(NamedTuple):
    """Joint draws from the model.

    Example:
        >>> import probae
        >>> probae.sample(probae.VAE(8, 2), 5).z.shape
        torch.Size([5, 2])
    """

    x: Tensor  # (n, *x_shape)
    z: Tensor  # (n, *z_shape)


def sample(pair: Autoencoder, num_samples: int = 1, *, seed: int | None = None) -> Samples:
    r"""Draw from the model: :math:`z \sim p(z)`, :math:`x \sim p(x|z)`.

    ``x`` is a draw from the decoder; for its mean, noise-free, take ``pair.decoder(z).mean``.

    Args:
        pair: a pair with a proper prior.
        num_samples: number of draws.
        seed: of the draws; None draws from torch's global stream.

    Raises:
        ValueError: ``num_samples`` < 1, or a flat prior, from which nothing can be drawn.

    Example:
        >>> import probae
        >>> x, z = probae.sample(probae.VAE(8, 2), 5)
        >>> x.shape, z.shape
        (torch.Size([5, 8]), torch.Size([5, 2]))
    """
    require_pair(pair)
    num_samples = require_count(num_samples, "num_samples")
    if is_flat(prior_of(pair)):
        raise ValueError(
            f"pair is of kind {pair.kind.value}: nothing can be drawn from its flat prior; give it "
            "a proper one, such as prior='normal'"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(pair, seed))
        if seed is not None:  # log_likelihood at this very seed would propose these very codes
            stack.enter_context(seeded((seed + 1_000_003) % 2**32, {pair.device}))
        z = pair.prior().sample(torch.Size((num_samples,)))
        return Samples(pair.decoder(z).sample().to(pair.dtype), z)


def reconstruct(pair: Autoencoder, x: Tensor | Any) -> Distribution:
    r"""Return p(x'|z) at the mean code of each datum, :math:`z = E_{q(z|x)}[z]`.

    Where the encoder's distribution has no mean in closed form, it is that of 100 draws.

    Args:
        pair: the pair; a corruption is not applied.
        x: data (N, *x_shape).

    Returns:
        Distribution: batch shape (N,), event shape x_shape; its ``mean`` is the reconstruction.

    Raises:
        ValueError: bad data, as in :func:`probae.fit`.

    Example:
        >>> import torch, probae
        >>> probae.reconstruct(probae.VAE(8, 2), torch.ones(5, 8)).mean.shape
        torch.Size([5, 8])
    """
    require_pair(pair)
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=False)
    with frozen(pair, seed=0):
        return pair.decoder(mean_of(pair.encoder(encoder_input(pair.corruption, data))))


def denoise(
    pair: Autoencoder,
    x_tilde: Tensor | Any,
    corruption: Corruption | None = None,
    *,
    num_samples: int = 100,
    proposal: nn.Module | None = None,
    seed: int | None = 0,
) -> Distribution:
    r"""Return p(x|x_tilde), the law of the clean x behind each corrupted one.

    .. math:: p(x|\tilde x) = \sum_k w_k\, p(x|\tilde x, z_k),\quad z_k \sim q(z|\tilde x),\quad
              w_k \propto \frac{p(z_k)\,p(\tilde x|z_k)}{q(z_k|\tilde x)}

    for a pair with a proper prior and any corruption with closed forms for its likelihood: Bayes'
    rule under p(z) p(x|z) C(x_tilde|x), the weights self-normalised importance weights, exact as K
    grows. ``distribution.mean`` is the posterior mean of x; with ``w`` the
    ``mixture_distribution.probs``, ``1 / (w**2).sum(-1)`` is the effective number of samples.

    A pair with a flat prior that was trained on its own corruption (a denoising autoencoder) has
    learned p(x|x_tilde) itself: it is the decoder at the code of x_tilde, nothing is drawn, and
    only that corruption can be undone.

    The encoder of a pair that was trained on clean x is given x_tilde in the place of x, with zeros
    where x is known to be missing. The result holds K distributions per datum, and a draw from it
    draws from all of them, so denoise large data in batches.

    Args:
        pair: the pair. With a :class:`CorruptedDecoder`, x is the clean one.
        x_tilde: corrupted data (N, *x_shape), or (N, 2, *x_shape) under ``Masking(known=True)``.
        corruption: how x_tilde came about; default: the pair's own.
        num_samples: K.
        proposal: an encoder to draw z from in place of the pair's own, for pairs with point codes.
        seed: of the draws of z; None draws from the global stream.

    Returns:
        Distribution: batch shape (N,), event shape that of the clean x; where entries are known
        exactly, it has atoms there (see :class:`probae.corrupted.Replacement`).

    Raises:
        ValueError: bad data (shape, dtype, empty, NaN, outside the support); no corruption, or one
            that has no closed form for the likelihood or that the pair was not trained to undo; a
            point code under a proper prior without a ``proposal``.

    Reference:
        Vincent et al., Extracting and composing robust features with denoising autoencoders, 2008;
        Mattei & Frellsen, MIWAE, 2019.

    Example:
        >>> import torch, probae
        >>> pair = probae.VAE(8, 2)
        >>> clean = probae.denoise(pair, torch.ones(5, 8), probae.SaltAndPepper(0.2))
        >>> clean.mean.shape, clean.log_prob(torch.ones(5, 8)).shape
        (torch.Size([5, 8]), torch.Size([5]))
    """
    require_pair(pair)
    num_samples = require_count(num_samples, "num_samples")
    data = to_pair(pair, as_tensor(x_tilde, "x_tilde"), "x_tilde")
    if is_flat(prior_of(pair)):
        return _trained_denoiser(pair, data, corruption, num_samples, seed)
    decoder: Any = pair.decoder
    own: Any = pair.corruption
    if isinstance(decoder, CorruptedDecoder):
        decoder, own = decoder.decoder, decoder.corruption
    if corruption is None and own is None:
        raise ValueError(
            "corruption must say how x_tilde came about, as the pair has none of its own: pass "
            "GaussianNoise(scale), BitFlip(probability), Masking(probability, known=True), …"
        )
    corruption = require_corruption(own if corruption is None else corruption)
    encoder: Any = pair.encoder if proposal is None else proposal
    with frozen(pair, seed=0):
        _check_corrupted(corruption.marginal(decoder(pair.prior().sample(Size((1,))))), data)
        takes = pair.x_shape if proposal is not None else _input_shape(pair)
    fed = _fed_to(takes, corruption, data)
    name = "encoder of the pair" if proposal is None else "proposal"
    require_density(pair, encoder, fed[:2], name)
    with frozen(pair, seed), frozen(encoder, None):
        codes = encoder(fed)
        z = codes.sample(Size((num_samples,)))  # (K, N, *z_shape)
        log_ratio = (pair.prior().log_prob(z) - codes.log_prob(z)).T  # (N, K)
        likelihood = decoder(z.transpose(0, 1))
        log_weights = log_ratio + corruption.marginal(likelihood).log_prob(data[:, None])
        return dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights), corruption.posterior(likelihood, data[:, None])
        )


def score(pair: Autoencoder, x: Tensor | Any) -> Tensor:
    r"""Return the score that a denoising autoencoder has learned, ∇ log p_σ at x.

    .. math:: \frac{r(x) - x}{\sigma^2} \approx \nabla \log p_\sigma(x),\quad
              p_\sigma = p * N(0, \sigma^2 I)

    with r(x) the decoder's mean at the mean code. For the best possible r, E[x|x_tilde], this is an
    identity at every σ (Tweedie's formula). It is the score of the **smoothed** density: that of p
    itself is its limit as σ goes to 0, and far from it while σ is not below the finest detail of p.

    The loss of a Gaussian likelihood is least at that r; a proper prior or a factor adds to the
    loss and moves its minimum, so other pairs are refused.

    Args:
        pair: a denoising autoencoder: a pair of kind CONDITIONAL with a Gaussian likelihood and the
            corruption :class:`GaussianNoise`, whose scale is σ.
        x: points (N, *x_shape), in the place of noisy data.

    Returns:
        Tensor: (N, *x_shape), in nats per unit of x.

    Raises:
        ValueError: a pair that has learned no score: without Gaussian noise, of another kind, or
            with another likelihood; or bad data (shape, dtype, empty, NaN).

    Reference:
        Miyasawa, An empirical Bayes estimator of the mean of a normal population, 1961; Alain &
        Bengio, What regularized auto-encoders learn from the data-generating distribution, 2014.

    Example:
        >>> import torch, probae
        >>> pair = probae.Autoencoder(
        ...     probae.FlatPrior(4),
        ...     probae.PointEncoder(probae.MLP(2, 4)),
        ...     probae.GaussianDecoder(probae.MLP(4, 2)),
        ...     probae.GaussianNoise(0.2),
        ... )
        >>> probae.score(pair, torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """
    require_pair(pair)
    if not isinstance(pair.corruption, GaussianNoise):
        raise ValueError(
            f"pair must have the corruption GaussianNoise, got {pair.corruption!r}: the score is "
            "(r(x) - x) / scale**2 of that noise; train a pair with corruption=GaussianNoise(scale)"
        )
    if pair.kind is not Kind.CONDITIONAL:
        raise ValueError(
            f"pair must be of kind CONDITIONAL, got {pair.kind.value}: under a proper prior or a "
            "factor r(x) is not trained to be E[x|x_tilde], so (r(x) - x) / scale**2 is no score; "
            "train a probae.DenoisingAutoencoder"
        )
    family = likelihood_of(pair)
    if not isinstance(family, torch.distributions.Normal):
        raise ValueError(
            f"decoder must return a Gaussian, got {type(family).__name__}: r(x) is fitted to "
            "E[x|x_tilde] by least squares; train a pair with likelihood='gaussian' or "
            "'heteroscedastic-gaussian'"
        )
    data = pair.check_input(as_tensor(x, "x")).to(pair.device, pair.dtype)
    with frozen(pair, seed=0):
        denoised = mean_of(pair.decoder(mean_of(pair.encoder(data))))
    return (denoised - data) / pair.corruption.scale**2


def _trained_denoiser(
    pair: Autoencoder, x_tilde: Tensor, corruption: Any, num_samples: int, seed: int | None
) -> Distribution:
    """Return p(x|x_tilde) of a pair that was trained to undo its own corruption."""
    own = pair.corruption
    if own is None:
        raise ValueError(
            f"pair is of kind {pair.kind.value}: without a proper prior or a corruption in "
            "training it has no p(x|x_tilde); give it prior='normal', or train it with a corruption"
        )
    same = isinstance(own, Corruption) and repr(corruption) == repr(own)
    if not (corruption is None or corruption is own or same):
        raise ValueError(
            f"corruption must be the {own!r} that the pair was trained to undo, got "
            f"{corruption!r}; a pair with a proper prior can undo any"
        )
    with frozen(pair, seed=0):
        _check_shape(_input_shape(pair), x_tilde)
    if isinstance(own, Corruption):
        own.check_corrupted(x_tilde, len(pair.x_shape))
    with frozen(pair, seed):
        codes = pair.encoder(x_tilde)
        if is_point(codes):
            return pair.decoder(codes.mean)
        z = codes.sample(Size((num_samples,))).transpose(0, 1)  # (N, K, *z_shape)
        evenly = dist.Categorical(logits=z.new_zeros(z.shape[:2]))
        return dist.MixtureSameFamily(evenly, pair.decoder(z))


def _input_shape(pair: Autoencoder) -> tuple[int, ...]:
    """Shape of what the pair's encoder is given: x, or its corrupted version."""
    if pair.corruption is None:
        return pair.x_shape
    x = torch.zeros(1, *pair.x_shape).to(pair.device, pair.dtype)
    return tuple(pair.corruption(x).event_shape)


def _fed_to(takes: tuple[int, ...], corruption: Corruption, x_tilde: Tensor) -> Tensor:
    """Return x_tilde in the shape that an encoder takes."""
    for candidate in (x_tilde, corruption.as_clean(x_tilde)):
        if tuple(candidate.shape[1:]) == takes:
            return candidate
    raise ValueError(
        f"corruption {corruption!r} makes x_tilde of shape {tuple(x_tilde.shape)}, but the encoder "
        f"takes (N, {', '.join(map(str, takes))}); denoise with the corruption that it was trained "
        "with, or another of that shape"
    )


def _check_shape(event_shape: tuple[int, ...], x_tilde: Tensor) -> None:
    if tuple(x_tilde.shape[1:]) != tuple(event_shape):
        form = event_shape == (2, *x_tilde.shape[1:])
        raise ValueError(
            f"x_tilde must have shape (N, {', '.join(map(str, event_shape))}), got "
            f"{tuple(x_tilde.shape)}"
            + ("; mark missing entries by NaN and use probae.stack_missing" if form else "")
        )


def _check_corrupted(noisy: Distribution, x_tilde: Tensor) -> None:
    """Check shape and support of corrupted data against p(x_tilde|z) at some z."""
    _check_shape(noisy.event_shape, x_tilde)
    base = base_distribution(noisy)
    support = constraints.boolean if has_component(base, GreyBernoulli) else base.support
    bad = ~support.check(x_tilde)
    if bad.any():
        raise ValueError(
            f"x_tilde must lie in the support of p(x_tilde|z) ({support}), got {int(bad.sum())} "
            f"values outside, the first {float(x_tilde[bad][0]):g}; corrupt data as the corruption "
            "does, and grey images after probae.binarize"
        )
