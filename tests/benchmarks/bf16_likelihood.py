"""Held-out likelihood after training in bfloat16 and in float32: the same within 0.2 nats.

The VAE, the data and the recipe are those of :mod:`tests.benchmarks.mnist_likelihood`, over fewer
epochs. Each seed trains twice from the same starting values, once in either precision; both are
evaluated in float32 on the same binarised test images, by 500 importance samples. Rounding parts
two runs as another seed would, so the difference is to be read beside that between seeds.

    python -m tests.benchmarks.bf16_likelihood --out bf16.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import probae

from .mnist_likelihood import train

PRECISIONS = ("float32", "bf16")


def run(
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 20,
    num_samples: int = 500,
    limit: int = 10_000,
    train_limit: int = 60_000,
) -> dict[str, Any]:
    """Train every seed in both precisions and return all figures."""
    data = probae.load_dataset("mnist")
    x = torch.cat([data.train, data.val])[:train_limit]
    test = probae.binarize(data.test, seed=1)[:limit]
    found: dict[str, list[probae.LogLikelihood]] = {precision: [] for precision in PRECISIONS}
    rows = []
    for seed in seeds:
        row: dict[str, Any] = {"seed": seed}
        for precision in PRECISIONS:
            objective = probae.ELBO(beta=probae.LinearWarmup(max(1, epochs // 4)))
            pair, record = train(objective, x, epochs, seed, precision)
            ll = probae.log_likelihood(pair, test, "iwae", num_samples)
            found[precision].append(ll)
            row[precision], row[f"{precision} std_error"] = ll.mean, ll.mean_std_error
            row[f"{precision} seconds"] = record.seconds - record.compile_seconds
        difference = probae.compare(found["bf16"][-1], found["float32"][-1])
        row["difference"], row["std_error"] = difference.difference, difference.std_error
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    differences = [row["difference"] for row in rows]
    between = [
        probae.compare(a, b).difference for a, b in itertools.combinations(found["float32"], 2)
    ]
    return {
        "epochs": epochs,
        "images": len(test),
        "num_samples": num_samples,
        "rows": rows,
        "mean_difference": statistics.mean(differences),
        "largest_difference": max(map(abs, differences)),
        "largest_between_seeds": max(map(abs, between), default=0.0),
    }


def table(result: dict[str, Any]) -> str:
    """Return log-likelihoods in nats per image, and what they differ by."""
    lines = [
        "| seed | float32, nats per image | bf16 | bf16 − float32, paired |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['seed']} | {row['float32']:.2f} ± {row['float32 std_error']:.2f} "
            f"| {row['bf16']:.2f} ± {row['bf16 std_error']:.2f} "
            f"| {row['difference']:+.3f} ± {row['std_error']:.3f} |"
        )
    lines.append(
        f"\nMean difference {result['mean_difference']:+.3f} nats, at most "
        f"{result['largest_difference']:.3f}; two seeds in float32 differ by at most "
        f"{result['largest_between_seeds']:.3f}. {result['images']} images, "
        f"K = {result['num_samples']}, {result['epochs']} epochs."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--limit", type=int, default=10_000, help="number of test images")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(arguments.seeds, arguments.epochs, arguments.num_samples, arguments.limit)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
