"""Which shortcut: identity, projection where dimensions change, or everywhere ([He15] Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_fused.paper.base import COLUMNS, Check, Experiment, Finding, Runs, curves, table, test
from resnet_fused.paper.runs import Job
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import Spread, above, noise
from resnet_fused.paper.variants import Variant, plain, residual

PUBLISHED = {
    "plain34": "28.54% top-1",
    "resnet34-a": "25.03% top-1",
    "resnet34-b": "24.52% top-1",
    "resnet34-c": "24.19% top-1",
}
"""[He15] Table 3, ImageNet, 10-crop."""
OPTIONS = ("A", "B", "C")


def variants(scale: Scale) -> list[Variant]:
    """The deepest network of the scale, plain and with each option."""
    depth = scale.depths[-1]
    return [plain(scale, depth), *(residual(scale, depth, option) for option in OPTIONS)]


def _order(options: dict[str, Spread]) -> str:
    """Whether the options differ at all."""
    names = sorted(options, key=lambda option: options[option].mean)
    best, worst = names[0], names[-1]
    if above(options[worst], options[best]):
        return f"The best is {best}, the worst {worst}."
    return "Among them none is better beyond the seeds' noise."


def judge(job: Job, networks: Sequence[Variant], runs: Runs) -> Finding:
    """Every option against the plain network, and the options against each other."""
    bare = networks[0]
    base = test(runs[bare.name])
    options = {v.shortcut: test(runs[v.name]) for v in networks[1:]}
    checks = [
        Check(
            f"option {option} is better than no shortcut", above(base, own),
            f"{own.percent()} against {base.percent()}, noise {noise(base, own):.2%}",
        )
        for option, own in options.items()
    ]  # fmt: skip
    means = [own.mean for own in options.values()]
    apart = max(means) - min(means)
    gain = base.mean - max(means)
    close = apart < gain
    checks.append(
        Check(
            "the options differ less among themselves than from no shortcut", close,
            f"{apart:.2%} from the best to the worst, {gain:.2%} from the worst to plain",
        )
    )  # fmt: skip
    better = all(check.holds for check in checks[:-1])
    if better and close:
        text = (
            "Each option is better than no shortcut, by more than they differ among themselves: "
            f"projections are not what cures degradation. {_order(options)}"
        )
    elif better:
        text = "Each option is better than no shortcut, but they differ as much among themselves."
    else:
        worse = [option for option, c in zip(OPTIONS, checks, strict=False) if not c.holds]
        text = (
            f"This scale does not show it: option {' and '.join(worse)} is not better than no "
            "shortcut by more than the seeds' noise."
        )
    return Finding(
        text, better and close, tuple(checks), COLUMNS, table(networks, runs, PUBLISHED),
        curves(networks, runs),
    )  # fmt: skip


EXPERIMENT = Experiment(
    "shortcuts",
    "Which shortcut: identity or projection?",
    "Table 3; section 4.1",
    "Options A (zero-padded identity), B (projection where dimensions change), C (projection "
    "everywhere), and none.",
    variants,
    judge,
)
