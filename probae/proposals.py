"""Proposals: encoders fitted to a frozen decoder, to measure what a point code cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from .autoencoder import Autoencoder, seeded
from .checks import prior_of, require_pair
from .distributions import base_distribution, is_discrete, is_flat
from .encoders import BernoulliEncoder, CategoricalEncoder, GaussianEncoder, LogNormalEncoder
from .networks import MLP
from .part import Shape
from .sparse import ConditionalBernoulli, SpikeAndSlab
from .sparse_encoders import ConditionalBernoulliEncoder, SpikeAndSlabEncoder
from .training import fit


def fit_proposal(
    pair: Autoencoder,
    x: Tensor | Any,
    val: Tensor | Any | None = None,
    *,
    encoder: nn.Module | None = None,
    hidden: Shape = (200, 200),
    activation: str = "tanh",
    **options: Any,
) -> nn.Module:
    r"""Train an encoder with a density against a pair's frozen prior and decoder.

    .. math:: \max_\phi E_{q_\phi(z|x)} [\log p(x|z) + \log p(z) - \log q_\phi(z|x)]

    A point code (``SparseAutoencoder``, ``PredictiveSparseDecomposition``) or a penalty
    (``ContractiveAutoencoder``) says nothing about log p(x) of the pair's generative part p(z)
    p(x|z). The fitted encoder measures it: ``log_likelihood(pair, x, proposal=encoder)`` is a lower
    bound whatever the fit, and tight where the fit is good. Neither corruption nor factor of the
    pair takes part.

    Args:
        pair: a pair with a proper prior; it is not changed.
        x: training data (N, *x_shape), as in :func:`probae.fit`. Not the data to be measured.
        val: validation data, as in :func:`probae.fit`.
        encoder: module to train; by default a perceptron with the density that fits the prior:
            Gaussian, log-normal (positive z), spike-and-slab, conditional Bernoulli, or discrete.
        hidden: widths of the default encoder's hidden layers.
        activation: of the default encoder, see :class:`MLP`.
        options: further keywords of :func:`probae.fit`.

    Returns:
        nn.Module: the trained encoder, q(z|x).

    Raises:
        ValueError: a flat prior; an encoder that does not fit the pair; bad data or options, as in
            :func:`probae.fit`.

    Reference:
        Wu et al., On the quantitative analysis of decoder-based generative models, 2017; Cremer,
        Li & Duvenaud, Inference suboptimality in variational autoencoders, 2018.

    Example:
        >>> import torch, probae
        >>> pair, x = probae.SparseAutoencoder(8, 3), torch.randn(64, 8)
        >>> proposal = probae.fit_proposal(pair, x, epochs=1, progress=False)
        >>> probae.log_likelihood(pair, x, "iwae", 10, proposal=proposal).is_bound
        True
    """
    require_pair(pair)
    if is_flat(prior_of(pair)):
        raise ValueError(
            f"pair is of kind {pair.kind.value}: its prior is flat or improper, so there is no "
            "p(x) to measure; give it a proper prior"
        )
    if encoder is None:
        seed = options.get("seed", 0)
        with contextlib.nullcontext() if seed is None else seeded(seed, {pair.device}):
            encoder = _encoder_for(pair, hidden, activation)
    elif isinstance(encoder, nn.Module):
        if any(parameter.is_meta for parameter in encoder.parameters()):
            raise ValueError("encoder must hold numbers, but is on the device 'meta'")
        encoder.to(pair.device, pair.dtype)
    with _fixed(pair.prior, pair.decoder):
        run = fit(Autoencoder(pair.prior, encoder, pair.decoder), x, val, **options)
    if run.interrupted:  # which fit takes for the end of its own work alone
        raise KeyboardInterrupt
    return encoder


def _encoder_for(pair: Autoencoder, hidden: Shape, activation: str) -> nn.Module:
    """Return an encoder whose density has the support of the pair's prior."""
    prior = prior_of(pair)
    base = base_distribution(prior)

    def network(*parameters: int) -> MLP:
        out_shape = (*parameters, *pair.z_shape)
        return MLP(pair.x_shape, out_shape, hidden, activation).to(pair.device, pair.dtype)

    encoder: nn.Module
    if isinstance(base, SpikeAndSlab) and isinstance(base.gate, ConditionalBernoulli):
        encoder = ConditionalBernoulliEncoder(network(3), base.gate.k)
    elif isinstance(base, SpikeAndSlab):
        encoder = SpikeAndSlabEncoder(network(3))
    elif isinstance(base, dist.OneHotCategorical):
        encoder = CategoricalEncoder(network())
    elif isinstance(base, dist.Bernoulli):
        encoder = BernoulliEncoder(network())
    elif is_discrete(prior):
        raise ValueError(
            f"encoder must be given for a prior of type {type(base).__name__}: no default fits it"
        )
    elif isinstance(base, dist.Exponential | dist.Gamma | dist.LogNormal | dist.HalfNormal):
        encoder = LogNormalEncoder(network(2))
    else:
        encoder = GaussianEncoder(network(2))
    return encoder.to(pair.device, pair.dtype)


@contextlib.contextmanager
def _fixed(*modules: nn.Module) -> Iterator[None]:
    """Hold parameters fixed, and modules in evaluation mode, inside the block."""
    parameters = {p for module in modules for p in module.parameters() if p.requires_grad}
    training = {m for module in modules for m in module.modules() if m.training}
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
