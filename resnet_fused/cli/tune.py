"""`resnet-fused tune`: measures kernels' configurations on the user's GPU, keeps what wins."""

from __future__ import annotations

from typing import Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import (
    DTYPES,
    ListOf,
    check_environment,
    json_option,
    size_option,
    torch_device,
)
from resnet_fused.cli._output import echo_json, progress_bar, table


@click.command()
@click.argument("model", default="resnet50")
@click.option("--batch", "batches", type=ListOf(click.IntRange(min=1)), default="32",
              show_default=True, help="Numbers of images, each tuned by itself.")  # fmt: skip
@click.option("--dtype", "dtypes", type=ListOf(click.Choice(DTYPES)), default="bfloat16",
              show_default=True, help="Of weights and activations.")  # fmt: skip
@click.option("--training", is_flag=True, help="The kernels of training too.")
@size_option
@click.option("--device", default="cuda", show_default=True, metavar="cuda", help="Where.")
@click.option("--budget-min", type=click.FloatRange(min=0, min_open=True), default=10.0,
              show_default=True, metavar="MINUTES",
              help="Begin no convolution behind this time.")  # fmt: skip
@json_option
@click.option("--dry-run", is_flag=True, help="Say what would be tried (or forgotten); do nothing.")
@click.option("--forget", is_flag=True, help="Remove what earlier runs kept, for all GPUs.")
@click.pass_context
def tune(ctx: click.Context, model: str, **given: Any) -> None:
    """Find configurations of the GPU kernels that are faster on this GPU than the usual choice.

    Every distinct convolution of MODEL is timed in its admitted configurations beside the usual
    choice. What wins by more than the noise is kept in the user's cache folder and taken from then
    on, as `explain` shows. MODEL is as for `explain`. Exit code 1: a configuration was wrong.
    """
    if given["forget"]:
        ctx.exit(_forget(given["dry_run"], given["as_json"]))
    check_environment()
    device = _gpu(given["device"])
    todo = _jobs(model, device, given)
    from resnet_fused.bench import tune as tuning

    if given["dry_run"]:
        ctx.exit(_say_plans(tuning.plans(todo), given["as_json"]))
    settings = tuning.Settings(total_s=60 * given["budget_min"])
    with progress_bar("tuning", quiet=given["as_json"]) as progress:
        try:
            found = tuning.tune(todo, settings, progress=progress)
        except OSError as error:
            raise UserError(f"what tuning finds cannot be kept: {error}") from error
    if given["as_json"]:
        echo_json(found)
    else:
        _say(found)
    wrong = any(layer["wrong"] for layer in found["layers"])
    ctx.exit(1 if wrong or "stopped" in found else 0)


def _gpu(name: str) -> str:
    """The device's kind.

    Raises:
        UserError: no GPU, or not the first one.
    """
    if name.partition(":")[0] != "cuda":
        raise UserError(
            f"--device: {name!r} has no configurations to tune; accepted: cuda, on a machine with "
            "an NVIDIA GPU"
        )
    import torch

    if not torch.cuda.is_available():
        why = "torch sees no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
        raise UserError(f"tune: there is nothing to tune here, {why}; run it on the GPU's machine")
    device = torch_device(name)
    if device.index:
        raise UserError(
            f"--device: tune runs on the first GPU; give --device cuda and "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    return "cuda"


def _jobs(model: str, device: str, given: dict[str, Any]) -> list[Any]:
    """The convolutions of MODEL."""
    from resnet_fused.bench import tune as tuning
    from resnet_fused.cli import _models

    network = _models.load(model)
    ops = tuning.OPS if given["training"] else tuning.INFERENCE
    with user_errors():
        return tuning.jobs(
            network.model, device, batches=given["batches"], dtypes=given["dtypes"], ops=ops,
            size=given["size"],
        )  # fmt: skip


def _forget(dry: bool, as_json: bool) -> int:
    """Removes the user's file."""
    from resnet_fused import _tuned

    try:
        count = _tuned.remove(really=not dry)
    except OSError as error:
        raise UserError(f"--forget: {error}") from error
    if as_json:
        echo_json({"file": str(_tuned.path()), "entries": count, "removed": not dry})
    else:
        click.echo(f"{_tuned.path()}: {count} entries {'would be ' if dry else ''}removed")
    return 0


def _say_plans(plans: list[dict[str, Any]], as_json: bool) -> int:
    """What would be tried."""
    if as_json:
        echo_json({"plans": plans})
        return 0
    rows = [
        [one["key"], one["implementation"], one.get("before", ""),
         one["problem"] or f"{len(one.get('options', []))} others"]
        for one in plans
    ]  # fmt: skip
    click.echo(table(["convolution", "implementation", "now", "would try"], rows))
    return 0


def _say(found: dict[str, Any]) -> None:
    """The table of a run."""
    rows = [
        [layer["key"], layer["implementation"], layer["before"], layer["after"] or "the same",
         _gain(layer)]
        for layer in found["layers"]
    ]  # fmt: skip
    if rows:
        click.echo(table(["convolution", "implementation", "before", "after", "gain"], rows))
    for layer in found["layers"]:
        for name, text in layer["wrong"].items():
            click.echo(f"WRONG {layer['key']}, {layer['implementation']} {name}: {text}")
        for name, text in layer["failed"].items():
            click.echo(f"could not run {layer['key']}, {layer['implementation']} {name}: {text}")
    for name, why in found["omitted"].items():
        click.echo(f"without {name}: {why}")
    if "stopped" in found:
        click.echo(f"STOPPED: {found['stopped']}")
    changed = sum(layer["after"] is not None for layer in found["layers"])
    click.echo(
        f"{found['gpu']['name']}: {found['reached']} of {found['of']} convolutions, {changed} "
        f"changed, {found['seconds']:.0f} s; kept in {found['kept_in']}"
    )


def _gain(layer: dict[str, Any]) -> str:
    """What the best option gained, and why that was not enough if it was not."""
    if layer["problem"]:
        return layer["problem"]
    gain = layer["gain"]
    if gain is None:
        return f"none of {layer['tried']} was faster"
    text = f"{gain['median']:.3f}x ({gain['low']:.3f} .. {gain['high']:.3f})"
    if layer["after"] is None:
        noise = "unknown" if layer["noise"] is None else f"{layer['noise']:.1%}"
        return f"{layer['best']} {text}, within the noise of {noise}"
    return text
