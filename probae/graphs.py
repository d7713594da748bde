"""Functions of tensors as graphs: recorded while they run once, and made machine code.

:func:`make_fx` records the tensor operations, so that Pyro's handlers are gone from then on, and
Inductor makes machine code of the record. Whatever the record does not show is a constant,
silently; so what machine code gives is compared with what the function gave.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.infer import trace_elbo, trace_mean_field_elbo
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from .autoencoder import random_state, set_random_state
from .layout import laid_out
from .part import RECORDING

INDUCTOR = {
    "fallback_random": True,  # torch's own random stream, as in eager steps
    # what is drawn keeps its order, of which older torch takes no care
    "reorder_for_locality": False,
    "reorder_for_peak_memory": False,
    "size_asserts": False,
    "alignment_asserts": False,
}
# On a CPU one block of memory a call, where malloc would give large tensors back to the system one
# by one; many small ones are sooner had one by one. A GPU's memory is torch's own to keep. Results
# are no part of the block, which they would keep alive, so that the next call had to have another.
ONE_BLOCK = {"memory_planning": True, "memory_pool": "intermediates"}
# What calls the kernels: C++, too, as Python would take longer for it than some of them take.
# Products and sums in one operation where there is one, which also rounds once less.
ON_CPU = {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
LARGE = 2**20  # bytes of a tensor


class CannotCompile(RuntimeError):
    """Why a step cannot be compiled, in words that follow "because".

    Example:
        >>> import torch, probae
        >>> pair = probae.PredictiveSparseDecomposition(8, 4)  # its encoder iterates on the data
        >>> try:
        ...     probae.fit(pair, torch.randn(64, 8), batch_size=8, compile=True, progress=False)
        ... except probae.CannotCompile as error:
        ...     print("refused")
        refused
    """


def require_mode(compile: Any) -> None:
    """Raise a ValueError unless the argument is True, False or "auto"."""
    if not isinstance(compile, bool) and not (isinstance(compile, str) and compile == "auto"):
        raise ValueError(f"compile must be True, False or 'auto', got {compile!r}")


@contextlib.contextmanager
def _values_unseen() -> Iterator[None]:
    """Run programs without what looks at values: checks, and losses made Python numbers."""
    token = RECORDING.set(True)
    try:
        with contextlib.ExitStack() as stack:
            for module in (trace_elbo, trace_mean_field_elbo):
                stack.enter_context(mock.patch.object(module, "torch_item", _detached))
                stack.enter_context(mock.patch.object(module, "warn_if_nan"))
            stack.enter_context(mock.patch.object(nn.functional, "one_hot", _one_hot))
            yield
    finally:
        RECORDING.reset(token)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _one_hot(index: Tensor, num_classes: int) -> Tensor:
    classes = torch.arange(num_classes, device=index.device)
    return (index.unsqueeze(-1) == classes).to(index.dtype)


def record(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> torch.fx.GraphModule:
    """Return the tensor operations of a function."""
    try:
        with _values_unseen():
            return make_fx(function, decomposition_table=REWRITTEN, tracing_mode="real")(*inputs)
    except Exception as error:
        if "get value out of a tracing tensor" not in str(error):
            raise CannotCompile(
                f"it cannot be recorded: {type(error).__name__}: {_first_line(error)}"
            ) from error
        raise CannotCompile(
            f"it branches on the value of a tensor{_place(error)}, which a graph cannot"
        ) from error


def _product_and_bias(
    bias: Tensor, h: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Add a bias where activations are made, and not in a pass of its own, as libraries do.

    The sign is there as Inductor would put a product and a sum together again.
    """
    product = torch.mm(h, weight)
    return (product if alpha == 1 else alpha * product) - (-bias if beta == 1 else -beta * bias)


def _bernoulli(probs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw in place, as torch does; of the whole Inductor would make rand() < p: other numbers."""
    drawn = torch.empty_like(probs, memory_format=torch.contiguous_format)
    return drawn.bernoulli_(probs, generator=generator)


REWRITTEN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.addmm.default: _product_and_bias,
    torch.ops.aten.bernoulli.default: _bernoulli,
}


def _largest(graph: torch.fx.GraphModule) -> int:
    """Return the size in bytes of the largest tensor that the operations make."""
    made = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    return max((t.numel() * t.element_size() for t in made if isinstance(t, Tensor)), default=0)


def compiled(
    function: Callable[..., list[Tensor]],
    inputs: list[Tensor],
    known: dict[Any, Callable[..., Any]] | None = None,
) -> Callable[..., list[Tensor]]:
    """Return a function of tensors as machine code for inputs of these shapes.

    The inputs are distinct tensors: a record could not tell one from itself in another place. They
    stay as they are.
    Tensors that it uses beside its inputs are those of now. Call it under
    :func:`probae.precision.float32_products`, or not, as the result. Machine code goes into
    ``known``, and comes from there for a function of the same operations on other tensors.

    Raises:
        CannotCompile: it branches on values, there is no compiler, or results differ.
    """
    device, noise = inputs[0].device, random_state(inputs[0].device)
    try:
        expected = function(*inputs)
        set_random_state(noise, device)
        graph = record(function, inputs)
        constants = _lifted(graph)
        known = {} if known is None else known
        layouts = [(t.shape, t.stride(), t.dtype, t.device) for t in (*inputs, *constants)]
        key = (graph.code, *layouts)
        if key not in known:
            known[key] = machine_code(graph, [*inputs, *constants])
        run = known[key]
        set_random_state(noise, device)
        require_equal(run(*inputs, *constants), expected, [f"result {i}" for i in range(9)])
    finally:
        set_random_state(noise, device)
    strides = [tensor.stride() for tensor in inputs]
    return lambda *inputs: run(*map(laid_out, inputs, strides), *constants)


def _lifted(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Make inputs of constants, so that the machine code serves others of their shapes."""
    nodes = [
        node
        for node in graph.graph.find_nodes(op="get_attr")
        if isinstance(getattr(graph, str(node.target)), Tensor)
    ]
    constants = {str(node.target): getattr(graph, str(node.target)).detach() for node in nodes}
    last = list(graph.graph.find_nodes(op="placeholder"))[-1]
    for name, constant in constants.items():
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"constant_{name.lstrip('_')}")
        last.meta["val"] = constant
        for node in nodes:
            if node.target == name:
                node.replace_all_uses_with(last)
                graph.graph.erase_node(node)
        delattr(graph, name)
    graph.recompile()
    return list(constants.values())


def attempt(
    mode: bool | str, make: Callable[[], Callable[..., Any]], what: str, stacklevel: int
) -> Callable[..., Any] | None:
    """Return machine code, or None where it is not wanted, or, with a warning, cannot be had.

    Raises:
        CannotCompile: the mode is True, and it cannot be had.
    """
    if mode is False:
        return None
    try:
        return make()
    except CannotCompile as error:
        if mode is True:
            raise
        warnings.warn(
            f"{what} eagerly, and so more slowly, because {error}; with compile=False it is not "
            "tried",
            stacklevel=stacklevel + 1,
        )
        return None


def require_equal(
    values: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], coarse: float = 1e-3
) -> None:
    """Raise unless tensors agree up to rounding: of long sums, or coarser where one says so."""
    for value, reference, name in zip(values, expected, names, strict=False):
        tolerance = coarse if reference.dtype.itemsize < 8 else 1e-6
        distance = torch.dist(value.double(), reference.double())
        if not distance <= tolerance * (reference.double().norm() + 1e-3):
            raise CannotCompile(
                f"the machine code gives another {name} than the program: something that changes "
                "from call to call is no tensor, or random numbers come in another order"
            )


def machine_code(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile recorded operations for inputs of these shapes, which need no gradients."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from .products import by_blocks

    on_cpu = inputs[-1].device.type == "cpu"
    wanted: dict[str, Any] = dict(INDUCTOR)
    if on_cpu:
        wanted |= {**ON_CPU, **(ONE_BLOCK if _largest(graph) >= LARGE else {})}
    constants = _lifted(graph)
    for node in graph.graph.nodes:  # each value of a record is of a world of its own
        node.meta.pop("val", None)
    inner: list[Any] = []

    def innermost(graph: torch.fx.GraphModule, inputs: Any, **keywords: Any) -> Any:
        inner.append(compile_fx_inner(graph, inputs, **keywords))
        return inner[-1]

    try:
        known = torch._inductor.config.get_config_copy()  # older torch does not know them all
        options = {name: value for name, value in wanted.items() if name in known}
        with (
            torch._inductor.config.patch(options),
            by_blocks() if on_cpu else contextlib.nullcontext(),
            # of what that keeps, the inner function is no part
            torch._functorch.config.patch(enable_autograd_cache=False),
            warnings.catch_warnings(),
            mock.patch.object(logging.getLogger("torch._inductor.ir"), "warning"),
        ):
            # which operations its C++ calls by way of Python is not the user's to know
            # the precision of products is the user's choice
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            code: Any = compile_fx(graph, [*inputs, *constants], inner_compile=innermost)
    except Exception as error:
        raise CannotCompile(
            f"Inductor failed with {type(error).__name__}: {_first_line(error)}"
        ) from error
    call = getattr(inner[0], "current_callable", None) if on_cpu and len(inner) == 1 else None
    if call is not None:
        # what is around it cares for gradients and aliases, and takes longer than some kernels do
        return lambda *inputs: call([*inputs, *constants])
    return lambda *inputs: code(*inputs, *constants)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _place(error: BaseException) -> str:
    """Name the innermost line of an error that is neither torch's nor Pyro's."""
    libraries = [Path(module.__file__ or "").parent for module in (torch, pyro)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(Path(frame.filename).is_relative_to(library) for library in libraries):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
