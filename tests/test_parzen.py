"""The Parzen-window score against its definition, and its calibration on real images."""

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.neighbors import KernelDensity
from torch import Tensor
from torch.utils.data import TensorDataset

import probae
from probae import ParzenScore, ParzenWarning, parzen, parzen_log_likelihood

DOUBLE = torch.float64
DATA = Path(os.environ.get("PROBAE_DATA") or Path(__file__).resolve().parents[2] / "shared/data")


@pytest.fixture(autouse=True)
def _silenced() -> Iterator[None]:
    """Silence the warning that each score comes with, by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParzenWarning)
        yield


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """The 50 000 + 10 000 training images of the papers, and the test images."""
    if not (DATA / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"no MNIST files in {DATA / 'mnist'}; set PROBAE_DATA to the folder above it")
    monkeypatch.setenv("PROBAE_DATA", str(DATA))
    data = probae.load_dataset("mnist")
    images = torch.cat([data.train, data.val])
    return images[:50_000], images[50_000:], data.test


def brute_force(samples: Tensor, x: Tensor, sigma: float) -> Tensor:
    """The definition, one pair of a datum and a sample after the other."""
    values = []
    for datum in x.double().flatten(1):
        terms = [
            torch.distributions.Normal(s, sigma).log_prob(datum).sum()
            for s in samples.double().flatten(1)
        ]
        values.append(torch.stack(terms).logsumexp(0) - math.log(len(samples)))
    return torch.stack(values)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3, 4)])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_values_are_those_of_the_definition(shape: tuple[int, ...], offset: float) -> None:
    samples, val, test = (torch.randn(n, *shape, dtype=DOUBLE) + offset for n in (13, 7, 11))
    score = parzen_log_likelihood(samples, val, test, bandwidths=[0.3, 0.7, 1.5])
    means = [brute_force(samples, val, sigma).mean() for sigma in (0.3, 0.7, 1.5)]
    assert score.bandwidth == (0.3, 0.7, 1.5)[int(torch.stack(means).argmax())]
    expected = brute_force(samples, test, score.bandwidth)
    # with an offset, subtraction alone rounds at 1e5 eps in the units of x
    assert torch.allclose(score.values, expected, rtol=0, atol=1e-11 if offset == 0 else 1e-7)
    assert score.values.dtype == DOUBLE
    assert score.mean == pytest.approx(expected.mean().item(), abs=1e-7)
    assert score.std_error == pytest.approx(expected.std().item() / 11**0.5, abs=1e-7)
    assert score.num_samples == 13
    assert score.reference is None


def test_the_default_bandwidths_are_those_of_the_protocol() -> None:
    samples, val, test = torch.rand(40, 6), torch.rand(30, 6), torch.rand(20, 6)
    grid = np.logspace(-1, 0, 10)
    score = parzen_log_likelihood(samples, val, test)
    best = max(grid, key=lambda sigma: brute_force(samples, val, sigma).mean().item())
    assert score.bandwidth == pytest.approx(best, rel=1e-14)
    known = KernelDensity(bandwidth=best).fit(samples.double().numpy())
    expected = known.score_samples(test.double().numpy())
    np.testing.assert_allclose(score.values.numpy(), expected, rtol=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, val, test = (torch.randn(n, 4, dtype=DOUBLE) for n in (29, 17, 23))
    whole = parzen_log_likelihood(samples, val, test)
    for block in (1, 5, 23):
        monkeypatch.setattr(parzen, "BLOCK", block)
        cut = parzen_log_likelihood(samples, val, test)
        assert cut.bandwidth == whole.bandwidth
        assert torch.allclose(cut.values, whole.values, rtol=0, atol=1e-11)


def test_a_far_datum_has_a_finite_score() -> None:
    far = torch.full((1, 3), 1e4)
    score = parzen_log_likelihood(torch.zeros(5, 3), torch.zeros(5, 3), far, bandwidths=[0.1])
    normalizer = 3 * math.log(0.1 * math.sqrt(2 * math.pi))
    assert score.values.item() == pytest.approx(-0.5 * 3e8 / 0.01 - normalizer, rel=1e-12)
    assert math.isnan(score.std_error), "one datum has no spread"


def test_the_score_moves_with_the_units_of_x_and_not_with_its_origin() -> None:
    # density: x -> 10 x + 3 takes D log 10 off every value
    x = torch.randn(60, 4, dtype=DOUBLE)
    sigmas = torch.logspace(-1, 0, 10, dtype=DOUBLE)
    one = parzen_log_likelihood(x[:20], x[20:40], x[40:], bandwidths=sigmas)
    y = 10 * x + 3
    ten = parzen_log_likelihood(y[:20], y[20:40], y[40:], bandwidths=10 * sigmas)
    assert torch.allclose(ten.values, one.values - 4 * math.log(10), rtol=1e-10)


def test_more_samples_of_the_truth_approach_its_entropy() -> None:
    # in one dimension the estimate is consistent: -E log N(x; 0, 1) = ½ log 2πe. Standard errors:
    # 0.0071 of the test data's mean, 0.01 or so of the estimate; 0.05 fails one time in 10^4
    samples, val, test = torch.randn(5000, 1), torch.randn(500, 1), torch.randn(10_000, 1)
    score = parzen_log_likelihood(samples, val, test)
    assert score.mean == pytest.approx(-0.5 * math.log(2 * math.pi * math.e), abs=0.05)


def test_the_reference_is_scored_as_samples_are_and_printed_beside() -> None:
    x = torch.rand(80, 5)
    samples = 0.5 + 0.01 * torch.randn(20, 5)
    score = parzen_log_likelihood(samples, x[20:40], x[40:], reference=x[:20])
    alone = parzen_log_likelihood(x[:20], x[20:40], x[40:])
    reference = score.reference
    assert isinstance(reference, ParzenScore)
    assert torch.equal(reference.values, alone.values)
    assert reference.bandwidth == alone.bandwidth
    assert reference.bandwidth != score.bandwidth, "each has its own"
    text = repr(score)
    for part in (
        f"{score.mean:.4f} ± {score.std_error:.4f} nats per datum",
        f"real data in the place of samples score {reference.mean:.4f} ± {reference.std_error:.4f}",
        "40 data, 20 samples",
        "a legacy score, no likelihood of the model",
    ):
        assert part in text
    assert "real data" not in repr(alone)
    assert "no likelihood of the model" in repr(alone)


def test_each_call_warns_and_can_be_silenced_by_name() -> None:
    x = torch.rand(30, 2)
    for _ in range(2):
        with pytest.warns(
            ParzenWarning, match="no likelihood of the model.*method='ais'"
        ) as caught:
            parzen_log_likelihood(x[:10], x[10:20], x[20:])
        assert len(caught) == 1
        assert caught[0].filename == __file__, "the warning names the line of the caller"
        assert issubclass(caught[0].category, UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ParzenWarning)
        parzen_log_likelihood(x[:10], x[10:20], x[20:])


def test_the_warning_tells_of_a_bandwidth_at_the_edge() -> None:
    x = torch.rand(30, 2)
    with pytest.warns(ParzenWarning, match=r"best bandwidth, 0\.2, is at the edge"):
        parzen_log_likelihood(x[:10], x[10:20], x[20:], bandwidths=[0.2, 50.0, 70.0])
    for inside in ([1e-3, 0.2, 50.0], [0.2]):
        with pytest.warns(ParzenWarning) as caught:
            parzen_log_likelihood(x[:10], x[10:20], x[20:], bandwidths=inside)
        assert "edge" not in str(caught[0].message)


def test_arrays_and_datasets_are_data() -> None:
    x = torch.rand(30, 2, 3)
    expected = parzen_log_likelihood(x[:10], x[10:20], x[20:]).values
    arrays = parzen_log_likelihood(x[:10].numpy(), x[10:20].numpy(), x[20:].double().numpy())
    assert torch.equal(arrays.values, expected)
    dataset = TensorDataset(x[20:], torch.arange(10))
    assert torch.equal(parzen_log_likelihood(x[:10], x[10:20], dataset).values, expected)


def test_nothing_is_tracked_or_drawn() -> None:
    samples = torch.rand(10, 2, requires_grad=True)
    state = torch.get_rng_state()
    score = parzen_log_likelihood(samples, torch.rand(5, 2), torch.rand(5, 2), reference=samples)
    assert not score.values.requires_grad
    torch.set_rng_state(state)
    torch.rand(5, 2)
    torch.rand(5, 2)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    x_val, x_test = torch.rand(5, 2), torch.rand(5, 2)
    parzen_log_likelihood(samples, x_val, x_test)
    assert torch.equal(torch.get_rng_state(), after)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"samples": torch.rand(4, 3)}, r"x_val must have shape \(N, 3\), as the samples have, got"),
    ({"x_test": torch.rand(4, 2, 1)}, r"x_test must have shape \(N, 2\), .* got \(4, 2, 1\)"),
    ({"x_val": torch.rand(0, 2)}, "x_val must have shape .* N >= 1"),
    (
        {"samples": torch.rand(4)},
        r"samples must have shape \(N, \*x_shape\), .* samples\[:, None\]",
    ),
    ({"samples": [[0.0, 1.0]]}, "samples must be a tensor, a NumPy array"),
    ({"x_test": torch.full((2, 2), math.nan)}, "x_test must be finite"),
    ({"x_test": torch.zeros(2, 2, dtype=torch.uint8)}, "x_test must be floating-point or bool"),
    ({"reference": torch.rand(3, 2)}, "reference must hold as many data as there are samples, 4"),
    ({"reference": torch.rand(4, 3)}, r"reference must have shape \(N, 2\)"),
    *(
        ({"bandwidths": value}, "bandwidths must be one or more finite numbers > 0")
        for value in ([], [0.0], [0.1, -1.0], [math.inf], [math.nan], ["a"], 0.1, "ab", [True])
    ),
    ({"bandwidths": torch.tensor(0.1)}, "bandwidths must be one or more finite numbers > 0"),
    ({"bandwidths": torch.rand(2, 2)}, "bandwidths must be one or more finite numbers > 0"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_refused(wrong: dict[str, Any], message: str) -> None:
    good = {name: torch.rand(4, 2) for name in ("samples", "x_val", "x_test")}
    with pytest.raises(ValueError, match=message):
        parzen_log_likelihood(**{**good, **wrong})


# ---- the calibration on real images --------------------------------------------------------------


def centroids(x: Tensor, count: int, iterations: int) -> Tensor:
    means = MiniBatchKMeans(
        count, init="random", n_init=1, batch_size=2048, max_iter=iterations, random_state=0
    ).fit(x.flatten(1).numpy())
    return torch.from_numpy(means.cluster_centers_).to(x).reshape(count, *x.shape[1:])


def test_centroids_score_above_real_mnist_images(mnist: tuple[Tensor, Tensor, Tensor]) -> None:
    train, val, test = mnist
    blurred = centroids(train[:10_000], 500, iterations=10)
    score = parzen_log_likelihood(blurred, val[:500], test[:1000], reference=train[:500])
    assert score.reference is not None
    # the difference is paired over the test images; it is 30 standard errors or more
    gain = score.values - score.reference.values
    assert gain.mean() > 10 * gain.std() / len(gain) ** 0.5


def test_real_mnist_images_score_as_published(mnist: tuple[Tensor, Tensor, Tensor]) -> None:
    train, val, test = mnist
    chosen = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:10_000]
    score = parzen_log_likelihood(train[chosen], val[:1000], test)
    assert score.mean == pytest.approx(242.7, abs=3.0)  # 243 in Theis et al., 2016
    assert score.std_error == pytest.approx(2.1, abs=0.1)
    assert score.bandwidth == pytest.approx(0.1668, abs=1e-4)


@pytest.mark.slow
def test_ten_thousand_centroids_score_far_above_the_data(
    mnist: tuple[Tensor, Tensor, Tensor],
) -> None:
    train, val, test = mnist
    blurred = centroids(train, 10_000, iterations=3)
    score = parzen_log_likelihood(blurred, val[:1000], test)
    assert score.mean > 242.7 + 50
