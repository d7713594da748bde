"""Pictures of codes and of the atoms that they weigh, see :mod:`probae.plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from torch import Size, Tensor
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import one_hot

from .autoencoder import Autoencoder, frozen
from .checks import chunks, prior_of, require_finite
from .corruptions import encoder_input
from .distributions import base_distribution, is_discrete, is_flat, mean_of
from .drawing import (
    as_images,
    checked_data,
    decoder_mean,
    mosaic,
    one_axes,
    require_images,
    require_title,
    set_title,
    square,
)
from .part import require_count

MOST_CLASSES = 20  # of labels, before they are drawn as a scale


def latent_scatter(
    pair: Autoencoder,
    x: Tensor | Any,
    labels: Sequence[Any] | Tensor | np.ndarray | None = None,
    dims: tuple[int, int] = (0, 1),
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw two coordinates of the mean codes of data, each datum marked by its label.

    Under a Gaussian prior with independent coordinates, two ellipses hold 50 and 95 of 100 draws
    from it: an encoder whose codes follow the prior fills them.

    Args:
        pair: the pair; codes are the means of ``pair.encoder(x)``.
        x: data (N, *x_shape).
        labels: N labels. Up to 20 different ones are classes, each with a mark and a colour of its
            own; more, if they are numbers, are drawn on a scale. Default: all marked alike.
        dims: two places in z.
        title: above the picture; default: the name of the pair's class, and what is shown.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: of one point a datum.

    Raises:
        ValueError: bad data; labels of another number, or of more than 20 names; ``dims`` are not
            two different places in z; or ``ax`` is no Axes.

    Example:
        >>> import torch, probae
        >>> from probae.plots import latent_scatter
        >>> latent_scatter(probae.VAE(8, 3), torch.ones(5, 8), "aabbc", dims=(2, 0)).get_xlabel()
        'z[2]'
    """
    require_title(title)
    data = checked_data(pair, x)
    first, second = _two_places(dims, math.prod(pair.z_shape))
    kinds = None if labels is None else _labels(labels, len(data))
    codes = _mean_codes(pair, data)[:, [first, second]].cpu().double().numpy()
    ax = one_axes(ax, 6.4, 5.6)
    size, alpha = (12.0, 0.6) if len(codes) > 1000 else (24.0, 0.8)
    prior = prior_of(pair)
    base = base_distribution(prior)
    if isinstance(base, Normal) and not is_flat(prior):
        loc, scale = (
            value.expand(pair.z_shape).flatten()[[first, second]].tolist()
            for value in (base.loc.detach().cpu(), base.scale.detach().cpu())
        )
        for mass, style in ((0.95, "--"), (0.5, ":")):
            width, height = (2 * math.sqrt(-2 * math.log(1 - mass)) * s for s in scale)
            ring = Ellipse(
                (loc[0], loc[1]), width, height, fill=False, linestyle=style, edgecolor="0.3"
            )
            ring.set_label(f"holds {mass:.0%} of the prior")
            ax.add_patch(ring)
    if kinds is None:
        ax.scatter(codes[:, 0], codes[:, 1], s=size, color="C0", alpha=alpha, linewidths=0)
    elif len(names := np.unique(kinds)) <= MOST_CLASSES:
        # text of the label as its mark, where that is short; legible without colours
        short = all(len(str(name)) == 1 and str(name).isalnum() for name in names)
        shades = colormaps["viridis"](np.linspace(0, 0.85, len(names)))
        for place, (name, shade) in enumerate(zip(names, shades, strict=True)):
            mark = f"${name}$" if short else _MARKS[place % len(_MARKS)]
            some = codes[kinds == name]
            ax.scatter(
                some[:, 0],
                some[:, 1],
                s=1.6 * size,
                marker=mark,
                color=shade,
                alpha=alpha,
                linewidths=0.2 if short else 0,
                label=None if short else str(name),
            )
    else:
        points = ax.scatter(
            codes[:, 0], codes[:, 1], s=size, c=kinds, cmap="viridis", alpha=alpha, linewidths=0
        )
        ax.figure.colorbar(points, ax=ax, label="label")
    if ax.get_legend_handles_labels()[1]:
        below = (0.5, -0.13)
        ax.legend(
            fontsize="small", loc="upper center", bbox_to_anchor=below, ncols=4, frameon=False
        )
    ax.autoscale_view()
    ax.set_aspect("equal")
    ax.set(xlabel=f"z[{first}]", ylabel=f"z[{second}]")
    ax.grid(alpha=0.3)
    set_title(ax, title or f"{type(pair).__name__}: mean codes of {len(data)} data")
    return ax


_MARKS = "os^vDPX*<>phd8H"


def dictionary(
    pair: Autoencoder,
    num: int = 64,
    x: Tensor | Any | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw the atoms of a linear decoder: what each coordinate of z adds to an image.

    .. math:: g(z) = b + \sum_j z_j d_j

    Atoms come in the order of their norms ‖d_j‖, or of how much they add to the data x,
    :math:`\|d_j\| \frac1N \sum_n |f_j(x_n)|`, largest first. Each is drawn in units of its own
    largest entry: grey is zero.

    Args:
        pair: a pair on images, of ``x_shape`` (1, H, W), (H, W) or (3, H, W), whose decoder is
            affine in its mean, or in its logits for a Bernoulli one.
        num: most atoms to show.
        x: data (N, *x_shape) to order the atoms by; default: by norm.
        title: above the picture; default: the name of the pair's class, and what is shown.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: one grid of images, as nearly square as may be.

    Raises:
        ValueError: the data are no images, a decoder that is not affine, ``num`` < 1, bad data, or
            ``ax`` is no Axes.

    Reference:
        Olshausen & Field, Emergence of simple-cell receptive field properties by learning a sparse
        code for natural images, 1996.

    Example:
        >>> import probae
        >>> from probae.plots import dictionary
        >>> ax = dictionary(probae.PPCA((8, 8), 4))
        >>> ax.images[0].get_array().shape  # two by two, and white between them
        (17, 17)
    """
    require_title(title)
    require_images(pair)
    num = require_count(num, "num")
    atoms = _atoms(pair)  # (K, *x_shape)
    weight = atoms.flatten(1).norm(dim=1)
    if x is not None:
        weight = weight * _mean_codes(pair, checked_data(pair, x)).abs().mean(0)
    order = weight.argsort(descending=True, stable=True)[:num]
    shown = atoms[order]
    largest = shown.flatten(1).abs().amax(1).clamp(min=torch.finfo(shown.dtype).tiny)
    grid = square(as_images(shown / largest.reshape(-1, *[1] * len(pair.x_shape))))
    if title is None:
        some = "" if len(order) == len(atoms) else f"{len(order)} of "
        by = "norm" if x is None else "use"
        title = f"{type(pair).__name__}: {some}{len(atoms)} atoms by {by} (grey is 0)"
    inches = min(max(0.6 * grid.shape[1], 3.0), 24.0)
    return mosaic(ax, grid, (-1.0, 1.0), title, inches, margin=0.2)


def code_histogram(
    pair: Autoencoder,
    x: Tensor | Any,
    dims: Sequence[int] | None = None,
    *,
    bins: int = 40,
    seed: int | None = 0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw a histogram of codes of data against the density of their prior.

    .. math:: \frac1N \sum_n q(z_j|x_n) \quad\text{against}\quad p(z_j)

    with one draw from q(z|x) a datum, or the code itself where it is a point, and both averaged
    over the coordinates j. Where the two differ, samples of the prior are codes that the decoder
    has not seen. Codes of exactly 0, as sparse encoders make, have no density: their share is
    named and left out of the histogram, which holds the rest of the mass.

    Args:
        pair: the pair; it is not changed.
        x: data (N, *x_shape).
        dims: places in z; default: all of them together.
        bins: of the histogram.
        seed: of the draws; None draws from torch's global stream.
        title: above the picture; default: the name of the pair's class, and what is shown.
        ax: the Axes to draw in; default: those of a new figure.

    Returns:
        Axes: densities on a logarithmic scale, or shares of each value for discrete codes.

    Raises:
        ValueError: bad data, ``dims`` that are no places in z, ``bins`` < 1, or ``ax`` is no Axes.

    Reference:
        Hoffman & Johnson, ELBO surgery: yet another way to carve up the variational evidence lower
        bound, 2016, on the aggregate of q(z|x) against p(z).

    Example:
        >>> import torch, probae
        >>> from probae.plots import code_histogram
        >>> code_histogram(probae.VAE(8, 2), torch.rand(50, 8).round(), dims=[1]).get_xlabel()
        'z[1]'
    """
    require_title(title)
    data = checked_data(pair, x)
    bins = require_count(bins, "bins")
    size = math.prod(pair.z_shape)
    places = list(range(size)) if dims is None else _places(dims, size)
    prior = prior_of(pair)
    with frozen(pair, seed):
        drawn = [
            pair.encoder(encoder_input(pair.corruption, rows)).sample().flatten(1)[:, places]
            for rows, _ in chunks(data)
        ]
        expected = None
        if not is_flat(prior):
            expected = prior.sample(Size((max(1000, 200_000 // size),))).flatten(1)[:, places]
    codes = torch.cat(drawn).flatten().cpu().double().numpy()
    draws = None if expected is None else expected.flatten().cpu().double().numpy()
    ax = one_axes(ax, 6.4, 4.4)
    if is_discrete(prior):
        assert draws is not None
        _bars(ax, codes, draws)
    else:
        _histogram(ax, codes, draws, _marginal(prior, places), bins)
    ax.set_xlabel(f"z[{places[0]}]" if len(places) == 1 else f"z, {len(places)} coordinates")
    ax.grid(alpha=0.3)
    if title is None:
        against = "; its prior is flat" if draws is None else " against their prior"
        title = f"{type(pair).__name__}: codes of {len(data)} data{against}"
    ax.legend(fontsize="small")
    set_title(ax, title)
    return ax


def _mean_codes(pair: Autoencoder, x: Tensor) -> Tensor:
    """Return the means of q(z|x), (N, K)."""
    with frozen(pair, seed=0):
        means = [
            mean_of(pair.encoder(encoder_input(pair.corruption, rows))).flatten(1)
            for rows, _ in chunks(x)
        ]
    return torch.cat(means)


def _places(dims: Any, size: int) -> list[int]:
    """Return one or more places in a flat code of that size."""
    given = dims
    if hasattr(dims, "tolist") and getattr(dims, "layout", torch.strided) == torch.strided:
        given = dims.tolist() if getattr(dims, "is_meta", False) is not True else None
    chosen = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    whole = [isinstance(d, Integral) and not isinstance(d, bool) for d in chosen]
    if not chosen or not all(whole) or not all(0 <= d < size for d in chosen):
        raise ValueError(
            f"dims must be one or more ints from 0 to {size - 1}, places in z, got {dims!r}"
        )
    return [int(d) for d in chosen]


def _two_places(dims: Any, size: int) -> tuple[int, int]:
    if size < 2:
        raise ValueError(
            "pair must have codes of two dimensions or more to scatter, got one; draw "
            "code_histogram(pair, x)"
        )
    places = _places(dims, size)
    if len(places) != 2 or places[0] == places[1]:
        raise ValueError(f"dims must be two different places in z, got {dims!r}")
    return places[0], places[1]


def _labels(labels: Any, count: int) -> np.ndarray:
    """Return the labels of ``count`` data, as classes or as numbers."""
    if isinstance(labels, Tensor) and (labels.is_meta or labels.layout != torch.strided):
        raise ValueError(
            f"labels must be dense and hold values, got {labels.layout}, {labels.device}"
        )
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    try:
        kinds = np.asarray(list(given) if isinstance(given, str) else given)
    except ValueError as error:
        raise ValueError(f"labels must be {count}, one a datum: {error}") from error
    if kinds.shape != (count,):
        raise ValueError(
            f"labels must be {count}, one a datum, got an array of shape {kinds.shape}"
        )
    if len(np.unique(kinds)) > MOST_CLASSES and kinds.dtype.kind not in "iufb":
        raise ValueError(
            f"labels must be numbers, or at most {MOST_CLASSES} names, got "
            f"{len(np.unique(kinds))} names"
        )
    return kinds


def _atoms(pair: Autoencoder) -> Tensor:
    """Return what each coordinate of z adds to the decoder's mean or logits, (K, *x_shape)."""
    require_finite(pair)
    size = math.prod(pair.z_shape)

    def centre(z: Tensor) -> Tensor:
        law = pair.decoder(z.unflatten(1, pair.z_shape).to(pair.device, pair.dtype))
        base = base_distribution(law)
        if isinstance(base, Bernoulli):
            return base.logits.double()
        return decoder_mean(law).double()

    probe = torch.randn(16, size, generator=torch.Generator().manual_seed(0))
    with frozen(pair, seed=0):
        bias = centre(torch.zeros(1, size))
        units = (one_hot(rows, size).float() for rows in torch.arange(size).split(1024))
        atoms = torch.cat([centre(rows) - bias for rows in units])
        expected = torch.tensordot(probe.to(atoms), atoms, 1) + bias
        off = (centre(probe) - expected).abs().max()
    if not off <= 1e-3 * expected.abs().max().clamp(min=1e-6):
        raise ValueError(
            "pair must have a decoder that is affine in z, whose atoms do not depend on where one "
            f"stands, got {type(pair.decoder).__name__} on a network that bends; build it with "
            "hidden=(), or draw traversals(pair)"
        )
    return atoms


def _marginal(prior: Any, places: list[int]) -> Any:
    """Return the prior's density averaged over places in z, a function, or None where unknown."""
    base = base_distribution(prior)
    factors = getattr(base, "batch_shape", Size()) == prior.event_shape and not base.event_shape
    if is_flat(prior) or not factors or base.support.is_discrete:
        return None

    def density(t: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(t).reshape(-1, *[1] * len(prior.event_shape))
        at = at.to(prior.sample()).expand(-1, *prior.event_shape)
        inside = base.support.check(at)
        safe = torch.where(inside, at, prior.sample())
        values = torch.where(inside, base.log_prob(safe).exp(), 0.0)
        return values.flatten(1)[:, places].mean(1).detach().cpu().double().numpy()

    return density


def _histogram(
    ax: Axes, codes: np.ndarray, draws: np.ndarray | None, density: Any, bins: int
) -> None:
    """Draw densities of codes and prior; mass at exactly 0 is named, not drawn."""
    some = codes[codes != 0]
    ends = [np.quantile(some, [0.0005, 0.9995])] if len(some) else []
    if draws is not None:
        ends.append(np.quantile(draws, [0.005, 0.995]))
    low = min((end[0] for end in ends), default=0.0)
    high = max((end[1] for end in ends), default=0.0)
    if not low < high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    width = edges[1] - edges[0]
    heights = np.histogram(some, edges)[0] / (len(codes) * width)
    ax.stairs(heights, edges, fill=True, color="0.7", label=f"codes{_at_zero(codes)}")
    if density is not None:
        t = np.linspace(low, high, 400)
        ax.plot(t, density(t), color="C0", linewidth=1.5, label="prior")
    elif draws is not None:
        share = np.histogram(draws[draws != 0], edges)[0] / (len(draws) * width)
        ax.stairs(share, edges, color="C0", linewidth=1.5, label=f"prior{_at_zero(draws)}")
    ax.set_yscale("log")
    ax.set_ylabel("density")


def _at_zero(values: np.ndarray) -> str:
    share = float((values == 0).mean())
    return f" ({share:.0%} are exactly 0, not drawn)" if share else ""


def _bars(ax: Axes, codes: np.ndarray, draws: np.ndarray) -> None:
    """Draw the share of each value of discrete codes."""
    values = np.unique(np.concatenate([codes, draws]))
    for what, offset, color, hatch in ((codes, -0.2, "0.7", ""), (draws, 0.2, "C0", "//")):
        shares = [(what == value).mean() for value in values]
        label = "codes" if what is codes else "prior"
        ax.bar(
            np.arange(len(values)) + offset,
            shares,
            0.4,
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
    ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    ax.set_ylabel("share")
