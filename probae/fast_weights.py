"""The fast path to importance weights: binary data, a perceptron, and no Pyro handlers.

It does what :func:`probae.importance.plain_weights` does, for the pairs of most tutorials and
papers, at close to the rate of the matrix products alone. What makes it fast: the encoder runs once
for all samples of a datum, layers write into buffers that are used again, and activations and the
Bernoulli log-likelihood are computed in place from the sigmoid, which is by far the
cheapest transcendental function of torch on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Independent

from .autoencoder import Autoencoder
from .decoders import BernoulliDecoder
from .importance import Weigh
from .networks import MLP
from .part import Part

FACTORS = 64  # sigmoids of |s| >= 1/2 whose product is far from the smallest float32, 2**-126


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
        or not all(type(m) in _IN_PLACE or type(m) in _LAYERS for m in decoder.network.modules())
        or any(m._forward_hooks or m._forward_pre_hooks for m in pair.modules())
        or any(isinstance(m, nn.Linear) and m.bias is None for m in decoder.modules())
        or torch.is_autocast_enabled(pair.device.type)
        or pair.dtype not in (torch.float32, torch.float64)
    ):
        return None
    network = decoder.network

    def weigh(x: Tensor) -> Weigh:
        sign = (2 * x - 1).flatten(1)  # (N, D)
        codes, prior = encoder(x), pair.prior()
        draw_codes = _normal_codes if _are_normal(codes, prior) else _codes
        buffers: dict[int, Tensor] = {}

        def draw(count: int) -> Tensor:
            z, log_ratio = draw_codes(codes, prior, count)  # (K, N, …), (K, N)
            logits = _logits(network, z.reshape(count * len(x), -1), buffers)
            signed = logits.view(count, *sign.shape).mul_(sign)
            return log_sigmoid_sum_(signed).add_(log_ratio)

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


def log_sigmoid_sum_(s: Tensor) -> Tensor:
    r"""Return Σ log σ(s) over the last dimension, and overwrite s.

    .. math:: \log\sigma(s) = \min(s, 0) + \log\sigma(|s|)

    and, as every σ(\|s\|) is in [1/2, 1], the logarithm of a product of up to 64 of them serves for
    the sum of their logarithms.
    """
    total = s.clamp(max=0).sum(-1)
    s.abs_().sigmoid_()
    width, factors = s.shape[-1], 1
    while factors < FACTORS and width > 1:
        half = width // 2
        s[..., :half].mul_(s[..., width - half : width])
        width, factors = width - half, 2 * factors
    return total.add_(s[..., :width].log_().sum(-1))


def _logits(network: MLP, h: Tensor, buffers: dict[int, Tensor]) -> Tensor:
    """Run a perceptron on (rows, in) with every layer written into a buffer of its own."""
    for i, layer in enumerate(network.layers):
        if not isinstance(layer, nn.Linear):
            _IN_PLACE[type(layer)](h)
            continue
        if i not in buffers or len(buffers[i]) < len(h):
            buffers[i] = h.new_empty(len(h), layer.out_features)
        h = torch.addmm(layer.bias, h, layer.weight.T, out=buffers[i][: len(h)])
    if network.out_activation is not None:
        _IN_PLACE[type(network.out_activation)](h)
    return h


def _tanh_(h: Tensor) -> Tensor:
    return h.mul_(2).sigmoid_().mul_(2).sub_(1)


_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: _tanh_,
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
