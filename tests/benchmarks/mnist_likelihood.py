"""Test likelihood of a VAE and of an IWAE(5) on dynamically binarised MNIST.

The architecture and the data are those of Burda, Grosse & Salakhutdinov (2016), one stochastic
layer: 784-200-200-50-200-200-784, tanh, all 60 000 training images binarised anew at every
presentation. Training is 60 epochs instead of their 3280. Both models are evaluated on the same
binarised test images, so that their difference is paired.

    python -m tests.benchmarks.mnist_likelihood --out mnist.json
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import probae

WARMUP = 10  # epochs over which the weight of the VAE's KL rises to 1


def train(
    objective: probae.ELBO | probae.IWAE,
    x: torch.Tensor,
    epochs: int,
    seed: int,
    precision: str = "float32",
) -> Any:
    """Return a trained pair and the run."""
    torch.manual_seed(seed)
    pair = probae.VAE((1, 28, 28), 50, hidden=(200, 200), activation="tanh")
    pair.initialize(x)
    run = probae.fit(
        pair,
        x,
        epochs=epochs,
        batch_size=100,
        lr=4e-3,
        schedule="cosine",
        objective=objective,
        binarize=True,
        seed=seed,
        precision=precision,
        progress=sys.stderr.isatty(),
    )
    return pair, run


def run(
    epochs: int = 60,
    num_samples: int = 5000,
    limit: int = 10_000,
    seed: int = 0,
    train_limit: int = 60_000,
) -> dict[str, Any]:
    """Train both models, evaluate both, and return every figure."""
    data = probae.load_dataset("mnist")
    x = torch.cat([data.train, data.val])[:train_limit]
    test = probae.binarize(data.test, seed=1)[:limit]
    warmup = probae.LinearWarmup(min(WARMUP, max(1, epochs // 4)))
    objectives = {"VAE": probae.ELBO(beta=warmup), "IWAE(5)": probae.IWAE(5, dreg=True)}
    values, rows = {}, {}
    for name, objective in objectives.items():
        pair, record = train(objective, x, epochs, seed)
        start = time.perf_counter()
        ll = probae.log_likelihood(pair, test, "iwae", num_samples)
        seconds = time.perf_counter() - start
        elbo = probae.log_likelihood(pair, test, "elbo", 100)
        values[name] = ll.values
        rows[name] = {
            "nll": -ll.mean,
            "std_error": ll.mean_std_error,
            "negative_elbo": -elbo.mean,
            "active_units": record.history["active_units"][-1],
            "khat_above_0.7": float((ll.khat > 0.7).double().mean()),
            "train_seconds": record.seconds,
            "evaluation_seconds": seconds,
        }
        print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)
    difference = values["VAE"] - values["IWAE(5)"]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "epochs": epochs,
        "num_samples": num_samples,
        "images": len(test),
        "models": rows,
        "iwae_minus_vae": float(-difference.mean()),  # log-likelihood gained, nats per image
        "iwae_minus_vae_std_error": float(difference.std() / math.sqrt(len(difference))),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        "| model | test NLL, nats per image | -ELBO | active units | images with Pareto k > 0.7 |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["models"].items():
        lines.append(
            f"| {name} | {row['nll']:.2f} ± {row['std_error']:.2f} | {row['negative_elbo']:.2f} "
            f"| {row['active_units']:.0f} | {100 * row['khat_above_0.7']:.0f} % |"
        )
    lines.append(
        f"\nIWAE(5) − VAE, paired: {result['iwae_minus_vae']:+.2f} ± "
        f"{result['iwae_minus_vae_std_error']:.2f} nats of log-likelihood; "
        f"{result['images']} images, K = {result['num_samples']}, {result['epochs']} epochs; peak "
        f"memory {result['peak_memory_gib']:.2f} GiB."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--limit", type=int, default=10_000, help="number of test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(arguments.epochs, arguments.num_samples, arguments.limit, arguments.seed)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
