"""Pictures of a run and of a pair, as :class:`matplotlib.figure.Figure` objects.

No figure here is known to pyplot: nothing pops up, no backend is chosen, nothing has to be closed.
Show one in a notebook by its name, write it with ``figure.savefig("name.png")``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .autoencoder import Autoencoder, Kind, frozen
from .calibration import CalibrationRanks, Coverage
from .latent import traverse
from .part import require_count
from .sampling import reconstruct, sample
from .training import Run

DPI = 150
MOST_PANELS = 9  # of ranks, before they are drawn as lines in one
MOST_ROWS = 10  # of a traversal whose dimensions were not given
NEEDED = ("epoch", "loss", "reconstruction", "kl", "active_units", "beta")


def loss_curve(
    run_or_history: Run | Mapping[str, Sequence[float]], *, title: str | None = None
) -> Figure:
    """Draw what happened over the epochs: loss, its two terms, and the units in use.

    Args:
        run_or_history: what :func:`probae.fit` returned, or its ``history``, which says nothing of
            the best epoch; that is then not marked.
        title: above the panels, for instance the names of the model and the data.

    Returns:
        Figure: three panels; losses in nats per datum.

    Raises:
        ValueError: no epochs, or a column of the history is missing.

    Example:
        >>> import torch, probae
        >>> from probae.plots import loss_curve
        >>> x = torch.rand(256, 8).round()
        >>> run = probae.fit(probae.VAE(8, 2), x, epochs=3, progress=False)
        >>> len(loss_curve(run).axes)
        3
    """
    run = run_or_history if isinstance(run_or_history, Run) else None
    history = run_or_history.history if isinstance(run_or_history, Run) else run_or_history
    missing = [name for name in NEEDED if not len(history.get(name, ()))]
    if missing:
        raise ValueError(
            f"run_or_history must have a value per epoch of {', '.join(NEEDED)}, got none of "
            f"{', '.join(missing)}; pass what probae.fit returned, or its history"
        )
    epochs, has_val = history["epoch"], "val_loss" in history
    monitored = "validation" if has_val else "training"
    figure = Figure(figsize=(12, 4), dpi=DPI, layout="constrained")
    losses, terms, units = figure.subplots(1, 3)
    one = {"marker": "o"} if len(epochs) == 1 else {}

    losses.set_title(_loss_name(run, history["beta"][-1]))
    losses.plot(epochs, history["loss"], color="C0", label=f"training{_beta(history)}", **one)
    if has_val:
        losses.plot(epochs, history["val_loss"], color="C1", label="validation", **one)
    losses.set_ylabel("loss (nats per datum)")

    bound = run is None or not run.bound_on.startswith("nothing")
    terms.set_title(f"terms of the {'ELBO' if bound else 'loss'}, on {monitored} data")
    distortion = [-value for value in history["reconstruction"]]
    of_x, of_z = _term_labels(run)
    terms.plot(epochs, distortion, color="C2", label=of_x, **one)
    if any(history["kl"]):  # a flat prior has no such term
        terms.plot(epochs, history["kl"], color="C3", label=of_z, **one)
    terms.set_ylabel("nats per datum")

    units.set_title(f"active units, on {monitored} data")
    units.plot(epochs, history["active_units"], color="C4", drawstyle="steps-mid", **one)
    units.set_ylabel("latent dimensions whose mean varies")
    most = max(*history["active_units"], 1)
    units.set_ylim(-0.05 * most, 1.05 * most)
    units.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))

    for axes in (losses, terms, units):
        axes.set_title(axes.get_title(), fontsize="medium")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        if run is not None and run.best_epoch >= 1:
            label = f"parameters kept: epoch {run.best_epoch}" if axes is losses else None
            axes.axvline(run.best_epoch, color="0.3", linestyle="--", linewidth=1, label=label)
    for axes in (losses, terms):
        axes.legend(fontsize="small")
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def reconstructions(
    pair: Autoencoder,
    x: Tensor,
    columns: int = 10,
    *,
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Draw images above their reconstructions, the decoder's mean at the mean code.

    Args:
        pair: a pair on images, of ``x_shape`` (1, H, W), (H, W) or (3, H, W).
        x: images (N, *x_shape), of which the first ``columns`` are shown.
        columns: most images to show.
        title: above the picture; default: the name of the pair's class.
        limits: values of x that are drawn black and white.

    Returns:
        Figure: two rows of images.

    Raises:
        ValueError: the data are no images, bad data as in :func:`probae.reconstruct`, ``columns``
            < 1, or a decoder without a mean.

    Example:
        >>> import torch, probae
        >>> from probae.plots import reconstructions
        >>> figure = reconstructions(probae.VAE((1, 8, 8), 2), torch.rand(16, 1, 8, 8))
        >>> len(figure.axes)
        1
    """
    _require_images(pair)
    require_count(columns, "columns")
    shown = pair.check_input(x)[:columns]
    rows = np.stack([_images(shown), _images(_mean(reconstruct(pair, shown)))])
    if title is None:
        title = f"{type(pair).__name__}: data and reconstructions"
    inches = max(1.0, 0.9 * len(shown))
    figure, axes = _mosaic(rows, limits, title, inches, margin=1.4)
    height, gap = rows.shape[2], _gap(rows)
    axes.set_yticks([(height - 1) / 2, height + gap + (height - 1) / 2])
    axes.set_yticklabels(["data", "reconstruction\n(decoder mean)"])
    return figure


def samples(
    pair: Autoencoder,
    num_samples: int = 64,
    mean: bool = True,
    seed: int | None = 0,
    *,
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    r"""Draw a grid of images from the model: :math:`z \sim p(z)`, then the decoder's mean.

    Args:
        pair: a pair on images, of ``x_shape`` (1, H, W), (H, W) or (3, H, W), with a proper prior.
        num_samples: number of images.
        mean: show the mean of p(x|z); False: draw from p(x|z), noise and all.
        seed: of the draws; None draws from torch's global stream.
        title: above the picture; default: the name of the pair's class, and what is shown.
        limits: values of x that are drawn black and white.

    Returns:
        Figure: one grid, as nearly square as may be.

    Raises:
        ValueError: the data are no images, ``num_samples`` < 1, a flat prior, or a decoder without
            a mean.

    Example:
        >>> import probae
        >>> from probae.plots import samples
        >>> len(samples(probae.VAE((1, 8, 8), 2), num_samples=9).axes)
        1
    """
    _require_images(pair)
    x, z = sample(pair, num_samples, seed=seed)
    if mean:
        with frozen(pair, seed=0):
            x = _mean(pair.decoder(z))
    images = _images(x)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = np.full((rows * columns - len(images), *images.shape[1:]), np.nan)
    grid = np.concatenate([images, blank]).reshape(rows, columns, *images.shape[1:])
    if title is None:
        what = "decoder means at" if mean else "draws from the decoder at"
        count = f"{num_samples} samples" if num_samples > 1 else "one sample"
        title = f"{type(pair).__name__}: {what} {count} of the prior"
    inches = min(max(0.75 * columns, 3.0), 24.0)
    figure, axes = _mosaic(grid, limits, title, inches, margin=0.2)
    axes.set_yticks([])
    return figure


def traversals(
    pair: Autoencoder,
    start: Tensor | Any | None = None,
    dimensions: Sequence[int] | None = None,
    values: Tensor | Sequence[float] | None = None,
    *,
    num_steps: int = 7,
    space: str = "z",
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Draw what the decoder makes of a code one of whose coordinates varies, a row for each.

    Args:
        pair: a pair on images, of ``x_shape`` (1, H, W), (H, W) or (3, H, W).
        start: code, or datum under ``space="x"``; see :func:`probae.traverse`.
        dimensions: places in z; default: all of them, or the first ten of more.
        values: of the coordinate; default: quantiles of its prior.
        num_steps: number of quantiles.
        space: what ``start`` is, ``"z"`` or ``"x"``.
        title: above the picture; default: the name of the pair's class, and what is shown.
        limits: values of x that are drawn black and white.

    Returns:
        Figure: decoder means, one row a dimension, one column a value.

    Raises:
        ValueError: the data are no images, a decoder without a mean, or arguments that
            :func:`probae.traverse` refuses.

    Example:
        >>> import probae
        >>> from probae.plots import traversals
        >>> len(traversals(probae.VAE((1, 8, 8), 3), num_steps=5).axes)
        1
    """
    _require_images(pair)
    size = math.prod(pair.z_shape)
    first = dimensions is None and size > MOST_ROWS
    if first:
        dimensions = range(MOST_ROWS)
    walk = traverse(pair, start, dimensions, values, num_steps=num_steps, space=space)
    with frozen(pair, seed=0):
        means = _mean(walk.x)  # (D, S, *x_shape)
    images = _images(means.flatten(0, 1))
    grid = images.reshape(*walk.values.shape, *images.shape[1:])
    if title is None:
        where = "the mean of the prior" if start is None else "a code"
        where = "the mean code of a datum" if space == "x" and start is not None else where
        rest = f" (the first {MOST_ROWS} of {size} coordinates)" if first else ""
        title = f"{type(pair).__name__}: decoder means, one coordinate varied around {where}{rest}"
    inches = min(max(0.75 * grid.shape[1], 3.0), 24.0)
    figure, axes = _mosaic(grid, limits, title, inches, margin=0.6)
    figure.set_figheight(figure.get_figheight() + 0.75)  # names of the columns, and their title
    height, width, gap = grid.shape[2], grid.shape[3], _gap(grid)
    places = range(size) if dimensions is None else dimensions
    axes.set_yticks([d * (height + gap) + (height - 1) / 2 for d in range(len(grid))])
    axes.set_yticklabels([f"z[{place}]" for place in places])
    axes.set_xlabel("value of the coordinate")
    shown = walk.values.cpu().double()
    if bool((shown == shown[:1]).all()):
        axes.set_xticks([s * (width + gap) + (width - 1) / 2 for s in range(grid.shape[1])])
        axes.set_xticklabels([f"{value:.3g}" for value in shown[0].tolist()])
    else:
        what = "low to high quantiles of its prior" if values is None else "as given for each row"
        axes.set_xlabel(f"value of the coordinate: {what}")
    return figure


def calibration_ranks(
    ranks: CalibrationRanks, bins: int | None = None, *, title: str | None = None
) -> Figure:
    """Draw the ranks of simulation-based calibration against what uniform ones would be.

    Up to nine quantities have a histogram each, with the band that holds 99 of 100 bins under
    uniform ranks. More are drawn as lines, the distribution function of the ranks less the uniform
    one, with the band that 99 of 100 uniform lines never leave; names are given to those that the
    chi-square test finds uneven (p < 0.01 after Bonferroni's correction).

    Args:
        ranks: what :func:`probae.simulation_based_calibration` returned.
        bins: of the histograms; default: as for the p-values.
        title: above the panels, for instance the names of the model and the data.

    Returns:
        Figure: one panel a quantity, or one for all.

    Raises:
        ValueError: ``ranks`` is something else, or ``bins`` is no count of at most L + 1.

    Reference:
        Talts et al., Validating Bayesian inference algorithms with simulation-based calibration,
        2018; Säilynoja, Bürkner & Vehtari, Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison, 2022.

    Example:
        >>> import probae
        >>> from probae.plots import calibration_ranks
        >>> ranks = probae.simulation_based_calibration(probae.PPCA(5, 2), 200)
        >>> len(calibration_ranks(ranks).axes)
        3
    """
    if not isinstance(ranks, CalibrationRanks):
        raise ValueError(
            "ranks must be what probae.simulation_based_calibration returned, got "
            f"{type(ranks).__name__}"
        )
    ranks.expected(bins)  # refuses bad bins
    total = len(ranks.names)
    if title is None:
        title = (
            f"Ranks of {len(ranks.ranks)} simulated codes among {ranks.num_draws} draws from the "
            f"encoder: p = {ranks.p_value:.2g} for {total} quantities together"
        )
    if total <= MOST_PANELS:
        return _rank_histograms(ranks, bins, title)
    return _rank_lines(ranks, title)


def coverage(coverage: Coverage, *, title: str | None = None) -> Figure:
    """Draw the coverage of credible regions of the encoder against their nominal level.

    Args:
        coverage: what :func:`probae.expected_coverage` returned.
        title: above the picture, for instance the names of the model and the data.

    Returns:
        Figure: coverage with two standard errors on either side, and the diagonal, where it is
        nominal.

    Raises:
        ValueError: ``coverage`` is something else.

    Reference:
        Hermans et al., A trust crisis in simulation-based inference? Your posterior approximations
        can be unfaithful, 2022.

    Example:
        >>> import probae
        >>> from probae.plots import coverage
        >>> len(coverage(probae.expected_coverage(probae.PPCA(5, 2), 200)).axes)
        1
    """
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
    figure = Figure(figsize=(5.5, 5.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1, label="nominal")
    axes.fill_between(
        levels,
        share - 2 * error,
        share + 2 * error,
        color="C0",
        alpha=0.3,
        linewidth=0,
        label="± 2 standard errors",
    )
    count = len(coverage.credibility)
    axes.plot(levels, share, color="C0", marker="o", markersize=3, label=f"{count} simulations")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel(
        "nominal level of the region of highest density\n"
        "curve above the diagonal: encoder too wide; below: too narrow, or off"
    )
    axes.set_ylabel("share of simulated codes inside")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")
    if title is None:
        title = f"Coverage of the encoder: p = {coverage.p_value:.2g}"
    _set_title(figure, title)
    return figure


def _rank_histograms(ranks: CalibrationRanks, bins: int | None, title: str) -> Figure:
    """One panel a quantity: counts, and the central 99 % of each bin's binomial law."""
    counts, expected = ranks.histogram(bins).cpu().numpy(), ranks.expected(bins).cpu().numpy()
    size, ends = len(expected), ranks.num_draws + 1
    edges = -(-np.arange(size + 1) * ends // size) - 0.5  # a rank is at the middle of its own unit
    low, high = _binomial_band(len(ranks.ranks), expected / len(ranks.ranks))
    columns = min(len(counts), 3)
    rows = math.ceil(len(counts) / columns)
    figure = Figure(figsize=(max(4 * columns, 5), 2.6 * rows + 1.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name, row, p in zip(
        grid.flat, ranks.names, counts, ranks.p_values.tolist(), strict=False
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
    _set_title(figure, title)
    return figure


_READING = (
    "a coordinate high at both ends: encoder too narrow; in the middle: too wide; at one end: off "
    "to the other side. log p(x|z) high at the right: draws of the encoder fit x worse than the "
    "true code does"
)


def _rank_lines(ranks: CalibrationRanks, title: str) -> Figure:
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
    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
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
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    _set_title(figure, title)
    return figure


_SLOPES = "up, then down: encoder too narrow; down, then up: too wide; a bow to one side: off"


def _binomial_band(total: int, shares: np.ndarray, mass: float = 0.99) -> tuple[Any, Any]:
    """Return the ends of the central mass of binomial counts, one for each share."""
    counts = torch.arange(total + 1, dtype=torch.float64)
    law = torch.distributions.Binomial(total, torch.from_numpy(shares)[:, None])
    cumulative = law.log_prob(counts).exp().cumsum(1)  # (bins, total + 1)
    tail = cumulative.new_tensor([(1 - mass) / 2, (1 + mass) / 2]).expand(len(shares), 2)
    low, high = torch.searchsorted(cumulative, tail.contiguous()).unbind(1)
    return low.numpy(), high.clamp(max=total).numpy()


def _set_title(figure: Figure, title: str) -> None:
    """Set a title that is wrapped to the width of the figure."""
    text = textwrap.fill(title, max(20, int(9.5 * figure.get_figwidth())))
    figure.suptitle(text, fontsize=12, parse_math=False)


def _mosaic(
    grid: np.ndarray, limits: tuple[float, float], title: str, inches: float, margin: float
) -> tuple[Figure, Axes]:
    """Lay images (rows, columns, H, W[, 3]) side by side, with white between them."""
    rows, columns, height, width = grid.shape[:4]
    low, high = limits
    if not low < high:
        raise ValueError(f"limits must be two increasing numbers, got {limits!r}")
    gap, rest = _gap(grid), grid.shape[4:]
    scaled = np.clip((grid - low) / (high - low), 0, 1)
    framed = np.ones((rows, columns, height + gap, width + gap, *rest))
    framed[:, :, :height, :width] = np.where(np.isnan(scaled), 1.0, scaled)
    sheet = framed.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), *rest)
    sheet = sheet[:-gap, :-gap]
    # the margins hold the title and the names of the rows, which do not grow with the images
    title = textwrap.fill(title, max(20, int(9.5 * (inches + margin))))
    height_inches = inches * sheet.shape[0] / sheet.shape[1] + 0.3 + 0.2 * len(title.splitlines())
    size = (inches + margin, height_inches)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure, axes


def _gap(grid: np.ndarray) -> int:
    """Pixels between images (rows, columns, H, W[, 3])."""
    return max(1, round(grid.shape[2] / 12))


def _images(x: Tensor) -> np.ndarray:
    """Turn (N, 1, H, W) or (N, H, W) into (N, H, W), and (N, 3, H, W) into (N, H, W, 3)."""
    images = x.detach().cpu().double().numpy()
    if images.ndim == 3:
        return images
    return images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)


def is_image(x_shape: tuple[int, ...]) -> bool:
    """Whether data of that shape can be drawn: (1, H, W), (H, W) or (3, H, W)."""
    return len(x_shape) == 2 or (len(x_shape) == 3 and x_shape[0] in (1, 3))


def _require_images(pair: Autoencoder) -> None:
    if not is_image(pair.x_shape):
        raise ValueError(
            f"pair must be on images of x_shape (1, H, W), (H, W) or (3, H, W), got "
            f"{pair.x_shape}; build it with x_dim=(1, height, width) on data of that shape"
        )


def _mean(distribution: Any) -> Tensor:
    mean = distribution.mean
    if mean.isnan().any():
        raise ValueError(
            "pair has a decoder whose mean is undefined, such as CategoricalDecoder; draw "
            "samples(pair, mean=False) instead"
        )
    return mean


def _beta(history: Mapping[str, Sequence[float]]) -> str:
    """Say at which weights of the KL the training loss was taken, where they differ."""
    beta = history["beta"]
    return f", KL weight {beta[0]:.2g} to {beta[-1]:.2g}" if len(set(beta)) > 1 else ""


def _loss_name(run: Run | None, beta: float) -> str:
    if run is None:
        return "loss"
    if run.bound_on.startswith("nothing"):
        return f"loss, which bounds nothing ({run.kind.value})"
    return f"loss: the negative {run.objective}" + ("" if beta == 1 else f", KL weight {beta:g}")


def _term_labels(run: Run | None) -> tuple[str, str]:
    point = (Kind.MAP_JOINT, Kind.DISCRETE_POINT, Kind.RECONSTRUCTION, Kind.CONDITIONAL)
    if run is not None and run.kind in point:
        return "$-$log p(x|z)", "$-$log p(z)"
    return "distortion, $-E_q$ log p(x|z)", "rate, KL(q(z|x) ‖ p(z))"
