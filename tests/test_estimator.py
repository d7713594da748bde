"""The scikit-learn estimator: its own contract, and the pair's numbers through it."""

import os
import pickle
import subprocess
import sys
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import probae
import probae.estimator as module
from probae import AutoencoderEstimator

SMALL: dict[str, Any] = {"z_dim": 2, "epochs": 2, "num_samples": 10}
NARROW: dict[str, Any] = {**SMALL, "hidden": (8,)}
CHECKED = [
    AutoencoderEstimator(**NARROW),
    AutoencoderEstimator("PPCA", 1, epochs=2),  # exact log p(x)
    AutoencoderEstimator("SparseAutoencoder", **SMALL, rate=0.5),  # without log p(x)
    AutoencoderEstimator("DenoisingAutoencoder", **NARROW, corruption=probae.Masking(0.3)),
]


@parametrize_with_checks(CHECKED)
def test_scikit_learn_accepts_it(estimator: Any, check: Any) -> None:
    check(estimator)


def gaussian(n: int = 60, d: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2)) @ rng.normal(size=(2, d)) + 0.3 * rng.normal(size=(n, d)) + 1
    return x.astype(np.float32).astype(float)  # no further rounding in the estimator


def bits(n: int = 60, d: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, size=(n, d)).astype(float)


def test_codes_and_reconstructions_are_the_pairs_own() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(**NARROW, random_state=0).fit(x)
    pair, tensor = estimator.pair_, torch.tensor(x, dtype=torch.float32)
    with torch.no_grad():
        codes = pair.encoder(tensor).mean
    np.testing.assert_allclose(estimator.transform(x), codes, atol=1e-5)  # float32 arithmetic
    reconstruction = estimator.inverse_transform(estimator.transform(x))
    np.testing.assert_allclose(reconstruction, probae.reconstruct(pair, tensor).mean, atol=1e-5)
    assert estimator.run_.best_epoch == 2
    assert (estimator.n_features_in_, reconstruction.shape) == (5, x.shape)


def test_a_corruption_does_not_touch_the_data_to_encode() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(
        "DenoisingAutoencoder", **NARROW, corruption=probae.Masking(0.5, known=True)
    ).fit(x)
    clean = torch.tensor(x, dtype=torch.float32)
    known = torch.stack([clean, torch.ones_like(clean)], 1)  # nothing is masked
    with torch.no_grad():
        np.testing.assert_allclose(
            estimator.transform(x), estimator.pair_.encoder(known).mean, atol=1e-5
        )


def test_exact_log_likelihood_is_that_of_the_gaussian() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator("PPCA", 2, epochs=5, lr=0.05, random_state=0).fit(x)
    weight, mean, scale = (t.detach() for t in deepcopy(estimator.pair_).double().decoder.affine())
    law = multivariate_normal(mean, weight @ weight.T + scale**2 * torch.eye(5).double())
    np.testing.assert_allclose(estimator.score_samples(x), law.logpdf(x), rtol=1e-9)
    assert estimator.score(x) == pytest.approx(law.logpdf(x).mean(), rel=1e-12)


@pytest.mark.parametrize("num_samples", [1, 7, 3000])  # 3000: in more than one block
def test_importance_weights_under_the_exact_posterior_are_exact(
    monkeypatch: pytest.MonkeyPatch, num_samples: int
) -> None:
    # p(x, z) / p(z|x) = p(x) for every z
    x = gaussian()
    estimator = AutoencoderEstimator("PPCA", 2, epochs=2, num_samples=num_samples).fit(x)
    exact = estimator.score_samples(x)
    monkeypatch.setattr(module, "closed_form", lambda pair: None)
    monkeypatch.setattr(module, "rows_in_budget", lambda pair: 1000)
    np.testing.assert_allclose(estimator.score_samples(x[:5]), exact[:5], rtol=1e-9)


@pytest.mark.parametrize("preset", ["VAE", "DenoisingVAE"])
def test_importance_weighted_bound_agrees_with_log_likelihood(preset: str) -> None:
    x = gaussian(80)
    estimator = AutoencoderEstimator(preset, **{**NARROW, "num_samples": 50}, random_state=0)
    estimator.fit(x)
    values = estimator.score_samples(x)
    ll = probae.log_likelihood(estimator.pair_.double(), x, "iwae", 50, seed=1)
    # the same expectation, independent draws: z-test, fails by chance with probability 1e-4
    spread = np.sqrt(2 * float((ll.std_error**2).sum())) / len(x)
    assert abs(values.mean() - ll.mean) < 3.9 * spread + 1e-12
    assert not np.allclose(values, ll.values)


def test_the_value_of_a_datum_does_not_depend_on_its_company() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(**NARROW, random_state=0).fit(x)
    values, order = estimator.score_samples(x), np.random.default_rng(1).permutation(len(x))
    np.testing.assert_allclose(estimator.score_samples(x[order]), values[order], rtol=1e-12)
    np.testing.assert_allclose(estimator.score_samples(x[7:8]), values[7:8], rtol=1e-12)
    twice = estimator.score_samples(np.stack([x[3], x[3]]))
    assert twice[0] == twice[1] == values[3]


def test_more_samples_give_a_tighter_bound() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(**NARROW, random_state=0).fit(x)
    means = [estimator.set_params(num_samples=k).score(x) for k in (1, 10, 300)]
    assert means == sorted(means)


def test_grey_data_are_trained_on_but_have_no_bernoulli_likelihood() -> None:
    x = np.random.default_rng(0).uniform(size=(40, 6))
    estimator = AutoencoderEstimator(**NARROW, likelihood="bernoulli", binarize=True).fit(x)
    assert estimator.run_.bound_on == "log p(x)"
    assert estimator.score_samples(bits()).shape == (60,)
    with pytest.raises(ValueError, match=r"binarise them with probae\.binarize"):
        estimator.score_samples(x)
    with pytest.raises(ValueError, match="X must lie in the support"):
        estimator.transform(3 * x)
    above = np.nextafter(np.ones((1, 6)), 2)  # as a MinMaxScaler may make it
    np.testing.assert_array_equal(estimator.transform(above), estimator.transform(np.ones((1, 6))))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"preset": "DenoisingAutoencoder"}, "CONDITIONAL: its prior is flat.*'VAE'"),
        ({"preset": "SparseAutoencoder"}, "MAP_JOINT: .*posterior='laplace'"),
        ({"preset": "PredictiveSparseDecomposition"}, "ENERGY: .*'ais'"),
    ],
)
def test_a_pair_without_a_likelihood_has_no_score(options: dict[str, Any], cause: str) -> None:
    estimator = AutoencoderEstimator(**options, **SMALL)
    assert hasattr(estimator, "score")  # who knows
    estimator.fit(gaussian())
    assert not hasattr(estimator, "score_samples")
    assert not hasattr(estimator, "score")
    with pytest.raises(AttributeError, match="has no attribute 'score'") as error:
        estimator.score(gaussian())
    with pytest.raises(ValueError, match=cause):
        raise error.value.__cause__  # type: ignore[misc]


def test_samples_have_the_moments_of_the_model() -> None:
    estimator = AutoencoderEstimator("PPCA", 2, epochs=5, lr=0.05, random_state=0).fit(gaussian())
    x = estimator.sample(20_000, random_state=0)
    weight, mean, scale = (t.detach().double() for t in estimator.pair_.decoder.affine())
    covariance = weight @ weight.T + scale**2 * torch.eye(5).double()
    z = (x.mean(0) - mean.numpy()) / np.sqrt(covariance.diagonal().numpy() / len(x))
    assert np.abs(z).max() < 4.5  # of five; fails by chance with probability 4e-5
    np.testing.assert_array_equal(x[:3], estimator.sample(20_000, random_state=0)[:3])
    assert not np.array_equal(estimator.sample(3), estimator.sample(3))


def test_sampling_needs_a_proper_prior() -> None:
    estimator = AutoencoderEstimator("UndercompleteAutoencoder", **SMALL).fit(gaussian())
    with pytest.raises(ValueError, match="flat prior; give it a proper one"):
        estimator.sample()
    with pytest.raises(ValueError, match="n_samples must be an int >= 1, got 0"):
        estimator.sample(0)


def test_the_scale_is_learned_where_the_loss_is_a_bound() -> None:
    x = 3 * gaussian()
    scale = np.sqrt(x.var(0).mean())
    start = AutoencoderEstimator(**NARROW, lr=1e-9).fit(x).pair_.decoder
    assert start.learn_scale
    assert float(start.scale.detach()) == pytest.approx(scale, rel=1e-5)
    for preset in ("SparseAutoencoder", "DenoisingAutoencoder"):
        decoder = AutoencoderEstimator(preset, **SMALL).fit(x).pair_.decoder
        assert (decoder.learn_scale, float(decoder.scale)) == (False, 1.0)
    given = AutoencoderEstimator(**NARROW, likelihood_options={"scale": 0.5}).fit(x)
    assert (given.pair_.decoder.learn_scale, float(given.pair_.decoder.scale)) == (False, 0.5)
    constant = AutoencoderEstimator(**NARROW).fit(np.ones((5, 3)))
    assert np.isfinite(constant.score_samples(np.ones((5, 3)))).all()


def test_presets_by_name_by_class_and_by_function() -> None:
    def narrow(x_dim: tuple[int, ...], z_dim: int, width: int = 3) -> probae.Autoencoder:
        return probae.VAE(x_dim, z_dim, hidden=(width,), likelihood="gaussian")

    x = gaussian()
    codes = [
        AutoencoderEstimator(preset, **SMALL, **options, random_state=0).fit_transform(x)
        for preset, options in (
            ("VAE", {"hidden": (4,), "likelihood_options": {}}),
            (probae.VAE, {"hidden": (4,), "likelihood_options": {}}),
            (narrow, {"width": 4}),
        )
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])
    with pytest.raises(ValueError, match=r"wide is no argument .* of narrow, which takes width"):
        AutoencoderEstimator(narrow, wide=4).fit(x)


def test_every_preset_has_its_name() -> None:
    assert set(module.PRESETS) == {
        name
        for name in probae.__all__
        if isinstance(cls := getattr(probae, name), type)
        and issubclass(cls, probae.Autoencoder)
        and cls.__module__ == "probae.presets"  # adversarial pairs are not trained by fit
    }


def test_images_for_convolutions() -> None:
    x = gaussian(20, 36)
    estimator = AutoencoderEstimator(**NARROW, x_shape=(1, 6, 6), channels=(3,)).fit(x)
    assert estimator.pair_.x_shape == (1, 6, 6)
    assert estimator.transform(x).shape == (20, 2)
    assert estimator.inverse_transform(estimator.transform(x)).shape == x.shape
    assert estimator.sample(4).shape == (4, 36)
    assert estimator.score_samples(x).shape == (20,)


def test_keywords_of_the_preset_are_parameters() -> None:
    corruption = probae.GaussianNoise(0.2)
    estimator = AutoencoderEstimator("DenoisingAutoencoder", 3, corruption=corruption, hidden=(4,))
    assert estimator.get_params()["corruption"] is corruption
    assert "hidden=(4,)" in repr(estimator)
    assert "hidden" in estimator._repr_html_()
    twin = clone(estimator).set_params(corruption=probae.Masking(0.1), activation="tanh", z_dim=2)
    assert (twin.get_params()["hidden"], twin.get_params()["activation"]) == ((4,), "tanh")
    assert estimator.get_params()["corruption"] is corruption
    assert "activation" not in estimator.get_params()
    pair = twin.set_params(epochs=1).fit(gaussian()).pair_
    assert isinstance(pair.corruption, probae.Masking)
    assert pair.z_shape == (2,)


def test_set_params_refuses_what_the_preset_does_not_take() -> None:
    estimator = AutoencoderEstimator()
    with pytest.raises(ValueError, match=r"rate is no argument .* VAE, which takes hidden"):
        estimator.set_params(rate=0.5, epochs=3)
    assert estimator.epochs == 50
    estimator.set_params(rate=0.5, preset="SparseAutoencoder")  # one call, in any order
    assert estimator.get_params()["rate"] == 0.5
    estimator.set_params(preset="VAE")
    with pytest.raises(ValueError, match="rate is no argument"):
        estimator.fit(gaussian())


def test_grid_search_goes_over_keywords_and_presets() -> None:
    x = gaussian(20)
    estimator = AutoencoderEstimator("SparseAutoencoder", **SMALL, posterior="laplace")
    grid = {"z_dim": [1, 3], "rate": [0.5, 2.0]}
    search = GridSearchCV(estimator, grid, cv=2, error_score="raise").fit(x)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    best = search.best_estimator_
    assert best.pair_.z_shape == (search.best_params_["z_dim"],)
    assert float(best.pair_.prior.rate) == search.best_params_["rate"]
    both = [{"preset": ["VAE"], "hidden": [(4,)]}, {"preset": ["PPCA"], "lr": [0.01, 0.1]}]
    search = GridSearchCV(AutoencoderEstimator(**SMALL), both, cv=2, error_score="raise").fit(x)
    assert len(search.cv_results_["params"]) == 3


def test_grid_search_finds_the_dimension_of_the_data() -> None:
    # data of two factors: the exact held-out likelihood tells
    x = gaussian(300, 6)
    estimator = AutoencoderEstimator("PPCA", epochs=30, lr=0.1, schedule="cosine", random_state=0)
    pipeline = make_pipeline(StandardScaler(), estimator)
    grid = {"autoencoderestimator__z_dim": [1, 2]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(x)
    assert search.best_params_ == {"autoencoderestimator__z_dim": 2}
    one, two = search.cv_results_["mean_test_score"]
    assert two - one > 0.5  # nats per datum


def test_a_pipeline_of_codes_and_a_classifier() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    x = rng.normal(size=(200, 4)) + 4 * labels[:, None]
    autoencoder = AutoencoderEstimator(
        "DenoisingAutoencoder", z_dim=3, epochs=30, lr=0.01, hidden=(8,), random_state=0
    )
    pipeline = make_pipeline(StandardScaler(), autoencoder, LogisticRegression())
    assert pipeline.fit(x[:100], labels[:100]).score(x[100:], labels[100:]) > 0.95


def test_pickle_keeps_everything() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(**NARROW, random_state=0).fit(x)
    twin = pickle.loads(pickle.dumps(estimator))  # noqa: S301
    np.testing.assert_array_equal(twin.score_samples(x), estimator.score_samples(x))
    np.testing.assert_array_equal(twin.transform(x), estimator.transform(x))
    assert twin.run_.history == estimator.run_.history
    assert twin.get_params() == estimator.get_params()


def test_tables_in_and_out() -> None:
    x = pd.DataFrame(gaussian(d=3), columns=["a", "b", "c"])
    estimator = AutoencoderEstimator(**NARROW).set_output(transform="pandas").fit(x)
    assert estimator.feature_names_in_.tolist() == ["a", "b", "c"]
    codes = estimator.transform(x)
    assert codes.columns.tolist() == ["autoencoderestimator0", "autoencoderestimator1"]
    assert estimator.inverse_transform(codes).shape == x.shape
    with pytest.raises(ValueError, match="feature names should match"):
        estimator.transform(x.rename(columns={"a": "z"}))


def test_results_have_the_dtype_of_the_data() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(**NARROW, random_state=0).fit(x)
    for dtype in (np.float32, np.float64):
        data = x.astype(dtype)
        codes = estimator.transform(data)
        results = (codes, estimator.inverse_transform(codes), estimator.score_samples(data))
        assert all(result.dtype == dtype for result in results)
    assert estimator.pair_.dtype == torch.float32
    assert estimator.transform(x.round().astype(int)).dtype == np.float64


def test_random_state() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(**NARROW, random_state=3, validation_fraction=0.2)
    codes = [clone(estimator).fit_transform(x) for _ in range(2)]
    np.testing.assert_array_equal(*codes)
    other = clone(estimator).set_params(random_state=4).fit_transform(x)
    assert not np.array_equal(codes[0], other)
    estimator.set_params(random_state=None)
    np.random.seed(0)  # noqa: NPY002 (the global stream is what None means)
    first, second = (clone(estimator).fit_transform(x) for _ in range(2))
    assert not np.array_equal(first, second)
    np.random.seed(0)  # noqa: NPY002
    np.testing.assert_array_equal(clone(estimator).fit_transform(x), first)


def test_no_global_state_is_touched() -> None:
    x, state = gaussian(), torch.get_rng_state()
    estimator = AutoencoderEstimator(**NARROW).fit(x)
    estimator.transform(x)
    estimator.score(x)
    estimator.sample(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list(pyro.get_param_store().keys())) == 0
    assert estimator.pair_.training
    assert estimator.pair_.dtype == torch.float32


def test_arguments_that_are_modules_or_objectives_are_not_changed() -> None:
    prior, objective = probae.GaussianMixturePrior(2), probae.IWAE(3)
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    attributes = dict(vars(objective))
    estimator = AutoencoderEstimator(**NARROW, prior=prior, objective=objective, random_state=0)
    first = estimator.fit_transform(gaussian())
    assert estimator.run_.objective == "IWAE"
    assert estimator.get_params()["prior"] is prior
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())
    assert vars(objective) == attributes
    assert not torch.equal(
        next(iter(estimator.pair_.prior.parameters())), next(iter(before.values()))
    )
    np.testing.assert_array_equal(estimator.fit_transform(gaussian()), first)


def test_rows_held_out_choose_the_epoch() -> None:
    estimator = AutoencoderEstimator(
        **{**NARROW, "epochs": 30}, lr=0.1, validation_fraction=0.25, patience=2, random_state=0
    ).fit(gaussian())
    assert estimator.run_.monitored == "val"
    assert estimator.run_.stopped_early
    losses = estimator.run_.history["val_loss"]
    assert losses[estimator.run_.best_epoch - 1] == min(losses)


def test_progress_is_shown_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    AutoencoderEstimator(**NARROW).fit(gaussian())
    assert capfd.readouterr() == ("", "")
    AutoencoderEstimator(**NARROW, verbose=1).fit(gaussian())
    assert "epoch 2/2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "Vae"}, "preset must be one of PPCA, .*got 'Vae'"),
        ({"preset": 3}, "preset must be one of PPCA, .*got 3"),
        ({"preset": lambda x_dim, z_dim: 3}, "preset must return a probae.Autoencoder, got int"),
        ({"preset": lambda x_dim: 3}, "cannot be built for X with n_features=5: .*positional"),
        ({"preset": "PPCA", "z_dim": 5}, "PPCA cannot be built for X with n_features=5: z_dim"),
        ({"z_dim": 0}, "z_dim must be an int >= 1, got 0"),
        ({"rat": 0.5}, "rat is no argument of AutoencoderEstimator and no keyword of VAE, which"),
        ({"x_dim": 5}, "x_dim is no argument"),
        ({"hidden": -1}, "hidden must have positive entries only"),
        ({"likelihood": "normal"}, "likelihood must be one of bernoulli"),
        ({"likelihood": "bernoulli"}, r"support of the decoder \(\[0, 1\]\)"),
        ({"preset": "PPCA", "likelihood": "bernoulli"}, "left at 'gaussian' for PPCA"),
        ({"preset": "PPCA", "likelihood_options": {}}, "left at None for PPCA"),
        ({"likelihood_options": {"sigma": 1}}, "likelihood_options do not fit"),
        ({"x_shape": (2, 3)}, r"x_shape \(2, 3\) has 6 numbers, but X has n_features = 5"),
        ({"epochs": 0}, "epochs must be an int >= 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"lr": 0}, "lr must be"),
        ({"objective": 3}, "objective must be an instance of pyro.infer.ELBO"),
        ({"schedule": "step"}, "schedule must be 'constant'"),
        ({"patience": 3}, "patience needs rows that are held out: set validation_fraction"),
        ({"validation_fraction": 1}, r"validation_fraction must be strictly in \(0, 1\)"),
        ({"validation_fraction": 0.001}, "holds 0 out with n_samples=60"),
        ({"clip_norm": -1}, "clip_norm must be"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"random_state": "one"}, "cannot be used to seed"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    estimator = AutoencoderEstimator(**{"epochs": 1, **options})  # nothing is looked at yet
    with pytest.raises(ValueError, match=message):
        estimator.fit(gaussian())


def test_bad_data() -> None:
    x = gaussian()
    estimator = AutoencoderEstimator(**NARROW)
    with pytest.raises(NotFittedError, match="is not fitted yet"):
        estimator.transform(x)
    for method in (estimator.inverse_transform, estimator.score_samples, estimator.sample):
        with pytest.raises(NotFittedError):
            method(x)
    with pytest.raises(ValueError, match="too large for dtype"):
        estimator.fit(1e300 * x)
    estimator.fit(x)
    with pytest.raises(ValueError, match="X must be finite"):
        estimator.transform(1e300 * x)
    with pytest.raises(ValueError, match="X has 4 features, but AutoencoderEstimator is expecting"):
        estimator.score_samples(x[:, :4])
    with pytest.raises(
        ValueError, match=r"X has 5 features, .* expecting 2 features as input of inv"
    ):
        estimator.inverse_transform(x)
    with pytest.raises(ValueError, match="num_samples must be an int >= 1, got 0"):
        estimator.set_params(num_samples=0).score(x)


def test_classes_have_no_mean() -> None:
    x = np.random.default_rng(0).integers(0, 3, (40, 5))
    estimator = AutoencoderEstimator(
        **NARROW, likelihood="categorical", likelihood_options={"num_classes": 3}
    ).fit(x)
    assert estimator.score(x) < 0
    with pytest.raises(ValueError, match=r"without a mean, .*estimator\.pair_\.decoder\(z\)"):
        estimator.inverse_transform(estimator.transform(x))


def test_importing_the_package_imports_no_scikit_learn() -> None:
    code = (
        "import sys, probae\n"
        "assert 'AutoencoderEstimator' in dir(probae)\n"
        "assert 'sklearn' not in sys.modules\n"
        "from probae import AutoencoderEstimator\n"
        "assert 'sklearn' in sys.modules\n"
        "assert not hasattr(probae, 'Estimator')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
