"""The Parzen-window score of samples, a legacy figure, and its calibration on real data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .datasets import as_tensor
from .part import as_number, listed

BLOCK = 1024  # data and samples of one block of distances; two such blocks fit in cache


class ParzenWarning(UserWarning):
    """Says with every Parzen score that it is no likelihood of the model.

    Example:
        >>> import warnings, torch, probae
        >>> x = torch.randn(30, 2)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", probae.ParzenWarning)
        ...     score = probae.parzen_log_likelihood(x[:10], x[10:20], x[20:])
    """


class ParzenScore(NamedTuple):
    """Score of samples by the density of a kernel estimate on them, in nats; no likelihood.

    Example:
        >>> import torch
        >>> score = ParzenScore(torch.tensor([-3.0, -5.0]), 0.1, 1000)
        >>> score.mean, score.std_error
        (-4.0, 1.0)
    """

    values: Tensor  # (N,) nats per datum, of the test data
    bandwidth: float  # standard deviation σ of the kernel, in units of x
    num_samples: int  # number M of samples, the centres of the kernels
    reference: ParzenScore | None = None  # of as many real data in the place of samples

    @property
    def mean(self) -> float:
        """Mean over the test data, nats per datum."""
        return float(self.values.double().mean())

    @property
    def std_error(self) -> float:
        """Standard error of the mean over the test data, for these samples and this σ."""
        if len(self.values) < 2:
            return math.nan
        return float(self.values.double().std() / math.sqrt(len(self.values)))

    def __repr__(self) -> str:
        own = f"{self.mean:.4f} ± {self.std_error:.4f} nats per datum"
        if self.reference is not None:
            real = self.reference
            own += (
                f", where real data in the place of samples score {real.mean:.4f} ± "
                f"{real.std_error:.4f} at bandwidth {real.bandwidth:.4g}"
            )
        return (
            f"ParzenScore({own}; {len(self.values)} data, {self.num_samples} samples, bandwidth "
            f"{self.bandwidth:.4g}; a legacy score, no likelihood of the model)"
        )


def parzen_log_likelihood(
    samples: Tensor | Any,
    x_val: Tensor | Any,
    x_test: Tensor | Any,
    *,
    bandwidths: Sequence[float] | Tensor | None = None,
    reference: Tensor | Any | None = None,
) -> ParzenScore:
    r"""Score samples by the density that a Gaussian kernel estimate on them gives to test data.

    .. math:: \log \frac1M \sum_{m=1}^M N(x; s_m, \sigma^2 I)

    with σ from ``bandwidths`` where the mean over ``x_val`` is highest. **This is a legacy score,
    not the likelihood of the model that made the samples**: it is here so that figures of papers
    that report it can be compared with, and each call warns of it by :class:`ParzenWarning`.

    In hundreds of dimensions M samples fill no neighbourhood, and the score measures how close the
    nearest of them are: it rewards blur and misorders models. Its calibration says so: on MNIST,
    with 10 000 samples, 1000 validation and 10 000 test images, 10 000 *real* training images score
    242.7 ± 2.1 (σ = 0.167), while as many k-means centroids of the training images score about
    335, above the data themselves. A score above that of real data is therefore no praise, and one
    is to be read beside its calibration only: ``reference=x_train[:M]`` computes it on your own
    data. For a likelihood take ``log_likelihood(pair, x, method="ais")``.

    Args:
        samples: M samples of a model, (M, *x_shape): tensor, array, path or Dataset. Papers take
            10 000 draws, or means of the decoder, which score higher: compare like with like.
        x_val: validation data (Nv, *x_shape) to choose σ on; papers take 1000 images.
        x_test: test data (N, *x_shape).
        bandwidths: values of σ to choose from, in units of x; by default
            ``torch.logspace(-1, 0, 10)``, for images in [0, 1].
        reference: real data (M, *x_shape), as many as there are samples and none of them in
            ``x_val`` or ``x_test``, to score in the place of samples, with their own σ.

    Returns:
        ParzenScore: values in nats per datum (relative to the volume of x as it was given), their
        mean and its standard error over the test data, the σ taken, and the score of the reference.

    Raises:
        ValueError: bad data (dtype, empty, NaN), data of different shapes, a reference of another
            size than the samples, or bandwidths that are no finite numbers > 0.

    Warns:
        ParzenWarning: always; it also says where the σ taken is the smallest or largest of several.

    Reference:
        Breuleux, Bengio & Vincent, Quickly generating representative samples from an RBM-derived
        process, 2011; Theis, van den Oord & Bethge, A note on the evaluation of generative models,
        2016; Wu et al., On the quantitative analysis of decoder-based generative models, 2017.

    Example:
        >>> import warnings, torch, probae
        >>> data = probae.load_dataset("digits")
        >>> pair = probae.PPCA.maximum_likelihood(data.train, z_dim=10)
        >>> samples = probae.sample(pair, 500, seed=0).x
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", probae.ParzenWarning)
        ...     score = probae.parzen_log_likelihood(
        ...         samples, data.val, data.test, reference=data.train[:500]
        ...     )
        >>> score.mean < score.reference.mean
        True
    """
    centres, sigmas = _data(samples, "samples"), _bandwidths(bandwidths)
    val = _like(centres, x_val, "x_val")
    test = _like(centres, x_test, "x_test")
    real = None
    if reference is not None:
        real = _like(centres, reference, "reference")
        if len(real) != len(centres):
            raise ValueError(
                f"reference must hold as many data as there are samples, {len(centres)}, got "
                f"{len(real)}: the score grows with their number"
            )
    calibration = None if real is None else _score(real, val, test, sigmas, None)
    score = _score(centres, val, test, sigmas, calibration)
    tried = sigmas.tolist()
    at_edge = len(tried) > 1 and score.bandwidth in (min(tried), max(tried))
    edge = f". The best bandwidth, {score.bandwidth:.4g}, is at the edge of those tried"
    warnings.warn(
        "a Parzen score is no likelihood of the model: it rewards blur, and k-means centroids "
        "score above real data; compare it with that of real data only (reference=x_train[:M]), "
        "and for a likelihood use probae.log_likelihood(pair, x, method='ais')"
        + (edge if at_edge else ""),
        ParzenWarning,
        stacklevel=2,
    )
    return score


@torch.no_grad()
def _score(
    samples: Tensor, val: Tensor, test: Tensor, bandwidths: Tensor, reference: ParzenScore | None
) -> ParzenScore:
    """Choose σ on the validation data and score the test data with it."""
    best = bandwidths[int(_log_density(samples, val, bandwidths).mean(1).argmax())]
    values = _log_density(samples, test, best[None])[0]
    return ParzenScore(values, float(best), len(samples), reference)


def _log_density(samples: Tensor, x: Tensor, bandwidths: Tensor) -> Tensor:
    """Log-density at x (N, *x_shape) of the kernel estimate on samples, (B, N), in double.

    Squared distances are |x|² + |s|² - 2 x·s, a matrix product a block; that cancels, so it is in
    double precision, and about the mean of the samples.
    """
    samples, x = samples.flatten(1), x.flatten(1)
    centre = samples.mean(0, dtype=torch.float64)
    precision = (bandwidths**-2).to(x.device)  # (B,)
    total = x.new_full((len(precision), len(x)), -math.inf, dtype=torch.float64)
    for block in samples.split(BLOCK):
        s = block.double() - centre
        for rows, sums in zip(x.split(BLOCK), total.split(BLOCK, 1), strict=True):
            y = rows.double() - centre
            norms = y.square().sum(1)[:, None] + s.square().sum(1)  # (rows, block)
            half = torch.addmm(norms, y, s.T, beta=0.5, alpha=-1.0).clamp_(min=0)  # ½|x - s|²
            for b in range(len(precision)):
                sums[b] = torch.logaddexp(sums[b], (-precision[b] * half).logsumexp(1))
    normalizer = 0.5 * x.shape[1] * (2 * math.pi / precision).log() + math.log(len(samples))
    return total - normalizer[:, None]


def _data(x: Any, argument: str) -> Tensor:
    """Return data as a tensor (N, *x_shape)."""
    data = as_tensor(x, argument).detach()
    if data.abs().max() > 1e150:
        raise ValueError(f"{argument} must be below 1e150, or squares overflow; scale the data")
    if data.dim() < 2:
        raise ValueError(
            f"{argument} must have shape (N, *x_shape), got {tuple(data.shape)}; add a dimension "
            f"with {argument}[:, None]"
        )
    return data


def _like(samples: Tensor, x: Any, argument: str) -> Tensor:
    """Return data on the device of the samples if they have their shape, or raise."""
    x = _data(x, argument)
    if x.shape[1:] != samples.shape[1:]:
        raise ValueError(
            f"{argument} must have shape (N, {', '.join(map(str, samples.shape[1:]))}), as the "
            f"samples have, got {tuple(x.shape)}"
        )
    return x.to(samples.device)


def _bandwidths(bandwidths: Any) -> Tensor:
    """Return σ to choose from, (B,), in double."""
    if bandwidths is None:
        return torch.logspace(-1, 0, 10, dtype=torch.float64)
    given = listed(bandwidths)
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if not values or not all(0 < as_number(value) < math.inf for value in values):
        raise ValueError(
            "bandwidths must be one or more finite numbers > 0, in units of x, got "
            f"{bandwidths!r}; for instance torch.logspace(-1, 0, 10)"
        )
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
