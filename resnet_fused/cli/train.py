"""`resnet-fused train`: a network learns from labelled images."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import check_environment, device_option, json_option, torch_device
from resnet_fused.cli._output import echo_json, progress_bar

if TYPE_CHECKING:
    from resnet_fused.data.sources import Source
    from resnet_fused.train.loop import Outcome
    from resnet_fused.train.processes import Processes

RECIPES = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar"}  # by data; else imagenet
TIMEOUT = 600


@click.command()
@click.argument("model")
@click.option(
    "--data", required=True, metavar="DATA",
    help="digits, cifar10[:PATH], cifar100[:PATH], imagefolder:PATH (PATH/train, PATH/val), or "
    "synthetic[:CLASSES], for speed only.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Checkpoints, metrics, curves and weights go here.",
)  # fmt: skip
@click.option(
    "--recipe", metavar="NAME|FILE",
    help="What decides what is learnt: digits, cifar, imagenet, imagenet_strong, "
    "imagenet_large_batch, paper_imagenet, paper_cifar, paper_cifar110, or a TOML file.  "
    "[default: by the data]",
)  # fmt: skip
@click.option(
    "--set", "changes", multiple=True, metavar="ENTRY=VALUE",
    help="Change an entry of the recipe, such as optimizer.lr=0.2. May be repeated.",
)  # fmt: skip
@click.option("--epochs", type=int, help="Short for --set epochs=.")
@click.option("--batch-size", type=int, help="Short for --set batch_size=; of all processes.")
@click.option("--lr", type=float, help="Short for --set optimizer.lr=.")
@click.option("--capture", is_flag=True,
              help="Short for --set capture=true: on a GPU, steps as CUDA graphs.")  # fmt: skip
@click.option(
    "--impl", type=click.Choice(["fused", "eager"]), default="fused", show_default=True,
    help="This library's layers, or PyTorch's, with everything else equal.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--weights", type=click.Path(path_type=Path), metavar="FILE",
    help="Begin with these: .pth, .pt or .safetensors.",
)  # fmt: skip
@click.option("--new-head", is_flag=True, help="With --weights: begin with a new classifier.")
@click.option(
    "--resume", is_flag=True,
    help="Go on where a run in this folder stopped; begin where there is none.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(min=0),
    help="Processes that decode images; 0: none.  [default: by the data and the cores]",
)  # fmt: skip
@click.option(
    "--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
    help="An image that cannot be read: stop there, or name it and take the next one.",
)  # fmt: skip
@click.option(
    "--save-every", type=click.IntRange(min=1), metavar="STEPS",
    help="Between checkpoints.  [default: an epoch]",
)  # fmt: skip
@click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True,
              help="Checkpoints to keep.")  # fmt: skip
@click.option("--log-every", type=click.IntRange(min=1), default=10, show_default=True,
              metavar="STEPS", help="Between lines of metrics.")  # fmt: skip
@click.option(
    "--parallel", type=click.Choice(["ddp", "fsdp"]), default="ddp", show_default=True,
    help="Under torchrun: each process has the whole network, or a share of each block.",
)  # fmt: skip
@click.option("--timeout", type=click.IntRange(min=1), default=TIMEOUT, show_default=True,
              metavar="SECONDS", help="To wait for another process.")  # fmt: skip
@click.option("--beside", type=click.Path(path_type=Path), multiple=True, metavar="FOLDER",
              help="Show this run's curves too, in the page. May be repeated.")  # fmt: skip
@click.option("--tensorboard/--no-tensorboard", default=True, show_default=True,
              help="Write event files.")  # fmt: skip
@click.option(
    "--loader-only", type=click.FloatRange(min=0), metavar="SECONDS",
    help="Load images so long and train nothing: how fast do they come? Nothing is written.",
)  # fmt: skip
@click.option("--download", is_flag=True, help="Fetch CIFAR where it is missing.")
@device_option
@json_option
@click.pass_context
def train(ctx: click.Context, **options: Any) -> None:
    """Train MODEL on labelled images.

    MODEL is a torchvision name such as resnet50, timm:NAME or rf:NAME (rf:cifar_resnet20). The
    folder gets checkpoints, metrics.jsonl, timing.jsonl, TensorBoard's files, best.safetensors,
    model.safetensors and report.html.

    Under torchrun all processes work on one run:
    torchrun --nproc-per-node 8 -m resnet_fused train ...

    SIGTERM and Ctrl-C save a checkpoint first; exit codes 143 and 130.
    """
    check_environment()
    if options["output"] is None and options["loader_only"] is None:
        raise UserError("--output: give the run a folder")
    device = torch_device(options["device"])
    from resnet_fused.data.images import ImageError
    from resnet_fused.train import CheckpointError, ProcessError, TrainingError, processes

    logging.getLogger("resnet_fused.train").addHandler(_Lines())
    try:
        with processes.joined(device, options["timeout"]) as found:
            outcome = _run(found, options)
            if outcome is None:
                return
    except (TrainingError, CheckpointError, ProcessError, ImageError) as error:
        raise UserError(str(error)) from error
    if found.first:
        _say(outcome, options)
    ctx.exit(128 + outcome.signal if outcome.signal else 0)


class _Lines(logging.Handler):
    """Warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"note: {record.getMessage()}", err=True)


def _run(processes: Processes, options: dict[str, Any]) -> Outcome | None:
    """Trains; or loads alone, if that is asked for."""
    from resnet_fused.cli import _models
    from resnet_fused.data.sources import open_source
    from resnet_fused.train import loop, network, recipe, settings

    _models.check_name(options["model"])
    with user_errors():
        changes = [*options["changes"], *_short(options)]
        chosen = options["recipe"] or RECIPES.get(options["data"].partition(":")[0], "imagenet")
        made = recipe.read(chosen, changes)
        source = open_source(options["data"], size=made.size, download=options["download"])
    run = options["output"]
    told = settings.Settings(
        options["model"], options["data"], made, options["impl"], options["seed"],
        options["parallel"], str(options["weights"]) if options["weights"] else None,
        options["new_head"], _workers(options["workers"], source), options["on_error"],
        options["save_every"], options["keep"], options["log_every"], options["tensorboard"],
    )  # fmt: skip
    told.check(source, processes.world)
    with user_errors():
        model = network.build(told, source, processes.device)
    if told.weights is not None:
        state = _models.read_state_dict(Path(told.weights))
        network.begin_with(model, state, told.weights, new_head=told.new_head)
    if options["loader_only"] is not None:
        trainer = loop.Trainer(
            told, source, model, processes, Path(), network.channels_of(told.model, source)
        )
        _say_loading(trainer.load(options["loader_only"]), told.workers, processes, options)
        return None
    if processes.first:
        identity = told.identity() | {"classes": list(source.classes), "images": len(source.train)}
        settings.begin(run, identity, resume=options["resume"])
    processes.wait()
    quiet = options["as_json"] or not processes.first
    with progress_bar("training", quiet=quiet) as progress:
        trainer = loop.Trainer(
            told, source, model, processes, run,
            network.channels_of(told.model, source), progress,
        )  # fmt: skip
        return trainer.train()


def _say_loading(
    found: dict[str, float], workers: int, processes: Processes, options: dict[str, Any]
) -> None:
    """Of all processes together."""
    rates = processes.gather(found["images_per_second"])
    if not processes.first:
        return
    if options["as_json"]:
        echo_json({**found, "images_per_second": sum(rates), "workers": workers,
                   "processes": len(rates)})  # fmt: skip
        return
    click.echo(
        f"{sum(rates):.1f} images/s from the loader alone ({len(rates)} processes with {workers} "
        f"workers each, {found['seconds']:.1f} s)"
    )


def _short(options: dict[str, Any]) -> list[str]:
    paths = {"epochs": "epochs", "batch_size": "batch_size", "lr": "optimizer.lr"}
    given = [f"{path}={options[name]}" for name, path in paths.items() if options[name] is not None]
    return [*given, *(["capture=true"] if options["capture"] else [])]


def _workers(asked: int | None, source: Source) -> int:
    """Images in memory need no processes; files are decoded by the cores that there are."""
    if asked is not None:
        return asked
    from resnet_fused.data import default_workers
    from resnet_fused.data.sources import Files

    return default_workers() if isinstance(source.train, Files) else 0


def _say(outcome: Outcome, options: dict[str, Any]) -> None:
    """What came of it; the page."""
    from resnet_fused.train import journal, phases

    run = options["output"]
    timing = journal.read(run, journal.TIMING)
    total = {
        key: sum(line.get(key, 0.0) for line in timing) for key in (*phases.PHASES, "seconds")
    }  # fmt: skip
    note = phases.starved(total) if timing else None
    page = _page(run, options["beside"])
    record = {
        "run": str(run), "step": outcome.step, "steps": outcome.steps, "test": outcome.test,
        "best": outcome.best, "seconds": total, "starved": note, "skipped": outcome.skipped,
        "signal": outcome.signal or None, "page": str(page) if page else None,
    }  # fmt: skip
    if options["as_json"]:
        echo_json(record)
        return
    err = sys.stderr
    if outcome.signal:
        print(f"stopped by signal {outcome.signal} behind step {outcome.step} of {outcome.steps}; "
              f"a checkpoint is in '{run}', --resume goes on", file=err)  # fmt: skip
    for name in outcome.skipped[:20]:
        print(f"skipped: {name}", file=err)
    if outcome.test:
        top5 = outcome.test["top5"]
        best = outcome.best
        click.echo(
            f"top-1 {outcome.test['top1']:.2%}"
            + (f", top-5 {top5:.2%}" if top5 is not None else "")
            + f" of {outcome.test['images']} images (best {best['top1']:.2%}, "
            f"epoch {best['epoch']})"
        )
    if total["seconds"]:
        shares = ", ".join(
            f"{name} {total[name] / total['seconds']:.0%}" for name in phases.PHASES if total[name]
        )
        click.echo(f"{total['seconds']:.1f} s of training: {shares}")
    if note:
        click.echo(note)
    if page:
        click.echo(f"curves: {page}")


def _page(run: Path, beside: tuple[Path, ...]) -> Path | None:
    from resnet_fused.cli._output import write_file
    from resnet_fused.report import training_page

    try:
        html = training_page.render([training_page.load(path) for path in (run, *beside)])
    except ModuleNotFoundError as error:
        click.echo(f"note: no page: {error.name} is not installed", err=True)
        return None
    except ValueError as error:
        click.echo(f"note: no page: {error}", err=True)
        return None
    write_file(run / "report.html", html)
    return run / "report.html"
