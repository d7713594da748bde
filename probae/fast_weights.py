"""The fast path to importance weights: binary data, a perceptron, and no Pyro handlers.

It does what :func:`probae.importance.plain_weights` does, for the pairs of most tutorials and
papers, at close to the rate of the matrix products alone. What makes it fast: the encoder runs once
for all samples of a datum, products are written into buffers that are used again, a sigmoid, by far
the cheapest transcendental function of torch on processors, serves for the tanh and for the
Bernoulli log-likelihood, and a logarithm is taken of products of many.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Independent

from .autoencoder import Autoencoder
from .decoders import BernoulliDecoder
from .importance import Weigh
from .networks import MLP
from .part import Part

FACTORS = 32  # sigmoids in a product whose logarithm is taken
LEAST = 1e-30  # of a product that has all its digits


class Layer(NamedTuple):
    """An affine map and what is applied to its outputs, in place."""

    weight: Tensor  # (in, out)
    bias: Tensor  # (out,)
    activate: Callable[[Tensor], Tensor]


def fast_weights(pair: Autoencoder, proposal: nn.Module | None) -> Callable[[Tensor], Weigh] | None:
    """Return the function that weighs draws for binary data, or None if it is not for this pair."""
    encoder = pair.encoder if proposal is None else proposal
    decoder = pair.decoder
    altered = pair.corruption is not None or pair.factor is not None or pair.has_own_programs()
    if (
        (proposal is None and altered)
        or not _is_ours(pair.prior, encoder)
        or type(decoder) is not BernoulliDecoder
        or type(decoder.network) is not MLP
        or decoder.network.out_activation is not None
        or not all(type(m) in _IN_PLACE or type(m) in _LAYERS for m in decoder.network.modules())
        or any(m._forward_hooks or m._forward_pre_hooks for m in pair.modules())
        or any(isinstance(m, nn.Linear) and m.bias is None for m in decoder.modules())
        or torch.is_autocast_enabled(pair.device.type)
        or pair.dtype not in (torch.float32, torch.float64)
    ):
        return None
    *hidden, last = _layers(decoder.network)
    buffers: dict[int, Tensor] = {}

    def product(h: Tensor, weight: Tensor) -> Tensor:
        out = buffers.get(id(weight))
        if out is None or len(out) < len(h):
            out = buffers[id(weight)] = h.new_empty(len(h), weight.shape[1])
        return torch.mm(h, weight, out=out[: len(h)])

    def weigh(x: Tensor) -> Weigh:
        sign = (2 * x - 1).flatten(1)  # (N, D): log p(x|z) = sum of log sigmoid(sign * logits)
        signed_bias = sign * last.bias
        codes, prior = encoder(x), pair.prior()
        draw_codes = _normal_codes if _are_normal(codes, prior) else _codes

        def draw(count: int) -> Tensor:
            z, log_ratio = draw_codes(codes, prior, count)  # (K, N, …), (K, N)
            h = z.reshape(count * len(x), -1)
            for layer in hidden:
                h = layer.activate(product(h, layer.weight).add_(layer.bias))
            logits = product(h, last.weight).view(count, *sign.shape)
            sigmoids = torch.addcmul(signed_bias, sign, logits, out=logits).sigmoid_()
            total, is_lost = log_of_product_(sigmoids)
            if is_lost is not None:
                logits = torch.addmm(last.bias, h[is_lost.flatten()], last.weight)
                signs = sign.expand(count, *sign.shape)[is_lost]
                total[is_lost] = nn.functional.logsigmoid(logits * signs).sum(-1)
            return total.add_(log_ratio)

        return draw

    return weigh


def _codes(codes: Any, prior: Any, count: int) -> tuple[Tensor, Tensor]:
    """Draw codes, and return log p(z) - log q(z|x), too."""
    shape = Size((count,))
    z = codes.rsample(shape) if codes.has_rsample else codes.sample(shape)
    return z, prior.log_prob(z) - codes.log_prob(z)


def _normal_codes(codes: Any, prior: Any, count: int) -> tuple[Tensor, Tensor]:
    r"""Do the same for Normals, from the noise ε: ½ Σ (ε² - ((z - m)/τ)²) + Σ log σ/τ."""
    q, p = codes.base_dist, prior.base_dist
    noise = torch.randn(count, *q.loc.shape, dtype=q.loc.dtype, device=q.loc.device)
    z = torch.addcmul(q.loc, q.scale, noise)
    standard = (z - p.loc).div_(p.scale)
    log_ratio = noise.square_().sub_(standard.square_()).flatten(2).sum(2).mul_(0.5)
    return z, log_ratio.add_((q.scale / p.scale).log().flatten(1).sum(1))


def _are_normal(codes: Any, prior: Any) -> bool:
    """Whether both are independent Normals, of as many dimensions."""
    return all(
        isinstance(d, Independent)
        and type(d.base_dist) is dist.Normal
        and d.reinterpreted_batch_ndims == len(prior.event_shape)
        for d in (codes, prior)
    )


def log_of_product_(factors: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""Return the log of the product over the last dimension, and where it is not to be trusted.

    .. math:: \sum_d \log \sigma_d = \sum_b \log \prod_{d \in b} \sigma_d

    for factors in [0, 1], which are overwritten. Products of up to 32 of them are taken before a
    logarithm is; where one of these is below 1e-30, digits may be lost.
    """
    width, length = factors.shape[-1], 1
    while length < FACTORS and width > 1:
        half = width // 2
        factors[..., :half].mul_(factors[..., width - half : width])
        width, length = width - half, 2 * length
    products = factors[..., :width]
    is_lost = (products < LEAST).any(-1) if products.min() < LEAST else None
    return products.log_().sum(-1), is_lost


def _layers(network: MLP) -> list[Layer]:
    r"""Return the layers of a perceptron, with sigmoids for its tanhs.

    .. math:: W \tanh(a) + b = 2 W \sigma(2 a) + (b - W 1)
    """
    layers, scale = [], 1
    for linear, after in pairwise([*network.layers, nn.Identity()]):
        if not isinstance(linear, nn.Linear):
            continue
        weight, bias = scale * linear.weight, linear.bias - (scale - 1) * linear.weight.sum(1)
        scale = 2 if isinstance(after, nn.Tanh) else 1
        activate = _IN_PLACE.get(type(after), lambda h: h)
        layers.append(Layer((scale * weight).T.contiguous(), scale * bias, activate))
    return layers


_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: Tensor.sigmoid_,  # of twice its argument
    nn.Sigmoid: Tensor.sigmoid_,
    nn.ReLU: Tensor.relu_,
}
_LAYERS = (MLP, nn.Sequential, nn.Linear)


def _is_ours(*parts: nn.Module) -> bool:
    """Whether every module is of this library or torch: others may hold Pyro sites of their own."""
    return all(
        type(m).__module__.startswith(("probae.", "torch.nn.")) and isinstance(part, Part)
        for part in parts
        for m in part.modules()
    )
