"""Autoencoders in scikit-learn pipelines: digits classified by logistic regression on codes.

A pipeline of features, standardisation and multinomial logistic regression, for raw pixels,
principal components, and the codes of a denoising (DAE), a sparse (SAE) and a variational
autoencoder (VAE), each trained without labels. Every setting, of the features and of the
regression, is chosen by GridSearchCV: three-fold cross-validation on the training and validation
images together. The chosen pipeline is fitted again on all of these, and the test images are used
once.

    python -m tests.benchmarks.digits_pipeline --out pipeline.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import probae
from probae import AutoencoderEstimator

STRENGTHS = (0.01, 0.1, 1.0)  # inverse regularisation of the logistic regression
TRAINING: dict[str, Any] = {
    "batch_size": 50,
    "lr": 2e-3,
    "schedule": "cosine",
    "random_state": 0,
}


def candidates(epochs: int) -> dict[str, tuple[Any, dict[str, list[Any]]]]:
    """Return each kind of features with the settings to choose from."""
    training = {"epochs": epochs, **TRAINING}
    return {
        "raw pixels": ("passthrough", {}),
        "PCA": (PCA(random_state=0), {"n_components": [10, 20, 40]}),
        "DAE": (
            AutoencoderEstimator("DenoisingAutoencoder", 256, hidden=(400,), **training),
            {"corruption": [probae.GaussianNoise(0.3), probae.Masking(0.3)]},
        ),
        "SAE": (
            AutoencoderEstimator(
                "SparseAutoencoder",
                256,
                prior="exponential",
                likelihood_options={"scale": 0.3},
                **training,
            ),
            {"rate": [0.01, 0.1, 0.3]},
        ),
        "VAE": (
            AutoencoderEstimator("VAE", hidden=(400,), **training),
            {"z_dim": [10, 20, 40]},
        ),
    }


def run(
    names: tuple[str, ...] | None = None,
    epochs: int = 40,
    strengths: tuple[float, ...] = STRENGTHS,
    first_only: bool = False,
) -> dict[str, Any]:
    """Choose, fit and test a pipeline for each kind of features, and return every figure.

    ``names`` are some of the features, by default all; ``first_only`` takes the first of the
    settings of each, for a quick run.
    """
    data = probae.load_dataset("digits")
    assert data.labels is not None
    x = torch.cat([data.train, data.val]).flatten(1).numpy()
    labels = torch.cat([data.labels.train, data.labels.val]).numpy()
    test, test_labels = data.test.flatten(1).numpy(), data.labels.test.numpy()
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    features = candidates(epochs)
    rows: dict[str, dict[str, Any]] = {}
    right = {}
    for name in features if names is None else names:
        step, settings = features[name]
        grid = {f"features__{key}": values for key, values in settings.items()}
        if first_only:
            grid = {key: values[:1] for key, values in grid.items()}
        grid["classifier__C"] = list(strengths)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as memory:  # features are fitted once for all C
            pipeline = Pipeline(
                [
                    ("features", step),
                    ("scaler", StandardScaler()),
                    ("classifier", LogisticRegression(max_iter=1000)),
                ],
                memory=memory,
            )
            search = GridSearchCV(pipeline, grid, cv=folds).fit(x, labels)
        right[name] = search.predict(test) == test_labels
        accuracy = float(right[name].mean())
        rows[name] = {
            "accuracy": accuracy,
            "std_error": math.sqrt(accuracy * (1 - accuracy) / len(test)),
            "cross_validated": float(search.best_score_),
            "settings": {key.split("__")[1]: str(v) for key, v in search.best_params_.items()},
            "seconds": time.perf_counter() - start,
        }
        print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)
    if "raw pixels" in right:
        for name, row in rows.items():  # the same images, so the difference is paired
            difference = right[name].astype(float) - right["raw pixels"]
            row["gain"] = float(difference.mean())
            row["gain_std_error"] = float(np.std(difference) / math.sqrt(len(difference)))
    return {"rows": rows, "epochs": epochs, "images": len(test), "labelled": len(labels)}


def table(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        "| features | test accuracy, % | gain over raw pixels, paired | cross-validated, % "
        "| chosen |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        gain = f"{100 * row['gain']:+.1f} ± {100 * row['gain_std_error']:.1f}"
        chosen = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
        lines.append(
            f"| {name} | {100 * row['accuracy']:.1f} ± {100 * row['std_error']:.1f} "
            f"| {'' if name == 'raw pixels' else gain} | {100 * row['cross_validated']:.1f} "
            f"| {chosen} |"
        )
    lines.append(
        f"\nLogistic regression on {result['labelled']} labelled images, {result['images']} test "
        f"images; autoencoders trained for {result['epochs']} epochs without labels."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(epochs=arguments.epochs)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
