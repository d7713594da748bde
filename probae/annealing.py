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
from .graphs import attempt, compiled, require_mode
from .memory import rows_in_budget
from .part import as_number, require_count, require_flag
from .precision import float32_products
from .sampling import sample
from .sparse import SpikeAndSlab

Densities = Callable[[Tensor], tuple[Tensor, Tensor]]  # u -> log of start and of end, both (C, N)
Leap = Callable[..., list[Tensor]]  # what _leap returns

PILOT_MOVES = 4  # at each temperature of the pilot run
WORTH = 5000  # leapfrog steps, each of about a millisecond, that earn a compilation back


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


class Compiler:
    """Makes machine code of leapfrog steps, where it is wanted and can be made.

    Args:
        mode: True, False, or ``"auto"``: where at least ``WORTH`` steps are expected.
    """

    def __init__(self, mode: bool | str) -> None:
        self.mode = mode
        self.known: dict[Any, Callable[..., Any]] = {}  # serves all chunks of one shape

    def expect(self, num_steps: int) -> None:
        """Give up ``"auto"`` where so few steps are to be taken: never by a clock."""
        if self.mode == "auto" and num_steps < WORTH:
            self.mode = False

    def __call__(self, leap: Leap, inputs: list[Tensor]) -> Leap:
        """Return the step as machine code for inputs of these shapes, or as it is."""
        made = attempt(
            self.mode,
            lambda: compiled(leap, inputs, self.known),
            "chains are annealed",
            stacklevel=5,  # of who called log_likelihood or bdmc
        )
        if made is None:
            self.mode = False
        return made or leap


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
    compiler: Compiler | None = None,
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
        compiler: makes machine code of leapfrog steps.
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
        return (draw(num_chains) / unit).contiguous()  # as machine code expects it

    pilot, u = annealing.betas(annealing.num_pilot), fresh()
    leap = _leap(densities)
    if compiler is not None:
        size, beta = u.new_full((len(x),), 0.1), u.new_full((), 0.3, dtype=torch.float64)
        leap = compiler(leap, [u, -u, size, 2 * size, beta])
    step_sizes = _tuned(leap, u, pilot, annealing)  # (P, N)
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
        u, log_start, log_end, rate = _move(leap, u, beta, size, annealing.num_leapfrogs)
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
    compiler: Compiler,
    end: Tensor | None = None,
) -> Weights:
    """Anneal chunks of the data that fit in memory, one after the other; see :func:`anneal`.

    A last chunk that is smaller than the others is annealed eagerly.
    """
    rows = min(len(x), max(1, rows_in_budget(pair) // num_chains))
    moves = PILOT_MOVES * annealing.num_pilot + annealing.num_temperatures
    compiler.expect(len(x) // rows * moves * (annealing.num_leapfrogs + 1))
    total = len(x) * annealing.num_temperatures
    parts = []
    with (
        frozen(pair, seed),
        frozen(nn.Module() if proposal is None else proposal, None),
        float32_products(pair.device),
        tqdm(total=total, disable=not progress, unit="temperature", unit_scale=True) as bar,
    ):
        for first in range(0, len(x), rows):
            chunk = slice(first, first + rows)
            ends = None if end is None else end[chunk]
            whole = compiler if len(x[chunk]) == rows else None
            part = anneal(pair, x[chunk], num_chains, annealing, proposal, ends, bar.update, whole)
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


def _leap(densities: Densities) -> Leap:
    """Return one leapfrog step: it moves u, and pushes the momentum by the gradient of log f_β.

    All that differs from step to step is a tensor, so that machine code serves every β.
    """

    def leap(
        u: Tensor, momentum: Tensor, drift: Tensor, kick: Tensor, beta: Tensor
    ) -> list[Tensor]:
        each = (1, -1, *[1] * (u.dim() - 2))  # drift and kick have shape (N,)
        u = u + drift.reshape(each) * momentum
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_start, log_end = densities(u)
            target = (1 - beta) * log_start + beta * log_end
            (gradient,) = torch.autograd.grad(target.sum(), u)
        pushed = momentum + kick.reshape(each) * gradient
        return [u.detach(), pushed, log_start.detach(), log_end.detach()]

    return leap


def _move(
    leap: Leap, u: Tensor, beta: float, step_size: Tensor, num_leapfrogs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move chains by Hamiltonian dynamics that leave f_β invariant; step_size has shape (N,).

    Returns the new u, the log-densities of start and end there, and the acceptance rates (C, N).
    """
    at = torch.tensor(beta, dtype=torch.float64, device=u.device)
    half, none = 0.5 * step_size, torch.zeros_like(step_size)

    def energy(log_start: Tensor, log_end: Tensor, momentum: Tensor) -> Tensor:
        kinetic = 0.5 * momentum.square().reshape(*u.shape[:2], -1).sum(2)
        return kinetic - (1 - beta) * log_start - beta * log_end

    momentum = torch.randn_like(u)
    new, pushed, old_start, old_end = leap(u, momentum, none, half, at)
    before = energy(old_start, old_end, momentum)
    for step in range(num_leapfrogs):
        kick = half if step == num_leapfrogs - 1 else step_size
        new, pushed, log_start, log_end = leap(new, pushed, step_size, kick, at)
    log_ratio = before - energy(log_start, log_end, pushed)
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


def _tuned(leap: Leap, u: Tensor, betas: Tensor, annealing: Annealing) -> Tensor:
    """Return the step size of each datum at each β after the first, (T, N), by a pilot run."""
    log_size = u.new_full((u.shape[1],), math.log(0.1))
    sizes = []
    for beta in betas[1:].tolist():
        for _ in range(PILOT_MOVES):
            u, _, _, rate = _move(leap, u, beta, log_size.exp(), annealing.num_leapfrogs)
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
    compile: bool | str = "auto",
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
        compile: let machine code move the chains; see :func:`probae.log_likelihood`.

    Returns:
        Sandwich: bounds per datum in nats, the gap and its standard error, and the data.

    Raises:
        ValueError: a count out of range, a flat or discrete prior, an encoder that does not fit.
        CannotCompile: ``compile=True``, and the moves cannot be compiled; the message says why.

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
    require_mode(compile)
    require_gradients("bdmc")
    annealing = Annealing() if annealing is None else require_annealing(annealing)
    x, z = sample(pair, num_data, seed=seed)
    if proposal is not None:
        require_density(pair, proposal, x[:2], "proposal")
    seed = None if seed is None else seed + 1
    chains = (num_chains, annealing, proposal, seed, progress, Compiler(compile))
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
