"""What `evaluate` tests: a network with its weights, and how its images are prepared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fused.cli._errors import UserError, user_errors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from resnet_fused.data.sources import Source

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


def subjects(options: dict[str, Any]) -> list[Subject]:
    """The networks that the command line names, which answer together.

    Raises:
        UserError: what cannot be tested, or not together.
    """
    models, weights = options["models"], options["weights"]
    if weights and len(weights) != len(models):
        raise UserError(
            f"--weights: got {len(weights)} for {len(models)} MODELs; give one for each in order, "
            "or none where all are runs"
        )
    found = [
        _subject({**options, "model": model, "weights": file})
        for model, file in zip(models, weights or (None,) * len(models), strict=True)
    ]
    first = found[0]
    for other in found[1:]:
        if other.data.classes != first.data.classes:
            raise UserError(f"MODEL: {other.name} and {first.name} know different classes")
        mine, its = (f"{each.size} of {each.resize}" for each in (first, other))
        if mine != its and not options["scales"]:
            raise UserError(
                f"MODEL: {first.name} takes {mine} pixels, {other.name} {its}; give --size and "
                "--resize for all of them"
            )
    return found


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
