"""Annealed importance sampling: from what can be drawn from to the posterior of z."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn
from tqdm.auto import tqdm

from .autoencoder import Autoencoder, frozen
from .checks import require_density, require_gradients, require_parts
from .corruptions import encoder_input
from .distributions import has_component, is_discrete, is_flat, is_point, to_support
from .memory import rows_in_budget
from .part import as_number, require_count, require_flag
from .sampling import sample
from .sparse import SpikeAndSlab

Densities = Callable[[Tensor], tuple[Tensor, Tensor]]  # u -> log of start and of end, both (C, N)


@dataclass(frozen=True)
class Annealing:
    r"""How to anneal: the path from a start to the posterior, and the moves along it.

    .. math:: f_\beta(z) = q(z)^{1 - \beta}\, [p(z)\, p(x|z)]^\beta, \quad
              0 = \beta_0 < \dots < \beta_T = 1

    Args:
        num_temperatures: number T of steps of β; the error falls like 1/T.
        num_leapfrogs: leapfrog steps of the Hamiltonian move at each β.
        start: q, ``"prior"`` or ``"encoder"``, that of the pair; a ``proposal`` comes before both.
        schedule: ``"sigmoid"``, dense near both ends, or ``"linear"``.
        target_acceptance: of the moves; step sizes are tuned to it on a pilot run, with noise of
            its own, and then held fixed, as the estimate needs.
        num_pilot: temperatures of the pilot run.

    Raises:
        ValueError: an argument is out of range or unknown.

    Reference:
        Neal, Annealed importance sampling, 2001; Wu et al., On the quantitative analysis of
        decoder-based generative models, 2017.

    Example:
        >>> Annealing(num_temperatures=4, schedule="linear").betas().tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    num_temperatures: int = 500
    num_leapfrogs: int = 10
    start: str = "prior"
    schedule: str = "sigmoid"
    target_acceptance: float = 0.65
    num_pilot: int = 50

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("num_temperatures", "num_leapfrogs", "num_pilot"):
            require_count(getattr(self, name), name)
        if not isinstance(self.start, str) or self.start not in ("prior", "encoder"):
            raise ValueError(f"start must be 'prior' or 'encoder', got {self.start!r}")
        if not isinstance(self.schedule, str) or self.schedule not in ("sigmoid", "linear"):
            raise ValueError(f"schedule must be 'sigmoid' or 'linear', got {self.schedule!r}")
        if not 0.1 <= as_number(self.target_acceptance) <= 0.95:
            raise ValueError(
                f"target_acceptance must be in [0.1, 0.95], got {self.target_acceptance!r}"
            )

    def betas(self, count: int | None = None) -> Tensor:
        """Return β_0, …, β_T, in double precision; ``count`` in the place of T."""
        steps = require_count(self.num_temperatures if count is None else count, "count")
        fraction = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        if self.schedule == "linear":
            return fraction
        logistic = torch.sigmoid(8 * fraction - 4)
        return (logistic - logistic[0]) / (logistic[-1] - logistic[0])


class Weights(NamedTuple):
    """Log-weights of annealed chains, in nats, and how often moves were accepted.

    Example:
        >>> import torch
        >>> Weights(torch.zeros(16, 3), torch.full((3,), 0.65)).log_weights.shape
        torch.Size([16, 3])
    """

    log_weights: Tensor  # (C, N)
    acceptance: Tensor  # (N,) mean over chains and temperatures


def anneal(
    pair: Autoencoder,
    x: Tensor,
    num_chains: int,
    annealing: Annealing,
    proposal: nn.Module | None = None,
    end: Tensor | None = None,
    tick: Callable[[int], Any] = lambda steps: None,
) -> Weights:
    r"""Anneal chains for each datum; run it inside :func:`frozen`.

    .. math:: \log w = \sum_t (\beta_t - \beta_{t-1})
              \log \frac{p(z_{t-1})\,p(x|z_{t-1})}{q(z_{t-1})}, \quad E\,w = p(x)

    Moves are Hamiltonian, in coordinates where z is unconstrained and the start is as wide in
    all directions:
    one that is narrow in some needs steps that are short in those alone.

    Args:
        pair: its prior and decoder are used.
        x: data (N, *x_shape).
        num_chains: chains C per datum.
        annealing: the path and the moves.
        proposal: an encoder to start from.
        end: z (N, *z_shape) drawn from the posterior given x; then the path is run backwards from
            it, and -log w is returned, whose expectation is at least log p(x).
        tick: called after every temperature with the number of data it was done for.
    """
    prior = pair.prior()
    start = _start(pair, x, annealing, proposal)
    to_z = to_support(start)

    def draw(count: int) -> Tensor:
        return to_z.inv(start.expand(Size((len(x),))).sample(Size((count,))))

    unit = _width(draw(100))  # (N, *z_shape)

    def densities(u: Tensor) -> tuple[Tensor, Tensor]:
        scaled = unit * u
        z = to_z(scaled)
        volume = to_z.log_abs_det_jacobian(scaled, z)  # that of `unit` is a constant
        volume = volume.flatten(2).sum(2) if volume.dim() > 2 else volume
        log_joint = prior.log_prob(z) + pair.decoder(z).log_prob(x)
        return start.log_prob(z).expand(log_joint.shape) + volume, log_joint + volume

    def fresh() -> Tensor:
        return draw(num_chains) / unit

    pilot = annealing.betas(annealing.num_pilot)
    step_sizes = _tuned(densities, fresh(), pilot, annealing)  # (P, N)
    betas, u = annealing.betas(), fresh()
    if end is not None:
        u = (to_z.inv(end.expand(num_chains, *end.shape)) / unit).contiguous()
        betas = betas.flip(0)
    total = x.new_zeros(num_chains, len(x), dtype=torch.float64)
    accepted = x.new_zeros(len(x))
    log_start, log_end = densities(u)
    for before, beta in zip(betas[:-1].tolist(), betas[1:].tolist(), strict=True):
        total = total + (beta - before) * (log_end - log_start).double()
        size = _interpolate(step_sizes, pilot[1:], beta)
        u, log_start, log_end, rate = _move(densities, u, beta, size, annealing.num_leapfrogs)
        accepted = accepted + rate.mean(0)
        tick(len(x))
    return Weights(total if end is None else -total, accepted / (len(betas) - 1))


def _width(draws: Tensor) -> Tensor:
    """Return the interquartile range over the first dimension, finite where no variance is."""
    ordered, quarter = draws.sort(0).values, len(draws) // 4
    info, size = torch.finfo(draws.dtype), ordered[len(draws) // 2].abs()
    # no step below the rounding of u itself: the chain would stand still and look accepted
    return torch.maximum(ordered[-quarter] - ordered[quarter], size * info.eps + info.tiny)


def anneal_in_chunks(
    pair: Autoencoder,
    x: Tensor,
    num_chains: int,
    annealing: Annealing,
    proposal: nn.Module | None,
    seed: int | None,
    progress: bool,
    end: Tensor | None = None,
) -> Weights:
    """Anneal chunks of the data that fit in memory, one after the other; see :func:`anneal`."""
    rows = max(1, rows_in_budget(pair) // num_chains)
    total = len(x) * annealing.num_temperatures
    parts = []
    with (
        frozen(pair, seed),
        frozen(nn.Module() if proposal is None else proposal, None),
        tqdm(total=total, disable=not progress, unit="temperature", unit_scale=True) as bar,
    ):
        for first in range(0, len(x), rows):
            chunk = slice(first, first + rows)
            ends = None if end is None else end[chunk]
            part = anneal(pair, x[chunk], num_chains, annealing, proposal, ends, bar.update)
            parts.append(part)
    return Weights(
        torch.cat([part.log_weights for part in parts], 1),
        torch.cat([part.acceptance for part in parts]),
    )


def require_annealing(annealing: Any) -> Annealing:
    """Return ``annealing`` if it is one, or raise a ValueError."""
    if not isinstance(annealing, Annealing):
        raise ValueError(
            f"annealing must be a probae.Annealing, got {type(annealing).__name__}; for instance "
            "probae.Annealing(num_temperatures=1000)"
        )
    return annealing


def _start(pair: Autoencoder, x: Tensor, annealing: Annealing, proposal: nn.Module | None) -> Any:
    """Return the distribution to start from, or refuse what Hamiltonian moves cannot follow."""
    prior = pair.prior()
    if is_discrete(prior) or has_component(prior, SpikeAndSlab) or is_flat(prior):
        raise ValueError(
            f"method='ais' needs a prior with a density, got {type(prior).__name__}: Hamiltonian "
            "moves need gradients; use method='iwae' (for a point code with "
            "proposal=probae.fit_proposal(pair, x_train)), or 'exact' where z is discrete"
        )
    if proposal is None and annealing.start == "prior":
        return prior
    seen = encoder_input(pair.corruption, x)
    start = pair.encoder(seen) if proposal is None else proposal(x)
    if is_point(start) or is_flat(start):
        raise ValueError(
            f"start='encoder' needs an encoder with a density, but the pair is of kind "
            f"{pair.kind.value}; use start='prior', or pass proposal="
        )
    return start


def _move(
    densities: Densities, u: Tensor, beta: float, step_size: Tensor, num_leapfrogs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move chains by Hamiltonian dynamics that leave f_β invariant; step_size has shape (N,).

    Returns the new u, the log-densities of start and end there, and the acceptance rates (C, N).
    """
    size = step_size.reshape(1, -1, *[1] * (u.dim() - 2))

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_start, log_end = densities(u)
            target = (1 - beta) * log_start + beta * log_end
            (gradient,) = torch.autograd.grad(target.sum(), u)
        return log_start.detach(), log_end.detach(), gradient

    def energy(log_start: Tensor, log_end: Tensor, momentum: Tensor) -> Tensor:
        kinetic = 0.5 * momentum.square().reshape(*u.shape[:2], -1).sum(2)
        return kinetic - (1 - beta) * log_start - beta * log_end

    momentum = torch.randn_like(u)
    old_start, old_end, gradient = evaluate(u)
    before = energy(old_start, old_end, momentum)
    new, new_momentum = u, momentum + 0.5 * size * gradient
    for step in range(num_leapfrogs):
        new = new + size * new_momentum
        log_start, log_end, gradient = evaluate(new)
        half = 0.5 if step == num_leapfrogs - 1 else 1.0
        new_momentum = new_momentum + half * size * gradient
    log_ratio = before - energy(log_start, log_end, new_momentum)
    log_ratio = torch.where(log_ratio.isnan(), -math.inf, log_ratio)  # a trajectory that diverged
    rate = log_ratio.clamp(max=0).exp()  # (C, N)
    take = torch.rand_like(rate) < rate
    moved = torch.where(take.reshape(*take.shape, *[1] * (u.dim() - 2)), new, u)
    return (
        moved,
        torch.where(take, log_start, old_start),
        torch.where(take, log_end, old_end),
        rate,
    )


def _tuned(densities: Densities, u: Tensor, betas: Tensor, annealing: Annealing) -> Tensor:
    """Return the step size of each datum at each β after the first, (T, N), by a pilot run."""
    log_size = u.new_full((u.shape[1],), math.log(0.1))
    sizes = []
    for beta in betas[1:].tolist():
        for _ in range(4):
            u, _, _, rate = _move(densities, u, beta, log_size.exp(), annealing.num_leapfrogs)
            gain = rate.mean(0) - annealing.target_acceptance  # (N,)
            log_size = log_size + gain
        sizes.append(log_size)
    return torch.stack(sizes).exp()


def _interpolate(sizes: Tensor, betas: Tensor, beta: float) -> Tensor:
    """Return the step sizes, (N,), at the first β of the pilot that is not below ``beta``."""
    index = int(torch.searchsorted(betas, torch.tensor(beta, dtype=betas.dtype)))
    return sizes[min(index, len(sizes) - 1)]


class Sandwich(NamedTuple):
    """Lower and upper bounds on log p(x) of data simulated from the model, in nats per datum.

    Example:
        >>> import probae
        >>> sandwich = probae.bdmc(probae.PPCA(5, 2), 10, annealing=probae.Annealing(20))
        >>> sandwich.lower.shape, sandwich.upper.shape
        (torch.Size([10]), torch.Size([10]))
    """

    lower: Tensor  # (N,) log-mean weight of forward chains; at most log p(x), in expectation
    upper: Tensor  # (N,) that of backward chains; at least log p(x), in expectation
    acceptance: Tensor  # (N,) mean over both directions
    x: Tensor  # (N, *x_shape) the simulated data
    z: Tensor  # (N, *z_shape) the codes that made them

    @property
    def gap(self) -> float:
        """Mean of upper less lower: in expectation at least what the annealing loses there."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_std_error(self) -> float:
        """Standard error of the gap, over the data."""
        difference = self.upper - self.lower
        return float(difference.std() / math.sqrt(len(difference)))

    def __repr__(self) -> str:
        lower, upper = float(self.lower.mean()), float(self.upper.mean())
        return (
            f"Sandwich(lower {lower:.4f}, upper {upper:.4f} nats per datum, bounds on log p(x) in "
            f"expectation; gap {self.gap:.4f} ± {self.gap_std_error:.4f}, {len(self.x)} simulated "
            "data)"
        )


def bdmc(
    pair: Autoencoder,
    num_data: int = 100,
    num_chains: int = 16,
    *,
    annealing: Annealing | None = None,
    proposal: nn.Module | None = None,
    seed: int | None = 0,
    progress: bool = False,
) -> Sandwich:
    r"""Bidirectional Monte Carlo: bounds from both sides on data simulated from the model.

    .. math:: E \log \frac1C \sum_c w_c \le \log p(x) \le
              -E \log \frac1C \sum_c \frac{1}{w'_c},\quad (x, z) \sim p(x, z)

    The code z that made x is an exact draw from the posterior; chains that run backwards from it
    bound log p(x) from above. The gap bounds the error of ``log_likelihood(pair, x, "ais")`` with
    the same settings, chains included, on data that the model makes; on other data it is an
    indication. Both are bounds in expectation: over few data they may cross, by the gap's error.

    Args:
        pair: a pair with a proper, continuous prior; it is not changed.
        num_data: number N of simulated data, at least 2.
        num_chains: chains C per datum, in each direction.
        annealing: temperatures, moves and start; default: ``Annealing()``.
        proposal: an encoder to anneal from; see :func:`probae.log_likelihood`.
        seed: of data and chains; None draws from the global stream.
        progress: show a progress bar for each direction.

    Returns:
        Sandwich: bounds per datum in nats, the gap and its standard error, and the data.

    Raises:
        ValueError: a count out of range, a flat or discrete prior, an encoder that does not fit.

    Reference:
        Grosse, Ghahramani & Adams, Sandwiching the marginal likelihood using bidirectional Monte
        Carlo, 2015; Wu et al., On the quantitative analysis of decoder-based generative models,
        2017.

    Example:
        >>> import probae
        >>> sandwich = probae.bdmc(probae.PPCA(5, 2), 10, annealing=probae.Annealing(20))
        >>> abs(sandwich.gap) < 0.5
        True
    """
    require_parts(pair)
    require_count(num_data, "num_data", least=2)
    require_count(num_chains, "num_chains")
    require_flag(progress, "progress")
    require_gradients("bdmc")
    annealing = Annealing() if annealing is None else require_annealing(annealing)
    x, z = sample(pair, num_data, seed=seed)
    if proposal is not None:
        require_density(pair, proposal, x[:2], "proposal")
    chains = (num_chains, annealing, proposal, None if seed is None else seed + 1, progress)
    forward = anneal_in_chunks(pair, x, *chains)
    backward = anneal_in_chunks(pair, x, *chains, end=z)
    count = math.log(num_chains)
    return Sandwich(
        lower=forward.log_weights.logsumexp(0) - count,
        upper=count - (-backward.log_weights).logsumexp(0),
        acceptance=(forward.acceptance + backward.acceptance) / 2,
        x=x,
        z=z,
    )
