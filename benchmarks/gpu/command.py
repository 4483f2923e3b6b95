"""A command as a step: a child that leads a session, with a time limit and a log of its own."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.pool import ROOT, environment, kill

TAIL = 1500
_running: set[subprocess.Popen[Any]] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Ran:
    """How a command ended.

    Attributes:
        code: its exit code; None if it was cut by its limit.
        seconds: that it took.
        text: everything that it printed.
    """

    code: int | None
    seconds: float
    text: str

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        return self.text[-TAIL:]


def path(text: str) -> Path:
    """A path of the command line: children run in the checkout, wherever this process runs."""
    return Path(text).absolute()


class Child:
    """A command under way.

    Args:
        command: program and arguments.
        log: file that gets what it prints.
        extra: environment variables beside those of `pool.environment`.
    """

    def __init__(
        self, command: Sequence[str], log: Path, extra: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self._start = log, time.monotonic()
        self._failure: str | None = None
        with log.open("ab") as out:
            try:
                self._process: subprocess.Popen[Any] | None = subprocess.Popen(
                    list(command), cwd=ROOT, env=environment(extra), stdin=subprocess.DEVNULL,
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._process, self._failure = None, f"{command[0]} can't be started: {error}"
                return
        with _lock:
            _running.add(self._process)

    def wait(self, limit: float) -> Ran:
        """Waits for its end, at most `limit` seconds; then it is ended."""
        if self._process is None:
            return Ran(127, 0.0, self._failure or "")
        try:
            code: int | None = self._process.wait(max(0.1, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(self._process)  # and what it started
            with _lock:
                _running.discard(self._process)
        seconds = round(time.monotonic() - self._start, 2)
        return Ran(code, seconds, self.log.read_text(encoding="utf-8", errors="replace"))


def run(
    command: Sequence[str], limit: float, log: Path, extra: Mapping[str, str] | None = None
) -> Ran:
    """Runs a command to its end, at most `limit` seconds."""
    return Child(command, log, extra).wait(limit)


def end_all() -> None:
    """Ends every command under way: the time is over."""
    with _lock:
        for process in _running:
            kill(process)
        _running.clear()
