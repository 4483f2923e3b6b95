"""The experiments by name, and how one is run: train, judge, record."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from resnet_fused.bench import record
from resnet_fused.paper import (
    bottleneck,
    degradation,
    depth,
    ensemble,
    gradient_paths,
    responses,
    shortcuts,
)
from resnet_fused.paper.base import Experiment
from resnet_fused.paper.runs import Job, every, step_seconds

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        degradation, shortcuts, bottleneck, responses, depth, ensemble, gradient_paths
    )
}  # fmt: skip
"""By the command's names."""


def run(experiment: Experiment, job: Job) -> dict[str, Any]:
    """Trains what is not trained yet, and says what came of it.

    Args:
        experiment: of `EXPERIMENTS`.
        job: scale, data, folder.

    Returns:
        Plain values: what the page shows and --json prints. All processes have the same.

    Raises:
        Stopped: a signal came; the same call goes on.
        TrainingError, CheckpointError, ImageError, ValueError: see `runs.train`.
    """
    begun, commit = time.perf_counter(), record.commit()
    networks = experiment.variants(job.scale)
    runs = every(job, networks)
    finding = experiment.judge(job, networks, runs)
    every_run = [r for variant in networks for r in runs[variant.name]]
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "question": experiment.question,
        "scale": job.scale.record(),
        "impl": job.impl,
        "torch": torch.__version__,
        "commit": commit,
        "machine": {"cpu": record.cpu_name(), "threads": torch.get_num_threads()},
        "device": _device(job.processes.device),
        "processes": job.processes.world,
        "images": {"train": len(job.source.train), "test": len(job.source.val)},
        "seconds": time.perf_counter() - begun,
        "step_seconds": sum(step_seconds(job.folder / r.folder) for r in every_run),
        **asdict(finding),
        "runs": [
            {k: v for k, v in asdict(r).items() if not k.endswith("curve")} for r in every_run
        ],
    }  # fmt: skip


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
