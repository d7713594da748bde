"""Training on an array that is larger than memory: what stays resident, and how fast it goes.

A sparse ``.npy`` file of the given size is made on the spot, of zeros but for some rows, and a VAE
is fitted to its path. Reported is the growth of the process's own memory (RssAnon: what is not a
page of a file, which the kernel takes back as it likes), its peak over the run.

    python -m tests.benchmarks.out_of_core --gigabytes 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import probae

PIXELS = 784
MIB = 2**20


def make(file: Path, size: int) -> int:
    """Write a sparse file of about so many bytes; return its number of rows."""
    rows = size // (4 * PIXELS)
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(rows, PIXELS))
    rng = np.random.default_rng(0)
    for start in np.linspace(0, rows - 100, 50).astype(int):
        array[start : start + 100] = rng.random((100, PIXELS)) < 0.5
    array.flush()
    return rows


def resident() -> dict[str, int]:
    """Return the process's resident memory in bytes, of its own and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


class Peak:
    """The peak of what is resident, looked at ten times a second."""

    def __init__(self) -> None:
        self.before = self.most = resident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.look()

    def look(self) -> None:
        """Take note of what is resident now."""
        now = resident()
        self.most = {name: max(now[name], self.most[name]) for name in now}

    def grown(self, name: str) -> int:
        """Return by how many bytes the peak is above the start."""
        self.look()
        return self.most[name] - self.before[name]


class Rows(Dataset[torch.Tensor]):
    """The rows of a mapped array as a user's own Dataset reads them."""

    def __init__(self, file: Path) -> None:
        self.array = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, place: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.array[place]))


class Pass(IterableDataset[torch.Tensor]):
    """The first rows of a mapped array in their order, shared out among workers."""

    def __init__(self, file: Path, rows: int) -> None:
        self.array, self.rows = np.load(file, mmap_mode="r"), rows

    def __iter__(self) -> Any:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place in range(first, self.rows, step):
            yield torch.from_numpy(np.array(self.array[place]))


class Stop(Exception):
    """Ends a training after so many steps."""


def train(data: Any, batch_size: int, most_steps: int | None, num_workers: int = 0) -> int:
    """Fit a VAE for an epoch, or so many steps; return the number of steps."""
    torch.manual_seed(0)
    pair = probae.VAE(PIXELS, 8, hidden=(64,))
    steps = 0

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        def factor(step: int) -> float:
            nonlocal steps
            steps = step
            if step == most_steps:
                raise Stop
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    with contextlib.suppress(Stop):
        probae.fit(
            pair,
            data,
            epochs=1,
            batch_size=batch_size,
            schedule=schedule,
            num_workers=num_workers,
            progress=False,
        )
    return steps


def measure(
    folder: Path, gigabytes: float, batch_size: int, most_steps: int | None, num_workers: int
) -> dict[str, Any]:
    """Make a file, train on it, and say what memory and time that took."""
    file = folder / "large.npy"
    try:
        rows = make(file, int(gigabytes * 2**30))
        probae.fit(probae.VAE(4, 1), torch.rand(8, 4).round(), epochs=1, progress=False)  # imports
        with Peak() as peak:
            start = time.perf_counter()
            steps = train(file, batch_size, most_steps, num_workers)
            seconds = time.perf_counter() - start
        return {
            "gigabytes": file.stat().st_size / 2**30,
            "on_disk_mib": file.stat().st_blocks * 512 / MIB,
            "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            "rows": rows,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "steps": steps,
            "epoch_steps": -(-rows // batch_size),
            "seconds": seconds,
            "data_per_second": steps * batch_size / seconds,
            "rss_anon_grown_mib": peak.grown("RssAnon") / MIB,
            "rss_file_grown_mib": peak.grown("RssFile") / MIB,
        }
    finally:
        file.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="end after so many; default: a whole epoch")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to make the file; default: a new one")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        result = measure(folder, args.gigabytes, args.batch_size, args.steps, args.num_workers)
    finally:
        shutil.rmtree(folder)
    for name, value in result.items():
        print(f"{name:22} {value:,.1f}" if isinstance(value, float) else f"{name:22} {value:,}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
