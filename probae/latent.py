"""Walks through the code space: one coordinate at a time, and from one code to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Normal

from .autoencoder import Autoencoder, frozen
from .checks import check_support, prior_of, require_finite, require_pair
from .corruptions import encoder_input
from .datasets import as_tensor
from .distributions import base_distribution, is_discrete, is_flat, mean_of
from .part import listed, require_count

CENTRAL = 0.95  # mass of the prior that a traversal goes through
NUM_DRAWS = 10_000  # of the prior, where its quantiles have no closed form


class Walk(NamedTuple):
    """Codes on a way through the code space, and what the decoder makes of them.

    Example:
        >>> import probae
        >>> walk = probae.traverse(probae.VAE(8, 2), num_steps=5)
        >>> walk.z.shape, walk.x.mean.shape
        (torch.Size([2, 5, 2]), torch.Size([2, 5, 8]))
    """

    z: Tensor  # (D, S, *z_shape) of traverse, (T, *z_shape) or (T, N, *z_shape) of interpolate
    x: Distribution  # p(x|z): batch shape that of z, event shape x_shape
    values: Tensor  # (D, S) values of the coordinate, or (T,) shares of the way, 0 to 1


def traverse(
    pair: Autoencoder,
    start: Tensor | Any | None = None,
    dimensions: Sequence[int] | None = None,
    values: Tensor | Sequence[float] | None = None,
    *,
    num_steps: int = 7,
    space: str = "z",
) -> Walk:
    r"""Vary one coordinate of a code at a time, and leave the others as they are.

    .. math:: z^{(d, s)}_i = v_{ds} \text{ where } i = d, \quad z_i \text{ elsewhere}

    By default v goes in equal steps of probability through the central 95 % of the prior of each
    coordinate: by its quantiles, in closed form or of 10 000 draws. A discrete coordinate takes
    all its values instead.

    Args:
        pair: the pair; it is not changed.
        start: one code z, or one datum under ``space="x"``, whose mean code is taken; default:
            the mean of the prior.
        dimensions: D places in z (in z.flatten(), were it no vector); default: all of them.
        values: v, (S,) for all dimensions alike, or (D, S).
        num_steps: number S of quantiles, where ``values`` is not given.
        space: what ``start`` is: ``"z"``, a code (*z_shape) or (1, *z_shape); or ``"x"``, a datum
            (*x_shape) or (1, *x_shape).

    Returns:
        Walk: the codes (D, S, *z_shape), p(x|z) of batch shape (D, S), and v (D, S).

    Raises:
        ValueError: bad data or a code of another shape; dimensions that are not in z; values of
            another shape, or outside the support of the prior; no values under a flat prior.

    Reference:
        Higgins et al., β-VAE: learning basic visual concepts with a constrained variational
        framework, 2017.

    Example:
        >>> import torch, probae
        >>> walk = probae.traverse(probae.VAE(8, 2), dimensions=[1], values=[-1.0, 0.0, 1.0])
        >>> walk.z.tolist()
        [[[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]]
    """
    require_pair(pair)
    require_finite(pair)
    num_steps = require_count(num_steps, "num_steps")
    _require_space(space)
    prior, size = prior_of(pair), math.prod(pair.z_shape)
    with frozen(pair, seed=0):
        if start is None:
            centre = _centre(pair, prior)
        else:
            centre = _codes(pair, prior, start, "start", space)
        if centre.dim() > len(pair.z_shape):
            if len(centre) > 1:
                raise ValueError(
                    f"start must be one {'code' if space == 'z' else 'datum'}, got {len(centre)}; "
                    "walk from one after the other"
                )
            centre = centre[0]
        chosen = _dimensions(dimensions, size)
        if values is None:
            varied = _quantiles(prior, num_steps).to(centre)[chosen]
        else:
            varied = _values(values, len(chosen)).to(centre)  # (D, S)
        z = centre.flatten().repeat(*varied.shape, 1)  # (D, S, K)
        index = torch.tensor(chosen, device=z.device)[:, None, None].expand(*varied.shape, 1)
        z = z.scatter(2, index, varied[..., None]).unflatten(2, pair.z_shape)
        fix = "take others; a code such as a one-hot one has no coordinate that can vary alone"
        _require_support(prior, z, "start with values in its place", fix)
        return Walk(z, pair.decoder(z), varied)


def interpolate(
    pair: Autoencoder,
    start: Tensor | Any,
    end: Tensor | Any,
    num_steps: int = 8,
    *,
    kind: str = "linear",
    space: str = "z",
) -> Walk:
    r"""Go from one code to another in equal steps.

    .. math::
        linear:&\quad z_t = (1 - t)\,z_0 + t\,z_1\\
        spherical:&\quad z_t = \big((1 - t)\,\|z_0\| + t\,\|z_1\|\big)
        \frac{\sin((1 - t)\,\omega)\,u_0 + \sin(t\,\omega)\,u_1}{\sin\omega},\quad
        u = \frac{z}{\|z\|},\quad \cos\omega = u_0 \cdot u_1

    In K dimensions a standard normal prior has its mass near the sphere of radius √K. The straight
    line between two draws passes through it, at a norm of about √(K/2) in the middle, where the
    decoder saw few codes. The great circle of ``"spherical"`` stays out there: its norm goes from
    that of start to that of end in equal steps. (Where the two are equal this is the formula of
    White, 2016.) Under another Gaussian, z is taken about its mean and in units of its scales.

    Args:
        pair: the pair; it is not changed.
        start: one code (*z_shape) or N codes (N, *z_shape); or data, under ``space="x"``, whose
            mean codes are taken.
        end: as many.
        num_steps: number T of codes on the way, both ends among them, at least 2.
        kind: ``"linear"``, or ``"spherical"`` under a Gaussian prior with independent coordinates.
        space: what start and end are: ``"z"``, codes; or ``"x"``, data (*x_shape) or
            (N, *x_shape).

    Returns:
        Walk: the codes (T, *z_shape) or (T, N, *z_shape), p(x|z) of batch shape (T,) or (T, N), and
        t (T,).

    Raises:
        ValueError: bad data or codes of another shape; start and end of different number;
            ``num_steps`` < 2; ``"spherical"`` without a Gaussian prior, from or to its mean, or
            between opposite codes; a way that leaves the support of the prior, such as a line
            between discrete codes.

    Reference:
        White, Sampling generative networks, 2016; Shoemake, Animating rotation with quaternion
        curves, 1985.

    Example:
        >>> import torch, probae
        >>> start, end = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
        >>> walk = probae.interpolate(probae.VAE(8, 2), start, end, 5, kind="spherical")
        >>> torch.allclose(walk.z.norm(dim=-1), torch.tensor(3.0))
        True
    """
    require_pair(pair)
    require_finite(pair)
    num_steps = require_count(num_steps, "num_steps", least=2)
    if not isinstance(kind, str) or kind not in ("linear", "spherical"):
        raise ValueError(f"kind must be 'linear' or 'spherical', got {kind!r}")
    _require_space(space)
    prior = prior_of(pair)
    with frozen(pair, seed=0):
        ends = [
            _codes(pair, prior, given, name, space)
            for given, name in ((start, "start"), (end, "end"))
        ]
        if ends[0].shape != ends[1].shape:
            raise ValueError(
                f"end must be as many as start, got z of shape {tuple(ends[1].shape)} and "
                f"{tuple(ends[0].shape)}"
            )
        t = torch.linspace(0, 1, num_steps, dtype=torch.float64).to(ends[0])
        steps = t.reshape(-1, *[1] * ends[0].dim())
        z = (1 - steps) * ends[0] + steps * ends[1]
        if kind == "spherical":
            loc, scale = _gaussian(pair, prior)
            a, b = ((code - loc) / scale for code in ends)
            z = loc + scale * _great_circle(a, b, t, len(pair.z_shape))
        fix = "change one coordinate at a time, with probae.traverse"
        _require_support(prior, z, "all codes between start and end", fix)
        return Walk(z, pair.decoder(z), t)


def _great_circle(start: Tensor, end: Tensor, t: Tensor, z_ndim: int) -> Tensor:
    """Go along the great circle between codes (..., *z_shape), (T, ..., *z_shape)."""
    a, b = start.flatten(-z_ndim), end.flatten(-z_ndim)  # (..., K)
    norms = [code.norm(dim=-1, keepdim=True) for code in (a, b)]
    for name, norm in zip(("start", "end"), norms, strict=True):
        if (norm == 0).any():
            raise ValueError(
                f"{name} must not be at the mean of the prior, where a code has no direction; use "
                "kind='linear'"
            )
    a, b = a / norms[0], b / norms[1]
    apart, together = (a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True)
    if (together < 1e-3).any():
        raise ValueError(
            "start and end must not lie opposite each other, where no great circle is the "
            "shortest; go by way of a third code, or use kind='linear'"
        )
    angle = 2 * torch.atan2(apart, together)  # exact near 0, as arccos is not
    t = t.reshape(-1, *[1] * a.dim())
    # where the angle is as good as 0, the two sines are as t and 1 - t
    tiny = angle < 1e-4
    from_a = torch.where(tiny, 1 - t, ((1 - t) * angle).sin())
    from_b = torch.where(tiny, t, (t * angle).sin())
    way = from_a * a + from_b * b
    way = way / way.norm(dim=-1, keepdim=True)
    return (((1 - t) * norms[0] + t * norms[1]) * way).unflatten(-1, start.shape[-z_ndim:])


def _gaussian(pair: Autoencoder, prior: Any) -> tuple[Tensor, Tensor]:
    """Return mean and scales of a Gaussian prior, or refuse another."""
    base = base_distribution(prior)
    if not isinstance(base, Normal) or is_flat(prior) or not pair.z_shape:
        raise ValueError(
            "kind='spherical' needs a Gaussian prior with independent coordinates, got "
            f"{'a flat one' if is_flat(prior) else type(base).__name__}: only that has its mass "
            "near a sphere; use kind='linear'"
        )
    return base.loc.expand(pair.z_shape), base.scale.expand(pair.z_shape)


def _codes(pair: Autoencoder, prior: Any, value: Any, argument: str, space: str) -> Tensor:
    """Return codes (*z_shape) or (N, *z_shape), given as such or as data."""
    given = as_tensor(value, argument).detach().to(pair.device, pair.dtype)
    shape = pair.z_shape if space == "z" else pair.x_shape
    if shape not in (tuple(given.shape), tuple(given.shape[1:])):
        other = pair.x_shape if space == "z" else pair.z_shape
        fits = other in (tuple(given.shape), tuple(given.shape[1:]))
        hint = f"; pass space={'x' if space == 'z' else 'z'!r} for the latter" if fits else ""
        raise ValueError(
            f"{argument} must be {'codes' if space == 'z' else 'data'} of shape {shape} or "
            f"(N, {', '.join(map(str, shape))}), got {tuple(given.shape)}"
            + (f", that of {'data' if space == 'z' else 'codes'}{hint}" if fits else "")
        )
    if space == "z":
        _require_support(prior, given, argument, "take other codes")
        return given
    one = tuple(given.shape) == shape
    data = given[None] if one else given
    check_support(pair, data, argument, binarize=False, strict=False)
    codes = mean_of(pair.encoder(encoder_input(pair.corruption, data)))
    fix = "a mean of discrete codes is none; pass codes, with space='z'"
    _require_support(prior, codes, f"mean codes of {argument}", fix)
    return codes[0] if one else codes


def _centre(pair: Autoencoder, prior: Any) -> Tensor:
    """Mean of the prior, (*z_shape)."""
    if is_flat(prior):
        raise ValueError(
            f"start must be given for a pair of kind {pair.kind.value}: its prior is flat and has "
            "no mean; pass a code, or a datum with space='x'"
        )
    mean = mean_of(prior, NUM_DRAWS)
    if not prior.support.check(mean).all():
        raise ValueError(
            f"start must be given where the mean of the prior is no code (support {prior.support})"
            "; for instance probae.sample(pair).z[0]"
        )
    return mean


def _dimensions(dimensions: Any, size: int) -> list[int]:
    """Return places in a flat code of that size."""
    if dimensions is None:
        return list(range(size))
    given = listed(dimensions)
    chosen = list(given) if isinstance(given, Sequence) else []
    whole = [isinstance(d, Integral) and not isinstance(d, bool) for d in chosen]
    if not chosen or not all(whole) or not all(0 <= d < size for d in chosen):
        raise ValueError(
            f"dimensions must be one or more ints from 0 to {size - 1}, places in z, got "
            f"{dimensions!r}"
        )
    return [int(d) for d in chosen]


def _values(values: Any, num_dimensions: int) -> Tensor:
    """Return the values of each dimension, (D, S), in double."""
    try:
        given = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"values must be numbers of shape (S,) or (D, S), got {values!r}"
        ) from error
    if given.is_meta or given.layout != torch.strided:
        raise ValueError(f"values must be dense numbers, got {given.layout} on {given.device}")
    given = given.expand(num_dimensions, -1) if given.dim() == 1 else given
    if given.dim() != 2 or len(given) != num_dimensions or not given.numel():
        raise ValueError(
            f"values must have shape (S,), or (D, S) for the D = {num_dimensions} dimensions, got "
            f"{tuple(given.shape)}"
        )
    if not given.isfinite().all():
        raise ValueError("values must be finite")
    return given


def _quantiles(prior: Any, num_steps: int) -> Tensor:
    """Values of each coordinate through the central mass of the prior, (K, S)."""
    base = base_distribution(prior)
    if is_flat(prior):
        raise ValueError(
            "values must be given where the prior is flat, as it has no quantiles; for instance "
            "torch.linspace(-3, 3, 7)"
        )
    if is_discrete(prior) and not base.event_shape and base.has_enumerate_support:
        states = base.enumerate_support(expand=False).flatten()
        return states.expand(math.prod(prior.event_shape), -1)
    tail = (1 - CENTRAL) / 2
    q = torch.linspace(tail, 1 - tail, num_steps, dtype=torch.float64)
    if num_steps == 1:
        q = torch.full_like(q, 0.5)
    try:
        if base.event_shape:
            raise NotImplementedError
        at: Tensor = base.icdf(q.reshape(-1, *[1] * len(prior.event_shape)).to(_like(prior)))
        at = at.expand(num_steps, *prior.event_shape)
    except NotImplementedError:
        draws = prior.sample(Size((NUM_DRAWS,))).sort(0).values
        at = draws[(q * (NUM_DRAWS - 1)).round().long()]
    return at.flatten(1).T


def _require_space(space: Any) -> None:
    if not isinstance(space, str) or space not in ("z", "x"):
        raise ValueError(f"space must be 'z' (codes) or 'x' (data), got {space!r}")


def _like(prior: Any) -> Tensor:
    """Return a code, for its dtype and device."""
    code: Tensor = prior.sample()
    return code


def _require_support(prior: Any, z: Tensor, argument: str, fix: str) -> None:
    """Raise a ValueError unless all codes lie in the support of the prior."""
    if not prior.support.check(z).all():
        raise ValueError(
            f"{argument} must lie in the support of the prior ({prior.support}), got some outside; "
            f"{fix}"
        )
