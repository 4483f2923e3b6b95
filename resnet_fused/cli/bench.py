"""`resnet-fused bench`: what fusing gains on this machine, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from resnet_fused.cli._options import (
    DTYPES,
    ListOf,
    check_environment,
    device_option,
    json_option,
    size_option,
    torch_device,
    torch_dtype,
)
from resnet_fused.cli._output import check_folder, echo_json, progress_bar, to_json, write_file

if TYPE_CHECKING:
    from resnet_fused.bench.model import Prediction, Result


@click.command()
@click.argument("model", default="resnet50")
@click.option(
    "--batch",
    "batches",
    type=ListOf(click.IntRange(min=1)),
    default="1,8",
    show_default=True,
    help="Numbers of images.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=ListOf(click.Choice(DTYPES)),
    default="float32",
    show_default=True,
    help="Of weights and activations.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=15,
    show_default=True,
    help="Pairs to time; 6 or more for a 95% interval.",
)
@click.option(
    "--at-least",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="The gain over eager that the verdict asks for.",
)
@size_option
@device_option
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON record here too.")
@json_option
def bench(
    model: str, batches: tuple[int, ...], dtypes: tuple[str, ...], rounds: int, at_least: float,
    size: int, device: str, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Time MODEL fused, against eager channels_last and bare oneDNN calls.

    The variants are interleaved and compared pair by pair. Above 5% of foreign load on the machine
    no verdict is given. MODEL is as for `explain`.
    """
    check_environment()
    where = torch_device(device)
    if output is not None:
        check_folder(output.parent)
    from resnet_fused.bench.model import bench_model, to_record
    from resnet_fused.cli import _models

    network = _models.load(model)
    with progress_bar("timing", quiet=as_json) as progress:
        results = bench_model(
            network.model, batches=batches, dtypes=[torch_dtype(name) for name in dtypes],
            size=size, device=where, rounds=rounds, at_least=at_least, progress=progress,
            announce=None if as_json else _announce, report=None if as_json else _report,
        )  # fmt: skip
    settings = {"batches": batches, "dtypes": dtypes, "rounds": rounds, "size": size,
                "device": str(where), "at_least": at_least, "weights": network.weights}  # fmt: skip
    record = to_record(model, results, settings)
    if output is not None:
        write_file(output, to_json(record) + "\n")
    if as_json:
        echo_json(record)
    elif output is not None:
        click.echo(f"record: {output}")


def _announce(prediction: Prediction) -> None:
    rates = prediction.ceilings
    click.echo(
        f"predicted, batch {prediction.batch} {prediction.dtype}: at least "
        f"{prediction.eager_s * 1e3:.1f} ms eager, {prediction.fused_s * 1e3:.1f} ms fused, "
        f"{prediction.gain:.2f}x, by the roofline of {rates.flops / 1e9:.0f} GFLOP/s and "
        f"{rates.bandwidth / 1e9:.1f} GB/s measured here"
    )


def _report(result: Result) -> None:
    timings = result.timings
    times = ", ".join(
        f"{name} {timings.median(name) * 1e3:.1f} ms "
        f"({result.batch / timings.median(name):.1f} images/s, spread {timings.spread(name):.0%})"
        for name in timings.seconds
    )
    click.echo(f"batch {result.batch} {result.dtype}: {times}")
    for sentence in result.verdicts:
        click.echo(f"  {sentence}")
    for name, reason in result.omitted.items():
        click.echo(f"  without {name}: {reason}")
    click.echo(f"  load: others {timings.load.foreign:.1%} of {timings.load.cores} cores")
