"""`resnet-fused paper`: the paper's experiments, one command each."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import (
    ListOf,
    check_environment,
    device_option,
    json_option,
    torch_device,
)
from resnet_fused.cli._output import echo_json, progress_bar, table, to_json, write_file

if TYPE_CHECKING:
    from resnet_fused.train.processes import Processes

TIMEOUT = 600


@click.command()
@click.argument("experiment", required=False)
@click.option(
    "--data", default="digits", show_default=True, metavar="DATA",
    help="digits, cifar10[:PATH] or imagefolder:PATH, as for `train`.",
)  # fmt: skip
@click.option(
    "--scale", default="tiny", show_default=True, metavar="tiny|small|full",
    help="Minutes on a laptop, hours, or the paper's own length.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Runs, record, picture and page go here; experiments share what they have in common.  "
    "[default: paper-DATA-SCALE]",
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(min=1), help="Of each network.  [default: the scale's]"
)
@click.option(
    "--depths", type=ListOf(click.IntRange(min=1)), metavar="N,...",
    help="Layers of the networks.  [default: the scale's]",
)  # fmt: skip
@click.option(
    "--set", "changes", multiple=True, metavar="ENTRY=VALUE",
    help="Change an entry of the recipe, such as iterations=2000. May be repeated.",
)  # fmt: skip
@click.option(
    "--impl", type=click.Choice(["fused", "eager"]), default="fused", show_default=True,
    help="This library's layers, or PyTorch's, with everything else equal.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(min=0),
    help="Processes that decode images; 0: none.  [default: by the data and the cores]",
)  # fmt: skip
@click.option("--download", is_flag=True, help="Fetch CIFAR where it is missing.")
@click.option("--timeout", type=click.IntRange(min=1), default=TIMEOUT, show_default=True,
              metavar="SECONDS", help="To wait for another process.")  # fmt: skip
@device_option
@json_option
@click.pass_context
def paper(ctx: click.Context, **options: Any) -> None:
    """Run an EXPERIMENT of "Deep Residual Learning for Image Recognition"; without one, list them.

    Whatever is in the folder already is not run again: a command that was stopped goes on. Under
    torchrun all processes work on one run after the other:
    torchrun --nproc-per-node 8 -m resnet_fused paper ...

    The exit code is 0 whatever the experiment finds, 130 or 143 behind Ctrl-C or SIGTERM.
    """
    check_environment()
    from resnet_fused.paper import EXPERIMENTS

    if options["experiment"] is None:
        _list(options["as_json"])
        return
    if options["experiment"] not in EXPERIMENTS:
        raise UserError(
            f"EXPERIMENT: there is no {options['experiment']!r}; accepted: {', '.join(EXPERIMENTS)}"
        )
    device = torch_device(options["device"])
    from resnet_fused.data.images import ImageError
    from resnet_fused.paper.runs import Stopped
    from resnet_fused.train import CheckpointError, ProcessError, TrainingError, processes

    try:
        with processes.joined(device, options["timeout"]) as found:
            record = _run(found, options)
    except Stopped as stop:
        number = int(stop.args[0])
        click.echo(f"stopped by signal {number}; the same command goes on", err=True)
        ctx.exit(128 + number)
    except (TrainingError, CheckpointError, ProcessError, ImageError) as error:
        raise UserError(str(error)) from error
    if found.first:
        _say(record, _folder(options), options)


def _list(as_json: bool) -> None:
    from resnet_fused.paper import EXPERIMENTS
    from resnet_fused.paper.scales import SCALES, kinds

    if as_json:
        found = {e.name: {"title": e.title, "source": e.source} for e in EXPERIMENTS.values()}
        echo_json({"experiments": found, "data": kinds(), "scales": list(SCALES)})
        return
    rows = [[e.name, e.title, e.source] for e in EXPERIMENTS.values()]
    click.echo(table(["experiment", "asks", "in the paper"], rows))


def _folder(options: dict[str, Any]) -> Path:
    if options["output"] is not None:
        return options["output"]
    kind = options["data"].partition(":")[0]
    return Path(f"paper-{kind}-{options['scale']}")


def _run(processes: Processes, options: dict[str, Any]) -> dict[str, Any]:
    from resnet_fused.data import default_workers
    from resnet_fused.data.sources import Files, open_source
    from resnet_fused.paper import EXPERIMENTS, run, scale_of
    from resnet_fused.paper.runs import Job

    with user_errors():
        scale = scale_of(
            options["data"], options["scale"], seeds=options["seeds"],
            depths=options["depths"] or (), changes=options["changes"],
        )  # fmt: skip
        source = open_source(options["data"], size=scale.recipe.size, download=options["download"])
        if len(source.classes) < 2:
            raise ValueError(f"--data: {source.name} has one class alone, {source.classes[0]!r}")
    workers = options["workers"]
    if workers is None:
        workers = default_workers() if isinstance(source.train, Files) else 0
    folder = _folder(options)
    experiment = EXPERIMENTS[options["experiment"]]
    # Depths that no network has: said before anything is trained.
    with user_errors():
        for variant in experiment.variants(scale):
            variant.check(scale)
    quiet = options["as_json"] or not processes.first
    with progress_bar(experiment.name, quiet=quiet) as progress:
        job = Job(scale, source, processes, folder, options["impl"], workers, progress)
        record = run(experiment, job)
    record["command"] = _command(options)
    if processes.first:
        _write(record, folder)
    return record


def _command(options: dict[str, Any]) -> str:
    words = ["resnet-fused", "paper", options["experiment"], "--data", options["data"],
             "--scale", options["scale"]]  # fmt: skip
    if options["seeds"]:
        words += ["--seeds", str(options["seeds"])]
    if options["depths"]:
        words += ["--depths", ",".join(map(str, options["depths"]))]
    for change in options["changes"]:
        words += ["--set", change]
    if options["impl"] != "fused":
        words += ["--impl", options["impl"]]
    if options["device"] != "cpu":
        words += ["--device", options["device"]]
    return shlex.join(words)


def _write(record: dict[str, Any], folder: Path) -> None:
    name = record["experiment"]
    write_file(folder / f"{name}.json", to_json(record) + "\n")
    try:
        from resnet_fused.report import paper_page
    except ModuleNotFoundError as error:
        click.echo(f"note: no page: {error.name} is not installed", err=True)
        return
    write_file(folder / f"{name}.png", paper_page.draw(record))
    write_file(folder / f"{name}.html", paper_page.render(record))


def _say(record: dict[str, Any], folder: Path, options: dict[str, Any]) -> None:
    if options["as_json"]:
        echo_json(record)
        return
    right = frozenset(range(1, len(record["columns"])))
    click.echo(table(list(record["columns"]), [list(row) for row in record["rows"]], right))
    click.echo("")
    marks = {True: "yes", False: "no", None: "-"}
    for check in record["checks"]:
        click.echo(f"[{marks[check['holds']]:>3}] {check['claim']}: {check['numbers']}")
    click.echo(f"\n{record['verdict']}")
    page = folder / f"{record['experiment']}.html"
    if page.exists():
        click.echo(f"page: {page}", file=sys.stdout)
