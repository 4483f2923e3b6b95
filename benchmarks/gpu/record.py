"""The one JSON that a check writes, whole after every step, and the clock that it runs under."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resnet_fused.bench.plain import plain

SCHEMA = 1  # raised when a field changes its meaning
RESERVE_S = 20.0  # the check ends so long before its minutes do
MESSAGE_LENGTH = 600
FIELDS = ("name", "ok", "seconds", "error", "skipped", "cut")


class Clock:
    """The check's time: when it ends, and how much of the rest a stage gets.

    Args:
        minutes: for everything; the check ends RESERVE_S before, of short ones at half.
        now: seconds, monotonic.
        started: a reading of `now` at which the time began; None for this moment.
    """

    def __init__(
        self,
        minutes: float,
        now: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        self.now = now
        self.start = now() if started is None else started
        self.end = self.start + max(60 * minutes - RESERVE_S, 30 * minutes)

    @property
    def left(self) -> float:
        """Seconds to the end; 0 when it has come."""
        return max(0.0, self.end - self.now())

    def deadline(self, stage: str, shares: Mapping[str, float]) -> float:
        """When a stage has to end: its share of what is left for it and the stages behind it.

        A stage that needs less leaves the rest to those that follow.

        Args:
            stage: one of `shares`.
            shares: stage -> its part of the time, in order.
        """
        names = list(shares)
        following = names[names.index(stage) :]
        part = shares[stage] / sum(shares[name] for name in following)
        return self.now() + part * self.left


def write_atomically(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file so that a reader finds the old content or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        text = json.dumps(plain(content, words=True), allow_nan=False, indent=1)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def one_line(text: str) -> str:
    """Text on one line, of a length that a record can bear."""
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 3] + "..."


class Record:
    """What a check has found so far.

    Args:
        file: where it is written, after every change.
        about: fields that head it.
        clock: gives the seconds.
        say: prints a line.
    """

    def __init__(
        self, file: Path, about: Mapping[str, Any], clock: Clock, say: Callable[[str], None]
    ) -> None:
        self.file, self._clock, self._say = file, clock, say
        self._open: str | None = None
        self._since = clock.now()
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "gpu-check",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **about,
            "ok": True,
            "complete": False,
            "seconds": 0.0,
            "stages": {},
            "admission": [],
        }

    @property
    def ok(self) -> bool:
        """Whether nothing that ran has failed."""
        return self.content["ok"]

    def write(self) -> None:
        """Writes the file."""
        self.content["seconds"] = round(self._clock.now() - self._clock.start, 2)
        if self._open is not None:
            stage = self.content["stages"][self._open]
            stage["seconds"] = round(self._clock.now() - self._since, 2)
        write_atomically(self.file, self.content)

    def begin(self, stage: str, steps: int) -> None:
        """Opens a stage that has so many steps."""
        self._open, self._since = stage, self._clock.now()
        self.content["stages"][stage] = {
            "reached": 0, "of": steps, "failed": 0, "skipped": 0, "cut": None, "seconds": 0.0,
            "steps": [],
        }  # fmt: skip
        self._say(f"== {stage}: {steps} steps, {self._clock.left:.0f} s left")
        self.write()

    def more(self, steps: int) -> None:
        """Adds to the number of steps of the open stage."""
        self.content["stages"][self._open]["of"] += steps

    def step(self, name: str, found: Mapping[str, Any], line: str = "") -> None:
        """Enters a step of the open stage.

        Args:
            name: of the step.
            found: with "ok": True, False, or None for one that was skipped ("skipped" says why).
            line: what to print behind the name; errors and reasons are printed by themselves.
        """
        stage = self.content["stages"][self._open]
        entry = {"name": name, **found}
        stage["steps"].append(entry)
        stage["reached"] += 1
        ok = entry.get("ok")
        stage["failed"] += ok is False
        stage["skipped"] += ok is None
        if ok is False:
            self.content["ok"] = False
        word = "skip" if ok is None else "ok  " if ok else "FAIL"
        about = entry.get("error") or entry.get("skipped") or ""
        text = one_line(f"{line} {about}")
        if ok is not True or line:
            self._say(f"{word} {name}: {text}"[:200] if text else f"{word} {name}")
        self.write()

    def end(self, cut: str | None = None) -> None:
        """Closes the open stage; `cut` says why it was not finished."""
        stage = self.content["stages"][self._open]
        stage["seconds"] = round(self._clock.now() - self._since, 2)
        if stage["reached"] < stage["of"] or cut:
            stage["cut"] = cut or "not all steps ran"
        self._say(
            f"-- {self._open}: {stage['reached']} of {stage['of']} steps, "
            f"{stage['failed']} failed, "
            f"{stage['skipped']} skipped, {stage['seconds']:.0f} s"
            + (f"; cut: {stage['cut']}" if stage["cut"] else "")
        )
        self._open = None
        self.write()

    def fail(self, reason: str) -> None:
        """Notes that the check itself went wrong."""
        self.content["ok"] = False
        self.content.setdefault("problems", []).append(one_line(reason))
        self._say(f"FAIL {one_line(reason)}"[:400])
        self.write()

    def finish(self) -> None:
        """Notes that every stage that was asked for has had its turn."""
        self.content["complete"] = all(
            stage["cut"] is None for stage in self.content["stages"].values()
        )
        self.write()
