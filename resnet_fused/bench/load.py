"""How much of the machine other programs used while something was timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

LIMIT = 0.05  # of all cores; above it a ratio says more about the neighbours than about the code
# The kernel counts CPU time in ticks of 10 ms, so a shorter run cannot show a load of 5%.
SHORTEST_S = 0.5


@dataclass(frozen=True)
class CpuTimes:
    """A reading of the clocks, all in seconds.

    Attributes:
        wall: a monotonic clock.
        busy: time that all cores together were busy, for whomever (steal included: time that a
            hypervisor gave to another guest is lost to this program too).
        own: CPU time of this process and of its children and theirs, ended or alive.
    """

    wall: float
    busy: float
    own: float


@dataclass(frozen=True)
class Load:
    """The load between two readings, as fractions of all cores.

    Attributes:
        foreign: what other programs used.
        own: what this process used.
        cores: number of logical cores.
        seconds: length of the measurement.
        limit: the foreign load above which no verdict is given.
    """

    foreign: float
    own: float
    cores: int
    seconds: float
    limit: float = LIMIT

    @property
    def quiet(self) -> bool:
        """Whether the foreign load was measured and is at most the limit."""
        return self.refusal is None

    @property
    def refusal(self) -> str | None:
        """Why no verdict can be given, or None when one can."""
        if self.seconds < SHORTEST_S:
            return (
                f"the run took {self.seconds:.2f} s, too short to measure the machine's load "
                f"(at least {SHORTEST_S} s)"
            )
        if self.foreign > self.limit:
            return (
                f"other programs used {self.foreign:.1%} of the {self.cores} cores "
                f"(limit {self.limit:.0%})"
            )
        return None

    def to_dict(self) -> dict[str, float | int | bool]:
        """The fields and the outcome, for JSON."""
        return {**asdict(self), "quiet": self.quiet}


def read_cpu_times() -> CpuTimes:
    """Reads the clocks of the machine and of this process."""
    system = psutil.cpu_times()
    # guest time is contained in user time (Linux), so it is not added again.
    names = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
    busy = sum(getattr(system, name, 0.0) for name in names)
    mine = psutil.Process().cpu_times()
    own = _with_ended(mine)
    for child in psutil.Process().children(recursive=True):
        # One that has ended meanwhile is in its parent's count of ended children.
        with contextlib.suppress(psutil.Error):
            own += _with_ended(child.cpu_times())
    return CpuTimes(time.perf_counter(), busy, own)


def _with_ended(times: Any) -> float:
    """CPU time of a process, and of those of its children that have ended, where it is known."""
    names = ("user", "system", "children_user", "children_system")
    return sum(getattr(times, name, 0.0) for name in names)


class LoadMeter:
    """Measures the load from its creation to `read`.

    Args:
        cores: number of logical cores; None asks the machine.
        reader: returns the clocks (a test gives its own).
    """

    def __init__(
        self, cores: int | None = None, reader: Callable[[], CpuTimes] = read_cpu_times
    ) -> None:
        self._cores = cores or psutil.cpu_count() or 1
        self._reader = reader
        self._start = reader()

    def read(self) -> Load:
        """The load since the meter was made."""
        now = self._reader()
        seconds = now.wall - self._start.wall
        capacity = max(seconds * self._cores, 1e-9)
        own = now.own - self._start.own
        # Both counters are rounded to ticks, so a small difference may come out below zero.
        foreign = max(0.0, now.busy - self._start.busy - own)
        return Load(foreign / capacity, own / capacity, self._cores, seconds)
