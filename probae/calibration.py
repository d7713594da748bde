"""Whether an encoder is the posterior of its model: ranks and coverage on simulated data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from .autoencoder import Autoencoder, frozen
from .checks import prior_of, require_density, require_parts
from .distributions import is_flat, is_point
from .memory import counts, rows_in_budget
from .part import as_number, listed, require_count

MOST_BINS = 20  # of a test of uniformity
VIEWS = 64  # corrupted views of x over which the density of a guide is averaged

Statistic = Callable[[Tensor, Tensor], Tensor]  # z (K, N, *z_shape), x (N, *x_shape) -> (K, N, ...)


class CalibrationRanks(NamedTuple):
    """Ranks of the codes that made the data among draws from the encoder; uniform if it is right.

    Example:
        >>> import probae
        >>> ranks = probae.simulation_based_calibration(probae.PPCA(5, 2), 200)
        >>> ranks.names, ranks.ranks.shape, ranks.p_value > 1e-3
        (('z[0]', 'z[1]', 'log p(x|z)'), torch.Size([200, 2]), True)
    """

    ranks: Tensor  # (S, *z_shape) number of draws below each coordinate of the code, 0 to L
    statistic_ranks: Tensor  # (S, J) those of log p(x|z) and of the statistic, 0 to L
    names: tuple[str, ...]  # (Q,) of the quantities: coordinates of z, then the J statistics
    num_draws: int  # L

    @property
    def table(self) -> Tensor:
        """Ranks of all quantities, (S, Q), in the order of ``names``."""
        return torch.cat([self.ranks.reshape(len(self.ranks), -1), self.statistic_ranks], 1)

    def histogram(self, bins: int | None = None) -> Tensor:
        """Count the simulations whose rank falls in each bin, (Q, bins).

        Args:
            bins: number of bins, at most L + 1; default: as for ``p_values``.

        Raises:
            ValueError: ``bins`` is no count of at most L + 1.
        """
        bins = self._num_bins(bins)
        index = self.table * bins // (self.num_draws + 1)  # (S, Q)
        return torch.stack([column.bincount(minlength=bins) for column in index.unbind(1)])

    def expected(self, bins: int | None = None) -> Tensor:
        """Return the mean counts of :meth:`histogram` under uniform ranks, (bins,), in double.

        They differ between bins where L + 1 ranks are no multiple of their number.
        """
        bins = self._num_bins(bins)
        bin_of_rank = torch.arange(self.num_draws + 1) * bins // (self.num_draws + 1)
        share = bin_of_rank.bincount(minlength=bins).double() / (self.num_draws + 1)
        return len(self.ranks) * share.to(self.ranks.device)

    @property
    def p_values(self) -> Tensor:
        """Probability of ranks this uneven, or more, were the encoder right, (Q,).

        By the chi-square test on at most 20 bins of at least 10 simulations each, on average.
        """
        return _chi_square(self.histogram(), self.expected())

    @property
    def p_value(self) -> float:
        """The smallest of Q p-values times Q (Bonferroni): valid however they depend."""
        return min(1.0, len(self.names) * float(self.p_values.min()))

    def _num_bins(self, bins: int | None) -> int:
        if bins is None:
            return min(MOST_BINS, self.num_draws + 1, len(self.ranks) // 10)
        if require_count(bins, "bins") > self.num_draws + 1:
            raise ValueError(
                f"bins must be at most the {self.num_draws + 1} ranks that there are, got {bins}"
            )
        return int(bins)

    def __repr__(self) -> str:
        values = self.p_values
        return (
            f"CalibrationRanks(p = {self.p_value:.3g} for {len(self.names)} quantities together, "
            f"the least even {self.names[int(values.argmin())]}; {len(self.ranks)} simulations, "
            f"{self.num_draws} draws each)"
        )


def simulation_based_calibration(
    pair: Autoencoder,
    num_simulations: int = 1000,
    num_draws: int = 99,
    *,
    statistic: Statistic | None = None,
    proposal: nn.Module | None = None,
    seed: int | None = 0,
) -> CalibrationRanks:
    r"""Check that the encoder is the posterior of the model, by the ranks of simulated codes.

    .. math:: z \sim p(z),\quad x \sim p(x|z),\quad z_1, \dots, z_L \sim q(z|x),\quad
              r = \#\{l : f(z_l, x) < f(z, x)\}

    Where q(z|x) = p(z|x), the code z is one more draw from q, so that for every quantity f the rank
    r is uniform on {0, …, L}. Ranks at both ends too often mean an encoder that is too narrow, in
    the middle too wide, at one end one that is off to the other side. Among equal values the rank
    is drawn, so ranks of discrete codes are uniform, too.

    The quantities are the coordinates of z **and log p(x|z)**. Coordinates alone are blind to much:
    an encoder that gives back the prior, whatever x, passes on each, and so does one with the right
    marginals and no correlations. The log-likelihood gives both away, as their draws fit x worse
    than those of the posterior. A ``statistic`` of your own may look for more.

    What passes is calibrated on data that the model makes; of real data the check says nothing, and
    it takes no notice of how good the model is. A small p-value tells nothing of the size of a
    fault, which :func:`expected_coverage` measures; with few simulations, any encoder passes.

    Under a corruption the guide draws x_tilde, then z: each of the L draws has an x_tilde of its
    own, and what is checked is the guide's law of z given the clean x,
    :math:`\int C(\tilde x|x)\,q(z|\tilde x)\,d\tilde x`. A factor takes no part.

    Args:
        pair: a pair with a proper prior and an encoder with a density; it is not changed.
        num_simulations: number S of codes and data, at least 20.
        num_draws: number L of draws from the encoder for each; 99 make ranks of one per cent.
        statistic: ``statistic(z, x)`` for z (K, N, *z_shape) and x (N, *x_shape) returns one number
            a code, (K, N), or several, (K, N, J), to be ranked, too.
        proposal: an encoder to check in place of the pair's own, given the clean x, such as
            :func:`probae.fit_proposal` makes.
        seed: of all draws; None draws from the global stream.

    Returns:
        CalibrationRanks: ranks of each quantity, and p-values of their uniformity.

    Raises:
        ValueError: a flat prior; a point code, which is no posterior; a proposal that does not fit;
            a count out of range; a statistic that fails, is of another shape or NaN.

    Reference:
        Talts et al., Validating Bayesian inference algorithms with simulation-based calibration,
        2018; Modrák et al., Simulation-based calibration checking for Bayesian computation: the
        choice of test quantities shapes sensitivity, 2023.

    Example:
        >>> import probae
        >>> pair = probae.PPCA(5, 2)  # its encoder is the posterior
        >>> probae.simulation_based_calibration(pair).p_value > 1e-3
        True
        >>> pair.encoder = probae.GaussianEncoder(probae.MLP(5, (2, 2)))  # and this one is not
        >>> probae.simulation_based_calibration(pair).p_value < 1e-3
        True
    """
    encoder, corruption = _guide_of(pair, proposal)
    require_count(num_simulations, "num_simulations", least=20)
    num_draws = require_count(num_draws, "num_draws")
    if statistic is not None and not callable(statistic):
        raise ValueError(
            f"statistic must be a function of z and x, got {type(statistic).__name__}; for "
            "instance lambda z, x: z.square().sum(-1)"
        )

    def quantities(z: Tensor, x: Tensor) -> list[Tensor]:
        log_likelihood = pair.decoder(z).log_prob(x)  # (K, N)
        of_x = [log_likelihood[..., None]]
        if statistic is not None:
            of_x.append(_checked(statistic, z, x))
        return [z.reshape(*z.shape[:2], -1), *of_x]

    columns = []
    with frozen(pair, seed), frozen(encoder, None):
        for z, x, blocks in _simulations(pair, num_simulations, num_draws):
            draw = _sampler(encoder, corruption, x)
            truth = quantities(z[None], x)
            below = [torch.zeros_like(value[0], dtype=torch.long) for value in truth]
            equal = [torch.zeros_like(count) for count in below]
            for block in blocks:
                draws = draw(block)
                same = (draws == z).reshape(block, len(z), -1).all(2)[..., None]  # (K, N, 1)
                for j, values in enumerate(quantities(draws, x)):
                    # equal codes have equal statistics, which may round differently in a batch
                    tied = (values == truth[j]) | (same if j > 0 else False)
                    below[j] += ((values < truth[j]) & ~tied).sum(0)
                    equal[j] += tied.sum(0)
            less, ties = torch.cat(below, 1), torch.cat(equal, 1)  # (N, Q)
            columns.append(less + (torch.rand_like(ties, dtype=torch.float64) * (ties + 1)).long())
    ranks = torch.cat(columns)
    size = math.prod(pair.z_shape)
    return CalibrationRanks(
        ranks[:, :size].reshape(-1, *pair.z_shape),
        ranks[:, size:],
        (*_names("z", pair.z_shape), "log p(x|z)", *_statistic_names(ranks.shape[1] - size - 1)),
        num_draws,
    )


class Coverage(NamedTuple):
    """How often regions of highest density of the encoder hold the code that made the data.

    Example:
        >>> import probae
        >>> coverage = probae.expected_coverage(probae.PPCA(5, 2), 400, levels=[0.5, 0.9])
        >>> bool(((coverage.coverage - coverage.levels).abs() < 4 * coverage.std_error).all())
        True
    """

    levels: Tensor  # (J,) nominal, the mass of the region under the encoder
    coverage: Tensor  # (J,) share of the simulations whose region holds the code
    std_error: Tensor  # (J,) of that share; (k + 1)/(S + 2) stands in for it, so it is never 0
    credibility: Tensor  # (S,) smallest level whose region holds the code; uniform if all is right
    num_draws: int  # L

    @property
    def p_value(self) -> float:
        """Probability of credibilities this uneven, or more, were the encoder right.

        By the chi-square test on at most 20 bins of at least 10 simulations each, on average.
        """
        total = len(self.credibility)
        bins = min(MOST_BINS, total // 10)
        index = (self.credibility * bins).long().clamp(max=bins - 1)
        expected = torch.full_like(self.credibility[:bins], total / bins)
        return float(_chi_square(index.bincount(minlength=bins)[None], expected))

    def __repr__(self) -> str:
        worst = int(((self.coverage - self.levels) / self.std_error).abs().argmax())
        return (
            f"Coverage({float(self.coverage[worst]):.3f} ± {float(self.std_error[worst]):.3f} at "
            f"level {float(self.levels[worst]):g}, the furthest off of {len(self.levels)}; p = "
            f"{self.p_value:.3g}; {len(self.credibility)} simulations, {self.num_draws} draws each)"
        )


def expected_coverage(
    pair: Autoencoder,
    num_simulations: int = 1000,
    num_draws: int = 99,
    levels: Sequence[float] | Tensor | None = None,
    *,
    proposal: nn.Module | None = None,
    seed: int | None = 0,
) -> Coverage:
    r"""Measure how often credible regions of the encoder hold the code that made the data.

    .. math:: c(\alpha) = P\big(z \in R_\alpha(x)\big),\quad (z, x) \sim p(z)\,p(x|z),\quad
              R_\alpha(x) = \{z : q(z|x) > t\} \text{ with mass } \alpha \text{ under } q(z|x)

    Where q(z|x) = p(z|x), coverage is nominal, c(α) = α, at every level. Below it, the encoder is
    too sure of itself (too narrow, or off); above it, too wide. The mass of the region that ends at
    z is the share of L draws that are denser than z, spread uniformly over its step of 1/(L + 1),
    so that the coverage of the posterior is nominal at every level and for every L.

    Nominal coverage is needed, not sufficient: the prior in place of the posterior has it, too.
    :func:`simulation_based_calibration` finds that out. Both speak of data that the model makes.

    Under a corruption z is drawn as in :func:`simulation_based_calibration`, and its density is
    averaged over 64 further draws of x_tilde: the region is then one of nearly highest density, and
    nominal coverage remains what the right guide has.

    Args:
        pair: a pair with a proper prior and an encoder with a density; it is not changed.
        num_simulations: number S of codes and data, at least 20.
        num_draws: number L of draws from the encoder for each.
        levels: nominal levels (J,) in (0, 1); default: 0.05, 0.1, …, 0.95.
        proposal: an encoder to check in place of the pair's own, given the clean x.
        seed: of all draws; None draws from the global stream.

    Returns:
        Coverage: share of the simulations covered at each level, with standard errors.

    Raises:
        ValueError: a flat prior; a point code, which is no posterior; a proposal that does not fit;
            a count out of range; levels that are not in (0, 1).

    Reference:
        Hermans et al., A trust crisis in simulation-based inference? Your posterior approximations
        can be unfaithful, 2022.

    Example:
        >>> import probae
        >>> coverage = probae.expected_coverage(probae.PPCA(5, 2))  # its encoder is the posterior
        >>> len(coverage.levels), coverage.p_value > 1e-3
        (19, True)
    """
    encoder, corruption = _guide_of(pair, proposal)
    require_count(num_simulations, "num_simulations", least=20)
    num_draws = require_count(num_draws, "num_draws")
    nominal = _levels(levels).to(pair.device)
    columns = []
    with frozen(pair, seed), frozen(encoder, None):
        for z, x, blocks in _simulations(pair, num_simulations, num_draws):
            draw, log_density = _sampler(encoder, corruption, x), _density(encoder, corruption, x)
            truth = log_density(z[None])[0]  # (N,)
            above, equal = torch.zeros(2, len(x), dtype=torch.long, device=x.device)
            for block in blocks:
                draws = draw(block)
                values = log_density(draws)
                tied = (values == truth) | (draws == z).reshape(block, len(z), -1).all(2)
                above += ((values > truth) & ~tied).sum(0)
                equal += tied.sum(0)
            within = torch.rand_like(truth, dtype=torch.float64)
            columns.append((above + within * (equal + 1)) / (num_draws + 1))
    credibility = torch.cat(columns)
    covered = (credibility[:, None] < nominal).double()  # (S, J)
    smoothed = (covered.sum(0) + 1) / (len(covered) + 2)
    std_error = (smoothed * (1 - smoothed) / len(covered)).sqrt()
    return Coverage(nominal, covered.mean(0), std_error, credibility, num_draws)


def _guide_of(pair: Autoencoder, proposal: nn.Module | None) -> tuple[nn.Module, Any]:
    """Return the encoder to check, and the corruption it sees x through, or refuse."""
    require_parts(pair)
    if is_flat(prior_of(pair)):
        raise ValueError(
            f"pair is of kind {pair.kind.value}: nothing can be drawn from its flat prior; give it "
            "a proper one, such as prior='normal'"
        )
    x = torch.zeros(2, *pair.x_shape).to(pair.device, pair.dtype)
    if proposal is not None:
        require_density(pair, proposal, x, "proposal")
        return proposal, None
    with frozen(pair, seed=0):
        seen = x if pair.corruption is None else pair.corruption(x).sample()
        point = is_point(pair.encoder(seen))
    if point:
        raise ValueError(
            f"pair is of kind {pair.kind.value}: its encoder gives a point, which is no posterior "
            "and has no spread to check; pass proposal=probae.fit_proposal(pair, x_train)"
        )
    require_density(pair, pair.encoder, seen, "encoder of the pair")
    return pair.encoder, pair.corruption


def _simulations(
    pair: Autoencoder, num_simulations: int, num_draws: int
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yield chunks of codes and data, each with how many draws may be made at once."""
    rows, prior = rows_in_budget(pair), pair.prior()
    for count in counts(num_simulations, max(min(64, rows), rows // num_draws)):
        z = prior.sample(Size((count,)))  # (N, *z_shape)
        x = pair.decoder(z).sample().to(pair.dtype)  # (N, *x_shape)
        yield z, x, list(counts(num_draws, max(1, rows // count)))


def _sampler(encoder: Any, corruption: Any, x: Tensor) -> Callable[[int], Tensor]:
    """Return what draws K codes for each datum, (K, N, *z_shape)."""
    law = encoder(x) if corruption is None else corruption(x)

    def draw(count: int) -> Tensor:
        z: Tensor = law.sample(Size((count,)))
        if corruption is not None:
            z = encoder(z.flatten(0, 1)).sample().unflatten(0, (count, len(x)))
        if not z.isfinite().all():
            raise ValueError("encoder draws codes that are not finite: check its parameters")
        return z

    return draw


def _density(encoder: Any, corruption: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the log-density of codes (K, N, *z_shape) given x, (K, N), up to a constant."""
    views = [x] if corruption is None else corruption(x).sample(Size((VIEWS,))).unbind()
    laws = [encoder(view) for view in views]

    def log_density(z: Tensor) -> Tensor:
        total = laws[0].log_prob(z)
        for law in laws[1:]:
            total = torch.logaddexp(total, law.log_prob(z))
        return torch.where(total.isnan(), -math.inf, total)  # outside the support

    return log_density


def _checked(statistic: Statistic, z: Tensor, x: Tensor) -> Tensor:
    """Return a statistic as (K, N, J), or raise."""
    try:
        values: Any = statistic(z, x)
    except Exception as error:
        raise ValueError(
            f"statistic(z, x) failed for z of shape {tuple(z.shape)} and x of shape "
            f"{tuple(x.shape)} with {type(error).__name__}: {error}"
        ) from error
    shape = ", ".join(map(str, z.shape[:2]))
    fits = isinstance(values, Tensor) and values.shape[:2] == z.shape[:2]
    if not fits or values.is_complex():
        raise ValueError(
            f"statistic(z, x) must return a real tensor of shape ({shape}), one number a code, or "
            f"({shape}, J), for z of shape {tuple(z.shape)}, got "
            f"{tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}"
        )
    if values.isnan().any():
        raise ValueError("statistic(z, x) must not be NaN: its rank would mean nothing")
    return values.reshape(*values.shape[:2], -1)


def _levels(levels: Any) -> Tensor:
    """Return nominal levels, (J,), in double."""
    if levels is None:
        return torch.arange(1, 20, dtype=torch.float64) / 20
    given = listed(levels)
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if not values or not all(0 < as_number(value) < 1 for value in values):
        raise ValueError(
            f"levels must be one or more numbers strictly in (0, 1), got {levels!r}; for instance "
            "[0.5, 0.9, 0.95]"
        )
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _chi_square(observed: Tensor, expected: Tensor) -> Tensor:
    """P-values of Pearson's test of counts (Q, bins) against their means (bins,), (Q,)."""
    statistic = ((observed - expected) ** 2 / expected).sum(1)
    degrees = statistic.new_full((), (len(expected) - 1) / 2)
    return torch.special.gammaincc(degrees, statistic / 2)


def _names(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    if not shape:  # one number
        yield name
        return
    for place in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        yield f"{name}[{', '.join(map(str, place))}]"


def _statistic_names(count: int) -> Iterator[str]:
    return iter(["statistic"]) if count == 1 else _names("statistic", (count,))
