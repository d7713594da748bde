"""Does a sparsity penalty approximate maximum likelihood? Point codes against posteriors.

A sparse autoencoder on binarised digits is trained at several rates λ of its Laplace prior, with
the textbook's point code and with a posterior that has a density. Prior, decoder and encoder
network are the same. Point codes certify no likelihood, so every model is measured alike, twice:
by annealed importance sampling from the prior, and by importance samples from a fresh proposal that
is fitted to the frozen decoder on the training images. Both are lower bounds on log p(x) of test
images; the first is the tighter one.

    python -m tests.benchmarks.digits_sparsity --out sparsity.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import probae

POSTERIORS = ("point", "laplace", "gaussian")
UNITS = 32  # latent dimensions
TRAINING: dict[str, Any] = {  # of pairs and of proposals alike
    "batch_size": 50,
    "lr": 2e-3,
    "schedule": "cosine",
    "binarize": True,
    "progress": False,
}


def build(x_shape: tuple[int, ...], posterior: str, rate: float) -> probae.Autoencoder:
    """Return a sparse autoencoder: a deep encoder, a linear decoder, a Laplace prior."""
    parameters = (UNITS,) if posterior == "point" else (2, UNITS)
    network = probae.MLP(x_shape, parameters, hidden=(200,))
    encoders = {
        "point": probae.PointEncoder,
        "laplace": probae.LaplaceEncoder,
        "gaussian": probae.GaussianEncoder,
    }
    # columns of unit length, for all three: else a point code trades the scale of z against that
    # of the decoder, and λ means nothing
    decoder = probae.BernoulliDecoder(probae.MLP(UNITS, x_shape, unit_norm=True))
    return probae.Autoencoder(
        probae.LaplacePrior(UNITS, rate), encoders[posterior](network), decoder
    )


def train(x: Tensor, posterior: str, rate: float, epochs: int, seed: int) -> Any:
    """Return a trained sparse autoencoder and its run."""
    torch.manual_seed(seed)
    pair = build(tuple(x.shape[1:]), posterior, rate)
    pair.initialize(x)
    run = probae.fit(pair, x, epochs=epochs, seed=seed, **TRAINING)
    return pair, run


def fitted(pair: Any, x: Tensor, test: Tensor, epochs: int, num_samples: int, seed: int) -> Any:
    """Return the importance-weighted bound on log p(test) under a proposal fitted to ``x``."""
    torch.manual_seed(seed)
    proposal = probae.fit_proposal(pair, x, epochs=epochs, seed=seed, **TRAINING)
    return probae.log_likelihood(pair, test, "iwae", num_samples, proposal=proposal)


def run(
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
    epochs: int = 200,
    num_samples: int = 5000,
    temperatures: int = 300,
    limit: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Train and measure every model, and return every figure."""
    data = probae.load_dataset("digits")
    x = torch.cat([data.train, data.val])
    test = probae.binarize(data.test, seed=1)[:limit]
    rows = []
    for rate in rates:
        values = {}
        for posterior in POSTERIORS:
            pair, record = train(x, posterior, rate, epochs, seed)
            annealing = probae.Annealing(temperatures)
            ll = probae.log_likelihood(pair, test, "ais", 8, annealing=annealing, seed=seed)
            bound = fitted(pair, x, test, epochs, num_samples, seed)
            values[posterior] = ll.values
            code = probae.reconstruct(pair, test)
            difference = ll.values - values["point"]
            row = {
                "rate": rate,
                "posterior": posterior,
                "kind": record.kind.value,
                "minus_loss": -record.history["loss"][-1],
                "log_likelihood": ll.mean,
                "std_error": ll.mean_std_error,
                "minus_point": float(difference.mean()),
                "minus_point_std_error": float(difference.std() / math.sqrt(len(difference))),
                "reconstruction": float(code.log_prob(test).mean()),
                "acceptance": float(ll.acceptance.mean()),
                "chains_ess": float(ll.ess.mean()),
                "fitted_proposal": bound.mean,
                "khat_above_0.7": float((bound.khat > 0.7).double().mean()),
            }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return {
        "rows": rows,
        "images": len(test),
        "num_samples": num_samples,
        "temperatures": temperatures,
        "epochs": epochs,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        "| λ | posterior | -loss is | -loss, training | log p(x), AIS | gain over point "
        "| log p(x), fitted proposal | log p(x \\| code) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        gain = f"{row['minus_point']:+.2f} ± {row['minus_point_std_error']:.2f}"
        lines.append(
            f"| {row['rate']:g} | {row['posterior']} | {row['kind']} | {row['minus_loss']:.1f} "
            f"| {row['log_likelihood']:.2f} ± {row['std_error']:.2f} "
            f"| {'' if row['posterior'] == 'point' else gain} | {row['fitted_proposal']:.2f} "
            f"| {row['reconstruction']:.2f} |"
        )
    lines.append(
        f"\nNats per image, {result['images']} test images; AIS with 8 chains and "
        f"{result['temperatures']} temperatures, {result['num_samples']} importance samples from "
        f"the fitted proposal, both lower bounds; {result['epochs']} epochs."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--temperatures", type=int, default=300)
    parser.add_argument("--limit", type=int, default=100, help="number of test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(
        epochs=arguments.epochs,
        num_samples=arguments.num_samples,
        temperatures=arguments.temperatures,
        limit=arguments.limit,
        seed=arguments.seed,
    )
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
