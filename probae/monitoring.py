"""What training looks at between steps: bounds on held-out data, active units, faults."""

from __future__ import annotations

import math

import pyro
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor

from .autoencoder import Autoencoder, Kind, frozen
from .checks import chunks, likelihood_of, require_pair, to_pair
from .corruptions import encoder_input
from .datasets import as_tensor
from .decoders import CorruptedDecoder
from .distributions import GreyBernoulli, has_component, mean_of
from .objectives import ELBO, IWAE, PerDatumObjective
from .part import require_positive
from .terms import elbo_terms


def active_units(pair: Autoencoder, x: Tensor, threshold: float = 0.01) -> int:
    r"""Number of latent dimensions that vary with x: :math:`Var_x\,E_{q(z|x)}[z_i] > threshold`.

    Under an exact posterior (``PPCA``) the basis of z is arbitrary, so that a direction that the
    data do not use may count, spread over several dimensions.

    Raises:
        ValueError: ``x`` has the wrong shape or dtype, is empty, or is not finite.

    Reference:
        Burda, Grosse & Salakhutdinov, Importance weighted autoencoders, 2016.

    Example:
        >>> import torch, probae
        >>> probae.active_units(probae.VAE(8, 2), torch.rand(64, 8)) <= 2
        True
    """
    require_pair(pair)
    data = pair.check_input(to_pair(pair, as_tensor(x, "x")))
    with frozen(pair, seed=0):
        return _active_units(pair, data, require_positive(threshold, "threshold"))


def measure(pair: Autoencoder, x: Tensor, rows: int = 1000) -> dict[str, float]:
    """Mean ELBO, reconstruction and KL in nats per datum, with the same noise at each call."""
    totals = {"reconstruction": 0.0, "kl": 0.0}
    with frozen(pair, seed=0):
        for chunk, _ in chunks(x, rows):
            terms = elbo_terms(pair.model, pair.guide, chunk)
            totals["reconstruction"] += float(terms.log_likelihood.sum())
            totals["kl"] += float(terms.kl.sum())
        means = {name: total / len(x) for name, total in totals.items()}
        active = _active_units(pair, x[:1000], 0.01)
    return {**means, "elbo": means["reconstruction"] - means["kl"], "active_units": active}


def _active_units(pair: Autoencoder, x: Tensor, threshold: float) -> int:
    code = mean_of(pair.encoder(encoder_input(pair.corruption, x)))  # (N, z_dim)
    return int((code.var(0, correction=0) > threshold).sum())


def objective_loss(pair: Autoencoder, objective: pyro.infer.ELBO, x: Tensor) -> float:
    """Mean of the objective on held-out data at its final KL weight, same noise at each call."""
    epoch, total = getattr(objective, "epoch", None), 0.0
    rows = max(50, 1000 // objective.num_particles)
    if isinstance(objective, PerDatumObjective):
        objective.epoch = math.inf
    with frozen(pair, seed=0):
        for chunk, _ in chunks(x, rows):
            total += float(objective.differentiable_loss(pair.model, pair.guide, chunk))
    if isinstance(objective, PerDatumObjective) and epoch is not None:
        objective.epoch = epoch
    return total / len(x)


def broken_parameter(pair: Autoencoder) -> str | None:
    """Name a parameter that is not finite, and the site of its part."""
    for name, parameter in pair.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} is not finite{_site_of(name)}"
    return None


def find_fault(pair: Autoencoder, x: Tensor) -> str | None:
    """Name the parameter or the site where a loss stopped being finite."""
    if (broken := broken_parameter(pair)) is not None:
        return broken
    with torch.no_grad(), pyro.validation_enabled(False):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    for program, trace in (("guide", guide), ("model", model)):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or name == "data":
                continue
            value, log_prob = site["value"], site["fn"].log_prob(site["value"])
            if not value.isfinite().all():
                return f"site {name!r} of the {program} drew a value that is not finite"
            if not torch.as_tensor(log_prob).isfinite().all():
                return f"site {name!r} of the {program} has a log-probability that is not finite"
    return None


def _site_of(parameter: str) -> str:
    """Name the site whose distribution a parameter belongs to."""
    sites = {
        "prior": "z",
        "encoder": "z",
        "decoder": "x",
        "corruption": "x_tilde",
        "factor": "factor",
    }
    part = parameter.split(".")[0]
    return f" (it belongs to the {part}, site {sites[part]!r})" if part in sites else ""


def bound_on(pair: Autoencoder, grey: bool) -> str:
    """Say what the ELBO of the pair bounds, in words; ``grey`` is about all the data."""
    if not pair.kind.is_lower_bound:
        return f"nothing: {pair.kind.statement}"
    if grey and has_component(likelihood_of(pair), GreyBernoulli):
        return "the expected log-likelihood of x's stochastic binarisation (x is grey)"
    if isinstance(pair.decoder, CorruptedDecoder):
        return "log p(x_tilde), of the corrupted data that the pair was given"
    return "log p(x)"


def kind_of_loss(kind: Kind, objective: pyro.infer.ELBO) -> Kind:
    """Return what the objective makes of a pair's kind: tempered below 1, no bound is left."""
    if isinstance(objective, IWAE) and kind is Kind.ELBO and objective.num_particles > 1:
        return Kind.IWELBO
    if isinstance(objective, ELBO) and objective.beta < 1 and kind.is_lower_bound:
        return Kind.ENERGY
    return kind
