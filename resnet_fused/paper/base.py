"""What an experiment is, and what its finding is made of: plain values that a report can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resnet_fused.paper.runs import Job, Run
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import Spread, by_step
from resnet_fused.paper.variants import Variant

Runs = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Check:
    """One thing that the numbers say, or do not.

    Attributes:
        claim: in a sentence.
        holds: None: it cannot be judged here.
        numbers: that decide it.
    """

    claim: str
    holds: bool | None
    numbers: str


@dataclass(frozen=True)
class Finding:
    """What came of an experiment.

    Attributes:
        verdict: in a sentence or two.
        shown: whether what [He15] reports shows here; None: this run cannot tell.
        checks: what the verdict is made of.
        columns: of the table.
        rows: of the table, cells as text.
        panels: of the picture; see `curves`.
        values: further numbers, for --json.
        notes: what a reader ought to know.
    """

    verdict: str
    shown: bool | None
    checks: tuple[Check, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    panels: tuple[dict[str, Any], ...]
    values: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        name: of the command.
        title: for readers.
        source: where [He15] has it.
        question: that it answers.
        variants: the networks of a scale.
        judge: what the runs of them say.
    """

    name: str
    title: str
    source: str
    question: str
    variants: Callable[[Scale], list[Variant]]
    judge: Callable[[Job, Sequence[Variant], Runs], Finding]


def training(runs: Sequence[Run]) -> Spread:
    """The training errors of one variant."""
    return Spread(tuple(run.train_error for run in runs))


def test(runs: Sequence[Run]) -> Spread:
    """The test errors of one variant."""
    return Spread(tuple(run.test_error for run in runs))


COLUMNS = ("network", "layers", "parameters", "training error", "test error", "paper")


def table(
    variants: Sequence[Variant], runs: Runs, published: Mapping[str, str]
) -> tuple[tuple[str, ...], ...]:
    """A row a variant, under `COLUMNS`.

    Args:
        variants: in order.
        runs: theirs.
        published: what [He15] reports, by the variant's name.
    """
    return tuple(
        (
            variant.label, str(variant.depth), f"{runs[variant.name][0].parameters:,}",
            training(runs[variant.name]).percent(), test(runs[variant.name]).percent(),
            published.get(variant.name, "none"),
        )
        for variant in variants
    )  # fmt: skip


def line(
    label: str, points: Sequence[Sequence[float]], colour: int, *, dashed: bool = False
) -> dict[str, Any]:
    """A line of a panel.

    Args:
        label: for the legend; "": not there.
        points: (x, y) or (x, y, least, most).
        colour: number of its colour.
        dashed: or whole.
    """
    return {
        "label": label, "points": [list(p) for p in points], "colour": colour, "dashed": dashed
    }  # fmt: skip


def panel(title: str, x: str, y: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An axis of the picture."""
    return {"title": title, "x": x, "y": y, "lines": list(lines)}


def curves(variants: Sequence[Variant], runs: Runs) -> tuple[dict[str, Any], ...]:
    """Errors over the iterations, an axis a group, as in [He15] figures 1, 4 and 6.

    Dashed: training, as augmented; whole: test. Bands are from the least to the most of the seeds.
    """
    found = []
    for group in dict.fromkeys(variant.group for variant in variants):
        lines = []
        for colour, variant in enumerate(v for v in variants if v.group == group):
            own = runs[variant.name]
            kinds = (("train_curve", True), ("test_curve", False))
            for kind, dashed in kinds:
                points = by_step([getattr(run, kind) for run in own])
                scaled = [(step, *(100 * value for value in rest)) for step, *rest in points]
                lines.append(line("" if dashed else variant.label, scaled, colour, dashed=dashed))
        found.append(panel(group, "iterations", "error, %", lines))
    return tuple(found)
