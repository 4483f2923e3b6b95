"""Where a step's time goes: waiting for data, forward, backward, optimizer, a graph's replay.

On a GPU the work of a phase ends long after the call that asked for it. There events are recorded
on the stream, and read when all of them have passed; the host never waits for one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

PHASES = ("data", "forward", "backward", "optimizer", "replay")
"""Of a captured step there is "replay" alone: forward, backward and optimizer are one launch."""


class Phases:
    """Adds up the seconds of each phase.

    "data" is what the host waits for a batch and asks for its copy: on a GPU it costs only where
    the GPU has nothing else left to do. `starved` says how much of the time that was.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begun = time.perf_counter()
        self._images = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside belongs to this phase."""
        if not self._cuda or name == "data":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        yield
        end_event.record()
        self._events.append((name, start_event, end_event))

    def add_images(self, count: int) -> None:
        """Counts images that were trained on."""
        self._images += count

    def take(self) -> dict[str, float]:
        """Seconds of each phase and of everything, and images a second; begins anew.

        Waits for the GPU: call it where its results are wanted anyway.
        """
        if self._cuda:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1e3
        now = time.perf_counter()
        seconds, images = now - self._begun, self._images
        found = {**self._seconds, "seconds": seconds, "images_per_second": images / seconds}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events.clear()
        self._begun, self._images = now, 0
        return found


def starved(timing: dict[str, float], share: float = 0.1) -> str | None:
    """What to say where the network waits for its images; None where it does not.

    Args:
        timing: of `Phases.take`, or sums of several.
        share: of the time, from which on it is said.
    """
    waited = timing["data"] / timing["seconds"] if timing["seconds"] else 0.0
    if waited < share:
        return None
    return (
        f"{waited:.0%} of the time went into waiting for images: more --workers, or smaller files"
    )
