"""conv_bn_stats beside memory that can't be touched, on huge tensors, and its machine code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from triton_trace import PROOF, needs_interpreter

LIMIT = 3600 if PROOF else 900
"""Seconds; a proof compiles every configuration, for four architectures one after the other."""
TESTS = Path(__file__).resolve().parent
KERNELS = ("conv_bn_stats_kernel", "stats_merge_kernel")
HUGE = (("x", KERNELS[0]), ("out", KERNELS[0]), ("merged", KERNELS[1]))
RIGHT = (
    f"pages {'all' if PROOF else 'some'}",
    *(f"huge {which} -" for which, _ in HUGE),
    "sums -",
)
FAULTS = (
    "planted conv_bn_stats_kernel pixels 1",
    "planted conv_bn_stats_kernel height 1",
    "planted conv_bn_stats_kernel out_c -2",
    "planted stats_merge_kernel pixels 1",
    "planted merge_moments_kernel channels 1",
    "planted merge_chunks_kernel count 1",
    *(f"huge {which} {kernel}" for which, kernel in HUGE),
    f"sums {KERNELS[0]}",
)


def child(name, *arguments, interpreted, **environment):
    """What a script of this folder prints."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TESTS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={
            **kept,
            **({"TRITON_INTERPRET": "1"} if interpreted else {}),
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.interpreter
@needs_interpreter[1]
@pytest.mark.timeout(LIMIT)
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """See `test_triton_memory`, of which this is the part for an op with two results."""
    printed, errors = child("triton_stats_guard.py", *RIGHT, *FAULTS, interpreted=True)
    found = dict(line.split(": ") for line in printed.splitlines())
    status = {scenario: int(outcome.split()[0]) for scenario, outcome in found.items()}
    assert {scenario: status[scenario] for scenario in RIGHT} == dict.fromkeys(RIGHT, 0), errors
    died = {fault: status[fault] in (-signal.SIGSEGV, -signal.SIGBUS) for fault in FAULTS}
    assert died == dict.fromkeys(FAULTS, True), errors


@pytest.mark.slow
@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("arch", ("80", "90", "100", "120") if PROOF else ("90",))
def test_the_machine_code_passes_the_gates(tmp_path, arch):
    """No spills, the best matrix instructions, wide accesses; also with the prologue."""
    printed, _ = child(
        "triton_stats_aot.py",
        "all" if PROOF else "quick",
        arch,
        interpreted=False,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    found = json.loads(printed)
    assert {entry["kernel"] for entry in found} >= {*KERNELS, "merge_moments_kernel"}
    assert any("prologue" in entry["call"] for entry in found)
    assert [
        (entry["arch"], entry["call"], entry["failures"]) for entry in found if entry["failures"]
    ] == []
