"""Greedy layer-wise pretraining: a deep pair as a stack of shallow ones, trained one by one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .autoencoder import Autoencoder, frozen
from .checks import chunks, require_pair, to_pair
from .datasets import as_tensor
from .decoders import Decoder, GaussianDecoder
from .distributions import mean_of
from .encoders import PointEncoder
from .networks import MLP, TransposedMLP
from .part import require_flag
from .priors import FlatPrior
from .training import Run, fit


def pretrain(
    pair: Autoencoder,
    x: Tensor | Any,
    *,
    corruption: nn.Module | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int | None = 0,
    progress: bool = True,
) -> list[Run]:
    r"""Pretrain a deep pair layer by layer, each as a shallow autoencoder of the layer below.

    .. math:: \min_{W_l, V_l} -E\, \log p_l(h_{l-1} | g_l(f_l(\tilde h_{l-1}))),\quad
              h_0 = x,\; h_l = f_l(h_{l-1})

    f_l is layer l of the encoder's perceptron and g_l the mirrored layer of the decoder's, both
    with their activations; they are the pair's own modules, so the pair is changed in place and
    :func:`probae.fit` then fine-tunes it. p_1 is the pair's own likelihood (with a scale of its
    own where it learns one), the higher p_l are Gaussian with σ² = 1/2: squared error. The code of
    the top layer is the mean of the pair's encoder, so what only sets its spread stays as it was.
    Without a corruption the stages are of kind RECONSTRUCTION, with one of kind CONDITIONAL:
    their losses say nothing about log p(x), and no sum of them does. It helps deep networks most
    whose activations are bounded (tanh, sigmoid); the errors of unbounded ones add up on the way
    back to x, so that fine-tuning may start no lower than without.

    Args:
        pair: encoder and decoder stand on perceptrons (:class:`MLP`) that mirror each other, or
            the decoder on a :class:`TransposedMLP` of the encoder's, with a hidden layer at least.
        x: training data (N, *x_shape), as in :func:`probae.fit`; read into memory.
        corruption: what each layer's input h_{l-1} is corrupted by, such as
            ``GaussianNoise(0.3)``: stacked denoising autoencoders. It has to fit hidden layers too.
        epochs: passes over the data for each layer.
        batch_size: data per step.
        lr: learning rate.
        seed: of every stage; None draws from the global stream.
        progress: show a progress bar for each layer.

    Returns:
        list[Run]: one for each layer, from the one next to x up to the code.

    Raises:
        ValueError: networks that are no perceptrons, have no hidden layer or do not mirror each
            other; an encoder whose mean passes no gradient; a corruption that does not fit; or
            what :func:`probae.fit` refuses.
        FloatingPointError: as in :func:`probae.fit`; layers below keep what they learned.

    Reference:
        Bengio et al., Greedy layer-wise training of deep networks, 2007; Vincent et al., Stacked
        denoising autoencoders, 2010.

    Example:
        >>> import torch, probae
        >>> x = torch.rand(64, 8)
        >>> pair = probae.UndercompleteAutoencoder(8, 2, hidden=(6, 4), activation="tanh")
        >>> noise = probae.GaussianNoise(0.1)
        >>> runs = probae.pretrain(pair, x, corruption=noise, epochs=1, progress=False)
        >>> [run.kind.value for run in runs]
        ['CONDITIONAL', 'CONDITIONAL', 'CONDITIONAL']
    """
    require_pair(pair)
    require_flag(progress, "progress")
    stages = _stages(pair, corruption)
    data = to_pair(pair, pair.check_input(as_tensor(x, "x")))
    runs: list[Run] = []
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    try:
        for stage in stages:
            run = fit(
                stage,
                data,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                progress=progress,
            )
            if run.interrupted:  # which fit takes for the end of its own work alone
                raise KeyboardInterrupt
            runs.append(run)
            if stage is not stages[-1]:
                with frozen(stage, seed=0):  # in chunks, so that only the layer itself is held
                    data = torch.cat([stage.encoder(rows).mean for rows, _ in chunks(data)])
    except ValueError:  # a layer's activations may not suit what the data do
        pair.load_state_dict(before)
        raise
    finally:
        pair.zero_grad(set_to_none=True)
    return runs


def _stages(pair: Autoencoder, corruption: nn.Module | None) -> list[Autoencoder]:
    """Return a shallow pair for each layer, lowest first, on the modules of the deep one."""
    network, reverse = _networks(pair)
    layers, activations = _linears(network), _activations(network)
    shapes = [pair.x_shape, *((width,) for width in _widths(network)[1:])]
    maps: list[nn.Module]  # back from each layer to the one below
    if isinstance(reverse, MLP):
        maps, out_activation = [*_linears(reverse)[::-1]], reverse.out_activation
    else:
        maps = [_Transposed(*tied) for tied in zip(layers, reverse.biases, strict=True)]
        out_activation = None
    stages = []
    for i, (layer, back) in enumerate(zip(layers, maps, strict=True)):
        flat = nn.Flatten(-len(shapes[i]))
        if i < len(activations):
            width = shapes[i + 1][0]
            encoder = PointEncoder(nn.Sequential(flat, layer, activations[i]))
        else:
            (width,) = pair.z_shape
            top = [flat, layer, network.out_activation, nn.Unflatten(-1, network.out_shape)]
            encoder = PointEncoder(_Mean(_rebuilt(pair.encoder, top)))
        if i == 0:
            out = [back, out_activation, nn.Unflatten(-1, reverse.out_shape)]
            decoder = _rebuilt(pair.decoder, out)
        else:
            hidden = nn.Sequential(back, activations[i - 1])
            decoder = GaussianDecoder(hidden, scale=math.sqrt(0.5))
        prior = FlatPrior(width)
        for part in (prior, encoder, decoder):
            part.to(pair.device, pair.dtype)
        stages.append(Autoencoder(prior, encoder, decoder, corruption))
    below = torch.zeros(1, *shapes[-1], dtype=pair.dtype, device=pair.device)
    with torch.enable_grad():
        if not stages[-1].encoder(below).mean.requires_grad:
            raise ValueError(
                f"encoder must have a mean that passes a gradient to its network, got "
                f"{type(pair.encoder).__name__}; pretrain a pair with a PointEncoder, "
                "GaussianEncoder, BernoulliEncoder or NoisySigmoidEncoder on that network"
            )
    return stages


def _networks(pair: Autoencoder) -> tuple[MLP, MLP | TransposedMLP]:
    """Return the perceptrons of encoder and decoder, or say why they are no stack of layers."""
    network, reverse = _network(pair.encoder), _network(pair.decoder)
    if not isinstance(network, MLP) or len(list(pair.encoder.parameters())) > len(
        list(network.parameters())
    ):
        raise ValueError(
            "encoder must stand on an MLP and have no parameters beside it, such as "
            f"PointEncoder(MLP(...)), got {_described(pair.encoder, network)}"
        )
    if not isinstance(pair.decoder, Decoder) or not isinstance(reverse, MLP | TransposedMLP):
        raise ValueError(
            "decoder must stand on an MLP or a TransposedMLP, such as "
            f"BernoulliDecoder(MLP(...)), got {_described(pair.decoder, reverse)}"
        )
    if network.in_shape != pair.x_shape:
        raise ValueError(
            f"encoder must take x of shape {pair.x_shape} itself, got a network for inputs of "
            f"shape {network.in_shape}; pretraining shows it no mask of missing entries"
        )
    if len(network.layers) == 1:
        raise ValueError(
            "encoder must have a hidden layer to be pretrained layer by layer, got none; build it "
            "with hidden=(…,), or train the pair with probae.fit"
        )
    if isinstance(reverse, TransposedMLP):
        mirrors = reverse.mlp is network
    else:
        kinds = [[type(layer) for layer in _activations(mlp)] for mlp in (network, reverse)]
        mirrors = kinds[0] == kinds[1] and _widths(network)[1:] == _widths(reverse)[:0:-1]
    if not mirrors or len(pair.z_shape) != 1:
        raise ValueError(
            "decoder must mirror the encoder, with the same hidden widths in reverse order and the "
            f"same activation, or with its very weights, got {_described(pair.encoder, network)} "
            f"and {_described(pair.decoder, reverse)}"
        )
    return network, reverse


class _Mean(nn.Module):
    """The mean code of an encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return mean_of(self.encoder(x))


class _Transposed(nn.Module):
    """A layer back through the same weights."""

    def __init__(self, layer: nn.Linear, bias: nn.Parameter) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, z: Tensor) -> Tensor:
        return linear(z, self.layer.weight.T, self.bias)


def _rebuilt(part: nn.Module, layers: list[nn.Module | None]) -> nn.Module:
    """Return a part of the same class and options on another network."""
    network = nn.Sequential(*(layer for layer in layers if layer is not None))
    return type(part)(**{**vars(part)["_arguments"], "network": network})


def _network(part: nn.Module) -> Any:
    """Return the network that a part was built on, if it can be built on another."""
    return getattr(part, "network", None) if "network" in vars(part).get("_arguments", {}) else None


def _widths(mlp: MLP) -> list[int]:
    """Width of the input of each layer."""
    return [layer.in_features for layer in _linears(mlp)]


def _linears(mlp: MLP) -> list[nn.Linear]:
    return [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]


def _activations(mlp: MLP) -> list[nn.Module]:
    return [layer for layer in mlp.layers if not isinstance(layer, nn.Linear)]


def _described(part: nn.Module, network: Any) -> str:
    inside = "" if network is None else type(network).__name__
    if isinstance(network, MLP):
        activation = f", {type(network.layers[1]).__name__}" if len(network.layers) > 1 else ""
        inside += f" with hidden widths {tuple(_widths(network)[1:])}{activation}"
    return f"{type(part).__name__}({inside})"
