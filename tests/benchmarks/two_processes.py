"""One process against several: the same losses, how many data a second, a worker that is killed.

The processes are started by torchrun, each with one thread, on one machine; the global batch is the
same. The loss curve has to be the same, up to rounding: what is drawn for the whole batch does not
depend on the number of processes. Rounding grows from step to step, so one pair is trained in
float64, too.

    python -m tests.benchmarks.two_processes --out two.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import probae
from probae import checkpoints

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ("undercomplete", "undercomplete float64", "contractive", "vae")


class Watched(probae.ELBO):
    """An ELBO that keeps the loss of each step, summed over the data of this process."""

    def __init__(self) -> None:
        super().__init__()
        self._losses: list[Tensor] = []

    def differentiable_loss(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().differentiable_loss(*arguments, **keywords)
        if torch.is_grad_enabled():
            self._losses.append(loss.detach().double())
        return loss


def build(name: str, x_shape: tuple[int, ...], hidden: tuple[int, ...]) -> probae.Autoencoder:
    """Return a pair; only the last draws."""
    torch.manual_seed(0)
    if name.endswith("float64"):
        return build(name.split()[0], x_shape, hidden).double()
    if name == "undercomplete":
        return probae.UndercompleteAutoencoder(x_shape, 20, hidden=hidden, likelihood="bernoulli")
    if name == "contractive":
        return probae.ContractiveAutoencoder(
            x_shape, 20, hidden=hidden[:1], weight=0.1, likelihood="bernoulli"
        )
    return probae.VAE(x_shape, 20, hidden=hidden)


def train(name: str, rows: int, batch_size: int, hidden: tuple[int, ...], out: Path) -> None:
    """Train for an epoch in this process, or as one of a group, and write losses and seconds."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    data = probae.load_dataset("mnist")
    x = data.train[:rows].round()
    pair = build(name, data.shape, hidden)
    x = x.to(pair.dtype)
    pair.initialize(x[:5000])
    objective = Watched()
    probae.fit(build(name, data.shape, hidden), x[:2000], epochs=1, progress=False)  # warm up
    start, used = time.perf_counter(), time.process_time()
    run = probae.fit(pair, x, epochs=1, batch_size=batch_size, objective=objective, progress=False)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    losses = torch.stack(objective._losses)
    if dist.is_initialized():
        dist.all_reduce(losses)
    if not dist.is_initialized() or dist.get_rank() == 0:
        result = {
            "losses": losses.tolist(),
            "loss": run.history["loss"][0],
            "elbo": run.history["elbo"][0],
            "seconds": seconds,
            "processor_seconds": used,
        }
        out.write_text(json.dumps(result), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(processes: int, *arguments: str) -> list[str]:
    """Return the command that starts so many processes."""
    if processes == 1:
        return [sys.executable, "-m", *arguments]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, f"--nproc-per-node={processes}", "-m", *arguments]


def environment() -> dict[str, str]:
    """Return this process's environment, for processes of one thread."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def compare(
    name: str, processes: int, rows: int, batch_size: int, hidden: tuple[int, ...]
) -> dict[str, Any]:
    """Train a pair in one process and in several, and compare losses and times."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, processes):
            out = Path(folder) / f"{count}.json"
            options = ["--worker", name, "--rows", str(rows), "--batch-size", str(batch_size)]
            options += ["--hidden", *map(str, hidden), "--out", str(out)]
            command = launch(count, "tests.benchmarks.two_processes", *options)
            subprocess.run(command, check=True, env=environment(), cwd=ROOT)
            results.append(json.loads(out.read_text(encoding="utf-8")))
    one, several = results
    losses = [torch.tensor(result["losses"], dtype=torch.float64) for result in results]
    return {
        "pair": name,
        "processes": processes,
        "rows": rows,
        "batch_size": batch_size,
        "steps": len(one["losses"]),
        "largest_difference_of_a_step": float(((losses[1] - losses[0]) / losses[0]).abs().max()),
        "difference_of_the_epoch": abs(several["loss"] / one["loss"] - 1),
        "difference_of_the_elbo": abs(several["elbo"] / one["elbo"] - 1),
        "loss": [one["loss"], several["loss"]],
        "data_per_second": [rows / result["seconds"] for result in results],
        "efficiency": one["seconds"] / several["seconds"] / processes,
        "processor_seconds": [result["processor_seconds"] for result in results],
    }


def kill_a_worker(folder: Path, processes: int = 2, victim: int = 1) -> dict[str, Any]:
    """Kill one process of ``probae fit``, and go on from the checkpoint with one process."""
    run, place = folder / "run", folder / "run.checkpoint" / checkpoints.FILE
    options = "--data digits --z-dim 4 --hidden 32 --batch-size 32 --quiet"
    fit = ["probae", "fit", "vae", *options.split(), "--checkpoint-seconds", "0.2"]
    fit += ["--out", str(run)]
    worker = subprocess.Popen(
        launch(processes, *fit, "--epochs", "100000"),
        env=environment(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300
    while time.monotonic() < until and not (place.exists() and _epoch(place) > 2):
        time.sleep(0.1)
        assert worker.poll() is None, worker.communicate()[1]
    children = _children(worker.pid)
    begun = time.monotonic()
    os.kill(children[victim], signal.SIGKILL)
    _, errors = worker.communicate(timeout=120)
    ended = time.monotonic() - begun
    # torchrun writes to the same stream, at times to the same line
    messages = [line for line in errors.splitlines() if "probae, process" in line]
    reached = _epoch(place)
    command = launch(1, *fit, "--epochs", str(reached + 1), "--resume", "--overwrite")
    resumed = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    history = json.loads((run / "history.json").read_text(encoding="utf-8"))
    return {
        "victim": victim,
        "exit_status": worker.returncode,
        "seconds_until_all_ended": ended,
        "messages": messages,
        "errors": errors[-3000:],
        "epoch_of_the_checkpoint": reached,
        "resumed_status": resumed.returncode,
        "resumed_note": resumed.stderr.strip()[-300:],
        "epochs_in_all": len(history["loss"]),
    }


def _epoch(place: Path) -> int:
    return int(checkpoints.read(place)["epoch"])


def _children(parent: int) -> list[int]:
    """Return the processes that torchrun started, in the order of their ranks."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                owner = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                settings = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [item for item in settings if item.startswith(b"RANK=")]
            if owner == parent and ranks:
                found[int(ranks[0][5:])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def table(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        "| pair | batch | steps | largest relative difference of a step | of the epoch's loss "
        "| data/s, one process | several | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        speeds = row["data_per_second"]
        lines.append(
            f"| {row['pair']} | {row['batch_size']} | {row['steps']} "
            f"| {row['largest_difference_of_a_step']:.1e} | {row['difference_of_the_epoch']:.1e} "
            f"| {speeds[0]:.0f} | {speeds[1]:.0f} | {100 * row['efficiency']:.0f} % |"
        )
    killed = [{k: v for k, v in row.items() if k != "errors"} for row in result["killed"]]
    return "\n".join([*lines, *map(json.dumps, killed)])


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, choices=PAIRS)
    parser.add_argument("--rows", type=int, default=55_000)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--hidden", type=int, nargs="+", default=(500, 200))
    parser.add_argument("--worker", choices=PAIRS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    sizes = (arguments.rows, arguments.batch_size, tuple(arguments.hidden))
    if arguments.worker is not None:
        train(arguments.worker, *sizes, arguments.out)
        return
    rows = []
    for name in arguments.pairs:
        rows.append(compare(name, arguments.processes, *sizes))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    killed = []
    for victim in range(arguments.processes):
        with tempfile.TemporaryDirectory() as folder:
            killed.append(kill_a_worker(Path(folder), arguments.processes, victim))
    result = {"rows": rows, "killed": killed}
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
