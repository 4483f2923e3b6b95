"""The prediction of a step by the CUDA kernels: the docs hold the code's, and it adds up."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent
OPS = ("conv_bn_stats", "conv_bn_dgrad", "conv_bn_wgrad")
BATCH = 256

pytestmark = pytest.mark.skipif(
    not all(map(_cuda_plan.exists, OPS)), reason="the extension was built without nvcc"
)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_cuda_training")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def total(found, name):
    return sum(getattr(one, name) for one in found)


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.text()}\n{tool.END}" in page, f"run python {tool.__file__} --write"


def test_every_kernel_of_the_step_is_there(tool):
    """And none is faster than memory or the tensor cores."""
    found = tool.kernels(BATCH)
    of = {op: [one for one in found if one.op == op] for op in {one.op for one in found}}
    counts = [len(of[op]) for op in (*OPS, "bn_add_act", "bn_add_act_backward")]
    assert counts == [53, 52, 53, 16, 16]
    assert len(of) == 7  # and the stem's pooling
    for one in found:
        assert one.us >= one.limit == max(one.memory, one.tensor) > 0
        assert one.lost == 0 or one.op in OPS
        assert bool(one.plan) == bool(one.kind) == (one.op in OPS)
    step, limit = tool.step_us(BATCH)
    launches = 2.0 * (len(found) + 3 * 53)
    assert step == pytest.approx(total(found, "us") + launches)
    assert limit == pytest.approx(total(found, "limit") + launches)
    assert total(found, "gb") * 1e3 / BATCH == pytest.approx(272.1, abs=0.1)  # docs/training.md


def test_the_forward_convolutions_are_those_of_the_other_prediction(tool):
    stats = importlib.import_module("predict_stats")
    nodes = stats._nodes(BATCH)
    kinds = ((7, False), (1, False), (3, True), (1, True))
    other = sum(stats.row(nodes, *kind)[1] for kind in kinds)
    found = [one for one in tool.kernels(BATCH) if one.op == "conv_bn_stats"]
    # Here no kernel is faster than memory.
    assert other <= total(found, "us") / 1e3 < 1.02 * other


def test_calls_are_the_nodes(tool):
    """Behind a BatchNorm x is read through it, its gradient masked; 16 blocks add a shortcut."""
    read = {"conv_bn_stats": 1, "conv_bn_dgrad": 6, "conv_bn_wgrad": 4}
    found = [(k, tool.problem(n, k)) for n in tool.step(32) for k in n.kernels if k.op in OPS]
    for op, place in read.items():
        through = [one.operands[place] is not None for kernel, one in found if kernel.op == op]
        assert sum(through) == 32 and len(through) in (52, 53)
    added = [k.layer for k, one in found if k.op == "conv_bn_dgrad" and one.operands[4] is not None]
    assert added == [0] * 16
    turned = [one.operands[1] is not None for kernel, one in found if kernel.op != "conv_bn_stats"]
    assert all(turned) and len(turned) == 105


def test_what_the_page_says_in_words(tool):
    found = tool.kernels(BATCH)
    convolutions = [one for one in found if one.op in OPS]
    lost = total(found, "lost")
    reached = total(convolutions, "limit") / total(convolutions, "us")
    assert 0.8 < lost / total(found, "limit") < 1
    assert total([one for one in found if one.kind == "3x3"], "lost") > lost / 2
    ones = {op: total([o for o in found if (o.op, o.kind) == (op, "1x1")], "lost") for op in OPS}
    assert min(ones["conv_bn_stats"], ones["conv_bn_dgrad"]) > ones["conv_bn_wgrad"]
    (stem,) = (one for one in convolutions if (one.op, one.kind) == ("conv_bn_wgrad", "7x7"))
    assert stem.plan.startswith("narrow") and stem.lost > 500
    page = " ".join(tool.PAGE.read_text(encoding="utf-8").split())
    assert f"convolutions are predicted at {reached:.2f} of their limit" in page


def test_what_loses_most_comes_first(tool):
    ranked = tool.worst(tool.kernels(BATCH))
    lost = [total(group, "lost") for group in ranked]
    assert lost == sorted(lost, reverse=True)
    assert sum(map(len, ranked)) == len(tool.kernels(BATCH))
    assert sum(lost) == pytest.approx(total(tool.kernels(BATCH), "lost"))
