"""Codes of 10 dimensions for MNIST: pairs beside PCA, factor analysis and UMAP.

Every method is fitted to the same training images without labels. Which pair is the best one is
decided by the accuracy of 10 nearest neighbours on validation images; the table is about test
images, with the training images as neighbours. Noise, widths and number of passes were chosen by
the same accuracy on validation images, in pilot runs.

    python -m tests.benchmarks.mnist_embedding --out embedding.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.decomposition import PCA, FactorAnalysis

import probae

Z_DIM = 10
NEIGHBOURS = 10
Build = Callable[[int, tuple[int, ...]], probae.Autoencoder]

PAIRS: dict[str, Build] = {
    "VAE": lambda x_dim, hidden: probae.VAE(x_dim, Z_DIM, hidden=hidden),
    "DAE": lambda x_dim, hidden: probae.DenoisingAutoencoder(
        x_dim,
        Z_DIM,
        hidden=hidden,
        corruption=probae.GaussianNoise(0.5),
        likelihood="bernoulli",
    ),
    "DenoisingVAE": lambda x_dim, hidden: probae.DenoisingVAE(
        x_dim, Z_DIM, hidden=hidden, corruption=probae.GaussianNoise(0.5)
    ),
}


def others(with_umap: bool) -> dict[str, Any]:
    """Return the methods of other libraries that are installed."""
    methods: dict[str, Any] = {
        "PCA": PCA(Z_DIM, random_state=0),
        "factor analysis": FactorAnalysis(Z_DIM, svd_method="randomized", random_state=0),
    }
    if with_umap:
        import umap  # an extra

        methods["UMAP"] = umap.UMAP(n_components=Z_DIM, random_state=0, n_jobs=1)
    return methods


def run(
    epochs: int = 10,
    hidden: tuple[int, ...] = (500, 500),
    names: tuple[str, ...] = tuple(PAIRS),
    with_umap: bool = True,
    limit: int = 60_000,
) -> dict[str, Any]:
    """Train the pairs, fit the others, and return every figure."""
    data = probae.load_dataset("mnist")
    assert data.labels is not None
    train, val, test = (x.flatten(1)[:limit] for x in (data.train, data.val, data.test))
    labels, val_labels, test_labels = (y[:limit] for y in data.labels)
    methods: dict[str, Any] = {}
    for name in names:
        torch.manual_seed(0)
        pair = PAIRS[name](train.shape[1], hidden)
        pair.initialize(train)
        fitted = probae.fit(
            pair,
            train,
            epochs=epochs,
            batch_size=250,
            schedule="cosine",
            progress=sys.stderr.isatty(),
            compile="auto",
        )
        methods[name] = (pair, fitted)
        print(name, f"{fitted.seconds:.0f} s", file=sys.stderr, flush=True)
    chosen = probae.compare_embeddings(
        methods, train, val, labels, val_labels, num_neighbours=NEIGHBOURS
    )
    print(chosen, file=sys.stderr, flush=True)
    best = max(chosen.rows, key=lambda row: row.accuracy or 0.0).name
    tested = probae.compare_embeddings(
        methods | others(with_umap), train, test, labels, test_labels, num_neighbours=NEIGHBOURS
    )
    print(tested, file=sys.stderr, flush=True)
    return {
        "rows": {row.name: row._asdict() for row in tested.rows},
        "validation": {row.name: row.accuracy for row in chosen.rows},
        "best": best,
        "epochs": epochs,
        "hidden": hidden,
        "images": len(test),
        "training_images": len(train),
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        f"| method | {NEIGHBOURS}-NN accuracy, % | trustworthiness | squared error per pixel "
        "| fit, s |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        error = "" if row["reconstruction"] is None else f"{row['reconstruction']:.4f}"
        mark = ", best on validation" if name == result["best"] else ""
        lines.append(
            f"| {name}{mark} | {100 * row['accuracy']:.2f} ± {100 * row['accuracy_std_error']:.2f} "
            f"| {row['trustworthiness']:.4f} | {error} | {row['fit_seconds']:.0f} |"
        )
    widths = "-".join(map(str, result["hidden"]))
    lines.append(
        f"\n{Z_DIM} dimensions; pairs with hidden layers {widths}, {result['epochs']} epochs; "
        f"{result['training_images']} training and {result['images']} test images; one seed."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs="+", default=[500, 500])
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--no-umap", action="store_true", help="leave UMAP out, which takes long")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(
        arguments.epochs,
        tuple(arguments.hidden),
        tuple(arguments.pairs),
        not arguments.no_umap,
    )
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
