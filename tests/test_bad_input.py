"""Bad input of every kind to every public function: what the error says, and that nothing changed.

A message names the argument, what was expected and what came, and the fix where there is one. The
patterns below hold these pieces in that order.
"""

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import probae
from probae import MLP, Autoencoder, Kind

X, Z, N = 8, 2, 6
NAN, INF = math.nan, math.inf


def bits(n: int = N) -> Tensor:
    return torch.rand(n, X).round()


def bits_fixed() -> Tensor:
    return torch.tensor([[0.0, 1.0] * (X // 2)]).repeat(N, 1)


def vae(likelihood: str = "bernoulli", **options: Any) -> Autoencoder:
    return probae.VAE(X, Z, hidden=(4,), likelihood=likelihood, likelihood_options=options)


def point(prior: str = "normal") -> Autoencoder:
    return probae.UndercompleteAutoencoder(X, Z, hidden=(4,), likelihood="bernoulli", prior=prior)


def bits_code() -> Autoencoder:
    return Autoencoder(
        probae.BernoulliPrior(Z),
        probae.BernoulliEncoder(MLP(X, Z)),
        probae.BernoulliDecoder(MLP(Z, X)),
    )


def refuses(call: Callable[[], object], message: str, pair: Autoencoder | None = None) -> None:
    """Check the error, and that neither the pair nor the world around it was changed."""
    before = {} if pair is None else copy.deepcopy(pair.state_dict())
    modes = [] if pair is None else [module.training for module in pair.modules()]
    stream, stored = torch.get_rng_state(), dict(pyro.get_param_store().items())
    with pytest.raises(ValueError, match=message):
        call()
    assert dict(pyro.get_param_store().items()) == stored
    assert torch.is_grad_enabled()
    if pair is not None:
        assert torch.equal(torch.get_rng_state(), stream)
        assert [module.training for module in pair.modules()] == modes
        assert all(parameter.grad is None for parameter in pair.parameters())
        for name, tensor in pair.state_dict().items():
            assert torch.equal(tensor, before[name]), name


TAKERS: dict[str, Callable[[Autoencoder, Any], object]] = {
    "fit": lambda pair, x: probae.fit(pair, x, epochs=1, progress=False),
    "val": lambda pair, x: probae.fit(pair, bits_fixed(), x, epochs=1, progress=False),
    "log_likelihood": lambda pair, x: probae.log_likelihood(pair, x, "elbo", 2),
    "reconstruct": lambda pair, x: probae.reconstruct(pair, x),
    "active_units": lambda pair, x: probae.active_units(pair, x),
    "initialize": lambda pair, x: pair.initialize(x),
}


def with_value(value: float) -> Tensor:
    x = torch.zeros(N, X)
    x[3, 5] = value
    return x


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(bits())

    def __len__(self) -> int:
        return N


class Items(Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


BAD_DATA = {
    "one datum": (
        lambda: bits()[0],
        r"NAME must have shape \(N, 8\), got \(8,\); .*unsqueeze\(0\)",
    ),
    "width": (lambda: bits()[:, :5], r"NAME must have shape \(N, 8\), got \(6, 5\)$"),
    "image": (
        lambda: bits().reshape(N, 1, 2, 4),
        r"\(N, 8\), got \(6, 1, 2, 4\); .*reshape\(-1, 8\)",
    ),
    "no dimension": (lambda: torch.tensor(1.0), r"NAME must have shape \(N, .*got shape \(\)"),
    "no data": (lambda: bits()[:0], r"NAME must have shape .* N >= 1 .*got shape \(0, 8\)"),
    "no pixels": (lambda: bits()[:, :0], r"NAME must have shape .*got shape \(6, 0\)"),
    "NaN": (
        lambda: with_value(NAN),
        r"NAME must be finite, got 1 NaN .*row 3 \(NAME\[3\]\); remove",
    ),
    "infinity": (lambda: with_value(-INF), r"NAME must be finite, got 1 .*row 3"),
    "integers": (lambda: bits().int(), r"NAME must be floating.*got torch.int32; .*\.float\(\)"),
    "bytes": (lambda: bits().byte().numpy(), r"NAME must be floating.*got uint8; .*by 255"),
    "complex": (lambda: bits() * 1j, r"NAME must be floating.*got torch.complex64; pass real"),
    "sparse": (lambda: bits().to_sparse(), r"NAME must be dense, got .*; pass NAME.to_dense\(\)"),
    "objects": (lambda: np.array([[None] * X]), r"NAME must be floating.*got object"),
    "list": (lambda: bits().tolist(), r"NAME must be a tensor, .*got list; .*numpy.asarray"),
    "number": (lambda: 3, r"NAME must be a tensor, .*got int"),
    "loader": (
        lambda: DataLoader(TensorDataset(bits())),
        r"NAME must be .* torch Dataset; got DataL",
    ),
    "stream": (Stream, r"NAME must be a map-style Dataset .*got Stream; .*torch.stack"),
    "empty Dataset": (Items, r"NAME (is empty|must have shape .* N >= 1)"),
    "Dataset of dicts": (lambda: Items({"x": bits()[0]}), r"NAME\[0\] must be a tensor .*got dict"),
    "Dataset of text": (lambda: Items("a", "b"), r"NAME\[0\] must be a tensor .*got str"),
    "ragged Dataset": (lambda: Items(bits()[0], bits()[0, :4]), r"NAME\[1\] must .*\(8,\).*\(4,\)"),
    "Dataset of ints": (lambda: Items(bits()[0].int()), r"NAME must be floating.*got torch.int32"),
    "name": (lambda: "digits", r"NAME must be the path .*'digits'; .*load_dataset\('digits'\)"),
    "file": (lambda: "x.csv", r"NAME must be the path of a \.npy or \.npz file, got 'x.csv'"),
}


STREAM_TAKERS = ("fit", "val")  # which read an IterableDataset in passes


@pytest.mark.parametrize(
    ("taker", "case"),
    [
        (taker, case)
        for taker in TAKERS
        for case in BAD_DATA
        if case != "stream" or taker not in STREAM_TAKERS
    ],
)
def test_bad_data(taker: str, case: str) -> None:
    make, message = BAD_DATA[case]
    pair, x = vae(), make()
    name = "val" if taker == "val" else "x"
    refuses(lambda: TAKERS[taker](pair, x), message.replace("NAME", name), pair)


@pytest.mark.parametrize("taker", TAKERS)
def test_missing_file(taker: str, tmp_path: Path) -> None:
    name = "val" if taker == "val" else "x"
    with pytest.raises(FileNotFoundError, match=rf"{name}: there is no file .*nowhere.npy"):
        TAKERS[taker](vae(), tmp_path / "nowhere.npy")


OUTSIDE = [
    ("bernoulli", {}, 1.5, r"\(\[0, 1\]\)", "1/255, or pick likelihood='gaussian'"),
    ("bernoulli", {}, -0.1, r"\(\[0, 1\]\)", "1/255"),
    ("bernoulli", {}, 255.0, r"\(\[0, 1\]\)", "1/255"),
    ("continuous-bernoulli", {}, 1.5, r"\(\[0, 1\]\)", "scale the data, or pick a likelihood"),
    ("categorical", {"num_classes": 3}, 3.0, r"upper_bound=2", "pick a likelihood"),
    ("categorical", {"num_classes": 3}, 0.5, r"lower_bound=0", "pick a likelihood"),
    ("categorical", {"num_classes": 3}, -1.0, r"lower_bound=0", "pick a likelihood"),
    ("discretized-logistic", {"levels": 17}, 0.1, r"multiples of 1/16 in \[0, 1\]", "pick"),
    ("discretized-logistic", {"levels": 17}, 17 / 16, r"multiples of 1/16", "pick"),
    ("poisson", {}, -1.0, r"\{0, 1, 2, …\}", "pick a likelihood"),
    ("poisson", {}, 0.5, r"\{0, 1, 2, …\}", "pick a likelihood"),
]


@pytest.mark.parametrize("taker", ["fit", "val", "log_likelihood", "reconstruct"])
@pytest.mark.parametrize(("likelihood", "options", "value", "support", "fix"), OUTSIDE)
def test_values_outside_the_support(
    taker: str, likelihood: str, options: dict[str, int], value: float, support: str, fix: str
) -> None:
    pair = vae(likelihood, **options)
    x = with_value(value)
    name = "val" if taker == "val" else "x"
    came = rf"got 1 values outside, the first {value:g} at index \(3, 5\)"
    if taker == "log_likelihood" and likelihood == "bernoulli":
        support, fix = r"\(\{0, 1\}\)", r"binarise them with probae.binarize\(x\)"
    message = rf"{name} must lie in the support of the decoder \(?.*{support}.*{came}; .*{fix}"
    refuses(lambda: TAKERS[taker](pair, x), message, pair)


def test_the_index_of_a_bad_value_counts_from_the_first_row() -> None:
    x = torch.zeros(20_000, 2)  # checked in blocks
    x[19_999, 1] = 2
    pair = probae.VAE(2, 1, hidden=(2,))
    refuses(lambda: probae.reconstruct(pair, x), r"the first 2 at index \(19999, 1\)", pair)


def test_a_support_of_vectors_is_checked_too() -> None:
    class Proportions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = MLP(Z, X)

        def forward(self, z: Tensor) -> Any:
            return dist.Dirichlet(self.network(z).exp())

    encoder = probae.GaussianEncoder(MLP(X, (2, Z)))
    pair = Autoencoder(probae.StandardNormalPrior(Z), encoder, Proportions())
    good = torch.softmax(torch.randn(N, X), -1)
    probae.fit(pair, good, epochs=1, progress=False)
    message = r"x must lie in the support .*Simplex.*the first \[.*\] at index \(0,\)"
    pair = copy.deepcopy(pair)
    pair.zero_grad()
    refuses(lambda: probae.reconstruct(pair, 2 * good), message)


def test_grey_pixels_have_a_loss_but_no_likelihood() -> None:
    pair, grey = vae(), torch.rand(N, X)
    message = r"x must lie in .*\{0, 1\}.*grey pixels .*probae.binarize\(x\).*continuous-bernoulli"
    for method in ("auto", "elbo", "iwae"):
        refuses(lambda m=method: probae.log_likelihood(pair, grey, m, 2), message, pair)
    assert probae.reconstruct(pair, grey).batch_shape == (N,)
    assert math.isfinite(probae.fit(pair, grey, epochs=1, progress=False).history["loss"][0])


@pytest.mark.parametrize("program", ["model", "guide"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bits().double(), r"x must have the dtype .*float32, got torch.float64; .*x.to\("),
        (lambda: bits().half(), r"x must have the dtype .*float32, got torch.float16"),
        (lambda: bits().int(), r"x must have a floating dtype, got torch.int32; convert with x.to"),
        (lambda: bits().numpy(), r"x must be a torch.Tensor, got ndarray"),
        (lambda: bits()[0], r"x must have shape \(N, 8\), got \(8,\); .*unsqueeze"),
        (lambda: bits()[:0], r"x is empty: expected at least one datum"),
    ],
)
def test_programs_check_their_input(program: str, make: Callable[[], object], message: str) -> None:
    pair, x = vae(), make()
    refuses(lambda: getattr(pair, program)(x), message, pair)


def fit(pair: Autoencoder, **keywords: Any) -> object:
    return probae.fit(pair, bits_fixed(), **{"epochs": 1, "progress": False, **keywords})


COUNTS = [0, -1, 2.5, True, "3", NAN, [2]]
POSITIVES = [0, -1.0, NAN, INF, True, "3", [1.0]]


def short(value: object) -> str:
    """Name a case the same in every process: without addresses."""
    return re.sub(r" at 0x.*", "", str(value))[:40]


FIT = [
    *(({"epochs": v}, r"epochs must be an int >= 1, got") for v in [*COUNTS, None]),
    *(({"batch_size": v}, r"batch_size must be an int >= 1, got") for v in [*COUNTS, None]),
    *(({"lr": v}, r"lr must be a finite number > 0, got") for v in [*POSITIVES, None]),
    *(({"clip_norm": v}, r"clip_norm must be a finite number > 0, got") for v in POSITIVES),
    *(({"patience": v}, r"patience must be an int >= 1, got") for v in COUNTS),
    ({"patience": 3}, r"patience needs validation data: pass val"),
    ({"seed": 1.5}, r"seed must be a 64-bit int, or None .*got 1.5"),
    ({"seed": "0"}, r"seed must be a 64-bit int, or None .*got '0'"),
    ({"seed": 2**70}, r"seed must be a 64-bit int"),
    ({"objective": "elbo"}, r"objective must be an instance of pyro.infer.ELBO.*got 'elbo'"),
    ({"objective": probae.ELBO}, r"objective must be an instance .*probae.ELBO\(\), got <class"),
    (
        {"objective": pyro.infer.TraceGraph_ELBO()},
        r"differentiable_loss, which TraceGraph_ELBO lack",
    ),
    ({"objective": pyro.infer.RenyiELBO()}, r"which RenyiELBO lacks; use .*probae.IWAE"),
    ({"schedule": "warm"}, r"schedule must be 'constant', 'cosine' or a function .*got 'warm'"),
    ({"schedule": None}, r"schedule must be .*got None"),
    ({"schedule": lambda optimizer: 3}, r"schedule must return a torch scheduler .*got int"),
    ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, r"without a metric, got ReduceLROn"),
    ({"optimizer": "adam"}, r"optimizer must be called with .*torch.optim.Adam.*got 'adam'"),
    ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, r"optimizer must be called with .*PyroOptim"),
    ({"optimizer": torch.optim.LBFGS}, r"optimizer must .* without a closure, got LBFGS"),
    ({"optimizer": lambda parameters, lr: None}, r"optimizer must make a torch.optim.Optimizer"),
    (
        {"val": bits_fixed(), "binarize": True, "x": 2 * torch.ones(N, X)},
        r"x must lie in \[0, 1\] to be bi",
    ),
]


@pytest.mark.parametrize(("keywords", "message"), FIT, ids=short)
def test_bad_arguments_of_fit(keywords: dict[str, Any], message: str) -> None:
    pair, keywords = vae(), dict(keywords)
    x = keywords.pop("x", bits())
    call = partial(probae.fit, pair, x, **{"epochs": 1, "progress": False, **keywords})
    refuses(call, message, pair)


def test_nothing_to_train() -> None:
    pair = vae().requires_grad_(False)
    refuses(lambda: fit(pair), r"pair has no parameters that require gradients", pair)


FUNCTIONS = [
    *(
        (
            lambda p, v=v: probae.log_likelihood(p, bits_fixed(), "iwae", v),
            r"num_samples must be an i",
        )
        for v in COUNTS
    ),
    *(
        (lambda p, v=v: probae.sample(p, v), r"num_samples must be an int >= 1, got")
        for v in COUNTS
    ),
    *(
        (
            lambda p, v=v: probae.log_likelihood(p, bits_fixed(), v),
            r"method must be one of auto, exac",
        )
        for v in ("AIS", "", None, 3, ["iwae"])
    ),
    (
        lambda p: probae.log_likelihood(p, bits_fixed(), "exact"),
        r"method='exact' needs .*use method='i",
    ),
    (
        lambda p: probae.log_likelihood(p, bits_fixed(), "iwae", 2, seed="a"),
        r"seed must be a 64-bit in",
    ),
    (lambda p: probae.sample(p, 2, seed=0.5), r"seed must be a 64-bit int, or None .*got 0.5"),
    *(
        (
            lambda p, v=v: probae.active_units(p, bits_fixed(), v),
            r"threshold must be a finite number",
        )
        for v in POSITIVES
    ),
]


@pytest.mark.parametrize(
    ("call", "message"), FUNCTIONS, ids=[str(i) for i in range(len(FUNCTIONS))]
)
def test_bad_arguments_of_functions(call: Callable[[Autoencoder], object], message: str) -> None:
    pair = vae()
    refuses(lambda: call(pair), message, pair)


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        ("encoder", r"proposal must be an encoder, a torch.nn.Module, got str"),
        (probae.GaussianEncoder(MLP(7, (2, Z))), r"proposal does not take x of shape \(2, 8\)"),
        (
            probae.GaussianEncoder(MLP(X, (2, 3))),
            r"continuous density,? .*with event shape \(2,\), .*\(3,\)",
        ),
        (probae.BernoulliEncoder(MLP(X, Z)), r"proposal is discrete but prior is continuous"),
        (probae.PointEncoder(MLP(X, Z)), r"continuous density,? .*got Delta"),
    ],
    ids=["text", "x", "z", "discrete", "point"],
)
def test_bad_proposals(proposal: object, message: str) -> None:
    pair = point()
    call = partial(probae.log_likelihood, pair, bits_fixed(), "iwae", 2, proposal=proposal)
    refuses(call, message, pair)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: probae.fit(p, bits_fixed(), progress=False),
        lambda p: probae.log_likelihood(p, bits_fixed()),
        lambda p: probae.reconstruct(p, bits_fixed()),
        lambda p: probae.active_units(p, bits_fixed()),
        probae.sample,
    ],
    ids=["fit", "log_likelihood", "reconstruct", "active_units", "sample"],
)
@pytest.mark.parametrize("not_a_pair", [nn.Linear(X, X), None, "vae", probae.VAE])
def test_what_is_no_pair(call: Callable[[Any], object], not_a_pair: Any) -> None:
    refuses(lambda: call(not_a_pair), r"pair must be a probae.Autoencoder, got \w+; compose one")


@pytest.mark.parametrize("method", ["elbo", "iwae", "auto"])
def test_point_codes_have_no_likelihood(method: str) -> None:
    pair = point()
    message = r"needs an encoder with a density, but the pair is of kind MAP_JOINT: .*proposal="
    refuses(lambda: probae.log_likelihood(pair, bits_fixed(), method, 2), message, pair)


@pytest.mark.parametrize("method", ["elbo", "iwae", "exact", "auto"])
def test_flat_priors_have_no_likelihood_and_no_samples(method: str) -> None:
    pair = point("flat")
    assert pair.kind is Kind.RECONSTRUCTION
    message = r"kind RECONSTRUCTION: its prior is flat, so there is no p\(x\).*prior='normal'"
    refuses(lambda: probae.log_likelihood(pair, bits_fixed(), method, 2), message, pair)
    message = r"kind RECONSTRUCTION: nothing can be drawn from its flat prior; .*prior='normal'"
    refuses(lambda: probae.sample(pair, 2), message, pair)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (point, r"guide site 'z' is a point code \(Delta\).*use a GaussianEncoder, or ELBO"),
        (bits_code, r"guide site 'z' .*no reparameterised gradient.*use ELBO"),
    ],
)
@pytest.mark.parametrize("dreg", [False, True])
def test_importance_weighting_refuses_guides_that_it_would_leave_wrong(
    build: Callable[[], Autoencoder], message: str, dreg: bool
) -> None:
    pair = build()
    refuses(lambda: fit(pair, objective=probae.IWAE(3, dreg=dreg)), message, pair)


@pytest.mark.parametrize("value", COUNTS)
def test_number_of_particles(value: Any) -> None:
    for objective in (probae.ELBO, probae.IWAE):
        refuses(
            lambda o=objective: o(num_particles=value), r"num_particles must be an int >= 1, got"
        )


@pytest.mark.parametrize("value", [-1, NAN, INF, "1", None, True])
def test_weight_of_the_kl(value: Any) -> None:
    refuses(
        lambda: probae.ELBO(beta=value), r"beta must be a finite number >= 0 or a function, got"
    )


@pytest.mark.parametrize(
    ("schedule", "came"),
    [
        (probae.LinearWarmup(3, start=-1.0), r"-1\.0 to 1\.0"),
        (probae.LinearWarmup(3, end=-1.0), r"0\.0 to -1\.0"),
        (lambda epoch: epoch, r"0\.0 to inf"),
    ],
)
def test_schedule_of_the_kl(schedule: Callable[[float], float], came: str) -> None:
    message = rf"beta as a function must be finite and >= 0 from epoch 0 to math.inf.*got {came}"
    refuses(lambda: probae.ELBO(beta=schedule), message)


@pytest.mark.parametrize("epochs", [0, -3, NAN, INF])
def test_length_of_a_warmup(epochs: float) -> None:
    message = r"epochs of a warm-up must be a finite number > 0, got"
    refuses(lambda: probae.LinearWarmup(epochs)(1.0), message)
    refuses(lambda: probae.ELBO(beta=probae.LinearWarmup(epochs)), message)


SHAPES = [0, (), (2, 0), (2, -1), 2.5, (2.5,), "ab", None, True, [True]]
PARTS: list[tuple[Callable[[], object], str]] = [
    *((lambda v=v: MLP(v, 2), r"in_shape must (be a positive int|have positive)") for v in SHAPES),
    *((lambda v=v: MLP(2, v), r"out_shape must (be a positive int|have positive)") for v in SHAPES),
    *(
        (lambda v=v: MLP(2, 2, v), r"hidden must (be a positive int|have positive)")
        for v in SHAPES
        if v != ()
    ),
    *(
        (lambda v=v, h=h: MLP(2, 2, h, v), r"activation must be one of relu, .*, got")
        for v in ("swish", "", None, 3, ["relu"], nn.ReLU)
        for h in ((), (3,))
    ),
    (
        lambda: probae.ConvNet(8, 2, (4,)),
        r"in_shape .* \(channels, height, width\), got 8; .*channels=\(\)",
    ),
    (
        lambda: probae.ConvNet((8, 8), 2, (4,)),
        r"in_shape .* \(channels, height, width\), got \(8, 8\)",
    ),
    (lambda: probae.ConvNet((1, 8, 8), 2, ()), r"channels must be .* non-empty"),
    (lambda: probae.DeconvNet(2, 8, (4,)), r"out_shape .* \(channels, height, width\), got 8"),
    (lambda: probae.DeconvNet(2, (1, 8, 8), (0,)), r"channels must have positive entries"),
    *(
        (lambda v=v, p=p: p(v), r"z_dim must be an int >= 1, got")
        for v in [*COUNTS, (2, 3), None]
        for p in (
            probae.StandardNormalPrior,
            probae.FlatPrior,
            probae.LaplacePrior,
            probae.GaussianMixturePrior,
            probae.FlowPrior,
            probae.BernoulliPrior,
            probae.CategoricalPrior,
        )
    ),
    *(
        (lambda v=v: probae.LaplacePrior(2, v), r"rate must be a finite number > 0")
        for v in POSITIVES
    ),
    *(
        (lambda v=v: probae.GaussianMixturePrior(2, v), r"components must be an int >= 1")
        for v in COUNTS
    ),
    *(
        (
            lambda v=v: probae.VampPrior(probae.GaussianEncoder(MLP(8, (2, 2))), 8, v),
            r"components must",
        )
        for v in COUNTS
    ),
    (lambda: probae.VampPrior(probae.GaussianEncoder(MLP(8, (2, 2))), ()), r"x_shape must be"),
    *((lambda v=v: probae.FlowPrior(2, v), r"transforms must be an int >= 1") for v in COUNTS),
    *(
        (lambda v=v, p=p: p(v), r"probability must be strictly in \(0, 1\), got")
        for v in (0, 1, -0.1, 1.1, NAN, "a", None, True)
        for p in (probae.BitFlip, partial(probae.BernoulliPrior, 2))
    ),
    *(
        (lambda v=v: probae.GaussianNoise(v), r"scale must be a finite number > 0")
        for v in POSITIVES
    ),
    *(
        (
            lambda v=v: probae.ContinuousBernoulliDecoder(MLP(2, 8), v),
            r"logit_max must be a finite number > 0",
        )
        for v in POSITIVES
    ),
    *(
        (
            lambda v=v: probae.GaussianDecoder(MLP(2, 8), scale=v),
            r"scale must be a finite number > 0",
        )
        for v in POSITIVES
    ),
    *(
        (
            lambda v=v, d=d: d(MLP(2, (2, 8)), scale_min=v),
            r"scale_min must be a finite number > 0, got",
        )
        for v in POSITIVES
        for d in (
            probae.GaussianDecoder,
            probae.HeteroscedasticGaussianDecoder,
            probae.DiscretizedLogisticDecoder,
            probae.GaussianEncoder,
        )
    ),
    (
        lambda: probae.GaussianDecoder(MLP(2, 8), scale=1e-3, learn_scale=True),
        r"scale must start above scale_min=0.001 when it is learned, got 0.001",
    ),
    *(
        (
            lambda v=v: probae.DiscretizedLogisticDecoder(MLP(2, (2, 8)), v),
            r"levels must be an int >= 2",
        )
        for v in (1, *COUNTS)
    ),
    *(
        (
            lambda v=v: probae.CategoricalDecoder.output_shape((8,), v),
            r"num_classes must be an int >= 2",
        )
        for v in (1, *COUNTS)
    ),
]


@pytest.mark.parametrize(("build", "message"), PARTS, ids=[str(i) for i in range(len(PARTS))])
def test_bad_arguments_of_parts(build: Callable[[], object], message: str) -> None:
    refuses(build, message)


PRESETS: list[tuple[dict[str, Any], str]] = [
    *(({"x_dim": v}, r"x_dim must (be a positive int|have positive)") for v in SHAPES),
    *(({"z_dim": v}, r"z_dim must be an int >= 1, got") for v in [*COUNTS, (2,), None]),
    *(({"hidden": v}, r"hidden must (be a positive int|have positive)") for v in SHAPES if v != ()),
    *(
        ({"channels": v}, r"channels must (be a positive int|have positive)")
        for v in SHAPES
        if v != ()
    ),
    (
        {"channels": (4,)},
        r"in_shape .* \(channels, height, width\), got \(8,\); leave channels=\(\)",
    ),
    *(({"activation": v}, r"activation must be one of relu") for v in ("swish", None, ["relu"])),
    *(
        ({"likelihood": v}, r"likelihood must be one of bernoulli, .*, got")
        for v in ("normal", "", None, 3, ["gaussian"], probae.GaussianDecoder)
    ),
    *(
        ({"prior": v}, r"prior must be a module or one of normal, .*, got")
        for v in ("gaussian", "", None, 3, ["normal"], probae.StandardNormalPrior)
    ),
    ({"prior": probae.StandardNormalPrior(3)}, r"decoder does not fit .*z of shape \(3, 3\)"),
    ({"prior": probae.BernoulliPrior(Z)}, r"(encoder is continuous but prior is discrete|outside)"),
    ({"prior": nn.Linear(2, 2)}, r"prior does not fit the other parts"),
    (
        {"likelihood_options": "scale"},
        r"likelihood_options must be a dict of keywords, got 'scale'",
    ),
    ({"likelihood_options": {"scale": 1.0}}, r"options do not fit likelihood='bernoulli': .*scale"),
    (
        {"likelihood": "gaussian", "likelihood_options": {"scale": -1}},
        r"scale must be a finite number > 0, got -1",
    ),
    (
        {"likelihood": "gaussian", "likelihood_options": {"num_classes": 3}},
        r"likelihood_options do not fit likelihood='gaussian'",
    ),
    (
        {"likelihood": "gaussian", "likelihood_options": {"network": 3}},
        r"likelihood_options do not fit likelihood='gaussian': .*network",
    ),
    (
        {"likelihood": "categorical", "likelihood_options": {"num_classes": 1}},
        r"num_classes must be an int >= 2, got 1",
    ),
]


@pytest.mark.parametrize("preset", [probae.VAE, probae.UndercompleteAutoencoder])
@pytest.mark.parametrize(("keywords", "message"), PRESETS, ids=short)
def test_bad_arguments_of_presets(
    preset: type[Autoencoder], keywords: dict[str, Any], message: str
) -> None:
    arguments = {"x_dim": X, "z_dim": Z, "hidden": (4,), "likelihood": "bernoulli", **keywords}
    with pytest.raises(ValueError, match=message):
        preset(**arguments)


def test_a_vamp_prior_needs_a_density() -> None:
    message = r"prior does not fit .*encoder of a VampPrior must return a density, got a point code"
    with pytest.raises(ValueError, match=message):
        probae.UndercompleteAutoencoder(X, Z, prior="vamp")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"z_dim": 8}, r"z_dim must be below the dimension of x, 8, got 8"),
        ({"x_dim": (2, 4), "z_dim": 9}, r"z_dim must be below the dimension of x, \(2, 4\), got 9"),
        ({"posterior": "full"}, r"posterior must be 'exact' or 'diagonal', got 'full'"),
        ({"posterior": None}, r"posterior must be 'exact' or 'diagonal', got None"),
        ({"scale": 0}, r"scale must be a finite number > 0, got 0"),
        ({"scale": 1e-4}, r"scale must start above scale_min=0.001"),
        ({"x_dim": 0}, r"x_dim must have positive entries"),
        ({"z_dim": 0}, r"z_dim must be an int >= 1, got 0"),
    ],
)
def test_bad_arguments_of_ppca(keywords: dict[str, Any], message: str) -> None:
    refuses(lambda: probae.PPCA(**{"x_dim": X, "z_dim": Z, **keywords}), message)


FLOOR = r"x must vary beyond its first z_dim=2 .*floor of the scale, 0.001, got .*; rescale x"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(1, X), FLOOR),
        (torch.ones(9, X), FLOOR),
        (1e-5 * torch.randn(9, X), FLOOR),
        (torch.randn(9, Z) @ torch.randn(Z, X), FLOOR),
        (torch.randn(9), r"x must have shape \(N, \*x_shape\), got \(9,\)"),
        (torch.randn(0, X), r"x must have shape .*N >= 1"),
        (torch.full((9, X), NAN), r"x must be finite"),
        (torch.ones(9, X).int(), r"x must be floating-point or bool, got torch.int32"),
        (torch.randn(9, 2), r"z_dim must be below the dimension of x, \(2,\), got 2"),
    ],
)
def test_data_without_a_maximum_of_the_likelihood(x: Tensor, message: str) -> None:
    refuses(lambda: probae.PPCA.maximum_likelihood(x, Z), message)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"weight": torch.zeros(Z, X)}, r"weight must have shape \(8, 2\), got \(2, 8\)"),
        ({"mean": torch.zeros(3)}, r"mean must have shape \(8,\), got \(3,\)"),
        ({"weight": torch.full((X, Z), NAN)}, r"weight must be finite"),
        ({"mean": [0.0] * X}, r"mean must be a tensor, .*got list"),
        ({"scale": 1e-3}, r"value must exceed scale_min=0.001, got 0.001"),
        ({"scale": -1.0}, r"value must be a finite number > 0, got -1"),
        ({"scale": NAN}, r"value must be a finite number > 0, got nan"),
    ],
)
def test_bad_parameters_of_ppca_change_nothing(keywords: dict[str, Any], message: str) -> None:
    pair = probae.PPCA(X, Z)
    good = {"weight": torch.ones(X, Z), "mean": torch.ones(X), "scale": 0.5}
    refuses(lambda: pair.set_parameters(**{**good, **keywords}), message, pair)


class Function(nn.Module):
    """A function as a part."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


GOOD = {
    "prior": probae.StandardNormalPrior(Z),
    "encoder": probae.GaussianEncoder(MLP(X, (2, Z))),
    "decoder": probae.BernoulliDecoder(MLP(Z, X)),
}
EVENT = r"must return a distribution of batch shape \(3?,?\) and event shape .*\.to_event\(n\)"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"prior": None}, r"prior must be a torch.nn.Module .*got NoneType"),
    "a class": (
        {"prior": probae.StandardNormalPrior},
        r"prior must be a torch.nn.Module .*got type",
    ),
    "a function": ({"encoder": lambda x: x}, r"encoder must be a torch.nn.Module .*got function"),
    "text": ({"decoder": "bernoulli"}, r"decoder must be a torch.nn.Module .*got str"),
    "noise level": (
        {"corruption": 0.3},
        r"corruption must be a torch.nn.Module or None, got float",
    ),
    "prior of 3": ({"prior": probae.StandardNormalPrior(3)}, r"decoder does not fit .*\(3, 3\)"),
    "decoder of 3": (
        {"decoder": probae.BernoulliDecoder(MLP(3, X))},
        r"decoder does not fit the other parts: given z of shape \(3, 2\), it failed with Run",
    ),
    "encoder to 3": (
        {"encoder": probae.GaussianEncoder(MLP(X, (2, 3)))},
        r"encoder\(x\) must .*event shape \(2,\), got .*event shape \(3,\).*same z_dim",
    ),
    "encoder of 7": (
        {"encoder": probae.GaussianEncoder(MLP(7, (2, Z)))},
        r"encoder does not fit the other parts: given x of shape \(3, 8\), it failed with",
    ),
    "encoder of images": (
        {"encoder": probae.GaussianEncoder(probae.ConvNet((1, 8, 8), (2, Z), (3,)))},
        r"encoder does not fit the other parts: given x of shape \(3, 8\), it failed with",
    ),
    "one parameter": (
        {"encoder": probae.GaussianEncoder(MLP(X, Z))},
        r"encoder does not fit .*network must have output of shape \(..., 2, z_dim\), got \(3, 2\)",
    ),
    "prior of tensors": (
        {"prior": Function(lambda: torch.zeros(Z))},
        r"prior\(\) must return a torch.distributions.Distribution, got Tensor",
    ),
    "encoder of tensors": (
        {"encoder": MLP(X, Z)},
        r"encoder\(x\) must return a torch.distributions.Distribution, got Tensor",
    ),
    "decoder of tensors": (
        {"decoder": MLP(Z, X)},
        r"decoder\(z\) must return a torch.distributions.Distribution, got Tensor",
    ),
    "corruption of tensors": (
        {"corruption": nn.Dropout()},
        r"corruption\(x\) must return a torch.distributions.Distribution, got Tensor",
    ),
    "prior in a batch": ({"prior": Function(lambda: dist.Normal(torch.zeros(Z), 1.0))}, EVENT),
    "encoder in a batch": ({"encoder": Function(lambda x: dist.Normal(x[..., :Z], 1.0))}, EVENT),
    "decoder in a batch": (
        {"decoder": Function(lambda z: dist.Normal(z.repeat(1, 4), 1.0))},
        EVENT,
    ),
    "corruption in a batch": ({"corruption": Function(lambda x: dist.Normal(x, 1.0))}, EVENT),
    "corruption to 4": (
        {"corruption": Function(lambda x: dist.Normal(x[:, :4], 1.0).to_event(1))},
        r"encoder does not fit the other parts: given x of shape \(3, 4\)",
    ),
    "bits of real codes": (
        {"encoder": probae.BernoulliEncoder(MLP(X, Z))},
        r"encoder is discrete but prior is continuous: .*pick both discrete",
    ),
    "real codes of bits": (
        {"prior": probae.BernoulliPrior(Z)},
        r"encoder is continuous but prior is discrete: .*pick both discrete",
    ),
    "points off the bits": (
        {"prior": probae.BernoulliPrior(Z), "encoder": probae.PointEncoder(MLP(X, Z))},
        r"encoder makes codes outside the support of the prior .*0/1 codes",
    ),
    "bits that are not one-hot": (
        {"prior": probae.CategoricalPrior(Z), "encoder": probae.BernoulliEncoder(MLP(X, Z))},
        r"encoder makes codes outside the support of the prior .*one-hot codes",
    ),
    "negative codes": (
        {"prior": Function(lambda: dist.Exponential(torch.ones(Z)).to_event(1))},
        r"encoder makes codes outside the support of the prior",
    ),
    "broken part": (
        {"decoder": Function(lambda z: z.nonsense)},
        r"decoder does not fit .*given z of shape \(3, 2\), it failed with AttributeError",
    ),
    "no network": (
        {"encoder": probae.GaussianEncoder(None)},
        r"encoder does not fit .*given x of shape \(3, 8\), it failed with TypeError",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_fail_at_construction(case: str) -> None:
    parts, message = MISFITS[case]
    refuses(lambda: Autoencoder(**{**GOOD, **parts}), message)


def test_an_exact_subset_of_the_support_is_no_misfit() -> None:
    one_hot = probae.CategoricalEncoder(MLP(X, Z))  # one-hot codes are bits, too
    pair = Autoencoder(probae.BernoulliPrior(Z), one_hot, GOOD["decoder"])
    assert pair.kind is Kind.ELBO


def test_replaced_parts_are_checked_when_they_are_used() -> None:
    pair = vae()
    pair.encoder = probae.GaussianEncoder(MLP(7, (2, Z)))
    message = r"encoder does not fit the other parts: given x of shape \(3, 8\)"
    refuses(lambda: fit(pair), message, pair)
    refuses(lambda: probae.log_likelihood(pair, bits_fixed(), "iwae", 2), message, pair)
    refuses(lambda: pair.kind, message, pair)
    pair.decoder = probae.BernoulliDecoder(MLP(Z, 7))
    message = (
        r"parts must keep x_shape \(8,\) and z_shape \(2,\), got \(7,\) and \(2,\); build a new"
    )
    refuses(lambda: fit(pair), message, pair)


def test_objectives_need_the_data_plate() -> None:
    def program(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    message = r"no site stands in a plate named 'data'; per-datum objectives need one"
    refuses(lambda: probae.ELBO().loss(program, program, bits_fixed()), message)


def test_fit_restores_the_schedule_of_an_objective_that_does_not_fit() -> None:
    objective = probae.ELBO(beta=probae.LinearWarmup(10))
    pair = vae()
    refuses(lambda: fit(pair, objective=objective, val=bits_fixed()[:, :3]), r"val must have", pair)
    assert objective.beta == 1.0


def test_codes_that_overflow_are_named() -> None:
    x, dictionary = torch.randn(5, 6), torch.randn(6, 2)
    with pytest.raises(ValueError, match="start and prediction must be numbers whose products fit"):
        probae.lasso(x, dictionary, 0.1, start=torch.full((5, 2), 1e38))
