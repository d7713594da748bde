"""Binary codes for retrieval: bits of a trained pair, packed into bytes, and their distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

from .autoencoder import Autoencoder, frozen
from .checks import check_support, chunks, require_pair
from .corruptions import encoder_input
from .datasets import as_tensor
from .distributions import base_distribution, is_point, mean_of
from .part import require_count

BLOCK = 2**18  # distances of one block; the temporaries of a block fit in cache


def binary_codes(pair: Autoencoder, x: Tensor | Any) -> Tensor:
    r"""Return the bits of each datum's code, :math:`b_i = 1[E_{q(z|x)} z_i > 1/2]`.

    For a :class:`NoisySigmoidEncoder`, a :class:`ThresholdEncoder`, a :class:`BernoulliEncoder` and
    a :class:`ProbitEncoder` this is 1 where the pre-activation is positive.

    Args:
        pair: a pair whose code lies in [0, 1]: bits, a density on [0, 1], or a point code with
            values there (a sigmoid output); a corruption is not applied.
        x: data (N, *x_shape).

    Returns:
        Tensor: (N, z_dim), bool.

    Raises:
        ValueError: codes that do not lie in [0, 1], or bad data, as in :func:`probae.fit`.

    Reference:
        Salakhutdinov & Hinton, Semantic hashing, 2009.

    Example:
        >>> import torch, probae
        >>> pair = probae.Autoencoder(
        ...     prior=probae.BernoulliPrior(3),
        ...     encoder=probae.BernoulliEncoder(probae.MLP(8, 3)),
        ...     decoder=probae.BernoulliDecoder(probae.MLP(3, 8)),
        ... )
        >>> bits = probae.binary_codes(pair, torch.rand(5, 8).round())
        >>> bits.shape, bits.dtype
        (torch.Size([5, 3]), torch.bool)
    """
    require_pair(pair)
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=False)
    codes = []
    with frozen(pair, seed=0):
        for rows, _ in chunks(data):
            encoder = pair.encoder(encoder_input(pair.corruption, rows))
            mean = mean_of(encoder)
            support = base_distribution(encoder).support
            unit = support in (constraints.boolean, constraints.unit_interval)
            if not unit and not (is_point(encoder) and ((mean >= 0) & (mean <= 1)).all()):
                raise ValueError(
                    "pair must have codes in [0, 1], got an encoder with codes in "
                    f"{support}, from {float(mean.min()):g} to {float(mean.max()):g}; use a "
                    "NoisySigmoidEncoder, a BernoulliEncoder, or a network with "
                    "out_activation='sigmoid'"
                )
            codes.append(mean > 0.5)
    return torch.cat(codes)


def pack_codes(bits: Tensor | Any) -> Tensor:
    """Pack bits into bytes, the first bit of eight as the highest of its byte.

    The last byte is filled up with zeros; the bytes are those of :func:`numpy.packbits` along the
    last axis.

    Args:
        bits: (N, z_dim), bool or numbers 0 and 1: a tensor or array.

    Returns:
        Tensor: (N, ceil(z_dim / 8)), uint8.

    Raises:
        ValueError: ``bits`` has another shape, or other values than 0 and 1.

    Example:
        >>> import torch
        >>> pack_codes(torch.tensor([[0, 0, 0, 0, 0, 1, 0, 1, 1]]))
        tensor([[  5, 128]], dtype=torch.uint8)
    """
    bits = _matrix(bits, "bits")
    if bits.is_meta or bits.layout != torch.strided:
        raise ValueError("bits must hold numbers, in a dense tensor; bits.to_dense() makes it one")
    if not ((bits == 0) | (bits == 1)).all():
        raise ValueError(
            "bits must be 0 or 1 (or bool), got other values; threshold codes with "
            "probae.binary_codes(pair, x)"
        )
    octets = pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8)).unflatten(-1, (-1, 8))
    return (octets << _shifts(bits)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor | Any, z_dim: int) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        packed: (N, ceil(z_dim / 8)), uint8.
        z_dim: number of bits of one code.

    Returns:
        Tensor: (N, z_dim), bool.

    Raises:
        ValueError: ``packed`` has another shape or dtype, or bits set beyond ``z_dim``.

    Example:
        >>> import torch
        >>> unpack_codes(torch.tensor([[5, 128]], dtype=torch.uint8), 9).int()
        tensor([[0, 0, 0, 0, 0, 1, 0, 1, 1]], dtype=torch.int32)
    """
    packed, z_dim = _packed(packed, "packed"), require_count(z_dim, "z_dim")
    if packed.shape[1] != -(-z_dim // 8):
        raise ValueError(
            f"packed must have shape (N, {-(-z_dim // 8)}) for codes of z_dim={z_dim} bits, got "
            f"{tuple(packed.shape)}"
        )
    bits = ((packed[..., None] >> _shifts(packed)) & 1).flatten(-2).bool()
    if bits[:, z_dim:].any():
        raise ValueError(
            f"packed has bits set beyond the first z_dim={z_dim}; give the z_dim of the codes that "
            "were packed"
        )
    return bits[:, :z_dim]


def hamming_distance(a: Tensor | Any, b: Tensor | Any) -> Tensor:
    r"""Number of bits in which packed codes differ, :math:`d_{ij} = \sum_l |a_{il} - b_{jl}|`.

    Beside the result it needs memory for one block of distances, whatever the number of codes.

    Args:
        a: packed codes (Na, bytes), uint8, of :func:`pack_codes`.
        b: packed codes (Nb, bytes), on the same device.

    Returns:
        Tensor: (Na, Nb), int32.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> import torch
        >>> a = pack_codes(torch.tensor([[0, 0, 1], [1, 1, 0]]))
        >>> hamming_distance(a, a)
        tensor([[0, 3],
                [3, 0]], dtype=torch.int32)
    """
    a, b = _packed(a, "a"), _packed(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"b must have codes of as many bytes as a, {a.shape[1]}, got {b.shape[1]}; compare "
            "codes of one pair"
        )
    if a.device != b.device:
        raise ValueError(f"b must be on the device of a, {a.device}, got {b.device}")
    distance = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    rows = max(1, BLOCK // max(1, len(b)))
    for codes, block in zip(a.split(rows), distance.split(rows), strict=True):
        for j in range(a.shape[1]):
            block += _count_bits(codes[:, j, None] ^ b[:, j])
    return distance


def _count_bits(byte: Tensor) -> Tensor:
    """Return the number of bits set in each uint8: sums of pairs, of fours, of eight."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)


def _packed(value: Any, argument: str) -> Tensor:
    packed = _matrix(value, argument)
    if packed.dtype != torch.uint8:
        raise ValueError(
            f"{argument} must be codes packed into uint8, got {packed.dtype}; pack bits with "
            "probae.pack_codes(bits)"
        )
    return packed


def _matrix(value: Any, argument: str) -> Tensor:
    try:
        matrix = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{argument} must be a tensor or array of shape (N, columns), got "
            f"{type(value).__name__}"
        ) from error
    if matrix.dim() != 2 or matrix.shape[1] == 0:
        raise ValueError(
            f"{argument} must have shape (N, columns) with at least one column, got "
            f"{tuple(matrix.shape)}"
        )
    return matrix
