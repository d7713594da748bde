"""Tests of the command line: what it prints, writes, refuses, and leaves behind."""

import contextlib
import doctest
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA  # type: ignore[import-untyped, unused-ignore]

import probae
from probae import checkpoints, cli
from probae import files as probae_files
from probae.demo import _independent_bernoulli

DATA = Path(os.environ.get("PROBAE_DATA") or Path(__file__).resolve().parents[2] / "shared/data")
RUN_FILES = ["history.json", "loss.png", "pair.json", "pair.safetensors", "run.json"]
PICTURES = ["reconstructions.png", "samples.png"]
FAST = ["--hidden", "16", "--z-dim", "2", "--epochs", "2", "--quiet"]


class Result(NamedTuple):
    status: int
    out: str
    err: str


STARTS = ("prior", "encoder")


def probae_cli(*arguments: object) -> Result:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Result(status, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    result = probae_cli(*arguments)
    assert result.status == 0, result.err
    assert result.err == ""
    return result.out


def fail(*arguments: object) -> str:
    """Return the error of a command, which has to be one line and nothing else."""
    result = probae_cli(*arguments)
    assert result.status == 2, result.out
    assert result.err.startswith("probae: error: ")
    assert result.err.count("\n") == 1
    return result.err


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_picture(file: Path) -> None:
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        assert all(200 < side < 3000 for side in image.size)
        assert image.convert("L").getextrema()[0] < 100, "a blank sheet"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data files."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    vectors = rng.normal(size=(103, 2)) @ rng.normal(size=(2, 5)) + 0.1 * rng.normal(size=(103, 5))
    np.save(folder / "vectors.npy", vectors + np.arange(103)[:, None])  # each row tells its index
    np.savez(folder / "colours.npz", x=rng.random((50, 3, 6, 5), dtype=np.float32))
    np.save(folder / "levels.npy", rng.integers(0, 4, (50, 4, 4)) / 3)
    np.save(folder / "bits.npy", rng.random((50, 4, 4)).round())
    np.save(folder / "few.npy", np.zeros((9, 3)))
    np.save(folder / "numbers.npy", np.zeros(50))
    np.save(folder / "bytes.npy", np.zeros((50, 4), dtype=np.uint8))
    (folder / "damaged.npy").write_bytes(b"\x93NUMPY nothing")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a VAE on digits, made by probae fit."""
    run = tmp_path_factory.mktemp("runs") / "vae"
    succeed("fit", "vae", "--data", "digits", "--out", run, *FAST)
    return run


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Path:
    """A run of PPCA on a file of vectors."""
    run = tmp_path_factory.mktemp("runs") / "vectors"
    data = files / "vectors.npy"
    succeed("fit", "ppca", "--data", data, "--z-dim", 2, "--seed", 3, "--out", run, "--quiet")
    return run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that probae demo wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "probae-demo"
    return folder, succeed("demo", "--out", folder)


def test_demo_writes_runs_and_pictures(demo: tuple[Path, str]) -> None:
    folder, out = demo
    run = ["history.json", "pair.json", "pair.safetensors", "run.json", "evaluation.json"]
    expected = ["demo.json", "loss.png", *PICTURES]
    expected += [f"vae/{name}" for name in run]
    expected += [f"ppca/{name}" for name in (*run, "loss.png", *PICTURES)]
    assert names_in(folder) == sorted(expected)
    assert all(f"  {name}\n" in out for name in expected)
    for file in folder.rglob("*.png"):
        check_picture(file)
    assert probae.load(folder / "vae").x_shape == (1, 8, 8)
    assert len(read(folder / "vae/history.json")["loss"]) == 60


def test_demo_prints_every_row_with_its_error_and_its_claim(demo: tuple[Path, str]) -> None:
    folder, out = demo
    record = read(folder / "demo.json")
    rows = record["binary"] + record["real_valued"]
    assert len(rows) == 7
    for row in rows:
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {row['model']} "))
        numbers = f"{row['nats_per_datum']:.3f}", f"{row['std_error']:.3f}"
        assert line.split()[-len(row["claim"].split()) :] == row["claim"].split()
        assert all(number in line for number in numbers)
        assert 0 < row["std_error"] < 2
    assert "nats per datum" in out
    assert out.rstrip().endswith("s in all")


def test_demo_relations_between_the_numbers(demo: tuple[Path, str]) -> None:
    record = read(demo[0] / "demo.json")
    value = {row["model"]: row["nats_per_datum"] for row in record["binary"]}
    independent, elbo, iwae = value.values()
    assert independent + 3 < elbo < iwae, "the VAE models what pixels have in common"
    value = {row["model"]: row["nats_per_datum"] for row in record["real_valued"]}
    diagonal, svi, exact, sklearn = value.values()
    assert diagonal + 3 < exact
    assert abs(svi - exact) < 0.2
    assert abs(sklearn - exact) < 0.02, "1/(N-1) in place of 1/N in the covariance"
    training = record["ppca_on_training_data"]
    assert 0 < training["exact_maximum"] - training["svi"] < 0.05


def test_demo_baselines_are_what_they_say(demo: tuple[Path, str]) -> None:
    record = read(demo[0] / "demo.json")
    digits = probae.load_dataset("digits")
    x = probae.binarize(digits.test, seed=0).flatten(1).double().numpy()
    p = (digits.train.flatten(1).double().numpy().sum(0) + 1) / (1257 + 2)
    values = (x * np.log(p) + (1 - x) * np.log(1 - p)).sum(1)
    assert record["binary"][0]["nats_per_datum"] == pytest.approx(values.mean(), abs=1e-6)
    expected = values.std(ddof=1) / math.sqrt(360)
    assert record["binary"][0]["std_error"] == pytest.approx(expected, abs=1e-6)
    y = probae.dequantize(digits.test, 17, seed=0).flatten(1).double().numpy()
    train = probae.dequantize(digits.train, 17, seed=1).flatten(1).double().numpy()
    mean, var = train.mean(0), train.var(0)
    values = -0.5 * ((y - mean) ** 2 / var + np.log(2 * np.pi * var)).sum(1)
    assert record["real_valued"][0]["nats_per_datum"] == pytest.approx(values.mean(), abs=1e-6)
    expected = PCA(32, svd_solver="full").fit(train).score(y)
    assert record["real_valued"][3]["nats_per_datum"] == pytest.approx(expected, abs=1e-6)


def test_demo_is_its_printed_commands_step_by_step(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, out = demo
    record, copy = read(folder / "demo.json"), shutil.copytree(folder, tmp_path / "copy")
    commands = [line.split()[2:] for line in out.splitlines() if line.startswith("$ probae fit")]
    for name, command in zip(("vae", "ppca"), commands, strict=True):
        options = vars(cli._parser().parse_args(command))
        options = {**options, "out": str(options["out"])}
        del options["command"]
        assert read(folder / name / "run.json")["options"] == options
    before = read(copy / "vae/evaluation.json")
    shown = succeed("evaluate", copy / "vae", "--method", "elbo")
    assert f"{record['binary'][1]['nats_per_datum']:.4f} ±" in shown
    assert "binarised once" in shown
    assert len(read(copy / "vae/evaluation.json")) == len(before), "the same evaluation, once"
    shown = succeed("evaluate", copy / "ppca")
    assert f"{record['real_valued'][1]['nats_per_datum']:.4f} ±" in shown
    assert "(exact)" in shown
    assert "dequantised once" in shown


def test_demo_is_not_written_over_without_leave(demo: tuple[Path, str], tmp_path: Path) -> None:
    assert "pass --overwrite" in fail("demo", "--out", demo[0])
    (tmp_path / "mine.txt").write_text("notes")
    error = fail("demo", "--out", tmp_path, "--overwrite")
    assert "is not empty and holds no earlier run" in error


def test_fit_writes_a_whole_run(vae: Path) -> None:
    assert names_in(vae) == sorted([*RUN_FILES, *PICTURES])
    for name in ("loss.png", *PICTURES):
        check_picture(vae / name)
    record = read(vae / "run.json")
    assert record["version"] == probae.__version__
    assert record["options"]["hidden"] == [16]
    assert record["data"] == {"name": "digits", "sizes": [1257, 180, 360]}
    assert record["binarize"] is True
    assert (record["kind"], record["objective"]) == ("ELBO", "ELBO")
    assert record["kl_method"] == {"z": "analytic"}
    assert record["bound_on"] == "log p(x)"
    assert record["best_epoch"] in (1, 2)
    assert record["seconds"] > 0
    history = read(vae / "history.json")
    assert len(history["val_loss"]) == 2
    assert probae.load(vae).kind is probae.Kind.ELBO


def test_fit_is_reproducible_and_leaves_the_random_stream(vae: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    succeed("fit", "vae", "--data", "digits", "--out", tmp_path / "again", *FAST)
    assert torch.equal(torch.get_rng_state(), state)
    a, b = probae.load(vae), probae.load(tmp_path / "again")
    assert all(torch.equal(a.state_dict()[name], t) for name, t in b.state_dict().items())


def test_fit_says_what_it_did(tmp_path: Path) -> None:
    out = succeed(
        *("fit", "undercomplete", "--data", "digits", "--out", tmp_path / "run", *FAST[:-1])
    )
    assert "1257 training, 180 validation, 360 test data of shape (1, 8, 8)" in out
    assert "without a proper prior there is no p(x)" in out
    assert names_in(tmp_path / "run") == sorted([*RUN_FILES, "reconstructions.png"])
    assert "samples.png" not in out


def test_fit_takes_every_training_option(tmp_path: Path) -> None:
    options = "--objective iwae --num-particles 3 --dreg --batch-size 200 --lr 0.01 --patience 1"
    options += " --schedule cosine --channels 4 --activation tanh --prior mixture --no-validation"
    run = tmp_path / "run"
    error = fail("fit", "vae", "--data", "digits", "--out", run, *FAST, *options.split())
    assert "patience needs validation data" in error
    options = options.replace("--no-validation", "")
    succeed("fit", "vae", "--data", "digits", "--out", run, *FAST, *options.split())
    pair = probae.load(run)
    assert isinstance(pair.prior, probae.GaussianMixturePrior)
    assert any(isinstance(module, probae.ConvNet) for module in pair.modules())
    assert read(run / "run.json")["objective"] == "IWAE"
    options = "--beta 0.5 --warmup 2 --no-validation --no-binarize --overwrite"
    succeed("fit", "vae", "--data", "digits", "--out", run, *FAST, *options.split())
    history, record = read(run / "history.json"), read(run / "run.json")
    assert history["beta"] == [0.25, 0.5]
    assert "val_loss" not in history
    assert (record["best_epoch"], record["binarize"]) == (2, False)
    assert "x is grey" in record["bound_on"]


def test_likelihood_options_and_grey_levels(tmp_path: Path, files: Path) -> None:
    logistic = ["--likelihood", "discretized-logistic"]
    succeed("fit", "vae", "--data", "digits", "--out", tmp_path / "a", *FAST, *logistic)
    assert probae.load(tmp_path / "a").decoder.levels == 17
    assert "note" not in succeed("evaluate", tmp_path / "a", "-k", 2, "--limit", 3)
    data = ["--data", files / "levels.npy"]
    levels = ["--likelihood-option", "levels=4", "--likelihood-option", "scale_min=0.01"]
    succeed("fit", "vae", *data, "--out", tmp_path / "b", *FAST, *logistic, *levels)
    decoder = probae.load(tmp_path / "b").decoder
    assert (decoder.levels, decoder.scale_min) == (4, 0.01)
    gaussian = ["--likelihood", "gaussian", "--likelihood-option", "learn_scale=true"]
    succeed("fit", "vae", "--data", "digits", "--out", tmp_path / "c", *FAST, *gaussian)
    assert "can grow without limit" in succeed("evaluate", tmp_path / "c", "-k", 2)
    more = [*gaussian, "--dequantize", 4]
    succeed("fit", "vae", *data, "--out", tmp_path / "d", *FAST, *more)
    assert read(tmp_path / "d/run.json")["dequantize"] == 4
    out = succeed("evaluate", tmp_path / "d", "-k", 2)
    bits, grey = (float(line.split(":")[-1].split("at most")[-1].split()[0])
                  for line in out.splitlines()[2:4])  # fmt: skip
    assert grey == pytest.approx(bits + 2, abs=2e-4), "log2 4 bits more than the density's"


def test_colours_and_other_ranges_are_drawn(tmp_path: Path, files: Path) -> None:
    run = tmp_path / "run"
    data = ["--data", files / "colours.npz", "--likelihood", "continuous-bernoulli"]
    succeed("fit", "vae", *data, "--out", run, *FAST)
    for name in PICTURES:
        check_picture(run / name)
    succeed("sample", run, "-n", 5, "--out", tmp_path / "five.PNG")
    check_picture(tmp_path / "five.PNG")


def test_files_are_split_once_and_for_all(vectors: Path, files: Path) -> None:
    assert names_in(vectors) == RUN_FILES, "vectors have no pictures"
    source = read(vectors / "run.json")["data"]
    assert source["path"] == str((files / "vectors.npy").resolve())
    assert source["sizes"] == [83, 10, 10]
    val, test = set(source["val"]), set(source["test"])
    assert len(val) == len(test) == 10
    assert not val & test
    assert val | test <= set(range(103))


def test_evaluate_uses_the_recorded_split(vectors: Path, files: Path) -> None:
    pair, source = probae.load(vectors), read(vectors / "run.json")["data"]
    x = torch.from_numpy(np.load(files / "vectors.npy"))
    rest = [i for i in range(103) if i not in source["val"] + source["test"]]
    for split, rows in (("test", source["test"]), ("val", source["val"]), ("train", rest)):
        out = succeed("evaluate", vectors, "--split", split)
        expected = probae.log_likelihood(pair, x[rows])
        assert f" {expected.mean:.4f} ± {expected.mean_std_error:.4f} nats per datum" in out
        assert f"{len(rows)} data, {split}" in out
    entries = {entry["split"]: entry for entry in read(vectors / "evaluation.json")}
    assert set(entries) == {"test", "val", "train"}
    assert entries["train"]["num_data"] == 83
    assert entries["test"]["is_bound"] is False
    assert entries["test"]["khat_above_0.7"] is None


def test_evaluate_on_other_data(vectors: Path, files: Path, tmp_path: Path) -> None:
    moved = shutil.copy(files / "vectors.npy", tmp_path / "moved.npy")
    assert "10 data, test" in succeed("evaluate", vectors, "--data", moved), "known by its content"
    x = np.load(moved)[:20]
    np.save(tmp_path / "other.npy", x)
    out = succeed("evaluate", vectors, "--data", tmp_path / "other.npy")
    expected = probae.log_likelihood(probae.load(vectors), x)
    assert f"{expected.mean:.4f} ±" in out
    assert "20 data, all of" in out
    error = fail("evaluate", vectors, "--data", tmp_path / "other.npy", "--split", "test")
    assert "--split test is unknown" in error


def test_evaluate_notices_changed_data(vectors: Path, files: Path, tmp_path: Path) -> None:
    data = shutil.copy(files / "vectors.npy", tmp_path / "data.npy")
    run = tmp_path / "run"
    succeed("fit", "ppca", "--data", data, "--z-dim", 2, "--epochs", 1, "--quiet", "--out", run)
    np.save(data, np.load(data) + 1)
    assert "has changed since the run was fitted" in fail("evaluate", run)
    Path(data).unlink()
    assert "there is no file" in fail("evaluate", run)


def test_evaluate_is_reproducible(vae: Path, tmp_path: Path) -> None:
    run = shutil.copytree(vae, tmp_path / "run")
    command = ["evaluate", run, "--method", "iwae", "-k", 30, "--limit", 40]
    first = succeed(*command, "--seed", 1)
    assert succeed(*command, "--seed", 1) == first
    assert succeed(*command, "--seed", 2) != first
    assert "40 data, test" in first
    assert "iwae, K = 30: a lower bound on log p(x)" in first
    assert "grey pixels were binarised once, seed 1" in first
    assert "Pareto k > 0.7" in first
    assert "bits per dim" in first
    digits = probae.load_dataset("digits")
    x = probae.binarize(digits.test[:40], seed=1)
    expected = probae.log_likelihood(probae.load(run), x, "iwae", 30, seed=1)
    assert f"{expected.mean:.4f} ± {expected.mean_std_error:.4f}" in first
    one, two = read(run / "evaluation.json")
    assert (one["seed"], two["seed"]) == (1, 2)
    assert one["nats_per_datum"] == pytest.approx(expected.mean)
    assert one["num_samples"] == 30
    assert "Pareto" not in succeed("evaluate", run, "-k", 3, "--limit", 2), "too few for a tail"


def test_evaluate_anneals_as_told(vae: Path, tmp_path: Path) -> None:
    run = shutil.copytree(vae, tmp_path / "run")
    options = ["--method", "ais", "-k", 4, "--limit", 5, "--temperatures", 12, "--seed", 1]
    shown = {start: succeed("evaluate", run, *options, "--start", start) for start in STARTS}
    x = probae.binarize(probae.load_dataset("digits").test[:5], seed=1)
    for start in STARTS:
        expected = probae.log_likelihood(
            probae.load(run), x, "ais", 4, annealing=probae.Annealing(12, start=start), seed=1
        )
        assert f"{expected.mean:.4f} ± {expected.mean_std_error:.4f}" in shown[start]
    records = read(run / "evaluation.json")
    assert [(r["start"], r["temperatures"]) for r in records] == [(s, 12) for s in STARTS]


def test_evaluate_leaves_black_and_white_data_alone(tmp_path: Path, files: Path) -> None:
    run = tmp_path / "run"
    succeed("fit", "vae", "--data", files / "bits.npy", "--out", run, *FAST)
    assert read(run / "run.json")["binarize"] is False
    assert "note" not in succeed("evaluate", run, "--method", "elbo", "-k", 2)


def test_evaluate_repeats_what_the_library_refuses(tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("fit", "undercomplete", "--data", "digits", "--out", run, *FAST)
    assert "RECONSTRUCTION: its prior is flat" in fail("evaluate", run)
    assert "nothing can be drawn from its flat prior" in fail("sample", run, "--out", run / "s.png")
    prior = ["--prior", "normal", "--overwrite"]
    succeed("fit", "undercomplete", "--data", "digits", "--out", run, *FAST, *prior)
    assert "MAP_JOINT" in fail("evaluate", run)
    assert not (run / "evaluation.json").exists()


def test_sample_writes_pictures_and_arrays(vae: Path, vectors: Path, tmp_path: Path) -> None:
    picture, array = tmp_path / "samples.png", tmp_path / "samples.npy"
    assert "9 samples of the prior, seed 4" in succeed(
        "sample", vae, "-n", 9, "--seed", 4, "--out", picture
    )
    check_picture(picture)
    succeed("sample", vae, "-n", 9, "--seed", 4, "--out", array)
    x, z = probae.sample(probae.load(vae), 9, seed=4)
    np.testing.assert_array_equal(np.load(array), x.numpy())
    succeed("sample", vectors, "-n", 5, "--mean", "--out", array)
    pair = probae.load(vectors)
    z = probae.sample(pair, 5, seed=0).z
    np.testing.assert_allclose(np.load(array), pair.decoder(z).mean.detach(), rtol=1e-5)
    assert names_in(tmp_path) == ["samples.npy", "samples.png"], "no half-written file stays"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out {tmp}/samples.jpg", "--out must end in .png, for a picture, or .npy"),
        ("--out {tmp}/samples.png", "data of shape (5,) are no images to draw"),
        ("--out {tmp}/no/samples.npy", "No such file or directory"),
        ("--out {tmp}/samples.npy -n 0", "num_samples must be an int >= 1, got 0"),
        ("--out {tmp}/samples.npy --device warp", "--device 'warp' cannot be used here"),
    ],
)
def test_sample_refuses(vectors: Path, tmp_path: Path, arguments: str, message: str) -> None:
    assert message in fail("sample", vectors, *arguments.format(tmp=tmp_path).split())
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vae --data nowhere.npy", "--data: there is no file 'nowhere.npy'"),
        ("vae --data digts", "--data must be one of digits, mnist, fashion-mnist, patches, or a"),
        ("vae --data {files}/damaged.npy", "cannot be read"),
        ("vae --data {files}/few.npy", "must hold at least 10 data, to split, got 9"),
        ("vae --data {files}/numbers.npy", "reshape numbers to (N, 1)"),
        ("vae --data {files}/bytes.npy", "must be floating-point or bool, got uint8"),
        ("vae --data {files}/vectors.npy", "x must lie in the support of the decoder ([0, 1])"),
        ("ppca --data {files}/vectors.npy", "z_dim must be below the dimension of x"),
        ("ppca --data digits --hidden 3", "ppca takes no --hidden; of the options of models it"),
        ("ppca --data digits --prior flow", "ppca takes no --prior"),
        ("ppca --data digits --likelihood-option a=1", "ppca takes no --likelihood-option"),
        ("ppca --data digits --binarize", "--binarize goes with --likelihood bernoulli"),
        ("vae --data digits --dequantize", "--dequantize is for densities"),
        ("ppca --data {files}/levels.npy --dequantize", "--dequantize needs the number of grey"),
        ("vae --data digits --likelihood-option a", "must be NAME=VALUE, got 'a'"),
        ("vae --data digits --likelihood-option a=b", "likelihood_options do not fit"),
        ("vae --data digits --likelihood laplace", "likelihood must be one of bernoulli"),
        ("vae --data digits --prior none", "prior must be a module or one of normal"),
        ("vae --data digits --hidden -3", "hidden must have positive entries only"),
        ("vae --data {files}/levels.npy --channels 4", "in_shape of a convolutional network"),
        ("vae --data digits --dreg", "--dreg goes with --objective iwae"),
        ("vae --data digits --objective iwae --beta 2", "--beta goes with --objective elbo"),
        ("vae --data digits --objective iwae --warmup 2", "--warmup goes with --objective elbo"),
        ("vae --data digits --warmup -1", "--warmup must be a number of epochs >= 0"),
        ("vae --data digits --num-particles 0", "num_particles must be"),
        ("vae --data digits --epochs 0", "epochs must be an int >= 1"),
        ("vae --data digits --lr -1", "lr must be a finite number > 0"),
        ("vae --data digits --schedule linear", "schedule must be 'constant', 'cosine'"),
        ("vae --data digits --device warp", "--device 'warp' cannot be used here"),
        ("vae --data digits --lr 1e30 --epochs 2", "loss became"),
    ],
)
def test_fit_refuses(tmp_path: Path, files: Path, arguments: str, message: str) -> None:
    error = fail("fit", *arguments.format(files=files).split(), "--out", tmp_path / "run")
    assert message in error
    assert list(tmp_path.iterdir()) == [], "a run that failed leaves nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-k 0", "num_samples must be an int >= 1, got 0"),
        ("--method exact", "method='exact' needs a linear-Gaussian pair"),
        ("--method exact -k 5", "--num-samples goes with --method elbo, iwae and ais"),
        ("--start encoder", "--temperatures and --start go with --method ais"),
        ("--method iwae --temperatures 9", "--temperatures and --start go with --method ais"),
        ("--method ais --temperatures 0", "num_temperatures must be an int >= 1, got 0"),
        ("--limit 0", "--limit must be a whole number >= 1"),
        ("--data {files}/vectors.npy", "x must have shape (N, 1, 8, 8)"),
        ("--data {files}", "--data must be one of digits"),
    ],
)
def test_evaluate_refuses(vae: Path, files: Path, arguments: str, message: str) -> None:
    assert message in fail("evaluate", vae, *arguments.format(files=files).split())
    assert not (vae / "evaluation.json").exists()


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fit"],
        ["fit", "gan", "--data", "digits", "--out", "run"],
        ["fit", "vae", "--data", "digits"],
        ["fit", "vae", "--data", "digits", "--out", "run", "--epoch", "3"],
        ["fit", "vae", "--data", "digits", "--out", "run", "--seed", "-1"],
        ["evaluate", "run", "--method", "guess"],
        ["sample", "run", "-n", "many"],
    ],
)
def test_arguments_that_do_not_parse(command: list[str]) -> None:
    result = probae_cli(*command)
    assert result.status == 2
    assert "error:" in result.err
    assert not Path("run").exists()


def test_damaged_runs_are_told_apart(vae: Path, tmp_path: Path) -> None:
    assert "holds no run: run.json is missing" in fail("evaluate", tmp_path / "nothing")
    assert "holds no run" in fail("sample", tmp_path, "--out", tmp_path / "s.png")

    def damaged(name: str, content: bytes | None) -> Path:
        run = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(vae, run)
        (run / name).unlink(missing_ok=True)
        if content is not None:
            (run / name).write_bytes(content)
        return run

    record = read(vae / "run.json")
    del record["limits"]
    tensors = (vae / "pair.safetensors").read_bytes()
    for name, content, message in (
        ("run.json", b'{"format": ', "run.json is not valid JSON"),
        ("run.json", b"\xff\xfe", "run.json is not valid JSON"),
        ("run.json", b"[]", "must have format 'probae-run/2', got 'list'"),
        ("run.json", b'{"format": "other"}', "must have format 'probae-run/2', got 'other'"),
        ("run.json", json.dumps(record).encode(), "is damaged: limits is missing"),
        ("pair.json", None, "pair.json is missing"),
        ("pair.json", b"{}", "must have format"),
        ("pair.safetensors", tensors[: len(tensors) // 2], "pair.safetensors"),
        ("evaluation.json", b"{}", "must hold a list of evaluations"),
    ):
        run = damaged(name, content)
        assert message in fail("evaluate", run, "--method", "elbo", "-k", 1)


def test_out_is_not_written_over_without_leave(vae: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(vae, run)
    (run / "notes.txt").write_text("mine")
    (run / "evaluation.json").write_text("[]")
    command = ["fit", "vae", "--data", "digits", "--out", run, *FAST, "--seed", "1"]
    before = (run / "pair.safetensors").read_bytes()
    assert "pass --overwrite to replace it" in fail(*command)
    assert "loss became" in fail(*command, "--overwrite", "--lr", "1e30")
    assert (run / "pair.safetensors").read_bytes() == before, "the run before outlives a failure"
    assert (run / "evaluation.json").exists()
    succeed(*command, "--overwrite")
    assert (run / "pair.safetensors").read_bytes() != before
    assert not (run / "evaluation.json").exists(), "it was of the run before"
    assert (run / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    (tmp_path / "file").write_text("")
    assert "--out must be a folder, got the file" in fail(*command[:5], tmp_path / "file")
    (tmp_path / "other").mkdir()
    succeed(*command[:5], tmp_path / "other", *FAST)  # empty: nothing to lose
    (tmp_path / "other/run.json").write_text("{}")
    assert "holds no earlier run" in fail(*command[:5], tmp_path / "other", "--overwrite")


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit", interrupted)
    result = probae_cli("fit", "vae", "--data", "digits", "--out", tmp_path / "run", *FAST)
    assert result.status == 130
    assert result.err == "probae: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """Let the process get a signal in that step of the next training."""
    real, steps = probae.fit, [0]

    def fit(*arguments: Any, objective: Any, **keywords: Any) -> probae.Run:
        plain = objective.differentiable_loss

        def loss(*programs: Any) -> torch.Tensor:
            steps[0] += torch.is_grad_enabled()
            if steps[0] == step and torch.is_grad_enabled():
                signal.raise_signal(number)
            return plain(*programs)

        objective.differentiable_loss = loss
        return real(*arguments, objective=objective, **keywords)

    monkeypatch.setattr(cli, "fit", fit)


LONG = ["fit", "vae", "--data", "digits", "--batch-size", "500", *FAST, "--out"]  # 3 steps an epoch
NAMED = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@pytest.mark.parametrize("number", NAMED, ids=NAMED.values())
@pytest.mark.parametrize("step", [2, 5])
def test_after_a_signal_the_same_command_goes_on(
    number: int, step: int, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = tmp_path / "run", tmp_path / "run.checkpoint" / "checkpoint.safetensors"
    handler = signal.getsignal(number)
    signalled(monkeypatch, number, step)
    stopped = probae_cli(*LONG, run)
    assert stopped.status == 130
    assert signal.getsignal(number) == handler
    monkeypatch.undo()
    goes_on = f"the same command with --resume goes on from {place}\n"
    if step == 2:
        assert stopped.err == f"probae: interrupted; no epoch is whole yet; {goes_on}"
        assert not run.exists()
    else:
        assert stopped.err == f"probae: interrupted; wrote {run} as it stands; {goes_on}"
        assert read(run / "run.json")["interrupted"] is True
        assert len(read(run / "history.json")["loss"]) == 1
        succeed("evaluate", run, "--method", "elbo", "-k", 1, "--limit", 3)
    assert place.exists()
    assert "pass --resume to go on with it, or --overwrite" in fail(*LONG, run)
    assert "lr (was 0.001, is 0.1)" in fail(*LONG, run, "--resume", "--lr", "0.1")
    assert place.exists(), "a slip of the hand must not cost the run"
    succeed(*LONG, run, "--resume")
    succeed(*LONG, tmp_path / "whole", "--resume")  # nothing to go on from: it begins
    weights = [(tmp_path / name / "pair.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    assert read(run / "run.json")["interrupted"] is False
    assert names_in(tmp_path / "run") == names_in(vae)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_what_is_left_of_files_half_moved_is_written_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(*LONG, run, "--keep-checkpoint")
    (run / "run.json").unlink()  # it comes last
    (run / "mine").touch()
    assert "holds no earlier run" in fail(*LONG, run, "--resume")
    (run / "mine").unlink()
    succeed(*LONG, run, "--resume")
    assert read(run / "run.json")["interrupted"] is False


def test_a_second_run_leaves_the_checkpoint_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probae_files, "PATIENCE", 0.3)
    run, place = tmp_path / "run", tmp_path / "run.checkpoint"
    real = probae.fit

    def begun(*arguments: Any, **keywords: Any) -> probae.Run:
        first.enter_context(probae_files.held(place, "checkpoint"))
        checkpoints.write(place / checkpoints.FILE, {"epoch": 1})
        return real(*arguments, **keywords)

    monkeypatch.setattr(cli, "fit", begun)
    with contextlib.ExitStack() as first:  # another run begins while this one reads its data
        assert "another process is at work" in fail(*LONG, run)
        assert names_in(place) == ["checkpoint.safetensors"]
        monkeypatch.setattr(cli, "fit", real)
        assert "another process is at work" in fail(*LONG, run, "--overwrite")
        assert names_in(place) == ["checkpoint.safetensors"]


def test_a_kept_checkpoint_is_trained_on_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(*LONG, run, "--keep-checkpoint")
    assert names_in(tmp_path / "run.checkpoint") == ["checkpoint.safetensors"]
    succeed(*LONG, run, "--resume", "--epochs", 3, "--keep-checkpoint")
    assert len(read(run / "history.json")["loss"]) == 3
    succeed(*LONG, run, "--overwrite")
    assert len(read(run / "history.json")["loss"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    succeed(*LONG, run, "--overwrite", "--keep-checkpoint")
    (run / "run.json").write_text("{}")
    assert "holds no earlier run" in fail(*LONG, run, "--overwrite")
    assert (tmp_path / "run.checkpoint").exists(), "it was refused, so nothing goes"


@pytest.mark.parametrize("command", ["demo", "fit", "evaluate", "sample"])
def test_help_tells_every_default(command: str) -> None:
    out = succeed(command, "--help")
    options = out[out.index("options:") :]
    flags = [line.split()[0] for line in options.splitlines() if line.startswith("  -")]
    assert options.count("(default:") == len(flags) - 1, "every option but --help"
    assert "None" not in options


def test_version() -> None:
    assert succeed("--version") == f"probae {probae.__version__}\n"


def test_console_script_in_a_narrow_terminal(vae: Path, tmp_path: Path) -> None:
    script = shutil.which("probae", path=str(Path(sys.executable).parent))
    run = shutil.copytree(vae, tmp_path / "run")
    done = subprocess.run(
        [script or "probae", "evaluate", run, "--method", "elbo", "-k", "2", "--limit", "5"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nats per datum (elbo, K = 2" in done.stdout


def test_module_runs_and_fails_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "probae", "evaluate", "no-such-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("probae: error: no-such-run holds no run")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(
    not (DATA / "mnist" / "train-images-idx3-ubyte.gz").is_file(),
    reason=f"no MNIST files in {DATA / 'mnist'}; set PROBAE_DATA to the folder above mnist/",
)
def test_mnist_from_fit_to_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBAE_DATA", str(DATA))
    run = tmp_path / "run"
    options = "--hidden 64 --epochs 1 --batch-size 500 --lr 0.005 --quiet"
    succeed("fit", "vae", "--data", "mnist", "--out", run, *options.split())
    assert read(run / "run.json")["data"]["sizes"] == [55_000, 5_000, 10_000]
    out = succeed("evaluate", run, "--method", "elbo", "-k", 1)
    assert "10000 data, test" in out
    mnist = probae.load_dataset("mnist")
    independent = _independent_bernoulli(mnist.train, probae.binarize(mnist.test)).mean()
    (entry,) = read(run / "evaluation.json")
    assert entry["nats_per_datum"] > independent + 10
    for name in ("loss.png", *PICTURES):
        check_picture(run / name)
    succeed("sample", run, "-n", 6, "--out", tmp_path / "six.png")
    check_picture(tmp_path / "six.png")


def test_examples_in_docstrings_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        result = doctest.testmod(cli)
    assert result.attempted > 0
    assert result.failed == 0


FAMILY = {
    "sparse": ["--option", "rate=0.5", "--option", 'posterior="laplace"'],
    "denoising": ["--corruption", "masking=0.3", "--likelihood", "bernoulli"],
    "denoising-vae": ["--corruption", "bit-flip=0.1"],
    "contractive": ["--option", "weight=0.5", "--option", "penalty=noise"],
    "psd": ["--option", "rate=0.5", "--option", "couple=false"],
    "hashing": ["--option", "posterior=bernoulli"],
}


@pytest.mark.parametrize("model", FAMILY)
def test_every_model_of_the_family_trains(model: str, tmp_path: Path) -> None:
    out = tmp_path / model
    options = ["--data", "digits", "--epochs", "1", "--z-dim", "4", "--out", str(out), "--quiet"]
    assert cli.main(["fit", model, *options, *FAMILY[model]]) == 0
    pair = probae.load(out)
    assert type(pair) is cli.MODELS[model].preset
    assert (out / "reconstructions.png").stat().st_size > 1000
    if model == "contractive":
        assert isinstance(pair.corruption, probae.GaussianNoise)
    if model == "denoising":
        assert pair.corruption.probability == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparse", "--option", "rate"], "--option must be NAME=VALUE"),
        (["sparse", "--option", "ratio=1"], "--option of sparse must be one of rate"),
        (["ppca", "--corruption", "masking=0.3"], "ppca takes no --corruption"),
        (["denoising", "--corruption", "blur=0.3"], "--corruption must be one of gaussian-noise"),
        (["denoising", "--corruption", "masking=2"], "probability must be"),
        (["sparse", "--option", 'rate="high"'], "rate must be a finite number > 0"),
    ],
)
def test_bad_options_of_the_family(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["fit", *arguments, "--data", "digits", "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_point_code_is_measured_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    options = ["--data", "digits", "--epochs", "1", "--z-dim", "2", "--out", run, "--quiet"]
    assert cli.main(["fit", "sparse", *options]) == 0
    assert cli.main(["evaluate", run, "--limit", "3"]) == 2
    assert "use method='ais'" in capsys.readouterr().err
    assert cli.main(["evaluate", run, "--limit", "3", "--method", "ais", "-k", "2"]) == 0
    assert "lower bound" in capsys.readouterr().out


def test_steps_are_compiled_on_request(tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed("fit", "vae", "--data", "digits", *FAST, "--compile", "--out", out)
    assert read(out / "history.json")["loss"][1] < read(out / "history.json")["loss"][0]
    other = tmp_path / "other"
    error = fail("fit", "psd", "--data", "digits", *FAST, "--compile", "--out", other)
    assert "branches on the value of a tensor" in error
    assert not other.exists()
