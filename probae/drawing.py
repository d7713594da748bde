"""What the pictures of :mod:`probae.plots` are made on: axes, titles, and sheets of images."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .autoencoder import Autoencoder
from .checks import check_support, require_finite, require_pair
from .datasets import as_tensor

DPI = 150  # of figures that pyplot does not know


def new_figure(width: float, height: float) -> Figure:
    """Return a figure, in inches: pyplot's where that shows it, as in a notebook, else a free one.

    A notebook shows and closes what pyplot knows at the end of each cell. A script that draws a
    hundred pictures would keep a hundred figures there.
    """
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06, compress=True)
    ipython = sys.modules.get("IPython")
    if matplotlib.is_interactive() or (ipython is not None and ipython.get_ipython() is not None):
        from matplotlib import pyplot

        return pyplot.figure(figsize=(width, height), layout=layout)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def one_axes(ax: Any, width: float, height: float) -> Axes:
    """Return ``ax`` if it is an Axes, or the one of a new figure."""
    if ax is None:
        return new_figure(width, height).subplots()
    if not isinstance(ax, Axes) or ax.name != "rectilinear":
        what = f"a {ax.name} one" if isinstance(ax, Axes) else type(ax).__name__
        raise ValueError(
            f"ax must be a plain matplotlib Axes, got {what}; make one with "
            "fig, ax = plt.subplots()"
        )
    return ax


def given_axes(axes: Any, count: int, what: str) -> np.ndarray:
    """Return ``count`` Axes that were given, in one row of an array (count,)."""
    flat = np.empty(0, dtype=object)
    if isinstance(axes, Axes):
        flat = np.array([axes], dtype=object)
    elif isinstance(axes, np.ndarray | Sequence):
        flat = np.array([*np.ravel(np.asarray(axes, dtype=object))], dtype=object)
    plain = all(isinstance(ax, Axes) and ax.name == "rectilinear" for ax in flat)
    if len(flat) != count or not plain:
        got = f"{len(flat)}" if plain and len(flat) else f"{type(axes).__name__}"
        raise ValueError(
            f"axes must hold {count} plain matplotlib Axes, {what}, got {got}; make them with "
            f"fig, axes = plt.subplots(1, {count})"
        )
    return flat


def require_title(title: Any) -> None:
    """Raise a ValueError unless a title is a str, or None, for one that is made."""
    if title is not None and not isinstance(title, str):
        raise ValueError(f"title must be a str or None, got {type(title).__name__}")


def as_limits(limits: Any) -> tuple[float, float]:
    """Return two increasing numbers, or raise a ValueError."""
    try:
        low, high = (float(value) for value in limits)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # what is none, or not two
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"limits must be two increasing numbers, got {limits!r}")
    return low, high


def wrap(ax: Axes, text: str) -> str:
    """Break text to the width of the axes."""
    inches = ax.get_position(original=True).width * ax.figure.bbox.width / ax.figure.dpi
    return textwrap.fill(text, max(20, int(10 * inches)))


def set_title(ax: Axes, title: str) -> None:
    """Set a title that is wrapped to the width of the axes."""
    ax.set_title(wrap(ax, title), parse_math=False, fontsize=11)


def set_figure_title(figure: Any, title: str) -> None:
    """Set a title above all panels, wrapped to the width of the figure."""
    inches = figure.bbox.width / figure.dpi
    text = textwrap.fill(title, max(20, int(9.5 * inches)))
    figure.suptitle(text, fontsize=12, parse_math=False)


def mosaic(
    ax: Any,
    grid: np.ndarray,
    limits: tuple[float, float],
    title: str,
    inches: float,
    margin: float,
    below: float = 0.0,
) -> Axes:
    """Lay images (rows, columns, H, W[, 3]) side by side, with white between them.

    Args:
        ax: where to draw; None: a new figure.
        grid: the images; NaN is white.
        limits: values that are black and white.
        title: above the images.
        inches: width of the images in a new figure.
        margin: inches beside them, for the names of the rows.
        below: inches under them, for the names of the columns.
    """
    rows, columns, height, width = grid.shape[:4]
    low, high = as_limits(limits)
    space, rest = gap(grid), grid.shape[4:]
    scaled = np.clip((grid - low) / (high - low), 0, 1)
    framed = np.ones((rows, columns, height + space, width + space, *rest))
    framed[:, :, :height, :width] = np.where(np.isnan(scaled), 1.0, scaled)
    sheet = framed.swapaxes(1, 2).reshape(rows * (height + space), columns * (width + space), *rest)
    sheet = sheet[:-space, :-space]
    # the margins hold the title and the names of the rows, which do not grow with the images
    wrapped = textwrap.fill(title, max(20, int(7.7 * (inches + margin))))
    tall = inches * sheet.shape[0] / sheet.shape[1] + 0.3 + 0.2 * len(wrapped.splitlines()) + below
    ax = one_axes(ax, inches + margin, tall)
    ax.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    set_title(ax, title)
    return ax


def name_rows(ax: Axes, grid: np.ndarray, names: Sequence[str]) -> None:
    """Write the names of the rows of a mosaic beside them."""
    height = grid.shape[2]
    places = [row * (height + gap(grid)) + (height - 1) / 2 for row in range(len(names))]
    ax.set_yticks(places, names)


def name_columns(ax: Axes, grid: np.ndarray, names: Sequence[str]) -> None:
    """Write the names of the columns of a mosaic under them."""
    width = grid.shape[3]
    places = [column * (width + gap(grid)) + (width - 1) / 2 for column in range(len(names))]
    ax.set_xticks(places, names)


def gap(grid: np.ndarray) -> int:
    """Pixels between images (rows, columns, H, W[, 3])."""
    return max(1, round(grid.shape[2] / 12))


def square(images: np.ndarray) -> np.ndarray:
    """Arrange images (N, H, W[, 3]) in a grid as nearly square as may be, NaN at its end."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = np.full((rows * columns - len(images), *images.shape[1:]), np.nan)
    return np.concatenate([images, blank]).reshape(rows, columns, *images.shape[1:])


def as_images(x: Tensor) -> np.ndarray:
    """Turn (N, 1, H, W) or (N, H, W) into (N, H, W), and (N, 3, H, W) into (N, H, W, 3)."""
    images = x.detach().cpu().double().numpy()
    if images.ndim == 3:
        return images
    return images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)


def is_image(x_shape: tuple[int, ...]) -> bool:
    """Whether data of that shape can be drawn: (1, H, W), (H, W) or (3, H, W)."""
    if not isinstance(x_shape, Sequence) or isinstance(x_shape, str | bytes):
        raise ValueError(f"x_shape must be a tuple of sizes, got {x_shape!r}")
    return len(x_shape) == 2 or (len(x_shape) == 3 and x_shape[0] in (1, 3))


def checked_data(pair: Autoencoder, x: Any) -> Tensor:
    """Return data on the pair's device, checked."""
    require_pair(pair)
    require_finite(pair)
    data = as_tensor(x, "x").detach().to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=False)
    return data


def decoder_mean(distribution: Any) -> Tensor:
    """Return the mean of p(x|z), or refuse a likelihood that has none."""
    mean = distribution.mean
    if mean.isnan().any():
        raise ValueError(
            "pair has a decoder whose mean is undefined, such as CategoricalDecoder; draw "
            "samples(pair, mean=False) instead"
        )
    return mean


def require_images(pair: Any) -> None:
    """Raise a ValueError unless ``pair`` is on data that can be drawn."""
    require_pair(pair)
    if not is_image(pair.x_shape):
        raise ValueError(
            f"pair must be on images of x_shape (1, H, W), (H, W) or (3, H, W), got "
            f"{pair.x_shape}; build it with x_dim=(1, height, width) on data of that shape"
        )
