"""The error of one to six networks together ([He15] Table 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resnet_fused.models import Ensemble
from resnet_fused.paper import runs as runs_
from resnet_fused.paper.base import Check, Experiment, Finding, Runs, line, panel
from resnet_fused.paper.runs import Job, Run
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import Spread
from resnet_fused.paper.variants import Variant, residual

MOST = 6
"""[He15], section 4.1: six models of different depth."""


def variants(scale: Scale) -> list[Variant]:
    """Residual networks of the scale's depths; more seeds make them six."""
    return [residual(scale, depth) for depth in scale.depths]


def members(networks: Sequence[Variant], runs: Runs) -> list[tuple[Variant, Run]]:
    """Up to six runs, of each depth one before the next seed."""
    seeds = range(min(len(runs[variant.name]) for variant in networks))
    return [(variant, runs[variant.name][seed]) for seed in seeds for variant in networks][:MOST]


def errors(job: Job, chosen: Sequence[tuple[Variant, Run]]) -> tuple[list[float], list[float]]:
    """Test errors of each member alone, and of the first one, two, ... together."""
    models = [runs_.trained(job, variant, run) for variant, run in chosen]
    forwards = [runs_.forward_of(model, job) for model in models]
    size = job.scale.recipe.eval_size or job.scale.recipe.size
    count = len(chosen)
    wrong = torch.zeros(2, count, dtype=torch.float64, device=job.processes.device)
    seen = torch.zeros((), dtype=torch.float64, device=job.processes.device)
    with torch.no_grad():
        for images, labels, _ in runs_.batches_of(job, job.source.val, size):
            if images is None:
                continue
            scores = [forward(images).double() for forward in forwards]
            for i in range(count):
                together = Ensemble.combine(scores[: i + 1])
                wrong[0, i] += (scores[i].argmax(1) != labels).sum()
                wrong[1, i] += (together.argmax(1) != labels).sum()
            seen += len(labels)
    alone, together = (job.processes.sum(wrong) / job.processes.sum(seen)).tolist()
    return alone, together


def judge(job: Job, networks: Sequence[Variant], runs: Runs) -> Finding:
    """More members against one."""
    chosen = members(networks, runs)
    alone, together = errors(job, chosen)
    mean = Spread(tuple(alone)).mean
    names = [f"{variant.label} #{run.seed}" for variant, run in chosen]
    checks = (
        Check(
            "all together are better than their members are on average", together[-1] < mean,
            f"{together[-1]:.2%} against {mean:.2%}",
        ),
        Check(
            "all together are better than the best of them", together[-1] < min(alone),
            f"{together[-1]:.2%} against {min(alone):.2%}",
        ),
    )  # fmt: skip
    if len(chosen) < 2:
        text, shown = "One network alone is no ensemble: more seeds, or more depths.", None
    elif checks[0].holds:
        text = (
            f"{len(chosen)} networks together have {together[-1]:.2%} errors, one of them "
            f"{mean:.2%} on average."
        )
        shown = True
    else:
        text, shown = "This scale does not show it: the ensemble is not better than one.", False
    columns = ("members", "the one that comes in", "alone", "together")
    rows = tuple(
        (str(i + 1), name, f"{alone[i]:.2%}", f"{together[i]:.2%}") for i, name in enumerate(names)
    )
    points = list(range(1, len(chosen) + 1))
    picture = panel(
        "ensembles", "members", "test error, %",
        [
            line("together", [(n, 100 * e) for n, e in zip(points, together, strict=True)], 0),
            line("each alone", [(n, 100 * e) for n, e in zip(points, alone, strict=True)], 1,
                 dashed=True),
        ],
    )  # fmt: skip
    return Finding(
        text, shown, checks, columns, rows, (picture,), {"alone": alone, "together": together},
        (
            "Table 5 reports 3.57% top-5 error on ImageNet's test images for six models, each "
            "tested at five scales; the best of them alone has 4.49% on its validation images "
            "(Table 4).",
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    "ensemble",
    "How much better are several networks together?",
    "Tables 4 and 5; section 4.1",
    "The error of one to six residual networks whose probabilities are averaged.",
    variants,
    judge,
)
