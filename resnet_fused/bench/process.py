"""A peer in a process of its own: what crashes or hangs there is a reason, not an end.

The parent writes requests to the child's standard input and reads answers from a pipe beside the
standard streams, one JSON object a line; what a peer prints goes to a file, of which the last lines
explain a crash. Between its samples a child is stopped (SIGSTOP), so that threads which spin for
work do not disturb the others' samples.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from resnet_fused.bench import gauges
from resnet_fused.bench.gauges import Step
from resnet_fused.bench.judging import Judgement
from resnet_fused.bench.peers import NoPeerError
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.timing import SampleError

PEERS = "resnet_fused.bench.peers:PEERS"
START_S = 60.0  # to import torch and build the operands, on a slow and busy machine
REQUEST_S = 60.0  # for anything but preparing and sampling
CLOSE_S = 5.0
LEAST_S = 1.0  # for a request, however late it is
SLACK = 10.0  # times as long as expected a sample may take
_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1


class ChildVariant:
    """A peer in a child process, as `sampler.Variant` asks.

    Args:
        name: what the record calls it.
        path: "module:attribute" of the peer; dots behind the colon are looked up one by one, in a
            mapping by key.
        subject: what to build there.
        shared: the file that `Work.share` wrote.
        limit_s: seconds for preparing.
        threads: of torch.
        graphs: on a GPU, whether to capture graphs.
        request_s: seconds for a short request; a sample has more where it is known to need more.
        left: seconds that the run has left; no request waits longer.
    """

    process = "child"

    def __init__(
        self,
        name: str,
        path: str,
        subject: Subject,
        shared: Path | None,
        limit_s: float,
        threads: int,
        graphs: bool = True,
        request_s: float = REQUEST_S,
        left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.name, self._limit_s, self._request_s, self._left = name, limit_s, request_s, left
        self.method, self.note, self.prepare_s = "", "", 0.0
        self._once = 0.0
        self._about = {
            "peer": path, "name": name, "subject": subject.to_dict(), "threads": threads,
            "shared": None if shared is None else str(shared), "graphs": graphs,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }  # fmt: skip
        self._child: Child | None = None

    def prepare(self) -> None:
        """Starts the process, builds the operands there and prepares the peer."""
        start = time.perf_counter()
        # In the child the GPU that is current here is the only one, and so the first.
        on_gpu = self._about["subject"]["device"] == "cuda" and torch.cuda.is_available()
        self._child = Child(self._about["threads"], gauges.current_gpu() if on_gpu else None)
        self._ask("build", START_S, **self._about)
        took = time.perf_counter() - start
        answer = self._ask("prepare", self._limit_s)
        if "no" in answer:
            raise NoPeerError(answer["no"])
        self.prepare_s = time.perf_counter() - start - took

    def judge(self) -> Judgement:
        """Judges in the child, by the parent's reference."""
        found = self._ask("judge", self._limit_s)
        return Judgement(found["ok"], float(found["worst"]), found["text"])

    def arm(self) -> None:
        """Makes the sampler there."""
        found = self._ask("arm", self._limit_s)
        self.method, self.note = found["method"], found["note"]

    def sample(self, calls: int) -> float:
        """Seconds a call, by the child's clock."""
        limit = max(self._request_s, SLACK * calls * self._once)
        self._once = float(self._ask("sample", limit, calls=calls)["seconds"])
        return self._once

    def kernels(self) -> list[str]:
        """What the peer says that it ran."""
        return self._ask("kernels", self._request_s)["kernels"]

    def peak_memory(self) -> int | None:
        """Of one call in the child."""
        return self._ask("memory", self._request_s)["bytes"]

    def layers(self, orders: Sequence[Sequence[Step]]) -> dict[str, float] | None:
        """Of one call in the child."""
        given = [list(order) for order in orders]
        return self._ask("layers", self._request_s, orders=given)["layers"]

    def ops(self) -> dict[str, float]:
        """Of one call in the child."""
        return self._ask("ops", self._request_s)["ops"]

    def close(self) -> None:
        """Lets the peer give back what it holds, then ends the child."""
        if self._child is not None and self.prepare_s:
            with contextlib.suppress(SampleError):
                self._child.request({"do": "close"}, CLOSE_S)
        self._end()

    def _end(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, do: str, limit_s: float, **more: Any) -> dict[str, Any]:
        if self._child is None:
            raise SampleError(f"it has ended before {do!r}")
        try:
            limit = min(limit_s, max(LEAST_S, self._left()))
            answer = self._child.request({"do": do, **more}, limit)
        except SampleError:
            self._end()
            raise
        if "error" in answer:
            raise SampleError(answer["error"])
        return answer


class Child:
    """A process that runs `main`, and the pipes to it.

    Args:
        threads: of the libraries that read OMP_NUM_THREADS when they start.
        gpu: the only one that it sees; None leaves what this process sees.
    """

    def __init__(self, threads: int, gpu: str | None = None) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long)
        self._buffer = b""
        self._pipe, writing = os.pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        # The child imports what this process would: stand-ins of a test as well.
        environment["PYTHONPATH"] = os.pathsep.join(part or os.getcwd() for part in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "resnet_fused.bench.process", str(writing)],
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, env=environment,
                pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            os.close(self._pipe)
            raise SampleError(f"no process could be started: {error}") from error
        finally:
            os.close(writing)

    def request(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Sends a message and waits for its answer.

        Raises:
            SampleError: no answer in time, or the process has ended; it is of no use any more.
        """
        what = message["do"]
        self._signal("SIGCONT")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end shows on the other pipe
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        until = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                raise SampleError(f"no answer to {what!r} within {limit_s:g} s{self._words()}")
            chunk = os.read(self._pipe, 65536)
            if not chunk:
                raise SampleError(f"its process ended in {what!r}: {self._ending()}")
            self._buffer += chunk
        self._signal("SIGSTOP")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _signal(self, name: str) -> None:
        # Elsewhere nothing would end a stopped child whose parent is gone.
        if _LINUX and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, getattr(signal, name))

    def _ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        how = f"exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        return f"{how}{self._words()}"

    def _words(self) -> str:
        """The end of what it printed."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 2000))
        said = " ".join(self._log.read().decode(errors="replace").split())
        return f"; it said: {said[-300:]}" if said else ""

    def close(self) -> None:
        """Ends the process and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(OSError):
            os.close(self._pipe)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._log.close()


def lookup(path: str) -> Any:
    """What "module:attribute" names; further dots are attributes, or keys of a mapping.

    Raises:
        ValueError: nothing is there.
    """
    module, _, attributes = path.partition(":")
    try:
        found = importlib.import_module(module)
        for name in attributes.split("."):
            found = found[name] if isinstance(found, dict) else getattr(found, name)
    except (ImportError, AttributeError, KeyError) as error:
        raise ValueError(f"peer {path!r}: nothing is there ({error!r})") from error
    return found


class _Server:
    """The child's side: one variant, and the answers about it."""

    def __init__(self) -> None:
        self._variant: Any = None

    def build(self, about: dict[str, Any]) -> dict[str, Any]:
        from resnet_fused.bench.sampler import OwnVariant
        from resnet_fused.bench.work import build

        torch.set_num_threads(about["threads"])
        torch.backends.cudnn.benchmark = about["cudnn_benchmark"]
        shared = about["shared"]
        work = build(Subject.from_dict(about["subject"]), None if shared is None else Path(shared))
        peer = lookup(about["peer"])
        self._variant = OwnVariant(about["name"], peer, work, about["graphs"])
        return {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        variant, do = self._variant, message["do"]
        if do == "build":
            return self.build(message)
        if do == "prepare":
            variant.prepare()
            return {}
        if do == "judge":
            found = variant.judge()
            return {"ok": found.ok, "worst": str(found.worst), "text": found.text}
        if do == "arm":
            variant.arm()
            return {"method": variant.method, "note": variant.note}
        if do == "sample":
            return {"seconds": variant.sample(message["calls"])}
        if do == "close":
            variant.close()
            return {}
        if do == "kernels":
            return {"kernels": variant.kernels()}
        if do == "memory":
            return {"bytes": variant.peak_memory()}
        if do == "layers":
            orders = [[_step(*fields) for fields in order] for order in message["orders"]]
            return {"layers": variant.layers(orders)}
        if do == "ops":
            return {"ops": variant.ops()}
        raise ValueError(f"do is {do!r}")


def _step(name: str, kind: str, shape: list[int] | None, projection: bool) -> Step:
    return Step(name, kind, None if shape is None else tuple(shape), projection)


def main(arguments: Sequence[str]) -> None:
    """Answers requests from standard input into the pipe whose number is the first argument."""
    _end_with_parent()
    from resnet_fused.bench.sampler import first_line

    server = _Server()
    with os.fdopen(int(arguments[0]), "w", encoding="utf-8") as pipe:
        for line in sys.stdin:
            try:
                answer = server.answer(json.loads(line))
            except NoPeerError as error:
                answer = {"no": str(error)}
            except SampleError as error:
                answer = {"error": str(error)}
            except Exception as error:
                answer = {"error": first_line(error)}
            pipe.write(json.dumps(answer) + "\n")
            pipe.flush()
    # Threads of a peer that do not end must not keep the process.
    os._exit(0)


def _end_with_parent() -> None:
    """A stopped process would never see that its parent is gone; the kernel ends it."""
    if not _LINUX:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


if __name__ == "__main__":
    main(sys.argv[1:])
