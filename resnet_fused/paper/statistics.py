"""What several seeds say: means, spreads, and whether one lies above another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (of a sample); None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def percent(self) -> str:
        """As a share: "8.75%", or "8.75% ± 0.12"."""
        if self.deviation is None:
            return f"{self.mean:.2%}"
        return f"{self.mean:.2%} \N{PLUS-MINUS SIGN} {100 * self.deviation:.2f}"


def noise(a: Spread, b: Spread) -> float:
    """Two standard errors of the difference of two means; 0 where nobody knows them.

    Args:
        a: of some seeds.
        b: of as many, or of others.
    """
    parts = [each.deviation**2 / len(each.values) for each in (a, b) if each.deviation is not None]
    return 2 * math.sqrt(sum(parts))


def above(a: Spread, b: Spread) -> bool:
    """Whether a's mean lies above b's by more than the seeds' noise."""
    return a.mean - b.mean > noise(a, b)


def by_step(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float, float, float]]:
    """Curves of several seeds as one: (step, mean, least, most) of each step that all of them have.

    Args:
        curves: (step, value) of each seed.
    """
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    found = []
    for step in steps:
        values = [table[step] for table in tables]
        found.append((step, statistics.fmean(values), min(values), max(values)))
    return found
