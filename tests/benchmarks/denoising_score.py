"""The score that a denoising autoencoder learns, against the exact one of a Gaussian mixture.

The autoencoder is trained at one noise scale σ on samples of a mixture of three Gaussians in the
plane. Its (r(x) - x)/σ² is compared with the gradient of log p_σ, the density smoothed by the
noise, on fresh noisy points; the clean density's score is a limit as σ goes to 0, and far off here.

    python -m tests.benchmarks.denoising_score
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import probae

SIGMA = 0.2
MEANS = torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.1, -1.1]], dtype=torch.float64)
WIDTHS = torch.tensor([0.25, 0.2, 0.3], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Return samples of the clean mixture, (count, 2)."""
    component = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return MEANS[component] + WIDTHS[component, None] * noise


def exact_score(x: Tensor, sigma: float) -> Tensor:
    """Gradient of the log-density of the mixture smoothed by N(0, σ² I)."""
    variance = WIDTHS**2 + sigma**2  # (3,)
    difference = MEANS - x[:, None]  # (N, 3, 2)
    log_joint = WEIGHTS.log() - variance.log() - (difference**2).sum(-1) / (2 * variance)
    return torch.einsum("nc,ncd->nd", torch.softmax(log_joint, 1) / variance, difference)


def relative_error(score: Tensor, exact: Tensor) -> float:
    """Root of E|s - s*|² / E|s*|²."""
    return float(((score - exact) ** 2).sum().sqrt() / (exact**2).sum().sqrt())


def run(epochs: int = 40, samples: int = 50_000, seed: int = 0) -> dict[str, Any]:
    """Train, compare on 20 000 held-out noisy points, and return every figure."""
    generator = torch.Generator().manual_seed(seed)
    x = draw(samples, generator)
    noise = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    points = draw(20_000, generator) + SIGMA * noise
    torch.manual_seed(seed)
    hidden, z_dim = (32, 32, 32), 64
    pair = probae.Autoencoder(
        probae.FlatPrior(z_dim),
        probae.PointEncoder(probae.MLP(2, z_dim, hidden, "gelu")),
        probae.GaussianDecoder(probae.MLP(z_dim, 2, hidden, "gelu"), scale=SIGMA),
        probae.GaussianNoise(SIGMA),
    )
    pair.initialize(x)
    record = probae.fit(
        pair,
        x,
        epochs=epochs,
        batch_size=512,
        lr=1e-2,
        schedule="cosine",
        seed=seed,
        progress=False,
    )
    score = probae.score(pair, points).double()
    return {
        "error": relative_error(score, exact_score(points, SIGMA)),
        "error_against_clean": relative_error(score, exact_score(points, 0.0)),
        "sigma": SIGMA,
        "epochs": epochs,
        "samples": samples,
        "seconds": record.seconds,
    }


def line(result: dict[str, Any]) -> str:
    """Return the figures in one line."""
    return (
        f"DAE score at σ = {result['sigma']}: relative L2 error {result['error']:.3f} against "
        f"∇ log p_σ ({result['error_against_clean']:.2f} against the clean ∇ log p), "
        f"{result['samples']} samples, {result['epochs']} epochs, {result['seconds']:.0f} s"
    )


def main() -> None:
    """Run the experiment and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(line(run(arguments.epochs, arguments.samples, arguments.seed)))


if __name__ == "__main__":
    main()
