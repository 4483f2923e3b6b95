"""The optimizer of a recipe, and its learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resnet_fused.train import recipe as recipes


def build(model: nn.Module, settings: recipes.Optimizer, *, fused: bool = False) -> Optimizer:
    """Makes the optimizer of a model's parameters.

    Args:
        model: on its device already.
        settings: of the recipe.
        fused: take PyTorch's fused implementation, where there is one.
    """
    decayed, plain = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            weight = name == "weight" and isinstance(module, nn.Conv2d | nn.Linear)
            (decayed if weight or settings.decay_all else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused or None)
    if settings.name == "lars":
        from timm.optim import Lars

        return Lars(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov,
        fused=fused or None,
    )  # fmt: skip


def factor(schedule: recipes.Schedule, step: int, in_epoch: int, steps: int) -> float:
    """The learning rate at a step, as a factor of the optimizer's.

    Args:
        schedule: of the recipe.
        step: from 0 on.
        in_epoch: steps of an epoch.
        steps: of the run.
    """
    warmup = schedule.warmup_steps
    warmup = schedule.warmup_epochs * in_epoch if warmup is None else warmup
    if step < warmup and schedule.warmup == "constant":
        return schedule.warmup_start
    if step < warmup:
        return schedule.warmup_start + (1 - schedule.warmup_start) * (step + 1) / (warmup + 1)
    if schedule.name == "step":
        places = [epochs * in_epoch for epochs in schedule.milestones]
        passed = sum(step >= place for place in (*places, *schedule.milestone_steps))
        return schedule.gamma**passed
    if schedule.name == "cosine":
        done = (step - warmup) / max(steps - warmup, 1)
        return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


class Plateau:
    """A factor of the learning rate that falls where the error of tests no longer does.

    By PyTorch's `ReduceLROnPlateau`, upon an optimizer of nothing: the run's own has its rate set
    at each step.

    Args:
        schedule: of the recipe.
    """

    def __init__(self, schedule: recipes.Schedule) -> None:
        self._holder = torch.optim.SGD([torch.zeros(())], lr=1.0)
        self._rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder, factor=schedule.gamma, patience=schedule.patience,
            threshold=schedule.threshold, threshold_mode="abs", eps=0.0,
        )  # fmt: skip

    @property
    def factor(self) -> float:
        """Of the rate, now."""
        return self._holder.param_groups[0]["lr"]

    def tested(self, error: float) -> None:
        """Takes in the error of a test."""
        self._rule.step(error)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"factor": self.factor, "rule": self._rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self._holder.param_groups[0]["lr"] = state["factor"]
        self._rule.load_state_dict(state["rule"])


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
