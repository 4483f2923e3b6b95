"""`resnet-fused verify --fp8`: whether a network in e4m3 names the classes that it did before."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._output import progress_bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resnet_fused.data import ImageStream

CALIBRATION = 64
"""Images that the scales are found on, at most: a quarter of those that there are."""


def fp8(
    model: str,
    weights: str | None,
    images: Sequence[Path],
    *,
    batch: int,
    required: float,
    where: torch.device,
    dtype: torch.dtype,
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
    from resnet_fused.data import ImageStream, find_images

    if not images:
        raise UserError("--fp8: give the --images to compare on, files or a folder of them")
    with user_errors():
        entries = find_images(images)
    if len(entries) < 2:
        raise UserError("--images: --fp8 needs two images or more, one to calibrate on")
    network = _models.load(model, weights, quiet=quiet)
    net = network.model.to(where)
    first = min(CALIBRATION, max(1, len(entries) // 4))
    skipped: list[str] = []
    streams = [
        ImageStream(part, network.transform, batch_size=batch, device=where)
        for part in (entries[:first], entries[first:])
    ]
    said = None
    with progress_bar("verifying", quiet=quiet) as progress, user_errors():
        seen = list(_images(streams[0], skipped))
        if not seen:
            raise UserError(f"--images: no image to calibrate on could be read: {skipped[0]}")
        if not network.trained:
            said = calibrate_batchnorm(net, torch.cat(seen))
        calibration = rf.calibrate_fp8(net, seen)
        total = len(entries) - first
        found = verify_fp8(
            net,
            _images(streams[1], skipped),
            calibration,
            dtype=torch.bfloat16 if dtype is torch.float32 else dtype,
            required=required,
            progress=lambda done: progress(done, total, "images"),
        )
    return {
        "model": model,
        "weights": network.weights,
        "calibration": said,
        "device": str(where),
        "skipped": skipped,
        "fp8": found.to_dict(),
        "text": str(found),
    }


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
