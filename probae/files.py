"""Files that are never half written, and the strict reading of files that may be damaged."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 10.0  # seconds that a folder in use is waited for
MOST_JSON = 2**28  # bytes: a record of a run names the rows of its splits
SEAL = "sha256"  # key of the checksum in a record that carries one


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[io.BufferedWriter]:
    """Write beside ``file`` and move, so that it is never half there, not even after a crash."""
    part = part_of(file)
    try:
        with fresh(part) as stream:
            yield stream
        move(part, file)
    finally:
        part.unlink(missing_ok=True)


def part_of(file: Path) -> Path:
    """Return the name of a file while it is being written."""
    return file.with_name(f"{file.name}.part")


@contextlib.contextmanager
def fresh(file: Path) -> Iterator[io.BufferedWriter]:
    """Open a file that was not there, and see to it that its content is on the disk at the end.

    A link of that name is removed, not followed.
    """
    file.unlink(missing_ok=True)
    with file.open("xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def move(part: Path, file: Path) -> None:
    """Rename a file, and see to it that the folder knows."""
    os.replace(part, file)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def held(folder: Path, argument: str, patience: float | None = None) -> Iterator[None]:
    """Keep a folder, made if need be, for this process; it is free again when the process ends.

    Workers outlive a killed process by some seconds, in which they hold its folder; so a little
    patience comes before the ValueError. Where a system knows no such locks, nothing is held.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + (PATIENCE if patience is None else patience)
        while not _locked(opened):
            if time.monotonic() > until:
                raise ValueError(
                    f"{argument}: another process is at work in {folder}; let it end, or take "
                    "another folder"
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(opened)
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _locked(opened: int) -> bool:
    """Whether this process now has the lock of an open folder; some file systems have none."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(file) as stream:
        stream.write(content)


def digest(content: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_json(file: Path, most: int = MOST_JSON) -> Any:
    """Read strict JSON of at most so many bytes, or raise a ValueError that names the file.

    NaN, infinities, numbers that are too large for a float, and keys that come twice are refused.
    """
    size = file.stat().st_size
    if size > most:
        raise ValueError(f"{file} must have at most {most} bytes, got {size}; it is not probae's")
    try:
        return json.loads(
            file.read_bytes().decode("utf-8"),
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_distinct,
        )
    except (ValueError, RecursionError) as error:  # of UTF-8, of JSON, of its depth
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _distinct(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) < len(items):
        raise ValueError("a key comes twice in an object")
    return record


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum, for which white space does not count."""
    record = {key: value for key, value in record.items() if key != SEAL}
    return {**record, SEAL: _checksum(record)}


def require_seal(record: dict[str, Any], file: Path) -> None:
    """Raise a ValueError unless the record is as it was sealed."""
    found = {key: value for key, value in record.items() if key != SEAL}
    if record.get(SEAL) != _checksum(found):
        raise ValueError(
            f"{file} is damaged: its checksum does not fit what it holds; take it from a copy, or "
            "make it again"
        )


def _checksum(record: dict[str, Any]) -> str:
    return digest(json.dumps(record, separators=(",", ":")).encode())


def parse_tensors(content: bytes, file: Path) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file, or raise a ValueError naming it."""
    try:
        return safetensors.torch.load(content)
    except (
        safetensors.SafetensorError,
        KeyError,  # a dtype that torch has no name for
        ValueError,
        TypeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file, or raise a ValueError."""
    content = file.read_bytes()
    tensors = parse_tensors(content, file)
    length = int.from_bytes(content[:8], "little")  # within the file, as it was parsed
    return tensors, json.loads(content[8 : 8 + length]).get("__metadata__", {})
