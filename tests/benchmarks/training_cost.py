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
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"marker": "o", "color": "C0"},
    RIVAL: {"marker": "s", "color": "C1", "linestyle": "--"},
    FLOOR: {"marker": "x", "color": "0.4", "linestyle": ":"},
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


def table(rows: list[dict[str, Any]]) -> str:
    """Return milliseconds per step, one column for each point of the curves."""
    lines = []
    for name in dict.fromkeys(row["curve"] for row in rows):
        points = [row for row in rows if row["curve"] == name]
        lines += [
            f"| {AXES[name]} | " + " | ".join(f"{row['value']:,}" for row in points) + " |",
            "|---|" + "---|" * len(points),
        ]
        for who in STYLES:
            cells = [f"{1e3 * row['seconds'][who]:.2f}" for row in points]
            lines.append(f"| {who} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw one panel for each curve."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure = Figure(figsize=(3 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, ax in zip(names, panels, strict=True):
        points = [row for row in rows if row["curve"] == name]
        at = [row["value"] for row in points]
        whole = name == "num_data"  # of which a step knows nothing: an epoch's seconds
        for who, style in STYLES.items():
            values = [row["seconds"][who] * (row["steps"] if whole else 1e3) for row in points]
            ax.plot(at, values, label=who, **style)
        ax.set(xscale="log", yscale="log", xlabel=AXES[name])
        ax.set_ylabel("seconds per epoch" if whole else "ms per step")
        ax.set_xticks(at, [f"{value:,}" for value in at], fontsize="small")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.tick_params(axis="y", labelsize="small")
        ax.grid(alpha=0.3)
    figure.suptitle(
        "Cost of training a VAE 784-400-20-400-784, batch 128, as one number is moved: "
        "less is better"
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STYLES))
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
        arguments.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    if arguments.picture is not None:
        picture(rows, arguments.picture)


if __name__ == "__main__":
    main()
