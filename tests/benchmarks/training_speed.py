"""Time of a training step: probae, raw Pyro, plain torch, NumPyro's jitted epoch, and pythae.

All train the same VAE, 784-400-20-400-784 with ReLU and a Bernoulli likelihood, by Adam, on the
same synthetic images in memory, shuffled at every epoch. The contestants take turns, an epoch or
two each; what counts are the medians over the turns, and their ratios. Compilation is not counted
(fit says what it cost), all else that a contestant does in an epoch is. Each contestant is as fast
as its own means allow: Pyro runs without argument checks, torch with its fused Adam.

    pip install 'jax[cpu]' numpyro pythae
    python -m tests.benchmarks.training_speed --batch-size 128 1000 --out speed.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

X, HIDDEN, Z, LR = 784, 400, 20, 1e-3
TURN = 3  # epochs timed in a turn
OURS, RIVAL = "probae, compiled", "NumPyro, jitted epoch"

Turn = Callable[[], float]  # returns seconds per step


def probae_fit(x: Tensor, batch_size: int, compile: bool, **keywords: Any) -> Turn:
    """Time the epochs of ``fit`` after the first, with all that it measures and records."""
    import probae

    torch.manual_seed(0)
    pair = probae.VAE(X, Z, hidden=(HIDDEN,))

    def turn() -> float:
        run = probae.fit(
            pair, x, epochs=1 + TURN, batch_size=batch_size, lr=LR, progress=False,
            compile=compile, **keywords,
        )  # fmt: skip
        seconds = run.history["seconds"]
        return (seconds[-1] - seconds[0]) / TURN / steps(x, batch_size)

    return turn


def encoder_and_decoder() -> tuple[nn.Module, nn.Module]:
    """Return x to the two halves of (loc, log-scale), and z to logits."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(X, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * Z))
    decoder = nn.Sequential(nn.Linear(Z, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, X))
    return encoder, decoder


def timed(epoch: Callable[[], None], x: Tensor, batch_size: int) -> Turn:
    """Time epochs; the first call warms up."""
    epoch()

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(TURN):
            epoch()
        return (time.perf_counter() - start) / TURN / steps(x, batch_size)

    return turn


def pyro_svi(x: Tensor, batch_size: int) -> Turn:
    """Time ``SVI.step`` with the analytic KL, as in Pyro's tutorial of the VAE."""
    import pyro
    from pyro import distributions as dist

    encoder, decoder = encoder_and_decoder()

    def model(batch: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(batch), Z), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=batch)

    def guide(batch: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(batch)):
            loc, log_scale = encoder(batch).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    optim = pyro.optim.Adam({"lr": LR})
    svi = pyro.infer.SVI(model, guide, optim, pyro.infer.TraceMeanField_ELBO())

    def epoch() -> None:
        with pyro.validation_enabled(False):
            for index in torch.randperm(len(x)).split(batch_size):
                svi.step(x[index])

    return timed(epoch, x, batch_size)


def plain_torch(x: Tensor, batch_size: int) -> Turn:
    """Time the loop that one would write by hand."""
    encoder, decoder = encoder_and_decoder()
    optim = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR, fused=True)

    def epoch() -> None:
        for index in torch.randperm(len(x)).split(batch_size):
            batch = x[index]
            loc, log_scale = encoder(batch).chunk(2, -1)
            logits = decoder(loc + log_scale.exp() * torch.randn_like(loc))
            kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 2 * log_scale - 1).sum()
            bce = nn.functional.binary_cross_entropy_with_logits(logits, batch, reduction="sum")
            loss = (bce + kl) / len(batch)
            optim.zero_grad()
            loss.backward()
            optim.step()
            loss.item()

    return timed(epoch, x, batch_size)


def numpyro_epoch(x: Tensor, batch_size: int) -> Turn:
    """Time a whole epoch in one jitted loop, as in NumPyro's example of the VAE."""
    import jax
    import numpyro
    from jax import numpy as jnp
    from jax.example_libraries import stax
    from numpyro import distributions as dist

    normal = jax.nn.initializers.normal(0.03)
    hidden = partial(stax.Dense, W_init=normal)
    encoder = stax.serial(
        hidden(HIDDEN),
        stax.Relu,
        stax.FanOut(2),
        stax.parallel(hidden(Z), stax.serial(hidden(Z), stax.Exp)),
    )
    decoder = stax.serial(hidden(HIDDEN), stax.Relu, hidden(X))

    def model(batch: Any) -> None:
        decode = numpyro.module("decoder", decoder, (batch_size, Z))
        with numpyro.plate("data", batch.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(Z), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=batch)

    def guide(batch: Any) -> None:
        encode = numpyro.module("encoder", encoder, (batch_size, X))
        loc, scale = encode(batch)
        with numpyro.plate("data", batch.shape[0]):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    elbo = numpyro.infer.TraceMeanField_ELBO()
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(LR), elbo)
    data, count = jnp.asarray(x.numpy()), len(x) // batch_size
    state = svi.init(jax.random.PRNGKey(0), data[:batch_size])

    @jax.jit
    def jitted(state: Any, key: Any, data: Any) -> Any:
        order = jax.random.permutation(key, len(data))

        def body(i: Any, carry: Any) -> Any:
            state, total = carry
            index = jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
            state, loss = svi.update(state, data[index])
            return state, total + loss

        return jax.lax.fori_loop(0, count, body, (state, 0.0))

    key = jax.random.PRNGKey(1)

    def epoch() -> None:
        nonlocal state, key
        key, now = jax.random.split(key)
        state, total = jitted(state, now, data)
        total.block_until_ready()

    return timed(epoch, x, batch_size)


def pythae_trainer(x: Tensor, batch_size: int) -> Turn:
    """Time the epochs of pythae's trainer."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    network, back = encoder_and_decoder()

    class Encoder(BaseEncoder):  # type: ignore[misc]
        """The same encoder."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.network(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        """The same decoder."""

        def __init__(self) -> None:
            super().__init__()
            self.network = back

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.network(z)))

    logging.disable(logging.WARNING)
    config = VAEConfig(input_dim=(X,), latent_dim=Z, reconstruction_loss="bce")
    trainer = BaseTrainer(
        model=VAE(config, encoder=Encoder(), decoder=Decoder()),
        train_dataset=BaseDataset(x, torch.zeros(len(x))),
        training_config=BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            num_epochs=1,
            per_device_train_batch_size=batch_size,
            learning_rate=LR,
        ),
    )
    trainer.prepare_training()

    def epoch() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            trainer.train_step(1)

    return timed(epoch, x, batch_size)


CONTESTANTS: dict[str, Callable[[Tensor, int], Turn]] = {
    OURS: partial(probae_fit, compile=True),
    RIVAL: numpyro_epoch,
    "probae, eager": partial(probae_fit, compile=False),
    "plain torch, fused Adam": plain_torch,
    "Pyro SVI.step": pyro_svi,
    "pythae's trainer": pythae_trainer,
}


def steps(x: Tensor, batch_size: int) -> int:
    """Return the number of steps of an epoch."""
    return len(x) // batch_size


def products(batch_size: int) -> float:
    """Time the matrix products of a step alone, in float32, by what fit multiplies with."""
    from probae.compiling import float32_products

    x, h, z = torch.rand(batch_size, X), torch.rand(batch_size, HIDDEN), torch.rand(batch_size, Z)
    w1, w2, w3 = torch.rand(HIDDEN, X), torch.rand(2 * Z, HIDDEN), torch.rand(HIDDEN, Z)
    codes = torch.rand(batch_size, 2 * Z)

    def step() -> None:
        for a, b, w in ((h, codes, w2), (z, h, w3), (h, x, w1.T)):
            _ = a @ w.T, b.T @ a, b @ w  # forward, gradients of the weight and of the input
        _ = x @ w1.T, h.T @ x  # the first layer's input needs none

    times = []
    with float32_products(torch.device("cpu")):
        for _ in range(20):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(batch_size: int, rounds: int, names: list[str], num_data: int) -> dict[str, Any]:
    """Let the contestants take turns and return their times, in seconds per step."""
    num_data -= num_data % batch_size
    torch.manual_seed(0)
    x = (torch.rand(num_data, X) < 0.13).float()
    turns, missing = {}, {}
    for name in names:
        try:
            turns[name] = CONTESTANTS[name](x, batch_size)
            turns[name]()
        except ImportError as error:
            missing[name] = str(error)
            print(f"{name} is left out: {error}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in ("matrix products alone", *turns)}
    for _ in range(rounds):
        times["matrix products alone"].append(products(batch_size))
        for name, turn in turns.items():
            times[name].append(turn())
    return {
        "batch_size": batch_size,
        "num_data": num_data,
        "times": times,
        "medians": {name: statistics.median(values) for name, values in times.items()},
        "missing": missing,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return medians in ms per step, and each as a multiple of the time of compiled ``fit``."""
    sizes = [str(result["batch_size"]) for result in results]
    lines = [
        "| ms per step (times that of compiled `fit`) | batch " + " | batch ".join(sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for name in results[0]["medians"]:
        cells = [
            f"{1e3 * r['medians'][name]:.2f} ({r['medians'][name] / r['medians'][OURS]:.2f}×)"
            if OURS in r["medians"]
            else f"{1e3 * r['medians'][name]:.2f}"
            for r in results
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 1000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-data", type=int, default=20_000)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    results = [
        run(batch_size, arguments.rounds, arguments.only, arguments.num_data)
        for batch_size in arguments.batch_size
    ]
    print(table(results))
    if arguments.out is not None:
        record = {
            "results": results,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
