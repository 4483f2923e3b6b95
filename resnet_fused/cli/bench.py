"""`resnet-fused bench`: what fusing gains on this machine, measured side by side."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import (
    DTYPES,
    ListOf,
    check_environment,
    device_option,
    json_option,
    size_option,
    torch_device,
)
from resnet_fused.cli._output import echo_json, progress_bar, to_json, write_file

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject

# Repeated here, so that `--help` imports no torch; a test holds them against bench.subject.
LEVELS = ("kernel", "block", "model")
OPS = (
    "conv_bn_act",
    "conv_dgrad",
    "conv_wgrad",
    "bn_act",
    "stem",
    "head",
    "conv_chain",
    "conv_bn_stats",
    "conv_bn_stats_finalize",
    "conv_bn_dgrad",
    "conv_bn_dgrad_end",
    "conv_bn_wgrad",
    "conv_bn_grad1x1",
    "conv_bn_grad1x1_end",
    "bn_add_act",
    "bn_add_act_conv_stats",
    "bn_add_act_backward",
)
MODES = ("inference", "training", "training_frozen", "train")
BATCHES = {"cpu": (1, 8), "cuda": (1, 32, 256)}
ROW_SHARE = 0.3  # of the budget, that one of many rows may take; of a few twice its part
QUICK = ("eager", "fused", "onednn")  # peers that are ready at once
# Any of these asks for everybody who joins; without one the quick peers are timed.
WHOLE = ("levels", "ops", "modes", "only", "html", "png_dir", "budget_min", "list_peers")
COMPARING = ("compare", "gate", "force", "only", "as_json")  # all else times something


class Percent(click.ParamType):
    """A fraction, given as "5%" or as "0.05"."""

    name = "5%"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The fraction."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = math.nan
        # A bare 5 would be 500%: nobody means that.
        if not (math.isfinite(number) and number >= 0) or (not text.endswith("%") and number > 1):
            self.fail(f"{text!r} is no percentage; accepted: 5%, or 0.05", param, ctx)
        return number / 100 if text.endswith("%") else number


@dataclass(frozen=True)
class Wanted:
    """The command's options; see its help."""

    levels: tuple[str, ...]
    ops: tuple[str, ...]
    modes: tuple[str, ...]
    batches: tuple[int, ...] | None
    dtypes: tuple[str, ...]
    device: str
    peers: str | None
    only: tuple[str, ...]
    rounds: int
    budget_min: float | None
    at_least: float
    size: int
    output: Path | None
    html: Path | None
    png_dir: Path | None
    compare: tuple[Path, Path] | None
    gate: float | None
    force: bool
    list_peers: bool
    as_json: bool

    def matches(self, key: str) -> bool:
        """Whether a row's key holds one of the texts of --only."""
        return not self.only or any(text in key for text in self.only)


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options, in the order of the help."""
    positive = click.FloatRange(min=0, min_open=True)
    file = click.Path(path_type=Path)
    options = (
        click.option("--level", "levels", type=ListOf(click.Choice(LEVELS)), default="model",
                     show_default=True, help="What to time."),
        click.option("--op", "ops", type=ListOf(click.Choice(OPS)), default="conv_bn_act",
                     show_default=True, help="Of level kernel."),
        click.option("--mode", "modes", type=ListOf(click.Choice(MODES)), default="inference",
                     show_default=True, help="Of levels block and model; training is a whole "
                     "step, training_frozen one with fixed BatchNorm; of a "
                     "model train adds autocast, the loss scale and the optimizer."),
        click.option("--batch", "batches", type=ListOf(click.IntRange(min=1)),
                     help="Numbers of images.  [default: 1,8; on a GPU 1,32,256]"),
        click.option("--dtype", "dtypes", type=ListOf(click.Choice(DTYPES)), default="float32",
                     show_default=True, help="Of weights and activations."),
        device_option,
        click.option("--peers", metavar="NAME,...|all|none",
                     help="Who is timed beside eager and fused; see --list-peers.  [default: "
                     "onednn; all with --level, --op, --mode, --only, --html, --png-dir or "
                     "--budget-min]"),
        click.option("--list-peers", is_flag=True, help="Who would join, and why others do not."),
        click.option("--only", type=ListOf(click.STRING), default=(), metavar="TEXT,...",
                     help="Rows whose key holds one of these, such as 3x3 or block/."),
        click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True,
                     help="Pairs to time; 6 or more for a 95% interval."),
        click.option("--budget-min", type=positive, metavar="MINUTES",
                     help="Begin no row behind this time, and end with what was reached."),
        click.option("--at-least", type=positive, default=1.0, show_default=True,
                     help="The gain over eager that the verdict asks for."),
        size_option,
        click.option("--output", type=file, help="Write the JSON record here too."),
        click.option("--html", type=file, help="Write a page with all pictures and tables."),
        click.option("--png-dir", type=file, help="Write the pictures into this folder."),
        click.option("--compare", type=file, nargs=2, metavar="A B",
                     help="Time nothing: compare two records, B against A."),
        click.option("--gate", type=Percent(), help="With --compare: exit code 1 if one of our "
                     "variants is slower by more than this plus the noise, wrong or gone."),
        click.option("--force-compare", "force", is_flag=True,
                     help="With --compare: across machines and dtypes too."),
        json_option,
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("model", default="resnet50")
@_options
@click.pass_context
def bench(ctx: click.Context, model: str, **given: Any) -> None:
    """Time MODEL fused, against eager channels_last and whoever else is there.

    The variants are judged against float64, interleaved, and compared pair by pair. Above 5% of
    foreign load on the machine no verdict is given.

    Alone it times any network in inference: eager, fused, and bare oneDNN calls on the CPU. Other
    levels, training and more peers are for asking (see docs/benchmarks.md); kernels, blocks and
    training are those of the networks of resnet_fused.models. MODEL is as for `explain`.

    Exits with 1 when a variant of this package is wrong or crashes.
    """
    wanted = Wanted(**{**given, "compare": given["compare"] or None})
    sources = {name: ctx.get_parameter_source(name) for name in [*given, "model"]}
    chosen = {name for name, source in sources.items() if source == ParameterSource.COMMANDLINE}
    _check(wanted, chosen, ctx)
    if wanted.compare is not None:
        ctx.exit(_compare(wanted, wanted.compare))
    check_environment()
    everybody = wanted.peers is None and bool(chosen & set(WHOLE))
    names = _peers("all" if everybody else wanted.peers)
    if wanted.list_peers:
        ctx.exit(_list_peers(model, wanted, names))
    ctx.exit(_run(model, wanted, names, _command(ctx, chosen)))


def _command(ctx: click.Context, chosen: set[str]) -> str:
    """What was typed, without the path of the interpreter."""
    words = ["resnet-fused", "bench"]
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if parameter.name not in chosen:
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if isinstance(parameter, click.Option):
            words.append(parameter.opts[0])
        if value is not True:
            words.append(text)
    return shlex.join(words)


def _check(wanted: Wanted, chosen: set[str], ctx: click.Context) -> None:
    """Holds the options against each other, before anything heavy is imported."""
    names = {p.name: p.opts[0] for p in ctx.command.params if isinstance(p, click.Option)}
    if wanted.compare is None:
        for name in ("gate", "force"):
            if name in chosen:
                raise UserError(f"{names[name]}: goes with --compare A B alone")
    elif extra := sorted(chosen - set(COMPARING)):
        told = ", ".join(names.get(name, name.upper()) for name in extra)
        raise UserError(f"--compare: times nothing, so {told} cannot go with it")
    for name, levels in (("ops", ("kernel",)), ("modes", ("block", "model"))):
        if name in chosen and not set(levels) & set(wanted.levels):
            raise UserError(
                f"{names[name]}: is for --level {' or '.join(levels)}, "
                f"and --level is {','.join(wanted.levels)}"
            )


def _compare(wanted: Wanted, files: tuple[Path, Path]) -> int:
    """Compares two records; 1 if the gate failed."""
    from resnet_fused.bench import compare
    from resnet_fused.cli._bench_output import say_comparison

    with user_errors():
        a, b = (compare.load(file) for file in files)
    found = compare.compare(a, b, force=wanted.force, only=wanted.matches)
    if not found.changes and not found.only_b:
        raise UserError(f"--only: no row of either record holds {' or '.join(wanted.only)}")
    gate = None if wanted.gate is None else compare.gate(found, wanted.gate)
    if wanted.as_json:
        echo_json({**found.to_dict(), "gate": None if gate is None else gate.to_dict()})
    else:
        say_comparison(found, gate, files)
    return 0 if gate is None or gate.ok else 1


def _subjects(model: str, wanted: Wanted, device: str) -> list[Subject]:
    """What to time, in the order of the levels.

    Raises:
        UserError: an unknown network, or nothing that --only lets through.
    """
    from resnet_fused.bench import networks
    from resnet_fused.bench.subject import subjects
    from resnet_fused.cli import _models

    _models.check_name(model)
    name, whole = networks.canonical(model), ("model",)
    if not networks.is_own(name) and (wanted.levels, wanted.modes) != (whole, ("inference",)):
        raise UserError(
            f"MODEL: of {model} only --level model --mode inference is timed; accepted for the "
            f"rest: {', '.join(networks.names('rf'))}"
        )
    every: list[Subject] = []
    with user_errors():
        for level in wanted.levels:
            every += subjects(
                level, device, model=name, batches=wanted.batches or BATCHES[device],
                dtypes=wanted.dtypes, size=wanted.size,
                ops=wanted.ops if level == "kernel" else wanted.modes,
            )  # fmt: skip
    found = [subject for subject in every if wanted.matches(subject.key)]
    if not found:
        raise UserError(
            f"--only: no key holds {' or '.join(wanted.only)}; one of {len(every)} keys is "
            f"{every[0].key}"
        )
    return found


def _peers(asked: str | None) -> Sequence[str]:
    """The names that --peers asks for, in its order; eager and ours stand before them.

    Args:
        asked: the option's text; None takes the quick ones.

    Raises:
        UserError: a name that is none.
    """
    from resnet_fused.bench.compare import ALWAYS, BASELINE
    from resnet_fused.bench.peers import PEERS

    if asked is None:
        return QUICK
    if asked == "all":
        return tuple(PEERS)
    words = [] if asked == "none" else [w.strip() for w in asked.split(",")]
    for word in words:
        if word not in PEERS:
            raise UserError(
                f"--peers: there is no {word!r}; accepted: all, none, or of {', '.join(PEERS)}"
            )
    # Where time is short the last ones are left out: the order is the user's.
    return tuple(dict.fromkeys((BASELINE, *ALWAYS, *words)))


def _device(wanted: Wanted) -> str:
    """The kind of device; a GPU of another number becomes the current one.

    Raises:
        UserError: no such device.
    """
    device = torch_device(wanted.device)
    if device.index:
        import torch

        torch.cuda.set_device(device)
    return device.type


def _list_peers(model: str, wanted: Wanted, names: Sequence[str]) -> int:
    """Prints who joins at which level."""
    from resnet_fused.bench.peers import PEERS, joining

    device, first = _device(wanted), {}
    for subject in _subjects(model, wanted, device):
        first.setdefault(f"{subject.level}/{subject.op}/{subject.dtype}", subject)
    found = {kind: joining(subject, names) for kind, subject in first.items()}
    about = {
        kind: {**{peer.name: None for peer in there}, **why} for kind, (there, why) in found.items()
    }
    if wanted.as_json:
        echo_json({kind: {n: why[n] for n in PEERS if n in why} for kind, why in about.items()})
        return 0
    width = max(map(len, PEERS))
    for kind, why in about.items():
        click.echo(f"{kind}:")
        for name in (name for name in PEERS if name in why):
            told = "joins" if why[name] is None else f"left out: {why[name]}"
            click.echo(f"  {name:{width}}  {told}")
    return 0


def _run(model: str, wanted: Wanted, names: Sequence[str], command: str) -> int:
    """Runs the benchmark; 1 if a variant of ours is wrong or crashed, or the GPU is lost."""
    from resnet_fused.cli import _bench_output as out

    chosen = _subjects(model, wanted, _device(wanted))
    out.check_targets(
        {"--output": wanted.output, "--html": wanted.html}, {"--png-dir": wanted.png_dir}
    )
    from resnet_fused.bench import runner
    from resnet_fused.bench.compare import OURS
    from resnet_fused.bench.peers import PEERS

    total = math.inf if wanted.budget_min is None else 60 * wanted.budget_min
    # One slow row shall not take the others' time.
    share = min(1.0, max(ROW_SHARE, 2 / len(chosen))) * total
    settings = runner.Settings(
        rounds=wanted.rounds, at_least=wanted.at_least, total_s=total, subject_s=share
    )
    with progress_bar("timing", quiet=wanted.as_json) as progress:
        record = runner.bench(
            chosen, [PEERS[name] for name in names], settings, command=command, progress=progress,
            report=None if wanted.output is None else functools.partial(_keep, wanted.output),
        )  # fmt: skip
    written = out.write_outputs(record, wanted.output, wanted.html, wanted.png_dir)
    faults = out.faults_of_ours(record, OURS)
    if wanted.as_json:
        echo_json(record)
    else:
        out.say_machine(record)
        out.say_rows(record)
        for line in [*written, *faults]:
            click.echo(line)
    return 1 if faults or "stopped" in record else 0


def _keep(file: Path, record: dict[str, Any]) -> None:
    """Writes what was reached: a run that is interrupted leaves a valid record."""
    write_file(file, to_json(record) + "\n")
