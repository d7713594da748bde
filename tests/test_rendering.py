"""A pair as a graph, as tables, and as its own representation."""

import html
import importlib
import importlib.util
import re
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from torch import Tensor, nn

import probae
from probae.autoencoder import frozen
from probae.rendering import _programs

from .conftest import CASES, Case, N, Z

EVERY = pytest.mark.parametrize("case", CASES, ids=repr)


def denoising() -> probae.DenoisingVAE:
    return probae.DenoisingVAE((1, 4, 3), 2, corruption=probae.GaussianNoise(0.3), hidden=(5,))


class Hierarchy(probae.VAE):
    """A pair with programs of its own: a code above the code, in the model and in the guide."""

    def model(self, x: Tensor) -> Tensor:
        self._enter(x)
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", self.prior())
            z = pyro.sample("z", pyro.distributions.Normal(top, 0.5).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)
        return z

    def guide(self, x: Tensor) -> Tensor:
        self._enter(x)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.encoder(x))
            return pyro.sample("top", pyro.distributions.Normal(z, 0.5).to_event(1))


# ---- render -------------------------------------------------------------------------------------


def test_text_of_a_pair_with_all_parts() -> None:
    torch.manual_seed(0)
    pair = probae.ContractiveAutoencoder(9, 3, penalty="noise")
    expected = """
model                                 guide
x_tilde ~ Normal (9) given x          x (9) observed
z ~ masked Normal (3)                 x_tilde ~ Normal (9) given x
x ~ Normal (9) given z, observed      z ~ Delta (3) given x_tilde
factor (0) given x, z                 plate data: 4
plate data: 4
"""
    found = probae.render(pair, torch.randn(4, 9), text=True)
    lines = [line.split() for line in expected.strip().splitlines()]
    assert [line.split() for line in found.splitlines()] == lines
    rows = found.splitlines()
    assert rows[0].index("guide") == rows[1].index("x (9)") == rows[2].index("x_tilde", 1)


def nodes(source: str) -> dict[str, str]:
    found = re.findall(r"^\s*(\w+) \[label=(.*?)\]$", source, flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def edges(source: str) -> set[tuple[str, str]]:
    return set(re.findall(r"(\w+) -> (\w+)", source))


def test_graph_of_a_pair_with_a_corruption() -> None:
    picture = probae.render(denoising(), torch.rand(7, 1, 4, 3).round())
    assert type(picture).__name__ == "Digraph"
    found = nodes(picture.source)
    assert set(found) == {
        *("model_x_tilde", "model_z", "model_x"),
        *("guide_x", "guide_x_tilde", "guide_z"),
    }
    assert found["model_x"].startswith('"x\nGreyBernoulli\n(1, 4, 3)"')
    assert found["guide_z"].startswith('"z\nNormal\n(2)"')
    observed = {name for name, text in found.items() if "fillcolor=lightgray" in text}
    assert observed == {"model_x", "guide_x"}
    assert not any("dashed" in text for text in found.values())
    assert edges(picture.source) == {
        ("model_z", "model_x"),
        ("model_x", "model_x_tilde"),
        ("guide_x", "guide_x_tilde"),
        ("guide_x_tilde", "guide_z"),
    }
    source = picture.source
    order = [source.index(f"subgraph cluster_{name} ") for name in ("model", "guide")]
    assert order == sorted(order)
    for name in ("model", "guide"):
        assert f"label={name}" in source
        inside = source.split(f"subgraph cluster_{name}_data {{")[1].split("}")[0]
        assert 'label="data: 7"' in inside
        assert set(nodes(inside)) == {node for node in found if node.startswith(name)}


def test_points_are_dashed_and_factors_are_boxes() -> None:
    torch.manual_seed(0)
    picture = probae.render(probae.ContractiveAutoencoder(9, 3))
    found = nodes(picture.source)
    assert "dashed" in found["guide_z"]
    assert "dashed" not in found["model_z"]
    assert "shape=box" in found["model_factor"]
    assert "fillcolor=white" in found["model_factor"]
    assert edges(picture.source) == {
        ("model_z", "model_x"),
        ("model_x", "model_factor"),
        ("model_z", "model_factor"),
        ("guide_x", "guide_z"),
    }


@EVERY
def test_every_pair_is_rendered_as_it_is_traced(case: Case) -> None:
    pair, x = case.pair(), case.x()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    stream = torch.get_rng_state()
    text, shapes = probae.render(pair, x, text=True), probae.trace_shapes(pair, x)
    assert set(nodes(probae.render(pair).source)) == set(nodes(probae.render(pair, x).source))
    programs = _programs(pair, x)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(before[name], t) for name, t in pair.state_dict().items())
    assert len(pyro.get_param_store()) == 0
    for name, sites in programs.items():
        trace = poutine.trace(getattr(pair, name)).get_trace(x)
        traced = {key for key, site in trace.nodes.items() if site["type"] == "sample"} - {"data"}
        assert {site.name for site in sites} == traced | {"x"}
        for site in sites:
            assert site.plates == (("data", N),)
            if site.family:
                assert site.event_shape == tuple(trace.nodes[site.name]["fn"].event_shape)
            # what a site depends on is drawn, or given, in the same program
            assert set(site.given) <= {other.name for other in sites} - {site.name}
        assert f"{name}" in text
        assert f"{name}\n" in shapes


@EVERY
def test_dependencies_are_those_that_pyro_sees(case: Case) -> None:
    # Pyro loses some on the way through layers that take tensors apart, and invents none
    pair, x = case.pair(), case.x()
    found = {site.name: set(site.given) for site in _programs(pair, x)["model"]}
    with frozen(pair, seed=0):
        seen = get_model_relations(pair.model, (x,))["sample_sample"]
    for name, given in seen.items():
        assert set(given) <= found[name]
    assert seen["x"] == ["z"]


def test_programs_of_a_users_own_are_followed_by_pyro() -> None:
    pair = Hierarchy(6, 2, hidden=(5,))
    source = probae.render(pair).source
    assert edges(source) == {
        ("model_top", "model_z"),
        ("model_z", "model_x"),
        ("guide_z", "guide_top"),
    }
    assert "top ~ Normal (2) given z" in probae.render(pair, text=True)


def test_nested_plates_are_nested_boxes() -> None:
    class Nested(probae.VAE):
        def model(self, x: Tensor) -> None:
            pyro.sample("shared", pyro.distributions.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", self.decoder(z), obs=x)
                with pyro.plate("views", 4, dim=-2):
                    pyro.sample("view", pyro.distributions.Normal(z[..., 0], 1.0))

    source = probae.render(Nested(6, 2, hidden=(5,))).source
    boxes = re.findall(r"subgraph cluster_model_(\w+) {", source)
    assert boxes == ["data", "data_views"]
    inner = source.split("subgraph cluster_model_data_views {")[1].split("}")[0]
    assert 'label="views: 4"' in inner
    assert set(nodes(inner)) == {"model_view"}
    assert ("model_z", "model_view") in edges(source)
    assert "model_shared" in nodes(source)


def test_without_graphviz_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "graphviz" else find(name)
    )
    pair = probae.VAE(5, 2)
    with pytest.raises(ImportError, match=r"pip install 'probae\[graphviz\]'.*text=True"):
        probae.render(pair)
    assert "x ~ GreyBernoulli (5) given z, observed" in probae.render(pair, text=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pair: probae.render(nn.Linear(2, 3)), r"pair must be a probae\.Autoencoder"),
        (lambda pair: probae.trace_shapes("pair"), r"pair must be a probae\.Autoencoder"),
        (lambda pair: probae.render(pair, torch.ones(3, 4)), r"x must have shape \(N, 5\)"),
        (lambda pair: probae.trace_shapes(pair, torch.ones(5)), r"x must have shape \(N, 5\)"),
        (lambda pair: probae.render(pair, 2 + torch.ones(3, 5)), "x must lie in the support"),
        (lambda pair: probae.render(pair, text="yes"), "text must be True or False, got 'yes'"),
    ],
)
def test_bad_input_is_refused(call: Callable[[probae.VAE], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(probae.VAE(5, 2))


# ---- trace shapes -------------------------------------------------------------------------------


def test_trace_shapes_are_those_of_pyro() -> None:
    pair, x = denoising(), torch.rand(7, 1, 4, 3).round()
    found = probae.trace_shapes(pair, x).splitlines()
    guide = found.index("guide")
    assert found[0] == "model"
    for name, lines in (("model", found[1:guide]), ("guide", found[guide + 1 :])):
        expected = poutine.trace(getattr(pair, name)).get_trace(x).format_shapes()
        rows = expected.splitlines()
        start = next(i for i, row in enumerate(rows) if row.strip() == "Sample Sites:")
        assert [row.split() for row in lines] == [row.split() for row in rows[start + 1 :]]
    assert "x_tilde dist 7 | 1 4 3" in [line.strip() for line in found]
    bars = {line.index("|") for line in found[1:guide]}
    assert len(bars) == 1


def test_trace_shapes_name_parameters_that_a_user_declares() -> None:
    class Scaled(probae.VAE):
        def guide(self, x: Tensor) -> Tensor:
            pyro.param("temperature", torch.ones(3))
            return super().guide(x)

    assert "temperature 3" in " ".join(probae.trace_shapes(Scaled(5, 2)).split())
    assert "temperature" not in pyro.get_param_store()


# ---- representations ----------------------------------------------------------------------------


@EVERY
def test_every_pair_represents_itself(case: Case) -> None:
    pair = case.pair()
    before = torch.get_rng_state()
    text = repr(pair)
    assert torch.equal(torch.get_rng_state(), before)
    lines = text.splitlines()
    count = sum(p.numel() for p in pair.parameters())
    shapes = f"x ({', '.join(map(str, case.x_shape))}) and z ({Z})"
    assert lines[0].startswith(f"{type(pair).__name__}: {shapes}, {count:,} parameters")
    names = ["prior", "encoder", "decoder", "corruption", "factor"]
    present = [name for name in names if getattr(pair, name) is not None]
    assert [line.split()[0] for line in lines[1 : 1 + len(present)]] == present
    for line, name in zip(lines[1:], present, strict=False):
        assert type(getattr(pair, name)).__name__ in line
    last = " ".join(" ".join(lines[1 + len(present) :]).split())
    assert last == f"kind {case.kind.value}: {case.kind.statement}"
    assert max(map(len, lines)) < 125
    assert len(lines) <= 8


def test_representation_in_full() -> None:
    pair = denoising()
    assert repr(pair).splitlines() == [
        "DenoisingVAE: x (1, 4, 3) and z (2), 176 parameters, float32",
        "  prior       p(z)          Normal         StandardNormalPrior(2)",
        "  encoder     q(z|x)        Normal         GaussianEncoder(MLP((1, 4, 3), (2, 2), "
        "hidden=(5,)))",
        "  decoder     p(x|z)        GreyBernoulli  BernoulliDecoder(MLP(2, (1, 4, 3), "
        "hidden=(5,)))",
        "  corruption  C(x_tilde|x)                 GaussianNoise(0.3)",
        "  kind        ELBO: -loss is a lower bound on log p(x), in expectation",
    ]


def test_representation_tells_of_fixed_parameters_and_dtype() -> None:
    pair = denoising().double()
    pair.encoder.requires_grad_(False)
    trained = sum(p.numel() for p in pair.decoder.parameters())
    assert f"176 parameters ({trained} trained), float64" in repr(pair).splitlines()[0]


def test_representation_of_modules_that_are_no_parts() -> None:
    class Custom(nn.Module):
        def forward(self, z: Tensor) -> torch.distributions.Distribution:
            normal = torch.distributions.Normal(z[..., :1].expand(*z.shape[:-1], 5), 1.0)
            return torch.distributions.Independent(normal, 1)

    pair = probae.Autoencoder(
        probae.LaplacePrior(2, rate=1 / 3),
        probae.GaussianEncoder(nn.Sequential(nn.Linear(5, 4), nn.Unflatten(-1, (2, 2)))),
        Custom(),
    )
    rows = {line.split()[0]: line for line in repr(pair).splitlines()[1:]}
    assert rows["prior"].endswith("LaplacePrior(2, rate=0.333333)")
    assert rows["encoder"].endswith("GaussianEncoder(Sequential)")
    assert rows["decoder"].split() == ["decoder", "p(x|z)", "Normal", "Custom"]


def test_representation_never_raises() -> None:
    pair = probae.VAE(5, 2)
    pair.encoder = probae.GaussianEncoder(probae.MLP(5, (2, 3)))
    assert "kind     none, as encoder(x) must return" in repr(pair)
    assert "GaussianEncoder(MLP(5, (2, 3)))" in repr(pair)
    assert "none, as encoder(x) must return" in pair._repr_html_()
    lost = probae.VAE(5, 2)
    with torch.no_grad():
        next(lost.parameters()).fill_(torch.nan)
    assert "kind     none, as pair has a parameter that is not finite, encoder" in repr(lost)
    unborn = probae.VAE.__new__(probae.VAE, 5, 2)
    assert repr(unborn) == "<VAE, not built>"
    assert "not built" in unborn._repr_html_()


def test_html_has_the_same_cells() -> None:
    pair = probae.SemanticHashing(6, 3, posterior="threshold", hidden=(5,))
    table = pair._repr_html_()
    assert "<=" not in table  # of the statement: escaped
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table)]
    caption = re.findall(r"<caption[^>]*>(.*?)</caption>", table)
    assert caption == [repr(pair).splitlines()[0]]
    words = " ".join(repr(pair).splitlines()[1:]).split()
    assert " ".join(cells).split() == words
    assert table.count("<tr>") == table.count("</tr>") == 4


# ---- summary of a run ---------------------------------------------------------------------------


def test_summary_has_the_first_the_best_and_the_last_epoch() -> None:
    x = torch.rand(64, 5).round()
    pair = probae.VAE(5, 2, hidden=(5,))
    run = probae.fit(pair, x, x, epochs=4, progress=False)
    run = run._replace(best_epoch=3)
    lines = run.summary().splitlines()
    assert lines[0] == f"ELBO on a pair of kind ELBO: {run.kind.statement}"
    assert lines[1].split() == ["first", "best", "last"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:-2]}
    assert list(rows) == list(run.history)
    for name, cells in rows.items():
        values = [run.history[name][epoch - 1] for epoch in (1, 3, 4)]
        assert [float(cell) for cell in cells] == pytest.approx(values, rel=1e-5, abs=1e-12)
    assert "nats per datum" in lines[-2]
    assert "on validation data; elbo bounds log p(x)" in lines[-2]
    assert lines[-1] == f"{run.seconds:.1f} s; steps were eager: the run is too short"
    run = run._replace(eager_because="", compile_seconds=2.0, seconds=4.0)
    assert run.summary().endswith("4.0 s; of these 2.0 s compiling the step")


def test_summary_of_what_bounds_nothing() -> None:
    pair = probae.UndercompleteAutoencoder(5, 2)
    run = probae.fit(pair, torch.randn(64, 5), epochs=2, progress=False)
    text = run.summary()
    assert f"of kind RECONSTRUCTION: {run.kind.statement}" in text
    assert "on training data; elbo bounds nothing" in text
    text = run._replace(best_epoch=0, stopped_early=True).summary()
    assert text.splitlines()[1].split() == ["first", "last"]
    assert "starting values" in text
    assert text.splitlines()[-2] == "stopped early"
