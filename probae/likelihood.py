"""Marginal likelihoods of held-out data: exact, evidence lower bound, importance weighted, AIS."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from tqdm.auto import tqdm

from .annealing import Annealing, Compiler, anneal_in_chunks, require_annealing
from .autoencoder import Autoencoder, frozen
from .checks import (
    check_support,
    likelihood_of,
    prior_of,
    require_density,
    require_gradients,
    require_parts,
)
from .corrupted import Replacement
from .datasets import as_tensor
from .distributions import GreyBernoulli, has_component, is_discrete, is_flat
from .exact import MAX_STATES, closed_form
from .fast_weights import fast_weights
from .graphs import attempt, require_mode
from .importance import StreamingWeights, compiled_weights, plain_weights
from .memory import counts, rows_in_budget
from .part import require_count, require_flag
from .precision import float32_products

KHAT_LIMIT = 0.7  # above it an importance-sampling estimate is not to be trusted
WORTH = 5000  # draws, each a few milliseconds, that earn a compilation back
BLOCK = 2**13  # samples of z whose weights are summed up at once


class LikelihoodWarning(UserWarning):
    """An estimate of a log-likelihood that its own diagnostics do not bear out.

    Example:
        >>> import warnings, probae
        >>> warnings.simplefilter("ignore", probae.LikelihoodWarning)
    """


class LogLikelihood(NamedTuple):
    """Log-likelihood of each datum, in nats, and how far it can be believed.

    Example:
        >>> import torch, probae
        >>> ll = probae.log_likelihood(probae.PPCA(5, 2), torch.zeros(4, 5))
        >>> ll.method, ll.is_bound, ll.std_error.tolist()
        ('exact', False, [0.0, 0.0, 0.0, 0.0])
    """

    values: Tensor  # (N,) nats per datum
    std_error: Tensor  # (N,) Monte Carlo standard error of each value; 0 where it is exact, inf
    # where one sample of iwae, or one chain of ais, carries the weight, so that nothing is known
    ess: Tensor | None  # (N,) effective number of importance samples, or of chains
    khat: Tensor | None  # (N,) Pareto k of the importance weights; above 0.7 do not trust; NaN
    # where it cannot be told, as of fewer than 25 samples or of draws that are all the same
    method: str  # "exact" | "elbo" | "iwae" | "ais"
    is_bound: bool  # whether the values are lower bounds in expectation
    num_samples: int  # samples of z per datum, for ais chains; 0 where exact
    dimension: int  # number of dimensions of one datum
    acceptance: Tensor | None = None  # (N,) share of accepted moves, for ais
    is_density: bool = True  # False where the data are discrete, and the values log-probabilities

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
        """Negative mean in bits per dimension of the data that the values are about.

        These are the data as they were given to :func:`log_likelihood`. :meth:`before` and
        :meth:`discrete` give the values, and so the bits, of the data before they were scaled or
        dequantised.
        """
        return -self.mean / (self.dimension * math.log(2))

    def before(self, transform: Transform, x: Tensor | Any) -> LogLikelihood:
        r"""Return the log-likelihood of the data x before a preprocessing y = T(x).

        .. math:: \log p_X(x) = \log p_Y(T(x)) + \log \left|\det \frac{dT}{dx}\right|

        Args:
            transform: T, from :mod:`torch.distributions.transforms`: an ``AffineTransform`` that
                scales or standardises, ``SigmoidTransform().inv`` for logits of grey values, a
                ``ComposeTransform`` of several. The values at hand are about T(x).
            x: the data before T, in the same order, (N, *shape).

        Returns:
            LogLikelihood: of x, in nats per datum; standard errors and diagnostics stay.

        Raises:
            ValueError: ``transform`` is no Transform, not invertible, changes the number of
                dimensions or has no finite log-determinant at x; ``x`` are not as many data of that
                dimension; the values are probabilities, which no scaling changes.

        Example:
            >>> import torch, probae
            >>> from torch.distributions import AffineTransform
            >>> metres = torch.randn(50, 5)
            >>> scale = AffineTransform(0, 0.001)  # the pair is about kilometres
            >>> ll = probae.log_likelihood(probae.PPCA(5, 2), scale(metres))
            >>> bool(ll.before(scale, metres).mean < ll.mean)
            True
        """
        if not isinstance(transform, Transform) or not transform.bijective:
            raise ValueError(
                "transform must be an invertible torch.distributions Transform, such as "
                f"AffineTransform(loc, scale), got {type(transform).__name__}"
            )
        self._require_density("before", "was scaled or bent")
        data = as_tensor(x, "x").to(self.values.device, torch.float64)
        expected = (len(self.values), self.dimension)
        if (len(data), data[0].numel()) != expected:
            raise ValueError(
                f"x must be the {expected[0]} data of dimension {expected[1]} that the values are "
                f"about, before the transform, got {len(data)} of dimension {data[0].numel()}"
            )
        bad = ~transform.domain.check(data)
        if bad.any() or transform.domain.event_dim >= data.dim():
            raise ValueError(
                f"x must lie in the domain of transform ({transform.domain}), datum by datum, got "
                f"{int(bad.sum())} outside; pass the data before the transform"
            )
        try:
            y = transform(data)
        except RuntimeError as error:
            raise ValueError(
                f"transform does not take x of shape {tuple(data.shape)}: {error}"
            ) from error
        if y.numel() != data.numel():
            raise ValueError(
                f"transform must keep the number of dimensions, {self.dimension}, got "
                f"{y.numel() // len(data)}: a density has none on the other side"
            )
        batch = data.shape[: data.dim() - transform.domain.event_dim]
        try:
            volume = torch.as_tensor(transform.log_abs_det_jacobian(data, y)).broadcast_to(batch)
        except ValueError:  # math.log of a scale of zero
            volume = data.new_full(batch, torch.nan)
        volume = volume.flatten(1).sum(1) if volume.dim() > 1 else volume
        if not volume.isfinite().all():
            raise ValueError(
                f"transform has no finite log-determinant at {int((~volume.isfinite()).sum())} of "
                "the data x: it maps some of them to a point, or to infinity"
            )
        return self._replace(values=self.values + volume.to(self.values.dtype))

    def discrete(self, levels: int) -> LogLikelihood:
        r"""Return the log-probability of the grey levels behind dequantised data.

        .. math:: \log P(k) \ge E_u \log p\big((k + u) / L\big) - D \log L

        for x = (k + u) / L as :func:`probae.dequantize` makes it from L ``levels``. Its
        ``bits_per_dim`` is the one that papers on image models report, whatever the model of the
        dequantised x, and at least 0 on average over u.

        Args:
            levels: L, the number of grey levels that were dequantised, such as ``data.levels``.

        Returns:
            LogLikelihood: a lower bound (Jensen's inequality), in nats per datum.

        Raises:
            ValueError: ``levels`` is no int >= 2; the values are probabilities already.

        Reference:
            Theis, van den Oord & Bethge, A note on the evaluation of generative models, 2016.

        Example:
            >>> import probae
            >>> data = probae.load_dataset("digits")
            >>> x = probae.dequantize(data.test, data.levels).flatten(1)
            >>> ll = probae.log_likelihood(probae.PPCA(64, 2), x)
            >>> round(ll.discrete(data.levels).bits_per_dim - ll.bits_per_dim, 4)  # log2(17)
            4.0875
        """
        shift = self.dimension * math.log(require_count(levels, "levels", least=2))
        self._require_density("discrete", "was dequantised")
        return self._replace(values=self.values - shift, is_bound=True, is_density=False)

    @property
    def unreliable(self) -> float | None:
        """Share of the data whose value is a bound and no estimate; None for exact and elbo.

        For iwae: Pareto k is above 0.7, or cannot be told. For ais: fewer than two chains count,
        by the ESS; the converse does not hold, so see :func:`probae.bdmc`.
        """
        if self.khat is None or self.ess is None or self.method == "elbo":
            return None
        bad = self.ess < 2 if self.method == "ais" else ~(self.khat <= KHAT_LIMIT)
        return float(bad.double().mean())

    def _require_density(self, name: str, what: str) -> None:
        if not self.is_density:
            raise ValueError(
                f"{name}() is for densities of data that {what}, but these values are "
                "log-probabilities of discrete data, which need no such correction"
            )

    def __repr__(self) -> str:
        claim = self.method + (f", {self.num_samples} samples" if self.num_samples else "")
        if self.is_bound or self.method != "exact":
            claim += ", lower bound" if self.is_bound else ", exact"
        if self.method == "iwae" and self.unreliable:
            claim += f", no estimate for {100 * self.unreliable:.0f} % of the data by Pareto k"
        if self.method == "ais" and self.ess is not None:
            claim += f", median ESS {float(self.ess.median()):.1f}"
        return (
            f"LogLikelihood({self.mean:.4f} ± {self.mean_std_error:.4f} nats per datum, "
            f"{len(self.values)} data, {claim})"
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
    compile: bool | str = "auto",
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
    its standard error certifies it: where fewer than two chains count it warns, take more
    temperatures until the value settles. With 500 temperatures and 16 chains the mean over data
    is far better than single values, which may be a nat off; 64 chains bring them within half a nat
    on a linear-Gaussian pair of 5 latent dimensions.

    ``exact`` needs a linear-Gaussian pair (affine mean, one scale, Gaussian prior) or a discrete
    code of at most 2**20 states. Work is cut into chunks of data and of samples, so memory does not
    grow with ``num_samples``.

    Args:
        pair: the pair; it is not changed.
        x: data (N, *x_shape) in the support of the decoder: tensor, array, path or Dataset.
        method: ``"exact"``, ``"elbo"``, ``"iwae"``, ``"ais"``, or ``"auto"``: exact where there is
            a closed form, else iwae, with a :class:`LikelihoodWarning` that gives the share of
            data whose Pareto k is above 0.7, or cannot be told, where there are any.
        num_samples: K, by default 100 for elbo, 5000 for iwae, 16 chains for ais.
        proposal: an encoder to draw z from in place of the pair's own, for pairs with point codes
            or factors, such as :func:`probae.fit_proposal` makes. The figures are then about
            p(z) p(x|z) alone: no corruption, no factor (as those of ais and exact always are).
        annealing: temperatures, moves and start of ais; default: ``Annealing()``.
        seed: of the samples of z; None draws from the global stream.
        progress: show a progress bar.
        compile: let machine code draw and weigh samples, which gives the same values up to
            rounding, or move the chains of ais, where rounding may decide whether a move is
            accepted: True, False, or ``"auto"`` where the work takes long enough to earn some
            seconds of compilation back, else with a warning that says why it cannot be.

    Returns:
        LogLikelihood: values and standard errors per datum in nats, and diagnostics.

    Raises:
        ValueError: bad data (shape, dtype, empty, NaN, outside the support; grey pixels under a
            Bernoulli decoder), ``num_samples`` < 1, an unknown method, a method that the pair does
            not allow, or a pair whose kind certifies no likelihood.
        CannotCompile: ``compile=True``, and the work cannot be compiled; the message says why.

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
    require_parts(pair)
    known = ("auto", "exact", "elbo", "iwae", "ais")
    require_flag(progress, "progress")
    require_mode(compile)
    if not isinstance(method, str) or method not in known:
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
    exact, chosen = closed_form(pair), method
    if method == "auto":
        chosen = "iwae" if exact is None else "exact"
    dimension, is_density = data[0].numel(), _has_density(pair)
    if proposal is not None:
        zeros = torch.zeros(2, *pair.x_shape).to(pair.device, pair.dtype)
        require_density(pair, proposal, zeros, "proposal")
    if chosen != "ais" and annealing is not None:
        raise ValueError(f"annealing goes with method='ais', got method={method!r}")
    if chosen == "exact":
        if exact is None:
            raise ValueError(
                "method='exact' needs a linear-Gaussian pair (Gaussian prior; GaussianDecoder on "
                f"an affine network, hidden=()) or a discrete code of at most {MAX_STATES} states; "
                "use method='iwae'"
            )
        with frozen(pair, seed=0):
            values = exact(data)
        zero = torch.zeros_like(values)
        return LogLikelihood(
            values, zero, None, None, "exact", False, 0, dimension, None, is_density
        )
    if chosen == "ais":
        require_gradients("method='ais'")
        annealing = Annealing() if annealing is None else require_annealing(annealing)
        chains = num_samples or 16
        annealed = anneal_in_chunks(
            pair, data, chains, annealing, proposal, seed, progress, Compiler(compile)
        )
        streaming = StreamingWeights(chains, data)
        streaming.add(annealed.log_weights)
        values, std_error, ess, khat = streaming.iwae()
        ll = LogLikelihood(
            values,
            std_error,
            ess,
            khat,
            "ais",
            True,
            chains,
            dimension,
            annealed.acceptance,
            is_density,
        )
        if ll.unreliable:
            warnings.warn(_advice(pair, ll), LikelihoodWarning, stacklevel=2)
        return ll
    samples = num_samples or {"elbo": 100, "iwae": 5000}[chosen]
    values, std_error, ess, khat = _weighed(
        pair, data, chosen, samples, proposal, seed, progress, compile
    )
    ll = LogLikelihood(
        values, std_error, ess, khat, chosen, True, samples, dimension, None, is_density
    )
    if method == "auto" and ll.unreliable:
        warnings.warn(_advice(pair, ll), LikelihoodWarning, stacklevel=2)
    return ll


def _weighed(
    pair: Autoencoder,
    data: Tensor,
    method: str,
    num_samples: int,
    proposal: nn.Module | None,
    seed: int | None,
    progress: bool,
    compile: bool | str,
) -> list[Tensor]:
    """Return values, standard errors, effective sample sizes and Pareto k of importance samples."""
    rows = rows_in_budget(pair)
    at_once = min(len(data), max(min(64, rows), rows // num_samples))
    most = min(num_samples, max(1, rows // at_once))
    num_draws = len(data) * num_samples // (at_once * most)
    results = []
    with (
        frozen(pair, seed),
        frozen(nn.Module() if proposal is None else proposal, None),
        float32_products(pair.device),
        tqdm(total=len(data), disable=not progress, unit="datum") as bar,
    ):
        plain = plain_weights(pair, method, proposal)  # which refuses some pairs
        weigh = attempt(
            False if compile == "auto" and num_draws < WORTH else compile,
            lambda: (
                fast_weights(pair, proposal, (most, at_once))
                or compiled_weights(plain, data[:at_once], most)
            ),
            "log_likelihood draws",
            stacklevel=3,
        )
        weigh = weigh or fast_weights(pair, proposal) or plain
        for x in data.split(at_once):
            streaming, draw = StreamingWeights(num_samples, x), weigh(x)
            for count in counts(num_samples, BLOCK):
                log_weights = x.new_empty(count, len(x))
                for block in log_weights.split(most):
                    block.copy_(draw(len(block)))
                streaming.add(log_weights)
            results.append(streaming.elbo() if method == "elbo" else streaming.iwae())
            bar.update(len(x))
    return [torch.cat(column) for column in zip(*results, strict=True)]


def _has_density(pair: Autoencoder) -> bool:
    """Whether p(x) is a density, and no probability of discrete data, nor a mixture of both."""
    likelihood = likelihood_of(pair)
    discrete = has_component(likelihood, (GreyBernoulli, Replacement))
    return not (discrete or likelihood.support.is_discrete)


def _advice(pair: Autoencoder, ll: LogLikelihood) -> str:
    """Say how many data the samples do not serve, and what would serve them."""
    share = f"{100 * (ll.unreliable or 0):.0f} % of {len(ll.values)} data"
    bounds = "their values are lower bounds and cannot be trusted as estimates"
    if ll.method == "ais":
        return (
            f"one of {ll.num_samples} chains carries nearly all the weight for {share}: {bounds}; "
            "take more num_temperatures, or start='encoder', and see probae.bdmc for how loose "
            "such values are on data of the model"
        )
    better = (
        f"more samples (num_samples > {ll.num_samples}) or a better proposal"
        if is_discrete(prior_of(pair))
        else "method='ais'"
    )
    return (
        f"Pareto k of {ll.num_samples} importance samples is above {KHAT_LIMIT}, or cannot be "
        f"told, for {share}: {bounds}; use {better}"
    )


class Comparison(NamedTuple):
    """Difference of two models on the same data, in nats per datum.

    Example:
        >>> Comparison(1.5, 0.1, 200, False, False)
        Comparison(+1.5000 ± 0.1000 nats per datum in favour of the first, 200 data, paired)
    """

    difference: float  # mean of the first less the second
    std_error: float  # of that mean, over the data
    num_data: int
    first_is_bound: bool  # whether its values are lower bounds
    second_is_bound: bool

    def __repr__(self) -> str:
        better = "first" if self.difference >= 0 else "second"
        notes = {
            (True, True): "; a difference of lower bounds, which is no bound",
            (True, False): "; a lower bound on the difference, in expectation",
            (False, True): "; an upper bound on the difference, in expectation",
        }
        return (
            f"Comparison({self.difference:+.4f} ± {self.std_error:.4f} nats per datum in favour of "
            f"the {better}, {self.num_data} data, paired"
            f"{notes.get((self.first_is_bound, self.second_is_bound), '')})"
        )


def compare(first: LogLikelihood, second: LogLikelihood) -> Comparison:
    r"""Compare two models by their log-likelihoods of the same data, in the same order.

    .. math:: \bar d = \frac1N \sum_n \big(\log p_1(x_n) - \log p_2(x_n)\big),\quad
              se = \frac{sd(d)}{\sqrt N}

    Data differ in how likely they are under any model, and the pairing takes that out: the standard
    error is often far below those of the two means. Where values are lower bounds, the result says
    what their difference is. That the data are the same cannot be checked: only their number is.

    Args:
        first: of one model, from :func:`log_likelihood`.
        second: of the other, on the very same data.

    Returns:
        Comparison: difference and standard error, nats per datum.

    Raises:
        ValueError: an argument is no :class:`LogLikelihood`, the two are not of as many data of the
            same dimension, or one is of densities and the other of probabilities.

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
    if first.is_density != second.is_density:
        raise ValueError(
            "first and second must both be densities, or both probabilities, got one of each: "
            "their difference has the units of x; for dequantised data take .discrete(levels)"
        )
    difference = first.values.double().cpu() - second.values.double().cpu()
    spread = float(difference.std()) if len(difference) > 1 else math.nan
    return Comparison(
        float(difference.mean()),
        spread / math.sqrt(len(difference)),
        len(difference),
        first.is_bound,
        second.is_bound,
    )
