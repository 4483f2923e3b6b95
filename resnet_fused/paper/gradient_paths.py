"""Do shortcuts help because gradients travel them, or because a residual is easier to learn?

[He15] section 4.1 argues that vanishing gradients are not what makes plain networks hard to train.
Here each of the two is taken away alone: a shortcut that is added in the forward pass while its
gradient is cut, and one that carries the gradient alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from resnet_fused.nn import BasicBlock, Bottleneck
from resnet_fused.paper.base import (
    COLUMNS,
    Check,
    Experiment,
    Finding,
    Runs,
    curves,
    table,
    training,
)
from resnet_fused.paper.runs import Job
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import above, noise
from resnet_fused.paper.variants import Variant, plain, residual


class ForwardOnly(nn.Module):
    """A shortcut that is added, and lets no gradient through.

    Args:
        shortcut: whose output it takes; None: the identity.
    """

    def __init__(self, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The shortcut of x [N, C, H, W], detached."""
        return self.shortcut(x).detach()


class BackwardOnly(nn.Module):
    """A shortcut that adds nothing, and lets the gradient through as if it had.

    Args:
        shortcut: whose gradient it takes; None: the identity.
    """

    def __init__(self, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the shortcut's shape, whose gradient is the shortcut's."""
        y = self.shortcut(x)
        return y - y.detach()


WAYS: dict[str, tuple[str, type[nn.Module]]] = {
    "forward": ("added, its gradient cut", ForwardOnly),
    "backward": ("gradient alone, nothing added", BackwardOnly),
}


def variants(scale: Scale) -> list[Variant]:
    """Networks of the greatest depth: residual, plain, and either half of a shortcut."""
    depth = scale.depths[-1]
    whole = residual(scale, depth)
    return [whole, plain(scale, depth), *(_half(whole, way) for way in WAYS)]


def _half(whole: Variant, way: str) -> Variant:
    what, module = WAYS[way]

    def change(model: nn.Module) -> None:
        for block in model.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                block.downsample = module(block.downsample)

    return replace(
        whole, name=f"{whole.name}-{way}", label=f"{whole.label}, {what}", group=f"{way} alone",
        change=change,
    )  # fmt: skip


def judge(job: Job, networks: Sequence[Variant], runs: Runs) -> Finding:
    """How much of the gap between plain and residual either half closes."""
    names = [variant.name for variant in networks]
    whole, bare, forward, backward = (training(runs[name]) for name in names)
    gap = bare.mean - whole.mean
    shares = {way: (bare.mean - each.mean) / gap if gap else None
              for way, each in (("forward", forward), ("backward", backward))}  # fmt: skip
    differ = above(bare, whole)

    def beats(each: object, what: str) -> Check:
        return Check(
            what, above(bare, each) if differ else None,
            f"{each.percent()} against {bare.percent()}, noise {noise(bare, each):.2%}",
        )  # fmt: skip

    checks = (
        Check(
            "the residual network has a lower training error than the plain one", differ,
            f"{whole.percent()} against {bare.percent()}, noise {noise(bare, whole):.2%}",
        ),
        beats(forward, "the add without its gradient is better than no shortcut"),
        beats(backward, "the gradient without the add is better than no shortcut"),
        Check(
            "one half is better than the other",
            above(forward, backward) or above(backward, forward) if differ else None,
            f"{forward.percent()} against {backward.percent()}, "
            f"noise {noise(forward, backward):.2%}",
        ),
    )  # fmt: skip
    if not differ:
        text = (
            "This scale cannot tell: the residual network is not better than the plain one by more "
            "than the seeds' noise."
        )
        return _finding(text, None, checks, networks, runs, shares)
    return _finding(*_halves(checks, shares), checks, networks, runs, shares)


def _halves(
    checks: Sequence[Check], shares: dict[str, float | None]
) -> tuple[str, bool | None]:  # fmt: skip
    """What is to be said of the two halves where there is a gap, and whether it is an answer."""
    names = {"forward": "the add alone", "backward": "the gradient alone"}
    closed = {way: f"{name} closes {shares[way]:.0%} of the gap" for way, name in names.items()}
    helping = [way for way, check in zip(names, checks[1:3], strict=True) if check.holds]
    if not helping:
        return "Neither half helps alone: a shortcut needs both.", True
    if len(helping) == 2:
        return f"Both halves help: {closed['forward']}, {closed['backward']}.", True
    (way,) = helping
    other = "backward" if way == "forward" else "forward"
    if not checks[3].holds:
        text = (
            f"Which half it is cannot be told here: {closed[way]}, and {names[other]} "
            f"{shares[other]:.0%}, within the seeds' noise of no shortcut and of the other half."
        )
        return text, None
    text = (
        f"Here it is {names[way]} that helps: {closed[way]}, and the other half does not help "
        "beyond the seeds' noise."
    )
    return text, True


def _finding(
    text: str, shown: bool | None, checks: tuple[Check, ...], networks: Sequence[Variant],
    runs: Runs, shares: dict[str, float | None],
) -> Finding:  # fmt: skip
    return Finding(
        text, shown, checks, COLUMNS, table(networks, runs, {}), curves(networks, runs),
        {"share_of_the_gap": shares},
        (
            "The paper has no such experiment: section 4.1 argues from the gradients' norms that "
            "they do not vanish in plain networks with BatchNorm.",
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    "gradient-paths",
    "Does the gradient's path help, or the residual?",
    "Section 4.1, the readers' question",
    "The forward add kept and the gradient through the shortcut cut, and the converse, beside "
    "residual and plain networks.",
    variants,
    judge,
)
