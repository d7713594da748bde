"""Data against a pair: shape, dtype, support, and batches of checked data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.utils.data import Dataset, IterableDataset

from .autoencoder import Autoencoder, frozen, require_compatible
from .distributions import (
    GreyBernoulli,
    base_distribution,
    has_component,
    is_discrete,
    is_flat,
    is_point,
)


def check_support(
    pair: Autoencoder, x: Tensor, argument: str, *, binarize: bool, strict: bool
) -> None:
    """Check shape, dtype and support of data; ``strict`` refuses grey pixels under Bernoulli."""
    pair.check_input(x, argument)
    if not x.isfinite().all():  # of finite numbers, so they were too large
        raise ValueError(
            f"{argument} must fit into the dtype of the pair, {pair.dtype}, got numbers that are "
            "too large; scale the data, or convert the pair with pair.to(torch.float64)"
        )
    SupportCheck(pair, binarize, strict)(x, argument)


class SupportCheck:
    """The check of many batches of data against one pair, which is looked at once."""

    def __init__(self, pair: Autoencoder, binarize: bool, strict: bool = False) -> None:
        self.pair, self.binarize = pair, binarize
        base = likelihood_of(pair)
        self.grey = has_component(base, GreyBernoulli)
        boolean = self.grey and strict
        self.support: Any = constraints.boolean if boolean else base.support

    def __call__(self, x: Tensor, argument: str, places: Sequence[int] | None = None) -> None:
        """Check data; ``places`` are the numbers of their rows where these are a batch."""
        self.pair.check_input(x, argument)
        places = range(len(x)) if places is None else places
        for chunk, row in blocks(x):
            bad = ~((chunk >= 0) & (chunk <= 1) if self.binarize else self.support.check(chunk))
            if bad.any() and self.binarize:
                raise ValueError(
                    f"{argument} must lie in [0, 1] to be binarised, got "
                    f"{_first_bad(chunk, bad, places[row:])}; scale 8-bit images by 1/255"
                )
            if bad.any():
                raise ValueError(
                    f"{argument} must lie in the support of the decoder "
                    f"({_describe(self.support)}), got "
                    f"{_first_bad(chunk, bad, places[row:])}; "
                    f"{_support_fix(self.grey, self.support)}"
                )


def _support_fix(grey: bool, support: Any) -> str:
    if grey and support is constraints.boolean:
        return (
            "grey pixels have no Bernoulli log-likelihood: binarise them with probae.binarize(x), "
            "or train with likelihood='continuous-bernoulli'"
        )
    if grey:
        return "scale 8-bit images by 1/255, or pick likelihood='gaussian'"
    return "scale the data, or pick a likelihood whose support they lie in"


def _describe(support: Any) -> str:
    if support is constraints.boolean:
        return "{0, 1}"
    if support is constraints.unit_interval:
        return "[0, 1]"
    if support is constraints.nonnegative_integer:
        return "{0, 1, 2, …}"
    return str(support)


def _first_bad(x: Tensor, bad: Tensor, places: Sequence[int]) -> str:
    position = bad.nonzero()[0].tolist()
    value = x[tuple(position)]  # a vector where the support is one of vectors
    text = f"{float(value):g}" if value.dim() == 0 else str(value.tolist())
    position[0] = places[position[0]]
    return f"{int(bad.sum())} values outside, the first {text} at index {tuple(position)}"


def require_pair(pair: Any, argument: str = "pair") -> None:
    """Raise a ValueError unless ``pair`` is an :class:`Autoencoder` that holds numbers."""
    if not isinstance(pair, Autoencoder):
        raise ValueError(
            f"{argument} must be a probae.Autoencoder, got {type(pair).__name__}; compose one with "
            "probae.Autoencoder(prior, encoder, decoder)"
        )
    if pair.device.type == "meta":
        raise ValueError(
            f"{argument} must hold numbers, but is on the device 'meta'; build it on 'cpu' or "
            "'cuda', or load it there"
        )


def require_parts(pair: Any) -> None:
    """Raise a ValueError unless ``pair`` is an :class:`Autoencoder` and its parts are its law."""
    require_pair(pair)
    if pair.has_own_programs():
        raise ValueError(
            f"pair, {type(pair).__name__}, has a model or guide of its own, so that its parts do "
            "not tell what p(x) is; write what they add as a part: prior, decoder, or factor"
        )
    require_finite(pair)


def require_finite(pair: Autoencoder) -> None:
    """Raise a ValueError where a parameter is NaN or infinite, as after a fit that diverged."""
    for name, parameter in pair.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"pair has a parameter that is not finite, {name}: fit it again with a lower lr, "
                "or load it from before"
            )


def require_gradients(what: str) -> None:
    """Raise a ValueError where autograd cannot be switched on."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what} needs gradients and cannot run inside torch.inference_mode(); leave it, or "
            "use torch.no_grad()"
        )


def prior_of(pair: Autoencoder) -> Any:
    """Return p(z), without a trace of having asked."""
    with frozen(pair, seed=0):
        return pair.prior()


def require_density(pair: Autoencoder, encoder: Any, x: Tensor, argument: str) -> None:
    """Raise a ValueError unless ``encoder(x)`` is a density over the pair's z to draw from."""
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"{argument} must be an encoder, a torch.nn.Module, got {type(encoder).__name__}"
        )
    with frozen(pair, seed=0), frozen(encoder, None):
        prior = pair.prior()
        try:
            density = encoder(x)
        except Exception as error:
            raise ValueError(
                f"{argument} does not take x of shape {tuple(x.shape)} and {x.dtype}: {error}"
            ) from error
        if (
            not isinstance(density, Distribution)
            or is_point(density)
            or is_flat(density)
            or density.event_shape != pair.z_shape
        ):
            shape = getattr(density, "event_shape", getattr(density, "shape", ()))
            raise ValueError(
                f"{argument}(x) must return a {'discrete' if is_discrete(prior) else 'continuous'} "
                f"density, not a point and not masked, with event shape {pair.z_shape}, got "
                f"{type(base_distribution(density)).__name__} with event shape {tuple(shape)}; fit "
                "one with probae.fit_proposal(pair, x_train)"
            )
        try:
            codes = density.sample(torch.Size((16,)))
        except NotImplementedError as error:
            raise ValueError(f"{argument}(x) must be a density to draw from: {error}") from error
        require_compatible(prior, density, codes, argument)


def likelihood_of(pair: Autoencoder) -> Any:
    """Return the decoder's elementwise distribution at some code, to look at its family."""
    with frozen(pair, seed=0):
        return base_distribution(pair.decoder(pair.prior().sample(torch.Size((1,)))))


def chunks(x: Tensor, rows: int = 8192) -> Iterator[tuple[Tensor, int]]:
    """Yield consecutive blocks of rows of ``x``, each with the index of its first row."""
    for start in range(0, len(x), rows):
        yield x[start : start + rows], start


def blocks(x: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield blocks that are small enough for what is made of them to take no memory to speak of."""
    return chunks(x, max(1, 2**20 // max(1, math.prod(x.shape[1:]))))


def is_grey(x: Tensor) -> bool:
    """Whether a value is neither 0 nor 1."""
    return any(bool(((rows != 0) & (rows != 1)).any()) for rows, _ in blocks(x))


def is_map_style(x: Any) -> bool:
    """Whether x is a torch Dataset that can be indexed."""
    return isinstance(x, Dataset) and not isinstance(x, IterableDataset) and hasattr(x, "__len__")


def to_pair(pair: Autoencoder, x: Tensor, argument: str = "x") -> Tensor:
    """Return data on the device and in the dtype of a pair, finite as they were."""
    converted = x.detach().to(pair.device, pair.dtype)
    if torch.finfo(pair.dtype).max < torch.finfo(x.dtype).max:
        for rows, first in blocks(converted):
            bad = ~rows.isfinite()
            if bad.any():
                row = first + int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"{argument} must fit into the dtype of the pair, {pair.dtype}, got numbers "
                    f"that are too large, the first in row {row}; scale the data, or convert the "
                    "pair with pair.to(torch.float64)"
                )
    return converted
