"""Marginal likelihoods in closed form: linear-Gaussian pairs, and codes that can be enumerated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pyro.distributions as dist
import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .checks import prior_of
from .decoders import GaussianDecoder
from .distributions import base_distribution
from .memory import rows_in_budget

MAX_STATES = 2**20  # of a discrete code that is enumerated


def closed_form(pair: Autoencoder) -> Callable[[Tensor], Tensor] | None:
    """Return the function that gives log p(x) exactly, or None where there is none."""
    prior = base_distribution(prior_of(pair))
    decoder = pair.decoder
    if isinstance(prior, dist.Normal) and isinstance(decoder, GaussianDecoder):
        affine = decoder.affine()
        if affine is not None:
            return lambda x: _linear_gaussian(x, prior, *affine)
    count = _count_states(pair)
    if count is not None and count <= MAX_STATES:
        return lambda x: _enumerated(pair, x)
    return None


def _linear_gaussian(
    x: Tensor, prior: dist.Normal, weight: Tensor, bias: Tensor, scale: Tensor
) -> Tensor:
    r"""Log-density of N(Wm + b, W diag(τ²) Wᵀ + s² I), in double precision."""
    weight, bias, scale = weight.double(), bias.double(), scale.double()
    marginal = dist.LowRankMultivariateNormal(
        weight @ prior.loc.double() + bias,
        weight * prior.scale.double(),
        (scale**2).expand(len(bias)),
    )
    return marginal.log_prob(x.flatten(1).double())


def _count_states(pair: Autoencoder) -> int | None:
    """Number of states of the code, or None if it is not discrete and finite."""
    prior = prior_of(pair)
    base = base_distribution(prior)
    if isinstance(base, dist.OneHotCategorical) and prior.event_shape == base.event_shape:
        return int(base.event_shape[0])
    if isinstance(base, dist.Bernoulli | dist.Categorical):
        choices = 2 if isinstance(base, dist.Bernoulli) else base.probs.shape[-1]
        return int(choices ** math.prod(prior.event_shape))
    return None


def _states(pair: Autoencoder, rows: int) -> Iterator[Tensor]:
    """Yield all states of the code in blocks of shape (rows, *z_shape)."""
    prior = pair.prior()
    base, like = base_distribution(prior), prior.sample()  # dtype and device of a code
    if isinstance(base, dist.OneHotCategorical):
        yield from torch.eye(len(like)).to(like).split(rows)
        return
    choices = 2 if isinstance(base, dist.Bernoulli) else base.probs.shape[-1]
    place = choices ** torch.arange(like.numel(), device=like.device)  # digits in base `choices`
    for index in torch.arange(choices ** like.numel(), device=like.device).split(rows):
        yield ((index[:, None] // place) % choices).to(like).reshape(-1, *like.shape)


def _enumerated(pair: Autoencoder, x: Tensor) -> Tensor:
    """Log Σ_z p(z) p(x|z) over all states, in chunks of states and of data."""
    prior, budget = pair.prior(), rows_in_budget(pair)
    values = []
    for chunk in x.split(max(1, budget // 64)):
        total = x.new_full((len(chunk),), -math.inf, dtype=torch.float64)
        for z in _states(pair, max(1, budget // len(chunk))):
            log_joint = prior.log_prob(z)[:, None] + pair.decoder(z[:, None]).log_prob(chunk)
            total = torch.logaddexp(total, log_joint.double().logsumexp(0))
        values.append(total)
    return torch.cat(values)
