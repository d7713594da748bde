"""Time of a training step: probae, raw Pyro, plain torch, NumPyro's jitted epoch, and pythae.

All train the same pair, 784-400-20-400-784 with ReLU and a Bernoulli likelihood, by Adam, on the
same synthetic images in memory, shuffled at every epoch. The contestants take turns of three
epochs, after one that is not counted, each in a process of its own, as in one process libraries
take each other's threads and caches; what counts are the medians over the turns, and their ratios.
Compilation is not counted (what ``fit`` says that it cost is below the table; less where torch's
cache on disk has the kernels), all else that a contestant does in an epoch is.

All libraries run at their defaults, but for Pyro, which runs without argument checks, and plain
torch, which takes its fused Adam. NumPyro runs a whole epoch in one jitted loop; as it knows no
closed KL between Laplaces, it draws that of the sparse pair. ``JAX_THREEFRY_PARTITIONABLE=0`` in
the environment halves the time of JAX's random numbers, which the denoising VAE draws many of.
None of torch's rivals is compiled, as compiling the step is what ``fit`` does. The pairs are a VAE,
for all; and for probae and NumPyro a sparse autoencoder with a proper posterior (Laplace both
ways), a denoising VAE (a tenth of the pixels flipped), and the VAE under IWAE(5).

    pip install 'jax[cpu]' numpyro pythae
    python -m tests.benchmarks.training_speed --batch-size 128 1000 --out speed.json
    python -m tests.benchmarks.training_speed --task sparse denoising iwae --picture speed.png
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

X, LR = 784, 1e-3
FLIPPED = 0.1  # share of the pixels that the denoising VAE does not see as they are
TURN = 3  # epochs timed in a turn, after one that is not
OURS, RIVAL = "probae, compiled", "NumPyro, jitted epoch"
FLOOR = "matrix products alone"
TASKS = ("vae", "sparse", "denoising", "iwae")


class Timing(NamedTuple):
    """What a turn took."""

    seconds_per_step: float
    compile_seconds: float = 0.0  # not in the former


Turn = Callable[[], Timing]


class Problem(NamedTuple):
    """What the contestants train, and on how much."""

    task: str = "vae"
    batch_size: int = 128
    num_data: int = 60_000
    hidden: int = 400
    z_dim: int = 20
    particles: int = 5  # of the task "iwae"

    @property
    def steps(self) -> int:
        """Number of steps of an epoch."""
        return self.num_data // self.batch_size


def images(problem: Problem) -> Tensor:
    """Return as many synthetic images as make whole batches."""
    torch.manual_seed(0)
    return (torch.rand(problem.steps * problem.batch_size, X) < 0.13).float()


def probae_fit(problem: Problem, x: Tensor, **keywords: Any) -> Turn:
    """Time the epochs of ``fit`` after the first, with all that it measures and records."""
    import probae

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden": (problem.hidden,)}
    if problem.task == "sparse":
        pair: probae.Autoencoder = probae.SparseAutoencoder(
            X, problem.z_dim, rate=1.0, posterior="laplace", likelihood="bernoulli", **size
        )
    elif problem.task == "denoising":
        corruption = probae.BitFlip(FLIPPED)
        pair = probae.DenoisingVAE(X, problem.z_dim, corruption=corruption, **size)
    else:
        pair = probae.VAE(X, problem.z_dim, **size)
    objective = probae.IWAE(problem.particles) if problem.task == "iwae" else None

    def turn() -> Timing:
        run = probae.fit(
            pair, x, epochs=1 + TURN, batch_size=problem.batch_size, lr=LR, objective=objective,
            progress=False, **keywords,
        )  # fmt: skip
        seconds = run.history["seconds"]
        per_step = (seconds[-1] - seconds[0]) / TURN / problem.steps
        return Timing(per_step, run.compile_seconds)

    return turn


def encoder_and_decoder(problem: Problem) -> tuple[nn.Module, nn.Module]:
    """Return x to the two halves of (loc, log-scale), and z to logits."""
    torch.manual_seed(0)
    h, z = problem.hidden, problem.z_dim
    encoder = nn.Sequential(nn.Linear(X, h), nn.ReLU(), nn.Linear(h, 2 * z))
    decoder = nn.Sequential(nn.Linear(z, h), nn.ReLU(), nn.Linear(h, X))
    return encoder, decoder


def timed(epoch: Callable[[], None], problem: Problem) -> Turn:
    """Time the epochs of a turn after the first."""

    def turn() -> Timing:
        epoch()
        start = time.perf_counter()
        for _ in range(TURN):
            epoch()
        return Timing((time.perf_counter() - start) / TURN / problem.steps)

    return turn


def pyro_svi(problem: Problem, x: Tensor) -> Turn:
    """Time ``SVI.step`` with the analytic KL, as in Pyro's tutorial of the VAE."""
    import pyro
    from pyro import distributions as dist

    encoder, decoder = encoder_and_decoder(problem)

    def model(batch: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(batch)):
            z = pyro.sample(
                "z", dist.Normal(torch.zeros(len(batch), problem.z_dim), 1.0).to_event(1)
            )
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
            for index in torch.randperm(len(x)).split(problem.batch_size):
                svi.step(x[index])

    return timed(epoch, problem)


def plain_torch(problem: Problem, x: Tensor) -> Turn:
    """Time the loop that one would write by hand."""
    encoder, decoder = encoder_and_decoder(problem)
    optim = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR, fused=True)

    def epoch() -> None:
        for index in torch.randperm(len(x)).split(problem.batch_size):
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

    return timed(epoch, problem)


def numpyro_epoch(problem: Problem, x: Tensor) -> Turn:
    """Time a whole epoch in one jitted loop, as in NumPyro's example of the VAE."""
    import jax
    import numpyro
    from jax import numpy as jnp
    from jax.example_libraries import stax
    from numpyro import distributions as dist

    batch_size, z_dim = problem.batch_size, problem.z_dim
    law = dist.Laplace if problem.task == "sparse" else dist.Normal
    layer = partial(stax.Dense, W_init=jax.nn.initializers.normal(0.03))
    encoder = stax.serial(layer(problem.hidden), stax.Relu, layer(2 * z_dim))
    decoder = stax.serial(layer(problem.hidden), stax.Relu, layer(X))

    def model(batch: Any, seen: Any) -> None:
        decode = numpyro.module("decoder", decoder, (batch_size, z_dim))
        with numpyro.plate("data", batch_size):
            z = numpyro.sample("z", law(jnp.zeros(z_dim), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=batch)

    def guide(batch: Any, seen: Any) -> None:
        encode = numpyro.module("encoder", encoder, (batch_size, X))
        loc, log_scale = jnp.split(encode(seen), 2, -1)
        with numpyro.plate("data", batch_size):
            numpyro.sample("z", law(loc, jnp.exp(log_scale)).to_event(1))

    elbo: Any = numpyro.infer.TraceMeanField_ELBO()
    if problem.task == "iwae":
        elbo = numpyro.infer.RenyiELBO(alpha=0.0, num_particles=problem.particles)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(LR), elbo)
    data = jnp.asarray(x.numpy())
    state = svi.init(jax.random.PRNGKey(0), data[:batch_size], data[:batch_size])

    @jax.jit
    def jitted(state: Any, key: Any, data: Any) -> Any:
        order_key, flip_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(data))

        def body(i: Any, carry: Any) -> Any:
            state, total = carry
            batch = data[jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)]
            seen = batch
            if problem.task == "denoising":
                flips = jax.random.bernoulli(jax.random.fold_in(flip_key, i), FLIPPED, batch.shape)
                seen = jnp.where(flips, 1 - batch, batch)
            state, loss = svi.update(state, batch, seen)
            return state, total + loss

        return jax.lax.fori_loop(0, problem.steps, body, (state, 0.0))

    key = jax.random.PRNGKey(1)

    def epoch() -> None:
        nonlocal state, key
        key, now = jax.random.split(key)
        state, total = jitted(state, now, data)
        total.block_until_ready()

    return timed(epoch, problem)


def pythae_trainer(problem: Problem, x: Tensor) -> Turn:
    """Time the epochs of pythae's trainer."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    network, back = encoder_and_decoder(problem)

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
    config = VAEConfig(input_dim=(X,), latent_dim=problem.z_dim, reconstruction_loss="bce")
    trainer = BaseTrainer(
        model=VAE(config, encoder=Encoder(), decoder=Decoder()),
        train_dataset=BaseDataset(x, torch.zeros(len(x))),
        training_config=BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            num_epochs=1,
            per_device_train_batch_size=problem.batch_size,
            learning_rate=LR,
        ),
    )
    trainer.prepare_training()

    def epoch() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            trainer.train_step(1)

    return timed(epoch, problem)


def products(problem: Problem, x: Tensor) -> Turn:
    """Time the matrix products of a step alone, in float32, by what fit multiplies with."""
    from probae.precision import float32_products

    rows, k = problem.batch_size, problem.particles if problem.task == "iwae" else 1
    h, z = problem.hidden, problem.z_dim
    layers = [(rows, X, h), (rows, h, 2 * z), (k * rows, z, h), (k * rows, h, X)]
    tensors = [
        (torch.rand(n, inputs), torch.rand(n, outputs), torch.rand(outputs, inputs))
        for n, inputs, outputs in layers
    ]

    def step() -> None:
        for i, (a, b, w) in enumerate(tensors):
            _ = a @ w.T, b.T @ a  # forward, and the gradient of the weight
            if i > 0:  # the first layer's input needs none
                _ = b @ w

    def epoch() -> None:
        with float32_products(torch.device("cpu")):
            for _ in range(problem.steps):
                step()

    return timed(epoch, problem)


CONTESTANTS: dict[str, Callable[[Problem, Tensor], Turn]] = {
    FLOOR: products,
    OURS: partial(probae_fit, compile=True),
    RIVAL: numpyro_epoch,
    "probae, compiled, bf16": partial(probae_fit, compile=True, precision="bf16"),
    "probae, eager": partial(probae_fit, compile=False),
    "plain torch, fused Adam": plain_torch,
    "Pyro SVI.step": pyro_svi,
    "pythae's trainer": pythae_trainer,
}
RUNNERS = [name for name in CONTESTANTS if name != FLOOR]
OF_THE_VAE = ("plain torch, fused Adam", "Pyro SVI.step", "pythae's trainer")


_turn: Turn | None = None  # of the contestant in this process


def take_turn(name: str, problem: Problem) -> Timing:
    """Give a contestant, who has this process to himself, a turn; set him up before the first."""
    global _turn
    if _turn is None:
        _turn = CONTESTANTS[name](problem, images(problem))
    return _turn()


def run(problem: Problem, rounds: int, names: list[str]) -> dict[str, Any]:
    """Let the contestants take turns; return seconds per step, and those of compilation."""
    names = [name for name in names if problem.task == "vae" or name not in OF_THE_VAE]
    times: dict[str, list[float]] = {}
    compile_seconds: dict[str, float] = {}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        new = multiprocessing.get_context("spawn")
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, mp_context=new))
            for name in (FLOOR, *names)
        }
        for i in range(rounds + 1):
            for name in list(processes):
                try:
                    timing = processes[name].submit(take_turn, name, problem).result()
                except ImportError as error:
                    missing[name] = str(error)
                    print(f"{name} is left out: {error}", flush=True)
                    del processes[name]
                else:
                    if i == 0:  # a warm-up
                        compile_seconds[name] = timing.compile_seconds
                    else:
                        times.setdefault(name, []).append(timing.seconds_per_step)
    return {
        "problem": problem._asdict(),
        "times": times,
        "medians": {name: statistics.median(values) for name, values in times.items()},
        "compile_seconds": compile_seconds,
        "missing": missing,
    }


def heading(result: dict[str, Any]) -> str:
    """Return what tells a result from the others."""
    return f"{result['problem']['task']}, batch {result['problem']['batch_size']}"


def cell(medians: dict[str, float], name: str) -> str:
    """Return a median in ms, and as a multiple of the time of compiled ``fit``."""
    ratio = f" ({medians[name] / medians[OURS]:.2f}×)" if OURS in medians else ""
    return f"{1e3 * medians[name]:.2f}{ratio}"


def table(results: list[dict[str, Any]]) -> str:
    """Return medians in ms per step, and each as a multiple of the time of compiled ``fit``."""
    heads = [heading(result) for result in results]
    lines = [
        "| ms per step (times that of compiled `fit`) | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for name in CONTESTANTS:
        cells = [cell(r["medians"], name) if name in r["medians"] else "" for r in results]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compilation(results: list[dict[str, Any]]) -> str:
    """Return what compiling cost those who say it, in a line."""
    parts = []
    for result in results:
        costs = [f"{name} {s:.1f} s" for name, s in result["compile_seconds"].items() if s > 0]
        if costs:
            parts.append(f"{heading(result)}: " + ", ".join(costs))
    return "compilation, first turn: " + ("; ".join(parts) or "none")


def picture(results: list[dict[str, Any]], file: Path) -> None:
    """Draw one panel for each problem, and in it the medians, with the range of the turns."""
    from matplotlib.figure import Figure

    columns = min(2, len(results))
    rows = [results[i : i + columns] for i in range(0, len(results), columns)]
    heights = [max(len(result["medians"]) for result in row) + 2 for row in rows]
    figure = Figure(figsize=(6.5 * columns, 0.3 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(
        len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for ax in panels.flat[len(results) :]:
        ax.set_visible(False)
    for result, ax in zip(results, panels.flat, strict=False):
        medians = result["medians"]
        names = [name for name in CONTESTANTS if name in medians]
        widest = max(1e3 * max(result["times"][name]) for name in names)
        for at, name in enumerate(names):
            median, times = 1e3 * medians[name], [1e3 * each for each in result["times"][name]]
            color = "C0" if name.startswith("probae") else "0.75" if name == FLOOR else "C1"
            whiskers = [[median - min(times)], [max(times) - median]]
            ax.barh(at, median, color=color, xerr=whiskers, ecolor="0.3", capsize=2)
            ax.text(
                max(times) + 0.02 * widest, at, cell(medians, name), va="center", fontsize="small"
            )
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set(xlim=(0, 1.35 * widest), title=heading(result), xlabel="ms per step")
        ax.spines[["top", "right"]].set_visible(False)
    problem = Problem(**results[0]["problem"])
    layers = f"{X}-{problem.hidden}-{problem.z_dim}-{problem.hidden}-{X}"
    figure.suptitle(
        f"Milliseconds per training step, VAE {layers}: less is better\n"
        "(median and range of the turns; multiples of the time of compiled fit)"
    )
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["vae"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 1000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-data", type=int, default=60_000)
    parser.add_argument("--only", nargs="+", choices=RUNNERS, default=RUNNERS)
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--picture", type=Path, help="write the medians to this PNG file")
    arguments = parser.parse_args()
    results = [
        run(Problem(task, batch_size, arguments.num_data), arguments.rounds, arguments.only)
        for task in arguments.task
        for batch_size in arguments.batch_size
    ]
    text = f"{table(results)}\n\n{compilation(results)}"
    print(text)
    if arguments.out is not None:
        record = {
            "results": results,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    if arguments.picture is not None:
        picture(results, arguments.picture)


if __name__ == "__main__":
    main()
