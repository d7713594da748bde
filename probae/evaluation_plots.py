"""Pictures of how good an encoder and a likelihood are, see :mod:`probae.plots`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from .annealing import Sandwich
from .calibration import CalibrationRanks, Coverage
from .drawing import given_axes, new_figure, one_axes, require_title, set_figure_title, set_title
from .likelihood import LogLikelihood

MOST_PANELS = 9  # of ranks, before they are drawn as lines in one


def calibration_ranks(
    ranks: CalibrationRanks,
    bins: int | None = None,
    *,
    title: str | None = None,
    axes: Any = None,
) -> np.ndarray:
    """Draw the ranks of simulation-based calibration against what uniform ones would be.

    Up to nine quantities have a histogram each, with the band that holds 99 of 100 bins under
    uniform ranks. More are drawn as lines, the distribution function of the ranks less the uniform
    one, with the band that 99 of 100 uniform lines never leave; names are given to those that the
    chi-square test finds uneven (p < 0.01 after Bonferroni's correction).

    Args:
        ranks: what :func:`probae.simulation_based_calibration` returned.
        bins: of the histograms; default: as for the p-values.
        title: above the panels, for instance the names of the model and the data.
        axes: Axes to draw in, one for each quantity, or one where there are more than nine;
            default: those of a new figure.

    Returns:
        array: the Axes of the panels, (Q,), one a quantity, or (1,), one for all.

    Raises:
        ValueError: ``ranks`` is something else, ``bins`` is no count of at most L + 1, or ``axes``
            are not as many as there are panels.

    Reference:
        Talts et al., Validating Bayesian inference algorithms with simulation-based calibration,
        2018; Säilynoja, Bürkner & Vehtari, Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison, 2022.

    Example:
        >>> import probae
        >>> from probae.plots import calibration_ranks
        >>> ranks = probae.simulation_based_calibration(probae.PPCA(5, 2), 200)
        >>> len(calibration_ranks(ranks))
        3
    """
    require_title(title)
    if not isinstance(ranks, CalibrationRanks):
        raise ValueError(
            "ranks must be what probae.simulation_based_calibration returned, got "
            f"{type(ranks).__name__}"
        )
    ranks.expected(bins)  # refuses bad bins
    total = len(ranks.names)
    few = total <= MOST_PANELS
    given = None
    if axes is not None:
        what = "one for each quantity" if few else "one for all quantities"
        given = given_axes(axes, total if few else 1, what)
    if title is None:
        title = (
            f"Ranks of {len(ranks.ranks)} simulated codes among {ranks.num_draws} draws from the "
            f"encoder: p = {ranks.p_value:.2g} for {total} quantities together"
        )
    return _rank_histograms(ranks, bins, title, given) if few else _rank_lines(ranks, title, given)


def coverage(coverage: Coverage, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the coverage of credible regions of the encoder against their nominal level.

    Args:
        coverage: what :func:`probae.expected_coverage` returned.
        title: above the picture, for instance the names of the model and the data.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: coverage with two standard errors on either side, and the diagonal, where it is
        nominal.

    Raises:
        ValueError: ``coverage`` is something else, or ``ax`` is no Axes.

    Reference:
        Hermans et al., A trust crisis in simulation-based inference? Your posterior approximations
        can be unfaithful, 2022.

    Example:
        >>> import probae
        >>> from probae.plots import coverage
        >>> ax = coverage(probae.expected_coverage(probae.PPCA(5, 2), 200))
        >>> ax.get_ylabel()
        'share of simulated codes inside'
    """
    require_title(title)
    if not isinstance(coverage, Coverage):
        raise ValueError(
            "coverage must be what probae.expected_coverage returned, got "
            f"{type(coverage).__name__}"
        )
    order = coverage.levels.argsort()
    levels, share, error = (
        column[order].cpu().numpy()
        for column in (coverage.levels, coverage.coverage, coverage.std_error)
    )
    ax = one_axes(ax, 5.5, 5.8)
    ax.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1, label="nominal")
    ax.fill_between(
        levels,
        share - 2 * error,
        share + 2 * error,
        color="C0",
        alpha=0.3,
        linewidth=0,
        label="± 2 standard errors",
    )
    count = len(coverage.credibility)
    ax.plot(levels, share, color="C0", marker="o", markersize=3, label=f"{count} simulations")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel(
        "nominal level of the region of highest density\n"
        "curve above the diagonal: encoder too wide;\nbelow: too narrow, or off"
    )
    ax.set_ylabel("share of simulated codes inside")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper left")
    if title is None:
        title = f"Coverage of the encoder: p = {coverage.p_value:.2g}"
    set_title(ax, title)
    return ax


def likelihoods(
    entries: Mapping[str, LogLikelihood | Sandwich],
    reference: str | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw mean log-likelihoods with ± 2 standard errors, marked by what each number is.

    Squares are exact. Triangles are lower bounds: the truth lies to their right. A filled one is
    near it by its own diagnostics, as ``unreliable`` names at most one datum in twenty; what these
    are worth, :func:`probae.log_likelihood` says. A :class:`~probae.Sandwich` has two ends.

    Args:
        entries: names and what :func:`probae.log_likelihood` or :func:`probae.bdmc` returned, in
            the order from top to bottom.
        reference: one of the names: draw differences to its values, datum by datum, whose errors
            are far smaller than those of the means. All must then be about the same data, in the
            same order.
        title: above the picture; default: what is shown.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: one line an entry, nats per datum.

    Raises:
        ValueError: no entries, or others; densities beside probabilities, or of data of different
            dimension; an unknown reference, or one on another number of data; ``ax`` is no Axes.

    Example:
        >>> import probae
        >>> from probae.plots import likelihoods
        >>> pair = probae.PPCA(5, 2)
        >>> x = probae.sample(pair, 100, seed=0).x
        >>> methods = ("exact", "iwae", "elbo")
        >>> ax = likelihoods({name: probae.log_likelihood(pair, x, name) for name in methods})
        >>> ax.get_xlabel()
        'log p(x), nats per datum (± 2 standard errors)'
    """
    require_title(title)
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(
            "entries must be a dict of names and log-likelihoods, such as "
            f"{{'VAE': probae.log_likelihood(pair, x)}}, got {type(entries).__name__}"
        )
    for name, entry in entries.items():
        if not isinstance(entry, LogLikelihood | Sandwich):
            raise ValueError(
                f"entries must be what probae.log_likelihood or probae.bdmc returned, got "
                f"{type(entry).__name__} under {name!r}"
            )
    measured = {name: entry for name, entry in entries.items() if isinstance(entry, LogLikelihood)}
    if len({(entry.is_density, entry.dimension) for entry in measured.values()}) > 1:
        what = ", ".join(
            f"{name!r}: {'densities' if entry.is_density else 'probabilities'} in "
            f"{entry.dimension} dimensions"
            for name, entry in measured.items()
        )
        raise ValueError(f"entries must be about the same data to compare, got {what}")
    zero = None
    if reference is not None:
        if not isinstance(reference, str) or reference not in measured:
            raise ValueError(
                f"reference must be a name of a log-likelihood in entries, one of "
                f"{', '.join(map(repr, measured))}, got {reference!r}"
            )
        zero = measured[reference].values.detach().cpu().double()
        if any(len(_ends(entry)[0]) != len(zero) for entry in entries.values()):
            raise ValueError(
                "entries must be about the same data as the reference, got "
                + ", ".join(f"{len(_ends(entry)[0])} under {n!r}" for n, entry in entries.items())
            )
    ax = one_axes(ax, 7.5, 1.6 + 0.42 * len(entries))
    used: dict[str, Line2D] = {}
    for place, entry in enumerate(entries.values()):
        means = []
        for values, (mark, filled, claim) in zip(_ends(entry), _claims(entry), strict=True):
            shown = values if zero is None else values - zero
            mean = float(shown.mean())
            error = float(shown.std() / math.sqrt(len(shown))) if len(shown) > 1 else math.nan
            style: dict[str, Any] = {
                "marker": mark,
                "markersize": 8,
                "color": "C0",
                "markerfacecolor": "C0" if filled else "white",
                "linestyle": "",
            }
            ax.errorbar(mean, place, xerr=2 * error, capsize=4, elinewidth=1.2, **style)
            used.setdefault(claim, Line2D([], [], label=claim, **style))
            means.append((mean, error))
        ax.plot([mean for mean, _ in means], [place] * len(means), color="C0", linewidth=3)
        text = _figures([mean for mean, _ in means], means[-1][1])
        if zero is None or entry is not entries[reference or ""]:
            ax.annotate(
                text,
                (means[-1][0], place),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
    if zero is not None:
        ax.axvline(0, color="0.3", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(entries)), list(entries), parse_math=False)
    ax.set_ylim(len(entries) - 0.5, -0.8)  # the first on top, with room for its figures
    ax.margins(x=0.15)
    ax.grid(alpha=0.3, axis="x")
    what = "log p(x)" if zero is None else f"log p(x) less {reference}, paired"
    ax.set_xlabel(f"{what}, nats per datum (± 2 standard errors)", parse_math=False)
    ax.legend(
        handles=list(used.values()),
        fontsize="small",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.9 / (1.0 + 0.42 * len(entries))),
        ncols=2,
        frameon=False,
    )
    sizes = sorted({len(_ends(entry)[0]) for entry in entries.values()})
    set_title(ax, title or f"Log-likelihood of {' or '.join(map(str, sizes))} data")
    return ax


def _figures(means: list[float], error: float) -> str:
    """Write means to two figures of their standard error."""
    known = 0 < error < math.inf
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6) if known else 2
    text = " to ".join(f"{mean:.{decimals}f}" for mean in means)
    return f"{text} ± {error:.{decimals}f}" if known else text


def _ends(entry: LogLikelihood | Sandwich) -> list[Tensor]:
    """Return the values of each datum, (N,), or the lower and the upper ones."""
    values = [entry.lower, entry.upper] if isinstance(entry, Sandwich) else [entry.values]
    return [value.detach().cpu().double() for value in values]


def _claims(entry: LogLikelihood | Sandwich) -> list[tuple[str, bool, str]]:
    """Return mark, whether it is filled, and what it stands for, of each end."""
    if isinstance(entry, Sandwich):
        return [(">", False, _BOUND), ("<", False, "upper bound")]
    if not entry.is_bound:
        return [("s", True, "exact")]
    doubt = entry.unreliable
    if doubt is None or doubt > 0.05:
        return [(">", False, _BOUND)]
    return [(">", True, "lower bound, near by its own diagnostics")]


_BOUND = "lower bound"


def _rank_histograms(
    ranks: CalibrationRanks, bins: int | None, title: str, given: np.ndarray | None
) -> np.ndarray:
    """One panel a quantity: counts, and the central 99 % of each bin's binomial law."""
    counts, expected = ranks.histogram(bins).cpu().numpy(), ranks.expected(bins).cpu().numpy()
    size, ends = len(expected), ranks.num_draws + 1
    edges = -(-np.arange(size + 1) * ends // size) - 0.5  # a rank is at the middle of its own unit
    low, high = _binomial_band(len(ranks.ranks), expected / len(ranks.ranks))
    columns = min(len(counts), 3)
    rows = math.ceil(len(counts) / columns)
    if given is None:
        figure = new_figure(max(4 * columns, 5), 2.6 * rows + 1.4)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = grid.flat[: len(counts)]
    else:
        panels = given
    for axes, name, row, p in zip(
        panels, ranks.names, counts, ranks.p_values.tolist(), strict=True
    ):
        axes.stairs(row, edges, fill=True, color="0.6", label="simulations")
        axes.stairs(
            high,
            edges,
            baseline=low,
            fill=True,
            color="C0",
            alpha=0.35,
            label="99 % of bins, were ranks uniform",
        )
        axes.stairs(expected, edges, baseline=None, color="C0", linestyle="--", label="expected")
        axes.set_title(f"{name}: p = {p:.2g}", fontsize="medium", parse_math=False)
        axes.set_xlim(edges[0], edges[-1])
    if given is not None:
        for axes in panels:
            axes.set(xlabel=f"rank among {ranks.num_draws} draws", ylabel="simulations in a bin")
        panels[0].legend(fontsize="x-small")
        panels[0].set_title(f"{title}\n{panels[0].get_title()}", fontsize="medium")
        return panels
    for axes in grid.flat[len(counts) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("simulations in a bin")
    for column in range(columns):
        lowest = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        lowest.set_xlabel(f"rank among {ranks.num_draws} draws")
        lowest.tick_params(labelbottom=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    reading = textwrap.fill(_READING, int(11 * figure.get_figwidth()))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        frameon=False,
        title=reading,
        title_fontsize="small",
    )
    set_figure_title(figure, title)
    return panels


_READING = (
    "a coordinate high at both ends: encoder too narrow; in the middle: too wide; at one end: off "
    "to the other side. log p(x|z) high at the right: draws of the encoder fit x worse than the "
    "true code does"
)


def _rank_lines(ranks: CalibrationRanks, title: str, given: np.ndarray | None) -> np.ndarray:
    """One panel for all quantities: distribution functions of the ranks, less the uniform one."""
    total, ends = len(ranks.ranks), ranks.num_draws + 1
    uniform = np.arange(1, ends) / ends
    ticks = np.concatenate([[0], uniform, [1]])  # all lines begin and end at 0
    tables = ranks.histogram(ends).cpu().double().numpy()  # (Q, L + 1)
    lines = tables.cumsum(1)[:, :-1] / total - uniform
    spread = np.sqrt(uniform * (1 - uniform) / total)
    draws = np.random.default_rng(0).multinomial(total, np.full(ends, 1 / ends), size=20_000)
    far = np.abs(draws.cumsum(1)[:, :-1] / total - uniform) / spread
    limit = np.quantile(far.max(1), 1 - 0.01 / len(lines))
    worth = (np.abs(lines) / spread).max(1)  # how far each line goes out, in units of the band's
    band = np.pad(limit * spread, 1)
    lines = np.pad(lines, ((0, 0), (1, 1)))
    axes = one_axes(None if given is None else given[0], 8, 5)
    axes.fill_between(
        ticks, -band, band, color="C0", alpha=0.25, linewidth=0, label="99 % band for all lines"
    )
    worst = [int(q) for q in (-worth).argsort()[:8] if worth[q] > limit]
    rest = [q for q in range(len(lines)) if q not in worst]
    for q in rest:
        label = f"{'the other ' if worst else ''}{len(rest)} quantities" if q == rest[0] else None
        axes.plot(ticks, lines[q], color="0.55", linewidth=0.7, label=label)
    for place, q in enumerate(worst):
        style = ("-", "--", "-.", ":")[place % 4]
        axes.plot(ticks, lines[q], color=f"C{place + 1}", linestyle=style, label=ranks.names[q])
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share of the {ranks.num_draws} draws below the code\n{_SLOPES}")
    axes.set_ylabel("distribution function of the ranks,\nless the uniform one")
    axes.grid(alpha=0.3)
    if given is None:
        axes.figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    else:
        axes.legend(fontsize="x-small")
    set_title(axes, title)
    return np.array([axes], dtype=object)


_SLOPES = "up, then down: encoder too narrow; down, then up: too wide; a bow to one side: off"


def _binomial_band(total: int, shares: np.ndarray, mass: float = 0.99) -> tuple[Any, Any]:
    """Return the ends of the central mass of binomial counts, one for each share."""
    counts = torch.arange(total + 1, dtype=torch.float64)
    law = torch.distributions.Binomial(total, torch.from_numpy(shares)[:, None])
    cumulative = law.log_prob(counts).exp().cumsum(1)  # (bins, total + 1)
    tail = cumulative.new_tensor([(1 - mass) / 2, (1 + mass) / 2]).expand(len(shares), 2)
    low, high = torch.searchsorted(cumulative, tail.contiguous()).unbind(1)
    return low.numpy(), high.clamp(max=total).numpy()
