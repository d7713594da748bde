"""Checkpoints of training: one safetensors file that is whole, of this very run, or refused.

What is no tensor stands as JSON in the file's metadata, so that one rename makes the whole of it.
A checksum covers every byte. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .files import write_bytes
from .part import Part

FORMAT = "probae-checkpoint/1"
FILE = "checkpoint.safetensors"
LARGE = 2**28  # bytes of data above which their fingerprint is of some rows only
ROWS = 1024  # of such data
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

State = dict[str, Any]  # nested plain values and tensors


def place(folder: str | os.PathLike[str]) -> Path:
    """Return where the checkpoint of a folder lies, or raise a ValueError where none can."""
    if not isinstance(folder, str | os.PathLike) or "\0" in os.fspath(folder):
        raise ValueError(f"checkpoint must be a folder, got {type(folder).__name__} {folder!r}")
    path = Path(folder).expanduser()
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"checkpoint must be a folder, got the file or broken link {path}")
    if (path / FILE).is_dir():
        raise ValueError(f"checkpoint must be a folder for a file {FILE}, which is a folder there")
    return path / FILE


def write(file: Path, state: State) -> None:
    """Write a checkpoint; until that is done, an earlier one stays as it was."""
    content = to_bytes(state)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)


def read(file: Path) -> State:
    """Return the state in a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or of another format.
    """
    return from_bytes(file.read_bytes(), str(file))


def to_bytes(state: State) -> bytes:
    """Return a state as the content of a checkpoint."""
    encoder = _Encoder()
    text = json.dumps(encoder.encode(state, "checkpoint"), allow_nan=False)
    metadata = {"format": FORMAT, "sha256": _NO_DIGEST, "state": text}
    content = bytearray(save_tensors(encoder.tensors, metadata))
    found = _DIGEST.search(content, 8, 8 + _header_size(content))
    assert found is not None
    # of all bytes, with zeros in its own place
    content[slice(*found.span(1))] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)


def from_bytes(content: bytes, name: str) -> State:
    """Undo :func:`to_bytes`; ``name`` is what errors call the content."""
    damaged = f"{name} is no whole checkpoint of {FORMAT}"
    fix = "remove it, to begin anew, or put a copy in its place"
    if len(content) < 8 or _header_size(content) > len(content) - 8:
        raise ValueError(f"{damaged}: its end is missing; {fix}")
    header = content[8 : 8 + _header_size(content)]
    found = _DIGEST.search(header)
    if found is None:
        raise ValueError(f"{damaged}: it has no checksum; {fix}")
    start, end = (8 + at for at in found.span(1))
    digest = hashlib.sha256(memoryview(content)[:start])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(content)[end:])
    if digest.hexdigest().encode() != found[1]:
        raise ValueError(f"{damaged}: its bytes do not fit its checksum; {fix}")
    try:
        metadata = json.loads(header)["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}")
        state = _decode(json.loads(metadata["state"]), load_tensors(content))
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (
        safetensors.SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{damaged}: {type(error).__name__}: {error}; {fix}") from error
    return state


class _Encoder:
    """Turns nested plain values and tensors into JSON and a dict of tensors, or says what it met.

    A tensor that occurs twice is stored once.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.keys: dict[tuple[Any, ...], str] = {}
        self.storages: set[int] = set()
        self.kept: list[Tensor] = []  # so that no address is used again meanwhile

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, Tensor):
            return {"tensor": self._key(value, path)}
        if type(value) in (dict, OrderedDict):
            items = [
                [self.encode(k, f"{path} key"), self.encode(v, f"{path}[{k!r}]")]
                for k, v in value.items()
            ]
            return {"dict": items}
        if type(value) is Counter:  # as torch's MultiStepLR keeps its milestones
            return {"counter": self.encode(dict(value), path)}
        if type(value) in (list, tuple):
            items = [self.encode(v, f"{path}[{i}]") for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if type(value) is float and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ValueError(
            f"checkpoint cannot hold {path}, {type(value).__name__}: only numbers, strings, None, "
            "tensors, and lists, tuples and dicts of these; train without checkpoint, or with "
            "another optimizer or schedule"
        )

    def _key(self, tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"checkpoint cannot hold {path}, a tensor that is not dense")
        address = (
            tensor.device,
            tensor.data_ptr() if tensor.numel() else 0,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        if address not in self.keys:
            self.kept.append(tensor)
            self.keys[address] = key = str(len(self.keys))
            copy = tensor.detach().cpu().contiguous()
            storage = copy.untyped_storage()
            # the format takes no two tensors on one piece of memory
            if storage.data_ptr() in self.storages or storage.nbytes() > copy.nbytes:
                copy = copy.clone()
            self.storages.add(copy.untyped_storage().data_ptr())
            self.tensors[key] = copy
        return self.keys[address]


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :meth:`_Encoder.encode`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind == "counter":
        return Counter(_decode(content, tensors))
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "float":
        return _NUMBERS[content]
    raise ValueError(f"unknown kind of value {kind!r}")


def _header_size(content: bytes | bytearray) -> int:
    return int.from_bytes(content[:8], "little")


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of all random streams that training may draw from, as tensors."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    _, words, gauss = random.getstate()
    states["python"] = torch.tensor(words, dtype=torch.int64)  # (625,)
    states["python_gauss"] = torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64)
    name, keys, position, has_gauss, number = np.random.get_state()  # noqa: NPY002 (that of others)
    if name == "MT19937":
        whole = [*np.asarray(keys).tolist(), position, has_gauss]
        states["numpy"] = torch.tensor(whole, dtype=torch.int64)  # (626,)
        states["numpy_gauss"] = torch.tensor(number, dtype=torch.float64)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    gauss = float(states["python_gauss"])
    words = tuple(states["python"].tolist())
    random.setstate((3, words, None if math.isnan(gauss) else gauss))
    if "numpy" in states:
        *keys, position, has_gauss = states["numpy"].tolist()
        if not 0 <= position <= len(keys):  # which NumPy takes as it is
            raise TypeError(f"the position in NumPy's stream is {position}")
        whole = ("MT19937", np.array(keys, np.uint32), position, has_gauss)
        np.random.set_state((*whole, float(states["numpy_gauss"])))  # noqa: NPY002


def structure(pair: nn.Module) -> dict[str, str]:
    """Return what a pair is beside the values of its tensors: name of a part or tensor -> form."""
    modules = pair.named_modules()
    lines = {name or "pair": f"{type(m).__name__}{_settings(m)}" for name, m in modules}
    for name, tensor in pair.state_dict().items():
        lines[name] = f"{tuple(tensor.shape)} {tensor.dtype}"
    for name, parameter in pair.named_parameters():
        lines[name] += "" if parameter.requires_grad else ", fixed"
    return lines


def _settings(module: nn.Module) -> str:
    """Plain attributes of our own parts; those of others may change while they are trained."""
    if not isinstance(module, Part) or type(module).__module__.split(".")[0] != "probae":
        return ""
    values = plain_attributes(module, without=("training",))
    return f"({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def plain_attributes(value: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the public attributes that are numbers, strings, None, or tuples of these."""
    plain = bool | int | float | str | None | tuple
    return {
        name: item
        for name, item in sorted(vars(value).items())
        if isinstance(item, plain) and not name.startswith("_") and name not in without
    }


def fingerprint(x: Tensor) -> str:
    """Return a hash of data, of all rows, or of some where they are large."""
    if x.numel() * x.element_size() > LARGE:
        x = x[torch.linspace(0, len(x) - 1, ROWS, dtype=torch.float64).long()]
    content = x.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


def require_same(file: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what differs between the run of a checkpoint and this one."""
    differences = []
    for name in sorted({*saved, *now}):
        before, after = saved.get(name), now.get(name)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            inner = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
            key = inner[0]
            more = f" and {len(inner) - 1} more" if len(inner) > 1 else ""
            text = f"{name} ({key} was {before.get(key)}, is {after.get(key)}{more})"
        else:
            text = f"{name} (was {before}, is {after})"
        differences.append(text)
    if differences:
        raise ValueError(
            f"resume: {file} is of another run, as these differ: {'; '.join(differences)}; pass "
            "the same, or take another folder as checkpoint"
        )
