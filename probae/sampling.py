"""Drawing from a pair: prior sampling and reconstruction."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from .autoencoder import Autoencoder, frozen
from .checks import check_support, require_pair
from .datasets import as_tensor
from .distributions import is_flat, mean_of
from .part import require_count


class Samples(NamedTuple):
    """Joint draws from the model.

    Example:
        >>> import probae
        >>> probae.sample(probae.VAE(8, 2), 5).z.shape
        torch.Size([5, 2])
    """

    x: Tensor  # (n, *x_shape)
    z: Tensor  # (n, *z_shape)


def sample(pair: Autoencoder, num_samples: int = 1, *, seed: int | None = None) -> Samples:
    r"""Draw from the model: :math:`z \sim p(z)`, :math:`x \sim p(x|z)`.

    ``x`` is a draw from the decoder; for its mean, noise-free, take ``pair.decoder(z).mean``.

    Args:
        pair: a pair with a proper prior.
        num_samples: number of draws.
        seed: of the draws; None draws from torch's global stream.

    Raises:
        ValueError: ``num_samples`` < 1, or a flat prior, from which nothing can be drawn.

    Example:
        >>> import probae
        >>> x, z = probae.sample(probae.VAE(8, 2), 5)
        >>> x.shape, z.shape
        (torch.Size([5, 8]), torch.Size([5, 2]))
    """
    require_pair(pair)
    num_samples = require_count(num_samples, "num_samples")
    if is_flat(pair.prior()):
        raise ValueError(
            f"pair is of kind {pair.kind.value}: nothing can be drawn from its flat prior; give it "
            "a proper one, such as prior='normal'"
        )
    with frozen(pair, seed):
        z = pair.prior().sample(torch.Size((num_samples,)))
        return Samples(pair.decoder(z).sample().to(pair.dtype), z)


def reconstruct(pair: Autoencoder, x: Tensor | Any) -> Distribution:
    r"""Return p(x'|z) at the mean code of each datum, :math:`z = E_{q(z|x)}[z]`.

    Where the encoder's distribution has no mean in closed form, it is that of 100 draws.

    Args:
        pair: the pair; a corruption is not applied.
        x: data (N, *x_shape).

    Returns:
        Distribution: batch shape (N,), event shape x_shape; its ``mean`` is the reconstruction.

    Raises:
        ValueError: bad data, as in :func:`probae.fit`.

    Example:
        >>> import torch, probae
        >>> probae.reconstruct(probae.VAE(8, 2), torch.ones(5, 8)).mean.shape
        torch.Size([5, 8])
    """
    require_pair(pair)
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=False)
    with frozen(pair, seed=0):
        return pair.decoder(mean_of(pair.encoder(data)))
