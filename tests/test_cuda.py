"""Everything on a GPU: the refusals of the CPU, and its numbers where nothing is drawn.

What is drawn has other random numbers there: its shape, its place and its seed are checked.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils.data import Dataset, TensorDataset

import probae
import probae.cli
from probae import Autoencoder, compiling, cuda_graphs, training
from probae.compiling import CompiledStep
from probae.graphs import CannotCompile

from .conftest import Case, Z

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="needs a GPU: torch.cuda.is_available() is False here",
)
CAPTURES = DEVICE == "cuda"
X = 8
fit = partial(probae.fit, progress=False)
SHORT = probae.Annealing(3, num_leapfrogs=1, num_pilot=2)


def bits(n: int = 40) -> Tensor:
    torch.manual_seed(7)
    return torch.rand(n, X).round()


def vae(**keywords: Any) -> Autoencoder:
    torch.manual_seed(0)
    return probae.VAE(X, Z, **{"hidden": (5,), **keywords}).to(DEVICE)


def stream() -> Tensor:
    """Return where the random stream of the device is."""
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


# every function on every preset


def encoder_input(pair: Autoencoder, x: Tensor) -> Tensor:
    return x if pair.corruption is None else pair.corruption(x).sample().to(x)


def codes(pair: Autoencoder, count: int) -> Tensor:
    return torch.linspace(0.1, 0.9, count * Z, dtype=torch.float64).reshape(count, Z)


def traced(pair: Autoencoder, x: Tensor) -> list[Tensor]:
    trace = poutine.trace(pair.guide).get_trace(x.to(pair.device))
    model = poutine.trace(poutine.replay(pair.model, trace=trace)).get_trace(x.to(pair.device))
    return [model.nodes["z"]["value"], model.nodes["x"]["fn"].sample()]


def data_dependent(pair: Autoencoder, x: Tensor) -> list[Tensor]:
    pair.initialize(x)
    return [*pair.state_dict().values()]


def to_arviz(pair: Autoencoder, x: Tensor) -> list[str]:
    result = probae.to_arviz(pair, x, num_samples=3, num_prior_samples=2)
    return sorted(result.groups() if callable(result.groups) else result.children)


def denoised(pair: Autoencoder, x: Tensor) -> Distribution:
    noise = None if pair.corruption is not None else probae.GaussianNoise(0.3)
    return probae.denoise(pair, x, noise, num_samples=3)


Function = Callable[[Autoencoder, Tensor], Any]
EXACT: dict[str, Function] = {  # nothing is drawn, so that numbers are those of the CPU
    "exact": lambda pair, x: probae.log_likelihood(pair, x, "exact"),
    "score": probae.score,
    "tangent_basis": lambda pair, x: probae.tangent_basis(pair, x).spectrum,
    "intrinsic_dimension": probae.intrinsic_dimension,
    "pullback_metric": lambda pair, x: probae.pullback_metric(pair, codes(pair, 2)),
    "geodesic": lambda pair, x: (
        probae.geodesic(pair, *codes(pair, 2), num_points=4, max_iterations=3).length
    ),
    "interpolate": lambda pair, x: probae.interpolate(pair, *codes(pair, 2), 3).z,
    "kind": lambda pair, x: str(pair.kind),
    "trace_shapes": lambda pair, x: probae.trace_shapes(pair, x),
    "to_arviz": to_arviz,
    "render": lambda pair, x: probae.render(pair, text=True).replace(f" on {pair.device}", ""),
}
DRAWN: dict[str, Function] = {
    "model and guide": traced,
    "elbo": lambda pair, x: probae.log_likelihood(pair, x, "elbo", 3),
    "iwae": lambda pair, x: probae.log_likelihood(pair, x, "iwae", 7),
    "ais": lambda pair, x: probae.log_likelihood(pair, x, "ais", 2, annealing=SHORT),
    "bdmc": lambda pair, x: probae.bdmc(pair, 3, 2, annealing=SHORT),
    "sample": lambda pair, x: probae.sample(pair, 3, seed=0),
    "reconstruct": probae.reconstruct,
    "denoise": denoised,
    "gsn_chain": lambda pair, x: probae.gsn_chain(pair, x, 2),
    "langevin": lambda pair, x: probae.langevin(pair, x, 2, 0.01),
    "metropolis": lambda pair, x: probae.langevin(pair, x, 2, 0.01, metropolis=True),
    "annealed_denoising": lambda pair, x: probae.annealed_denoising(pair, x, num_steps=2),
    "traverse": lambda pair, x: probae.traverse(pair, num_steps=2).z,
    "calibration": lambda pair, x: probae.simulation_based_calibration(pair, 20, 3),
    "coverage": lambda pair, x: probae.expected_coverage(pair, 20, 3),
    "initialize": data_dependent,
}


def flat(result: Any) -> list[Any]:
    """Return the tensors and plain values of a result in one list."""
    if isinstance(result, Distribution):
        return [result.sample()]
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in flat(part)]
    return [result]


def outcome(function: Function, pair: Autoencoder, x: Tensor) -> Any:
    """Return what a function gives, or how it refuses, as a string."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", probae.LikelihoodWarning)
            return function(pair, x)
    except (ValueError, NotImplementedError) as error:
        return Refusal(f"{type(error).__name__}: {error}".replace(str(pair.device), "cpu"))


class Refusal(str):
    """The message of an error."""


@pytest.mark.parametrize("name", [*EXACT, *DRAWN])
def test_every_function_of_every_preset(case: Case, name: str) -> None:
    function = {**EXACT, **DRAWN}[name]
    x = case.x(torch.float64)
    expected = outcome(function, case.pair(torch.float64), x)
    pair = case.pair(torch.float64).to(DEVICE)
    here, there = stream(), torch.get_rng_state()
    found = outcome(function, pair, x)
    if name not in ("model and guide", "initialize"):
        assert torch.equal(stream(), here)
        assert torch.equal(torch.get_rng_state(), there)
    assert isinstance(found, Refusal) == isinstance(expected, Refusal), (found, expected)
    if isinstance(expected, Refusal):
        assert found == expected
        return
    errors = found.std_error if name == "iwae" else None
    ess, found = getattr(found, "ess", None), flat(found)
    for value, reference in zip(found, flat(expected), strict=True):
        if not isinstance(reference, Tensor):
            assert name in DRAWN or value == reference
            continue
        assert (value.shape, value.dtype) == (reference.shape, reference.dtype)
        if name in EXACT:
            torch.testing.assert_close(value.cpu(), reference, rtol=1e-6, atol=1e-8)
        elif value is errors:  # it cannot be told where fewer than two importance samples count
            assert (value >= 0).all()
            assert torch.equal(value.isinf(), ess < 2)
        elif reference.isfinite().all():
            assert value.isfinite().all()
    if name in ("sample", "model and guide", "pullback_metric", "tangent_basis", "elbo"):
        assert found[0].device == pair.device


def test_every_preset_trains(case: Case) -> None:
    # the optimizer's update of a loss and gradients without noise is that of the CPU
    x = case.x(n=10)
    pair = case.pair().to(DEVICE)
    here, there = stream(), torch.get_rng_state()
    run = fit(pair, x, x[:4], epochs=2, batch_size=4, lr=0.01)
    assert torch.equal(stream(), here)
    assert torch.equal(torch.get_rng_state(), there)
    assert all(np.isfinite(run.history["loss"]))
    assert {p.device.type for p in pair.parameters()} == {torch.device(DEVICE).type}
    for (name, p), q in zip(pair.named_parameters(), case.pair().parameters(), strict=True):
        assert name in case.still or not torch.equal(p.cpu(), q), name


ITERATIVE = ("sparse-laplace-sparse-coding", "psd", "psd-started-only-3d")
WAITS = ("ppca-exact", "ppca-exact-3d")  # for what a Cholesky factorisation reports


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[CompiledStep]:
    """Return the compiled steps that a test makes."""
    made: list[CompiledStep] = []

    class Noted(CompiledStep):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            made.append(self)

    monkeypatch.setattr(training, "CompiledStep", Noted)
    return made


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run recorded graphs operation by operation, which takes no compiler."""
    monkeypatch.setattr(compiling, "machine_code", lambda graph, inputs: graph)


@pytest.mark.usefixtures("interpreted")
def test_every_preset_is_captured(case: Case, steps: list[CompiledStep]) -> None:
    x = case.x(torch.float64, n=10)
    pairs = [case.pair(torch.float64).to(DEVICE) for _ in range(2)]
    train = partial(fit, epochs=2, batch_size=4, lr=1e-3)
    expected = train(pairs[0], x, compile=False)
    if case.name in ITERATIVE:
        with pytest.raises(CannotCompile, match="branches on the value"):
            train(pairs[1], x, compile=True)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(pairs[1], x, compile=True)
    said = [str(w.message) for w in caught if "one by one" in str(w.message)]
    (step,) = steps
    assert (step.captured is not None) == (CAPTURES and case.name not in WAITS)
    assert len(said) == (CAPTURES and case.name in WAITS)
    assert all("because an operation waits for the GPU" in text for text in said)
    assert run.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-8)
    for (name, p), q in zip(pairs[0].named_parameters(), pairs[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-8, msg=name)


# compiled steps


class Normed(nn.Module):
    """A network with statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # no bias before a norm: its gradient is rounding error
            nn.Linear(X, 6, bias=False), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * Z)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).unflatten(-1, (2, Z))


def normed() -> Autoencoder:
    torch.manual_seed(0)
    encoder = probae.GaussianEncoder(Normed())
    decoder = probae.BernoulliDecoder(probae.MLP(Z, X, (5,)))
    pair = Autoencoder(probae.StandardNormalPrior(Z), encoder, decoder, probae.SaltAndPepper(0.3))
    return pair.to(DEVICE)


def convolutional() -> Autoencoder:
    torch.manual_seed(0)
    return probae.VAE((1, 8, 8), Z, hidden=(), channels=(4,)).to(DEVICE)


def grey(*shape: int) -> Tensor:
    return torch.full(shape, 0.3)


KINDS: dict[str, tuple[Callable[[], Autoencoder], Any, dict[str, Any]]] = {
    "all at once": (
        vae,
        grey(40, X),
        {
            "objective": probae.ELBO(beta=probae.LinearWarmup(3)),
            "binarize": True,
            "schedule": "cosine",
            "clip_norm": 1.0,
            "val": bits(6),
        },
    ),
    "Dataset": (vae, TensorDataset(bits()), {"objective": probae.IWAE(3, dreg=True)}),
    "SGD": (vae, bits(), {"optimizer": partial(torch.optim.SGD, momentum=0.9)}),
    "statistics, dropout": (normed, bits(), {}),
    "convolutions": (convolutional, grey(40, 1, 8, 8).round(), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_machine_code_gives_the_numbers_of_eager_steps(
    kind: str, steps: list[CompiledStep]
) -> None:
    build, x, keywords = KINDS[kind]
    pairs, runs = [build(), build()], []
    for pair, compile in zip(pairs, (False, True), strict=True):
        runs.append(fit(pair, x, epochs=4, batch_size=16, compile=compile, **keywords))
    assert runs[1].eager_because == ""
    (step,) = steps
    assert (step.captured is not None) == CAPTURES, step.not_captured_because
    rtol = 1e-3 if kind == "convolutions" else 1e-5  # cuDNN's products are of ten bits
    for name in ("loss", "elbo", "kl", "beta", "lr"):
        expected = pytest.approx(runs[0].history[name], rel=rtol, abs=1e-6)
        assert runs[1].history[name] == expected, name
    for name, p in pairs[1].state_dict().items():
        q = pairs[0].state_dict()[name]
        torch.testing.assert_close(p, q, rtol=10 * rtol, atol=10 * rtol, msg=name)


def test_bfloat16(steps: list[CompiledStep]) -> None:
    losses = []
    for compile, precision in ((False, "float32"), (False, "bf16"), (True, "bf16")):
        pair = vae(hidden=(32,))
        run = fit(pair, bits(), epochs=3, batch_size=16, compile=compile, precision=precision)
        assert run.eager_because == ("" if compile else "compile=False")
        assert pair.dtype is torch.float32
        losses.append(run.history["loss"])
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[1], rel=1e-2)
    assert (steps[0].captured is not None) == CAPTURES


@pytest.mark.usefixtures("interpreted")
def test_replays_are_the_steps_that_they_replace(
    steps: list[CompiledStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, states = [], []
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(CompiledStep, "_capture", lambda step, source: None)
        pair = vae()
        losses.append(fit(pair, bits(), epochs=6, batch_size=8, compile=True).history["loss"])
        states.append(pair.state_dict())
    assert [step.captured is not None for step in steps] == [CAPTURES, False]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("interpreted")
def test_a_loss_that_is_not_finite_is_found_after_replays() -> None:
    def encoder(x: Tensor, p: Tensor) -> Any:
        bad = (x > 8).any(-1, keepdim=True)
        return pyro.distributions.Normal(torch.where(bad, torch.nan, x[..., :Z] + p), 1.0).to_event(
            1
        )

    class Part(nn.Module):
        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__()
            self.function, self.parameter = function, nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            return self.function(x, self.parameter)

    def decoder(z: Tensor, p: Tensor) -> Any:
        loc = (z + p).sum(-1, keepdim=True).expand(*z.shape[:-1], X)
        return pyro.distributions.Normal(loc, 1.0).to_event(1)

    x, good = bits(40), bits(4)
    x[11] = 9.0
    messages, states = [], []
    for compile in (False, True):
        pair = Autoencoder(probae.StandardNormalPrior(Z), Part(encoder), Part(decoder)).to(DEVICE)
        with pytest.raises(FloatingPointError, match="site 'z' of the guide drew") as caught:
            fit(pair, x, good, epochs=3, batch_size=4, compile=compile, lr=0.1, seed=5)
        messages.append(str(caught.value))
        states.append([p.item() for p in pair.parameters()])
        pair = Autoencoder(probae.StandardNormalPrior(Z), Part(encoder), Part(decoder)).to(DEVICE)
        with pytest.warns(UserWarning, match="loss became nan"):
            run = fit(
                pair, x, good, epochs=3, batch_size=4, compile=compile, seed=5, on_fault="skip"
            )
        assert run.skipped == 3
    assert messages[0] == messages[1]
    assert states[0] == pytest.approx(states[1])


# CUDA graphs by themselves

gpu = pytest.mark.skipif(DEVICE != "cuda", reason="there are no CUDA graphs elsewhere")


def wander(change: Tensor, at: Tensor) -> list[Tensor]:
    """Move a tensor, in its place, by what is given and by noise."""
    at.add_(change).add_(torch.randn_like(at))
    return [at.sum(), torch.rand(2, device=at.device)]


@gpu
def test_a_graph_draws_what_its_function_would() -> None:
    changes = [torch.full((3,), float(i), device=DEVICE) for i in range(4)]
    at = torch.zeros(3, device=DEVICE)
    captured = cuda_graphs.CudaGraph(wander, [changes[0]], [at])
    assert torch.equal(at, torch.zeros_like(at))
    twin = at.clone()
    torch.manual_seed(3)
    found = [[tensor.clone() for tensor in captured(change)] for change in changes]
    after = torch.rand(2, device=DEVICE)
    torch.manual_seed(3)
    expected = [[tensor.clone() for tensor in wander(change, twin)] for change in changes]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(at, twin)
    assert torch.equal(torch.rand(2, device=DEVICE), after)
    assert len({row[1].tolist()[0] for row in found}) == len(changes)  # fresh at every call


class Unfit:
    """A function that cannot be captured: from some call on it looks at a value."""

    def __init__(self, first: int) -> None:
        self.calls, self.first = 0, first

    def __call__(self, change: Tensor, at: Tensor) -> list[Tensor]:
        self.calls += 1
        results = wander(change, at)
        if self.calls >= self.first:
            results[0].item()
        return results


@gpu
@pytest.mark.parametrize("first", [1, 2], ids=["at once", "while it is recorded"])
def test_a_capture_that_fails_leaves_the_gpu_fit_for_use(first: int) -> None:
    change, at = torch.ones(2, 3, device=DEVICE)
    torch.manual_seed(3)
    expected = torch.rand(2, device=DEVICE)
    current, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    with pytest.raises(cuda_graphs.CannotCapture) as caught:
        cuda_graphs.CudaGraph(Unfit(first), [change], [at])
    if first == 1:
        assert str(caught.value).startswith("an operation waits for the GPU")
    assert torch.cuda.current_stream() == current
    assert torch.cuda.get_sync_debug_mode() == mode
    assert torch.equal(at, torch.ones_like(at))
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2, device=DEVICE), expected)
    captured = cuda_graphs.CudaGraph(wander, [change], [at])
    torch.manual_seed(3)
    assert captured(change)[1].isfinite().all()


@gpu
def test_steps_that_cannot_be_captured_stay_compiled(
    steps: list[CompiledStep], interpreted: None
) -> None:
    torch.manual_seed(0)
    pair = probae.PPCA(X, Z).to(DEVICE)
    with pytest.warns(UserWarning, match="one by one, because an operation waits") as caught:
        run = fit(pair, torch.randn(40, X), epochs=3, batch_size=8, compile=True)
    assert [w.filename for w in caught if "one by one" in str(w.message)] == [__file__]
    assert run.eager_because == ""
    (step,) = steps
    assert step.captured is None
    assert step.not_captured_because.startswith("an operation waits for the GPU")


# training and its state


def test_a_seed_tells_all_that_is_drawn() -> None:
    def numbers(seed: int) -> list[float]:
        pair = vae()
        run = fit(pair, bits(), epochs=2, batch_size=16, seed=seed)
        ll = probae.log_likelihood(pair, bits(), "iwae", 20, seed=seed)
        return [
            *run.history["loss"],
            ll.mean,
            *probae.sample(pair, 3, seed=seed).z.flatten().tolist(),
        ]

    torch.manual_seed(5)
    first = numbers(1)
    torch.manual_seed(6)
    assert numbers(1) == pytest.approx(first, rel=1e-6)
    assert numbers(2) != pytest.approx(first, rel=1e-6)
    pair = vae()
    assert not torch.equal(probae.sample(pair, 9, seed=None).z, probae.sample(pair, 9, seed=None).z)


@pytest.mark.skipif(DEVICE != "cuda", reason="there is one random stream")
def test_a_pair_on_the_cpu_leaves_the_stream_of_the_gpu_alone() -> None:
    pair, x = vae().cpu(), bits()
    here = stream()
    fit(pair, x, epochs=1, batch_size=16)
    probae.sample(pair, 3, seed=1)
    assert torch.equal(stream(), here)


class Drawing(Dataset[Tensor]):
    """Data that are drawn anew at every presentation, on the CPU."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> Tensor:
        return torch.rand(X).round()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("data", ["tensor", "Dataset"])
def test_a_resumed_run_goes_on(compile: bool, data: str, tmp_path: Path, interpreted: None) -> None:
    # the same noise in the same steps; bits may differ, as a GPU's sums may come in another order
    x = bits() if data == "tensor" else Drawing()
    train = partial(fit, batch_size=16, compile=compile, schedule="constant")
    whole, halves = vae(), vae()
    expected = train(whole, x, epochs=4)
    train(halves, x, epochs=2, checkpoint=tmp_path)
    run = train(halves.cpu().to(DEVICE), x, epochs=4, checkpoint=tmp_path, resume=True)
    assert run.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)
    for name, tensor in halves.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("places", [("cpu", DEVICE), (DEVICE, "cpu")], ids=["to", "from"])
def test_a_run_goes_on_at_another_place(places: tuple[str, str], tmp_path: Path) -> None:
    histories = []
    for place, epochs in zip(places, (2, 4), strict=True):
        pair = vae().to(place)
        keep = {"checkpoint": tmp_path, "resume": True}
        histories.append(fit(pair, bits(), epochs=epochs, batch_size=16, **keep).history["loss"])
        assert pair.device.type == torch.device(place).type
    assert histories[1][:2] == histories[0]
    assert all(np.isfinite(histories[1]))


def test_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    pair = case.pair().to(DEVICE)
    probae.save(pair, tmp_path / "pair")
    for place in ("cpu", DEVICE):
        loaded = probae.load(tmp_path / "pair", device=place)
        assert loaded.device.type == torch.device(place).type
        for name, tensor in pair.state_dict().items():
            assert torch.equal(loaded.state_dict()[name].cpu(), tensor.cpu()), name
    again = case.pair().to(DEVICE)
    assert probae.load(tmp_path / "pair", pair=again).device == again.device == pair.device


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    common = ["--device", DEVICE]
    assert probae.cli.main(
        [
            "fit",
            "vae",
            "--data",
            "digits",
            "--epochs",
            "1",
            "--z-dim",
            "2",
            "--out",
            str(out),
            *common,
        ]
    ) in (0, None)
    for command in (
        ["evaluate", str(out), "--limit", "20", "-k", "50"],
        ["sample", str(out), "-n", "4", "--out", str(tmp_path / "x.npy")],
    ):
        assert probae.cli.main([*command, *common]) in (0, None)
    assert np.load(tmp_path / "x.npy").shape[0] == 4
    assert json.loads((out / "pair.json").read_text())
    assert "nats" in capsys.readouterr().out


# the rest of the package


def test_estimator() -> None:
    x = np.random.default_rng(0).normal(size=(60, 5))
    small = {"z_dim": 2, "epochs": 2, "num_samples": 10, "random_state": 0, "device": DEVICE}
    for estimator in (
        probae.AutoencoderEstimator(hidden=(8,), **small),
        probae.AutoencoderEstimator("PPCA", **small),
    ):
        estimator.fit(x)
        assert estimator.pair_.device.type == torch.device(DEVICE).type
        z = estimator.transform(x)
        assert z.shape == (60, 2)
        assert estimator.inverse_transform(z).shape == x.shape
        scores = estimator.score_samples(x)
        assert np.isfinite(scores).all()
        assert estimator.score_samples(x[:7]) == pytest.approx(scores[:7], rel=1e-4)


@pytest.mark.parametrize("preset", ["GAN", "AdversarialAutoencoder", "AdversarialVariationalBayes"])
def test_adversarial_pairs(preset: str) -> None:
    torch.manual_seed(0)
    pair, x = getattr(probae, preset)(X, Z).to(DEVICE), bits()
    here = stream()
    run = probae.fit_adversarial(pair, x, epochs=2, batch_size=16, progress=False)
    assert torch.equal(stream(), here)
    assert all(np.isfinite(values).all() for values in run.history.values())
    assert probae.sample(pair, 3, seed=0).x.device == pair.device
    if preset == "AdversarialVariationalBayes":
        assert probae.adversarial_elbo(pair, bits()).values.isfinite().all()


def test_pretraining_and_proposals() -> None:
    pair = vae(hidden=(6, 5))
    probae.pretrain(pair, bits(), epochs=1, batch_size=16, progress=False)
    torch.manual_seed(0)
    point = probae.SparseAutoencoder(X, Z).to(DEVICE)
    quick = {"epochs": 1, "batch_size": 16, "hidden": (5,), "progress": False}
    proposal = probae.fit_proposal(point, torch.randn(40, X), **quick)
    ll = probae.log_likelihood(point, torch.randn(6, X), "iwae", 20, proposal=proposal)
    assert ll.values.device == point.device
    assert ll.values.isfinite().all()


@pytest.mark.parametrize("method", ["nuts", "hmc"])
def test_mcmc(method: str) -> None:
    quick = {"method": method, "warmup": 5, "num_chains": 2}
    draws = probae.posterior_samples(vae(), bits(2), 5, **quick)
    assert draws.z.isfinite().all()


def test_codes_to_retrieve_by() -> None:
    torch.manual_seed(0)
    pair = probae.SemanticHashing(X, 12, hidden=(5,)).to(DEVICE)
    found = probae.binary_codes(pair, bits())
    packed = probae.pack_codes(found)
    distance = probae.hamming_distance(packed[:5], packed)
    assert found.device == distance.device == pair.device
    assert torch.equal(probae.unpack_codes(packed, 12), found)
    plain = (found[:5, None] != found[None]).sum(-1)
    assert torch.equal(distance.long().cpu(), plain.cpu())
    labels = torch.arange(40) % 3
    task = (found[:5], found, labels[:5], labels)
    places = [t.to(DEVICE) for t in task]
    for score in (probae.precision_at_k, probae.recall_at_k):
        cpu = score(*(t.cpu() for t in task), k=3)
        assert str(score(*places, k=3)) == str(cpu)
    index = probae.CodeIndex(found)
    assert index.search(found[:2], 3).indices.shape == (2, 3)


def test_what_is_measured_of_codes_and_samples() -> None:
    z, x = torch.randn(9, 4).relu(), torch.randn(30, 5)
    for function in (probae.l0_norm, probae.feature_density, probae.dead_features):
        assert torch.equal(function(z.to(DEVICE)).cpu(), function(z))
    parts = (x[:10], x[10:20], x[20:])
    score = probae.parzen_log_likelihood(*(part.to(DEVICE) for part in parts))
    other = probae.parzen_log_likelihood(*parts)
    torch.testing.assert_close(score.values.cpu(), other.values)
    dictionary = torch.randn(5, 4)
    found, expected = (
        probae.lasso(x.to(place), dictionary.to(place), 0.5) for place in (DEVICE, "cpu")
    )
    torch.testing.assert_close(found.codes.cpu(), expected.codes, rtol=1e-3, atol=1e-4)
    pair = vae()
    assert 0 <= probae.active_units(pair, bits().to(DEVICE)) <= Z
    first, second = (probae.log_likelihood(vae().to(place), bits()) for place in (DEVICE, "cpu"))
    assert np.isfinite(float(probae.compare(first, second).difference))


def test_pictures() -> None:
    import matplotlib.pyplot as plt

    pair = convolutional()
    x = grey(20, 1, 8, 8).round().to(DEVICE)
    run = fit(pair, x, x[:4], epochs=2, batch_size=16)
    probae.plots.loss_curve(run)
    probae.plots.reconstructions(pair, x[:4])
    probae.plots.samples(pair, 4)
    probae.plots.traversals(pair)
    probae.plots.latent_scatter(pair, x, torch.arange(20).to(DEVICE) % 3)
    probae.plots.code_histogram(pair, x)
    probae.plots.likelihoods({"a": probae.log_likelihood(pair, x, num_samples=5)})
    ranks = probae.simulation_based_calibration(pair, 20, 3)
    probae.plots.calibration_ranks(ranks)
    probae.plots.coverage(probae.expected_coverage(pair, 20, 3))
    sparse = probae.SparseAutoencoder((1, 8, 8), Z).to(DEVICE)
    probae.plots.dictionary(sparse)
    plt.close("all")


@pytest.fixture(autouse=True)
def _no_more_memory() -> Iterator[None]:
    """Give memory back, so that no test is short of it."""
    yield
    if DEVICE == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
