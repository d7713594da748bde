"""Cost of a training step against batch size, width, size of the code, particles and data.

Each curve moves one number of the problem of :mod:`tests.benchmarks.training_speed` and leaves the
others; probae's compiled ``fit`` and NumPyro's jitted epoch take turns at every point. Memory is
measured by :mod:`tests.benchmarks.data_scaling`.

    pip install 'jax[cpu]' numpyro
    python -m tests.benchmarks.training_cost --out cost.json --picture cost.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .training_speed import FLOOR, OURS, RIVAL, Problem, run

CURVES: dict[str, list[int]] = {
    "batch_size": [32, 128, 512, 2048],
    "hidden": [100, 200, 400, 800, 1600],
    "z_dim": [2, 10, 50, 200],
    "particles": [1, 5, 20],
    "num_data": [20_000, 60_000, 200_000],
}
AXES = {
    "batch_size": "data per step",
    "hidden": "width of the hidden layers",
    "z_dim": "dimension of the code",
    "particles": "particles of IWAE",
    "num_data": "training data",
}


def problem(name: str, value: int) -> Problem:
    """Return the problem with that one number changed; few data where their number is not it."""
    task = "iwae" if name == "particles" else "vae"
    return Problem(task=task, num_data=20_000)._replace(**{name: value})


def measure(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return one row for each point of each curve."""
    rows = []
    for name in names:
        for value in CURVES[name]:
            here = problem(name, value)
            medians = run(here, rounds, [OURS, RIVAL])["medians"]
            row = {"curve": name, "value": value, "steps": here.steps, "seconds": medians}
            rows.append(row)
            print(text(row), flush=True)
    return rows


def text(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    seconds = row["seconds"]
    line = f"{row['curve']} = {row['value']}: "
    line += ", ".join(f"{name} {1e3 * each:.2f} ms per step" for name, each in seconds.items())
    return line + f"; epoch {seconds[OURS] * row['steps']:.2f} s"


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw one panel for each curve."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    styles = {OURS: ("o", "-"), RIVAL: ("s", "--"), FLOOR: ("x", ":")}
    for name, ax in zip(names, panels, strict=True):
        points = [row for row in rows if row["curve"] == name]
        for who, (marker, line) in styles.items():
            values = [1e3 * row["seconds"].get(who, float("nan")) for row in points]
            at = [row["value"] for row in points]
            ax.plot(at, values, marker=marker, linestyle=line, label=who)
        ax.set(xscale="log", yscale="log", xlabel=AXES[name])
    panels[0].set_ylabel("milliseconds per step")
    panels[0].legend(fontsize="small")
    figure.suptitle("Cost of a training step, VAE 784-400-20-400-784 but for what is moved")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure the curves, print their points, write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--picture", type=Path, help="write the curves to this PNG file")
    arguments = parser.parse_args()
    rows = measure(arguments.curve, arguments.rounds)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        picture(rows, arguments.picture)


if __name__ == "__main__":
    main()
