"""The self-check: runs a kernel's configurations in a child process that may crash or hang.

`run` is the parent's side, `main` the child's (`python -m resnet_fused._selfcheck REQUEST FD`). The
child announces each configuration before it runs it and its outcome after, as lines of JSON on a
pipe of its own, so that what a kernel prints does no harm, and a death is blamed on the one that
was under way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger("resnet_fused")

SECONDS = "RESNET_FUSED_SELFCHECK_SECONDS"
DEFAULT_SECONDS = 60.0
# A configuration that takes this share of the whole time hangs: most of what it takes is compiling,
# up to 15 s on a slow CPU.
SHARE = 0.5
MOST_CHILDREN = 4
"""At once: each takes half a GB of the GPU's memory for its context, and a core to compile."""
# Triton's interpreter is no GPU, and a backend asked for by name is another question.
UNWANTED = ("TRITON_INTERPRET", "RESNET_FUSED_BACKEND", "CUDA_ENABLE_COREDUMP_ON_EXCEPTION")
MESSAGE_LENGTH = 300
PACKAGE = str(Path(__file__).resolve().parent)


class Outcome(NamedTuple):
    """What a self-check found.

    Attributes:
        results: configuration -> None where it passed, else why it did not.
        problem: why the configurations that are absent from `results` were not checked, or None.
        late: whether that was for lack of time.
    """

    results: dict[str, str | None]
    problem: str | None = None
    late: bool = False


def time_limit() -> float:
    """How long a self-check may take, in seconds; 0 switches it off.

    Raises:
        ValueError: the environment variable holds no such number.
    """
    given = os.environ.get(SECONDS)
    if not given:
        return DEFAULT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not (0 <= seconds < math.inf):
        raise ValueError(
            f"environment variable {SECONDS}: got {given!r}; accepted are seconds, 0 for no check"
        )
    return seconds


def cannot_start() -> str | None:
    """Why no child process can be started here, or None."""
    if os.name != "posix":
        return f"self-checks need POSIX processes, this is {sys.platform}"
    if getattr(sys, "frozen", False):
        return "this Python is frozen into an application that can't be started as Python"
    if not sys.executable:
        return "sys.executable is empty, so that no child process can be started"
    return None


def run(
    check: str,
    configurations: Sequence[str],
    device: str,
    *,
    limit: float,
    uuid: str | None = None,
    children: int = 1,
) -> Outcome:
    """Checks configurations in child processes within a time limit.

    A wrong result or an exception refuses its configuration. A crash or a hang refuses the one that
    was under way, and a fresh child goes on with the rest.

    Args:
        check: "module:function", called as function(configuration, device); raises when wrong.
        configurations: their names, in the order in which to check them.
        device: "cuda:1", or "cpu".
        limit: seconds for everything.
        uuid: of the GPU that is meant, should the child number them otherwise.
        children: how many processes share the configurations at one time.
    """
    deadline = time.monotonic() + limit
    shares = [configurations[first::children] for first in range(children)]
    shares = [share for share in shares if share]

    def follow(share: Sequence[str]) -> Outcome:
        return _run(check, share, device, limit, deadline, uuid)

    if len(shares) < 2:
        return follow(configurations)
    with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
        outcomes = list(pool.map(follow, shares))
    found = {name: why for outcome in outcomes for name, why in outcome.results.items()}
    problems = [outcome for outcome in outcomes if outcome.problem is not None]
    # What is wrong with the check itself says more than that time ran out.
    worst = min(problems, key=lambda outcome: outcome.late, default=Outcome({}))
    results = {name: found[name] for name in configurations if name in found}
    return Outcome(results, worst.problem, worst.late)


def children() -> int:
    """How many processes may check at one time here: half of the cores compile."""
    return max(1, min(MOST_CHILDREN, (os.cpu_count() or 1) // 2))


def _run(
    check: str,
    configurations: Sequence[str],
    device: str,
    limit: float,
    deadline: float,
    uuid: str | None,
) -> Outcome:
    """Checks configurations one after the other, each child as long as it lives."""
    results: dict[str, str | None] = {}
    while left := [name for name in configurations if name not in results]:
        before = len(results)
        why = cannot_start()
        if why is not None:
            return Outcome(results, why)
        request = {
            "check": check, "configurations": left, "device": device, "uuid": uuid,
            "seconds": max(1.0, deadline - time.monotonic()), "package": PACKAGE,
        }  # fmt: skip
        try:
            with _child(request) as (process, pipe):
                problem = _follow(process, pipe, results, deadline, limit * SHARE)
        except OSError as error:
            return Outcome(results, f"the child process {sys.executable} can't be started: {error}")
        if time.monotonic() >= deadline and len(results) < len(configurations):
            return Outcome(results, f"not reached within the {limit:g} s of the self-check", True)
        if problem is not None:
            return Outcome(results, problem)
        if len(results) == before:
            return Outcome(
                results, f"the child process ended before it checked anything: {_end(process)}"
            )
    return Outcome(results)


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    environment[SECONDS] = "0"  # a child checks what it is told to, and starts no children
    # In the parent's order: the standard library stays before what is installed beside it.
    folders = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    folders.append(str(Path(PACKAGE).parent))
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))
    return environment


@contextlib.contextmanager
def _child(request: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Starts the child in a session of its own; whatever is left of it ends with the block."""
    reading, writing = os.pipe()
    process = None
    try:
        try:
            process = subprocess.Popen(
                # -P: the folder that the user stands in comes where the parent's path has it.
                [sys.executable, "-P", "-m", __name__, json.dumps(request), str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        yield process, reading
    finally:
        os.close(reading)
        if process is not None:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The session too: a compiler that the child started. Its id can't be another's before wait().
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        # In the driver's hands; waiting longer would hang the user too.
        logger.warning("the self-check's process %d can't be ended", process.pid)


def _follow(
    process: subprocess.Popen[bytes],
    pipe: int,
    results: dict[str, str | None],
    deadline: float,
    share: float,
) -> str | None:
    """Fills `results` from a child's announcements until it ends or its time does.

    Returns:
        A problem of the child that is no configuration's fault, or None.
    """
    running, since = None, 0.0
    buffer = b""
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(pipe, select.POLLIN)
    while True:
        until = deadline if running is None else min(deadline, since + share)
        wait = until - time.monotonic()
        if wait <= 0:
            if running is not None and time.monotonic() >= since + share:
                results[running] = f"no result within {share:g} s: it hangs"
            return None
        # Short waits: a process that the child left behind may hold the pipe open.
        ready = poll.poll(1000 * min(wait, 0.25))
        ended = not ready and process.poll() is not None
        chunk = os.read(pipe, 65536) if ready else b""
        if ended or (ready and not chunk):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, min(2.0, deadline - time.monotonic())))
            if running is not None:
                results[running] = f"the process ended in it: {_end(process)}"
            return None
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "problem" in event:
                return event["problem"]
            if "start" in event:
                running, since = event["start"], time.monotonic()
            else:
                results[event["done"]] = event["error"]
                running = None


def _end(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    if code is None:
        return "it closed its pipe"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def text_of(error: BaseException) -> str:
    """An exception as a reason: its type and what it says, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 3] + "..."


def load(name: str) -> Callable[..., Any]:
    """The function that "module:function" names.

    Raises:
        ValueError: for another form of name.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{name!r} names no function; accepted is 'module:function'")
    return getattr(importlib.import_module(module), function)


def _gpu(device: str, uuid: str | None) -> str:
    """The child's name of the GPU that the parent means, after a first use of it."""
    if device == "cpu":
        return device
    import torch

    if uuid is not None:
        count = torch.cuda.device_count()
        uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
        if uuid not in uuids:
            raise RuntimeError(f"the child process does not see the GPU {uuid}, only {uuids}")
        device = f"cuda:{uuids.index(uuid)}"
    torch.cuda.set_device(device)
    torch.zeros(1, device=device).add_(1).item()  # a busy or exclusive GPU fails here
    return device


def _out_of_memory(error: BaseException) -> bool:
    # Not by type: Triton and the libraries below torch have errors of their own.
    return "out of memory" in str(error).lower()


def _settle(device: str) -> None:
    """Waits for the GPU, so that a fault shows in the configuration that made it."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def main(arguments: Sequence[str]) -> None:
    """The child: checks what the request names, and reports line by line.

    Args:
        arguments: the request as JSON, and the number of the pipe to report to.
    """
    request, pipe = json.loads(arguments[0]), int(arguments[1])

    def tell(**event: Any) -> None:
        os.write(pipe, json.dumps(event).encode() + b"\n")

    # Should the parent be gone by then, nobody else ends a child that hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is no one's to debug
    try:
        if request["package"] != PACKAGE:
            raise ImportError(f"the child process has another resnet_fused, in {PACKAGE}")
        check = load(request["check"])
        device = _gpu(request["device"], request["uuid"])
    except BaseException as error:
        tell(problem=f"the check can't start: {text_of(error)}")
        return
    for name in request["configurations"]:
        tell(start=name)
        failure: str | None = None
        try:
            check(name, device)
            _settle(device)
        except BaseException as error:
            if _out_of_memory(error):
                tell(problem=f"too little memory for the check: {text_of(error)}")
                return
            failure = text_of(error)
        tell(done=name, error=failure)
        if failure is not None and not _usable(device):
            return  # the fault took the context with it; a fresh process goes on


def _usable(device: str) -> bool:
    try:
        _settle(device)
    except BaseException:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
    # Not through destructors: a damaged context could hang or crash in them.
    os._exit(0)
