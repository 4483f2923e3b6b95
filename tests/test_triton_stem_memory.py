"""stem's and head's Triton kernels beside memory that can't be touched, and repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_trace import PROOF, needs_interpreter

from resnet_fused import numerics
from resnet_fused.cases import CHAIN_CASES, HEAD_CASES, StemCase
from resnet_fused.ops._library import overload

pytestmark = needs_interpreter

TESTS = Path(__file__).resolve().parent
REPEATS = 250 if PROOF else 3
RIGHT = (
    *(f"ends {which} {at} -" for which in ("stem", "bytes", "one", "two") for at in (
        "end", "start")),
    "wide far x -", "wide far out -", "wide one x -", "wide two x -",
)  # fmt: skip
FAULTS = (
    "ends stem end stem_kernel.height=9", "ends stem end stem_kernel.out_width=30",
    "ends bytes end stem_kernel.width=9", "ends stem end pack_kernel.filters=9",
    "ends stem end stem_kernel.filters=9", "ends stem start stem_kernel.x_n=-999",
    "ends one end head_kernel.images=9", "ends one end head_kernel.classes=9",
    "ends one end head_kernel.channels=50", "ends one end head_kernel.pixels=9",
    "ends two end mean_kernel.channels=50", "ends two end mean_kernel.pixels=9",
    "wide far x stem_kernel.WIDE=-1", "wide far out stem_kernel.WIDE=-1",
    "wide one x head_kernel.WIDE=-1", "wide two x mean_kernel.WIDE=-1",
)  # fmt: skip


def outcomes(scenarios):
    """Scenario -> the exit status of the child that ran it; and what all of them said."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_stem_guard.py"), *scenarios],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    found = dict(line.split(": ") for line in child.stdout.splitlines())
    return {name: int(outcome.split()[0]) for name, outcome in found.items()}, child.stderr


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")


@linux
@pytest.mark.timeout(300)
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Between guard pages, and with steps beyond 2^31: what is off ends a child by a signal."""
    faults = FAULTS if PROOF else FAULTS[::2]
    status, said = outcomes([*RIGHT, *faults])
    assert {s: status[s] for s in RIGHT} == dict.fromkeys(RIGHT, 0), said
    died = {s: status[s] in (-signal.SIGSEGV, -signal.SIGBUS) for s in faults}
    assert died == dict.fromkeys(faults, True), said


@linux
def test_classes_far_apart():
    """A weight whose rows lie 2^30 elements apart: the third begins beyond 2^31."""
    status, said = outcomes(["wide one weight -"])
    assert status == {"wide one weight -": 0}, said


def calls():
    """(op, arguments of its overload) of small cases, random data."""
    torch.manual_seed(0)
    stem = StemCase("small", 1, 3, 7, 9, 8, images="uint8")
    given = list(numerics.exact_stem_inputs(stem, torch.float16, torch.Generator().manual_seed(0)))
    given[1] = torch.randn(stem.weight_shape).half()
    head = next(case for case in HEAD_CASES if case.name == "classes200")
    chain = next(case for case in CHAIN_CASES if case.name == "whole_tiles")
    operands = numerics.chain_operands(chain, torch.float16)
    x, weight = torch.randn(head.shape).half(), torch.randn(head.classes, head.c).half()
    return {
        "stem": (*given, *stem.geometry),
        "head": (x, weight, torch.randn(head.classes).half()),
        "conv_chain": (*operands, chain.projection_stride, chain.out_stride, True),
    }


@pytest.mark.parametrize("op", ["stem", "head", "conv_chain"])
def test_the_same_bits_each_time(op):
    """250 times in the long proofs: sums are made in one order, whatever was in memory before."""
    run, arguments = overload(op, "triton"), calls()[op]
    first = run(*arguments)
    first = first if isinstance(first, tuple) else (first,)
    assert all(torch.isfinite(t).all() for t in first)
    for _ in range(REPEATS):
        again = run(*arguments)
        again = again if isinstance(again, tuple) else (again,)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
