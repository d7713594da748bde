"""``probae demo``: a VAE and PPCA on digits, compared by held-out log-likelihood."""

from __future__ import annotations

import argparse
import math
import shlex
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from . import __version__
from .autoencoder import Autoencoder
from .cli import _parser, _train
from .datasets import Splits, binarize, dequantize, load_dataset
from .likelihood import LogLikelihood, log_likelihood
from .presets import PPCA
from .runs import (
    DEMO_FILE,
    DEMO_FORMAT,
    Record,
    append_evaluation,
    measure,
    say,
    staged,
    training_data,
    write_json,
)


class Row(NamedTuple):
    """A line of the demo's table."""

    model: str
    nats_per_datum: float
    std_error: float
    claim: str


def run_demo(args: argparse.Namespace) -> None:
    """Run two ``probae fit`` commands, compare the models on test data, write what was made."""
    start = time.perf_counter()
    # PPCA keeps its last epoch, as it is compared with the maximum on the training data
    epochs = [default if args.epochs is None else args.epochs for default in (60, 120)]
    common = f"--data digits --schedule cosine --seed {args.seed}"
    commands = {
        "vae": f"fit vae {common} --z-dim 10 --hidden 256 --epochs {epochs[0]} --lr 0.003",
        "ppca": f"fit ppca {common} --z-dim 32 --epochs {epochs[1]} --lr 0.03 --dequantize "
        "--no-validation",
    }
    with staged(args.out, DEMO_FILE, DEMO_FORMAT, args.overwrite) as folder:
        trained = {}
        for name, command in commands.items():
            say(f"$ probae {command} --out {shlex.quote(str(args.out / name))}")
            argv = [*shlex.split(command), "--out", str(args.out / name)]
            (folder / name).mkdir()
            # the pictures of the VAE lie on top
            pictures = folder if name == "vae" else folder / name
            trained[name] = _train(_parser().parse_args(argv), folder / name, pictures)
        say("evaluating both on the test images\n")
        blocks, record = _demo_table(trained, folder, args.seed)
        seconds = time.perf_counter() - start
        write_json(folder / DEMO_FILE, {"format": DEMO_FORMAT, **record, "seconds": seconds})
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    say(blocks)
    say(f"\nwrote {args.out}:")
    say("\n".join(f"  {name}" for name in names))
    say(f"\n{time.perf_counter() - start:.1f} s in all")


def _demo_table(
    trained: dict[str, tuple[Autoencoder, Record]], folder: Path, seed: int
) -> tuple[str, Record]:
    """Return both blocks of the table as text, and as what demo.json holds."""
    from sklearn.decomposition import PCA  # type: ignore[import-untyped, unused-ignore]

    digits = load_dataset("digits")
    levels, (z_dim,) = digits.levels, trained["ppca"][0].z_shape
    binary_test, grey_test = binarize(digits.test), dequantize(digits.test, levels)
    grey_train = training_data(Splits(digits.train, digits.val, digits.test), levels, seed).train

    def evaluated(name: str, method: str) -> LogLikelihood:
        ll, note = measure(*trained[name], digits.test, levels, method, None, seed=0)
        key = {"data": "digits", "split": "test", "limit": None, "seed": 0}
        append_evaluation(folder / name, key, ll, note)
        return ll

    def row(model: str, values: Tensor, claim: str = "exact") -> Row:
        error = float(values.double().std() / math.sqrt(len(values)))
        return Row(model, float(values.double().mean()), error, claim)

    masses = [
        row("independent Bernoulli", _independent_bernoulli(digits.train, binary_test)),
        row("VAE, ELBO, K = 100", evaluated("vae", "elbo").values, "lower bound"),
        row("VAE, IWAE, K = 5000", evaluated("vae", "iwae").values, "lower bound"),
    ]
    best = PPCA.maximum_likelihood(grey_train, z_dim)
    pca = PCA(z_dim, svd_solver="full").fit(grey_train.flatten(1).double().numpy())
    scores = pca.score_samples(grey_test.flatten(1).double().numpy())
    densities = [
        row("diagonal Gaussian", _diagonal_gaussian(grey_train, grey_test)),
        row("PPCA, trained by SVI", evaluated("ppca", "exact").values),
        row("PPCA, exact maximum", log_likelihood(best, grey_test).values),
        row("PCA of scikit-learn", torch.as_tensor(scores)),
    ]
    train_svi = log_likelihood(trained["ppca"][0], grey_train).mean
    train_best = log_likelihood(best, grey_train).mean
    count, pixels = len(digits.test), digits.test[0].numel()
    text = "\n\n".join(
        [
            f"Binary digits, log-probabilities: {count} test images of {pixels} pixels, each pixel "
            f"drawn once\nfrom Bernoulli(grey).\n{_table(masses)}",
            f"Real-valued digits, log-densities: the same {count} images, grey level k of 0 to "
            f"{levels - 1} spread\nto (k + u) / {levels}. Not comparable with the numbers above: "
            f"densities have units.\n{_table(densities)}",
            f"On its training data, PPCA by SVI reaches {train_svi:.4f}, the exact maximum is "
            f"{train_best:.4f}\nnats per datum: {train_best - train_svi:.4f} short.",
        ]
    )
    record = {
        "version": __version__,
        "seed": seed,
        "num_data": count,
        "binary": [entry._asdict() for entry in masses],
        "real_valued": [entry._asdict() for entry in densities],
        "ppca_on_training_data": {"svi": train_svi, "exact_maximum": train_best},
    }
    return text, record


def _independent_bernoulli(train: Tensor, test: Tensor) -> Tensor:
    """Log-probability of each datum under independent pixels, add-one smoothed frequencies."""
    probs = (train.double().sum(0) + 1) / (len(train) + 2)
    return Bernoulli(probs).log_prob(test.double()).flatten(1).sum(1)


def _diagonal_gaussian(train: Tensor, test: Tensor) -> Tensor:
    """Log-density of each datum under a Gaussian of independent pixels, at maximum likelihood."""
    normal = Normal(train.double().mean(0), train.double().std(0, correction=0))
    return normal.log_prob(test.double()).flatten(1).sum(1)


def _table(rows: list[Row]) -> str:
    lines = [f"  {'model':<24}{'log-likelihood':>16}{'± s.e.':>9}   what the number is"]
    lines.append(f"  {'':<24}{'nats per datum':>16}")
    lines += [
        f"  {row.model:<24}{row.nats_per_datum:>16.3f}{row.std_error:>9.3f}   {row.claim}"
        for row in rows
    ]
    return "\n".join(lines)
