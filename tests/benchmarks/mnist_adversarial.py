"""Likelihoods of VAE, adversarial autoencoder and GAN on MNIST, by annealing and by Parzen windows.

Three pairs with one and the same decoder, 10-64-128-784, tanh, its mean through a sigmoid, and
Gaussian noise of one scale: a VAE, an adversarial autoencoder with a point code, and a GAN, which
never saw that noise. The first two have the same encoder, 784-500-500, wide enough that it is not
what limits them; all make as many passes over the data. Each has its own way of training: the VAE a
rate that falls to 0 and its best epoch by validation, the others a constant rate and their last
epoch. The rates of VAE and adversarial autoencoder, 3e-3 and 1e-3, are the better of these two on
validation images; the GAN's settings were not searched. Grey images are dequantised, (k + u) / 256.
The scale of each is then chosen on validation images by short runs of annealed importance sampling,
and log p(x) of test images is estimated by long ones from the prior, which use nothing but prior
and decoder. How loose these lower bounds can be is measured from both sides on data simulated from
each pair. Beside them stands the Parzen-window score of means of the decoder, a legacy figure that
is no likelihood.

    python -m tests.benchmarks.mnist_adversarial --out adversarial.json --picture adversarial.png
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import probae

SHAPE, Z = (1, 28, 28), 10
WIDTHS, ENCODER_WIDTHS = (64, 128), (500, 500)
EPOCHS = {"VAE": 60, "AAE": 60, "GAN": 60}
VAE_RATE = 3e-3
AAE_WEIGHT = 20.0  # the reconstruction has hundreds of nats
GAN_RATE, GAN_PENALTY = 5e-4, 1.0
RATIO = 1.12  # from one scale to the next in the search
SHORT = probae.Annealing(num_temperatures=100, num_pilot=20)


def build(name: str) -> probae.Autoencoder:
    """Return the untrained pair of that name; the decoder is the same for all."""
    mean = probae.MLP(Z, SHAPE, WIDTHS, "tanh", out_activation="sigmoid")
    decoder = probae.GaussianDecoder(mean, scale=0.2, learn_scale=True)
    prior = probae.StandardNormalPrior(Z)
    if name == "GAN":
        judge = probae.Discriminator(probae.MLP(SHAPE, 1, (128,), "elu"), "data")
        return probae.Autoencoder(prior, probae.NoEncoder(), decoder, discriminator=judge)
    if name == "VAE":
        encoder = probae.GaussianEncoder(probae.MLP(SHAPE, (2, Z), ENCODER_WIDTHS))
        return probae.Autoencoder(prior, encoder, decoder)
    encoder = probae.PointEncoder(probae.MLP(SHAPE, Z, ENCODER_WIDTHS))
    judge = probae.Discriminator(probae.MLP(Z, 1, (128, 128)), "code")
    return probae.Autoencoder(prior, encoder, decoder, discriminator=judge)


def train(name: str, x: Tensor, val: Tensor, epochs: int) -> tuple[probae.Autoencoder, Any]:
    """Return the trained pair of that name, and the record of its training."""
    torch.manual_seed(0)
    pair = build(name)
    options: dict[str, Any] = {"epochs": epochs, "progress": sys.stderr.isatty()}
    if name == "VAE":
        return pair, probae.fit(pair, x, val, lr=VAE_RATE, schedule="cosine", **options)
    if name == "AAE":
        return pair, probae.fit_adversarial(pair, x, weight=AAE_WEIGHT, **options)
    return pair, probae.fit_adversarial(
        pair, x, lr=GAN_RATE, gradient_penalty=GAN_PENALTY, **options
    )


def choose_scale(
    pair: probae.Autoencoder, val: Tensor, annealing: probae.Annealing, start: float = 0.2
) -> dict[str, float]:
    """Set the decoder's scale where short annealing finds validation images most likely."""
    values: dict[float, float] = {}

    def at(step: int) -> float:
        scale = round(start * RATIO**step, 4)
        if scale not in values:
            pair.decoder.set_scale(scale)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", probae.LikelihoodWarning)
                values[scale] = probae.log_likelihood(pair, val, "ais", 8, annealing=annealing).mean
        return values[scale]

    step = 0
    uphill = 1 if at(1) > at(0) else -1
    while at(step + uphill) > at(step):
        step += uphill
    pair.decoder.set_scale(round(start * RATIO**step, 4))
    return {f"{scale:g}": value for scale, value in sorted(values.items())}


def evaluate(
    pair: probae.Autoencoder,
    val: Tensor,
    test: Tensor,
    images: int,
    simulated: int,
    chains: int,
    annealing: probae.Annealing,
    samples: int,
) -> dict[str, Any]:
    """Return every figure about a pair that is trained and has its scale."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", probae.LikelihoodWarning)  # its share is in the record
        ll = probae.log_likelihood(pair, test[:images], "ais", chains, annealing=annealing)
    sandwich = probae.bdmc(pair, simulated, chains, annealing=annealing)
    seconds = time.process_time() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", probae.ParzenWarning)
        drawn = means(pair, samples)
        parzen = probae.parzen_log_likelihood(drawn, val, test)
    return {
        "scale": pair.decoder.scale.item(),
        "ais": ll.mean,
        "ais_std_error": ll.mean_std_error,
        "values": [round(value, 3) for value in ll.values.tolist()],
        "ess": float(ll.ess.median()),
        "unreliable": ll.unreliable,
        "acceptance": float(ll.acceptance.mean()),
        "gap": sandwich.gap,
        "gap_std_error": sandwich.gap_std_error,
        "parzen": parzen.mean,
        "parzen_std_error": parzen.std_error,
        "bandwidth": parzen.bandwidth,
        "parzen_same_images": float(parzen.values[:images].mean()),
        "seconds": seconds,
    }


def means(pair: probae.Autoencoder, count: int) -> Tensor:
    """Return means of the decoder at codes from the prior."""
    z = probae.sample(pair, count, seed=0).z
    with torch.no_grad():
        return torch.cat([pair.decoder(rows).mean for rows in z.split(1000)])


def run(
    epochs: dict[str, int],
    images: int = 50,
    simulated: int = 25,
    chains: int = 10,
    temperatures: int = 500,
    samples: int = 10_000,
    tuning: int = 25,
    short: probae.Annealing = SHORT,
    limit: int = 60_000,
    keep: Path | None = None,
) -> tuple[dict[str, Any], Figure]:
    """Train, choose scales and evaluate; return every figure, and a picture of samples."""
    data = probae.load_dataset("mnist")
    parts = (data.train[:limit], data.val[:limit], data.test[:limit])
    x, val, test = (probae.dequantize(part, data.levels, seed=i) for i, part in enumerate(parts))
    annealing = probae.Annealing(num_temperatures=temperatures, num_pilot=30)
    rows: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    for name, passes in epochs.items():
        start = time.process_time()
        pair, record = train(name, x, val[:1000], passes)
        seconds = time.process_time() - start
        if keep is not None:
            probae.save(pair, keep / name)
        trained = pair.decoder.scale.item()
        search = choose_scale(pair, val[:tuning], short)
        rows[name] = {
            "epochs": passes,
            "train_seconds": seconds,
            "kind": pair.kind.value,
            "history": {column: values[-1] for column, values in record.history.items()},
            "scale_of_training": trained,
            "search": search,
            **evaluate(pair, val[:1000], test, images, simulated, chains, annealing, samples),
        }
        shown = {k: v for k, v in rows[name].items() if k != "values"}
        print(json.dumps({name: shown}), file=sys.stderr, flush=True)
        pictures[name] = means(pair, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", probae.ParzenWarning)
        real = probae.parzen_log_likelihood(x[:samples], val[:1000], test)
    result = {
        "rows": rows,
        "training images": {
            "parzen": real.mean,
            "parzen_std_error": real.std_error,
            "bandwidth": real.bandwidth,
        },
        "images": images,
        "simulated": simulated,
        "chains": chains,
        "temperatures": temperatures,
        "leapfrogs": annealing.num_leapfrogs,
        "samples": samples,
        "test_images": len(test),
    }
    return result, draw(pictures, result)


def draw(pictures: dict[str, Tensor], result: dict[str, Any]) -> Figure:
    """Draw means of the decoders at codes from the prior."""
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (name, shown) in zip(panels, pictures.items(), strict=True):
        grid = shown.reshape(6, 8, *SHAPE[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
        axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
        row = result["rows"][name]
        axes.set_title(
            f"{name}: {row['ais']:.0f} nats by annealing,\nParzen score {row['parzen']:.0f}",
            fontsize=11,
        )
        axes.set_axis_off()
    return figure


def loss_against(result: dict[str, Any], first: str, second: str) -> tuple[float, float]:
    """Return by how much the first is likelier on the same images, and its standard error."""
    values = [torch.tensor(result["rows"][name]["values"]).double() for name in (first, second)]
    difference = values[0] - values[1]
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        "| pair | σ | log p(x) by AIS, nats per image, a lower bound | less than the first, paired "
        "| gap of BDMC | Parzen score |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(result["rows"]))
    for name, row in result["rows"].items():
        behind = ""
        if name != first:
            mean, std_error = loss_against(result, first, name)
            behind = f"{mean:.1f} ± {std_error:.1f}"
        lines.append(
            f"| {name} | {row['scale']:.3f} | {row['ais']:.1f} ± {row['ais_std_error']:.1f} "
            f"| {behind} | {row['gap']:.2f} ± {row['gap_std_error']:.2f} "
            f"| {row['parzen']:.1f} ± {row['parzen_std_error']:.1f} |"
        )
    real = result["training images"]
    lines.append(
        f"| {result['samples']} training images | | | | "
        f"| {real['parzen']:.1f} ± {real['parzen_std_error']:.1f} |"
    )
    lines.append(
        f"\nAIS: first {result['images']} test images, {result['chains']} chains, "
        f"{result['temperatures']} temperatures, {result['leapfrogs']} leapfrog steps; the gap is "
        f"that of {result['simulated']} simulated images, from lower to upper bound. Parzen: "
        f"{result['samples']} means of the decoder, {result['test_images']} test images."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in EPOCHS.items():
        parser.add_argument(f"--{name.lower()}-epochs", type=int, default=default)
    parser.add_argument("--only", choices=list(EPOCHS), help="one pair alone")
    parser.add_argument("--temperatures", type=int, default=500)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--limit", type=int, default=60_000, help="images of each split")
    parser.add_argument("--keep", type=Path, help="folder to save the trained pairs in")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--picture", type=Path, help="write samples to this image file")
    arguments = parser.parse_args()
    epochs = {name: getattr(arguments, f"{name.lower()}_epochs") for name in EPOCHS}
    if arguments.only is not None:
        epochs = {arguments.only: epochs[arguments.only]}
    result, figure = run(
        epochs,
        images=arguments.images,
        temperatures=arguments.temperatures,
        limit=arguments.limit,
        keep=arguments.keep,
    )
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
