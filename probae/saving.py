"""Saving and loading a pair: a JSON recipe and safetensors, never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from . import (
    corruptions,
    decoders,
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
from .part import Part

FORMAT = "probae/1"
RECIPE, TENSORS = "pair.json", "pair.safetensors"

CLASSES: dict[str, type[Part]] = {
    cls.__name__: cls
    for module in (
        corruptions,
        decoders,
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
    folder = Path(path).expanduser()
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
    tensors, text = folder / (TENSORS + ".part"), folder / (RECIPE + ".part")
    try:
        save_model(pair, str(tensors))
        text.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        tensors.chmod(text.stat().st_mode)  # safetensors writes for the owner only
        os.replace(tensors, folder / TENSORS)
        os.replace(text, folder / RECIPE)
    finally:
        tensors.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
    return folder


def load(
    path: str | os.PathLike[str],
    pair: Autoencoder | None = None,
    device: str | torch.device = "cpu",
) -> Autoencoder:
    """Read a pair from the folder ``path``.

    Only classes of probae are built, from plain values; nothing is unpickled or executed.

    Args:
        path: folder that :func:`save` wrote.
        pair: a pair of the same structure and dtype to load the parameters into, for pairs with
            parts of your own; without it, the pair is rebuilt. A load that fails leaves it alone.
        device: where to put it.

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
    folder = Path(path).expanduser()
    for name in (RECIPE, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"path {folder} holds no saved pair: {name} is missing")
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / RECIPE} is not valid JSON: {error}") from error
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        found = recipe.get("format") if isinstance(recipe, dict) else type(recipe).__name__
        raise ValueError(f"{folder / RECIPE} must have format {FORMAT!r}, got {found!r}")
    if pair is None:
        if recipe.get("pair") is None:
            raise ValueError(
                f"{folder} holds a pair with parts that are not probae's own, or that were changed "
                "after they were built; build the same pair and pass it: "
                "probae.load(path, pair=...)"
            )
        pair = _rebuild(recipe, folder / RECIPE)
    require_pair(pair)
    try:
        place = torch.empty((), device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {first}") from error
    if place.type == "meta":
        raise ValueError("device must hold data, got 'meta'; load to 'cpu' or 'cuda'")
    _check_tensors(folder / TENSORS, pair)
    load_model(pair, str(folder / TENSORS), strict=True)
    return pair.to(place)


def _check_tensors(file: Path, pair: Autoencoder) -> None:
    """Compare names, shapes and dtypes before anything of the pair is overwritten."""
    try:
        saved = load_file(str(file))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
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


def _rebuild(recipe: dict[str, Any], file: Path) -> Autoencoder:
    dtype = getattr(torch, str(recipe.get("dtype")), None)
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{file}: dtype must be a floating dtype, got {recipe.get('dtype')!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            pair = _build(recipe["pair"], {})
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} does not describe a pair: {error!r}") from error
    if not isinstance(pair, Autoencoder):
        raise ValueError(f"{file} must describe an Autoencoder, got {type(pair).__name__}")
    return pair.to(dtype)


def _recipe(pair: Autoencoder) -> Any:
    """Return the nested recipe of a pair, or None where it cannot be rebuilt from one."""
    try:
        recipe = _describe(pair, {})
        with torch.random.fork_rng(devices=[]):
            twin = _build(json.loads(json.dumps(recipe)), {}).to(pair.dtype)
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
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _NotPlain


def _build(recipe: Any, built: dict[int, Any]) -> Any:
    """Undo :func:`_describe`."""
    if isinstance(recipe, list):
        return tuple(_build(item, built) for item in recipe)
    if not isinstance(recipe, dict):
        return recipe
    if "ref" in recipe:
        return built[recipe["ref"]]
    if "dict" in recipe:
        return {key: _build(item, built) for key, item in recipe["dict"].items()}
    name = recipe.get("class")
    if name not in CLASSES:
        raise ValueError(f"unknown class {name!r}")
    arguments = {key: _build(item, built) for key, item in recipe["arguments"].items()}
    part = CLASSES[name](**arguments)
    built[len(built)] = part
    return part


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
