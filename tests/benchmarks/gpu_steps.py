"""Time of a training step on a GPU: eager, as machine code, and as one CUDA graph of that.

``fit`` trains a VAE 784-400-20-400-784 by Adam on random bits in the GPU's memory, the three ways
in turn, several rounds; what counts are the medians over the epochs after the first, which
compiles, and their medians over the rounds. Losses are printed, as they have to agree.

    python -m tests.benchmarks.gpu_steps
    python -m tests.benchmarks.gpu_steps --batch-size 128 --out steps.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import probae
from probae.compiling import CompiledStep

X, Z, HIDDEN = 784, 20, (400,)
EPOCHS = 4


def not_captured() -> AbstractContextManager[Any]:
    """Return a context in which machine code is launched operation by operation."""
    return mock.patch.object(CompiledStep, "_capture")


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "eager": nullcontext,
    "compiled": not_captured,
    "captured": nullcontext,
}


def train(way: str, batch_size: int, steps: int, precision: str, device: str) -> dict[str, float]:
    """Return milliseconds per step, the seconds that compilation took, and the last loss."""
    torch.manual_seed(0)
    pair = probae.VAE(X, Z, hidden=HIDDEN).to(device)
    x = torch.rand(steps * batch_size, X).round()
    with WAYS[way]():
        run = probae.fit(
            pair, x, epochs=EPOCHS, batch_size=batch_size, compile=way != "eager",
            precision=precision, progress=False,
        )  # fmt: skip
    epochs = [after - before for before, after in pairwise(run.history["seconds"])]
    return {
        "ms": 1e3 * statistics.median(epochs) / steps,
        "compile_seconds": run.compile_seconds,
        "loss": run.history["loss"][-1],
    }


def run(
    batch_size: int, rounds: int, steps: int, precision: str = "float32", device: str = "cuda"
) -> dict[str, Any]:
    """Let the three ways take turns, and return all that was measured."""
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, results in turns.items():
            results.append(train(way, batch_size, steps, precision, device))
            print(way, *(f"{name} {value:.4g}" for name, value in results[-1].items()), flush=True)
    return {
        "batch_size": batch_size,
        "precision": precision,
        "medians": {way: statistics.median(r["ms"] for r in turns[way]) for way in WAYS},
        "turns": turns,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the medians in ms per step, and how many times faster than eager steps that is."""
    lines = ["| ms per step | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for result in results:
        medians = result["medians"]
        cells = [f"{ms:.3f} ({medians['eager'] / ms:.1f}×)" for ms in medians.values()]
        lines.append(f"| batch {result['batch_size']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    results = [
        run(size, arguments.rounds, arguments.steps, arguments.precision, arguments.device)
        for size in arguments.batch_size
    ]
    print(table(results))
    if arguments.out is not None:
        on_gpu = torch.device(arguments.device).type == "cuda"
        record = {
            "results": results,
            "device": torch.cuda.get_device_name(arguments.device) if on_gpu else "cpu",
            "torch": torch.__version__,
            "platform": platform.platform(),
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
