"""Features of four autoencoders on MNIST: logistic regression on their codes.

One layer of 500 sigmoid units with tied weights and a Bernoulli likelihood, trained without
labels on 50 000 images: plain (AE), with an Exponential prior on the code (SAE), on corrupted input
(DAE), with a contractive penalty (CAE). Then multinomial logistic regression on the standardised
codes of labelled training images, its regularisation chosen on the validation images, beside the
same on raw pixels and on principal components. ‖J‖ is the mean Frobenius norm of the encoder's
Jacobian over test images.

    python -m tests.benchmarks.mnist_features --out features.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import probae

UNITS = 500
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation of the logistic regression


def tied(
    x_shape: tuple[int, ...],
    prior: Callable[[int], probae.Part] = probae.FlatPrior,
    corruption: probae.Part | None = None,
    penalty: float | None = None,
) -> probae.Autoencoder:
    """Return a pair of one sigmoid layer with tied weights."""
    network = probae.MLP(x_shape, UNITS, out_activation="sigmoid")
    encoder = probae.PointEncoder(network)
    return probae.Autoencoder(
        prior(UNITS),
        encoder,
        probae.BernoulliDecoder(probae.TransposedMLP(network)),
        corruption,
        None if penalty is None else probae.ContractivePenalty(encoder, penalty),
    )


MODELS: dict[str, Callable[[tuple[int, ...]], probae.Autoencoder]] = {
    "AE": tied,
    "SAE": lambda shape: tied(shape, prior=lambda k: probae.ExponentialPrior(k, rate=0.3)),
    "DAE": lambda shape: tied(shape, corruption=probae.Masking(0.3)),
    "CAE": lambda shape: tied(shape, penalty=0.5),
}


def codes(pair: probae.Autoencoder, x: Tensor) -> np.ndarray[Any, Any]:
    """Return the code of every image, (N, units)."""
    with torch.no_grad():
        return torch.cat([pair.encoder(chunk).mean for chunk in x.split(5000)]).numpy()


def jacobian(pair: probae.Autoencoder, x: Tensor) -> float:
    """Return the mean Frobenius norm of the encoder's Jacobian."""
    with torch.no_grad():
        return float(probae.jacobian_norm(pair.encoder, x).sqrt().mean())


def wrongly_classified(features: list[Any], labels: list[Any]) -> tuple[Any, float]:
    """Return which test images are misclassified, and the strength the validation images chose."""
    scaler = StandardScaler().fit(features[0])
    train, val, test = (scaler.transform(f) for f in features)
    models = {c: LogisticRegression(C=c, max_iter=300).fit(train, labels[0]) for c in STRENGTHS}
    best = max(STRENGTHS, key=lambda c: models[c].score(val, labels[1]))
    return models[best].predict(test) != labels[2], best


def run(epochs: int = 10, labelled: int = 10_000, limit: int = 60_000) -> dict[str, Any]:
    """Train the four models, fit the regressions, and return every figure."""
    data = probae.load_dataset("mnist")
    x = data.train[:limit]
    splits = [x[:labelled], data.val[:limit], data.test[:limit]]
    assert data.labels is not None
    own = data.labels.train, data.labels.val, data.labels.test
    labels = [all_of[: len(split)].numpy() for all_of, split in zip(own, splits, strict=True)]
    rows: dict[str, dict[str, float]] = {}
    wrong = {}

    def add(name: str, features: list[Any], **more: float) -> None:
        wrong[name], strength = wrongly_classified(features, labels)
        error = 100 * wrong[name].mean()
        std_error = math.sqrt(error * (100 - error) / len(labels[2]))
        rows[name] = {"error": error, "std_error": std_error, "strength": strength, **more}
        print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)

    raw = [split.flatten(1).numpy() for split in splits]
    add("raw pixels", raw)
    pca = PCA(n_components=min(100, len(raw[0])), random_state=0).fit(x.flatten(1).numpy())
    add("PCA, 100 components", [pca.transform(f) for f in raw])
    for name, build in MODELS.items():
        start = time.perf_counter()
        torch.manual_seed(0)
        pair = build(data.shape)
        pair.initialize(x)
        probae.fit(
            pair,
            x,
            epochs=epochs,
            batch_size=100,
            lr=1e-3,
            schedule="cosine",
            progress=sys.stderr.isatty(),
        )
        seconds = time.perf_counter() - start
        add(
            name,
            [codes(pair, split) for split in splits],
            jacobian=jacobian(pair, splits[2]),
            train_seconds=seconds,
        )
    for name, row in rows.items():  # the same images, so the difference is paired
        difference = 100.0 * wrong[name] - 100.0 * wrong["AE"]
        row["minus_ae"] = float(difference.mean())
        row["minus_ae_std_error"] = float(difference.std() / math.sqrt(len(difference)))
    return {"rows": rows, "epochs": epochs, "labelled": len(labels[0]), "images": len(labels[2])}


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        "| features | test error, % | less that of AE, paired | mean ‖J‖ of the encoder |",
        "|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        norm = f"{row['jacobian']:.2f}" if "jacobian" in row else ""
        difference = f"{row['minus_ae']:+.2f} ± {row['minus_ae_std_error']:.2f}"
        lines.append(
            f"| {name} | {row['error']:.2f} ± {row['std_error']:.2f} "
            f"| {'' if name == 'AE' else difference} | {norm} |"
        )
    lines.append(
        f"\nLogistic regression on {result['labelled']} labelled images, {result['images']} test "
        f"images; autoencoders with {UNITS} units, {result['epochs']} epochs."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--labelled", type=int, default=10_000, help="labelled training images")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(arguments.epochs, arguments.labelled)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
