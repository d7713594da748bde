"""The comparison of training speed runs in small, with those whose packages are there."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from . import training_speed
from .training_speed import FLOOR, OURS, RIVAL, Problem

SMALL = Problem(num_data=256, batch_size=64, hidden=16, z_dim=2)
INSTALLED = ["probae, eager", "plain torch, fused Adam", "Pyro SVI.step"]
PNG = b"\x89PNG\r\n\x1a\n"


def synthetic(task: str, times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "problem": Problem(task)._asdict(),
        "times": times,
        "medians": {name: sorted(each)[len(each) // 2] for name, each in times.items()},
        "compile_seconds": {name: 7.5 * (name == OURS) for name in times},
        "missing": {},
    }


def test_the_comparison_runs_end_to_end_in_small(tmp_path: Path) -> None:
    result = training_speed.run(SMALL, rounds=1, names=INSTALLED)
    assert list(result["times"]) == [FLOOR, *INSTALLED]
    assert all(len(times) == 1 and times[0] > 0 for times in result["times"].values())
    assert result["medians"] == {name: times[0] for name, times in result["times"].items()}
    assert result["compile_seconds"] == dict.fromkeys([FLOOR, *INSTALLED], 0)
    assert not result["missing"]

    table = training_speed.table([result])
    assert "vae, batch 64" in table
    assert all(f"\n| {name} | " in table for name in [FLOOR, *INSTALLED])
    training_speed.picture([result], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)


def test_a_rival_who_is_not_installed_is_left_out() -> None:
    result = training_speed.run(SMALL, rounds=1, names=[RIVAL])
    installed = all(map(importlib.util.find_spec, ("jax", "numpyro")))
    assert (RIVAL in result["medians"]) == installed
    assert (RIVAL in result["missing"]) != installed
    assert result["medians"][FLOOR] > 0
    assert (f"\n| {RIVAL} | " in training_speed.table([result])) == installed


def test_only_the_vae_is_a_problem_for_all() -> None:
    result = training_speed.run(SMALL._replace(task="iwae"), rounds=1, names=INSTALLED)
    assert list(result["medians"]) == [FLOOR, "probae, eager"]


def test_the_first_turn_tells_what_compiling_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    import probae

    def fit(*_: Any, epochs: int, compile: bool, **__: Any) -> Any:
        history = {"seconds": [9.0 + 2 * i for i in range(epochs)]}
        return SimpleNamespace(history=history, compile_seconds=7.5 if compile else 0.0)

    monkeypatch.setattr(probae, "fit", fit)
    turn = training_speed.CONTESTANTS[OURS](SMALL, training_speed.images(SMALL))
    assert turn() == (2 / SMALL.steps, 7.5)  # without the first epoch


def test_an_epoch_of_a_turn_is_not_timed() -> None:
    epochs = []
    turn = training_speed.timed(lambda: epochs.append(1), SMALL)
    assert not epochs
    assert turn().seconds_per_step > 0
    assert len(epochs) == 1 + training_speed.TURN


def test_table_and_picture_give_multiples_of_compiled_fit(tmp_path: Path) -> None:
    vae = synthetic("vae", {OURS: [0.001, 0.002, 0.003], RIVAL: [0.003, 0.005, 0.004]})
    iwae = synthetic("iwae", {OURS: [0.004]})
    lines = training_speed.table([vae, iwae]).splitlines()
    assert lines[2] == f"| {OURS} | 2.00 (1.00×) | 4.00 (1.00×) |"
    assert lines[3] == f"| {RIVAL} | 4.00 (2.00×) |  |"
    assert training_speed.compilation([vae, iwae]) == (
        f"compilation, first turn: vae, batch 128: {OURS} 7.5 s; iwae, batch 128: {OURS} 7.5 s"
    )
    for results in ([vae], [vae, iwae], [vae, iwae, vae]):
        training_speed.picture(results, tmp_path / "speed.png")
        assert (tmp_path / "speed.png").read_bytes().startswith(PNG)
