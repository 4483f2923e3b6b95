"""`resnet-fused evaluate`: how often a network is right, on labelled images."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import (
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
    from torch import Tensor, nn

    from resnet_fused.data.sources import Source
    from resnet_fused.train.evaluation import Score

SIDE, SHORTER = 224, 256  # torchvision's and timm's, where nothing else is known


@dataclass(frozen=True)
class Subject:
    """What is tested.

    Attributes:
        model: in evaluation mode, on the CPU.
        name: of the network.
        weights: where they come from.
        data: what it is tested on.
        channels: that the model wants.
        size: side of the images, pixels.
        resize: their shorter side before the crop.
        mean: of the channels that the model wants, of values from 0 to 1.
        std: likewise.
    """

    model: nn.Module
    name: str
    weights: str
    data: Source
    channels: int
    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@click.command()
@click.argument("model", metavar="MODEL|RUN")
@click.option("--data", metavar="DATA", help="As for `train`.  [default: the run's]")
@click.option(
    "--weights", metavar="FILE|NAME",
    help="A file of weights, as for `predict`, or published weights, downloaded.  "
    "[default: the run's]",
)  # fmt: skip
@click.option("--split", type=click.Choice(["val", "train"]), default="val", show_default=True,
              help="Which of the images.")  # fmt: skip
@click.option(
    "--crops", type=click.Choice(["1", "10"]), default="1", show_default=True,
    help="The centre, or corners and centre and their mirror images.",
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
    size are known; the weights are its model.safetensors, or those of its last checkpoint.
    """
    check_environment()
    device, dtype = torch_device(options["device"]), torch_dtype(options["dtype"])
    from resnet_fused.data.images import ImageError
    from resnet_fused.train import CheckpointError, TrainingError

    try:
        subject = _subject(options)
        score, skipped, seconds = _test(subject, device, dtype, options)
        with user_errors():
            record = score.record()
    except (TrainingError, CheckpointError, ImageError) as error:
        raise UserError(str(error)) from error
    if options["confusion"] is not None:
        from resnet_fused.report import confusion

        picture = confusion.draw(score.confusion.tolist(), subject.data.classes)
        write_file(options["confusion"], picture)
    _say(subject, score, record, skipped, seconds, options)


def _subject(options: dict[str, Any]) -> Subject:
    from resnet_fused.train import settings

    run = Path(options["model"])
    if run.is_dir():
        if not (run / settings.RUN).exists():
            raise UserError(f"MODEL: folder '{run}' holds no run of `train`")
        return _of_run(run, options)
    if options["data"] is None or options["weights"] is None:
        raise UserError("--data and --weights: give both, or the folder of a run of `train`")
    return _named(options)


def _of_run(run: Path, options: dict[str, Any]) -> Subject:
    from resnet_fused.cli import _models
    from resnet_fused.train import network, settings
    from resnet_fused.train.recipe import Recipe

    told = settings.read(run)
    recipe = Recipe.model_validate(told["recipe"])
    source = _source(options["data"] or told["data"], recipe.size, options)
    if list(source.classes) != told["classes"]:
        raise UserError(f"--data: {source.name} has other classes than the run in '{run}'")
    made = settings.Settings(told["model"], source.name, recipe, impl="eager")
    import torch

    model = network.build(made, source, torch.device("cpu"))
    file = options["weights"]
    state, name = (_models.read_state_dict(Path(file)), file) if file is not None else _trained(run)
    network.begin_with(model, state, name)
    size = options["size"] or recipe.eval_size or recipe.size
    resize = options["resize"] or max(recipe.eval_resize or size, size)
    channels = network.channels_of(made.model, source)
    return Subject(
        model.eval(), made.model, f"from '{name}'", source, channels, size, resize,
        *_of_data(source, channels),
    )  # fmt: skip


def _of_data(source: Source, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the data, for a model that may want grey images thrice."""
    times = channels // source.channels
    return source.mean * times, source.std * times


def _trained(run: Path) -> tuple[dict[str, Tensor], str]:
    """The weights that a run came to, so far."""
    from resnet_fused.cli import _models
    from resnet_fused.train import checkpoint
    from resnet_fused.train.loop import FINAL

    if (run / FINAL).exists():
        return _models.read_state_dict(run / FINAL), str(run / FINAL)
    found = checkpoint.newest(run)
    if found is None:
        raise UserError(f"MODEL: the run in '{run}' has no checkpoint yet")
    return _models.read_state_dict(found.path), str(found.path)


def _named(options: dict[str, Any]) -> Subject:
    from resnet_fused.cli import _models
    from resnet_fused.train import network, settings
    from resnet_fused.train.recipe import Recipe

    name, weights = options["model"], options["weights"]
    _models.check_name(name)
    size = options["size"]
    source = _source(options["data"], size or SIDE, options)
    norm: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    if _models.is_file(weights):
        import torch

        made = settings.Settings(name, source.name, Recipe(), impl="eager")
        with user_errors():
            model = network.build(made, source, torch.device("cpu"))
        weights_read = _models.read_weights(Path(weights))
        if weights_read.preprocessing is None:
            network.begin_with(model, dict(weights_read), weights)
            where = f"from '{weights}'"
        else:
            where = _models.filled(model, weights_read, name)
            norm = weights_read.preprocessing.mean, weights_read.preprocessing.std
        channels, shorter = network.channels_of(name, source), None
    else:
        found = _models.load(name, weights, quiet=options["as_json"])
        model, where, channels = found.model, found.weights, 3
        if len(found.categories) != len(source.classes):
            raise UserError(
                f"--weights: {where} know {len(found.categories)} classes, {source.name} has "
                f"{len(source.classes)}"
            )
        known = (
            getattr(found.transform, "crop_size", None),
            getattr(found.transform, "resize_size", None),
        )
        size = size or (known[0][0] if known[0] else None)
        shorter = known[1][0] if known[1] else None
    size = size or source.size or SIDE
    shorter = shorter or (size if source.size else round(size * SHORTER / SIDE))
    resize = options["resize"] or max(shorter, size)
    mean, std = norm or _of_data(source, channels)
    return Subject(model.eval(), name, where, source, channels, size, resize, mean, std)


def _source(spec: str, size: int, options: dict[str, Any]) -> Source:
    from resnet_fused.data.sources import open_source

    with user_errors():
        return open_source(spec, size=size, download=options["download"])


def _test(
    subject: Subject, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Score, list[str], float]:
    from resnet_fused.data import augment, loading
    from resnet_fused.data.images import ImageError
    from resnet_fused.train import evaluation

    images = subject.data.val if options["split"] == "val" else subject.data.train
    ten = options["crops"] == "10"
    with user_errors():
        make = augment.ten_crops if ten else augment.evaluation_transform
        transform = make(subject.size, subject.resize)
    samples = loading.Samples(images, transform)
    batches = loading.loader(
        samples, loading.shares(len(samples), options["batch_size"]),
        workers=options["workers"], pin=device.type == "cuda",
    )  # fmt: skip
    forward = _forward(subject, device, dtype, ten=ten)
    begun, done = time.perf_counter(), 0
    with progress_bar("evaluating", quiet=options["as_json"]) as progress:

        def seen(count: int) -> None:
            nonlocal done
            done += count
            rate = done / (time.perf_counter() - begun)
            progress(done, len(samples), f"{rate:.1f} images/s")

        classes = len(subject.data.classes)
        moved = loading.on_device(batches, device)
        score, skipped = evaluation.evaluate(forward, moved, classes, device, seen=seen)
    if skipped and options["on_error"] == "stop":
        raise ImageError(skipped[0])
    return score, skipped, time.perf_counter() - begun


def _forward(
    subject: Subject, device: torch.device, dtype: torch.dtype, *, ten: bool
) -> Callable[[Tensor], Tensor]:
    """Bytes of images -> logits, by a frozen engine that the first batch makes."""
    import torch

    import resnet_fused as rf

    norm = rf.ops.stem_input_norm(subject.mean, subject.std)
    model = subject.model.to(device, dtype).to(memory_format=torch.channels_last)
    engine: nn.Module | None = None

    def forward(images: Tensor) -> Tensor:
        nonlocal engine
        flat = images.flatten(0, 1) if ten else images
        flat = flat.expand(-1, subject.channels, -1, -1)
        flat = flat.contiguous(memory_format=torch.channels_last)
        if engine is None:
            engine = rf.freeze(model, flat, input_norm=norm)
        with torch.inference_mode():
            logits = engine(flat).float()
        if not ten:
            return logits
        # The mean of ten softmaxes; its logarithm has the same order, and is a softmax's input.
        return logits.softmax(1).view(len(images), 10, -1).mean(1).log()

    return forward


def _say(
    subject: Subject, score: Score, found: dict[str, Any], skipped: list[str], seconds: float,
    options: dict[str, Any],
) -> None:  # fmt: skip
    names = subject.data.classes
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
            "model": subject.name, "weights": subject.weights, "data": subject.data.name,
            "split": options["split"], "crops": int(options["crops"]), "size": subject.size,
            "resize": subject.resize, **found, "seconds": seconds, "classes": rows,
            "confusion": matrix.tolist(), "skipped": skipped,
        }  # fmt: skip
        echo_json(record)
        return
    for name in skipped[:20]:
        print(f"skipped: {name}", file=sys.stderr)
    top5 = f", top-5 {found['top5']:.2%}" if found["top5"] is not None else ""
    click.echo(
        f"{subject.name} ({subject.weights}) on {subject.data.name}: top-1 {found['top1']:.2%}"
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
