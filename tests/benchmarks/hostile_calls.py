"""Hostile calls: does every public function answer nonsense with an error that names it?

Each public function and class gets a call that works, in which one or two arguments are replaced by
values of the wrong kind, shape, dtype, device or size. What may come back is a result without NaN
and infinities, or a ValueError or TypeError whose message names such an argument (a
FileNotFoundError for paths, a FloatingPointError from training, a refusal to compile).

    python -m tests.benchmarks.hostile_calls --number 10000
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import inspect
import json
import operator
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import probae
from probae import Autoencoder

X, Z, N = 6, 2, 5
SECONDS = 60  # after which a call hangs

# made by functions, not by users; and what is no function of its own
NOT_CALLED = {
    *("AdversarialELBO", "AdversarialRun", "AnnealedSamples", "Ball", "CalibrationRanks"),
    *("CannotCompile", "Chain", "Comparison", "Coverage", "IntrinsicDimension", "Kind"),
    *("LIKELIHOODS", "LangevinChain", "LikelihoodWarning", "LogLikelihood", "Neighbours"),
    *("ParzenScore", "ParzenWarning", "PosteriorSamples", "RetrievalScore", "Run", "Samples"),
    *("Sandwich", "SparseCodes", "TangentBasis", "Walk", "NoEncoder", "Geodesic", "Part"),
    *("EmbeddingComparison", "EmbeddingScore"),
    *("Corruption", "Decoder"),  # abstract
    *("GreyBernoulli", "UnitNormLinear"),  # constructors of torch's own
}
# torch's own, and the name that messages give to data; and what is called, whose errors are its own
NOT_HOSTILE = {"validate_args", "device", "dtype", "argument"}
CALLED = {"schedule", "optimizer", "statistic", "beta", "preset"}
# a part that does not fit another: the message names either
TOGETHER = {
    "Autoencoder": ["prior", "encoder", "decoder", "corruption", "factor", "discriminator"],
    "CodeCoupling": ["predictor"],
    "CorruptedDecoder": ["decoder", "corruption"],
    "SparseAutoencoder": ["encoder"],
    "AdversarialAutoencoder": ["in_shape"],
    "AdversarialVariationalBayes": ["in_shape"],
    "annealed_denoising": ["pair"],
    "PPCA": ["dimension of x"],
    "pretrain": ["encoder"],
    "PredictiveSparseDecomposition": ["scale"],  # of the coupling
    "compare_embeddings": ["x must fit into"],
    **{
        name: ["queries", "database", "query_labels", "database_labels"]
        for name in ("mean_average_precision", "precision_at_k", "recall_at_k")
    },
}
# sizes, in which a number may be too large for any memory; elsewhere it would only take long
SIZES = {
    *("x_dim", "z_dim", "in_shape", "out_shape", "hidden", "channels", "components", "levels"),
    *("x_shape", "k", "num_active", "noise_dim", "in_features", "out_features", "seed"),
}
# of a result: not numbers of interest where there are too few samples for them
MAY_BE_NAN = {"khat", "ess", "std_error", "mean_std_error", "r_hat", "difference"}
# what is infinite, or a density that is too low for float32
PASSES_ON = {"coupling_log_normalizer", "sparse_coding_energy", "adversarial_elbo"} | {
    *("log_likelihood", "shared_log_likelihood"),
}
TRAINING = {"langevin", "fit", "pretrain", "fit_proposal", "fit_adversarial", "annealed_denoising"}


def bits(*shape: int) -> Tensor:
    return (torch.rand(*shape) > 0.5).float()


def mlp(out: Any = (2, Z)) -> nn.Module:
    return probae.MLP(X, out)


def encoder() -> nn.Module:
    return probae.GaussianEncoder(mlp())


def decoder() -> nn.Module:
    return probae.GaussianDecoder(probae.MLP(Z, X))


def vae(likelihood: str = "gaussian") -> Autoencoder:
    return probae.VAE(X, Z, hidden=(4,), likelihood=likelihood)


def hashing() -> Autoencoder:
    return probae.SemanticHashing(X, Z, hidden=(4,))


def denoising() -> Autoencoder:
    return probae.DenoisingAutoencoder(X, Z, corruption=probae.GaussianNoise(0.3), hidden=(4,))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def ll() -> Any:
    return probae.log_likelihood(vae(), torch.ones(N, X), "elbo", 4)


def saved(folder: Path) -> Path:
    return probae.save(vae(), folder / "pair")


FEW = {"epochs": 1, "batch_size": 4, "progress": False}
AIS = {"num_temperatures": 3, "num_leapfrogs": 1, "num_pilot": 2}


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, 1, 4, 4)


def of_images() -> Autoencoder:
    return probae.VAE((1, 4, 4), 2, hidden=(4,), likelihood="continuous-bernoulli")


def plot_calls() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return arguments for the functions of probae.plots."""
    run = probae.fit(vae(), torch.ones(N, X), **FEW)
    ranks = probae.simulation_based_calibration(probae.PPCA(X, Z), 50)
    shares = probae.expected_coverage(probae.PPCA(X, Z), 50)
    return {
        "plots.is_image": lambda: {"x_shape": (1, 4, 4)},
        "plots.loss_curve": lambda: {"run_or_history": run},
        "plots.reconstructions": lambda: {"pair": of_images(), "x": images(N)},
        "plots.samples": lambda: {"pair": of_images(), "num_samples": 4},
        "plots.traversals": lambda: {"pair": of_images(), "num_steps": 3},
        "plots.score_field": lambda: {
            "pair": probae.DenoisingAutoencoder(2, 3, hidden=(4,)),
            "x": normal(N, 2),
            "num": 4,
        },
        "plots.tangent_planes": lambda: {
            "pair": of_images(),
            "x": images(2),
            "num_directions": 2,
        },
        "plots.latent_scatter": lambda: {"pair": vae(), "x": normal(N, X)},
        "plots.dictionary": lambda: {"pair": probae.PPCA((4, 4), 2), "num": 2},
        "plots.code_histogram": lambda: {"pair": vae(), "x": normal(N, X), "bins": 5},
        "plots.calibration_ranks": lambda: {"ranks": ranks},
        "plots.coverage": lambda: {"coverage": shares},
        "plots.likelihoods": lambda: {"entries": {"a": ll(), "b": ll()}},
    }


def calls(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return arguments, fresh each time, with which each public name can be called."""
    path = saved(folder)
    codes = torch.arange(12).reshape(4, 3) % 2 == 0
    labels = torch.tensor([0, 1, 0, 1])
    return {
        "ELBO": lambda: {},
        "IWAE": lambda: {},
        "LinearWarmup": lambda: {"epochs": 2.0},
        "Walkback": lambda: {},
        "Annealing": lambda: {},
        "MLP": lambda: {"in_shape": X, "out_shape": 3, "hidden": (4,)},
        "ConvNet": lambda: {"in_shape": (1, 8, 8), "out_shape": 3, "channels": (2,)},
        "DeconvNet": lambda: {"in_shape": 3, "out_shape": (1, 8, 8), "channels": (2,)},
        "TransposedMLP": lambda: {"mlp": probae.MLP(X, 3)},
        "PPCA": lambda: {"x_dim": X, "z_dim": Z},
        "VAE": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "UndercompleteAutoencoder": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "SparseAutoencoder": lambda: {"x_dim": X, "z_dim": Z},
        "DenoisingAutoencoder": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "DenoisingVAE": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "ContractiveAutoencoder": lambda: {"x_dim": X, "z_dim": Z},
        "PredictiveSparseDecomposition": lambda: {"x_dim": X, "z_dim": Z, "max_iterations": 5},
        "SemanticHashing": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "AdversarialAutoencoder": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "AdversarialVariationalBayes": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "GAN": lambda: {"x_dim": X, "z_dim": Z, "hidden": (4,)},
        "Autoencoder": lambda: {
            "prior": probae.StandardNormalPrior(Z),
            "encoder": encoder(),
            "decoder": decoder(),
        },
        "AutoencoderEstimator": lambda: {"epochs": 1},
        "Discriminator": lambda: {"network": mlp(1), "sees": "data"},
        "ImplicitEncoder": lambda: {
            "network": probae.MLP(X + 2, Z),
            "x_dim": X,
            "z_dim": Z,
            "noise_dim": 2,
        },
        "BernoulliDecoder": lambda: {"network": probae.MLP(Z, X)},
        "CategoricalDecoder": lambda: {"network": probae.MLP(Z, (X, 3))},
        "ContinuousBernoulliDecoder": lambda: {"network": probae.MLP(Z, X)},
        "DiscretizedLogisticDecoder": lambda: {"network": probae.MLP(Z, (2, X))},
        "GaussianDecoder": lambda: {"network": probae.MLP(Z, X)},
        "HeteroscedasticGaussianDecoder": lambda: {"network": probae.MLP(Z, (2, X))},
        "PoissonDecoder": lambda: {"network": probae.MLP(Z, X)},
        "CorruptedDecoder": lambda: {"decoder": decoder(), "corruption": probae.GaussianNoise(1.0)},
        "BernoulliEncoder": lambda: {"network": mlp(Z)},
        "CategoricalEncoder": lambda: {"network": mlp(Z)},
        "ConditionalBernoulliEncoder": lambda: {"network": mlp((3, Z)), "num_active": 1},
        "GaussianEncoder": lambda: {"network": mlp()},
        "JumpReLUEncoder": lambda: {"network": mlp(Z), "z_dim": Z},
        "LaplaceEncoder": lambda: {"network": mlp()},
        "LinearGaussianPosterior": lambda: {"decoder": decoder()},
        "LogNormalEncoder": lambda: {"network": mlp()},
        "NoisyGateEncoder": lambda: {"network": mlp(Z), "z_dim": Z},
        "NoisySigmoidEncoder": lambda: {"network": mlp(Z)},
        "PointEncoder": lambda: {"network": mlp(Z)},
        "ProbitEncoder": lambda: {"network": mlp(Z)},
        "SparseCodingEncoder": lambda: {"decoder": decoder(), "rate": 1.0, "max_iterations": 5},
        "SpikeAndSlabEncoder": lambda: {"network": mlp((3, Z))},
        "ThresholdEncoder": lambda: {"network": mlp(Z)},
        "TopKEncoder": lambda: {"network": mlp(Z), "num_active": 1},
        "BernoulliPrior": lambda: {"z_dim": Z},
        "CategoricalPrior": lambda: {"z_dim": Z},
        "ExponentialPrior": lambda: {"z_dim": Z},
        "FlatPrior": lambda: {"z_dim": Z},
        "FlowPrior": lambda: {"z_dim": Z, "transforms": 1, "hidden": (4,)},
        "GaussianMixturePrior": lambda: {"z_dim": Z, "components": 2},
        "LaplacePrior": lambda: {"z_dim": Z},
        "SpikeAndSlabPrior": lambda: {"z_dim": Z},
        "StandardNormalPrior": lambda: {"z_dim": Z},
        "StudentTPrior": lambda: {"z_dim": Z},
        "SubsetPrior": lambda: {"z_dim": Z, "num_active": 1},
        "VampPrior": lambda: {"encoder": encoder(), "x_shape": X, "components": 2},
        "BitFlip": lambda: {"probability": 0.1},
        "GaussianNoise": lambda: {"scale": 0.1},
        "Masking": lambda: {"probability": 0.1},
        "PoissonThinning": lambda: {"probability": 0.1},
        "SaltAndPepper": lambda: {"probability": 0.1},
        "CodeCoupling": lambda: {"predictor": probae.PointEncoder(mlp(Z)), "scale": 1.0},
        "ContractivePenalty": lambda: {"encoder": probae.PointEncoder(mlp(Z)), "weight": 1.0},
        "ConditionalBernoulli": lambda: {"logits": normal(3), "k": 1},
        "ContinuousBernoulli": lambda: {"logits": normal(3)},
        "DiscretizedLogistic": lambda: {"loc": torch.rand(3), "scale": torch.ones(3)},
        "SpikeAndSlab": lambda: {
            "gate": dist.Bernoulli(torch.full((3,), 0.5)).to_event(1),
            "slab": dist.Normal(torch.zeros(3), torch.ones(3)),
        },
        "CodeIndex": lambda: {"codes": codes},
        "active_units": lambda: {"pair": vae(), "x": normal(N, X)},
        "adversarial_elbo": lambda: {
            "pair": probae.AdversarialVariationalBayes(X, Z, hidden=(4,)),
            "x": normal(N, X),
            "num_samples": 2,
        },
        "annealed_denoising": lambda: {"pairs": denoising(), "x0": normal(N, X), "num_steps": 2},
        "as_tensor": lambda: {"x": normal(3)},
        "bdmc": lambda: {
            "pair": vae(),
            "num_data": 2,
            "num_chains": 2,
            "annealing": probae.Annealing(**AIS),
        },
        "binarize": lambda: {"x": torch.rand(N, X)},
        "binary_codes": lambda: {"pair": hashing(), "x": bits(N, X)},
        "compare_embeddings": lambda: {
            "methods": {"VAE": probae.VAE(X, Z, hidden=(4,))},
            "train": bits(20, X),
            "test": bits(12, X),
            "num_neighbours": 3,
        },
        "compare": lambda: {"first": ll(), "second": ll()},
        "coupling_log_normalizer": lambda: {"prediction": normal(3), "rate": 1.0, "coupling": 1.0},
        "dead_features": lambda: {"z": normal(N, Z)},
        "denoise": lambda: {
            "pair": vae(),
            "x_tilde": normal(N, X),
            "corruption": probae.GaussianNoise(0.3),
            "num_samples": 3,
        },
        "dequantize": lambda: {"x": bits(N, X), "levels": 2},
        "expected_coverage": lambda: {"pair": vae(), "num_simulations": 20, "num_draws": 4},
        "feature_density": lambda: {"z": normal(N, Z)},
        "fit": lambda: {"pair": vae(), "x": normal(N, X), **FEW},
        "fit_adversarial": lambda: {
            "pair": probae.GAN(X, Z, hidden=(4,), discriminator=(4,)),
            "x": normal(N, X),
            **FEW,
        },
        "fit_proposal": lambda: {"pair": vae(), "x": normal(N, X), "hidden": (4,), **FEW},
        "fraction_of_variance_unexplained": lambda: {"x": normal(N, X), "x_hat": normal(N, X)},
        "geodesic": lambda: {"pair": vae(), "z0": normal(Z), "z1": normal(Z)},
        "gsn_chain": lambda: {"pair": denoising(), "x0": normal(N, X), "num_steps": 2},
        "hamming_distance": lambda: {
            "a": probae.pack_codes(codes),
            "b": probae.pack_codes(codes),
        },
        "interpolate": lambda: {
            "pair": vae(),
            "start": normal(Z),
            "end": normal(Z),
            "num_steps": 3,
        },
        "intrinsic_dimension": lambda: {"pair": vae(), "x": normal(N, X)},
        "jacobian_norm": lambda: {"encoder": probae.PointEncoder(mlp(Z)), "x": normal(N, X)},
        "l0_norm": lambda: {"z": normal(N, Z)},
        "langevin": lambda: {
            "pair": denoising(),
            "x0": normal(N, X),
            "num_steps": 2,
            "step_size": 0.01,
        },
        "lasso": lambda: {
            "x": normal(N, X),
            "dictionary": normal(X, Z),
            "rate": 1.0,
            "max_iterations": 20,
        },
        "load": lambda: {"path": path},
        "load_dataset": lambda: {"name": "digits", "root": folder},
        "log_likelihood": lambda: {
            "pair": vae(),
            "x": normal(N, X),
            "method": "iwae",
            "num_samples": 3,
        },
        "mean_average_precision": lambda: {
            "queries": codes,
            "database": codes,
            "query_labels": labels,
            "database_labels": labels,
        },
        "pack_codes": lambda: {"bits": codes},
        "parzen_log_likelihood": lambda: {
            "samples": normal(N, X),
            "x_val": normal(N, X),
            "x_test": normal(N, X),
        },
        "posterior_samples": lambda: {
            "pair": vae(),
            "x": normal(2, X),
            "num_samples": 4,
            "warmup": 2,
        },
        "precision_at_k": lambda: {
            "queries": codes,
            "database": codes,
            "query_labels": labels,
            "database_labels": labels,
            "k": 2,
        },
        "recall_at_k": lambda: {
            "queries": codes,
            "database": codes,
            "query_labels": labels,
            "database_labels": labels,
            "k": 2,
        },
        "pretrain": lambda: {"pair": vae(), "x": normal(N, X), **FEW},
        "pullback_metric": lambda: {"pair": vae(), "z": normal(N, Z)},
        "reconstruct": lambda: {"pair": vae(), "x": normal(N, X)},
        "render": lambda: {"pair": vae(), "x": normal(N, X), "text": True},
        "sample": lambda: {"pair": vae(), "num_samples": 2},
        "save": lambda: {"pair": vae(), "path": folder / "again"},
        "score": lambda: {"pair": denoising(), "x": normal(N, X)},
        "simulation_based_calibration": lambda: {
            "pair": vae(),
            "num_simulations": 20,
            "num_draws": 4,
        },
        "shared_log_likelihood": lambda: {
            "pair": vae(),
            "x": normal(N, X),
            "method": "iwae",
            "num_samples": 3,
        },
        "sparse_coding_energy": lambda: {
            "x": normal(N, X),
            "codes": normal(N, Z),
            "dictionary": normal(X, Z),
            "rate": 1.0,
        },
        "stack_missing": lambda: {"x": normal(N, X)},
        "tangent_basis": lambda: {"pair": vae(), "x": normal(N, X)},
        "to_arviz": lambda: {
            "pair": vae(),
            "x": normal(N, X),
            "num_samples": 2,
            "num_prior_samples": 2,
        },
        "trace_shapes": lambda: {"pair": vae(), "x": normal(N, X)},
        "traverse": lambda: {"pair": vae(), "start": normal(Z), "num_steps": 3},
        "unpack_codes": lambda: {"packed": probae.pack_codes(codes), "z_dim": 3},
        **plot_calls(),
    }


class Blank:
    """Of no use to any function."""


NUMBERS: tuple[Any, ...] = (
    *(None, True, False, -1, 0, -7, 1.5, 0.0, -0.0, -0.5, float("nan"), float("inf")),
    *(float("-inf"), 1e308, -1e308, 5e-324, 1e-30, 1 + 1j, np.float64("nan"), np.int64(-3)),
    *(np.float32(0.5), np.bool_(True)),
)
HUGE: tuple[Any, ...] = (2**45, 2**70, 10**400, [2**45], (2**40, 2**40), -(2**70))
TEXTS: tuple[Any, ...] = (
    *("", "x", "meta", "cuda:99", "gaussian", "../../etc/passwd", "a\0b", "é" * 300, b"x"),
    *("nan", "missing.npy", "x" * 5000 + ".npy"),
)
THINGS: tuple[Callable[[], Any], ...] = (
    *(list, tuple, dict, set, Blank, object, lambda: int, lambda: len, lambda: print),
    *(lambda: [None], lambda: [1, "a"], lambda: (0,), lambda: (-1,), lambda: (1.5,)),
    *(lambda: [True], lambda: {"a": 1}, lambda: [[1], [1, 2]], lambda: iter([1])),
    *(lambda: torch.device("meta"), lambda: torch.float16, lambda: Path("nowhere")),
    *(lambda: nn.Linear(3, 3), lambda: nn.Identity(), lambda: torch.Generator()),
    lambda: torch.distributions.Normal(0.0, 1.0),
    *(vae, hashing, denoising, lambda: vae().to("meta"), lambda: vae().half()),
    *(lambda: probae.PPCA(X + 1, Z), lambda: encoder(), lambda: decoder()),
    *(lambda: probae.GaussianNoise(0.1), lambda: probae.FlatPrior(Z), lambda: probae.Masking(0.5)),
    *(lambda: TensorDataset(torch.zeros(3, X)), lambda: DataLoader(TensorDataset(torch.ones(3)))),
)


def tensors() -> Iterator[Callable[[], Any]]:
    """Return tensors and arrays of odd shapes, dtypes, devices and values."""
    shapes = ((), (0,), (0, X), (N, 0), (X,), (Z,), (N, X), (N, Z), (N, X + 1), (1, N, X), (N, 1))
    for shape in (*shapes, (2,) * 12, (4, 3), (4,)):
        yield lambda shape=shape: torch.randn(shape)
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16):
        yield lambda dtype=dtype: torch.ones(N, X).to(dtype)
    for dtype in (torch.complex64, torch.float64, torch.int8):
        yield lambda dtype=dtype: torch.ones(N, X).to(dtype)
    yield lambda: torch.ones(N, Z, dtype=torch.int64)
    for value in (float("nan"), float("inf"), -1.0, 1e30, 1e38, 1e-40, 0.5):
        yield lambda value=value: torch.full((N, X), value)
        yield lambda value=value: torch.full((N, Z), value)
    for value in (1e308, 5e-324):
        yield lambda value=value: torch.full((N, X), value, dtype=torch.float64)
    for place in ((N, X), (N, Z), (Z,)):
        yield lambda place=place: torch.empty(place, device="meta")
    yield lambda: torch.ones(N, X).to_sparse()
    yield lambda: torch.ones(N, X, requires_grad=True)
    yield lambda: torch.ones(1, X).expand(N, X)
    yield lambda: np.ones((N, X), dtype="U3")
    yield lambda: np.array([[None] * X] * N)
    yield lambda: np.ma.masked_array(np.ones((N, X)), mask=np.eye(N, X))
    yield lambda: np.ones((N, X), dtype=">f8")
    yield lambda: np.zeros((N, X), dtype=[("a", "f4")])
    yield lambda: np.array(1.0)
    yield lambda: np.ones((N, X), dtype="M8[s]")
    yield lambda: np.full((N, X), 1e300)


def pool(argument: str) -> list[Callable[[], Any]]:
    """Return hostile values for an argument, each made anew when called."""
    plain = [*NUMBERS, *TEXTS, *(HUGE if argument in SIZES else ())]
    things = [thing for thing in THINGS if argument not in CALLED or not callable(thing())]
    return [*((lambda value=value: value) for value in plain), *things, *tensors()]


class Hang(BaseException):
    """A call took too long."""


def _ring(*_: Any) -> None:
    raise Hang


def broken(value: Any, name: str = "result", depth: int = 0) -> str | None:
    """Return the name of a part of a result that is NaN or infinite."""
    if name.rpartition(".")[2] in MAY_BE_NAN or depth > 4:
        return None
    if isinstance(value, Tensor):
        whole = value.device.type == "meta" or bool(torch.isfinite(value).all())
        return None if whole else name
    if isinstance(value, nn.Module):
        items = list(value.state_dict().items())
    elif hasattr(value, "_asdict"):
        items = list(value._asdict().items())
    elif dataclasses.is_dataclass(value):
        items = list(vars(value).items())
    elif isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return None
    found = (broken(item, f"{name}.{key}", depth + 1) for key, item in items)
    return next((text for text in found if text is not None), None)


def allowed(name: str, error: BaseException) -> bool:
    """Whether the documentation of a function tells of errors of this kind."""
    if isinstance(error, ValueError | TypeError | FileNotFoundError | probae.CannotCompile):
        return True
    if isinstance(error, FloatingPointError):
        return name in TRAINING
    if isinstance(error, OSError):  # of a name that no file can have
        return name in ("save", "fit")
    return out_of_memory(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether this is about what no memory could hold; torch has no class for it."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate" in text or "Storage size" in text


def call(name: str, arguments: dict[str, Any], hostile: list[str]) -> str:
    """Call a public function, and say what came of it."""
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(name)(**arguments)
            plt.close("all")
        fault = None if name in PASSES_ON else broken(result)
        return "a result" if fault is None else f"NOT FINITE: {fault}"
    except Hang:
        return "HANG"
    except Exception as error:
        kind = type(error).__name__
        if not allowed(name, error):
            return f"CRASH: {kind}: {str(error)[:200]}"
        others = (
            parameters(name) if {"pair", "pairs"} & {*hostile} else []
        )  # data that do not fit it
        hostile = [*hostile, *others, *TOGETHER.get(name, [])]
        if out_of_memory(error):
            return "out of memory"
        if isinstance(error, ValueError | TypeError) and not names(error, hostile):
            return f"UNNAMED: {kind}: {str(error)[:200]}"
        return kind
    finally:
        signal.alarm(0)


def function(name: str) -> Callable[..., Any]:
    """Return a public function, of probae or of probae.plots."""
    return operator.attrgetter(name)(probae)


def public() -> list[str]:
    """Return the names of all that is public and can be called."""
    plots = [f"plots.{name}" for name in probae.plots.__all__]
    return [*(name for name in probae.__all__ if name not in NOT_CALLED), *plots]


def names(error: BaseException, arguments: list[str]) -> bool:
    """Whether a message names one of these arguments."""
    return any(argument in str(error) for argument in arguments)


def short(value: Any) -> str:
    """Return a value in a few words."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{tuple(value.shape)} {value.dtype} {str(value).replace(chr(10), ' ')[:60]}"
    return f"{type(value).__name__} {repr(value)[:60]}"


def parameters(name: str) -> list[str]:
    """Return the names of the arguments of a public function, without *args and **options."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function(name)).parameters
    return [k for k, p in found.items() if p.kind not in kinds and k not in NOT_HOSTILE]


def benchmark(
    number: int, seed: int = 0, only: str | None = None, tell: Callable[..., None] = print
) -> dict[str, Any]:
    """Make so many calls, and count what comes of them."""
    rng = np.random.default_rng(seed)
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, str] = {}
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # a hostile path may be one that can be written to
        try:
            table = calls(Path(folder))
            called = [n for n in public() if only in (None, n)]
            places = [(n, argument) for n in called for argument in parameters(n)]
            rng.shuffle(places)
            start = time.perf_counter()
            for step in range(number):
                name, argument = places[step % len(places)]
                torch.manual_seed(step)
                values = pool(argument)
                changed = {argument: values[rng.integers(len(values))]()}
                if rng.random() < 0.2:
                    other = str(rng.choice(parameters(name)))
                    values = pool(other)
                    changed = {other: values[rng.integers(len(values))](), **changed}
                result = call(name, table[name]() | changed, [*changed])
                kind, _, message = result.partition(": ")
                counts[kind] += 1
                if kind.isupper():
                    what = ", ".join(f"{key}={short(value)}" for key, value in changed.items())
                    faults.setdefault(f"{kind} {name} {[*changed][-1]} {message[:60]}", "")
                    faults[f"{kind} {name} {[*changed][-1]} {message[:60]}"] = f"{what}: {message}"
            seconds = time.perf_counter() - start
        finally:
            os.chdir(before)
    tell(f"{number} calls of {len(called)} functions in {seconds:.0f} s: {dict(counts)}")
    for key, text in sorted(faults.items()):
        tell(f"{key}\n    {text}")
    return {"number": number, "seed": seed, "counts": dict(counts), "faults": faults}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="name of one function")
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    args = parser.parse_args(arguments)
    result = benchmark(args.number, args.seed, args.only)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
