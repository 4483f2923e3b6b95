"""`resnet-fused verify`: a network's fused numbers against its unfused self, and what it gains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli import _fp8
from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import (
    check_environment,
    device_option,
    dtype_option,
    json_option,
    size_option,
    torch_device,
    torch_dtype,
)
from resnet_fused.cli._output import check_folder, echo_json, progress_bar, table, write_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from resnet_fused.cli._models import Network
    from resnet_fused.explain import Explanation

TIMED_BATCHES = (1, 8)  # an answer wanted at once, and throughput
BUDGET_S = 20.0  # a batch size; a busy machine stops after fewer pairs
ROUNDS = 9  # pairs a batch size: a 95% interval, and half a minute in all on two cores


@click.command()
@click.argument("model", default="resnet50")
@click.option(
    "--weights",
    metavar="FILE|NAME",
    help="As for `predict`; without it: random ones, BatchNorm calibrated on the images.",
)
@click.option(
    "--images", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="An image to use, again for each one (with --fp8 a folder too); without it: "
    "scikit-learn's two photographs.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(min=1), default=4, show_default=True,
    help="Crops of the images to compare on.",
)  # fmt: skip
@size_option
@dtype_option
@click.option(
    "--time", "timed", is_flag=True,
    help="Time eager against fused too; with --fp8 e4m3 against 16 bits, --batch images at a time.",
)  # fmt: skip
@click.option(
    "--fp8", "in_fp8", is_flag=True,
    help="Compare top classes of an engine in e4m3 with one in bfloat16 instead, on --images, "
    "which may be folders; a quarter of them, at most 64, calibrate it.",
)  # fmt: skip
@click.option(
    "--agreement", type=click.FloatRange(0, 1), default=0.99, show_default=True, metavar="SHARE",
    help="With --fp8: exit with 1 where the images show, with 95% confidence, a smaller share.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR",
    help="Write report.html and report.png there.",
)  # fmt: skip
@device_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context, model: str, weights: str | None, images: tuple[Path, ...], batch: int,
    size: int, dtype: str, timed: bool, in_fp8: bool, agreement: float, output: Path | None,
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Compare MODEL fused with its unfused self in float64, layer by layer and end to end.

    Exits with 1 when a layer, a block or the output is further off than its roundings allow.
    MODEL is as for `explain`.
    """
    check_environment()
    where = torch_device(device)
    if output is not None:
        check_folder(output)
    if in_fp8:
        if output is not None:
            raise UserError(
                "--output: not with --fp8, which reports top classes alone; leave it out"
            )
        record = _fp8.fp8(
            model, weights, images, batch=batch, required=agreement, where=where,
            dtype=torch_dtype(dtype), timed=timed, quiet=as_json,
        )  # fmt: skip
        echo_json(record) if as_json else _fp8.show(record)
        ctx.exit(0 if record["fp8"]["ok"] else 1)
    import torch

    import resnet_fused as rf
    from resnet_fused.bench.model import cast
    from resnet_fused.cli import _models

    crops, pictured = _images(images, batch, size)
    network = _models.load(model, weights, quiet=as_json)
    calibration = None if network.trained else _calibrate(network, crops, where)
    x = crops.to(where, torch_dtype(dtype)).to(memory_format=torch.channels_last)
    fused = rf.fuse(cast(network.model, where, torch_dtype(dtype)))
    with progress_bar("verifying", quiet=as_json) as progress, user_errors():
        verification = rf.verify(fused, x, progress=progress)
    with torch.no_grad():
        explanation = rf.explain(fused, x)
    record: dict[str, Any] = {
        "model": model,
        "weights": network.weights,
        "calibration": calibration,
        "images": pictured,
        "device": str(where),
        "verification": verification.to_dict(),
        "explanation": explanation.to_dict(),
        "timings": [],
        "report": None,
    }
    if not as_json:
        _print_numbers(record, explanation)
    if timed:
        record["timings"] = _time(fused, size, where, torch_dtype(dtype), as_json)
    record |= _provenance()
    if output is not None:
        record["report"] = _write(record, output)
    if as_json:
        echo_json(record)
    else:
        _print_outcome(record)
    ctx.exit(0 if verification.ok else 1)


def _images(files: Sequence[Path], batch: int, size: int) -> tuple[Tensor, str]:
    """The input as float32 [batch, 3, size, size], and a few words on it."""
    from resnet_fused.data import crops, load_image

    with user_errors():
        pictures = [load_image(file) for file in files] or None
        made = crops(max(batch, len(files)), size, images=pictures)
    names = ", ".join(file.name for file in files)
    return made, (
        f"{len(made)} crops of {size} x {size} pixels of "
        + (names or "scikit-learn's photographs (china.jpg, flower.jpg)")
    )


def _calibrate(network: Network, crops: Tensor, where: torch.device) -> str:
    """Gives random weights a BatchNorm under which mistakes show; says so in a sentence."""
    from resnet_fused.calibrate import calibrate_batchnorm

    network.model.to(where)
    with user_errors():
        sentence = calibrate_batchnorm(network.model, crops.to(where))
    return f"The weights are random: trained ones were not given. {sentence}"


def _time(
    fused: nn.Module, size: int, where: torch.device, dtype: torch.dtype, quiet: bool
) -> list[dict[str, Any]]:
    from resnet_fused.bench.model import bench_model

    with progress_bar("timing", quiet=quiet) as progress:
        results = bench_model(
            fused,
            batches=TIMED_BATCHES,
            dtypes=[dtype],
            size=size,
            device=where,
            rounds=ROUNDS,
            budget_s=BUDGET_S,
            progress=progress,
        )
    return [result.to_dict() for result in results]


def _provenance() -> dict[str, Any]:
    import datetime

    from resnet_fused.bench import record

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": record.commit(),
        "versions": record.versions(),
        "machine": record.machine(),
    }


def _write(record: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draws and writes the picture and the page; returns their paths."""
    from resnet_fused.bench.plain import plain
    from resnet_fused.report import draw, render

    content = plain(record)
    paths = {"png": folder / "report.png", "html": folder / "report.html"}
    # Both are made before either is written: a picture without its page would be half a report.
    picture = draw(content)
    page = render(content, picture)
    write_file(paths["png"], picture)
    write_file(paths["html"], page)
    return {kind: str(path) for kind, path in paths.items()}


def _print_numbers(record: dict[str, Any], explanation: Explanation) -> None:
    found = record["verification"]
    click.echo(f"{record['model']}, weights {record['weights']}, {found['dtype']}")
    click.echo(f"images: {record['images']}")
    if record["calibration"]:
        click.echo(record["calibration"])
    click.echo("\nEach layer on the input that the fused run gave it, against float64:")
    rows = [
        [
            layer["layer"], layer["pattern"], layer["implementation"], _number(layer["error"]),
            _number(layer["bound_use"], "{:.3f}"), "ok" if layer["ok"] else "FAILED",
        ]
        for layer in found["layers"]
    ]  # fmt: skip
    headers = ["layer", "pattern", "by", "max error", "of its bound", ""]
    click.echo(table(headers, rows, frozenset({3, 4})))
    click.echo("\nEach block's rms error beside that of the unfused block:")
    rows = [
        [
            block["block"], _number(block["fused_rms"]), _number(block["eager_rms"]),
            _number(block["ratio"], "{:.3f}"), _number(block["limit"], "{:.2f}"),
            "ok" if block["ok"] else "FAILED",
        ]
        for block in found["blocks"]
    ]  # fmt: skip
    headers = ["block", "fused", "eager", "ratio", "allowed", ""]
    click.echo(table(headers, rows, frozenset({1, 2, 3, 4})))
    end = found["end_to_end"]
    agree = end["top1_agree"]
    click.echo(
        f"\nend to end: rms error {_number(end['fused_rms'])} fused, {_number(end['eager_rms'])} "
        f"eager, ratio {_number(end['ratio'], '{:.3f}')} (allowed {end['limit']:.2f})"
        + ("" if agree is None else f", top class as in float64 for {agree:.0%} of the images")
    )
    for line in found["not_judged"]:
        click.echo(f"not judged by itself: {line}")
    click.echo(f"fused: {explanation.summary()}")
    reasons = {row.implementation: row.why for row in reversed(explanation.rows)}
    for name, why in reasons.items():
        click.echo(f"  {name}: {why}")


def _print_outcome(record: dict[str, Any]) -> None:
    for timing in record["timings"]:
        times = ", ".join(
            f"{name} {seconds * 1e3:.1f} ms (spread {_number(timing['spread'][name], '{:.0%}')})"
            for name, seconds in timing["median_s"].items()
        )
        click.echo(f"\nbatch {timing['batch']} {timing['dtype']}: {times}")
        for sentence in timing["verdicts"]:
            click.echo(f"  {sentence}")
        for name, reason in timing["omitted"].items():
            click.echo(f"  without {name}: {reason}")
    found = record["verification"]
    click.echo("\nok: every check passed" if found["ok"] else "\nFAILED:")
    for sentence in found["failures"]:
        click.echo(f"  {sentence}")
    for path in (record["report"] or {}).values():
        click.echo(f"report: {path}")


def _number(value: float | None, form: str = "{:.2e}") -> str:
    """A number, or what is written where it is none (NaN or infinite)."""
    return "none" if value is None else form.format(value)
