"""Tests of probae.datasets; nothing here goes further than the loopback interface."""

import doctest
import gc
import gzip
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pooch  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import probae
from probae import datasets
from probae.datasets import (
    DataSplits,
    Labels,
    Splits,
    as_tensor,
    binarize,
    dequantize,
    load_dataset,
)

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
# Read before the fixture below hides the variable from the tests.
DATA = Path(os.environ.get("PROBAE_DATA") or Path(__file__).resolve().parents[2] / "shared/data")

needs_mnist = pytest.mark.skipif(
    not all((DATA / "mnist" / name).is_file() for name in FILES),
    reason=f"no MNIST files in {DATA / 'mnist'}; set PROBAE_DATA to the folder above mnist/",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty cache, no PROBAE_DATA, no proxy, and addresses that refuse."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(pooch, "os_cache", lambda project: folder / project)
    monkeypatch.delenv("PROBAE_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("mnist", "fashion-mnist"):
        set_source(monkeypatch, name, url="http://127.0.0.1:1/")
    return folder / "probae"


def set_source(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str, folder: Path | None = None
) -> None:
    """Point a data set at `url`, and its checksums at the files in `folder` where given."""
    md5 = datasets._SOURCES[name].md5
    if folder is not None:
        packed = {file: (folder / file).read_bytes() for file in FILES}
        md5 = {file: (md5_of(raw), md5_of(gzip.decompress(raw))) for file, raw in packed.items()}
    monkeypatch.setitem(datasets._SOURCES, name, datasets._Source(url, md5))


def md5_of(raw: bytes) -> str:
    return hashlib.md5(raw).hexdigest()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes(), compresslevel=1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Write a data set in MNIST's format with 20 + 5000 train and 7 test images; its folder."""
    folder = tmp_path / "small"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 5020), ("t10k", 7)):
        images = rng.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        labels = np.arange(count).astype(np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx_bytes(labels))
    return folder


class QuietFiles(SimpleHTTPRequestHandler):
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:
        pass


class Short(BaseHTTPRequestHandler):
    """Announce 1000 bytes, send 10 and hang up: a connection that breaks half-way."""

    timeout = 5

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"0123456789")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start loopback servers; all are stopped, closed and joined after the test."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(handler: Callable[..., BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
        assert not thread.is_alive()
    gc.collect()  # see test_failed_download_leaves_nothing_behind


# --- load_dataset: data inside scikit-learn -------------------------------------------------


def test_digits() -> None:
    data = load_dataset("digits")
    assert (data.name, data.levels, data.shape) == ("digits", 17, (1, 8, 8))
    assert data.labels is not None
    assert [len(split) for split in data[1:4]] == [1257, 180, 360]
    assert [len(split) for split in data.labels] == [1257, 180, 360]
    for split, labels in zip(data[1:4], data.labels, strict=True):
        assert split.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert torch.equal(split * 16, (split * 16).round())
        assert split.min() == 0
        assert split.max() == 1
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert (shares - 0.1).abs().max() < 0.01  # stratified


def test_digits_splits_partition_the_raw_data() -> None:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    data = load_dataset("digits")
    assert data.labels is not None
    images = torch.cat(data[1:4]).flatten(1) * 16
    rows = torch.cat([images, torch.cat(data.labels)[:, None]], dim=1).tolist()
    raw = load_digits()
    expected = np.concatenate([raw.data, raw.target[:, None]], axis=1).tolist()
    assert sorted(rows) == sorted(expected)


def test_patches() -> None:
    data = load_dataset("patches")
    assert (data.name, data.levels, data.shape) == ("patches", 256, (1, 12, 12))
    assert data.labels is None
    assert [len(split) for split in data[1:4]] == [20_000, 2_000, 4_000]
    for split in data[1:4]:
        assert split.dtype == torch.float32
        assert split.min() >= 0
        assert split.max() <= 1
        assert (split * 255 - (split * 255).round()).abs().max() < 1e-4
        assert split.std() > 0.1


def test_patches_of_different_splits_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets  # type: ignore[import-untyped, unused-ignore]

    # Photos whose grey level is the column number // 3: a patch shows where it was cut.
    column = np.broadcast_to((np.arange(640) // 3)[None, :, None], (427, 640, 3)).astype(np.uint8)

    class Photos:
        images = (column, column)

    monkeypatch.setattr(sklearn.datasets, "load_sample_images", Photos)
    train, val, test = (split * 255 for split in load_dataset("patches")[1:4])
    assert train.max() <= 447 // 3
    assert val.min() >= 448 // 3
    assert val.max() <= 511 // 3
    assert test.min() >= 512 // 3
    # and each split reaches both edges of its band
    assert train.min() == 0
    assert train.max() == 447 // 3
    assert test.max() == 639 // 3


def numpy_global_state() -> tuple[list[int], int]:
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return state["key"].tolist(), state["pos"]


@pytest.mark.parametrize("name", ["digits", "patches"])
def test_load_is_reproducible_and_leaves_the_global_generators_alone(name: str) -> None:
    torch_state, numpy_state = torch.get_rng_state(), numpy_global_state()
    first, second = load_dataset(name), load_dataset(name)
    assert all(torch.equal(a, b) for a, b in zip(first[1:4], second[1:4], strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert numpy_global_state() == numpy_state


@pytest.mark.parametrize("name", ["MNIST", "", "cifar10", None, ["mnist"]])
def test_unknown_name_lists_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match="name must be one of digits, mnist, fashion-mnist, pat"):
        load_dataset(name)  # type: ignore[arg-type]


# --- load_dataset: files --------------------------------------------------------------------


@needs_mnist
def test_real_mnist_from_disk(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PROBAE_DATA", str(DATA))
    data = load_dataset("mnist")
    assert (data.name, data.levels, data.shape) == ("mnist", 256, (1, 28, 28))
    assert data.labels is not None
    assert [len(split) for split in data[1:4]] == [55_000, 5_000, 10_000]
    assert [len(split) for split in data.labels] == [55_000, 5_000, 10_000]
    assert data.labels.train[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.labels.test[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.test.dtype == torch.float32
    assert data.test.min() == 0
    assert data.test.max() == 1
    assert data.test.mean().item() == pytest.approx(0.1325, abs=1e-4)
    assert torch.equal((data.val * 255).round() / 255, data.val)
    assert not cache.exists()


@needs_mnist
def test_real_mnist_over_http(
    monkeypatch: pytest.MonkeyPatch, cache: Path, serve: Callable[..., str]
) -> None:
    folder = DATA / "mnist"
    url = serve(partial(QuietFiles, directory=str(folder)))
    set_source(monkeypatch, "mnist", url, folder)
    data = load_dataset("mnist")
    assert [len(split) for split in data[1:4]] == [55_000, 5_000, 10_000]
    assert data.train[0].sum().item() * 255 == pytest.approx(27525, abs=0.1)
    assert files_in(cache) == sorted(FILES)
    for name in FILES:
        assert (cache / "mnist" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_download_then_cache(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    small: Path,
    serve: Callable[..., str],
) -> None:
    set_source(monkeypatch, name, serve(partial(QuietFiles, directory=str(small))), small)
    data = load_dataset(name)
    assert data.name == name
    assert [len(split) for split in data[1:4]] == [20, 5000, 7]
    assert data.shape == (1, 4, 4)
    assert data.labels is not None
    assert data.labels.train.tolist() == [*range(10), *range(10)]
    assert data.labels.val[:3].tolist() == [0, 1, 2]
    assert data.labels.test.dtype == torch.int64
    assert files_in(cache / name) == sorted(FILES)

    set_source(monkeypatch, name, "http://127.0.0.1:1/", small)  # the second time needs no server
    again = load_dataset(name)
    assert torch.equal(again.train, data.train)


def test_damaged_cache_file_is_downloaded_again(
    monkeypatch: pytest.MonkeyPatch, cache: Path, small: Path, serve: Callable[..., str]
) -> None:
    set_source(monkeypatch, "mnist", serve(partial(QuietFiles, directory=str(small))), small)
    (cache / "mnist").mkdir(parents=True)
    (cache / "mnist" / FILES[0]).write_bytes(b"damaged")
    assert len(load_dataset("mnist").train) == 20
    assert (cache / "mnist" / FILES[0]).read_bytes() == (small / FILES[0]).read_bytes()


def test_root_and_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, small: Path
) -> None:
    set_source(monkeypatch, "mnist", "http://127.0.0.1:1/", small)
    assert len(load_dataset("mnist", root=small).train) == 20  # files directly in root
    assert len(load_dataset("mnist", root=str(small)).train) == 20

    above = tmp_path / "above"
    above.mkdir()
    small.rename(above / "mnist")
    assert len(load_dataset("mnist", root=above).train) == 20  # files in root/mnist
    assert not cache.exists()

    with pytest.raises(OSError, match="PROBAE_DATA"):
        load_dataset("mnist")
    monkeypatch.setenv("PROBAE_DATA", str(above))
    assert len(load_dataset("mnist").train) == 20
    with pytest.raises(OSError, match="PROBAE_DATA"):  # root is looked at instead of PROBAE_DATA
        load_dataset("mnist", root=tmp_path / "nowhere")
    monkeypatch.setenv("PROBAE_DATA", "")
    with pytest.raises(OSError, match="PROBAE_DATA"):
        load_dataset("mnist")


@pytest.mark.parametrize("damage", ["truncated", "no gzip", "flipped byte", "other data set"])
def test_damaged_file_on_disk_is_named_and_left_alone(
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    small: Path,
    serve: Callable[..., str],
) -> None:
    set_source(monkeypatch, "mnist", serve(partial(QuietFiles, directory=str(small))), small)
    path = small / FILES[2]
    raw = path.read_bytes()
    damaged = {
        "truncated": raw[:-20],
        "no gzip": b"<html>not found</html>",
        "flipped byte": raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
        "other data set": idx_bytes(np.zeros((7, 4, 4), np.uint8)),
    }[damage]
    path.write_bytes(damaged)
    message = f"{FILES[2]} must unpack to the mnist file .*; delete it, or replace it with http"
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("mnist", root=small)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == damaged
    assert not cache.exists()


def test_file_packed_again_is_accepted(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    set_source(monkeypatch, "mnist", "http://127.0.0.1:1/", small)
    path = small / FILES[0]
    before = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(before), compresslevel=0))
    assert path.read_bytes() != before
    assert len(load_dataset("mnist", root=small).train) == 20


def test_offline(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="fashion-mnist could not be loaded") as caught:
        load_dataset("fashion-mnist", root=tmp_path / "typo")
    message = str(caught.value)
    assert f"http://127.0.0.1:1/{FILES[0]}" in message
    assert str(tmp_path / "typo") in message
    assert f"set PROBAE_DATA to a folder holding fashion-mnist/{FILES[0]}" in message
    assert files_in(cache) == []


# pooch leaves the connection of a failed download to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    ("fault", "says"), [("corrupt", "hash"), ("missing", "404"), ("short", "PROBAE_DATA")]
)
def test_failed_download_leaves_nothing_behind(
    fault: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    small: Path,
    serve: Callable[..., str],
) -> None:
    set_source(monkeypatch, "mnist", "", small)
    if fault == "corrupt":
        (small / FILES[0]).write_bytes(b"not what was published")
    elif fault == "missing":
        (small / FILES[0]).unlink()
    url = serve(Short if fault == "short" else partial(QuietFiles, directory=str(small)))
    set_source(monkeypatch, "mnist", url)
    with pytest.raises(OSError, match=says) as caught:
        load_dataset("mnist")
    assert url + FILES[0] in str(caught.value)
    assert files_in(cache) == []


# --- as_tensor ------------------------------------------------------------------------------


def test_as_tensor_passes_a_good_tensor_through() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.rand(3, 2, dtype=dtype)
        assert as_tensor(x) is x


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16])
def test_as_tensor_makes_other_tensors_float32(dtype: torch.dtype) -> None:
    y = as_tensor(torch.tensor([0.0, 1.0]).to(dtype))
    assert y.dtype == torch.float32
    assert y.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bool", torch.float32),
        ("float16", torch.float32),
        ("float32", torch.float32),
        ("float64", torch.float64),
        (">f4", torch.float32),
        (">f8", torch.float64),
        ("longdouble", torch.float64),
    ],
)
def test_as_tensor_reads_numpy(dtype: str, expected: torch.dtype) -> None:
    y = as_tensor(np.array([[0, 1], [1, 0]]).astype(dtype))
    assert y.dtype == expected
    assert y.tolist() == [[0, 1], [1, 0]]


def test_as_tensor_shares_memory_unless_torch_cannot(recwarn: pytest.WarningsRecorder) -> None:
    x = np.arange(6.0).reshape(3, 2)
    as_tensor(x)[0, 0] = 7
    assert x[0, 0] == 7
    assert as_tensor(x[::-1]).tolist() == x[::-1].tolist()
    x.flags.writeable = False
    as_tensor(x)[0, 0] = 8
    assert x[0, 0] == 7
    assert not recwarn.list


def test_as_tensor_reads_files(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((4, 3))
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez_compressed(tmp_path / "x.npz", x=x, y=np.zeros(2))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    for name in ("A.NPY", "one.npz", "x.npz"):
        assert as_tensor(tmp_path / name).tolist() == x.tolist()
        assert as_tensor(str(tmp_path / name)).tolist() == x.tolist()


class Items(Dataset[Any]):
    """A map-style Dataset that counts its reads."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.reads = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return self.items[i]


def test_as_tensor_stacks_a_dataset() -> None:
    x = torch.rand(5, 1, 2)
    plain = Items(list(x))
    assert torch.equal(as_tensor(plain), x)
    assert plain.reads == 5
    assert torch.equal(as_tensor(TensorDataset(x, torch.arange(5))), x)
    assert torch.equal(as_tensor(Items([[row, 0] for row in x])), x)
    assert torch.equal(as_tensor(Subset(TensorDataset(x), [3, 1])), x[[3, 1]])
    assert as_tensor(Items([torch.tensor(True), torch.tensor(False)])).tolist() == [1.0, 0.0]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.rand(3, 2))


class NoLength(Dataset[Tensor]):
    def __getitem__(self, i: int) -> Tensor:
        return torch.rand(2)


ONE = torch.zeros(2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), r"got torch.uint8; .*w\.float\(\).*divide 8-bit .*255"),
        (torch.zeros(2, dtype=torch.int64), r"got torch.int64; convert it with w\.float\(\)"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64; pass real numbers"),
        (np.zeros(2, np.uint8), r"got uint8; .*w\.astype\('float32'\).*divide 8-bit .*255"),
        (np.zeros(2, np.complex128), "got complex128; pass real numbers"),
        (np.array([None, 1.0]), "got object; pass real numbers"),
        (np.array(["a"]), "got <U1; pass real numbers"),
        (torch.zeros(0, 3), r"N >= 1 .* got shape \(0, 3\)"),
        (torch.zeros(3, 0), r"no empty dimension, got shape \(3, 0\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (np.float32(1.0), "got float32"),
        (np.array(1.0), r"got shape \(\)"),
        (np.zeros((0, 2)), r"got shape \(0, 2\)"),
        (torch.eye(2).to_sparse(), r"must be dense, got torch.sparse_coo; pass w.to_dense\(\)"),
        ([0.0, 1.0], "got list; pass numpy.asarray"),
        (None, "got NoneType"),
        (
            DataSplits("a", ONE, ONE, ONE, None, 2),
            r"got all of them \(DataSplits\); pass data.train",
        ),
        (Splits(ONE, ONE, ONE), "pass data.train"),
        (Stream(), r"must be a map-style Dataset .* got Stream; .*torch.stack\(list\(dataset\)\)"),
        (NoLength(), "must be a map-style Dataset .* got NoLength"),
        (Items([]), r"got shape \(0,\)"),
        (Items(["a"]), r"w\[0\] must be a tensor .* got str; give the Dataset a transform"),
        (Items([()]), r"w\[0\] must be a tensor .* got tuple"),
        (Items([ONE, torch.zeros(3)]), r"w\[1\] must be like w\[0\], \(2,\) .* got \(3,\)"),
        (Items([ONE, ONE.double()]), r"w\[1\] must be like w\[0\].* got \(2,\) torch.float64"),
        (Items([ONE.long()]), "got torch.int64"),
        ("data.csv", "path of a .npy or .npz file, got 'data.csv'; save it with numpy.save"),
        ("mnist", r"got 'mnist'; for the data set use load_dataset\('mnist'\).train"),
    ],
)
def test_as_tensor_refuses(x: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        as_tensor(x, argument="w")
    assert str(caught.value).startswith("w")


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_as_tensor_counts_values_that_are_not_finite(make: Callable[..., object]) -> None:
    x = make([[0.0, 1.0], [0.0, float("nan")], [float("inf"), -float("inf")]])
    with pytest.raises(ValueError, match=r"x must be finite, got 3 .* in row 1 \(x\[1\]\)"):
        as_tensor(x)
    with pytest.raises(ValueError, match="got 1 NaN or infinite values, the first in row 2"):
        as_tensor(make([0.0, 1.0, float("nan")]))


def test_as_tensor_refuses_an_unknown_path(tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    for name in ("missing.npy", "missing.npz", "folder.npy"):
        with pytest.raises(FileNotFoundError, match=name):
            as_tensor(tmp_path / name)


def test_as_tensor_refuses_an_ambiguous_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", train=np.zeros(2), test=np.zeros(2))
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"two.npz' must hold .* got \['train', 'test'\]; pass"):
        as_tensor(tmp_path / "two.npz")
    with pytest.raises(ValueError, match=r"none.npz' must hold .* got \[\]"):
        as_tensor(tmp_path / "none.npz")


def test_as_tensor_refuses_damaged_files(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((50, 3))
    np.save(tmp_path / "whole.npy", x)
    np.savez_compressed(tmp_path / "whole.npz", x=x)
    npy, npz = ((tmp_path / f"whole.{kind}").read_bytes() for kind in ("npy", "npz"))
    damaged = {
        "empty.npy": b"",
        "text.npy": b"1.0, 2.0\n",
        "short.npy": npy[:-8],
        "header.npy": npy[:20],
        "syntax.npy": npy.replace(b"}", b" "),  # numpy raises tokenize.TokenError
        "short.npz": npz[:-30],
        "middle.npz": npz[:200] + b"\0" * 50 + npz[250:],  # zlib.error
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' cannot be read, it is damaged"):
            as_tensor(tmp_path / name)


def test_as_tensor_never_unpickles(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects.npy' cannot be read, .* holds Python objects"):
        as_tensor(tmp_path / "objects.npy")


def test_as_tensor_does_not_call_a_large_file_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*args: object, **kwargs: object) -> None:
        raise MemoryError("Unable to allocate 1 TiB")

    np.save(tmp_path / "large.npy", np.zeros(2))
    monkeypatch.setattr(np, "load", too_large)
    with pytest.raises(MemoryError):
        as_tensor(tmp_path / "large.npy")


# --- binarize and dequantize ----------------------------------------------------------------


def test_binarize_draws_bernoulli() -> None:
    x = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).repeat(20_000, 1)
    y = binarize(x)
    assert y.dtype == torch.float32
    assert ((y == 0) | (y == 1)).all()
    mean = y.mean(0)
    assert mean[0] == 0
    assert mean[4] == 1
    assert (mean - x[0]).abs().max() < 5 * 0.5 / 20_000**0.5  # five standard errors


def test_dequantize_is_uniform_on_each_level() -> None:
    k = torch.arange(17.0).repeat(5_000, 1)
    y = dequantize(k / 16, levels=17)
    u = y * 17 - k
    assert ((u > -1e-5) & (u < 1 + 1e-5)).all()
    assert (u.mean(0) - 0.5).abs().max() < 5 * (1 / 12) ** 0.5 / 5_000**0.5
    assert (u.var(0) - 1 / 12).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantize_stays_below_one(dtype: torch.dtype) -> None:
    # 2^20 draws: in float32, 255 + u rounds to 256 about eight times
    y = dequantize(torch.ones(2**20, dtype=dtype), levels=256)
    assert y.dtype == dtype
    assert y.max() < 1
    assert y.min() >= 255 / 256


@pytest.mark.parametrize("levels", [2, 17, 256, 65536, np.int64(256)])
def test_dequantize_keeps_the_level(levels: int) -> None:
    k = torch.arange(int(levels)).float()
    for x in (k / (levels - 1), (k.double() / (levels - 1)).float(), k.double() / (levels - 1)):
        y = dequantize(x, levels)
        assert (y >= (k / levels).to(y.dtype)).all()
        assert (y < ((k + 1) / levels).to(y.dtype)).all()


@pytest.mark.parametrize("draw", [binarize, partial(dequantize, levels=2)])
def test_draws_depend_on_the_seed_alone(draw: Callable[..., Tensor]) -> None:
    x = torch.ones(1000) if draw is not binarize else torch.full((1000,), 0.5)
    state = torch.get_rng_state()
    first = draw(x)
    torch.rand(1)
    assert torch.equal(draw(x, seed=0), first)
    assert not torch.equal(draw(x, seed=1), first)
    torch.set_rng_state(state)
    draw(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("draw", [binarize, partial(dequantize, levels=2)])
def test_draws_refuse_values_outside_the_unit_interval(draw: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"x must be in \[0, 1\], got values from -1 to 2"):
        draw(torch.tensor([-1.0, 2.0]))
    with pytest.raises(ValueError, match="x must be finite"):
        draw(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match=r"got torch.uint8; convert it with x.float\(\)"):
        draw(torch.zeros(2, dtype=torch.uint8))


def test_dequantize_refuses_values_off_the_grid() -> None:
    with pytest.raises(ValueError, match=r"levels = 17, got 2 values off it, the first 0.3;"):
        dequantize(torch.tensor([0.0, 0.3, 0.7, 1.0]), levels=17)
    x = torch.arange(17) / 16
    with pytest.raises(ValueError, match="on the grid"):  # already dequantized
        dequantize(dequantize(x, levels=17), levels=17)


@pytest.mark.parametrize("levels", [1, 0, -3, 2.5, 256.0, "256", None])
def test_dequantize_refuses_levels(levels: object) -> None:
    with pytest.raises(ValueError, match="levels must be a whole number >= 2"):
        dequantize(torch.zeros(2), levels=levels)  # type: ignore[arg-type]


def test_labels_and_splits_are_named() -> None:
    labels = Labels(train=ONE, val=ONE, test=ONE)
    assert labels._fields == ("train", "val", "test")


def test_docstring_examples() -> None:
    result = doctest.testmod(datasets)
    assert result.attempted >= 5
    assert result.failed == 0


def test_dataset_of_arrays_is_read() -> None:
    class Arrays(Dataset[tuple[np.ndarray, int]]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.full(4, index, dtype=np.float32), 0

    assert as_tensor(Arrays()).tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_seed_must_be_an_int() -> None:
    for seed in (None, 1.5, True):
        with pytest.raises(ValueError, match="seed must be an int"):
            binarize(torch.rand(2, 3), seed=seed)  # type: ignore[arg-type]


def test_masks_are_not_dropped_in_silence() -> None:
    masked = np.ma.masked_array(np.ones((3, 2)), mask=[[0, 1], [0, 0], [0, 0]])
    with pytest.raises(ValueError, match="x must have no missing entries, got a masked array"):
        probae.as_tensor(masked)
    values, mask = probae.stack_missing(masked).unbind(1)
    assert mask[0].tolist() == [1, 0]
    assert values[0].tolist() == [1, 0]
