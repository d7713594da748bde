"""What a pair is, as a graph, as tables of shapes and of parts; and what a run did."""

from __future__ import annotations

import html
import importlib.util
import inspect
import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from .autoencoder import Autoencoder, frozen
from .checks import check_support, require_finite, require_pair
from .datasets import as_tensor
from .discriminators import NoEncoder
from .distributions import base_distribution, is_flat, is_point
from .part import Part, require_flag

if TYPE_CHECKING:
    from .training import Run

PARTS = {
    "prior": "p(z)",
    "encoder": "q(z|x)",
    "decoder": "p(x|z)",
    "corruption": "C(x_tilde|x)",
    "factor": "exp c(x, z)",
    "discriminator": "T(x, z)",
}
WIDTH = 72  # of the description of a part


def render(pair: Autoencoder, x: Tensor | Any | None = None, *, text: bool = False) -> Any:
    """Draw the model and the guide of a pair side by side, as Pyro's ``render_model`` does one.

    Each site stands in its plates with the name of its distribution and its event shape; what is
    observed is grey, a point code has a dashed border, a factor is a box. The guide shows x, too,
    which it is given. In a notebook the picture shows itself; ``picture.render("name",
    format="svg")`` writes it. That takes Graphviz's own program ``dot`` (from graphviz.org, or the
    system's package manager), ``picture.source`` does not.

    Args:
        pair: the pair; it is not changed.
        x: data (N, *x_shape) to run the programs on; default: three data of zeros.
        text: return text instead, which needs nothing installed.

    Returns:
        A ``graphviz.Digraph``; with ``text`` a string.

    Raises:
        ImportError: the Python package graphviz is missing, and ``text`` is False.
        ValueError: bad data, as in :func:`probae.fit`.

    Example:
        >>> import probae
        >>> pair = probae.DenoisingVAE(8, 2, corruption=probae.GaussianNoise(0.3))
        >>> print(probae.render(pair, text=True))
        model                                      guide
        x_tilde ~ Normal (8) given x               x (8) observed
        z ~ Normal (2)                             x_tilde ~ Normal (8) given x
        x ~ GreyBernoulli (8) given z, observed    z ~ Normal (2) given x_tilde
        plate data: 3                              plate data: 3
    """
    require_pair(pair)
    require_flag(text, "text")
    if not text and importlib.util.find_spec("graphviz") is None:
        raise ImportError(
            "render needs the package graphviz: pip install 'probae[graphviz]'; without it, "
            "print(probae.render(pair, text=True))"
        )
    programs = _programs(pair, _data(pair, x))
    return _as_text(programs) if text else _as_graph(programs)


def trace_shapes(pair: Autoencoder, x: Tensor | Any | None = None) -> str:
    """Return the shapes of all sites of model and guide, as Pyro's ``Trace.format_shapes`` does.

    Batch shapes are left of the bar, event shapes right of it.

    Args:
        pair: the pair; it is not changed.
        x: data (N, *x_shape) to run the programs on; default: three data of zeros.

    Returns:
        str: a table for the model, and one for the guide.

    Raises:
        ValueError: bad data, as in :func:`probae.fit`.

    Example:
        >>> import probae
        >>> print(probae.trace_shapes(probae.VAE(8, 2)))
        model
        data dist   |
            value 3 |
           z dist 3 | 2
            value 3 | 2
           x dist 3 | 8
            value 3 | 8
        guide
        data dist   |
            value 3 |
           z dist 3 | 2
            value 3 | 2
    """
    require_pair(pair)
    data = _data(pair, x)
    lines = []
    for name, trace in _traces(pair, data).items():
        shapes = trace.format_shapes(title="").splitlines()
        shapes = shapes[3 if shapes[2].strip() == "Sample Sites:" else 1 :]  # titles of no rows
        indent = min(len(line) - len(line.lstrip()) for line in shapes)
        lines += [name, *(line[indent:].rstrip() for line in shapes)]
    return "\n".join(lines)


class _Site(NamedTuple):
    """A node of a graph."""

    name: str
    family: str  # of its distribution; empty for data that a program is given
    event_shape: tuple[int, ...]
    given: tuple[str, ...]  # sites that it depends on
    plates: tuple[tuple[str, int], ...]  # name and size, outermost first
    observed: bool
    point: bool


def _data(pair: Autoencoder, x: Any) -> Tensor:
    if x is None:
        return torch.zeros(3, *pair.x_shape).to(pair.device, pair.dtype)
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=False)
    return data


def _traces(pair: Autoencoder, x: Tensor) -> dict[str, Any]:
    with frozen(pair, seed=0):
        programs = {"model": pair.model, "guide": pair.guide}
        return {name: poutine.trace(run).get_trace(x) for name, run in programs.items()}


def _programs(pair: Autoencoder, x: Tensor) -> dict[str, list[_Site]]:
    """Return the sites of model and guide, in the order in which they are drawn."""
    programs = {}
    for name, trace in _traces(pair, x).items():
        given = _dependencies(pair, name, x)
        sites = []
        for key, site in prune_subsample_sites(trace).nodes.items():
            if site["type"] != "sample":
                continue
            frames = site["cond_indep_stack"]  # the outermost is first
            sites.append(
                _Site(
                    key,
                    _family(site["fn"]),
                    tuple(site["fn"].event_shape),
                    tuple(given.get(key, ())),
                    tuple((frame.name, frame.size) for frame in frames),
                    site["is_observed"],
                    is_point(site["fn"]),
                )
            )
        if any("x" in site.given for site in sites) and all(site.name != "x" for site in sites):
            plates = sites[0].plates
            sites.insert(0, _Site("x", "", pair.x_shape, (), plates, True, False))
        programs[name] = sites
    return programs


def _dependencies(pair: Autoencoder, name: str, x: Tensor) -> dict[str, list[str]]:
    """Return the sites that each site of a program depends on.

    Those of :class:`Autoencoder` are known. In programs of a user's own Pyro follows the values
    from site to site, which it loses in whatever takes a tensor apart.
    """
    program = getattr(pair, name)
    if program != vars(Autoencoder)[name].__get__(pair):
        with frozen(pair, seed=0):
            found: dict[str, list[str]] = get_model_relations(program, (x,))["sample_sample"]
        return found
    if name == "guide" and isinstance(pair.encoder, NoEncoder):
        return {}
    if name == "guide":
        return {"x_tilde": ["x"], "z": ["x" if pair.corruption is None else "x_tilde"]}
    return {"x_tilde": ["x"], "x": ["z"], "factor": ["x", "z"]}


def _as_text(programs: dict[str, list[_Site]]) -> str:
    columns = []
    for name, sites in programs.items():
        lines = [name]
        for site in sites:
            shape = ", ".join(map(str, site.event_shape))
            law = f" ~ {site.family}" if site.family else ""
            law = "" if site.name == "factor" else law
            notes = [f"given {', '.join(site.given)}"] if site.given else []
            notes += ["observed"] if site.observed and site.name != "factor" else []
            lines.append(f"{site.name}{law} ({shape}) {', '.join(notes)}".rstrip())
        plates = dict.fromkeys(plate for site in sites for plate in site.plates)
        lines += [f"plate {plate}: {size}" for plate, size in plates]
        columns.append(lines)
    width = max(map(len, columns[0])) + 4
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left:{width}}{right}".rstrip() for left, right in rows)


def _as_graph(programs: dict[str, list[_Site]]) -> Any:
    graphviz: Any = importlib.import_module("graphviz")
    picture = graphviz.Digraph()
    for program, sites in programs.items():
        boxes = {site.plates[:depth] for site in sites for depth in range(len(site.plates) + 1)}
        graphs = {}
        for plates in sorted(boxes, key=len):
            name = "_".join(["cluster", program, *(plate for plate, _ in plates)])
            graphs[plates] = graphviz.Digraph(name)
            label = f"{plates[-1][0]}: {plates[-1][1]}" if plates else program
            graphs[plates].attr(label=label, labelloc="b" if plates else "t", labeljust="r")
        for site in sites:
            lines = [site.name, site.family, f"({', '.join(map(str, site.event_shape))})"]
            factor = site.name == "factor"
            graphs[site.plates].node(
                f"{program}_{site.name}",
                label=site.name if factor else "\n".join(line for line in lines if line),
                shape="box" if factor else "ellipse",
                style="filled,dashed" if site.point else "filled",
                fillcolor="lightgray" if site.observed and not factor else "white",
            )
        for plates in sorted(boxes, key=len, reverse=True)[:-1]:
            graphs[plates[:-1]].subgraph(graphs[plates])
        for site in sites:
            for source in site.given:
                graphs[()].edge(f"{program}_{source}", f"{program}_{site.name}")
        picture.subgraph(graphs[()])
    return picture


def describe(pair: Autoencoder) -> str:
    """Return a pair as a few lines of text: its sizes, its parts, and what its loss certifies."""
    if not hasattr(pair, "x_shape"):
        return f"<{type(pair).__name__}, not built>"  # in the traceback of an error in __init__
    rows = _rows(pair)
    widths = [max([4, *(len(row[i]) for row in rows)]) for i in range(3)]
    lines = [_headline(pair)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join(["", *cells, row[3]]).rstrip())
    margin = f"  {'kind':{widths[0]}}  "
    lines += textwrap.wrap(
        _kind(pair), 100, initial_indent=margin, subsequent_indent=" " * len(margin)
    )
    return "\n".join(lines)


def describe_html(pair: Autoencoder) -> str:
    """Return the same as a table for notebooks."""
    if not hasattr(pair, "x_shape"):
        return html.escape(describe(pair))
    left = 'style="text-align: left"'
    rows = [[html.escape(cell) for cell in row] for row in _rows(pair)]
    lines = [
        f"<tr><th {left}>{name}</th>"
        + "".join(f"<td {left}>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    ]
    kind = html.escape(_kind(pair))
    lines.append(f'<tr><th {left}>kind</th><td {left} colspan="3">{kind}</td></tr>')
    caption = f"<caption {left}>{html.escape(_headline(pair))}</caption>"
    return "\n".join(["<table>", caption, *lines, "</table>"])


def _headline(pair: Autoencoder) -> str:
    shapes = {"x": pair.x_shape, "z": pair.z_shape}
    sizes = [f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items()]
    count = sum(p.numel() for p in pair.parameters())
    trained = sum(p.numel() for p in pair.parameters() if p.requires_grad)
    some = "" if trained == count else f" ({trained:,} trained)"
    dtype = str(pair.dtype).removeprefix("torch.")
    place = "" if pair.device.type == "cpu" else f" on {pair.device}"
    return (
        f"{type(pair).__name__}: {' and '.join(sizes)}, {count:,} parameters{some}, {dtype}{place}"
    )


def _rows(pair: Autoencoder) -> list[tuple[str, str, str, str]]:
    """Return name, symbol, family of distributions and description of each part there is."""
    try:
        families = {name: _family(law) for name, law in _laws(pair).items()}
    except Exception:  # of parts that do not fit; a representation never raises
        families = {}
    return [
        (name, symbol, families.get(name, ""), _describe_part(part))
        for name, symbol in PARTS.items()
        if (part := getattr(pair, name, None)) is not None
    ]


def _laws(pair: Autoencoder) -> dict[str, Any]:
    dry = pair._dry_run()
    return {name: dry[name] for name in ("prior", "encoder", "decoder")}


def _kind(pair: Autoencoder) -> str:
    try:
        return f"{pair.kind.value}: {pair.kind.statement}"
    except Exception as error:  # of parts that do not fit, or hold NaN
        try:
            require_finite(pair)
        except ValueError as cause:
            return f"none, as {cause}"
        return f"none, as {error}"


def _family(distribution: Any) -> str:
    name = type(base_distribution(distribution)).__name__
    return f"masked {name}" if is_flat(distribution) else name


def _describe_part(part: nn.Module, width: int = WIDTH) -> str:
    """Return a module as the call that made it, without arguments that are at their default."""
    if not isinstance(part, Part) or not hasattr(part, "_arguments"):
        return type(part).__name__
    parameters = inspect.signature(type(part)).parameters
    arguments = []
    for name, value in part._arguments.items():
        default = parameters[name].default
        if default is inspect.Parameter.empty:
            arguments.append(_describe_value(value))
        elif not _same(value, default):
            arguments.append(f"{name}={_describe_value(value)}")
    text = " ".join(f"{type(part).__name__}({', '.join(arguments)})".split())
    return text if len(text) <= width else f"{text[: width - 2]}…)"


def _describe_value(value: Any) -> str:
    if isinstance(value, nn.Module):
        return _describe_part(value)
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, Tensor | nn.Module) or isinstance(default, Tensor | nn.Module):
        return value is default
    return bool(type(value) is type(default) and value == default)


def summarize(run: Run) -> str:
    """Return a run as a small table: its first, best and last epoch, and what they are about."""
    epochs = [int(epoch) for epoch in run.history["epoch"]]
    columns = {"first": 0}
    if run.best_epoch in epochs:
        columns["best"] = epochs.index(run.best_epoch)
    columns["last"] = len(epochs) - 1
    width = max(map(len, run.history))
    lines = [f"{run.objective} on a pair of kind {run.kind.value}: {run.kind.statement}"]
    lines.append(" " * width + "".join(f"{name:>12}" for name in columns))
    for name, values in run.history.items():
        cells = "".join(f"{values[i]:>12.6g}" for i in columns.values())
        lines.append(f"{name:{width}}{cells}")
    data = "validation data" if run.monitored == "val" else "training data"
    lines.append(
        f"losses and their terms in nats per datum, the terms on {data}; elbo bounds {run.bound_on}"
    )
    if run.best_epoch not in epochs:
        lines.append("the pair has its starting values, as no epoch counted")
    if run.stopped_early:
        lines.append("stopped early")
    steps = f"steps were eager: {run.eager_because}"
    if not run.eager_because:
        steps = f"of these {run.compile_seconds:.1f} s compiling the step"
    lines.append(f"{run.seconds:.1f} s; {steps}")
    return "\n".join(lines)
