"""Runs steps in worker processes that may crash or hang, several at a time, under a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from gpu.record import one_line

FOLDER = Path(__file__).resolve().parent.parent
ROOT = FOLDER.parent
START_S = 150.0  # a first import of torch from a cold disk takes a minute
MOST_FAILED_STARTS = 3


@dataclass(frozen=True)
class Task:
    """One step.

    Attributes:
        name: of the step, in the record.
        function: "module:function" of this folder.
        arguments: by keyword, as JSON can hold them.
        seconds: how long it may take; longer counts as a hang.
        about: for the caller alone.
    """

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    about: Mapping[str, Any] = field(default_factory=dict)


class PoolError(RuntimeError):
    """No worker can be started; the message says why."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a child process of the check runs with: this checkout, no other backend's word."""
    found = {k: v for k, v in os.environ.items() if k not in ("RESNET_FUSED_BACKEND",)}
    paths = [str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # A check looks at kernels by itself: no child starts another one.
    found["RESNET_FUSED_SELFCHECK_SECONDS"] = "0"
    found.setdefault("OMP_NUM_THREADS", "2")
    return {**found, **(extra or {})}


def kill(process: subprocess.Popen[Any]) -> None:
    """Ends a process that leads a session, and what it started: a compiler, for example."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


class _Worker:
    """One process, and the step that it is busy with."""

    def __init__(self, device: str, env: Mapping[str, str], life: float) -> None:
        self.task: Task | None = None
        self.since = time.monotonic()
        self.ready = False
        self.problem: str | None = None
        self._buffer = b""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long)
        self.pipe, writing = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu.worker", device, str(writing), str(life)],
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, env=dict(env),
                pass_fds=(writing,), start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        finally:
            os.close(writing)

    @property
    def until(self) -> float:
        """When it has taken too long."""
        if not self.ready:
            return self.since + START_S
        return self.since + (self.task.seconds if self.task else float("inf"))

    def give(self, task: Task) -> None:
        self.task, self.since = task, time.monotonic()
        request = {"function": task.function, "arguments": dict(task.arguments)}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end shows on the other pipe
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """What it has said since the last time; None if it has ended."""
        chunk = os.read(self.pipe, 65536)
        if not chunk:
            return None
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        """How it ended, and the end of what it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.poll()
        how = f"exit code {code}"
        if code is None:
            how = "it closed its pipe"
        elif code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 2000))
        said = self._log.read().decode(errors="replace").strip()[-300:]
        return f"{how}; {said}" if said else how

    def close(self) -> None:
        kill(self.process)
        os.close(self.pipe)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self._log.close()


class Pool:
    """Worker processes.

    Args:
        count: how many.
        device: "cuda:0" or "cpu".
        end: the monotonic time at which every worker ends by itself.
        extra: environment variables beside those of this process.
    """

    def __init__(
        self, count: int, device: str, end: float, extra: Mapping[str, str] | None = None
    ) -> None:
        self._device, self._env = device, environment(extra)
        self._end, self._failed_starts = end, 0
        self._late: list[str] = []
        self._workers = [self._start() for _ in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> _Worker:
        return _Worker(self._device, self._env, max(1.0, self._end - time.monotonic()) + 15)

    def run(
        self,
        tasks: Sequence[Task],
        until: float,
        report: Callable[[Task, dict[str, Any]], None],
    ) -> int:
        """Runs steps, the first ones first, until all are done or the time is over.

        A step that is under way when the time ends is not reported; `why_cut` names it.

        Args:
            tasks: the steps.
            until: monotonic time.
            report: called with each step and what it found, as it comes.

        Returns:
            How many were reported.

        Raises:
            PoolError: no worker can be started.
        """
        left, done = deque(tasks), 0

        def answer(worker: _Worker, found: dict[str, Any]) -> None:
            nonlocal done
            assert worker.task is not None
            task, worker.task = worker.task, None
            done += 1
            if isinstance(found.get("error"), str):
                found["error"] = one_line(found["error"])
            report(task, found)

        while left or any(worker.task for worker in self._workers):
            now = time.monotonic()
            if now >= until:
                break
            for index, worker in enumerate(self._workers):
                if now >= worker.until:
                    self._too_late(index, answer)
                elif worker.ready and worker.task is None and left:
                    worker.give(left.popleft())
            for index in self._readable(min(until - now, 0.25)):
                self._listen(index, answer)
        now = time.monotonic()
        busy = [(worker.task.name, worker.since) for worker in self._workers if worker.task]
        self._late = [f"{name} ({now - since:.0f} s)" for name, since in busy]
        self._drop_busy()
        return done

    def _readable(self, seconds: float) -> list[int]:
        pipes = {worker.pipe: index for index, worker in enumerate(self._workers)}
        poll = select.poll()
        for pipe in pipes:
            poll.register(pipe, select.POLLIN)
        return [pipes[pipe] for pipe, _ in poll.poll(1000 * max(0.0, seconds))]

    def _listen(self, index: int, answer: Callable[[_Worker, dict[str, Any]], None]) -> None:
        worker = self._workers[index]
        events = worker.read()
        for event in events or ():
            if "ready" in event:
                worker.ready, self._failed_starts = True, 0
            elif "problem" in event:
                worker.problem = event["problem"]
            elif worker.task is not None:
                answer(worker, event["found"])
        if events is None:
            self._ended(index, answer)

    def _ended(self, index: int, answer: Callable[[_Worker, dict[str, Any]], None]) -> None:
        worker = self._workers[index]
        words = worker.last_words()
        if worker.task is not None:
            answer(worker, {"ok": False, "error": f"the process ended in it: {words}"})
        elif not worker.ready:
            self._not_started(worker.problem or words)
        self._replace(index)

    def _too_late(self, index: int, answer: Callable[[_Worker, dict[str, Any]], None]) -> None:
        worker = self._workers[index]
        if worker.task is None:
            self._not_started(f"it was not ready within {START_S:g} s")
        else:
            error = f"no result within {worker.task.seconds:g} s: it hangs"
            answer(worker, {"ok": False, "error": error})
        self._replace(index)

    def _not_started(self, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise PoolError(f"no worker process can be started: {why}")

    def _replace(self, index: int) -> None:
        self._workers[index].close()
        self._workers[index] = self._start()

    def _drop_busy(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker.task is not None:
                self._replace(index)

    def why_cut(self) -> str:
        """Why the last `run` ended before all was done, and what was under way for how long."""
        return "; under way: ".join(filter(None, ["its time was over", ", ".join(self._late)]))

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def close(self) -> None:
        """Ends every worker."""
        for worker in self._workers:
            worker.close()
        self._workers = []
