"""The command line: ``probae demo``, ``probae fit``, ``probae evaluate``, ``probae sample``."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import __version__, checkpoints, distributed, plots
from .annealing import Annealing
from .autoencoder import Autoencoder, frozen, seeded
from .checks import likelihood_of
from .corruptions import CORRUPTIONS
from .datasets import (
    DATASET_NAMES,
    load_dataset,
)
from .decoders import LIKELIHOODS
from .distributions import GreyBernoulli, has_component, is_flat
from .files import held
from .graphs import CannotCompile
from .interrupts import terminate
from .likelihood import LogLikelihood
from .networks import ACTIVATIONS
from .objectives import ELBO, IWAE, LinearWarmup, PerDatumObjective
from .presets import (
    PPCA,
    VAE,
    ContractiveAutoencoder,
    DenoisingAutoencoder,
    DenoisingVAE,
    PredictiveSparseDecomposition,
    SemanticHashing,
    SparseAutoencoder,
    UndercompleteAutoencoder,
)
from .runs import (
    HISTORY,
    LOSS,
    RECONSTRUCTIONS,
    RUN_FILE,
    RUN_FORMAT,
    SAMPLES,
    Data,
    Record,
    append_evaluation,
    as_device,
    as_measured,
    cut,
    digest,
    is_grey,
    load_data,
    load_run,
    measure,
    read_file,
    say,
    staged,
    training_data,
    untrusted,
    write_array,
    write_figure,
    write_json,
)
from .sampling import sample
from .saving import save
from .training import Run, fit


class Model(NamedTuple):
    """A preset on the command line, and where its training differs from :func:`probae.fit`'s."""

    preset: type[Autoencoder]
    lr: float = 1e-3
    schedule: str = "constant"


MODELS = {
    "vae": Model(VAE),
    "ppca": Model(PPCA, lr=0.02, schedule="cosine"),
    "undercomplete": Model(UndercompleteAutoencoder),
    "sparse": Model(SparseAutoencoder),
    "denoising": Model(DenoisingAutoencoder),
    "denoising-vae": Model(DenoisingVAE),
    "contractive": Model(ContractiveAutoencoder),
    "psd": Model(PredictiveSparseDecomposition),
    "hashing": Model(SemanticHashing),
}

PARTS = {  # keyword of a preset: option
    "hidden": "--hidden",
    "channels": "--channels",
    "activation": "--activation",
    "likelihood": "--likelihood",
    "likelihood_options": "--likelihood-option",
    "prior": "--prior",
    "corruption": "--corruption",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: arguments after the program's name; None: those of the process.

    Returns:
        int: 0; 2 after an error that is the user's to mend, told in one line on stderr; 130 after
        an interrupt, by Ctrl-C or SIGTERM.

    Raises:
        SystemExit: after ``--help`` and ``--version`` (0), or where the arguments do not parse (2).

    Example:
        >>> from probae.cli import main
        >>> main(["evaluate", "no-such-run"])
        2
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± must not end a run
    args = _parser().parse_args(argv)
    number, launched = distributed.launched_rank(), distributed.is_launched()
    who = f"probae, process {number}" if launched else "probae"
    try:
        with _sigterm_as_interrupt():
            args.command(args)
    except (ValueError, OSError, FloatingPointError, ImportError, CannotCompile) as error:
        print(f"{who}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if number == 0:
            what = str(interrupt) or "nothing was written"
            print(f"{who}: interrupted; {what}", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, by which clusters end a job, do what Ctrl-C does."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="probae",
        description="Probabilistic autoencoders: train, evaluate in nats per datum, sample.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"probae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_options, run, text) in {
        "demo": (_demo_options, _demo, "train a VAE and PPCA on digits, and compare them"),
        "fit": (_fit_options, _fit, "train a model, and save it with pictures of it"),
        "evaluate": (_evaluate_options, _evaluate, "print the log-likelihood of held-out data"),
        "sample": (_sample_options, _sample, "draw from a model: a picture, or an array"),
    }.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(command=run)
        add_options(command)
    return parser


def _option(parser: Any, flags: str, text: str, shown: str | None = None, **keywords: Any) -> None:
    """Add an option whose help ends with its default, shown as ``shown`` where it is computed."""
    if "type" in keywords:
        keywords.setdefault("metavar", "N")
    default = keywords.get("default") if shown is None else shown
    parser.add_argument(*flags.split(), help=f"{text} (default: {default})", **keywords)


def _demo_options(parser: argparse.ArgumentParser) -> None:
    of_each = "60 for the VAE, 120 for PPCA"
    _option(parser, "--out", "folder to write", type=Path, default="probae-demo", metavar="FOLDER")
    _option(parser, "--epochs", "of both models", of_each, type=int)
    _option(parser, "--seed", "of the training", type=_seed, default=0)
    _option(parser, "--overwrite", "replace an earlier demo", "no", action="store_true")


def _fit_options(parser: argparse.ArgumentParser) -> None:
    on_or_off = argparse.BooleanOptionalAction
    names = f"one of {', '.join(MODELS)}"
    parser.add_argument("model", metavar="MODEL", choices=tuple(MODELS), help=names)
    text = f"{', '.join(DATASET_NAMES)}, or a .npy or .npz file of floats (N, ...), of which 10 %% "
    text += "become validation and 10 %% test data by --seed"
    _option(parser, "--data", text, "none", required=True, metavar="NAME|FILE")
    _option(parser, "--out", "folder to write", "none", required=True, type=Path, metavar="RUN")
    _option(parser, "--overwrite", "replace an earlier run", "no", action="store_true")
    _option(parser, "--quiet", "print errors only", "no", action="store_true")
    _option(parser, "--device", "cpu, cuda, cuda:1, …", default="cpu")

    parts = parser.add_argument_group("the model")
    _option(parts, "--z-dim", "latent dimensions", type=int, default=10)
    _option(parts, "--hidden", "widths of hidden layers", _own("hidden"), type=int, nargs="*")
    _option(parts, "--channels", "of convolutions before them", "none", type=int, nargs="+")
    _option(parts, "--activation", ", ".join(ACTIVATIONS), _own("activation"))
    _option(parts, "--likelihood", ", ".join(LIKELIHOODS), _own("likelihood"))
    text = "keyword of the decoder, such as learn_scale=true; may be repeated"
    shown = "none, but for discretized-logistic the data set's own levels"
    _option(
        parts, "--likelihood-option", text, shown, action="append", metavar="NAME=VALUE", default=[]
    )
    priors = (
        "normal, laplace, mixture, vamp, flow, flat; of sparse: laplace, exponential, student-t"
    )
    priors += ", spike-and-slab, subset"
    _option(parts, "--prior", priors, _own("prior"))
    text = f"of denoising models, with its strength: {', '.join(CORRUPTIONS)}"
    _option(parts, "--corruption", text, "gaussian-noise=0.3", metavar="NAME=VALUE")
    text = "any other keyword of the model, such as rate=0.5 of sparse; may be repeated"
    _option(parts, "--option", text, "none", action="append", metavar="NAME=VALUE", default=[])

    training = parser.add_argument_group("training")
    _option(training, "--epochs", "passes over the data", type=int, default=50)
    _option(training, "--batch-size", "data per step", type=int, default=128)
    _option(training, "--lr", "learning rate at the start", _own("lr"), type=float)
    _option(training, "--schedule", "of the learning rate: constant, cosine", _own("schedule"))
    text = "keep the epoch of the lowest validation loss, not the last"
    _option(training, "--validation", text, "yes", action=on_or_off, default=True)
    _option(training, "--patience", "epochs without gain to stop after", "never stop", type=int)
    bounds = ("elbo", "iwae")
    _option(training, "--objective", "what is maximised", choices=bounds, default="elbo")
    _option(training, "--num-particles", "samples of z per datum", "1, for iwae 5", type=int)
    text = "doubly reparameterised gradient, for iwae"
    _option(training, "--dreg", text, "no", action="store_true")
    _option(training, "--beta", "final weight of the KL, for elbo", "1", type=float)
    _option(training, "--warmup", "epochs of linear KL warm-up, for elbo", "0", type=float)
    text = "draw black-and-white from grey anew at every presentation"
    shown = "where the likelihood is bernoulli and the data are grey"
    _option(training, "--binarize", text, shown, action=on_or_off, default=None)
    text = "spread each grey level over its interval, once, for densities; of a file, say how many"
    _option(training, "--dequantize", text, "no", type=int, nargs="?", const=0, metavar="LEVELS")
    _option(training, "--seed", "of split, weights and training", type=_seed, default=0)
    text = "float32, or bf16: layers multiply in bfloat16"
    _option(training, "--precision", text, choices=("float32", "bf16"), default="float32")
    text = "take the steps as one compiled graph; a resumed run then ends as a whole one up to "
    text += "rounding"
    _option(training, "--compile", text, "no", action="store_true")
    text = "of a NaN or infinity in a batch: raise an error, or skip the batch and count it"
    _option(training, "--on-fault", text, choices=("raise", "skip"), default="raise")

    keeping = parser.add_argument_group("checkpoints, in the folder RUN.checkpoint until the end")
    text = "go on from the checkpoint of an unfinished run, or begin where there is none"
    _option(keeping, "--resume", text, "no", action="store_true")
    text = "keep it at the end, so that --resume with more --epochs can train on"
    _option(keeping, "--keep-checkpoint", text, "no", action="store_true")
    text = "seconds between checkpoints, which are made after every epoch, too"
    _option(keeping, "--checkpoint-seconds", text, type=float, default=300.0)


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that probae fit wrote")
    methods = ("auto", "exact", "elbo", "iwae", "ais")
    text = "auto is exact where there is a closed form, else iwae"
    _option(parser, "--method", text, choices=methods, default="auto")
    text, shown = "samples of z per datum", "100 for elbo, 5000 for iwae, 16 chains for ais"
    _option(parser, "-k --num-samples", text, shown, type=int, metavar="K")
    text, shown = "of ais; the error falls like 1/T", "500, with ais"
    _option(parser, "--temperatures", text, shown, type=int, metavar="T")
    text, shown = "where ais begins; the encoder, where it is good, needs far fewer T", "prior"
    _option(parser, "--start", text, shown, choices=("prior", "encoder"))
    _option(parser, "--split", "of the data", "test", choices=("test", "val", "train"))
    text = "other data; of a file that the run was not fitted on, every row"
    _option(parser, "--data", text, "those of the run", metavar="NAME|FILE")
    _option(parser, "--limit", "first N data only", "all", type=int)
    _option(parser, "--seed", "of z, binarisation, dequantisation", type=_seed, default=0)
    _option(parser, "--device", "cpu, cuda, cuda:1, …", default="cpu")


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that probae fit wrote")
    _option(parser, "-n --num-samples", "how many to draw", type=int, default=64)
    text = "a .png for images, or a .npy; replaced if it is there"
    _option(parser, "--out", text, type=Path, default="samples.png", metavar="FILE")
    text = "the decoder's mean, without its noise"
    _option(parser, "--mean", text, "no", action="store_true")
    _option(parser, "--seed", "of the draws", type=_seed, default=0)
    _option(parser, "--device", "cpu, cuda, cuda:1, …", default="cpu")


def _own(argument: str) -> str:
    """Say the default of an argument, model by model where they differ."""
    values: dict[str, list[str]] = {}
    for name, model in MODELS.items():
        parameters = inspect.signature(model.preset.__init__).parameters
        if argument in model._fields:
            value = getattr(model, argument)
        elif argument in parameters:
            value = parameters[argument].default
        else:
            continue
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        values.setdefault(text, []).append(name)
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} for {', '.join(names)}" for value, names in values.items())


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63 - 2:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo  # it runs commands of this module

    run_demo(args)


def _fit(args: argparse.Namespace) -> None:
    out = args.out.expanduser().resolve()
    place = out.with_name(f"{out.name}.checkpoint")
    with distributed.joined(args.device) as args.device:
        if not distributed.is_main():  # it helps, and writes nothing
            if _train(args, None, None, place)[1]["interrupted"]:
                raise KeyboardInterrupt
            return
        unfinished = _unfinished(args, place)
        with staged(args.out, RUN_FILE, RUN_FORMAT, args.overwrite or unfinished) as folder:
            if not unfinished:
                _remove(place)
            with contextlib.nullcontext() if unfinished else _left_if_of_use(place):
                _, record = _train(args, folder, folder, place)
            names = sorted(path.name for path in folder.iterdir())
        if record["interrupted"]:
            raise KeyboardInterrupt(f"wrote {args.out} as it stands; {_goes_on(place)}")
        if not args.keep_checkpoint:
            with contextlib.suppress(ValueError):  # another run has just begun
                _remove(place, patience=0.0)
    if not args.quiet:
        print(f"wrote {args.out}: {', '.join(names)}")


def _unfinished(args: argparse.Namespace, place: Path) -> bool:
    """Return whether there is a run to go on with; refuse to begin over it without leave."""
    if not (place / checkpoints.FILE).exists():
        return False
    if not args.resume and not args.overwrite:
        raise ValueError(
            f"{place} holds the checkpoint of an unfinished run; pass --resume to go on with it, "
            "or --overwrite to begin anew"
        )
    return bool(args.resume)


@contextlib.contextmanager
def _left_if_of_use(place: Path) -> Iterator[None]:
    """Remove the checkpoint of a run that met an error before an epoch was whole."""
    try:
        yield
    except (ValueError, FloatingPointError):
        file = place / checkpoints.FILE
        with contextlib.suppress(ValueError, OSError, LookupError, TypeError):
            if checkpoints.read(file)["epoch"] == 1:
                _remove(place, patience=0.0)
        raise


def _remove(place: Path, patience: float | None = None) -> None:
    """Remove a checkpoint, or raise a ValueError where another run is at work there."""
    if not place.exists():
        return
    with held(place, "--out", patience):
        (place / checkpoints.FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other things lie there
            place.rmdir()


def _goes_on(place: Path) -> str:
    return f"the same command with --resume goes on from {place / checkpoints.FILE}"


def _train(
    args: argparse.Namespace,
    folder: Path | None,
    pictures: Path | None,
    checkpoint: Path | None = None,
) -> tuple[Autoencoder, Record]:
    """Fit a pair as ``probae fit`` was told to; write the run, and its pictures."""
    start = time.perf_counter()
    model, tell = MODELS[args.model], _silent if args.quiet or folder is None else say
    objective, place = _objective(args), as_device(args.device)
    raw = load_data(args.data, args.seed)
    with seeded(args.seed, {torch.device("cpu")}):
        pair = _build(args, raw)
    bernoulli = has_component(likelihood_of(pair), GreyBernoulli)
    levels = _levels(args, raw, bernoulli)
    data = training_data(raw.splits, levels, args.seed)
    binary = _wants_binary(args, data.train, bernoulli)
    with seeded(args.seed, {torch.device("cpu")}):
        pair.initialize(data.train.to(pair.dtype))
    pair.to(place)
    form = "binarised" if binary else "dequantised" if levels else ""
    title = f"{type(pair).__name__} on {raw.title}" + (f" ({form})" if form else "")
    sizes = f"{len(data.train)} training, {len(data.val)} validation, {len(data.test)} test data"
    tell(f"{title}: {sizes} of shape {pair.x_shape}")
    run = fit(
        pair,
        data.train,
        data.val if args.validation else None,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=model.lr if args.lr is None else args.lr,
        objective=objective,
        binarize=binary,
        schedule=model.schedule if args.schedule is None else args.schedule,
        patience=args.patience,
        seed=args.seed,
        compile=True if args.compile else "auto",
        progress=not args.quiet and sys.stderr.isatty(),
        precision=args.precision,
        on_fault=args.on_fault,
        checkpoint=checkpoint,
        checkpoint_seconds=args.checkpoint_seconds,
        resume=checkpoint is not None and args.resume,
    )
    if run.interrupted and checkpoint is None:
        raise KeyboardInterrupt
    if run.interrupted and checkpoint is not None and not run.history["epoch"]:
        raise KeyboardInterrupt(f"no epoch is whole yet; {_goes_on(checkpoint)}")
    tell(_outcome(run))
    in_unit = bool(data.train.min() >= 0 and data.train.max() <= 1)
    limits = (0.0, 1.0) if in_unit else (float(data.train.min()), float(data.train.max()))
    record: Record = {
        "format": RUN_FORMAT,
        "version": __version__,
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if key != "command"
        },
        "title": title,
        "data": raw.source,
        "seed": args.seed,
        "binarize": binary,
        "dequantize": levels,
        "limits": limits,
        "kind": run.kind.value,
        "objective": run.objective,
        "kl_method": run.kl_method,
        "bound_on": run.bound_on,
        "monitored": run.monitored,
        "best_epoch": run.best_epoch,
        "stopped_early": run.stopped_early,
        "interrupted": run.interrupted,
        "skipped": run.skipped,
        "seconds": time.perf_counter() - start,
    }
    if folder is None or pictures is None:
        return pair, record
    save(pair, folder)
    write_json(folder / HISTORY, run.history)
    write_json(folder / RUN_FILE, record)
    _write_picture(pictures / LOSS, plots.loss_curve(run, title=title)[0])
    if plots.is_image(pair.x_shape):
        shown, _ = as_measured(pair, record, raw.splits.val[:12], None, seed=0)
        ax = plots.reconstructions(
            pair,
            shown.to(pair.device, pair.dtype),
            columns=12,
            title=f"{title}: validation data and their reconstructions",
            limits=limits,
        )
        _write_picture(pictures / RECONSTRUCTIONS, ax)
        if not is_flat(pair.prior()):
            what = "decoder means at 64 samples of the prior, seed 0"
            ax = plots.samples(pair, 64, seed=0, title=f"{title}: {what}", limits=limits)
            _write_picture(pictures / SAMPLES, ax)
    return pair, record


def _write_picture(file: Path, ax: Axes) -> None:
    """Write the figure that the axes are in."""
    assert isinstance(ax.figure, Figure)
    write_figure(file, ax.figure)


def _outcome(run: Run) -> str:
    text = f"parameters of epoch {run.best_epoch} of {len(run.history['epoch'])}"
    text += f"{' (stopped early)' if run.stopped_early else ''}, {run.seconds:.1f} s"
    if run.compile_seconds:
        text += f", of these {run.compile_seconds:.1f} s compiling the step"
    if run.skipped:
        text += f"; {run.skipped} batches with faults were left out"
    if run.best_epoch < 1:
        return text
    on, column = ("validation", "val_loss") if run.monitored == "val" else ("training", "loss")
    at = run.best_epoch - 1
    if not run.kind.is_lower_bound:
        loss = run.history[column][at]
        return f"{text}; {on} loss {loss:.3f} nats per datum; {run.kind.statement}"
    elbo = run.history["elbo"][at]
    return f"{text}; {on} ELBO {elbo:.3f} nats per datum, a lower bound on {run.bound_on}"


def _build(args: argparse.Namespace, data: Data) -> Autoencoder:
    """Return the preset with the options that were given, or refuse one that it does not take."""
    preset: Any = MODELS[args.model].preset
    takes = inspect.signature(preset.__init__).parameters
    options = _named_values("--likelihood-option", args.likelihood_option)
    if args.likelihood == "discretized-logistic" and data.levels is not None:
        options.setdefault("levels", data.levels)
    given = {**vars(args), "likelihood_options": options or None}
    given = {name: given[name] for name in PARTS if given[name] is not None}
    if args.corruption is not None:
        given["corruption"] = _corruption(args.corruption)
    for name in given:
        if name not in takes:
            taken = ["--z-dim", *(flag for part, flag in PARTS.items() if part in takes)]
            raise ValueError(
                f"{args.model} takes no {PARTS[name]}; of the options of models it takes "
                f"{', '.join(taken)}"
            )
    own = [name for name in takes if name not in ("self", "x_dim", "z_dim", *PARTS)]
    for name, value in _named_values("--option", args.option).items():
        if name not in own:
            raise ValueError(
                f"--option of {args.model} must be one of {', '.join(own) or '(none)'}, got {name}"
            )
        given[name] = value
    return preset(tuple(data.splits.train.shape[1:]), args.z_dim, **given)


def _corruption(text: str) -> nn.Module:
    """Return the corruption of that name and strength, such as ``masking=0.3``."""
    ((name, value),) = _named_values("--corruption", [text]).items()
    if name not in CORRUPTIONS:
        raise ValueError(f"--corruption must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    return CORRUPTIONS[name](value)


def _named_values(flag: str, pairs: list[str]) -> Record:
    """Return NAME=VALUE arguments as a dict, values read as JSON where they are that."""
    options = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"{flag} must be NAME=VALUE, got {text!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _objective(args: argparse.Namespace) -> PerDatumObjective:
    if args.objective == "iwae":
        for name in ("beta", "warmup"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} goes with --objective elbo, not iwae")
        return IWAE(5 if args.num_particles is None else args.num_particles, dreg=args.dreg)
    if args.dreg:
        raise ValueError("--dreg goes with --objective iwae, not elbo")
    beta = 1.0 if args.beta is None else args.beta
    particles = 1 if args.num_particles is None else args.num_particles
    warmup = args.warmup or 0.0
    if not 0 <= warmup < math.inf:
        raise ValueError(f"--warmup must be a number of epochs >= 0, got {args.warmup}")
    schedule = LinearWarmup(warmup, end=beta) if warmup else beta
    return ELBO(schedule, particles)


def _levels(args: argparse.Namespace, data: Data, bernoulli: bool) -> int | None:
    """Return the number of grey levels to dequantise from, None for no dequantisation."""
    if args.dequantize is None:
        return None
    if bernoulli:
        raise ValueError("--dequantize is for densities, but the likelihood is bernoulli")
    if args.dequantize == 0 and data.levels is None:
        raise ValueError("--dequantize needs the number of grey levels of a file: --dequantize 256")
    return args.dequantize or data.levels


def _wants_binary(args: argparse.Namespace, train: Tensor, bernoulli: bool) -> bool:
    if args.binarize is None:
        return bernoulli and is_grey(train)
    if args.binarize and not bernoulli:
        raise ValueError("--binarize goes with --likelihood bernoulli; leave it out")
    return args.binarize


def _evaluate(args: argparse.Namespace) -> None:
    with distributed.joined(args.device) as args.device:
        _evaluate_together(args)


def _evaluate_together(args: argparse.Namespace) -> None:
    """Evaluate; in several processes, each some of the data, and the main one reports."""
    pair, record = load_run(args.run, args.device)
    x, data, split, levels = _select(args, record)
    annealing = _annealing(args)
    ll, note = measure(pair, record, x, levels, args.method, args.num_samples, args.seed, annealing)
    if not distributed.is_main():
        return
    key: Record = {"data": data, "split": split, "limit": args.limit, "seed": args.seed}
    if annealing is not None:
        key |= {"temperatures": annealing.num_temperatures, "start": annealing.start}
    append_evaluation(args.run, key, ll, note)
    place = "" if args.data is None else f" of {data}"
    print(f"{record['title']}: {len(ll.values)} data, {split}{place}")
    print(_report(ll, record))
    if note:
        print(f"note: {note}")


def _annealing(args: argparse.Namespace) -> Annealing | None:
    """Return the settings of ais, None for another method."""
    given = {
        name: value
        for name, value in (("num_temperatures", args.temperatures), ("start", args.start))
        if value is not None
    }
    if args.method == "ais":
        return Annealing(**given)
    if given:
        raise ValueError("--temperatures and --start go with --method ais")
    return None


def _report(ll: LogLikelihood, record: Record) -> str:
    how = f"{ll.method}, K = {ll.num_samples}: a lower bound on log p(x)"
    lines = [
        f"log-likelihood: {ll.mean:.4f} ± {ll.mean_std_error:.4f} nats per datum "
        f"({how if ll.is_bound else 'exact'})",
        f"bits per dim:   {ll.bits_per_dim:.4f}",
    ]
    if record["dequantize"]:
        grey = ll.discrete(record["dequantize"]).bits_per_dim
        lines.append(f"                at most {grey:.4f} for the grey levels themselves")
    if ll.method == "ais" and ll.ess is not None and ll.acceptance is not None:
        lines.append(
            f"chains:         {float(ll.ess.median()):.1f} of {ll.num_samples} count (median ESS), "
            f"{100 * float(ll.acceptance.mean()):.0f} % of moves accepted"
        )
    share = untrusted(ll)
    if share is not None and ll.method == "iwae":
        lines.append(f"Pareto k > 0.7: {100 * share:.1f} % of the data")
        if share > 0:
            lines.append(
                "                bounds, not estimates; --method ais is tighter (continuous z)"
            )
    return "\n".join(lines)


def _select(args: argparse.Namespace, record: Record) -> tuple[Tensor, str, str, int | None]:
    """Return the data to evaluate, the name of their source, of their split, and their levels."""
    source = record["data"]
    name = args.data or source.get("name") or source["path"]
    split, levels = args.split or "test", None
    if name in DATASET_NAMES:
        data = load_dataset(name)
        x, levels = getattr(data, split), data.levels
    else:
        x = read_file(name)
        if digest(x) == source.get("sha256"):
            x = getattr(cut(x, source), split)
        elif args.data is None:
            raise ValueError(
                f"{name} has changed since the run was fitted, so its splits are lost; evaluate it "
                f"as other data with --data {name}"
            )
        elif args.split is not None:
            raise ValueError(
                f"--split {args.split} is unknown of {name}, which the run was not fitted on; "
                "leave --split out to evaluate every row"
            )
        else:
            split = "all"
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f"--limit must be a whole number >= 1, got {args.limit}")
        x = x[: args.limit]
    return x, name, split, levels


def _sample(args: argparse.Namespace) -> None:
    suffix = args.out.suffix.lower()
    if suffix not in (".png", ".npy"):
        raise ValueError(f"--out must end in .png, for a picture, or .npy, got {str(args.out)!r}")
    pair, record = load_run(args.run, args.device)
    if suffix == ".png" and not plots.is_image(pair.x_shape):
        raise ValueError(
            f"data of shape {pair.x_shape} are no images to draw; write them to an array with "
            "--out samples.npy"
        )
    what = "decoder means at" if args.mean else "draws from the decoder at"
    count = "one sample" if args.num_samples == 1 else f"{args.num_samples} samples"
    what = f"{what} {count} of the prior, seed {args.seed}"
    if suffix == ".png":
        ax = plots.samples(
            pair,
            args.num_samples,
            mean=args.mean,
            seed=args.seed,
            title=f"{record['title']}: {what}",
            limits=tuple(record["limits"]),
        )
        _write_picture(args.out, ax)
    else:
        x, z = sample(pair, args.num_samples, seed=args.seed)
        if args.mean:
            with frozen(pair, seed=0):
                x = pair.decoder(z).mean
        write_array(args.out, x.cpu().numpy())
    print(f"wrote {args.out}: {what}")


def _silent(text: str) -> None:
    """Say nothing."""


if __name__ == "__main__":
    sys.exit(main())
