"""The fast path to importance weights: binary data, a perceptron, and no Pyro handlers.

It does what :func:`probae.importance.plain_weights` does, for the pairs of most tutorials and
papers, at close to the rate of the matrix products alone. Three things make it fast. The encoder
runs once for all samples of a datum. Layers write into buffers that are used again. And activations
and the Bernoulli log-likelihood are computed in place from the sigmoid, which is by far the
cheapest transcendental function of torch on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Size, Tensor, nn

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
    own = type(pair).model is not Autoencoder.model or type(pair).guide is not Autoencoder.guide
    altered = pair.corruption is not None or pair.factor is not None or own
    if (
        (proposal is None and altered)
        or not _is_ours(pair.prior, encoder)
        or type(decoder) is not BernoulliDecoder
        or type(decoder.network) is not MLP
        or not all(type(m) in _IN_PLACE or type(m) in _LAYERS for m in decoder.network.modules())
        or any(m._forward_hooks or m._forward_pre_hooks for m in pair.modules())
        or pair.dtype not in (torch.float32, torch.float64)
    ):
        return None
    network = decoder.network

    def weigh(x: Tensor) -> Weigh:
        sign = (2 * x - 1).flatten(1)  # (N, D)
        codes, prior = encoder(x), pair.prior()
        buffers: dict[int, Tensor] = {}

        def draw(count: int) -> Tensor:
            shape = Size((count,))
            z = codes.rsample(shape) if codes.has_rsample else codes.sample(shape)  # (K, N, …)
            logits = _logits(network, z.reshape(count * len(x), -1), buffers)
            log_likelihood = log_sigmoid_sum_(logits.view(count, *sign.shape).mul_(sign))
            return log_likelihood.add_(prior.log_prob(z)).sub_(codes.log_prob(z))

        return draw

    return weigh


def log_sigmoid_sum_(s: Tensor) -> Tensor:
    r"""Return Σ log σ(s) over the last dimension, and overwrite s.

    .. math:: \log\sigma(s) = \min(s, 0) + \log\sigma(|s|)

    and, as every σ(\|s\|) is in [1/2, 1], the logarithm of a product of up to 64 of them serves for
    the sum of their logarithms.
    """
    total = s.sum(-1)
    total.sub_(s.abs_().sum(-1)).mul_(0.5)  # Σ min(s, 0)
    s.sigmoid_()
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
