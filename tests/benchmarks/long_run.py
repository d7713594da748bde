"""Memory over a long training: the resident set of 100 000 steps and more of a tiny pair.

Steps, checkpoints, skipped batches, measurements and history are those of any training; only the
pair is small, so that a day's number of steps passes in minutes. The resident set is read at the
end of every epoch; the first tenth of the run is left out, in which caches and pools fill up.

    python -m tests.benchmarks.long_run --out long.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import probae

STEPS_PER_EPOCH, BATCH = 100, 8


class Watched(probae.ELBO):
    """An ELBO that reads the resident set of the process once an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[float] = []  # MiB
        self._calls = 0

    def differentiable_loss(self, *arguments: Any, **keywords: Any) -> Tensor:
        if torch.is_grad_enabled():
            if self._calls % STEPS_PER_EPOCH == 0:
                self._sizes.append(resident())
            self._calls += 1
        return super().differentiable_loss(*arguments, **keywords)


def resident() -> float:
    """Return the resident set of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def run(steps: int) -> dict[str, Any]:
    """Train for so many steps with checkpoints; return sizes at the begin of epochs."""
    torch.manual_seed(0)
    x = torch.rand(STEPS_PER_EPOCH * BATCH, 6).round()
    pair, objective = probae.VAE(6, 2, hidden=(5,)), Watched()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = probae.fit(
            pair, x, x[:50], epochs=steps // STEPS_PER_EPOCH, batch_size=BATCH,
            objective=objective, progress=False, checkpoint=folder,
        )  # fmt: skip
    sizes = objective._sizes
    settled = sizes[len(sizes) // 10 :]
    tenth = max(1, len(settled) // 10)
    return {
        "steps": objective._calls,
        "epochs": len(record.history["loss"]),
        "seconds": time.monotonic() - begun,
        "mib_after_warm_up": statistics.median(settled[:tenth]),
        "mib_at_the_end": statistics.median(settled[-tenth:]),
        "largest_over_smallest": max(settled) / min(settled),
        "growth": statistics.median(settled[-tenth:]) / statistics.median(settled[:tenth]) - 1,
    }


def main() -> None:
    """Run the experiment and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120_000)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run(arguments.steps)
    print(json.dumps(result, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
