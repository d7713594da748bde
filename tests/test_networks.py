"""Networks: shapes, batch dimensions, starting values, biases."""

import pytest
import torch
from torch import Tensor, nn

from probae import MLP, ConvNet, DeconvNet
from probae.networks import ACTIVATIONS, network_from_code, network_to_code


@pytest.mark.parametrize("batch", [(), (5,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("in_shape", [6, (6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("out_shape", [4, (4,), (2, 3)])
@pytest.mark.parametrize("hidden", [(), 7, (7, 8)])
def test_mlp_maps_shapes(
    batch: tuple[int, ...],
    in_shape: int | tuple[int, ...],
    out_shape: int | tuple[int, ...],
    hidden: int | tuple[int, ...],
) -> None:
    network = MLP(in_shape, out_shape, hidden)
    x = torch.randn(*batch, *network.in_shape)
    assert network(x).shape == (*batch, *network.out_shape)


def test_mlp_is_the_written_formula() -> None:
    network = MLP((2, 3), (2, 2), hidden=(5,), activation="tanh").double()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    first, _, last = network.layers
    hidden = torch.tanh(x.flatten(1) @ first.weight.T + first.bias)
    expected = (hidden @ last.weight.T + last.bias).reshape(7, 2, 2)
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-14)
    assert network.output is last


def test_affine_mlp_says_so() -> None:
    network = MLP(3, (2, 2)).double()
    weight, bias = network.affine()
    z = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(network(z).flatten(1), z @ weight.T + bias, rtol=0, atol=1e-14)
    assert MLP(3, 4, hidden=(5,)).affine() is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_name_gives_that_activation(name: str) -> None:
    network = MLP(3, 2, hidden=(4, 4), activation=name)
    assert sum(type(layer) is ACTIVATIONS[name] for layer in network.layers) == 2
    assert network(torch.randn(5, 3)).isfinite().all()


@pytest.mark.parametrize(
    "network",
    [
        MLP(30, 20, hidden=(10,)),
        ConvNet((3, 8, 8), 5, channels=(4, 6), hidden=(7,)),
        DeconvNet(5, (2, 8, 8), channels=(6, 4), hidden=(7,)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_weights_start_glorot_and_biases_at_zero(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            bound = (6 / sum(fan)) ** 0.5
            assert 0.5 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()


@pytest.mark.parametrize("image", [(1, 28, 28), (2, 5, 6), (3, 7, 1), (1, 1, 1)])
@pytest.mark.parametrize("channels", [4, (4,), (4, 3), (4, 3, 2)])
@pytest.mark.parametrize("hidden", [(), (6,)])
def test_convolutions_meet_any_image_size(
    image: tuple[int, int, int], channels: int | tuple[int, ...], hidden: tuple[int, ...]
) -> None:
    for batch in ((), (5,), (4, 5)):
        x = torch.randn(*batch, *image)
        code = ConvNet(image, (2, 3), channels, hidden)(x)
        assert code.shape == (*batch, 2, 3)
        for out_shape in (image, (2, *image)):
            decoded = DeconvNet((2, 3), out_shape, channels, hidden)(code)
            assert decoded.shape == (*batch, *out_shape)


@pytest.mark.parametrize("make", [ConvNet, DeconvNet])
def test_leading_dimensions_of_convolutions_are_independent(make: type) -> None:
    image, code = (2, 5, 6), (3,)
    shapes = (image, code) if make is ConvNet else (code, image)
    network = make(*shapes, (4, 3), (6,)).double()
    x = torch.randn(2, 7, *shapes[0], dtype=torch.float64)
    expected = torch.stack([torch.stack([network(datum) for datum in row]) for row in x])
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("out_shape", [(4,), (2, 3)])
def test_set_bias_is_the_output_where_weights_are_zero(out_shape: tuple[int, ...]) -> None:
    network, value = MLP(3, out_shape, hidden=(5,)), torch.randn(out_shape)
    nn.init.zeros_(network.output.weight)
    network.set_bias(value)
    assert torch.equal(network(torch.randn(7, 3)), value.expand(7, *out_shape))


def test_set_bias_of_a_deconvolution_is_a_mean_over_each_channel() -> None:
    network, value = DeconvNet(3, (2, 4, 5, 6), channels=(4,)), torch.randn(2, 4, 5, 6)
    nn.init.zeros_(network.convolutions[-1].weight)
    network.set_bias(value)
    expected = value.mean((-1, -2), keepdim=True).expand(7, 2, 4, 5, 6)
    torch.testing.assert_close(network(torch.randn(7, 3)), expected)


def test_decoder_networks_mirror_encoder_networks() -> None:
    to_code = network_to_code((1, 8, 8), (2, 3), (20, 10), (4, 6), "relu")
    from_code = network_from_code(3, (1, 8, 8), (20, 10), (4, 6), "relu")
    assert widths(to_code) == [(1, 4), (4, 6), (24, 20), (20, 10), (10, 6)]
    assert widths(from_code) == [(3, 10), (10, 20), (20, 24), (6, 4), (4, 1)]
    assert isinstance(network_to_code((1, 8, 8), (3,), (20,), (), "relu"), MLP)
    assert widths(network_from_code(3, (1, 8, 8), 20, (), "relu")) == [(3, 20), (20, 64)]


def widths(network: nn.Module) -> list[tuple[int, int]]:
    found = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            found.append((layer.in_features, layer.out_features))
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            found.append((layer.in_channels, layer.out_channels))
    return found


def test_networks_follow_the_dtype() -> None:
    x: Tensor = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    code = ConvNet((1, 8, 8), 3, (4,)).double()(x)
    assert code.dtype == torch.float64
    assert DeconvNet(3, (1, 8, 8), (4,)).double()(code).dtype == torch.float64
