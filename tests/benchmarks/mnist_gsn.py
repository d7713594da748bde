"""Chains of denoising autoencoders on MNIST, trained with and without walkback.

One autoencoder, 784 pixels to hidden units and back with salt-and-pepper noise and a Bernoulli
likelihood, is trained by the plain denoising loss, by walkback with as many updates, and by the
plain loss with as many reconstructions, which takes as long as walkback. Images are binarised anew
at every presentation. Then each makes chains, from validation images and from noise, and 10 000
means of its decoder along them get a Parzen-window score on the test images. That is a legacy score
and no likelihood: it rewards blur. So beside it stand what 10 000 training images score in their
place, and the entropy of the pixels, which is the larger the greyer the means are.

    python -m tests.benchmarks.mnist_gsn --out gsn.json --picture gsn.png
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

NOISE = 0.4  # share of pixels that salt and pepper replace
CHAINS = 100
STARTS = ("images", "noise")
SHOWN = 24  # steps of the chains in the picture


def autoencoder(x_shape: tuple[int, ...], units: int, layers: int) -> probae.Autoencoder:
    """Return a pair whose encoder has so many layers of units; its decoder has one of weights."""
    encoder = probae.MLP(x_shape, units, (units,) * (layers - 1), out_activation="tanh")
    return probae.Autoencoder(
        probae.FlatPrior(units),
        probae.PointEncoder(encoder),
        probae.BernoulliDecoder(probae.MLP(units, x_shape)),
        probae.SaltAndPepper(NOISE),
    )


def train(
    pair: probae.Autoencoder, x: Tensor, val: Tensor, epochs: int, steps: int
) -> tuple[Any, float]:
    """Train a pair by walkback over so many steps, 1 being the plain loss; return its seconds."""
    pair.initialize(x)
    start = time.process_time()  # of this process, whatever else runs
    run = probae.fit(
        pair,
        x,
        val,
        epochs=epochs,
        batch_size=100,
        lr=1e-3,
        schedule="cosine",
        objective=probae.Walkback(steps),
        binarize=True,
        progress=sys.stderr.isatty(),
    )
    return run, time.process_time() - start


def starts(val: Tensor, count: int) -> dict[str, Tensor]:
    """Return where chains start: binarised validation images, and noise."""
    noise = torch.bernoulli(
        torch.full_like(val[:count], 0.5), generator=torch.Generator().manual_seed(0)
    )
    return dict(zip(STARTS, (probae.binarize(val[:count]), noise), strict=True))


def score(samples: Tensor, val: Tensor, test: Tensor) -> dict[str, float]:
    """Score samples on test data, the bandwidth chosen on validation data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", probae.ParzenWarning)
        parzen = probae.parzen_log_likelihood(samples, val, test)
    entropy = torch.distributions.Bernoulli(samples.clamp(1e-6, 1 - 1e-6)).entropy()
    return {
        "score": parzen.mean,  # nats
        "std_error": parzen.std_error,
        "bandwidth": parzen.bandwidth,
        "entropy": float(entropy.flatten(1).sum(1).mean()),  # nats per image
    }


def run(
    epochs: int = 8,
    units: int = 1000,
    layers: int = 1,
    steps: int = 3,  # of 2, 3 and 5 the best on validation images
    samples: int = 10_000,
    burn_in: int = 100,
    thin: int = 10,
    limit: int = 60_000,
    on_validation: bool = False,
) -> tuple[dict[str, Any], Figure]:
    """Train, sample and score; return every figure, and the picture.

    ``on_validation`` scores other validation images in the place of test images, to choose settings
    by.
    """
    data = probae.load_dataset("mnist")
    x, val, test = (split[:limit] for split in (data.train, data.val, data.test))
    choose = val[:1000]
    if on_validation:
        test = val[1000:]
    rows: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    trainings = {
        "plain": (epochs, 1),
        "plain, longer": (epochs * steps, 1),
        "walkback": (epochs, steps),
    }
    for name, (passes, walk) in trainings.items():
        torch.manual_seed(0)
        pair = autoencoder(data.shape, units, layers)
        record, seconds = train(pair, x, choose, passes, walk)
        row: dict[str, Any] = {
            "epochs": passes,
            "steps": walk,
            "train_seconds": seconds,
            "denoising_loss": -record.history["reconstruction"][-1],  # one step from the data
            "kind": record.kind.value,
        }
        for seed, (start, x0) in enumerate(starts(val[-CHAINS:], CHAINS).items()):
            each = -(-samples // CHAINS)
            chain = probae.gsn_chain(pair, x0, each, burn_in=burn_in, thin=thin, seed=seed)
            row[start] = score(chain.mean.flatten(0, 1)[:samples], choose, test)
        rows[name] = row
        print(json.dumps({name: row}), file=sys.stderr, flush=True)
        x0 = torch.cat([x0[:2] for x0 in starts(val[-CHAINS:], CHAINS).values()])
        walk_means = probae.gsn_chain(pair, x0, SHOWN).mean
        pictures[name] = torch.cat([x0[None], walk_means])  # (1 + SHOWN, 4, *x_shape)
    result = {
        "rows": rows,
        "training images": score(x[:samples], choose, test),
        "units": units,
        "layers": layers,
        "samples": samples,
        "burn_in": burn_in,
        "thin": thin,
        "images": len(test),
        "scored_on": "validation" if on_validation else "test",
    }
    return result, draw(pictures, result)


def draw(pictures: dict[str, Tensor], result: dict[str, Any]) -> Figure:
    """Draw where chains start and the means of their first steps, for each training."""
    figure = Figure(figsize=(13, 8.6), dpi=100, layout="constrained")
    panels = figure.subplots(len(pictures), 1)
    for axes, (name, images) in zip(panels, pictures.items(), strict=True):
        row = result["rows"][name]
        height, width = images.shape[-2:]
        strips = images.squeeze(2).permute(1, 2, 0, 3)  # (4, height, 1 + SHOWN, width)
        gap = torch.ones(4, height, width // 2)  # between the start and the chain
        canvas = torch.cat([strips[:, :, 0], gap, strips[:, :, 1:].flatten(2)], 2)
        canvas[:, :, width : width + width // 2] = 0
        axes.imshow(canvas.flatten(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        scores = ", ".join(f"{row[start]['score']:.0f} from {start}" for start in STARTS)
        axes.set_title(f"{title(name, row)}: Parzen score {scores}", fontsize=11, loc="left")
        labels = [f"{start} {i}" for start in ("image", "noise") for i in (1, 2)]
        axes.set_yticks([height * (i + 0.5) for i in range(4)], labels)
        places = [1, *range(4, SHOWN + 1, 4)]
        axes.set_xticks(
            [0.5 * width, *(width * (step + 1) for step in places)],
            ["start", *(f"step {step}" for step in places)],
        )
        axes.tick_params(length=0, labelsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
    real = result["training images"]["score"]
    figure.suptitle(
        "Chains of denoising autoencoders on MNIST: each row is one chain, the mean of its decoder "
        f"at every step\n(the legacy Parzen score is {real:.0f} for training images, and rewards "
        "blur)",
        fontsize=12,
    )
    return figure


def title(name: str, row: dict[str, Any]) -> str:
    """Return the name of a training and how long it was."""
    steps = f", {row['steps']} steps" if row["steps"] > 1 else ""
    return f"{name}{steps}, {row['epochs']} epoch{'s' if row['epochs'] > 1 else ''}"


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = [
        "| training | core seconds | one-step loss, nats | Parzen score, from images "
        "| from noise | pixel entropy, nats |",
        "|---|---|---|---|---|---|",
    ]

    def cell(scores: dict[str, float]) -> str:
        return f"{scores['score']:.1f} ± {scores['std_error']:.1f}"

    for name, row in result["rows"].items():
        lines.append(
            f"| {title(name, row)} | {row['train_seconds']:.0f} | {row['denoising_loss']:.1f} "
            f"| {cell(row['images'])} | {cell(row['noise'])} | {row['images']['entropy']:.0f} |"
        )
    real = result["training images"]
    lines.append(
        f"| {result['samples']} training images | | | {cell(real)} | | {real['entropy']:.0f} |"
    )
    lines.append(
        f"\n{result['layers']} layer(s) of {result['units']} units; {result['samples']} means of "
        f"{CHAINS} chains, every {result['thin']}th after {result['burn_in']} steps; "
        f"{result['images']} {result['scored_on']} images."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the experiment and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=1, help="layers of the encoder")
    parser.add_argument("--steps", type=int, default=3, help="steps of walkback")
    parser.add_argument("--validation", action="store_true", help="score validation images")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--picture", type=Path, help="write the chains to this image file")
    arguments = parser.parse_args()
    result, figure = run(
        arguments.epochs,
        arguments.units,
        arguments.layers,
        arguments.steps,
        on_validation=arguments.validation,
    )
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
