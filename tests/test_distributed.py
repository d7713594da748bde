"""Several processes: the steps of one, the values of one, and an end when one of them ends."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes

import probae
from probae import distributed
from probae.distributions import draw_bits
from probae.shared_noise import SharedNoise

from .benchmarks import two_processes

X, Z, WORLD = 6, 2, 3


def undercomplete() -> probae.Autoencoder:
    torch.manual_seed(0)
    return probae.UndercompleteAutoencoder(X, Z, hidden=(5,))


class Normed(nn.Module):
    """A network with batch norm, whose statistics are those of a process's share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(X, 5), nn.BatchNorm1d(5), nn.Linear(5, 2 * Z))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).unflatten(-1, (2, Z))


def vae() -> probae.Autoencoder:
    torch.manual_seed(0)
    decoder = probae.GaussianDecoder(probae.MLP(Z, X, (5,)))
    return probae.Autoencoder(
        probae.StandardNormalPrior(Z), probae.GaussianEncoder(Normed()), decoder
    )


def denoising() -> probae.Autoencoder:
    """Return a pair that draws a corruption, dropout and codes."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Dropout(0.3), probae.MLP(X, (2, Z), (5,)))
    return probae.Autoencoder(
        probae.StandardNormalPrior(Z),
        probae.GaussianEncoder(layers),
        probae.GaussianDecoder(probae.MLP(Z, X, (5,))),
        probae.GaussianNoise(0.5),
    )


def noisy() -> probae.Autoencoder:
    torch.manual_seed(0)
    return probae.VAE(X, Z, hidden=(5,), likelihood="gaussian")


def binary() -> probae.Autoencoder:
    torch.manual_seed(0)
    return probae.VAE(X, Z, hidden=(5,))


def data(n: int = 50) -> Tensor:
    return torch.randn(n, X, generator=torch.Generator().manual_seed(3))


def broken() -> Tensor:
    """Return data one of which has a loss that is not finite."""
    x = data()
    x[17] = 1e30
    return x


FITS: dict[str, tuple[Callable[[], probae.Autoencoder], Callable[[], Tensor], dict[str, Any]]] = {
    # batches of 8 make shares of 3, 3 and 2; the last one, of 2, leaves a process without a datum
    "undercomplete": (undercomplete, data, {"schedule": "cosine", "clip_norm": 1.0}),
    "batch norm": (vae, partial(data, 48), {}),  # it takes no share of one datum
    "denoising": (denoising, data, {}),
    "particles": (noisy, data, {"objective": probae.IWAE(5)}),
    "binarized": (binary, lambda: data().sigmoid(), {"binarize": True}),
    "fault": (undercomplete, broken, {"on_fault": "skip"}),
    # the process that meets the fault draws more than others, to name it
    "fault and noise": (noisy, broken, {"on_fault": "skip", "objective": probae.IWAE(5)}),
}
ALIKE: dict[str, Callable[[int], tuple[probae.Autoencoder, Tensor, dict[str, Any]]]] = {
    "batch_size": lambda rank: (noisy(), data(), {"batch_size": 8 + rank}),
    "epochs": lambda rank: (noisy(), data(), {"epochs": 1 + rank}),
    "x": lambda rank: (noisy(), data(50 + rank), {}),
    "val": lambda rank: (noisy(), data(), {"val": data(5 + rank)}),
    "pair": lambda rank: (noisy() if rank else binary(), data().sigmoid(), {}),
    "objective": lambda rank: (noisy(), data(), {"objective": probae.IWAE(2 + rank)}),
}


def refusal(name: str, rank: int) -> str:
    """Return what processes hear whose calls differ in one argument."""
    pair, x, options = ALIKE[name](rank)
    try:
        probae.fit(pair, x, progress=False, **options)
    except ValueError as error:
        return str(error)
    return ""


def train(name: str) -> tuple[probae.Autoencoder, probae.Run]:
    build, make, options = FITS[name]
    pair = build()
    x = make()
    run = probae.fit(pair, x, x[:10], epochs=3, batch_size=8, progress=False, **options)
    return pair, run


def evaluate(method: str, estimate: Callable[..., probae.LogLikelihood]) -> probae.LogLikelihood:
    torch.manual_seed(0)
    return estimate(probae.PPCA(X, Z), data(1203), method, None if method == "exact" else 7)


def worker(rank: int, folder: str) -> None:
    """Train and evaluate as one of a group, and write what came of it."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    result: dict[str, Any] = {}
    for name in FITS:
        pair, run = train(name)
        result[name] = {
            "history": {key: value for key, value in run.history.items() if key != "seconds"},
            "parameters": [p.detach().flatten().tolist() for p in pair.state_dict().values()],
            "skipped": run.skipped,
            "eager_because": run.eager_because,
        }
    result["refusals"] = {name: refusal(name, rank) for name in ALIKE}
    for method in ("exact", "iwae"):
        ll = evaluate(method, distributed.shared_log_likelihood)
        result[method] = [ll.values.tolist(), ll.std_error.tolist()]
    dist.destroy_process_group()
    # one that is alive when the interpreter ends may abort the process
    result["threads"] = [name for name in threads() if "gloo" in name]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def threads() -> list[str]:
    """Return the names of this process's threads, where the system tells."""
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append(file.read_text().strip())
    return names


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each process of a group of three found."""
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        start_processes(worker, (str(folder),), nprocs=WORLD, start_method="spawn")
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_all_processes_end_alike(results: list[dict[str, Any]]) -> None:
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_no_thread_of_a_group_outlives_it(results: list[dict[str, Any]]) -> None:
    assert [result["threads"] for result in results] == [[]] * WORLD


@pytest.mark.parametrize("name", [name for name in FITS if name != "batch norm"])
def test_processes_take_the_steps_of_one(name: str, results: list[dict[str, Any]]) -> None:
    if "fault" in name:
        with pytest.warns(UserWarning, match="fit leaves out a batch"):
            pair, run = train(name)
    else:
        pair, run = train(name)
    found = results[0][name]
    assert found["skipped"] == run.skipped == (3 if "fault" in name else 0)
    for key, values in found["history"].items():
        assert values == pytest.approx(run.history[key], rel=1e-5, abs=1e-6), key
    for p, q in zip(pair.state_dict().values(), found["parameters"], strict=True):
        torch.testing.assert_close(p.flatten(), torch.tensor(q), rtol=1e-4, atol=1e-6)


def test_processes_that_were_called_otherwise_all_refuse(results: list[dict[str, Any]]) -> None:
    for name, message in results[0]["refusals"].items():
        assert message.startswith(f"{name} must be the same in all processes"), message


def drawn(x: Tensor) -> list[Tensor]:
    """Return one draw of each kind for data x (n, X)."""
    normal = torch.distributions.Normal(x, 1.0)
    factor = torch.distributions.MultivariateNormal(x, torch.eye(X))
    return [
        normal.rsample(),
        normal.rsample((2,)).movedim(1, 0),  # particles
        factor.rsample(),
        torch.distributions.Laplace(x, 1.0).rsample(),
        torch.distributions.Gumbel(x, 1.0).rsample(),
        torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=x).rsample(),
        torch.distributions.Bernoulli(x.sigmoid()).sample(),
        draw_bits(x.sigmoid()),
        torch.distributions.Categorical(logits=x).sample(),
        torch.distributions.Exponential(x.exp()).rsample(),
        nn.functional.dropout(x, 0.5),
        torch.empty_like(x).uniform_(),
        torch.rand_like(x),
        torch.randn(len(x), 2),
    ]


def test_processes_draw_rows_of_one_noise() -> None:
    x = data(7)
    torch.manual_seed(0)
    whole = drawn(x)
    shares = []
    for first, last in ((0, 4), (4, 7)):
        torch.manual_seed(0)
        with SharedNoise(first, last - first, len(x)):
            shares.append(drawn(x[first:last]))
    for i, expected in enumerate(whole):  # functions of the draws round as vectors are cut
        found = torch.cat([share[i] for share in shares])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=str(i))


def test_noise_that_data_share_is_not_cut() -> None:
    torch.manual_seed(0)
    expected = torch.randn(5)
    torch.manual_seed(0)
    with SharedNoise(4, 3, 7):
        assert torch.equal(torch.randn(5), expected)


def test_with_rejection_draws_are_of_the_same_law() -> None:
    # 20 000 draws of Gamma(2, 1) have a mean within 0.05 of 2 unless 5 standard errors off
    torch.manual_seed(0)
    concentration = torch.full((20_000,), 2.0)
    with SharedNoise(30_000, 20_000, 50_000):
        draws = torch.distributions.Gamma(concentration, 1.0).rsample()
    assert draws.mean() == pytest.approx(2.0, abs=0.05)
    assert draws.var() == pytest.approx(2.0, abs=0.2)


def test_with_batch_norm_they_differ_as_shares_do(results: list[dict[str, Any]]) -> None:
    _, run = train("batch norm")
    found = results[0]["batch norm"]["history"]
    assert found["loss"] != run.history["loss"]
    assert found["loss"] == pytest.approx(run.history["loss"], abs=1.0)
    assert all(map(math.isfinite, (v for column in found.values() for v in column)))


def test_values_do_not_depend_on_the_number_of_processes(results: list[dict[str, Any]]) -> None:
    exact = evaluate("exact", probae.log_likelihood)
    assert results[0]["exact"][0] == pytest.approx(exact.values.tolist(), rel=1e-6)
    one = evaluate("iwae", distributed.shared_log_likelihood)
    assert results[0]["iwae"] == [one.values.tolist(), one.std_error.tolist()]


def test_a_killed_worker_ends_the_run_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    result = two_processes.kill_a_worker(tmp_path)
    assert result["exit_status"] != 0
    assert result["seconds_until_all_ended"] < 60
    assert any("lost contact" in message for message in result["messages"]), result["errors"]
    assert result["resumed_status"] == 0, result["resumed_note"]
    assert result["epochs_in_all"] == result["epoch_of_the_checkpoint"] + 1


def test_one_process_needs_no_group() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = data(5)
    assert distributed.add_up(x) is x
    assert distributed.share_of(x) is x
    assert distributed.gathered(x) == [x]
    assert distributed.bytes_from_main(b"abc") == b"abc"


@pytest.mark.parametrize("seed", [None, True, 1.5])
def test_shared_evaluation_needs_a_seed(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be an int"):
        probae.shared_log_likelihood(probae.PPCA(X, Z), data(5), seed=seed)
