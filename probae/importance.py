"""Importance weights p(x, z) / q(z|x): where they come from, and sums over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from .arviz import pareto_khat, tail_size
from .autoencoder import Autoencoder, Kind
from .graphs import compiled
from .terms import log_weights

Weigh = Callable[[int], Tensor]  # K -> log-weights (K, N) of fresh draws, in nats


def plain_weights(
    pair: Autoencoder, method: str, proposal: nn.Module | None
) -> Callable[[Tensor], Weigh]:
    """Return the function that weighs draws for data x (N, *x_shape), by the Pyro programs."""
    model, guide = _programs(pair, method, proposal)
    return lambda x: lambda count: log_weights(model, guide, x, num_particles=count)


def _programs(
    pair: Autoencoder, method: str, proposal: nn.Module | None
) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """Return the model and what proposes z for it, or refuse what would not give a bound."""
    if proposal is None:
        kind = pair.kind
        if kind is Kind.ELBO or (kind is Kind.DISCRETE_POINT and method == "elbo"):
            return pair.model, pair.guide
        raise ValueError(
            f"method={method!r} needs an encoder with a density, but the pair is of kind "
            f"{kind.value}: {kind.statement}; use method='ais', or pass "
            "proposal=probae.fit_proposal(pair, x_train)"
            + (", or method='elbo'" if kind is Kind.DISCRETE_POINT else "")
        )

    def propose(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", proposal(x))

    def generate(x: Tensor) -> None:  # p(z) p(x|z): neither corruption nor factor
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", pair.prior())
            pyro.sample("x", pair.decoder(z), obs=x)

    return generate, propose


def compiled_weights(
    weigh: Callable[[Tensor], Weigh], x: Tensor, count: int
) -> Callable[[Tensor], Weigh]:
    """Return the function with machine code for ``count`` samples at a time for data like x.

    It gives the same draws up to rounding; other numbers of samples and of data stay as they are.

    Raises:
        CannotCompile: the programs branch on values, there is no compiler, or draws differ.
    """
    run = compiled(lambda x: [weigh(x)(count)], [x])

    def compiled_weigh(other: Tensor) -> Weigh:
        if other.shape != x.shape:
            return weigh(other)
        return lambda k: run(other)[0] if k == count else weigh(other)(k)

    return compiled_weigh


class StreamingWeights:
    """Running sums over log-weights (K, N) that arrive in blocks, in memory that K does not enter.

    Pareto k needs only the largest weights; M = min(K/5, 3√K) of them and one more are kept.
    """

    def __init__(self, num_samples: int, x: Tensor) -> None:
        self.num_samples = num_samples
        self.tail_size = tail_size(num_samples)
        empty = x.new_full((len(x),), -math.inf, dtype=torch.float64)
        self.log_sum, self.log_sum_squares = empty, empty
        self.mean, self.sum_squares, self.seen = torch.zeros_like(empty), torch.zeros_like(empty), 0
        self.tail = empty.new_empty((0, len(x)))

    def add(self, log_weights: Tensor) -> None:
        """Take in a block of shape (k, N)."""
        block = log_weights.double()
        self.log_sum = torch.logaddexp(self.log_sum, block.logsumexp(0))
        self.log_sum_squares = torch.logaddexp(self.log_sum_squares, (2 * block).logsumexp(0))
        count, total = len(block), self.seen + len(block)
        mean, shift = block.mean(0), block.mean(0) - self.mean  # Chan et al., 1983
        self.sum_squares = self.sum_squares + ((block - mean) ** 2).sum(0)
        self.sum_squares = self.sum_squares + shift**2 * self.seen * count / total
        self.mean, self.seen = self.mean + shift * count / total, total
        top = torch.topk(block, min(count, self.tail_size), 0).values
        merged = torch.cat([self.tail, top])
        self.tail = torch.topk(merged, min(len(merged), self.tail_size), 0).values

    def ess(self) -> Tensor:
        """Kish's effective sample size (Σw)² / Σw²."""
        return (2 * self.log_sum - self.log_sum_squares).exp()

    def elbo(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean log-weight, its standard error, effective sample size, Pareto k."""
        variance = self.sum_squares / max(self.seen - 1, 1)
        std_error = (variance / self.seen).sqrt() if self.seen > 1 else variance + math.nan
        return self.mean, std_error, self.ess(), self.khat()

    def iwae(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-mean weight, its standard error (delta method), effective sample size, Pareto k."""
        count, ess = self.seen, self.ess()
        relative_variance = (1 / ess - 1 / count).clamp(min=0) * count / max(count - 1, 1)
        std_error = relative_variance.sqrt() if count > 1 else relative_variance + math.nan
        # the delta method gives at most one nat; where one weight is all, it knows nothing
        std_error = torch.where((ess < 2) & (count > 2), math.inf, std_error)
        return self.log_sum - math.log(count), std_error, ess, self.khat()

    def khat(self) -> Tensor:
        """Pareto k of each datum, from the kept tail."""
        return pareto_khat(self.tail, self.num_samples)
