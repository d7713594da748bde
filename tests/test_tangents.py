"""Tangent planes against closed forms, autograd and manifolds whose planes are known."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import probae
from probae import memory

from .conftest import CASES, Case

DOUBLE = torch.float64


class Fixed(nn.Module):
    """A part made of a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def composed(encode: Any, decode: Any, z_dim: int) -> probae.Autoencoder:
    """Pair with a point code f(x) and a Gaussian decoder of mean g(z)."""
    return probae.Autoencoder(
        probae.FlatPrior(z_dim),
        Fixed(lambda x: dist.Delta(encode(x), event_dim=1)),
        Fixed(lambda z: dist.Normal(decode(z), 1.0).to_event(1)),
    )


def linear(n: int, m: int) -> Tensor:
    return torch.randn(n, m, dtype=DOUBLE, generator=torch.Generator().manual_seed(n * m))


def angle(basis: Tensor, plane: Tensor) -> Tensor:
    """Largest principal angle between spans of orthonormal columns, degrees."""
    missing = plane - basis @ (basis.mT @ plane)
    return torch.rad2deg(torch.asin(torch.linalg.matrix_norm(missing, 2).clamp(max=1)))


# ---- against closed forms ------------------------------------------------------------------------


@pytest.mark.parametrize("z_dim", [2, 4, 7])  # narrow, as wide as x, overcomplete
def test_of_linear_maps_it_is_the_svd_of_their_product(z_dim: int) -> None:
    f, g = linear(z_dim, 4), linear(4, z_dim + 1)[:, :z_dim]
    pair = composed(lambda x: x.to(DOUBLE) @ f.T, lambda z: z.to(DOUBLE) @ g.T, z_dim).double()
    x, rank = torch.randn(3, 4, dtype=DOUBLE), min(z_dim, 4)
    left, values, right = torch.linalg.svd(g @ f)
    basis, spectrum = probae.tangent_basis(pair, x, 2)
    assert (basis.shape, spectrum.shape) == ((3, 4, 2), (3, rank))
    assert torch.allclose(spectrum, values[:rank].expand(3, -1), atol=1e-12)
    for i in range(2):  # up to sign
        assert torch.allclose((basis[..., i] @ left[:, i]).abs(), torch.ones(3).double())
    _, values, right = torch.linalg.svd(f)
    basis, spectrum = probae.tangent_basis(pair, x, of="encoder")
    assert (basis.shape, spectrum.shape) == ((3, 4, rank), (3, rank))
    assert torch.allclose(spectrum, values.expand(3, -1), atol=1e-12)
    assert torch.allclose((basis * right[:rank].T).sum(1).abs(), torch.ones(3, rank).double())


def test_a_denoiser_of_gaussian_data_counts_the_directions_wider_than_its_noise() -> None:
    # the best one is linear, E[x|x_tilde] = S (S + σ² I)⁻¹ x_tilde: singular values λ / (λ + σ²)
    variances, noise = torch.tensor([4.0, 1.0, 0.3, 0.1]).double(), 0.25
    turn = torch.linalg.qr(linear(4, 4))[0]
    best = turn @ (variances / (variances + noise)).diag() @ turn.T
    pair = composed(lambda x: x.to(DOUBLE) @ best.T, lambda z: z, 4).double()
    x = torch.randn(5, 4, dtype=DOUBLE)
    estimate = probae.intrinsic_dimension(pair, x)
    assert torch.allclose(estimate.spectrum, variances / (variances + noise), atol=1e-12)
    # relative to the largest, 0.94, which is as good as one: 0.3 > 0.25 counts, 0.1 does not
    assert estimate.overall == 3
    assert estimate.values.tolist() == [3] * 5
    assert probae.intrinsic_dimension(pair, x, share=0.9).overall == 1
    assert probae.intrinsic_dimension(pair, x, share=0.01).overall == 4
    # gaps 0.14, 0.25, 0.26, 0.29: none of them is large, and the last is the largest
    assert probae.intrinsic_dimension(pair, x, rule="gap").overall == 4


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_projection_onto_a_sphere_has_its_tangent_plane(dim: int) -> None:
    pair = composed(lambda x: x, lambda z: z / z.norm(dim=-1, keepdim=True), dim + 1).double()
    x = nn.functional.normalize(torch.randn(20, dim + 1, dtype=DOUBLE))
    estimate = probae.intrinsic_dimension(pair, x, rule="gap")
    assert estimate.values.tolist() == [dim] * 20
    assert estimate.overall == probae.intrinsic_dimension(pair, x).overall == dim
    basis, spectrum = probae.tangent_basis(pair, 2 * x, dim)
    assert (basis.mT @ x[..., None]).abs().max() < 1e-12
    assert torch.allclose(spectrum[:, :dim], torch.full((20, dim), 0.5).double())
    assert spectrum[:, dim].abs().max() < 1e-12


def test_the_posterior_mean_of_ppca_shrinks_by_what_it_should() -> None:
    x = torch.randn(200, 5, dtype=DOUBLE) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    pair = probae.PPCA.maximum_likelihood(x, z_dim=2).double()
    weight, _, scale = pair.decoder.affine()
    gains = torch.linalg.svdvals(weight) ** 2
    estimate = probae.tangent_basis(pair, x[:4])
    assert torch.allclose(estimate.spectrum, (gains / (gains + scale**2)).expand(4, 2), atol=1e-10)
    assert angle(estimate.basis, torch.linalg.qr(weight)[0]).max() < 1e-5


def test_rules_at_the_edges() -> None:
    for values, share, gap in (
        ([1.0, 1.0, 1.0], 3, 3),
        ([1.0, 0.0, 0.0], 1, 1),
        ([1.0, 0.6, 0.1], 2, 2),
        ([0.0, 0.0, 0.0], 1, 1),  # a collapsed code
    ):
        scale = torch.tensor(values, dtype=DOUBLE)
        pair = composed(lambda x: x, lambda z, scale=scale: z * scale, 3).double()
        x = torch.randn(2, 3, dtype=DOUBLE)
        assert probae.intrinsic_dimension(pair, x).values.tolist() == [share] * 2
        assert probae.intrinsic_dimension(pair, x, rule="gap").overall == gap


def test_an_estimate_tells_how_data_differ() -> None:
    pair = composed(lambda x: x, lambda z: z * (z > 0), 2).double()
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [2.0, 3.0]]).double()
    estimate = probae.intrinsic_dimension(pair, x)
    assert estimate.values.tolist() == [2, 1, 1, 2]
    assert repr(estimate) == (
        "IntrinsicDimension(1 by the mean spectrum; of the data, 1 at 50 %, 2 at 50 %)"
    )


# ---- every pair ----------------------------------------------------------------------------------

REFUSED = {
    "bits-code": "continuous codes",
    "one-hot-code": "continuous codes",
    "sparse-laplace-sparse-coding": "autograd can follow",
    "psd": r"pair.encoder = pair.predictor",
    "psd-started-only-3d": r"pair.encoder = pair.predictor",
    "hashing-bernoulli": "posterior='noise'",
    "hashing-probit": "posterior='noise'",
    "hashing-threshold": "posterior='noise'",
}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_pair_has_its_planes_or_says_why_not(case: Case) -> None:
    pair, x = case.pair(DOUBLE), case.x(DOUBLE)
    reason = REFUSED.get(case.name, "finite mean" if "categorical" in case.name else None)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            probae.tangent_basis(pair, x)
        return
    basis, spectrum = probae.tangent_basis(pair, x)
    eye = torch.eye(basis.shape[-1], dtype=DOUBLE)
    assert torch.allclose(basis.mT @ basis, eye.expand(len(x), -1, -1), atol=1e-10)
    assert (spectrum.diff(dim=1) <= 1e-12).all()
    pair.eval()

    def reconstruct(datum: Tensor) -> Tensor:
        fed = probae.corruptions.encoder_input(pair.corruption, datum[None])
        return pair.decoder(pair.encoder(fed).mean).mean[0].flatten()

    jacobian = torch.autograd.functional.jacobian(reconstruct, x[0]).flatten(1)
    # the directions that were left out, U Uᵀ J, are none
    assert torch.allclose(basis[0] @ (basis[0].T @ jacobian), jacobian, atol=1e-10)
    assert torch.allclose(
        torch.linalg.svdvals(jacobian)[: spectrum.shape[1]], spectrum[0], atol=1e-10
    )


def test_the_predictor_of_psd_has_planes() -> None:
    pair = probae.PredictiveSparseDecomposition(5, 3)
    pair.encoder = pair.predictor
    assert probae.tangent_basis(pair, torch.randn(4, 5)).basis.shape == (4, 5, 3)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = probae.VAE((1, 5, 6), 3, channels=(4,), hidden=(6,)).double()
    x = torch.rand(7, 1, 5, 6)
    whole = probae.tangent_basis(pair, x)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 1)
    for a, b in zip(whole, probae.tangent_basis(pair, x.numpy()), strict=True):
        assert torch.allclose(a.abs(), b.abs(), atol=1e-12)
    assert whole.basis.mT.unflatten(-1, pair.x_shape).shape == (7, 3, 1, 5, 6)


def test_nothing_is_changed() -> None:
    pair = probae.DenoisingVAE(5, 2, hidden=(6,), likelihood="gaussian")
    pair.decoder.network.layers[1].eval()
    modes = {name: module.training for name, module in pair.named_modules()}
    x = torch.randn(4, 5, requires_grad=True)
    before, stream = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    first = probae.tangent_basis(pair, x)
    assert torch.equal(first.spectrum, probae.tangent_basis(pair, x).spectrum)
    assert not first.basis.requires_grad
    assert x.grad is None
    assert {name: module.training for name, module in pair.named_modules()} == modes
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert len(pyro.get_param_store()) == 0
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())


# ---- trained pairs -------------------------------------------------------------------------------


def test_a_denoising_autoencoder_learns_the_planes_of_a_circle() -> None:
    # 500 fresh points; a median angle below 5° and the right dimension at 95 % of them. With five
    # seeds the angles were 0.6° to 1.5°, and the dimension right at all points
    def circle(n: int) -> tuple[Tensor, Tensor]:
        t = 2 * math.pi * torch.rand(n)
        return torch.stack([t.cos(), t.sin()], 1), torch.stack([-t.sin(), t.cos()], 1)[..., None]

    x, plane = circle(500)
    pair = probae.DenoisingAutoencoder(
        2, 20, hidden=(40,), activation="tanh", corruption=probae.GaussianNoise(0.3)
    )
    probae.fit(
        pair, circle(2000)[0], epochs=30, lr=1e-2, batch_size=200, schedule="cosine", progress=False
    )
    assert angle(probae.tangent_basis(pair, x, 1).basis, plane).median() < 5
    estimate = probae.intrinsic_dimension(pair, x)
    assert estimate.overall == 1
    assert (estimate.values == 1).double().mean() > 0.95


# ---- what it refuses -----------------------------------------------------------------------------


def test_parts_without_a_jacobian_are_named() -> None:
    x = torch.randn(3, 4)
    for encode, decode, message in (
        (lambda x: (x > 0).to(x.dtype), lambda z: z, r"encoder must have a mean .* got Fixed"),
        (lambda x: x, lambda z: z.detach(), r"decoder must have a mean .* moves with z"),
        (lambda x: x, lambda z: z * torch.nan, "decoder must have a finite mean"),
    ):
        with pytest.raises(ValueError, match=message):
            probae.tangent_basis(composed(encode, decode, 4), x)
    assert probae.tangent_basis(
        composed(lambda x: x, lambda z: z.detach(), 4), x, of="encoder"
    ).basis.shape == (3, 4, 4)


def test_a_mean_without_closed_form_is_named() -> None:
    class Meanless(dist.Normal):
        @property
        def mean(self) -> Tensor:
            raise NotImplementedError

    pair = probae.Autoencoder(
        probae.StandardNormalPrior(4),
        Fixed(lambda x: Meanless(x, 1.0).to_event(1)),
        probae.GaussianDecoder(probae.MLP(4, 4)),
    )
    with pytest.raises(ValueError, match="encoder must have a mean in closed form, got Meanless"):
        probae.tangent_basis(pair, torch.randn(3, 4))


@pytest.mark.parametrize("call", [probae.tangent_basis, probae.intrinsic_dimension])
def test_bad_arguments_are_named(call: Any) -> None:
    pair, x = probae.VAE(6, 2), torch.rand(3, 6)
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder, got Linear"):
        call(nn.Linear(6, 2), x)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 6\), got \(3, 5\)"):
        call(pair, torch.rand(3, 5))
    with pytest.raises(ValueError, match="x must lie in the support of the decoder"):
        call(pair, 3 * torch.ones(3, 6))
    with pytest.raises(ValueError, match="x must be finite"):
        call(pair, torch.full((3, 6), math.nan))
    with pytest.raises(ValueError, match="of must be 'reconstruction' or 'encoder', got 'code'"):
        call(pair, x, of="code")
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot run inside"):
        call(pair, x)
    with torch.no_grad():
        call(pair, x)
        next(pair.decoder.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="parameter that is not finite"):
        call(pair, x)


def test_numbers_out_of_range_are_named() -> None:
    pair, x = probae.VAE(6, 2), torch.rand(3, 6)
    with pytest.raises(ValueError, match=r"num_directions must be at most min\(.*\) = 2, got 3"):
        probae.tangent_basis(pair, x, 3)
    for bad in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match="num_directions must be an int >= 1"):
            probae.tangent_basis(pair, x, bad)
    with pytest.raises(ValueError, match="rule must be 'share' or 'gap', got 'knee'"):
        probae.intrinsic_dimension(pair, x, rule="knee")
    for bad in (0.0, 1.0, math.nan, "x"):
        with pytest.raises(ValueError, match=r"share must be strictly in \(0, 1\)"):
            probae.intrinsic_dimension(pair, x, share=bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_of_half_precision_have_planes(dtype: torch.dtype) -> None:
    basis = probae.tangent_basis(probae.VAE(6, 2).to(dtype), torch.rand(5, 6), 2).basis
    assert torch.allclose(basis.mT @ basis, torch.eye(2), atol=1e-5)
