"""The fast path to importance weights: Gaussian codes, a perceptron, binary data, no handlers.

It does what :func:`probae.importance.plain_weights` does, for the pairs of most tutorials and
papers, at close to the rate of the matrix products alone. What makes it fast: the encoder runs once
for all samples of a datum; products are written into buffers that are used again; a sigmoid, by far
the cheapest transcendental function of torch on processors, serves for the tanh and for the
Bernoulli log-likelihood; and one logarithm is taken of the product of many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .decoders import BernoulliDecoder
from .encoders import GaussianEncoder
from .graphs import compiled
from .importance import Weigh
from .networks import MLP
from .priors import StandardNormalPrior

FACTORS = 32  # sigmoids in a product whose logarithm is taken
LEAST = 1e-30  # of a product that has all its digits


class Layer(NamedTuple):
    """An affine map and what is applied to its outputs, in place."""

    weight: Tensor  # (in, out)
    bias: Tensor  # (out,)
    activate: Callable[[Tensor], Tensor]


def fast_weights(
    pair: Autoencoder, proposal: nn.Module | None, machine_code: tuple[int, ...] | None = None
) -> Callable[[Tensor], Weigh] | None:
    """Return the function that weighs draws for binary data, or None if it is not for this pair.

    Where ``machine_code`` is (K, N), the log-likelihoods of so many samples for so many data are
    summed by a compiled pass over the logits; other numbers take a few passes.

    Raises:
        CannotCompile: there is no compiler for that.
    """
    encoder = pair.encoder if proposal is None else proposal
    decoder = pair.decoder
    altered = pair.corruption is not None or pair.factor is not None or pair.has_own_programs()
    if (
        (proposal is None and altered)
        or type(pair.prior) is not StandardNormalPrior
        or type(encoder) is not GaussianEncoder
        or not all(
            type(m).__module__.startswith(("probae.", "torch.nn.")) for m in encoder.modules()
        )
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
    log_sigmoids = None
    if machine_code is not None:
        shape = (*machine_code, len(last.bias))
        log_sigmoids = _compiled_sum(shape, pair.dtype, pair.device, torch.get_num_threads())
    buffers: dict[int, Tensor] = {}

    def product(h: Tensor, weight: Tensor) -> Tensor:
        out = buffers.get(id(weight))
        if out is None or len(out) < len(h):
            out = buffers[id(weight)] = h.new_empty(len(h), weight.shape[1])
        return torch.mm(h, weight, out=out[: len(h)])

    def weigh(x: Tensor) -> Weigh:
        sign = (2 * x - 1).flatten(1)  # (N, D): log p(x|z) = sum of log sigmoid(sign * logits)
        signed_bias = sign * last.bias
        q, p = encoder(x).base_dist, pair.prior().base_dist
        log_scales = (q.scale / p.scale).log().sum(1)

        def draw(count: int) -> Tensor:
            eps = torch.randn(count, *q.loc.shape, dtype=x.dtype, device=x.device)
            z = torch.addcmul(q.loc, q.scale, eps)  # (K, N, z_dim)
            standard = (z - p.loc).div_(p.scale)
            log_ratio = eps.square_().sub_(standard.square_()).sum(2).mul_(0.5).add_(log_scales)
            h = z.flatten(0, 1)
            for layer in hidden:
                h = layer.activate(product(h, layer.weight).add_(layer.bias))
            logits = product(h, last.weight).view(count, *sign.shape)
            if log_sigmoids is not None and (count, len(x)) == machine_code:
                return log_sigmoids(logits, sign, signed_bias)[0].add_(log_ratio)
            sigmoids = torch.addcmul(signed_bias, sign, logits, out=logits).sigmoid_()
            total, is_lost = log_of_product_(sigmoids)
            if is_lost is not None:
                logits = torch.addmm(last.bias, h[is_lost.flatten()], last.weight)
                signs = sign.expand(count, *sign.shape)[is_lost]
                total[is_lost] = nn.functional.logsigmoid(logits * signs).sum(-1)
            return total.add_(log_ratio)

        return draw

    return weigh


@cache
def _compiled_sum(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, threads: int
) -> Callable[..., list[Tensor]]:
    """Return :func:`log_sigmoid_sum` of logits (K, N, D) by signs (N, D), plus biases (N, D)."""
    logits = torch.linspace(-9, 9, math.prod(shape), dtype=dtype, device=device).view(shape)
    sign, bias = torch.ones_like(logits[0]), torch.zeros_like(logits[0])
    return compiled(lambda a, s, b: [log_sigmoid_sum(b + s * a)], [logits, sign, bias])


def log_sigmoid_sum(s: Tensor) -> Tensor:
    r"""Return the sum of log-sigmoids over the last dimension, in operations that fuse to one pass.

    .. math:: \sum_d \log \sigma(s_d) = \sum_d \min(s_d, 0) + \log \prod_d \sigma(|s_d|)

    Every factor is in [1/2, 1], so products of up to 64 are far from the smallest float32.
    """
    width = s.shape[-1]
    lanes = 16 * -(-width // (16 * 64))  # as wide as vector registers, or a multiple
    whole = width // lanes * lanes
    products = s[..., :whole].abs().sigmoid().unflatten(-1, (-1, lanes)).prod(-2)
    total = s.clamp(max=0).sum(-1) + products.log().sum(-1)
    return total + s[..., whole:].abs().sigmoid().log().sum(-1) if whole < width else total


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
_KNOWN = ("probae.", "torch.nn.")  # modules of others may hold Pyro sites of their own
_LAYERS = (MLP, nn.Sequential, nn.Linear)
