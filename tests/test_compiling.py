"""Compiled steps against eager ones: same numbers, same errors, and a reason where it is refused.

Most tests run the recorded graph operation by operation (the fixture ``interpreted``), which tests
all but Inductor's own work and takes no C++ compiler; the tests named ``..._in_machine_code`` do.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import IterableDataset, TensorDataset

import probae
from probae import Autoencoder, LinearWarmup, compiling
from probae.graphs import CannotCompile

from .conftest import Case

X, Z = 8, 2
fit = partial(probae.fit, progress=False)


def vae(**keywords: Any) -> Autoencoder:
    torch.manual_seed(0)
    return probae.VAE(X, Z, **{"hidden": (5,), **keywords})


def bits(n: int = 20) -> Tensor:
    torch.manual_seed(7)
    return torch.rand(n, X).round()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Return the graphs that get compiled in the test."""
    made, compile = [], compiling.machine_code

    def machine_code(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return compile(graph, inputs)

    monkeypatch.setattr(compiling, "machine_code", machine_code)
    return made


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Run recorded graphs operation by operation; return them."""
    made = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return graph

    monkeypatch.setattr(compiling, "machine_code", as_it_is)
    return made


def assert_same_training(
    build: Callable[[], Autoencoder], *args: Any, rtol: float = 1e-5, **keywords: Any
) -> probae.Run:
    """Train by both kinds of steps and compare all that comes out; return the compiled run."""
    pairs, runs = [], []
    objective = keywords.pop("objective", None)
    for compile in (False, True):
        pairs.append(build())
        runs.append(
            fit(pairs[-1], *args, objective=copy.deepcopy(objective), compile=compile, **keywords)
        )
    for name in runs[0].history:
        if name != "seconds":
            expected = pytest.approx(runs[0].history[name], rel=rtol, abs=1e-6)
            assert runs[1].history[name] == expected, name
    for name, p in pairs[1].state_dict().items():
        q = pairs[0].state_dict()[name]
        torch.testing.assert_close(p, q, rtol=10 * rtol, atol=10 * rtol, msg=name)
    assert runs[1].kl_method == runs[0].kl_method
    assert (runs[0].compile_seconds, runs[0].eager_because) == (0, "compile=False")
    assert runs[1].compile_seconds > 0
    assert runs[1].eager_because == ""
    return runs[1]


no_warning = contextlib.nullcontext
ITERATIVE = ("sparse-laplace-sparse-coding", "psd", "psd-started-only-3d")


def test_every_preset_has_the_gradients_of_an_eager_step(case: Case, interpreted: list) -> None:
    # SGD at rate 1: the parameters move by the gradients; the noise is that of the seed
    x = case.x(torch.float64, n=10)
    pairs = [case.pair(torch.float64) for _ in range(2)]
    train = partial(fit, epochs=1, batch_size=5, lr=1e-3, optimizer=torch.optim.SGD)
    expected = train(pairs[0], x, compile=False)
    if case.name in ITERATIVE:
        with pytest.raises(CannotCompile, match=r"branches on the value.*sparse_coding.py, line"):
            train(pairs[1], x, compile=True)
        return
    run = train(pairs[1], x, compile=True)
    assert len(interpreted) == 1
    assert run.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-9)
    for (name, p), q in zip(pairs[0].named_parameters(), pairs[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=2),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        probae.IWAE(5),
        probae.IWAE(5, dreg=True),
        probae.ELBO(num_particles=3, analytic_kl=False),
        probae.ELBO(beta=LinearWarmup(3)),
        probae.ELBO(beta=0.5),
    ],
    ids=["Trace", "loop", "vectorised", "mean-field", "IWAE", "DReG", "particles", "warm-up", "β"],
)
def test_every_objective(objective: pyro.infer.ELBO, interpreted: list) -> None:
    assert_same_training(vae, bits(), bits(6), epochs=4, batch_size=8, objective=objective)
    assert len(interpreted) == 1


@pytest.mark.parametrize("build", ["bits-code", "hashing"])
def test_score_function_under_trace_elbo(build: str, interpreted: list) -> None:
    def pair() -> Autoencoder:
        torch.manual_seed(0)
        return probae.SemanticHashing(X, Z, posterior="bernoulli", hidden=(5,))

    objective = Trace_ELBO() if build == "bits-code" else probae.ELBO()
    assert_same_training(pair, bits(), epochs=3, batch_size=8, objective=objective)


def groups(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    half = [{"params": parameters[:2], "lr": lr / 3}, {"params": parameters[2:], "eps": 1e-3}]
    return torch.optim.Adam(half, lr=lr, betas=(0.5, 0.9))


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "weight decay": partial(torch.optim.Adam, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
    "groups": groups,
    "AMSGrad": partial(torch.optim.Adam, amsgrad=True),
    "maximize": partial(torch.optim.Adam, maximize=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str, clip_norm: float | None, interpreted: list) -> None:
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=20)
    momentum = name not in ("groups", "RMSprop")
    assert_same_training(
        vae, bits(), epochs=4, batch_size=8, lr=3e-3, clip_norm=clip_norm,
        optimizer=OPTIMIZERS[name], schedule=cycle if momentum else "cosine",
    )  # fmt: skip
    (graph,) = interpreted
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    in_graph = name in ("Adam", "weight decay", "AdamW", "groups")
    assert len(outputs) == (1 if in_graph else 1 + 8)


class Normed(nn.Module):
    """A network with statistics, dropout, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(X, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * Z)
        )
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).unflatten(-1, (2, Z))


def normed() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        probae.StandardNormalPrior(Z),
        probae.GaussianEncoder(Normed()),
        probae.BernoulliDecoder(probae.MLP(Z, X, (5,))),
    )


class DecayLater(torch.optim.lr_scheduler.LambdaLR):
    """Lets weights decay from some step on."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self.optimizer.param_groups[0]["weight_decay"] = 0.5 if self.last_epoch > 4 else 0.0


class FreezeLater(torch.optim.lr_scheduler.LambdaLR):
    """Freezes a parameter at some step."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.last_epoch == 5:
            self.optimizer.param_groups[0]["params"][0].requires_grad_(False)


class GroupLater(torch.optim.lr_scheduler.LambdaLR):
    """Trains with half of the parameters from some step on, all others in a group of their own."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.last_epoch == 5:
            (group,) = self.optimizer.param_groups
            new = {**group, "params": group["params"][4:], "lr": 0.1}
            group["params"] = group["params"][:4]
            self.optimizer.param_groups.append(new)
            self.base_lrs.append(0.1)
            self.lr_lambdas.append(self.lr_lambdas[0])


class DropLater(torch.optim.lr_scheduler.LambdaLR):
    """Changes a number that a module holds."""

    pair: Any = None

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self.pair.encoder.network.layers[2].p = 0.5 if self.last_epoch < 5 else 0.1


class ForgetLater(torch.optim.lr_scheduler.LambdaLR):
    """Begins the moments of Adam anew at some step."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.last_epoch == 5:
            self.optimizer.state.clear()


@pytest.mark.parametrize(
    ("later", "optimizer", "what"),
    [
        (DecayLater, torch.optim.Adam, "whether weights decay"),
        (DecayLater, torch.optim.SGD, ""),  # which takes its step itself
        (FreezeLater, torch.optim.Adam, "which parameters require gradients"),
        (GroupLater, torch.optim.Adam, "groups of the optimizer"),
        (GroupLater, torch.optim.SGD, "groups of the optimizer"),
        (DropLater, torch.optim.Adam, "attribute p of Dropout encoder.network.layers.2"),
        (ForgetLater, torch.optim.Adam, "the memory of parameters, or the state of the optimizer"),
    ],
)
def test_what_a_schedule_changes_beside_rates(
    later: Any, optimizer: Any, what: str, interpreted: list
) -> None:
    ends = []
    for compile in (False, True):
        later.pair = pair = normed()
        warns = pytest.warns(UserWarning, match=what) if compile and what else no_warning()
        with warns:
            run = fit(
                pair, bits(), epochs=4, batch_size=8, optimizer=optimizer, compile=compile,
                schedule=partial(later, lr_lambda=lambda step: 1.0),
            )  # fmt: skip
        ends.append((run.history["loss"], run.history["elbo"]))
    assert what in run.eager_because
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-5)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-5)
    assert len(interpreted) == 1


@pytest.mark.parametrize("binarize", [False, True])
def test_data_in_memory_and_datasets(binarize: bool, interpreted: list) -> None:
    x = torch.full((20, X), 0.3) if binarize else bits()
    for data in (x, TensorDataset(x)):
        assert_same_training(vae, data, epochs=3, batch_size=8, binarize=binarize)


@pytest.mark.parametrize("batch_size", [20, 7, 1, 1000])
def test_batches_of_any_size_compile_once(batch_size: int, interpreted: list) -> None:
    assert_same_training(vae, bits(), epochs=3, batch_size=batch_size)
    assert len(interpreted) == 1


def test_buffers_dropout_and_frozen_parameters(interpreted: list) -> None:
    assert_same_training(normed, bits(), epochs=3, batch_size=8)


def test_compiling_leaves_the_pair_and_the_random_stream_alone(interpreted: list) -> None:
    # the encoder of a VampPrior is the encoder of the pair: one module by two names
    def build() -> Autoencoder:
        return vae(prior="vamp")

    pair = build()
    before = dict(pair.named_parameters())
    torch.manual_seed(3)
    fit(pair, bits(), epochs=2, batch_size=8, seed=None, compile=True)
    after = torch.rand(1)
    torch.manual_seed(3)
    fit(build(), bits(), epochs=2, batch_size=8, seed=None, compile=False)
    assert torch.equal(torch.rand(1), after)
    assert all(p is before[name] for name, p in pair.named_parameters())
    assert torch.get_float32_matmul_precision() == "highest"
    assert nn.functional.one_hot(torch.tensor([1])).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("optimizer", "weight"),
    [(torch.optim.Adam, 0.0), (torch.optim.Adam, 0.1), (torch.optim.AdamW, 0.1)],
)
def test_adam_is_torchs_and_flushes_denormals(optimizer: Any, weight: float) -> None:
    torch.manual_seed(0)
    p, twin = torch.randn(50), nn.Parameter(torch.zeros(50))
    with torch.no_grad():
        twin.copy_(p)
    optim = optimizer([twin], lr=0.01, weight_decay=weight)
    decay = compiling._decay(optim, 0)
    m, v = torch.zeros(50), torch.zeros(50)
    settings = torch.tensor([0.01, 0.9, 0.999, 1e-8, weight], dtype=torch.float64)
    for t in range(1, 6):
        twin.grad = torch.randn(50)
        rates = compiling._rates(settings, torch.tensor(float(t)), torch.float32)
        p, m, v = compiling._adam(p, twin.grad, m, v, rates, decay)
        optim.step()
        torch.testing.assert_close(p, twin.detach(), rtol=1e-5, atol=1e-6)
    small = torch.tensor([1e-40, -1e-40, 1e-30, -1e-30, 0.0])
    assert compiling._flushed(small).tolist() == [0, 0, small[2], small[3], 0]


class Part(nn.Module):
    """A function of its input as a module, with a parameter to train."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.parameter = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.parameter)


def with_encoder(function: Callable[[Tensor, Tensor], Any]) -> Autoencoder:
    decoder = Part(lambda z, p: dist.Normal((z + p).repeat_interleave(X // Z, -1), 1).to_event(1))
    return Autoencoder(probae.StandardNormalPrior(Z), Part(function), decoder)


def test_a_loss_that_is_not_finite_is_traced_to_its_site(interpreted: list) -> None:
    mark = 9.0

    def encoder(x: Tensor, p: Tensor) -> Any:
        bad = (x > mark - 1).any(-1, keepdim=True)
        return dist.Normal(torch.where(bad, math.nan, x[..., :Z] + p), 1.0).to_event(1)

    x = bits(40)
    x[torch.randperm(40, generator=torch.Generator().manual_seed(1))[:1]] = mark
    states, messages = [], []
    for compile in (False, True):
        pair = with_encoder(encoder)
        with pytest.raises(FloatingPointError, match="site 'z' of the guide drew") as caught:
            fit(pair, x, epochs=3, batch_size=4, compile=compile, lr=0.1, seed=5)
        messages.append(str(caught.value))
        states.append([p.item() for p in pair.parameters()])
    assert messages[0] == messages[1]
    assert "step 1:" not in messages[0]
    assert len(interpreted) == 1
    assert states[0] == states[1]


def test_a_gradient_that_is_not_finite_is_left_out_like_an_eager_one(interpreted: list) -> None:
    def encoder(x: Tensor, p: Tensor) -> Any:  # at x = 0 the gradient is infinity times 0
        return dist.Normal((x[..., :Z] * (1 + p)).abs().sqrt(), 1.0).to_event(1)

    x = 1 + bits(40)
    x[torch.randperm(40, generator=torch.Generator().manual_seed(1))[:1]] = 0.0
    pairs, runs = [with_encoder(encoder) for _ in range(2)], []
    for pair, compile in zip(pairs, (False, True), strict=True):
        with pytest.warns(UserWarning, match="a gradient became NaN or infinite"):
            runs.append(
                fit(pair, x, epochs=3, batch_size=4, compile=compile, seed=5, on_fault="skip")
            )
    assert [run.skipped for run in runs] == [3, 3]
    assert runs[1].history["loss"] == pytest.approx(runs[0].history["loss"], rel=1e-6)
    for p, q in zip(*(pair.parameters() for pair in pairs), strict=True):
        torch.testing.assert_close(p, q)


def test_a_first_step_that_is_left_out_is_not_the_one_to_learn_from(interpreted: list) -> None:
    x = bits(40)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = torch.randperm(40)[0]
    x[first] = 9.0  # beyond what the encoder takes

    def encoder(x: Tensor, p: Tensor) -> Any:
        bad = (x > 8).any(-1, keepdim=True)
        return dist.Normal(torch.where(bad, math.nan, x[..., :Z] + p), 1.0).to_event(1)

    losses = []
    for compile in (False, True):
        pair = with_encoder(encoder)
        with pytest.warns(UserWarning, match="loss became nan at epoch 1, step 1:"):
            run = fit(
                pair, x, bits(4), epochs=2, batch_size=4, compile=compile, seed=5, on_fault="skip"
            )
        losses.append(run.history["loss"])
        assert run.skipped == 2
    assert len(interpreted) == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_step_without_finite_loss_changes_nothing(interpreted: list) -> None:
    pair, data = normed(), torch.cat([bits(), torch.full((1, X), math.inf)])
    optim = torch.optim.Adam(pair.parameters(), lr=0.1)
    checked = probae.batches.TrainingData(pair, bits(21), "x", False)
    probae.ELBO().differentiable_loss(pair.model, pair.guide, bits()).backward()
    optim.step()
    step = compiling.CompiledStep(pair, probae.ELBO(), checked, optim, None)
    step.compile(torch.arange(5))
    checked.tensor = data
    before = [copy.deepcopy(t) for t in (pair.state_dict(), optim.state_dict())]
    state = torch.get_rng_state()
    assert step.step(torch.arange(16, 21)) is None
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in pair.state_dict().items():
        assert torch.equal(tensor, before[0][name]), name
    for k, moments in optim.state_dict()["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, before[1]["state"][k][name]), name
    assert math.isfinite(step.step(torch.arange(5)))
    step.leave()
    assert {float(s["step"]) for s in optim.state.values()} == {2.0}


def test_steps_one_after_the_other_stop_where_a_loss_is_not_finite(interpreted: list) -> None:
    data = torch.cat([bits(), torch.full((1, X), math.inf)])
    good = [torch.arange(5), torch.arange(5, 10)]
    bad, partial_batch = torch.arange(16, 21), torch.arange(3)
    ends = []
    for go_on in (False, True):
        pair = vae()
        optim = torch.optim.Adam(pair.parameters(), lr=0.1)
        checked = probae.batches.TrainingData(pair, bits(21), "x", False)
        probae.ELBO().differentiable_loss(pair.model, pair.guide, bits()).backward()
        optim.step()
        step = compiling.CompiledStep(pair, probae.ELBO(), checked, optim, None)
        step.compile(good[0])
        checked.tensor = data
        torch.manual_seed(3)
        if go_on:
            losses, left = step.go_on(iter([*good, bad, good[0]]), seconds=100.0)
            assert left is bad
            more, left = step.go_on(iter([good[0], partial_batch]), seconds=100.0)
            assert left is partial_batch
            last, left = step.go_on(iter(good), seconds=0.0)  # one is always taken
            assert left is None
            losses += more + last
        else:
            losses = [step.step(source) for source in (*good, bad, good[0], good[0])]
            assert losses.pop(2) is None
        step.leave()
        ends.append((losses, torch.get_rng_state(), pair.state_dict(), optim.state_dict()["state"]))
    (losses, stream, tensors, state), (others, its_stream, its_tensors, its_state) = ends
    assert losses == others
    assert torch.equal(stream, its_stream)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, its_tensors[name]), name
    for k, moments in state.items():
        assert all(torch.equal(m, its_state[k][name]) for name, m in moments.items())


@pytest.mark.parametrize(
    ("num_data", "form", "optimizer"),
    [
        (40, bits, None),
        (43, bits, None),
        (43, lambda n: TensorDataset(bits(n)), None),
        (43, bits, torch.optim.SGD),
    ],
    ids=["whole batches", "a partial batch", "a Dataset", "SGD"],
)
def test_steps_one_after_the_other_train_as_single_ones(
    num_data: int, form: Any, optimizer: Any, interpreted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, go_on = [], compiling.CompiledStep.go_on

    def noted(*args: Any, **keywords: Any) -> Any:
        losses, left = go_on(*args, **keywords)
        taken.extend(losses)
        return losses, left

    monkeypatch.setattr(compiling.CompiledStep, "go_on", noted)
    monkeypatch.setattr(probae.loop, "WHILE", math.inf)
    runs = []
    for steady in (True, False):
        pair = vae()
        if not steady:
            monkeypatch.setattr(probae.loop.Training, "is_steady", False)
        run = fit(
            pair, form(num_data), epochs=3, batch_size=4, compile=True, seed=0, optimizer=optimizer
        )
        runs.append((run.history["loss"], run.history["elbo"], pair.state_dict()))
        assert len(taken) == 28
    assert runs[0][:2] == runs[1][:2]
    for name, tensor in runs[0][2].items():
        assert torch.equal(tensor, runs[1][2][name]), name


class Own(probae.ELBO):
    """An objective of a user's own, which may do something at every step."""


@pytest.mark.parametrize(
    "keywords",
    [
        {"objective": probae.ELBO(beta=LinearWarmup(2))},
        {"objective": Own()},
        {"schedule": "cosine"},
        {"on_fault": "skip"},
    ],
    ids=["beta", "own", "rate", "skip"],
)
def test_steps_whose_settings_change_are_single(
    keywords: dict[str, Any], interpreted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.CompiledStep, "go_on", gone)
    fit(vae(), bits(40), epochs=2, batch_size=4, compile=True, **keywords)


def test_a_fault_among_steps_one_after_the_other_is_named_as_eagerly(interpreted: list) -> None:
    x = bits(40)
    x[11] = 9.0  # beyond what the encoder takes

    def encoder(x: Tensor, p: Tensor) -> Any:
        bad = (x > 8).any(-1, keepdim=True)
        return dist.Normal(torch.where(bad, math.nan, x[..., :Z] + p), 1.0).to_event(1)

    said = []
    for compile in (False, True):
        with pytest.raises(FloatingPointError) as error:
            fit(with_encoder(encoder), x, bits(4), batch_size=4, compile=compile, seed=2)
        said.append(str(error.value))
    assert "datum 11" in said[0]
    assert said[0] == said[1]


class Tempered(probae.ELBO):
    """An objective with a schedule of its own, as a Python number."""

    def differentiable_loss(self, *args: Any, **keywords: Any) -> Tensor:
        factor = 1.0 if math.isinf(self.epoch) else 1 + self.epoch
        return factor * super().differentiable_loss(*args, **keywords)


def branching(x: Tensor, p: Tensor) -> Any:
    loc = x[..., :Z] + p
    return dist.Normal(loc if loc.mean() > 0 else 2 * loc, 1.0).to_event(1)


class Counting:
    """A part whose scale grows with every call, unseen by any record."""

    calls = 0

    def __call__(self, x: Tensor, p: Tensor) -> Any:
        self.calls += 1
        return dist.Normal(x[..., :Z] + p, 1.0 + 0.1 * self.calls).to_event(1)


def gone(*_: object, **__: object) -> None:
    raise RuntimeError("disk gone\nand more")


REFUSED = [
    (lambda: with_encoder(branching), None, r"branches on the value .*test_compiling.py, line \d+"),
    (lambda: with_encoder(Counting()), None, "gives another loss .* is no tensor"),
    (vae, Tempered(), "gives another loss"),
]


@pytest.mark.parametrize(("build", "objective", "message"), REFUSED, ids=["if", "count", "number"])
def test_what_a_graph_would_get_wrong_is_refused(
    build: Callable[[], Autoencoder],
    objective: Any,
    message: str,
    interpreted: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = partial(fit, x=bits(), epochs=8, batch_size=8, objective=objective)
    with pytest.raises(CannotCompile, match=message):
        train(build(), compile=True)
    monkeypatch.setattr(compiling, "WORTH", 0.0)
    pairs = [build(), build()]
    with pytest.warns(UserWarning, match="takes its steps eagerly.*because") as caught:
        run = train(pairs[0], compile="auto")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.raises(CannotCompile, match=message):
        raise CannotCompile(run.eager_because)
    if not isinstance(pairs[0].encoder, Part) or pairs[0].encoder.function is branching:
        train(pairs[1], compile=False)
        for p, q in zip(pairs[0].parameters(), pairs[1].parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_auto_compiles_long_runs_only(interpreted: list, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = fit(vae(), bits(), epochs=8, batch_size=8, compile="auto")
        assert (run.compile_seconds, run.eager_because) == (0, "the run is too short")
        assert not interpreted
        monkeypatch.setattr(compiling, "WORTH", 0.0)
        run = fit(vae(), bits(), epochs=8, batch_size=8, compile="auto")
        assert len(interpreted) == 1
        assert run.eager_because == ""
        assert run.compile_seconds > 0


def test_auto_goes_by_the_size_of_the_work_and_not_by_the_clock() -> None:
    pair, seconds = vae(), partial(compiling.eager_seconds, objective=probae.ELBO())
    assert 10_000 * seconds(pair, batch_size=1) > compiling.WORTH
    assert 1000 * seconds(pair, batch_size=1) < compiling.WORTH
    large = probae.VAE(784, 20, hidden=(1000, 1000))
    assert 1000 * seconds(large, batch_size=1000) > compiling.WORTH
    few, many = (
        compiling.eager_seconds(large, probae.IWAE(k), 1000) - compiling.OVERHEAD for k in (1, 5)
    )
    assert many == pytest.approx(5 * few)


class Endless(IterableDataset[Tensor]):
    """Forty data, of which nobody knows how many they are."""

    def __iter__(self) -> Any:
        return iter(bits(40))


def test_auto_waits_where_nobody_knows_how_long_the_run_is(
    interpreted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(vae(), Endless(), epochs=2, batch_size=8)
    assert (run.compile_seconds, run.eager_because) == (0, "the run is too short")
    monkeypatch.setattr(compiling, "WORTH", 7.0)
    monkeypatch.setattr(compiling, "OVERHEAD", 1.0)  # seconds an eager step is taken to last
    taken, take = [], compiling.CompiledStep._taken
    monkeypatch.setattr(
        compiling.CompiledStep, "_taken", lambda *args: taken.append(1) or take(*args)
    )
    fit(vae(), Endless(), epochs=3, batch_size=8)
    assert len(taken) == 15 - 7


def test_auto_looks_at_the_batches_that_there_are() -> None:
    run = fit(vae(), bits(20), epochs=3, batch_size=10**9)
    assert run.eager_because == "the run is too short"


def test_auto_keeps_the_bits_that_a_checkpoint_promises(
    tmp_path: Path, interpreted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "WORTH", 0.0)
    run = fit(vae(), bits(), epochs=2, batch_size=8, compile="auto", checkpoint=tmp_path)
    assert (len(interpreted), run.compile_seconds) == (0, 0.0)
    assert "bits of a whole one" in run.eager_because
    run = fit(vae(), bits(), epochs=2, batch_size=8, compile=True, checkpoint=tmp_path / "second")
    assert (len(interpreted), run.eager_because) == (1, "")


@pytest.mark.parametrize("compile", ["yes", None, 1, "True"])
def test_compile_is_checked(compile: Any) -> None:
    with pytest.raises(ValueError, match="compile must be True, False or 'auto', got"):
        fit(vae(), bits(), compile=compile)


def test_data_outside_the_domain_of_a_corruption_are_refused(interpreted: list) -> None:
    def pair() -> Autoencoder:
        torch.manual_seed(0)
        corruption = probae.BitFlip(0.1)
        return probae.DenoisingVAE(X, Z, corruption=corruption, hidden=(5,), likelihood="gaussian")

    x = bits(40)
    x[torch.randperm(40, generator=torch.Generator().manual_seed(1))[:1]] = 1.5
    for data in (x, TensorDataset(x)):
        for compile in (False, True):
            with pytest.raises(ValueError, match=r"x must be in .* under BitFlip.*first 1.5"):
                fit(pair(), data, epochs=3, batch_size=4, compile=compile)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", gone)
    with pytest.raises(CannotCompile, match=r"Inductor failed with RuntimeError: disk gone$"):
        fit(vae(), bits(), batch_size=8, compile=True)


def test_vae_in_machine_code(graphs: list) -> None:
    # weight of the KL, learning rate, a partial batch, binarisation, clipping: one compilation
    objective = probae.ELBO(beta=LinearWarmup(3))
    x = torch.full((20, X), 0.3)
    assert_same_training(
        vae, x, bits(6), epochs=4, batch_size=8, objective=objective, binarize=True,
        schedule="cosine", clip_norm=1.0,
    )  # fmt: skip
    assert len(graphs) == 1


def test_particles_and_statistics_in_machine_code(graphs: list) -> None:
    objective = probae.IWAE(3, dreg=True)
    build = partial(vae, likelihood="gaussian", likelihood_options={"learn_scale": True})
    optimizer = partial(torch.optim.SGD, momentum=0.9)
    assert_same_training(
        build, bits(), epochs=3, batch_size=8, objective=objective, optimizer=optimizer
    )
    assert_same_training(normed, bits(), epochs=3, batch_size=8)
    assert len(graphs) == 2


def test_random_numbers_come_in_the_same_order_in_machine_code(graphs: list) -> None:
    def build() -> Autoencoder:
        torch.manual_seed(0)
        encoder = probae.GaussianEncoder(Normed())
        decoder = probae.BernoulliDecoder(probae.MLP(Z, X, (5,)))
        prior, corruption = probae.StandardNormalPrior(Z), probae.SaltAndPepper(0.3)
        return Autoencoder(prior, encoder, decoder, corruption)

    assert_same_training(build, bits(), epochs=3, batch_size=8)
    assert len(graphs) == 1


class Pulled(probae.ELBO):
    """An objective with a parameter of its own, or one that it reaches by itself."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameters = [parameter]

    def differentiable_loss(self, *args: Any, **keywords: Any) -> Tensor:
        return (
            super().differentiable_loss(*args, **keywords) + (self.parameters[0] - 3).square().sum()
        )


class Counted(probae.ELBO):
    """An objective that counts its calls."""

    calls = 0

    def differentiable_loss(self, *args: Any, **keywords: Any) -> Tensor:
        self.calls += 1
        return super().differentiable_loss(*args, **keywords) * (1 + self.calls / 1e6)


class Renewed(nn.Module):
    """A network whose buffer is another tensor after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(X, 2 * Z)
        self.register_buffer("mean", torch.zeros(X))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.layer(x - self.mean).unflatten(-1, (2, Z))


class AtItsEpoch(probae.ELBO):
    """An objective that knows no end of training."""

    def differentiable_loss(self, *args: Any, **keywords: Any) -> Tensor:
        return super().differentiable_loss(*args, **keywords) * (1 + int(self.epoch))


def _zero_gradient(p: Tensor) -> None:
    p.grad.zero_()


def hooked() -> tuple[Autoencoder, dict[str, Any]]:
    pair = vae()
    next(pair.parameters()).register_post_accumulate_grad_hook(_zero_gradient)
    return pair, {}


def outside() -> tuple[Autoencoder, dict[str, Any]]:
    own = nn.Parameter(torch.zeros(3))
    return vae(), {
        "objective": Pulled(own),
        "optimizer": lambda parameters, lr: torch.optim.Adam([*parameters, own], lr=lr),
    }


def renewed() -> tuple[Autoencoder, dict[str, Any]]:
    pair = normed()
    pair.encoder = probae.GaussianEncoder(Renewed())
    return pair, {}


def by_another_way() -> tuple[Autoencoder, dict[str, Any]]:
    pair = vae()
    return pair, {"objective": Pulled(next(pair.parameters()))}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (outside, "a parameter that is none of the pair's"),
        (by_another_way, "by another way than the pair's parameters"),
        (hooked, "encoder.network.layers.0.weight has a hook"),
        (renewed, "attribute mean of Renewed encoder.network changes from step to step"),
        (lambda: (vae(), {"objective": Counted()}), "attribute calls of the objective changes"),
        (lambda: (vae(), {"objective": AtItsEpoch()}), "OverflowError"),
    ],
    ids=["outside", "by another way", "hook", "buffer", "counter", "epoch"],
)
def test_what_a_graph_would_leave_out_is_refused(
    make: Any, why: str, interpreted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "WORTH", 0.0)
    pair, keywords = make()
    with pytest.raises(CannotCompile, match=why):
        fit(pair, bits(), epochs=2, batch_size=4, compile=True, **keywords)
    ends = []
    for compile in (False, "auto"):
        pair, keywords = make()
        with pytest.warns(UserWarning, match=why) if compile else no_warning():
            run = fit(pair, bits(), epochs=2, batch_size=4, compile=compile, **keywords)
        ends.append((run.history["loss"], run.history["elbo"]))
    assert ends[0] == ends[1]


class Rebinding(torch.optim.Optimizer):
    """Gradient descent that gives parameters new memory at each step, and flattens them."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        weights = nn.utils.parameters_to_vector(group["params"])
        change = torch.cat([p.grad.flatten() for p in group["params"]])
        nn.utils.vector_to_parameters(weights - group["lr"] * change, group["params"])


def test_an_optimizer_may_give_parameters_other_memory(interpreted: list) -> None:
    assert_same_training(vae, bits(43), epochs=3, batch_size=8, optimizer=Rebinding)


def test_a_part_may_flatten_weights(interpreted: list) -> None:
    class Sized(probae.VAE):
        """A pair whose model looks at the weights of its decoder."""

        def model(self, x: Tensor) -> Any:
            pyro.factor("size", -self.decoder.network.layers[0].weight.view(-1).square().sum())
            return super().model(x)

    def pair() -> Autoencoder:
        torch.manual_seed(0)
        return Sized(X, Z, hidden=(5,))

    assert_same_training(pair, bits(), epochs=3, batch_size=8)


def test_a_step_that_somebody_wrapped_is_called(interpreted: list) -> None:
    calls = []

    def wrapped(parameters: Any, lr: float) -> torch.optim.Optimizer:
        optim = torch.optim.Adam(parameters, lr=lr)
        step = optim.step
        optim.step = lambda *args, **keywords: (calls.append(1), step(*args, **keywords))[1]
        return optim

    fit(vae(), bits(40), epochs=2, batch_size=8, compile=True, optimizer=wrapped)
    assert len(calls) == 10
    handle = register_optimizer_step_post_hook(lambda *args: calls.append(2))
    try:
        fit(vae(), bits(40), epochs=2, batch_size=8, compile=True)
    finally:
        handle.remove()
    assert calls.count(2) == 10


def test_batches_of_a_dataset_lie_as_the_graph_reads_them(interpreted: list) -> None:
    pair, x = vae(), bits()
    optim = torch.optim.Adam(pair.parameters())
    data = probae.batches.TrainingData(pair, TensorDataset(x), "x", False)
    step = compiling.CompiledStep(pair, probae.ELBO(), data, optim, None)
    (batch,) = step._drawn_from(x.t().contiguous().t())
    assert batch.is_contiguous()
    assert torch.equal(batch, x)


def test_autocast_around_fit_changes_nothing() -> None:
    ends = []
    for enabled in (False, True):
        pair = vae()
        with torch.autocast("cpu", enabled=enabled):
            ends.append(fit(pair, bits(40), epochs=3, batch_size=8).history["loss"])
    assert ends[0] == ends[1]
    assert ends[0][-1] < ends[0][0]
