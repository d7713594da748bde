"""Parts of adversarial pairs: discriminators, encoders without a density, and no encoder at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn

from .part import Part, Shape, as_shape, require_count

if TYPE_CHECKING:
    from torch.distributions import Distribution

SEES = ("data", "code", "joint")


class Discriminator(Part):
    r"""Classifier whose logit estimates a log-ratio of densities, :math:`T \approx \log (a / b)`.

    .. math:: y \sim Bernoulli(\sigma(T(x, z))),\quad T^*(x, z) = \log \frac{a(x, z)}{b(x, z)}

    It tells draws of a (y = 1), which data had a part in, from draws of b (y = 0), which the model
    made. T* is its optimum where both come equally often. What it sees decides the two:

    =========  =======================================  =================================  =======
    ``sees``   a                                        b                                  pair
    =========  =======================================  =================================  =======
    ``data``   the law of the data                      x = E[x|z], z ~ p(z)               GAN
    ``code``   q(z) = E_x q(z|x), the aggregated codes  p(z)                               AAE
    ``joint``  (x, z), x from the data, z ~ q(z|x)      (x, z), x from the data, z ~ p(z)  AVB
    =========  =======================================  =================================  =======

    Args:
        network: maps what it sees to (..., 1), the logit: x of shape (..., *x_shape), z of shape
            (..., z_dim), or for ``joint`` both in a row, (..., D + z_dim) with x flattened to D.
        sees: ``"data"``, ``"code"`` or ``"joint"``.

    Raises:
        ValueError: ``sees`` is none of these; or, from ``forward``, an output of another shape.

    Reference:
        Goodfellow et al., Generative adversarial nets, 2014; Makhzani et al., Adversarial
        autoencoders, 2015; Mescheder, Nowozin & Geiger, Adversarial variational Bayes, 2017.

    Example:
        >>> import torch, probae
        >>> discriminator = probae.Discriminator(probae.MLP(8 + 3, 1, (16,)), sees="joint")
        >>> discriminator(torch.rand(7, 8), torch.randn(7, 3)).logits.shape
        torch.Size([7])
    """

    def __init__(self, network: nn.Module, sees: str) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        if not isinstance(sees, str) or sees not in SEES:
            raise ValueError(f"sees must be one of {', '.join(SEES)}, got {sees!r}")
        self.network = network
        self.sees = sees

    def forward(self, x: Tensor | None, z: Tensor | None) -> Distribution:
        """Return the law of y, batch shape (...); what it does not see may be None."""
        seen: Any = {"data": x, "code": z}.get(self.sees)
        if self.sees == "joint":
            assert x is not None
            assert z is not None
            seen = torch.cat([x.flatten(z.dim() - 1), z], -1)
        logit = self.network(seen)
        if logit.dim() == 0 or logit.shape[-1] != 1:
            raise ValueError(
                f"network must have output of shape (..., 1), the logit, got {tuple(logit.shape)}"
            )
        return dist.Bernoulli(logits=logit.squeeze(-1))


class ImplicitEncoder(Part):
    r"""Encoder whose draws are known and whose density is not: :math:`z = f(x, \epsilon)`.

    .. math:: \epsilon \sim N(0, I),\quad z = f(x, \epsilon) \sim q(z|x)

    Any law of codes can be had so, of several modes, too; but log q(z|x) is nowhere, so that no
    bound can be had from it. :func:`probae.fit_adversarial` trains it by a density ratio.

    Args:
        network: maps x, flattened to D, and ε in a row, (..., D + noise_dim), to z, (..., z_dim).
        x_dim: dimension or shape of one datum.
        z_dim: number of latent dimensions.
        noise_dim: dimension of ε.

    Raises:
        ValueError: an argument is out of range; or, from ``forward``, an output of another shape.

    Reference:
        Mescheder, Nowozin & Geiger, Adversarial variational Bayes, 2017.

    Example:
        >>> import torch
        >>> from probae import MLP
        >>> encoder = ImplicitEncoder(MLP(8 + 4, 3, (16,)), x_dim=8, z_dim=3, noise_dim=4)
        >>> encoder(torch.rand(7, 8)).rsample((5,)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(self, network: nn.Module, x_dim: Shape, z_dim: int, noise_dim: int) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        self.network = network
        self.x_shape = as_shape(x_dim, "x_dim")
        self.z_dim = require_count(z_dim, "z_dim")
        self.noise_dim = require_count(noise_dim, "noise_dim")

    def forward(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch shape (...), event shape (z_dim,), with draws and no density."""
        return Implicit(self.network, x.flatten(-len(self.x_shape)), self.z_dim, self.noise_dim)


class Implicit(dist.TorchDistribution):
    """Law of ``network([x, noise])``: it can be drawn from, with gradients, and has no log_prob.

    Args:
        network: maps (..., D + noise_dim) to (..., z_dim).
        x: what it is conditioned on, (..., D).
        z_dim: dimension of a draw.
        noise_dim: dimension of the standard normal noise.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True
    _mask = False  # as by .mask(False): wherever densities are asked for, there is none

    def __init__(self, network: nn.Module, x: Tensor, z_dim: int, noise_dim: int) -> None:
        self.network, self.x, self.noise_dim = network, x, noise_dim
        super().__init__(x.shape[:-1], Size((z_dim,)), validate_args=False)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw with gradients."""
        batch = Size(sample_shape) + self.batch_shape
        noise = torch.randn(*batch, self.noise_dim, dtype=self.x.dtype, device=self.x.device)
        z: Tensor = self.network(torch.cat([self.x.expand(*batch, -1), noise], -1))
        if z.shape != batch + self.event_shape:
            raise ValueError(
                f"network must have output of shape (..., {self.event_shape[0]}), z, got "
                f"{tuple(z.shape)}"
            )
        return z

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draw without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise: there is none."""
        raise NotImplementedError(
            "an implicit encoder has draws and no density: train it with probae.fit_adversarial, "
            "and measure the pair by log_likelihood(pair, x, method='ais')"
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> Implicit:
        """Return the distribution with its batch shape expanded."""
        x = self.x.expand(*Size(batch_shape), -1)
        return Implicit(self.network, x, self.event_shape[0], self.noise_dim)


class NoEncoder(Part):
    """The encoder of a pair that has none, as a GAN: whatever asks it for codes is refused.

    Example:
        >>> import torch, probae
        >>> pair = probae.GAN(8, 2)
        >>> probae.reconstruct(pair, torch.rand(5, 8))
        Traceback (most recent call last):
            ...
        ValueError: pair has no encoder, as a GAN has none, so there are no codes of x: ...
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Distribution:
        """Raise a ValueError that says what does without an encoder, and how to get one."""
        raise ValueError(
            "pair has no encoder, as a GAN has none, so there are no codes of x: for log p(x) use "
            "probae.log_likelihood(pair, x, method='ais'); for codes fit an encoder to its "
            "decoder, proposal = probae.fit_proposal(pair, x_train), and pass proposal=proposal, "
            "or call proposal(x)"
        )
