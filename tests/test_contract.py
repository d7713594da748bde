"""One contract over every preset: shapes, sites, kind, training, saving, determinism."""

import copy
import itertools

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import Distribution

import probae
import probae.cli
from probae import Autoencoder
from probae.distributions import is_flat, is_point

from .conftest import CASES, IMAGE, LEVELS, VECTOR, Case, N, Z

K = 4


def test_the_table_covers_every_likelihood_prior_and_network() -> None:
    names = " ".join(case.name for case in CASES)
    for word in (*probae.LIKELIHOODS, "flat", "normal", "laplace", "mixture", "vamp", "flow"):
        assert word in names
    presets = {type(case.pair()).__name__ for case in CASES}
    assert presets >= {model.preset.__name__ for model in probae.cli.MODELS.values()}
    modules = {type(m) for case in CASES for m in case.pair().modules()}
    assert {probae.MLP, probae.ConvNet, probae.DeconvNet} <= modules


def test_parts_return_distributions_of_the_stated_shapes(case: Case, dtype: torch.dtype) -> None:
    pair, x = case.pair(dtype), case.x(dtype)
    assert (pair.x_shape, pair.z_shape, pair.dtype) == (case.x_shape, (Z,), dtype)
    prior = pair.prior()
    check(prior, (), (Z,), dtype)
    seen = seen_by_encoder(pair, x)
    for batch in ((N,), (K, N)):
        inputs = x.expand(*batch, *case.x_shape)
        encoder = pair.encoder(seen.expand(*batch, *seen.shape[1:]))
        check(encoder, batch, (Z,), dtype)
        decoder = pair.decoder(encoder.sample())
        check(decoder, batch, case.x_shape, dtype)
        assert decoder.log_prob(inputs).shape == batch
        assert prior.log_prob(encoder.sample()).shape in (batch, ())  # () where masked out: flat
    if pair.corruption is not None:
        check(pair.corruption(x), (N,), tuple(seen.shape[1:]), dtype)
    if pair.factor is not None:
        factor = pair.factor(x, pair.encoder(seen).sample())
        assert (factor.batch_shape, factor.event_shape) == ((N,), (0,))


def seen_by_encoder(pair: Autoencoder, x: Tensor) -> Tensor:
    """What the encoder sees of x: a corrupted copy where the pair has a corruption."""
    return x if pair.corruption is None else pair.corruption(x).sample().to(x)


def check(
    distribution: Distribution, batch: tuple[int, ...], event: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert isinstance(distribution, Distribution)
    assert (distribution.batch_shape, distribution.event_shape) == (batch, event)
    value = distribution.sample()
    assert value.shape == batch + event
    if not distribution.support.is_discrete:
        assert value.dtype == dtype


def test_leading_batch_dimensions_are_independent(case: Case) -> None:
    # one wrong flattening of (K, N) would mix data up and keep every shape
    pair = case.pair(torch.float64)
    x = torch.stack([case.x(torch.float64), case.x(torch.float64).flip(0)])  # (2, N, ...)
    seen = torch.stack([seen_by_encoder(pair, x[k]) for k in range(2)])
    z = pair.encoder(seen).sample()

    def densities(seen: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        encoder = pair.encoder(seen)
        # a point that is computed twice may differ in its last digit, where its density is 0
        code = encoder.mean if is_point(encoder) else encoder.log_prob(z)
        return code, pair.decoder(z).log_prob(x)

    whole = densities(seen, z, x)
    for k in range(2):
        alone = densities(seen[k], z[k], x[k])
        torch.testing.assert_close(whole[0][k], alone[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(whole[1][k], alone[1], rtol=1e-10, atol=1e-10)


def test_sites_stand_in_one_plate(case: Case) -> None:
    pair, x = case.pair(), case.x()
    guide = poutine.trace(pair.guide).get_trace(x)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    corrupted = {"x_tilde"} if pair.corruption is not None else set()
    factor = {"factor"} if pair.factor is not None else set()
    assert sample_sites(guide) == {"z"} | corrupted
    assert sample_sites(model) == {"z", "x"} | corrupted | factor
    assert model.nodes["x"]["is_observed"]
    assert model.nodes["x"]["value"] is x
    for trace in (guide, model):
        for name in sample_sites(trace):
            site = trace.nodes[name]
            (plate,) = site["cond_indep_stack"]
            assert (plate.name, plate.dim, plate.size) == ("data", -1, N)
            event = {"z": (Z,), "x": case.x_shape, "factor": (0,)}.get(name)
            if event is None:  # x_tilde
                event = seen_by_encoder(pair, x).shape[1:]
            assert (site["fn"].batch_shape, site["fn"].event_shape) == ((N,), event)


def sample_sites(trace: poutine.Trace) -> set[str]:
    return {
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }


def test_kind_is_derived_from_the_parts(case: Case) -> None:
    pair = case.pair()
    assert pair.kind is case.kind
    assert isinstance(pair.kind.statement, str)
    certifies = (probae.Kind.ELBO, probae.Kind.DISCRETE_POINT)
    assert pair.kind.is_lower_bound == (case.kind in certifies)


def pyro_objectives(case: Case) -> list[pyro.infer.ELBO]:
    objectives = [Trace_ELBO(), probae.ELBO()]
    if case.reparameterised:
        objectives.append(TraceMeanField_ELBO())
    else:
        objectives.append(TraceGraph_ELBO())
    return objectives


def test_trains_under_raw_svi(case: Case, dtype: torch.dtype) -> None:
    x = case.x(dtype)
    for objective in pyro_objectives(case):
        pyro.clear_param_store()
        pair = case.pair(dtype)
        before = copy.deepcopy(pair.state_dict())
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), objective)
        losses = [svi.step(x) for _ in range(3)]
        assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)
        assert_moved(case, pair, before)
        stored = [p for _, p in pyro.get_param_store().named_parameters()]
        assert {id(p) for p in stored} == {id(p) for p in pair.parameters()}
        assert len(stored) == len(list(pair.parameters()))  # each under one name


def test_trains_under_fit(case: Case, dtype: torch.dtype) -> None:
    pair, x = case.pair(dtype), case.x(dtype, n=20)
    before = copy.deepcopy(pair.state_dict())
    run = probae.fit(pair, x, epochs=3, batch_size=8, lr=1e-2, progress=False)
    assert_moved(case, pair, before)
    assert pair.dtype == dtype
    assert run.kind is case.kind
    assert run.kl_method["z"] == case.kl
    assert run.bound_on == "log p(x)" or not case.kind.is_lower_bound
    for name, column in run.history.items():
        assert torch.tensor(column).isfinite().all(), name
    assert len(pyro.get_param_store()) == 0


def assert_moved(case: Case, pair: Autoencoder, before: dict[str, Tensor]) -> None:
    assert set(case.still) <= {name for name, _ in pair.named_parameters()}
    for name, parameter in pair.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, before[name]) == (name in case.still), name


def test_every_parameter_has_a_finite_gradient(case: Case, dtype: torch.dtype) -> None:
    pair, x = case.pair(dtype), case.x(dtype)
    for objective in (Trace_ELBO(), probae.ELBO()):
        pair.zero_grad(set_to_none=True)
        objective.differentiable_loss(pair.model, pair.guide, x).backward()
        for name, parameter in pair.named_parameters():
            if name in case.still:
                assert parameter.grad is None or not parameter.grad.any(), name
                continue
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == dtype
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_a_copy_and_a_second_instance_train_apart(case: Case) -> None:
    # weight decay moves whatever an optimizer was given, even where the gradient is zero
    first, x = case.pair(), case.x()
    pairs = [first, copy.deepcopy(first), case.pair()]
    adam = [pyro.optim.Adam({"lr": 1e-2, "weight_decay": 0.1}) for _ in pairs]
    svis = [SVI(p.model, p.guide, a, Trace_ELBO()) for p, a in zip(pairs, adam, strict=True)]
    for i in (0, 1, 2, 1, 0):
        before = [copy.deepcopy(pair.state_dict()) for pair in pairs]
        svis[i].step(x)
        for j, pair in enumerate(pairs):
            same = {n: torch.equal(t, before[j][n]) for n, t in pair.named_parameters()}
            assert i == j or all(same.values()), (i, j)
            assert i != j or {n for n in same if same[n]} <= set(case.still), (i, j)


def test_after_a_part_was_replaced_the_new_one_trains_and_the_old_one_rests() -> None:
    pair, x = probae.VAE(VECTOR, Z, hidden=(6,)), torch.rand(N, *VECTOR).round()
    adam = pyro.optim.Adam({"lr": 1e-2, "weight_decay": 0.1})
    svi = SVI(pair.model, pair.guide, adam, Trace_ELBO())
    svi.step(x)
    old = pair.encoder
    pair.encoder = probae.GaussianEncoder(probae.MLP(VECTOR, (2, Z), (5,)))
    before = copy.deepcopy((old.state_dict(), pair.state_dict()))
    svi.step(x)
    assert all(torch.equal(t, before[0][n]) for n, t in old.named_parameters())
    assert not any(torch.equal(t, before[1][n]) for n, t in pair.named_parameters())


class Noisy(nn.Module):
    """A network with a mode: it draws from the random stream while it trains."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.linear = nn.Linear(*widths)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_fit_leaves_the_world_as_it_was(valid: bool, fails: bool) -> None:
    pair = Autoencoder(
        probae.StandardNormalPrior(Z),
        probae.GaussianEncoder(nn.Sequential(Noisy(9, 2 * Z), nn.Unflatten(-1, (2, Z)))),
        probae.BernoulliDecoder(Noisy(Z, 9)),
    )
    pair.eval()
    pair.encoder.train()
    modes = {name: module.training for name, module in pair.named_modules()}
    x = torch.rand(N, 9).round()
    mine = pyro.param("mine", torch.tensor([1.0, 2.0]))
    other = probae.VAE(9, 2)
    SVI(other.model, other.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(x)
    stored = {name: p.clone() for name, p in pyro.get_param_store().named_parameters()}
    stream = torch.get_rng_state()
    with pyro.validation_enabled(valid):
        settings = validation_settings()
        if fails:
            with pytest.raises(FloatingPointError):
                probae.fit(pair, x, x, epochs=2, lr=1e38, progress=False)
        else:
            probae.fit(pair, x, x, epochs=2, progress=False)
        assert validation_settings() == settings
    assert torch.equal(torch.get_rng_state(), stream)
    assert {name: module.training for name, module in pair.named_modules()} == modes
    store = dict(pyro.get_param_store().named_parameters())
    assert store.keys() == stored.keys()
    assert all(torch.equal(store[name], stored[name]) for name in stored)
    assert pyro.param("mine") is mine or torch.equal(pyro.param("mine"), mine)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def validation_settings() -> tuple[bool, ...]:
    return (
        pyro.infer.util.is_validation_enabled(),
        pyro.poutine.util.is_validation_enabled(),
        Distribution._validate_args,
    )


def test_fit_is_deterministic_under_a_seed(case: Case) -> None:
    first, x = case.pair(), case.x(n=20)
    pairs = [copy.deepcopy(first) for _ in range(3)]
    runs = []
    for pair, seed in zip(pairs, (5, 5, 6), strict=True):
        torch.rand(3)  # the global stream does not matter
        runs.append(probae.fit(pair, x, epochs=2, batch_size=8, seed=seed, progress=False))
    states = [pair.state_dict() for pair in pairs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    histories = [{k: v for k, v in run.history.items() if k != "seconds"} for run in runs]
    assert histories[0] == histories[1]
    assert histories[0]["loss"] != histories[2]["loss"]
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_evaluation_runs_on_every_pair(case: Case, dtype: torch.dtype) -> None:
    pair, x = case.pair(dtype), case.x(dtype)
    before = copy.deepcopy(pair.state_dict())
    shape = (N, *case.x_shape)
    reconstruction = probae.reconstruct(pair, x)
    assert reconstruction.sample().shape == shape
    assert reconstruction.log_prob(x).isfinite().all()
    assert 0 <= probae.active_units(pair, x) <= Z
    if is_flat(pair.prior()):
        with pytest.raises(ValueError, match="flat prior"):
            probae.sample(pair, N)
        with pytest.raises(ValueError, match=f"{case.kind.value}.*prior is flat"):
            probae.log_likelihood(pair, x)
    else:
        drawn = probae.sample(pair, N, seed=0)
        assert (drawn.x.shape, drawn.x.dtype) == (shape, dtype)
        assert drawn.z.shape == (N, Z)
        pair.check_input(drawn.x)
        assert pair.decoder(drawn.z).log_prob(drawn.x).isfinite().all()
    if case.kind is probae.Kind.ELBO:
        ll = probae.log_likelihood(pair, x, "iwae", num_samples=3)
        assert ll.values.shape == (N,)
        assert ll.values.isfinite().all()
    after = pair.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_starting_values_from_data_keep_every_pair_finite(case: Case, dtype: torch.dtype) -> None:
    pair = case.pair(dtype)
    for n in (1, 20):
        pair.initialize(case.x(dtype, n))
        for name, tensor in itertools.chain(pair.named_parameters(), pair.named_buffers()):
            assert tensor.isfinite().all(), name
            assert tensor.dtype == dtype or not tensor.is_floating_point()
    run = probae.fit(pair, case.x(dtype), epochs=1, progress=False)
    assert torch.tensor(run.history["loss"]).isfinite().all()


def test_levels_and_image_sizes_of_the_table_are_distinct() -> None:
    # equal sizes would let a transposition pass the tests above
    assert len({N, K, Z, 2, LEVELS, *VECTOR, IMAGE[2]}) == 7
