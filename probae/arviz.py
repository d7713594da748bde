"""ArviZ, old (0.x) and new (1.x): its container for what a pair says of data, and its Pareto k."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn

from .autoencoder import Autoencoder, Kind, frozen
from .checks import (
    check_support,
    likelihood_of,
    prior_of,
    require_density,
    require_finite,
    require_pair,
)
from .datasets import as_tensor
from .distributions import GreyBernoulli, base_distribution, has_component, is_flat, is_point
from .memory import counts, rows_in_budget
from .part import require_count, require_flag, require_positive

Variable = tuple[tuple[str, ...], np.ndarray, dict[str, str]]  # dimensions, values, attributes
Groups = dict[str, dict[str, Variable]]

DRAWS = ("chain", "draw")
SPREAD = 1e-6  # nats, over the draws of a log-likelihood: ArviZ fits no tail to equal values
LONG_NAMES = {
    "reconstruction": "log p(x|z)",
    "log_p": "log p(x, z)",
    "log_q": "log q(z|x)",
    "log_weight": "log importance weight, log p(x, z) - log q(z|x)",
}


def to_arviz(
    pair: Autoencoder,
    x: Tensor | Any,
    *,
    num_samples: int = 200,
    num_prior_samples: int = 100,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    proposal: nn.Module | None = None,
    predictive: bool = True,
    max_bytes: float = 2**30,
    seed: int | None = 0,
) -> Any:
    r"""Return what a pair says of data in ArviZ's container: draws, predictions, likelihoods.

    ========================  ==================================================================
    group                     variables and their dimensions
    ========================  ==================================================================
    ``posterior``             ``z`` (chain, draw, datum, z_dim), drawn from the encoder
    ``posterior_predictive``  ``x`` (chain, draw, datum, x_dim), drawn from the decoder at these z
    ``log_likelihood``        ``x`` (chain, draw, datum), log p(x) in nats, see below
    ``sample_stats``          ``reconstruction`` log p(x|z), ``log_p`` log p(x, z), ``log_q``
                              log q(z|x), ``log_weight`` log p(x, z) - log q(z|x), all (chain,
                              draw, datum) in nats; ``khat`` Pareto k of the weights (datum)
    ``prior``                 ``z`` (chain, draw, datum, z_dim), drawn from the prior
    ``prior_predictive``      ``x`` (chain, draw, datum, x_dim), drawn from the decoder at these z
    ``observed_data``         ``x`` (datum, x_dim)
    ``constant_data``         ``x_tilde`` (datum, x_tilde_dim), under a corruption: what the
                              encoder was given, one for each datum
    ========================  ==================================================================

    Draws are independent and all in one chain, so that there is no r-hat. The ``attrs`` hold the
    kind of the pair and what that certifies, the seed, and the versions of the libraries.

    **The log-likelihood.** A code belongs to one datum, and the parameters are a point estimate.
    What predicts a datum that is left out is then p(x), with the code integrated out. So the value
    of draw s for a datum is the importance-weighted estimate by all the *other* draws,

    .. math::
        \ell_s = \log \frac{1}{S-1} \sum_{t \ne s} w_t,\qquad
        w_t = \frac{p(x, z_t)}{q(z_t|x)},\quad z_t \sim q(z|x)

    ``az.loo`` makes of it the sum of log p(x): exact where the encoder is the posterior, else a
    lower bound in expectation, as ``log_likelihood(pair, x, "iwae")`` is. Its Pareto k is that of
    the weights; where ArviZ warns of it, few draws decide, and the value is too low: take more
    samples, a ``proposal`` that fits better, or ``log_likelihood(pair, x, "ais")``. (Of a few
    distinct codes it warns without need: a tail of equal weights is none.) In the place of these
    values log p(x|z), the ``reconstruction``, would be wrong by up to hundreds of nats: z was made
    from x itself. Nothing is trained anew with a datum left out, and ``p_loo`` counts no
    parameters, so give it held-out data.

    **What may be missing.** A flat prior gives no draws and no p(x): no ``prior``, no
    ``prior_predictive``, no ``log_p``. A point code has no density: all its draws are one value,
    and there is no ``log_q``. The ``log_weight``, ``khat`` and ``log_likelihood`` are there for
    pairs of kind ELBO only, and under a ``proposal``.

    Args:
        pair: the pair; it is not changed.
        x: data (N, *x_shape) in the support of the decoder, as in :func:`probae.log_likelihood`.
        num_samples: S, draws of z and x per datum, at least 2; for Pareto k, at least 30.
        num_prior_samples: draws of N data from the prior; 0 leaves their groups out.
        coords: labels along dimensions, such as ``{"datum": names}``; default: 0, 1, 2, ….
        dims: names of the dimensions of one ``z``, ``x`` or ``x_tilde``, such as
            ``{"x": ["channel", "row", "column"]}``; default: ``x_dim``, or ``x_dim_0``, ….
        proposal: an encoder to draw z from in place of the pair's own, such as
            :func:`probae.fit_proposal` makes. It is given x, and ``log_likelihood`` is about
            p(z) p(x|z) alone: no corruption, no factor.
        predictive: whether to draw x: without, both predictive groups are left out, which take by
            far the most memory.
        max_bytes: most memory that the result may take.
        seed: of the draws; None draws from the global stream.

    Returns:
        An ``arviz.InferenceData`` under ArviZ 0.x, an ``xarray.DataTree`` under 1.x; both have
        ``to_netcdf``. Discrete x and z are whole numbers there.

    Raises:
        ValueError: bad data (shape, dtype, empty, NaN, outside the support; grey pixels under a
            Bernoulli decoder and a proper prior); a count out of range; a result above
            ``max_bytes``; ``coords`` or ``dims`` that do not fit; a ``proposal`` that does not, or
            one under a flat prior.

    Reference:
        Kumar et al., ArviZ, 2019; Vehtari, Gelman & Gabry, Practical Bayesian model evaluation
        using leave-one-out cross-validation and WAIC, 2017; Merkle, Furr & Rabe-Hesketh, Bayesian
        comparison of latent variable models: conditional versus marginal likelihoods, 2019.

    Example:
        >>> import torch, probae
        >>> data = probae.to_arviz(probae.PPCA(5, 2), torch.randn(7, 5), num_samples=50)
        >>> data["posterior"]["z"].dims, data["posterior"]["z"].shape
        (('chain', 'draw', 'datum', 'z_dim'), (1, 50, 7, 2))
        >>> data["log_likelihood"]["x"].shape, data.attrs["kind"]
        ((1, 50, 7), 'ELBO')
    """
    require_pair(pair)
    require_finite(pair)
    draws = _Draws(
        require_count(num_samples, "num_samples", least=2),
        require_count(num_prior_samples, "num_prior_samples", least=0),
        require_flag(predictive, "predictive"),
    )
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    proper = not is_flat(prior_of(pair))
    check_support(pair, data, "x", binarize=False, strict=proper)
    if proposal is not None:
        if not proper:
            raise ValueError(
                f"proposal needs a pair with a proper prior, got one of kind {pair.kind.value}, "
                "whose prior is flat: there is no p(x) to weigh for; leave proposal=None"
            )
        require_density(pair, proposal, data[:2], "proposal")
    if not proper:
        draws = draws._replace(prior=0)
    corruption = pair.corruption if proposal is None else None
    shapes = {"z": pair.z_shape, "x": pair.x_shape}
    if corruption is not None:
        with frozen(pair, seed=0):
            shapes["x_tilde"] = tuple(corruption(data[:1]).event_shape)
    labels = _labels(shapes, len(data), dims, coords)
    _check_size(pair, data, draws, max_bytes)
    with frozen(pair, seed), frozen(nn.Module() if proposal is None else proposal, None):
        groups = _posterior(pair, data, draws, corruption, proposal, labels)
        if draws.prior:
            groups |= _prior(pair, len(data), draws, labels)
    observed = _numpy(data, _dtype(likelihood_of(pair), pair) if _is_whole(data) else None)
    groups["observed_data"] = {"x": (labels.of("x"), observed, {})}
    return _container(groups, labels.coords, _attributes(pair, proposal, seed))


class _Draws(NamedTuple):
    """How much is drawn."""

    posterior: int
    prior: int
    predictive: bool


class _Labels(NamedTuple):
    """Names of the event dimensions of each variable, and labels along every dimension."""

    dims: dict[str, tuple[str, ...]]
    coords: dict[str, np.ndarray]

    def of(self, variable: str, *sample_dims: str) -> tuple[str, ...]:
        """Return all dimensions of a variable that has a value per datum."""
        return (*sample_dims, "datum", *self.dims[variable])


def _labels(
    shapes: Mapping[str, tuple[int, ...]],
    num_data: int,
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
) -> _Labels:
    """Name and label what the user did not, and refuse names and labels that do not fit."""
    names = _names(shapes, dims)
    sizes = {"datum": num_data}
    for variable, shape in shapes.items():
        for name, size in zip(names[variable], shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"dims must give dimensions of different sizes different names, got {name!r} "
                    f"for sizes {sizes[name]} and {size}"
                )
    labels = {name: np.arange(size) for name, size in sizes.items()}
    for name, given in _mapping(coords, "coords", "names of dimensions to labels").items():
        if name not in sizes:
            raise ValueError(
                f"coords must be for the dimensions {', '.join(sizes)}, got {name!r}; dimensions "
                "are named by dims"
            )
        labels[name] = _label_array(given, name, sizes[name])
    return _Labels(names, labels)


def _label_array(given: Any, name: str, size: int) -> np.ndarray:
    """Return labels along a dimension, of a kind that netCDF stores."""
    listed = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(listed, Iterable) and not isinstance(listed, str | bytes | np.ndarray):
        listed = list(listed)
    try:
        array = np.asarray(listed)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"coords[{name!r}] must be {size} labels: {error}") from error
    if array.dtype.kind == "O" and all(isinstance(label, str) for label in array.flat):
        array = array.astype(str)  # of a table
    if array.shape != (size,):
        raise ValueError(f"coords[{name!r}] must be {size} labels, got shape {array.shape}")
    if array.dtype.kind not in "biufUMm":
        raise ValueError(
            f"coords[{name!r}] must be numbers, strings or dates, all of one kind, which netCDF "
            f"stores, got {array.dtype} with {array[0]!r} at its head"
        )
    return array


def _names(
    shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """Return the names of the event dimensions of each variable."""
    given = _mapping(dims, "dims", "variables to the names of their dimensions")
    for variable in given:
        if variable not in shapes:
            raise ValueError(f"dims must be for {', '.join(shapes)}, got {variable!r}")
    names: dict[str, tuple[str, ...]] = {}
    for variable, shape in shapes.items():
        if variable not in given:
            ordinals = [f"_{i}" for i in range(len(shape))] if len(shape) > 1 else [""]
            names[variable] = tuple(f"{variable}_dim{ordinal}" for ordinal in ordinals)
            if variable == "x_tilde" and shape == shapes["x"]:
                names[variable] = names["x"]
            continue
        chosen = given[variable]
        if (
            isinstance(chosen, str)
            or not isinstance(chosen, Sequence)
            or not all(map(_is_name, chosen))
            or not len(chosen) == len(set(chosen)) == len(shape)
        ):
            raise ValueError(
                f"dims[{variable!r}] must be a list of {len(shape)} different names, for the shape "
                f"{shape} of one {variable}, without slashes, not those of variables such as x, "
                f"none of them chain, draw or datum; got {chosen!r}"
            )
        names[variable] = tuple(chosen)
    return names


def _is_name(name: Any) -> bool:
    """Whether a dimension of the user's may have that name, in xarray and in a netCDF file."""
    taken = {*DRAWS, "datum", "x", "z", "x_tilde", "khat", *LONG_NAMES}
    return isinstance(name, str) and name not in taken and "/" not in name and bool(name.strip("."))


def _mapping(value: Any, argument: str, what: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{argument} must be a dict of {what}, got {type(value).__name__}")
    return value or {}


def _check_size(pair: Autoencoder, x: Tensor, draws: _Draws, max_bytes: float) -> None:
    """Refuse what would take too much memory, before anything is drawn."""
    most = require_positive(max_bytes, "max_bytes")
    of_x = math.prod(pair.x_shape) * _dtype(likelihood_of(pair), pair).itemsize
    draw = math.prod(pair.z_shape) * _dtype(prior_of(pair), pair).itemsize
    draw += of_x if draws.predictive else 0
    stats = 8 * (len(LONG_NAMES) + 1)  # and the log-likelihood
    per_datum = draws.posterior * (draw + stats) + draws.prior * draw + 2 * of_x
    total = len(x) * per_datum
    if total > most:
        fits = int(most // per_datum)
        raise ValueError(
            f"num_samples={draws.posterior} and num_prior_samples={draws.prior} draws for the "
            f"{len(x)} data x would take {total / 1e9:.3g} GB, above "
            f"max_bytes={most / 1e9:.3g} GB; pass "
            + (f"at most {fits} data, x[:{fits}], " if fits else "")
            + ("predictive=False, " if draws.predictive else "")
            + "fewer samples, or a larger max_bytes"
        )


def _posterior(
    pair: Autoencoder,
    x: Tensor,
    draws: _Draws,
    corruption: nn.Module | None,
    proposal: nn.Module | None,
    labels: _Labels,
) -> Groups:
    """Draw codes, and data at these codes; weigh them as far as they have densities."""
    encoder = pair.encoder if proposal is None else proposal
    proper, weighed = not is_flat(pair.prior()), proposal is not None or pair.kind is Kind.ELBO
    shape = (draws.posterior, len(x))
    store, stats = _Store(pair, shape, draws.predictive), _Stats(shape)
    x_tilde, rows = [], rows_in_budget(pair)
    for first, chunk in _chunks(x, max(min(64, rows), rows // draws.posterior)):
        seen = chunk if corruption is None else corruption(chunk).sample()
        x_tilde.append(seen)
        codes = encoder(seen)
        dense = not (is_point(codes) or is_flat(codes))
        done = 0
        for count in counts(draws.posterior, max(1, rows // len(chunk))):
            at = (slice(done, done + count), slice(first, first + len(chunk)))
            done += count
            z = codes.sample(Size((count,)))  # (count, n, *z_shape)
            likelihood = pair.decoder(z)
            store.put(at, z, likelihood)
            reconstruction = likelihood.log_prob(chunk).double()
            stats.put(at, "reconstruction", reconstruction)
            if proper:
                log_p = pair.prior().log_prob(z).double() + reconstruction
                stats.put(at, "log_p", log_p)
            if dense:
                log_q = codes.log_prob(z).double()
                stats.put(at, "log_q", log_q)
            if weighed:
                stats.put(at, "log_weight", log_p - log_q)
    groups = store.groups("posterior", "posterior_predictive", labels)
    groups["sample_stats"] = stats.variables()
    if weighed:
        log_weights = torch.from_numpy(stats.arrays["log_weight"])
        largest = torch.topk(log_weights, tail_size(draws.posterior), 0).values
        khat = pareto_khat(largest, draws.posterior).numpy()
        about = {"long_name": "Pareto k of the importance weights; above 0.7 do not trust"}
        groups["sample_stats"]["khat"] = (("datum",), khat, about)
        values = _leave_one_out(log_weights).numpy()[None]
        about = {"long_name": "log p(x) by the weights of the other draws", "units": "nats"}
        groups["log_likelihood"] = {"x": ((*DRAWS, "datum"), values, about)}
    if corruption is not None:
        array = _numpy(torch.cat(x_tilde))
        groups["constant_data"] = {"x_tilde": (labels.of("x_tilde"), array, {})}
    return groups


def _prior(pair: Autoencoder, num_data: int, draws: _Draws, labels: _Labels) -> Groups:
    """Draw as many data from the model as were given, again and again."""
    store = _Store(pair, (draws.prior, num_data), draws.predictive)
    prior, rows = pair.prior(), rows_in_budget(pair)
    for first in range(0, num_data, rows):
        n, done = min(rows, num_data - first), 0
        for count in counts(draws.prior, max(1, rows // n)):
            z = prior.sample(Size((count, n)))
            at = (slice(done, done + count), slice(first, first + n))
            store.put(at, z, pair.decoder(z) if draws.predictive else None)
            done += count
    return store.groups("prior", "prior_predictive", labels)


def _chunks(x: Tensor, rows: int) -> list[tuple[int, Tensor]]:
    return [(first, x[first : first + rows]) for first in range(0, len(x), rows)]


class _Store:
    """Arrays for draws of z and x, filled block by block."""

    def __init__(self, pair: Autoencoder, shape: tuple[int, int], predictive: bool) -> None:
        self.arrays = {"z": np.empty((*shape, *pair.z_shape), _dtype(pair.prior(), pair))}
        if predictive:
            x_dtype = _dtype(likelihood_of(pair), pair)
            self.arrays["x"] = np.empty((*shape, *pair.x_shape), x_dtype)

    def put(self, at: tuple[slice, slice], z: Tensor, likelihood: Any) -> None:
        self.arrays["z"][at] = _numpy(z)
        if "x" in self.arrays:
            self.arrays["x"][at] = _numpy(likelihood.sample())

    def groups(self, of_z: str, of_x: str, labels: _Labels) -> Groups:
        names = {"z": of_z, "x": of_x}
        return {
            names[variable]: {variable: (labels.of(variable, *DRAWS), array[None], {})}
            for variable, array in self.arrays.items()
        }


class _Stats:
    """Arrays for log-densities of draws, filled block by block."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.arrays = shape, dict[str, np.ndarray]()

    def put(self, at: tuple[slice, slice], name: str, values: Tensor) -> None:
        if name not in self.arrays:
            self.arrays[name] = np.empty(self.shape)
        self.arrays[name][at] = _numpy(values)

    def variables(self) -> dict[str, Variable]:
        return {
            name: (
                (*DRAWS, "datum"),
                array[None],
                {"long_name": LONG_NAMES[name], "units": "nats"},
            )
            for name, array in self.arrays.items()
        }


def _leave_one_out(log_weights: Tensor) -> Tensor:
    """Return the log-mean of the other draws' weights, (S, N) from (S, N), in double precision.

    Their mean over the draws, as weights, is the mean weight. What ArviZ fits a tail to is close to
    an affine function of the weights, so that it finds their Pareto k. It fits none to equal
    values, as an exact posterior gives up to rounding; hence the spread. Where all weights are the
    very same, as of draws that are all one code, nothing is known, and the spread has a heavy tail
    for ArviZ to warn of.
    """
    count = len(log_weights)
    total = log_weights.logsumexp(0)
    others = total + torch.log1p(-(log_weights - total).exp())
    largest = log_weights.argmax(0, keepdim=True)  # a difference of nearly equal numbers there
    without = log_weights.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True)
    others = others.scatter(0, largest, without) - math.log(count - 1)
    light = torch.linspace(-SPREAD, SPREAD, count, dtype=others.dtype)[:, None]
    heavy = -SPREAD / torch.arange(1, count + 1, dtype=others.dtype)[:, None] ** 2  # k = 2
    same = (log_weights == log_weights[:1]).all(0)
    return others + torch.where(same, heavy, light)


def _dtype(distribution: Any, pair: Autoencoder) -> np.dtype[Any]:
    """Return what draws are stored as: whole numbers, for which ArviZ draws bars, or floats."""
    support = base_distribution(distribution).support
    binary = support is constraints.boolean or support is constraints.one_hot
    if binary or has_component(distribution, GreyBernoulli):
        return np.dtype(np.int8)
    if isinstance(support, constraints.integer_interval | type(constraints.nonnegative_integer)):
        return np.dtype(np.int32)
    return np.dtype(np.float64 if pair.dtype == torch.float64 else np.float32)


def _is_whole(x: Tensor) -> bool:
    return bool((x == x.round()).all())


def _numpy(tensor: Tensor, dtype: np.dtype[Any] | None = None) -> np.ndarray:
    """Return a tensor as an array; NumPy has no bfloat16."""
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    array: np.ndarray = (tensor.float() if narrow else tensor).detach().cpu().numpy()
    return array if dtype is None else array.astype(dtype)


def _attributes(
    pair: Autoencoder, proposal: nn.Module | None, seed: int | None
) -> dict[str, str | int]:
    """Return what the container says of itself; netCDF stores strings and numbers."""
    from . import __version__

    return {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "inference_library": "probae",
        "inference_library_version": __version__,
        "inference_method": "svi",
        "pair": type(pair).__name__,
        "kind": pair.kind.value,
        "statement": pair.kind.statement,
        "proposal": "encoder of the pair" if proposal is None else type(proposal).__name__,
        "seed": "none" if seed is None else int(seed),
        "torch_version": str(torch.__version__),
        "pyro_version": pyro.__version__,
        "arviz_version": _arviz().__version__,
    }


def _container(
    groups: Groups, coords: dict[str, np.ndarray], attributes: dict[str, str | int]
) -> Any:
    """Return groups of variables as ArviZ of this version has them."""
    import xarray as xr  # with pandas behind it, it takes a second to import

    datasets = {}
    for group, variables in groups.items():
        sizes = {
            name: size
            for names, values, _ in variables.values()
            for name, size in zip(names, values.shape, strict=True)
        }
        labels = {name: coords.get(name, np.arange(size)) for name, size in sizes.items()}
        datasets[group] = xr.Dataset(variables, labels, attributes)
    arviz = _arviz()
    if _is_old(arviz):
        return arviz.InferenceData(attrs=attributes, **datasets)
    tree = xr.DataTree.from_dict(datasets)
    tree.attrs = dict(attributes)
    return tree


def tail_size(num_samples: int) -> int:
    """Return M + 1 of :func:`pareto_khat`: how many of the largest weights it looks at."""
    return min(num_samples, math.ceil(min(num_samples / 5, 3 * num_samples**0.5)) + 1)


def pareto_khat(tail: Tensor, num_samples: int) -> Tensor:
    r"""Pareto k of importance weights, given their largest ones.

    Smoothing looks only at the M = min(K/5, 3√K) largest of the K weights and at the next one,
    their threshold; no more are sorted than make ArviZ look at M, filled in at that threshold.

    Args:
        tail: the largest log-weights of each datum, (M + 1, N).
        num_samples: number K of weights that they are the largest of.

    Returns:
        Pareto k of each datum, (N,): 0 where the weights are equal up to rounding, so that there is
        no tail; NaN where no tail can be fitted, because K < 25, a log-weight is not finite, fewer
        than five weights exceed the threshold (as with few distinct codes), or all are the very
        same, as of draws that are all one code: then nothing is known.

    Reference:
        Vehtari et al., Pareto smoothed importance sampling, 2024.

    Example:
        >>> pareto_khat(torch.randn(100, 2), num_samples=100).shape
        torch.Size([2])
    """
    if num_samples < 25:
        return tail.new_full((tail.shape[1],), torch.nan)
    kept = tail.detach().double().cpu().numpy().T  # (N, M + 1)
    threshold, finite = kept.min(1, keepdims=True), np.isfinite(kept).all(1)
    with np.errstate(invalid="ignore"):
        spread = np.ptp(kept, 1)
    khat = np.full(len(kept), np.nan)
    khat[finite & (spread > 0) & (spread < 1e-10)] = 0.0
    has_tail = finite & ~(spread < 1e-10) & ((kept > threshold).sum(1) >= 5)
    few = 5 * (kept.shape[1] - 1)  # of which M are a fifth
    weights = np.repeat(threshold[has_tail], min(few, num_samples), 1)
    weights[:, : kept.shape[1]] = kept[has_tail]
    if has_tail.any():
        khat[has_tail] = _psis(weights, 1.0 if few >= num_samples else FEW)
    return torch.from_numpy(khat).to(tail)


FEW = 1e-6  # relative efficiency at which a fifth of the weights, and not 3√K, is looked at


def _psis(log_weights: np.ndarray, r_eff: float) -> np.ndarray:
    """Return Pareto k of each row."""
    arviz = _arviz()
    if _is_old(arviz):
        # one weight far above the others, or a tail of rounding errors, which is none: NaN
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            khat: np.ndarray = arviz.psislw(log_weights, r_eff)[1]
            return khat
    return np.array([_psis_of_row(row, r_eff) for row in log_weights])


def _psis_of_row(log_weights: np.ndarray, r_eff: float) -> float:
    from arviz_stats.base import array_stats

    try:
        return float(array_stats.psislw(-log_weights, r_eff)[1])  # 1.x takes minus the log-weights
    except ValueError:  # all of the tail is one value
        return math.nan


def _arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.x at every import
        import arviz
    return arviz


def _is_old(arviz: ModuleType) -> bool:
    """Whether ArviZ is of version 0.x, with containers of its own."""
    return hasattr(arviz, "psislw")
