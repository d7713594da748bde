"""The pair itself: its parameters under Pyro, its input checks, and the state it leaves alone."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import probae
from probae import Autoencoder
from probae.autoencoder import frozen, local_parameters


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def svi(model: object, guide: object) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())


def moved(pair: nn.Module, step: object, x: Tensor) -> set[str]:
    """Names of the parameters that one step changed."""
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    step(x)
    return {name for name, p in pair.named_parameters() if not torch.equal(p, before[name])}


def names(pair: nn.Module) -> set[str]:
    return {name for name, _ in pair.named_parameters()}


def test_plain_methods_train_nothing_and_ours_train_everything() -> None:
    pair, x = probae.VAE(6, 2, hidden=(5,)), torch.ones(8, 6)

    class Plain:
        """The textbook pair without a word to Pyro about its parameters."""

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", pair.prior())
                pyro.sample("x", pair.decoder(z), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", pair.encoder(x))

    plain = Plain()
    assert moved(pair, svi(plain.model, plain.guide).step, x) == set()
    assert moved(pair, svi(pair.model, pair.guide).step, x) == names(pair)


def test_two_instances_of_one_class_train_side_by_side() -> None:
    first, second = probae.VAE(6, 2, hidden=(5,)), probae.VAE(6, 2, hidden=(5,))
    x = torch.ones(8, 6)
    steps = [svi(pair.model, pair.guide).step for pair in (first, second)]
    for _ in range(2):
        state = {name: p.detach().clone() for name, p in second.named_parameters()}
        assert moved(first, steps[0], x) == names(first)
        assert all(torch.equal(p, state[name]) for name, p in second.named_parameters())
        assert moved(second, steps[1], x) == names(second)
    assert len(pyro.get_param_store()) == len(names(first)) + len(names(second))


def test_a_copy_trains_apart_from_its_original() -> None:
    pair, x = probae.VAE(6, 2, hidden=(5,)), torch.ones(8, 6)
    step = svi(pair.model, pair.guide).step
    step(x)
    twin = copy.deepcopy(pair)
    twin_step = svi(twin.model, twin.guide).step
    for _ in range(2):
        assert moved(twin, twin_step, x) == names(twin)
        assert moved(pair, step, x) == names(pair)


def test_a_replaced_part_is_trained() -> None:
    pair, x = probae.VAE(6, 2, hidden=(5,)), torch.ones(8, 6)
    svi(pair.model, pair.guide).step(x)
    pair.decoder = probae.BernoulliDecoder(probae.MLP(2, 6, (5,)))
    assert moved(pair, svi(pair.model, pair.guide).step, x) == names(pair)


def test_frozen_parameters_stay() -> None:
    pair, x = probae.VAE(6, 2, hidden=(5,)), torch.ones(8, 6)
    pair.decoder.requires_grad_(False)
    assert moved(pair, svi(pair.model, pair.guide).step, x) == {
        name for name in names(pair) if name.startswith("encoder")
    }


def test_evaluation_leaves_the_param_store_the_modes_and_the_stream_alone() -> None:
    pair, x = probae.VAE(6, 2, hidden=(5,)), torch.ones(8, 6)
    pair.encoder.eval()
    state = torch.get_rng_state()
    probae.log_likelihood(pair, x, num_samples=10)
    probae.reconstruct(pair, x)
    probae.active_units(pair, x)
    assert pair.kind is probae.Kind.ELBO
    assert len(pyro.get_param_store()) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.decoder.training
    assert not pair.encoder.training


def test_frozen_puts_modes_back_after_an_error() -> None:
    pair = probae.VAE(6, 2)
    with pytest.raises(ZeroDivisionError), frozen(pair, seed=0):
        1 / pair.training  # False inside
    assert pair.training


def test_import_changes_no_setting_of_torch_or_pyro() -> None:
    program = """
import torch, pyro
def settings():
    return (
        torch.distributions.Distribution._validate_args, pyro.settings.get(),
        torch.get_default_dtype(), torch.get_float32_matmul_precision(),
        torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
        torch.get_rng_state().sum().item(),
    )
torch.manual_seed(0)
before = settings()
import probae
from probae import Autoencoder
assert settings() == before, (before, settings())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.parametrize("prefix", ["model", "guide"])
def test_programs_name_the_shape_they_expect(prefix: str) -> None:
    pair = probae.VAE((1, 4, 4), 2)
    program = getattr(pair, prefix)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 1, 4, 4\), got \(3, 16\).*resh"):
        program(torch.ones(3, 16))
    with pytest.raises(ValueError, match="unsqueeze"):
        program(torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match=r"floating dtype, got torch.int64"):
        program(torch.ones(3, 1, 4, 4, dtype=torch.int64))


def test_pyro_samplers_run_on_the_model() -> None:
    pair = probae.PPCA(5, 2).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    torch.manual_seed(0)
    with local_parameters():
        mcmc = pyro.infer.MCMC(
            pyro.infer.NUTS(pair.model, jit_compile=False),
            num_samples=300,
            warmup_steps=100,
            disable_progbar=True,
        )
        mcmc.run(x)
    draws = mcmc.get_samples()["z"].reshape(-1, 2)
    posterior = pair.encoder(x)
    error = (draws.mean(0) - posterior.mean[0]).abs() / posterior.variance[0].sqrt()
    assert (error < 0.5).all()


@pytest.mark.parametrize(
    ("build", "part", "other"),
    [
        (lambda: probae.ContractiveAutoencoder(6, 3, tied=False), "encoder", "factor"),
        (lambda: probae.PredictiveSparseDecomposition(6, 3), "decoder", "encoder"),
        (lambda: probae.PPCA(6, 3), "decoder", "encoder"),
    ],
)
def test_a_part_that_others_use_is_not_replaced_alone(
    build: Callable[[], Autoencoder], part: str, other: str
) -> None:
    pair, fresh = build(), build()
    copy.deepcopy(pair).kind  # noqa: B018
    setattr(pair, part, getattr(fresh, part))
    with pytest.raises(ValueError, match="shared parameters when the pair was built"):
        pair.kind  # noqa: B018
    with pytest.raises(ValueError, match="shared parameters when the pair was built"):
        probae.fit(pair, torch.randn(10, 6), epochs=1, progress=False)
    setattr(pair, other, getattr(fresh, other))
    if not isinstance(pair, probae.PredictiveSparseDecomposition):
        assert pair.kind is fresh.kind
