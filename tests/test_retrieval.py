"""Bits of a pair, their packing and their distances, against NumPy and against counting by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import probae
from probae import MLP, Autoencoder, binary_codes, hamming_distance, pack_codes, retrieval
from probae import unpack_codes as unpack

X, K, N = 9, 5, 7


def data(n: int = N) -> Tensor:
    return torch.rand(n, X).round()


def pair_of(encoder: nn.Module, prior: nn.Module | None = None) -> Autoencoder:
    decoder = probae.BernoulliDecoder(MLP(K, X))
    return Autoencoder(prior or probae.FlatPrior(K), encoder, decoder)


def random_bits(n: int, k: int) -> Tensor:
    return torch.rand(n, k) < 0.5


# the bits of a pair


@pytest.mark.parametrize("name", ["noisy", "threshold", "bernoulli", "probit", "sigmoid point"])
def test_bits_are_the_signs_of_the_pre_activations(name: str, dtype: torch.dtype) -> None:
    network, bits = MLP(X, K, (6,)), probae.BernoulliPrior(K)
    if name == "noisy":
        pair = pair_of(probae.NoisySigmoidEncoder(network))
    elif name == "threshold":
        pair = pair_of(probae.ThresholdEncoder(network), bits)
    elif name == "bernoulli":
        pair = pair_of(probae.BernoulliEncoder(network), bits)
    elif name == "probit":
        pair = pair_of(probae.ProbitEncoder(network), bits)
    else:
        pair = pair_of(probae.PointEncoder(nn.Sequential(network, nn.Sigmoid())))
    pair, x = pair.to(dtype), data(50)
    before = copy.deepcopy(pair.state_dict())
    stream = torch.get_rng_state()
    codes = binary_codes(pair, x)
    assert (codes.shape, codes.dtype) == ((50, K), torch.bool)
    assert torch.equal(codes, network(x.to(dtype)) > 0)
    assert not codes.requires_grad
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(t, before[n]) for n, t in pair.state_dict().items())


def test_many_data_are_encoded_in_blocks() -> None:
    network = MLP(X, K)
    sizes: list[int] = []
    network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    pair = pair_of(probae.NoisySigmoidEncoder(network))
    x = torch.rand(20_000, X)
    sizes.clear()
    codes = binary_codes(pair, x.numpy())
    assert max(sizes) < 10_000
    with torch.no_grad():
        assert torch.equal(codes, network(x) > 0)


def test_bits_without_a_mean_in_closed_form() -> None:
    class Relaxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = MLP(X, K)

        def forward(self, x: Tensor) -> Any:
            temperature = torch.tensor(0.1)
            relaxed = torch.distributions.RelaxedBernoulli(temperature, logits=self.network(x))
            return torch.distributions.Independent(relaxed, 1)

    pair, x = pair_of(Relaxed()), data(50)
    with torch.no_grad():
        pair.encoder.network.output.weight.mul_(10)
        a = pair.encoder.network(x)
    codes = binary_codes(pair, x)
    sure = a.abs() > 2  # 100 draws, each right with probability 0.88
    assert sure.float().mean() > 0.5
    assert torch.equal(codes[sure], (a > 0)[sure])
    assert torch.equal(codes, binary_codes(pair, x))


def test_bits_of_a_denoiser_are_those_of_clean_data() -> None:
    network = MLP((2, X), K)
    pair = Autoencoder(
        probae.FlatPrior(K),
        probae.NoisySigmoidEncoder(network),
        probae.BernoulliDecoder(MLP(K, X)),
        probae.Masking(0.2, known=True),
    )
    x = data()
    seen = torch.stack([x, torch.ones_like(x)], 1)  # nothing is missing
    with torch.no_grad():
        assert torch.equal(binary_codes(pair, x), network(seen) > 0)


def test_codes_outside_the_unit_interval_have_no_bits() -> None:
    tanh = nn.Sequential(MLP(X, K), nn.Tanh())
    for pair, support in [
        (probae.VAE(X, K), "Real"),
        (pair_of(probae.PointEncoder(tanh)), "Real"),
        (pair_of(probae.CategoricalEncoder(MLP(X, K)), probae.CategoricalPrior(K)), "OneHot"),
    ]:
        with pytest.raises(ValueError, match=rf"pair must have codes in \[0, 1\], got.*{support}"):
            binary_codes(pair, data())


def test_bits_of_bad_data() -> None:
    pair = pair_of(probae.NoisySigmoidEncoder(MLP(X, K)))
    with pytest.raises(ValueError, match=r"x must have shape \(N, 9\), got \(7, 8\)"):
        binary_codes(pair, torch.rand(N, 8))
    with pytest.raises(ValueError, match="x must lie in the support of the decoder"):
        binary_codes(pair, torch.full((N, X), 2.0))
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder, got MLP"):
        binary_codes(MLP(X, K), data())


# packing


@pytest.mark.parametrize("k", [*range(1, 18), 63, 64, 65, 128])
def test_packing_is_numpys_and_can_be_undone(k: int) -> None:
    bits = random_bits(20, k)
    packed = pack_codes(bits)
    assert (packed.shape, packed.dtype) == ((20, -(-k // 8)), torch.uint8)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy(), axis=-1))
    assert torch.equal(unpack(packed, k), bits)
    extremes = torch.stack([torch.zeros(k), torch.ones(k)]).bool()
    assert torch.equal(unpack(pack_codes(extremes), k), extremes)


def test_bits_may_be_of_any_type() -> None:
    bits = random_bits(20, 11)
    packed = pack_codes(bits)
    for form in (bits.float(), bits.double(), bits.to(torch.uint8), bits.long(), bits.numpy()):
        assert torch.equal(pack_codes(form), packed)
    assert torch.equal(unpack(packed.numpy(), 11), bits)
    assert torch.equal(pack_codes(bits.T.contiguous().T), packed)  # strides do not matter
    assert pack_codes(bits[:0]).shape == (0, 2)
    assert unpack(packed[:0], 11).shape == (0, 11)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (torch.rand(3, 8), "bits must be 0 or 1"),
        (torch.full((3, 8), -1), "bits must be 0 or 1"),
        (torch.full((3, 8), float("nan")), "bits must be 0 or 1"),
        (torch.zeros(8), r"bits must have shape \(N, columns\).*got \(8,\)"),
        (torch.zeros(3, 0), r"bits must have shape \(N, columns\) with at least one"),
        ("0101", "bits must be a tensor or array of shape .*, got str"),
        (None, "bits must be a tensor or array of shape .*, got NoneType"),
    ],
)
def test_bad_bits(bits: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_codes(bits)


@pytest.mark.parametrize(
    ("packed", "z_dim", "message"),
    [
        (torch.zeros(3, 2), 9, r"packed must be codes packed into uint8, got torch\.float32"),
        (torch.zeros(3, 2).bool(), 9, r"packed must be codes packed into uint8, got torch\.bool"),
        (torch.zeros(3, 2).byte(), 8, r"packed must have shape \(N, 1\) .* z_dim=8 .*got \(3, 2\)"),
        (torch.zeros(3, 2).byte(), 17, r"packed must have shape \(N, 3\) .* z_dim=17"),
        (torch.full((3, 2), 1).byte(), 15, "packed has bits set beyond the first z_dim=15"),
        (torch.zeros(2).byte(), 9, r"packed must have shape \(N, columns\).*got \(2,\)"),
        (torch.zeros(3, 2).byte(), 0, "z_dim must be an int >= 1, got 0"),
        (torch.zeros(3, 2).byte(), 9.0, r"z_dim must be an int >= 1, got 9\.0"),
    ],
)
def test_bad_packed_codes(packed: Tensor, z_dim: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(packed, z_dim)


# distances


@pytest.mark.parametrize("k", [1, 7, 8, 9, 64, 100, 300])
def test_hamming_distance_counts_differing_bits(k: int) -> None:
    a, b = random_bits(13, k), random_bits(11, k)
    distance = hamming_distance(pack_codes(a), pack_codes(b).numpy())
    assert (distance.shape, distance.dtype) == ((13, 11), torch.int32)
    assert torch.equal(distance, (a[:, None] != b).sum(-1).int())
    opposite = hamming_distance(pack_codes(a), pack_codes(~a))
    assert (opposite.diagonal() == k).all()


def test_every_byte_is_counted() -> None:
    byte = torch.arange(256).byte()[:, None]
    expected = torch.tensor([[(i ^ j).bit_count() for j in range(256)] for i in range(256)])
    assert torch.equal(hamming_distance(byte, byte), expected.int())


@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_blocks_do_not_change_distances(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pack_codes(random_bits(13, 20)), pack_codes(random_bits(11, 20))
    expected = hamming_distance(a, b)
    monkeypatch.setattr(retrieval, "BLOCK", block)
    assert torch.equal(hamming_distance(a, b), expected)
    assert hamming_distance(a[:0], b).shape == (0, 11)
    assert hamming_distance(a, b[:0]).shape == (13, 0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3, 2).byte(), torch.zeros(4, 3).byte(), "b must have .* bytes as a, 2, got 3"),
        (torch.zeros(3, 2), torch.zeros(4, 2).byte(), "a must be codes packed into uint8"),
        (torch.zeros(3, 2).byte(), torch.zeros(4, 2).bool(), "b must be codes packed into uint8"),
        (torch.zeros(2).byte(), torch.zeros(4, 2).byte(), r"a must have shape .*got \(2,\)"),
        (
            torch.zeros(3, 2).byte(),
            torch.zeros(4, 2, device="meta").byte(),
            "b must be on the device of a, cpu, got meta",
        ),
    ],
)
def test_bad_codes(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hamming_distance(a, b)


def test_neighbours_of_a_trained_code_share_its_label() -> None:
    digits = probae.load_dataset("digits")
    x, labels = digits.train.round(), digits.labels.train
    torch.manual_seed(0)
    pair = Autoencoder(
        probae.FlatPrior(24),
        probae.NoisySigmoidEncoder(MLP((1, 8, 8), 24, (64,))),
        probae.BernoulliDecoder(MLP(24, (1, 8, 8), (64,))),
    )
    pair.initialize(x)
    precision = []
    for epochs in (0, 20):
        if epochs:
            probae.fit(pair, x, epochs=epochs, lr=3e-3, progress=False)
        codes = pack_codes(binary_codes(pair, x))
        distance = hamming_distance(codes, codes).fill_diagonal_(25)
        nearest = distance.topk(10, largest=False).indices  # (N, 10)
        precision.append((labels[nearest] == labels[:, None]).float().mean().item())
    assert precision[1] > precision[0] + 0.2  # 0.3 or more with four other seeds
    assert precision[1] > 0.6
