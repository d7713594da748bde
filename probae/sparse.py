"""Codes with exact zeros: their distributions, divergences, and the thresholds they imply."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor
from torch.distributions import Independent, kl_divergence, register_kl
from torch.distributions.utils import lazy_property
from torch.nn.functional import pad, softplus

from .distributions import is_point
from .part import require_count, require_parameter

_IMPOSSIBLE = -1e30  # log-weight of what cannot be; -inf would put NaN into gradients


class SpikeAndSlab(dist.TorchDistribution):
    r"""Vectors with exact zeros: :math:`h = s \odot a`, gates s, and a value a_i drawn where s_i=1.

    .. math:: \log p(h) = \log gate(1[h \ne 0]) + \sum_{i:\, h_i \ne 0} \log slab_i(h_i)

    This is a density with respect to the base measure :math:`(\delta_0 + Lebesgue)^K`: an entry
    that is off costs what its gate says and nothing for a value that was never drawn. Such
    densities compare with each other, not with one on all of :math:`R^K` such as a Laplace.

    A draw carries the pathwise gradient of the slab, the gates none, so ``has_rsample`` is False
    and :meth:`score_parts` tells Pyro which part needs the score function: Trace_ELBO and
    TraceGraph_ELBO are unbiased.

    Args:
        gate: distribution over {0, 1}^K, event shape (K,): independent Bernoullis, or a
            :class:`ConditionalBernoulli`.
        slab: reparameterised distribution of the entries, batch shape (..., K), no event
            dimension, no atom at 0 and 1 in its support: Normal, Laplace, Exponential, LogNormal,
            StudentT; Delta for a point; ``Normal(0, 1).mask(False)`` for the improper flat slab.

    Raises:
        ValueError: gate or slab is no such distribution, or their sizes differ.

    Reference:
        Mitchell & Beauchamp, Bayesian variable selection in linear regression, 1988; Goodfellow,
        Courville & Bengio, Large-scale feature learning with spike-and-slab sparse coding, 2012.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> gate = dist.Bernoulli(torch.tensor([0.1, 0.5, 0.9])).to_event(1)
        >>> h = SpikeAndSlab(gate, dist.Normal(torch.zeros(3), 1.0))
        >>> h.log_prob(torch.zeros(3))  # log(0.9 · 0.5 · 0.1)
        tensor(-3.1011)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, gate: Any, slab: Any, validate_args: bool | None = None) -> None:
        _check_gate(gate)
        size = gate.event_shape[0]
        _check_slab(slab, size)
        batch_shape = torch.broadcast_shapes(gate.batch_shape, slab.batch_shape[:-1])
        self.gate = gate if gate.batch_shape == batch_shape else gate.expand(batch_shape)
        shape = Size((*batch_shape, size))
        self.slab = slab if slab.batch_shape == shape else slab.expand(shape)
        super().__init__(batch_shape, gate.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Vectors whose pattern of zeros the gate, and whose other entries the slab, can make."""
        return _SparseVector(self.gate.support, self.slab.support)

    @property
    def mean(self) -> Tensor:
        """Mean, P(s_i = 1) E[a_i]."""
        return self.gate.mean * self.slab.mean

    @property
    def variance(self) -> Tensor:
        """Variance of each entry."""
        return self.gate.mean * (self.slab.variance + self.slab.mean**2) - self.mean**2

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw; outside ``no_grad`` the draw carries the gradient of the slab, not of the gates."""
        gates = self.gate.sample(sample_shape)
        values = self.slab.rsample(sample_shape)
        return torch.where(gates > 0, values, torch.zeros_like(values))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(value), shape of ``value`` without its last dimension, broadcast."""
        log_gate, log_slab = self._log_probs(value)
        return log_gate + log_slab

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Return what Pyro needs: score function for the gates, pathwise gradient for the slab."""
        log_gate, log_slab = self._log_probs(value)
        return ScoreParts(log_gate + log_slab, score_function=log_gate, entropy_term=log_slab)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpikeAndSlab:
        """Return the distribution with its batch shape expanded."""
        shape = Size(batch_shape)
        slab = self.slab.expand(shape + self.event_shape)
        return SpikeAndSlab(self.gate.expand(shape), slab, self._validate_args)

    def _log_probs(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of the gates, and log-density of the entries that are on."""
        if self._validate_args:
            self._validate_sample(value)
        on = value != 0
        # off entries are sent elsewhere first: a slab may have no density, or no gradient, at 0
        log_slab = self.slab.log_prob(torch.where(on, value, torch.ones_like(value)))
        log_slab = torch.where(on, log_slab, torch.zeros_like(log_slab)).sum(-1)
        return self.gate.log_prob(on.to(value.dtype)), log_slab


class ConditionalBernoulli(dist.TorchDistribution):
    r"""Independent Bernoullis given that exactly k of them are on.

    .. math:: q(s) = \frac{\prod_i w_i^{s_i}}{e_k(w)} \;\text{ for } \sum_i s_i = k,\quad
              w_i = e^{logit_i}

    The normaliser is the elementary symmetric polynomial e_k, and everything about q is exact: a
    binary tree over the units multiplies truncated generating polynomials upwards (the
    normaliser), passes probabilities downwards (the marginals) and splits the count k downwards
    (a draw), in O(K k) operations and O(log K) steps. Equal logits give the uniform law over
    k-subsets. (Adding Gumbel noise to the logits and taking the top k is another law,
    Plackett–Luce.)

    Args:
        logits: log w of shape (..., K); a constant added to all of them changes nothing.
        k: number of ones, 1 to K.

    Raises:
        ValueError: ``k`` is no count between 1 and K.

    Reference:
        Chen & Liu, Statistical applications of the Poisson-binomial and conditional Bernoulli
        distributions, 1997.

    Example:
        >>> import torch
        >>> pairs = ConditionalBernoulli(torch.tensor([0.0, 0.0, 0.0, 0.0]), k=2)
        >>> round(pairs.log_prob(torch.tensor([1.0, 0.0, 0.0, 1.0])).exp().item(), 4)  # one of six
        0.1667
        >>> pairs.mean
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    has_rsample = False
    has_enumerate_support = True

    def __init__(self, logits: Tensor, k: int, validate_args: bool | None = None) -> None:
        self.k = require_count(k, "k")
        require_parameter(logits, "logits")
        if logits.dim() < 1 or logits.shape[-1] < self.k:
            raise ValueError(
                f"k must be at most the number of units, the last dimension of logits, got k={k} "
                f"and logits of shape {tuple(logits.shape)}"
            )
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Vectors of zeros and k ones."""
        return _Subset(self.k)

    @property
    def log_normalizer(self) -> Tensor:
        """Log of e_k(w), shape (...)."""
        return self._tree[-1][..., 0, self.k].expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Inclusion probabilities P(s_i = 1), which sum to k."""
        size = self.event_shape[0]
        root = torch.full_like(self._tree[-1], _IMPOSSIBLE)  # (..., 1, counts)
        root[..., self.k] = 0.0
        outside = root  # log-weight of all that is not below a node, given the count below it
        for inside in reversed(self._tree[:-1]):
            left, right = inside[..., 0::2, :], inside[..., 1::2, :]
            pair = [_correlate(outside, right), _correlate(outside, left)]
            outside = torch.stack(pair, -2).flatten(-3, -2)
        log_on = (outside + self._tree[0])[..., :size, 1]
        return (log_on - self._tree[-1][..., self.k]).exp().expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each entry."""
        return self.mean * (1 - self.mean)

    @property
    def mode(self) -> Tensor:
        """Most probable subset, the k largest logits."""
        top = self.logits.topk(self.k, -1).indices
        return torch.zeros_like(self.logits).scatter(-1, top, 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(value), -inf where ``value`` has not k ones."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = (value * self.logits).sum(-1) - self.log_normalizer
        return torch.where(value.sum(-1) == self.k, log_prob, -math.inf)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, log e_k(w) - Σ P(s_i = 1) logit_i."""
        return self.log_normalizer - (self.mean * self.logits).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw exactly, by splitting the count k down the tree."""
        shape = self._extended_shape(sample_shape)
        counts = torch.full((*shape[:-1], 1), self.k, device=self.logits.device)
        for inside in reversed(self._tree[:-1]):
            left, right = inside[..., 0::2, :], inside[..., 1::2, :]  # (..., nodes, n)
            first = torch.arange(left.shape[-1], device=counts.device)
            second = counts.unsqueeze(-1) - first  # (..., nodes, n)
            possible = (second >= 0) & (second < len(first))
            log_second = right.expand(second.shape).gather(-1, second.clamp(0, len(first) - 1))
            logits = torch.where(possible, left + log_second, _IMPOSSIBLE)
            chosen = dist.Categorical(logits=logits, validate_args=False).sample()
            counts = torch.stack([chosen, counts - chosen], -1).flatten(-2)
        return counts[..., : shape[-1]].to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all C(K, k) values along a new first dimension."""
        subsets = torch.tensor(
            list(itertools.combinations(range(self.event_shape[0]), self.k)),
            device=self.logits.device,
        )  # (C, k)
        values = self.logits.new_zeros(len(subsets), *self.event_shape).scatter(-1, subsets, 1.0)
        values = values.reshape(-1, *(1 for _ in self.batch_shape), *self.event_shape)
        return values.expand(-1, *self._extended_shape()) if expand else values

    def expand(self, batch_shape: Any, _instance: Any = None) -> ConditionalBernoulli:
        """Return the distribution with its batch shape expanded, the tree computed once."""
        logits = self.logits.expand(Size(batch_shape) + self.event_shape)
        new = ConditionalBernoulli(logits, self.k, self._validate_args)
        new.__dict__["_tree"] = self._tree
        return new

    @lazy_property
    def _tree(self) -> tuple[Tensor, ...]:
        """Log-coefficients of Π (1 + w_i t) below each node, up to t^k, from leaves to root.

        Level l has shape (..., nodes, min(2^l, k) + 1); the leaves are padded to a power of two.
        """
        size = self.event_shape[0]
        width = 1 << (size - 1).bit_length()
        logits = pad(self.logits, (0, width - size), value=_IMPOSSIBLE)
        levels = [torch.stack([torch.zeros_like(logits), logits], -1)]
        while levels[-1].shape[-2] > 1:
            left, right = levels[-1][..., 0::2, :], levels[-1][..., 1::2, :]
            levels.append(_convolve(left, right, self.k + 1))
        return tuple(levels)


def _convolve(left: Tensor, right: Tensor, most: int) -> Tensor:
    """Log-coefficients of a product of polynomials, at most ``most``: (..., n) to (..., 2n - 1)."""
    n = left.shape[-1]
    windows = pad(right, (n - 1, n - 1), value=_IMPOSSIBLE).unfold(-1, n, 1).flip(-1)
    return torch.logsumexp(left.unsqueeze(-2) + windows[..., :most, :], -1)


def _correlate(outside: Tensor, sibling: Tensor) -> Tensor:
    """Log-weights of all outside a child, from those outside its parent and inside its sibling."""
    n = sibling.shape[-1]
    short = 2 * n - 1 - outside.shape[-1]  # counts above k, cut off in the parent
    windows = pad(outside, (0, short), value=_IMPOSSIBLE).unfold(-1, n, 1)
    return torch.logsumexp(windows + sibling.unsqueeze(-2), -1)


class _SparseVector(constraints.Constraint):
    """Vectors of zeros and of a slab's values, the zeros where a gate can put them."""

    event_dim = 1

    def __init__(self, gate: constraints.Constraint, slab: constraints.Constraint) -> None:
        self.gate, self.slab = gate, slab

    def check(self, value: Tensor) -> Tensor:
        on = value != 0
        return self.gate.check(on.to(value.dtype)) & (~on | self.slab.check(value)).all(-1)

    def __repr__(self) -> str:
        return f"vectors of zeros and {self.slab} values, their nonzero pattern in {self.gate}"


class _Subset(constraints.Constraint):
    """Vectors of zeros and k ones."""

    is_discrete = True
    event_dim = 1

    def __init__(self, k: int) -> None:
        self.k = k

    def check(self, value: Tensor) -> Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value.sum(-1) == self.k)

    def __repr__(self) -> str:
        return f"vectors of zeros and exactly {self.k} ones"


def _check_gate(gate: Any) -> None:
    kind = isinstance(gate, torch.distributions.Distribution)
    if not kind or len(gate.event_shape) != 1 or not gate.support.is_discrete:
        raise ValueError(
            "gate must be a distribution over {0, 1}^K with event shape (K,), such as "
            f"Bernoulli(probs).to_event(1) or a ConditionalBernoulli, got {gate!r}"
        )


def _check_slab(slab: Any, size: int) -> None:
    kind = isinstance(slab, torch.distributions.Distribution)
    if not kind or slab.event_shape or slab.batch_shape[-1:] != (size,):
        raise ValueError(
            f"slab must be a distribution of batch shape (..., {size}), as many as the gate's "
            f"units, without event dimensions (no .to_event), got {slab!r}"
        )
    if not slab.has_rsample:
        raise ValueError(
            "slab must have a reparameterised sampler, as Normal, Laplace and LogNormal have, "
            f"got {slab!r}"
        )


@register_kl(SpikeAndSlab, SpikeAndSlab)
def _kl_spike_and_slab(p: SpikeAndSlab, q: SpikeAndSlab) -> Tensor:
    """KL of the gates, plus that of each slab as often as p draws it."""
    if is_point(p.slab):
        raise NotImplementedError  # the KL of a point is infinite
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)  # torch's KL of Bernoullis does not broadcast
    flat = getattr(q.slab, "_mask", None) is False
    slab = -p.slab.entropy() if flat else kl_divergence(p.slab, q.slab)
    return kl_divergence(p.gate, q.gate) + (p.gate.mean * slab).sum(-1)


@register_kl(ConditionalBernoulli, ConditionalBernoulli)
def _kl_conditional_bernoulli(p: ConditionalBernoulli, q: ConditionalBernoulli) -> Tensor:
    if p.k != q.k:
        return torch.full_like(p.log_normalizer + q.log_normalizer, math.inf)
    return (p.mean * (p.logits - q.logits)).sum(-1) - p.log_normalizer + q.log_normalizer


@register_kl(ConditionalBernoulli, Independent)
def _kl_conditional_bernoulli_bernoulli(p: ConditionalBernoulli, q: Independent) -> Tensor:
    bits = q.base_dist
    if not isinstance(bits, torch.distributions.Bernoulli) or len(q.event_shape) != 1:
        raise NotImplementedError
    return -p.entropy() - (p.mean * bits.logits - softplus(bits.logits)).sum(-1)


@register_kl(torch.distributions.LogNormal, torch.distributions.Exponential)
def _kl_log_normal_exponential(
    p: torch.distributions.LogNormal, q: torch.distributions.Exponential
) -> Tensor:
    return -p.entropy() - q.rate.log() + q.rate * p.mean


def soft_threshold(z: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Shrink towards zero, :math:`sign(z)\,\max(|z| - t, 0)`: what a Laplace prior implies.

    With an orthonormal dictionary D and noise variance σ², the most probable code of x under
    ``LaplacePrior(rate=λ)`` is this of :math:`z = D^T x` at :math:`t = \lambda \sigma^2`.

    Args:
        z: any shape.
        threshold: t >= 0, broadcast with z.

    Reference:
        Donoho, De-noising by soft-thresholding, 1995.

    Example:
        >>> import torch
        >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-1.,  0.,  2.])
    """
    limit = torch.as_tensor(threshold, dtype=z.dtype, device=z.device)
    return z - z.clamp(-limit, limit)


def hard_threshold(z: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Keep or kill, :math:`z\,1[|z| > t]`: what a spike-and-slab prior with a flat slab implies.

    With an orthonormal dictionary D and noise variance σ², the most probable code of x under
    ``SpikeAndSlabPrior(rate=λ, slab_scale=None)`` is this of :math:`z = D^T x` at
    :math:`t = \sigma \sqrt{2 \lambda}`, where :math:`\lambda = \log \frac{1 - \pi}{\pi}`.

    Args:
        z: any shape.
        threshold: t >= 0, broadcast with z.

    Reference:
        Donoho & Johnstone, Ideal spatial adaptation by wavelet shrinkage, 1994.

    Example:
        >>> import torch
        >>> hard_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-2.,  0.,  3.])
    """
    return torch.where(z.abs() > threshold, z, torch.zeros_like(z))


def top_k(z: Tensor, k: int, positive: bool = False) -> Tensor:
    r"""Keep the k largest entries: what a uniform prior over k-subsets with a flat slab implies.

    With an orthonormal dictionary D, the most probable code of x under
    ``SubsetPrior(num_active=k, slab_scale=None)`` is this of :math:`z = D^T x`, at any noise. For
    another dictionary it is one step of iterative hard thresholding, and may be suboptimal.

    Args:
        z: shape (..., K).
        k: number of entries to keep, 1 to K.
        positive: keep the largest z, not the largest \|z\|, and set what is kept and not positive
            to the smallest positive number, so that k entries stay active.

    Raises:
        ValueError: ``k`` is no count between 1 and K.

    Reference:
        Makhzani & Frey, k-sparse autoencoders, 2013; Gao et al., Scaling and evaluating sparse
        autoencoders, 2024.

    Example:
        >>> import torch
        >>> top_k(torch.tensor([-2.0, 0.5, 3.0]), 2)
        tensor([-2.,  0.,  3.])
        >>> top_k(torch.tensor([-2.0, 0.5, 3.0]), 2, positive=True)
        tensor([0.0000, 0.5000, 3.0000])
    """
    if z.shape[-1] < require_count(k, "k"):
        raise ValueError(f"k must be at most the number of entries, {z.shape[-1]}, got {k!r}")
    kept = (z if positive else z.abs()).topk(k, -1).indices
    tiny = torch.full_like(z, torch.finfo(z.dtype).tiny)  # k entries stay active, come what may
    values = torch.maximum(z, tiny) if positive else torch.where(z == 0, tiny, z)
    return torch.zeros_like(z).scatter(-1, kept, values.gather(-1, kept))
