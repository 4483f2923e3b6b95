"""The driver's calls of kernels by TMA and wgmma: those that gpu-check makes on capability 9.0."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from test_driver import run
from test_driver_training import both, gradient, right

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpu.driver import BY_TMA, SM90A_CALLS

pytestmark = pytest.mark.emulated


def named(call):
    """A call's op and configuration, and what else tells it from others."""
    return " ".join(word.removeprefix("--") for word in call[1:] if word != "--configuration")


every_call = pytest.mark.parametrize("call", SM90A_CALLS, ids=named)


# ThreadSanitizer takes minutes over a cluster of weight gradients' largest tiles.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
@every_call
def test_calls_are_right_and_sanitizers_content(call, variant):
    found = run(*call, variant=variant, timeout=880 if variant == "tsan" else 170)
    assert (found.returncode, found.stderr) == (0, ""), found
    record = json.loads(found.stdout)
    assert record["wrong"] == 0 and record["elements"] > 0
    if "--configuration" in call:
        asked = call[call.index("--configuration") + 1]
        assert re.match(rf"{asked}[,:] ", record["plan"]), record["plan"]


def test_every_op_by_tma_is_among_them():
    """Another op's first configuration by TMA wants a call as well."""
    listed = {op for op, *_ in BY_TMA}
    asked = ("--configuration", "no such")
    ops = run("--help").stdout.partition("one of ")[2].partition(" [")[0].split(", ")
    assert len(ops) > 10
    for op in ops:
        more = ("--r", 1, "--s", 1, "--padding", 0)
        tiles = run("--op", op, *more, *asked).stderr.partition("accepted are ")[2]
        assert ("tma_" not in tiles) or op in listed or op.endswith("_fp8"), (op, tiles)


WGMMA, MMA = ("--configuration", "tma_64x128_4s"), ("--configuration", "64x64_8w3s")
WIDE = ("--c", 136, "--k", 120, "--splits", 2)


@both
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--affine", "--addend", 1, "--residual", *WGMMA),
        ("--affine", "--addend", 1, "--residual", *MMA),
        ("--splits", 3, "--addend", 1, "--asynchrony", "lazy", "--order", "reverse", *WGMMA),
        ("--splits", 3, "--addend", 1, "--asynchrony", "lazy", "--order", "reverse", *MMA),
        ("--affine", "--addend", 2, *WIDE, "--configuration", "tma_128x128_4s", "--float-weight"),
        ("--affine", "--addend", 2, *WIDE, "--configuration", "128x128_8w2s", "--float-weight"),
        ("--affine", "--addend", 3, "--residual", "--asynchrony", "random", "--order", "shuffled"),
        ("--affine", "--residual", "--rounding", "toward_zero", *MMA),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_gradients_behind_a_blocks_end_are_right(dtype, options, data):
    """Behind a projection three rows of sums, without one two."""
    record = right(*gradient("conv_bn_grad1x1_end"), "--dtype", dtype, "--data", data, *options)
    c, k = (136, 120) if "--c" in options else (32, 32)
    sums = (2 + ("--residual" in options)) * c
    assert record["elements"] == 2 * c * 81 + sums + k * c
    # The bound is the results' own rounding.
    assert record["worst"] == 0 if data == "integers" else record["worst"] > 0.8
