"""Properties of public functions over whatever hypothesis thinks of, hostile values among it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import probae
from probae import files
from probae.batches import TrainingData

from .benchmarks import hostile_calls

# the same examples each time: a failure is one of the code, not of the day
settings.register_profile(
    "probae",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("probae")

# --- hostile calls --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return hostile_calls.calls(tmp_path_factory.mktemp("calls"))


def test_every_public_name_is_called_or_is_none_to_call(table: dict[str, Any]) -> None:
    assert not table.keys() & hostile_calls.NOT_CALLED
    missing = {*hostile_calls.public()} - table.keys()
    assert not missing, "give these a call in hostile_calls.calls, or name them in NOT_CALLED"


def test_every_call_works_as_it_is(table: dict[str, Any]) -> None:
    outcomes = {name: hostile_calls.call(name, table[name](), []) for name in table}
    assert {name: text for name, text in outcomes.items() if text != "a result"} == {}


PLACES = sorted(
    (name, argument)
    for name in hostile_calls.public()
    for argument in hostile_calls.parameters(name)
)


@settings(max_examples=150)
@given(place=st.sampled_from(PLACES), number=st.integers(0, 10**6))
def test_hostile_arguments_are_named(
    place: tuple[str, str],
    number: int,
    table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, argument = place
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(number)
    values = hostile_calls.pool(argument)
    value = values[number % len(values)]()
    outcome = hostile_calls.call(name, {**table[name](), argument: value}, [argument])
    assert not outcome.split(":")[0].isupper(), f"{outcome} of {hostile_calls.short(value)}"


# --- data -----------------------------------------------------------------------------------

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(),
    hnp.unicode_string_dtypes(max_len=3),
    hnp.datetime64_dtypes(),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
    )
)


@settings(max_examples=150)
@given(array=ARRAYS)
def test_as_tensor_keeps_the_values_or_says_what_is_wrong(array: np.ndarray) -> None:
    real = array.dtype.kind in "bf"
    if not real or array.size == 0 or array.ndim == 0 or not np.isfinite(array).all():
        with pytest.raises(ValueError, match="data"):
            probae.as_tensor(array, "data")
        return
    x = probae.as_tensor(array, "data")
    assert x.dtype == (torch.float64 if array.dtype.itemsize == 8 else torch.float32)
    assert tuple(x.shape) == array.shape
    assert np.array_equal(x.numpy(), array.astype(x.numpy().dtype))


@settings(max_examples=150)
@given(array=ARRAYS)
def test_a_file_says_what_its_array_says(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    outcomes: list[Any] = []
    for given_ in (array, tmp_path / "x.npy", tmp_path / "x.npz"):
        try:
            x = probae.as_tensor(given_)
            outcomes.append((x.dtype, tuple(x.shape), x.numpy().tobytes()))
        except ValueError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1] == outcomes[2]


@settings(max_examples=100)
@given(
    levels=st.integers(2, 300),
    data=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    seed=st.integers(-(2**40), 2**40),
)
def test_dequantized_levels_are_found_again(levels: int, data: list[float], seed: int) -> None:
    k = (torch.tensor(data, dtype=torch.float64) * (levels - 1)).round()
    y = probae.dequantize(k / (levels - 1), levels, seed=seed)
    assert torch.equal((y * levels).floor().clamp(max=levels - 1), k) or torch.allclose(
        y * levels, k.clamp(min=0), atol=1.0 + 1e-9
    )
    assert ((y >= k / levels) & (y < (k + 1) / levels)).all()


@settings(max_examples=60)
@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    start=st.integers(0, 5),
    ranks=st.integers(1, 3),
)
def test_the_steps_of_an_epoch_hold_every_datum_once(
    size: int, batch_size: int, start: int, ranks: int
) -> None:
    pair = probae.PPCA(2, 1)
    data = TrainingData(pair, torch.arange(2.0 * size).reshape(size, 2), "x", False)
    order = data.order()
    assert order is not None
    found = [
        source
        for rank in range(ranks)
        for source in data.sources(
            batch_size, order, 1, start, share=lambda places, rank=rank: places[rank::ranks]
        )
    ]
    expected = order[start * batch_size :]
    rows = torch.cat([*found, torch.empty(0, dtype=torch.int64)])
    assert sorted(rows.tolist()) == sorted(expected.tolist())


# --- files ----------------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FINITE | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=150)
@given(value=JSON, name=st.sampled_from(["a", "b"]), other=JSON)
def test_records_are_read_as_written_and_sealed(
    value: Any, name: str, other: Any, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    record = files.sealed({"a": value, "b": 1})
    files.write_bytes(file, json.dumps(record).encode())
    found = files.read_json(file)
    files.require_seal(found, file)
    assert json.dumps(found) == json.dumps(record)
    changed = found | {name: other}
    if json.dumps(changed) != json.dumps(found):
        with pytest.raises(ValueError, match="damaged"):
            files.require_seal(changed, file)


@settings(max_examples=120)
@given(
    content=st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE+-.aNI ').map(str.encode)
)
def test_arbitrary_bytes_are_refused_or_finite(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(content)
    try:
        json.dumps(files.read_json(file), allow_nan=False)
    except ValueError as error:
        named = str(file) in str(error)
        assert named
    with pytest.raises(ValueError, match=r"record\.json is damaged"):
        files.parse_tensors(content, file)


@settings(max_examples=40)
@given(
    x_dim=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    z_dim=st.integers(1, 4),
    hidden=st.lists(st.integers(1, 5), max_size=2),
    likelihood=st.sampled_from(sorted(set(probae.LIKELIHOODS) - {"categorical"})),
    prior=st.sampled_from(["normal", "laplace", "mixture", "vamp"]),
    activation=st.sampled_from(["relu", "tanh", "gelu"]),
)
def test_any_pair_is_loaded_as_it_was_saved(
    x_dim: list[int],
    z_dim: int,
    hidden: list[int],
    likelihood: str,
    prior: str,
    activation: str,
    tmp_path: Path,
) -> None:
    pair = probae.VAE(
        tuple(x_dim),
        z_dim,
        hidden=tuple(hidden),
        likelihood=likelihood,
        prior=prior,
        activation=activation,
    )
    loaded = probae.load(probae.save(pair, tmp_path / "pair"))
    assert repr(loaded) == repr(pair)
    state = loaded.state_dict()
    assert state.keys() == pair.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in pair.state_dict().items())


# --- numbers --------------------------------------------------------------------------------


@settings(max_examples=100)
@given(bits=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_codes_are_unpacked_as_they_were_packed(bits: np.ndarray) -> None:
    codes = torch.from_numpy(bits)
    packed = probae.pack_codes(codes)
    assert torch.equal(probae.unpack_codes(packed, codes.shape[1]).bool(), codes)
    distances = probae.hamming_distance(packed, packed)
    expected = (codes[:, None] != codes[None]).sum(-1)
    assert torch.equal(distances.long(), expected)


@settings(max_examples=100)
@given(
    z=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.sampled_from([0.0, 1.0, -2.0, 1e-40, -1e38]),
    )
)
def test_sparsity_counts_what_is_not_zero(z: np.ndarray) -> None:
    codes = torch.from_numpy(z)
    active = z != 0
    assert float(probae.l0_norm(codes)) == pytest.approx(active.sum(1).mean())
    assert np.allclose(probae.feature_density(codes).numpy(), active.mean(0))
    assert probae.dead_features(codes).tolist() == (~active.any(0)).tolist()


@settings(max_examples=60)
@given(
    in_shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    out_shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    batch=st.lists(st.integers(0, 2), max_size=2),
)
def test_networks_keep_the_batch(
    in_shape: list[int], out_shape: list[int], batch: list[int]
) -> None:
    network = probae.MLP(tuple(in_shape), tuple(out_shape), hidden=(3,))
    y = network(torch.rand(*batch, *in_shape))
    assert tuple(y.shape) == (*batch, *out_shape)
    assert torch.isfinite(y).all()


@settings(max_examples=80)
@given(
    logit=st.floats(-1e4, 1e4, width=32),
    x=st.floats(0, 1, width=32),
)
def test_log_densities_are_finite_at_every_logit(logit: float, x: float) -> None:
    for family in (probae.ContinuousBernoulli, probae.GreyBernoulli):
        log_prob = family(logits=torch.tensor(logit)).log_prob(torch.tensor(x))
        assert math.isfinite(float(log_prob)), family
