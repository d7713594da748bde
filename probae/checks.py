"""Checks of data against a pair: shape, dtype, support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from .autoencoder import Autoencoder, frozen
from .distributions import GreyBernoulli, base_distribution


def check_support(
    pair: Autoencoder, x: Tensor, argument: str, *, binarize: bool, strict: bool
) -> None:
    """Check shape, dtype and support of data; ``strict`` refuses grey pixels under Bernoulli."""
    pair.check_input(x, argument)
    if binarize:
        bad = ~((x >= 0) & (x <= 1))
        if bad.any():
            raise ValueError(
                f"{argument} must lie in [0, 1] to be binarised, got {_first_bad(x, bad)}; scale "
                "8-bit images by 1/255"
            )
        return
    base = likelihood_of(pair)
    grey = isinstance(base, GreyBernoulli)
    support: Any = constraints.boolean if grey and strict else base.support
    for chunk, rows in chunks(x):
        bad = ~support.check(chunk)
        if bad.any():
            raise ValueError(
                f"{argument} must lie in the support of the decoder ({_describe(support)}), got "
                f"{_first_bad(chunk, bad, rows)}; {_support_fix(grey, support)}"
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


def _first_bad(x: Tensor, bad: Tensor, first_row: int = 0) -> str:
    position = bad.nonzero()[0].tolist()
    value = x[tuple(position)]  # a vector where the support is one of vectors
    text = f"{float(value):g}" if value.dim() == 0 else str(value.tolist())
    position[0] += first_row
    return f"{int(bad.sum())} values outside, the first {text} at index {tuple(position)}"


def require_pair(pair: Any) -> None:
    """Raise a ValueError unless ``pair`` is an :class:`Autoencoder`."""
    if not isinstance(pair, Autoencoder):
        raise ValueError(
            f"pair must be a probae.Autoencoder, got {type(pair).__name__}; compose one with "
            "probae.Autoencoder(prior, encoder, decoder)"
        )


def likelihood_of(pair: Autoencoder) -> Any:
    """Return the decoder's elementwise distribution at some code, to look at its family."""
    with frozen(pair, seed=0):
        return base_distribution(pair.decoder(pair.prior().sample(torch.Size((1,)))))


def chunks(x: Tensor, rows: int = 8192) -> Iterator[tuple[Tensor, int]]:
    """Yield consecutive blocks of rows of ``x``, each with the index of its first row."""
    for start in range(0, len(x), rows):
        yield x[start : start + rows], start
