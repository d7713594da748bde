"""Small image data sets, and the conversions that bring a user's data into the same form."""

import gzip
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Sized
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pooch  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

# scikit-learn is imported inside the two functions that use it: it is slow to import, and
# as_tensor, which every model calls, does not need it.

DATASET_NAMES = ("digits", "mnist", "fashion-mnist", "patches")

LARGE = 2**28  # bytes above which training maps a .npy file
DEFLATED = 1100  # how many bytes a compressed one can stand for, at most, in a .npz file

_SEED = 0  # splits and patches are the same in every process
_PATCH = 12  # side of a patch, pixels
_PATCH_COUNTS = (20_000, 2_000, 4_000)  # train, val, test
_PATCH_BANDS = ((0.0, 0.7), (0.7, 0.8), (0.8, 1.0))  # fractions of a photo's width
_IDX_MOST = 2**26  # bytes; the largest idx file holds 60000 * 28 * 28 and 16
_IDX_VAL = 5_000  # the last images of an idx train file are the validation split


class _Source(NamedTuple):
    """Where the files of a data set are published, and their two md5 checksums.

    The first, of the .gz, is for downloads. The second, of what is in it, is for every file read:
    a copy that someone packed again differs in the first only.
    """

    url: str
    md5: dict[str, tuple[str, str]]


_SOURCES = {
    "mnist": _Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "6bbc9ace898e44ae57da46a324031adb",
            ),
            "train-labels-idx1-ubyte.gz": (
                "d53e105ee54ea40749a09fcbcd1e9432",
                "a25bea736e30d166cdddb491f175f624",
            ),
            "t10k-images-idx3-ubyte.gz": (
                "9fb629c4189551a2d022fa330f9573f3",
                "2646ac647ad5339dbf082846283269ea",
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "ec29112dd5afa0611ce80d1b7f02629c",
                "27ae3e4e09519cfbb04c329615203637",
            ),
        },
    ),
    "fashion-mnist": _Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            ),
            "train-labels-idx1-ubyte.gz": (
                "25c81989df183df01b3e8a0aad5dffbe",
                "9018921c3c673c538a1fc5bad174d6f9",
            ),
            "t10k-images-idx3-ubyte.gz": (
                "bef4ecab320f06d8554ea6380940ec79",
                "8181f5470baa50b63fa0f6fddb340f0a",
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "bb300cfdad3c16e7a12a480ee83cd310",
                "15d484375f8d13e6eb1aabb0c3f46965",
            ),
        },
    ),
}


class Splits(NamedTuple):
    """One tensor for each of the three splits of a data set.

    Shapes: (N, ...) each, with its own N. Units: those of the data.

    Example:
        >>> Splits(torch.zeros(3), torch.zeros(2), torch.zeros(1)).val.shape
        torch.Size([2])
    """

    train: Tensor
    val: Tensor
    test: Tensor


Labels = Splits  # class labels: (N,) int64 for each split


class DataSplits(NamedTuple):
    """A data set cut into training, validation and test images, as `load_dataset` returns it.

    Shapes: train, val, test (N, *shape) float32 in [0, 1]; labels (N,) int64 for each split, or
    None where the data has no classes.
    Units: pixel intensity k / (levels - 1), where k in {0, ..., levels - 1} is the raw grey level.

    Example:
        >>> data = load_dataset("digits")
        >>> data.name, data.shape, data.levels
        ('digits', (1, 8, 8), 17)
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    labels: Labels | None
    levels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, (channels, height, width): a model's `x_dim`."""
        return tuple(self.train.shape[1:])


def load_dataset(name: str, root: str | os.PathLike[str] | None = None) -> DataSplits:
    """Load a small image data set, split the same way every time.

    ================  ===========  ======  =====================  =====================
    name              shape        levels  train / val / test     from
    ================  ===========  ======  =====================  =====================
    "digits"          (1, 8, 8)        17  1257 / 180 / 360       inside scikit-learn
    "mnist"           (1, 28, 28)     256  55000 / 5000 / 10000   files, or a download
    "fashion-mnist"   (1, 28, 28)     256  55000 / 5000 / 10000   files, or a download
    "patches"         (1, 12, 12)     256  20000 / 2000 / 4000    inside scikit-learn
    ================  ===========  ======  =====================  =====================

    The .gz files of "mnist" and "fashion-mnist" are looked for in `root`/<name> and `root`; with
    no `root`, in $PROBAE_DATA/<name>; then in the user's cache folder. What none of these holds
    is downloaded into the cache. Every file is checked against the published checksums.
    "patches" are cut from two photos in grey; no pixel is in two splits.

    Shapes: each split (N, *shape). Units: pixel intensity in [0, 1].

    Raises:
        ValueError: `name` is unknown, or a file on disk is not the published one.
        OSError: a file is on no disk and could not be downloaded.

    Source: digits, Alpaydin & Kaynak 1998 (UCI); MNIST, LeCun et al. 1998; Fashion-MNIST,
    Xiao et al. 2017; patches, the sample photos of scikit-learn (Pedregosa et al. 2011).

    Example:
        >>> data = load_dataset("digits")
        >>> data.train.shape, data.labels.train.shape
        (torch.Size([1257, 1, 8, 8]), torch.Size([1257]))
    """
    if not isinstance(name, str) or name not in DATASET_NAMES:
        raise ValueError(f"name must be one of {', '.join(DATASET_NAMES)}; got {name!r}")
    if root is not None and not isinstance(root, str | os.PathLike):
        raise ValueError(f"root must be the path of a folder or None, got {root!r}")
    if name == "digits":
        return _load_digits()
    if name == "patches":
        return _load_patches()
    return _load_idx(name, root)


def as_tensor(x: Any, argument: str = "x") -> Tensor:
    """Turn a user's data into one floating-point tensor, or say what is wrong with it.

    `x` is a tensor, a NumPy array, the path of a .npy or .npz file (.npz: its only array, or the
    one named "x"), or a map-style torch `Dataset` whose items are tensors or tuples that begin
    with one; a `Dataset` is read once and stacked. float64 stays float64; bool, float32 and the
    half precisions become float32. Memory is shared with `x` where no conversion is needed.
    `argument` is the name that error messages give to `x`.

    Shapes: x (N, ...) -> (N, ...), N >= 1. Units: unchanged.

    Raises:
        ValueError: `x` is of another type, is empty or 0-dimensional, holds integers, complex
            numbers, text or objects, holds NaN or infinity, or its file cannot be read as arrays.
        FileNotFoundError: there is no file at the path `x`.

    Source: none, a conversion only.

    Example:
        >>> as_tensor(np.ones((5, 2), dtype=np.float16)).dtype
        torch.float32
    """
    if not isinstance(argument, str):
        raise ValueError(f"argument must be a name, a str, got {type(argument).__name__}")
    if isinstance(x, (DataSplits, Splits)):
        raise ValueError(
            f"{argument} must be one split of a data set, got all of them "
            f"({type(x).__name__}); pass data.train (or data.val, data.test)"
        )
    if isinstance(x, (str, os.PathLike)):
        x = read_array(Path(x), argument)
    elif isinstance(x, Dataset):
        x = _stack_items(x, argument)

    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(
            f"{argument} must have no missing entries, got a masked array; use "
            f"{argument}.filled(value), or probae.stack_missing for pairs that know of a mask"
        )
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "bf":
            raise _dtype_error(argument, x.dtype)
        wide = x.dtype.kind == "f" and x.dtype.itemsize >= 8
        # torch takes native-endian, writable arrays only; `require` copies where that is needed.
        x = torch.from_numpy(np.require(x, np.float64 if wide else np.float32, ["C", "W"]))
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{argument} must be a tensor, a NumPy array, the path of a .npy or .npz file or a "
            f"torch Dataset; got {type(x).__name__}; pass numpy.asarray(...) of numbers, "
            "torch.stack(...) of tensors, .to_numpy() of a table, .dataset of a DataLoader"
        )
    if x.device.type == "meta":
        raise ValueError(f"{argument} must hold numbers, got a tensor on the device 'meta'")
    if x.layout != torch.strided:
        raise ValueError(f"{argument} must be dense, got {x.layout}; pass {argument}.to_dense()")
    if not (x.is_floating_point() or x.dtype == torch.bool):
        raise _dtype_error(argument, x.dtype)
    if x.dtype != torch.float64:
        x = x.float()

    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"{argument} must have shape (N, ...) with N >= 1 and no empty dimension, got shape "
            f"{tuple(x.shape)}; check how it was loaded or sliced"
        )
    rows = max(1, 2**20 // x[0].numel())  # at a time: a mask of all would be a quarter of x
    count, first = 0, None
    # numbers are kept, and no tensors: these lay in the gaps that the masks leave, and the next
    # masks, for which the gaps were too small then, would take new memory
    for i, part in enumerate(x.unsqueeze(-1).split(rows)):
        bad = ~torch.isfinite(part)
        number = int(bad.sum())
        if number > 0 and first is None:
            first = i * rows + int(bad.flatten(1).any(1).nonzero()[0])
        count += number
    if first is not None:
        raise ValueError(
            f"{argument} must be finite, got {count} NaN or infinite values, the first "
            f"in row {first} ({argument}[{first}]); remove or impute them"
        )
    return x


def require_mappable(array: np.memmap, argument: str) -> None:
    """Raise a ValueError unless rows of a mapped array are data that :func:`as_tensor` takes."""
    if array.dtype.kind not in "bf":
        raise _dtype_error(
            argument, array.dtype, ", or a torch Dataset whose items are so converted as they come"
        )
    if array.ndim == 0 or array.size == 0:
        raise ValueError(
            f"{argument} must have shape (N, ...) with N >= 1 and no empty dimension, got shape "
            f"{array.shape}; check how it was saved or sliced"
        )


def binarize(x: Tensor, seed: int = 0) -> Tensor:
    """Draw black-and-white images from grey ones, each pixel from Bernoulli(x).

    Shapes: x (N, ...) -> (N, ...), of zeros and ones. Units: x is a probability in [0, 1].

    Raises:
        ValueError: `x` has values outside [0, 1], or `as_tensor` refuses it.

    Source: Salakhutdinov & Murray 2008, "On the quantitative analysis of deep belief networks".

    Example:
        >>> binarize(torch.tensor([[0.0, 1.0]]))
        tensor([[0., 1.]])
    """
    x = as_tensor(x)
    _check_unit_interval(x)
    return (_uniform(x, seed) < x).to(x.dtype)


def dequantize(x: Tensor, levels: int, seed: int = 0) -> Tensor:
    """Spread each grey level evenly over its own interval: k / (levels - 1) -> (k + u) / levels.

    u ~ U[0, 1). A continuous density fitted to the result bounds the probability of the discrete
    pixels from below; fitted to the grey levels themselves, it could grow without limit.

    Shapes: x (N, ...) -> (N, ...). Units: x on the grid {0, 1, ..., levels - 1} / (levels - 1);
    the result is in [k / levels, (k + 1) / levels), so below 1.

    Raises:
        ValueError: `levels` is not a whole number >= 2, `x` is more than 1 % of a grey level off
            the grid or outside [0, 1], or `as_tensor` refuses it.

    Source: Theis, van den Oord & Bethge 2016, "A note on the evaluation of generative models".

    Example:
        >>> y = dequantize(torch.tensor([[0.0, 0.5, 1.0]]), levels=3)
        >>> (y * 3).floor()
        tensor([[0., 1., 2.]])
    """
    if not isinstance(levels, (int, np.integer)) or not 2 <= levels <= 2**53:
        raise ValueError(
            f"levels must be a whole number >= 2, the number of grey levels, got {levels!r}; "
            "8-bit images have 256"
        )
    x = as_tensor(x)
    _check_unit_interval(x)
    k = (x * (levels - 1)).round()
    off = (x * (levels - 1) - k).abs() > 0.01  # wider than float32 rounding, up to 16-bit images
    if off.any():
        raise ValueError(
            f"x must be on the grid k / (levels - 1) with levels = {levels}, got "
            f"{int(off.sum())} values off it, the first {x[off][0].item():.6g}; pass the data's "
            "own number of levels (data.levels), and data not yet dequantized or rescaled"
        )
    y = (k + _uniform(x, seed)) / levels
    # Rounding can carry k + u up to k + 1, and so y to 1.0; keep the interval half-open.
    return torch.minimum(y, torch.nextafter((k + 1) / levels, torch.zeros_like(y)))


def _load_digits() -> DataSplits:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    from sklearn.model_selection import (  # type: ignore[import-untyped, unused-ignore]
        train_test_split,
    )

    raw = load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
    labels = torch.as_tensor(raw.target, dtype=torch.int64)  # (1797,)

    rows = np.arange(len(labels))
    rest, test = train_test_split(rows, test_size=360, random_state=_SEED, stratify=raw.target)
    train, val = train_test_split(
        rest, test_size=180, random_state=_SEED, stratify=raw.target[rest]
    )
    return DataSplits(
        "digits",
        images[train],
        images[val],
        images[test],
        Labels(labels[train], labels[val], labels[test]),
        levels=17,
    )


def _load_patches() -> DataSplits:
    from sklearn.datasets import load_sample_images  # type: ignore[import-untyped, unused-ignore]

    photos = np.stack(load_sample_images().images)  # (2, 427, 640, 3) uint8
    luminance = photos @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 weights
    grey = luminance.round().astype(np.uint8)  # (2, 427, 640)

    rng = np.random.default_rng(_SEED)
    width = grey.shape[2]
    splits: list[Tensor] = []
    for (left, right), count in zip(_PATCH_BANDS, _PATCH_COUNTS, strict=True):
        # A vertical band of each photo per split: a patch never reaches over its band's edge.
        band = grey[:, :, int(left * width) : int(right * width)]
        # (2, rows, columns, 12, 12): a view of the patch at every place
        windows = np.lib.stride_tricks.sliding_window_view(band, (_PATCH, _PATCH), axis=(1, 2))
        places = windows.shape[:3]
        chosen = rng.choice(np.prod(places), size=count, replace=False)
        patches = windows[np.unravel_index(chosen, places)]  # (count, 12, 12)
        splits.append(_grey_images(patches))
    train, val, test = splits
    return DataSplits("patches", train, val, test, labels=None, levels=256)


def _load_idx(name: str, root: str | os.PathLike[str] | None) -> DataSplits:
    def read(filename: str) -> np.ndarray:
        path = _find_or_download(name, filename, root)
        return _read_idx(path, _SOURCES[name].md5[filename][1], name)

    train_images = _grey_images(read("train-images-idx3-ubyte.gz"))  # (60000, 1, 28, 28)
    train_labels = torch.from_numpy(read("train-labels-idx1-ubyte.gz").astype(np.int64))
    test_images = _grey_images(read("t10k-images-idx3-ubyte.gz"))  # (10000, 1, 28, 28)
    test_labels = torch.from_numpy(read("t10k-labels-idx1-ubyte.gz").astype(np.int64))
    return DataSplits(
        name,
        train_images[:-_IDX_VAL],
        train_images[-_IDX_VAL:],
        test_images,
        Labels(train_labels[:-_IDX_VAL], train_labels[-_IDX_VAL:], test_labels),
        levels=256,
    )


def _grey_images(pixels: np.ndarray) -> Tensor:
    """Turn (N, height, width) 8-bit pixels into (N, 1, height, width) intensities in [0, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1) / 255


def _read_idx(path: Path, md5: str, name: str) -> np.ndarray:
    """Read a gzipped idx file: 3 bytes of type, 1 of rank, rank big-endian sizes, the bytes."""
    try:
        with gzip.open(path) as file:
            raw = file.read(_IDX_MOST)  # a bomb would go on
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raw = b""  # of no data set
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} must unpack to the {name} file with md5 {md5}, got {found}; it is damaged or "
            f"from another data set; delete it, or replace it with {_SOURCES[name].url}{path.name}"
        )
    rank = raw[3]
    sizes = np.frombuffer(raw, dtype=">u4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(sizes.tolist())


def _find_or_download(name: str, filename: str, root: str | os.PathLike[str] | None) -> Path:
    source = _SOURCES[name]
    folders: list[Path] = []
    if root is not None:
        folders = [Path(root).expanduser() / name, Path(root).expanduser()]
    elif os.environ.get("PROBAE_DATA"):
        folders = [Path(os.environ["PROBAE_DATA"]).expanduser() / name]

    for folder in folders:
        if (folder / filename).is_file():
            return folder / filename

    # pooch keeps a cached file whose checksum is right, and moves a download into the cache only
    # once its checksum is.
    cache = Path(pooch.os_cache("probae")) / name
    try:
        return Path(
            pooch.retrieve(
                source.url + filename,
                known_hash=f"md5:{source.md5[filename][0]}",
                fname=filename,
                path=cache,
            )
        )
    except (OSError, ValueError) as error:  # no connection, an HTTP status, a wrong checksum
        searched = ", ".join(str(folder) for folder in [*folders, cache])
        raise OSError(
            f"{name} could not be loaded: {filename} is not in {searched}, and the download of "
            f"{source.url}{filename} failed ({error}); check the connection, or set PROBAE_DATA "
            f"to a folder holding {name}/{filename} and its three companions"
        ) from error


def is_file(path: Path) -> bool:
    """Whether there is such a file; no error for a name that none can have."""
    return os.path.isfile(path)


def is_large_file(path: Path) -> bool:
    """Whether a file is an array that is better mapped than read."""
    return path.suffix.lower() == ".npy" and is_file(path) and path.stat().st_size > LARGE


def read_array(path: Path, argument: str, mapped: bool = False) -> np.ndarray:
    """Return the array in a .npy or .npz file, ``mapped`` or read; nothing is ever unpickled."""
    if path.suffix.lower() not in (".npy", ".npz"):
        hint = f"; for the data set use load_dataset({str(path)!r}).train"
        raise ValueError(
            f"{argument} must be the path of a .npy or .npz file, got {str(path)!r}"
            + (hint if str(path) in DATASET_NAMES else "; save it with numpy.save")
        )
    if not is_file(path):
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r}; check the path")
    names: list[str] = []
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
            file.seek(0)
            if not is_archive:
                _require_whole(file, path.stat().st_size)
        if not is_archive:
            return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            _require_plain_names(names)
            name = names[0] if len(names) == 1 else "x"
            if name in names:
                return _read_member(archive, name)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # numpy and zipfile raise ten unrelated types on damaged files
        raise ValueError(
            f"{argument}: {str(path)!r} cannot be read, it is damaged or holds Python objects "
            f"({error}); save it again with numpy.save or numpy.savez from a numeric array"
        ) from error
    raise ValueError(
        f"{argument}: {str(path)!r} must hold one array, or one named 'x', got {names}; "
        "pass the array itself, or save it under the name 'x'"
    )


def _require_whole(file: IO[bytes], size: int) -> None:
    """Raise a ValueError unless the header of a .npy file tells of as many bytes as there are.

    So nothing is allocated for a header that lies.
    """
    readers: Any = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the format is not one of {list(readers)}")
    try:
        shape, _, dtype = readers[version](file)
    except MemoryError as error:  # of Python's parser, on brackets within brackets
        raise ValueError("its header cannot be parsed") from error
    if dtype.hasobject:
        raise ValueError("its items are Python objects")
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected != size - file.tell():
        raise ValueError(
            f"its header tells of {expected} bytes, shape {shape} of {dtype}, and "
            f"{size - file.tell()} follow"
        )


def _require_plain_names(names: list[str]) -> None:
    """Raise a ValueError where a member's name is a way out of a folder, or comes twice."""
    for name in names:
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
            raise ValueError(f"the name {name!r} in it is no plain name")
    if len(set(names)) < len(names):
        raise ValueError("a name comes twice in it")


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array of an archive; zipfile compares its checksum once all is read."""
    entry = next(e for e in archive.infolist() if e.filename.removesuffix(".npy") == name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is compressed in a way that numpy does not use")
    if entry.file_size > DEFLATED * max(entry.compress_size, 1):
        raise ValueError(f"{name!r} cannot have {entry.file_size} bytes")
    with archive.open(entry) as member:
        _require_whole(member, entry.file_size)
    with archive.open(entry) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError(f"{name!r} has bytes beyond its array")
        return array


def _stack_items(dataset: Dataset[object], argument: str) -> Tensor:
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise ValueError(
            f"{argument} must be a map-style Dataset (with __len__ and __getitem__), got "
            f"{type(dataset).__name__}; collect its items with torch.stack(list(dataset)) first"
        )
    items: list[Tensor] = []
    for i in range(len(dataset)):
        item = dataset[i]
        if isinstance(item, (tuple, list)) and item:
            item = item[0]
        if isinstance(item, np.ndarray):
            item = torch.as_tensor(item)
        if not isinstance(item, Tensor):
            raise ValueError(
                f"{argument}[{i}] must be a tensor or a tuple that begins with one, got "
                f"{type(item).__name__}; give the Dataset a transform to tensors"
            )
        if items and (item.shape, item.dtype) != (items[0].shape, items[0].dtype):
            raise ValueError(
                f"{argument}[{i}] must be like {argument}[0], {tuple(items[0].shape)} "
                f"{items[0].dtype}, got {tuple(item.shape)} {item.dtype}; crop, pad or convert "
                "the items in the Dataset"
            )
        items.append(item)
    return torch.stack(items) if items else torch.empty(0)


def _dtype_error(argument: str, dtype: np.dtype | torch.dtype, more: str = "") -> ValueError:
    if "int" in str(dtype):
        fix = f"convert it with {argument}.float() (NumPy: {argument}.astype('float32')), and "
        fix += "divide 8-bit images by 255"
    else:
        fix = "pass real numbers, for example as float32"
    return ValueError(f"{argument} must be floating-point or bool, got {dtype}; {fix}{more}")


def _check_unit_interval(x: Tensor) -> None:
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"x must be in [0, 1], got values from {low:.6g} to {high:.6g}; rescale it, 8-bit "
            "images with x / 255"
        )


def _uniform(x: Tensor, seed: int) -> Tensor:
    """U[0, 1) like x; drawn on the CPU so that a seed means the same on every device."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an int of 64 bits, got {seed!r}")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
