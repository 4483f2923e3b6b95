"""Made-up and very short runs of the paper's experiments, for the tests."""

from __future__ import annotations

from pathlib import Path

import torch

from resnet_fused.data.sources import open_source
from resnet_fused.paper import scale_of
from resnet_fused.paper.runs import Job, Run
from resnet_fused.train.processes import Processes

CPU = torch.device("cpu")
SHORT = (
    "iterations=5", "batch_size=96", "schedule.milestone_steps=[3]", "eval_resize=8"
)  # fmt: skip


def job(folder: Path, **changes) -> Job:
    """Networks of 8 and 14 layers, two seeds, five steps of the digits."""
    told = {"seeds": 2, "depths": (8, 14), "changes": SHORT, **changes}
    scale = scale_of("digits", "tiny", **told)
    return Job(scale, open_source("digits"), Processes(0, 1, CPU), folder)


def made_up(name: str, train: list[float], test: list[float] | None = None) -> list[Run]:
    """Runs of these errors, a seed each."""
    pairs = zip(train, test or train, strict=True)
    return [
        Run(name, seed, 9, a, b, 1000, f"runs/{name}-seed{seed}", ((3, a), (9, a)), ((9, b),))
        for seed, (a, b) in enumerate(pairs)
    ]
