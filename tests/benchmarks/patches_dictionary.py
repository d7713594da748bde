"""Sparse coding and predictive sparse decomposition of natural-image patches.

The patches are those of ``load_dataset("patches")`` that show more than a flat surface, with their
mean taken off, divided by their contrast, and whitened. Compared on held-out ones are

- the reconstruction error of the dictionary that ``probae.fit`` learns and of scikit-learn's
  ``MiniBatchDictionaryLearning``: trained with the same penalty and passes over the data,
  evaluated at an equal mean number of nonzeros (L0), the same solver encoding for both;
- how localised and how oriented the atoms of both are;
- the time that the predictor of predictive sparse decomposition (PSD) takes and that of FISTA with
  the same dictionary, and what the predictor loses in energy (the amortisation gap).

    python -m tests.benchmarks.patches_dictionary --out results
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import MiniBatchDictionaryLearning
from torch import Tensor

import probae

SIDE = 12  # pixels of a patch
LEAST_CONTRAST = 0.02  # standard deviation of a patch's pixels, of 1; the sky has less
COMPONENTS = 100  # of the 143: the others are the corners of the spectrum, noise for the most part
ATOMS = 196
RATE = 2.0  # λ of sparse coding
PSD_RATE, PSD_COUPLING = 1.0, 1.0  # λ and γ of predictive sparse decomposition
BATCH = 128
TRAINING_TOLERANCE = 1e-4
L0S = (5, 10, 20, 40)


def load() -> tuple[Tensor, Tensor]:
    """Return training and test patches (N, 1, 12, 12), whitened, with a mean square of 1."""
    data = probae.load_dataset("patches")
    splits = []
    for patches in (torch.cat([data.train, data.val]).flatten(1), data.test.flatten(1)):
        x = patches - patches.mean(1, keepdim=True)
        contrast = x.var(1, keepdim=True)
        keep = contrast[:, 0] > LEAST_CONTRAST**2
        splits.append((x / (contrast + 10 / 255**2).sqrt())[keep])
    train, test = splits
    mean = train.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(train.T))  # ascending
    floor = 0.5 * eigenvalues.mean()
    eigenvalues, vectors = eigenvalues[-COMPONENTS:], vectors[:, -COMPONENTS:]
    whiten = vectors @ torch.diag((eigenvalues + floor).rsqrt()) @ vectors.T
    train, test = (train - mean) @ whiten, (test - mean) @ whiten
    unit = train.square().mean().sqrt()
    return tuple((x / unit).unflatten(1, (1, SIDE, SIDE)) for x in (train, test))


def sparse_coding(x: Tensor, atoms: int, epochs: int, seed: int) -> tuple[Tensor, Tensor, Any]:
    """Learn a dictionary (D, K) and a bias (D,) with probae; return the record, too."""
    torch.manual_seed(seed)
    network = probae.MLP(atoms, x.shape[1:], unit_norm=True)
    decoder = probae.GaussianDecoder(network, scale=math.sqrt(0.5))
    encoder = probae.SparseCodingEncoder(decoder, RATE, tolerance=TRAINING_TOLERANCE)
    pair = probae.Autoencoder(probae.LaplacePrior(atoms, RATE), encoder, decoder)
    pair.initialize(x)
    record = train(pair, x, epochs, lr=1e-2, seed=seed)
    weight, bias, _ = decoder.affine()
    return weight.detach(), bias.detach(), record


def scikit_learn(x: Tensor, atoms: int, epochs: int, seed: int) -> tuple[Tensor, float]:
    """Learn a dictionary (D, K) of the same energy with scikit-learn; return its seconds, too."""
    learner = MiniBatchDictionaryLearning(
        n_components=atoms,
        alpha=RATE / 2,  # of ‖x - Wh‖²/2 + α‖h‖₁
        batch_size=BATCH,
        max_iter=epochs,
        fit_algorithm="cd",
        random_state=seed,
        transform_max_iter=100_000,  # of the lasso, in training, too; 1000 do not converge
        tol=0.0,  # no early stop
        max_no_improvement=None,
    )
    start = time.perf_counter()
    learner.fit(x.flatten(1).double().numpy())
    seconds = time.perf_counter() - start
    return torch.from_numpy(learner.components_.T).to(x), seconds


def train(pair: probae.Autoencoder, x: Tensor, epochs: int, lr: float, seed: int) -> Any:
    """Train a pair in the same way as any other."""
    return probae.fit(
        pair,
        x,
        epochs=epochs,
        batch_size=BATCH,
        lr=lr,
        schedule="cosine",
        seed=seed,
        progress=sys.stderr.isatty(),
    )


def at_l0(x: Tensor, dictionary: Tensor, l0: float) -> dict[str, Any]:
    """Encode x (N, D) at the rate where codes have ``l0`` nonzeros on average."""
    low, high = 1e-2, 1e2
    for _ in range(25):
        rate = math.sqrt(low * high)
        codes = probae.lasso(x, dictionary, rate, tolerance=1e-4).codes
        found = float(codes.count_nonzero(1).double().mean())
        low, high = (rate, high) if found > l0 else (low, rate)
    errors = (x - codes @ dictionary.T).square().sum(1).double()  # (N,)
    return {"rate": rate, "l0": found, "errors": errors}


def compare(x: Tensor, ours: Tensor, bias: Tensor, theirs: Tensor, l0s: list[float]) -> list[dict]:
    """Compare the errors of two dictionaries on x (N, D), each at several L0."""
    rows = []
    for l0 in l0s:
        one, other = at_l0(x - bias, ours, l0), at_l0(x, theirs, l0)
        mean, their_mean = float(one["errors"].mean()), float(other["errors"].mean())
        ratio, root = mean / their_mean, math.sqrt(len(x))
        rows.append(
            {
                "l0": one["l0"],
                "their_l0": other["l0"],
                "rate": one["rate"],
                "their_rate": other["rate"],
                "error": mean,  # squared, per patch
                "error_std_error": float(one["errors"].std()) / root,
                "their_error": their_mean,
                "their_error_std_error": float(other["errors"].std()) / root,
                "ratio": ratio,  # and its standard error by the delta method, paired
                "ratio_std_error": float((one["errors"] - ratio * other["errors"]).std())
                / (root * their_mean),
            }
        )
    return rows


def localisation(dictionary: Tensor) -> Tensor:
    """Share of each atom's energy in the best quarter of its area, a square: (K,)."""
    energy = dictionary.T.reshape(-1, 1, SIDE, SIDE).square()
    energy = energy / energy.sum((-1, -2), keepdim=True)
    windows = torch.nn.functional.avg_pool2d(energy, SIDE // 2, stride=1) * (SIDE // 2) ** 2
    return windows.amax((1, 2, 3))


def orientation(dictionary: Tensor) -> Tensor:
    """Anisotropy of each atom's power spectrum, 0 (none) to 1 (one direction): (K,)."""
    power = torch.fft.fft2(dictionary.T.reshape(-1, SIDE, SIDE)).abs().square()
    frequency = torch.fft.fftfreq(SIDE).to(power)
    u, v = torch.meshgrid(frequency, frequency, indexing="ij")
    uu, vv, uv = ((power * w).sum((-1, -2)) for w in (u * u, v * v, u * v))
    return ((uu - vv).square() + 4 * uv.square()).sqrt() / (uu + vv)


def shape_of_atoms(dictionary: Tensor) -> dict[str, float]:
    """Return how localised and oriented the atoms are, by medians."""
    return {
        "localisation": float(localisation(dictionary).median()),
        "orientation": float(orientation(dictionary).median()),
    }


def predictive(x: Tensor, test: Tensor, atoms: int, epochs: int, seed: int, repeats: int) -> Any:
    """Train PSD; return the pair, its gap, and how long FISTA takes against its predictor."""
    torch.manual_seed(seed)
    pair = probae.PredictiveSparseDecomposition(
        x.shape[1:],
        atoms,
        rate=PSD_RATE,
        coupling=PSD_COUPLING,
        hidden=(),  # on these patches no worse than 392 hidden units, tanh or ReLU
        tolerance=TRAINING_TOLERANCE,
    )
    pair.initialize(x)
    record = train(pair, x, epochs, lr=3e-3, seed=seed)
    pair = pair.double()  # a tolerance of 1e-6 is near the rounding error of float32
    test = test.double()
    encoder, network = pair.encoder, pair.predictor.network
    encoder.tolerance = 1e-6
    plain = probae.SparseCodingEncoder(pair.decoder, PSD_RATE)
    with torch.no_grad():
        predicted, zero = network(test), torch.zeros(len(test), atoms, dtype=test.dtype)
        weight, bias, _ = pair.decoder.affine()
        energies, gaps = {}, {}
        for name, inference in (("psd", encoder), ("sparse_coding", plain)):
            codes = {"minimum": inference(test).mean, "predicted": predicted, "zero_code": zero}
            energy = {at: inference.energy(test, code) for at, code in codes.items()}
            energies[name] = {at: float(e.mean()) for at, e in energy.items()}  # nats per patch
            gap = energy["predicted"] - energy["minimum"]
            gaps[name] = [float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))]
        exact = codes["minimum"]
        batch = test[:1000]
        flat = batch.flatten(1) - bias
        calls: dict[str, Callable[[], Any]] = {
            "predictor": lambda: network(batch),
            "fista_1e-3": lambda: probae.lasso(flat, weight, PSD_RATE, tolerance=1e-3),
            "fista_1e-6": lambda: probae.lasso(flat, weight, PSD_RATE, tolerance=1e-6),
            "coupled_fista_1e-6": lambda: encoder(batch),
        }
        seconds = interleaved(calls, repeats)
        solved = calls["fista_1e-6"]()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return pair, {
        "atoms": atoms,
        "epochs": epochs,
        "rate": PSD_RATE,
        "coupling": PSD_COUPLING,
        "train_seconds": record.seconds,
        "energy": energies,
        "amortisation_gap": gaps,  # mean and standard error, nats per patch
        "exact_l0": float(exact.count_nonzero(1).double().mean()),
        "batch": len(batch),
        "repeats": repeats,
        "worst_kkt": float(solved.kkt.max()),
        "mean_iterations": float(solved.iterations.double().mean()),
        "median_seconds": medians,
        "speedup": {n: s / medians["predictor"] for n, s in medians.items() if n != "predictor"},
    }


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time the calls in turn on one thread, after one warm-up of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return seconds


def run(
    epochs: int = 20,
    atoms: int = ATOMS,
    seed: int = 0,
    limit: int | None = None,
    repeats: int = 15,
    l0s: tuple[float, ...] = L0S,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Make all three comparisons; return every figure, and the pictures."""
    x, test = (split[:limit] for split in load())
    ours, bias, record = sparse_coding(x, atoms, epochs, seed)
    print(f"sparse coding: {record.seconds:.0f} s", file=sys.stderr, flush=True)
    theirs, their_seconds = scikit_learn(x, atoms, epochs, seed)
    print(f"scikit-learn: {their_seconds:.0f} s", file=sys.stderr, flush=True)
    flat = test.flatten(1)
    rows = compare(flat, ours, bias, theirs, list(l0s))
    pair, psd = predictive(x, test, atoms, epochs, seed, repeats)
    noise = torch.randn(SIDE**2, 1000, generator=torch.Generator().manual_seed(seed))
    weight = pair.decoder.affine()[0].detach().float()
    # outside the span of the whitened patches the filters are what they started as
    span = torch.linalg.svd(x.flatten(1), full_matrices=False).Vh[:COMPONENTS]
    filters = span.T @ span @ pair.predictor.network.affine()[0].detach().T.float()  # (D, K)
    energy = psd["energy"]["sparse_coding"]
    result = {
        "train": len(x),
        "test": len(test),
        "atoms": atoms,
        "epochs": epochs,
        "rate": RATE,
        "kind": record.kind.value,
        "test_energy_of_zero_code": float(flat.square().sum(1).mean()),
        "train_seconds": record.seconds,
        "their_train_seconds": their_seconds,
        "comparison": rows,
        "atom_shape": {
            "probae": shape_of_atoms(ours),
            "scikit-learn": shape_of_atoms(theirs),
            "white noise": shape_of_atoms(noise),
        },
        "psd": psd,
    }
    middle, zero = rows[len(rows) // 2], result["test_energy_of_zero_code"]
    pictures = {
        "patches_dictionary": draw(
            f"Dictionaries of {atoms} atoms from the same {len(x)} whitened patches of two photos",
            [
                (
                    "probae: SparseCodingEncoder + LaplacePrior\n"
                    f"held-out squared error {middle['error']:.1f} of {zero:.1f} at "
                    f"{middle['l0']:.0f} nonzeros per patch",
                    ours[:, by_use(flat - bias, ours)],
                ),
                (
                    "scikit-learn: MiniBatchDictionaryLearning\n"
                    f"held-out squared error {middle['their_error']:.1f} of {zero:.1f} at "
                    f"{middle['their_l0']:.0f} nonzeros per patch",
                    theirs[:, by_use(flat, theirs)],
                ),
            ],
            f"one square is one atom of {SIDE}×{SIDE} pixels, mid-grey is 0; most used first",
        ),
        "patches_psd": draw(
            f"Predictive sparse decomposition of the same patches, {atoms} codes",
            [
                ("decoder: atom of each code", weight[:, (order := by_use(flat, weight))]),
                ("predictor: filter that guesses the same code", filters[:, order]),
            ],
            f"FISTA to 10⁻⁶ takes {psd['speedup']['fista_1e-6']:.0f} times as long as the "
            f"predictor; energy of sparse coding per patch: zero code {energy['zero_code']:.0f}, "
            f"predictor {energy['predicted']:.0f}, FISTA {energy['minimum']:.0f} nats",
        ),
    }
    return result, pictures


def by_use(x: Tensor, dictionary: Tensor) -> Tensor:
    """Return the order of the atoms by how much of x (N, D) they explain, most first."""
    codes = probae.lasso(x, dictionary, RATE, tolerance=1e-4).codes
    return codes.abs().sum(0).argsort(descending=True)


def draw(title: str, panels: list[tuple[str, Tensor]], caption: str) -> Figure:
    """Draw dictionaries (D, K) side by side."""
    figure = Figure(figsize=(6.2 * len(panels), 7.2), dpi=150, layout="constrained")
    for axes, (name, dictionary) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.set_title(name, fontsize=11)
        mosaic(axes, dictionary)
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(caption, fontsize=10)
    return figure


def mosaic(axes: Axes, dictionary: Tensor) -> None:
    """Draw the atoms in rows, each on its own scale from -max|w| (black) to max|w| (white)."""
    columns = math.ceil(math.sqrt(dictionary.shape[1]))
    rows = math.ceil(dictionary.shape[1] / columns)
    sheet = torch.ones(rows * (SIDE + 1) - 1, columns * (SIDE + 1) - 1)  # white between atoms
    for i, atom in enumerate(dictionary.T.reshape(-1, SIDE, SIDE)):
        top, left = (SIDE + 1) * (i // columns), (SIDE + 1) * (i % columns)
        sheet[top : top + SIDE, left : left + SIDE] = atom / atom.abs().max()
    axes.imshow(sheet.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        "| nonzeros per patch (both) | squared error, probae | scikit-learn | ratio, paired |",
        "|---|---|---|---|",
    ]
    for row in result["comparison"]:
        lines.append(
            f"| {row['l0']:.2f} ({row['their_l0']:.2f}) "
            f"| {row['error']:.2f} ± {row['error_std_error']:.2f} "
            f"| {row['their_error']:.2f} ± {row['their_error_std_error']:.2f} "
            f"| {row['ratio']:.4f} ± {row['ratio_std_error']:.4f} |"
        )
    psd, seconds = result["psd"], result["psd"]["median_seconds"]
    lines += [
        f"\n{result['test']} held-out patches of squared norm "
        f"{result['test_energy_of_zero_code']:.1f}; {result['atoms']} atoms, {result['epochs']} "
        f"epochs of {result['train']} patches: {result['train_seconds']:.0f} s with probae, "
        f"{result['their_train_seconds']:.0f} s with scikit-learn.",
        *(
            f"Atoms of {name}: {shape['localisation']:.2f} of the energy in the best quarter of "
            f"the area, anisotropy {shape['orientation']:.2f} (medians)."
            for name, shape in result["atom_shape"].items()
        ),
        f"\nPSD, {psd['batch']} patches, float64, one thread, medians of {psd['repeats']} runs in "
        f"turn: affine predictor {1e3 * seconds['predictor']:.2f} ms.",
        *(
            f"{name}: {1e3 * seconds[name]:.1f} ms, {psd['speedup'][name]:.0f} times as long."
            for name in psd["speedup"]
        ),
        *(
            f"Energy of {name}, nats per patch: zero code {energy['zero_code']:.2f}, prediction "
            f"{energy['predicted']:.2f}, minimum {energy['minimum']:.2f}; amortisation gap "
            f"{psd['amortisation_gap'][name][0]:.2f} ± {psd['amortisation_gap'][name][1]:.2f}."
            for name, energy in psd["energy"].items()
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the experiment, print the table, and write figures and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--atoms", type=int, default=ATOMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the figures (JSON) and the pictures")
    arguments = parser.parse_args()
    result, pictures = run(arguments.epochs, arguments.atoms, arguments.seed)
    print(table(result))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=2) + "\n"
        (arguments.out / "patches_dictionary.json").write_text(text, encoding="utf-8")
        for name, figure in pictures.items():
            figure.savefig(arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
