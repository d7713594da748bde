"""Folders of runs: the data a run was made of, its record, files that are never half written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import __version__
from .annealing import Annealing
from .autoencoder import Autoencoder, seeded
from .checks import likelihood_of
from .datasets import DATASET_NAMES, Splits, as_tensor, binarize, dequantize, load_dataset
from .distributed import shared_log_likelihood, world_size
from .distributions import GreyBernoulli, has_component
from .files import SEAL, move, read_json, replacing, require_seal, sealed, write_bytes
from .likelihood import LikelihoodWarning, LogLikelihood, log_likelihood
from .saving import RECIPE, TENSORS, load

RUN_FORMAT, DEMO_FORMAT = "probae-run/2", "probae-demo/2"
UNSEALED = ("probae-run/1", "probae-demo/1")  # the earlier ones have no checksum
RUN_FILE, DEMO_FILE = "run.json", "demo.json"
HISTORY, EVALUATION = "history.json", "evaluation.json"
LOSS, RECONSTRUCTIONS, SAMPLES = "loss.png", "reconstructions.png", "samples.png"
PICTURES = (LOSS, RECONSTRUCTIONS, SAMPLES)
FILES = (RUN_FILE, DEMO_FILE, RECIPE, TENSORS, HISTORY, EVALUATION, *PICTURES)

# of an evaluation that an earlier version wrote, without a checksum
UNSEALED_KEYS = {"method", "num_samples", "data", "split", "limit", "seed", "temperatures"} | {
    *("start", "num_data", "nats_per_datum", "std_error", "is_bound", "bits_per_dim"),
    *("khat_above_0.7", "note", "version"),
}

Record = dict[str, Any]  # what run.json holds


def _is_source(value: Any) -> bool:
    """Whether a value names the data of a run: a data set, or a file that is known again."""
    if not isinstance(value, dict):
        return False
    if "name" in value:
        return value["name"] in DATASET_NAMES
    return isinstance(value.get("path"), str) and isinstance(value.get("sha256"), str)


def _is_interval(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(type(bound) in (int, float) for bound in value)


# what is read of a run, and what it can be
KINDS: dict[str, Callable[[Any], bool]] = {
    "title": lambda value: isinstance(value, str),
    "data": _is_source,
    "dequantize": lambda value: value is None or (type(value) is int and value >= 2),
    "limits": _is_interval,
}


class Data(NamedTuple):
    """Data of a run: the three splits, and how to get them again."""

    title: str
    splits: Splits
    levels: int | None  # grey levels, where they are known
    source: Record


def load_data(name: str, seed: int) -> Data:
    """Return a data set, or a file cut into 80 % training, 10 % validation, 10 % test data."""
    if name in DATASET_NAMES:
        data = load_dataset(name)
        splits = Splits(data.train, data.val, data.test)
        return Data(name, splits, data.levels, {"name": name, "sizes": [len(x) for x in splits]})
    x = read_file(name)
    held_out = len(x) // 10
    if held_out < 1:
        raise ValueError(f"--data {name} must hold at least 10 data, to split, got {len(x)}")
    with seeded(seed, {torch.device("cpu")}):
        order = torch.randperm(len(x)).tolist()
    source = {
        "path": str(Path(name).resolve()),
        "sha256": digest(x),
        "sizes": [len(x) - 2 * held_out, held_out, held_out],
        "split_seed": seed,
        "val": order[:held_out],
        "test": order[held_out : 2 * held_out],
    }
    return Data(Path(name).name, cut(x, source), None, source)


def cut(x: Tensor, source: Record) -> Splits:
    """Split the rows of a file as it was done when the run was fitted."""
    held_out = []
    for split in ("val", "test"):
        rows = source.get(split)
        if not isinstance(rows, list) or not all(type(row) is int for row in rows):
            raise ValueError(f"data.{split} of the run must be a list of numbers of rows")
        held_out += rows
    if len({*held_out}) < len(held_out) or not all(0 <= row < len(x) for row in held_out):
        raise ValueError(f"data.val and data.test of the run must be distinct rows of {len(x)}")
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[held_out] = False
    return Splits(x[rest], x[source["val"]], x[source["test"]])


def read_file(name: str) -> Tensor:
    """Return the array (N, ...) in a .npy or .npz file."""
    if Path(name).suffix.lower() not in (".npy", ".npz"):
        raise ValueError(
            f"--data must be one of {', '.join(DATASET_NAMES)}, or a .npy or .npz file, got "
            f"{name!r}"
        )
    x = as_tensor(name, "--data")
    if x.dim() < 2:
        raise ValueError(
            f"--data must hold an array (N, ...) of N data, got shape {tuple(x.shape)}; reshape "
            "numbers to (N, 1)"
        )
    return x


def digest(x: Tensor) -> str:
    """Return a hash of the values, by which a moved file is known again."""
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def training_data(splits: Splits, levels: int | None, seed: int) -> Splits:
    """Return the splits, the first two dequantised; each with noise of its own."""
    if levels is None:
        return splits
    train, val = (
        dequantize(x, levels, seed=seed + i)
        for i, x in enumerate((splits.train, splits.val), start=1)
    )
    return Splits(train, val, splits.test)


def is_grey(x: Tensor) -> bool:
    """Whether x lies in [0, 1], but not only on 0 and 1."""
    return bool(x.min() >= 0 and x.max() <= 1 and not ((x == 0) | (x == 1)).all())


def as_measured(
    pair: Autoencoder, record: Record, x: Tensor, levels: int | None, seed: int
) -> tuple[Tensor, str]:
    """Return data in the form that the pair has a likelihood of, and what was done to them."""
    pair.check_input(x)
    if record["dequantize"]:
        note = f"grey levels were dequantised once, (k + u) / {record['dequantize']}, seed {seed}"
        return dequantize(x, record["dequantize"], seed=seed), note
    likelihood = likelihood_of(pair)
    if has_component(likelihood, GreyBernoulli):
        if not is_grey(x):
            return x, ""
        return binarize(x, seed=seed), f"grey pixels were binarised once, seed {seed}"
    if levels is None or likelihood.support.is_discrete:
        return x, ""
    return x, (
        f"this is a density at {levels} grey levels, which can grow without limit; a model fitted "
        "with --dequantize bounds their probability"
    )


def measure(
    pair: Autoencoder,
    record: Record,
    x: Tensor,
    levels: int | None,
    method: str,
    num_samples: int | None,
    seed: int,
    annealing: Annealing | None = None,
) -> tuple[LogLikelihood, str]:
    """Return the log-likelihood of data in the form the pair was trained on, and what to note."""
    if method == "exact" and num_samples is not None:
        raise ValueError("--num-samples goes with --method elbo, iwae and ais, not exact")
    x, note = as_measured(pair, record, x, levels, seed)
    estimate = shared_log_likelihood if world_size() > 1 else log_likelihood
    progress = sys.stderr.isatty() and world_size() == 1
    with warnings.catch_warnings():  # the report says it
        warnings.simplefilter("ignore", LikelihoodWarning)
        ll = estimate(
            pair, x, method, num_samples, annealing=annealing, seed=seed, progress=progress
        )
    return ll, note


def untrusted(ll: LogLikelihood) -> float | None:
    """Share of the data with Pareto k > 0.7; None where too few samples leave k undefined."""
    if ll.khat is None or ll.khat.isnan().any():
        return None
    return float((ll.khat > 0.7).double().mean())


def append_evaluation(run: Path, key: Record, ll: LogLikelihood, note: str) -> None:
    """Add a record to evaluation.json; the same evaluation made again replaces the earlier one."""
    file = run / EVALUATION
    earlier = read_json(file) if file.exists() else []
    if not isinstance(earlier, list) or not all(isinstance(entry, dict) for entry in earlier):
        raise ValueError(f"{file} must hold a list of evaluations; move it out of the way")
    for entry in earlier:
        version = re.fullmatch(r"\d+(\.\d+)+", str(entry.get("version", "0.0")))
        if SEAL in entry or not version or not entry.keys() <= UNSEALED_KEYS:
            require_seal(entry, file)
    key = {"method": ll.method, "num_samples": ll.num_samples, **key}
    entry = {
        **key,
        "num_data": len(ll.values),
        "nats_per_datum": ll.mean,
        "std_error": None if math.isnan(ll.mean_std_error) else ll.mean_std_error,
        "is_bound": ll.is_bound,
        "bits_per_dim": ll.bits_per_dim,
        "khat_above_0.7": untrusted(ll),
        "note": note,
        "version": __version__,
    }
    others = [e for e in earlier if any(e.get(name) != value for name, value in key.items())]
    write_json(file, [*others, sealed(_plain(entry))])


def load_run(folder: Path, device: str) -> tuple[Autoencoder, Record]:
    """Return the pair and the record of a run, or say why the folder holds none."""
    file = folder / RUN_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run: {RUN_FILE} is missing; make one with probae fit"
        )
    record = read_json(file)
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if not isinstance(record, dict) or found not in (RUN_FORMAT, UNSEALED[0]):
        raise ValueError(f"{file} must have format {RUN_FORMAT!r}, got {found!r}")
    missing = [name for name in KINDS if name not in record]
    if missing:
        raise ValueError(f"{file} is damaged: {', '.join(missing)} is missing; fit the run again")
    if found == RUN_FORMAT:
        require_seal(record, file)
    elif SEAL in record:
        raise ValueError(f"{file} is damaged: format {found!r} has no checksum")
    for name, is_kind in KINDS.items():
        if not is_kind(record[name]):
            raise ValueError(
                f"{file} is damaged: {name} cannot be {str(record[name])[:100]}; fit the run again"
            )
    return load(folder, device=str(as_device(device))), record


def as_device(name: str) -> torch.device:
    """Return the device of that name, or raise a ValueError where it cannot be used."""
    try:
        return torch.empty((), device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used here: {first}") from error


@contextlib.contextmanager
def staged(out: Path, marker: str, form: str, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside ``out`` whose files are moved there once the block has succeeded."""
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {out}")
    if out.is_dir() and any(out.iterdir()):
        # what a run left that was killed while its files were moved, the marker last
        names = {path.name for path in out.iterdir()}
        partial = overwrite and marker not in names and names <= {*FILES}
        if not partial and not _has_format(out / marker, form):
            raise ValueError(f"--out {out} is not empty and holds no earlier run; take another")
        if not overwrite:
            raise ValueError(
                f"--out {out} holds an earlier run; pass --overwrite to replace it, or take another"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        stage = Path(name)
        yield stage
        for folder in (stage, *(path for path in stage.rglob("*") if path.is_dir())):
            place = out / folder.relative_to(stage)
            place.mkdir(exist_ok=True)
            for file in FILES:
                (place / file).unlink(missing_ok=True)
        files = [path for path in stage.rglob("*") if path.is_file()]
        # the marker comes last: a folder that has it is whole
        for path in sorted(files, key=lambda path: path.name == marker):
            move(path, out / path.relative_to(stage))


def _has_format(file: Path, form: str) -> bool:
    """Whether a file is a record of that format, or of the version before."""
    try:
        record = read_json(file)
    except (OSError, ValueError):
        return False
    found = record.get("format") if isinstance(record, dict) else None
    return found == form or (found in UNSEALED and found.split("/")[0] == form.split("/")[0])


def _finite(value: Any) -> Any:
    """Replace numbers that JSON has no word for, NaN and the infinities, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it, and as it is read again."""
    return json.loads(json.dumps(_finite(value), allow_nan=False))


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all; a record that names its format gets a checksum."""
    value = _plain(value)
    if isinstance(value, dict) and "format" in value:
        value = sealed(value)
    write_bytes(file, (json.dumps(value, indent=2) + "\n").encode())


def write_figure(file: Path, figure: Figure) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(file) as stream:
        figure.savefig(stream, format="png")


def write_array(file: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    with replacing(file) as stream:
        np.save(stream, array)


def say(text: str) -> None:
    """Print a line now, as what follows may take a while."""
    print(text, flush=True)
