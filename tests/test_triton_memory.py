"""Triton kernels beside memory that can't be touched, and on tensors of more than 2^31 elements."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from triton_trace import PROOF, needs_interpreter

pytestmark = [
    *needs_interpreter,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve"),
]

TESTS = Path(__file__).resolve().parent
PAGES = "pages all" if PROOF else "pages some"
RIGHT = (PAGES, "huge x wide", "huge out wide")
FAULTS = ("planted pixels 1", "planted height 1", "huge x narrow", "huge out narrow")
MEGABYTES = 400  # one of the huge tensors would take 4,000


def outcomes():
    """Of every scenario (exit status, megabytes); one child for all: its imports take seconds."""
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_guard.py"), *RIGHT, *FAULTS],
        capture_output=True,
        text=True,
        timeout=900,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert child.returncode == 0, child.stderr
    found = {}
    for line in child.stdout.splitlines():
        scenario, _, outcome = line.partition(": ")
        status, megabytes = outcome.split()
        found[scenario] = int(status), int(megabytes)
    return found, child.stderr


@pytest.mark.timeout(900)
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Every configuration between guard pages; the last tile of huge tensors: also right.

    One pixel too many, one row too many, offsets of 32 bits must end the child by a signal: else
    the rest would be blind.
    """
    found, errors = outcomes()
    assert {s: found[s][0] for s in RIGHT} == dict.fromkeys(RIGHT, 0), errors
    assert max(found[s][1] for s in RIGHT) < MEGABYTES
    died = {s: found[s][0] in (-signal.SIGSEGV, -signal.SIGBUS) for s in FAULTS}
    assert died == dict.fromkeys(FAULTS, True), errors
