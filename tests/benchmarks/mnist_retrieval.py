"""Retrieval of MNIST digits by binary codes: semantic hashing beside two classical hashes.

Queries are the test images, the database is the training images; an image is relevant where it
shows the same digit. No method sees a label. Locality-sensitive hashing takes the signs of random
projections, PCA hashing those of the first principal components, both of centred images. The
settings of semantic hashing were chosen in pilot runs by the mean average precision of validation
images at 32 bits.

Then the look-up of the 10 nearest of 60 000 codes for 10 000 queries is timed in turn: the index of
this library on faiss and on scikit-learn, and faiss called directly.

    python -m tests.benchmarks.mnist_retrieval --out retrieval.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.decomposition import PCA
from torch import Tensor

import probae

BITS = (32, 64)
DEPTH = 100  # of precision at k, and of the look-up that semantic hashing is for, radius 2
NEIGHBOURS = 10  # of the look-up that is timed
NAMES = ("LSH", "PCA hashing", "SemanticHashing")

Bits = Callable[[Tensor], Tensor]


def random_hyperplanes(x: Tensor, bits: int) -> Bits:
    """Return the signs of random projections of centred data."""
    planes = torch.randn(x.shape[1], bits, generator=torch.Generator().manual_seed(0))
    mean = x.mean(0)
    return lambda x: (x - mean) @ planes > 0


def principal_components(x: Tensor, bits: int) -> Bits:
    """Return the signs of the first principal components."""
    pca = PCA(bits, random_state=0).fit(x.numpy())
    return lambda x: torch.from_numpy(pca.transform(x.numpy()) > 0)


def semantic_hashing(x: Tensor, bits: int, epochs: int, units: int) -> Bits:
    """Train a pair without labels and return its bits."""
    torch.manual_seed(0)
    pair = probae.SemanticHashing(x.shape[1], bits, hidden=(units,))
    pair.initialize(x)
    probae.fit(
        pair,
        x,
        epochs=epochs,
        batch_size=250,
        schedule="cosine",
        progress=sys.stderr.isatty(),
        compile="auto",
    )
    return lambda x: probae.binary_codes(pair, x)


def look_up(codes: Tensor, queries: Tensor, repeats: int) -> dict[str, float]:
    """Return median seconds of the same search, by the index and by faiss called directly."""
    import faiss  # an extra

    packed, asked = (probae.pack_codes(c).numpy() for c in (codes, queries))
    direct = faiss.IndexBinaryFlat(8 * packed.shape[1])
    direct.add(packed)
    ours, without = (probae.CodeIndex(packed, backend=name) for name in ("faiss", "sklearn"))
    searches: dict[str, Callable[[], Any]] = {
        "faiss": lambda: direct.search(asked, NEIGHBOURS),
        "index on faiss": lambda: ours.search(asked, NEIGHBOURS),
        "index on sklearn": lambda: without.search(asked, NEIGHBOURS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(repeats):
        for name, search in searches.items():
            start = time.perf_counter()
            search()
            seconds[name].append(time.perf_counter() - start)
    found = ours.search(asked, NEIGHBOURS), without.search(asked, NEIGHBOURS)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return {name: statistics.median(times) for name, times in seconds.items()}


def run(
    epochs: int = 8,
    units: int = 500,
    bits: tuple[int, ...] = BITS,
    limit: int = 60_000,
    repeats: int = 5,
    timed: bool = True,
    names: tuple[str, ...] = NAMES,
) -> dict[str, Any]:
    """Make the codes, rank the training images for every test image, and return every figure."""
    data = probae.load_dataset("mnist")
    assert data.labels is not None
    train, val, test = (x.flatten(1)[:limit] for x in (data.train, data.val, data.test))
    labels, _, test_labels = (y[:limit] for y in data.labels)
    makers: dict[str, Callable[[int], Bits]] = {
        "LSH": lambda k: random_hyperplanes(train, k),
        "PCA hashing": lambda k: principal_components(train, k),
        "SemanticHashing": lambda k: semantic_hashing(train, k, epochs, units),
    }
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for k in bits:
        for name in names:
            to_bits = makers[name](k)
            codes, queries = to_bits(train), to_bits(test)
            task = (queries, codes, test_labels, labels)
            average = probae.mean_average_precision(*task)
            first = probae.precision_at_k(*task, k=min(DEPTH, len(codes)))
            rows[f"{name}, {k} bits"] = {
                "bits": k,
                "map": average.mean,
                "map_std_error": average.std_error,
                "precision": first.mean,
                "precision_std_error": first.std_error,
            }
            print(name, k, rows[f"{name}, {k} bits"], file=sys.stderr, flush=True)
            if timed and name == names[-1] and k == bits[-1]:
                seconds = look_up(torch.cat([codes, to_bits(val)]), queries, repeats)
    return {
        "rows": rows,
        "seconds": seconds,
        "epochs": epochs,
        "units": units,
        "images": len(test),
        "training_images": len(train),
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        f"| code | mean average precision, % | precision at {DEPTH}, % |",
        "|---|---|---|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {100 * row['map']:.1f} ± {100 * row['map_std_error']:.1f} "
            f"| {100 * row['precision']:.1f} ± {100 * row['precision_std_error']:.1f} |"
        )
    lines.append(
        f"\n{result['images']} queries, {result['training_images']} codes; semantic hashing with "
        f"{result['units']} hidden units, {result['epochs']} epochs."
    )
    for name, seconds in result["seconds"].items():
        ratio = seconds / result["seconds"]["faiss"]
        lines.append(f"Look-up, {name}: {seconds:.2f} s, {ratio:.2f} times faiss.")
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--units", type=int, default=500)
    parser.add_argument("--no-timing", action="store_true", help="do without faiss")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(arguments.epochs, arguments.units, timed=not arguments.no_timing)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
