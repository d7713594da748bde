"""Saving and loading a pair: a JSON recipe and safetensors, never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from . import corruptions, decoders, encoders, networks, presets, priors
from .autoencoder import Autoencoder
from .part import Part

FORMAT = "probae/1"
RECIPE, TENSORS = "pair.json", "pair.safetensors"

CLASSES: dict[str, type[Part]] = {
    cls.__name__: cls
    for module in (corruptions, decoders, encoders, networks, presets, priors)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Part) and cls is not Part
}


def save(pair: Autoencoder, path: str | os.PathLike[str]) -> Path:
    """Write a pair to the folder ``path``: ``pair.json`` and ``pair.safetensors``.

    Both files are written beside their place and then moved, so a folder never holds half a file.
    A pair with parts of your own is saved too; :func:`load` then needs a pair to load into.

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
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "format": FORMAT,
        "pair": _recipe(pair),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "kind": pair.kind.value,
        "x_shape": pair.x_shape,
        "z_shape": pair.z_shape,
    }
    tensors = folder / (TENSORS + ".part")
    save_model(pair, str(tensors))
    text = folder / (RECIPE + ".part")
    text.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    os.replace(tensors, folder / TENSORS)
    os.replace(text, folder / RECIPE)
    return folder


def load(
    path: str | os.PathLike[str], pair: Autoencoder | None = None, device: str = "cpu"
) -> Autoencoder:
    """Read a pair from the folder ``path``.

    Only classes of probae are built, from plain values; nothing is unpickled or executed.

    Args:
        path: folder that :func:`save` wrote.
        pair: a pair of the same structure to load the parameters into, for pairs with parts of
            your own; without it, the pair is rebuilt.
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
    folder = Path(path)
    for name in (RECIPE, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"path {folder} holds no saved pair: {name} is missing")
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / RECIPE} is not valid JSON: {error}") from error
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        found = recipe.get("format") if isinstance(recipe, dict) else type(recipe).__name__
        raise ValueError(f"{folder / RECIPE} must have format {FORMAT!r}, got {found!r}")
    if pair is None:
        if recipe.get("pair") is None:
            raise ValueError(
                f"{folder} holds a pair with parts that are not probae's own; build the same pair "
                "and pass it: probae.load(path, pair=...)"
            )
        pair = _rebuild(recipe, folder / RECIPE)
    try:
        load_model(pair, str(folder / TENSORS), strict=True, device=device)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / TENSORS} does not fit the pair: {error}") from error
    return pair.to(device)


def _rebuild(recipe: dict[str, Any], file: Path) -> Autoencoder:
    dtype = getattr(torch, str(recipe.get("dtype")), None)
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{file}: dtype must be a floating dtype, got {recipe.get('dtype')!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            pair = _build(recipe["pair"], {})
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file} does not describe a pair: {error}") from error
    if not isinstance(pair, Autoencoder):
        raise ValueError(f"{file} must describe an Autoencoder, got {type(pair).__name__}")
    return pair.to(dtype)


def _recipe(pair: Autoencoder) -> Any:
    """Return the nested recipe of a pair, or None where it cannot be rebuilt from one."""
    try:
        recipe = _describe(pair, {})
        with torch.random.fork_rng(devices=[]):
            twin = _build(json.loads(json.dumps(recipe)), {})
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


def _structure(pair: nn.Module) -> list[tuple[str, Any]]:
    modules = [(name, type(module)) for name, module in pair.named_modules()]
    tensors = [(name, tensor.shape) for name, tensor in pair.state_dict().items()]
    return [*modules, *tensors]
