"""What training looks at between steps: bounds on held-out data, active units, faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from .autoencoder import Autoencoder, Kind, frozen
from .checks import likelihood_of, require_pair, to_pair
from .corruptions import encoder_input
from .datasets import as_tensor
from .decoders import CorruptedDecoder
from .distributed import shared_blocks
from .distributions import GreyBernoulli, base_distribution, has_component, mean_of
from .objectives import ELBO, IWAE, at_the_end
from .part import require_positive
from .precision import float32_products
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


def measure(
    pair: Autoencoder, x: Tensor, objective: pyro.infer.ELBO | None = None, rows: int = 1000
) -> dict[str, float]:
    """Mean ELBO, reconstruction and KL in nats per datum, with the same noise at each call.

    With an objective also ``val_loss``, its mean at its final KL weight. Where it is made of the
    same terms, it costs no second pass over the data.
    """
    shares = _is_of_the_same_terms(objective)

    def totals(chunk: Tensor) -> list[float]:
        terms = elbo_terms(pair.model, pair.guide, chunk)
        sums = [float(terms.log_likelihood.sum()), float(terms.kl.sum())]
        if shares:
            assert isinstance(objective, ELBO)
            per_datum, shared = objective.loss_of(terms)
            sums.append(float(per_datum.sum() + shared))
        return sums

    with at_the_end(objective):
        reconstruction, kl, *loss = _means(pair, x, rows, totals)
    with frozen(pair, seed=0), float32_products(pair.device):
        active = _active_units(pair, x[:1000], 0.01)
    elbo = reconstruction - kl
    row = {"reconstruction": reconstruction, "kl": kl, "elbo": elbo, "active_units": active}
    if objective is not None:
        row["val_loss"] = loss[0] if loss else objective_loss(pair, objective, x)
    return row


def _is_of_the_same_terms(objective: Any) -> bool:
    """Whether an objective is what `measure` looks at, but for the weight of the KL."""
    return type(objective) is ELBO and objective.num_particles == 1 and objective.analytic_kl


def _means(
    pair: Autoencoder, x: Tensor, rows: int, totals: Callable[[Tensor], list[float]]
) -> list[float]:
    """Return means over data of what is summed over chunks of them, shared by all processes.

    Each chunk is seeded by itself, so that it does not matter which process it falls to.
    """
    parts = x.split(rows)

    def block(i: int) -> list[Tensor]:
        with frozen(pair, seed=i), float32_products(pair.device):
            return [torch.tensor([totals(parts[i])], dtype=torch.float64)]

    (table,) = shared_blocks(len(parts), block)  # (chunks, columns)
    return (table.sum(0) / len(x)).tolist()


def _active_units(pair: Autoencoder, x: Tensor, threshold: float) -> int:
    code = mean_of(pair.encoder(encoder_input(pair.corruption, x)))  # (N, z_dim)
    return int((code.var(0, correction=0) > threshold).sum())


def objective_loss(pair: Autoencoder, objective: pyro.infer.ELBO, x: Tensor) -> float:
    """Mean of the objective on held-out data at its final KL weight, same noise at each call."""
    rows = max(50, 1000 // objective.num_particles)

    def totals(chunk: Tensor) -> list[float]:
        return [float(objective.differentiable_loss(pair.model, pair.guide, chunk))]

    with at_the_end(objective):
        (mean,) = _means(pair, x, rows, totals)
    return mean


def broken_parameter(pair: Autoencoder) -> str | None:
    """Name a parameter that is not finite, and the site of its part."""
    for name, parameter in pair.named_parameters():
        # a sum first, as the cheapest look at all; it may overflow where no number is infinite
        if not parameter.detach().sum().isfinite() and not parameter.isfinite().all():
            return f"parameter {name} is not finite{_site_of(name)}"
    return None


def find_fault(pair: Autoencoder, x: Tensor, places: Tensor | None = None) -> str | None:
    """Name the parameter, or the site and the datum, where a loss stopped being finite.

    ``places`` (N,) tells where in all the data the data at hand are.
    """
    if (broken := broken_parameter(pair)) is not None:
        return broken
    bad = ~x.isfinite()
    if bad.any():
        return f"the data are not finite{_datum(bad, places)}"
    with torch.no_grad(), pyro.validation_enabled(False):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    for program, trace in (("guide", guide), ("model", model)):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or name == "data":
                continue
            value, log_prob = site["value"], site["fn"].log_prob(site["value"])
            for what, tensor in (
                ("drew a value", value),
                ("has a log-probability", torch.as_tensor(log_prob)),
            ):
                bad = ~tensor.isfinite()
                if bad.any():
                    why = _bad_argument(site["fn"])
                    datum = _datum(bad, places, len(x))
                    return f"site {name!r} of the {program} {what} that is not finite{why}{datum}"
    return None


def broken_gradient(
    pair: Autoencoder, objective: Any, x: Tensor, places: Tensor | None, names: list[str]
) -> str:
    """Say which gradients are not finite, next to the loss first, and which datum makes them so.

    Each datum is looked at alone, with noise of its own, so the search may find none.
    """
    order = ("factor", "decoder", "encoder", "corruption", "prior")  # back from the loss
    names = sorted(names, key=lambda name: [*order, name.split(".")[0]].index(name.split(".")[0]))
    if not names:
        return "the gradients of single processes overflow in their sum"
    text = f"the gradient of parameter {names[0]} is not finite{_site_of(names[0])}"
    state = [buffer.clone() for buffer in pair.buffers()]
    parameters = [p for p in pair.parameters() if p.requires_grad]
    found = None
    for row in range(len(x)):
        datum = x[row : row + 1].repeat_interleave(2, 0)  # two, for the sake of a batch norm
        try:
            loss = objective.differentiable_loss(pair.model, pair.guide, datum)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        except (RuntimeError, ValueError):
            continue
        if not all(g.isfinite().all() for g in gradients if g is not None):
            found = row
            break
    with torch.no_grad():
        for buffer, before in zip(pair.buffers(), state, strict=True):
            buffer.copy_(before)
    return text if found is None else text + _named(found, places)


def _bad_argument(distribution: Any) -> str:
    """Name the argument of a distribution that is not one, such as a scale of 0."""
    base = base_distribution(distribution)
    for name, constraint in getattr(base, "arg_constraints", {}).items():
        value = vars(base).get(name)
        if not isinstance(value, Tensor):
            continue
        if not value.isfinite().all():
            return f" (its {name} is not)"
        known = not constraints.is_dependent(constraint)  # that of a Delta's value is not
        if known and not constraint.check(value).all():
            return f" (its {name} is not in {constraint})"
    return ""


def _datum(bad: Tensor, places: Tensor | None, rows: int | None = None) -> str:
    """Name the first datum at which something is bad; nothing where the shape tells of no datum."""
    if bad.dim() == 0 or len(bad) != (len(bad) if rows is None else rows):
        return ""
    return _named(
        int(bad.flatten(1).any(1).nonzero()[0]) if bad.dim() > 1 else int(bad.nonzero()[0]), places
    )


def _named(row: int, places: Tensor | None) -> str:
    return f", at row {row} of the batch" if places is None else f", at datum {int(places[row])}"


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
