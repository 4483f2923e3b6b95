"""`resnet-fused verify --fp8`: whether a network in e4m3 names the classes that it did before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._output import progress_bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from resnet_fused.data import ImageStream
    from resnet_fused.data.stream import Entry
    from resnet_fused.freeze import Fp8Calibration

CALIBRATION = 64
"""Images that the scales are found on, at most: a quarter of those that there are."""
ROUNDS = 9
BUDGET_S = 20.0


def fp8(
    model: str,
    weights: str | None,
    images: Sequence[Path],
    *,
    batch: int,
    required: float,
    where: torch.device,
    dtype: torch.dtype,
    timed: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Calibrates on some of the images and compares on the others.

    Args:
        model: as for `explain`.
        weights: as for `predict`; None are random ones, BatchNorm calibrated on the images.
        images: files and folders.
        batch: images at a time.
        required: share of the images that has to agree.
        where: the device.
        dtype: of what is not e4m3; float32 is taken for bfloat16.
        timed: time the engine in e4m3 beside the one in 16 bits, too.
        quiet: print nothing.

    Returns:
        A record, ready for JSON.

    Raises:
        UserError: nothing can be read, or too few images; a network that freeze can't take.
    """
    import torch

    import resnet_fused as rf
    from resnet_fused.agreement import verify_fp8
    from resnet_fused.calibrate import calibrate_batchnorm
    from resnet_fused.cli import _models
    from resnet_fused.data import ImageStream

    entries = _entries(images)
    network = _models.load(model, weights, quiet=quiet)
    net = network.model.to(where)
    first = min(CALIBRATION, max(1, len(entries) // 4))
    skipped: list[str] = []
    calibrating, comparing = (
        ImageStream(part, network.transform, batch_size=batch, device=where)
        for part in (entries[:first], entries[first:])
    )
    said = timing = None
    wide = torch.bfloat16 if dtype is torch.float32 else dtype
    with progress_bar("verifying", quiet=quiet) as progress, user_errors():
        seen = list(_images(calibrating, skipped))
        if not seen:
            raise UserError(f"--images: no image to calibrate on could be read: {skipped[0]}")
        if not network.trained:
            said = calibrate_batchnorm(net, torch.cat(seen))
        calibration = rf.calibrate_fp8(net, seen)
        found = verify_fp8(
            net,
            _images(comparing, skipped),
            calibration,
            dtype=wide,
            required=required,
            progress=lambda done: progress(done, len(entries) - first, "images"),
        )
    if timed:
        with progress_bar("timing", quiet=quiet) as progress:
            timing = _time(net, torch.cat(seen), batch, calibration, wide, progress)
    return {
        "model": model,
        "weights": network.weights,
        "calibration": said,
        "device": str(where),
        "skipped": skipped,
        "fp8": found.to_dict(),
        "timing": timing,
        "text": str(found),
    }


def _entries(images: Sequence[Path]) -> list[Entry]:
    from resnet_fused.data import find_images

    if not images:
        raise UserError("--fp8: give the --images to compare on, files or a folder of them")
    with user_errors():
        entries = find_images(images)
    if len(entries) < 2:
        raise UserError("--images: --fp8 needs two images or more, one to calibrate on")
    return entries


def _time(
    net: nn.Module,
    images: Tensor,
    batch: int,
    calibration: Fp8Calibration,
    wide: torch.dtype,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """The engine in e4m3 beside the one in 16 bits, in turns, on the same images."""
    import torch

    from resnet_fused.agreement import engines
    from resnet_fused.bench.model import MIN_SAMPLE_S, synchronizer
    from resnet_fused.bench.timing import interleaved

    x = images[torch.arange(batch, device=images.device) % len(images)]
    made, name = engines(net, x, calibration, wide), str(wide).removeprefix("torch.")
    x = x.to(wide).to(memory_format=torch.channels_last)
    calls = {name: lambda: made["wide"](x), "fp8": lambda: made["fp8"](x)}
    with torch.inference_mode():
        timings = interleaved(
            calls,
            rounds=ROUNDS,
            min_sample_s=MIN_SAMPLE_S,
            budget_s=BUDGET_S,
            progress=lambda done, total: progress(done, total, f"batch {len(x)}"),
            synchronize=synchronizer(x.device),
        )
    rates = {one: len(x) / timings.median(one) for one in timings.seconds}
    verdicts = [timings.verdict(name, "fp8")]
    return {"batch": len(x), "images_per_s": rates, "verdicts": verdicts, **timings.to_dict()}


def _images(stream: ImageStream, skipped: list[str]) -> Iterator[Tensor]:
    for batch in stream:
        skipped.extend(str(entry.error) for entry in batch.failures)
        if batch.images is not None:
            yield batch.images


def show(record: dict[str, Any]) -> None:
    """Prints a record for a reader."""
    click.echo(f"{record['model']}, weights {record['weights']}, on {record['device']}")
    if record["calibration"]:
        click.echo(f"The weights are random: top classes mean little. {record['calibration']}")
    for line in record["skipped"]:
        print(f"skipped: {line}", file=sys.stderr)
    click.echo(record["text"])
    if record["timing"]:
        rates = record["timing"]["images_per_s"].items()
        said = ", ".join(f"{rate:,.1f} images/s in {name}" for name, rate in rates)
        click.echo(f"batch {record['timing']['batch']}: {said}")
        for sentence in record["timing"]["verdicts"]:
            click.echo(f"  {sentence}")
