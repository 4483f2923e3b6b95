"""Small runs for the tests of training: a data set in memory, a network of 8 layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from resnet_fused import models
from resnet_fused.convert import unfuse
from resnet_fused.data.sources import Source, Stored
from resnet_fused.train.loop import Outcome, Trainer
from resnet_fused.train.processes import Processes
from resnet_fused.train.recipe import Recipe
from resnet_fused.train.settings import Settings

CPU = torch.device("cpu")
RECIPE = {
    "epochs": 3,
    "batch_size": 12,
    "size": 8,
    "optimizer": {"lr": 0.05, "nesterov": True},
    "schedule": {"warmup_epochs": 1},
    "augmentation": {"crop": "padded", "padding": 1, "flip": True},
}


def source(train: int = 50, val: int = 13, classes: int = 4) -> Source:
    """Grey images of 8x8: a pattern a class, and noise upon it."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(60, 180, (classes, 1, 8, 8), generator=generator)
    parts = []
    for count in (train, val):
        labels = torch.arange(count) % classes
        noise = torch.randint(-25, 26, (count, 1, 8, 8), generator=generator)
        parts.append(Stored((patterns[labels] + noise).to(torch.uint8), labels))
    names = tuple(f"kind {i}" for i in range(classes))
    return Source("patterns", parts[0], parts[1], names, (0.47,), (0.19,), 8)


def recipe(**changes: Any) -> Recipe:
    """The recipe above, some entries changed; tables by entry."""
    content: dict[str, Any] = {**RECIPE}
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(content.get(key), Mapping)
        content[key] = {**content[key], **value} if inner else value
    return Recipe.model_validate(content)


def settings(made: Recipe | None = None, **changes: Any) -> Settings:
    """Of a run that writes a line a step, and no event files."""
    given = {"log_every": 1, "tensorboard": False, **changes}
    return Settings("rf:cifar_resnet20", "patterns", made or recipe(), **given)


def network(classes: int = 4, impl: str = "fused") -> nn.Module:
    """Eight layers, the same weights whenever it is asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.CifarResNet(8, classes, 1)
    model = model if impl == "fused" else unfuse(model)
    return model.to(memory_format=torch.channels_last)


def trainer(
    run: Path, told: Settings | None = None, *, data: Source | None = None,
    model: nn.Module | None = None, processes: Processes | None = None, **changes: Any,
) -> Trainer:  # fmt: skip
    """A trainer on the CPU."""
    told = told or settings(**changes)
    data = data or source()
    run.mkdir(parents=True, exist_ok=True)
    model = model or network(len(data.classes), told.impl)
    return Trainer(told, data, model, processes or Processes(0, 1, CPU), run, 1)


def train(run: Path, told: Settings | None = None, **others: Any) -> Outcome:
    """Runs to the end."""
    return trainer(run, told, **others).train()


def picture_folder(top: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 6) -> Path:
    """A folder as `imagefolder:` wants it: bright images of one class, dark ones of another."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", each), ("val", 3)):
        for number, name in enumerate(classes):
            (top / split / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 60, (40, 50, 3), generator=generator)
                pixels = (noise + 150 * number).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(top / split / name / f"{i}.png")
    return top
