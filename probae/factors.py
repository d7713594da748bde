"""Factors c(x, z): modules that map x and z to an unnormalised log-factor of the model.

``factor(x, z)`` returns a :class:`pyro.distributions.Unit` of batch shape (N,), whose log-factor,
in nats per datum, is one more term of the pair's -loss.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from .distributions import mean_of
from .encoders import PointEncoder
from .networks import MLP
from .part import Part, require_count, require_positive

MAX_ELEMENTS = 2**24  # of a Jacobian that is held at once


class ContractivePenalty(Part):
    r"""Contraction of an encoder, :math:`c(x, z) = -\lambda \|\partial f / \partial x\|_F^2`.

    f is the mean of the encoder. One sigmoid layer has the closed form
    :math:`\|J\|_F^2 = \sum_j (f_j (1 - f_j))^2 \|W_j\|^2`; any other encoder is differentiated by
    :mod:`torch.func`, or, with ``method="hutchinson"``, by the unbiased estimate
    :math:`\|J\|_F^2 = E_v \|J^T v\|^2, v \sim N(0, I)`, one backward pass a probe. The exact one
    takes a backward pass for each dimension of z: for convolutions, take the estimate.

    The encoder is the one given here: where you replace a pair's encoder, replace the factor, too.

    Args:
        encoder: the encoder of the same pair; its parameters are shared, not copied.
        weight: λ > 0, in nats per unit of the squared norm.
        method: ``"exact"`` or ``"hutchinson"``.
        num_probes: number of probes v of the estimate.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Rifai et al., Contractive auto-encoders, 2011; Hutchinson, 1990.

    Example:
        >>> import torch, probae
        >>> encoder = probae.PointEncoder(probae.MLP(8, 3, out_activation="sigmoid"))
        >>> ContractivePenalty(encoder, 0.1)(torch.rand(7, 8), torch.rand(7, 3)).batch_shape
        torch.Size([7])
    """

    def __init__(
        self, encoder: nn.Module, weight: float, method: str = "exact", num_probes: int = 1
    ) -> None:
        super().__init__()
        if not isinstance(method, str) or method not in ("exact", "hutchinson"):
            raise ValueError(f"method must be 'exact' or 'hutchinson', got {method!r}")
        self.encoder = encoder
        self.weight = require_positive(weight, "weight")
        self.method = method
        self.num_probes = require_count(num_probes, "num_probes")

    def forward(self, x: Tensor, z: Tensor) -> dist.Unit:
        """Return the log-factor of each datum, batch shape (N,)."""
        if self.method == "exact":
            norm = jacobian_norm(self.encoder, x)
        else:
            norm = _hutchinson(self.encoder, x, self.num_probes)
        return dist.Unit(-self.weight * norm)


def jacobian_norm(encoder: nn.Module, x: Tensor) -> Tensor:
    r"""Squared Frobenius norm of an encoder's Jacobian at each datum, differentiable.

    .. math:: \|J\|_F^2 = \sum_{ij} (\partial f_i / \partial x_j)^2,\quad f(x) = E_{q(z|x)} z

    In closed form for one sigmoid layer, else exact by :mod:`torch.func`.

    Args:
        encoder: maps (N, *x_shape) to a distribution over z whose mean is differentiable.
        x: data (N, *x_shape).

    Returns:
        Tensor: (N,), in units of z²/x².

    Raises:
        ValueError: ``x`` is not a floating tensor with a batch dimension, or the encoder's mean is
            not differentiable.

    Reference:
        Rifai et al., Contractive auto-encoders, 2011.

    Example:
        >>> import torch, probae
        >>> encoder = probae.PointEncoder(probae.MLP(8, 3))
        >>> norm = probae.jacobian_norm(encoder, torch.rand(7, 8))
        >>> weight, bias = encoder.network.affine()
        >>> torch.allclose(norm, (weight**2).sum())
        True
    """
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    dense = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    if not dense or not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be a floating tensor of shape (N, *x_shape), got {_shape(x)}")
    code_size = _differentiable_mean(encoder, x[:1]).numel()
    layer = _sigmoid_layer(encoder)
    if layer is not None:
        f = encoder(x).mean  # (N, k)
        return (f * (1 - f)).square() @ layer.weight.square().sum(1)
    tensors: dict[str, Tensor] = {
        **dict(encoder.named_parameters()),
        **dict(encoder.named_buffers()),
    }

    def code(datum: Tensor) -> Tensor:  # (*x_shape) to (z_dim,)
        distribution = functional_call(encoder, tensors, (datum.unsqueeze(0),))
        return distribution.mean.squeeze(0)

    chunk = max(1, MAX_ELEMENTS // (x[0].numel() * code_size))
    with pyro.validation_enabled(False):  # its checks branch on values, which vmap cannot
        try:
            jacobian = vmap(jacrev(code), randomness="different", chunk_size=chunk)(x)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise ValueError(
                "encoder must be one that torch.func can differentiate, got "
                f"{type(encoder).__name__}: {first}"
            ) from error
    return jacobian.square().flatten(1).sum(1)  # of (N, z_dim, *x_shape)


class CodeCoupling(Part):
    r"""A prediction of the code as a noisy view of it, :math:`c(x, z) = \log N(f(x); z, s^2 I)`.

    Read as :math:`\log N(z; f(x), s^2 I)` it is the moving "prior" that contracts an encoder whose
    input is corrupted by N(0, σ² I): to leading order a contractive penalty of weight
    :math:`\lambda = \sigma^2 / 2 s^2`. Read as an observed view of z it couples the predictor of
    predictive sparse decomposition to the sparse code, with :math:`\gamma = 1 / 2 s^2`.

    Args:
        predictor: encoder whose mean is f(x); its parameters are shared, not copied.
        scale: s > 0, in units of z.

    Raises:
        ValueError: ``scale`` is not a finite number > 0.

    Reference:
        Kavukcuoglu, Ranzato & LeCun, Fast inference in sparse coding algorithms, 2010; Rifai et
        al., Contractive auto-encoders, 2011.

    Example:
        >>> import torch, probae
        >>> predictor = probae.PointEncoder(probae.MLP(8, 3))
        >>> CodeCoupling(predictor, 0.5)(torch.rand(7, 8), torch.rand(7, 3)).batch_shape
        torch.Size([7])
    """

    def __init__(self, predictor: nn.Module, scale: float) -> None:
        super().__init__()
        self.predictor = predictor
        self.scale = require_positive(scale, "scale")

    def forward(self, x: Tensor, z: Tensor) -> dist.Unit:
        """Return the log-factor of each datum, batch shape that of z without its last dimension."""
        prediction = mean_of(self.predictor(x))
        if prediction.shape[-1] != z.shape[-1]:
            raise ValueError(
                f"predictor must have codes of {z.shape[-1]} dimensions, as the pair, got "
                f"{prediction.shape[-1]}"
            )
        return dist.Unit(dist.Normal(z, self.scale).to_event(1).log_prob(prediction))


def _hutchinson(encoder: nn.Module, x: Tensor, num_probes: int) -> Tensor:
    """Unbiased estimate of the squared norm of the Jacobian at each datum, (N,)."""
    with torch.enable_grad():  # the derivative with respect to x is needed in evaluation, too
        x = x.detach().requires_grad_()
        code = _differentiable_mean(encoder, x)  # (N, z_dim)
        total = x.new_zeros(len(x))
        for _ in range(num_probes):
            (product,) = torch.autograd.grad(
                code, x, grad_outputs=torch.randn_like(code), create_graph=True
            )  # J'v, (N, *x_shape)
            total = total + product.square().flatten(1).sum(1)
    return total / num_probes


def _differentiable_mean(encoder: nn.Module, x: Tensor) -> Tensor:
    """Return the mean code as a function of x, or refuse an encoder that has none."""
    with torch.enable_grad():
        try:
            code: Tensor = encoder(x if x.requires_grad else x.detach().requires_grad_()).mean
        except NotImplementedError:
            code = x.new_zeros(())
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"encoder must map x of shape {tuple(x.shape)} and {x.dtype} to a distribution: "
                f"{error}"
            ) from error
    if not code.requires_grad:
        raise ValueError(
            "encoder must have a mean in closed form that x moves, got "
            f"{type(encoder).__name__}, whose Jacobian autograd cannot see"
        )
    return code


def _sigmoid_layer(encoder: nn.Module) -> nn.Linear | None:
    """Return the layer of an encoder that is one affine map and a sigmoid, else None."""
    network = encoder.network if isinstance(encoder, PointEncoder) else None
    if isinstance(network, MLP) and len(network.layers) == 1:
        return network.output if isinstance(network.out_activation, nn.Sigmoid) else None
    return None


def _shape(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
