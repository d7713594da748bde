"""Annealed importance sampling and bidirectional Monte Carlo on a VAE of binarised MNIST.

The VAE is that of ``mnist_likelihood`` (784-200-200-50, tanh, 60 epochs). The first 100 test images
are evaluated by importance samples from the encoder and by annealing from the encoder and from the
prior; all values are lower bounds in expectation. How loose annealing can be is bounded on data
simulated from the model, from both sides, with the same settings.

    python -m tests.benchmarks.mnist_annealing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import probae

from .mnist_likelihood import WARMUP, train

SETTINGS = {
    "encoder": probae.Annealing(num_temperatures=200, start="encoder"),
    "prior": probae.Annealing(num_temperatures=1000, start="prior"),
}


def trained(epochs: int, seed: int, train_limit: int) -> Any:
    """Return the VAE of the likelihood experiment."""
    data = probae.load_dataset("mnist")
    x = torch.cat([data.train, data.val])[:train_limit]
    warmup = probae.LinearWarmup(min(WARMUP, max(1, epochs // 4)))
    pair, _ = train(probae.ELBO(beta=warmup), x, epochs, seed)
    return pair


def run(
    pair: Any,
    images: int = 100,
    simulated: int = 50,
    num_samples: int = 5000,
    chains: int = 16,
    settings: dict[str, probae.Annealing] = SETTINGS,
) -> dict[str, Any]:
    """Evaluate a pair on test images and on simulated data, and return every figure."""
    test = probae.binarize(probae.load_dataset("mnist").test, seed=1)[:images]
    rows: list[dict[str, Any]] = []
    values = {}

    def row(name: str, evaluate: Callable[[], probae.LogLikelihood]) -> None:
        start = time.perf_counter()
        ll = evaluate()
        values[name] = ll
        gain = None if not rows else probae.compare(ll, values["iwae"])
        rows.append(
            {
                "name": name,
                "mean": ll.mean,
                "std_error": ll.mean_std_error,
                "gain": None if gain is None else gain.difference,
                "gain_std_error": None if gain is None else gain.std_error,
                "ess": float(ll.ess.mean()),
                "khat_above_0.7": ll.unreliable if ll.method == "iwae" else None,
                "acceptance": None if ll.acceptance is None else float(ll.acceptance.mean()),
                "seconds": time.perf_counter() - start,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    row("iwae", lambda: probae.log_likelihood(pair, test, "iwae", num_samples))
    for start, annealing in settings.items():
        row(
            f"ais from the {start}",
            lambda annealing=annealing: probae.log_likelihood(
                pair, test, "ais", chains, annealing=annealing
            ),
        )
    gaps = {}
    for start, annealing in settings.items():
        sandwich = probae.bdmc(pair, simulated, chains, annealing=annealing)
        gaps[start] = {
            "lower": float(sandwich.lower.mean()),
            "upper": float(sandwich.upper.mean()),
            "gap": sandwich.gap,
            "gap_std_error": sandwich.gap_std_error,
        }
        print(json.dumps({start: gaps[start]}), file=sys.stderr, flush=True)
    return {
        "rows": rows,
        "gaps": gaps,
        "images": images,
        "simulated": simulated,
        "num_samples": num_samples,
        "chains": chains,
        "temperatures": {start: a.num_temperatures for start, a in settings.items()},
        "leapfrogs": {start: a.num_leapfrogs for start, a in settings.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        "| estimate, a lower bound | log p(x), nats per image | gain over IWAE, paired "
        "| gap of BDMC, simulated data |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        start = row["name"].removeprefix("ais from the ")
        name = f"IWAE, K = {result['num_samples']}"
        gain = gap = ""
        if row["gain"] is not None:
            steps = result["temperatures"][start]
            name = f"AIS from the {start}, {steps} temperatures"
            gain = f"{row['gain']:+.2f} ± {row['gain_std_error']:.2f}"
            bounds = result["gaps"][start]
            gap = f"{bounds['gap']:.2f} ± {bounds['gap_std_error']:.2f}"
        lines.append(f"| {name} | {row['mean']:.2f} ± {row['std_error']:.2f} | {gain} | {gap} |")
    lines.append(
        f"\nFirst {result['images']} test images, {result['chains']} chains, "
        f"{next(iter(result['leapfrogs'].values()))} leapfrog steps; the gap is that of "
        f"{result['simulated']} simulated images, from lower to upper bound."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a folder of probae.save, instead of training")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    if arguments.run is None:
        pair = trained(arguments.epochs, arguments.seed, 60_000)
    else:
        pair = probae.load(arguments.run)
    result = run(pair)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
