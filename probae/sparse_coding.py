"""Sparse coding: the most probable sparse code of a linear-Gaussian decoder, by iteration.

The energy that everything here minimises over the code h is

.. math:: E(x, h) = \\frac{\\|x - Wh\\|^2}{2\\sigma^2} + \\lambda \\|h\\|_1 + \\gamma \\|h - f\\|^2

with the dictionary W, the rate λ of a Laplace prior, and a coupling γ to a prediction f of the code
(predictive sparse decomposition); γ = 0 is plain sparse coding.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softshrink

from .datasets import as_tensor
from .decoders import GaussianDecoder
from .distributions import mean_of
from .networks import MLP
from .part import (
    Part,
    as_number,
    require_count,
    require_flag,
    require_parameter,
    require_positive,
)

if TYPE_CHECKING:
    from torch.distributions import Distribution

TEXTBOOK_SCALE = math.sqrt(0.5)  # σ at which the reconstruction term is the squared error
CHUNK = 1024  # data solved at a time, to bound memory
CHECK = 10  # iterations between looks at the optimality conditions
SOLVE = 100  # iterations between solutions on the support, which cost more than most data need
GATHERED = 2**24  # most matrix elements that solving on the supports holds at a time


class SparseCodes(NamedTuple):
    """Codes from :func:`lasso`, and how far each is from optimal.

    Example:
        >>> import torch, probae
        >>> result = probae.lasso(torch.randn(7, 5), torch.eye(5), rate=0.1)
        >>> result.codes.shape, bool(result.converged.all())
        (torch.Size([7, 5]), True)
    """

    codes: Tensor  # (N, K)
    kkt: Tensor  # (N,) largest violation of the optimality conditions, in units of λ
    iterations: Tensor  # (N,) int64
    converged: Tensor  # (N,) bool, whether kkt fell to the tolerance or to rounding error


def lasso(
    x: Tensor | Any,
    dictionary: Tensor,
    rate: float,
    *,
    noise_scale: float = TEXTBOOK_SCALE,
    prediction: Tensor | None = None,
    coupling: float = 0.0,
    nonnegative: bool = False,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
) -> SparseCodes:
    r"""Minimise the energy of sparse coding over the code of every datum, by FISTA.

    .. math:: E(x, h) = \frac{\|x - Wh\|^2}{2\sigma^2} + \lambda \|h\|_1 + \gamma \|h - f\|^2

    A datum is done when its largest violation of the optimality conditions, with the gradient g of
    the smooth terms, is at most ``tolerance`` in units of λ,

    .. math:: \max_i \begin{cases} |g_i + \lambda\,sign(h_i)| & h_i \ne 0\\
              \max(|g_i| - \lambda, 0) & h_i = 0 \end{cases} \le \lambda \cdot tolerance

    or at most the rounding error of g in the dtype of x. FISTA restarts its momentum where that
    points uphill. Where the signs of a code have settled, the linear system on its support is
    solved, and kept if it is optimal. Deterministic; no gradient flows through it.

    Args:
        x: data (N, D), in their own units, with whatever the decoder adds (its bias) taken off.
        dictionary: W (D, K), one atom a column.
        rate: λ > 0; with the default σ it acts on the plain squared error.
        noise_scale: σ > 0, in units of x; at its default √½ the first term is the squared error.
        prediction: f (N, K), where there is a coupling.
        coupling: γ >= 0.
        nonnegative: allow no code below 0.
        start: code (N, K) to start from; default: the prediction, or else 0.
        tolerance: largest violation allowed, in units of λ.
        max_iterations: iterations after which to give up; see ``converged`` of the result.

    Returns:
        SparseCodes: codes (N, K), their violations, the iterations taken, and which converged.

    Raises:
        ValueError: a shape does not fit the others, data are not finite, or a number is out of
            range.

    Reference:
        Beck & Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; O'Donoghue &
        Candès, Adaptive restart for accelerated gradient schemes, 2015.

    Example:
        >>> import torch, probae
        >>> x = torch.tensor([[3.0, -0.2]])
        >>> probae.lasso(x, torch.eye(2), rate=1.0).codes  # soft threshold at λσ²
        tensor([[2.5000, 0.0000]])
    """
    x = as_tensor(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x must have shape (N, D), got {tuple(x.shape)}; x.flatten(1) has it")
    dictionary = as_tensor(dictionary, "dictionary").to(x)
    if dictionary.dim() != 2 or len(dictionary) != x.shape[1]:
        raise ValueError(
            f"dictionary must have shape (D, K) with D = {x.shape[1]} as in x, got "
            f"{tuple(dictionary.shape)}; one atom is one column"
        )
    require_positive(rate, "rate")
    require_positive(noise_scale, "noise_scale")
    if x.abs().max() > torch.finfo(x.dtype).max ** 0.25:
        raise ValueError(f"x is too large for its square in {x.dtype}; scale it")
    if rate < 1e-30:
        raise ValueError(f"rate must be at least 1e-30, got {rate!r}")
    if not 1e-12 < noise_scale < 1e12:
        raise ValueError(f"noise_scale must be in (1e-12, 1e12), got {noise_scale!r}; scale x")
    require_flag(nonnegative, "nonnegative")
    _require_coupling(coupling, prediction, "prediction")
    codes_shape = (len(x), dictionary.shape[1])
    start = prediction if start is None else start
    prediction = _as_codes(prediction, codes_shape, x, "prediction")
    found = _solve(
        x,
        dictionary,
        rate,
        noise_scale,
        prediction,
        coupling,
        _as_codes(start, codes_shape, x, "start"),
        nonnegative,
        require_positive(tolerance, "tolerance"),
        require_count(max_iterations, "max_iterations"),
    )
    if not found.kkt.isfinite().all():
        raise ValueError(
            "x, dictionary, start and prediction must be numbers whose products fit into "
            f"{x.dtype}, got some that overflow; scale them"
        )
    return found


def sparse_coding_energy(
    x: Tensor,
    codes: Tensor,
    dictionary: Tensor,
    rate: float,
    *,
    noise_scale: float = TEXTBOOK_SCALE,
    prediction: Tensor | None = None,
    coupling: float = 0.0,
) -> Tensor:
    r"""Return what :func:`lasso` minimises, for any codes.

    .. math:: E(x, h) = \frac{\|x - Wh\|^2}{2\sigma^2} + \lambda \|h\|_1 + \gamma \|h - f\|^2

    It is -log p(x, h) of sparse coding, but for constants, where γ = 0. Gradients flow through it.

    Args:
        x: data (..., D), with the decoder's bias taken off.
        codes: h (..., K).
        dictionary: W (D, K).
        rate: λ.
        noise_scale: σ, in units of x.
        prediction: f (..., K), where there is a coupling.
        coupling: γ >= 0.

    Returns:
        Tensor: (...), nats per datum.

    Raises:
        ValueError: a coupling without a prediction, or a number out of range.

    Example:
        >>> import torch, probae
        >>> x, codes = torch.tensor([[3.0, 0.0]]), torch.tensor([[2.5, 0.0]])
        >>> probae.sparse_coding_energy(x, codes, torch.eye(2), rate=1.0)
        tensor([2.7500])
    """
    require_positive(rate, "rate")
    require_positive(noise_scale, "noise_scale")
    _require_coupling(coupling, prediction, "prediction")
    codes, dictionary = (
        require_parameter(value, name)
        for value, name in ((codes, "codes"), (dictionary, "dictionary"))
    )
    require_parameter(x, "x")
    if dictionary.dim() != 2 or codes.shape[-1:] != dictionary.shape[1:]:
        raise ValueError(
            "dictionary must have shape (D, K) and codes (..., K), got "
            f"{tuple(dictionary.shape)} and {tuple(codes.shape)}"
        )
    if x.shape[-1:] != dictionary.shape[:1]:
        raise ValueError(
            f"x must have shape (..., D) with D = {len(dictionary)} as in dictionary, got "
            f"{tuple(x.shape)}"
        )
    try:
        residual = x - codes @ dictionary.T
    except RuntimeError as error:
        raise ValueError(
            f"x and codes must hold as many data, got {tuple(x.shape)} and {tuple(codes.shape)}"
        ) from error
    energy = residual.square().sum(-1) / (2 * noise_scale**2) + rate * codes.abs().sum(-1)
    if coupling and prediction is not None:
        energy = energy + coupling * (codes - prediction).square().sum(-1)
    return energy


def coupling_log_normalizer(prediction: Tensor, rate: float, coupling: float) -> Tensor:
    r"""Return log Z of the prior over codes that a coupling to a prediction makes.

    .. math:: p(h|f) = \frac1Z e^{-\lambda \|h\|_1 - \gamma \|h - f\|^2},\quad
              \log Z = \sum_i \log \int e^{-\lambda |h| - \gamma (h - f_i)^2} dh

    With it the energy of predictive sparse decomposition becomes a joint density: -log p(x, h|f) is
    E(x, h) + log Z(f) + (D/2) log 2πσ². Gradients flow through it.

    Args:
        prediction: f (..., K).
        rate: λ > 0.
        coupling: γ > 0.

    Returns:
        Tensor: (...), nats per datum.

    Raises:
        ValueError: ``rate`` or ``coupling`` is not a finite number > 0.

    Example:
        >>> import torch, probae
        >>> h = torch.linspace(-20, 20, 100_001)
        >>> integral = torch.trapezoid(torch.exp(-2 * h.abs() - (h - 1) ** 2), h)
        >>> log_z = probae.coupling_log_normalizer(torch.ones(1), rate=2.0, coupling=1.0)
        >>> bool((log_z - integral.log()).abs() < 1e-4)
        True
    """
    require_positive(rate, "rate")
    require_positive(coupling, "coupling")
    for name, value in (("rate", rate), ("coupling", coupling)):
        if value > 1e100:
            raise ValueError(f"{name} must be below 1e100, got {value!r}")
    if require_parameter(prediction, "prediction").dtype not in (torch.float32, torch.float64):
        raise ValueError(f"prediction must be in float32 or float64, got {prediction.dtype}")
    shift, width = rate / (2 * coupling), math.sqrt(2 * coupling)
    # the integrals over h > 0 and h < 0, but for the common factor; exponents stay finite in logs
    above = -rate * prediction + torch.special.log_ndtr((prediction - shift) * width)
    below = rate * prediction + torch.special.log_ndtr(-(prediction + shift) * width)
    constant = rate**2 / (4 * coupling) + 0.5 * math.log(math.pi / coupling)
    return (torch.logaddexp(above, below) + constant).sum(-1)


class SparseCodingEncoder(Part):
    r"""Encoder that infers: the point mass at the code that minimises the energy, by FISTA.

    .. math:: h^*(x) = \arg\min_h \frac{\|x - b - Wh\|^2}{2\sigma^2} + \lambda \|h\|_1
              + \gamma \|h - f(x)\|^2

    W, b and σ are the decoder's. The code is detached: at a minimum, the gradient of the minimal
    energy in the parameters is that at the code held fixed (envelope theorem), so nothing is lost.
    Together with ``LaplacePrior(z_dim, rate)`` it is sparse coding. Give the decoder's network
    ``unit_norm=True``: else training sends W to infinity and the codes to 0, and the penalty with
    them.

    With a ``predictor`` f, inference starts at f(x). With a ``coupling`` γ, too, the last term is
    part of the energy: predictive sparse decomposition. (Published code starts at f(x) without that
    term: γ = 0.) Training f on the codes is not this encoder's business, but that of a factor of
    the pair.

    Args:
        decoder: a :class:`GaussianDecoder` with a fixed scale σ on an affine network.
        rate: λ > 0, that of the prior.
        predictor: encoder whose mean is f(x), or a network from (..., *x_shape) to (..., z_dim),
            or None.
        coupling: γ >= 0.
        nonnegative: allow no code below 0, as an exponential prior does.
        tolerance: largest violation of the optimality conditions, in units of λ, see
            :func:`lasso`.
        max_iterations: iterations after which to give up with a warning.

    Raises:
        ValueError: the decoder is not affine with a fixed scale, a coupling without a predictor, a
            number out of range; from ``forward``, a prediction that is not of the code's shape.

    Reference:
        Olshausen & Field, Emergence of simple-cell receptive field properties by learning a sparse
        code for natural images, 1996; Kavukcuoglu, Ranzato & LeCun, Fast inference in sparse coding
        algorithms with applications to object recognition, 2008.

    Example:
        >>> import torch, probae
        >>> decoder = probae.GaussianDecoder(probae.MLP(6, 4, unit_norm=True), scale=0.5**0.5)
        >>> pair = probae.Autoencoder(
        ...     probae.LaplacePrior(6, rate=0.5), probae.SparseCodingEncoder(decoder, 0.5), decoder
        ... )
        >>> run = probae.fit(pair, torch.randn(64, 4), epochs=1, progress=False)
        >>> pair.encoder(torch.zeros(2, 4)).mean.count_nonzero().item(), pair.kind.value
        (0, 'MAP_JOINT')
    """

    def __init__(
        self,
        decoder: GaussianDecoder,
        rate: float,
        predictor: nn.Module | None = None,
        coupling: float = 0.0,
        nonnegative: bool = False,
        tolerance: float = 1e-6,
        max_iterations: int = 10_000,
    ) -> None:
        super().__init__()
        affine = decoder.affine() if isinstance(decoder, GaussianDecoder) else None
        if affine is None or decoder.learn_scale or not isinstance(decoder.network, MLP):
            raise ValueError(
                "decoder must be a GaussianDecoder with a fixed scale on an affine network "
                "(hidden=(), learn_scale=False), whose most probable code is a lasso; for any "
                "other decoder use PointEncoder"
            )
        if predictor is not None and not isinstance(predictor, nn.Module):
            raise ValueError(
                f"predictor must be a torch.nn.Module or None, got {type(predictor).__name__}"
            )
        _require_coupling(coupling, predictor, "predictor")
        self.decoder = decoder
        self.predictor = predictor
        self.x_ndim = len(decoder.network.out_shape)
        self.rate = require_positive(rate, "rate")
        self.coupling = float(coupling)
        self.nonnegative = require_flag(nonnegative, "nonnegative")
        self.tolerance = require_positive(tolerance, "tolerance")
        if self.tolerance > 1e30:
            raise ValueError(
                f"tolerance must be below 1e30, in units of the rate, got {tolerance!r}"
            )
        self.max_iterations = require_count(max_iterations, "max_iterations")

    @torch.no_grad()
    def forward(self, x: Tensor) -> Distribution:
        """Return the point mass at h*(x), batch shape (...), event shape (z_dim,)."""
        centred, weight, prediction = self._problem(x)
        batch = centred.shape[:-1]
        flat = None if prediction is None else prediction.reshape(-1, weight.shape[1])
        result = _solve(
            centred.reshape(-1, len(weight)),
            weight,
            self.rate,
            self.decoder.fixed_scale,
            flat,
            self.coupling,
            flat,
            self.nonnegative,
            self.tolerance,
            self.max_iterations,
        )
        if (result.kkt.isfinite() & ~result.converged).any():
            warnings.warn(
                "SparseCodingEncoder: codes did not reach the tolerance within max_iterations; "
                "raise either, or the rate",
                stacklevel=2,
            )
        return dist.Delta(result.codes.reshape(*batch, weight.shape[1]), event_dim=1)

    def energy(self, x: Tensor, z: Tensor) -> Tensor:
        """Return E(x, z), nats per datum but for constants: x (..., *x_shape), z (..., z_dim).

        Gradients flow to z and to all parameters. At z = f(x), less its value at z = h*(x), it is
        the amortisation gap of the predictor.
        """
        centred, weight, prediction = self._problem(x)
        return sparse_coding_energy(
            centred,
            z,
            weight,
            self.rate,
            noise_scale=self.decoder.fixed_scale,
            prediction=prediction,
            coupling=self.coupling,
        )

    def _problem(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x - b (..., D), W (D, K) and f(x) (..., K)."""
        affine = self.decoder.affine()
        assert affine is not None
        weight, bias, _ = affine
        centred = x.flatten(-self.x_ndim) - bias
        if self.predictor is None:
            return centred, weight, None
        output = self.predictor(x)
        prediction = output if isinstance(output, Tensor) else mean_of(output)
        expected = (*centred.shape[:-1], weight.shape[1])
        if prediction.shape != expected:
            raise ValueError(
                f"predictor must map x of shape {tuple(x.shape)} to codes of shape {expected}, got "
                f"{tuple(prediction.shape)}"
            )
        return centred, weight, prediction


@torch.no_grad()
def _solve(
    x: Tensor,
    dictionary: Tensor,
    rate: float,
    noise_scale: float,
    prediction: Tensor | None,
    coupling: float,
    start: Tensor | None,
    nonnegative: bool,
    tolerance: float,
    max_iterations: int,
) -> SparseCodes:
    """Write the energy as h'Qh/2 - c'h + λ|h| + constant, and minimise that chunk by chunk."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precision has no linear algebra
    weight = dictionary.to(dtype) / noise_scale
    quadratic = weight.T @ weight  # Q: (K, K)
    smaller = weight @ weight.T if len(weight) < len(quadratic) else quadratic
    largest = float(torch.linalg.eigvalsh(smaller)[-1])  # WW' and W'W share it
    linear = (x.to(dtype) / noise_scale) @ weight  # c: (N, K)
    if prediction is not None and coupling:
        quadratic = quadratic + 2 * coupling * torch.eye(len(quadratic)).to(quadratic)
        largest += 2 * coupling
        linear = linear + 2 * coupling * prediction.to(dtype)
    first = torch.zeros_like(linear) if start is None else start.to(dtype)
    problem = _Problem(quadratic, quadratic.abs(), largest, rate, nonnegative, tolerance)
    chunks = [
        _fista(problem, c, h, max_iterations)
        for c, h in zip(linear.split(CHUNK), first.split(CHUNK), strict=True)
    ]
    codes, kkt, *rest = map(torch.cat, zip(*chunks, strict=True))
    codes = codes.masked_fill(kkt.isnan().unsqueeze(-1), math.nan)  # of data that are not finite
    return SparseCodes(codes.to(x.dtype) + 0.0, kkt, *rest)  # -0 becomes 0


class _Problem(NamedTuple):
    """Minimise h'Qh/2 - c'h + λ|h| for each row c of a tensor (N, K)."""

    quadratic: Tensor  # Q: (K, K)
    magnitude: Tensor  # |Q|: (K, K)
    largest: float  # eigenvalue of Q
    rate: float  # λ
    nonnegative: bool
    tolerance: float

    def proximal_step(self, linear: Tensor, y: Tensor) -> Tensor:
        """Take a gradient step from y (N, K), then the prox of the penalty."""
        step = 1 / self.largest if self.largest > 0 else 1.0
        h = y - step * (y @ self.quadratic - linear)
        threshold = step * self.rate
        return relu(h - threshold) if self.nonnegative else softshrink(h, threshold)

    def violation(self, linear: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the violation (N,) of the optimality conditions, and how much is allowed (N,)."""
        gradient = h @ self.quadratic - linear
        off = -gradient if self.nonnegative else gradient.abs()
        on = (gradient + self.rate * h.sign()).abs()
        violation = torch.where(h == 0, (off - self.rate).clamp(min=0), on)
        # a sum of products is off by a few eps of the sum of their magnitudes
        size = h.abs() @ self.magnitude + linear.abs()
        rounding = 4 * torch.finfo(h.dtype).eps * size.amax(-1)
        return violation.amax(-1) / self.rate, (rounding / self.rate).clamp(min=self.tolerance)

    def solve_on_support(self, linear: Tensor, h: Tensor) -> Tensor:
        """Minimise with the signs of h (N, K) held; anything may come where Q is singular there."""
        size = int(h.count_nonzero(-1).max())  # s, of the largest support
        solved = torch.zeros_like(h)
        for rows in torch.arange(len(h), device=h.device).split(
            max(1, GATHERED // max(1, size**2))
        ):
            signs = h[rows].sign()
            index = signs.abs().topk(size).indices  # (n, s): the support, then any others
            inside = signs.gather(-1, index).abs()
            gram = self.quadratic[index.unsqueeze(-1), index.unsqueeze(-2)]  # (n, s, s)
            gram = gram * inside.unsqueeze(-1) * inside.unsqueeze(-2) + torch.diag_embed(1 - inside)
            right = (linear[rows] - self.rate * signs).gather(-1, index) * inside
            cholesky, _ = torch.linalg.cholesky_ex(gram)
            solution = torch.cholesky_solve(right.unsqueeze(-1), cholesky).squeeze(-1)
            solved[rows] = torch.zeros_like(signs).scatter(-1, index, solution * inside)
        return solved


def _fista(problem: _Problem, linear: Tensor, h: Tensor, max_iterations: int) -> SparseCodes:
    """Minimise from h (N, K); rows that are done leave the batch."""
    if problem.nonnegative:
        h = h.clamp(min=0)
    codes, converged = h.clone(), torch.zeros(len(h), dtype=torch.bool, device=h.device)
    kkt, iterations = torch.zeros_like(h[:, 0]), torch.zeros_like(converged, dtype=torch.int64)
    rows = torch.arange(len(h), device=h.device)
    y, momentum, signs = h, torch.ones_like(h[:, :1]), torch.full_like(h, math.nan)
    for iteration in range(max_iterations + 1):
        if iteration % CHECK == 0 or iteration == max_iterations:
            violation, allowed = problem.violation(linear, h)
            settled = (h.sign() == signs).all(-1).nonzero().squeeze(-1)
            if len(settled) and iteration % SOLVE == 0:
                better = problem.solve_on_support(linear[settled], h[settled])
                theirs, _ = problem.violation(linear[settled], better)
                good = theirs <= allowed[settled]
                h = h.index_copy(0, settled[good], better[good])
                violation[settled[good]] = theirs[good]
            signs = h.sign()
            codes[rows], kkt[rows], iterations[rows] = h, violation, iteration
            converged[rows] = violation <= allowed
            todo = violation > allowed  # not so where it is NaN: more of it would not help
            if not todo.any():
                break
            rows, linear, h, y, momentum, signs = (
                tensor[todo] for tensor in (rows, linear, h, y, momentum, signs)
            )
        new = problem.proximal_step(linear, y)
        uphill = ((y - new) * (new - h)).sum(-1, keepdim=True) > 0  # then restart the momentum
        later = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        y = new + torch.where(uphill, 0.0, (momentum - 1) / later) * (new - h)
        h, momentum = new, later
    return SparseCodes(codes, kkt, iterations, converged)


def _as_codes(
    value: Tensor | None, shape: tuple[int, int], x: Tensor, argument: str
) -> Tensor | None:
    """Return codes like x, None as it is, or raise a ValueError where the shape is wrong."""
    if value is None:
        return None
    codes = as_tensor(value, argument)
    if codes.shape != shape:
        raise ValueError(
            f"{argument} must have shape (N, K) = {shape}, a code for each datum, got "
            f"{tuple(codes.shape)}"
        )
    return codes.to(x)


def _require_coupling(coupling: float, prediction: object, argument: str) -> None:
    if not 0 <= as_number(coupling) < math.inf:
        raise ValueError(f"coupling must be a finite number >= 0, got {coupling!r}")
    if coupling and prediction is None:
        raise ValueError(
            f"{argument} must be given where coupling > 0, got None; it is what the codes are "
            "coupled to"
        )
