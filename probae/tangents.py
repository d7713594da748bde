"""Tangent planes of the manifold that a pair has learned, and how many dimensions it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from .autoencoder import Autoencoder, frozen
from .checks import check_support, prior_of, require_finite, require_gradients, require_pair
from .corruptions import encoder_input
from .datasets import as_tensor
from .distributions import base_distribution, is_discrete
from .memory import rows_in_budget
from .part import require_count, require_probability

Map = Callable[[Tensor], Tensor]  # (n, *in_shape) to (n, *out_shape), each datum by itself


class TangentBasis(NamedTuple):
    """Directions in which the data may move, the most important first, at each datum.

    The sign of a direction is arbitrary.

    Example:
        >>> import torch, probae
        >>> tangent = probae.tangent_basis(probae.VAE(8, 3), torch.rand(5, 8), 2)
        >>> tangent.basis.shape, tangent.spectrum.shape
        (torch.Size([5, 8, 2]), torch.Size([5, 3]))
    """

    basis: Tensor  # (N, x_dim, k): orthonormal columns, in the space of x.flatten(1)
    spectrum: Tensor  # (N, r): all singular values, descending; r = min(x_dim, z_dim)


class IntrinsicDimension(NamedTuple):
    """How many directions of a spectrum are tangent, at each datum and over all.

    Example:
        >>> import torch, probae
        >>> estimate = probae.intrinsic_dimension(probae.PPCA(8, 3), torch.randn(5, 8))
        >>> estimate.values.shape, estimate.spectrum.shape
        (torch.Size([5]), torch.Size([3]))
    """

    values: Tensor  # (N,) int64: by the spectrum of each datum
    overall: int  # by the mean spectrum
    spectrum: Tensor  # (r,): mean over the data

    def __repr__(self) -> str:
        shares = torch.bincount(self.values).double() / len(self.values)
        found = ", ".join(
            f"{count} at {100 * float(share):.0f} %"
            for count, share in enumerate(shares)
            if share > 0
        )
        return f"IntrinsicDimension({self.overall} by the mean spectrum; of the data, {found})"


def tangent_basis(
    pair: Autoencoder,
    x: Tensor | Any,
    num_directions: int | None = None,
    *,
    of: str = "reconstruction",
) -> TangentBasis:
    r"""Return the tangent plane at each datum: the directions of largest singular values.

    .. math:: J_r(x) = J_g(f(x))\, J_f(x) = U S V^T

    with f(x) the mean of the encoder, g(z) that of the decoder and r(x) = g(f(x)). The columns of U
    are the directions in which the reconstruction moves, S how far it moves for a unit step of x.
    Along the manifold that the data lie on, a denoising autoencoder copies such steps (singular
    values near 1, λ / (λ + σ²) for data of variance λ under noise of variance σ²), and undoes those
    across it (near 0). Under ``of="encoder"`` it is J_f = U S Vᵀ, and the basis is V, the
    directions of x to which the code is most sensitive: a contractive penalty leaves only those
    that the reconstruction needs.

    Derivatives are those of autograd in evaluation mode; a corruption is not applied. An image of
    shape x_shape is a vector of x_dim entries here: ``basis.mT.unflatten(-1, pair.x_shape)`` are
    images again.

    Args:
        pair: a pair with continuous codes; it is not changed.
        x: data (N, *x_shape): tensor, array, path or Dataset.
        num_directions: k, the number of directions, at most r; default r = min(x_dim, z_dim).
        of: ``"reconstruction"`` or ``"encoder"``.

    Returns:
        TangentBasis: basis (N, x_dim, k) of orthonormal columns, spectrum (N, r) in units of x per
        unit of x, or of z per unit of x under ``of="encoder"``.

    Raises:
        ValueError: bad data, as in :func:`probae.fit`; discrete codes; an encoder or decoder whose
            mean has no closed form, or through which autograd sees no path.

    Reference:
        Rifai et al., The manifold tangent classifier, 2011; Alain & Bengio, What regularized
        auto-encoders learn from the data-generating distribution, 2014.

    Example:
        >>> import torch, probae
        >>> pair = probae.PPCA(5, 2)
        >>> basis, spectrum = probae.tangent_basis(pair, torch.randn(7, 5))
        >>> weight = pair.decoder.network.output.weight  # its columns span the plane
        >>> torch.allclose(basis @ (basis.mT @ weight), weight.expand(7, 5, 2), atol=1e-5)
        True
    """
    data = _checked(pair, x, "tangent_basis", of)
    rank = min(math.prod(pair.x_shape), math.prod(pair.z_shape))
    count = rank if num_directions is None else require_count(num_directions, "num_directions")
    if count > rank:
        raise ValueError(
            f"num_directions must be at most min(x_dim, z_dim) = {rank}, got {count}: the Jacobian "
            "has no more"
        )
    with frozen(pair, seed=0):
        pieces = [_singular(pair, rows, of) for rows in data.split(_rows(pair))]
    basis = torch.cat([directions[..., :count] for directions, _ in pieces])
    return TangentBasis(basis, torch.cat([values for _, values in pieces]))


def intrinsic_dimension(
    pair: Autoencoder,
    x: Tensor | Any,
    *,
    rule: str = "share",
    share: float = 0.5,
    of: str = "reconstruction",
) -> IntrinsicDimension:
    r"""Estimate the number of dimensions of the manifold, from the spectra of tangent planes.

    .. math::
        share:&\quad \#\{i : s_i > share \cdot s_1\}\\
        gap:&\quad \arg\max_d\, (s_d - s_{d+1}),\quad s_{r+1} = 0

    with s the descending singular values of :func:`tangent_basis`. At the default share of one half
    a denoising autoencoder counts the directions along which the data vary more than its noise: the
    smaller the noise, the finer the structure that counts. The estimate is one of the pair, and of
    the data only as far as the pair has learned them: an autoencoder that copies its input has a
    flat spectrum. It is at least 1 and at most min(x_dim, z_dim).

    Args:
        pair: a pair with continuous codes; it is not changed.
        x: data (N, *x_shape): tensor, array, path or Dataset.
        rule: ``"share"`` or ``"gap"``.
        share: of the largest singular value, strictly in (0, 1); for ``"share"``.
        of: whose spectrum, ``"reconstruction"`` or ``"encoder"``.

    Returns:
        IntrinsicDimension: per datum, and over all by the mean spectrum.

    Raises:
        ValueError: as :func:`tangent_basis`; an unknown rule, or a share outside (0, 1).

    Reference:
        Rifai et al., Contractive auto-encoders: explicit invariance during feature extraction,
        2011; Fukunaga & Olsen, An algorithm for finding intrinsic dimensionality of data, 1971.

    Example:
        >>> import torch, probae
        >>> x = torch.randn(500, 1) @ torch.ones(1, 4) + 0.01 * torch.randn(500, 4)  # near a line
        >>> pair = probae.PPCA.maximum_likelihood(x, z_dim=3)
        >>> probae.intrinsic_dimension(pair, x).overall
        1
    """
    if not isinstance(rule, str) or rule not in ("share", "gap"):
        raise ValueError(f"rule must be 'share' or 'gap', got {rule!r}")
    share = require_probability(share, "share")
    data = _checked(pair, x, "intrinsic_dimension", of)
    with frozen(pair, seed=0):
        spectrum = torch.cat([_singular(pair, rows, of)[1] for rows in data.split(_rows(pair))])
    mean = spectrum.mean(0)

    def count(s: Tensor) -> Tensor:  # (..., r) to (...)
        if rule == "share":
            return (s > share * s[..., :1]).sum(-1).clamp(min=1)
        below = torch.cat([s[..., 1:], torch.zeros_like(s[..., :1])], -1)
        return (s - below).argmax(-1) + 1

    return IntrinsicDimension(count(spectrum), int(count(mean)), mean)


def _checked(pair: Any, x: Any, what: str, of: Any) -> Tensor:
    """Return data on the device of a pair whose Jacobian can be taken, or say what is wrong."""
    require_pair(pair)
    require_finite(pair)
    require_gradients(what)
    if pair.dtype not in (torch.float32, torch.float64):  # torch decomposes no others
        raise ValueError(
            f"pair must be of float32 or float64 for {what}, got {pair.dtype}; call pair.float()"
        )
    if not isinstance(of, str) or of not in ("reconstruction", "encoder"):
        raise ValueError(f"of must be 'reconstruction' or 'encoder', got {of!r}")
    data = as_tensor(x, "x").detach().to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=False)
    prior = prior_of(pair)
    if is_discrete(prior):
        raise ValueError(
            f"pair must have continuous codes, got a prior of type "
            f"{type(base_distribution(prior)).__name__}: a code that jumps has no Jacobian; use a "
            "pair such as probae.VAE or probae.DenoisingAutoencoder, or, for bits, "
            "SemanticHashing with posterior='noise'"
        )
    with frozen(pair, seed=0):
        code = _require_path(pair, _encode(pair), data[:1], "encoder", "x")
        if of == "reconstruction":
            _require_path(pair, _decode(pair), code, "decoder", "z")
    return data


def _singular(pair: Autoencoder, x: Tensor, of: str) -> tuple[Tensor, Tensor]:
    """Return the singular directions in the space of x (n, x_dim, r), and all values (n, r)."""
    encode = _encode(pair)
    into = jacobian(encode, x)  # (n, z_dim, x_dim)
    if of == "encoder":
        _, values, directions = torch.linalg.svd(into, full_matrices=False)
        return directions.mT, values
    out = jacobian(_decode(pair), encode(x))  # (n, x_dim, z_dim)
    # the product has no more than r nonzero values: decompose an (r, r) matrix in its place
    left, upper = torch.linalg.qr(out)  # (n, x_dim, r), (n, r, z_dim)
    _, lower = torch.linalg.qr(into.mT)
    inner, values, _ = torch.linalg.svd(upper @ lower.mT)
    return left @ inner, values


def jacobian(function: Map, at: Tensor) -> Tensor:
    """Return the Jacobian at each datum (n, *in_shape), shape (n, out_size, in_size).

    Forward mode or reverse, whichever needs fewer passes. Data go through as one batch, and only
    tangents are mapped over, so that the function may look at the values of the data.
    """
    value = function(at)
    size_in, size_out = at[0].numel(), value[0].numel()
    if size_in <= size_out:
        tangents = _directions(size_in, at)
        moved = vmap(lambda tangent: jvp(function, (at,), (tangent,))[1])(tangents)
        return moved.flatten(2).permute(1, 2, 0)  # from (in, n, out)
    pull = vjp(function, at)[1]
    pulled = vmap(lambda cotangent: pull(cotangent)[0])(_directions(size_out, value))
    return pulled.flatten(2).transpose(0, 1)  # from (out, n, in)


def _directions(size: int, like: Tensor) -> Tensor:
    """Return the unit vectors of one datum, for all data alike, (size, n, *shape)."""
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    return unit.reshape(size, 1, *like.shape[1:]).expand(size, *like.shape)


def _encode(pair: Autoencoder) -> Map:
    return lambda x: _mean(pair.encoder(encoder_input(pair.corruption, x)), "encoder")


def _decode(pair: Autoencoder) -> Map:
    return lambda z: _mean(pair.decoder(z), "decoder")


def _mean(law: Any, name: str) -> Tensor:
    try:
        mean: Tensor = law.mean
    except NotImplementedError as error:
        raise ValueError(
            f"{name} must have a mean in closed form, got {type(base_distribution(law)).__name__}, "
            "which has none to differentiate"
        ) from error
    return mean


def _require_path(pair: Autoencoder, function: Map, at: Tensor, name: str, argument: str) -> Tensor:
    """Return the value at one datum, or refuse a function that autograd cannot see through."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        value = function(at)
        if not value.isfinite().all():
            raise ValueError(
                f"{name} must have a finite mean, got {int((~value.isfinite()).sum())} entries "
                "that are not: classes, for instance, have no mean"
            )
        path = value.requires_grad and torch.autograd.grad(value.sum(), at, allow_unused=True)[0]
    if not isinstance(path, Tensor):
        raise ValueError(
            f"{name} must have a mean that moves with {argument} and that autograd can follow, got "
            f"{type(getattr(pair, name)).__name__}, without a path between them; where codes come "
            "from iterations, put a network in their place: for PredictiveSparseDecomposition, "
            "pair.encoder = pair.predictor"
        )
    return value.detach()


def _rows(pair: Autoencoder) -> int:
    """Return the number of data whose Jacobians are held at once."""
    sizes = math.prod(pair.x_shape), math.prod(pair.z_shape)
    return max(1, rows_in_budget(pair) // min(sizes))
