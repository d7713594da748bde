"""What fit does, against a loop written by hand, and what it leaves behind when it fails."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import probae
from probae import Autoencoder, LinearWarmup, monitoring, precision, training

X, Z = 8, 2
fit = partial(probae.fit, progress=False)


def vae(**keywords: Any) -> Autoencoder:
    torch.manual_seed(0)
    return probae.VAE(X, Z, **{"hidden": (5,), **keywords})


def plain() -> Autoencoder:
    """A pair whose training draws nothing but the order of the data."""
    torch.manual_seed(0)
    return probae.UndercompleteAutoencoder(X, Z, hidden=(5,))


def bits(n: int = 20) -> Tensor:
    return torch.rand(n, X).round()


def state(pair: Autoencoder) -> dict[str, Tensor]:
    return copy.deepcopy(pair.state_dict())


def assert_state(pair: Autoencoder, expected: dict[str, Tensor]) -> None:
    for name, tensor in pair.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


class Spy(probae.ELBO):
    """An ELBO that remembers the data it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def differentiable_loss(self, model: Any, guide: Any, x: Tensor, **kwargs: Any) -> Tensor:
        (self.trained if torch.is_grad_enabled() else self.validated).append(x.clone())
        return super().differentiable_loss(model, guide, x, **kwargs)


@pytest.mark.parametrize("batch_size", [20, 8, 7, 1, 1000])
def test_fit_is_the_loop_one_would_write(batch_size: int) -> None:
    # 20 data: the last batch is whole, partial, single, or larger than the data
    x, by_hand, by_fit = torch.randn(20, X), plain(), plain()
    optim = torch.optim.Adam(by_hand.parameters(), lr=0.01, fused=True)
    torch.manual_seed(5)
    expected = []
    for _ in range(3):
        total = 0.0
        for index in torch.randperm(20).split(batch_size):
            batch = x[index]
            log_prob = by_hand.decoder(by_hand.encoder(batch).mean).log_prob(batch)
            optim.zero_grad()
            (-log_prob.mean()).backward()
            optim.step()
            total -= log_prob.sum().item()
        expected.append(total / 20)
    run = fit(by_fit, x, epochs=3, batch_size=batch_size, lr=0.01, seed=5)
    assert run.history["loss"] == pytest.approx(expected, rel=1e-5)
    for name, tensor in by_fit.state_dict().items():
        torch.testing.assert_close(tensor, by_hand.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_every_datum_is_presented_once_an_epoch() -> None:
    x, spy = torch.arange(20.0)[:, None].expand(20, X) / 19, Spy()
    fit(vae(), x, epochs=3, batch_size=8, objective=spy)
    assert [len(batch) for batch in spy.trained] == [8, 8, 4] * 3
    orders = [torch.cat(spy.trained[i : i + 3])[:, 0] for i in (0, 3, 6)]
    for order in orders:
        assert torch.equal(order.sort().values, x[:, 0])
    assert not torch.equal(orders[0], orders[1])


def test_history_has_a_value_an_epoch_in_every_column() -> None:
    columns = ["epoch", "loss", "elbo", "reconstruction", "kl", "active_units", "beta", "lr"]
    columns.append("seconds")
    run = fit(vae(), bits(), epochs=4, lr=0.02)
    assert list(run.history) == columns
    run_with_val = fit(vae(), bits(), bits(6), epochs=4)
    assert sorted(run_with_val.history) == sorted([*columns, "val_loss"])
    for history in (run.history, run_with_val.history):
        assert all(len(column) == 4 for column in history.values())
        assert all(type(value) is float for column in history.values() for value in column)
        assert history["epoch"] == [1.0, 2.0, 3.0, 4.0]
        assert history["seconds"] == sorted(history["seconds"])
    assert run.history["lr"] == pytest.approx([0.02] * 4)
    assert run.history["beta"] == [1.0] * 4
    elbo = np.subtract(run.history["reconstruction"], run.history["kl"])
    assert run.history["elbo"] == pytest.approx(elbo)
    assert (run.monitored, run_with_val.monitored) == ("train", "val")
    assert (run.best_epoch, run.stopped_early, run.objective) == (4, False, "ELBO")
    assert 0 < run.history["seconds"][-1] <= run.seconds
    assert "ELBO on a pair of kind ELBO" in repr(run)


def test_elbo_column_is_nats_per_datum() -> None:
    # with the exact posterior the ELBO is the evidence, whatever z was drawn
    x = torch.randn(20, X, dtype=torch.float64)
    pair = probae.PPCA(X, Z).double()
    run = fit(pair, x, epochs=2, batch_size=8)
    evidence = probae.log_likelihood(pair, x, "exact").mean
    assert run.history["elbo"][-1] == pytest.approx(evidence, abs=1e-9)
    held_out = torch.randn(6, X, dtype=torch.float64)
    run = fit(pair, x, held_out, epochs=1)
    assert run.history["elbo"][-1] == pytest.approx(
        probae.log_likelihood(pair, held_out, "exact").mean, abs=1e-9
    )
    assert run.history["val_loss"] == pytest.approx([-run.history["elbo"][-1]])
    assert run.history["active_units"][-1] == probae.active_units(pair, held_out)


def test_beta_weighs_the_training_loss_and_not_the_elbo_column() -> None:
    pair, x = vae(), bits()
    run = fit(pair, x, x, epochs=1, lr=1e-30, batch_size=20, objective=probae.ELBO(beta=3.0))
    history = {name: column[0] for name, column in run.history.items()}
    assert history["beta"] == 3.0
    assert history["elbo"] == pytest.approx(history["reconstruction"] - history["kl"])
    assert history["val_loss"] == pytest.approx(3 * history["kl"] - history["reconstruction"])


def test_warmup_raises_beta_and_measures_at_its_end() -> None:
    objective = probae.ELBO(beta=LinearWarmup(epochs=4))
    run = fit(vae(), bits(), bits(6), epochs=5, objective=objective)
    assert run.history["beta"] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert run.history["val_loss"] == pytest.approx(np.negative(run.history["elbo"]), rel=1e-5)
    assert objective.beta == 1.0
    pair = vae()
    with torch.no_grad():
        pair.decoder.network.output.weight.zero_()  # the loss is 8 log 2 + β KL, without noise
        pair.encoder.network.output.bias[:Z] = 3.0
    first = fit(pair, bits(), epochs=1, batch_size=5, lr=1e-30, objective=objective)
    # β = 0, 1/16, 2/16, 3/16 in the four steps of the first epoch: 3/32 on average
    expected = X * math.log(2) + 3 / 32 * first.history["kl"][0]
    assert first.history["kl"][0] > 5
    assert first.history["loss"][0] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        probae.IWAE(5),
        probae.IWAE(5, dreg=True),
        probae.ELBO(num_particles=3, analytic_kl=False),
    ],
    ids=["Trace", "vectorised", "mean-field", "IWAE", "DReG", "particles"],
)
def test_any_differentiable_pyro_objective_trains(objective: pyro.infer.ELBO) -> None:
    # all pixels alike: of 8 log 2 = 5.5 nats, all but log 2 can be learned
    pair, x = vae(hidden=(20,)), (torch.rand(40, 1) < 0.5).float().expand(40, X)
    before = state(pair)
    run = fit(pair, x, x, epochs=20, batch_size=8, lr=0.03, objective=objective)
    assert run.objective == type(objective).__name__
    assert run.history["loss"][-1] < 3 < run.history["loss"][0]
    assert min(run.history["val_loss"]) == run.history["val_loss"][run.best_epoch - 1]
    assert not any(torch.equal(p, before[name]) for name, p in pair.named_parameters())


def test_training_does_not_mind_that_gradients_are_off() -> None:
    pairs, x = [vae(), vae()], bits()
    fit(pairs[0], x, epochs=2)
    with torch.no_grad():
        fit(pairs[1], x, epochs=2)
        assert not torch.is_grad_enabled()
    assert_state(pairs[0], state(pairs[1]))


def test_no_seed_means_the_global_stream() -> None:
    x, pairs = bits(), [vae() for _ in range(3)]
    torch.manual_seed(3)
    fit(pairs[0], x, epochs=2, batch_size=4, seed=None)
    moved = torch.rand(1)
    fit(pairs[1], x, epochs=2, batch_size=4, seed=None)
    torch.manual_seed(3)
    fit(pairs[2], x, epochs=2, batch_size=4, seed=None)
    assert_state(pairs[2], state(pairs[0]))
    weights = [pair.encoder.network.output.weight for pair in pairs]
    assert not torch.equal(weights[0], weights[1])
    torch.manual_seed(3)
    assert not torch.equal(moved, torch.rand(1))


def test_measurements_use_the_same_noise_at_every_epoch() -> None:
    for seed in (0, 1):
        run = fit(vae(), bits(), bits(6), epochs=3, lr=1e-30, seed=seed)
        for name in ("val_loss", "elbo", "reconstruction", "kl"):
            assert len(set(run.history[name])) == 1, name


def test_measuring_does_not_disturb_training() -> None:
    pairs, x = [vae(), vae()], bits()
    fit(pairs[0], x, epochs=3)
    run = fit(pairs[1], x, x, epochs=3)
    assert run.best_epoch == 3
    assert_state(pairs[0], state(pairs[1]))


def test_binarisation_is_drawn_anew_at_every_presentation() -> None:
    epochs, n = 60, 8
    x = torch.full((n, X), 0.3)
    x[:, :3] = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(n)])  # its own index
    grey, spy = x.clone(), Spy()
    fit(vae(), x, grey, epochs=epochs, batch_size=5, binarize=True, objective=spy, lr=1e-30)
    assert torch.equal(x, grey)
    seen = torch.cat(spy.trained)
    assert seen.unique().tolist() == [0.0, 1.0]
    index = (seen[:, :3] @ torch.tensor([1.0, 2.0, 4.0])).long()
    for i in range(n):
        presentations = seen[index == i][:, 3:]
        assert len(presentations) == epochs
        assert len(presentations.unique(dim=0)) > 15  # of 32 patterns
    frequency = seen[:, 3:].mean().item()
    assert frequency == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / (5 * n * epochs)))
    validated = torch.stack(spy.validated)  # binarised once
    assert len(validated) == epochs
    assert (validated == validated[0]).all()
    assert validated.unique().tolist() == [0.0, 1.0]
    assert not torch.equal(validated[0], grey)


@pytest.mark.parametrize("bad", [-0.1, 1.1, 255.0])
def test_binarisation_refuses_data_outside_the_unit_interval(bad: float) -> None:
    x = bits()
    x[4, 2] = bad
    for data, val, name in ((x, None, "x"), (bits(), x, "val")):
        with pytest.raises(
            ValueError, match=rf"{name} must lie in \[0, 1\].*{bad:g} at index \(4, 2"
        ):
            fit(vae(), data, val, binarize=True)


def test_grey_data_say_what_is_bounded() -> None:
    assert fit(vae(), bits(), epochs=1).bound_on == "log p(x)"
    grey = fit(vae(), torch.rand(20, X), epochs=1)
    assert "stochastic binarisation" in grey.bound_on
    assert fit(vae(), torch.rand(20, X), epochs=1, binarize=True).bound_on == "log p(x)"
    assert fit(plain(), torch.rand(20, X), epochs=1).bound_on.startswith("nothing: ")


def opposite() -> tuple[Tensor, Tensor]:
    """Training data that make validation worse from the first step on."""
    return torch.ones(20, X), torch.zeros(6, X)


def test_early_stopping_keeps_the_best_epoch() -> None:
    x, val = opposite()
    pair, once = vae(), vae()
    run = fit(pair, x, val, epochs=30, patience=3, lr=0.03)
    assert run.stopped_early
    assert run.best_epoch == 1
    assert len(run.history["epoch"]) == 4
    assert run.history["val_loss"] == sorted(run.history["val_loss"])
    fit(once, x, val, epochs=1, lr=0.03)
    assert_state(pair, state(once))


def test_without_patience_the_best_epoch_is_kept_all_the_same() -> None:
    x, val = opposite()
    pair, once = vae(), vae()
    run = fit(pair, x, val, epochs=4, lr=0.03)
    assert (run.stopped_early, run.best_epoch, len(run.history["loss"])) == (False, 1, 4)
    fit(once, x, val, epochs=1, lr=0.03)
    assert_state(pair, state(once))


def test_improvement_resets_patience() -> None:
    x = bits(40)
    run = fit(vae(), x, x, epochs=12, patience=2, lr=1e-3)
    assert not run.stopped_early
    assert run.best_epoch == 12


@pytest.mark.parametrize(("warmup", "best"), [(5, 5), (4.5, 5), (1, 1), (50, 9)])
def test_early_stopping_waits_for_the_warmup(warmup: float, best: int) -> None:
    x, val = opposite()
    pair = vae()
    objective = probae.ELBO(beta=LinearWarmup(epochs=warmup))
    run = fit(pair, x, val, epochs=9, patience=1, lr=0.03, objective=objective)
    losses = run.history["val_loss"]
    assert losses == sorted(losses)  # so that without a warm-up it fires at epoch 2
    assert run.best_epoch == best
    assert len(losses) == min(best + 1, 9)
    assert run.stopped_early == (warmup < 9)
    twin = vae()
    fit(twin, x, epochs=best, lr=0.03, objective=objective)
    assert_state(pair, state(twin))


def test_cosine_schedule_ends_at_zero() -> None:
    run = fit(vae(), bits(), epochs=4, batch_size=8, lr=0.02, schedule="cosine")
    expected = [0.01 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (1, 2, 3, 4)]
    assert run.history["lr"] == pytest.approx(expected, abs=1e-12)
    assert run.history["lr"][-1] == pytest.approx(0, abs=1e-12)


def test_custom_schedule_steps_after_every_batch() -> None:
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run = fit(vae(), bits(), epochs=2, batch_size=8, lr=0.02, schedule=halve)
    assert run.history["lr"] == pytest.approx([0.02 / 8, 0.02 / 64])


@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_gradients_are_clipped_to_their_norm(clip_norm: float) -> None:
    pair, twin, x = plain(), plain(), torch.randn(20, X)
    loss = probae.ELBO().differentiable_loss(twin.model, twin.guide, x) / 20
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
    before = nn.utils.parameters_to_vector(pair.parameters()).clone()
    fit(pair, x, epochs=1, lr=1.0, clip_norm=clip_norm, optimizer=torch.optim.SGD)
    step = before - nn.utils.parameters_to_vector(pair.parameters())
    expected = gradient * min(1.0, clip_norm / gradient.norm().item())
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)


def test_every_form_of_the_same_data_trains_the_same(tmp_path: Path) -> None:
    x = bits()
    path = tmp_path / "x.npy"
    np.save(path, x.numpy().astype(np.float64))
    forms = {
        "float64 tensor": x.double(),
        "float64 array": x.numpy().astype(np.float64),
        "bool tensor": x.bool(),
        "read-only array": np.broadcast_to(x.numpy(), x.shape),
        "path": path,
        "str": str(path),
        "TensorDataset": TensorDataset(x),
        "with labels": TensorDataset(x.double(), torch.arange(20)),
        "view": x.T.contiguous().T,
        "needs grad": x.clone().requires_grad_() * 1.0,
    }
    expected = vae()
    reference = fit(expected, x, x, epochs=2, batch_size=8)
    for name, form in forms.items():
        pair = vae()
        run = fit(pair, form, form, epochs=2, batch_size=8)
        assert run.history["val_loss"] == reference.history["val_loss"], name
        assert_state(pair, state(expected))


class Augmented(Dataset[Tensor]):
    """Item i is i in its first pixel, and in the second how often it was asked for."""

    def __init__(self, size: int = 10, as_numpy: bool = False) -> None:
        self.calls = [0] * size
        self.as_numpy = as_numpy

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, i: int) -> Any:
        self.calls[i] += 1
        item = torch.zeros(X)
        item[0], item[1] = i, self.calls[i]
        return item.numpy() if self.as_numpy else (item, "label")


@pytest.mark.parametrize("as_numpy", [False, True])
def test_augmentations_live_at_every_presentation(as_numpy: bool) -> None:
    data, spy = Augmented(as_numpy=as_numpy), Spy()
    fit(vae(likelihood="gaussian"), data, epochs=4, batch_size=3, objective=spy)
    seen = torch.cat(spy.trained)
    assert len(seen) == 40
    for i in range(10):
        presentations = seen[seen[:, 0] == i][:, 1]
        assert len(presentations) == 4
        assert len(presentations.unique()) == 4
    assert max(data.calls) <= 7  # four epochs, a first look, what is measured, and whether grey


def test_validation_dataset_is_read_once() -> None:
    val, spy = Augmented(), Spy()
    pair = vae(likelihood="gaussian")
    run = fit(pair, torch.randn(20, X), val, epochs=3, objective=spy, lr=1e-30)
    assert len(set(run.history["val_loss"])) == 1
    assert max(val.calls) <= 2


@pytest.mark.parametrize("n", [1, 2])
def test_one_datum_is_enough(n: int) -> None:
    run = fit(vae(), bits(n), bits(n), epochs=2, objective=probae.IWAE(2))
    assert all(math.isfinite(v) for column in run.history.values() for v in column)


def test_progress_is_shown_on_stderr_and_only_if_asked(
    capfd: pytest.CaptureFixture[str],
) -> None:
    probae.fit(vae(), bits(), epochs=2, progress=False)
    assert capfd.readouterr() == ("", "")
    probae.fit(vae(), bits(), bits(6), epochs=2, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "epoch 2/2" in err
    assert "nats" in err


def test_absurd_learning_rate_names_the_parameter_and_changes_nothing() -> None:
    pair, x = vae(), bits()
    before = state(pair)
    message = r"parameter encoder\S* is not finite .*encoder, site 'z'.*parameters of epoch 0 again"
    with pytest.raises(FloatingPointError, match=message):
        fit(pair, x, epochs=3, lr=1e38, batch_size=8)
    assert_state(pair, before)


@pytest.mark.parametrize("learning_rate", [1e20, 1e30, 1e38])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    "build", [vae, plain, lambda: probae.PPCA(X, Z)], ids=["vae", "ae", "ppca"]
)
def test_divergence_gives_back_the_last_good_epoch(
    build: Callable[[], Autoencoder], steps: int, learning_rate: float
) -> None:
    # the overflow comes in the last, the first or the middle step of an epoch: two good epochs
    # of three steps, then a rate under which parameters overflow, or stay finite and the loss does
    torch.manual_seed(0)
    x, pair = bits(), build()
    twin = copy.deepcopy(pair)
    good = 6 + 3 - steps
    schedule = partial(
        torch.optim.lr_scheduler.LambdaLR,
        lr_lambda=lambda step: 1.0 if step < good else learning_rate,
    )
    with pytest.raises(FloatingPointError, match=r"parameters of epoch 2 again"):
        fit(pair, x, epochs=5, batch_size=8, lr=1e-3, schedule=schedule)
    fit(twin, x, epochs=2, batch_size=8, lr=1e-3)
    assert_state(pair, state(twin))
    assert all(tensor.isfinite().all() for tensor in pair.state_dict().values())


def test_a_parameter_that_overflows_unseen_is_found_at_the_end_of_the_epoch() -> None:
    # exp(-∞) = 0: the loss is finite, and would stay so
    pair = assemble(encoder=lambda x, p: normal(x[..., :Z] + p.exp()))
    pair.decoder.requires_grad_(False)
    before = state(pair)
    message = r"diverged in epoch 1: parameter encoder.parameter is not finite .*epoch 0 again"
    with pytest.raises(FloatingPointError, match=message):
        fit(pair, bits(), epochs=1, batch_size=1, lr=3e38)
    assert_state(pair, before)


MARK = 9.0  # a datum that holds this number is one that a part cannot stand


class Part(nn.Module):
    """A function of its input as a module, with a parameter to train."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.parameter = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.parameter)


def marked(x: Tensor) -> Tensor:
    return (x > MARK - 1).any(-1, keepdim=True)  # codes have moved a little from the data


def normal(loc: Tensor, scale: float | Tensor = 1.0) -> dist.Distribution:
    return dist.Normal(loc, scale).to_event(1)


def broken_encoder() -> Autoencoder:
    def encoder(x: Tensor, p: Tensor) -> Any:
        return normal(torch.where(marked(x), math.nan, x[..., :Z] + p))

    return assemble(encoder=encoder)


def broken_encoder_scale() -> Autoencoder:
    def encoder(x: Tensor, p: Tensor) -> Any:
        return normal(x[..., :Z] + p, torch.where(marked(x), 0.0, 1.0).expand(*x.shape[:-1], Z))

    return assemble(encoder=encoder)


def broken_decoder() -> Autoencoder:
    def decoder(z: Tensor, p: Tensor) -> Any:
        return normal(torch.where(marked(z), math.nan, z + p).repeat_interleave(X // Z, -1))

    return assemble(encoder=point, decoder=decoder)


def impossible_datum() -> Autoencoder:
    def decoder(z: Tensor, p: Tensor) -> Any:
        logits = torch.zeros(*z.shape[:-1], X, 10) + p * z[..., :1, None]
        logits[..., int(MARK)] = -math.inf
        return dist.Categorical(logits=logits).to_event(1)

    return assemble(decoder=decoder)


def broken_corruption() -> Autoencoder:
    def corruption(x: Tensor, p: Tensor) -> Any:
        return normal(torch.where(marked(x), math.nan, x + p))

    return assemble(corruption=corruption)


def point(x: Tensor, p: Tensor) -> Any:
    return dist.Delta(x[..., :Z] + p, event_dim=1)


def assemble(**parts: Callable[[Tensor, Tensor], Any]) -> Autoencoder:
    functions = {
        "encoder": lambda x, p: normal(x[..., :Z] + p),
        "decoder": lambda z, p: normal((z + p).repeat_interleave(X // Z, -1)),
        **parts,
    }
    return Autoencoder(
        probae.StandardNormalPrior(Z), **{name: Part(f) for name, f in functions.items()}
    )


BROKEN = [
    (broken_encoder, "site 'z' of the guide drew a value that is not finite"),
    (broken_encoder_scale, "site 'z' of the guide has a log-probability that is not finite"),
    (broken_decoder, "site 'x' of the model has a log-probability that is not finite"),
    (impossible_datum, "site 'x' of the model has a log-probability that is not finite"),
    (broken_corruption, "site 'x_tilde' of the guide drew a value that is not finite"),
]
broken_parts = pytest.mark.parametrize(
    ("build", "fault"), BROKEN, ids=lambda v: getattr(v, "__name__", "")
)


def with_mark(x: Tensor) -> Tensor:
    return torch.cat([x[:-1], torch.full((1, X), MARK)])


@broken_parts
@pytest.mark.parametrize("batch_size", [20, 3])
def test_one_bad_datum_is_traced_to_its_site(
    build: Callable[[], Autoencoder], fault: str, batch_size: int
) -> None:
    # whole batch: it comes in the first step, which runs under Pyro's own checks
    pair, x = build(), with_mark(bits())
    before = state(pair)
    with pytest.raises(
        FloatingPointError, match=rf"loss became .* epoch 1, step \d: {fault}.*epoch 0"
    ):
        fit(pair, x, batch_size=batch_size, epochs=2)
    assert_state(pair, before)


@broken_parts
def test_one_bad_validation_datum_is_traced_to_its_site(
    build: Callable[[], Autoencoder], fault: str
) -> None:
    pair = build()
    before = state(pair)
    with pytest.raises(FloatingPointError, match=rf"became .* at the end of epoch 1: {fault}"):
        fit(pair, bits(), with_mark(bits()), epochs=2)
    assert_state(pair, before)


class Late(Dataset[Tensor]):
    """Good data in the first epoch, then one that calls ``event``."""

    def __init__(self, event: Callable[[], Tensor], size: int = 20) -> None:
        self.x, self.event, self.calls = bits(size), event, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        self.calls += 1  # 2 to look at, 20 to measure on, 20 in the first epoch
        return self.event() if self.calls == 2 + 20 + 20 + 11 else self.x[i]


def fail(error: Exception) -> Tensor:
    raise error


@pytest.mark.parametrize(
    ("event", "error", "message"),
    [
        (lambda: torch.full((X,), MARK), FloatingPointError, "epoch 2, step 3: site 'z'.*epoch 1"),
        (lambda: torch.full((X,), math.nan), ValueError, "x must be finite"),
        (
            lambda: torch.zeros(X + 1),
            ValueError,
            r"x\[\d+\] must have the shape \(8,\).*got \(9,\)",
        ),
        (lambda: "label", ValueError, r"x\[\d+\] must be a tensor or a tuple .* got str"),
        (lambda: fail(OSError("disk gone")), OSError, "disk gone"),
    ],
    ids=["NaN loss", "NaN datum", "shape", "type", "read error"],
)
def test_an_error_in_mid_training_gives_back_the_last_good_epoch(
    event: Callable[[], Tensor], error: type[Exception], message: str
) -> None:
    pair = broken_encoder()
    twin = copy.deepcopy(pair)
    data = Late(event)
    objective = probae.ELBO(beta=LinearWarmup(epochs=5))
    with pytest.raises(error, match=message):
        fit(pair, data, epochs=4, batch_size=4, objective=objective)
    fit(twin, TensorDataset(data.x), epochs=1, batch_size=4, objective=objective)
    assert_state(pair, state(twin))
    assert objective.beta == 1.0  # the schedule is over for whoever uses it next


def test_an_interrupt_keeps_what_was_learned() -> None:
    def interrupt() -> Tensor:
        raise KeyboardInterrupt

    pair = vae()
    before = state(pair)
    with pytest.raises(KeyboardInterrupt):
        fit(pair, Late(interrupt), epochs=4, batch_size=4)
    assert not torch.equal(
        pair.encoder.network.output.weight, before["encoder.network.layers.2.weight"]
    )


def test_active_units_are_those_whose_mean_moves() -> None:
    pair = vae(hidden=())
    weight, bias = pair.encoder.network.affine()
    with torch.no_grad():
        weight.zero_()
        bias.fill_(3.0)
        weight[0, 0] = 1.0
    x = bits(50)
    assert probae.active_units(pair, x) == 1
    assert probae.active_units(pair, x, threshold=0.3) == 0  # the variance of a bit is 1/4
    with torch.no_grad():
        weight[1, 1] = 0.1
    assert probae.active_units(pair, x) == 1  # 0.0025 is below the threshold of 0.01
    assert probae.active_units(pair, x, threshold=1e-3) == 2


def test_code_without_a_mean_in_closed_form_can_be_measured() -> None:
    def encoder(x: Tensor, p: Tensor) -> Any:
        base = dist.Normal(x[..., :Z] + p, 0.1)
        return dist.TransformedDistribution(
            base, [dist.transforms.AffineTransform(1.0, 2.0)]
        ).to_event(1)

    pair, x = assemble(encoder=encoder), torch.randn(200, X)
    with pytest.raises(NotImplementedError):
        _ = pair.encoder(x).mean
    assert fit(pair, x, epochs=1).history["active_units"] == [2.0]
    assert probae.active_units(pair, x) == 2
    code = probae.reconstruct(pair, x).mean.reshape(200, Z, X // Z)[..., 0]
    loc = 1 + 2 * (x[:, :Z] + pair.encoder.parameter) + pair.decoder.parameter
    torch.testing.assert_close(code, loc, rtol=0, atol=0.1 * 2 * 6 / 10)  # 6 standard errors


def test_an_interrupt_leaves_the_last_whole_epoch() -> None:
    torch.manual_seed(0)
    pair, x = probae.VAE(8, 2, hidden=(5,)), torch.rand(64, 8).round()
    states: list[dict[str, Tensor]] = []

    class Interrupted(probae.ELBO):
        """Objective at whose seventh step somebody presses Ctrl-C; an epoch has four."""

        steps = 0

        def differentiable_loss(self, *args: object, **kwargs: object) -> Tensor:
            self.steps += torch.is_grad_enabled()
            if self.steps == 5:
                states.append({name: t.clone() for name, t in pair.state_dict().items()})
            if self.steps == 7:
                raise KeyboardInterrupt
            return super().differentiable_loss(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        probae.fit(pair, x, epochs=3, batch_size=16, objective=Interrupted(), progress=False)
    assert all(torch.equal(t, states[0][name]) for name, t in pair.state_dict().items())


@pytest.mark.parametrize("name", ["TraceEnum_ELBO", "JitTrace_ELBO", "TraceTailAdaptive_ELBO"])
def test_objectives_that_cannot_be_differentiated_are_refused(name: str) -> None:
    objective = getattr(pyro.infer, name)()
    with pytest.raises(ValueError, match=f"{name} cannot be differentiated.*Trace_ELBO"):
        probae.fit(probae.VAE(8, 2), torch.rand(4, 8).round(), objective=objective, progress=False)


def test_the_record_says_what_the_elbo_bounds_and_what_is_left_of_the_kind() -> None:
    pair, grey = probae.VAE(8, 2, hidden=(5,)), torch.rand(64, 8)
    assert "stochastic binarisation" in repr(probae.fit(pair, grey, epochs=1, progress=False))
    run = probae.fit(pair, grey, epochs=1, binarize=True, progress=False)
    assert run.bound_on == "log p(x)"
    late = torch.cat([grey.round(), grey])  # grey data behind the binary ones are seen too
    assert "grey" in probae.fit(pair, late, epochs=1, progress=False).bound_on
    kinds = {
        probae.IWAE(3): "IWELBO",
        probae.ELBO(beta=0.5): "ENERGY",
        probae.ELBO(beta=2.0): "ELBO",
    }
    for objective, kind in kinds.items():
        run = probae.fit(pair, grey.round(), epochs=1, objective=objective, progress=False)
        assert run.kind == kind


# numerical faults


def with_marks(x: Tensor, *places: int) -> Tensor:
    x = x.clone()
    x[list(places)] = MARK
    return x


class Poisoned(torch.autograd.Function):
    """The identity, whose gradient is NaN for marked data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marks: Tensor) -> Tensor:
        ctx.save_for_backward(marks)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (marks,) = ctx.saved_tensors
        return torch.where(marks, math.nan, gradient), None


def broken_gradient() -> Autoencoder:
    """A pair whose loss is always finite, while one datum makes the encoder's gradient NaN."""

    def encoder(x: Tensor, p: Tensor) -> Any:
        return normal(Poisoned.apply(x[..., :Z] + p, marked(x)))

    return assemble(encoder=encoder)


def bad_scale(value: float) -> Callable[[], Autoencoder]:
    def build() -> Autoencoder:
        def decoder(z: Tensor, p: Tensor) -> Any:
            scale = torch.where(marked(z), value, 1.0).expand(*z.shape[:-1], X)
            return normal((z + p).repeat_interleave(X // Z, -1), scale)

        return assemble(encoder=point, decoder=decoder)

    return build


FAULTS: list[tuple[Callable[[], Autoencoder], str]] = [
    (broken_encoder, r"loss became .*: site 'z' of the guide drew a value .* \(its loc is not\)"),
    (broken_encoder_scale, r"loss .*site 'z' .* \(its scale is not in GreaterThan.*\)"),
    (broken_decoder, r"loss .*site 'x' of the model .* \(its loc is not\)"),
    (bad_scale(math.nan), r"loss .*site 'x' of the model .* \(its scale is not\)"),
    (bad_scale(0.0), r"loss .*site 'x' of the model .* \(its scale is not in GreaterThan.*\)"),
    (
        broken_gradient,
        r"a gradient became NaN or infinite .*: the gradient of parameter encoder.parameter is "
        r"not finite \(it belongs to the encoder, site 'z'\)",
    ),
]
faults = pytest.mark.parametrize(("build", "message"), FAULTS)


@faults
def test_a_fault_names_site_step_and_datum(build: Callable[[], Autoencoder], message: str) -> None:
    x, pair = with_marks(torch.zeros(20, X), 13), build()
    before = state(pair)
    torch.manual_seed(0)
    order = torch.randperm(20).tolist()
    step = order.index(13) // 3 + 1
    with pytest.raises(FloatingPointError, match=rf"(?s){message}.*, at datum 13\..*epoch 0 again"):
        fit(pair, x, epochs=2, batch_size=3)
    with pytest.raises(FloatingPointError, match=rf"at epoch 1, step {step}:"):
        fit(pair, x, epochs=2, batch_size=3)
    assert_state(pair, before)


@faults
def test_a_batch_with_a_fault_is_skipped_and_counted(
    build: Callable[[], Autoencoder], message: str
) -> None:
    torch.manual_seed(1)
    clean = torch.randn(20, X)
    x, pair = with_marks(clean, 13), build()
    with pytest.warns(UserWarning, match=rf"(?s)fit leaves out a batch, as {message}.*datum 13"):
        run = fit(pair, x, clean[:6], epochs=3, batch_size=3, on_fault="skip", lr=0.01)
    assert run.skipped == 3
    assert run.history["skipped"] == [1.0, 1.0, 1.0]
    assert all(math.isfinite(v) for column in run.history.values() for v in column)
    assert all(tensor.isfinite().all() for tensor in pair.state_dict().values())
    good = fit(build(), clean, epochs=1, batch_size=3, lr=0.01, on_fault="skip")
    assert (good.skipped, good.history["skipped"]) == (0, [0.0])
    assert "skipped" not in fit(build(), clean, epochs=1).history


def test_a_fault_in_data_that_are_measured_too_ends_no_run() -> None:
    x = torch.randn(12, X)
    x[5] = 1e30
    with pytest.warns(UserWarning, match="fit leaves out a batch"):
        run = fit(probae.VAE(X, 2, likelihood="gaussian"), x, epochs=2, batch_size=4,
                  on_fault="skip")  # fmt: skip
    assert run.history["skipped"] == [1.0, 1.0]
    assert all(map(math.isfinite, run.history["loss"]))
    assert not any(map(math.isfinite, run.history["elbo"]))


def test_the_loss_is_the_mean_over_the_data_that_were_not_skipped() -> None:
    x = with_marks(torch.zeros(20, X), 13)
    run = fit_skipping(broken_decoder(), x, lr=1e-30, batch_size=4)
    plain = fit(broken_decoder(), torch.zeros(20, X), lr=1e-30, batch_size=4, epochs=1)
    assert run.history["loss"] == pytest.approx(plain.history["loss"], rel=1e-5)


def fit_skipping(pair: Autoencoder, x: Any, **keywords: Any) -> probae.Run:
    with pytest.warns(UserWarning, match="fit leaves out a batch"):
        return fit(pair, x, torch.zeros(4, X), on_fault="skip", **{"epochs": 1, **keywords})


def test_a_skipped_batch_leaves_no_trace() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(X)
            self.linear = nn.Linear(X, 2 * Z)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)).unflatten(-1, (2, Z))

    def build() -> Autoencoder:
        torch.manual_seed(0)
        decoder = broken_decoder().decoder
        return Autoencoder(probae.StandardNormalPrior(Z), probae.GaussianEncoder(Normed()), decoder)

    class Breaking(probae.ELBO):
        """Its loss, or a gradient, is not finite at these steps."""

        def __init__(self, loss: tuple[int, ...] = (), gradient: tuple[int, ...] = ()) -> None:
            super().__init__()
            self._loss, self._gradient, self._step = loss, gradient, 0

        def differentiable_loss(self, *arguments: Any, **keywords: Any) -> Tensor:
            loss = super().differentiable_loss(*arguments, **keywords)
            if not torch.is_grad_enabled():
                return loss
            self._step += 1
            if self._step in self._gradient:
                return Poisoned.apply(loss, torch.tensor(True))
            return loss * math.inf if self._step in self._loss else loss

    x = torch.randn(12, X)
    reached: list[dict[str, Tensor]] = []
    for objective in (Breaking(), Breaking(loss=(2,)), Breaking(gradient=(2,))):
        pair = build()
        states: list[dict[str, Tensor]] = []
        spy = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=note(pair, states))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = fit(
                pair, x, epochs=1, batch_size=4, objective=objective, on_fault="skip", schedule=spy
            )
        assert run.skipped == (objective._loss + objective._gradient != ())
        # states after the start and after each of three steps
        for name in states[0]:
            unchanged = torch.equal(states[1][name], states[2][name])
            assert unchanged == bool(run.skipped), name
        reached.append(states[1])
    assert all(torch.equal(reached[0][name], t) for name, t in reached[2].items())


def note(pair: Autoencoder, states: list[dict[str, Tensor]]) -> Callable[[int], float]:
    """A schedule of a constant rate that keeps what the encoder is after each step."""

    def rate(step: int) -> float:
        states.append(copy.deepcopy(pair.encoder.state_dict()))
        return 1.0

    return rate


def test_too_many_faults_in_a_row_are_an_error() -> None:
    pair, x = broken_decoder(), torch.full((40, X), MARK)
    before = state(pair)
    message = r"(?s)11 batches in a row had faults; the last: loss became nan at epoch 1, step 11: "
    with (
        pytest.warns(UserWarning, match="leaves out"),
        pytest.raises(FloatingPointError, match=message + r"site 'x' .* datum \d+.*epoch 0 again"),
    ):
        fit(pair, x, torch.zeros(4, X), epochs=2, batch_size=2, on_fault="skip")
    assert_state(pair, before)
    with (
        pytest.warns(UserWarning, match="leaves out"),
        pytest.raises(FloatingPointError, match=r"no batch of epoch 1 was fit to .*: 10 were left"),
    ):
        fit(pair, x, torch.zeros(4, X), epochs=2, batch_size=4, on_fault="skip")
    assert_state(pair, before)


def test_a_matrix_without_rank_is_a_fault_like_others() -> None:
    def encoder(x: Tensor, p: Tensor) -> Any:
        matrix = torch.eye(Z) * torch.where(marked(x), -1.0, 1.0)[..., None]
        return dist.MultivariateNormal(x[..., :Z] + p, scale_tril=torch.linalg.cholesky(matrix))

    pair, x = assemble(encoder=encoder), with_marks(torch.zeros(20, X), 13)
    with pytest.raises(FloatingPointError, match="a matrix lost its rank"):
        fit(pair, x, torch.zeros(4, X), batch_size=3, epochs=1)
    assert fit_skipping(pair, x, batch_size=3).skipped == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_that_gives_nan_now_and_then(num_workers: int) -> None:
    x = torch.zeros(20, X)
    x[13, 2] = math.nan
    pair = assemble()
    options: dict[str, Any] = {"batch_size": 3, "num_workers": num_workers}
    with pytest.raises(ValueError, match=r"x must be finite.*13"):
        fit(pair, TensorDataset(x), torch.zeros(4, X), epochs=1, **options)
    run = fit_skipping(pair, TensorDataset(x), epochs=2, **options)
    assert run.skipped == 2
    assert all(math.isfinite(v) for column in run.history.values() for v in column)


def test_finite_gradients_whose_sum_overflows_are_no_fault() -> None:
    def decoder(z: Tensor, p: Tensor) -> Any:
        return normal((z * 0 + p * 1e20).repeat_interleave(X // Z, -1))

    pair = assemble(decoder=decoder)
    pair.decoder.parameter = nn.Parameter(torch.full((Z,), 5e-3))
    optimizer = partial(torch.optim.SGD, momentum=0.0)
    run = fit(pair, torch.zeros(4, X), epochs=1, lr=1e-42, optimizer=optimizer)
    assert run.history["loss"][0] > 1e9
    gradient = pair.decoder.parameter.grad
    assert gradient.isfinite().all()
    assert gradient.sum().isinf()


def test_infinite_gradients_that_cancel_in_their_sum_are_a_fault() -> None:
    signs = torch.tensor([math.inf, -math.inf])

    def decoder(z: Tensor, p: Tensor) -> Any:
        if p.requires_grad and torch.is_grad_enabled():
            p.register_hook(lambda _: signs)
        return normal((z + p).repeat_interleave(X // Z, -1))

    pair = assemble(decoder=decoder)
    pair.decoder.parameter = nn.Parameter(torch.zeros(Z))
    with pytest.raises(FloatingPointError, match=r"gradient of parameter decoder.parameter"):
        fit(pair, torch.zeros(4, X), epochs=1)


@pytest.mark.parametrize("objective", [probae.ELBO(), probae.ELBO(beta=LinearWarmup(4, end=2.0))])
def test_val_loss_is_that_of_a_pass_of_its_own(objective: probae.ELBO) -> None:
    class Other(probae.ELBO):  # for all that fit knows, of other terms
        pass

    pair, x = vae(), bits(1200)
    other = Other(beta=objective.schedule or objective.beta)
    row = monitoring.measure(pair, x, objective)
    assert row == monitoring.measure(pair, x, other)
    assert row["val_loss"] == monitoring.objective_loss(pair, objective, x)
    assert "val_loss" not in monitoring.measure(pair, x)


def test_large_steps_multiply_as_fast_as_float32_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_onednn_keeps_float32", lambda: True)
    seen = []

    class Looks(probae.ELBO):
        def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().differentiable_loss(model, guide, *args, **kwargs)
            if loss.requires_grad:
                seen.append(precision.setting())
                loss.register_hook(lambda _: seen.append(precision.setting()))
            return loss

    default, fast = precision.setting(), "medium" if precision.MATMUL is None else "bf16"
    for limit, expected in ((training.LARGE, default), (0, fast)):
        monkeypatch.setattr(training, "LARGE", limit)
        seen.clear()
        fit(vae(), bits(), epochs=1, batch_size=20, objective=Looks())
        assert seen == [expected] * 2
    assert precision.setting() == default
