"""Training data as batches: in memory, mapped from a file, read by a Dataset, or in passes."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .autoencoder import Autoencoder
from .checks import SupportCheck, blocks, is_grey, is_map_style, to_pair
from .datasets import as_tensor, is_large_file, read_array, require_mappable
from .distributions import draw_bits
from .part import require_count, require_flag

NOT_FINITE = "must be finite"  # in what is said of such data, and of no other fault
Share = Callable[[Tensor], Tensor]


class TrainingData:
    """Data of a pair, checked, and taken in batches.

    - A tensor, an array or a small file is checked and held in memory as ``tensor``.
    - A ``numpy.memmap``, or a ``.npy`` file above 256 MiB, stays on the disk: rows are read as they
      are needed, and checked then.
    - A map-style Dataset is indexed anew at every presentation, so its augmentations live.
    - An ``IterableDataset`` is read in passes of unknown length (``size`` is None), in the order in
      which it gives its data; shuffling is its own matter.

    The last three are ``dataset``. With ``num_workers`` other processes read them ahead; the noise
    of a map-style Dataset is then seeded batch by batch, so that any number of workers gives the
    same data, and so does a run that is resumed between two batches.

    Args:
        pair: the pair that the data are for.
        x: the data (N, *x_shape).
        argument: name of ``x`` in messages.
        binarize: draw x ~ Bernoulli(x) anew at every presentation.
        num_workers: number of processes that read, beside this one.
        skips: leave data that are not finite out of what `some` returns.
    """

    def __init__(
        self,
        pair: Autoencoder,
        x: Any,
        argument: str,
        binarize: bool,
        num_workers: int = 0,
        skips: bool = False,
    ) -> None:
        self.pair, self.argument = pair, argument
        self.binarize = require_flag(binarize, "binarize")
        self.num_workers = require_count(num_workers, "num_workers", least=0)
        self.skips = skips
        self.seen_grey = False  # of a Dataset, as its data come by
        self.support = SupportCheck(pair, binarize)
        if isinstance(x, DataLoader):
            raise ValueError(
                f"{argument} must be a tensor, array, path or torch Dataset; got DataLoader; "
                "pass its .dataset, with batch_size and num_workers of fit"
            )
        if isinstance(x, str | os.PathLike) and is_large_file(Path(x)):
            x = read_array(Path(x), argument, mapped=True)
        if isinstance(x, np.memmap):
            require_mappable(x, argument)
            x = MappedRows(x)
        self.dataset: Dataset[Any] | None = x if isinstance(x, Dataset) else None
        self.size: int | None = None
        if self.dataset is None:
            if self.num_workers > 0:
                raise ValueError(
                    f"num_workers must be 0 for data in memory, got {num_workers}; it is for a "
                    "torch Dataset or a mapped file"
                )
            self.tensor = to_pair(pair, as_tensor(x, argument), argument)
            self.size = len(self.tensor)
            self.support(self.tensor, argument)
        elif is_map_style(x):
            self.size = len(x)
            if self.size == 0:
                raise ValueError(f"{argument} is empty: expected at least one datum")
            self._look(torch.arange(min(self.size, 2)).tolist())
        elif not isinstance(x, IterableDataset):
            raise ValueError(
                f"{argument} must be a map-style Dataset (with __len__ and __getitem__) or an "
                f"IterableDataset, got {type(x).__name__}"
            )

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"{self.argument} is an IterableDataset, whose length is not known")
        return self.size

    def is_grey(self) -> bool:
        """Whether a value is neither 0 nor 1; of a Dataset, among the data seen so far."""
        return self.seen_grey if self.dataset is not None else is_grey(self.tensor)

    def order(self) -> Tensor | None:
        """Return the places (N,) of all data in random order; None where they are not known."""
        return None if self.size is None else torch.randperm(self.size)

    def sources(
        self,
        batch_size: int,
        order: Tensor | None,
        epoch: int,
        start: int = 0,
        share: Share | None = None,
    ) -> Iterator[Tensor]:
        """Yield what each step of an epoch is made of: places in memory, or else a whole batch.

        Args:
            batch_size: number of data per step.
            order: places of the data, None for an ``IterableDataset``.
            epoch: number of the epoch, by which workers are seeded.
            start: number of steps to leave out. An ``IterableDataset`` is read and dropped up to
                there, which is the same epoch only if all its passes are alike.
            share: takes a process's share of the places, or of the rows, of a step.
        """
        share = _all if share is None else share
        if order is None:
            batches = self._passed(batch_size, epoch)
            _drop(batches, start)
            count = start * batch_size
            for items in batches:
                x = self._stack(items, range(count, count + len(items)))
                count += len(items)
                yield self._finish(share(x))
            if count == 0:
                raise ValueError(f"{self.argument} is empty in epoch {epoch}: it gave no data")
            return
        if self.dataset is None:  # copied to a GPU at once, as every copy of its own would wait
            order = order.to(self.tensor.device)
        parts = [share(places) for places in order.split(batch_size)[start:]]
        if self.dataset is None:
            yield from parts
        elif self.num_workers == 0:
            for places in parts:
                yield self._finish(self.rows(places))
        else:
            seed = _seed(order, epoch)
            loader = self._loader(_Ahead(self.dataset, parts, start, seed), None, seed)
            for places, items in zip(parts, loader, strict=True):
                yield self._finish(self._stack(items, places.tolist()))

    def batch(self, source: Tensor) -> Tensor:
        """Return the data of a step, of what `sources` gave for it, or at these places."""
        if self.dataset is not None:
            return source if source.is_floating_point() else self._finish(self.rows(source))
        x = self.tensor[source]
        return draw_bits(x) if self.binarize else x

    def rows(self, places: Tensor) -> Tensor:
        """Return the data at these places as they are, checked."""
        if self.dataset is None:
            return self.tensor[places]
        return self._stack(_items(self.dataset, places.tolist()), places.tolist())

    def some(self, number: int) -> Tensor:
        """Return so many random data, or the first of a pass, binarised once."""
        if self.size is not None:
            places = torch.randperm(self.size)[:number]
            if self.dataset is None:
                return self.batch(places)
            return self._finish(self._look(places.tolist()))
        items = list(itertools.islice(iter(self.dataset or ()), number))
        if not items:
            raise ValueError(f"{self.argument} is empty: expected at least one datum")
        return self._finish(self._look(range(len(items)), items))

    def _look(self, places: Sequence[int], items: Any = None) -> Tensor:
        """Return the data at these places as they are, checked, but for those to be left out."""
        items = _items(self.dataset, list(places)) if items is None else items
        try:
            return self._stack(items, places)
        except ValueError as error:
            if not self.skips or NOT_FINITE not in str(error):
                raise
        tensors = [torch.as_tensor(_first(item)) for item in items]
        kept = [i for i, tensor in enumerate(tensors) if tensor.isfinite().all()]
        if not kept:
            raise ValueError(f"{self.argument} {NOT_FINITE}, got no such datum among {len(items)}")
        return self._stack([items[i] for i in kept], [places[i] for i in kept])

    def all(self) -> Tensor:
        """Return all data, binarised once."""
        if self.dataset is None:
            return _bits_of(self.tensor) if self.binarize else self.tensor
        if self.size is None:
            return self.some(sys.maxsize)
        return self.batch(torch.arange(self.size))

    def _finish(self, x: Tensor) -> Tensor:
        self.seen_grey = self.seen_grey or is_grey(x)
        return _bits_of(x) if self.binarize else x

    def _passed(self, batch_size: int, epoch: int) -> Iterator[Any]:
        """Yield lists of items, one pass over an ``IterableDataset``."""
        dataset: Any = self.dataset
        if self.num_workers > 0:
            yield from self._loader(dataset, batch_size, _seed(None, epoch))
            return
        items = iter(dataset)
        while batch := list(itertools.islice(items, batch_size)):
            yield batch

    def _loader(self, dataset: Any, batch_size: int | None, seed: int) -> Any:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=_packed,
            worker_init_fn=_stays,
            generator=torch.Generator().manual_seed(seed),  # else of the global stream
        )

    def _stack(self, items: Any, places: Sequence[int]) -> Tensor:
        """Return items, or an array of them, as one checked tensor on the pair's device."""
        if not isinstance(items, Tensor | np.ndarray):
            if len(items) != len(places):
                raise ValueError(
                    f"{self.argument} must give {len(places)} data for as many places, got "
                    f"{len(items)}; see its __getitems__"
                )
            tensors = [self._tensor(item, i) for item, i in zip(items, places, strict=True)]
            if len({tensor.dtype for tensor in tensors}) > 1:
                tensors = [tensor.double() for tensor in tensors]
            items = torch.stack(tensors)
        elif tuple(items.shape[1:]) != self.pair.x_shape:
            self._tensor(items[0], places[0])
        items = torch.as_tensor(items)
        if items.is_floating_point() and not items.isfinite().all():
            bad = places[int((~items.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise ValueError(
                f"{self.argument} {NOT_FINITE}, got NaN or infinite values in {self.argument}"
                f"[{bad}]; remove or impute them"
            )
        x = to_pair(self.pair, as_tensor(items, self.argument), self.argument)
        self.support(x, self.argument, places)
        return x

    def _tensor(self, item: Any, place: int) -> Tensor:
        item = _first(item)
        if not isinstance(item, Tensor | np.ndarray):
            raise ValueError(
                f"{self.argument}[{place}] must be a tensor or a tuple that begins with one, got "
                f"{type(item).__name__}; give the Dataset a transform to tensors"
            )
        tensor = torch.as_tensor(item)
        if tuple(tensor.shape) != self.pair.x_shape:
            raise ValueError(
                f"{self.argument}[{place}] must have the shape {self.pair.x_shape} of one datum, "
                f"got {tuple(tensor.shape)}"
            )
        return tensor


class MappedRows(Dataset[Tensor]):
    """Rows of an array on the disk; what is not asked for is not read."""

    def __init__(self, array: np.memmap) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, place: int) -> Tensor:
        return torch.as_tensor(_native(self.array[place]))

    def __getitems__(self, places: list[int]) -> Tensor:
        """Return rows (N, ...), read in the order in which they lie on the disk."""
        ordered, back = np.unique(places, return_inverse=True)
        return torch.as_tensor(_native(self.array[ordered]))[torch.as_tensor(back)]

    def __getstate__(self) -> dict[str, Any]:
        """Return where the array lies: a worker that is no fork maps it again."""
        if not self.array.flags.c_contiguous or self.array.filename is None:
            raise ValueError(
                "a mapped array that is sliced along other dimensions, or has no file, cannot be "
                "read by workers here; use num_workers=0"
            )
        root = self.array
        while isinstance(root.base, np.memmap):
            root = root.base
        offset = root.offset + self.array.ctypes.data - root.ctypes.data
        return {
            "filename": self.array.filename,
            "dtype": self.array.dtype,
            "shape": self.array.shape,
            "offset": int(offset),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.array = np.memmap(mode="r", **state)


class _Ahead(Dataset[Any]):
    """The steps of an epoch as a Dataset of batches, each with a seed of its own."""

    def __init__(self, dataset: Any, parts: list[Tensor], start: int, seed: int) -> None:
        self.dataset, self.parts, self.start, self.seed = dataset, parts, start, seed

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, step: int) -> Any:
        seed = (self.seed + self.start + step) % 2**63
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what a user's augmentation may draw from
        random.seed(seed)
        return _items(self.dataset, self.parts[step].tolist())


def _bits_of(x: Tensor) -> Tensor:
    """Return bits of all data, block by block: a draw takes several times the memory of bits."""
    bits = torch.empty_like(x)
    for rows, first in blocks(x):
        bits[first : first + len(rows)] = draw_bits(rows)
    return bits


def _items(dataset: Any, places: list[int]) -> Any:
    """Return the items at these places, a list or one tensor of them."""
    if hasattr(dataset, "__getitems__"):  # torch's name for reading a batch at once
        return dataset.__getitems__(places)
    return [dataset[place] for place in places]


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, tuple | list) and item else item


def _packed(items: Any) -> Any:
    """Return items as one tensor, which a worker hands over at once; as they are if they differ."""
    if isinstance(items, Tensor):
        return items
    firsts = [_first(item) for item in items]
    if not all(isinstance(item, Tensor | np.ndarray) for item in firsts):
        return firsts
    tensors = [torch.as_tensor(item) for item in firsts]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        return firsts
    return torch.stack(tensors)


def _stays(worker: int) -> None:
    """Let a worker read on where an interrupt comes to it, too, as from a terminal.

    It is this process that ends training, after the step under way, for which it wants its data.
    The second SIGTERM is of the loader, which then waits for the worker no longer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array in memory, in this machine's order of bytes, that torch takes."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), subok=False)


def _drop(batches: Iterator[Any], number: int) -> None:
    """Leave so many batches out; reading them takes nothing from the random streams."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for step in range(number):
        if next(batches, None) is None:
            raise ValueError(
                f"x must give as many data as before: its pass ended after {step} of {number} "
                "steps that were taken already"
            )
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


def _seed(order: Tensor | None, epoch: int) -> int:
    """Return a seed for the workers: another one in each epoch, the same after a resume."""
    text = f"{torch.initial_seed()} {epoch} {[] if order is None else order[:64].tolist()}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _all(source: Tensor) -> Tensor:
    return source
