"""What a run is told, and what of it must be the same for a run to go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resnet_fused.data.sources import Source
from resnet_fused.train.recipe import Recipe, differences

RUN = "run.json"
IMPLEMENTATIONS = ("fused", "eager")


class TrainingError(RuntimeError):
    """A run that cannot begin or go on; the message says why, and what is left of it."""


@dataclass(frozen=True)
class Settings:
    """A run.

    Attributes:
        model: "resnet50" (torchvision's), "timm:NAME" or "rf:NAME".
        data: as `resnet_fused.data.sources.open_source` takes it.
        recipe: what decides what is learnt.
        impl: "fused" or "eager", everything else equal.
        seed: of weights, order and augmentation.
        parallel: of several processes, "ddp" or "fsdp".
        weights: a file to begin with; None: random ones.
        new_head: begin with a new classifier, whatever the file has.
        workers: processes that decode images.
        on_error: "stop" or "skip", where an image cannot be read.
        save_every: steps between checkpoints; None: an epoch. There is one behind the last step.
        keep: checkpoints to keep.
        log_every: steps between lines of metrics.
        tensorboard: write event files.
    """

    model: str
    data: str
    recipe: Recipe
    impl: Literal["fused", "eager"] = "fused"
    seed: int = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    weights: str | None = None
    new_head: bool = False
    workers: int = 0
    on_error: Literal["stop", "skip"] = "stop"
    save_every: int | None = None
    keep: int = 3
    log_every: int = 10
    tensorboard: bool = True

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: a run goes on only with the same."""
        return {
            "model": self.model,
            "data": self.data,
            "impl": self.impl,
            "seed": self.seed,
            "parallel": self.parallel,
            "weights": self.weights,
            "new_head": self.new_head,
            "on_error": self.on_error,
            "log_every": self.log_every,
            "recipe": json.loads(self.recipe.model_dump_json()),
        }

    def check(self, source: Source, world: int) -> None:
        """Refuses what does not fit together.

        Args:
            source: the data.
            world: processes.

        Raises:
            TrainingError: the message names both sides.
        """
        batch, count = self.recipe.batch_size, len(source.train)
        parts = world * self.recipe.accumulate
        if batch % parts:
            raise TrainingError(
                f"batch_size is {batch}, which is no multiple of {world} processes x "
                f"accumulate={self.recipe.accumulate}"
            )
        if batch > count:
            raise TrainingError(
                f"batch_size is {batch}, but {source.name} has {count} images to train on"
            )
        if self.parallel == "fsdp" and self.recipe.ema is not None:
            raise TrainingError(
                "ema: an average of weights that are spread over processes is not supported; use "
                "--parallel ddp, or --set ema=none"
            )


def begin(run: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Takes a folder for a run, or finds the one that is to go on.

    Args:
        run: its folder.
        identity: of the settings, and of the data.
        resume: go on where an earlier run stopped, if there was one.

    Raises:
        TrainingError: the folder holds a run, and `resume` is False; or it holds another run.
    """
    file = run / RUN
    try:
        if file.exists():
            if not resume:
                raise TrainingError(
                    f"--output: '{run}' holds a run; --resume goes on with it, or give another "
                    "folder"
                )
            _compare(file, identity)
            return
        if run.is_dir() and any(run.iterdir()):
            raise TrainingError(f"--output: '{run}' holds other files; give a folder of its own")
        run.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        temporary.rename(file)
    except OSError as error:
        raise TrainingError(f"--output: '{run}' cannot be written ({error.strerror})") from error


def read(run: Path) -> dict[str, Any]:
    """What a run was told.

    Raises:
        TrainingError: the folder holds no run.
    """
    try:
        return json.loads((run / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"'{run}' holds no run ({error})") from error


def _compare(file: Path, identity: dict[str, Any]) -> None:
    found = differences(read(file.parent), json.loads(json.dumps(identity)))
    if found:
        more = f"; {len(found) - 3} more" if len(found) > 3 else ""
        raise TrainingError(
            f"--resume: '{file.parent}' is another run: {'; '.join(found[:3])}{more}"
        )
