"""What objectives are sums of: the log-probabilities of a pair's sites, per particle and datum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import detach, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from .distributions import is_discrete, is_point
from .part import LAWS

Program = Callable[..., Any]
Site = dict[str, Any]


class Terms(NamedTuple):
    """Per-particle, per-datum terms of an ELBO, in nats: ``elbo = log_likelihood - kl``."""

    log_likelihood: Tensor  # (K, N): Σ of log-probabilities of observed sites
    kl: Tensor  # (K, N): Σ over latent sites of KL, or of log q(z|x) - log p(z)
    score: Tensor  # (K, N): log q of sites without reparameterised gradient, else zeros
    shared: Tensor  # (): Σ of observed sites outside the data plate
    shared_kl: Tensor  # (): Σ over latent sites outside the data plate of their KL
    scale: float | Tensor  # subsampling scale of the data plate
    kl_method: dict[str, str]  # site -> "analytic" | "monte carlo"


class Traces(NamedTuple):
    """Sample sites of one joint run of a guide and of the model replayed on it."""

    model: dict[str, Site]
    guide: dict[str, Site]
    num_particles: int


def trace_pair(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
) -> Traces:
    """Run guide and model once, particles as a plate to the left of the data plate."""
    token = LAWS.set({})
    try:
        guide_trace = poutine.trace(_vectorized(guide, num_particles)).get_trace(*args, **kwargs)
        replayed = poutine.replay(_vectorized(model, num_particles), trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    finally:
        LAWS.reset(token)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace)
    sites = []
    for trace in (model_trace, guide_trace):
        found = {
            name: site
            for name, site in prune_subsample_sites(trace).nodes.items()
            if site["type"] == "sample"
        }
        if is_validation_enabled():
            trace.compute_log_prob()
            for site in found.values():
                check_site_shape(site, max_plate_nesting=2)
        sites.append(found)
    return Traces(sites[0], sites[1], num_particles)


def elbo_terms(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    analytic: bool = True,
    **kwargs: Any,
) -> Terms:
    """Return the terms of the ELBO of each particle and datum; see :class:`Terms`."""
    traces = trace_pair(model, guide, args, kwargs, num_particles)
    return sum_terms(traces, analytic=analytic, detach_guide=False, per_datum=False)


def log_weights(model: Program, guide: Program, *args: Any, num_particles: int = 1) -> Tensor:
    r"""Return log importance weights, (K, N) in nats: :math:`\log p(x, z_k) - \log q(z_k|x)`."""
    traces = trace_pair(model, guide, args, {}, num_particles)
    for name in traces.model.keys() & traces.guide.keys():
        drawn, given = traces.guide[name]["fn"], traces.model[name]["fn"]
        if is_point(drawn) and not (is_point(given) or is_discrete(given)):
            raise ValueError(
                f"guide site {name!r} is a point code (Delta) for these data: its weights are the "
                "joint density, no bound; use an encoder that has a density for all data"
            )
    terms = sum_terms(traces, analytic=False, detach_guide=False, per_datum=True)
    return terms.log_likelihood - terms.kl


def _vectorized(program: Program, num_particles: int) -> Program:
    if num_particles == 1:
        return program

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("particles", num_particles, dim=-2):
            return program(*args, **kwargs)

    return run


def _check_sites(traces: Traces, per_datum: bool) -> None:
    """Refuse programs whose log-probabilities would sum to no bound, or to a wrong gradient."""
    for name, site in traces.model.items():
        latent, inside = name in traces.guide, _in_plate(site, "data")
        if not latent and not site["is_observed"]:
            raise ValueError(
                f"site {name!r} is latent in the model and missing from the guide, so the loss "
                "would be no bound; sample it in the guide too, or observe it"
            )
        if not per_datum or inside:
            continue
        if latent:
            raise ValueError(
                f"site {name!r} is latent and outside the data plate: all data share it, so "
                "importance weights per datum do not exist; use ELBO, or move it into the plate"
            )
        log_prob = log_prob_of(name, site)
        if _in_plate(site, "particles") and not (log_prob == log_prob[:1]).all():
            raise ValueError(
                f"site {name!r} is outside the data plate but depends on the latent sites, so it "
                "belongs into the weights of the data; move it into the plate, or use ELBO"
            )
    for name, site in traces.guide.items():
        if name in traces.model:
            continue
        if not isinstance(site["fn"], Unit):
            raise ValueError(
                f"guide site {name!r} is random and missing from the model, so the loss would be "
                "no bound; put it into both programs with the same distribution"
            )
        if not site["fn"].has_rsample and log_prob_of(name, site).requires_grad:
            raise ValueError(
                f"guide factor {name!r} has has_rsample=False, which would give it the score "
                "gradient of a random site; write it into the model, or has_rsample=True"
            )
        if not _in_plate(site, "data"):
            raise ValueError(
                f"guide factor {name!r} is outside the data plate; write it into the model"
            )


def sum_terms(traces: Traces, analytic: bool, detach_guide: bool, per_datum: bool) -> Terms:
    """Sum log-probabilities over sites, the data plate and the particles kept apart.

    ``per_datum`` leaves the subsampling scale of the data plate out, as importance weights must.
    """
    _check_sites(traces, per_datum)
    inside: dict[str, list[Tensor]] = {"observed": [], "kl": [], "score": []}
    shared: dict[str, list[Tensor]] = {"observed": [], "kl": []}
    kl_method: dict[str, str] = {}

    def add(kind: str, term: Tensor, site: Site) -> None:
        if not _in_plate(site, "data"):
            shared[kind].append(_mean_over_particles(_scaled(term, site), site))
        else:
            inside[kind].append(term if per_datum else _scaled(term, site))

    for name, site in traces.model.items():
        guide_site = traces.guide.get(name)
        if guide_site is None:  # observed, or a factor
            add("observed", log_prob_of(name, site), site)
            continue
        kl = _analytic_kl(site, guide_site) if analytic else None
        kl_method[name] = "monte carlo" if kl is None else "analytic"
        if kl is not None:
            add("kl", kl, site)
        else:
            add("kl", log_prob_of(name, guide_site, detach_guide), guide_site)
            add("kl", -log_prob_of(name, site), site)
    for name, site in traces.guide.items():
        if name not in traces.model:  # a factor of the guide
            add("kl", log_prob_of(name, site, detach_guide), site)
        if not site["fn"].has_rsample:
            log_q = _score_function(site)
            if log_q.requires_grad and (shared["observed"] or not _in_plate(site, "data")):
                raise ValueError(
                    f"guide site {name!r} has no reparameterised gradient, and not all sites are "
                    "inside the data plate; train this pair with pyro.infer.Trace_ELBO"
                )
            if log_q.requires_grad:
                inside["score"].append(log_q)
    shape = (traces.num_particles, _data_size(traces))
    every = [term for terms in (*inside.values(), *shared.values()) for term in terms]
    zero = every[0].new_zeros(())  # of their dtype and device
    zeros = zero.expand(shape)
    return Terms(
        log_likelihood=_total(inside["observed"], zeros),
        kl=_total(inside["kl"], zeros),
        score=_total(inside["score"], zeros),
        shared=sum(shared["observed"], zero),
        shared_kl=sum(shared["kl"], zero),
        scale=_data_scale(traces) if per_datum else 1.0,
        kl_method=kl_method,
    )


def log_prob_of(name: str, site: Site, detached: bool = False) -> Tensor:
    """Log-probability of a site, mask applied, subsampling scale not; errors name the site."""
    distribution = detach(site["fn"]) if detached else site["fn"]
    try:
        log_prob = distribution.log_prob(site["value"])
    except ValueError as error:
        raise ValueError(f"site {name!r}: {error}") from error
    return scale_and_mask(log_prob, mask=site["mask"])


def _score_function(site: Site) -> Tensor:
    """Log-probability of what was drawn without reparameterisation: all of it, or a part."""
    score = site["fn"].score_parts(site["value"]).score_function
    return scale_and_mask(_as_tensor(score, site), mask=site["mask"])


def _scaled(log_prob: Tensor, site: Site) -> Tensor:
    return scale_and_mask(log_prob, scale=site["scale"])


def _analytic_kl(site: Site, guide_site: Site) -> Tensor | None:
    """Closed-form KL(guide || model) at a site, or None where none is registered."""
    if is_point(guide_site["fn"]):  # its KL is infinite; the loss uses log p at the point instead
        return None
    if float(site["scale"]) != float(guide_site["scale"]):  # tempered: no longer a KL
        return None
    try:
        kl = kl_divergence(guide_site["fn"], site["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(_as_tensor(kl, guide_site), mask=guide_site["mask"])


def _as_tensor(term: Any, site: Site) -> Tensor:
    """Return a term as a tensor where its site is; of masked densities Pyro gives the number 0."""
    return torch.as_tensor(term, device=site["value"].device)


def _in_plate(site: Site, plate: str) -> bool:
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def _mean_over_particles(term: Tensor, site: Site) -> Tensor:
    """Sum a term over everything but the particles, over which it is averaged; shape ()."""
    particles = [f.size for f in site["cond_indep_stack"] if f.name == "particles"]
    return term.sum() / (particles[0] if particles else 1)


def _data_size(traces: Traces) -> int:
    for site in (*traces.model.values(), *traces.guide.values()):
        for frame in site["cond_indep_stack"]:
            if frame.name == "data":
                return frame.size
    raise ValueError("no site stands in a plate named 'data'; per-datum objectives need one")


def _data_scale(traces: Traces) -> float | Tensor:
    """Return the scale that all sites of the data plate share."""
    scales = {
        float(site["scale"])
        for site in (*traces.model.values(), *traces.guide.values())
        if _in_plate(site, "data")
    }
    if len(scales) > 1:
        raise ValueError(
            f"sites in the data plate have unequal scales {sorted(scales)}: their ratio is no "
            "importance weight; a tempered or beta-weighted loss needs ELBO"
        )
    return scales.pop()


def _total(terms: list[Tensor], zeros: Tensor) -> Tensor:
    """Sum terms that broadcast to (K, N); zeros (K, N) where there are none."""
    return sum(terms[1:], terms[0]).expand_as(zeros) if terms else zeros
