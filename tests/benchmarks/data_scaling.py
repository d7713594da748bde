"""Ten times the data: ten times the time of an epoch, and no more memory beyond the data.

The VAE of :mod:`tests.benchmarks.training_speed` is trained by ``fit`` on 20 000 and on 200 000
images, and measured on a tenth as many held-out ones after every epoch. The two take turns that
last equally long, the smaller one in ten times as many epochs. Memory is that of processes of their
own: the peak resident set during ``fit``, less the resident set right before it, when the data were
there.

With ``binarize`` the held-out images are binarised once, which is a copy of them; nothing else is.

    python -m tests.benchmarks.data_scaling
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import probae

from .training_speed import LR, Problem, X

STATUS = Path("/proc/self/status")  # of Linux; ru_maxrss begins at the peak of the parent process
MODES: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "eager": {"compile": False},
    "eager, binarised anew": {"compile": False, "binarize": True},
}
SIZES = (20_000, 200_000)


def data(num_data: int) -> tuple[Tensor, Tensor]:
    """Return images for training and a tenth as many more; they are made in place, with no peak."""
    torch.manual_seed(0)
    x, val = torch.empty(num_data, X), torch.empty(num_data // 10, X)
    return x.bernoulli_(0.13), val.bernoulli_(0.13)


def epoch_seconds(problem: Problem, x: Tensor, val: Tensor, epochs: int, mode: str) -> float:
    """Return the seconds of an epoch of ``fit``, after a first one that is left out."""
    torch.manual_seed(0)
    pair = probae.VAE(X, problem.z_dim, hidden=(problem.hidden,))
    run = probae.fit(
        pair, x, val, epochs=1 + epochs, batch_size=problem.batch_size, lr=LR, progress=False,
        **MODES[mode],
    )  # fmt: skip
    seconds = run.history["seconds"]
    return (seconds[-1] - seconds[0]) / epochs


def run_time(problem: Problem, mode: str, rounds: int, sizes: tuple[int, int]) -> dict[str, Any]:
    """Let the sizes take turns; return medians of the seconds of an epoch, and of their ratios."""
    small, large = sizes
    sets, factor = [data(small), data(large)], large // small
    pairs = []
    for i in range(rounds):
        turns = {}
        for which in (0, 1) if i % 2 == 0 else (1, 0):  # as the clock of a machine drifts
            epochs = 1 if which else factor
            turns[which] = epoch_seconds(problem, *sets[which], epochs, mode)
        pairs.append((turns[0], turns[1]))
    return {
        "seconds": [statistics.median(pair[which] for pair in pairs) for which in (0, 1)],
        "ratio": statistics.median(b / a for a, b in pairs),
        "ratios": [b / a for a, b in pairs],
    }


def resident(name: str) -> float:
    """Return the resident set of this process in MiB: ``VmRSS`` (now) or ``VmHWM`` (its peak)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def measure_memory(problem: Problem, mode: str, queue: Any) -> None:
    """Put the size of the data and how much more ``fit`` took at its peak, in MiB."""
    few = data(10 * problem.batch_size)
    epoch_seconds(problem, *few, 1, mode)  # what is loaded and kept has nothing to do with size
    x, val = data(problem.num_data)
    before = resident("VmRSS")
    epoch_seconds(problem, x, val, 1, mode)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (x, val)) / 2**20
    queue.put({"data": size, "before": before, "more": resident("VmHWM") - before})


def memory(problem: Problem, mode: str) -> dict[str, float]:
    """Run :func:`measure_memory` in a new process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(problem, mode, queue))
    process.start()
    result: dict[str, float] = queue.get(timeout=1800)
    process.join()
    return result


def run(
    rounds: int, sizes: tuple[int, int] = SIZES, modes: tuple[str, ...] = tuple(MODES)
) -> dict[str, Any]:
    """Measure time and memory in each mode."""
    result: dict[str, Any] = {"sizes": sizes, "time": {}, "memory": {}}
    for mode in modes:
        result["memory"][mode] = [memory(Problem(num_data=size), mode) for size in sizes]
        result["time"][mode] = run_time(Problem(), mode, rounds, sizes)
        print(text(result, mode), flush=True)
    return result


def text(result: dict[str, Any], mode: str) -> str:
    """Return the two ratios of a mode as two lines."""
    small, large = result["sizes"]
    time, (less, more) = result["time"][mode], result["memory"][mode]
    grown, added = more["more"] - less["more"], more["data"] - less["data"]
    return (
        f"{mode}: an epoch of {small} data {time['seconds'][0]:.2f} s, of {large} "
        f"{time['seconds'][1]:.2f} s; ratio {time['ratio']:.2f} for {large / small:g} times the "
        f"data\n{mode}: beyond the data, {less['data']:.0f} and {more['data']:.0f} MiB, fit's peak "
        f"is {less['more']:.0f} and {more['more']:.0f} MiB; {grown:+.0f} MiB for {added:.0f} MiB "
        f"more data, ratio {grown / added:.3f}"
    )


def main() -> None:
    """Run the measurement, print its lines, write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    result = run(arguments.rounds, modes=tuple(arguments.mode))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
