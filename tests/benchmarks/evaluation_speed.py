"""How close importance-weighted evaluation comes to the rate of the matrix products alone.

``log_likelihood(pair, x, "iwae", 5000)`` on binary 28 x 28 images, decoder 50-200-200-784 with tanh
(Burda, Grosse & Salakhutdinov, 2016), float32, with and without machine code (made before the
clock runs), beside: the products of its layers alone and large square products, both by the library
that the evaluation multiplies with, and by torch's default; the same evaluation through Pyro's
handlers; and what a user of Pyro alone writes: the same VAE with Pyro's distributions, and a loop
over the images that calls Pyro's ``vectorized_importance_weights``. All in turn, several rounds;
ratios are of medians.

    python -m tests.benchmarks.evaluation_speed --threads 1
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.importance import vectorized_importance_weights
from torch.nn.functional import softplus

import probae
from probae.precision import float32_products

LAYERS = ((50, 200), (200, 200), (200, 784))
FLOPS = 2 * sum(m * n for m, n in LAYERS)  # of one sample of z through the decoder
ROWS = 5000  # of the products of the layers
SQUARE = 2048


def gemm_of_layers() -> Callable[[], None]:
    """Return the three products of the decoder, on 5000 rows, into buffers that exist."""
    inputs = [torch.randn(ROWS, m) for m, _ in LAYERS]
    weights = [torch.randn(m, n) for m, n in LAYERS]
    outputs = [torch.empty(ROWS, n) for _, n in LAYERS]

    def products() -> None:
        for x, w, y in zip(inputs, weights, outputs, strict=True):
            torch.mm(x, w, out=y)

    return products


def gemm_square() -> Callable[[], torch.Tensor]:
    """Return one large square product."""
    a, b, out = (torch.randn(SQUARE, SQUARE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def as_in_evaluation(products: Callable[[], Any]) -> Callable[[], None]:
    """Return the same, by the library that the evaluation multiplies with."""

    def multiply() -> None:
        with float32_products(torch.device("cpu")):
            products()

    return multiply


def pyro_programs(pair: probae.VAE) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return model and guide of the same VAE as a user of Pyro alone writes them."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 50), 1.0).to_event(1))
            logits = pair.decoder.network.layers(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, scale = pair.encoder.network.layers(x).chunk(2, -1)
            scale = softplus(scale) + pair.encoder.scale_min
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def pyro_loop(pair: probae.VAE, x: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Return the IWAE value of each image by Pyro's own function, one image after the other."""
    model, guide = pyro_programs(pair)
    values = []
    with torch.no_grad():
        for datum in x.flatten(1):
            weights, _, _ = vectorized_importance_weights(
                model, guide, datum[None], num_samples=num_samples, max_plate_nesting=1
            )
            values.append(weights.logsumexp(0) - math.log(num_samples))
    return torch.stack(values)


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run(images: int = 64, num_samples: int = 5000, rounds: int = 7) -> dict[str, Any]:
    """Return rates in GFLOP/s of the decoder's products (medians), and their ratios."""
    torch.manual_seed(0)
    pair = probae.VAE((1, 28, 28), 50, hidden=(200, 200), activation="tanh")
    x = (torch.rand(images, 1, 28, 28) > 0.5).float()
    few = x[: max(1, images // 8)]

    def plain() -> None:
        with mock.patch("probae.likelihood.fast_weights", return_value=None):
            probae.log_likelihood(pair, few, "iwae", num_samples, compile=False)

    def evaluate(compile: bool) -> None:
        probae.log_likelihood(pair, x, "iwae", num_samples, compile=compile)

    flops = images * num_samples * FLOPS, len(few) * num_samples * FLOPS
    work: dict[str, tuple[Callable[[], Any], float]] = {
        "products of the layers": (as_in_evaluation(gemm_of_layers()), ROWS * FLOPS),
        "square products": (as_in_evaluation(gemm_square()), 2 * SQUARE**3),
        "products of the layers, torch's default": (gemm_of_layers(), ROWS * FLOPS),
        "square products, torch's default": (gemm_square(), 2 * SQUARE**3),
        "probae": (partial(evaluate, True), flops[0]),
        "probae, compile=False": (partial(evaluate, False), flops[0]),
        "probae, through Pyro's handlers": (plain, flops[1]),
        "vectorized_importance_weights": (lambda: pyro_loop(pair, few, num_samples), flops[1]),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for function, _ in work.values():
        function()
    for _ in range(rounds):
        for name, (function, flops) in work.items():
            repeats = 10 if "products" in name else 1  # they are short
            for _ in range(repeats):
                times[name].append(seconds(function) / flops)
    rates = {name: 1e-9 / statistics.median(values) for name, values in times.items()}
    gemm = max(rate for name, rate in rates.items() if "products" in name)
    # the same numbers, by both: a rate of something else would be no rate
    ours = probae.log_likelihood(pair, few, "iwae", num_samples)
    theirs = pyro_loop(pair, few, num_samples)
    error = (ours.values - theirs).abs() / ours.std_error.hypot(ours.std_error).float()
    return {
        "gflops": rates,
        "share_of_gemm": rates["probae"] / gemm,
        "times_pyro": rates["probae"] / rates["vectorized_importance_weights"],
        "times_handlers": rates["probae"] / rates["probae, through Pyro's handlers"],
        "largest_difference_in_std_errors": float(error.max()),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as README shows them."""
    lines = ["| | GFLOP/s of matrix products |", "|---|---|"]
    lines += [f"| {name} | {rate:.0f} |" for name, rate in result["gflops"].items()]
    lines.append(
        f"\nEvaluation runs at {100 * result['share_of_gemm']:.0f} % of the fastest "
        f"products alone, and {result['times_pyro']:.1f} times as fast as the loop over Pyro's "
        f"`vectorized_importance_weights`; {result['threads']} threads, float32, medians of "
        f"{result['rounds']} rounds in turn."
    )
    return "\n".join(lines)


def main() -> None:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(table(run(arguments.images, rounds=arguments.rounds)))


if __name__ == "__main__":
    main()
