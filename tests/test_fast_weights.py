"""The fast path to importance weights gives what Pyro's programs give, draw for draw."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import probae
from probae import fast_weights as module
from probae.autoencoder import frozen
from probae.fast_weights import LEAST, as_normal, fast_weights, log_of_product_, raw_noise
from probae.graphs import compiled
from probae.importance import plain_weights

X = (1, 5, 7)


def binary(n: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(n, *X, generator=torch.Generator().manual_seed(3)) > 0.4).to(dtype)


def vae(**options: object) -> probae.VAE:
    torch.manual_seed(0)
    pair = probae.VAE(X, 3, **{"hidden": (6, 5), "activation": "tanh", **options})
    with torch.no_grad():
        for parameter in pair.decoder.parameters():
            parameter.mul_(4)  # logits of either sign, some of them large
    return pair


PAIRS: dict[str, Callable[[], probae.Autoencoder]] = {
    "tanh": vae,
    "relu": lambda: vae(activation="relu"),
    "sigmoid": lambda: vae(activation="sigmoid"),
    "affine": lambda: vae(hidden=()),
}


@pytest.fixture
def noise_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fast path draw as Pyro does, in float32, too."""

    def raw_noise(count: int, loc: Tensor) -> Tensor:
        return torch.randn(count, *loc.shape, dtype=loc.dtype)

    monkeypatch.setattr(module, "raw_noise", raw_noise)


@pytest.mark.parametrize("size", [1, 2, 15, 2_000_000])
def test_noise_is_normal(size: int) -> None:
    loc = torch.zeros(size)
    torch.manual_seed(0)
    first, second = (as_normal(raw_noise(1, loc), 1, loc).double() for _ in range(2))
    assert first.shape == (1, size)
    assert not torch.equal(first, second)
    if size > 1000:  # failure rates of 1e-4 each
        assert stats.kstest(first[0].numpy(), "norm").pvalue > 1e-4
        counts = torch.histc(torch.special.ndtr(first), 500, 0, 1).numpy()
        assert stats.chisquare(counts).pvalue > 1e-4
        half = size // 2  # the two of a pair, neighbours, and draws one after the other
        for a, b in ((first[:, :half], first[:, half:]), (first[:, 1:], first[:, :-1])):
            assert abs(float((a * b).mean())) * a.numel() ** 0.5 < 3.9
        assert abs(float((first * second).mean())) * size**0.5 < 3.9
        assert 4.8 < first.abs().max() < 5.9  # of 2e6 draws: 1e-4 each way


def test_noise_has_the_dtype_of_the_pair() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        pair, x = vae().float(), binary(4, torch.float32)
        values = probae.log_likelihood(pair, x, "iwae", 50).values
        loc = torch.zeros(2, dtype=torch.float32)
        assert as_normal(raw_noise(3, loc), 3, loc).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.isfinite().all()


def test_words_are_those_of_splitmix64() -> None:
    # as its authors' C code gives for this seed
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    seed = 1234567 * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64
    words = module.random_words(torch.tensor([seed - (seed >> 63 << 64)]), 5)
    assert [word % 2**64 for word in words.tolist()] == expected


@pytest.mark.parametrize("number", [1, 15, 16, 17, 1000, 4099])
def test_words_in_machine_code_are_the_same(number: int) -> None:
    run = compiled(lambda seed: [module.random_words(seed, number)], [torch.tensor([5])])
    for seed in (5, 0, -1, 2**63 - 1, -(2**63)):
        words = module.random_words(torch.tensor([seed]), number)
        assert torch.equal(run(torch.tensor([seed]))[0], words)


def test_noise_of_all_bits_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([0, -1, 2**63 - 1, -(2**63)], dtype=torch.int64)
    monkeypatch.setattr(module, "random_words", lambda seed, number: words)
    normal = as_normal(torch.zeros(1, dtype=torch.int64), 1, torch.zeros(8))
    assert normal.isfinite().all()
    assert normal.abs().max() < 5.8


def test_noise_in_float64_is_that_of_torch() -> None:
    loc = torch.zeros(3, 2, dtype=torch.float64)
    torch.manual_seed(1)
    ours = as_normal(raw_noise(4, loc), 4, loc)
    torch.manual_seed(1)
    assert torch.equal(ours, torch.randn(4, 3, 2, dtype=torch.float64))


@pytest.mark.usefixtures("noise_of_torch")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_paths_give_the_same_weights(name: str, dtype: torch.dtype) -> None:
    pair, x = PAIRS[name]().to(dtype), binary(4, dtype)
    fast = fast_weights(pair, None)
    assert fast is not None
    plain = plain_weights(pair, "iwae", None)
    # torch's softplus is the identity beyond 20, which loses up to 2e-9 a pixel
    tolerance = 1e-7 if dtype == torch.float64 else 1e-3
    with frozen(pair, seed=1):
        draw = fast(x)
        ours = [draw(count) for count in (9, 2, 9)]  # buffers are used again
    with frozen(pair, seed=1):
        draw = plain(x)
        theirs = [draw(count) for count in (9, 2, 9)]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < tolerance  # of some hundred nats


def test_a_proposal_takes_the_place_of_the_encoder() -> None:
    pair, x = vae().double(), binary(4, torch.float64)
    proposal = probae.GaussianEncoder(probae.MLP(X, (2, 3))).double()
    fast, plain = fast_weights(pair, proposal), plain_weights(pair, "iwae", proposal)
    assert fast is not None
    with frozen(pair, seed=1):
        ours = fast(x)(5)
    with frozen(pair, seed=1):
        assert torch.allclose(ours, plain(x)(5), atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 31, 32, 33, 784, 1000])
def test_products_of_sigmoids_own_up_to_lost_digits(width: int) -> None:
    lost = 0
    for scale in (0.0, 1e-3, 1.0, 3.0, 30.0, 1e4):
        s = scale * torch.randn(6, width, generator=torch.Generator().manual_seed(0))
        exact = nn.functional.logsigmoid(s.double()).sum(-1)
        total, is_lost = log_of_product_(s.sigmoid())
        if is_lost is None:
            is_lost = torch.zeros(6, dtype=torch.bool)
        error = (total.double() - exact).abs()
        # 2e-7 a factor, and a few roundings of the sum
        assert (is_lost | (error <= 3e-7 * width + 5e-7 * exact.abs())).all(), (width, scale, error)
        assert not is_lost[exact > math.log(LEAST)].any()  # no product of some is below that of all
        lost += int(is_lost.sum())
    assert lost > 0


@pytest.mark.usefixtures("noise_of_torch")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hopeless_codes_get_their_weights_too(dtype: torch.dtype) -> None:
    pair, x = vae().to(dtype), binary(4, dtype)
    with torch.no_grad():
        pair.decoder.network.output.weight.mul_(300)  # pixels of probability e**-400 and less
        pair.encoder.network.output.bias.add_(3)
    fast = fast_weights(pair, None)
    assert fast is not None
    with frozen(pair, seed=1):
        ours = fast(x)(50)
    with frozen(pair, seed=1):
        theirs = plain_weights(pair, "iwae", None)(x)(50)
    assert theirs.min() < -1e3
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_the_fast_path_is_reproducible() -> None:
    pair, x = vae(), binary(70, torch.float32)
    ll = probae.log_likelihood(pair, x, "iwae", 3000, seed=1)
    again = probae.log_likelihood(pair, x, "iwae", 3000, seed=1)
    assert torch.equal(ll.values, again.values)
    assert ll.values.isfinite().all()


def test_log_likelihood_takes_the_fast_path_and_gives_the_plain_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, x = vae().double(), binary(9, torch.float64)
    seen = []
    monkeypatch.setattr(
        "probae.likelihood.fast_weights",
        lambda *arguments: seen.append(1) or fast_weights(*arguments),
    )
    fast = {m: probae.log_likelihood(pair, x, m, 200) for m in ("elbo", "iwae")}
    assert len(seen) == 2
    monkeypatch.setattr("probae.likelihood.fast_weights", lambda *arguments: None)
    for method, ll in fast.items():
        plain = probae.log_likelihood(pair, x, method, 200)
        for a, b in zip(ll[:4], plain[:4], strict=True):
            assert torch.allclose(a, b, atol=1e-9, equal_nan=True)


class OwnModel(probae.VAE):
    def model(self, x: Tensor) -> Tensor:
        return super().model(x)


class OwnDecoder(probae.BernoulliDecoder):
    pass


class OwnEncoder(probae.GaussianEncoder):
    pass


def with_hook() -> probae.Autoencoder:
    pair = vae()
    pair.decoder.network.layers[0].register_forward_hook(lambda m, i, o: o * 2)
    return pair


def without_bias() -> probae.Autoencoder:
    pair = vae()
    pair.decoder.network.output.bias = None
    return pair


def squashed() -> probae.Autoencoder:
    pair = vae()
    pair.decoder = probae.BernoulliDecoder(probae.MLP(3, X, (6,), out_activation="tanh"))
    return pair


OTHERS: dict[str, Callable[[], probae.Autoencoder]] = {
    "a program of its own": lambda: OwnModel(X, 3),
    "a decoder of its own": lambda: probae.Autoencoder(
        probae.StandardNormalPrior(3),
        probae.GaussianEncoder(probae.MLP(X, (2, 3))),
        OwnDecoder(probae.MLP(3, X)),
    ),
    "an encoder of its own": lambda: probae.Autoencoder(
        probae.StandardNormalPrior(3),
        OwnEncoder(probae.MLP(X, (2, 3))),
        probae.BernoulliDecoder(probae.MLP(3, X)),
    ),
    "a corruption": lambda: probae.DenoisingVAE(X, 3, corruption=probae.BitFlip(0.1)),
    "a factor": lambda: probae.ContractiveAutoencoder(X, 3, likelihood="bernoulli"),
    "another likelihood": lambda: vae(likelihood="continuous-bernoulli"),
    "another activation": lambda: vae(activation="elu"),
    "convolutions": lambda: probae.Autoencoder(
        probae.StandardNormalPrior(3),
        probae.GaussianEncoder(probae.MLP((1, 8, 8), (2, 3))),
        probae.BernoulliDecoder(probae.DeconvNet(3, (1, 8, 8), (4,))),
    ),
    "unit norm": lambda: probae.Autoencoder(
        probae.StandardNormalPrior(3),
        probae.GaussianEncoder(probae.MLP(X, (2, 3))),
        probae.BernoulliDecoder(probae.MLP(3, X, unit_norm=True)),
    ),
    "mixture prior": lambda: vae(prior=probae.GaussianMixturePrior(3, 4)),
    "flat prior": lambda: vae(prior=probae.FlatPrior(3)),
    "bits": lambda: probae.Autoencoder(
        probae.BernoulliPrior(4),
        probae.BernoulliEncoder(probae.MLP(X, 4)),
        probae.BernoulliDecoder(probae.MLP(4, X, (6,), activation="relu")),
    ),
    "squashed logits": squashed,
    "a hook": with_hook,
    "no bias": without_bias,
    "half precision": lambda: vae().bfloat16(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_pairs_take_the_plain_path(name: str) -> None:
    assert fast_weights(OTHERS[name](), None) is None


def test_the_whole_pair_is_left_as_it_was() -> None:
    pair = vae().train()
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    probae.log_likelihood(pair, binary(3, torch.float32), "iwae", 40)
    assert pair.training
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert set(module._IN_PLACE) == {nn.Tanh, nn.Sigmoid, nn.ReLU}


def test_autocast_takes_the_plain_path() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast_weights(vae(), None) is None
