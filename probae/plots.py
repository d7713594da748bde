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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .autoencoder import Autoencoder, Kind, frozen
from .part import require_count
from .sampling import reconstruct, sample
from .training import Run

DPI = 150
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
