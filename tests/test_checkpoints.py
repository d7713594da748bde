"""Checkpoints: whole or not there, of this run or refused, and to the bit the run they continue."""

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import probae
from probae import Autoencoder, LinearWarmup, checkpoints, files

X, Z = 8, 2
fit = partial(probae.fit, progress=False)
EVERY_STEP = 1e-9  # seconds


def vae(seed: int = 0, **keywords: Any) -> Autoencoder:
    torch.manual_seed(seed)
    return probae.VAE(X, Z, **{"hidden": (5,), **keywords})


def bits(n: int = 20) -> Tensor:
    return torch.rand(n, X, generator=torch.Generator().manual_seed(n)).round()


def assert_same(pair: Autoencoder, other: Autoencoder) -> None:
    expected = other.state_dict()
    for name, tensor in pair.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def comparable(history: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: column for name, column in history.items() if name != "seconds"}


class Killed(Exception):
    """What ends a run in the middle."""


class Killer:
    """Ends a run before its step of that number; its steps are counted from the first call."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def __call__(self) -> None:
        if not torch.is_grad_enabled():
            return
        self.steps += 1
        if self.steps > self.after:
            raise Killed


def dying(objective: Any, after: int) -> Any:
    """Return the objective, to be killed after so many steps."""
    plain, killer = objective.differentiable_loss, Killer(after)

    def loss(*arguments: Any) -> Tensor:
        killer()
        return plain(*arguments)

    objective.differentiable_loss = loss
    return objective


class Noisy(Dataset[Tensor]):
    """Draws from the random streams of torch, NumPy and Python at every look."""

    def __init__(self, size: int = 20) -> None:
        self.x = bits(size)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        noise = torch.rand(X) + np.random.rand() + random.random()  # noqa: NPY002
        noise = noise + random.gauss(0, 1) + np.random.randn()  # noqa: NPY002
        return self.x[i] + 0.1 * noise


class BatchNormed(nn.Module):
    """An encoder network whose buffers change at every step, and that drops units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(X, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2 * Z)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).unflatten(-1, (2, Z))


def batch_normed() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        probae.StandardNormalPrior(Z),
        probae.GaussianEncoder(BatchNormed()),
        probae.BernoulliDecoder(probae.MLP(Z, X)),
    )


def _pyro_elbo() -> Any:
    return TraceMeanField_ELBO(num_particles=2, vectorize_particles=True)


GREY = torch.rand(20, X, generator=torch.Generator().manual_seed(3))
CASES: dict[str, tuple[Callable[[], Autoencoder], Callable[[], Any], dict[str, Any]]] = {
    "plain": (vae, bits, {}),
    "cosine": (vae, bits, {"schedule": "cosine"}),
    "binarised, validated": (vae, lambda: GREY, {"binarize": True, "val": GREY[:6]}),
    "clipped SGD": (
        vae,
        bits,
        {"optimizer": partial(torch.optim.SGD, momentum=0.9), "clip_norm": 0.1},
    ),
    "AdamW, step schedule": (
        vae,
        bits,
        {
            "optimizer": partial(torch.optim.AdamW, amsgrad=True),
            "schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7),
        },
    ),
    "sequence of schedules": (
        vae,
        bits,
        {
            "schedule": lambda optim: torch.optim.lr_scheduler.SequentialLR(
                optim,
                [
                    torch.optim.lr_scheduler.LinearLR(optim, 0.1, total_iters=4),
                    torch.optim.lr_scheduler.ExponentialLR(optim, 0.9),
                ],
                milestones=[4],
            )
        },
    ),
    "rates of NumPy": (
        vae,
        bits,
        {
            "optimizer": partial(torch.optim.AdamW, weight_decay=np.float32(0.1)),
            "schedule": lambda optim: torch.optim.lr_scheduler.LambdaLR(
                optim, lambda step: np.exp(-0.1 * step)
            ),
        },
    ),
    "milestones": (
        vae,
        bits,
        {"schedule": lambda optim: torch.optim.lr_scheduler.MultiStepLR(optim, [3, 5, 5])},
    ),
    "corruption": (
        lambda: probae.DenoisingVAE(X, Z, hidden=(5,), corruption=probae.BitFlip(0.2)),
        bits,
        {},
    ),
    "batch norm, dropout": (batch_normed, bits, {}),
    "warm-up": (vae, bits, {"warmup": 2.5, "val": bits(6), "patience": 1}),
    "early stopping": (
        vae,
        lambda: torch.ones(20, X),
        {"val": torch.zeros(6, X), "patience": 1, "kills": (1, 2, 2)},
    ),
    "augmented": (lambda: vae(likelihood="gaussian"), Noisy, {"val": Noisy(6)}),
    "augmented, measured on itself": (lambda: vae(likelihood="gaussian"), Noisy, {}),
    "workers": (
        lambda: vae(likelihood="gaussian"),
        Noisy,
        {"num_workers": 1, "kills": (5,)},
    ),
    "global stream": (vae, bits, {"seed": None}),
    "double": (lambda: vae().double(), bits, {"objective": lambda: probae.IWAE(3, dreg=True)}),
    "Pyro's ELBO": (vae, bits, {"objective": _pyro_elbo}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(case: str, tmp_path: Path) -> None:
    make_pair, data, options = CASES[case]
    keywords: dict[str, Any] = {"epochs": 4, "batch_size": 8, "lr": 0.01, **options}
    warmup, kills = keywords.pop("warmup", 0.0), keywords.pop("kills", (1, 2, 4, 3))
    make = keywords.pop("objective", lambda: probae.ELBO(LinearWarmup(warmup) if warmup else 1.0))

    def build() -> Autoencoder:
        torch.manual_seed(0)
        pair = make_pair()
        torch.manual_seed(3)
        return pair

    def seed_all() -> None:
        torch.manual_seed(3)
        random.seed(5)
        np.random.seed(7)  # noqa: NPY002

    whole = build()
    seed_all()
    expected = fit(whole, data(), objective=make(), **keywords)
    after = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002

    keywords |= {"checkpoint": tmp_path, "checkpoint_seconds": EVERY_STEP, "resume": True}
    seed_all()
    for steps in kills:
        with pytest.raises(Killed):
            fit(build(), data(), objective=dying(make(), steps), **keywords)
        random.seed(os.urandom(4))  # of another process
        np.random.seed(random.randrange(1000))  # noqa: NPY002
        torch.manual_seed(random.randrange(1000))
    resumed = build()
    with torch.no_grad():
        for parameter in resumed.parameters():  # what it starts from does not matter
            parameter.fill_(0.5)
    torch.manual_seed(3)
    run = fit(resumed, data(), objective=make(), **keywords)
    assert comparable(run.history) == comparable(expected.history)
    assert (run.best_epoch, run.stopped_early) == (expected.best_epoch, expected.stopped_early)
    assert (run.kl_method, run.bound_on) == (expected.kl_method, expected.bound_on)
    assert_same(resumed, whole)
    if case in ("augmented", "global stream"):
        now = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        assert now == after
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.FILE]


def test_a_checkpoint_is_written_at_the_end_of_every_epoch_and_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[int, int]] = []
    write = checkpoints.write

    def spy(file: Path, state: dict[str, Any]) -> None:
        places.append((state["epoch"], state["step"]))
        write(file, state)

    monkeypatch.setattr(checkpoints, "write", spy)
    fit(vae(), bits(), epochs=2, batch_size=8, checkpoint=tmp_path / "a")
    assert places == [(1, 0), (2, 0), (3, 0)]
    places.clear()
    fit(vae(), bits(), epochs=1, batch_size=8, checkpoint=tmp_path / "b", checkpoint_seconds=1e-9)
    assert places == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    places.clear()
    fit(vae(), bits(), epochs=2, batch_size=8)
    assert places == []


def test_training_goes_on_with_more_epochs(tmp_path: Path) -> None:
    whole, parts = vae(), vae()
    fit(whole, bits(), epochs=5, batch_size=8)
    options: dict[str, Any] = {"batch_size": 8, "checkpoint": tmp_path, "resume": True}
    first = fit(parts, bits(), epochs=2, **options)
    assert len(first.history["loss"]) == 2
    run = fit(vae(seed=4), bits(), epochs=2, **options)  # nothing is left to do
    assert run.history == first.history
    assert run.kl_method == first.kl_method == {"z": "analytic"}
    resumed = vae(seed=4)
    run = fit(resumed, bits(), epochs=5, **options)
    assert len(run.history["loss"]) == 5
    assert run.history["seconds"] == sorted(run.history["seconds"])
    assert run.seconds > run.history["seconds"][1] >= first.history["seconds"][1]
    assert_same(resumed, whole)
    with pytest.raises(ValueError, match=r"epochs must be at least 5, which .* begun, got 3"):
        fit(vae(), bits(), epochs=3, **options)


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    x, val = torch.ones(20, X), torch.zeros(6, X)
    options: dict[str, Any] = {"checkpoint": tmp_path, "resume": True, "epochs": 9}
    for patience, epochs in ((1, 2), (1, 2), (3, 4), (2, 4)):
        run = fit(vae(), x, val, patience=patience, **options)
        assert (run.stopped_early, run.best_epoch) == (True, 1)
        assert len(run.history["loss"]) == epochs


def test_cosine_depends_on_the_number_of_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path, "resume": True, "schedule": "cosine"}
    fit(vae(), bits(), epochs=2, **options)
    with pytest.raises(ValueError, match=r"epochs must be 2, as in the checkpoint, got 3.*cosine"):
        fit(vae(), bits(), epochs=3, **options)


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({"batch_size": 9}, r"batch_size \(was 8, is 9\)"),
    "learning rate": ({"lr": 0.1}, r"lr \(was 0.001, is 0.1\)"),
    "seed": ({"seed": 1}, r"seed \(was 0, is 1\)"),
    "clip": ({"clip_norm": 1.0}, r"clip_norm \(was None, is 1.0\)"),
    "binarize": ({"binarize": True}, r"binarize \(was False, is True\)"),
    "schedule": ({"schedule": "cosine"}, r"schedule \(was constant, is cosine\)"),
    "optimizer": (
        {"optimizer": torch.optim.SGD},
        r"optimizer \(\w+ was .*, is .* and \d+ more\)",
    ),
    "setting of the optimizer": (
        {"optimizer": partial(torch.optim.Adam, fused=True, betas=(0.8, 0.9))},
        r"optimizer \(betas was \(0.9, 0.999\), is \(0.8, 0.9\)\)",
    ),
    "objective": ({"objective": probae.IWAE(3)}, r"objective \(.* more\)"),
    "its setting": (
        {"objective": probae.ELBO(beta=2.0)},
        r"objective \(constant_beta was 1.0, is 2.0\)",
    ),
    "its schedule": (
        {"objective": probae.ELBO(beta=LinearWarmup(2))},
        r"objective \(constant_beta was 1.0, is None and 2 more\)",
    ),
    "faults": ({"on_fault": "skip"}, r"on_fault \(was raise, is skip\)"),
    "validation": ({"val": bits(6)}, r"val \(was None, is \w+\)"),
    "data": ({"x": 1 - bits()}, r"x \(hash was \w+, is \w+\)"),
    "number of data": ({"x": bits(21)}, r"x \(hash was .* and 1 more\)"),
    "Dataset": ({"x": TensorDataset(bits())}, r"x \(hash was \w+, is None and 1 more\)"),
    "workers": (
        {"x": TensorDataset(bits()), "num_workers": 1},
        r"x \(hash was \w+, is None and 2 more\)",
    ),
    "width": (
        {"pair": partial(vae, hidden=(6,))},
        r"pair \(decoder.* was .*5.*, is .*6.* and \d+ more\)",
    ),
    "likelihood": ({"pair": partial(vae, likelihood="gaussian")}, r"pair \(decoder was Bern"),
    "setting of a part": ({"pair": lambda: changed(vae())}, r"pair \(encoder was .*1e-06.*0.5"),
    "fixed parameter": (
        {"pair": lambda: fixed(vae())},
        r"pair \(decoder\S+ was \(5,\) torch.float32, is \(5,\) torch.float32, fixed and 3 m",
    ),
    "dtype": ({"pair": lambda: vae().double()}, r"pair \(\S+ was .*float32, is .*float64"),
}


def changed(pair: Any) -> Any:
    pair.encoder.scale_min = 0.5
    return pair


def fixed(pair: Any) -> Any:
    pair.decoder.requires_grad_(False)
    return pair


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_run_is_refused_by_what_differs(case: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"x": bits(), "batch_size": 8, "epochs": 1, "checkpoint": tmp_path}
    fit(vae(), **options)
    changes, message = DIFFERENT[case]
    changes = dict(changes)
    pair = changes.pop("pair", vae)()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    content = (tmp_path / checkpoints.FILE).read_bytes()
    with pytest.raises(ValueError, match=rf"resume: .* of another run, .*: .*{message}"):
        fit(pair, resume=True, **{**options, **changes})
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.state_dict().items())
    assert (tmp_path / checkpoints.FILE).read_bytes() == content


def test_other_versions_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path, "resume": True, "batch_size": 8}
    fit(vae(), bits(), epochs=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(vae(), bits(), epochs=2, **options)
    now = str(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.warns(
        UserWarning, match=rf"other versions: torch \(was {re.escape(now)}, is 9.9\)"
    ):
        run = fit(vae(), bits(), epochs=3, **options)
    assert len(run.history["loss"]) == 3


def test_places_that_hold_no_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "run" / checkpoints.FILE).mkdir(parents=True)
    for name, message in (("link", "broken link"), ("run", "which is a folder there")):
        with pytest.raises(ValueError, match=rf"checkpoint must be a folder.*{message}"):
            fit(vae(), bits(), epochs=1, checkpoint=tmp_path / name)


def test_a_full_disk_ends_training_with_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed, pair = vae(), vae(seed=4), vae()
    fit(whole, bits(), epochs=4, batch_size=8)
    count, sync = [0], os.fsync

    def full(opened: int) -> None:
        count[0] += 1
        if count[0] > 4:  # two of each checkpoint: of the file, and of the folder
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(opened)

    options: dict[str, Any] = {"batch_size": 8, "checkpoint": tmp_path, "resume": True}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit(pair, bits(), epochs=4, **options)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.FILE]
    assert checkpoints.read(tmp_path / checkpoints.FILE)["epoch"] == 2
    fit(resumed, bits(), epochs=4, **options)
    assert_same(resumed, whole)


def transposed() -> Autoencoder:
    """Return a pair whose weights lie in memory column by column, as with channels_last."""
    pair = vae()
    for module in pair.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    return pair


def test_the_state_of_an_optimizer_lies_in_memory_as_the_parameters_do(tmp_path: Path) -> None:
    whole, resumed = transposed(), transposed()
    fit(whole, bits(), epochs=4, batch_size=8)
    options: dict[str, Any] = {"batch_size": 8, "checkpoint": tmp_path, "resume": True}
    fit(transposed(), bits(), epochs=2, **options)
    fit(resumed, bits(), epochs=4, **options)
    assert_same(resumed, whole)


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "short moment": lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "no moment": lambda s: s["optimizer"]["state"][0].pop("exp_avg"),
    "long step": lambda s: s["optimizer"]["state"][0].update(step=torch.zeros(2)),
    "another parameter": lambda s: s["optimizer"]["state"].update({-1: {}}),
    "no such parameter": lambda s: s["optimizer"]["state"].update({99: {}}),
    "flag": lambda s: s["optimizer"]["param_groups"][0].update(fused=False),
    "betas": lambda s: s["optimizer"]["param_groups"][0].update(betas=math.nan),
    "rate": lambda s: s["optimizer"]["param_groups"][0].update(lr="x"),
    "method": lambda s: s["scheduler"].update(step=1),
    "epoch": lambda s: s.update(epoch=math.nan),
    "step": lambda s: s.update(step=-1),
    "history": lambda s: s["history"].pop("loss"),
    "number of the history": lambda s: s["history"].update(loss=["x"]),
    "order": lambda s: s.update(order=s["order"] * 0),
    "order beyond": lambda s: s.update(order=s["order"] + 1),
    "order of numbers": lambda s: s.update(order=s["order"].double()),
    "NumPy's stream": lambda s: s["random"][0]["numpy"].fill_(10**6),
    "seconds": lambda s: s.update(seconds=()),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_checkpoints_are_refused(what: str, tmp_path: Path) -> None:
    """As one could write with a checksum that fits: an optimizer would reach beyond its memory."""
    options: dict[str, Any] = {"batch_size": 8, "checkpoint": tmp_path, "epochs": 3}
    options["schedule"] = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    objective = Pressing(4)
    fit(vae(), bits(), objective=objective, **options)
    file = tmp_path / checkpoints.FILE
    saved = checkpoints.read(file)
    FORGED[what](saved)
    checkpoints.write(file, saved)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors does not hold what a checkp"):
        fit(vae(), bits(), objective=objective, resume=True, **options)


def test_what_changes_no_figure_may_differ(tmp_path: Path) -> None:
    options: dict[str, Any] = {"x": bits(), "val": bits(6), "checkpoint": tmp_path, "resume": True}
    fit(vae(), epochs=1, **options)
    fit(vae(), epochs=2, patience=5, checkpoint_seconds=7.0, compile="auto", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, r"resume=True needs the folder of a checkpoint: pass checkpoint"),
        ({"resume": "yes", "checkpoint": "folder"}, r"resume must be True or False, got 'yes'"),
        ({"checkpoint": 3}, r"checkpoint must be a folder, got int"),
        ({"checkpoint": "file"}, r"checkpoint must be a folder, got the file .*file"),
        ({"checkpoint_seconds": 0}, r"checkpoint_seconds must be a finite number > 0, got 0"),
        ({"checkpoint_seconds": math.nan}, r"checkpoint_seconds must be .* got nan"),
        ({"on_fault": "ignore"}, r"on_fault must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_wrong_arguments(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        fit(vae(), bits(), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_earlier_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    fit(vae(), bits(), epochs=1, checkpoint=tmp_path)
    content = (tmp_path / checkpoints.FILE).read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is there already; pass resume"):
        fit(vae(), bits(), epochs=1, checkpoint=tmp_path)
    assert (tmp_path / checkpoints.FILE).read_bytes() == content


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_kill_between_write_and_rename_leaves_the_earlier_checkpoint(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = vae()
    options: dict[str, Any] = {"epochs": 3, "batch_size": 8}
    fit(whole, bits(), **options)
    options |= {"checkpoint": tmp_path, "resume": True}
    real, calls = {"fsync": os.fsync, "replace": os.replace}, []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:
            raise Killed
        return real[moment](*arguments)

    if moment == "write":  # half of the file, and no chance to clean up
        to_bytes = checkpoints.to_bytes

        def half(state: dict[str, Any]) -> bytes:
            content = to_bytes(state)
            if state["epoch"] == 3:
                files.part_of(tmp_path / checkpoints.FILE).write_bytes(content[:1000])
                raise Killed
            return content

        monkeypatch.setattr(checkpoints, "to_bytes", half)
    else:
        monkeypatch.setattr(os, moment, killed)
    with pytest.raises(Killed):
        fit(vae(), bits(), **options)
    monkeypatch.undo()
    earlier = checkpoints.read(tmp_path / checkpoints.FILE)
    assert earlier["epoch"] in (2, 3)
    resumed = vae(seed=4)
    fit(resumed, bits(), **options)
    assert_same(resumed, whole)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.FILE]


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    shared, base = torch.randn(3, 2), torch.arange(12.0)
    state = {
        "numbers": [1, 1.0, True, False, None, "text", 0.1 + 0.2, -0.0, 10**30],
        "infinite": (math.inf, -math.inf),
        "nested": {1: {"a": (1, [2, ()])}, (2, "b"): {}, None: []},
        "shared": [shared, shared, shared.t()],
        "views": [base[:4], base[4:8], base.view(3, 4)[:, 1], base.view(3, 4)],
        "types": [
            torch.tensor(2.5, dtype=torch.float64),
            torch.zeros(0, 3),
            torch.tensor([True, False]),
            torch.arange(5, dtype=torch.uint8),
            torch.randn(2).bfloat16(),
            torch.tensor([math.nan, math.inf]),
        ],
        "{'dict'": 'quoted " and \\ and \u00e9 \n',
    }
    checkpoints.write(tmp_path / checkpoints.FILE, state)
    again = checkpoints.read(tmp_path / checkpoints.FILE)

    def check(value: Any, other: Any) -> None:
        assert type(value) is type(other)
        if isinstance(value, dict):
            assert list(value) == list(other)
            for key in value:
                check(value[key], other[key])
        elif isinstance(value, list | tuple):
            assert len(value) == len(other)
            for pair in zip(value, other, strict=True):
                check(*pair)
        elif isinstance(value, Tensor):
            assert value.dtype == other.dtype
            assert value.shape == other.shape
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert repr(value) == repr(other)

    check(state, again)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (nn.Linear(1, 1), r"checkpoint\['a'\]\[0\], Linear"),
        (print, r"checkpoint\['a'\]\[0\], builtin_function"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (torch.eye(2).to_sparse(), "not dense"),
    ],
)
def test_what_is_no_plain_value_is_refused_by_name(value: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint cannot hold .*{name}"):
        checkpoints.to_bytes({"a": [value]})


def test_an_optimizer_with_odd_state_is_refused_by_name(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> Any:
            return {**super().state_dict(), "odd": object()}

    with pytest.raises(ValueError, match=r"cannot hold checkpoint\['optimizer'\]\['odd'\], object"):
        fit(vae(), bits(), optimizer=Odd, checkpoint=tmp_path)


def content_of(folder: Path) -> bytes:
    fit(vae(), bits(), bits(6), epochs=2, batch_size=8, checkpoint=folder)
    return (folder / checkpoints.FILE).read_bytes()


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    generator = np.random.default_rng(0)
    places = {*range(0, 40), *generator.integers(0, len(content), 300).tolist(), len(content) - 1}
    damaged = []
    for i in places:
        changed = bytearray(content)
        changed[i] ^= 1 << int(generator.integers(8))
        damaged.append(bytes(changed))
    damaged += [content[:n] for n in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1)]
    damaged += [content + b"\0", b"\x80\x04." * 100, (2**62).to_bytes(8, "little") + content[8:]]
    for wrong in damaged:
        with pytest.raises(
            ValueError, match=r"^name is no whole checkpoint of probae-checkpoint/1"
        ):
            checkpoints.from_bytes(wrong, "name")
    pair = vae()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    (tmp_path / checkpoints.FILE).write_bytes(damaged[3])
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is no whole .*; remove it"):
        fit(pair, bits(), bits(6), checkpoint=tmp_path, resume=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("optimizer"),
        lambda state: state.update(best={}),
        lambda state: state.update(settings=None),
        lambda state: state.update(random=[{}]),
        lambda state: state.update(epoch="one"),
        lambda state: state["pair"].update({"extra": torch.zeros(1)}),
        lambda state: state["optimizer"].pop("param_groups"),
        lambda state: state.update(history=3),
        lambda state: state.update(order=None),
        lambda state: state.update(scheduler=3),
    ],
)
def test_a_checkpoint_of_another_content_changes_nothing(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    # a file that somebody wrote with a right checksum
    options: dict[str, Any] = {"schedule": "cosine", "epochs": 2, "batch_size": 8}
    with pytest.raises(Killed):
        fit(
            vae(),
            bits(),
            objective=dying(probae.ELBO(), 4),
            checkpoint=tmp_path,
            checkpoint_seconds=EVERY_STEP,
            **options,
        )
    state = checkpoints.read(tmp_path / checkpoints.FILE)
    change(state)
    checkpoints.write(tmp_path / checkpoints.FILE, state)
    pair = vae()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint.safetensors|resume: "):
        fit(pair, bits(), checkpoint=tmp_path, resume=True, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.state_dict().items())


def test_nothing_is_executed(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": Canary()}, tmp_path / checkpoints.FILE)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        fit(vae(), bits(), checkpoint=tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()
    text = json.dumps(checkpoints.read(write_plain(tmp_path)), default=str)
    assert "settings" in text


def write_plain(folder: Path) -> Path:
    (folder / checkpoints.FILE).unlink()
    fit(vae(), bits(), epochs=1, checkpoint=folder)
    return folder / checkpoints.FILE


# Ctrl-C


class Pressing(probae.ELBO):
    """An objective at whose steps of these numbers somebody presses Ctrl-C."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self._at, self._count = steps, 0

    def differentiable_loss(self, *arguments: Any, **keywords: Any) -> Tensor:
        if torch.is_grad_enabled():
            self._count += 1
            for _ in range(self._at.count(self._count)):
                signal.raise_signal(signal.SIGINT)
        return super().differentiable_loss(*arguments, **keywords)


def test_an_interrupt_returns_what_there_is(capfd: pytest.CaptureFixture[str]) -> None:
    handler, pair, twin = signal.getsignal(signal.SIGINT), vae(), vae()
    run = fit(pair, bits(), epochs=4, batch_size=8, objective=Pressing(5))
    assert run.interrupted
    assert not run.stopped_early
    assert (run.best_epoch, len(run.history["loss"])) == (1, 1)
    fit(twin, bits(), epochs=1, batch_size=8)
    assert_same(pair, twin)  # the last whole epoch
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Ctrl-C again" in capfd.readouterr().err
    x, val = torch.ones(20, X), torch.zeros(6, X)
    pair, twin = vae(), vae()
    run = fit(pair, x, val, epochs=4, batch_size=8, objective=Pressing(11))
    assert (run.best_epoch, len(run.history["loss"])) == (1, 3)
    fit(twin, x, val, epochs=1, batch_size=8)
    assert_same(pair, twin)  # the best one
    assert not fit(vae(), bits(), epochs=1).interrupted


@pytest.mark.parametrize("step", [1, 3, 4, 6, 12])
def test_after_an_interrupt_training_goes_on_from_the_very_step(step: int, tmp_path: Path) -> None:
    whole, resumed = vae(), vae(seed=4)
    expected = fit(whole, bits(), epochs=4, batch_size=8, objective=Pressing())
    options: dict[str, Any] = {"epochs": 4, "batch_size": 8, "checkpoint": tmp_path}
    objective = Pressing(step)
    run = fit(vae(), bits(), objective=objective, **options)
    assert run.interrupted
    assert objective._count == step
    saved = checkpoints.read(tmp_path / checkpoints.FILE)
    assert (saved["epoch"] - 1) * 3 + saved["step"] == step
    objective._at, objective._count = (), 0
    run = fit(resumed, bits(), objective=objective, resume=True, **options)
    assert not run.interrupted
    assert objective._count == 12 - step
    assert comparable(run.history) == comparable(expected.history)
    assert_same(resumed, whole)


def test_the_second_interrupt_raises_at_once(tmp_path: Path) -> None:
    pair, twin = vae(), vae()
    with pytest.raises(KeyboardInterrupt):
        fit(pair, bits(), epochs=4, batch_size=8, objective=Pressing(5, 5), checkpoint=tmp_path)
    fit(twin, bits(), epochs=1, batch_size=8)
    assert_same(pair, twin)
    assert checkpoints.read(tmp_path / checkpoints.FILE)["epoch"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_stays() -> None:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        run = fit(vae(), bits(), epochs=2, batch_size=8, objective=Pressing(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]
    assert not run.interrupted


# kill -9


def test_killed_runs_end_in_the_same_bits(tmp_path: Path) -> None:
    # in a process of its own, as it forks, which one that has trained must not
    out = tmp_path / "kills.json"
    options = ["--kills", "3", "--cases", "vae", "augmented", "--out", str(out)]
    subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.kill_and_resume", *options],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parent.parent,
    )
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["kills"] == 3
    assert result["failed_resumes"] == 0
    assert result["identical"], result


def test_a_folder_serves_one_training_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.3)
    code = (
        "import sys, time, pathlib; from probae import files\n"
        "with files.held(pathlib.Path(sys.argv[1]), 'checkpoint'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        pair = probae.VAE(3, 2, hidden=(4,), likelihood="gaussian")
        keep: dict[str, Any] = {"checkpoint": tmp_path, "epochs": 1, "progress": False}
        with pytest.raises(ValueError, match="checkpoint: another process is at work in"):
            probae.fit(pair, torch.randn(8, 3), **keep)
        assert not list(tmp_path.iterdir())
    finally:
        other.kill()  # as by kill -9, after which the folder is free
        other.wait()
    probae.fit(pair, torch.randn(8, 3), **keep)
    assert (tmp_path / checkpoints.FILE).exists()


def test_refused_data_leave_no_folder(tmp_path: Path) -> None:
    pair = probae.VAE(3, 2, hidden=(4,), likelihood="gaussian")
    with pytest.raises(ValueError, match="x must"):
        probae.fit(pair, torch.randn(8, 4), checkpoint=tmp_path / "new", progress=False)
    assert not list(tmp_path.iterdir())
