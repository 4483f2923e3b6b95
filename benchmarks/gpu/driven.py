"""The steps of gpu-record that are calls of the driver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import ceilings, one_launch, plan_spanning
from gpu.pool import Pool, Task
from gpu.record import Record


class Driven:
    """Beside what a check has: its record, its worker processes and its way to run a stage."""

    record: Record

    def pool(self, count: int | None = None) -> Pool:
        """The worker processes."""
        raise NotImplementedError

    def _stage(self, name: str, tasks: Sequence[Task], until: float, report: Any) -> None:
        raise NotImplementedError

    def ceilings(self, until: float) -> None:
        """What a multiprocessor reads, multiplies and waits for, beside what plans count with."""
        self._driven("ceilings", plan_spanning.ceilings, ceilings.line, until)

    def one_launch(self, until: float) -> None:
        """A network's convolutions in one launch, beside graphs of single kernels."""
        self._driven("one_launch", plan_spanning.one_launch, one_launch.line, until)

    def _driven(self, name: str, tasks: Any, line: Any, until: float) -> None:
        def report(task: Task, one: dict[str, Any]) -> None:
            self.record.step(task.name, one, line(one))

        program = self._driver(until)
        self.pool(1)
        self._stage(name, tasks(None if program is None else str(program)), until, report)

    def _driver(self, until: float) -> Path | None:
        """The driver that was given or built; None for whatever lies there."""
        return None
