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
MEGABYTES = 400  # one of the huge tensors would take 4,000

# The kernels of each op, the merge last.
KERNELS = {
    "conv_bn_act": ("conv_bn_act_kernel", "merge_kernel"),
    "conv_dgrad": ("conv_dgrad_kernel", "merge_kernel"),
    "conv_wgrad": ("conv_wgrad_kernel", "wgrad_merge_kernel"),
    "bn_act": ("bn_act_kernel",),
}
# Op, which of its tensors is huge, and the kernel that fails if its offsets have 32 bits.
HUGE = (
    ("conv_bn_act", "x", "conv_bn_act_kernel"),
    ("conv_bn_act", "out", "conv_bn_act_kernel"),
    ("conv_bn_act", "merged", "merge_kernel"),
    ("conv_bn_act", "weight", "conv_bn_act_kernel"),
    ("conv_dgrad", "dx", "conv_dgrad_kernel"),
    ("conv_dgrad", "dy", "conv_dgrad_kernel"),
    ("conv_dgrad", "weight", "conv_dgrad_kernel"),
    ("conv_wgrad", "dy", "conv_wgrad_kernel"),
    ("conv_wgrad", "x", "conv_wgrad_kernel"),
    ("conv_wgrad", "dweight", "conv_wgrad_kernel"),
    ("bn_act", "nhwc", "bn_act_kernel"),
    ("bn_act", "nchw", "bn_act_kernel"),
    ("bn_act", "sliced", "bn_act_kernel"),
)
# An argument of one kernel, off by so much: beyond the end, or with a stride of the wrong sign
# before the start.
PLANTED = (
    "conv_bn_act conv_bn_act_kernel pixels 1",
    "conv_bn_act conv_bn_act_kernel height 1",
    "conv_bn_act conv_bn_act_kernel out_c -2",
    "conv_bn_act merge_kernel pixels 1",
    "conv_dgrad conv_dgrad_kernel pixels 1",
    "conv_dgrad conv_dgrad_kernel out_height 1",
    "conv_dgrad conv_dgrad_kernel dx_c -2",
    "conv_dgrad merge_kernel pixels 1",
    "conv_wgrad conv_wgrad_kernel pixels 1",
    "conv_wgrad conv_wgrad_kernel height 1",
    "conv_wgrad conv_wgrad_kernel dweight_c -2",
    "conv_wgrad wgrad_merge_kernel count 1",
    "bn_act bn_act_kernel rows 1",
    "bn_act bn_act_kernel columns 1",
    "bn_act bn_act_kernel x_c -2",
)
MERGED = [op for op in KERNELS if len(KERNELS[op]) > 1]
RIGHT = (
    *(f"pages {op} {'all' if PROOF else 'some'}" for op in KERNELS),
    *(f"huge {op} {which} -" for op, which, _ in HUGE),
    *(f"sums {op} -" for op in MERGED),
)
FAULTS = (
    *(f"planted {fault}" for fault in PLANTED),
    *(f"huge {op} {which} {kernel}" for op, which, kernel in HUGE),
    # merge_kernel walks from part to part: its offsets are those of one part.
    *(f"sums {op} {kernel}" for op in MERGED for kernel in KERNELS[op] if kernel != "merge_kernel"),
)


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

    An argument that is off, or offsets of 32 bits, must end the child by a signal: else the rest
    would be blind.
    """
    found, errors = outcomes()
    assert {s: found[s][0] for s in RIGHT} == dict.fromkeys(RIGHT, 0), errors
    assert max(found[s][1] for s in RIGHT) < MEGABYTES
    died = {s: found[s][0] in (-signal.SIGSEGV, -signal.SIGBUS) for s in FAULTS}
    assert died == dict.fromkeys(FAULTS, True), errors
