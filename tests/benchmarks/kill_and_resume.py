"""Trainings that are killed with SIGKILL at random moments, resumed, and compared bit by bit.

Each training is a process of its own. A chain kills it, resumes it, kills it again and so on until
one resume reaches the end, and then compares weights and history with those of a training that was
never stopped. Checkpoints are written after every few steps, so that a good part of the kills falls
into their writing; a kill counts as such where the unfinished file was there.

    python -m tests.benchmarks.kill_and_resume --kills 50 --out kills.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import probae
from probae import checkpoints

CHECKPOINT_SECONDS = 0.01
LIFE = 0.5  # of the time of a whole training, at most, that one lives


class Augmented(Dataset[Tensor]):
    """Digits with noise from the random streams of torch, NumPy and Python."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        image = torch.roll(self.x[i], int(torch.randint(-1, 2, ())), -1)
        image = image * (0.8 + 0.2 * np.random.rand())  # noqa: NPY002
        return (image + 0.05 * random.random()).clamp(0, 1)


class Normed(nn.Module):
    """A network with batch norm and dropout."""

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(-3), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)
        )
        self.output = nn.Linear(32, 2 * z_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x)).unflatten(-1, (2, -1))


def vae() -> tuple[Any, dict[str, Any]]:
    """Binarised anew at every presentation, cosine schedule, validated."""
    data = probae.load_dataset("digits")
    options = {"val": data.val, "binarize": True, "schedule": "cosine", "patience": 50}
    return probae.VAE(data.shape, 4, hidden=(32,)), {"x": data.train, "epochs": 30, **options}


def dropout() -> tuple[Any, dict[str, Any]]:
    """Dropout and batch norm, with a KL warm-up, clipping and AdamW."""
    data = probae.load_dataset("digits")
    pair = probae.Autoencoder(
        probae.StandardNormalPrior(4),
        probae.GaussianEncoder(Normed(4)),
        probae.BernoulliDecoder(probae.MLP(4, data.shape, (32,))),
    )
    objective = probae.ELBO(probae.LinearWarmup(5.5))
    options = {"objective": objective, "clip_norm": 5.0, "optimizer": torch.optim.AdamW}
    return pair, {"x": data.train, "epochs": 30, **options}


def denoising() -> tuple[Any, dict[str, Any]]:
    """A corruption, and early stopping that comes true."""
    data = probae.load_dataset("digits")
    pair = probae.DenoisingVAE(data.shape, 4, hidden=(32,), corruption=probae.SaltAndPepper(0.2))
    few = data.train[:256]
    options = {"val": data.val, "patience": 3, "lr": 0.02, "batch_size": 16}
    return pair, {"x": few, "epochs": 500, **options}


def augmented() -> tuple[Any, dict[str, Any]]:
    """A map-style Dataset with random augmentation."""
    data = probae.load_dataset("digits")
    pair = probae.VAE(data.shape, 4, hidden=(32,), likelihood="gaussian")
    return pair, {"x": Augmented(data.train[:600]), "epochs": 30, "batch_size": 50}


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    function.__name__: function for function in (vae, dropout, denoising, augmented)
}


def train(case: str, folder: Path | None, out: Path) -> None:
    """Train to the end, by way of checkpoints in a folder, and write what came of it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    pair, options = CASES[case]()
    x, val = options.pop("x"), options.pop("val", None)
    if folder is not None:
        options |= {"checkpoint": folder, "checkpoint_seconds": CHECKPOINT_SECONDS, "resume": True}
    run = probae.fit(pair, x, val, progress=False, **options)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in pair.state_dict().items()}
    result = {
        "weights": {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()},
        "history": {name: v for name, v in run.history.items() if name != "seconds"},
        "best_epoch": run.best_epoch,
        "stopped_early": run.stopped_early,
    }
    out.write_text(json.dumps(result), encoding="utf-8")


def start(case: str, folder: Path | None, out: Path) -> int:
    """Start a training as a process; return its number. This process must not train itself."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(case, folder, out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended(child: int, seconds: float) -> int | None:
    """Return the exit status of a process, or None if it lives on after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def run_case(case: str, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kill trainings so many times, and compare how each chain of them ends."""
    generator = random.Random(seed)
    probae.load_dataset("digits")  # so that modules which are imported late are there
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    begun = time.monotonic()
    reference = folder / "reference.json"
    status = ended(start(case, None, reference), 600)
    assert status == 0, f"the training itself ended with {status}"
    whole = time.monotonic() - begun
    expected = json.loads(reference.read_text(encoding="utf-8"))
    result: dict[str, Any] = {
        "case": case,
        "kills": 0,
        "while_writing": 0,
        "before_the_first_checkpoint": 0,
        "chains": 0,
        "failed_resumes": 0,
        "identical": True,
        "epochs": len(expected["history"]["loss"]),
        "stopped_early": expected["stopped_early"],
    }
    while result["kills"] < kills:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            place, out = Path(name) / "checkpoint", Path(name) / "end.json"
            while True:
                child = start(case, place, out)
                last = result["kills"] >= kills
                status = ended(child, 600 if last else generator.uniform(0, LIFE * whole))
                if status is None:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    result["kills"] += 1
                    result["while_writing"] += (place / f"{checkpoints.FILE}.part").exists()
                    result["before_the_first_checkpoint"] += not (place / checkpoints.FILE).exists()
                    continue
                result["failed_resumes"] += status != 0
                break
            result["chains"] += 1
            same = status == 0 and json.loads(out.read_text(encoding="utf-8")) == expected
            result["identical"] = result["identical"] and same
    result["seconds"] = time.monotonic() - begun
    return result


def run(kills: int = 50, cases: tuple[str, ...] = tuple(CASES), seed: int = 0) -> dict[str, Any]:
    """Run all cases, each with its part of the kills."""
    rows = []
    for i, case in enumerate(cases):
        part = kills // len(cases) + (i < kills % len(cases))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_case(case, part, Path(folder), seed + i))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "rows": rows,
        "kills": sum(row["kills"] for row in rows),
        "while_writing": sum(row["while_writing"] for row in rows),
        "failed_resumes": sum(row["failed_resumes"] for row in rows),
        "identical": all(row["identical"] for row in rows),
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        "| training | kills | of these before the first checkpoint | while one was written "
        "| resumes that failed | trainings ended | bit-identical |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['case']} | {row['kills']} | {row['before_the_first_checkpoint']} "
            f"| {row['while_writing']} | {row['failed_resumes']} | {row['chains']} "
            f" | {'all' if row['identical'] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run(arguments.kills, tuple(arguments.cases), arguments.seed)
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()


if __name__ == "__main__":
    main()
