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


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("scenario", RIGHT)
def test_nothing_beyond_is_touched(outcomes, scenario):
    """Every configuration between guard pages; the last tile of huge tensors: also right."""
    found, errors = outcomes
    status, megabytes = found[scenario]
    assert status == 0, errors
    assert megabytes < MEGABYTES


@pytest.mark.parametrize("scenario", FAULTS)
def test_a_planted_fault_kills_the_child(outcomes, scenario):
    """One pixel too many, one row too many, offsets of 32 bits: else the tests above were blind."""
    found, _ = outcomes
    status, _ = found[scenario]
    assert status in (-signal.SIGSEGV, -signal.SIGBUS)
