"""The fast path to importance weights: Gaussian codes, a perceptron, binary data, no handlers.

It does what :func:`probae.importance.plain_weights` does (in float32 on a processor by other noise
of the same law), for the pairs of most tutorials and papers, at close to the rate of the matrix
products alone. What makes it fast: the encoder runs once for all samples of a datum; products are
written into buffers that are used again; a sigmoid, by far the cheapest transcendental function of
torch on processors, serves for the tanh and for the Bernoulli log-likelihood; and one logarithm is
taken of the product of many. Machine code takes fewer passes yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder, seeded
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

    Where ``machine_code`` is (K, N), so many samples for so many data are weighed by a compiled
    function; other numbers take more passes.

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
        or not all(type(m).__module__.startswith(_KNOWN) for m in encoder.modules())
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
    layers = _layers(decoder.network)
    *hidden, last = layers
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    run = None
    if machine_code is not None:
        run = _compiled_log_weights(
            machine_code,
            tuple(layer.weight.shape for layer in layers),
            tuple(layer.activate for layer in layers),
            pair.dtype,
            pair.device,
            torch.get_num_threads(),
        )
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
            noise = raw_noise(count, q.loc)
            if run is not None and (count, len(x)) == machine_code:
                return run(noise, q.loc, q.scale, p.loc, p.scale, log_scales, sign, *tensors)[0]
            eps = as_normal(noise, count, q.loc)
            z = torch.addcmul(q.loc, q.scale, eps)  # (K, N, z_dim)
            standard = (z - p.loc).div_(p.scale)
            log_ratio = eps.square_().sub_(standard.square_()).sum(2).mul_(0.5).add_(log_scales)
            h = z.flatten(0, 1)
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


@cache
def _compiled_log_weights(
    shape: tuple[int, ...],
    sizes: tuple[tuple[int, int], ...],
    activations: tuple[Callable[[Tensor], Tensor], ...],
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
) -> Callable[..., list[Tensor]]:
    """Return :func:`fused_log_weights` for layers of these sizes and (K, N) = ``shape``."""
    count, data = shape
    z_dim, width = sizes[0][0], sizes[-1][1]
    new = partial(torch.rand, dtype=dtype, device=device)
    with seeded(0, {device}):
        layers = [tensor for m, n in sizes for tensor in (new(m, n) - 0.5, new(n))]
        codes = [new(data, z_dim), new(data, z_dim), new(z_dim), 1 + new(z_dim)]
        signs = new(data, width).round() * 2 - 1
        example = [raw_noise(count, codes[0]), *codes, new(data), signs, *layers]
    return compiled(lambda *tensors: [fused_log_weights(count, activations, *tensors)], example)


def fused_log_weights(
    count: int,
    activations: tuple[Callable[[Tensor], Tensor], ...],
    noise: Tensor,
    loc: Tensor,
    scale: Tensor,
    prior_loc: Tensor,
    prior_scale: Tensor,
    log_scales: Tensor,
    sign: Tensor,
    *layers: Tensor,
) -> Tensor:
    """Return log p(x|z) + log p(z) - log q(z|x), (K, N), for K = ``count`` draws from q.

    ``log_scales`` (N,) is the log-ratio of the scales of q and p; ``sign`` (N, D) is 1 where x is
    1, and -1 elsewhere; layers are weights (in, out) and biases (out,) in turn.
    """
    eps = as_normal(noise, count, loc)
    z = torch.addcmul(loc, scale, eps)
    standard = (z - prior_loc) / prior_scale
    h = z.flatten(0, 1)
    for activate, weight, bias in zip(activations, layers[::2], layers[1::2], strict=True):
        h = activate(torch.addmm(bias, h, weight))
    log_ratio = 0.5 * (eps.square() - standard.square()).sum(2) + log_scales
    return log_sigmoid_sum(sign * h.view(count, *sign.shape)) + log_ratio


def raw_noise(count: int, loc: Tensor) -> Tensor:
    """Draw what :func:`as_normal` makes noise of for that many samples of codes like loc.

    On a processor it is a seed, as torch draws normal numbers there by one thread.
    """
    if loc.dtype != torch.float32 or loc.device.type != "cpu":
        return torch.randn(count, *loc.shape, dtype=loc.dtype, device=loc.device)
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=loc.device)


def as_normal(noise: Tensor, count: int, loc: Tensor) -> Tensor:
    r"""Return standard normal numbers (K, N, z_dim) of what :func:`raw_noise` drew.

    .. math:: \sqrt{-2 \log u} \, (\cos 2 \pi v, \sin 2 \pi v)

    for uniform u in (0, 1] and v in [0, 1), both of 24 bits as torch's own (Box & Muller, 1958).
    """
    if noise.is_floating_point():
        return noise
    words = random_words(noise, (count * loc.numel() + 1) // 2)
    u, v = words & 0xFFFFFF, (words >> 32) & 0xFFFFFF
    radius = (-2 * ((u + 1).to(loc.dtype) * 2.0**-24).log()).sqrt()
    angle = v.to(loc.dtype) * (2 * math.pi * 2.0**-24)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()])
    return normal[: count * loc.numel()].view(count, *loc.shape)


def random_words(seed: Tensor, number: int) -> Tensor:
    """Return that many words of 64 random bits, each by itself, so that all threads can make them.

    They are those of SplitMix64 (Steele, Lea & Flood, Fast splittable pseudorandom number
    generators, 2014), which passes the usual tests of randomness, from the seed times its gamma.
    """
    # a product with the places alone would be one of C++'s integers, which must not overflow
    z = (seed + torch.arange(1, number + 1, device=seed.device)) * -0x61C8864680B583EB
    z = (z ^ (z >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47  # >> keeps the sign
    z = (z ^ (z >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & 2**33 - 1)


def log_sigmoid_sum(s: Tensor) -> Tensor:
    r"""Return the sum of log-sigmoids over the last dimension, in operations that fuse to one pass.

    .. math:: \sum_d \log \sigma(s_d) = \sum_d \min(s_d, 0) - \log \prod_d (1 + e^{-|s_d|})

    Every factor is in [1, 2], so products of up to 64 are far from the largest float32.
    """
    width = s.shape[-1]
    lanes = 16 * -(-width // (16 * 64))  # as wide as vector registers, or a multiple
    whole = width // lanes * lanes
    negative, factors = s.clamp(max=0), _one_and_exp_of_minus(s.abs())
    sums = negative[..., :whole].unflatten(-1, (-1, lanes)).sum(-2)
    products = factors[..., :whole].unflatten(-1, (-1, lanes)).prod(-2)
    total = (sums - products.log()).sum(-1)
    if whole < width:
        total = total + (negative - factors.log())[..., whole:].sum(-1)
    return total


def _one_and_exp_of_minus(a: Tensor) -> Tensor:
    r"""Return :math:`1 + e^{-a}` of a >= 0 up to 2e-7, in less time than a library takes.

    .. math:: e^{2t} - 1 = w (2 + w), \quad w = e^t - 1

    four times over, from six terms of the series of w; so no rounding grows on the way, and an
    error of the series, which is larger the smaller e^t is, shrinks.
    """
    if a.dtype != torch.float32:
        return 1 + (-a).exp()
    t = a.clamp(max=24) * (-1 / 16)
    w = torch.full_like(t, 1 / math.factorial(6))
    for k in range(5, 0, -1):
        w = w * t + 1 / math.factorial(k)
    w = w * t
    for _ in range(4):
        w = w * (2 + w)
    return 2 + w


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
        activate = _IN_PLACE.get(type(after), _unchanged)
        layers.append(Layer((scale * weight).T.contiguous(), scale * bias, activate))
    return layers


def _unchanged(h: Tensor) -> Tensor:
    return h


_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: Tensor.sigmoid_,  # of twice its argument
    nn.Sigmoid: Tensor.sigmoid_,
    nn.ReLU: Tensor.relu_,
}
_LAYERS = (MLP, nn.Sequential, nn.Linear)
_KNOWN = ("probae.", "torch.nn.")  # modules of others may hold Pyro sites of their own
