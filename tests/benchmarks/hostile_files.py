"""Damaged and hostile files: is each of many refused by name, or read as it was written?

Files that probae wrote (pairs, a run and its data, arrays, a data set in MNIST's format, and a
checkpoint) are damaged at random: cut off, bits flipped, blocks moved, numbers of JSON
replaced, headers that lie, and whole files replaced by ones that unpickling would execute. What is
read must be bit for bit what was written, unless the file is refused with one of probae's errors.
A recipe whose checksum was made anew, as by an attacker, may be read as the pair it describes.

    python -m tests.benchmarks.hostile_files --number 10000
"""

from __future__ import annotations

import argparse
import ast
import base64
import collections
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

import probae
from probae import checkpoints, cli, datasets, files, runs, saving
from probae.autoencoder import Autoencoder

ERRORS = (ValueError, FileNotFoundError, PermissionError)
HOSTILE_EVENTS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
SEEN: list[str] = []  # of these events, while a file is read
WATCHING = [False]


def watch(event: str, arguments: Any) -> None:
    """Take note of what unpickling or a shell would do."""
    if WATCHING[0] and event in HOSTILE_EVENTS:
        SEEN.append(event)


class Canary:
    """Leaves a file behind where it is unpickled."""

    place = Path(tempfile.gettempdir()) / f"probae-canary-{os.getpid()}"

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.place}",)


class Target(NamedTuple):
    """Files that belong together, and how they are read."""

    name: str
    folder: Path
    files: tuple[str, ...]  # those that are damaged
    read: Callable[[Path], Any]  # folder -> something that compares equal if all is as it was
    faithful: Callable[[Path], bool] = lambda folder: False  # of one that was made anew


def print_of(pair: Autoencoder) -> Any:
    """Return all of a pair that its files say."""
    tensors = {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        if t.numel() and t.dim()
        else t.tolist()
        for name, t in pair.state_dict().items()
    }
    return type(pair).__name__, saving._recipe(pair), tensors


def as_described(folder: Path) -> bool:
    """Whether a pair is the one that its recipe describes, with the tensors of its file."""
    pair = probae.load(folder)
    recipe = json.loads((folder / saving.RECIPE).read_text())
    saved = files.parse_tensors((folder / saving.TENSORS).read_bytes(), folder)
    state = pair.state_dict()
    found = _with_floats(saving._plain(saving._describe(pair, {})))
    said = _with_defaults(recipe["pair"], found)
    return found == said and all(torch.equal(state[name], t) for name, t in saved.items())


def _with_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return float(value) if type(value) is int else value


def _with_defaults(said: Any, found: Any) -> Any:
    """Return what a recipe says, with the defaults of arguments that it leaves out."""
    if isinstance(said, dict) and "arguments" in said and isinstance(found, dict):
        own = found.get("arguments", {})
        arguments = {k: _with_defaults(v, own.get(k)) for k, v in said["arguments"].items()}
        return {"class": said["class"], "arguments": {**own, **arguments}}
    return _with_floats(said)


def pairs() -> Iterator[tuple[str, Autoencoder]]:
    """Return pairs of many classes, small ones."""
    yield "vae", probae.VAE((1, 3, 3), 2, hidden=(5,))
    yield "ppca", probae.PPCA(5, 2).double()
    yield "sparse", probae.SparseAutoencoder(6, 4, rate=0.5, likelihood="bernoulli")
    yield "denoising", probae.DenoisingVAE(6, 2, corruption=probae.Masking(0.3), hidden=(4,))
    encoder = probae.GaussianEncoder(probae.MLP(6, (2, 2), (4,)))
    decoder = probae.BernoulliDecoder(probae.MLP(2, 6))
    yield "vamp", Autoencoder(probae.VampPrior(encoder, 6, components=3), encoder, decoder)


def make_targets(root: Path) -> list[Target]:
    """Write every kind of file that probae reads."""
    torch.manual_seed(0)
    targets = []
    for name, pair in pairs():
        folder = probae.save(pair, root / name)
        both = (saving.RECIPE, saving.TENSORS)
        targets.append(
            Target(name, folder, both, lambda path: print_of(probae.load(path)), as_described)
        )
    folder = root / "arrays"
    folder.mkdir()
    x = np.random.default_rng(0).random((40, 4), dtype=np.float32)
    np.save(folder / "x.npy", x)
    np.savez(folder / "x.npz", x=x, y=np.zeros(3))
    np.savez_compressed(folder / "one.npz", x=x.astype(np.float64))
    for name in ("x.npz", "one.npz", "x.npy"):
        targets.append(Target(f"array {name}", folder, (name,), read_array(name), own_bytes))
    targets += [dataset_target(root), *run_targets(root, x), *checkpoint_targets(root)]
    return targets


def read_array(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        x = probae.as_tensor(folder / name)
        return tuple(x.shape), str(x.dtype), x.numpy().tobytes()

    return read


def own_bytes(folder: Path) -> bool:
    """Whether a .npy file, which has no checksum, is read as the bytes that stand in it."""
    content = (folder / "x.npy").read_bytes()
    length = int.from_bytes(content[8:10], "little")
    header = ast.literal_eval(content[10 : 10 + length].decode()) if content[6] == 1 else None
    if header is None:
        return False
    order = "F" if header["fortran_order"] else "C"
    values = np.frombuffer(content[10 + length :], np.dtype(header["descr"]))
    x = probae.as_tensor(folder / "x.npy").numpy()
    return bool(np.array_equal(x, values.reshape(header["shape"], order=order)))


def dataset_target(root: Path) -> Target:
    """Write a data set in MNIST's format."""
    folder = root / "idx"
    folder.mkdir()
    generator, md5 = np.random.default_rng(0), {}
    for part, count in (("train", 5_020), ("t10k", 7)):
        images = generator.integers(0, 256, (count, 2, 2), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", images[:, 0, 0] % 10)):
            raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw += np.ascontiguousarray(array).tobytes()
            packed = gzip.compress(raw, compresslevel=1, mtime=0)
            file = f"{part}-{name}-ubyte.gz"
            (folder / file).write_bytes(packed)
            md5[file] = tuple(hashlib.md5(c).hexdigest() for c in (packed, raw))
    source = datasets._Source("http://127.0.0.1:1/", md5)

    def read(path: Path) -> Any:
        with mock.patch.dict(datasets._SOURCES, {"mnist": source}):
            data = probae.load_dataset("mnist", root=path)
        labels = [*(data.labels or [])]
        return [tensor.numpy().tobytes() for tensor in (*data[1:4], *labels)]

    return Target("data set", folder, tuple(md5), read)


def run_targets(root: Path, x: np.ndarray) -> list[Target]:
    """Fit a run on an array."""
    folder = root / "run"
    folder.mkdir()
    data = root / "run" / "data.npy"
    np.save(data, x)
    command = f"fit vae --data {data} --out {folder / 'fit'} --epochs 1 --z-dim 2 --hidden 4"
    with contextlib.redirect_stdout(io.StringIO()):
        if cli.main([*command.split(), "--quiet"]) != 0:
            raise RuntimeError(f"{command} failed")
    for file in (folder / "fit").iterdir():
        shutil.move(file, folder / file.name)
    which = SimpleNamespace(data=None, split="test", limit=None)

    def read(path: Path) -> Any:
        pair, record = runs.load_run(path, "cpu")
        record["data"]["path"] = str(path / "data.npy")
        test = cli._select(which, record)[0]  # type: ignore[arg-type]
        record["data"]["path"] = str(data)
        return print_of(pair), record, test.numpy().tobytes()

    pair = probae.load(folder)
    ll = probae.log_likelihood(pair, torch.as_tensor(x).round(), "elbo", 2, seed=0)
    runs.append_evaluation(folder, {"split": "test"}, ll, "")

    def read_evaluation(path: Path) -> Any:
        file = path / runs.EVALUATION
        before = file.read_bytes()
        try:
            runs.append_evaluation(path, {"split": "val"}, ll, "")
            return json.loads(file.read_text())[:-1]
        finally:
            file.write_bytes(before)

    def as_recorded(path: Path) -> bool:
        record = runs.load_run(path, "cpu")[1]
        return record == json.loads((path / runs.RUN_FILE).read_text()) and as_described(path)

    whole = (runs.RUN_FILE, saving.RECIPE, saving.TENSORS, "data.npy")
    return [
        Target("run", folder, whole, read, as_recorded),
        Target("evaluation", folder, (runs.EVALUATION,), read_evaluation),
    ]


def checkpoint_targets(root: Path) -> list[Target]:
    """Write a checkpoint of a training."""
    folder = root / "checkpoint"
    pair = probae.VAE(6, 2, hidden=(4,))
    optimizer = torch.optim.Adam(pair.parameters())
    pair.decoder(torch.zeros(3, 2)).log_prob(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    state = {"pair": pair.state_dict(), "optimizer": optimizer.state_dict(), "loss": math.nan}
    file = checkpoints.place(folder)
    checkpoints.write(file, {**state, "random": torch.get_rng_state(), "order": torch.randperm(9)})
    return [Target("checkpoint", folder, (file.name,), lambda _: _plain(checkpoints.read(file)))]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), repr(value.tolist())
    if isinstance(value, dict):
        return [(key, _plain(value[key])) for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)


Random = np.random.Generator


def cut_off(content: bytes, rng: Random) -> bytes:
    return content[: rng.integers(len(content))]


def flip_bit(content: bytes, rng: Random, number: int = 1) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(len(content), size=number):
        changed[place] ^= 1 << rng.integers(8)
    return bytes(changed)


def flip_bits(content: bytes, rng: Random) -> bytes:
    return flip_bit(content, rng, int(rng.integers(2, 64)))


def flip_in_header(content: bytes, rng: Random) -> bytes:
    start = min(len(content), 200)
    return flip_bit(content[:start], rng, int(rng.integers(1, 4))) + content[start:]


def replace_bytes(content: bytes, rng: Random) -> bytes:
    start = rng.integers(len(content))
    return content[:start] + rng.bytes(int(rng.integers(1, 64))) + content[start + 8 :]


def insert_bytes(content: bytes, rng: Random) -> bytes:
    start = rng.integers(len(content) + 1)
    return content[:start] + rng.bytes(int(rng.integers(1, 32))) + content[start:]


def delete_bytes(content: bytes, rng: Random) -> bytes:
    start = rng.integers(len(content))
    return content[:start] + content[start + rng.integers(1, 64) :]


def zero_block(content: bytes, rng: Random) -> bytes:
    start, length = rng.integers(len(content)), int(rng.integers(1, 512))
    return (content[:start] + bytes(length) + content[start + length :])[: len(content)]


def swap_blocks(content: bytes, rng: Random) -> bytes:
    a, b, c = sorted(rng.integers(len(content) + 1, size=3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def append_bytes(content: bytes, rng: Random) -> bytes:
    return content + (rng.bytes(int(rng.integers(1, 64))) if rng.random() < 0.5 else content)


def lie_about_length(content: bytes, rng: Random) -> bytes:
    lengths = (0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, len(content) * 2)
    length = lengths[rng.integers(len(lengths))]
    return length.to_bytes(8, "little") + content[8:]


def random_file(content: bytes, rng: Random) -> bytes:
    return rng.bytes(int(rng.integers(0, 2000)))


NUMBERS = (b"1e999", b"-1e999", b"NaN", b"Infinity", b"-1", b"0", b"1e308", b"5e-324", b"9" * 5000)
VALUES = (*NUMBERS, b"100000000000", b"2000000", b"null", b"true", b'"x"', b"[]", b"{}", b"[[]]")


def replace_value(content: bytes, rng: Random) -> bytes:
    """Replace a number of JSON, or of a header, by another value."""
    places = [i for i in range(1, len(content)) if content[i : i + 1].isdigit()]
    places = [i for i in places if not content[i - 1 : i].isalnum()]
    if not places:
        return random_file(content, rng)
    start = end = int(rng.choice(places))
    while content[end : end + 1].isdigit() or content[end : end + 1] in (b".", b"e", b"-"):
        end += 1
    return content[:start] + VALUES[rng.integers(len(VALUES))] + content[end:]


def nest(content: bytes, rng: Random) -> bytes:
    depth = int(rng.choice([100, 10_000, 1_000_000]))
    opening = [b"[", b'{"a":', b'{"class": "VAE", "arguments": {"x_dim":'][rng.integers(3)]
    return opening * depth if rng.random() < 0.5 else opening * depth + content


def duplicate_key(content: bytes, rng: Random) -> bytes:
    place = content.find(b'"', int(rng.integers(len(content))))
    keys = (b"format", b"pair", b"dtype", b"sha256", b"class", b"x", b"__metadata__")
    key = b'"' + keys[rng.integers(len(keys))] + b'": '
    return content[:place] + key + VALUES[rng.integers(len(VALUES))] + b", " + content[place:]


def white_space(content: bytes, rng: Random) -> bytes:
    """Change what does not count in JSON; of other files, nothing."""
    try:
        text = json.dumps(json.loads(content), indent=int(rng.integers(8)))
    except ValueError:
        return content
    return f"\n\t {text} \r\n".encode()


def canary(content: bytes, rng: Random) -> bytes:
    """Replace the file by one that unpickling executes."""
    stream = io.BytesIO()
    objects = np.array([Canary()], dtype=object)
    form = rng.integers(6)
    if form == 0:
        return pickle.dumps(Canary())
    if form == 1:
        np.save(stream, objects, allow_pickle=True)
    elif form == 2:
        np.savez(stream, x=objects)  # numpy pickles arrays of objects unless told otherwise
    elif form == 3:
        torch.save({"x": Canary()}, stream)
    elif form == 4:
        text = base64.b64encode(pickle.dumps(Canary())).decode()
        record = {"py/reduce": ["os.system", "x"], "__reduce__": text, "class": "os.system"}
        return json.dumps(record | {"format": saving.FORMAT, "pair": record}).encode()
    else:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../x.npy", content)
            archive.writestr("x/data.pkl", pickle.dumps(Canary()))
    return stream.getvalue()


def seal_anew(content: bytes, rng: Random) -> bytes:
    """Change a record in one place, and make its checksum anew, as an attacker would."""
    try:
        record = json.loads(content)
    except ValueError:
        return replace_value(content, rng)
    record = record if isinstance(record, dict) else {"x": record}
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        if not isinstance(value, dict | list):
            return
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            visit(value[key])

    visit(record)
    holder, key = places[rng.integers(len(places))]
    others = (-1, 0, 1, 2, 3, 7, 10**6, 10**11, 10**30, 1.5, 1e308, 5e-324, True, None, "", "relu")
    names = tuple(saving.CLASSES)
    parts: tuple[Any, ...] = tuple({"class": name, "arguments": {}} for name in names)
    choice = (*others, "gaussian", "os.system", "flow", [], {}, [2], [10**9, 10**9], [3] * 5_000)
    holder[key] = [*choice, *names, *parts, {"ref": 0}, {"dict": {}}][
        rng.integers(len(choice) + 2 * len(names) + 2)
    ]
    return json.dumps(files.sealed(record)).encode()


MUTATIONS = (
    cut_off,
    flip_bit,
    flip_bits,
    flip_in_header,
    replace_bytes,
    insert_bytes,
    delete_bytes,
    zero_block,
    swap_blocks,
    append_bytes,
    lie_about_length,
    random_file,
    replace_value,
    nest,
    duplicate_key,
    white_space,
    canary,
    seal_anew,
)


def outcome(target: Target, file: str, mutated: bytes, expected: Any, made_anew: bool) -> str:
    """Read damaged files, and say what came of it."""
    path = target.folder / file
    original = path.read_bytes()
    path.write_bytes(mutated)
    try:
        WATCHING[0] = True
        try:
            found = target.read(target.folder)
        finally:
            WATCHING[0] = False
        if found == expected:
            return "read as written"
        if (made_anew or path.suffix == ".npy") and target.faithful(target.folder):
            return "read as it says"
        return "WRONG"
    except ERRORS as error:
        named = file.split(".")[0] in str(error) or str(target.folder) in str(error)
        return f"refused, {type(error).__name__}" if named else f"UNNAMED: {error!r}"
    except Exception as error:
        return f"CRASH: {error!r}"
    finally:
        path.write_bytes(original)


def benchmark(number: int, seed: int = 0, tell: Callable[..., None] = print) -> dict[str, Any]:
    """Damage so many files, and count what comes of it."""
    sys.addaudithook(watch)
    SEEN.clear()
    rng = np.random.default_rng(seed)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    by_target: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        targets = make_targets(Path(name))
        expected = {target.name: target.read(target.folder) for target in targets}
        places = [(target, file) for target in targets for file in target.files]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for step in range(number):
            target, file = places[step % len(places)]
            mutate = MUTATIONS[step // len(places) % len(MUTATIONS)]
            content = mutate((target.folder / file).read_bytes(), rng)
            start = time.perf_counter()
            result = outcome(target, file, content, expected[target.name], mutate is seal_anew)
            slowest = max(slowest, time.perf_counter() - start)
            kind = result.split(":")[0]
            counts[mutate.__name__][kind] += 1
            by_target[f"{target.name}: {file}"][kind] += 1
            if kind in ("WRONG", "UNNAMED", "CRASH"):
                faults.append(f"{step} {mutate.__name__} of {target.name} {file}: {result[:300]}")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    if Canary.place.exists():
        Canary.place.unlink()
        SEEN.append("canary")
    result = {
        "number": number,
        "seed": seed,
        "faults": faults,
        "executed": [*SEEN],
        "mutations": {name: dict(counter) for name, counter in counts.items()},
        "files": {name: dict(counter) for name, counter in by_target.items()},
        "slowest_seconds": slowest,
        "peak_memory_grown_mib": grown / 1024,
    }
    table(tell, "mutation", result["mutations"])
    table(tell, "file", result["files"])
    tell(
        f"{number} files, {len(faults)} faults, {len(SEEN)} executions; slowest {slowest:.2f} s, "
        f"peak memory grew by {grown / 1024:.0f} MiB"
    )
    for fault in faults[:50]:
        tell(fault)
    return result


def table(tell: Callable[..., None], title: str, rows: dict[str, dict[str, int]]) -> None:
    """Print counts."""
    columns = sorted({name for row in rows.values() for name in row})
    tell(f"{title:34}" + "".join(f"{name:>28}" for name in columns))
    for name, row in rows.items():
        tell(f"{name:34}" + "".join(f"{row.get(column, 0):28}" for column in columns))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    args = parser.parse_args(arguments)
    result = benchmark(args.number, args.seed)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
