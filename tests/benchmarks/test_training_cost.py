"""The curves of training cost move one number each, and are written as a table and a picture."""

from pathlib import Path
from typing import Any

import pytest

from . import training_cost
from .training_cost import AXES, CURVES, STYLES
from .training_speed import FLOOR, OURS, RIVAL


def synthetic(name: str) -> list[dict[str, Any]]:
    return [
        {
            "curve": name,
            "value": value,
            "steps": training_cost.problem(name, value).steps,
            "seconds": {OURS: 0.002 * i, RIVAL: 0.003 * i, FLOOR: 0.001 * i},
        }
        for i, value in enumerate(CURVES[name], start=1)
    ]


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_moves_one_number_of_the_problem(name: str) -> None:
    at = [training_cost.problem(name, value)._asdict() for value in CURVES[name]]
    assert [problem.pop(name) for problem in at] == CURVES[name]
    assert all(problem == at[0] for problem in at)
    assert at[0]["task"] == ("iwae" if name == "particles" else "vae")


def test_all_curves_are_in_table_and_picture(tmp_path: Path) -> None:
    rows = [row for name in CURVES for row in synthetic(name)]
    table = training_cost.table(rows)
    assert all(f"| {AXES[name]} | " in table for name in CURVES)
    assert all(table.count(f"| {who} | ") == len(CURVES) for who in STYLES)
    assert "| particles of IWAE | 1 | 5 | 20 |" in table
    assert f"| {RIVAL} | 3.00 | 6.00 | 9.00 |" in table

    training_cost.picture(rows, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_row_gives_the_time_of_an_epoch() -> None:
    row = synthetic("num_data")[0]
    assert row["steps"] == 20_000 // 128
    assert training_cost.text(row).startswith(f"num_data = 20000: {OURS} 2.00 ms per step, ")
    assert training_cost.text(row).endswith("; epoch 0.31 s")


def test_measuring_asks_for_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(problem: Any, rounds: int, names: list[str]) -> dict[str, Any]:
        asked.append((problem.z_dim, rounds, names))
        return {"medians": {OURS: 0.002, RIVAL: 0.003, FLOOR: 0.001}}

    monkeypatch.setattr(training_cost, "run", run)
    rows = training_cost.measure(["z_dim"], rounds=2)
    assert asked == [(z_dim, 2, [OURS, RIVAL]) for z_dim in CURVES["z_dim"]]
    assert [row["value"] for row in rows] == CURVES["z_dim"]
