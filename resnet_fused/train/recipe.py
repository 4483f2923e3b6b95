"""Recipes: everything that decides what a run learns, in a file that people can read.

    [sgd]                              resnet_fused/train/recipes/*.toml are examples
    lr = 0.1

A recipe is named by one of those files' names, or is a file of one's own. Single values are set by
their path: `optimizer.lr=0.2`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resnet_fused.data.augment import Augmentation

_STRICT = ConfigDict(extra="forbid", frozen=True)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the entry and what is accepted."""


class Optimizer(BaseModel):
    """What takes the steps.

    Attributes:
        name: "sgd", "lars" (timm's; for batches of thousands of images) or "adamw".
        lr: learning rate at the schedule's top.
        momentum: of sgd and lars.
        nesterov: of sgd and lars.
        weight_decay: of convolutions' and linear layers' weights.
        decay_all: of BatchNorm's parameters and of biases as well.
        clip_norm: largest norm of all gradients together; None: any.
    """

    model_config = _STRICT

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0)
    decay_all: bool = True
    clip_norm: float | None = Field(None, gt=0)


class Schedule(BaseModel):
    """The learning rate over the run, as a factor of the optimizer's.

    Attributes:
        name: "cosine" (to `final` at the end), "step" (times `gamma` at each milestone), "plateau"
            (times `gamma` where the test error has not fallen for `patience` tests) or "constant".
        warmup_epochs: at the beginning, before everything else.
        warmup_steps: the same in steps; None: by `warmup_epochs`.
        warmup: "linear", a straight line up, or "constant", at `warmup_start`.
        warmup_start: where that begins.
        milestones: epochs, of "step".
        milestone_steps: further milestones, in steps.
        patience: tests, of "plateau".
        threshold: least fall of the error that counts, of "plateau".
        gamma: of "step" and "plateau".
        final: of "cosine".
    """

    model_config = _STRICT

    name: Literal["cosine", "step", "plateau", "constant"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)
    warmup_steps: int | None = Field(None, ge=0)
    warmup: Literal["linear", "constant"] = "linear"
    warmup_start: float = Field(0.0, ge=0, le=1)
    milestones: tuple[float, ...] = ()
    milestone_steps: tuple[int, ...] = ()
    patience: int = Field(5, ge=0)
    threshold: float = Field(1e-4, ge=0)
    gamma: float = Field(0.1, gt=0, le=1)
    final: float = Field(0.0, ge=0, le=1)


class Loss(BaseModel):
    """Cross entropy, and what is done to its targets.

    Attributes:
        label_smoothing: share of a target that goes to all classes.
        mixup: alpha of mixup; 0: none.
        cutmix: alpha of CutMix; 0: none. Where both are wanted each step takes one of them.
    """

    model_config = _STRICT

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)


class Recipe(BaseModel):
    """A run.

    Attributes:
        epochs: passes over the training images.
        iterations: steps of the run, whatever `epochs` says; None: by `epochs`.
        batch_size: images of a step, of all processes together.
        size: side of the images that are trained on, pixels.
        eval_size: of those tested with; None: `size`.
        eval_resize: their shorter side before the centre is cropped; None: `eval_size`.
        precision: "float32", or the dtype of autocast.
        accumulate: parts of a batch, one after the other.
        ema: decay of a moving average of the weights, which is then what is tested; None: none.
        sync_batchnorm: statistics over all processes.
        capture: on a GPU, whether a step is captured as a CUDA graph; the optimizer is PyTorch's
            fused one then, and the learning rate float32.
        optimizer, schedule, loss, augmentation: see there.
    """

    model_config = _STRICT

    epochs: int = Field(90, ge=1)
    iterations: int | None = Field(None, ge=1)
    batch_size: int = Field(256, ge=1)
    size: int = Field(224, ge=1)
    eval_size: int | None = Field(None, ge=1)
    eval_resize: int | None = Field(None, ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulate: int = Field(1, ge=1)
    ema: float | None = Field(None, gt=0, lt=1)
    sync_batchnorm: bool = False
    capture: bool = False
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    augmentation: Augmentation = Augmentation()


def names() -> list[str]:
    """The recipes that come with this package."""
    folder = resources.files("resnet_fused.train") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read(recipe: str, changes: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        recipe: one of `names()`, or the path of a TOML file.
        changes: "entry=value", such as "epochs=10" or "optimizer.lr=0.2"; the value as in TOML,
            text also without quotation marks.

    Raises:
        RecipeError: no such recipe, a file that is no TOML, an entry or a value that is not known.
    """
    text, source = _text(recipe)
    try:
        content: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe: {source} is no TOML file ({error})") from error
    for change in changes:
        _apply(content, change)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"recipe: {source}: {_first(error)}") from error


def _text(recipe: str) -> tuple[str, str]:
    if recipe in names():
        file = resources.files("resnet_fused.train") / "recipes" / f"{recipe}.toml"
        return file.read_text(encoding="utf-8"), f"'{recipe}'"
    path = Path(recipe)
    if not path.is_file():
        raise RecipeError(f"recipe: {recipe!r} is neither a file nor one of {', '.join(names())}")
    try:
        return path.read_text(encoding="utf-8"), f"'{path}'"
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe: '{path}' cannot be read ({error})") from error


def _apply(content: dict[str, Any], change: str) -> None:
    path, sign, text = change.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not sign or not all(keys):
        raise RecipeError(f"--set: expected entry=value, such as optimizer.lr=0.2, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text.strip().lower() == "none" else text.strip()
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set: {change!r}: {key!r} has no entries of its own")
    place[keys[-1]] = value
    if keys == ["epochs"]:
        content.pop("iterations", None)  # whoever says epochs means them


def _first(error: ValidationError) -> str:
    """The first thing wrong, in one line, and how many more there are."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known(problem["loc"][:-1])
        line = f"there is no entry {where!r}; accepted: {', '.join(known)}"
    else:
        line = f"{where} is {problem['input']!r}: {problem['msg'].lower()}"
    return line + (f" ({len(problems) - 1} more like it)" if len(problems) > 1 else "")


def _known(path: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in path:
        inner = model.model_fields[str(key)].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return list(model.model_fields)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two nested tables do not have in common: "entry: old, now new"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {before!r}, now is {now!r}")
    return found
