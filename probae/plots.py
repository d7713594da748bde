"""Pictures of a run, a pair and its evaluation, drawn with matplotlib.

Every function takes ``ax`` and returns the Axes that it drew in; those with several panels take and
return ``axes``, an array of them. ``ax.figure`` is the picture: ``ax.figure.savefig("name.png")``.

Without ``ax`` they make a figure of their own. In a notebook, and wherever pyplot is interactive,
that figure is pyplot's and shown as any other. In a script pyplot does not know of it: nothing pops
up and nothing has to be closed. For ``plt.show()`` there, pass axes of ``plt.subplots()``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .autoencoder import Autoencoder, Kind, frozen
from .checks import require_pair
from .code_plots import code_histogram, dictionary, latent_scatter
from .drawing import (
    as_images,
    as_limits,
    checked_data,
    decoder_mean,
    given_axes,
    is_image,
    mosaic,
    name_columns,
    name_rows,
    new_figure,
    one_axes,
    require_images,
    require_title,
    set_title,
    square,
    wrap,
)
from .evaluation_plots import calibration_ranks, coverage, likelihoods
from .latent import traverse
from .part import require_count, require_flag
from .sampling import reconstruct, sample, score
from .tangents import tangent_basis
from .training import Run

__all__ = [
    "calibration_ranks",
    "code_histogram",
    "coverage",
    "dictionary",
    "is_image",
    "latent_scatter",
    "likelihoods",
    "loss_curve",
    "reconstructions",
    "samples",
    "score_field",
    "tangent_planes",
    "traversals",
]

MOST_ROWS = 10  # of a traversal whose dimensions were not given
NEEDED = ("epoch", "loss", "reconstruction", "kl", "active_units", "beta")
POINTS = "0.45"  # grey of data under lines


def loss_curve(
    run_or_history: Run | Mapping[str, Sequence[float]],
    *,
    title: str | None = None,
    axes: Any = None,
) -> np.ndarray:
    """Draw what happened over the epochs: loss, its two terms, and the units in use.

    Args:
        run_or_history: what :func:`probae.fit` returned, or its ``history``, which says nothing of
            the best epoch; that is then not marked.
        title: above the panels, for instance the names of the model and the data.
        axes: three Axes to draw in; default: those of a new figure.

    Returns:
        array: the Axes of three panels, (3,): loss, terms and active units; losses in nats per
        datum.

    Raises:
        ValueError: no epochs, a column of the history is missing, or ``axes`` are not three.

    Example:
        >>> import torch, probae
        >>> from probae.plots import loss_curve
        >>> x = torch.rand(256, 8).round()
        >>> run = probae.fit(probae.VAE(8, 2), x, epochs=3, progress=False)
        >>> losses, terms, units = loss_curve(run)
        >>> losses.get_ylabel()
        'loss (nats per datum)'
    """
    require_title(title)
    run = run_or_history if isinstance(run_or_history, Run) else None
    history = run_or_history.history if isinstance(run_or_history, Run) else run_or_history
    if not isinstance(history, Mapping):
        history = {}
    missing = [name for name in NEEDED if not len(history.get(name, ()))]
    if missing:
        raise ValueError(
            f"run_or_history must have a value per epoch of {', '.join(NEEDED)}, got none of "
            f"{', '.join(missing)}; pass what probae.fit returned, or its history"
        )
    epochs, has_val = history["epoch"], "val_loss" in history
    monitored = "validation" if has_val else "training"
    if axes is None:
        figure = new_figure(12, 4)
        panels = figure.subplots(1, 3)
        if title:
            figure.suptitle(title, parse_math=False)
    else:
        panels = given_axes(axes, 3, "for loss, terms and active units")
    losses, terms, units = panels
    one = {"marker": "o"} if len(epochs) == 1 else {}

    losses.set_title(_loss_name(run, history["beta"][-1]))
    losses.plot(epochs, history["loss"], color="C0", label=f"training{_beta(history)}", **one)
    if has_val:
        losses.plot(
            epochs, history["val_loss"], color="C1", linestyle="--", label="validation", **one
        )
    losses.set_ylabel("loss (nats per datum)")

    bound = run is None or not run.bound_on.startswith("nothing")
    terms.set_title(f"terms of the {'ELBO' if bound else 'loss'}, on {monitored} data")
    distortion = [-value for value in history["reconstruction"]]
    of_x, of_z = _term_labels(run)
    terms.plot(epochs, distortion, color="C2", label=of_x, **one)
    if any(history["kl"]):  # a flat prior has no such term
        terms.plot(epochs, history["kl"], color="C3", linestyle="--", label=of_z, **one)
    terms.set_ylabel("nats per datum")

    units.set_title(f"active units, on {monitored} data")
    units.plot(epochs, history["active_units"], color="C4", drawstyle="steps-mid", **one)
    units.set_ylabel("latent dimensions whose mean varies")
    most = max(*history["active_units"], 1)
    units.set_ylim(-0.05 * most, 1.05 * most)
    units.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))

    for ax in panels:
        ax.set_title(ax.get_title(), fontsize="medium")
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        ax.grid(alpha=0.3)
        if len(epochs) == 1:
            ax.set_xlim(epochs[0] - 1, epochs[0] + 1)
        if run is not None and run.best_epoch >= 1:
            label = f"parameters kept: epoch {run.best_epoch}" if ax is losses else None
            ax.axvline(run.best_epoch, color="0.3", linestyle=":", linewidth=1, label=label)
    for ax in (losses, terms):
        ax.legend(fontsize="small")
    if title and axes is not None:
        losses.set_title(f"{title}\n{losses.get_title()}", fontsize="medium")
    return panels


def reconstructions(
    pair: Autoencoder,
    x: Tensor,
    columns: int = 10,
    *,
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Draw images above their reconstructions, the decoder's mean at the mean code.

    Args:
        pair: a pair on images, of ``x_shape`` (1, H, W), (H, W) or (3, H, W).
        x: images (N, *x_shape), of which the first ``columns`` are shown.
        columns: most images to show.
        title: above the picture; default: the name of the pair's class.
        limits: values of x that are drawn black and white.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: two rows of images.

    Raises:
        ValueError: the data are no images, bad data as in :func:`probae.reconstruct`, ``columns``
            < 1, a decoder without a mean, or ``ax`` is no Axes.

    Example:
        >>> import torch, probae
        >>> from probae.plots import reconstructions
        >>> ax = reconstructions(probae.VAE((1, 8, 8), 2), torch.rand(16, 1, 8, 8))
        >>> len(ax.get_yticklabels())
        2
    """
    require_title(title)
    require_images(pair)
    require_count(columns, "columns")
    shown = pair.check_input(x)[:columns]
    grid = np.stack([as_images(shown), as_images(decoder_mean(reconstruct(pair, shown)))])
    if title is None:
        title = f"{type(pair).__name__}: data and reconstructions"
    inches = max(1.5, 0.9 * len(shown))
    ax = mosaic(ax, grid, limits, title, inches, margin=1.7)
    name_rows(ax, grid, ["data", "reconstruction\n(decoder mean)"])
    return ax


def samples(
    pair: Autoencoder,
    num_samples: int = 64,
    mean: bool = True,
    seed: int | None = 0,
    *,
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    r"""Draw a grid of images from the model: :math:`z \sim p(z)`, then the decoder's mean.

    Args:
        pair: a pair on images, of ``x_shape`` (1, H, W), (H, W) or (3, H, W), with a proper prior.
        num_samples: number of images.
        mean: show the mean of p(x|z); False: draw from p(x|z), noise and all.
        seed: of the draws; None draws from torch's global stream.
        title: above the picture; default: the name of the pair's class, and what is shown.
        limits: values of x that are drawn black and white.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: one grid, as nearly square as may be.

    Raises:
        ValueError: the data are no images, ``num_samples`` < 1, a flat prior, a decoder without a
            mean, or ``ax`` is no Axes.

    Example:
        >>> import probae
        >>> from probae.plots import samples
        >>> ax = samples(probae.VAE((1, 8, 8), 2), num_samples=4)
        >>> ax.images[0].get_array().shape  # two by two, and white between them
        (17, 17)
    """
    require_title(title)
    require_images(pair)
    require_flag(mean, "mean")
    x, z = sample(pair, num_samples, seed=seed)
    if mean:
        with frozen(pair, seed=0):
            x = decoder_mean(pair.decoder(z))
    grid = square(as_images(x))
    if title is None:
        what = "decoder means at" if mean else "draws from the decoder at"
        count = f"{num_samples} samples" if num_samples > 1 else "one sample"
        title = f"{type(pair).__name__}: {what} {count} of the prior"
    inches = min(max(0.75 * grid.shape[1], 3.0), 24.0)
    return mosaic(ax, grid, limits, title, inches, margin=0.2)


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
    ax: Axes | None = None,
) -> Axes:
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
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: decoder means, one row a dimension, one column a value.

    Raises:
        ValueError: the data are no images, a decoder without a mean, arguments that
            :func:`probae.traverse` refuses, or ``ax`` is no Axes.

    Example:
        >>> import probae
        >>> from probae.plots import traversals
        >>> ax = traversals(probae.VAE((1, 8, 8), 3), num_steps=5)
        >>> len(ax.get_yticklabels()), len(ax.get_xticklabels())
        (3, 5)
    """
    require_title(title)
    require_images(pair)
    size = math.prod(pair.z_shape)
    first = dimensions is None and size > MOST_ROWS
    if first:
        dimensions = range(MOST_ROWS)
    walk = traverse(pair, start, dimensions, values, num_steps=num_steps, space=space)
    with frozen(pair, seed=0):
        means = decoder_mean(walk.x)  # (D, S, *x_shape)
    images = as_images(means.flatten(0, 1))
    grid = images.reshape(*walk.values.shape, *images.shape[1:])
    if title is None:
        where = "the mean of the prior" if start is None else "a code"
        where = "the mean code of a datum" if space == "x" and start is not None else where
        rest = f" (the first {MOST_ROWS} of {size} coordinates)" if first else ""
        title = f"{type(pair).__name__}: decoder means, one coordinate varied around {where}{rest}"
    inches = min(max(0.75 * grid.shape[1], 3.0), 24.0)
    ax = mosaic(ax, grid, limits, title, inches, margin=0.6, below=0.75)
    places = range(size) if dimensions is None else dimensions
    name_rows(ax, grid, [f"z[{place}]" for place in places])
    ax.set_xlabel("value of the coordinate")
    shown = walk.values.cpu().double()
    if bool((shown == shown[:1]).all()):
        name_columns(ax, grid, [f"{value:.3g}" for value in shown[0].tolist()])
    else:
        what = "low to high quantiles of its prior" if values is None else "as given for each row"
        ax.set_xlabel(wrap(ax, f"value of the coordinate: {what}"))
    return ax


def score_field(
    pair: Autoencoder,
    x: Tensor | Any | None = None,
    limits: Any = None,
    *,
    num: int = 20,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw the score that a denoising autoencoder has learned in the plane, as arrows.

    .. math:: s(x) = \frac{r(x) - x}{\sigma^2} \approx \nabla \log p_\sigma(x)

    of :func:`probae.score`. Arrows point uphill, their shade is the length of s. They are as long
    as the grid allows where s is long, and shorter in proportion where it is short.

    Args:
        pair: a denoising autoencoder on data (2,), with Gaussian noise and likelihood.
        x: data (N, 2) to draw under the arrows.
        limits: (low, high) of both coordinates, or ((low, high), (low, high)); default: the range
            of x and a tenth more on each side, or (-3, 3) without.
        num: arrows along each coordinate.
        title: above the picture; default: the name of the pair's class, and what is shown.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: ``num`` x ``num`` arrows and a scale of their lengths, nats per unit of x.

    Raises:
        ValueError: data that are no points in the plane, a pair that :func:`probae.score` refuses,
            limits that do not increase, ``num`` < 2, or ``ax`` is no Axes.

    Reference:
        Alain & Bengio, What regularized auto-encoders learn from the data-generating distribution,
        2014, figure 4.

    Example:
        >>> import torch, probae
        >>> from probae.plots import score_field
        >>> ax = score_field(probae.DenoisingAutoencoder(2, 8), torch.randn(50, 2))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('x[0]', 'x[1]')
    """
    require_title(title)
    _require_plane(pair)
    num = require_count(num, "num", least=2)
    data = None if x is None else checked_data(pair, x).cpu().double()
    low, high = _window(data, limits)
    lines = [torch.linspace(a, b, num, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*lines)  # (num², 2)
    slope = score(pair, grid.to(pair.dtype)).cpu().double()
    length = slope.norm(dim=1)
    ax = one_axes(ax, 6.4, 5.6)
    if data is not None:
        ax.scatter(
            data[:, 0].numpy(), data[:, 1].numpy(), s=6, color=POINTS, linewidths=0, alpha=0.5
        )
    reach = min((b - a) / (num - 1) for a, b in zip(low, high, strict=True))
    long = length.quantile(0.8).clamp(min=1e-300)
    arrows = (
        slope
        / length.clamp(min=1e-300)[:, None]
        * (0.9 * reach * (length / long).clamp(max=1))[:, None]
    )
    shown = ax.quiver(
        *grid.T.numpy(),
        *arrows.T.numpy(),
        length.numpy(),
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.0035,
        cmap="viridis_r",
        pivot="mid",
    )
    ax.figure.colorbar(shown, ax=ax, label="length of the score (nats per unit of x)")
    edge = 0.5 * reach
    ax.set_xlim(low[0] - edge, high[0] + edge)
    ax.set_ylim(low[1] - edge, high[1] + edge)
    ax.set_aspect("equal")
    ax.set(xlabel="x[0]", ylabel="x[1]")
    if title is None:
        title = f"{type(pair).__name__}: learned score at {pair.corruption!r}"
    set_title(ax, title)
    return ax


def tangent_planes(
    pair: Autoencoder,
    x: Tensor | Any,
    *,
    num_points: int | None = None,
    num_directions: int = 5,
    of: str = "reconstruction",
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Draw the directions in which reconstructions follow the data.

    They are those of :func:`probae.tangent_basis`.

    Points in the plane get a line along their first direction each. Images stand at the left of a
    row, beside their first directions, each in units of its largest entry: grey is zero, and adding
    a little of such an image, or taking it away, stays on the manifold.

    Args:
        pair: a pair on points (2,), or on images of ``x_shape`` (1, H, W), (H, W) or (3, H, W).
        x: data (N, *x_shape).
        num_points: most data with lines or rows, spread evenly over x; default: 60 lines, 6 rows.
        num_directions: most directions of an image to show.
        of: whose directions, ``"reconstruction"`` or ``"encoder"``; see
            :func:`probae.tangent_basis`.
        title: above the picture; default: the name of the pair's class, and what is shown.
        limits: values of an image that are drawn black and white.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: data and lines, or rows of images.

    Raises:
        ValueError: data that are neither points in the plane nor images, bad data, counts < 1, a
            pair that :func:`probae.tangent_basis` refuses, or ``ax`` is no Axes.

    Reference:
        Rifai et al., The manifold tangent classifier, 2011.

    Example:
        >>> import torch, probae
        >>> from probae.plots import tangent_planes
        >>> pair = probae.ContractiveAutoencoder((1, 8, 8), 5)
        >>> ax = tangent_planes(pair, torch.rand(3, 1, 8, 8), num_directions=2)
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['datum', '1st', '2nd']
    """
    require_title(title)
    require_pair(pair)
    plane = pair.x_shape == (2,)
    if not plane and not is_image(pair.x_shape):
        raise ValueError(
            "pair must be on points of x_shape (2,), or on images (1, H, W), (H, W) or (3, H, W), "
            f"got {pair.x_shape}; for other data look at the numbers of probae.tangent_basis"
        )
    most = (60 if plane else 6) if num_points is None else require_count(num_points, "num_points")
    num_directions = require_count(num_directions, "num_directions")
    data = checked_data(pair, x)
    picked = np.linspace(0, len(data) - 1, min(most, len(data))).round().astype(int).tolist()
    points = data[picked]
    basis = tangent_basis(pair, points, of=of).basis  # (n, D, k)
    if plane:
        return _tangent_lines(pair, data, points, basis[:, :, 0], title, ax)
    low, high = as_limits(limits)
    directions = basis[:, :, :num_directions].mT  # (n, k, D)
    largest = directions.abs().amax(2, keepdim=True).clamp(min=torch.finfo(basis.dtype).tiny)
    shades = low + (high - low) * (0.5 + 0.5 * directions / largest)
    sheet = torch.cat([points.flatten(1)[:, None], shades.to(points)], 1)  # (n, 1 + k, D)
    images = as_images(sheet.reshape(-1, *pair.x_shape))
    grid = images.reshape(*sheet.shape[:2], *images.shape[1:])
    if title is None:
        title = f"{type(pair).__name__}: data and the first directions of their tangent planes"
    inches = min(max(0.9 * grid.shape[1], 3.0), 24.0)
    ax = mosaic(ax, grid, limits, title, inches, margin=0.2, below=0.7)
    name_columns(ax, grid, ["datum", *(_ordinal(k + 1) for k in range(directions.shape[1]))])
    ax.set_xlabel(wrap(ax, f"directions, by singular value of the {of}'s Jacobian"))
    return ax


def _require_plane(pair: Any) -> None:
    require_pair(pair)
    if pair.x_shape != (2,):
        raise ValueError(
            f"pair must be on points in the plane, of x_shape (2,), got {pair.x_shape}; "
            "probae.score(pair, x) returns the score for data of any shape"
        )


def _window(data: Tensor | None, limits: Any) -> tuple[list[float], list[float]]:
    """Return the low and the high ends of both coordinates."""
    if limits is None and data is not None:
        low, high = data.amin(0), data.amax(0)
        room = 0.1 * (high - low).clamp(min=1e-6)
        return (low - room).tolist(), (high + room).tolist()
    try:
        ends = np.broadcast_to(np.asarray((-3, 3) if limits is None else limits, float), (2, 2))
    except (TypeError, ValueError, RuntimeError):
        ends = np.zeros((2, 2))
    if not (np.isfinite(ends).all() and (ends[:, 0] < ends[:, 1]).all()):
        raise ValueError(
            "limits must be two increasing numbers (low, high), or two pairs of them, got "
            f"{limits!r}"
        )
    return ends[:, 0].tolist(), ends[:, 1].tolist()


def _tangent_lines(
    pair: Autoencoder,
    data: Tensor,
    points: Tensor,
    directions: Tensor,
    title: str | None,
    ax: Axes | None,
) -> Axes:
    """Draw points in the plane, and lines through some of them."""
    cloud, at, along = (t.detach().cpu().double().numpy() for t in (data, points, directions))
    ax = one_axes(ax, 5.8, 5.6)
    ax.scatter(cloud[:, 0], cloud[:, 1], s=8, color=POINTS, linewidths=0, alpha=0.6, label="data")
    half = 0.06 * max(float(np.ptp(cloud, axis=0).max()), 1e-6)
    ends = np.stack([at - half * along, at + half * along])  # (2, n, 2)
    lines = ax.plot(ends[:, :, 0], ends[:, :, 1], color="C0", linewidth=1.8)
    lines[0].set_label("tangents")
    ax.set_aspect("equal", adjustable="datalim")
    ax.set(xlabel="x[0]", ylabel="x[1]")
    ax.legend(fontsize="small")
    set_title(ax, title or f"{type(pair).__name__}: tangents at {len(at)} data")
    return ax


def _ordinal(place: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{'th' if 10 <= place % 100 <= 20 else ending}"


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
