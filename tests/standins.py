"""Stand-ins for kernels that a child process checks: right, wrong, raising, faulting, hanging.

A configuration is named by what it does; a number behind it ("right2") makes another one of it.
Imports nothing heavy, so that a child starts in a moment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

CALLS = "RESNET_FUSED_TEST_CALLS"  # a file that gets one line for every configuration that runs


def right() -> None:
    """The result is right."""


def wrong() -> None:
    raise ArithmeticError("3 of 8 elements are wrong")


def refuses() -> None:
    raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448")


def faults() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def exits() -> None:
    os._exit(0)


def leaves() -> None:
    sys.exit("the check wants to leave")


def hangs() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def forks_and_hangs() -> None:
    """Leaves a process behind that holds everything it inherited."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
    note(f"forked {child}")
    os._exit(1)


def slow() -> None:
    time.sleep(0.4)


def prints() -> None:
    """What a kernel's own prints look like, with lines that pretend to be announcements."""
    for number in (1, 2):
        os.write(number, b'{"done": "prints", "error": "no"}\n\xff\x00garbage' * 50_000)
    print("garbage", flush=True)


def poisons() -> None:
    """As a fault of the GPU does: everything fails from now on in this process."""
    import resnet_fused._selfcheck as selfcheck

    main = sys.modules["__main__"]
    assert main.__spec__ is not None and main.__spec__.name == selfcheck.__name__

    def dead(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    main._settle = dead


def memory() -> None:
    raise RuntimeError("Triton Error [CUDA]: out of memory")


def environment() -> None:
    for name in ("TRITON_INTERPRET", "RESNET_FUSED_BACKEND"):
        assert name not in os.environ, f"{name} came through"


def note(line: str) -> None:
    if CALLS in os.environ:
        with Path(os.environ[CALLS]).open("a") as stream:
            stream.write(f"{line}\n")


def check(configuration: str, device: str) -> None:
    """What a child calls; the configuration names one of the functions above."""
    assert device == "cpu", device
    note(f"{configuration} {os.getpid()}")
    globals()[configuration.rstrip("0123456789")]()


def no_configurations() -> tuple[str, ...]:
    raise ImportError("cannot import name 'triton'")
