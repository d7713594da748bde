"""Marginal likelihoods of held-out data: exact, evidence lower bound, importance weighted, AIS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .annealing import Annealing, anneal
from .arviz import pareto_khat
from .autoencoder import Autoencoder, Kind, frozen
from .checks import check_support, prior_of, require_density, require_gradients, require_pair
from .datasets import as_tensor
from .decoders import GaussianDecoder
from .distributions import base_distribution, is_flat
from .part import require_count
from .terms import log_weights

MAX_STATES = 2**20  # of a discrete code that is enumerated
CHUNK_BYTES = 4 * 2**20  # widest activation of one pass through the decoder; fits in cache


class LogLikelihood(NamedTuple):
    """Log-likelihood of each datum, in nats, and how far it can be believed.

    Example:
        >>> import torch, probae
        >>> ll = probae.log_likelihood(probae.PPCA(5, 2), torch.zeros(4, 5))
        >>> ll.method, ll.is_bound, ll.std_error.tolist()
        ('exact', False, [0.0, 0.0, 0.0, 0.0])
    """

    values: Tensor  # (N,) nats per datum
    std_error: Tensor  # (N,) Monte Carlo standard error of each value; 0 where it is exact
    ess: Tensor | None  # (N,) effective number of importance samples
    khat: Tensor | None  # (N,) Pareto k of the importance weights; above 0.7 do not trust
    method: str  # "exact" | "elbo" | "iwae" | "ais"
    is_bound: bool  # whether the values are lower bounds in expectation
    num_samples: int  # samples of z per datum, for ais chains; 0 where exact
    dimension: int  # number of dimensions of one datum
    acceptance: Tensor | None = None  # (N,) share of accepted moves, for ais

    @property
    def mean(self) -> float:
        """Mean over the data, nats per datum."""
        return float(self.values.double().mean())

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean over the data, sampling of data and of z together."""
        if len(self.values) < 2:
            return math.nan
        return float(self.values.double().std() / math.sqrt(len(self.values)))

    @property
    def bits_per_dim(self) -> float:
        """Negative mean in bits per dimension of the data as they were given."""
        return -self.mean / (self.dimension * math.log(2))

    def __repr__(self) -> str:
        claim = "lower bound" if self.is_bound else "exact"
        samples = f", {self.num_samples} samples" if self.num_samples else ""
        return (
            f"LogLikelihood({self.mean:.4f} ± {self.mean_std_error:.4f} nats per datum, "
            f"{len(self.values)} data, {self.method}{samples}, {claim})"
        )


def log_likelihood(
    pair: Autoencoder,
    x: Tensor | Any,
    method: str = "auto",
    num_samples: int | None = None,
    *,
    proposal: nn.Module | None = None,
    annealing: Annealing | None = None,
    seed: int | None = 0,
    progress: bool = False,
) -> LogLikelihood:
    r"""Estimate log p(x) of each datum.

    .. math::
        exact:&\quad \log p(x) \text{ in closed form, or } \log\sum_z p(z)\,p(x|z)\\
        elbo:&\quad \frac1K \sum_k \log w_k,\qquad
        iwae:\quad \log \frac1K \sum_k w_k,\qquad w_k = \frac{p(x, z_k)}{q(z_k|x)}\\
        ais:&\quad \log \frac1K \sum_k w_k, \text{ with } w_k \text{ annealed from } q
        \text{ or } p(z) \text{ to the posterior; see :class:`Annealing`}

    ``ais`` needs no encoder, so it measures point codes and penalised pairs, too, and is often the
    tighter bound where an encoder is poor; it needs continuous z. Neither its acceptance rate nor
    its standard error certifies it where the effective number of chains is near one: take more
    temperatures until the value settles.

    ``exact`` needs a linear-Gaussian pair (affine mean, one scale, Gaussian prior) or a discrete
    code of at most 2**20 states. Work is cut into chunks of data and of samples, so memory does not
    grow with ``num_samples``.

    Args:
        pair: the pair; it is not changed.
        x: data (N, *x_shape) in the support of the decoder: tensor, array, path or Dataset.
        method: ``"exact"``, ``"elbo"``, ``"iwae"``, ``"ais"``, or ``"auto"``: exact where there is
            a closed form, else iwae.
        num_samples: K, by default 100 for elbo, 5000 for iwae, 16 chains for ais.
        proposal: an encoder to draw z from in place of the pair's own, for pairs with point codes
            or factors, such as :func:`probae.fit_proposal` makes. The figures are then about
            p(z) p(x|z) alone: no corruption, no factor (as those of ais and exact always are).
        annealing: temperatures, moves and start of ais; default: ``Annealing()``.
        seed: of the samples of z; None draws from the global stream.
        progress: show a progress bar.

    Returns:
        LogLikelihood: values and standard errors per datum in nats, and diagnostics.

    Raises:
        ValueError: bad data (shape, dtype, empty, NaN, outside the support; grey pixels under a
            Bernoulli decoder), ``num_samples`` < 1, an unknown method, a method that the pair does
            not allow, or a pair whose kind certifies no likelihood.

    Reference:
        Burda, Grosse & Salakhutdinov, Importance weighted autoencoders, 2016; Neal, Annealed
        importance sampling, 2001; Tipping & Bishop, 1999; Vehtari et al., Pareto smoothed
        importance sampling, 2024.

    Example:
        >>> import torch, probae
        >>> pair = probae.VAE(8, 2)
        >>> ll = probae.log_likelihood(pair, torch.ones(4, 8), "iwae", num_samples=10)
        >>> ll.values.shape, ll.is_bound
        (torch.Size([4]), True)
    """
    require_pair(pair)
    known = ("auto", "exact", "elbo", "iwae", "ais")
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, got {method!r}")
    if num_samples is not None:
        num_samples = require_count(num_samples, "num_samples")
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=True)
    if is_flat(prior_of(pair)):
        raise ValueError(
            f"pair is of kind {pair.kind.value}: its prior is flat, so there is no p(x) "
            f"({pair.kind.statement}); give it a proper prior, such as prior='normal'"
        )
    closed_form = _closed_form(pair)
    if method == "auto":
        method = "iwae" if closed_form is None else "exact"
    dimension = data[0].numel()
    if method == "exact":
        if closed_form is None:
            raise ValueError(
                "method='exact' needs a linear-Gaussian pair (Gaussian prior; GaussianDecoder on "
                f"an affine network, hidden=()) or a discrete code of at most {MAX_STATES} states; "
                "use method='iwae'"
            )
        with frozen(pair, seed=0):
            values = closed_form(data)
        zero = torch.zeros_like(values)
        return LogLikelihood(values, zero, None, None, "exact", False, 0, dimension)
    if proposal is not None:
        zeros = torch.zeros(2, *pair.x_shape).to(pair.device, pair.dtype)
        require_density(pair, proposal, zeros, "proposal")
    if method != "ais" and annealing is not None:
        raise ValueError(f"annealing goes with method='ais', got method={method!r}")
    if method == "ais":
        return _annealed(
            pair, data, num_samples or 16, annealing or Annealing(), proposal, seed, progress
        )
    model, guide = _programs(pair, method, proposal)
    samples = num_samples or {"elbo": 100, "iwae": 5000}[method]
    rows = max(1, CHUNK_BYTES // (data.element_size() * _widest(pair)))
    results = []
    thawed = nn.Module() if proposal is None else proposal
    with (
        frozen(pair, seed),
        frozen(thawed, None),
        tqdm(total=len(data), disable=not progress, unit="datum") as bar,
    ):
        for chunk in data.split(max(min(64, rows), rows // samples)):
            streaming = _StreamingWeights(samples, chunk)
            for count in _counts(samples, max(1, rows // len(chunk))):
                streaming.add(log_weights(model, guide, chunk, num_particles=count))
            results.append(streaming.elbo() if method == "elbo" else streaming.iwae())
            bar.update(len(chunk))
    values, std_error, ess, khat = (torch.cat(column) for column in zip(*results, strict=True))
    return LogLikelihood(values, std_error, ess, khat, method, True, samples, dimension)


class Comparison(NamedTuple):
    """Difference of two models on the same data, in nats per datum.

    Example:
        >>> Comparison(1.5, 0.1, 200, "exact", "exact")
        Comparison(+1.5000 ± 0.1000 nats per datum in favour of the first, 200 data, paired)
    """

    difference: float  # mean of the first less the second
    std_error: float  # of that mean, over the data
    num_data: int
    first_method: str
    second_method: str

    def __repr__(self) -> str:
        better = "first" if self.difference >= 0 else "second"
        bounds = {self.first_method, self.second_method} - {"exact"}
        note = "; a difference of lower bounds, which is no bound" if bounds else ""
        return (
            f"Comparison({self.difference:+.4f} ± {self.std_error:.4f} nats per datum in favour of "
            f"the {better}, {self.num_data} data, paired{note})"
        )


def compare(first: LogLikelihood, second: LogLikelihood) -> Comparison:
    r"""Compare two models by their log-likelihoods of the same data, in the same order.

    .. math:: \bar d = \frac1N \sum_n \big(\log p_1(x_n) - \log p_2(x_n)\big),\quad
              se = \frac{sd(d)}{\sqrt N}

    Data differ in how likely they are under any model, and the pairing takes that out: the standard
    error is often far below those of the two means. Where a value is a lower bound, the difference
    is one of bounds.

    Args:
        first: of one model, from :func:`log_likelihood`.
        second: of the other, on the very same data.

    Returns:
        Comparison: difference and standard error, nats per datum.

    Raises:
        ValueError: an argument is no :class:`LogLikelihood`, or the two are not of the same data.

    Example:
        >>> import torch, probae
        >>> x = torch.randn(50, 5)
        >>> lls = [probae.log_likelihood(probae.PPCA(5, k), x) for k in (1, 2)]
        >>> probae.compare(*lls).num_data
        50
    """
    for argument, ll in (("first", first), ("second", second)):
        if not isinstance(ll, LogLikelihood):
            raise ValueError(
                f"{argument} must be a LogLikelihood from probae.log_likelihood, got "
                f"{type(ll).__name__}"
            )
    if (len(first.values), first.dimension) != (len(second.values), second.dimension):
        raise ValueError(
            "first and second must be of the same data, got "
            f"{len(first.values)} data of dimension {first.dimension} and {len(second.values)} of "
            f"dimension {second.dimension}"
        )
    difference = first.values.double().cpu() - second.values.double().cpu()
    spread = float(difference.std()) if len(difference) > 1 else math.nan
    return Comparison(
        float(difference.mean()),
        spread / math.sqrt(len(difference)),
        len(difference),
        first.method,
        second.method,
    )


def _annealed(
    pair: Autoencoder,
    data: Tensor,
    num_chains: int,
    annealing: Annealing,
    proposal: nn.Module | None,
    seed: int | None,
    progress: bool,
) -> LogLikelihood:
    """Log-mean weight of annealed chains; its expectation is at most log p(x)."""
    require_gradients("method='ais'")
    if not isinstance(annealing, Annealing):
        raise ValueError(
            f"annealing must be a probae.Annealing, got {type(annealing).__name__}; for instance "
            "probae.Annealing(num_temperatures=1000)"
        )
    rows = max(1, CHUNK_BYTES // (data.element_size() * _widest(pair) * num_chains))
    thawed = nn.Module() if proposal is None else proposal
    columns: list[list[Tensor]] = []
    with (
        frozen(pair, seed),
        frozen(thawed, None),
        tqdm(total=len(data), disable=not progress, unit="datum") as bar,
    ):
        for chunk in data.split(rows):
            weights = anneal(pair, chunk, num_chains, annealing, proposal)
            streaming = _StreamingWeights(num_chains, chunk)
            streaming.add(weights.log_weights)
            columns.append([*streaming.iwae(), weights.acceptance])
            bar.update(len(chunk))
    values, std_error, ess, khat, acceptance = (
        torch.cat(column) for column in zip(*columns, strict=True)
    )
    return LogLikelihood(
        values, std_error, ess, khat, "ais", True, num_chains, data[0].numel(), acceptance
    )


class _StreamingWeights:
    """Running sums over log-weights (K, N) that arrive in blocks, in memory that K does not enter.

    Pareto k needs only the largest weights; M = min(K/5, 3√K) of them and one more are kept.
    """

    def __init__(self, num_samples: int, x: Tensor) -> None:
        self.num_samples = num_samples
        self.tail_size = min(num_samples, math.ceil(min(num_samples / 5, 3 * num_samples**0.5)) + 1)
        empty = x.new_full((len(x),), -math.inf, dtype=torch.float64)
        self.log_sum, self.log_sum_squares = empty, empty
        self.mean, self.sum_squares, self.seen = torch.zeros_like(empty), torch.zeros_like(empty), 0
        self.tail = empty.new_empty((0, len(x)))

    def add(self, log_weights: Tensor) -> None:
        """Take in a block of shape (k, N)."""
        block = log_weights.double()
        self.log_sum = torch.logaddexp(self.log_sum, block.logsumexp(0))
        self.log_sum_squares = torch.logaddexp(self.log_sum_squares, (2 * block).logsumexp(0))
        count, total = len(block), self.seen + len(block)
        mean, shift = block.mean(0), block.mean(0) - self.mean  # Chan et al., 1983
        self.sum_squares = self.sum_squares + ((block - mean) ** 2).sum(0)
        self.sum_squares = self.sum_squares + shift**2 * self.seen * count / total
        self.mean, self.seen = self.mean + shift * count / total, total
        top = torch.topk(block, min(count, self.tail_size), 0).values
        merged = torch.cat([self.tail, top])
        self.tail = torch.topk(merged, min(len(merged), self.tail_size), 0).values

    def ess(self) -> Tensor:
        """Kish's effective sample size (Σw)² / Σw²."""
        return (2 * self.log_sum - self.log_sum_squares).exp()

    def elbo(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean log-weight, its standard error, effective sample size, Pareto k."""
        variance = self.sum_squares / max(self.seen - 1, 1)
        std_error = (variance / self.seen).sqrt() if self.seen > 1 else variance + math.nan
        return self.mean, std_error, self.ess(), self.khat()

    def iwae(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-mean weight, its standard error (delta method), effective sample size, Pareto k."""
        count, ess = self.seen, self.ess()
        relative_variance = (1 / ess - 1 / count).clamp(min=0) * count / max(count - 1, 1)
        std_error = relative_variance.sqrt() if count > 1 else relative_variance + math.nan
        return self.log_sum - math.log(count), std_error, ess, self.khat()

    def khat(self) -> Tensor:
        """Pareto k of each datum, from the kept tail."""
        return pareto_khat(self.tail, self.num_samples)


def _programs(
    pair: Autoencoder, method: str, proposal: nn.Module | None
) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """Return the model and what proposes z for it, or refuse what would not give a bound."""
    if proposal is None:
        kind = pair.kind
        if kind is Kind.ELBO or (kind is Kind.DISCRETE_POINT and method == "elbo"):
            return pair.model, pair.guide
        raise ValueError(
            f"method={method!r} needs an encoder with a density, but the pair is of kind "
            f"{kind.value}: {kind.statement}; use method='ais', or pass "
            "proposal=probae.fit_proposal(pair, x_train)"
            + (", or method='elbo'" if kind is Kind.DISCRETE_POINT else "")
        )

    def propose(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", proposal(x))

    def generate(x: Tensor) -> None:  # p(z) p(x|z): neither corruption nor factor
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", pair.prior())
            pyro.sample("x", pair.decoder(z), obs=x)

    return generate, propose


def _closed_form(pair: Autoencoder) -> Callable[[Tensor], Tensor] | None:
    """Return the function that gives log p(x) exactly, or None where there is none."""
    prior = base_distribution(prior_of(pair))
    decoder = pair.decoder
    if isinstance(prior, dist.Normal) and isinstance(decoder, GaussianDecoder):
        affine = decoder.affine()
        if affine is not None:
            return lambda x: _linear_gaussian(x, prior, *affine)
    count = _count_states(pair)
    if count is not None and count <= MAX_STATES:
        return lambda x: _enumerated(pair, x)
    return None


def _linear_gaussian(
    x: Tensor, prior: dist.Normal, weight: Tensor, bias: Tensor, scale: Tensor
) -> Tensor:
    r"""Log-density of N(Wm + b, W diag(τ²) Wᵀ + s² I), in double precision."""
    weight, bias, scale = weight.double(), bias.double(), scale.double()
    marginal = dist.LowRankMultivariateNormal(
        weight @ prior.loc.double() + bias,
        weight * prior.scale.double(),
        (scale**2).expand(len(bias)),
    )
    return marginal.log_prob(x.flatten(1).double())


def _count_states(pair: Autoencoder) -> int | None:
    """Number of states of the code, or None if it is not discrete and finite."""
    prior = prior_of(pair)
    base = base_distribution(prior)
    if isinstance(base, dist.OneHotCategorical) and prior.event_shape == base.event_shape:
        return int(base.event_shape[0])
    if isinstance(base, dist.Bernoulli | dist.Categorical):
        choices = 2 if isinstance(base, dist.Bernoulli) else base.probs.shape[-1]
        return int(choices ** math.prod(prior.event_shape))
    return None


def _states(pair: Autoencoder, rows: int) -> Iterator[Tensor]:
    """Yield all states of the code in blocks of shape (rows, *z_shape)."""
    prior = pair.prior()
    base, like = base_distribution(prior), prior.sample()  # dtype and device of a code
    if isinstance(base, dist.OneHotCategorical):
        yield from torch.eye(len(like)).to(like).split(rows)
        return
    choices = 2 if isinstance(base, dist.Bernoulli) else base.probs.shape[-1]
    place = choices ** torch.arange(like.numel(), device=like.device)  # digits in base `choices`
    for index in torch.arange(choices ** like.numel(), device=like.device).split(rows):
        yield ((index[:, None] // place) % choices).to(like).reshape(-1, *like.shape)


def _enumerated(pair: Autoencoder, x: Tensor) -> Tensor:
    """Log Σ_z p(z) p(x|z) over all states, in chunks of states and of data."""
    prior, budget = pair.prior(), CHUNK_BYTES // (x.element_size() * _widest(pair))
    values = []
    for chunk in x.split(max(1, budget // 64)):
        total = x.new_full((len(chunk),), -math.inf, dtype=torch.float64)
        for z in _states(pair, max(1, budget // len(chunk))):
            log_joint = prior.log_prob(z)[:, None] + pair.decoder(z[:, None]).log_prob(chunk)
            total = torch.logaddexp(total, log_joint.double().logsumexp(0))
        values.append(total)
    return torch.cat(values)


def _widest(pair: Autoencoder) -> int:
    """Elements of the widest activation of the decoder for one code."""
    widths = [math.prod(pair.x_shape)]
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output: (
                widths.append(output.numel()) if isinstance(output, Tensor) else None
            )
        )
        for module in pair.decoder.modules()
    ]
    try:
        with frozen(pair, seed=0):
            pair.decoder(pair.prior().sample(torch.Size((1,))))
    finally:
        for hook in hooks:
            hook.remove()
    return max(widths)


def _counts(total: int, most: int) -> Iterator[int]:
    """Split ``total`` samples into blocks of at most ``most``."""
    for start in range(0, total, most):
        yield min(most, total - start)
