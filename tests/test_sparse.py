"""Sparse distributions against enumeration of their gates and quadrature of their slabs."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Independent, kl_divergence

import probae
from probae import (
    ConditionalBernoulli,
    LaplacePrior,
    SpikeAndSlab,
    SpikeAndSlabPrior,
    SubsetPrior,
)
from probae.sparse import hard_threshold, soft_threshold, top_k

from .test_distributions import FALSE_ALARM, assert_frequencies

SIZES = [(1, 1), (2, 1), (3, 2), (4, 4), (5, 2), (6, 3), (7, 6), (8, 3), (9, 4)]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def subsets(size: int, k: int) -> Tensor:
    """All vectors of ``size`` zeros and k ones."""
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64)
    return states[states.sum(-1) == k]


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def brute_force(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every subset, its log-probability, and the log-normaliser, by adding all terms up."""
    states = subsets(len(logits), k)
    weights = torch.stack([logits[s > 0].exp().prod() for s in states])
    return states, (weights / weights.sum()).log(), weights.sum().log()


@pytest.mark.parametrize(("size", "k"), SIZES)
def test_conditional_bernoulli_is_its_definition(size: int, k: int) -> None:
    logits = 2 * torch.randn(3, size, dtype=torch.float64)
    q, uniform = ConditionalBernoulli(logits, k), ConditionalBernoulli(0 * logits[0] + 7.0, k)
    log_choices = math.log(math.comb(size, k))
    for row in range(3):
        states, log_prob, normalizer = brute_force(logits[row], k)
        alone = ConditionalBernoulli(logits[row], k)
        assert_equal(q.log_normalizer[row], normalizer)
        assert_equal(alone.log_prob(states), log_prob)
        assert_equal(q.log_prob(states.unsqueeze(1))[:, row], log_prob)
        assert_equal(q.mean[row], log_prob.exp() @ states)
        assert_equal(q.variance[row], log_prob.exp() @ (states - q.mean[row]) ** 2)
        entropy = -(log_prob.exp() * log_prob).sum()
        assert_equal(q.entropy()[row], entropy)
        assert_equal(kl_divergence(alone, uniform), log_choices - entropy)
        assert_equal(q.mode[row], states[log_prob.argmax()])
    assert_equal(q.mean.sum(-1), torch.full((3,), float(k), dtype=torch.float64))
    assert_equal(uniform.log_prob(subsets(size, k)[0]), double(-log_choices)[0])


@pytest.mark.parametrize(("size", "k"), [(3, 2), (6, 3), (5, 4)])
def test_conditional_bernoulli_kl_between_two(size: int, k: int) -> None:
    first, second = torch.randn(2, size, dtype=torch.float64)
    p, q = ConditionalBernoulli(first, k), ConditionalBernoulli(second, k)
    _, log_p, _ = brute_force(first, k)
    _, log_q, _ = brute_force(second, k)
    assert_equal(kl_divergence(p, q), (log_p.exp() * (log_p - log_q)).sum())
    other = ConditionalBernoulli(second, k - 1)
    assert kl_divergence(p, other).item() == math.inf
    bits = dist.Bernoulli(logits=second).to_event(1)
    outside = bits.log_prob(subsets(size, k))
    assert_equal(kl_divergence(p, bits), (log_p.exp() * (log_p - outside)).sum())
    with pytest.raises(NotImplementedError):
        kl_divergence(p, dist.Normal(second, 1.0).to_event(1))
    with pytest.raises(NotImplementedError):
        kl_divergence(bits, p)


def test_conditional_bernoulli_derivatives() -> None:
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    value = subsets(6, 2)[:2]

    def check(function: Callable[[ConditionalBernoulli], Tensor]) -> None:
        assert torch.autograd.gradcheck(lambda t: function(ConditionalBernoulli(t, 2)), logits)

    check(lambda q: q.log_prob(value))
    check(lambda q: q.mean)
    check(lambda q: q.entropy())
    check(lambda q: kl_divergence(q, ConditionalBernoulli(torch.zeros(6).double(), 2)))
    q = ConditionalBernoulli(logits, 2)
    (gradient,) = torch.autograd.grad(q.log_normalizer.sum(), logits)
    assert_equal(gradient, q.mean)  # the marginals, by another way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditional_bernoulli_is_stable_and_large(dtype: torch.dtype) -> None:
    logits = torch.zeros(300, dtype=dtype)
    logits[:20], logits[20:40] = 200.0, -300.0
    logits.requires_grad_()
    q = ConditionalBernoulli(logits, 30)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    expected = 20 * 200 + math.lgamma(261) - math.lgamma(11) - math.lgamma(251)
    assert q.log_normalizer.item() == pytest.approx(expected, rel=1e-6)
    assert q.mean.dtype == dtype
    assert q.mean.tolist() == pytest.approx([1.0] * 20 + [0.0] * 20 + [1 / 26] * 260, abs=tolerance)
    gradients = torch.autograd.grad(q.entropy() + q.log_prob(q.sample()), logits)
    assert gradients[0].isfinite().all()
    assert (q.sample((50,)).sum(-1) == 30).all()


@pytest.mark.parametrize(("size", "k"), [(2, 1), (5, 2), (6, 3), (7, 5), (4, 4)])
def test_conditional_bernoulli_samples_have_its_frequencies(size: int, k: int) -> None:
    logits = torch.randn(3, size, dtype=torch.float64)
    sample = ConditionalBernoulli(logits, k).sample((20_000,))
    assert sample.shape == (20_000, 3, size)
    code = (2 ** torch.arange(size)).double()
    for row in range(3):
        states, log_prob, _ = brute_force(logits[row], k)
        drawn = torch.bincount((sample[:, row] @ code).long(), minlength=2**size)
        counts = drawn[(states @ code).long()].numpy()
        assert counts.sum() == 20_000  # all of them k-subsets
        if len(states) > 1:
            assert_frequencies(counts, log_prob.exp().numpy())  # false alarm: 1e-6 a row


def test_conditional_bernoulli_shapes_and_errors() -> None:
    q = ConditionalBernoulli(torch.zeros(4), 2)
    wide = q.expand((3, 2))
    assert (wide.batch_shape, wide.event_shape) == ((3, 2), (4,))
    assert wide.sample((5,)).shape == (5, 3, 2, 4)
    assert len(wide.sample((5,)).reshape(-1, 4).unique(dim=0)) > 1  # expanded draws are independent
    assert wide.log_prob(torch.tensor([1.0, 1, 0, 0])).shape == (3, 2)
    assert wide.mean.shape == (3, 2, 4)
    assert wide.enumerate_support().shape == (6, 3, 2, 4)
    assert q.enumerate_support(expand=False).shape == (6, 4)
    assert not q.sample().requires_grad
    with pyro.validation_enabled():
        for bad in ([1.0, 0, 0, 0], [0.5, 0.5, 1, 0], [1.0, 1, 1, 0]):
            with pytest.raises(ValueError, match="exactly 2 ones"):
                q.log_prob(torch.tensor(bad))
    with pyro.validation_enabled(False):
        assert q.log_prob(torch.tensor([1.0, 0, 0, 0])).item() == -math.inf
    for k in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match=r"k must be an int >= 1, got"):
            ConditionalBernoulli(torch.zeros(4), k)
    with pytest.raises(ValueError, match=r"k must be at most the number of units.* k=5"):
        ConditionalBernoulli(torch.zeros(4), 5)


# spike and slab: two entries, gates of both kinds, slabs of every kind

LOC, SCALE = double(0.4, -0.9), double(0.7, 0.3)
GATES: dict[str, Callable[[], dist.Distribution]] = {
    "bernoulli": lambda: dist.Bernoulli(double(0.3, 0.8)).to_event(1),
    "subset": lambda: ConditionalBernoulli(double(0.2, -0.5), 1),
}
SLABS: dict[str, Callable[[], dist.Distribution]] = {
    "normal": lambda: dist.Normal(LOC, SCALE),
    "laplace": lambda: dist.Laplace(LOC, SCALE),
    "log-normal": lambda: dist.LogNormal(LOC, SCALE),
    "exponential": lambda: dist.Exponential(1 / SCALE),
}


def panels(positive: bool) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on pieces between the kinks of every slab above."""
    if positive:
        pieces = np.concatenate([[0], np.geomspace(1e-6, 1e3, 60)])
    else:
        pieces = np.concatenate(
            [np.linspace(-21.9, -0.9, 22), [0, 0.4], np.linspace(0.9, 21.9, 22)]
        )
    x, w = np.polynomial.legendre.leggauss(12)
    half = np.diff(pieces) / 2
    nodes = (pieces[:-1] + half)[:, None] + half[:, None] * x
    return torch.tensor(nodes.ravel()), torch.tensor((half[:, None] * w).ravel())


def integral(function: Callable[[Tensor], Tensor], positive: bool) -> Tensor:
    """Integral over two entries under the base measure: a point at 0 plus a line for each."""
    nodes, weights = panels(positive)
    nodes, weights = torch.cat([double(0.0), nodes]), torch.cat([double(1.0), weights])
    values = function(torch.cartesian_prod(nodes, nodes))
    return torch.cartesian_prod(weights, weights).prod(-1) @ values


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("slab", SLABS)
def test_spike_and_slab_has_mass_one(gate: str, slab: str) -> None:
    h = SpikeAndSlab(GATES[gate](), SLABS[slab]())
    with pyro.validation_enabled(False):  # k-subsets: other patterns are asked for, too
        total = integral(
            lambda value: h.log_prob(value).exp(), slab in ("log-normal", "exponential")
        )
        for i in range(2):
            mean = integral(
                lambda value, i=i: h.log_prob(value).exp() * value[:, i],
                slab in ("log-normal", "exponential"),
            )
            assert mean.item() == pytest.approx(h.mean[i].item(), abs=1e-8)
    assert total.item() == pytest.approx(1, abs=1e-8)


PAIRS = [
    ("normal", lambda: dist.Normal(double(0.1, 0.2), 1.3)),
    ("laplace", lambda: dist.Laplace(double(0.0, 0.0), 1.3)),
    ("normal", lambda: dist.Laplace(double(0.0, 0.0), 0.6)),
    ("log-normal", lambda: dist.Exponential(double(1.3, 0.4))),
    ("exponential", lambda: dist.Exponential(double(1.3, 0.4))),
    ("normal", lambda: dist.Normal(LOC, SCALE).mask(False)),
    ("laplace", lambda: dist.Normal(LOC, SCALE).mask(False)),
]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("slab", "prior"), PAIRS, ids=lambda x: x if isinstance(x, str) else "")
def test_spike_and_slab_kl(gate: str, slab: str, prior: Callable[[], dist.Distribution]) -> None:
    q = SpikeAndSlab(GATES[gate](), SLABS[slab]())
    other = {
        "bernoulli": lambda: dist.Bernoulli(logits=double(-1.0, -1.0)).to_event(1),
        "subset": lambda: ConditionalBernoulli(double(0.0, 0.0), 1),
    }[gate]()
    p = SpikeAndSlab(other, prior())

    def integrand(value: Tensor) -> Tensor:
        log_q = q.log_prob(value)
        ratio = torch.where(log_q > -700, log_q - p.log_prob(value), 0.0)
        return log_q.exp() * ratio

    with pyro.validation_enabled(False):
        expected = integral(integrand, slab in ("log-normal", "exponential"))
    assert kl_divergence(q, p).item() == pytest.approx(expected.item(), abs=1e-8)
    assert kl_divergence(q, p.expand((3,))).tolist() == pytest.approx(
        [expected.item()] * 3, abs=1e-8
    )


def test_kl_without_a_closed_form_says_so() -> None:
    gate = GATES["bernoulli"]
    q, point = SpikeAndSlab(gate(), SLABS["normal"]()), SpikeAndSlab(gate(), dist.Delta(LOC))
    flat = SpikeAndSlab(gate(), dist.Normal(LOC, 1.0).mask(False))
    heavy = SpikeAndSlab(gate(), dist.StudentT(3.0, LOC, SCALE))
    subset = SpikeAndSlab(GATES["subset"](), SLABS["normal"]())
    for first, second in ((q, heavy), (point, q), (point, flat), (flat, q), (flat, flat)):
        with pytest.raises(NotImplementedError):
            kl_divergence(first, second)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, subset)
    assert kl_divergence(subset, q).isfinite()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("slab", [*SLABS, "delta"])
def test_spike_and_slab_samples(gate: str, slab: str) -> None:
    values = dist.Delta(LOC) if slab == "delta" else SLABS[slab]()
    h = SpikeAndSlab(GATES[gate](), values)
    draws = h.sample((20_000,))
    assert h.support.check(draws).all()
    pattern = (draws != 0).double()
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2))).double()
    with pyro.validation_enabled(False):
        probabilities = h.gate.log_prob(states).exp()
    counts = torch.bincount((pattern @ double(2.0, 1.0)).long(), minlength=4)
    assert_frequencies(counts.numpy(), probabilities.numpy())
    spread = (h.variance / 20_000).sqrt()
    assert ((draws.mean(0) - h.mean).abs() <= 5.3 * spread).all()  # false alarm: 1e-7 each
    for i in range(2):
        on = draws[draws[:, i] != 0, i]
        if slab == "delta":
            assert (on == LOC[i]).all()
            continue
        marginal = SLABS[slab]()
        uniform = marginal.cdf(on.unsqueeze(-1).expand(-1, 2))[:, i]
        assert stats.kstest(uniform.numpy(), "uniform").pvalue > FALSE_ALARM


def test_draws_carry_the_gradient_of_the_slab_only() -> None:
    logits = double(0.5, -0.5).requires_grad_()
    loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()
    h = SpikeAndSlab(dist.Bernoulli(logits=logits).to_event(1), dist.Normal(loc, scale))
    draws = h.sample((200,))
    on = draws != 0
    gradients = torch.autograd.grad(draws.sum(), [loc, scale, logits], allow_unused=True)
    noise = torch.where(on, (draws - loc) / scale, 0.0)
    assert_equal(gradients[0], on.double().sum(0))
    assert_equal(gradients[1], noise.sum(0).detach())
    assert gradients[2] is None
    with torch.no_grad():
        assert not h.sample().requires_grad
    assert not h.has_rsample
    parts = h.score_parts(draws)
    assert_equal(parts.log_prob, h.log_prob(draws))
    assert_equal(parts.score_function, h.gate.log_prob(on.double()))
    assert_equal(parts.entropy_term, (on * dist.Normal(loc, scale).log_prob(draws)).sum(-1))


# Trace_ELBO's gradient, averaged exactly over gates and slab noise, against that of the exact ELBO

NOISE = 7  # Gauss-Hermite nodes an entry, exact for the quartic log-likelihood below


class Chosen(ConditionalBernoulli):
    """Gates that are drawn as told."""

    chosen: Tensor

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.chosen

    def expand(self, batch_shape: object, _instance: object = None) -> dist.Distribution:
        return self


class ChosenBernoulli(dist.Independent):
    chosen: Tensor

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.chosen

    def expand(self, batch_shape: object, _instance: object = None) -> dist.Distribution:
        return self


class ChosenNormal(dist.Normal):
    noise: Tensor

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.loc + self.scale * self.noise

    def expand(self, batch_shape: object, _instance: object = None) -> dist.Distribution:
        return self


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("gate", ["bernoulli", "subset"])
def test_pyro_gives_an_unbiased_gradient(gate: str, objective: type[pyro.infer.ELBO]) -> None:
    size, k = 3, 2
    states = (
        subsets(size, k) if gate == "subset" else torch.cat([subsets(size, j) for j in range(4)])
    )
    x, w = np.polynomial.hermite_e.hermegauss(NOISE)
    nodes = torch.cartesian_prod(*[torch.tensor(x)] * size)  # (Q, size)
    mass = torch.cartesian_prod(*[torch.tensor(w / w.sum())] * size).prod(-1)  # (Q,)
    gates = states.repeat_interleave(len(nodes), 0)  # (S Q, size)
    noise, mass = nodes.repeat(len(states), 1), mass.repeat(len(states))

    dictionary, target = torch.randn(4, size).double(), torch.randn(4).double()
    start = [torch.randn(size).double() for _ in range(3)]
    pyro.clear_param_store()

    def law(logits: Tensor) -> dist.Distribution:
        if gate == "subset":
            return ConditionalBernoulli(logits, k)
        return dist.Bernoulli(logits=logits).to_event(1)

    def likelihood(z: Tensor, bend: Tensor) -> dist.Distribution:
        return dist.Normal(z @ dictionary.T + bend * (z @ dictionary.T) ** 2, 0.8).to_event(1)

    def parameters() -> tuple[Tensor, Tensor, Tensor]:
        logits, loc, log_scale = (pyro.param(f"q{i}", t) for i, t in enumerate(start))
        return logits, loc, log_scale.exp()

    def prior() -> SpikeAndSlab:
        price = pyro.param("price", double(0.5))
        spread = pyro.param("spread", double(1.5))
        return SpikeAndSlab(
            law(-price.expand(size)), dist.Normal(torch.zeros(size).double(), spread)
        )

    logits, loc, scale = parameters()
    weight = law(logits).log_prob(gates).exp().detach() * mass
    assert weight.sum().item() == pytest.approx(1, abs=1e-12)

    def model() -> None:
        bend = pyro.param("bend", double(0.2))
        with pyro.plate("data", len(gates)), pyro.poutine.scale(scale=weight):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z, bend), obs=target.expand(len(gates), 4))

    def guide() -> None:
        logits, loc, scale = (t.expand(len(gates), size) for t in parameters())
        if gate == "subset":
            gate_law = Chosen(logits, k)
        else:
            gate_law = ChosenBernoulli(dist.Bernoulli(logits=logits), 1)
        slab = ChosenNormal(loc, scale)
        gate_law.chosen, slab.noise = gates, noise
        with pyro.plate("data", len(gates)), pyro.poutine.scale(scale=weight):
            pyro.sample("z", SpikeAndSlab(gate_law, slab))

    loss = objective().loss_and_grads(model, guide)
    store = pyro.get_param_store()
    found = {name: p.grad.clone() for name, p in store.named_parameters()}

    # the same by hand: E_q [log p(x|z) + log p(z) - log q(z)], every expectation differentiated
    logits, loc, scale = parameters()
    value = gates * (loc + scale * noise)
    log_gate, law_slab = law(logits).log_prob(gates), torch.distributions.Normal(loc, scale)
    slab_prior = torch.distributions.Normal(0.0, pyro.param("spread"))
    log_ratio = slab_prior.log_prob(value) - law_slab.log_prob(value)
    each = (
        likelihood(value, pyro.param("bend")).log_prob(target)
        + law(-pyro.param("price").expand(size)).log_prob(gates)
        - log_gate
        + (gates * log_ratio).sum(-1)
    )
    elbo = (log_gate.exp() * mass * each).sum()
    assert loss == pytest.approx(-elbo.item(), abs=1e-9)
    names = [name for name, _ in store.named_parameters()]
    exact = torch.autograd.grad(-elbo, [p for _, p in store.named_parameters()])
    assert set(names) == {"q0", "q1", "q2", "bend", "price", "spread"}
    for name, gradient in zip(names, exact, strict=True):
        assert_equal(found[name], gradient, 1e-9)
        if (gate, name) != ("subset", "price"):  # equal prices of a k-subset change nothing
            assert (gradient.abs() > 1e-3).all(), name


def test_log_prob_does_not_touch_the_slab_at_zero() -> None:
    # LogNormal has log-density -inf at 0, and NaN gradients
    loc = LOC.clone().requires_grad_()
    h = SpikeAndSlab(GATES["bernoulli"](), dist.LogNormal(loc, SCALE))
    value = double(0.0, 2.0).requires_grad_()
    log_prob = h.log_prob(value)
    expected = h.gate.log_prob(double(0.0, 1.0)) + dist.LogNormal(LOC[1], SCALE[1]).log_prob(
        value[1]
    )
    assert_equal(log_prob, expected)
    gradients = torch.autograd.grad(log_prob, [loc, value])
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0][0] == gradients[1][0] == 0


def test_spike_and_slab_shapes_support_and_errors() -> None:
    gate, slab = GATES["bernoulli"](), SLABS["normal"]()
    wide = SpikeAndSlab(gate, dist.Normal(torch.zeros(5, 1, 2).double(), 1.0))
    assert (wide.batch_shape, wide.event_shape) == ((5, 1), (2,))
    assert wide.expand((5, 4)).sample((3,)).shape == (3, 5, 4, 2)
    assert wide.expand((5, 4)).log_prob(torch.zeros(2).double()).shape == (5, 4)
    assert wide.score_parts(torch.zeros(2).double()).entropy_term.shape == (5, 1)
    draws = SpikeAndSlab(gate, slab).expand((50,)).sample()
    assert len(draws.unique(dim=0)) > 10  # expanded draws are independent
    positive = SpikeAndSlab(GATES["subset"](), SLABS["exponential"]())
    values = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, -1.0], [0.0, 0.0], [1.0, 1.0]]).double()
    assert positive.support.check(values).tolist() == [True, True, False, False, False]
    assert not positive.support.is_discrete
    with pyro.validation_enabled(), pytest.raises(ValueError, match="support"):
        positive.log_prob(values)
    bits = dist.Bernoulli(double(0.3, 0.8))
    for bad in (bits, slab, slab.to_event(1), None, 0.5):
        with pytest.raises(ValueError, match=r"gate must be a distribution over \{0, 1\}\^K"):
            SpikeAndSlab(bad, slab)
    for bad in (slab.to_event(1), dist.Normal(double(0.0), 1.0), dist.Normal(0.0, 1.0), None):
        with pytest.raises(ValueError, match=r"slab must be a distribution of batch shape"):
            SpikeAndSlab(gate, bad)
    with pytest.raises(ValueError, match=r"slab must have a reparameterised sampler"):
        SpikeAndSlab(gate, dist.Poisson(double(1.0, 1.0)))


# T9: the divergences between the slabs that torch registers

LAPLACE_PAIRS = [(0.7, 0.4, 1.3), (-2.0, 1.5, 0.5), (0.0, 0.3, 2.0), (5.0, 0.05, 1.0)]


@pytest.mark.parametrize(("loc", "scale", "rate"), LAPLACE_PAIRS)
@pytest.mark.parametrize("family", ["laplace", "normal"])
def test_kl_to_a_laplace_prior(family: str, loc: float, scale: float, rate: float) -> None:
    law = stats.laplace(loc, scale) if family == "laplace" else stats.norm(loc, scale)
    prior = stats.laplace(0, 1 / rate)
    ends = sorted({0.0, loc, loc - 45 * scale, loc + 45 * scale})
    expected = sum(
        integrate.quad(
            lambda z: law.pdf(z) * (law.logpdf(z) - prior.logpdf(z)), a, b, epsabs=1e-11, limit=400
        )[0]
        for a, b in itertools.pairwise(ends)
    )
    p = LaplacePrior(1, rate).double()()
    base = dist.Laplace if family == "laplace" else dist.Normal
    q = base(double(loc), double(scale)).to_event(1)
    kl = kl_divergence(q, p).item()
    assert kl == pytest.approx(expected, abs=1e-8)
    size = abs(loc)
    if family == "laplace":
        formula = -math.log(rate * scale) + rate * size + rate * scale * math.exp(-size / scale) - 1
    else:
        spread = scale * math.sqrt(2 / math.pi) * math.exp(-(loc**2) / (2 * scale**2))
        spread += loc * (1 - 2 * stats.norm.cdf(-loc / scale))
        formula = -0.5 * math.log(2 * math.pi * math.e * scale**2) + math.log(2 / rate)
        formula += rate * spread
    assert kl == pytest.approx(formula, abs=1e-12)
    assert isinstance(q, Independent)


@pytest.mark.parametrize("loc", [0.0, 0.3, -2.0])
def test_narrow_laplace_code_pays_the_l1_penalty_and_a_constant(loc: float) -> None:
    rate, scale = 1.7, 1e-9
    q = dist.Laplace(double(loc), double(scale)).to_event(1)
    kl = kl_divergence(q, LaplacePrior(1, rate).double()()).item()
    assert kl == pytest.approx(rate * abs(loc) - math.log(rate * scale) - 1, abs=1e-8)


# T10: what the priors imply, by trying every support


def orthonormal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def most_probable(
    x: Tensor, dictionary: Tensor, sigma: float, prior: dist.Distribution, codes: Tensor
) -> Tensor:
    """The code of largest log p(x, h) among candidates (C, K)."""
    likelihood = dist.Normal(codes @ dictionary.T, sigma).to_event(1)
    with pyro.validation_enabled(False):
        joint = likelihood.log_prob(x) + prior.log_prob(codes)
    return codes[joint.argmax()]


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_are_the_most_probable_codes(seed: int) -> None:
    torch.manual_seed(seed)
    size, sigma, rate = 6, 0.6, 1.4
    dictionary, x = orthonormal(size), torch.randn(size, dtype=torch.float64)
    z = x @ dictionary
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size))).double()

    l0 = SpikeAndSlabPrior(size, rate, slab_scale=None).double()()
    probability = 1 / (1 + math.exp(rate))
    threshold = sigma * math.sqrt(2 * math.log((1 - probability) / probability))
    best = most_probable(x, dictionary, sigma, l0, states * z)
    assert torch.equal(best, hard_threshold(z, threshold))
    assert threshold == pytest.approx(sigma * math.sqrt(2 * rate), rel=1e-12)

    for k in range(1, size + 1):
        prior = SubsetPrior(size, k, slab_scale=None).double()()
        assert torch.equal(most_probable(x, dictionary, sigma, prior, states * z), top_k(z, k))
        positive = states[states.sum(-1) == k] * z.clamp(min=torch.finfo(z.dtype).tiny)
        best = most_probable(x, dictionary, sigma, prior, positive)
        found = top_k(z, k, positive=True)
        if (z > 0).sum() >= k:
            assert torch.equal(best, found)
        else:  # entries that are set to zero tie
            assert torch.equal(best.clamp(min=1e-9), found.clamp(min=1e-9))

    # L1: a minimum has a sign pattern, and within it one stationary point
    signs = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=size))).double()
    codes = signs.abs() * (z - signs * rate * sigma**2)
    codes = codes[(codes * signs >= 0).all(-1)]
    l1 = LaplacePrior(size, rate).double()()
    best = most_probable(x, dictionary, sigma, l1, codes)
    assert torch.equal(best, soft_threshold(z, rate * sigma**2))


def test_thresholds_of_tensors_and_errors() -> None:
    z = torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
    t = torch.tensor([1.0, 0.1, 0.6, 5.0])
    assert soft_threshold(z, t).tolist() == [[-1.0, pytest.approx(-0.4), 0.0, 0.0]]
    assert hard_threshold(z, t).tolist() == [[-2.0, -0.5, 0.0, 0.0]]
    code = top_k(z, 3, positive=True)
    assert (code != 0).sum() == 3
    assert (code >= 0).all()
    assert code.clamp(min=1e-9).tolist()[0][2:] == [0.5, 2.0]
    for k in (0, 1.0, None):
        with pytest.raises(ValueError, match=r"k must be an int >= 1, got"):
            top_k(z, k)
    with pytest.raises(ValueError, match=r"k must be at most the number of entries, 4, got 5"):
        top_k(z, 5)


@pytest.mark.parametrize("positive", [False, True])
def test_top_k_keeps_k_active_even_where_all_is_zero(positive: bool) -> None:
    z = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert ((top_k(z, 2, positive) != 0).sum(1) == 2).all()


def test_a_top_k_pair_survives_data_that_give_it_nothing() -> None:
    pair = probae.SparseAutoencoder(8, 4, prior="subset", num_active=2)
    x = torch.cat([torch.zeros(5, 8), torch.rand(20, 8)])
    run = probae.fit(pair, x, epochs=1, progress=False)
    assert run.history["loss"][0] < 1e6
