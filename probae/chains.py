"""Markov chains of a pair: over x by denoising, over x by its score, over z given x."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.autoguide import init_to_sample
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from .autoencoder import _WITH_ATOMS, Autoencoder, Kind, frozen, seeded
from .checks import check_support, chunks, prior_of, require_finite, require_gradients, require_pair
from .datasets import as_tensor
from .distributions import has_component, is_discrete, is_flat, mean_of, to_support
from .part import as_number, require_count, require_flag, require_positive, require_probability
from .sampling import score

Field = Callable[[Tensor], Tensor]  # (M, *x_shape) -> (M, *x_shape)


class Chain(NamedTuple):
    """States of N chains that go on side by side, T of each.

    Example:
        >>> import torch, probae
        >>> pair = probae.DenoisingAutoencoder(8, 20, corruption=probae.GaussianNoise(0.3))
        >>> probae.gsn_chain(pair, torch.zeros(5, 8), 10).z.shape
        torch.Size([10, 5, 20])
    """

    x: Tensor  # (T, N, *x_shape) draws from p(x|z)
    mean: Tensor  # (T, N, *x_shape) means of p(x|z), free of its noise; NaN where it has none
    x_tilde: Tensor  # (T, N, ...) the corrupted x that each of these was drawn from
    z: Tensor  # (T, N, *z_shape) its code


def gsn_chain(
    pair: Autoencoder,
    x0: Tensor | Any,
    num_steps: int,
    *,
    walkback: int | None = None,
    burn_in: int = 0,
    thin: int = 1,
    seed: int | None = 0,
) -> Chain:
    r"""Sample x by corrupting and reconstructing it again and again.

    .. math:: \tilde x_t \sim C(\tilde x|x_{t-1}),\quad z_t \sim q(z|\tilde x_t),\quad
              x_t \sim p(x|z_t)

    Where p(x|z) is the exact law of the datum behind a code, for data x and codes z that come about
    as in the equation, this is Gibbs sampling: the chain is reversible, and its stationary law is
    that of the data. Maximum likelihood fits the decoder to that law, whatever the encoder is, as
    far as its family goes: one with independent entries gets there only where the entries of x are
    independent given z. In total variation the stationary law is off by at most
    :math:`\max_x TV(P_x, P^*_x) / (1 - \tau)`, with P and P* the transition laws of the pair and
    with the exact decoder, and τ < 1 Dobrushin's coefficient of either, the largest distance of two
    of its rows.

    The stationary law is unique where every region can be reached from every other, as when C has
    full support. How long that takes is another matter: start from several places.

    The states are draws and have the noise of the likelihood: with a Bernoulli one they are black
    and white, so train by ``fit(..., binarize=True)``; with a Gaussian one let ``learn_scale=True``
    fit that noise.

    Args:
        pair: a pair with a corruption; not of kind ENERGY.
        x0: where the N chains start, (N, *x_shape).
        num_steps: number T of states that are kept.
        walkback: start again from ``x0`` after every so many steps: these are the states that
            training by :class:`Walkback` visits. None: never.
        burn_in: steps before the first one that counts.
        thin: steps from each kept state to the next.
        seed: of the draws; None draws from torch's global stream.

    Returns:
        Chain: T states of each chain, ``x0`` not among them.

    Raises:
        ValueError: a pair without a corruption, or with a factor; bad data, as in
            :func:`probae.fit`; a count out of range; or draws that the corruption does not take.

    Reference:
        Bengio et al., Generalized denoising auto-encoders as generative models, 2013; Alain et al.,
        GSNs: generative stochastic networks, 2016.

    Example:
        >>> import torch, probae
        >>> pair = probae.DenoisingAutoencoder(
        ...     8, 20, corruption=probae.SaltAndPepper(0.4), likelihood="bernoulli"
        ... )
        >>> probae.gsn_chain(pair, torch.zeros(5, 8), 10, burn_in=100, thin=2).x.shape
        torch.Size([10, 5, 8])
    """
    require_pair(pair)
    corruption: Any = pair.corruption
    if corruption is None:
        raise ValueError(
            f"pair is of kind {pair.kind.value} and has no corruption, so there is no p(x|x_tilde) "
            "to make a chain of; train a probae.DenoisingAutoencoder, or draw from a pair with a "
            "proper prior by probae.sample"
        )
    if pair.kind is Kind.ENERGY:
        raise ValueError(
            "pair is of kind ENERGY: under a factor, programs of its own or an encoder without a "
            "density, p(x|z) need not be trained to be the law of x behind its code; train a "
            "probae.DenoisingAutoencoder"
        )
    x = _starts(pair, x0)
    check_support(pair, x, "x0", binarize=False, strict=False)
    every = None if walkback is None else require_count(walkback, "walkback")
    start = x

    def step(x: Tensor) -> tuple[Tensor, ...]:
        try:
            x_tilde = corruption(x).sample()
        except ValueError as error:
            raise ValueError(
                f"pair draws x that its corruption {corruption!r} does not take ({error}); give it "
                "a likelihood on the values that the corruption takes"
            ) from error
        z = pair.encoder(x_tilde).sample()
        likelihood = pair.decoder(z)
        return likelihood.sample().to(x.dtype), mean_of(likelihood), x_tilde, z

    kept: list[list[Tensor]] = [[], [], [], []]
    with frozen(pair, seed):
        for t, keep in _schedule(num_steps, burn_in, thin):
            if every is not None and t % every == 0:
                x = start
            blocks = [step(rows) for rows, _ in chunks(x)]
            state = [torch.cat(pieces) for pieces in zip(*blocks, strict=True)]
            x = state[0]
            if keep:
                for values, value in zip(kept, state, strict=True):
                    values.append(value)
    return Chain(*(torch.stack(values) for values in kept))


class LangevinChain(NamedTuple):
    """States of N Langevin chains, T of each, and how good the moves were.

    Example:
        >>> import torch
        >>> LangevinChain(torch.zeros(10, 5, 2), None, None).x.shape
        torch.Size([10, 5, 2])
    """

    x: Tensor  # (T, N, *x_shape)
    acceptance: Tensor | None  # (N,) mean probability after burn-in; None without a correction
    circulation: Tensor | None  # (N,) nats around a triangle of moves; None without a correction


def langevin(
    pair: Autoencoder,
    x0: Tensor | Any,
    num_steps: int,
    step_size: float,
    *,
    metropolis: bool = False,
    num_nodes: int = 8,
    burn_in: int = 0,
    thin: int = 1,
    seed: int | None = 0,
) -> LangevinChain:
    r"""Sample the smoothed density p_σ of a denoising autoencoder by the score it has learned.

    .. math:: x_{t+1} = x_t + \frac{\epsilon^2}{2} s(x_t) + \epsilon\,\xi_t,\quad
              \xi_t \sim N(0, I),\quad s(x) = \frac{r(x) - x}{\sigma^2}

    s is :func:`probae.score`, so that the draws are from :math:`p_\sigma = p * N(0, \sigma^2 I)`,
    data with noise, and not from the clean p. Without correction their law is off by O(ε²): for a
    Gaussian of variance v it has the variance :math:`v / (1 - \epsilon^2 / 4v)`.

    With ``metropolis`` a move to x' is accepted with probability min(1, a), which removes that
    error:

    .. math:: \log a = \int_0^1 s(x + u (x' - x)) \cdot (x' - x)\,du
              + \log N(x; x' + \tfrac{\epsilon^2}{2} s(x'), \epsilon^2 I)
              - \log N(x'; x + \tfrac{\epsilon^2}{2} s(x), \epsilon^2 I)

    The integral is the difference of log p_σ **where s is a gradient**, that is where the Jacobian
    of r is symmetric, as with one layer of tied weights. A learned s is one approximately at best,
    and then there is no density to be exact about. It is computed by Gauss-Legendre quadrature,
    exact for polynomials in u of degree 2 num_nodes - 1. ``circulation`` shows both errors: the
    integral around a triangle of moves from the last state, 0 for a gradient that is integrated
    exactly. For all but a few chains it should be small against 1.

    Args:
        pair: a denoising autoencoder, as for :func:`probae.score`.
        x0: where the N chains start, (N, *x_shape).
        num_steps: number T of states that are kept.
        step_size: ε, in units of x. Below 2 standard deviations of the narrowest direction of p_σ
            (at least σ) moves are stable; MALA mixes best near an acceptance of 0.57.
        metropolis: correct the moves by accepting or rejecting them (MALA).
        num_nodes: nodes of the quadrature, each an evaluation of the score; needs ``metropolis``.
        burn_in: steps before the first one that counts.
        thin: steps from each kept state to the next.
        seed: of the draws; None draws from torch's global stream.

    Returns:
        LangevinChain: T states of each chain, ``x0`` not among them; acceptance and circulation.

    Raises:
        ValueError: a pair that has learned no score; bad data (shape, dtype, empty, NaN); an
            argument out of range.
        FloatingPointError: the chain left the finite numbers: the step is too large.

    Reference:
        Roberts & Tweedie, Exponential convergence of Langevin distributions and their discrete
        approximations, 1996; Alain & Bengio, What regularized auto-encoders learn from the
        data-generating distribution, 2014.

    Example:
        >>> import torch, probae
        >>> pair = probae.DenoisingAutoencoder(2, 30, corruption=probae.GaussianNoise(0.3))
        >>> chain = probae.langevin(pair, torch.zeros(5, 2), 10, 0.2, metropolis=True)
        >>> chain.x.shape, chain.acceptance.shape
        (torch.Size([10, 5, 2]), torch.Size([5]))
    """
    step_size = require_positive(step_size, "step_size")
    if step_size > 1e100:
        raise ValueError(f"step_size must be below 1e100, in units of x, got {step_size:g}")
    metropolis = require_flag(metropolis, "metropolis")
    num_nodes = require_count(num_nodes, "num_nodes")
    field, x, _ = _score_field(pair, x0)
    kept: list[Tensor] = []
    with frozen(pair, seed):
        moves = _Moves(field, step_size, num_nodes if metropolis else 0)
        accepted, at_x = x.new_zeros(len(x)), field(x)
        for t, keep in _schedule(num_steps, burn_in, thin):
            x, at_x, rate = moves.step(x, at_x)
            _require_finite(x, t + 1, step_size, "make them smaller, or set metropolis=True")
            if t >= burn_in:
                accepted = accepted + rate / (num_steps * thin)
            if keep:
                kept.append(x)
        if not metropolis:
            return LangevinChain(torch.stack(kept), None, None)
        return LangevinChain(torch.stack(kept), accepted, moves.circulation(x))


class AnnealedSamples(NamedTuple):
    """Draws at the smallest noise, and the way there.

    Example:
        >>> import torch
        >>> levels = torch.zeros(3, 5, 2)
        >>> AnnealedSamples(levels[-1], levels[-1], levels, torch.tensor([1.0, 0.5, 0.25])).x.shape
        torch.Size([5, 2])
    """

    x: Tensor  # (N, *x_shape) draws from p_σ at the smallest σ, noise and all
    denoised: Tensor  # (N, *x_shape) E[clean x|x] for each of them
    levels: Tensor  # (L, N, *x_shape) where the chains were at the end of each level
    scales: Tensor  # (L,) σ of the levels


def annealed_denoising(
    pairs: Autoencoder | Sequence[Autoencoder],
    x0: Tensor | Any,
    *,
    num_steps: int = 100,
    relative_step: float = 0.3,
    seed: int | None = 0,
) -> AnnealedSamples:
    r"""Sample by Langevin steps from one noise scale down to the next (annealed Langevin).

    .. math:: x \leftarrow x + \frac{\epsilon_l^2}{2} s_l(x) + \epsilon_l\,\xi,\quad
              \epsilon_l = c\,\sigma_l,\quad \sigma_1 > \dots > \sigma_L

    Where σ is large, p_σ is smooth and the chains find all of it, each mode as often as it should
    be; the smaller ones make the draws sharp. At a single small σ chains stay in the mode they
    start near.

    Args:
        pairs: denoising autoencoders, as for :func:`probae.score`, one for each level, their noise
            from largest to smallest; or a single one.
        x0: where the N chains start, (N, *x_shape), for instance noise as wide as data and σ₁.
        num_steps: steps at each level.
        relative_step: c, the step in units of σ, below 2. It makes the variance of directions
            in which the data have none too large by a factor of 1 / (1 - c²/4).
        seed: of the draws; None draws from torch's global stream.

    Returns:
        AnnealedSamples: draws at the smallest σ, these denoised, and the state after each level.

    Raises:
        ValueError: pairs that have learned no score, have several x_shapes, or whose noise does not
            decrease; bad data (shape, dtype, empty, NaN); an argument out of range.
        FloatingPointError: a chain left the finite numbers: the step is too large.

    Reference:
        Song & Ermon, Generative modeling by estimating gradients of the data distribution, 2019;
        Jolicoeur-Martineau et al., Adversarial score matching and improved sampling for image
        generation, 2021, on why the result is denoised.

    Example:
        >>> import torch, probae
        >>> pairs = [
        ...     probae.DenoisingAutoencoder(2, 30, corruption=probae.GaussianNoise(scale))
        ...     for scale in (1.0, 0.5, 0.25)
        ... ]
        >>> samples = probae.annealed_denoising(pairs, torch.randn(5, 2), num_steps=10)
        >>> samples.denoised.shape, samples.scales
        (torch.Size([5, 2]), tensor([1.0000, 0.5000, 0.2500]))
    """
    num_steps = require_count(num_steps, "num_steps")
    if not 0 < as_number(relative_step) < 2:
        raise ValueError(
            f"relative_step must be in (0, 2), as Langevin steps of 2σ and more do not settle, got "
            f"{relative_step!r}"
        )
    levels = list(pairs) if isinstance(pairs, Sequence) else [pairs]
    for pair in levels:
        require_pair(pair, "pairs")
    if not levels:
        raise ValueError("pairs is empty: expected at least one denoising autoencoder")
    fields = [_score_field(pair, x0) for pair in levels]
    scales = [scale for _, _, scale in fields]
    if any(b >= a for a, b in pairwise(scales)):
        raise ValueError(
            f"pairs must be in order of decreasing noise, got scales {scales}; sort them by "
            "pair.corruption.scale, the largest first"
        )
    x, states = fields[0][1], []
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(seeded(seed, {pair.device for pair in levels}))
        for pair, (field, start, scale) in zip(levels, fields, strict=True):
            x = x.to(start)
            moves = _Moves(field, relative_step * scale, 0)
            with frozen(pair, None):
                at_x = field(x)
                for _ in range(num_steps):
                    x, at_x, _ = moves.step(x, at_x)
                _require_finite(x, num_steps, relative_step * scale, "lower relative_step")
            states.append(x)
    return AnnealedSamples(
        x=x,
        denoised=x + scale**2 * at_x,
        levels=torch.stack([state.to(x) for state in states]),
        scales=torch.tensor(scales, dtype=x.dtype),
    )


class PosteriorSamples(NamedTuple):
    """Draws from p(z|x) for each datum, and whether the chains that made them can be trusted.

    Example:
        >>> import torch, probae
        >>> draws = probae.posterior_samples(
        ...     probae.PPCA(5, 2), torch.zeros(1, 5), 20, warmup=20, num_chains=2
        ... )
        >>> draws.z.shape, draws.r_hat.shape
        (torch.Size([2, 20, 1, 2]), torch.Size([1, 2]))
    """

    z: Tensor  # (chains, draws, N, *z_shape), the order of ArviZ
    r_hat: Tensor  # (N, *z_shape) split R-hat, near 1 where the halves of all chains agree
    ess: Tensor  # (N, *z_shape) effective number of draws; may exceed chains x draws, a little;
    # both NaN where no chain ever moved
    acceptance: Tensor  # (chains, N) rate of moves that were accepted
    divergences: Tensor  # (chains, N) number of draws whose trajectory diverged

    def __repr__(self) -> str:
        chains, draws, data = self.z.shape[:3]
        return (
            f"PosteriorSamples({chains} x {draws} draws of z {tuple(self.z.shape[3:])} for {data} "
            f"data; worst R-hat {float(self.r_hat.max()):.3f}, least ESS "
            f"{float(self.ess.min()):.0f}, {int(self.divergences.sum())} divergences)"
        )


def posterior_samples(
    pair: Autoencoder,
    x: Tensor | Any,
    num_samples: int = 1000,
    *,
    method: str = "nuts",
    num_chains: int = 1,
    warmup: int = 500,
    target_acceptance: float = 0.8,
    seed: int | None = 0,
) -> PosteriorSamples:
    r"""Draw from the posterior :math:`p(z|x) \propto p(z)\,p(x|z)` of a few data, by Pyro's MCMC.

    The encoder takes no part, so that the draws show what it approximates. ``pair.model`` is
    sampled by :class:`pyro.infer.NUTS` or :class:`pyro.infer.HMC`, one datum and one chain after
    the other, started at draws from the prior; x_tilde, and a factor, stand aside. A draw takes
    some ten steps of about a millisecond each: this is for single data. Where the posterior has
    several modes, chains may stay in one each; then R-hat is far above 1. For ArviZ:
    ``az.from_dict(posterior={"z": draws.z.numpy()})``.

    Args:
        pair: a pair with a proper, continuous prior.
        x: data (N, *x_shape), best only a few.
        num_samples: draws of each chain that are kept, at least 4.
        method: ``"nuts"``, or ``"hmc"`` with trajectories of up to 2.5 standard deviations.
        num_chains: independent chains per datum; R-hat means more with four.
        warmup: draws before these, in which the step size is adapted, and the mass matrix (a dense
            one, up to 10 latent dimensions; else a diagonal one).
        target_acceptance: that the step size is adapted to; raise it where trajectories diverge.
        seed: of all draws; None draws from torch's global stream.

    Returns:
        PosteriorSamples: draws, R-hat, effective sample size, acceptance and divergences.

    Raises:
        ValueError: a flat, discrete or spike-and-slab prior; bad data, as in
            :func:`probae.log_likelihood`; an argument out of range or unknown.

    Reference:
        Hoffman & Gelman, The no-U-turn sampler, 2014; Gelman et al., Bayesian data analysis, third
        edition, 2013, for R-hat and effective sample size.

    Example:
        >>> import torch, probae
        >>> pair = probae.VAE(8, 2, hidden=(4,))
        >>> draws = probae.posterior_samples(pair, torch.ones(1, 8), 50, warmup=50)
        >>> draws.z.mean((0, 1)).shape  # E[z|x]
        torch.Size([1, 2])
    """
    require_pair(pair)
    require_finite(pair)
    if pair.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"pair must be in float32 or float64 for Hamiltonian moves, got {pair.dtype}; convert "
            "it with pair.float()"
        )
    num_samples = require_count(num_samples, "num_samples", least=4)
    num_chains = require_count(num_chains, "num_chains")
    warmup = require_count(warmup, "warmup")
    # under a Gaussian z is back where it was after 2π, Pyro's default, and independent after π/2;
    # Pyro rounds down to whole steps of about 1
    kernels: dict[str, Any] = {"nuts": NUTS, "hmc": partial(HMC, trajectory_length=2.5)}
    if not isinstance(method, str) or method not in kernels:
        raise ValueError(f"method must be 'nuts' or 'hmc', got {method!r}")
    target_acceptance = require_probability(target_acceptance, "target_acceptance")
    require_gradients("posterior_samples")
    prior = prior_of(pair)
    if is_discrete(prior) or has_component(prior, _WITH_ATOMS) or is_flat(prior):
        raise ValueError(
            f"pair must have a prior with a density, got {type(prior).__name__}: Hamiltonian moves "
            "follow its gradient; under a flat prior there is no p(z|x), train with "
            "prior='normal'; for discrete or spike-and-slab codes pair.encoder(x) approximates it"
        )
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=True)
    model = poutine.block(pair.model, hide=["x_tilde", "factor"])

    def run(datum: Tensor) -> tuple[Tensor, float, int]:
        kernel = kernels[method](
            model,
            target_accept_prob=target_acceptance,
            full_mass=math.prod(pair.z_shape) <= 10,  # above, a dense one costs more than it gains
            transforms={"z": to_support(prior).inv},
            init_strategy=init_to_sample,
        )
        mcmc = MCMC(kernel, num_samples, warmup, disable_progbar=True)
        try:
            mcmc.run(datum[None])
        except ValueError as error:
            raise ValueError(
                f"x must have a posterior that Hamiltonian moves can start from; Pyro says: {error}"
            ) from error
        found = mcmc.diagnostics()
        rate, diverged = (found[name]["chain 0"] for name in ("acceptance rate", "divergences"))
        draws = mcmc.get_samples()["z"].detach()[:, 0]  # (draws, *z_shape)
        return draws, float(rate), len(diverged)

    with frozen(pair, seed), torch.enable_grad():
        runs = [[run(datum) for datum in data] for _ in range(num_chains)]
    z = torch.stack([torch.stack([draws for draws, _, _ in chain], 1) for chain in runs])
    ess, count = effective_sample_size(z), num_chains * num_samples
    most = count * math.log10(count)  # as in Stan; estimates for antithetic draws may even be < 0
    return PosteriorSamples(
        z=z,
        r_hat=split_gelman_rubin(z),
        ess=torch.where((ess <= 0) | (ess > most), most, ess),
        acceptance=torch.tensor([[rate for _, rate, _ in chain] for chain in runs]),
        divergences=torch.tensor([[count for _, _, count in chain] for chain in runs]),
    )


class _Moves:
    """Langevin moves of one step size along a field, corrected where there are nodes."""

    def __init__(self, field: Field, step_size: float, num_nodes: int) -> None:
        self.field, self.step_size = field, step_size
        self.nodes: list[tuple[float, float]] = []
        if num_nodes:
            places, weights = np.polynomial.legendre.leggauss(num_nodes)  # on [-1, 1]
            self.nodes = list(zip((places / 2 + 0.5).tolist(), (weights / 2).tolist(), strict=True))

    def step(self, x: Tensor, at_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new x, the field there, and the acceptance probability of each row."""
        noise = torch.randn_like(x)
        new = x + 0.5 * self.step_size**2 * at_x + self.step_size * noise
        at_new = self.field(new)
        if not self.nodes:
            return new, at_new, x.new_ones(len(x))
        back = (x - new) / self.step_size - 0.5 * self.step_size * at_new
        log_ratio = 0.5 * (noise.square() - back.square()).flatten(1).sum(1) + self.work(x, new)
        log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)  # a move to nowhere
        rate = log_ratio.clamp(max=0).exp()
        take = (torch.rand_like(rate) < rate).reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(take, new, x), torch.where(take, at_new, at_x), rate

    def work(self, x: Tensor, new: Tensor) -> Tensor:
        """Integrate the field along the segments from x to new, (N,) in nats."""
        way = new - x
        total = x.new_zeros(len(x))
        for place, weight in self.nodes:
            total = total + weight * (self.field(x + place * way) * way).flatten(1).sum(1)
        return total

    def circulation(self, x: Tensor) -> Tensor:
        """Integrate the field along two moves from x and straight back to it, (N,) in nats."""
        corners = [x]
        for _ in range(2):
            here = corners[-1]
            drift = 0.5 * self.step_size**2 * self.field(here)
            corners.append(here + drift + self.step_size * torch.randn_like(x))
        ways = zip(corners, [*corners[1:], x], strict=True)
        return sum((self.work(a, b) for a, b in ways), x.new_zeros(len(x))).abs()


def _schedule(num_steps: int, burn_in: int, thin: int) -> Iterator[tuple[int, bool]]:
    """Return an iterator over the steps of a chain, each with whether its state is kept."""
    num_steps, thin = require_count(num_steps, "num_steps"), require_count(thin, "thin")
    burn_in = require_count(burn_in, "burn_in", least=0)
    total = burn_in + num_steps * thin
    return ((t, t >= burn_in and (t - burn_in + 1) % thin == 0) for t in range(total))


def _starts(pair: Autoencoder, x0: Any) -> Tensor:
    return pair.check_input(as_tensor(x0, "x0"), "x0").to(pair.device, pair.dtype)


def _score_field(pair: Autoencoder, x0: Any) -> tuple[Field, Tensor, float]:
    """Return the score as a function to call inside :func:`frozen`, checked starts, and σ."""
    require_pair(pair)
    x = _starts(pair, x0)
    score(pair, x[:1])  # refuses pairs that have none
    noise: Any = pair.corruption

    def field(x: Tensor) -> Tensor:
        means = [mean_of(pair.decoder(mean_of(pair.encoder(rows)))) for rows, _ in chunks(x)]
        return (torch.cat(means) - x) / noise.scale**2

    return field, x, noise.scale


def _require_finite(x: Tensor, steps: int, step_size: float, fix: str) -> None:
    if not x.isfinite().all():
        raise FloatingPointError(
            f"the chain left the finite numbers within {steps} steps of size {step_size:g}; {fix}"
        )
