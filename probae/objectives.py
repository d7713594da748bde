"""Objectives that Pyro lacks: an ELBO that reports how it got its KL, and a per-datum IWAE bound.

Both are :class:`pyro.infer.ELBO` objects: pass them to :class:`pyro.infer.SVI` or to
:func:`probae.fit`. As everywhere in Pyro, their loss is summed over the data of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import detach, scale_and_mask
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from .distributions import is_point
from .part import as_number, require_count

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


@dataclass(frozen=True)
class LinearWarmup:
    """Weight of the KL that rises linearly: ``start`` at epoch 0 to ``end`` at epoch ``epochs``.

    Reference:
        Bowman et al., Generating sentences from a continuous space, 2016.

    Example:
        >>> LinearWarmup(epochs=10)(5.0)
        0.5
    """

    epochs: float
    start: float = 0.0
    end: float = 1.0

    def __call__(self, epoch: float) -> float:
        """Return the weight at ``epoch``, which may be fractional; ``epochs`` must be > 0."""
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs of a warm-up must be a finite number > 0, got {self.epochs}")
        fraction = min(max(epoch / self.epochs, 0.0), 1.0)
        return self.start + (self.end - self.start) * fraction


class PerDatumObjective(pyro.infer.ELBO):
    """What the objectives of this module share: one loss per datum, summed once at the end."""

    warmup_epochs: float = 0.0

    def __init__(self, num_particles: int) -> None:
        super().__init__(num_particles=require_count(num_particles, "num_particles"))
        self.epoch = math.inf  # schedules are over unless a trainer says otherwise
        self.kl_method: dict[str, str] = {}

    def per_datum_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each datum, (N,) in nats, and what all data share, ()."""
        raise TypeError(f"{type(self).__name__} has no per-datum loss")

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Serve Pyro's abstract interface; the losses here trace all particles at once."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss summed over data, differentiable."""
        per_datum, shared = self.per_datum_loss(model, guide, *args, **kwargs)
        return per_datum.sum() + shared

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss summed over data as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number and add its gradients to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()


class ELBO(PerDatumObjective):
    r"""Evidence lower bound with the KL in closed form where torch or Pyro registers one.

    .. math:: L = \frac1K \sum_k \log p(x|z_k) - \beta\, KL(q(z|x) \| p(z)),\quad z_k \sim q(z|x)

    Where no closed form is registered (and for point codes) the KL is the Monte Carlo average of
    log q(z|x) - log p(z); ``kl_method`` says which site got which. Guide sites without
    reparameterised gradient get the score-function gradient with a leave-one-out baseline over the
    batch. With β = 1 it is a lower bound on log p(x); with β > 1 a looser one; with β < 1 none.

    Args:
        beta: weight of the KL, >= 0: a number, or a function of the epoch such as
            :class:`LinearWarmup`; :func:`probae.fit` advances the epoch.
        num_particles: samples K of z per datum.
        analytic_kl: whether closed forms are used at all.

    Raises:
        ValueError: ``beta`` < 0 or ``num_particles`` < 1.

    Reference:
        Kingma & Welling, 2013; Higgins et al., beta-VAE, 2017.

    Example:
        >>> import torch, probae
        >>> pair, objective = probae.VAE(8, 2), probae.ELBO()
        >>> loss = objective.loss(pair.model, pair.guide, torch.ones(16, 8))
        >>> objective.kl_method
        {'z': 'analytic'}
    """

    def __init__(
        self,
        beta: float | Callable[[float], float] = 1.0,
        num_particles: int = 1,
        analytic_kl: bool = True,
    ) -> None:
        super().__init__(num_particles)
        self.schedule = beta if callable(beta) else None
        self.constant_beta = None if callable(beta) else as_number(beta)
        self.analytic_kl = analytic_kl
        self.warmup_epochs = float(getattr(beta, "epochs", 0.0))
        start, end = self.beta if self.schedule is None else self.schedule(0.0), self.beta
        if self.schedule is None and not 0 <= end < math.inf:
            raise ValueError(f"beta must be a finite number >= 0 or a function, got {beta!r}")
        if not (0 <= start < math.inf and 0 <= end < math.inf):
            raise ValueError(
                "beta as a function must be finite and >= 0 from epoch 0 to math.inf, which stands "
                f"for the end of training, got {start} to {end}"
            )

    @property
    def beta(self) -> float:
        """Weight of the KL at the current epoch."""
        if self.schedule is not None:
            return float(self.schedule(self.epoch))
        assert self.constant_beta is not None
        return self.constant_beta

    def per_datum_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return -L of each datum, (N,) in nats, and minus the observed terms that all share."""
        terms = elbo_terms(
            model,
            guide,
            *args,
            num_particles=self.num_particles,
            analytic=self.analytic_kl,
            **kwargs,
        )
        self.kl_method = terms.kl_method
        elbo = terms.log_likelihood - self.beta * terms.kl  # (K, N)
        if terms.score.requires_grad:
            signal = elbo.detach()
            if signal.numel() > 1:
                signal = signal - (signal.sum() - signal) / (signal.numel() - 1)
            score = signal * terms.score
            elbo = elbo + score - score.detach()
        return -elbo.mean(0), self.beta * terms.shared_kl - terms.shared


class IWAE(PerDatumObjective):
    r"""Importance-weighted bound, per datum, never over the batch.

    .. math:: L_K = E \log \frac1K \sum_k w_k,\quad w_k = \frac{p(x, z_k)}{q(z_k|x)},\quad
              L_1 \le L_K \le L_{K+1} \le \log p(x)

    Weights are formed for each datum and before any subsampling scale; log-probabilities outside
    the data plate are added once. With ``dreg`` the encoder's gradient is the doubly
    reparameterised one, :math:`\sum_k \tilde w_k^2\, \partial_z \log w_k\, \partial_\phi z`, whose
    signal-to-noise ratio does not fall with K.

    Args:
        num_particles: number K of importance samples.
        dreg: use the doubly reparameterised gradient.

    Raises:
        ValueError: ``num_particles`` < 1; or, when it is evaluated, a pair it gives no bound or no
            gradient for: a point code on continuous z, a guide site without reparameterised
            gradient, a latent site outside the data plate, unequal scales of sites.

    Reference:
        Burda, Grosse & Salakhutdinov, 2016; Tucker et al., Doubly reparameterized gradient
        estimators, 2019.

    Example:
        >>> import torch, probae
        >>> pair, objective = probae.VAE(8, 2), probae.IWAE(5, dreg=True)
        >>> isinstance(objective.loss(pair.model, pair.guide, torch.ones(16, 8)), float)
        True
    """

    def __init__(self, num_particles: int = 5, dreg: bool = False) -> None:
        super().__init__(num_particles)
        self.dreg = dreg

    def per_datum_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return -L_K of each datum, (N,) in nats, and minus the observed terms that all share."""
        traces = trace_pair(model, guide, args, kwargs, self.num_particles)
        for name, site in traces.guide.items():
            _require_proposal(name, site)
        pathwise = [s for s in traces.guide.values() if s["value"].requires_grad]
        if self.dreg and len(pathwise) > 1:
            raise ValueError(
                f"dreg=True needs one reparameterised guide site, got {len(pathwise)}; "
                "use dreg=False"
            )
        terms = _sum_terms(traces, analytic=False, detach_guide=self.dreg, per_datum=True)
        log_weights = terms.log_likelihood - terms.kl  # (K, N)
        bound = torch.logsumexp(log_weights, 0) - math.log(self.num_particles)
        self.kl_method = terms.kl_method
        if self.dreg and self.num_particles > 1:
            weights = torch.softmax(log_weights.detach(), 0)  # (K, N), once more than logsumexp's
            for site in pathwise:
                _weight_gradient(site["value"], weights)
        return -terms.scale * bound, -terms.shared


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
    guide_trace = poutine.trace(_vectorized(guide, num_particles)).get_trace(*args, **kwargs)
    replayed = poutine.replay(_vectorized(model, num_particles), trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
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
    return _sum_terms(traces, analytic=analytic, detach_guide=False, per_datum=False)


def log_weights(model: Program, guide: Program, *args: Any, num_particles: int = 1) -> Tensor:
    r"""Return log importance weights, (K, N) in nats: :math:`\log p(x, z_k) - \log q(z_k|x)`."""
    traces = trace_pair(model, guide, args, {}, num_particles)
    terms = _sum_terms(traces, analytic=False, detach_guide=False, per_datum=True)
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
        log_prob = _log_prob(name, site)
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
        if not site["fn"].has_rsample and _log_prob(name, site).requires_grad:
            raise ValueError(
                f"guide factor {name!r} has has_rsample=False, which would give it the score "
                "gradient of a random site; write it into the model, or has_rsample=True"
            )
        if not _in_plate(site, "data"):
            raise ValueError(
                f"guide factor {name!r} is outside the data plate; write it into the model"
            )


def _sum_terms(traces: Traces, analytic: bool, detach_guide: bool, per_datum: bool) -> Terms:
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
            add("observed", _log_prob(name, site), site)
            continue
        kl = _analytic_kl(site, guide_site) if analytic else None
        kl_method[name] = "monte carlo" if kl is None else "analytic"
        if kl is not None:
            add("kl", kl, site)
        else:
            add("kl", _log_prob(name, guide_site, detach_guide), guide_site)
            add("kl", -_log_prob(name, site), site)
    for name, site in traces.guide.items():
        if name not in traces.model:  # a factor of the guide
            add("kl", _log_prob(name, site, detach_guide), site)
        if not site["fn"].has_rsample and not is_point(site["fn"]):
            log_q = _log_prob(name, site)
            if log_q.requires_grad and (shared["observed"] or not _in_plate(site, "data")):
                raise ValueError(
                    f"guide site {name!r} has no reparameterised gradient, and not all sites are "
                    "inside the data plate; train this pair with pyro.infer.Trace_ELBO"
                )
            if log_q.requires_grad:
                inside["score"].append(log_q)
    shape = (traces.num_particles, _data_size(traces))
    return Terms(
        log_likelihood=_total(inside["observed"], shape),
        kl=_total(inside["kl"], shape),
        score=_total(inside["score"], shape),
        shared=sum(shared["observed"], torch.zeros(())),
        shared_kl=sum(shared["kl"], torch.zeros(())),
        scale=_data_scale(traces) if per_datum else 1.0,
        kl_method=kl_method,
    )


def _log_prob(name: str, site: Site, detached: bool = False) -> Tensor:
    """Log-probability of a site, mask applied, subsampling scale not; errors name the site."""
    distribution = detach(site["fn"]) if detached else site["fn"]
    try:
        log_prob = distribution.log_prob(site["value"])
    except ValueError as error:
        raise ValueError(f"site {name!r}: {error}") from error
    return scale_and_mask(log_prob, mask=site["mask"])


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
    return scale_and_mask(torch.as_tensor(kl), mask=guide_site["mask"])


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


def _total(terms: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Sum terms that broadcast to (K, N); zeros where there are none."""
    if not terms:
        return torch.zeros(shape)
    return sum(terms[1:], terms[0]).expand(shape)


def _require_proposal(name: str, site: Site) -> None:
    """Refuse guide sites that give no importance weights, or a silently wrong gradient."""
    if is_point(site["fn"]):
        raise ValueError(
            f"guide site {name!r} is a point code (Delta): it is no proposal, and its weights are "
            "the joint density, no bound; use a GaussianEncoder, or ELBO for this loss"
        )
    if not site["fn"].has_rsample and _log_prob(name, site).requires_grad:
        raise ValueError(
            f"guide site {name!r} ({type(site['fn']).__name__}) has no reparameterised gradient, "
            "so importance weighting would leave it untrained; use ELBO, "
            "pyro.infer.TraceGraph_ELBO, or a reparameterised encoder"
        )


def _weight_gradient(z: Tensor, weights: Tensor) -> None:
    """Multiply the gradient that will reach z of shape (K, N, ...) by its weights, (K, N)."""
    weights = weights.reshape(*weights.shape, *[1] * (z.dim() - 2))
    z.register_hook(lambda gradient: gradient * weights)
