"""Saving and loading a pair: a JSON recipe and safetensors, never pickle.

What is read may be damaged or hostile. Both files carry a checksum. Of a recipe, only classes of
probae are built, from values of the kinds that their signatures name, and with no more memory and
work than the tensors in the file make plausible; then the pair is compared with them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import (
    adversarial_presets,
    corruptions,
    decoders,
    discriminators,
    encoders,
    factors,
    hashing,
    networks,
    presets,
    priors,
    sparse_coding,
    sparse_encoders,
)
from .autoencoder import Autoencoder
from .checks import require_pair
from .files import digest, fresh, move, parse_tensors, part_of, read_json, require_seal, sealed
from .part import Part

FORMAT, UNSEALED = "probae/2", "probae/1"  # the earlier one has no checksums
RECIPE, TENSORS = "pair.json", "pair.safetensors"
KEYS = ("format", "pair", "dtype", "kind", "x_shape", "z_shape")
DTYPES = {str(t)[6:]: t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}

MOST_RECIPE = 2**22  # bytes of pair.json
MOST_NUMBERS = 2**28  # that building a pair may ask for at once, beside 16 for each in the file
MOST_OPERATIONS = 10**6  # of torch, that building a pair may take

CLASSES: dict[str, type[Part]] = {
    cls.__name__: cls
    for module in (
        adversarial_presets,
        corruptions,
        decoders,
        discriminators,
        encoders,
        factors,
        hashing,
        networks,
        presets,
        priors,
        sparse_coding,
        sparse_encoders,
    )
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Part) and cls is not Part
}


def save(pair: Autoencoder, path: str | os.PathLike[str]) -> Path:
    """Write a pair to the folder ``path``: ``pair.json`` and ``pair.safetensors``.

    Both files are written beside their place and then moved, so a folder never holds half a file.
    A pair with parts of your own, or with parts that were replaced or given other settings after
    they were built, is saved too; :func:`load` then needs a pair to load into.

    Args:
        pair: the pair.
        path: folder, made if it is not there; a pair in it is replaced.

    Returns:
        Path: the folder.

    Raises:
        ValueError: ``path`` is a file.

    Example:
        >>> import tempfile, probae
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pair = probae.load(probae.save(probae.VAE(8, 2), folder))
        >>> type(pair).__name__
        'VAE'
    """
    require_pair(pair)
    folder = _folder(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, got the file {folder}")
    recipe = {
        "format": FORMAT,
        "pair": _recipe(pair),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "kind": pair.kind.value,
        "x_shape": pair.x_shape,
        "z_shape": pair.z_shape,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors, text = part_of(folder / TENSORS), part_of(folder / RECIPE)
    try:
        tensors.unlink(missing_ok=True)
        save_model(pair, str(tensors))
        content = tensors.read_bytes()
        with fresh(tensors) as stream:  # safetensors writes for the owner only, and does not wait
            stream.write(content)
        recipe = sealed({**_plain(recipe), "tensors": digest(content)})
        with fresh(text) as stream:
            stream.write((json.dumps(recipe, indent=2) + "\n").encode())
        move(tensors, folder / TENSORS)
    except BaseException:
        tensors.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
        raise
    # an end between the two leaves pair.json.part, with which `load` finds the new pair
    move(text, folder / RECIPE)
    return folder


def load(
    path: str | os.PathLike[str],
    pair: Autoencoder | None = None,
    device: str | torch.device | None = None,
) -> Autoencoder:
    """Read a pair from the folder ``path``.

    Only classes of probae are built, from plain values; nothing is unpickled or executed. Files
    that were changed since they were written are refused, by their checksums; so is a recipe that
    needs far more memory than its tensors.

    Args:
        path: folder that :func:`save` wrote.
        pair: a pair of the same structure and dtype to load the parameters into, for pairs with
            parts of your own; without it, the pair is rebuilt. A load that fails leaves it alone.
        device: where to put it; by default where ``pair`` is, and without one on the CPU.

    Raises:
        FileNotFoundError: no saved pair at ``path``.
        ValueError: a file is damaged or of another format; the parameters do not fit; or the pair
            has parts of your own and ``pair`` was not given.

    Example:
        >>> import tempfile, torch, probae
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = probae.save(probae.PPCA(8, 2), folder)
        ...     probae.load(path).kind.value
        'ELBO'
    """
    folder = _folder(path)
    for name in (RECIPE, TENSORS):
        if not os.path.isfile(folder / name):  # no error for a name that no file can have
            raise FileNotFoundError(f"path {folder} holds no saved pair: {name} is missing")
    if pair is not None:
        require_pair(pair)
    if device is None:
        device = "cpu" if pair is None else pair.device
    try:
        place = torch.empty((), device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {first}") from error
    if place.type == "meta":
        raise ValueError("device must hold data, got 'meta'; load to 'cpu' or 'cuda'")
    content = (folder / TENSORS).read_bytes()
    recipe = _read_recipe(folder, content)
    saved = parse_tensors(content, folder / TENSORS)
    if pair is None:
        if recipe["pair"] is None:
            raise ValueError(
                f"{folder} holds a pair with parts that are not probae's own, or that were changed "
                "after they were built; build the same pair and pass it: "
                "probae.load(path, pair=...)"
            )
        pair = _rebuild(recipe, folder / RECIPE, saved)
    _check_tensors(folder / TENSORS, pair, saved)
    pair.load_state_dict(saved, strict=False)  # of a shared tensor, one name is in the file
    return pair.to(place)


def _folder(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise ValueError(f"path must be that of a folder, got {path!r}")
    return Path(path).expanduser()


def _read_recipe(folder: Path, content: bytes) -> dict[str, Any]:
    """Return the recipe that goes with the content of the file of tensors."""
    file, after = folder / RECIPE, part_of(folder / RECIPE)
    recipe = _checked_recipe(file)
    if recipe["format"] == UNSEALED or recipe["tensors"] == digest(content):
        return recipe
    with contextlib.suppress(ValueError, OSError):  # a save that ended between its two moves
        recipe = _checked_recipe(after)
        if recipe.get("tensors") == digest(content):
            return recipe
    raise ValueError(
        f"{folder / TENSORS} is damaged: its checksum is not the one in {RECIPE}; take both from a "
        "copy, or save the pair again"
    )


def _checked_recipe(file: Path) -> dict[str, Any]:
    recipe = read_json(file, MOST_RECIPE)
    found = recipe.get("format") if isinstance(recipe, dict) else type(recipe).__name__
    if not isinstance(recipe, dict) or found not in (FORMAT, UNSEALED):
        raise ValueError(f"{file} must have format {FORMAT!r}, got {found!r}")
    keys = {*KEYS} if found == UNSEALED else {*KEYS, "tensors", "sha256"}
    if recipe.keys() != keys:
        odd = ", ".join(sorted(map(repr, recipe.keys() ^ keys)))
        raise ValueError(f"{file} is damaged: it must have just the keys of {found}, not so: {odd}")
    if found == FORMAT:
        require_seal(recipe, file)
    if not isinstance(recipe["dtype"], str) or recipe["dtype"] not in DTYPES:
        raise ValueError(f"{file}: dtype must be a floating dtype, got {recipe['dtype']!r}")
    return recipe


def _check_tensors(file: Path, pair: Autoencoder, saved: dict[str, Tensor]) -> None:
    """Compare names, shapes and dtypes before anything of the pair is overwritten."""
    wanted = pair.state_dict()
    for name in sorted({*saved, *wanted}):
        alias = name not in saved and any(_same(wanted[name], wanted.get(other)) for other in saved)
        if alias:  # of a shared tensor, one name is in the file
            continue
        found = [_describe_tensor(tensors.get(name)) for tensors in (wanted, saved)]
        if found[0] != found[1]:
            raise ValueError(
                f"{file} does not fit the pair: {name} must be {found[0]}, got {found[1]}; load it "
                "into a pair of the same structure and dtype"
            )


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.data_ptr() == other.data_ptr()


def _describe_tensor(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _rebuild(recipe: dict[str, Any], file: Path, saved: dict[str, Tensor]) -> Autoencoder:
    """Return the pair of a recipe, its parameters at their starting values."""
    numbers = sum(tensor.numel() for tensor in saved.values())
    try:
        with torch.random.fork_rng(devices=[]), _Bounded(MOST_NUMBERS + 16 * numbers):
            pair = _build(recipe["pair"], {})
            if not isinstance(pair, Autoencoder):
                raise ValueError(f"it must describe an Autoencoder, got {type(pair).__name__}")
            found = [pair.kind.value, list(pair.x_shape), list(pair.z_shape)]
    except Exception as error:  # whatever a constructor meets in settings that make no sense
        raise ValueError(f"{file} does not describe a pair: {error!r}") from error
    said = [recipe["kind"], recipe["x_shape"], recipe["z_shape"]]
    if found != said:
        raise ValueError(
            f"{file} is damaged: kind, x_shape and z_shape must be {found}, as its parts say, got "
            f"{said}"
        )
    return pair.to(DTYPES[recipe["dtype"]])


class _Bounded(TorchFunctionMode):
    """Refuses to build what takes too much memory or work, before it is allocated."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.numbers, self.operations = most, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch if its result is not too large."""
        kwargs = kwargs or {}
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            raise ValueError(f"it takes more than {MOST_OPERATIONS} operations to build")
        values = [*_leaves((args, tuple(kwargs.values())))]
        counts = [max(1, value.numel()) for value in values if isinstance(value, Tensor)]
        sizes = [value for value in values if isinstance(value, int)]
        # an upper bound: of no result from tensors and sizes are there more numbers than that
        asked = math.prod(counts) * math.prod(max(1, abs(size)) for size in sizes)
        if (asked if counts else self.numbers + asked**2) > self.most:
            self._require_room(func, args, kwargs, made_new=not counts)
        result = func(*args, **kwargs)
        if not counts and isinstance(result, Tensor):
            self.numbers += result.numel()
        return result

    def _require_room(self, func: Any, args: Any, kwargs: Any, made_new: bool) -> None:
        """Call the function on tensors that hold no data, and look at the size of its result."""
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        try:
            with torch.device("meta"):
                made = func(*_without_data(args), **_without_data(kwargs))
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError):
            return  # what looks at values gives no more results than there are
        numbers = self.numbers * made_new
        numbers += sum(tensor.numel() for tensor in _leaves(made) if isinstance(tensor, Tensor))
        if numbers > self.most:
            raise ValueError(f"it needs more than {self.most} numbers")


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value)
    else:
        yield values


def _without_data(values: Any) -> Any:
    """Return arguments with tensors of the same shapes and dtypes on the device "meta"."""
    if isinstance(values, dict):
        return {key: _without_data(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return (
            [*map(_without_data, values)]
            if type(values) is list
            else (*map(_without_data, values),)
        )
    return values.detach().to("meta") if isinstance(values, Tensor) else values


def _recipe(pair: Autoencoder) -> Any:
    """Return the nested recipe of a pair, or None where it cannot be rebuilt from one."""
    try:
        recipe = _describe(pair, {})
        with torch.random.fork_rng(devices=[]):
            twin = _build(_plain(recipe), {}).to(pair.dtype)
    except (_NotPlain, ValueError, TypeError, KeyError, RuntimeError):
        return None
    return recipe if _structure(twin) == _structure(pair) else None


class _NotPlain(Exception):
    """A value that JSON cannot hold, or a class that is not probae's own."""


def _describe(value: Any, seen: dict[int, int]) -> Any:
    """Return ``value`` as JSON; a part that came before is a reference, so sharing survives."""
    if isinstance(value, Part):
        if id(value) in seen:
            return {"ref": seen[id(value)]}
        name = type(value).__name__
        if CLASSES.get(name) is not type(value) or not hasattr(value, "_arguments"):
            raise _NotPlain
        arguments = {key: _describe(v, seen) for key, v in value._arguments.items()}
        seen[id(value)] = len(seen)
        return {"class": name, "arguments": arguments}
    if isinstance(value, dict):
        return {"dict": {str(key): _describe(v, seen) for key, v in value.items()}}
    if isinstance(value, list | tuple):
        return [_describe(v, seen) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotPlain
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _NotPlain


def _plain(recipe: Any) -> Any:
    """Return a recipe as it is once it was written and read."""
    return json.loads(json.dumps(recipe))


def _build(recipe: Any, built: dict[int, Any]) -> Any:
    """Undo :func:`_describe`, or raise an error on what it cannot have written."""
    if isinstance(recipe, list):
        return tuple(_build(item, built) for item in recipe)
    if not isinstance(recipe, dict):
        return recipe
    if recipe.keys() == {"ref"}:
        return built[recipe["ref"]]
    if recipe.keys() == {"dict"}:
        return {key: _build(item, built) for key, item in recipe["dict"].items()}
    if recipe.keys() != {"class", "arguments"}:
        raise ValueError(f"a part must have a class and arguments, got {sorted(recipe)}")
    name = recipe["class"]
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"unknown class {name!r}")
    cls = CLASSES[name]
    kinds = typing.get_type_hints(cls.__init__)
    arguments = {key: _build(item, built) for key, item in recipe["arguments"].items()}
    for key, value in arguments.items():
        if key not in inspect.signature(cls).parameters or key not in kinds:
            raise ValueError(f"{name} takes no argument {key!r}")
        if not _is_kind(value, kinds[key]):
            raise ValueError(f"{key} of {name} must be {kinds[key]}, got {value!r}")
    part = cls(**arguments)
    built[len(built)] = part
    return part


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says, of the kinds that constructors of parts use."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(_is_kind(value, option) for option in inner)
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if origin is not None and issubclass(origin, dict):
        return isinstance(value, dict)
    if origin is not None:  # a sequence
        return isinstance(value, tuple) and all(_is_kind(item, inner[0]) for item in value)
    return isinstance(value, kind)


def _structure(pair: nn.Module) -> list[tuple[Any, ...]]:
    """Everything about a pair that its tensors do not say: parts, their settings, names, shapes."""
    modules = [(name, type(m), _settings(m)) for name, m in pair.named_modules()]
    tensors = [(name, t.shape, t.dtype) for name, t in pair.state_dict().items()]
    return [*modules, *tensors]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes, such as a rate that was changed after construction."""
    plain = bool | int | float | str | tuple
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and name != "training"
    }
