"""Training data in batches: mapped files, Datasets, passes, workers; checked as they come."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
)

import probae
from probae import datasets
from probae.batches import MappedRows, TrainingData

X, N = 6, 23


def vae(likelihood: str = "gaussian") -> probae.Autoencoder:
    return probae.VAE(X, 2, hidden=(8,), likelihood=likelihood)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Rows that hold their number, and noise of three streams."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        noise = torch.randn(X) + np.random.rand() + random.random()  # noqa: NPY002
        return place + 0.01 * noise, 0


class Pass(IterableDataset[Tensor]):
    """Rows that hold their number, in order, shared out among workers."""

    def __init__(self, rows: int = N) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place in range(first, self.rows, step):
            yield torch.full((X,), float(place))


def mapped(tmp_path: Path, x: np.ndarray) -> np.memmap:
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def taken(data: TrainingData, order: Tensor | None, epoch: int = 1, **options: Any) -> list[Tensor]:
    return [data.batch(s) for s in data.sources(5, order, epoch, **options)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8", "f2", "?"])
@pytest.mark.parametrize(
    "view",
    [np.s_[:], np.s_[5:20], np.s_[::2], np.s_[:, ::-1]],
    ids=["all", "rows", "steps", "cols"],
)
def test_mapped_rows_are_those_of_the_file(dtype: str, view: Any, tmp_path: Path) -> None:
    x = (np.random.default_rng(0).random((N, X)) > 0.5).astype(dtype)
    array = mapped(tmp_path, x)[view]
    data = TrainingData(vae(), array, "x", False)
    assert isinstance(data.dataset, MappedRows)
    order = data.order()
    assert order is not None
    found = torch.cat(taken(data, order))
    assert np.array_equal(found.numpy(), x[view][order.numpy()].astype("f4"))
    assert np.array_equal(data.rows(torch.tensor([3, 1, 3])).numpy(), x[view][[3, 1, 3]])


@pytest.mark.parametrize("view", [np.s_[:], np.s_[5:20]], ids=["all", "rows"])
def test_a_worker_that_is_no_fork_maps_the_file_again(view: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((N, X), dtype=np.float32)
    rows = MappedRows(mapped(tmp_path, x)[view])
    content = pickle.dumps(rows)
    assert len(content) < 1000, "the array itself does not travel"
    again = pickle.loads(content)  # noqa: S301
    assert np.array_equal(again.array, x[view])
    with pytest.raises(ValueError, match="use num_workers=0"):
        pickle.dumps(MappedRows(mapped(tmp_path, x)[:, 1:]))


def test_a_large_file_is_mapped_and_a_small_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).random((N, X), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    in_memory = TrainingData(vae(), tmp_path / "x.npy", "x", False)
    monkeypatch.setattr(datasets, "LARGE", 100)
    on_disk = TrainingData(vae(), str(tmp_path / "x.npy"), "x", False)
    assert in_memory.dataset is None
    assert isinstance(on_disk.dataset, MappedRows)
    order = torch.randperm(N)
    assert same(taken(in_memory, order), taken(on_disk, order))


def test_training_on_a_mapped_file_is_training_on_its_tensor(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((N, X), dtype=np.float32).round()
    states = []
    for given in (torch.from_numpy(x), mapped(tmp_path, x), MappedRows(mapped(tmp_path, x))):
        torch.manual_seed(0)
        pair = vae("bernoulli")
        probae.fit(pair, given, epochs=2, batch_size=5, progress=False)
        states.append(pair.state_dict())
    for other in states[1:]:
        assert all(torch.equal(states[0][name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"x must be finite, got NaN or infinite values in x\[17\]; remove"),
        (2.0, r"x must lie in the support .*the first 2 at index \(17, 3\)"),
    ],
)
def test_a_bad_value_in_a_mapped_file_is_found_when_it_is_read(
    value: float, message: str, tmp_path: Path
) -> None:
    x = np.zeros((N, X), dtype=np.float32)
    x[17, 3] = value
    data = TrainingData(vae("bernoulli"), mapped(tmp_path, x), "x", False)
    with pytest.raises(ValueError, match=message):
        taken(data, data.order())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((N, X), np.uint8), r"got uint8; .* or a torch Dataset whose items are so conv"),
        (np.zeros((N, X), complex), "floating-point or bool, got complex128"),
        (np.zeros((N, X + 1)), r"shape \(6,\) of one datum, got \(7,\)"),
        (np.zeros(N), r"shape \(6,\) of one datum, got \(\)"),
    ],
)
def test_mapped_arrays_that_are_refused(x: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingData(vae(), mapped(tmp_path, x), "x", False)


def test_any_number_of_workers_reads_the_same_data_and_takes_no_noise_of_ours() -> None:
    order = torch.randperm(N)
    one, two = (TrainingData(vae(), Noisy(), "x", False, num_workers=n) for n in (1, 2))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = taken(one, order)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, taken(two, order))
    assert same(first[2:], taken(two, order, start=2)), "as after a resume"
    assert not same(first, taken(two, order, epoch=2)), "noise of its own in each epoch"
    assert torch.equal(torch.cat(first)[:, 0].round().long(), order)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        assert not same(first, taken(two, order)), "and under each seed"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_is_read_to_its_end_and_skipped_into(workers: int) -> None:
    data = TrainingData(vae(), Pass(), "x", False, num_workers=workers)
    assert data.size is None
    assert data.order() is None
    with pytest.raises(TypeError, match="whose length is not known"):
        len(data)
    state = torch.get_rng_state()
    batches = taken(data, None)
    assert sorted(torch.cat(batches)[:, 0].tolist()) == [*range(N)]
    assert same(batches[2:], taken(data, None, start=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert data.some(3)[:, 0].tolist() == [0, 1, 2]
    assert data.all().shape == (N, X)
    with pytest.raises(ValueError, match=r"its pass ended after .* of 100 steps"):
        taken(data, None, start=100)


def test_noise_after_a_skip_is_that_of_the_stream_now() -> None:
    class NoisyPass(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            for place in range(N):
                yield place + torch.rand(X)

    data = TrainingData(vae(), NoisyPass(), "x", False)
    torch.manual_seed(0)
    sources = data.sources(5, None, 1)
    next(sources)
    state = torch.get_rng_state()
    rest = list(sources)
    torch.set_rng_state(state)
    assert same(rest, taken(data, None, start=1))


def test_an_empty_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="x is empty"):
        TrainingData(vae(), Pass(0), "x", False).some(3)
    with pytest.raises(ValueError, match="x is empty in epoch 4"):
        taken(TrainingData(vae(), Pass(0), "x", False), None, epoch=4)


@pytest.mark.parametrize("x", [Noisy(), Pass(), torch.randn(N, X)], ids=["map", "pass", "tensor"])
def test_shares_of_two_processes_make_the_whole(x: Any) -> None:
    data = TrainingData(vae(), x, "x", False)
    order = data.order()
    halves = [
        taken(data, order, share=lambda rows, rank=rank: rows[rank::2])  # type: ignore[misc]
        for rank in (0, 1)
    ]
    whole = taken(data, order)
    for a, b, batch in zip(*halves, whole, strict=True):
        assert len(a) + len(b) == len(batch)
        assert torch.equal(a.round(), batch[::2].round())
        assert torch.equal(b.round(), batch[1::2].round())


@pytest.mark.parametrize(
    ("x", "workers", "message"),
    [
        (torch.zeros(N, X), 1, "num_workers must be 0 for data in memory"),
        (Noisy(), -1, "num_workers must be an int >= 0, got -1"),
        (Noisy(), True, "num_workers must be an int"),
        (DataLoader(Noisy()), 0, "got DataLoader; pass its .dataset, with batch_size and num_w"),
    ],
)
def test_workers_and_loaders_that_are_refused(x: Any, workers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingData(vae(), x, "x", False, num_workers=workers)


def test_a_dataset_that_reads_batches_at_once_is_asked_for_them() -> None:
    class Batches(Noisy):
        def __getitems__(self, places: list[int]) -> list[Tensor]:
            return [torch.full((X,), float(place)) for place in places]

    data = TrainingData(vae(), Batches(), "x", False)
    assert data.rows(torch.tensor([4, 2]))[:, 0].tolist() == [4, 2]
    subset = TrainingData(vae(), Subset(Batches(), [7, 8, 9]), "x", False)
    assert subset.rows(torch.tensor([2, 0]))[:, 0].tolist() == [9, 7]

    class Short(Noisy):
        def __getitems__(self, places: list[int]) -> list[Tensor]:
            return [torch.zeros(X)]

    with pytest.raises(ValueError, match="x must give 2 data for as many places, got 1"):
        TrainingData(vae(), Short(), "x", False)


def test_numbers_that_the_pair_cannot_hold_are_refused() -> None:
    x = torch.zeros(N, X, dtype=torch.float64)
    x[4, 1] = 1e300
    with pytest.raises(ValueError, match=r"x must fit into the dtype of the pair.*in row 4"):
        TrainingData(vae(), x, "x", False)
    TrainingData(vae().double(), x, "x", False)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_passes(workers: int) -> None:
    pair = vae()
    run = probae.fit(
        pair, Pass(), Pass(7), epochs=2, batch_size=5, num_workers=workers, progress=False
    )
    assert len(run.history["val_loss"]) == 2
    assert all(torch.isfinite(p).all() for p in pair.parameters())


class Faulty(Noisy):
    """Rows of which one is not finite."""

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        x, label = super().__getitem__(place)
        return x * (float("nan") if place == 1 else 1.0), label


@pytest.mark.parametrize("workers", [0, 2])
def test_a_datum_that_is_left_out_ends_no_run(workers: int) -> None:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 5, "num_workers": workers}
    with pytest.raises(ValueError, match=r"x must be finite, got .* in x\[1\]"):
        probae.fit(vae(), Faulty(), progress=False, **options)
    with pytest.warns(UserWarning, match="fit leaves out a batch"):
        run = probae.fit(vae(), Faulty(), progress=False, on_fault="skip", **options)
    assert run.skipped == 2
    assert run.history["skipped"] == [1, 1]
    assert all(np.isfinite(run.history["elbo"]))  # of the data that are finite


class Signalled(probae.ELBO):
    """An objective at whose third step a signal comes to all processes, as from a terminal."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self._number, self._count = number, 0

    def differentiable_loss(self, *arguments: Any, **keywords: Any) -> Tensor:
        self._count += torch.is_grad_enabled()
        if self._count == 3 and torch.is_grad_enabled():
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, self._number)
                child.join(0.5)  # it may end of it
            if self._number == signal.SIGINT:
                signal.raise_signal(self._number)
        return super().differentiable_loss(*arguments, **keywords)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_read_on_where_a_signal_comes_to_them(number: signal.Signals) -> None:
    objective = Signalled(number)
    run = probae.fit(
        vae(), Noisy(), epochs=3, batch_size=5, objective=objective, num_workers=2, progress=False
    )
    assert run.interrupted == (number == signal.SIGINT)
    assert objective._count == (3 if run.interrupted else 15)
    assert multiprocessing.active_children() == []


RESIDENT = """
import sys, tempfile
from pathlib import Path
from tests.benchmarks.out_of_core import measure
result = measure(Path(sys.argv[1]), 0.4, 1024, 30, 0)
print(result["gigabytes"] * 1024, result["rss_anon_grown_mib"], result["steps"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_file_is_never_read_whole(tmp_path: Path) -> None:
    """Training on 400 MiB takes less than 100 MiB of the process's own memory."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    size, grown, steps = map(float, done.stdout.split())
    assert size > 400
    assert steps == 30
    assert grown < 100


@pytest.mark.parametrize("as_dataset", [False, True])
def test_held_out_data_are_binarised_in_blocks(
    as_dataset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], probae.batches.draw_bits

    def noted(probs: Tensor) -> Tensor:
        drawn.append(probs.numel())
        return draw(probs)

    monkeypatch.setattr(probae.batches, "draw_bits", noted)
    x = torch.full((2**18, X), 0.25)
    data = TrainingData(vae("bernoulli"), TensorDataset(x) if as_dataset else x, "val", True)
    bits = data.all()
    assert bits.shape == x.shape
    assert max(drawn) <= 2**20  # a draw takes several times the memory of its bits
    assert sum(drawn) == x.numel()
    assert bits.unique().tolist() == [0.0, 1.0]
    assert (bits.mean(0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / len(x)) ** 0.5
