"""Sparse codes against optimality conditions, enumeration and scikit-learn's coordinate descent."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from scipy.integrate import quad
from sklearn.decomposition import sparse_encode
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from torch.nn.functional import normalize

import probae
from probae import (
    MLP,
    Autoencoder,
    BernoulliDecoder,
    CodeCoupling,
    GaussianDecoder,
    LaplacePrior,
    PointEncoder,
    SparseCodingEncoder,
    coupling_log_normalizer,
    lasso,
    sparse_coding,
    sparse_coding_energy,
)
from probae.distributions import is_point

N = 7
SCALE = math.sqrt(0.5)


def problem(d: int, k: int, n: int = N) -> tuple[Tensor, Tensor]:
    """Data (n, d) and a dictionary (d, k) of unit-norm atoms."""
    x = torch.randn(n, d, dtype=torch.float64)
    return x, normalize(torch.randn(d, k, dtype=torch.float64), dim=0)


def exact(result: probae.SparseCodes) -> Tensor:
    assert result.converged.all()
    return result.codes


def pair_of(
    x_shape: int | tuple[int, ...],
    k: int,
    rate: float,
    predictor: nn.Module | None = None,
    **kw: float,
) -> Autoencoder:
    decoder = GaussianDecoder(MLP(k, x_shape, unit_norm=True), scale=SCALE)
    encoder = SparseCodingEncoder(decoder, rate, predictor, tolerance=1e-12, **kw)
    factor = None
    if encoder.coupling:
        factor = CodeCoupling(PointEncoder(predictor), (2 * encoder.coupling) ** -0.5)
    return Autoencoder(LaplacePrior(k, rate), encoder, decoder, factor=factor).double()


@pytest.mark.parametrize(("d", "k"), [(9, 5), (9, 24), (40, 60)])
@pytest.mark.parametrize("coupling", [0.0, 0.7])
@pytest.mark.parametrize("noise_scale", [SCALE, 0.3])
def test_optimality_conditions(d: int, k: int, coupling: float, noise_scale: float) -> None:
    x, dictionary = problem(d, k)
    rate, f = 0.5 * (SCALE / noise_scale) ** 2, torch.randn(N, k, dtype=torch.float64)
    result = lasso(
        x,
        dictionary,
        rate,
        noise_scale=noise_scale,
        prediction=f,
        coupling=coupling,
        tolerance=1e-12,
    )
    h = exact(result).requires_grad_()
    smooth = (x - h @ dictionary.T).square().sum() / (2 * noise_scale**2)
    smooth = smooth + coupling * (h - f).square().sum()
    (gradient,) = torch.autograd.grad(smooth, h)
    on = h != 0
    assert 0 < on.sum() < on.numel()
    torch.testing.assert_close(gradient[on], -rate * h.sign()[on], rtol=0, atol=1e-9)
    assert (gradient[~on].abs() <= rate + 1e-9).all()
    off = (gradient.abs() - rate).clamp(min=0)
    worst = torch.where(on, (gradient + rate * h.sign()).abs(), off).amax(1) / rate
    torch.testing.assert_close(result.kkt, worst.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d", "k"), [(9, 5), (9, 24), (40, 60)])
@pytest.mark.parametrize("coupling", [0.0, 0.7])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_equals_coordinate_descent(d: int, k: int, coupling: float, nonnegative: bool) -> None:
    x, dictionary = problem(d, k)
    rate, f = 0.5, torch.randn(N, k, dtype=torch.float64)
    codes = exact(
        lasso(
            x,
            dictionary,
            rate,
            prediction=f,
            coupling=coupling,
            nonnegative=nonnegative,
            tolerance=1e-12,
        )
    )
    # ‖x - Wh‖² + γ‖h - f‖² is one least-squares problem, A = [W; √γ I] and b = [x; √γ f]
    a = torch.cat([dictionary, math.sqrt(coupling) * torch.eye(k, dtype=torch.float64)])
    b = torch.cat([x, math.sqrt(coupling) * f], 1)
    reference = Lasso(
        alpha=rate / (2 * (d + k)),
        fit_intercept=False,
        positive=nonnegative,
        tol=1e-15,
        max_iter=10**6,
    )
    expected = np.stack([reference.fit(a.numpy(), row.numpy()).coef_ for row in b])
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-9)
    assert not nonnegative or (codes >= 0).all()


@pytest.mark.parametrize(("d", "k"), [(12, 6), (12, 30)])
def test_equals_sparse_encode(d: int, k: int) -> None:
    x, dictionary = problem(d, k)
    codes = exact(lasso(x, dictionary, 0.6, tolerance=1e-10))
    expected = sparse_encode(  # it minimises ‖x - Wh‖²/2 + α‖h‖₁
        x.numpy(), dictionary.T.numpy(), algorithm="lasso_cd", alpha=0.3, max_iter=10**6
    )
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("coupling", [0.0, 0.7])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_equals_enumeration_of_signs(coupling: float, nonnegative: bool) -> None:
    k, rate = 5, 0.8
    x, dictionary = problem(3, k)
    f = torch.randn(N, k, dtype=torch.float64)
    options = {"prediction": f, "coupling": coupling}
    codes = exact(lasso(x, dictionary, rate, nonnegative=nonnegative, tolerance=1e-10, **options))
    found = sparse_coding_energy(x, codes, dictionary, rate, **options)
    best = torch.full((N,), math.inf, dtype=torch.float64)
    for pattern in itertools.product((0, 1) if nonnegative else (-1, 0, 1), repeat=k):
        signs = torch.tensor(pattern, dtype=torch.float64)
        on = signs != 0
        if on.sum() > (k if coupling else 3):  # an optimum needs no more atoms than dimensions
            continue
        w = dictionary[:, on]
        gram = 2 * (w.T @ w + coupling * torch.eye(int(on.sum()), dtype=torch.float64))
        right = 2 * (x @ w + coupling * f[:, on]) - rate * signs[on]
        h = torch.zeros(N, k, dtype=torch.float64)
        h[:, on] = torch.linalg.solve(gram, right.T).T
        energy = sparse_coding_energy(x, h, dictionary, rate, **options)
        energy[(h * signs < 0).any(1)] = math.inf
        best = torch.minimum(best, energy)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-10)


def test_orthonormal_dictionary_gives_the_soft_threshold() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    x = torch.randn(N, 6, dtype=torch.float64)
    codes = exact(lasso(x, basis, rate=2.0, noise_scale=0.5, tolerance=1e-12))
    expected = nn.functional.softshrink(x @ basis, 2.0 * 0.5**2)  # λσ²
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)


def test_rows_do_not_depend_on_their_batch() -> None:
    x, dictionary = problem(9, 24, n=2 * 1024 + 3)  # more than one chunk
    whole = lasso(x, dictionary, 0.1, tolerance=1e-11)
    assert whole.converged.all()
    assert whole.iterations.unique().numel() > 3  # rows left at different times
    for i in (0, 1500, 2050):
        alone = lasso(x[i : i + 1], dictionary, 0.1, tolerance=1e-11)
        torch.testing.assert_close(alone.codes[0], whole.codes[i], rtol=0, atol=1e-9)
    again = lasso(x, dictionary, 0.1, tolerance=1e-11)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_memory_bound_does_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dictionary = problem(20, 50, n=40)
    whole = lasso(x, dictionary, 0.05, tolerance=1e-11)
    assert (whole.iterations % sparse_coding.SOLVE == 0).any()  # solved on the support
    monkeypatch.setattr(sparse_coding, "GATHERED", 1000)
    monkeypatch.setattr(sparse_coding, "CHUNK", 17)
    pieces = lasso(x, dictionary, 0.05, tolerance=1e-11)
    torch.testing.assert_close(pieces.codes, whole.codes, rtol=0, atol=1e-9)


def test_a_tighter_tolerance_takes_longer_and_fits_better() -> None:
    x, dictionary = problem(20, 50)
    loose, tight = (lasso(x, dictionary, 0.05, tolerance=t) for t in (1e-2, 1e-8))
    assert (loose.kkt <= 1e-2).all()
    assert (tight.kkt <= 1e-8).all()
    assert (loose.iterations <= tight.iterations).all()
    energies = [sparse_coding_energy(x, r.codes, dictionary, 0.05) for r in (loose, tight)]
    assert (energies[0] >= energies[1] - 1e-12).all()


def test_units_of_the_data_do_not_matter() -> None:
    x, dictionary = problem(9, 24)
    codes = exact(lasso(x, dictionary, 0.5))
    for unit in (1e-9, 1e9):
        scaled = lasso(unit * x, dictionary, 0.5 / unit, noise_scale=SCALE * unit)
        # x, h and σ in new units, λ per unit of h: the same energy
        torch.testing.assert_close(exact(scaled) / unit, codes, rtol=1e-9, atol=1e-9)


def test_float32() -> None:
    x, dictionary = problem(40, 60)
    single = lasso(x.float(), dictionary.float(), 0.3, tolerance=1e-9)  # beyond its precision
    assert single.codes.dtype == torch.float32
    assert single.kkt.max() < 1e-4
    expected = exact(lasso(x, dictionary, 0.3, tolerance=1e-12))
    torch.testing.assert_close(exact(single).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encoder_in_half_precision(dtype: torch.dtype) -> None:
    pair = pair_of(9, 12, 0.5)
    x = torch.randn(N, 9, dtype=torch.float64)
    expected = pair.encoder(x).mean
    codes = pair.to(dtype).encoder(x.to(dtype)).mean
    assert codes.dtype == dtype
    torch.testing.assert_close(codes.double(), expected, rtol=0, atol=0.1)


class TestHardInput:
    def test_zero_data_have_zero_codes(self) -> None:
        result = lasso(torch.zeros(3, 9), problem(9, 24)[1], 0.1)
        assert not exact(result).any()
        assert not result.iterations.any()

    def test_codes_are_zero_from_the_critical_rate_on(self) -> None:
        x, dictionary = problem(9, 24)
        critical = float((2 * x @ dictionary).abs().amax(1).max())
        assert not exact(lasso(x, dictionary, critical * (1 + 1e-9))).any()
        assert exact(lasso(x, dictionary, critical * 0.99)).count_nonzero() == 1

    def test_one_datum_and_one_atom(self) -> None:
        codes = exact(lasso(torch.tensor([[3.0]]), torch.tensor([[1.0]]), 2.0))
        torch.testing.assert_close(codes, torch.tensor([[2.0]]))

    @pytest.mark.parametrize("rate", [1.0, 0.01])
    def test_duplicate_atoms(self, rate: float) -> None:
        x, dictionary = problem(9, 6)
        twice = torch.cat([dictionary, dictionary, torch.zeros(9, 1)], 1)  # and an empty one
        codes = exact(lasso(x, twice, rate, tolerance=1e-10))
        expected = exact(lasso(x, dictionary, rate, tolerance=1e-10))
        torch.testing.assert_close(codes[:, :6] + codes[:, 6:12], expected, rtol=0, atol=1e-9)
        assert not codes[:, 12].any()

    def test_empty_dictionary(self) -> None:
        assert not exact(lasso(torch.randn(N, 9), torch.zeros(9, 4), 0.1)).any()

    @pytest.mark.parametrize("rate", [1.0, 1e-3])
    def test_nearly_parallel_atoms(self, rate: float) -> None:
        x, dictionary = problem(9, 1)
        close = normalize(dictionary + 1e-4 * torch.randn(9, 8, dtype=torch.float64), dim=0)
        assert torch.linalg.cond(close) > 1e3
        result = lasso(x, close, rate, tolerance=1e-9, max_iterations=100_000)
        assert exact(result).isfinite().all()
        assert result.kkt.max() <= 1e-9

    def test_a_start_at_the_optimum_takes_no_iteration(self) -> None:
        x, dictionary = problem(9, 24)
        first = lasso(x, dictionary, 0.2)
        again = lasso(x, dictionary, 0.2, start=first.codes)
        assert not again.iterations.any()
        assert torch.equal(again.codes, first.codes)
        assert again.codes.data_ptr() != first.codes.data_ptr()

    def test_no_gradient_flows(self) -> None:
        x, dictionary = problem(9, 24)
        assert not lasso(x.requires_grad_(), dictionary.requires_grad_(), 0.2).codes.requires_grad

    def test_giving_up_is_reported(self) -> None:
        x, dictionary = problem(20, 50)
        result = lasso(x, dictionary, 1e-3, max_iterations=5)
        assert not result.converged.any()
        assert (result.iterations == 5).all()
        assert (result.kkt > 1e-6).all()
        decoder = GaussianDecoder(MLP(24, 9, unit_norm=True), scale=SCALE)
        encoder = SparseCodingEncoder(decoder, 1e-3, max_iterations=2)
        with pytest.warns(UserWarning, match="did not reach the tolerance within max_iterations"):
            encoder(x[:, :9].float())


class TestEncoder:
    @pytest.mark.parametrize("x_shape", [(6,), (1, 2, 3)])
    @pytest.mark.parametrize("batch", [(), (0,), (N,), (2, 3, N)])
    @pytest.mark.parametrize("coupling", [0.0, 1.0])
    def test_batch_shapes(
        self, x_shape: tuple[int, ...], batch: tuple[int, ...], coupling: float
    ) -> None:
        encoder = pair_of(x_shape, 8, 0.3, MLP(x_shape, 8), coupling=coupling).encoder
        x = torch.randn(*batch, *x_shape, dtype=torch.float64)
        q = encoder(x)
        assert is_point(q)
        assert (q.batch_shape, q.event_shape) == (batch, (8,))
        assert not q.mean.requires_grad
        assert encoder.energy(x, q.mean).shape == batch
        if batch == (2, 3, N):
            torch.testing.assert_close(q.mean[1, 2], encoder(x[1, 2]).mean, rtol=0, atol=1e-9)

    def test_code_is_the_lasso_of_the_centred_data(self) -> None:
        pair = pair_of(9, 12, 0.5)
        with torch.no_grad():
            pair.decoder.network.output.bias.normal_()
        x = torch.randn(N, 9, dtype=torch.float64)
        weight, bias, _ = pair.decoder.affine()
        torch.testing.assert_close(weight.norm(dim=0), torch.ones(12, dtype=torch.float64))
        expected = exact(lasso(x - bias, weight, 0.5, tolerance=1e-12))
        torch.testing.assert_close(pair.encoder(x).mean, expected, rtol=0, atol=1e-10)

    def test_code_is_the_mode_of_the_joint_density(self) -> None:
        pair = pair_of(9, 12, 0.5)
        x = torch.randn(N, 9, dtype=torch.float64)

        def log_joint(z: Tensor) -> Tensor:
            return pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)

        z = pair.encoder(x).mean
        for size in (1e-4, 1e-2, 1.0):
            assert (log_joint(z + size * torch.randn_like(z)) < log_joint(z)).all()

    def test_nonnegative_codes(self) -> None:
        encoder = pair_of(9, 12, 0.5, nonnegative=True).encoder
        z = encoder(torch.randn(N, 9, dtype=torch.float64)).mean
        assert (z >= 0).all()
        assert z.any()

    @pytest.mark.parametrize("wrap", [lambda network: network, PointEncoder])
    def test_predictor_alone_only_starts_the_inference(self, wrap: type) -> None:
        network = MLP(9, 12)
        encoder = pair_of(9, 12, 0.5, wrap(network)).encoder
        x = torch.randn(N, 9, dtype=torch.float64)
        plain = SparseCodingEncoder(encoder.decoder, 0.5, tolerance=1e-12)
        torch.testing.assert_close(encoder(x).mean, plain(x).mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(encoder.energy(x, network(x)), plain.energy(x, network(x)))

    def test_coupling_pulls_the_code_to_the_prediction(self) -> None:
        network = MLP(9, 12)  # the pairs below share it
        x = torch.randn(N, 9, dtype=torch.float64)
        distances = []
        for coupling in (0.0, 1.0, 100.0, 1e6):
            encoder = pair_of(9, 12, 0.5, network.float(), coupling=coupling).encoder
            distances.append(float((encoder(x).mean - network(x)).norm().detach()))
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 1e-4

    def test_amortisation_gap_is_never_negative(self) -> None:
        encoder = pair_of(9, 12, 0.5, MLP(9, 12), coupling=1.0).encoder
        x = torch.randn(N, 9, dtype=torch.float64)
        gap = encoder.energy(x, encoder.predictor(x)) - encoder.energy(x, encoder(x).mean)
        assert (gap > 0).all()

    def test_owns_the_parameters_of_its_parts_alone(self) -> None:
        decoder, predictor = GaussianDecoder(MLP(4, 9), scale=SCALE), MLP(9, 4)
        encoder = SparseCodingEncoder(decoder, 1.0, predictor)
        parts = itertools.chain(decoder.parameters(), predictor.parameters())
        assert {id(p) for p in encoder.parameters()} == {id(p) for p in parts}

    def test_nan_passes_through_without_a_warning(self) -> None:
        encoder = pair_of(9, 12, 0.5).encoder
        x = torch.randn(N, 9, dtype=torch.float64)
        x[2, 3] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            z = encoder(x).mean
        assert z.isnan().any(1).tolist() == [i == 2 for i in range(N)]


class TestPair:
    @pytest.mark.parametrize("elbo", [pyro.infer.Trace_ELBO(), probae.ELBO()])
    def test_loss_is_the_energy_but_for_constants(self, elbo: pyro.infer.ELBO) -> None:
        d, k, rate = 9, 12, 0.5
        pair = pair_of(d, k, rate)
        assert pair.kind is probae.Kind.MAP_JOINT
        x = torch.randn(N, d, dtype=torch.float64)
        loss = float(elbo.differentiable_loss(pair.model, pair.guide, x).detach())
        energy = pair.encoder.energy(x, pair.encoder(x).mean).sum().detach()
        constant = N * (d / 2 * math.log(math.pi) + k * math.log(2 / rate))
        assert loss == pytest.approx(float(energy) + constant, abs=1e-9)

    def test_loss_with_a_coupling(self) -> None:
        d, k, rate, coupling = 9, 12, 0.5, 0.7
        pair = pair_of(d, k, rate, MLP(d, k), coupling=coupling)
        assert pair.kind is probae.Kind.ENERGY
        x = torch.randn(N, d, dtype=torch.float64)
        loss = pyro.infer.Trace_ELBO().differentiable_loss(pair.model, pair.guide, x)
        energy = pair.encoder.energy(x, pair.encoder(x).mean).sum().detach()
        constant = d / 2 * math.log(math.pi) + k * math.log(2 / rate)
        constant += k / 2 * math.log(math.pi / coupling)
        assert float(loss.detach()) == pytest.approx(float(energy) + N * constant, abs=1e-9)

    @pytest.mark.parametrize("coupling", [0.0, 0.7])
    def test_gradient_is_that_of_the_minimal_energy(self, coupling: float) -> None:
        predictor = MLP(5, 8, hidden=(4,), activation="tanh") if coupling else None
        pair = pair_of(5, 8, 0.4, predictor, coupling=coupling)
        x = torch.randn(N, 5, dtype=torch.float64)
        elbo = pyro.infer.Trace_ELBO()
        elbo.differentiable_loss(pair.model, pair.guide, x).backward()

        def minimal_energy() -> float:
            return float(pair.encoder.energy(x, pair.encoder(x).mean).sum().detach())

        step, checked = 1e-5, 0
        for parameter in pair.parameters():
            for i in torch.randperm(parameter.numel())[:4]:
                value, moved = parameter.data.view(-1), []
                original = value[i].clone()
                for sign in (1, -1):
                    value[i] = original + sign * step
                    moved.append(minimal_energy())
                value[i] = original
                slope = (moved[0] - moved[1]) / (2 * step)
                assert float(parameter.grad.view(-1)[i]) == pytest.approx(slope, abs=1e-6)
                checked += 1
        assert checked >= 8

    def test_training_finds_the_atoms_of_sparse_data(self) -> None:
        truth = normalize(torch.randn(10, 12), dim=0)
        codes = torch.randn(1500, 12) * (torch.rand(1500, 12) < 0.15)
        decoder = GaussianDecoder(MLP(12, 10, unit_norm=True), scale=SCALE)
        encoder = SparseCodingEncoder(decoder, 0.2, tolerance=1e-3)
        pair = Autoencoder(LaplacePrior(12, 0.2), encoder, decoder)
        probae.fit(pair, codes @ truth.T, epochs=20, lr=0.03, schedule="cosine", progress=False)
        weight, _, _ = decoder.affine()
        cosines = (truth.T @ weight.detach()).abs().amax(1)
        assert cosines.median() > 0.99

    def test_save_and_load(self, tmp_path: Path) -> None:
        pair = pair_of((1, 3, 3), 12, 0.5, MLP((1, 3, 3), 12), coupling=0.7)
        x = torch.randn(N, 1, 3, 3, dtype=torch.float64)
        again = probae.load(probae.save(pair, tmp_path / "run"))
        assert torch.equal(again.encoder(x).mean, pair.encoder(x).mean)


@pytest.mark.parametrize("f", [-2.0, 0.0, 0.3, 5.0])
@pytest.mark.parametrize(("rate", "coupling"), [(0.5, 1.0), (3.0, 0.2), (1.0, 50.0)])
def test_log_normalizer_is_the_integral(f: float, rate: float, coupling: float) -> None:
    def density(h: float) -> float:
        return math.exp(-rate * abs(h) - coupling * (h - f) ** 2)

    ends = (-60.0, min(0.0, f), max(0.0, f), 60.0)
    pieces = [quad(density, *ab, epsabs=1e-14, epsrel=1e-13)[0] for ab in itertools.pairwise(ends)]
    prediction = torch.tensor([[f, f]], dtype=torch.float64)
    log_z = coupling_log_normalizer(prediction, rate, coupling)
    assert log_z.shape == (1,)
    assert math.exp(log_z.item() / 2) == pytest.approx(sum(pieces), rel=1e-8)


def test_log_normalizer_stays_finite() -> None:
    prediction = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    log_z = coupling_log_normalizer(prediction, 10.0, 1e-3)
    (gradient,) = torch.autograd.grad(log_z, prediction)
    assert log_z.isfinite()
    torch.testing.assert_close(gradient, torch.tensor([10.0, -10.0, 0.0]), rtol=1e-4, atol=1e-4)


X, W = torch.zeros(N, 9), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W, 1.0), {}, r"x must have shape \(N, D\), got \(9,\)"),
        ((X.int(), W, 1.0), {}, "x must be floating-point"),
        ((X / 0, W, 1.0), {}, "x must be finite"),
        ((X, W.T, 1.0), {}, r"dictionary must have shape \(D, K\) with D = 9 .* got \(4, 9\)"),
        ((X, W / 0, 1.0), {}, "dictionary must be finite"),
        ((X, W, 0.0), {}, "rate must be a finite number > 0, got 0.0"),
        ((X, W, 1.0), {"noise_scale": -1.0}, "noise_scale must be a finite number > 0"),
        ((X, W, 1.0), {"coupling": -1.0}, "coupling must be a finite number >= 0, got -1.0"),
        ((X, W, 1.0), {"coupling": 1.0}, "prediction must be given where coupling > 0"),
        ((X, W, 1.0), {"prediction": W}, r"prediction must have shape \(N, K\) = \(7, 4\)"),
        ((X, W, 1.0), {"start": X}, r"start must have shape \(N, K\) = \(7, 4\), .* \(7, 9\)"),
        ((X, W, 1.0), {"tolerance": 0.0}, "tolerance must be a finite number > 0"),
        ((X, W, 1.0), {"max_iterations": 0}, "max_iterations must be an int >= 1"),
    ],
)
def test_lasso_says_what_is_wrong(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lasso(*arguments, **options)


@pytest.mark.parametrize(
    "decoder",
    [
        GaussianDecoder(MLP(4, 9, hidden=(4,))),
        GaussianDecoder(MLP(4, 9), learn_scale=True),
        GaussianDecoder(nn.Linear(4, 9)),
        BernoulliDecoder(MLP(4, 9)),
        None,
    ],
    ids=["hidden", "learned scale", "no MLP", "Bernoulli", "None"],
)
def test_encoder_refuses_other_decoders(decoder: object) -> None:
    with pytest.raises(ValueError, match="decoder must be a GaussianDecoder with a fixed scale"):
        SparseCodingEncoder(decoder, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be"),
        ({"coupling": 1.0}, "predictor must be given where coupling > 0"),
        ({"coupling": math.nan}, "coupling must be a finite number >= 0, got nan"),
        ({"predictor": torch.sin}, "predictor must be a torch.nn.Module or None"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"max_iterations": 1.5}, "max_iterations must be"),
    ],
)
def test_encoder_says_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseCodingEncoder(GaussianDecoder(MLP(4, 9)), **{"rate": 1.0, **options})


def test_encoder_says_which_predictions_it_needs() -> None:
    encoder = SparseCodingEncoder(GaussianDecoder(MLP(4, 9)), 1.0, MLP(9, 5))
    with pytest.raises(
        ValueError, match=r"predictor must map x of shape \(7, 9\) .* \(7, 4\), got"
    ):
        encoder(X)


@pytest.mark.parametrize("options", [{"rate": -1.0}, {"noise_scale": 0.0}, {"coupling": 1.0}])
def test_energy_says_what_is_wrong(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        sparse_coding_energy(X, X @ W, W, **{"rate": 1.0, **options})


@pytest.mark.parametrize(("rate", "coupling"), [(0.0, 1.0), (1.0, 0.0)])
def test_log_normalizer_says_what_is_wrong(rate: float, coupling: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        coupling_log_normalizer(X, rate, coupling)
