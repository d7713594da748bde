"""Training and evaluation in several processes: what they tell each other, and nothing more.

``torchrun --nproc-per-node N -m probae fit …`` starts the processes. Each takes its share of every
batch of :func:`probae.fit` and one sum over all processes makes the step, so that N processes take
the steps that one would. That is a plain sum and not torch's ``DistributedDataParallel``, which
averages equal shares, wants a gradient of every parameter from every process, and leaves the others
waiting where one meets a fault or has no datum; one sum of gradients, losses and counts has none of
these troubles.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .autoencoder import Autoencoder
from .checks import require_pair
from .datasets import as_tensor
from .likelihood import LogLikelihood, log_likelihood

if dist.is_available():
    # Its functions keep the group that they find when they are imported, as a default. Imported
    # later, as some optimizers do, they would keep the threads of a group beyond its end, to meet
    # that of the interpreter, which aborts the process.
    import torch.distributed.nn.functional

BLOCK = 500  # data that one process evaluates at a time


def is_active() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def is_launched() -> bool:
    """Whether torchrun started this process, so that a group is to be joined."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def launched_rank() -> int:
    """Return the number of this process as torchrun tells it, 0 where it started none."""
    return int(os.environ["RANK"]) if is_launched() else 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the group that torchrun tells of, if it does; yield the device of this process."""
    if is_active() or not is_launched():
        yield device
        return
    if torch.device(device).type == "cuda":
        if torch.device(device).index is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def place() -> torch.device:
    """Return the device on which processes exchange tensors."""
    on_gpu = is_active() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def add_up(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().to(place(), copy=True)
    with _talking():
        dist.all_reduce(total)
    return total.to(tensor.device)


def from_main(tensor: Tensor) -> Tensor:
    """Return the main process's tensor, of the same shape in every process."""
    if world_size() == 1:
        return tensor
    copy = tensor.detach().to(place(), copy=True).contiguous()
    with _talking():
        dist.broadcast(copy, src=0)
    return copy.to(tensor.device)


def gathered(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, which are of one shape, in their order."""
    if world_size() == 1:
        return [tensor]
    mine = tensor.detach().to(place()).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    with _talking():
        dist.all_gather(parts, mine)
    return [part.to(tensor.device) for part in parts]


def bytes_from_main(content: bytes | None) -> bytes | None:
    """Return the main process's bytes, or its None."""
    if world_size() == 1:
        return content
    size = from_main(torch.tensor(-1 if content is None else len(content)))
    if int(size) < 0:
        return None
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if content is not None and is_main():
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return from_main(buffer).numpy().tobytes()


def require_alike(values: Mapping[str, Any]) -> None:
    """Raise a ValueError, in every process, where one has other values: they would wait for ever.

    The names, of which there are as many in every process, are compared in their order.
    """
    if world_size() == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in values.values()]
    numbers = torch.tensor([int.from_bytes(digest[:7], "little") for digest in digests])
    first, *others = gathered(numbers)
    for number, other in enumerate(others, 1):
        odd = [
            name for name, same in zip(values, (first == other).tolist(), strict=True) if not same
        ]
        if odd:
            raise ValueError(
                f"{', '.join(odd)} must be the same in all processes, got other ones in process "
                f"{number} than in process 0; start all with the same arguments, data and pair"
            )


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Turn what libraries say of a lost process into one error."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"process {rank()} of {world_size()} lost contact with another one, which has ended or "
            "was killed"
        ) from error


def share_of(rows: Tensor) -> Tensor:
    """Return this process's share of the rows of a batch; the first row where there is none."""
    if world_size() == 1:
        return rows
    return rows.tensor_split(world_size())[rank()] if rank() < len(rows) else rows[:1]


def shared_blocks(count: int, block: Callable[[int], list[Tensor]]) -> list[Tensor]:
    """Let processes compute blocks in turn, and return each result of all blocks, in order.

    Args:
        count: number of blocks.
        block: computes that block: tensors (n, ...), with n, shapes and dtypes its own matter.

    Returns:
        list[Tensor]: the results, joined along their first dimension.
    """
    results: list[list[Tensor] | None] = [None] * count
    for i in range(rank(), count, world_size()):
        results[i] = block(i)
    if world_size() > 1:
        from . import checkpoints  # tensors of unknown shapes, as bytes without pickle

        mine = {str(i): result for i, result in enumerate(results) if result is not None}
        content = checkpoints.to_bytes(mine)
        sizes = gathered(torch.tensor(len(content)))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for size, part in zip(sizes, gathered(padded), strict=True):
            held = checkpoints.from_bytes(part[: int(size)].numpy().tobytes(), "a process's result")
            for name, result in held.items():
                results[int(name)] = result
    return [
        torch.cat(column) for column in zip(*(r for r in results if r is not None), strict=True)
    ]


def shared_log_likelihood(
    pair: Autoencoder,
    x: Tensor | Any,
    method: str = "auto",
    num_samples: int | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> LogLikelihood:
    r"""Estimate log p(x) of each datum with the processes of a group, each on some of the data.

    .. math:: \log p(x_n), \quad n \in \text{block } b, \text{ by process } b \bmod N

    Blocks are of 500 data; block b is what :func:`probae.log_likelihood` gives for these data under
    ``seed + b``. So values do not depend on the number of processes. Where log p(x) is exact, and
    up to 500 data, they are those of :func:`probae.log_likelihood`; else another draw of the same
    estimates.

    Args:
        pair: the pair, the same in every process; it is not changed.
        x: data (N, *x_shape), the same in every process.
        method: see :func:`probae.log_likelihood`.
        num_samples: see there.
        seed: of the samples of z.
        options: other keywords of :func:`probae.log_likelihood`.

    Returns:
        LogLikelihood: of all data, in their order, in every process.

    Raises:
        ValueError: as :func:`probae.log_likelihood` does; or ``seed`` is no int.
        ConnectionError: another process has ended.

    Example:
        >>> import torch, probae
        >>> ll = probae.shared_log_likelihood(probae.PPCA(5, 2), torch.zeros(4, 5))
        >>> ll.method, ll.values.shape
        ('exact', torch.Size([4]))
    """
    require_pair(pair)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}: blocks are seeded one by one")
    data = as_tensor(x, "x")
    parts = data.split(BLOCK)
    about: list[LogLikelihood] = []

    def block(i: int) -> list[Tensor]:
        ll = log_likelihood(pair, parts[i], method, num_samples, seed=seed + i, **options)
        about.append(ll)
        return [value.cpu() for value in _columns(ll)]

    columns = shared_blocks(len(parts), block)
    if not about:  # fewer blocks than processes: of one datum, to know what the figures are
        about.append(log_likelihood(pair, parts[0][:1], method, num_samples, seed=seed, **options))
    first, filled = about[0], iter(columns)
    whole: dict[str, Any] = {
        name: next(filled).to(first.values.device)
        for name in ("values", "std_error", "ess", "khat", "acceptance")
        if getattr(first, name) is not None
    }
    return first._replace(**whole)


def _columns(ll: LogLikelihood) -> list[Tensor]:
    every = (ll.values, ll.std_error, ll.ess, ll.khat, ll.acceptance)
    return [column for column in every if column is not None]
