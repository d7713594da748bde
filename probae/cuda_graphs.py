"""A function of tensors on a GPU as one CUDA graph: one launch in place of dozens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class CannotCapture(RuntimeError):
    """Why a function cannot be captured, in words that follow "because"."""


class CudaGraph:
    """What a function does on a GPU, recorded once, and done anew at every call.

    The record knows addresses, not tensors: what a call brings is copied to where the function
    found it, and results lie where they lay. Random numbers are fresh nevertheless, and those that
    the function itself would draw: torch tells the record at each replay where the GPU's default
    stream of random numbers is, and moves it on.

    Args:
        function: works on that GPU alone, and may change its arguments.
        fed: examples of the arguments that every call brings.
        fixed: further arguments, which stay where they are; the record is made without a change to
            them.

    Raises:
        CannotCapture: the function looks at a value, or asks for what a record cannot hold.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], fed: list[Tensor], fixed: list[Tensor]
    ) -> None:
        self.fed = [tensor.clone() for tensor in fed]
        self.graph = torch.cuda.CUDAGraph()
        device = self.fed[0].device
        noise = torch.cuda.default_generators[device.index]
        before, stream = noise.clone_state(), torch.cuda.Stream(device)
        try:
            with torch.cuda.device(device), _aside(stream):
                with _not_waiting():  # once as it is, for what its first run alone asks for
                    function(*self.fed, *(tensor.clone() for tensor in fixed))
                # other threads may use the GPU meanwhile
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.results = function(*self.fed, *fixed)
        except RuntimeError as error:
            noise.graphsafe_set_state(before)  # a record that failed leaves it without use
            raise CannotCapture(_reason(error)) from error

    def __call__(self, *fed: Tensor) -> Sequence[Tensor]:
        """Return the results, which the next call overwrites."""
        for place, tensor in zip(self.fed, fed, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.results


@contextlib.contextmanager
def _aside(stream: Any) -> Iterator[None]:
    """Work on another stream, after and before what is on the one in use."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextlib.contextmanager
def _not_waiting() -> Iterator[None]:
    """Raise a RuntimeError where the CPU would wait for the GPU, which a record cannot hold."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _reason(error: BaseException) -> str:
    while isinstance(error.__context__, RuntimeError):  # the end of a record that failed fails, too
        error = error.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "synchronizing CUDA operation" in lines[0]:
        return "an operation waits for the GPU, as a Cholesky factorisation does"
    return f"it failed with {type(error).__name__}: {lines[0] if lines else 'no message'}"
