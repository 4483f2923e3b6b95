"""Deeper plain networks learn less well; deeper residual ones do not ([He15] figures 1, 4, 6)."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_fused.paper.base import (
    COLUMNS,
    Check,
    Experiment,
    Finding,
    Runs,
    curves,
    table,
    test,
    training,
)
from resnet_fused.paper.runs import Job
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import above, noise
from resnet_fused.paper.variants import Variant, plain, residual

LEARNT = 0.05
"""Training error that the shallowest plain network must fall below before depths are compared."""

PUBLISHED = {
    "cifar": {
        "resnet20": "8.75% test", "resnet32": "7.51% test", "resnet44": "7.17% test",
        "resnet56": "6.97% test", "resnet110": "6.43% test",
        "plain110": "over 60% training",
    },
    "imagenet": {
        "plain18": "27.94% top-1", "plain34": "28.54% top-1",
        "resnet18": "27.88% top-1", "resnet34": "25.03% top-1",
    },
}  # fmt: skip
"""[He15] Table 6 and section 4.2 for CIFAR-10; Table 2 (10-crop) for ImageNet."""


def variants(scale: Scale) -> list[Variant]:
    """Plain and residual networks of each depth."""
    return [make(scale, depth) for make in (plain, residual) for depth in scale.depths]


def judge(job: Job, networks: Sequence[Variant], runs: Runs) -> Finding:
    """Compares the shallowest with the deepest, without shortcuts and with them."""
    low, high = job.scale.depths[0], job.scale.depths[-1]
    plain_low, plain_high = (training(runs[f"plain{depth}"]) for depth in (low, high))
    res_low, res_high = (training(runs[f"resnet{depth}"]) for depth in (low, high))
    learnt = plain_low.mean < LEARNT
    checks = [
        Check(
            f"plain-{low} has learnt: a training error below {LEARNT:.0%}", learnt,
            plain_low.percent(),
        ),
        Check(
            f"plain-{high} has a higher training error than plain-{low}",
            above(plain_high, plain_low) if learnt and low < high else None,
            f"{plain_high.percent()} against {plain_low.percent()}, noise "
            f"{noise(plain_high, plain_low):.2%}",
        ),
        Check(
            f"ResNet-{high} has no higher training error than ResNet-{low}",
            not above(res_high, res_low) if learnt and low < high else None,
            f"{res_high.percent()} against {res_low.percent()}, noise "
            f"{noise(res_high, res_low):.2%}",
        ),
    ]  # fmt: skip
    text, shown = _verdict(checks, low, high)
    tests = {name: test(own).mean for name, own in runs.items()}
    return Finding(
        text, shown, tuple(checks), COLUMNS,
        table(networks, runs, PUBLISHED[job.scale.family]), curves(networks, runs),
        {"test_errors": tests},
        ("Training errors are of the training images without augmentation, behind the last step.",),
    )  # fmt: skip


def _verdict(checks: Sequence[Check], low: int, high: int) -> tuple[str, bool | None]:
    learnt, degrades, cured = (check.holds for check in checks)
    if low == high:
        return "One depth alone: nothing can be compared.", None
    if not learnt:
        return (
            f"Too short: plain-{low} has not come below {LEARNT:.0%} training error "
            f"({checks[0].numbers}), so that depth cannot be told from a run that is not over.",
            None,
        )
    if degrades and cured:
        return (
            f"Degradation shows: {high} plain layers fit the training images worse than {low}, and "
            f"with shortcuts they do not.",
            True,
        )
    what = []
    if not degrades:
        what.append(f"plain-{high} is not above plain-{low} by more than the seeds' noise")
    if not cured:
        what.append(f"ResNet-{high} is above ResNet-{low}")
    return f"This scale does not show it: {', and '.join(what)}.", False


EXPERIMENT = Experiment(
    "degradation",
    "Does depth hurt without shortcuts?",
    "Figures 1, 4 and 6; Table 2; section 4.2",
    "Plain against residual networks of rising depth: training and test error.",
    variants,
    judge,
)
