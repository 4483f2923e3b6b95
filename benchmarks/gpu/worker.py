"""A process that runs steps for `pool`: one line of JSON in, one line out, until its input ends.

A step is a function of this folder, called as function(device, **arguments), that returns a dict
with "ok". What a kernel does to the process, or to its CUDA context, hurts that step alone: the
pool starts another process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from typing import Any

EXTENSION = "RESNET_FUSED_GPU_CHECK_EXTENSION"
"""A folder beside the package that holds its compiled extension."""


def add_extension(folder: str | None) -> None:
    """Lets the package find its compiled extension in a folder beside it."""
    if folder:
        import resnet_fused

        resnet_fused.__path__.append(folder)


def direct() -> contextlib.AbstractContextManager[object]:
    """Kernels are launched by Triton itself, as inside of an op that runs eagerly.

    Outside of one `wrap_triton` goes through what tracing needs: a millisecond a launch.
    """
    try:
        from torch._library.triton import set_wrap_triton_enabled
    except ImportError:
        return contextlib.nullcontext()
    return set_wrap_triton_enabled(False)


def prepare(device: str) -> None:
    """Loads what every step needs, and makes the GPU current."""
    import torch

    add_extension(os.environ.get(EXTENSION))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    import resnet_fused.ops  # noqa: F401  (importing it enters the kernels)

    if device != "cpu":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device).add_(1).item()  # a busy or exclusive GPU fails here


def settle(device: str) -> str | None:
    """Waits for the GPU and gives its memory back; why that is not possible any more, or None."""
    if device == "cpu":
        return None
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def call(function: str, device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs one step; an exception is its failure."""
    module, _, name = function.partition(":")
    start = time.perf_counter()
    try:
        with direct():
            found = dict(getattr(importlib.import_module(module), name)(device, **arguments))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        # Not by type: Triton and the libraries below torch have errors of their own.
        lack = "out of memory" in text.lower()
        found = {"ok": None, "skipped": text} if lack else {"ok": False, "error": text}
    found["seconds"] = round(time.perf_counter() - start, 3)
    dead = settle(device)
    if dead is not None:
        found["ok"] = False
        found["error"] = found.get("error") or dead
        found["fatal"] = True
    return found


def main(arguments: list[str]) -> None:
    """Serves steps.

    Args:
        arguments: the device, the number of the pipe for answers, and the seconds after which this
            process ends, should its parent be gone by then.
    """
    from resnet_fused.bench.plain import plain

    device, pipe, life = arguments[0], int(arguments[1]), float(arguments[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.setitimer(signal.ITIMER_REAL, life)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def tell(**event: Any) -> None:
        data = json.dumps(plain(event, words=True)).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    try:
        prepare(device)
    except BaseException as error:
        tell(problem=f"{type(error).__name__}: {error}")
        return
    tell(ready=os.getpid())
    for line in sys.stdin:
        request = json.loads(line)
        found = call(request["function"], device, request["arguments"])
        tell(found=found)
        if found.get("fatal"):
            return


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    # Not through destructors: a damaged context could hang or crash in them.
    os._exit(0)
