"""What an epoch of eager ``fit`` costs beside the bare loop that one would write by hand.

Both train the VAE of :mod:`tests.benchmarks.training_speed` by the same objective and optimizer on
the same images, shuffled at every epoch. The bare loop does nothing else; ``fit`` also looks
whether loss and gradients are finite, shows progress, keeps the best parameters, and measures
10 000 held-out images after every epoch. The bare loop is there twice: with torch's defaults, and
multiplying matrices as ``fit`` does, which shows what all that ``fit`` adds costs. They take turns,
an epoch each; what counts are the medians of the ratios of neighbours.

    python -m tests.benchmarks.fit_overhead --batch-size 128 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import probae
from probae.monitoring import measure
from probae.precision import float32_products

from .training_speed import LR, Problem, X, images

CPU = torch.device("cpu")
BARE, SAME, FIT = "bare loop", "bare loop, fit's products", "fit"


def vae(problem: Problem) -> probae.VAE:
    """Return the pair that both train."""
    torch.manual_seed(0)
    return probae.VAE(X, problem.z_dim, hidden=(problem.hidden,))


class BareLoop:
    """The steps of ``fit`` and nothing else."""

    def __init__(self, problem: Problem, x: Tensor) -> None:
        self.batch_size, self.x, self.pair = problem.batch_size, x, vae(problem)
        self.objective = probae.ELBO()
        self.optim = torch.optim.Adam(self.pair.parameters(), lr=LR, fused=True)

    def epoch(self) -> float:
        """Return the seconds of an epoch."""
        start = time.perf_counter()
        with pyro.validation_enabled(False):
            for index in torch.randperm(len(self.x)).split(self.batch_size):
                batch = self.x[index]
                loss = self.objective.differentiable_loss(self.pair.model, self.pair.guide, batch)
                self.optim.zero_grad()
                (loss / len(batch)).backward()
                self.optim.step()
                loss.item()  # to be reported, as everybody does
        return time.perf_counter() - start


def fit_epoch(pair: probae.VAE, x: Tensor, val: Tensor, batch_size: int) -> float:
    """Return the seconds of an epoch of ``fit``, its second one."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        run = probae.fit(
            pair, x, val, epochs=2, batch_size=batch_size, lr=LR, compile=False, progress=True
        )
    first, second = run.history["seconds"]
    return second - first


def measuring(pair: probae.VAE, val: Tensor) -> float:
    """Return the seconds of what ``fit`` measures after an epoch."""
    start = time.perf_counter()
    measure(pair, val, probae.ELBO())
    return time.perf_counter() - start


def run(problem: Problem, num_val: int, rounds: int) -> dict[str, Any]:
    """Let the loops take turns; return medians of times and of ratios within a round."""
    x, val = images(problem), images(problem._replace(num_data=num_val, batch_size=1))
    loop, pair = BareLoop(problem, x), vae(problem)
    loop.epoch(), measuring(pair, val)  # to warm up
    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        bare = [loop.epoch()]
        with float32_products(CPU):
            same = [loop.epoch()]
        fit = fit_epoch(pair, x, val, problem.batch_size)
        after = measuring(pair, val)
        with float32_products(CPU):
            same.append(loop.epoch())
        bare.append(loop.epoch())  # in both orders, as the clock of a machine drifts
        rows.append(
            {
                BARE: statistics.mean(bare),
                SAME: statistics.mean(same),
                FIT: fit,
                "measuring": after,
                "fit / bare": fit / statistics.mean(bare),
                "fit / same": fit / statistics.mean(same),
                "measuring / same": after / statistics.mean(same),
            }
        )
    return {
        "problem": problem._asdict(),
        "num_val": num_val,
        "medians": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "rounds": rows,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return milliseconds per step, ratios, and where what ``fit`` adds goes."""
    lines = [
        "| eager, batch | bare loop, ms per step | fit's products | fit | fit / bare loop "
        "| fit / bare loop, fit's products | of that, validation | and all else |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        medians, problem = result["medians"], Problem(**result["problem"])
        ms = [f"{1e3 * medians[name] / problem.steps:.2f}" for name in (BARE, SAME, FIT)]
        extra = medians["fit / same"] - 1 - medians["measuring / same"]
        each = 1e6 * extra * medians[SAME] / problem.steps
        lines.append(
            f"| {problem.batch_size} | {' | '.join(ms)} | {medians['fit / bare']:.3f} "
            f"| {medians['fit / same']:.3f} | {100 * medians['measuring / same']:+.1f} % "
            f"({1e3 * medians['measuring']:.0f} ms per epoch) "
            f"| {100 * extra:+.1f} % ({each:.0f} µs per step) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 1000])
    parser.add_argument("--num-data", type=int, default=60_000)
    parser.add_argument("--num-val", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    results = [
        run(
            Problem(batch_size=batch_size, num_data=arguments.num_data),
            arguments.num_val,
            arguments.rounds,
        )
        for batch_size in arguments.batch_size
    ]
    print(table(results))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
