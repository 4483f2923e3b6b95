"""`resnet-fused evaluate`: how often a network is right, on labelled images."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import (
    ListOf,
    check_environment,
    device_option,
    dtype_option,
    json_option,
    torch_device,
    torch_dtype,
)
from resnet_fused.cli._output import echo_json, progress_bar, table, write_file

if TYPE_CHECKING:
    import torch

    from resnet_fused.cli._subjects import Subject
    from resnet_fused.train.evaluation import Score


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL|RUN...")
@click.option("--data", metavar="DATA", help="As for `train`.  [default: the run's]")
@click.option(
    "--weights", metavar="FILE|NAME", multiple=True,
    help="A file of weights, as for `predict`, or published weights, downloaded; once for each "
    "MODEL.  [default: the run's]",
)  # fmt: skip
@click.option("--split", type=click.Choice(["val", "train"]), default="val", show_default=True,
              help="Which of the images.")  # fmt: skip
@click.option(
    "--crops", type=click.Choice(["1", "10"]), default="1", show_default=True,
    help="The centre, or corners and centre and their mirror images.",
)  # fmt: skip
@click.option(
    "--scales", type=ListOf(click.IntRange(min=1)), metavar="N,...", default=(),
    help="Instead of crops: all of each image, its shorter side of these lengths, averaged.",
)  # fmt: skip
@click.option("--size", type=click.IntRange(min=1), help="Side of a crop, pixels.")
@click.option("--resize", type=click.IntRange(min=1), help="Shorter side before it is cropped.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True,
              help="Processes that decode images; 0: none.")  # fmt: skip
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
              help="An image that cannot be read: stop there, or leave it out.")  # fmt: skip
@click.option("--per-class", is_flag=True, help="A table of the classes.")
@click.option("--confusion", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw which class is taken for which.")  # fmt: skip
@click.option("--download", is_flag=True, help="Fetch CIFAR where it is missing.")
@device_option
@dtype_option
@json_option
def evaluate(**options: Any) -> None:
    """Test MODEL, or the result of a RUN of `train`, on labelled images.

    MODEL is as for `train` and wants --data and --weights. Of a run's folder model, data and image
    size are known; the weights are its model.safetensors, or those of its last checkpoint. Several
    answer together: the mean of their probabilities.
    """
    check_environment()
    device, dtype = torch_device(options["device"]), torch_dtype(options["dtype"])
    if options["scales"]:
        for name, own in (("--crops", "1"), ("--size", None), ("--resize", None)):
            if options[name[2:]] != own:
                raise UserError(f"{name}: with --scales all of an image is looked at")
    from resnet_fused.cli import _subjects
    from resnet_fused.data.images import ImageError
    from resnet_fused.train import CheckpointError, TrainingError

    try:
        subjects = _subjects.subjects(options)
        score, skipped, seconds = _test(subjects, device, dtype, options)
        with user_errors():
            record = score.record()
    except (TrainingError, CheckpointError, ImageError) as error:
        raise UserError(str(error)) from error
    if options["confusion"] is not None:
        from resnet_fused.report import confusion

        picture = confusion.draw(score.confusion.tolist(), subjects[0].data.classes)
        write_file(options["confusion"], picture)
    _say(subjects, score, record, skipped, seconds, options)


def _test(
    subjects: Sequence[Subject], device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Score, list[str], float]:
    from resnet_fused.data import loading
    from resnet_fused.data.images import ImageError
    from resnet_fused.train import evaluation, views

    data = subjects[0].data
    images = data.val if options["split"] == "val" else data.train
    looks = views.Views(
        subjects[0].size, subjects[0].resize, int(options["crops"]), tuple(options["scales"])
    )
    with user_errors():
        samples = loading.Samples(images, looks.transform())
    # Whole photographs have unlike sizes: no two of them make a batch.
    batch = 1 if looks.scales and data.size is None else options["batch_size"]
    batches = loading.loader(
        samples, loading.shares(len(samples), batch), workers=options["workers"],
        pin=device.type == "cuda",
    )  # fmt: skip
    forward = views.together([
        views.View(each.model, looks, each.channels, each.mean, each.std, device, dtype)
        for each in subjects
    ])  # fmt: skip
    begun, done = time.perf_counter(), 0
    with progress_bar("evaluating", quiet=options["as_json"]) as progress:

        def seen(count: int) -> None:
            nonlocal done
            done += count
            rate = done / (time.perf_counter() - begun)
            progress(done, len(samples), f"{rate:.1f} images/s")

        moved = loading.on_device(batches, device)
        score, skipped = evaluation.evaluate(forward, moved, len(data.classes), device, seen=seen)
    if skipped and options["on_error"] == "stop":
        raise ImageError(skipped[0])
    return score, skipped, time.perf_counter() - begun


def _say(
    subjects: Sequence[Subject], score: Score, found: dict[str, Any], skipped: list[str],
    seconds: float, options: dict[str, Any],
) -> None:  # fmt: skip
    first = subjects[0]
    names = first.data.classes
    model = " + ".join(each.name for each in subjects)
    weights = "; ".join(each.weights for each in subjects)
    matrix = score.confusion
    rows = []
    for number, name in enumerate(names):
        line = matrix[number].clone()
        count, right = int(line.sum()), int(line[number])
        line[number] = 0
        other = int(line.argmax()) if int(line.sum()) else None
        rows.append(
            {"class": name, "images": count, "top1": right / count if count else None,
             "taken_for": names[other] if other is not None else None,
             "times": int(line[other]) if other is not None else 0}
        )  # fmt: skip
    if options["as_json"]:
        record = {
            "model": model, "weights": weights,
            "members": [{"model": each.name, "weights": each.weights} for each in subjects],
            "data": first.data.name, "split": options["split"], "crops": int(options["crops"]),
            "scales": list(options["scales"]), "size": first.size, "resize": first.resize,
            **found, "seconds": seconds, "classes": rows, "confusion": matrix.tolist(),
            "skipped": skipped,
        }  # fmt: skip
        echo_json(record)
        return
    for name in skipped[:20]:
        print(f"skipped: {name}", file=sys.stderr)
    top5 = f", top-5 {found['top5']:.2%}" if found["top5"] is not None else ""
    click.echo(
        f"{model} ({weights}) on {first.data.name}: top-1 {found['top1']:.2%}"
        f"{top5} of {score.images} images, {score.images / seconds:.1f} images/s"
    )
    if options["per_class"]:
        cells = [
            [row["class"], str(row["images"]),
             "none" if row["top1"] is None else f"{row['top1']:.2%}",
             f"{row['taken_for']} ({row['times']})" if row["taken_for"] else ""]
            for row in rows
        ]  # fmt: skip
        click.echo(
            table(["class", "images", "top-1", "mostly taken for"], cells, frozenset({1, 2}))
        )
    if options["confusion"] is not None:
        click.echo(f"picture: {options['confusion']}")
