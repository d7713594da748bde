"""Files that are damaged, or made to do harm: refused by name, never executed, never misread."""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import probae
from probae import files, saving
from probae.files import read_json, replacing, sealed, write_bytes

from .benchmarks import hostile_files


def test_hundreds_of_damaged_files_are_refused_or_read_as_written() -> None:
    """One of each kind of damage for each kind of file."""
    result = hostile_files.benchmark(len(hostile_files.MUTATIONS) * 23, tell=lambda *_: None)
    assert result["number"] > 400
    assert result["faults"] == []
    assert result["executed"] == []
    assert result["peak_memory_grown_mib"] < 512


def test_the_canary_sings() -> None:
    """Unpickling one of the files above would have been seen."""
    place = hostile_files.Canary.place
    pickle.loads(pickle.dumps(hostile_files.Canary()))  # noqa: S301
    assert place.exists()
    place.unlink()


# --- what a recipe can ask for --------------------------------------------------------------


def recipe_of(**arguments: Any) -> dict[str, Any]:
    return {"class": "VAE", "arguments": {"x_dim": 9, "z_dim": 3, "hidden": [6], **arguments}}


def with_recipe(folder: Path, recipe: Any, **changes: Any) -> Path:
    """Save a pair, and another recipe beside its tensors, with the checksum it should have."""
    probae.save(probae.VAE(9, 3, hidden=(6,)), folder)
    file = folder / saving.RECIPE
    record = json.loads(file.read_text()) | {"pair": recipe} | changes
    file.write_text(json.dumps(sealed(record)))
    return folder


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of(hidden=[200_000, 200_000]), "needs more than"),
        (recipe_of(hidden=[40_000] * 40), "needs more than"),
        (recipe_of(z_dim=10**12), "does not describe a pair"),
        (recipe_of(z_dim=10**9), "needs more than"),
        (recipe_of(hidden=[10**30]), "does not describe a pair"),
        ({"class": "PPCA", "arguments": {"x_dim": 10**6, "z_dim": 10**5}}, "needs more than"),
        (
            recipe_of(prior={"class": "GaussianMixturePrior", "arguments": {"z_dim": 2 * 10**9}}),
            "more",
        ),
        (
            {
                "class": "PredictiveSparseDecomposition",
                "arguments": {"x_dim": 9, "z_dim": 4, "tolerance": 1e-300, "max_iterations": 10**9},
            },
            "kind, x_shape and z_shape|operations to build|does not fit",
        ),
    ],
    ids=["square", "deep", "huge", "code", "beyond int64", "eye", "prior", "iterations"],
)
def test_no_memory_for_a_recipe_that_its_tensors_do_not_bear_out(
    recipe: Any, message: str, tmp_path: Path
) -> None:
    folder, before, start = with_recipe(tmp_path, recipe), peak(), time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        probae.load(folder)
    assert str(tmp_path) in str(caught.value)
    assert peak() - before < 2**30 + 2**28
    assert time.perf_counter() - start < 120


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of(activation=3), "activation of VAE must be .*str.*, got 3"),
        (recipe_of(z_dim="3"), "z_dim of VAE must be .*int.*, got '3'"),
        (recipe_of(z_dim=True), "z_dim of VAE must be"),
        (recipe_of(z_dim=3.0), "z_dim of VAE must be"),
        (recipe_of(hidden=["6"]), "hidden of VAE must be"),
        (recipe_of(likelihood_options=[1]), "likelihood_options of VAE must be"),
        (recipe_of(likelihood_options={"x": 1}), "a part must have a class and arguments"),
        (recipe_of(prior={"class": "Corruption", "arguments": {}}), "does not describe a pair"),
        (recipe_of(self=1), "VAE takes no argument 'self'"),
        (recipe_of(__class__="x"), "VAE takes no argument '__class__'"),
        ({"class": "VAE", "arguments": {}, "call": "os.system"}, "must have a class and arguments"),
        ({"class": "eval", "arguments": {"source": "1"}}, "unknown class 'eval'"),
        ({"ref": [0]}, "does not describe a pair"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_recipe_is_compared_with_signatures(recipe: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        probae.load(with_recipe(tmp_path, recipe))


@pytest.mark.parametrize(
    "changes", [{"kind": "MAP_JOINT"}, {"x_shape": [3, 3]}, {"z_shape": [2]}, {"kind": None}]
)
def test_a_recipe_does_not_lie_about_its_pair(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind, x_shape and z_shape must be .*'ELBO'"):
        probae.load(with_recipe(tmp_path, recipe_of(), **changes))


def test_a_recipe_that_is_changed_by_hand_is_refused(tmp_path: Path) -> None:
    file = probae.save(probae.VAE(9, 3), tmp_path) / saving.RECIPE
    file.write_text(file.read_text().replace('"relu"', '"tanh"'))
    with pytest.raises(ValueError, match=r"pair.json is damaged: its checksum does not fit"):
        probae.load(tmp_path)


def test_tensors_of_another_pair_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        probae.save(probae.VAE(9, 3, hidden=(6,)), tmp_path / name)
    other = (tmp_path / "two" / saving.TENSORS).read_bytes()
    (tmp_path / "one" / saving.TENSORS).write_bytes(other)
    with pytest.raises(ValueError, match=r"pair.safetensors is damaged: its checksum is not"):
        probae.load(tmp_path / "one")


def test_a_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    file = probae.save(probae.VAE(9, 3), tmp_path) / saving.TENSORS
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    pair = probae.VAE(9, 3)
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    for given in (None, pair):
        with pytest.raises(ValueError, match=r"pair.safetensors is damaged"):
            probae.load(tmp_path, pair=given)
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())


def test_folders_of_the_first_format_still_load(tmp_path: Path) -> None:
    pair = probae.VAE(9, 3, hidden=(6,))
    file = probae.save(pair, tmp_path) / saving.RECIPE
    record = json.loads(file.read_text())
    del record["sha256"], record["tensors"]
    file.write_text(json.dumps(record | {"format": saving.UNSEALED}))
    loaded = probae.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in pair.state_dict().items())
    file.write_text(json.dumps(record | {"format": saving.UNSEALED, "sha257": "0"}))
    with pytest.raises(ValueError, match="must have just the keys of probae/1"):
        probae.load(tmp_path)


def test_a_save_that_ends_between_its_two_moves_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = probae.VAE(9, 3), probae.PPCA(5, 2)
    probae.save(first, tmp_path)
    move = saving.move

    def killed(part: Path, file: Path) -> None:
        if file.name == saving.RECIPE:
            raise KeyboardInterrupt
        move(part, file)

    monkeypatch.setattr(saving, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        probae.save(second, tmp_path)
    monkeypatch.undo()
    loaded = probae.load(tmp_path)
    assert type(loaded) is probae.PPCA
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t) for name, t in second.state_dict().items())
    probae.save(first, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {saving.RECIPE, saving.TENSORS}


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "", "a\0b", 3.5, None])
def test_devices_that_are_none(device: Any, tmp_path: Path) -> None:
    probae.save(probae.VAE(4, 2), tmp_path)
    if device is None:
        assert probae.load(tmp_path, device=device).device.type == "cpu"
        return
    with pytest.raises(ValueError, match="device"):
        probae.load(tmp_path, device=device)


# --- arrays ---------------------------------------------------------------------------------


def header(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header("(100000000000, 784)"),
        header("(4, 784)") + bytes(100),
        header("(4, 2)") + bytes(33),
        header("(-4, -2)") + bytes(32),
        header("(2,)", "'|O'") + pickle.dumps([1, 2]),
        header("(2,)", "'<U1000000000'") + bytes(8),
        header("(2.5,)") + bytes(8),
        header("(" * 5000 + ")" * 5000),
        header("__import__('os').getpid()") + bytes(8),
        header("(2,)", "[('a', 'O')]") + bytes(16),
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"PK\x03\x04" + bytes(100),
    ],
    ids=[
        *("sizes", "short", "long", "negative", "objects", "text", "float", "nested", "code"),
        *("record", "version", "zip"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["npy", "npz"])
def test_headers_that_lie_are_refused(content: bytes, packed: bool, tmp_path: Path) -> None:
    file = tmp_path / ("x.npz" if packed else "x.npy")
    if packed:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", content)
    else:
        file.write_bytes(content)
    before = peak()
    with pytest.raises(ValueError, match=rf"{file.name}' cannot be read, it is damaged"):
        probae.as_tensor(file)
    assert peak() - before < 2**28


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:x", "..\\x"])
def test_members_that_lead_out_of_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(f"{name}.npy", stream.getvalue())
    with pytest.raises(ValueError, match="is no plain name"):
        probae.as_tensor(tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_an_archive_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile says so, too
        for value in (0.0, 1.0):
            stream = io.BytesIO()
            np.save(stream, np.full(3, value))
            archive.writestr("x.npy", stream.getvalue())
    with pytest.raises(ValueError, match="a name comes twice"):
        probae.as_tensor(tmp_path / "x.npz")


def test_an_array_of_zeros_is_no_bomb(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 1000), dtype=np.float32))
    assert (tmp_path / "x.npz").stat().st_size < 10_000
    assert probae.as_tensor(tmp_path / "x.npz").shape == (1000, 1000)


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"x\.npy"):
        probae.as_tensor(tmp_path / "x.npy")


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[1e999]", "1e999 is too large"),
        (b"9" * 5000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a key comes twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b" " * 1001 + b"1", "must have at most 1000 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_is_read_strictly(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(content)
    most = 1000 if content.startswith(b" ") else 2**20
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file, most)
    assert str(file) in str(caught.value)


def test_a_seal_counts_all_but_white_space() -> None:
    record = sealed({"a": [1, 2.5, None], "b": {"c": "x"}})
    again = json.loads(json.dumps(record, indent=7))
    files.require_seal(again, Path("here"))
    for changed in (record | {"a": [1, 2.5]}, record | {"d": 1}, {"b": record["b"]}, {}):
        with pytest.raises(ValueError, match="here is damaged: its checksum does not fit"):
            files.require_seal(changed, Path("here"))


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x"
    write_bytes(file, b"before")

    def fail() -> None:
        with replacing(file) as stream:
            stream.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_writing_follows_no_link_that_lies_in_wait(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (saving.RECIPE, saving.TENSORS):
        (folder / f"{name}.part").symlink_to(target)
        (folder / name).symlink_to(target)
    pair = probae.VAE(4, 2)
    probae.save(pair, folder)
    assert target.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
    probae.load(folder)


def test_files_are_on_the_disk_before_they_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def moved(*arguments: Any) -> None:
        done.append("move")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    write_bytes(tmp_path / "x", b"content")
    assert done == ["file", "move", "folder"]
    done.clear()
    probae.save(probae.VAE(4, 2), tmp_path)
    assert done == ["file", "file", "move", "folder", "move", "folder"]


LOADER = """
import sys
events = []
sys.addaudithook(lambda event, arguments: events.append(event))
import probae
probae.load(sys.argv[1])
assert "pickle.find_class" not in events, "something was unpickled"
assert "torch._dynamo" not in sys.modules, "loading a pair brings no compiler in"
"""


def test_loading_unpickles_nothing_and_stays_light(tmp_path: Path) -> None:
    probae.save(probae.VAE(9, 3), tmp_path)
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    subprocess.run([sys.executable, "-c", LOADER, tmp_path], check=True, env=environment)


@pytest.mark.parametrize(
    "build",
    [
        lambda: {"a": torch.zeros(0, 3)},
        lambda: {"a": torch.tensor(1.5), "b": torch.ones(2, dtype=torch.bfloat16)},
    ],
)
def test_tensors_are_read_with_their_metadata(build: Callable[[], Any], tmp_path: Path) -> None:
    tensors = build()
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"note": "mine"})
    found, metadata = files.read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"note": "mine"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
