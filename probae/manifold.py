"""The geometry that a decoder gives to the space of codes: its metric, and its straightest ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, Poisson

from .autoencoder import Autoencoder, frozen
from .checks import likelihood_of, prior_of, require_finite, require_gradients, require_pair
from .corrupted import Replacement, Seen
from .datasets import as_tensor
from .distributions import (
    ContinuousBernoulli,
    DiscretizedLogistic,
    base_distribution,
    is_discrete,
    is_flat,
)
from .memory import rows_in_budget
from .part import require_count, require_positive

ROUND = 20  # iterations of L-BFGS between two looks at the energy


class Geodesic(NamedTuple):
    """The shortest way between codes, as points at nearly equal distances.

    Example:
        >>> import torch, probae
        >>> way = probae.geodesic(probae.PPCA(5, 2), torch.zeros(2), torch.ones(2), num_points=4)
        >>> way.z.shape, way.x.mean.shape, way.length.shape
        (torch.Size([4, 2]), torch.Size([4, 5]), torch.Size([]))
    """

    z: Tensor  # (T, *z_shape) or (T, N, *z_shape), both ends among them
    x: Distribution  # p(x|z): batch shape (T,) or (T, N)
    length: Tensor  # () or (N,): in standard deviations, the square root of nats
    straight_length: Tensor  # () or (N,): of the straight line of codes, through as many points
    converged: Tensor  # () or (N,) bool: whether the energy has stopped to fall


def pullback_metric(pair: Autoencoder, z: Tensor | Any) -> Tensor:
    r"""Return the Fisher information of p(x|z) about z: the metric of x-space, pulled back to z.

    .. math:: G(z) = E_{p(x|z)} \big[\nabla_z \log p(x|z)\; \nabla_z \log p(x|z)^T\big]
              = J_\mu(z)^T F(\mu)\, J_\mu(z), \quad
              KL(p(x|z) \,\|\, p(x|z + dz)) = \tfrac12\, dz^T G(z)\, dz + O(|dz|^3)

    with J_μ the Jacobian of the decoder's parameters and F their Fisher information, which is known
    for each family: for a Gaussian decoder of one scale, :math:`G = J_\mu^T J_\mu / \sigma^2`. It
    is exact up to rounding: nothing is drawn. :math:`\sqrt{\det G}` tells how much of x-space a
    cell of code space covers; under z = φ(y), G becomes :math:`J_\phi^T G\, J_\phi`.

    Under a Bernoulli decoder the x are bits; with a :class:`CorruptedDecoder` p(x_tilde|z) stands
    in the place of p(x|z). The encoder takes no part, the prior only in that it has to be
    continuous. Derivatives are those that forward-mode autograd gives, in evaluation mode; that of
    rounding, for instance, is 0.

    Args:
        pair: a pair with continuous codes, and a decoder that is a product over the entries of x,
            each Normal, Bernoulli, ContinuousBernoulli, Poisson, Categorical, DiscretizedLogistic
            or one of these corrupted; it is not changed.
        z: codes (N, *z_shape): tensor, array, path or Dataset.

    Returns:
        Tensor: (N, k, k) with k the number of entries of a code, in nats per squared unit of z;
        symmetric and, up to rounding, positive semi-definite.

    Raises:
        ValueError: bad codes (shape, dtype, empty, NaN), discrete codes, a decoder that autograd
            cannot see through, or one of another family.

    Reference:
        Arvanitidis, Hansen & Hauberg, Latent space oddity: on the curvature of deep generative
        models, 2018; Arvanitidis et al., Pulling back information geometry, 2022.

    Example:
        >>> import torch, probae
        >>> pair = probae.PPCA(5, 2, scale=0.5)
        >>> weight = pair.decoder.network.output.weight
        >>> G = probae.pullback_metric(pair, torch.randn(7, 2))
        >>> G.shape, torch.allclose(G, weight.T @ weight / 0.5**2, atol=1e-5)
        (torch.Size([7, 2, 2]), True)
    """
    require_pair(pair)
    require_finite(pair)
    require_gradients("pullback_metric")
    codes = as_tensor(z, "z").to(pair.device, pair.dtype)
    if tuple(codes.shape[1:]) != pair.z_shape:
        raise ValueError(
            f"z must have shape (N, {', '.join(map(str, pair.z_shape))}), got "
            f"{tuple(codes.shape)}"
            + ("; add a batch dimension with z[None]" if tuple(codes.shape) == pair.z_shape else "")
        )
    _require_continuous(prior_of(pair))
    size = codes[0].numel()
    basis = torch.eye(size).to(codes).reshape(size, 1, *pair.z_shape)
    rows = max(1, rows_in_budget(pair) // size)
    with frozen(pair, seed=0):
        return torch.cat([_metric(pair, chunk, basis) for chunk in codes.split(rows)])


def geodesic(
    pair: Autoencoder,
    z0: Tensor | Any,
    z1: Tensor | Any,
    *,
    num_points: int = 16,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
) -> Geodesic:
    r"""Go from one code to another on the shortest way under the :func:`pullback_metric`.

    .. math:: \min_{z_2, \dots, z_{T-1}} \; (T - 1) \sum_{t=1}^{T-1} J(z_t, z_{t+1}),\quad
              J(z, z') = KL(p_z \| p_{z'}) + KL(p_{z'} \| p_z)
              = dz^T G\big(\tfrac{z + z'}2\big)\, dz + O(|dz|^4)

    with p_z = p(x|z): a discrete energy under the metric G, without a Jacobian. For a Gaussian
    decoder of one scale J is :math:`\|g(z) - g(z')\|^2 / \sigma^2`. As T grows, the steps tend to
    one length and the chain to the geodesic; its length is :math:`\sum_t \sqrt{J(z_t, z_{t+1})}`.
    Where the decoder maps far codes close together, or the straight line leaves what it has
    learned, the geodesic bends around.

    It is found from a place beside the straight line on, by L-BFGS in coordinates in which the
    steps of a flat metric are independent; so it is a local minimum, and the length an upper bound
    on that of the shortest chain. Where there are no data, it is as good as the decoder
    extrapolates.

    Args:
        pair: a pair with continuous codes, and a decoder that is a product over the entries of x,
            each Normal, Bernoulli, ContinuousBernoulli, Poisson, Categorical or
            DiscretizedLogistic; it is not changed. The encoder takes no part.
        z0: start: one code (*z_shape), or N codes (N, *z_shape).
        z1: end, as many.
        num_points: T, both ends among them, at least 3.
        max_iterations: of L-BFGS, in rounds of 20.
        tolerance: the energy has converged where a round changes it by less than this share.

    Returns:
        Geodesic: codes, p(x|z) and lengths.

    Raises:
        ValueError: bad codes (shape, dtype, empty, NaN), or outside the support of the prior, or a
            way that leaves it; discrete codes; a decoder of another family, or one that autograd
            cannot see through; an argument out of range.

    Reference:
        Arvanitidis, Hansen & Hauberg, Latent space oddity: on the curvature of deep generative
        models, 2018; Shao, Kumar & Fletcher, The Riemannian geometry of deep generative models,
        2018.

    Example:
        >>> import torch, probae
        >>> pair = probae.PPCA(5, 2)  # linear: the shortest way is straight
        >>> way = probae.geodesic(pair, torch.zeros(3, 2), torch.randn(3, 2), num_points=5)
        >>> torch.allclose(way.length, way.straight_length, rtol=1e-4)
        True
    """
    require_pair(pair)
    require_finite(pair)
    require_gradients("geodesic")
    num_points = require_count(num_points, "num_points", least=3)
    max_iterations = require_count(max_iterations, "max_iterations")
    tolerance = require_positive(tolerance, "tolerance")
    prior = prior_of(pair)
    _require_continuous(prior)
    ends = [_end(pair, prior, code, name) for code, name in ((z0, "z0"), (z1, "z1"))]
    if ends[0].shape != ends[1].shape:
        raise ValueError(
            f"z1 must be as many codes as z0, got shapes {tuple(ends[1].shape)} and "
            f"{tuple(ends[0].shape)}"
        )
    one = ends[0].dim() == len(pair.z_shape)
    start, end = (code[None] if one else code for code in ends)
    levels = getattr(likelihood_of(pair), "levels", 1)  # each is kept for the backward pass
    rows = max(1, rows_in_budget(pair) // (num_points * levels))
    with frozen(pair, seed=0):
        pieces = [
            _shortest(pair, a, b, num_points, max_iterations, tolerance)
            for a, b in zip(start.split(rows), end.split(rows), strict=True)
        ]
        z = torch.cat([piece[0] for piece in pieces], 1)
        rest = [torch.cat(parts) for parts in zip(*(piece[1:] for piece in pieces), strict=True)]
        if not prior.support.check(z).all():
            raise ValueError(
                f"z0 and z1 must be joined by a way inside the support of the prior "
                f"({prior.support}), but the shortest leaves it; take nearer codes, or a prior on "
                "all real codes"
            )
        if one:
            z, rest = z[:, 0], [part[0] for part in rest]
        return Geodesic(z, pair.decoder(z), *rest)


def _end(pair: Autoencoder, prior: Any, value: Any, argument: str) -> Tensor:
    """Return one code (*z_shape) or codes (N, *z_shape), checked."""
    codes = as_tensor(value, argument).detach().to(pair.device, pair.dtype)
    if pair.z_shape not in (tuple(codes.shape), tuple(codes.shape[1:])):
        raise ValueError(
            f"{argument} must be one code of shape {pair.z_shape}, or of shape "
            f"(N, {', '.join(map(str, pair.z_shape))}), got {tuple(codes.shape)}; the codes of "
            "data are pair.encoder(x).mean"
        )
    if not prior.support.check(codes).all():
        raise ValueError(
            f"{argument} must lie in the support of the prior ({prior.support}), got codes outside"
        )
    return codes


def _require_continuous(prior: Any) -> None:
    if is_discrete(prior):
        raise ValueError(
            f"pair must have continuous codes, got a prior of type "
            f"{type(base_distribution(prior)).__name__}: between discrete codes there is no metric"
        )


def _shortest(
    pair: Autoencoder,
    start: Tensor,
    end: Tensor,
    num_points: int,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes (T, n, *z_shape), their length, that of the line, and convergence, (n,)."""
    inner, share = num_points - 2, torch.linspace(0, 1, num_points).to(start)
    share = share.reshape(-1, *[1] * start.dim())
    line = (1 - share) * start + share * end
    # a flat energy has the Hessian of a chain of springs, L Lᵀ; in y, z = line + L⁻ᵀ y, it is 1
    beside = torch.ones(inner - 1, dtype=torch.float64)
    springs = 2 * torch.eye(inner).double() - beside.diag(1) - beside.diag(-1)
    upper = torch.linalg.cholesky(springs).mT.to(start)
    with torch.enable_grad():
        # no gradient leads off a line over the very top of a hill: begin a little beside it
        aside = torch.randn(
            inner, 1, *start.shape[1:], generator=torch.Generator().manual_seed(0)
        ).to(start)
        reach = (end - start).flatten(1).norm(dim=1).reshape(-1, *[1] * (start.dim() - 1))
        bend = (1e-3 / inner * reach * aside).flatten(1).requires_grad_()

        def chain() -> Tensor:
            moved = torch.linalg.solve_triangular(upper, bend, upper=True)
            return torch.cat([line[:1], line[1:-1] + moved.unflatten(1, start.shape), line[-1:]])

        def energies() -> Tensor:
            return (num_points - 1) * _steps(pair, chain()).sum(0)  # (n,)

        value = energies()
        seen = value.requires_grad and torch.autograd.grad(value.sum(), bend, allow_unused=True)[0]
        if not isinstance(seen, Tensor):
            raise _no_path(pair)
        before = after = value.detach()
        scale = torch.where(before > 0, before, torch.ones_like(before))  # all curves weigh alike
        optimizer = torch.optim.LBFGS(
            [bend],
            max_iter=ROUND,
            history_size=ROUND,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = (energies() / scale).sum()
            total.backward(inputs=[bend])
            return total

        for _ in range(-(-max_iterations // ROUND)):
            optimizer.step(closure)
            before, after = after, energies().detach()
            if ((before - after).abs() <= tolerance * before).all():
                break
    z, converged = chain().detach(), (before - after).abs() <= tolerance * before
    length, straight = (_steps(pair, way).clamp(min=0).sqrt().sum(0) for way in (z, line))
    found = z, length, straight, converged
    for i in (~converged).nonzero().flatten().tolist() if len(start) > 1 else ():
        one = slice(i, i + 1)  # by itself: the memory of L-BFGS is shared by all of a block
        alone = _shortest(pair, start[one], end[one], num_points, max_iterations, tolerance)
        z[:, one] = alone[0]
        for whole, part in zip(found[1:], alone[1:], strict=True):
            whole[one] = part
    return found


def _steps(pair: Autoencoder, z: Tensor) -> Tensor:
    """Return J between codes that follow each other in z (T, n, *z_shape), (T - 1, n)."""
    law = _entries(pair.decoder(z.flatten(0, 1)))

    def path(parameter: Tensor) -> Tensor:  # from (T * n, ...) to (T, n, entries)
        return parameter.reshape(*z.shape[:2], -1)

    def step(parameter: Tensor) -> Tensor:
        return path(parameter).diff(dim=0)

    if isinstance(law, Normal):
        precision = path(law.scale**-2)
        divergence = step(law.loc) ** 2 * (precision[1:] + precision[:-1]) / 2
        divergence = divergence + 2 * torch.sinh(step(law.scale.log())) ** 2
    elif isinstance(law, Bernoulli):
        divergence = step(law.logits) * step(torch.sigmoid(law.logits))
    elif isinstance(law, ContinuousBernoulli):
        divergence = step(law.logits) * step(law.mean)
    elif isinstance(law, Poisson):
        divergence = step(law.rate.log()) * step(law.rate)
    elif isinstance(law, Categorical):
        divergence = step(law.logits) * step(law.probs)
    elif isinstance(law, DiscretizedLogistic):
        divergence = torch.zeros_like(step(law.loc))
        for level in range(law.levels):
            log_prob = law.log_prob(torch.full_like(law.loc, level / (law.levels - 1)))
            divergence = divergence + step(log_prob) * step(log_prob.exp())
    else:
        raise ValueError(
            "decoder must be a product over the entries of x, each Normal, Bernoulli, "
            "ContinuousBernoulli, Poisson, Categorical or DiscretizedLogistic, got "
            f"{type(law).__name__}: its divergence is not known here; for a CorruptedDecoder take "
            "a pair with the clean decoder, pair.decoder.decoder"
        )
    return divergence.sum(-1)


def _metric(pair: Autoencoder, z: Tensor, basis: Tensor) -> Tensor:
    """Return G at z (n, *z_shape), by one forward pass of k copies, each with its own tangent."""
    still = _entries(pair.decoder(z))
    size, copies = len(basis), z.repeat(len(basis), *[1] * (z.dim() - 1))  # (k * n, *z_shape)
    tangents = basis.expand(size, *z.shape).reshape_as(copies)
    metric, differentiable = z.new_zeros(len(z), size, size), False
    with forward_ad.dual_level():
        try:
            law = pair.decoder(forward_ad.make_dual(copies, tangents))
            pieces = list(_information(_entries(law), still))
        except NotImplementedError as error:
            raise ValueError(f"decoder must have forward-mode derivatives: {error}") from error
        for coordinate, weight in pieces:
            tangent = forward_ad.unpack_dual(coordinate).tangent  # (k * n, *x_shape)
            if tangent is None:  # a parameter that z does not move, such as one scale for all
                continue
            differentiable = True
            tangent = tangent.reshape(size, len(z), -1).transpose(0, 1)  # (n, k, entries)
            metric = metric + (tangent * weight.reshape(len(z), 1, -1)) @ tangent.mT
    if not differentiable:
        raise _no_path(pair)
    return (metric + metric.mT) / 2


def _entries(law: Any) -> Any:
    """Return the distribution of the entries of x, or refuse a law that is no product of them."""
    base = base_distribution(law)
    entries = law.event_shape[1:] if isinstance(base, Seen) else law.event_shape
    clean = base.component_distribution if isinstance(base, Seen) else base
    if clean.batch_shape != law.batch_shape + entries:
        raise _unknown(base)
    if is_flat(clean if isinstance(base, Seen) else law):
        raise ValueError(
            "decoder must have a density that is not masked, got one with a mask: entries that are "
            "left out say nothing of z; for missing entries use CorruptedDecoder with "
            "Masking(known=True)"
        )
    return base


def _information(moved: Any, still: Any) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Yield coordinates c of the law of the entries, and weights w: G = Σ w ∂c ∂cᵀ.

    Coordinates are those of ``moved``, (k * n, ...), which has tangents; weights are the Fisher
    information in them at ``still``, (n, ...), the same law without.
    """
    if isinstance(still, Normal):
        yield moved.loc, still.scale**-2
        yield moved.scale.log(), torch.full_like(still.scale, 2.0)
    elif isinstance(still, Bernoulli):
        yield moved.logits, torch.sigmoid(still.logits) * torch.sigmoid(-still.logits)
    elif isinstance(still, ContinuousBernoulli):
        yield moved.logits, _variance(still)
    elif isinstance(still, Poisson):
        yield moved.rate, 1 / still.rate
    elif isinstance(still, Categorical):
        yield moved.logits, still.probs  # logits are log-probabilities here
    elif isinstance(still, DiscretizedLogistic):
        # the information is a 2 x 2 matrix; completing the square makes it diagonal
        of_loc, of_both, of_scale = _information_of_levels(still)
        ratio = torch.where(of_loc > 0, of_both / of_loc, 0.0)
        shape = (-1, *ratio.shape)  # (k, n, ...)
        yield moved.loc.reshape(shape) + ratio * moved.scale.reshape(shape), of_loc
        yield moved.scale, (of_scale - ratio * of_both).clamp(min=0)
    elif isinstance(still, Seen):
        for coordinate, weight in _information(
            moved.component_distribution, still.component_distribution
        ):
            yield coordinate, (1 - still.probability) * weight
    elif isinstance(still, Replacement) and _is_fixed(still):
        yield from _information_left(moved, still)
    else:
        raise _unknown(still)


def _information_left(moved: Replacement, still: Replacement) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what replacing entries leaves: less at values that the clean entries take, too."""
    kept, clean = 1 - still.probability, still.component_distribution
    for coordinate, weight in _information(moved.component_distribution, clean):
        yield coordinate, kept * weight
    if not clean.support.is_discrete:  # then an entry with the value of an atom was replaced
        return
    for value in set(still.values):
        x = weight.new_tensor(value)
        replaced = (still.log_replaced(x) - still.log_prob(x)).exp()  # probability, given x
        lost = kept * clean.log_prob(x).exp() * replaced
        yield moved.component_distribution.log_prob(x), -lost


def _is_fixed(law: Replacement) -> bool:
    """Whether chance and values are plain numbers, as those of corruptions, which z cannot move."""
    return law.probability.dim() == 0 and not any(isinstance(v, Tensor) for v in law.values)


def _variance(law: ContinuousBernoulli) -> Tensor:
    """Return the variance, 1/l² - 1/(4 sinh²(l/2)), by its series where that would cancel."""
    small = law.logits.abs() < 0.3
    safe = torch.where(small, torch.ones_like(law.logits), law.logits)
    square = law.logits**2
    series = torch.full_like(square, 1 / 5322240)
    for coefficient in (-1 / 172800, 1 / 6048, -1 / 240, 1 / 12):
        series = series * square + coefficient
    return torch.where(small, series, safe**-2 - 0.25 * torch.sinh(safe / 2) ** -2)


def _information_of_levels(law: DiscretizedLogistic) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Fisher information of location, of both, and of scale, summed over the levels."""
    of_loc, of_both, of_scale = (torch.zeros_like(law.loc) for _ in range(3))
    with torch.enable_grad():
        loc, scale = law.loc.detach().requires_grad_(), law.scale.detach().requires_grad_()
        again = DiscretizedLogistic(loc, scale, law.levels)
        for level in range(law.levels):  # one at a time: all of a batch may not fit memory
            log_prob = again.log_prob(torch.full_like(loc, level / (law.levels - 1)))
            by_loc, by_scale = torch.autograd.grad(log_prob.sum(), (loc, scale))
            prob = log_prob.detach().exp()
            of_loc = of_loc + prob * by_loc**2
            of_both = of_both + prob * by_loc * by_scale
            of_scale = of_scale + prob * by_scale**2
    return of_loc, of_both, of_scale


def _no_path(pair: Autoencoder) -> ValueError:
    return ValueError(
        f"decoder must be differentiable in z, got {type(pair.decoder).__name__}, through which "
        "autograd sees no path from z to p(x|z)"
    )


def _unknown(law: Any) -> ValueError:
    return ValueError(
        "decoder must be a product over the entries of x, each Normal, Bernoulli, "
        "ContinuousBernoulli, Poisson, Categorical, DiscretizedLogistic or one of these corrupted, "
        f"got {type(law).__name__}: its Fisher information is not known here"
    )
