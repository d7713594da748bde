"""The pair: a stochastic decoder as the model, a stochastic encoder as the guide."""

from __future__ import annotations

import contextlib
import contextvars
import enum
import itertools
from collections import defaultdict
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro.distributions import Empirical, MaskedDistribution, ZeroInflatedDistribution
from pyro.nn import PyroModule
from torch import Size, Tensor, nn
from torch.distributions import biject_to

from .corrupted import Replacement
from .corruptions import encoder_input
from .datasets import as_tensor
from .discriminators import NoEncoder
from .distributions import has_component, is_discrete, is_flat, is_point, weighs_points
from .part import LAWS, Part
from .sparse import SpikeAndSlab

_LOCAL: contextvars.ContextVar[bool] = contextvars.ContextVar("probae_local", default=False)
_WITH_ATOMS = (SpikeAndSlab, Replacement, ZeroInflatedDistribution, Empirical)
_COUNTERS: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


class Kind(str, enum.Enum):
    """What the loss of a pair certifies about log p(x); it decides which numbers may be printed.

    Example:
        >>> Kind.MAP_JOINT.is_lower_bound, Kind.DISCRETE_POINT.is_lower_bound
        (False, True)
        >>> Kind.DISCRETE_POINT.statement
        '-loss = log p(x, z) <= log p(x), a lower bound because z is discrete'
    """

    ELBO = "ELBO"
    IWELBO = "IWELBO"
    DISCRETE_POINT = "DISCRETE_POINT"
    MAP_JOINT = "MAP_JOINT"
    CONDITIONAL = "CONDITIONAL"
    RECONSTRUCTION = "RECONSTRUCTION"
    ENERGY = "ENERGY"
    ADVERSARIAL = "ADVERSARIAL"

    def __str__(self) -> str:
        return self.value

    @property
    def is_lower_bound(self) -> bool:
        """Whether -loss is a lower bound on log p(x)."""
        return self in (Kind.ELBO, Kind.IWELBO, Kind.DISCRETE_POINT)

    @property
    def statement(self) -> str:
        """The statement that is true of the loss, in one sentence."""
        return _STATEMENTS[self]


_STATEMENTS = {
    Kind.ELBO: "-loss is a lower bound on log p(x), in expectation",
    Kind.IWELBO: "-loss is a lower bound on log p(x), tighter with more particles",
    Kind.DISCRETE_POINT: "-loss = log p(x, z) <= log p(x), a lower bound because z is discrete",
    Kind.MAP_JOINT: "-loss = log p(x, f(x)), a joint density that bounds log p(x) in neither "
    "direction and moves with the units of z",
    Kind.CONDITIONAL: "-loss = log p(x | x_tilde), or given a noisy code of x, in expectation; it "
    "says nothing about log p(x)",
    Kind.RECONSTRUCTION: "-loss = log p(x | z = f(x)), a reconstruction score; without a proper "
    "prior there is no p(x)",
    Kind.ENERGY: "the loss holds an unnormalised factor and says nothing about log p(x)",
    Kind.ADVERSARIAL: "the loss holds an estimated density ratio and says nothing about log p(x)",
}


class Autoencoder(Part, PyroModule):
    r"""A probabilistic autoencoder: four or five parts, two Pyro programs.

    .. math::
        model:&\quad z \sim p(z),\quad x \sim p(x|z),\quad \tilde x \sim C(\tilde x|x),
               \quad \text{factor } e^{c(x, z)}\\
        guide:&\quad \tilde x \sim C(\tilde x|x),\quad z \sim q(z|\tilde x)

    Without a corruption, x_tilde is absent and the encoder sees x. With one, x_tilde stands in both
    programs with the same distribution, so it cancels and an ELBO stays an ELBO. A factor (the
    penalty of a contractive autoencoder, say) is one more term of the loss, unnormalised: with it
    the loss says nothing about log p(x). A discriminator is no part of the two programs: with one
    the pair is of kind ADVERSARIAL, and :func:`probae.fit_adversarial` trains it.

    ``model`` and ``guide`` work with :class:`pyro.infer.SVI` as they are; every parameter of every
    instance is in the param store under the instance's own name. Sites are ``z``, ``x`` and, where
    there are such parts, ``x_tilde`` and ``factor``, in one plate ``data``.

    Args:
        prior: module, ``prior()`` is p(z) with event shape ``z_shape`` and no batch shape.
        encoder: module, ``encoder(x)`` is q(z|x) for x of shape (..., *x_shape).
        decoder: module, ``decoder(z)`` is p(x|z) for z of shape (..., *z_shape).
        corruption: module, ``corruption(x)`` is C(x_tilde|x), or None.
        factor: module, ``factor(x, z)`` is a :class:`pyro.distributions.Unit` whose log-factor is
            c(x, z), or None.
        discriminator: a :class:`Discriminator` to train the others by, or None. Only with it may
            the encoder be :class:`NoEncoder`; z of the guide is then drawn from the prior.

    Raises:
        ValueError: parts that do not fit together; the message names the part, the shape that was
            expected and the one that came.

    Example:
        >>> import torch, pyro, probae
        >>> pair = probae.Autoencoder(
        ...     prior=probae.StandardNormalPrior(2),
        ...     encoder=probae.GaussianEncoder(probae.MLP(8, (2, 2))),
        ...     decoder=probae.BernoulliDecoder(probae.MLP(2, 8)),
        ... )
        >>> svi = pyro.infer.SVI(
        ...     pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
        ... )
        >>> loss = svi.step(torch.ones(16, 8))  # nats, summed over the 16 data
        >>> pair.kind.value
        'ELBO'
    """

    def __init__(
        self,
        prior: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        corruption: nn.Module | None = None,
        factor: nn.Module | None = None,
        discriminator: nn.Module | None = None,
    ) -> None:
        name = type(self).__name__
        super().__init__(name=f"{name}_{next(_COUNTERS[name])}")
        for argument, part in (("prior", prior), ("encoder", encoder), ("decoder", decoder)):
            if not isinstance(part, nn.Module):
                raise ValueError(
                    f"{argument} must be a torch.nn.Module whose forward returns a Distribution, "
                    f"got {type(part).__name__}"
                )
        options = {"corruption": corruption, "factor": factor, "discriminator": discriminator}
        for argument, option in options.items():
            if option is not None and not isinstance(option, nn.Module):
                raise ValueError(
                    f"{argument} must be a torch.nn.Module or None, got {type(option).__name__}"
                )
        self.prior = prior
        self.encoder = encoder
        self.decoder = decoder
        self.corruption = corruption
        self.factor = factor
        self.discriminator = discriminator
        dry = self._dry_run()
        self.z_shape = tuple(dry["prior"].event_shape)
        self.x_shape = tuple(dry["decoder"].event_shape)
        self._shared = self._sharing()

    def model(self, x: Tensor) -> Tensor:
        """Pyro program p(z) p(x|z) with ``x`` of shape (N, *x_shape) observed; returns z.

        With a corruption it ends in C(x_tilde|x), with a factor in exp c(x, z).
        """
        self._enter(x)
        with pyro.plate("data", len(x), dim=-1):
            # x_tilde comes first, as in the guide: TraceMeanField_ELBO compares the order of sites
            if self.corruption is not None:
                pyro.sample("x_tilde", self._corrupted(x))
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.decoder(z), obs=x)
            if self.factor is not None:
                unit = self.factor(x, z)
                pyro.sample("factor", unit, obs=unit.sample(), infer={"is_auxiliary": True})
        return z

    def guide(self, x: Tensor) -> Tensor:
        """Pyro program q(z|x), or C(x_tilde|x) q(z|x_tilde) under a corruption; returns z."""
        self._enter(x)
        with pyro.plate("data", len(x), dim=-1):
            if self.corruption is not None:
                x = pyro.sample("x_tilde", self._corrupted(x))
            code = self.prior() if isinstance(self.encoder, NoEncoder) else self.encoder(x)
            if is_point(code):  # Pyro's kl(Delta, p) leaves the Delta's log-density out
                code = MaskedDistribution(code, True)
            return pyro.sample("z", code)

    def _corrupted(self, x: Tensor) -> Any:
        """Return C(x_tilde|x), in an objective of the same tensors for guide and model."""
        assert self.corruption is not None
        laws = LAWS.get()
        if laws is None:
            return self.corruption(x)
        key = (id(self), id(x))
        if key not in laws:
            laws[key] = (x, self.corruption(x))  # with x, so that no other tensor gets its id
        return laws[key][1]

    @property
    def kind(self) -> Kind:
        """What the loss certifies, derived from the distributions that the parts return.

        Raises:
            ValueError: parts that were replaced and do not fit together, or have other shapes.
        """
        dry = self._dry_run()
        shapes = tuple(dry["decoder"].event_shape), tuple(dry["prior"].event_shape)
        if shapes != (self.x_shape, self.z_shape):
            raise ValueError(
                f"parts must keep x_shape {self.x_shape} and z_shape {self.z_shape}, got "
                f"{shapes[0]} and {shapes[1]}; build a new pair for other shapes"
            )
        for one, other in sorted(self._shared - self._sharing()):
            raise ValueError(
                f"{one} and {other} shared parameters when the pair was built, and one of them was "
                f"replaced alone, so that {other} still uses the old {one}, or the other way "
                "round; replace both, or build a new pair"
            )
        point, masked = is_point(dry["encoder"]), is_flat(dry["encoder"])
        if self.factor is not None or self.has_own_programs():
            return Kind.ENERGY
        if self.discriminator is not None:
            return Kind.ADVERSARIAL
        if is_flat(dry["prior"]):
            if not dry["prior_is_constant"] or not (point or masked):
                return Kind.ENERGY
            return Kind.RECONSTRUCTION if point and self.corruption is None else Kind.CONDITIONAL
        if not point:
            return Kind.ENERGY if masked else Kind.ELBO
        return Kind.DISCRETE_POINT if is_discrete(dry["prior"]) else Kind.MAP_JOINT

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the parameters and buffers."""
        return self._any_tensor().dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters and buffers."""
        return self._any_tensor().device

    def initialize(self, x: Tensor) -> None:
        """Set data-dependent starting values in every part that has them.

        For instance the decoder's output bias to the data's mean and the pseudo-inputs of a
        VampPrior to data. Call it before training, on training data of shape (N, *x_shape).

        Raises:
            ValueError: ``x`` has the wrong shape or dtype, is empty, or is not finite.
        """
        x = self.check_input(as_tensor(x, "x")).to(self.device, self.dtype)
        seen = encoder_input(self.corruption, x)
        for part in (self.prior, self.encoder):  # a VampPrior holds what the encoder is given
            if isinstance(part, Part):
                part.initialize(seen)
        for other in (self.decoder, self.corruption, self.factor):
            if isinstance(other, Part):
                other.initialize(x)

    def check_input(self, x: Any, argument: str = "x") -> Tensor:
        """Return ``x`` if it is a floating tensor (N, *x_shape), or raise a ValueError."""
        if not isinstance(x, Tensor):
            raise ValueError(f"{argument} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != len(self.x_shape) + 1 or tuple(x.shape[1:]) != self.x_shape:
            raise ValueError(
                f"{argument} must have shape (N, {', '.join(map(str, self.x_shape))}), got "
                f"{tuple(x.shape)}{_shape_hint(x, self.x_shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{argument} must have a floating dtype, got {x.dtype}; convert with "
                f"{argument}.to({self.dtype}) (and scale 8-bit images by 1/255)"
            )
        most = torch.finfo(self.dtype).max
        if torch.finfo(x.dtype).max > most and (x.abs() > most).any():
            raise ValueError(
                f"{argument} must fit into the dtype of the pair, {self.dtype}, got numbers that "
                "are too large; scale the data, or convert the pair with pair.to(torch.float64)"
            )
        return x

    def __repr__(self) -> str:
        from .rendering import describe  # it looks at pairs, so it imports this module

        return describe(self)

    def _repr_html_(self) -> str:
        from .rendering import describe_html

        return describe_html(self)

    def _enter(self, x: Tensor) -> None:
        """Check the input, and tell Pyro about every parameter of this very instance."""
        self.check_input(x)
        if x.dtype != self.dtype:
            raise ValueError(
                f"x must have the dtype of the pair, {self.dtype}, got {x.dtype}; convert with "
                f"x.to({self.dtype}), or the pair with pair.to({x.dtype})"
            )
        if len(x) == 0:
            raise ValueError("x is empty: expected at least one datum")
        if _LOCAL.get():
            return
        store, held = pyro.get_param_store(), self._name_parts()
        for name, parameter in self.named_parameters(prefix=str(self._pyro_name)):
            key = name.removesuffix("_unconstrained") if name in held else name
            # a stale tensor (of a replaced part, or of the original of a copy) would be trained
            # in place of this one, silently
            if key in store and store[key].unconstrained() is not parameter:
                del store[key]
            if name not in held and parameter.requires_grad:  # a PyroParam enters by itself
                pyro.param(name, parameter)

    def _name_parts(self) -> set[str]:
        """Name the parts that are PyroModules; return the names of their own parameters.

        Inside a plain module Pyro gives them no name, and so would confuse those of two pairs.
        """
        held: set[str] = set()
        for path, module in self.named_modules(prefix=str(self._pyro_name)):
            if isinstance(module, PyroModule):
                module._pyro_name = path
                held |= {f"{path}.{name}_unconstrained" for name in module._pyro_params}
        return held

    def has_own_programs(self) -> bool:
        """Whether model or guide were overridden, so that the parts do not tell what they hold."""
        own = {name: vars(Autoencoder)[name].__get__(self) for name in ("model", "guide")}
        return any(getattr(self, name) != program for name, program in own.items())

    def _sharing(self) -> set[tuple[str, str]]:
        """Return the pairs of parts that share parameters."""
        owned = {
            name: {id(p) for p in part.parameters()}
            for name in ("prior", "encoder", "decoder", "corruption", "factor")
            if (part := getattr(self, name)) is not None
        }
        return {(a, b) for a, b in itertools.combinations(owned, 2) if owned[a] & owned[b]}

    def _any_tensor(self) -> Tensor:
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.empty(())

    def _dry_run(self) -> dict[str, Any]:
        """Run the parts on three data; check each distribution's shape; change no state."""
        self._name_parts()
        with frozen(self, seed=0):
            prior, z = _draw("prior()", self.prior, sample_shape=(3,))
            _expect("prior()", prior, Size(), prior.event_shape)
            decoder, x = _draw("decoder(z)", self.decoder, z)
            _expect("decoder(z)", decoder, Size((3,)), decoder.event_shape)
            x_tilde = x = x.to(self.dtype)
            if self.corruption is not None:
                # zeros: a draw of the decoder need not lie where the data do
                corruption, x_tilde = _draw("corruption(x)", self.corruption, torch.zeros_like(x))
                _expect("corruption(x)", corruption, Size((3,)), corruption.event_shape)
            if isinstance(self.encoder, NoEncoder):
                encoder, codes = prior, z
            else:
                encoder, codes = _draw("encoder(x)", self.encoder, x_tilde, sample_shape=(16,))
                _expect("encoder(x)", encoder, Size((3,)), prior.event_shape)
            if self.factor is not None:
                factor, _ = _draw("factor(x, z)", self.factor, x, z)
                _expect("factor(x, z)", factor, Size((3,)), Size((0,)))
            if self.discriminator is not None:
                label, _ = _draw("discriminator(x, z)", self.discriminator, x, z)
                _expect("discriminator(x, z)", label, Size((3,)), Size())
            elif isinstance(self.encoder, NoEncoder):
                raise ValueError(
                    "encoder may be NoEncoder only beside a discriminator to train by, got "
                    "discriminator=None"
                )
            constant = bool((prior.log_prob(z) == 0).all())
        require_compatible(prior, encoder, codes)
        learns = any(parameter.requires_grad for parameter in self.prior.parameters())
        if is_point(encoder) and not is_discrete(prior) and learns:
            raise ValueError(
                "prior learns its parameters and encoder is a point code (Delta): shrinking both "
                "makes the density of the code, and so the loss, unbounded; use an encoder with a "
                "density, such as a GaussianEncoder, or fix the prior: prior.requires_grad_(False)"
            )
        return {
            "prior": prior,
            "decoder": decoder,
            "encoder": encoder,
            "prior_is_constant": constant,
        }


def require_compatible(prior: Any, encoder: Any, codes: Tensor, argument: str = "encoder") -> None:
    """Refuse a law of codes whose ratio with the prior is no density; ``codes`` are its draws."""
    point = is_point(encoder)
    if not point and is_discrete(encoder) != is_discrete(prior):
        kinds = ["discrete" if is_discrete(d) else "continuous" for d in (encoder, prior)]
        raise ValueError(
            f"{argument} is {kinds[0]} but prior is {kinds[1]}: their ratio is no density; pick "
            "both discrete (BernoulliEncoder, BernoulliPrior) or both continuous"
        )
    if point and is_discrete(prior) and weighs_points(encoder):
        raise ValueError(
            f"{argument} is a point (Delta) with a log-density, but on discrete codes a point has "
            "mass one: leave log_density=0"
        )
    atoms = [has_component(d, _WITH_ATOMS) for d in (encoder, prior)]
    if atoms == [True, False] and not point:
        raise ValueError(
            f"{argument} puts probability on codes of exactly 0 (SpikeAndSlab), or other points, "
            "but prior has a density there: their ratio is no density; use a SpikeAndSlabPrior or "
            "SubsetPrior"
        )
    drawn = codes.isfinite().all() and not prior.support.check(codes).all()
    if drawn or (not point and _reaches_outside(encoder, prior.support)):
        raise ValueError(
            f"{argument} makes codes outside the support of the prior ({prior.support}), where "
            "its density is zero: give the two the same support, such as 0/1 codes for a "
            "BernoulliPrior, one-hot codes for a CategoricalPrior, and a LogNormalEncoder for an "
            "ExponentialPrior"
        )


def _reaches_outside(encoder: Any, support: Any) -> bool:
    """Whether the support of the encoder reaches beyond another, wherever its draws are."""
    try:
        to_z = biject_to(encoder.support)
    except NotImplementedError:  # discrete, or a mixture: the draws have to do
        return False
    if to_z.inverse_shape(encoder.event_shape) != encoder.event_shape:
        return False
    far = torch.linspace(-30, 30, 13).reshape(-1, *[1] * len(encoder.event_shape))
    return not support.check(to_z(far.expand(13, *encoder.event_shape))).all()


@contextlib.contextmanager
def frozen(pair: nn.Module, seed: int | None) -> Iterator[None]:
    """Evaluate a pair without a trace of it: no gradients, eval mode, random stream put back.

    Pyro's param store is left alone, and its argument checks are off inside (callers check their
    input first). ``seed=None`` draws from, and advances, the global random stream.
    """
    training = [module for module in pair.modules() if module.training]
    devices = {t.device for t in itertools.chain(pair.parameters(), pair.buffers())}
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(seeded(seed, devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(local_parameters())
        stack.enter_context(pyro.validation_enabled(False))
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextlib.contextmanager
def local_parameters() -> Iterator[None]:
    """Run pairs without the global param store: their parameters are those of the module."""
    token = _LOCAL.set(True)
    try:
        # parts that are PyroModules use a store of their own; handlers outside do not reach in
        with pyro.get_param_store().scope(), pyro.poutine.block():
            yield
    finally:
        _LOCAL.reset(token)


@contextlib.contextmanager
def seeded(seed: int, devices: set[torch.device]) -> Iterator[None]:
    """Seed torch's generators of these devices inside the block and put them back after it."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not abs(seed) < 2**63:
        raise ValueError(f"seed must be a 64-bit int, or None for the global stream, got {seed!r}")
    cuda = [d for d in devices if d.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        if {device.type for device in devices} <= {"cpu", "cuda"}:
            # torch.manual_seed would seed GPUs that are not put back, too
            for generator in [torch.default_generator, *map(_generator_of, cuda)]:
                generator.manual_seed(int(seed))
        else:
            torch.manual_seed(int(seed))
        yield


def _generator_of(device: torch.device) -> torch.Generator:
    torch.cuda.init()  # no GPU has one before
    place = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[place]


RandomState = tuple[Tensor, Tensor | None]  # torch's random streams, of the CPU and of a GPU


def random_state(device: torch.device) -> RandomState:
    """Return where the random streams are that work on a device draws from."""
    return torch.get_rng_state(), (
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    )


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Put the random streams back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _draw(
    call: str, part: nn.Module, *args: Tensor, sample_shape: tuple[int, ...] = ()
) -> tuple[Any, Tensor]:
    """Call a part, check that it returns a distribution, and draw from that."""
    names = call[call.index("(") + 1 : -1].split(", ")
    shapes = [f"{n} of shape {tuple(x.shape)}" for n, x in zip(names, args, strict=bool(args))]
    given = ", ".join(shapes) or "no argument"
    with _naming(call.split("(")[0], given):
        distribution = part(*args)
    if not isinstance(distribution, torch.distributions.Distribution):
        raise ValueError(
            f"{call} must return a torch.distributions.Distribution, got "
            f"{type(distribution).__name__}"
        )
    with _naming(call.split("(")[0], given):
        return distribution, distribution.sample(Size(sample_shape))


@contextlib.contextmanager
def _naming(name: str, given: str) -> Iterator[None]:
    """Turn an error inside a part into one that names the part and what it was given."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{name} does not fit the other parts: given {given}, it failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def _expect(call: str, distribution: Any, batch_shape: Size, event_shape: Size) -> None:
    """Check that a part returned a distribution of these shapes."""
    if distribution.batch_shape != batch_shape or distribution.event_shape != event_shape:
        raise ValueError(
            f"{call} must return a distribution of batch shape {tuple(batch_shape)} and event "
            f"shape {tuple(event_shape)}, got batch shape {tuple(distribution.batch_shape)} and "
            f"event shape {tuple(distribution.event_shape)}; declare event dimensions with "
            ".to_event(n), and give encoder, decoder and prior the same z_dim and x_shape"
        )


def _shape_hint(x: Tensor, x_shape: tuple[int, ...]) -> str:
    if tuple(x.shape) == x_shape:
        return "; add a batch dimension with x.unsqueeze(0)"
    if x.dim() > 0 and x[:1].numel() == Size(x_shape).numel():
        return f"; reshape with x.reshape(-1, {', '.join(map(str, x_shape))})"
    return ""
