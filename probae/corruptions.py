r"""Corruptions C(x_tilde|x): modules that map x to a distribution over its corrupted version.

Each also knows in closed form what it makes of a likelihood p(x|z): the law p(x_tilde|z) of what is
then observed, and the law p(x|x_tilde, z) of the clean x behind it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid

from .corrupted import Bits, Point, Replacement, Seen, ShiftedPoisson, Thinned
from .datasets import as_tensor
from .distributions import base_distribution, is_flat
from .part import RECORDING, Part, as_number, require_flag, require_positive, require_probability

DOMAINS: dict[Any, tuple[str, str]] = {  # what values must be, and the fix
    constraints.real: ("finite", "missing entries go through probae.stack_missing"),
    constraints.unit_interval: ("in [0, 1]", "scale 8-bit images by 1/255"),
    constraints.boolean: ("0 or 1", "binarise grey values with probae.binarize"),
    constraints.nonnegative_integer: ("whole numbers >= 0", "give it counts of events"),
}


class Corruption(Part):
    r"""What the corruptions share: C(x_tilde|x), and what it makes of a likelihood p(x|z).

    A corruption of your own needs ``forward``; for :class:`CorruptedDecoder` and
    :func:`probae.denoise` it is a subclass with :meth:`marginal` and :meth:`posterior`, too. Those
    of this module take floating tensors of finite values in the ``domain`` of the class only,
    whether or not torch validates its arguments.

    Example:
        >>> import torch, probae
        >>> likelihood = probae.GaussianDecoder(probae.MLP(2, 8), scale=0.4)(torch.randn(7, 2))
        >>> noisy = GaussianNoise(0.3).marginal(likelihood)
        >>> round(float(noisy.variance[0, 0]), 4)
        0.25
    """

    takes: str = ""  # what marginal and posterior have a closed form for, in words
    domain: Any = constraints.real  # of the entries of x, one of DOMAINS
    codomain: Any = constraints.real  # of the entries of x_tilde, one of DOMAINS

    def marginal(self, distribution: Distribution) -> Distribution:
        r"""Return :math:`p(\tilde x|z) = \int C(\tilde x|x)\,p(x|z)\,dx` in closed form.

        Args:
            distribution: p(x|z), of any batch shape, that is a product over the entries of x.

        Raises:
            ValueError: ``distribution`` is no such thing, or there is no closed form for it.
        """
        raise self._no_closed_form(distribution)

    def posterior(self, distribution: Distribution, x_tilde: Tensor) -> Distribution:
        r"""Return :math:`p(x|\tilde x, z) \propto C(\tilde x|x)\,p(x|z)` in closed form.

        Args:
            distribution: p(x|z), as for :meth:`marginal`.
            x_tilde: what was observed, of the event shape of p(x_tilde|z), after batch dimensions
                that broadcast with those of p(x|z).

        Raises:
            ValueError: ``distribution`` is no such thing, or there is no closed form for it; or
                ``x_tilde`` is no floating tensor of such a shape, or not what the corruption makes.
        """
        raise self._no_closed_form(distribution)

    def as_clean(self, x_tilde: Tensor) -> Tensor:
        """Return x_tilde (N, ...) in the shape of x, for networks made for x; default: itself."""
        return x_tilde

    def as_corrupted(self, x: Tensor) -> Tensor:
        """Return x (N, *x_shape), nothing corrupted, in the shape of x_tilde; default: itself."""
        return x

    def check_corrupted(self, x_tilde: Any, x_ndim: int) -> Tensor:
        """Return x_tilde if it is a floating tensor of values that the corruption makes, or raise.

        Args:
            x_tilde: corrupted data, of any batch shape.
            x_ndim: number of dimensions of one clean datum.

        Raises:
            ValueError: it is not; the message names the first value.
        """
        return self._checked(x_tilde, "x_tilde", self.codomain)

    def extra_repr(self) -> str:
        """Return the settings, so that equal corruptions print alike."""
        return ", ".join(
            f"{name}={getattr(self, name)!r}" for name in self._arguments if hasattr(self, name)
        )

    def _elements(self, distribution: Any, family: Any = Distribution) -> Any:
        """Return the distribution of the entries if it is of that family, or raise."""
        if not isinstance(distribution, Distribution):
            raise ValueError(
                "distribution must be p(x|z), a torch.distributions.Distribution, got "
                f"{type(distribution).__name__}; pass what a decoder returns, decoder(z)"
            )
        base = base_distribution(distribution)
        entries = distribution.batch_shape + distribution.event_shape
        if base.batch_shape != entries or is_flat(distribution) or not isinstance(base, family):
            raise self._no_closed_form(distribution)
        return base

    def _data(self, x: Any) -> Tensor:
        """Return x if it is a floating tensor (N, ...) of values in the domain, or raise."""
        x = self._checked(x, "x", self.domain)
        if x.dim() == 0:
            raise ValueError("x must have shape (N, *x_shape), got (); add a dimension by x[None]")
        return x

    def _observed(self, distribution: Any, x_tilde: Any) -> Tensor:
        """Return x_tilde if it fits p(x|z), or raise."""
        event_shape = self._corrupted_shape(distribution.event_shape)
        if isinstance(x_tilde, Tensor):
            split = x_tilde.dim() - len(event_shape)
            fits = split >= 0 and x_tilde.shape[split:] == event_shape
            if not (fits and _broadcast(x_tilde.shape[:split], distribution.batch_shape)):
                raise ValueError(
                    f"x_tilde must have shape (..., {', '.join(map(str, event_shape))}), with a "
                    f"batch shape (...) that broadcasts with the {tuple(distribution.batch_shape)} "
                    f"of distribution, got {tuple(x_tilde.shape)}; corrupt x as {self!r} does"
                )
        return self.check_corrupted(x_tilde, len(distribution.event_shape))

    def _corrupted_shape(self, x_shape: Size) -> Size:
        return x_shape

    def _checked(self, x: Any, argument: str, domain: Any) -> Tensor:
        """Return x if it is a dense floating tensor of values in the domain, or raise."""
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{argument} must be a floating torch tensor, got {type(x).__name__}; convert data "
                f"with torch.as_tensor({argument}, dtype=torch.float32)"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{argument} must have a floating dtype, got {x.dtype}; convert with "
                f"{argument}.to(torch.float32) (and scale 8-bit images by 1/255)"
            )
        if x.layout != torch.strided:
            raise ValueError(
                f"{argument} must be dense, got {x.layout}; pass {argument}.to_dense()"
            )
        if RECORDING.get():  # who records a program has checked its data
            return x
        bad = ~(x.isfinite() & domain.check(x))
        if bad.any():
            words, fix = DOMAINS[domain]
            raise ValueError(
                f"{argument} must be {words} under {self!r}, got {int(bad.sum())} values that are "
                f"not, the first {float(x[bad][0]):g}; {fix}"
            )
        return x

    def _no_closed_form(self, distribution: Any) -> ValueError:
        if not self.takes:
            return ValueError(
                f"corruption {self!r} must have closed forms here: give the class the methods "
                "marginal and posterior"
            )
        return ValueError(
            f"distribution must be {self.takes}, the closed form that {self!r} has, got "
            f"{type(base_distribution(distribution)).__name__} with event shape "
            f"{tuple(distribution.event_shape)}; change the decoder or the corruption (Masking "
            "takes every product over entries)"
        )


class GaussianNoise(Corruption):
    r"""Additive Gaussian noise, :math:`C(\tilde x|x) = N(\tilde x; x, \sigma^2 I)`.

    Under :math:`p(x|z) = N(g, s^2)` the noisy x is :math:`N(g, s^2 + \sigma^2)`, and the clean one
    is :math:`N\big(\frac{\sigma^2 g + s^2 \tilde x}{s^2 + \sigma^2},
    \frac{s^2 \sigma^2}{s^2 + \sigma^2}\big)`, entry by entry.

    Args:
        scale: σ > 0, in units of x.

    Raises:
        ValueError: ``scale`` is not a finite number > 0.

    Reference:
        Vincent et al., Stacked denoising autoencoders, 2010.

    Example:
        >>> import torch
        >>> GaussianNoise(0.3)(torch.zeros(7, 2, 4)).event_shape
        torch.Size([2, 4])
    """

    takes = "a Normal of independent entries"

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = require_positive(scale, "scale")

    def forward(self, x: Tensor) -> Distribution:
        """Return C(x_tilde|x), batch shape (N,), event shape x_shape."""
        return dist.Normal(self._data(x), self.scale).to_event(x.dim() - 1)

    def marginal(self, distribution: Distribution) -> Distribution:
        """Return p(x_tilde|z), a Normal with the variances added."""
        clean = self._elements(distribution, torch.distributions.Normal)
        scale = (clean.scale**2 + self.scale**2).sqrt()
        return dist.Normal(clean.loc, scale).to_event(len(distribution.event_shape))

    def posterior(self, distribution: Distribution, x_tilde: Tensor) -> Distribution:
        """Return p(x|x_tilde, z), a Normal between the decoder's mean and x_tilde."""
        clean = self._elements(distribution, torch.distributions.Normal)
        x_tilde = self._observed(distribution, x_tilde)
        trust = clean.scale**2 / (clean.scale**2 + self.scale**2)  # in x_tilde
        loc = clean.loc + trust * (x_tilde - clean.loc)
        return dist.Normal(loc, self.scale * trust.sqrt()).to_event(len(distribution.event_shape))


class BitFlip(Corruption):
    r"""Each bit flips independently, :math:`P(\tilde x_i = 1|x_i) = \rho + (1 - \rho - \rho') x_i`.

    Grey x in [0, 1] is binarised first. Under Bernoulli p(x|z), both the flipped bits and the clean
    bits behind them are Bernoulli again.

    Args:
        probability: ρ, with which a 0 becomes a 1; in (0, 1).
        one_to_zero: ρ', with which a 1 becomes a 0, by default ρ. Where it is given, each of the
            two lies in [0, 1) and one of them may be 0.

    Raises:
        ValueError: a probability out of range.

    Example:
        >>> import torch
        >>> BitFlip(0.1)(torch.zeros(7, 4)).mean[0]
        tensor([0.1000, 0.1000, 0.1000, 0.1000])
        >>> BitFlip(0.0, one_to_zero=0.25)(torch.ones(7, 4)).mean[0]
        tensor([0.7500, 0.7500, 0.7500, 0.7500])
    """

    takes = "a Bernoulli of independent entries"
    domain = constraints.unit_interval
    codomain = constraints.boolean

    def __init__(self, probability: float, one_to_zero: float | None = None) -> None:
        super().__init__()
        if one_to_zero is None:
            one_to_zero = require_probability(probability, "probability")
        for argument, value in (("probability", probability), ("one_to_zero", one_to_zero)):
            if not 0 <= as_number(value) < 1:
                raise ValueError(f"{argument} must be in [0, 1), got {value!r}")
        if probability == one_to_zero == 0:
            raise ValueError("probability and one_to_zero must not both be 0: no bit would flip")
        self.probability = float(probability)
        self.one_to_zero = float(one_to_zero)

    def forward(self, x: Tensor) -> Distribution:
        """Return C(x_tilde|x), batch shape (N,), event shape x_shape."""
        ones = self.probability + (1 - self.probability - self.one_to_zero) * self._data(x)
        return Bits(ones).to_event(x.dim() - 1)

    def marginal(self, distribution: Distribution) -> Distribution:
        """Return p(x_tilde|z), Bernoulli."""
        clean = self._elements(distribution, torch.distributions.Bernoulli)
        flipped = _flipped(clean, self.probability, self.one_to_zero)
        return dist.Independent(flipped, len(distribution.event_shape))

    def posterior(self, distribution: Distribution, x_tilde: Tensor) -> Distribution:
        """Return p(x|x_tilde, z), Bernoulli."""
        clean = self._elements(distribution, torch.distributions.Bernoulli)
        x_tilde = self._observed(distribution, x_tilde)
        restored = _restored(clean, self.probability, self.one_to_zero, x_tilde)
        return dist.Independent(restored, len(distribution.event_shape))


class ReplacingCorruption(Corruption):
    r"""Each entry is replaced with probability ν by a fair draw from a few values.

    .. math:: C(\tilde x_i|x_i) = (1 - \nu)\,\delta(\tilde x_i - x_i)
              + \frac{\nu}{A} \sum_a \delta(\tilde x_i - a)

    Under Bernoulli p(x|z), x_tilde and the x behind it are Bernoulli again. Under any other product
    over entries, p(x_tilde|z) is the mixture of p(x|z) and the values (of a density and of atoms
    where x is continuous), and p(x|x_tilde, z) is a :class:`Replacement` of p(x|z) by x_tilde.

    Args:
        probability: ν in (0, 1).
        values: what entries are replaced by, zeros and ones.

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1.

    Example:
        >>> import torch
        >>> ReplacingCorruption(0.4, (0.0, 1.0))(torch.full((7, 4), 0.5)).mean[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    takes = "a product over entries"

    def __init__(self, probability: float, values: tuple[float, ...]) -> None:
        super().__init__()
        self.probability = require_probability(probability, "probability")
        self.values = tuple(values)

    def forward(self, x: Tensor) -> Distribution:
        """Return C(x_tilde|x), batch shape (N,), event shape x_shape."""
        x = self._data(x)
        return Replacement(Point(x), self.values, self.probability).to_event(x.dim() - 1)

    def marginal(self, distribution: Distribution) -> Distribution:
        """Return p(x_tilde|z): Bernoulli under a Bernoulli, else a :class:`Replacement`."""
        clean, noisy = self._elements(distribution), None
        if isinstance(clean, torch.distributions.Bernoulli):
            noisy = _flipped(clean, self._flips_to(1), self._flips_to(0))
        else:
            noisy = Replacement(clean, self.values, self.probability)
        return dist.Independent(noisy, len(distribution.event_shape))

    def posterior(self, distribution: Distribution, x_tilde: Tensor) -> Distribution:
        """Return p(x|x_tilde, z): x_tilde where it must have been kept, p(x|z) where it was not."""
        clean, x_tilde = self._elements(distribution), self._observed(distribution, x_tilde)
        if isinstance(clean, torch.distributions.Bernoulli):
            x_tilde = self._checked(x_tilde, "x_tilde", constraints.boolean)
            restored = _restored(clean, self._flips_to(1), self._flips_to(0), x_tilde)
        else:
            noisy = Replacement(clean, self.values, self.probability)
            kept = -torch.expm1(noisy.log_replaced(x_tilde) - noisy.log_prob(x_tilde))
            restored = Replacement(clean, (x_tilde,), kept)
        return dist.Independent(restored, len(distribution.event_shape))

    def _flips_to(self, value: float) -> float:
        return self.probability * self.values.count(value) / len(self.values)


class SaltAndPepper(ReplacingCorruption):
    r"""Each entry is replaced with probability ν by a fair coin in {0, 1}.

    See :class:`ReplacingCorruption`; of bits, ν/2 are flipped.

    Args:
        probability: ν in (0, 1).

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1.

    Reference:
        Vincent et al., Stacked denoising autoencoders, 2010.

    Example:
        >>> import torch
        >>> SaltAndPepper(0.4)(torch.zeros(7, 4)).mean[0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
    """

    def __init__(self, probability: float) -> None:
        super().__init__(probability, (0.0, 1.0))


class Masking(ReplacingCorruption):
    r"""Each entry is dropped with probability ν: replaced by an unmarked 0, or marked as missing.

    With ``known=False``, x_tilde has the shape of x and nothing tells a dropped entry from a true 0
    (see :class:`ReplacingCorruption`). With ``known=True`` it is (x∘m, m), of shape (2, *x_shape):
    the values, 0 where they are missing, and the mask, 1 where they were seen. Missing data of this
    kind (completely at random) take any likelihood that is a product over entries,

    .. math:: p(\tilde x|z) = \prod_{i: m_i = 1} (1 - \nu)\,p(x_i|z) \prod_{i: m_i = 0} \nu

    and the x behind it is x_i where it was seen, p(x_i|z) where it was not. The ν enters
    log p(x_tilde) as a constant, log P(m); :func:`stack_missing` puts data with NaN into this form.

    Args:
        probability: ν in (0, 1).
        known: whether the mask is observed.

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1, or ``known`` is no bool.

    Reference:
        Vincent et al., Stacked denoising autoencoders, 2010; Rubin, Inference and missing data,
        1976.

    Example:
        >>> import torch
        >>> Masking(0.25)(torch.ones(7, 4)).mean[0]
        tensor([0.7500, 0.7500, 0.7500, 0.7500])
        >>> Masking(0.25, known=True)(torch.ones(7, 4)).event_shape
        torch.Size([2, 4])
    """

    def __init__(self, probability: float, known: bool = False) -> None:
        super().__init__(probability, (0.0,))
        self.known = require_flag(known, "known")

    def forward(self, x: Tensor) -> Distribution:
        """Return C(x_tilde|x), batch shape (N,), event shape x_shape or (2, *x_shape)."""
        if not self.known:
            return super().forward(x)
        return Seen(Point(self._data(x)), self.probability, x.dim() - 1)

    def marginal(self, distribution: Distribution) -> Distribution:
        """Return p(x_tilde|z): a :class:`Seen` under a known mask."""
        if not self.known:
            return super().marginal(distribution)
        return Seen(self._elements(distribution), self.probability, len(distribution.event_shape))

    def posterior(self, distribution: Distribution, x_tilde: Tensor) -> Distribution:
        """Return p(x|x_tilde, z): what was seen as it is, p(x|z) elsewhere."""
        if not self.known:
            return super().posterior(distribution, x_tilde)
        clean, event_dim = self._elements(distribution), len(distribution.event_shape)
        values, mask = self._observed(distribution, x_tilde).unbind(-event_dim - 1)
        return Replacement(clean, (values,), mask).to_event(event_dim)

    def check_corrupted(self, x_tilde: Any, x_ndim: int) -> Tensor:
        """Return x_tilde if it is what masking makes, under a known mask (x∘m, m), or raise.

        Raises:
            ValueError: it is not, such as for a mask that is neither 0 nor 1.
        """
        x_tilde = super().check_corrupted(x_tilde, x_ndim)
        if self.known:
            values, mask = x_tilde.unbind(-x_ndim - 1)
            bad = torch.stack([(mask == 0) & (values != 0), (mask != 0) & (mask != 1)], -x_ndim - 1)
            if bad.any():
                raise ValueError(
                    "x_tilde must be pairs of values and mask, the mask 0 or 1 and the value 0 "
                    f"where the mask is 0, got {int(bad.sum())} entries that are not, the first "
                    f"{float(x_tilde[bad][0]):g}; mark missing entries by NaN and use "
                    "probae.stack_missing"
                )
        return x_tilde

    def _corrupted_shape(self, x_shape: Size) -> Size:
        return Size((2, *x_shape)) if self.known else x_shape

    def as_clean(self, x_tilde: Tensor) -> Tensor:
        """Return x with zeros where it is missing, of shape (N, *x_shape)."""
        return x_tilde[:, 0] if self.known else x_tilde

    def as_corrupted(self, x: Tensor) -> Tensor:
        """Return x with, under a known mask, a mask of ones: (N, 2, *x_shape)."""
        return torch.stack([x, torch.ones_like(x)], 1) if self.known else x


class PoissonThinning(Corruption):
    r"""Of the x events of a count each is kept with probability κ.

    .. math:: C(\tilde x|x) = Binomial(\tilde x; x, \kappa)

    Under :math:`p(x|z) = Poisson(\lambda)` the kept events are :math:`Poisson(\kappa\lambda)`, and
    independent of the lost ones, so the clean count is
    :math:`\tilde x + Poisson((1 - \kappa)\lambda)`.

    Args:
        probability: κ in (0, 1), of an event to be kept.

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1.

    Reference:
        Kingman, Poisson processes, 1993, section 5.1.

    Example:
        >>> import torch
        >>> PoissonThinning(0.25)(torch.full((7, 4), 8.0)).mean[0]
        tensor([2., 2., 2., 2.])
    """

    takes = "a Poisson of independent entries"
    domain = codomain = constraints.nonnegative_integer

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = require_probability(probability, "probability")

    def forward(self, x: Tensor) -> Distribution:
        """Return C(x_tilde|x), batch shape (N,), event shape x_shape."""
        x = self._data(x)
        return Thinned(x, x.new_tensor(self.probability)).to_event(x.dim() - 1)

    def marginal(self, distribution: Distribution) -> Distribution:
        """Return p(x_tilde|z), Poisson."""
        clean = self._elements(distribution, torch.distributions.Poisson)
        kept = dist.Poisson(self.probability * clean.rate)
        return kept.to_event(len(distribution.event_shape))

    def posterior(self, distribution: Distribution, x_tilde: Tensor) -> Distribution:
        """Return p(x|x_tilde, z), a Poisson shifted by x_tilde."""
        clean = self._elements(distribution, torch.distributions.Poisson)
        x_tilde = self._observed(distribution, x_tilde)
        total = ShiftedPoisson((1 - self.probability) * clean.rate, x_tilde)
        return total.to_event(len(distribution.event_shape))


CORRUPTIONS: dict[str, type[Corruption]] = {
    "gaussian-noise": GaussianNoise,
    "masking": Masking,
    "salt-and-pepper": SaltAndPepper,
    "bit-flip": BitFlip,
    "poisson-thinning": PoissonThinning,
}


def stack_missing(x: Tensor | np.ndarray) -> Tensor:
    """Turn data with NaN for what is missing into values and mask, as ``Masking(known=True)`` does.

    Args:
        x: data (N, *x_shape), floating, NaN where an entry is missing; of a masked NumPy array
            what is masked is missing, too.

    Returns:
        Tensor: (N, 2, *x_shape): the values, 0 where they are missing, and the mask, 1 where not.

    Raises:
        ValueError: as in :func:`as_tensor`, but NaN is fine; or ``x`` has one dimension only.

    Example:
        >>> import torch
        >>> stack_missing(torch.tensor([[0.5, float("nan")]]))
        tensor([[[0.5000, 0.0000],
                 [1.0000, 0.0000]]])
    """
    missing: Any = False
    if isinstance(x, np.ndarray):
        hidden = np.ma.getmaskarray(x)  # False throughout where x is no masked array
        x = np.ma.getdata(x)
        if x.dtype.kind in "bf":
            hidden = hidden | np.isnan(x)
            missing, x = torch.from_numpy(hidden), np.where(hidden, x.dtype.type(0), x)
    elif isinstance(x, Tensor):
        missing = x.isnan()
        x = torch.where(missing, 0, x)
    values = as_tensor(x, "x")
    if values.dim() < 2:
        raise ValueError(
            f"x must have shape (N, *x_shape), got {tuple(values.shape)}; add a dimension with "
            "x[:, None]"
        )
    return torch.stack([values, torch.where(missing, 0, torch.ones_like(values))], 1)


def encoder_input(corruption: Any, x: Tensor) -> Tensor:
    """Return clean x in the shape that an encoder takes which was trained on corrupted x."""
    return corruption.as_corrupted(x) if isinstance(corruption, Corruption) else x


def require_corruption(corruption: Any) -> Corruption:
    """Return ``corruption`` if it is a :class:`Corruption`, or raise a ValueError."""
    if not isinstance(corruption, Corruption):
        raise ValueError(
            "corruption must be a probae.Corruption, such as GaussianNoise(0.3), got "
            f"{corruption!r}; make one of your own a subclass with marginal and posterior"
        )
    return corruption


def _broadcast(shape: Size, other: Size) -> bool:
    """Whether the shapes broadcast."""
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return all(a == b or 1 in (a, b) for a, b in pairs)


def _flipped(bits: Any, zero_to_one: float, one_to_zero: float) -> Any:
    """Bernoulli whose bits then flip, of the same class (grey values stay grey values)."""
    ones, zeros = logsigmoid(bits.logits), logsigmoid(-bits.logits)
    stay_one, stay_zero = math.log1p(-one_to_zero), math.log1p(-zero_to_one)
    to_one = torch.logaddexp(zeros + _log(zero_to_one), ones + stay_one)
    to_zero = torch.logaddexp(zeros + stay_zero, ones + _log(one_to_zero))
    return type(bits)(logits=to_one - to_zero)


def _restored(bits: Any, zero_to_one: float, one_to_zero: float, x_tilde: Tensor) -> Any:
    """Bernoulli of the bits before they flipped to x_tilde."""
    if_one = math.log1p(-one_to_zero) - _log(zero_to_one)  # log C(1|1)/C(1|0)
    if_zero = _log(one_to_zero) - math.log1p(-zero_to_one)
    evidence = torch.where(x_tilde == 1, *bits.logits.new_tensor([if_one, if_zero]))
    return type(bits)(logits=(bits.logits + evidence).nan_to_num())  # certain: ±the largest float


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
