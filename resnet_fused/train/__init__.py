"""Training: recipes, the loop, checkpoints, what is written down; one process or many.

The names below are loaded when they are first used: a captured step needs no recipe, whose pydantic
comes with the package's extra `train` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captured import CapturedStep
    from .checkpoint import CheckpointError
    from .processes import ProcessError
    from .recipe import Recipe, RecipeError
    from .settings import Settings, TrainingError
    from .step import Step

__all__ = [
    "CapturedStep",
    "CheckpointError",
    "ProcessError",
    "Recipe",
    "RecipeError",
    "Settings",
    "Step",
    "TrainingError",
]
_HOMES = {
    "CapturedStep": "captured",
    "CheckpointError": "checkpoint",
    "ProcessError": "processes",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "Settings": "settings",
    "Step": "step",
    "TrainingError": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
