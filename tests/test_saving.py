"""Saving and loading: exact, in this process and in a new one, and never half done."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import probae
from probae import Autoencoder
from probae.corruptions import encoder_input
from probae.files import sealed

from .conftest import CASES, Case, Z

FILES = {"pair.json", "pair.safetensors"}


def log_probs(pair: Autoencoder, x: Tensor) -> dict[str, Tensor]:
    """What the parts draw and say with the same noise; a difference in any setting shows here."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        encoder = pair.encoder(encoder_input(pair.corruption, x))
        z, own = pair.prior().sample((len(x),)), encoder.sample()
        found = {
            "prior": pair.prior().log_prob(z).expand(len(x)),
            "z": z,
            "encoder": encoder.log_prob(own),
            "code": own,
            "mean": encoder.mean,
            "decoder": pair.decoder(z).log_prob(x),
        }
        if pair.corruption is not None:
            noisy = pair.corruption(x)
            found["x_tilde"] = noisy.sample()
            found["corruption"] = noisy.log_prob(found["x_tilde"])
        if pair.factor is not None:
            found["factor"] = pair.factor(x, own).log_factor
    return {name: value.contiguous() for name, value in found.items()}


def assert_same(first: Autoencoder, second: Autoencoder, x: Tensor) -> None:
    assert type(first) is type(second)
    assert first.kind is second.kind
    assert (first.x_shape, first.z_shape) == (second.x_shape, second.z_shape)
    states = first.state_dict(), second.state_dict()
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        assert states[0][name].dtype == states[1][name].dtype
        assert torch.equal(states[0][name], states[1][name]), name
    values = log_probs(first, x), log_probs(second, x)
    for name in values[0]:
        assert torch.equal(values[0][name], values[1][name]), name


def trained(case: Case, dtype: torch.dtype = torch.float32) -> Autoencoder:
    pair = case.pair(dtype)
    probae.fit(pair, case.x(dtype), epochs=1, lr=0.05, progress=False)
    return pair


def test_saving_is_exact(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    pair, x = trained(case, dtype), case.x(dtype)
    before = copy.deepcopy(pair.state_dict())
    stream = torch.get_rng_state()
    folder = probae.save(pair, tmp_path / "new" / "folder")
    loaded = probae.load(folder)
    assert torch.equal(torch.get_rng_state(), stream)
    assert {file.name for file in folder.iterdir()} == FILES
    assert_same(pair, loaded, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())
    fresh = case.pair(dtype)
    assert probae.load(folder, pair=fresh) is fresh
    assert_same(pair, fresh, x)
    assert len(pyro.get_param_store()) == 0


def test_loaded_pair_trains_on_like_the_original(case: Case, tmp_path: Path) -> None:
    pair, x = trained(case), case.x()
    loaded = probae.load(probae.save(pair, tmp_path))
    shared = [[names for names in aliases(p)] for p in (pair, loaded)]
    assert shared[0] == shared[1]  # a tensor that two parts share is still one tensor
    for one in (pair, loaded):
        probae.fit(one, x, epochs=1, lr=0.05, progress=False)
    assert_same(pair, loaded, x)


def aliases(pair: Autoencoder) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in pair.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(groups.values())


READER = """
import sys, torch, safetensors.torch, probae
from tests.test_saving import log_probs
for folder in sys.argv[1:]:
    inputs = safetensors.torch.load_file(folder + "/inputs.safetensors")
    pair = probae.load(folder)
    found = {"state." + name: tensor.clone() for name, tensor in pair.state_dict().items()}
    found |= {name: tensor.clone() for name, tensor in log_probs(pair, inputs["x"]).items()}
    safetensors.torch.save_file(found, folder + "/outputs.safetensors")
"""


def test_a_new_process_reads_the_same_pairs(tmp_path: Path) -> None:
    pairs = {}
    for case in CASES:
        dtype = torch.float64 if len(pairs) % 2 else torch.float32
        pair, x = trained(case, dtype), case.x(dtype)
        folder = probae.save(pair, tmp_path / case.name)
        safetensors.torch.save_file({"x": x}, folder / "inputs.safetensors")
        pairs[folder] = (pair, x)
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", READER, *map(str, pairs)]
    subprocess.run(command, check=True, env=environment, cwd=root, timeout=300)
    for folder, (pair, x) in pairs.items():
        found = safetensors.torch.load_file(folder / "outputs.safetensors")
        state = {"state." + name: tensor for name, tensor in pair.state_dict().items()}
        values = log_probs(pair, x)
        assert found.keys() == state.keys() | values.keys()
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor), (folder.name, name)
        for name, tensor in values.items():  # threads and alignment move the last bits
            tolerance = 1e-5 if x.dtype == torch.float32 else 1e-13
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_pair_built_in_double_precision_is_rebuilt_exactly(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        prior = probae.LaplacePrior(Z, rate=3.0)
        pair = Autoencoder(
            prior,
            probae.GaussianEncoder(probae.MLP(9, (2, Z))),
            probae.GaussianDecoder(probae.MLP(Z, 9), scale=0.1),
            probae.GaussianNoise(0.1),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    loaded = probae.load(probae.save(pair, tmp_path))
    assert loaded.dtype == torch.float64
    assert_same(pair, loaded, torch.randn(7, 9, dtype=torch.float64))


def shared_encoder() -> Autoencoder:
    encoder = probae.GaussianEncoder(probae.MLP(9, (2, Z), (6,)))
    prior = probae.VampPrior(encoder, 9, components=5)
    return Autoencoder(prior, encoder, probae.BernoulliDecoder(probae.MLP(Z, 9)))


def shared_decoder() -> Autoencoder:
    decoder = probae.GaussianDecoder(probae.MLP(Z, 9), learn_scale=True)
    encoder = probae.LinearGaussianPosterior(decoder)
    return Autoencoder(probae.StandardNormalPrior(Z), encoder, decoder)


@pytest.mark.parametrize("build", [shared_encoder, shared_decoder])
def test_parts_that_are_shared_stay_shared(
    build: Callable[[], Autoencoder], tmp_path: Path
) -> None:
    pair, x = build(), torch.rand(7, 9).round()
    loaded = probae.load(probae.save(pair, tmp_path))
    assert aliases(loaded) == aliases(pair)
    assert any(len(names) > 1 for names in aliases(loaded))
    assert_same(pair, loaded, x)


def test_numpy_sizes_and_settings_are_plain_numbers(tmp_path: Path) -> None:
    options = {"scale": np.float32(0.25)}
    pair = probae.VAE(
        np.prod((3, 3)), np.int64(2), likelihood="gaussian", likelihood_options=options
    )
    loaded = probae.load(probae.save(pair, tmp_path))
    assert (loaded.x_shape, loaded.z_shape, loaded.decoder.scale.item()) == ((9,), (2,), 0.25)


def test_saving_again_replaces_the_pair(tmp_path: Path) -> None:
    probae.save(probae.VAE(8, 2), tmp_path)
    second = probae.PPCA(5, Z)
    probae.save(second, tmp_path)
    assert_same(second, probae.load(tmp_path), torch.randn(7, 5))


class Own(nn.Module):
    """An encoder that is not of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(9, 2 * Z)

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        loc, scale = self.network(x).chunk(2, -1)
        return torch.distributions.Independent(torch.distributions.Normal(loc, scale.exp()), 1)


def vae() -> Autoencoder:
    return probae.VAE(9, Z, hidden=(6,), prior="laplace")


def own_part() -> Autoencoder:
    return Autoencoder(
        probae.StandardNormalPrior(Z), Own(), probae.GaussianDecoder(nn.Linear(Z, 9))
    )


def replaced_part() -> Autoencoder:
    pair = vae()
    pair.encoder = probae.GaussianEncoder(probae.MLP(9, (2, Z), (5,)))
    return pair


def replaced_setting() -> Autoencoder:
    pair = vae()  # no tensor tells the two priors apart
    pair.prior = probae.LaplacePrior(Z, rate=5.0)
    return pair


def changed_setting() -> Autoencoder:
    pair = vae()
    pair.encoder.scale_min = 0.5
    return pair


def added_corruption() -> Autoencoder:
    pair = vae()
    pair.corruption = probae.GaussianNoise(0.2)
    return pair


@pytest.mark.parametrize(
    "build", [own_part, replaced_part, replaced_setting, changed_setting, added_corruption]
)
def test_what_a_recipe_cannot_say_is_loaded_into_a_pair(
    build: Callable[[], Autoencoder], tmp_path: Path
) -> None:
    pair, x = build(), torch.rand(7, 9).round()
    probae.save(pair, tmp_path)
    with pytest.raises(
        ValueError, match=r"build the same pair and pass it: probae.load\(path, pair"
    ):
        probae.load(tmp_path)
    assert_same(pair, probae.load(tmp_path, pair=build()), x)


def test_a_part_replaced_by_its_equal_needs_no_help(tmp_path: Path) -> None:
    pair = vae()
    pair.prior = probae.LaplacePrior(Z)
    assert_same(pair, probae.load(probae.save(pair, tmp_path)), torch.rand(7, 9).round())


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (lambda: probae.VAE(9, Z, hidden=(7,), prior="laplace"), r"must be \(7,\) torch.float32"),
        (lambda: probae.VAE(9, Z, hidden=(6, 6), prior="laplace"), r"got"),
        (
            lambda: probae.VAE(9, Z, hidden=(6,), prior="mixture"),
            r"prior.\w+ must be .* got absent",
        ),
        (lambda: probae.PPCA(9, Z), r"got"),
        (lambda: vae().double(), r"must be .* torch.float64, got .* torch.float32"),
    ],
    ids=["width", "depth", "prior", "preset", "dtype"],
)
def test_loading_into_another_pair_changes_nothing(
    other: Callable[[], Autoencoder], fault: str, tmp_path: Path
) -> None:
    probae.save(vae(), tmp_path)
    pair = other()
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(ValueError, match=rf"pair.safetensors does not fit the pair: .*{fault}"):
        probae.load(tmp_path, pair=pair)
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.99])
def test_truncated_tensors_are_refused(fraction: float, tmp_path: Path) -> None:
    file = probae.save(vae(), tmp_path) / "pair.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match=r"pair.safetensors is damaged: "):
        probae.load(tmp_path)


def rewrite(folder: Path, **changes: object) -> None:
    """Change a recipe as somebody would who knows of the checksum."""
    file = folder / "pair.json"
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | changes)))


VAE_RECIPE = {"class": "VAE", "arguments": {"x_dim": 9, "z_dim": 3, "hidden": [6]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "probae/0"}, "must have format 'probae/2', got 'probae/0'"),
        ({"format": None}, "must have format 'probae/2', got None"),
        ({"dtype": "int64"}, "dtype must be a floating dtype, got 'int64'"),
        ({"dtype": "nn"}, "dtype must be a floating dtype, got 'nn'"),
        ({"dtype": None}, "dtype must be a floating dtype, got None"),
        ({"dtype": "float64"}, r"must be \(\d+,?.*\) torch.float64, got .* torch.float32"),
        ({"pair": {"class": "Exec", "arguments": {}}}, "unknown class 'Exec'"),
        ({"pair": {"class": "os.system", "arguments": {}}}, "unknown class 'os.system'"),
        ({"pair": {"class": ["VAE"], "arguments": {}}}, "does not describe a pair"),
        ({"pair": {"class": "VAE", "arguments": []}}, "does not describe a pair"),
        ({"pair": {"class": "VAE"}}, "a part must have a class and arguments"),
        ({"pair": {"class": "VAE", "arguments": {"x_dim": -1, "z_dim": 2}}}, "x_dim"),
        ({"pair": {"class": "VAE", "arguments": {"x_dims": 9}}}, "x_dims"),
        ({"pair": {"class": "MLP", "arguments": {"in_shape": 2, "out_shape": 2}}}, "got MLP"),
        ({"pair": {"ref": 3}}, "does not describe a pair"),
        ({"pair": [VAE_RECIPE]}, "must describe an Autoencoder, got tuple"),
        ({"pair": 5}, "must describe an Autoencoder, got int"),
        (
            {"pair": {"class": "VAE", "arguments": VAE_RECIPE["arguments"] | {"z_dim": 4}}},
            "z_shape must",
        ),
        ({"pair": {"class": "PPCA", "arguments": {"x_dim": 9, "z_dim": 3}}}, "does not fit"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_recipes_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    probae.save(probae.VAE(9, 3, hidden=(6,)), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        probae.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "format 'probae/2', got 'list'"),
        (b"{}", "format 'probae/2', got None"),
    ],
)
def test_recipes_that_are_no_json_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (probae.save(vae(), tmp_path) / "pair.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        probae.load(tmp_path)


@pytest.mark.parametrize("missing", sorted(FILES))
def test_missing_files_are_named(missing: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no saved pair: pair.json"):
        probae.load(tmp_path / "nowhere")
    (probae.save(vae(), tmp_path) / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no saved pair: {missing} is missing"):
        probae.load(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "pair"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"path must be a folder, got the file"):
        probae.save(vae(), file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("broken", ["save_model", "os.replace"])
def test_a_save_that_fails_leaves_the_old_pair_whole(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = vae()
    probae.save(pair, tmp_path)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"probae.saving.{broken}", fail)
    with pytest.raises(OSError, match="disk full"):
        probae.save(probae.PPCA(5, 2), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert_same(pair, probae.load(tmp_path), torch.rand(7, 9).round())


def test_a_pair_that_cannot_be_saved_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pair must be a probae.Autoencoder, got Linear"):
        probae.save(nn.Linear(2, 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_pickled(tmp_path: Path) -> None:
    probae.save(vae(), tmp_path)
    recipe = json.loads((tmp_path / "pair.json").read_text())
    assert recipe["kind"] == "ELBO"
    assert recipe["x_shape"] == [9]
    header = (tmp_path / "pair.safetensors").read_bytes()[8:9]
    assert header == b"{"  # the safetensors header is JSON


def test_device_may_be_a_torch_device_and_must_hold_data(tmp_path: Path) -> None:
    probae.save(probae.VAE(6, 2), tmp_path)
    assert probae.load(tmp_path, device=torch.device("cpu")).device.type == "cpu"
    for device in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"device.*{device}"):
            probae.load(tmp_path, device=device)


def test_deeply_nested_recipe_is_refused(tmp_path: Path) -> None:
    probae.save(probae.VAE(6, 2), tmp_path)
    (tmp_path / "pair.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ValueError, match=r"pair\.json"):
        probae.load(tmp_path)
