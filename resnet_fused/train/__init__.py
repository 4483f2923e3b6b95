"""Training: recipes, the loop, checkpoints, what is written down; one process or many."""

from resnet_fused.train.captured import CapturedStep
from resnet_fused.train.checkpoint import CheckpointError
from resnet_fused.train.processes import ProcessError
from resnet_fused.train.recipe import Recipe, RecipeError
from resnet_fused.train.settings import Settings, TrainingError
from resnet_fused.train.step import Step

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
