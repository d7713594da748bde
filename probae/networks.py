"""Deterministic networks that parts are built on: multilayer perceptrons and convolutions.

A network maps a tensor of shape (..., *in_shape) to one of shape (..., *out_shape), for any number
of leading batch dimensions, so that it works inside any nesting of Pyro plates.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, linear, normalize

from .part import Part, Shape, as_shape, as_widths, numel, require_flag

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class MLP(Part):
    r"""Multilayer perceptron of any depth, on vectors or on flattened arrays.

    .. math:: y = W_L\, a(W_{L-1} \cdots a(W_1 x + b_1) \cdots + b_{L-1}) + b_L

    With ``hidden=()`` it is an affine map. Weights start Glorot-uniform, biases at zero (Glorot &
    Bengio, 2010).

    Args:
        in_shape: shape of one input, without batch dimensions.
        out_shape: shape of one output.
        hidden: widths of the hidden layers.
        activation: one of ``relu, tanh, sigmoid, softplus, elu, silu, gelu``.
        out_activation: activation of the output, by default none.
        unit_norm: give the columns of every W unit length, as a decoder needs where the penalty on
            its code could otherwise be had for nothing by scaling z down and a W up.

    Raises:
        ValueError: a shape or width is not positive, or an activation is unknown.

    Example:
        >>> import torch
        >>> MLP((1, 8, 8), (2, 5), hidden=(32,))(torch.rand(7, 3, 1, 8, 8)).shape
        torch.Size([7, 3, 2, 5])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        hidden: Shape = (),
        activation: str = "relu",
        out_activation: str | None = None,
        unit_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_shape = as_shape(in_shape, "in_shape")
        self.out_shape = as_shape(out_shape, "out_shape")
        widths = [numel(self.in_shape), *as_widths(hidden, "hidden"), numel(self.out_shape)]
        _activation(activation)  # an unknown name is an error without a hidden layer, too
        self.out_activation = (
            None if out_activation is None else _activation(out_activation, "out_activation")
        )
        layers: list[nn.Module] = []
        layer = UnitNormLinear if require_flag(unit_norm, "unit_norm") else nn.Linear
        for width_in, width_out in pairwise(widths):
            layers += [_glorot(layer(width_in, width_out)), _activation(activation)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., *in_shape) to (..., *out_shape)."""
        x = self.layers(_flatten(x, self.in_shape))
        if self.out_activation is not None:
            x = self.out_activation(x)
        return x.unflatten(-1, self.out_shape) if len(self.out_shape) > 1 else x

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Return ``(W, b)`` of shapes (out, in) and (out,) if the map is affine, else None."""
        if len(self.layers) > 1 or self.out_activation is not None:
            return None
        layer = self.output
        weight = layer.unit_weight if isinstance(layer, UnitNormLinear) else layer.weight
        return weight, layer.bias

    @torch.no_grad()
    def set_bias(self, value: Tensor) -> None:
        """Set the bias of the last layer to ``value`` of shape ``out_shape``."""
        self.output.bias.copy_(value.reshape(-1))


class UnitNormLinear(nn.Linear):
    r"""Affine map whose columns have unit length, :math:`y = \sum_i x_i w_i / \|w_i\| + b`.

    Example:
        >>> import torch
        >>> torch.allclose(UnitNormLinear(3, 5).unit_weight.norm(dim=0), torch.ones(3))
        True
    """

    @property
    def unit_weight(self) -> Tensor:
        """The matrix that is applied, of shape (out, in)."""
        return normalize(self.weight, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(x, self.unit_weight, self.bias)


class UnitNormConvTranspose2d(nn.ConvTranspose2d):
    r"""Transposed convolution whose kernels of each input channel have unit length together.

    Example:
        >>> import torch
        >>> lengths = UnitNormConvTranspose2d(3, 5, 3).unit_weight.flatten(1).norm(dim=1)
        >>> torch.allclose(lengths, torch.ones(3))
        True
    """

    @property
    def unit_weight(self) -> Tensor:
        """The kernels that are applied, of shape (in, out, height, width)."""
        return normalize(self.weight.flatten(1), dim=1).view_as(self.weight)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map (B, in, height, width) to (B, out, larger height, larger width)."""
        if output_size is not None:
            raise ValueError("output_size is fixed by output_padding here, leave it None")
        stride, padding = self.stride, self.padding
        weight, bias = self.unit_weight, self.bias
        return conv_transpose2d(x, weight, bias, stride, padding, self.output_padding)  # type: ignore[arg-type]


class TransposedMLP(Part):
    r"""The mirror image of a perceptron, with its weights tied: :math:`W_l` becomes :math:`W_l^T`.

    .. math:: y = W_1^T a(\cdots a(W_L^T z + c_L) \cdots) + c_1

    Biases are its own and start at zero.

    Args:
        mlp: the perceptron; its weights are shared, not copied.

    Raises:
        ValueError: ``mlp`` is not an :class:`MLP` with a one-dimensional output.

    Reference:
        Vincent et al., Stacked denoising autoencoders, 2010, section 3.

    Example:
        >>> import torch
        >>> encoder = MLP((8, 8), 5, hidden=(32,), out_activation="sigmoid")
        >>> TransposedMLP(encoder)(torch.rand(7, 5)).shape
        torch.Size([7, 8, 8])
    """

    mlp: MLP

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        if not isinstance(mlp, MLP) or len(mlp.out_shape) != 1:
            raise ValueError(
                f"mlp must be an MLP with a one-dimensional output, got {type(mlp).__name__}"
                + (f" with out_shape {mlp.out_shape}" if isinstance(mlp, MLP) else "")
            )
        self.in_shape, self.out_shape = mlp.out_shape, mlp.in_shape
        self.mlp = mlp
        widths = [layer.in_features for layer in mlp.layers if isinstance(layer, nn.Linear)]
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(width)) for width in widths])

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., *in_shape) to (..., *out_shape)."""
        layers = self.mlp.layers  # linear and activation in turn
        for i, bias in reversed(list(enumerate(self.biases))):
            layer = layers[2 * i]
            assert isinstance(layer, nn.Linear)
            z = linear(z, layer.weight.T, bias)
            if i > 0:
                z = layers[2 * i - 1](z)
        return z.unflatten(-1, self.out_shape) if len(self.out_shape) > 1 else z

    @torch.no_grad()
    def set_bias(self, value: Tensor) -> None:
        """Set the bias of the last layer to ``value`` of shape ``out_shape``."""
        self.biases[0].copy_(value.reshape(-1))


class ConvNet(Part):
    """Strided 3x3 convolutions, then a perceptron: images to vectors.

    Each entry of ``channels`` halves height and width (rounded up).

    Args:
        in_shape: (channels, height, width) of one image.
        out_shape: shape of one output.
        channels: output channels of the convolutions, at least one.
        hidden: widths of the dense layers behind them.
        activation: see :class:`MLP`.
        out_activation: see :class:`MLP`.

    Raises:
        ValueError: ``in_shape`` is not an image shape, or ``channels`` is empty.

    Example:
        >>> import torch
        >>> ConvNet((1, 28, 28), (2, 5), channels=(8, 16))(torch.rand(7, 1, 28, 28)).shape
        torch.Size([7, 2, 5])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Shape,
        hidden: Shape = (),
        activation: str = "relu",
        out_activation: str | None = None,
    ) -> None:
        super().__init__()
        self.in_shape = _image_shape(in_shape, "in_shape")
        sizes = _sizes(self.in_shape, as_shape(channels, "channels"))
        layers: list[nn.Module] = []
        for (c_in, _, _), (c_out, _, _) in pairwise(sizes):
            convolution = nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1)
            layers += [_glorot(convolution), _activation(activation)]
        self.convolutions = nn.Sequential(*layers)
        self.dense = MLP(sizes[-1], out_shape, hidden, activation, out_activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., channels, height, width) to (..., *out_shape)."""
        batch = x.shape[:-3]
        features = self.convolutions(x.reshape(-1, *self.in_shape))  # (B, C, h, w)
        return self.dense(features.reshape(*batch, *features.shape[1:]))


class DeconvNet(Part):
    """A perceptron, then transposed 3x3 convolutions: vectors to images, of exactly that size.

    The mirror of :class:`ConvNet`: ``channels`` are read from the code towards the image, each
    followed by a doubling of height and width.

    Args:
        in_shape: shape of one code.
        out_shape: (..., channels, height, width) of one output; dimensions before the last three
            (several parameters a pixel) become further output channels.
        channels: input channels of the transposed convolutions, at least one.
        hidden: widths of the dense layers before them.
        activation: see :class:`MLP`.
        unit_norm: see :class:`MLP`.

    Raises:
        ValueError: ``out_shape`` is not an image shape, or ``channels`` is empty.

    Example:
        >>> import torch
        >>> DeconvNet(5, (1, 28, 28), channels=(16, 8))(torch.randn(7, 5)).shape
        torch.Size([7, 1, 28, 28])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Shape,
        hidden: Shape = (),
        activation: str = "relu",
        unit_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_shape = as_shape(in_shape, "in_shape")
        self.out_shape = as_shape(out_shape, "out_shape")
        *parameters, c, h, w = (*self.out_shape,) if len(self.out_shape) >= 3 else (0, 0, 0)
        if len(self.out_shape) < 3:
            _image_shape(out_shape, "out_shape")
        image = (numel(tuple(parameters)) * c, h, w)
        sizes = _sizes(image, as_shape(channels, "channels")[::-1])[::-1]
        self.dense = MLP(in_shape, sizes[0], hidden, activation, unit_norm=unit_norm)
        require_flag(unit_norm, "unit_norm")
        convolution = UnitNormConvTranspose2d if unit_norm else nn.ConvTranspose2d
        layers: list[nn.Module] = []
        for (c_in, h_in, w_in), (c_out, h_out, w_out) in pairwise(sizes):
            padding = (h_out - 2 * h_in + 1, w_out - 2 * w_in + 1)
            layers += [
                _activation(activation),
                _glorot(convolution(c_in, c_out, 3, 2, padding=1, output_padding=padding)),
            ]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., *in_shape) to (..., *out_shape)."""
        features = self.dense(z)
        batch = features.shape[:-3]
        image = self.convolutions(features.reshape(-1, *features.shape[-3:]))
        return image.reshape(*batch, *self.out_shape)

    @torch.no_grad()
    def set_bias(self, value: Tensor) -> None:
        """Set the bias of the last layer to the mean of ``value`` over height and width."""
        bias = self.convolutions[-1].bias
        assert isinstance(bias, Tensor)
        bias.copy_(value.flatten(-2).mean(-1).reshape(-1))


def network_to_code(
    x_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    hidden: Shape,
    channels: Shape,
    activation: str,
    out_activation: str | None = None,
) -> Part:
    """Return the network of an encoder: convolutional where ``channels`` are given."""
    if as_widths(channels, "channels"):
        return ConvNet(x_shape, out_shape, channels, hidden, activation, out_activation)
    return MLP(x_shape, out_shape, hidden, activation, out_activation)


def network_from_code(
    z_dim: int,
    out_shape: tuple[int, ...],
    hidden: Shape,
    channels: Shape,
    activation: str,
    unit_norm: bool = False,
) -> Part:
    """Return the network of a decoder: the encoder's widths and channels in reverse order."""
    widths, channels = as_widths(hidden, "hidden")[::-1], as_widths(channels, "channels")[::-1]
    if channels:
        return DeconvNet(z_dim, out_shape, channels, widths, activation, unit_norm)
    return MLP(z_dim, out_shape, widths, activation, unit_norm=unit_norm)


def _activation(name: str, argument: str = "activation") -> nn.Module:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{argument} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def _glorot(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _flatten(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.flatten(-len(shape)) if len(shape) > 1 else x


def _image_shape(value: Shape, argument: str) -> tuple[int, int, int]:
    shape = as_shape(value, argument)
    if len(shape) != 3:
        raise ValueError(
            f"{argument} of a convolutional network must be (channels, height, width), got "
            f"{value!r}; leave channels=() for a perceptron on vectors"
        )
    return shape


def _sizes(image: tuple[int, int, int], channels: tuple[int, ...]) -> list[tuple[int, int, int]]:
    sizes = [image]
    for c in channels:
        _, h, w = sizes[-1]
        sizes.append((c, -(-h // 2), -(-w // 2)))
    return sizes
