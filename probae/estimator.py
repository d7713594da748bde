"""A scikit-learn estimator around any preset: for pipelines, grid searches and pandas."""

from __future__ import annotations

import copy
import inspect
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import (  # type: ignore[import-untyped, unused-ignore]
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import (  # type: ignore[import-untyped, unused-ignore]
    check_array,
    check_random_state,
)
from sklearn.utils.metaestimators import (  # type: ignore[import-untyped, unused-ignore]
    available_if,
)
from sklearn.utils.validation import (  # type: ignore[import-untyped, unused-ignore]
    check_is_fitted,
    validate_data,
)
from torch import Tensor

from . import presets
from .autoencoder import Autoencoder, Kind, frozen, seeded
from .checks import check_support, chunks, prior_of
from .corruptions import encoder_input
from .datasets import as_tensor
from .distributions import is_flat, mean_of
from .exact import closed_form
from .fast_weights import fast_weights
from .importance import StreamingWeights, plain_weights
from .memory import counts, rows_in_budget
from .part import as_shape, numel, require_count, require_probability
from .sampling import sample
from .training import fit

PRESETS: dict[str, Callable[..., Autoencoder]] = {
    name: preset
    for name, preset in vars(presets).items()
    if isinstance(preset, type)
    and issubclass(preset, Autoencoder)
    and preset.__module__ == presets.__name__
}
LEAST_SCALE = 0.01  # start of a learned σ for data that hardly vary

Array = np.ndarray[Any, Any]


def _has_likelihood(estimator: AutoencoderEstimator) -> bool:
    """Whether a fitted pair has log p(x), or say why not; before ``fit`` nobody knows."""
    pair = getattr(estimator, "pair_", None)
    if pair is None:
        return True
    if is_flat(prior_of(pair)):
        raise ValueError(
            f"pair_ is of kind {pair.kind.value}: its prior is flat, so there is no p(x) "
            f"({pair.kind.statement}); take a preset with a proper prior and a posterior, such as "
            "'VAE', 'PPCA' or 'SparseAutoencoder' with posterior='laplace'"
        )
    if closed_form(pair) is None and pair.kind is not Kind.ELBO:
        raise ValueError(
            f"pair_ is of kind {pair.kind.value}: {pair.kind.statement}; take a posterior with a "
            "density, such as posterior='laplace' of 'SparseAutoencoder', or measure this pair by "
            "probae.log_likelihood(estimator.pair_, x, 'ais')"
        )
    return True


class AutoencoderEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Any preset as a scikit-learn estimator: a transformer, and a density where the pair has one.

    .. math:: transform:\; x \mapsto E_{q(z|x)}[z],\qquad
              inverse\_transform:\; z \mapsto E_{p(x|z)}[x],\qquad score\_samples:\; \log p(x)

    It works in a ``Pipeline``, in ``GridSearchCV`` (also over keywords of the preset), with
    ``clone``, ``pickle`` and ``set_output``. Data are rows of numbers; scale them before, such as
    by a ``StandardScaler`` in the pipeline. They are rounded to float32, in which the pair is
    trained; it is evaluated in float64, so that the result for a datum does not depend on the
    others that were passed along.

    Fitted attributes are ``pair_``, the pair, for everything else in this library; ``run_``, what
    :func:`probae.fit` returned; ``n_features_in_``; and ``feature_names_in_``, of a table.

    Args:
        preset: name of a preset, such as ``"VAE"`` or ``"DenoisingAutoencoder"``; its class; or any
            function of ``x_dim``, ``z_dim`` and keywords that returns a pair.
        z_dim: number of latent dimensions.
        likelihood: a name in ``probae.LIKELIHOODS``; presets without that keyword are Gaussian.
        likelihood_options: keywords of that decoder. None: of a Gaussian, the scale is learned
            where the loss is a bound on log p(x) (kind ELBO), starting at that of the data; else
            the preset's own defaults.
        x_shape: shape of one datum, such as ``(1, 8, 8)`` for convolutions; None: (n_features,).
        epochs: see :func:`probae.fit`, as for all options down to ``clip_norm``.
        batch_size: data per step.
        lr: learning rate at the start; ``"PPCA"`` is linear and wants about 0.02.
        objective: default ``probae.ELBO()``.
        binarize: draw x ~ Bernoulli(x) anew at every presentation.
        schedule: of the learning rate.
        patience: epochs without gain to stop after; needs ``validation_fraction``.
        clip_norm: clip the gradient to that norm.
        validation_fraction: share of the rows that is held out to choose the best epoch.
        num_samples: importance samples of z per datum in ``score_samples``, where log p(x) has no
            closed form.
        device: to train and evaluate on, such as ``"cuda"``.
        verbose: above 0, show a progress bar.
        random_state: int, ``RandomState``, or None for numpy's global stream: of the starting
            values, the rows held out, and the training.
        options: any other keyword of the preset, such as ``hidden=(64,)`` or ``rate=0.5``.

    Raises:
        ValueError: from ``fit``, as in scikit-learn: an argument is out of range or unknown, or the
            data do not lie in the support of the likelihood.

    Reference:
        Buitinck et al., API design for machine learning software: experiences from the scikit-learn
        project, 2013.

    Example:
        >>> import numpy as np, probae
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> X = np.random.default_rng(0).normal(size=(100, 5))
        >>> vae = probae.AutoencoderEstimator("VAE", z_dim=2, hidden=(16,), epochs=2)
        >>> pipeline = make_pipeline(StandardScaler(), vae).fit(X)
        >>> pipeline.transform(X).shape, pipeline.score_samples(X).shape
        ((100, 2), (100,))
        >>> vae.set_params(preset="SparseAutoencoder", z_dim=8, rate=0.5).get_params()["rate"]
        0.5
    """

    def __init__(
        self,
        preset: str | Callable[..., Autoencoder] = "VAE",
        z_dim: int = 10,
        *,
        likelihood: str = "gaussian",
        likelihood_options: dict[str, Any] | None = None,
        x_shape: tuple[int, ...] | None = None,
        epochs: int = 50,
        batch_size: int = 128,
        lr: float = 1e-3,
        objective: Any = None,
        binarize: bool = False,
        schedule: Any = "constant",
        patience: int | None = None,
        clip_norm: float | None = None,
        validation_fraction: float | None = None,
        num_samples: int = 100,
        device: str = "cpu",
        verbose: int = 0,
        random_state: Any = None,
        **options: Any,
    ) -> None:
        self.preset = preset
        self.z_dim = z_dim
        self.likelihood = likelihood
        self.likelihood_options = likelihood_options
        self.x_shape = x_shape
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.objective = objective
        self.binarize = binarize
        self.schedule = schedule
        self.patience = patience
        self.clip_norm = clip_norm
        self.validation_fraction = validation_fraction
        self.num_samples = num_samples
        self.device = device
        self.verbose = verbose
        self.random_state = random_state
        self._options = options

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor, with the keywords of the preset among them."""
        return {**super().get_params(deep), **self._options}

    def set_params(self, **params: Any) -> AutoencoderEstimator:
        """Set arguments of the constructor, or any keyword of the preset; return the estimator.

        Raises:
            ValueError: a name is neither.
        """
        own = self._get_param_names()
        options = {name: value for name, value in params.items() if name not in own}
        preset = params.get("preset", self.preset)
        preset = PRESETS.get(preset) if isinstance(preset, str) else preset
        if callable(preset):  # else fit says what is wrong with it
            _check_keywords(preset, options)
        super().set_params(**{name: value for name, value in params.items() if name in own})
        self._options = {**self._options, **options}
        return self

    def fit(self, X: Any, y: Any = None) -> AutoencoderEstimator:
        """Build a pair for ``X`` (n_samples, n_features), and train it; ``y`` is not looked at."""
        with np.errstate(over="ignore", invalid="ignore"):  # too large for float32 is an error
            rows = validate_data(self, X, dtype=np.float32)
        random_state = check_random_state(self.random_state)
        seed = _seed(random_state)
        x = self._shaped(rows)
        train, held_out = self._split(x, random_state)
        pair = self._build(train, seed)
        self.run_ = fit(
            pair,
            train,
            held_out,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            objective=copy.deepcopy(self.objective),  # it may count epochs
            binarize=self.binarize,
            schedule=self.schedule,
            patience=self.patience,
            clip_norm=self.clip_norm,
            seed=seed,
            progress=bool(self.verbose),
        )
        if self.run_.interrupted:  # so that a search over many fits ends, too
            raise KeyboardInterrupt
        self.pair_ = pair
        self._n_features_out = numel(pair.z_shape)
        return self

    def transform(self, X: Any) -> Array:
        """Return the mean codes of ``X`` (n_samples, n_features), (n_samples, z_dim).

        Raises:
            ValueError: data outside the support of the likelihood.
        """
        check_is_fitted(self)
        x, dtype = self._data(X)
        pair = self._evaluated()
        check_support(pair, x, "X", binarize=False, strict=False)
        with frozen(pair, seed=0):
            codes = [
                mean_of(pair.encoder(encoder_input(pair.corruption, rows))) for rows, _ in chunks(x)
            ]
        return _rows(torch.cat(codes), dtype)

    def inverse_transform(self, X: Any) -> Array:
        """Return the decoder's means at codes ``X`` (n_samples, z_dim), (n_samples, n_features).

        Raises:
            ValueError: codes of the wrong dimension, or a likelihood of classes, which has no mean.
        """
        check_is_fitted(self)
        codes = check_array(X, dtype=(np.float64, np.float32))
        if codes.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {codes.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self._n_features_out} features as input of inverse_transform: the codes that "
                "transform returns"
            )
        pair = self._evaluated()
        z = torch.tensor(codes, device=pair.device, dtype=pair.dtype)
        with frozen(pair, seed=0):
            x = torch.cat(
                [mean_of(pair.decoder(r.reshape(-1, *pair.z_shape))) for r, _ in chunks(z)]
            )
        if x.isnan().any():
            raise ValueError(
                "pair_ has a likelihood without a mean, as of classes; take the distribution over "
                "x itself: estimator.pair_.decoder(z)"
            )
        return _rows(x, codes.dtype)

    @available_if(_has_likelihood)
    def score_samples(self, X: Any) -> Array:
        """Return log p(x) of each datum of ``X``, (n_samples,), in nats.

        It is exact where there is a closed form, else the importance-weighted lower bound by
        ``num_samples`` draws, which the datum itself seeds: the same datum has the same value in
        any company. Standard errors, Pareto k, and tighter methods are those of
        ``probae.log_likelihood(estimator.pair_, x)``. Where the pair has no log p(x), this
        attribute is absent.

        Raises:
            ValueError: data outside the support of the likelihood; grey data under a Bernoulli.
        """
        check_is_fitted(self)
        num_samples = require_count(self.num_samples, "num_samples")
        x, dtype = self._data(X)
        pair = self._evaluated()
        check_support(pair, x, "X", binarize=False, strict=True)
        exact = closed_form(pair)
        if exact is not None:
            with frozen(pair, seed=0):
                return _rows(exact(x), dtype)
        weigh = fast_weights(pair, None) or plain_weights(pair, "iwae", None)
        block, values = rows_in_budget(pair), []
        with frozen(pair, seed=0):
            for datum in x.split(1):
                with seeded(zlib.crc32(datum.cpu().numpy().tobytes()), {pair.device}):
                    draw, weights = weigh(datum), StreamingWeights(num_samples, datum)
                    for count in counts(num_samples, block):
                        weights.add(draw(count))
                values.append(weights.log_sum - math.log(num_samples))
        return _rows(torch.cat(values), dtype)

    @available_if(_has_likelihood)
    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean of :meth:`score_samples`, nats per datum; ``y`` is not looked at."""
        return float(np.mean(self.score_samples(X), dtype=np.float64))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw from the model, z ~ p(z) and x ~ p(x|z); return x (n_samples, n_features).

        Raises:
            ValueError: ``n_samples`` < 1, or a flat prior, from which nothing can be drawn.
        """
        check_is_fitted(self)
        n_samples = require_count(n_samples, "n_samples")
        seed = _seed(check_random_state(random_state))
        return _rows(sample(self._evaluated(), n_samples, seed=seed).x, np.dtype(np.float64))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _build(self, x: Tensor, seed: int) -> Autoencoder:
        """Return the untrained pair, its starting values from data and seed."""
        preset = PRESETS.get(self.preset) if isinstance(self.preset, str) else self.preset
        if not callable(preset):
            raise ValueError(
                f"preset must be one of {', '.join(PRESETS)}, the class of one, or a function of "
                f"x_dim and z_dim that returns a pair, got {self.preset!r}"
            )
        _check_keywords(preset, self._options)
        options, takes = dict(self._options), _keywords(preset)
        for name, default in (("likelihood", "gaussian"), ("likelihood_options", None)):
            value = getattr(self, name)
            if takes is None or name in takes:
                options[name] = value
            elif value != default:
                raise ValueError(
                    f"{name} must be left at {default!r} for {_name(preset)}, which has no such "
                    f"keyword, got {value!r}"
                )
        pair = self._made(preset, x, options, seed)
        left = options.get("likelihood") == "gaussian" and self.likelihood_options is None
        if left and "likelihood_options" in options and pair.kind is Kind.ELBO:
            scale = float(x.double().var(0, correction=0).mean().sqrt())
            options["likelihood_options"] = {"learn_scale": True, "scale": max(scale, LEAST_SCALE)}
            pair = self._made(preset, x, options, seed)
        pair.initialize(x)
        try:
            return pair.to(self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"device {self.device!r} cannot be used here: {first}") from error

    def _made(
        self, preset: Callable[..., Autoencoder], x: Tensor, options: dict[str, Any], seed: int
    ) -> Autoencoder:
        x_dim = tuple(x.shape[1:])
        options = copy.deepcopy(options)  # training changes modules
        try:
            with seeded(seed, set()):
                pair = preset(x_dim, self.z_dim, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{_name(preset)} cannot be built for X with n_features={numel(x_dim)}: {error}"
            ) from error
        if not isinstance(pair, Autoencoder):
            raise ValueError(
                f"preset must return a probae.Autoencoder, got {type(pair).__name__} from "
                f"{_name(preset)}"
            )
        return pair

    def _split(self, x: Tensor, random_state: Any) -> tuple[Tensor, Tensor | None]:
        """Return the rows to train on, and those held out."""
        if self.validation_fraction is None:
            if self.patience is not None:
                raise ValueError(
                    "patience needs rows that are held out: set validation_fraction, such as 0.1, "
                    "or leave patience=None"
                )
            return x, None
        share = require_probability(self.validation_fraction, "validation_fraction")
        size = round(share * len(x))
        if not 0 < size < len(x):
            raise ValueError(
                f"validation_fraction={share:g} leaves {len(x) - size} rows to train on and holds "
                f"{size} out with n_samples={len(x)}: it needs one of each at least"
            )
        order = torch.from_numpy(random_state.permutation(len(x)))
        return x[order[size:]], x[order[:size]]

    def _data(self, X: Any) -> tuple[Tensor, np.dtype[Any]]:
        """Return rows in float64 on the pair's device, and the dtype that results should have."""
        rows = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        with np.errstate(over="ignore"):  # rounded as in training: a 1 + 2e-16 is in [0, 1] there
            single = rows.astype(np.float32, copy=False)
        x = as_tensor(single.reshape(-1, *self.pair_.x_shape), "X")
        return x.to(self.pair_.device, torch.float64), rows.dtype

    def _shaped(self, rows: Array) -> Tensor:
        if self.x_shape is None:
            return as_tensor(rows, "X")
        x_shape = as_shape(self.x_shape, "x_shape")
        if numel(x_shape) != rows.shape[1]:
            raise ValueError(
                f"x_shape {x_shape} has {numel(x_shape)} numbers, but X has n_features = "
                f"{rows.shape[1]}"
            )
        return as_tensor(rows.reshape(-1, *x_shape), "X")

    def _evaluated(self) -> Autoencoder:
        """Return the pair in float64: in float32, BLAS rounds a row as its neighbours have it."""
        return copy.deepcopy(self.pair_).double()


def _seed(random_state: Any) -> int:
    return int(random_state.randint(2**31 - 1))


def _rows(x: Tensor, dtype: np.dtype[Any]) -> Array:
    """Return an array of one row, or number, a datum."""
    return (x.flatten(1) if x.dim() > 1 else x).cpu().numpy().astype(dtype, copy=False)


def _name(preset: Any) -> str:
    return getattr(preset, "__name__", repr(preset))


def _keywords(preset: Callable[..., Any]) -> list[str] | None:
    """Return the keywords that a preset takes after x_dim and z_dim; None: it takes any."""
    parameters = list(inspect.signature(preset).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters[2:]]


def _check_keywords(preset: Callable[..., Any], options: dict[str, Any]) -> None:
    takes = _keywords(preset)
    unknown = [name for name in options if takes is not None and name not in takes]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no argument of AutoencoderEstimator and no keyword of "
            f"{_name(preset)}, which takes {', '.join(takes or ())}"
        )
