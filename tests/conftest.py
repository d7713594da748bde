"""The table of pairs that the contract tests go through, and what every test starts from."""

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pytest
import torch
from torch import Tensor

import probae
from probae import Autoencoder, Kind

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each is faster
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the tests of Ctrl-C need

N = 7  # data of a batch, equal to no other size below, so that no wrong axis fits by accident
VECTOR, IMAGE = (9,), (2, 5, 6)  # odd sizes: strided convolutions have to round up
Z = 3
LEVELS, CLASSES = 5, 4


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    """Give every test an empty param store and the same random stream."""
    pyro.clear_param_store()
    torch.manual_seed(1)


def bits(*shape: int) -> Tensor:
    return torch.rand(shape).round()


def unit(*shape: int) -> Tensor:
    return torch.rand(shape)


def reals(*shape: int) -> Tensor:
    return torch.randn(shape)


def classes(*shape: int) -> Tensor:
    return torch.randint(0, CLASSES, shape).float()


def levels(*shape: int) -> Tensor:
    return torch.randint(0, LEVELS, shape) / (LEVELS - 1)


def counts(*shape: int) -> Tensor:
    return torch.poisson(torch.full(shape, 2.0))


DATA: dict[str, Callable[..., Tensor]] = {
    "bernoulli": bits,
    "continuous-bernoulli": unit,
    "gaussian": reals,
    "heteroscedastic-gaussian": reals,
    "categorical": classes,
    "discretized-logistic": levels,
    "poisson": counts,
}
OPTIONS = {
    "gaussian": {"learn_scale": True},
    "categorical": {"num_classes": CLASSES},
    "discretized-logistic": {"levels": LEVELS},
}


class Case(NamedTuple):
    """A pair, data for it, and what it should say about itself."""

    name: str
    build: Callable[[], Autoencoder]
    data: Callable[..., Tensor] = reals  # shape -> data in the decoder's support
    x_shape: tuple[int, ...] = VECTOR
    kind: Kind = Kind.ELBO
    kl: str = "analytic"  # how probae.ELBO gets the KL of z
    reparameterised: bool = True
    # parameters whose gradient is zero at every step -> why; all others have to move
    still: dict[str, str] = {}  # noqa: RUF012

    def pair(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        torch.manual_seed(1)
        return self.build().to(dtype)

    def x(self, dtype: torch.dtype = torch.float32, n: int = N) -> Tensor:
        torch.manual_seed(2)
        return self.data(n, *self.x_shape).to(dtype)

    def __repr__(self) -> str:
        return self.name


def _vae(likelihood: str, x_shape: tuple[int, ...], channels: tuple[int, ...] = ()) -> Case:
    network = "conv" if channels else "mlp"
    return Case(
        f"vae-{likelihood}-{network}-{len(x_shape)}d",
        lambda: probae.VAE(
            x_shape,
            Z,
            hidden=(6,),
            channels=channels,
            likelihood=likelihood,
            likelihood_options=OPTIONS.get(likelihood),
        ),
        DATA[likelihood],
        x_shape,
    )


def _vae_prior(prior: str, kl: str, kind: Kind = Kind.ELBO) -> Case:
    return Case(
        f"vae-{prior}-prior",
        lambda: probae.VAE(VECTOR, Z, hidden=(6,), activation="tanh", prior=prior),
        bits,
        kind=kind,
        kl=kl,
    )


def _undercomplete(prior: str, kind: Kind, channels: tuple[int, ...] = ()) -> Case:
    x_shape = IMAGE if channels else VECTOR
    return Case(
        f"undercomplete-{prior}-{'conv' if channels else 'mlp'}",
        lambda: probae.UndercompleteAutoencoder(
            x_shape, Z, hidden=(6,), channels=channels, prior=prior
        ),
        x_shape=x_shape,
        kind=kind,
        kl="monte carlo",
    )


def _corrupted(
    name: str,
    corruption: Callable[[], probae.Part],
    *,
    flat: bool = False,
    kind: Kind = Kind.ELBO,
    reparameterised: bool = True,
) -> Case:
    def build() -> Autoencoder:
        network = probae.MLP(VECTOR, (Z,) if flat else (2, Z), (6,), "tanh")
        return Autoencoder(
            prior=probae.FlatPrior(Z) if flat else probae.StandardNormalPrior(Z),
            encoder=probae.PointEncoder(network) if flat else probae.GaussianEncoder(network),
            decoder=probae.BernoulliDecoder(probae.MLP(Z, VECTOR, (6,), "tanh")),
            corruption=corruption(),
        )

    kl = "monte carlo" if flat else "analytic"
    return Case(name, build, bits, kind=kind, kl=kl, reparameterised=reparameterised)


def _bits_code() -> Autoencoder:
    return Autoencoder(
        probae.BernoulliPrior(Z, probability=0.3),
        probae.BernoulliEncoder(probae.MLP(VECTOR, Z, (6,), "tanh")),
        probae.BernoulliDecoder(probae.MLP(Z, VECTOR, (6,), "tanh")),
    )


def _one_hot_code() -> Autoencoder:
    return Autoencoder(
        probae.CategoricalPrior(Z),
        probae.CategoricalEncoder(probae.MLP(VECTOR, Z, (6,), "tanh")),
        probae.GaussianDecoder(probae.MLP(Z, VECTOR, (6,), "tanh"), learn_scale=True),
    )


def _sparse(
    prior: str,
    posterior: str,
    kind: Kind,
    kl: str = "monte carlo",
    *,
    reparameterised: bool = True,
    **options: object,
) -> Case:
    return Case(
        "-".join(["sparse", prior, posterior, *(["flat-slab"] if "slab_scale" in options else [])]),
        lambda: probae.SparseAutoencoder(VECTOR, Z, prior=prior, posterior=posterior, **options),
        kind=kind,
        kl=kl,
        reparameterised=reparameterised,
    )


def _denoising(
    name: str,
    corruption: Callable[[], probae.Part],
    likelihood: str,
    x_shape: tuple[int, ...] = VECTOR,
    channels: tuple[int, ...] = (),
) -> list[Case]:
    options = {
        "hidden": (6,),
        "channels": channels,
        "activation": "tanh",
        "likelihood": likelihood,
        "likelihood_options": OPTIONS.get(likelihood),
    }
    return [
        Case(
            f"denoising-{name}-{len(x_shape)}d",
            lambda: probae.DenoisingAutoencoder(x_shape, Z, corruption=corruption(), **options),
            DATA[likelihood],
            x_shape,
            kind=Kind.CONDITIONAL,
            kl="monte carlo",
        ),
        Case(
            f"denoising-vae-{name}-{len(x_shape)}d",
            lambda: probae.DenoisingVAE(x_shape, Z, corruption=corruption(), **options),
            DATA[likelihood],
            x_shape,
        ),
    ]


def _contractive(penalty: str, x_shape: tuple[int, ...] = VECTOR, **options: object) -> Case:
    return Case(
        "-".join(["contractive", penalty, f"{len(x_shape)}d", *options]),
        lambda: probae.ContractiveAutoencoder(x_shape, Z, penalty=penalty, **options),
        x_shape=x_shape,
        kind=Kind.ENERGY,
        kl="monte carlo",
    )


def _hashing(posterior: str, kind: Kind, kl: str, **options: object) -> Case:
    return Case(
        f"hashing-{posterior}",
        lambda: probae.SemanticHashing(
            VECTOR, Z, posterior=posterior, hidden=(6,), activation="tanh"
        ),
        bits,
        kind=kind,
        kl=kl,
        **options,
    )


CASES = [
    Case("ppca-exact", lambda: probae.PPCA(VECTOR, Z), kl="monte carlo"),
    Case(
        "ppca-exact-3d",
        lambda: probae.PPCA(IMAGE, Z, learn_scale=False),
        x_shape=IMAGE,
        kl="monte carlo",
    ),
    Case("ppca-diagonal", lambda: probae.PPCA(VECTOR, Z, posterior="diagonal")),
    _undercomplete("flat", Kind.RECONSTRUCTION),
    _undercomplete("normal", Kind.MAP_JOINT),
    _undercomplete("laplace", Kind.MAP_JOINT),
    _undercomplete("flat", Kind.RECONSTRUCTION, channels=(4, 3)),
    *(_vae(name, VECTOR) for name in probae.LIKELIHOODS),
    _vae("bernoulli", IMAGE),
    *(_vae(name, IMAGE, channels=(4, 3)) for name in probae.LIKELIHOODS),
    _vae_prior("laplace", "analytic"),
    _vae_prior("mixture", "monte carlo"),
    _vae_prior("vamp", "monte carlo"),
    _vae_prior("flow", "monte carlo"),
    _vae_prior("flat", "monte carlo", Kind.ENERGY),
    Case("bits-code", _bits_code, bits, reparameterised=False),
    Case("one-hot-code", _one_hot_code, reals, reparameterised=False),
    _corrupted("noisy-vae", lambda: probae.GaussianNoise(0.3)),
    _corrupted("bit-flip-vae", lambda: probae.BitFlip(0.1)),
    _corrupted(
        "denoising-point", lambda: probae.GaussianNoise(0.3), flat=True, kind=Kind.CONDITIONAL
    ),
    _sparse("laplace", "point", Kind.MAP_JOINT),
    _sparse("laplace", "sparse-coding", Kind.MAP_JOINT, rate=0.5),
    _sparse("laplace", "laplace", Kind.ELBO, "analytic"),
    _sparse("laplace", "gaussian", Kind.ELBO, "analytic"),
    _sparse("exponential", "point", Kind.MAP_JOINT, hidden=(6,)),
    _sparse("exponential", "lognormal", Kind.ELBO, "analytic"),
    _sparse("student-t", "point", Kind.MAP_JOINT),
    _sparse("student-t", "gaussian", Kind.ELBO),
    _sparse("spike-and-slab", "point", Kind.MAP_JOINT, bandwidth=3.0),
    _sparse("spike-and-slab", "point", Kind.ENERGY, slab_scale=None, bandwidth=3.0),
    _sparse("spike-and-slab", "noisy-gate", Kind.ELBO, "analytic", reparameterised=False),
    _sparse("spike-and-slab", "noisy-gate", Kind.ENERGY, reparameterised=False, slab_scale=None),
    _sparse("spike-and-slab", "spike-and-slab", Kind.ELBO, "analytic", reparameterised=False),
    _sparse("subset", "point", Kind.MAP_JOINT, num_active=2),
    _sparse("subset", "point", Kind.ENERGY, num_active=2, slab_scale=None),
    _sparse(
        "subset",
        "conditional-bernoulli",
        Kind.ELBO,
        "analytic",
        reparameterised=False,
        num_active=2,
    ),
    *_denoising("gaussian", lambda: probae.GaussianNoise(0.3), "gaussian"),
    *_denoising("gaussian", lambda: probae.GaussianNoise(0.3), "gaussian", IMAGE, (4, 3)),
    *_denoising("masking", lambda: probae.Masking(0.3), "gaussian"),
    *_denoising("known-mask", lambda: probae.Masking(0.3, known=True), "gaussian"),
    *_denoising("salt-and-pepper", lambda: probae.SaltAndPepper(0.3), "continuous-bernoulli"),
    *_denoising("bit-flip", lambda: probae.BitFlip(0.1, 0.2), "bernoulli"),
    *_denoising("thinning", lambda: probae.PoissonThinning(0.5), "poisson"),
    _contractive("exact"),
    _contractive("exact", hidden=(6,)),
    _contractive("exact", IMAGE, tied=False, channels=(4,)),
    _contractive("hutchinson"),
    _contractive("noise"),
    Case(
        "psd",
        lambda: probae.PredictiveSparseDecomposition(VECTOR, Z, rate=0.3, hidden=(6,)),
        kind=Kind.ENERGY,
        kl="monte carlo",
    ),
    Case(
        "psd-started-only-3d",
        lambda: probae.PredictiveSparseDecomposition(IMAGE, Z, rate=0.3, hidden=(6,), couple=False),
        x_shape=IMAGE,
        kind=Kind.ENERGY,
        kl="monte carlo",
    ),
    _hashing("noise", Kind.CONDITIONAL, "analytic"),
    _hashing("bernoulli", Kind.ELBO, "analytic", reparameterised=False),
    _hashing("probit", Kind.ELBO, "analytic", reparameterised=False),
    _hashing(
        "threshold",
        Kind.DISCRETE_POINT,
        "monte carlo",
        still={
            f"encoder.network.layers.{layer}.{name}": "a threshold passes no gradient"
            for layer in (0, 2)
            for name in ("weight", "bias")
        },
    ),
]


@pytest.fixture(params=CASES, ids=repr)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
