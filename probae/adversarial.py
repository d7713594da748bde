"""Training by an estimated density ratio, outside the contract of stochastic variational inference.

Two losses pull in opposite directions, that of the pair and that of its discriminator, so there is
no one objective that :class:`pyro.infer.SVI` could take steps on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm.auto import tqdm

from .autoencoder import Autoencoder, Kind, frozen, local_parameters, seeded
from .batches import TrainingData
from .checks import check_support, chunks, prior_of, require_gradients, require_parts
from .datasets import as_tensor
from .discriminators import Discriminator, NoEncoder
from .distributions import is_flat, mean_of
from .layout import set_gradients
from .memory import counts, rows_in_budget
from .monitoring import broken_parameter
from .part import as_number, require_count, require_flag, require_positive


class AdversarialRun(NamedTuple):
    """What :func:`fit_adversarial` did.

    ``history`` maps each column to one value per epoch, means over its training batches:
    ``epoch`` (from 1), ``loss`` (of encoder and decoder), ``discriminator_loss`` (log 4, about
    1.386, where the discriminator cannot tell), ``accuracy`` (of the discriminator; 0.5 where it
    cannot tell), ``reconstruction`` and ``divergence`` (log p(x|z) and the estimated KL, nats per
    datum; absent for a GAN), ``seconds`` (since the start). None of them is a measure of the pair:
    take ``log_likelihood(pair, x, method="ais")``.

    Example:
        >>> import torch, probae
        >>> x = torch.randn(64, 5)
        >>> run = probae.fit_adversarial(probae.GAN(5, 2), x, epochs=3, progress=False)
        >>> run.kind.value, sorted(run.history)
        ('ADVERSARIAL', ['accuracy', 'discriminator_loss', 'epoch', 'loss', 'seconds'])
    """

    history: dict[str, list[float]]
    sees: str  # what the discriminator sees: "data", "code" or "joint"
    kind: Kind  # what the loss certifies
    seconds: float

    def __repr__(self) -> str:
        last = {name: round(values[-1], 4) for name, values in self.history.items()}
        return (
            f"AdversarialRun(discriminator of {self.sees}, pair of kind {self.kind.value}, "
            f"{self.seconds:.1f} s; {self.kind.statement}; last epoch: {last})"
        )


class AdversarialELBO(NamedTuple):
    """Estimate of an evidence lower bound by a discriminator, in nats per datum; **no bound**.

    Example:
        >>> import torch, probae
        >>> pair = probae.AdversarialVariationalBayes(8, 2, noise_dim=2)
        >>> estimate = probae.adversarial_elbo(pair, torch.randn(5, 8))
        >>> torch.allclose(estimate.values, estimate.reconstruction - estimate.divergence)
        True
    """

    values: Tensor  # (N,) reconstruction less divergence
    std_error: Tensor  # (N,) Monte Carlo standard error over draws of z, the discriminator given
    reconstruction: Tensor  # (N,) mean log p(x|z)
    divergence: Tensor  # (N,) mean of T

    @property
    def mean(self) -> float:
        """Mean over the data, nats per datum."""
        return float(self.values.double().mean())

    def __repr__(self) -> str:
        return (
            f"AdversarialELBO({self.mean:.4f} nats per datum, {len(self.values)} data; an estimate "
            "that is as good as the discriminator, and no bound)"
        )


class _Draws(NamedTuple):
    """What the discriminator is to tell apart: (x, z) with label 1, and with label 0."""

    x1: Tensor
    z1: Tensor | None
    x0: Tensor
    z0: Tensor


def fit_adversarial(
    pair: Autoencoder,
    x: Tensor | Any,
    *,
    epochs: int = 50,
    batch_size: int = 128,
    lr: float = 1e-3,
    discriminator_lr: float | None = None,
    discriminator_steps: int = 1,
    weight: float = 1.0,
    gradient_penalty: float = 0.0,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    seed: int | None = 0,
    progress: bool = True,
) -> AdversarialRun:
    r"""Train a pair and its discriminator by turns; it is not SVI, and its loss is no bound.

    .. math::
        discriminator:&\quad \min_T\; E_a\, softplus(-T) + E_b\, softplus(T)\\
        data:&\quad \min_\theta\; E_{z \sim p(z)}\, softplus(-T(E[x|z]))\\
        code:&\quad \min_{\theta,\phi}\; E_{z \sim q(z|x)} [-\log p(x|z) + \lambda\,T(z)]\\
        joint:&\quad \min_{\theta,\phi}\; E_{z \sim q(z|x)} [-\log p(x|z) + \lambda\,T(x, z)]

    with a and b as in :class:`Discriminator`. With the best T and λ = 1 the last two are -E log
    p(x|z) + KL(q(z) ‖ p(z)), the loss of the adversarial autoencoder, which leaves the mutual
    information of x and z out of the KL and so bounds nothing, and the negative ELBO. The first is
    the non-saturating loss of generative adversarial networks; it trains the mean of the decoder,
    and a learned scale stays as it was.

    Model and guide of the pair take no part, and :class:`pyro.infer.SVI` on them would not train
    the discriminator. Pyro's param store and torch's random stream are as they were.

    Args:
        pair: a pair with a :class:`Discriminator`; its parameters are changed in place.
        x: training data (N, *x_shape): a tensor, array, path, or torch Dataset.
        epochs: passes over the data.
        batch_size: data per step; the last, smaller batch of an epoch is used too.
        lr: learning rate of encoder and decoder.
        discriminator_lr: that of the discriminator; default: ``lr``.
        discriminator_steps: steps of the discriminator for each step of encoder and decoder.
        weight: λ > 0, weight of the estimated divergence; other than 1 leaves the ELBO.
        gradient_penalty: γ >= 0; adds :math:`\frac\gamma2 E_{data} \|\nabla_x T(x)\|^2` to the loss
            of a discriminator of data, which keeps the two from circling each other.
        optimizer: called with parameters and ``lr``, twice; default: Adam with β₁ = 0.5.
        seed: of shuffling and noise; None draws from the global stream.
        progress: show a progress bar.

    Returns:
        AdversarialRun: history and facts of the run.

    Raises:
        ValueError: a pair without a discriminator, with a corruption or a factor, a prior that is
            flat or learned, or an encoder without gradients; bad data, as in :func:`probae.fit`; an
            argument out of range.
        FloatingPointError: a loss or parameter became NaN or infinite. After this or any other
            error the pair has the parameters of the last good epoch.

    Reference:
        Goodfellow et al., Generative adversarial nets, 2014; Makhzani et al., Adversarial
        autoencoders, 2015; Mescheder, Nowozin & Geiger, Adversarial variational Bayes, 2017;
        Mescheder, Geiger & Nowozin, Which training methods for GANs do actually converge?, 2018,
        for the gradient penalty.

    Example:
        >>> import torch, probae
        >>> pair = probae.AdversarialAutoencoder(8, 2)
        >>> run = probae.fit_adversarial(pair, torch.randn(64, 8), epochs=2, progress=False)
        >>> len(run.history["discriminator_loss"])
        2
    """
    for argument, count in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("discriminator_steps", discriminator_steps),
    ):
        require_count(count, argument)
    rates = {"lr": lr, "discriminator_lr": lr if discriminator_lr is None else discriminator_lr}
    for argument, value in {**rates, "weight": weight}.items():
        require_positive(value, argument)
    discriminator = _require_adversarial(pair)
    _check_parts(pair, discriminator, weight, gradient_penalty)
    judged = {id(p) for part in (pair.encoder, pair.decoder) for p in part.parameters()}
    if any(id(p) in judged for p in discriminator.parameters()):
        raise ValueError(
            "discriminator must not share parameters with encoder or decoder, which pull them the "
            "other way; give it a network of its own"
        )
    require_flag(progress, "progress")
    require_gradients("fit_adversarial")
    devices = {pair.device}
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(seeded(seed, devices))
        stack.enter_context(local_parameters())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(pyro.validation_enabled(False))  # losses are looked at, and named
        data = TrainingData(pair, x, "x", binarize=False)
        judge = _Player(list(discriminator.parameters()), rates["discriminator_lr"], optimizer)
        own = {id(parameter) for parameter in judge.parameters}
        others = [p for p in pair.parameters() if id(p) not in own]
        generator = _Player(others, lr, optimizer)
        last = stack.enter_context(_last_good(pair))
        history: dict[str, list[float]] = {}
        start = time.perf_counter()
        steps = epochs * math.ceil(len(data) / batch_size)
        bar = stack.enter_context(tqdm(total=steps, disable=not progress, unit="step"))
        for epoch in range(1, epochs + 1):
            totals: dict[str, float] = {}
            for source in data.sources(batch_size, data.order(), epoch):
                batch = data.batch(source)
                for _ in range(discriminator_steps):
                    draws = _draw(pair, discriminator.sees, batch)
                    row = _judge(discriminator, draws, judge, gradient_penalty)
                row |= _generate(pair, discriminator, batch, draws, weight, generator)
                for name, value in row.items():
                    if not math.isfinite(value):
                        raise last.error(f"{name} became {value} in epoch {epoch}")
                    totals[name] = totals.get(name, 0.0) + value * len(batch) / len(data)
                bar.update()
            if (broken := broken_parameter(pair)) is not None:
                raise last.error(f"training diverged in epoch {epoch}: {broken}")
            row = {"epoch": epoch, **totals, "seconds": time.perf_counter() - start}
            for name, value in row.items():
                history.setdefault(name, []).append(float(value))
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.2f}")
            last.update(epoch)
    return AdversarialRun(
        history, discriminator.sees, pair.kind, seconds=time.perf_counter() - start
    )


def adversarial_elbo(
    pair: Autoencoder, x: Tensor | Any, num_samples: int = 100, *, seed: int | None = 0
) -> AdversarialELBO:
    r"""Estimate the evidence lower bound with a discriminator in the place of the KL.

    .. math:: E_{z \sim q(z|x)} [\log p(x|z) - T(x, z)],\quad
              T^*(x, z) = \log q(z|x) - \log p(z)

    At the optimal discriminator of x and z it *is* the ELBO of the implicit encoder; at any other
    it may lie above log p(x). A discriminator of codes alone has :math:`T^*(z) = \log q(z) - \log
    p(z)`, q(z) being the aggregated codes, and the mean over x is then too high by their mutual
    information with x: :math:`E_x KL(q(z|x) \| p(z)) = KL(q(z) \| p(z)) + I_q(x; z)`. So it is an
    **estimate and no bound**; for a bound take ``log_likelihood(pair, x, method="ais")``.

    Args:
        pair: a pair with a :class:`Discriminator` of codes, or of x and z; it is not changed.
        x: data (N, *x_shape).
        num_samples: draws of z per datum.
        seed: of the draws; None draws from the global stream.

    Returns:
        AdversarialELBO: estimates per datum in nats, and their two terms.

    Raises:
        ValueError: a pair without such a discriminator; bad data; ``num_samples`` < 1.

    Reference:
        Mescheder, Nowozin & Geiger, Adversarial variational Bayes, 2017; Hoffman & Johnson, ELBO
        surgery, 2016.

    Example:
        >>> import torch, probae
        >>> pair = probae.AdversarialVariationalBayes(8, 2, noise_dim=2)
        >>> probae.adversarial_elbo(pair, torch.randn(5, 8)).values.shape
        torch.Size([5])
    """
    discriminator = _require_adversarial(pair)
    if discriminator.sees == "data":
        raise ValueError(
            "pair must have a discriminator of codes, sees='code' or 'joint', got sees='data': "
            "there is no KL of codes to estimate; for log p(x) use "
            "probae.log_likelihood(pair, x, method='ais')"
        )
    require_count(num_samples, "num_samples")
    data = as_tensor(x, "x").to(pair.device, pair.dtype)
    check_support(pair, data, "x", binarize=False, strict=True)
    rows, results = rows_in_budget(pair), []
    with frozen(pair, seed):
        for chunk, _ in chunks(data, max(1, rows // num_samples)):
            parts = []
            for count in counts(num_samples, max(1, rows // len(chunk))):
                z = pair.encoder(chunk).sample(torch.Size((count,)))
                seen = chunk.expand(count, *chunk.shape)
                logit = discriminator(seen, z).logits
                parts.append(torch.stack([pair.decoder(z).log_prob(chunk), logit]).double())
            terms = torch.cat(parts, 1)  # (2, K, n)
            values = terms[0] - terms[1]
            spread = values.std(0) if num_samples > 1 else torch.full_like(values[0], math.nan)
            results.append(torch.stack([values.mean(0), spread, *terms.mean(1)]))
    mean, spread, reconstruction, divergence = torch.cat(results, 1)
    return AdversarialELBO(mean, spread / math.sqrt(num_samples), reconstruction, divergence)


class _Player:
    """Parameters that are trained together, and their optimizer."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        make: Callable[..., torch.optim.Optimizer] | None,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "pair must have parameters that require gradients, both its discriminator and what "
                "it judges: nothing to train"
            )
        make = partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True) if make is None else make
        if not callable(make):
            raise ValueError(
                "optimizer must be called with parameters and lr, such as torch.optim.Adam, got "
                f"{make!r}"
            )
        self.optim = make(self.parameters, lr=lr)
        if not isinstance(self.optim, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer must make a torch.optim.Optimizer, got {type(self.optim).__name__}"
            )

    def step(self, loss: Tensor) -> None:
        """Take a step on these parameters alone; the other player's gradients are not computed."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        set_gradients(self.parameters, gradients)
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)


def _draw(pair: Autoencoder, sees: str, x: Tensor) -> _Draws:
    """Draw what the discriminator is to tell apart; gradients go through what the pair made."""
    z0 = pair.prior().sample(torch.Size((len(x),)))
    if sees == "data":
        return _Draws(x, None, mean_of(pair.decoder(z0)), z0)
    return _Draws(x, pair.encoder(x).rsample(), x, z0)


def _judge(
    discriminator: Discriminator, draws: _Draws, player: _Player, penalty: float
) -> dict[str, float]:
    """Take a step of the discriminator."""
    x1 = draws.x1.detach().requires_grad_(bool(penalty > 0))
    z1 = None if draws.z1 is None else draws.z1.detach()
    ones = discriminator(x1, z1).logits
    zeros = discriminator(draws.x0.detach(), draws.z0).logits
    loss = discriminator_loss(ones, zeros)
    objective = loss
    if penalty:
        (slope,) = torch.autograd.grad(ones.sum(), x1, create_graph=True)
        objective = loss + 0.5 * penalty * slope.square().flatten(1).sum(1).mean()
    player.step(objective)
    right = ((ones > 0).double().mean() + (zeros < 0).double().mean()) / 2
    return {"discriminator_loss": float(loss.detach()), "accuracy": float(right)}


def _generate(
    pair: Autoencoder,
    discriminator: Discriminator,
    x: Tensor,
    draws: _Draws,
    weight: float,
    player: _Player,
) -> dict[str, float]:
    """Take a step of encoder and decoder."""
    if discriminator.sees == "data":
        loss = softplus(-discriminator(draws.x0, None).logits).mean()
        player.step(loss)
        return {"loss": float(loss.detach())}
    reconstruction = pair.decoder(draws.z1).log_prob(x).mean()
    divergence = discriminator(x, draws.z1).logits.mean()
    loss = weight * divergence - reconstruction
    player.step(loss)
    return {
        "loss": float(loss.detach()),
        "reconstruction": float(reconstruction.detach()),
        "divergence": float(divergence.detach()),
    }


def discriminator_loss(ones: Tensor, zeros: Tensor) -> Tensor:
    r"""Return the loss of a discriminator from its logits on draws of a and of b.

    .. math:: E_a\, softplus(-T) + E_b\, softplus(T) = -V,\quad
              V^* = 2\,JS(a, b) - \log 4

    the negative value of the game (Goodfellow et al., 2014); its least is log 4 - 2 JS.
    """
    return softplus(-ones).mean() + softplus(zeros).mean()


class _LastGood:
    """The parameters of the last good epoch."""

    def __init__(self, pair: Autoencoder) -> None:
        self.pair = pair
        self.update(0)

    def update(self, epoch: int) -> None:
        self.epoch = epoch
        self.state = {name: tensor.clone() for name, tensor in self.pair.state_dict().items()}

    def error(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what}. The pair has its parameters of epoch {self.epoch} again; lower lr or "
            "discriminator_lr, or set a gradient_penalty"
        )


@contextlib.contextmanager
def _last_good(pair: Autoencoder) -> Iterator[_LastGood]:
    """Give the pair its parameters of the last good epoch again where training fails."""
    last = _LastGood(pair)
    try:
        yield last
    except BaseException:  # an interrupt too leaves a whole epoch
        pair.load_state_dict(last.state)
        raise


def _require_adversarial(pair: Any) -> Discriminator:
    """Return the discriminator of a pair, or raise a ValueError that says how to get one."""
    require_parts(pair)
    discriminator = pair.discriminator
    if not isinstance(discriminator, Discriminator):
        got = "None" if discriminator is None else type(discriminator).__name__
        raise ValueError(
            f"pair must have a probae.Discriminator, got discriminator={got}; take a probae.GAN, "
            "AdversarialAutoencoder or AdversarialVariationalBayes, build a pair with "
            "discriminator=, or train this one with probae.fit"
        )
    for name in ("corruption", "factor"):
        if getattr(pair, name) is not None:
            raise ValueError(
                f"pair has a {name}, which adversarial training leaves out: build it with "
                f"{name}=None"
            )
    return discriminator


def _check_parts(
    pair: Autoencoder, discriminator: Discriminator, weight: float, penalty: float
) -> None:
    """Refuse what would be left untrained, silently."""
    sees = discriminator.sees
    if is_flat(prior_of(pair)):
        raise ValueError(
            "pair has a flat prior, from which no codes can be drawn; give it a proper one, such "
            "as prior='normal'"
        )
    if any(parameter.requires_grad for parameter in pair.prior.parameters()):
        raise ValueError(
            "prior learns its parameters, to which an estimated density ratio passes no gradient: "
            "fix them with pair.prior.requires_grad_(False)"
        )
    if isinstance(pair.encoder, NoEncoder) != (sees == "data"):
        raise ValueError(
            "encoder must be NoEncoder() beside a discriminator with sees='data', which trains no "
            f"encoder, and beside no other, got {type(pair.encoder).__name__} and sees={sees!r}"
        )
    if sees == "data":
        learns = any(parameter.requires_grad for parameter in pair.decoder.parameters())
        with frozen(pair, seed=0), torch.enable_grad():
            mean = mean_of(pair.decoder(pair.prior().sample(torch.Size((2,)))))
        if not mean.isfinite().all() or (learns and not mean.requires_grad):
            raise ValueError(
                "decoder must have a mean that passes gradients, which the discriminator takes for "
                "data, as a GaussianDecoder has, got one without"
            )
    else:
        with frozen(pair, seed=0):
            code = pair.encoder(torch.zeros(1, *pair.x_shape).to(pair.device, pair.dtype))
        if not code.has_rsample:
            raise ValueError(
                "encoder must make draws that pass gradients (has_rsample), got "
                f"{type(code).__name__}; take a GaussianEncoder, PointEncoder or ImplicitEncoder"
            )
    if not 0 <= as_number(penalty) < math.inf:
        raise ValueError(f"gradient_penalty must be a finite number >= 0, got {penalty!r}")
    for argument, value, default, fits in (
        ("gradient_penalty", penalty, 0, sees == "data"),
        ("weight", weight, 1, sees != "data"),
    ):
        if value != default and not fits:
            raise ValueError(
                f"{argument} must be left at {default} for a discriminator with sees={sees!r}, got "
                f"{value!r}"
            )
