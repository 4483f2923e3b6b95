"""Basic blocks against bottlenecks at equal cost ([He15] figure 5; Tables 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused.convert import unfuse
from resnet_fused.paper.base import COLUMNS, Check, Experiment, Finding, Runs, curves, table, test
from resnet_fused.paper.runs import Job
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import above, noise
from resnet_fused.paper.variants import Variant, residual

EQUAL = 0.1
"""Share by which multiply-adds may differ and be called equal: [He15] has 3.6e9 and 3.8e9."""
PUBLISHED = {"resnet34-b": "24.52% top-1", "resnet50": "22.85% top-1"}
"""[He15] Table 3, ImageNet, 10-crop."""


def variants(scale: Scale) -> list[Variant]:
    """As many blocks of either kind: a bottleneck costs what a basic block does."""
    if scale.family == "imagenet":
        return [residual(scale, 34, "B"), residual(scale, 50)]
    basic = residual(scale, scale.depths[0])
    depth = (basic.depth - 2) // 6 * 9 + 2
    wide = Variant(
        f"bottleneck{depth}", f"ResNet-{depth}, bottlenecks", basic.group, depth, "A", True
    )
    return [basic, wide]


def multiply_adds(job: Job, variant: Variant) -> float:
    """Of one image of the size that is trained on."""
    size = job.scale.recipe.size
    with torch.device("meta"):
        model = unfuse(variant.build(job.scale, job.source)).eval()
        x = torch.empty(1, model.conv1.in_channels, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2


def judge(job: Job, networks: Sequence[Variant], runs: Runs) -> Finding:
    """Costs, then errors."""
    basic, wide = networks
    costs = [multiply_adds(job, variant) for variant in networks]
    ratio = costs[1] / costs[0]
    errors = [test(runs[variant.name]) for variant in networks]
    checks = (
        Check(
            f"both cost the same within {EQUAL:.0%}", abs(ratio - 1) <= EQUAL,
            f"{costs[1] / 1e6:,.2f} against {costs[0] / 1e6:,.2f} million multiply-adds an image",
        ),
        Check(
            "bottlenecks, with half as many layers again, have the lower test error",
            above(errors[0], errors[1]),
            f"{errors[1].percent()} against {errors[0].percent()}, noise {noise(*errors):.2%}",
        ),
    )  # fmt: skip
    if checks[1].holds:
        text = f"Bottlenecks are better at equal cost: {wide.depth} layers against {basic.depth}."
    elif above(errors[1], errors[0]):
        text = "At this scale basic blocks are better at equal cost."
    else:
        text = "This scale does not show a difference beyond the seeds' noise."
    return Finding(
        text, bool(checks[1].holds) and bool(checks[0].holds), checks,
        (*COLUMNS, "million multiply-adds"),
        tuple(
            (*row, f"{cost / 1e6:,.2f}")
            for row, cost in zip(table(networks, runs, PUBLISHED), costs, strict=True)
        ),
        curves(networks, runs),
        {"multiply_adds": {v.name: c for v, c in zip(networks, costs, strict=True)}},
    )  # fmt: skip


EXPERIMENT = Experiment(
    "bottleneck",
    "Basic blocks or bottlenecks, at equal cost?",
    "Figure 5; Tables 1 and 3",
    "As many blocks of two 3x3 convolutions as of 1x1, 3x3, 1x1: which has the lower error?",
    variants,
    judge,
)
