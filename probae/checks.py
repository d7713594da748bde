"""Data against a pair: shape, dtype, support, and batches of checked data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.utils.data import Dataset, IterableDataset

from .autoencoder import Autoencoder, frozen, require_compatible
from .datasets import as_tensor
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
    if binarize:
        bad = ~((x >= 0) & (x <= 1))
        if bad.any():
            raise ValueError(
                f"{argument} must lie in [0, 1] to be binarised, got {_first_bad(x, bad)}; scale "
                "8-bit images by 1/255"
            )
        return
    base = likelihood_of(pair)
    grey = has_component(base, GreyBernoulli)
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
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
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


def is_grey(x: Tensor) -> bool:
    """Whether a value is neither 0 nor 1."""
    return any(bool(((rows != 0) & (rows != 1)).any()) for rows, _ in chunks(x))


class TrainingData:
    """Training data that are indexed by batch: a tensor in memory, or a map-style Dataset."""

    def __init__(self, pair: Autoencoder, x: Any, argument: str, binarize: bool) -> None:
        self.pair, self.binarize, self.argument = pair, binarize, argument
        self.seen_grey = False  # of a Dataset, as its data come by
        self.dataset: Dataset[Any] | None = x if is_map_style(x) else None
        if self.dataset is not None:
            self.size = len(x)
            if self.size == 0:
                raise ValueError(f"{argument} is empty: expected at least one datum")
            self._check(self._items(torch.arange(min(self.size, 2))))
        else:
            self.tensor = to_pair(pair, as_tensor(x, argument))
            self.size = len(self.tensor)
            self._check(self.tensor)

    def __len__(self) -> int:
        return self.size

    def is_grey(self) -> bool:
        """Whether a value is neither 0 nor 1; of a Dataset, among the data seen so far."""
        return self.seen_grey if self.dataset is not None else is_grey(self.tensor)

    def batch(self, index: Tensor) -> Tensor:
        """Return the data at these places, binarised anew where that was asked for."""
        x = self.tensor[index] if self.dataset is None else self._items(index)
        if self.dataset is not None:
            self._check(x)
            self.seen_grey = self.seen_grey or is_grey(x)
        return torch.bernoulli(x) if self.binarize else x

    def _items(self, index: Tensor) -> Tensor:
        dataset = self.dataset
        assert dataset is not None
        items = []
        for i in index.tolist():
            item = dataset[i]
            item = item[0] if isinstance(item, tuple | list) and item else item
            if not isinstance(item, Tensor | np.ndarray):
                raise ValueError(
                    f"{self.argument}[{i}] must be a tensor or a tuple that begins with one, got "
                    f"{type(item).__name__}; give the Dataset a transform to tensors"
                )
            items.append(torch.as_tensor(item))
            if tuple(items[-1].shape) != self.pair.x_shape:
                raise ValueError(
                    f"{self.argument}[{i}] must have the shape {self.pair.x_shape} of one datum, "
                    f"got {tuple(items[-1].shape)}"
                )
        return to_pair(self.pair, as_tensor(torch.stack(items), self.argument))

    def _check(self, x: Tensor) -> None:
        check_support(self.pair, x, self.argument, binarize=self.binarize, strict=False)


def is_map_style(x: Any) -> bool:
    """Whether x is a torch Dataset that can be indexed."""
    return isinstance(x, Dataset) and not isinstance(x, IterableDataset) and hasattr(x, "__len__")


def to_pair(pair: Autoencoder, x: Tensor) -> Tensor:
    """Return data on the device and in the dtype of a pair."""
    return x.detach().to(pair.device, pair.dtype)
