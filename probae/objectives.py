"""Objectives that Pyro lacks: an ELBO that reports how it got its KL, per-datum IWAE, walkback.

All are :class:`pyro.infer.ELBO` objects: pass them to :class:`pyro.infer.SVI` or to
:func:`probae.fit`. As everywhere in Pyro, their loss is summed over the data of the batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .distributions import is_point
from .part import as_number, require_count, require_flag
from .terms import Program, Site, Terms, elbo_terms, log_prob_of, sum_terms, trace_pair


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

    def __post_init__(self) -> None:
        if not math.isfinite(as_number(self.epochs)):
            raise ValueError(
                f"epochs of a warm-up must be a finite number > 0, got {self.epochs!r}"
            )
        for name in ("start", "end"):
            if not math.isfinite(as_number(getattr(self, name))):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}")

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


@contextlib.contextmanager
def at_the_end(objective: Any) -> Iterator[None]:
    """Set the schedules of an objective to the end of training."""
    if not isinstance(objective, PerDatumObjective):
        yield
        return
    epoch, objective.epoch = objective.epoch, math.inf
    try:
        yield
    finally:
        objective.epoch = epoch


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
        self.analytic_kl = require_flag(analytic_kl, "analytic_kl")
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
        return self.loss_of(terms)

    def loss_of(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """Return -L of each datum, (N,), and minus the observed terms that all share."""
        elbo = terms.log_likelihood - self.beta * terms.kl  # (K, N)
        elbo = _with_score_gradient(elbo, terms.score)
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
        self.dreg = require_flag(dreg, "dreg")

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
        terms = sum_terms(traces, analytic=False, detach_guide=self.dreg, per_datum=True)
        log_weights = terms.log_likelihood - terms.kl  # (K, N)
        bound = torch.logsumexp(log_weights, 0) - math.log(self.num_particles)
        self.kl_method = terms.kl_method
        if self.dreg and self.num_particles > 1:
            weights = torch.softmax(log_weights.detach(), 0)  # (K, N), once more than logsumexp's
            for site in pathwise:
                _weight_gradient(site["value"], weights)
        return -terms.scale * bound, -terms.shared


class Walkback(PerDatumObjective):
    r"""Denoising loss along a chain that the model itself walks, away from the data and back.

    .. math:: L = \frac1k \sum_{t=1}^k \log p(x|\tilde x_t),\quad
              \tilde x_t \sim C(\tilde x|x_{t-1}),\quad x_t \sim p(x|\tilde x_t),\quad x_0 = x

    Each step learns to come back to the datum x from a place where the chain of
    :func:`probae.gsn_chain` goes by itself, so that modes of the model far from all data, which
    plain corruption never visits, are unlearned. Gradients go through the k reconstructions and not
    along the chain. One step is the plain denoising loss; k steps cost k times as much.

    Under a proper prior each term holds the KL of z too. It is then a lower bound on log p(x) as
    ever, which holds at any x_tilde; for a :class:`DenoisingAutoencoder` the loss is a conditional
    one (kind CONDITIONAL) and says nothing about log p(x).

    Args:
        num_steps: number k of steps of the chain.

    Raises:
        ValueError: ``num_steps`` < 1; or, when it is evaluated, programs without a corruption (no
            site ``x_tilde``), or with one that it would leave untrained.

    Reference:
        Bengio et al., Generalized denoising auto-encoders as generative models, 2013, section 4;
        Bengio et al., Deep generative stochastic networks trainable by backprop, 2014.

    Example:
        >>> import torch, probae
        >>> pair = probae.DenoisingAutoencoder(8, 20, corruption=probae.GaussianNoise(0.3))
        >>> x = torch.randn(64, 8)
        >>> run = probae.fit(pair, x, epochs=2, objective=probae.Walkback(3), progress=False)
        >>> run.objective, run.kind.value
        ('Walkback', 'CONDITIONAL')
    """

    def __init__(self, num_steps: int = 5) -> None:
        super().__init__(1)
        self.num_steps = require_count(num_steps, "num_steps")

    def per_datum_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the chain of each datum, (N,) in nats, and what all share."""
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                "Walkback needs the data as the first argument of model and guide, a tensor"
            )
        x, *others = args
        state, losses, shared = x, [], []
        for _ in range(self.num_steps):
            corrupted = _Corrupted()
            traces = trace_pair(  # x is observed, and x_tilde comes from the chain
                partial(corrupted(model), x, *others, **kwargs),
                partial(corrupted(guide), state, *others, **kwargs),
                (),
                {},
                num_particles=1,
            )
            _require_corruption(corrupted.site, traces.model.get("x"))
            terms = sum_terms(traces, analytic=True, detach_guide=False, per_datum=False)
            elbo = _with_score_gradient(terms.log_likelihood - terms.kl, terms.score)
            losses.append(-elbo.mean(0))
            shared.append(terms.shared_kl - terms.shared)
            with torch.no_grad():
                state = traces.model["x"]["fn"].sample().to(x.dtype)
            if state.shape != x.shape:
                raise ValueError(
                    f"site 'x' must have the shape of the data, {tuple(x.shape)}, got "
                    f"{tuple(state.shape)}; Walkback takes no subsampling inside the programs"
                )
        self.kl_method = terms.kl_method
        return torch.stack(losses).mean(0), torch.stack(shared).mean(0)


class _Corrupted(Messenger):
    """Hand the x_tilde that one program draws to the next, and show it to no handler outside."""

    site: Site | None = None

    def _pyro_sample(self, site: Site) -> None:
        if site["name"] == "x_tilde":
            site["stop"] = True
            site["value"] = None if self.site is None else self.site["value"]

    def _pyro_post_sample(self, site: Site) -> None:
        if site["name"] == "x_tilde" and self.site is None:
            self.site = site


def _require_corruption(corrupted: Site | None, observed: Site | None) -> None:
    """Refuse programs in which there is nothing to walk back from, or back to."""
    if corrupted is None:
        raise ValueError(
            "Walkback needs a corruption, a site 'x_tilde' in the guide, and there is none; give "
            "the pair one, such as corruption=probae.GaussianNoise(0.3), or use probae.ELBO"
        )
    if observed is None or not observed["is_observed"]:
        raise ValueError("Walkback needs an observed site 'x' in the model, p(x|z) at the data")
    learns = is_validation_enabled() and not corrupted["fn"].has_rsample
    if learns and log_prob_of("x_tilde", corrupted).requires_grad:
        raise ValueError(
            f"site 'x_tilde' ({type(corrupted['fn']).__name__}) has parameters that Walkback would "
            "leave untrained; fix them with corruption.requires_grad_(False), or use probae.ELBO"
        )


def _with_score_gradient(elbo: Tensor, score: Tensor) -> Tensor:
    """Add the score-function gradient, with a leave-one-out baseline, to the (K, N) terms."""
    if not score.requires_grad:
        return elbo
    signal = elbo.detach()
    if signal.numel() > 1:
        signal = signal - (signal.sum() - signal) / (signal.numel() - 1)
    score = signal * score
    return elbo + score - score.detach()


def _require_proposal(name: str, site: Site) -> None:
    """Refuse guide sites that give no importance weights, or a silently wrong gradient."""
    if is_point(site["fn"]):
        raise ValueError(
            f"guide site {name!r} is a point code (Delta): it is no proposal, and its weights are "
            "the joint density, no bound; use a GaussianEncoder, or ELBO for this loss"
        )
    if not site["fn"].has_rsample and log_prob_of(name, site).requires_grad:
        raise ValueError(
            f"guide site {name!r} ({type(site['fn']).__name__}) has no reparameterised gradient, "
            "so importance weighting would leave it untrained; use ELBO, "
            "pyro.infer.TraceGraph_ELBO under pyro.infer.SVI, or a reparameterised encoder"
        )


def _weight_gradient(z: Tensor, weights: Tensor) -> None:
    """Multiply the gradient that will reach z of shape (K, N, ...) by its weights, (K, N)."""
    weights = weights.reshape(*weights.shape, *[1] * (z.dim() - 2))
    z.register_hook(lambda gradient: gradient * weights)


def is_known(objective: Any) -> bool:
    """Whether an objective is none of a user's own, which may do something every step."""
    return type(objective).__module__.split(".")[0] in ("probae", "pyro", "torch")
