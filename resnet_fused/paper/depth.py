"""Errors of residual networks of rising depth ([He15] Table 6)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from resnet_fused.paper import degradation
from resnet_fused.paper.base import COLUMNS, Check, Experiment, Finding, Runs, curves, table, test
from resnet_fused.paper.runs import Job
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import above, noise
from resnet_fused.paper.variants import Variant, residual

_EXTRA = {"cifar": 32, "imagenet": 50}
"""Between the depths of a scale that has two, or beyond them: a row has three points at least."""


def variants(scale: Scale) -> list[Variant]:
    """Residual networks alone."""
    depths = scale.depths
    if len(depths) == 2:
        depths = tuple(sorted({*depths, _EXTRA[scale.family]}))
    return [residual(scale, depth) for depth in depths]


def judge(job: Job, networks: Sequence[Variant], runs: Runs) -> Finding:
    """Each depth against the one before it."""
    checks = []
    for before, after in itertools.pairwise(networks):
        old, new = test(runs[before.name]), test(runs[after.name])
        checks.append(
            Check(
                f"{after.label} has no higher test error than {before.label}", not above(new, old),
                f"{new.percent()} against {old.percent()}, noise {noise(new, old):.2%}",
            )
        )  # fmt: skip
    first, last = test(runs[networks[0].name]), test(runs[networks[-1].name])
    gains = above(first, last)
    checks.append(
        Check(
            f"{networks[-1].label} has a lower test error than {networks[0].label}", gains,
            f"{last.percent()} against {first.percent()}, noise {noise(first, last):.2%}",
        )
    )  # fmt: skip
    if gains and all(check.holds for check in checks):
        text, shown = "Depth pays: the deepest is the best, and no step towards it hurts.", True
    elif not checks[-1].holds and all(check.holds for check in checks[:-1]):
        text = "Depth does not hurt; that it pays does not show beyond the seeds' noise."
        shown = False
    else:
        worse = [c.claim for c in checks[:-1] if not c.holds]
        text = f"This scale does not show it. What does not hold: {'; '.join(worse)}."
        shown = False
    published = {**degradation.PUBLISHED[job.scale.family], "resnet1202": "7.93% test"}
    if job.scale.family == "imagenet":
        published |= {"resnet50": "22.85% top-1", "resnet101": "21.75% top-1",
                      "resnet152": "21.43% top-1"}  # fmt: skip
    return Finding(
        text, shown, tuple(checks), COLUMNS, table(networks, runs, published),
        curves(networks, runs),
    )  # fmt: skip


EXPERIMENT = Experiment(
    "depth",
    "Does depth pay?",
    "Tables 3 and 6; section 4.2",
    "Residual networks of rising depth: error and parameters.",
    variants,
    judge,
)
