"""The prediction of a step by the CUDA kernels: the docs hold the code's, and it adds up."""

from __future__ import annotations

import collections
import importlib
import math
import sys
from pathlib import Path

import pytest

from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent
BETWEEN, UNITED = "conv_bn_dgrad_end", "conv_bn_grad1x1_end"
OPS = ("conv_bn_stats", "conv_bn_dgrad", "conv_bn_wgrad", "conv_bn_grad1x1", BETWEEN, UNITED)
END = "bn_add_act_conv_stats"
FOLDED = 12
"""Blocks' ends of fifteen that are made with the convolution behind them."""
ENDS = 15
"""Blocks' ends behind whose ReLU the next block makes the gradient: all that have one behind."""
ALL_THREE = 6
"""Of these, where both gradients of the convolution come from the same kernel."""
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
    # Of 52 layers with both gradients 5 have one kernel, and 15 go on to a block's end.
    ends = ENDS - ALL_THREE, ALL_THREE
    assert counts == [53 - FOLDED, 32, 48 - ALL_THREE, 5, *ends, 16 - FOLDED, 16 - ENDS]
    assert len(of) == 11 and len(of[END]) == FOLDED  # and the stem's pooling
    for one in found:
        assert one.us >= one.limit == max(one.memory, one.tensor) > 0
        planned = one.op in (*OPS, END)
        assert one.lost == 0 or planned
        assert bool(one.plan) == bool(one.kind) == planned
    step, limit = tool.step_us(BATCH)
    # They finalize as they end, 1,500 cycles at 1,480 MHz, but for those made with a block's end,
    # which two kernels follow; backward's finalize is a kernel.
    alone = 53 - FOLDED
    launches = 2.0 * (len(found) + alone + 3 * FOLDED) + alone * 1500 / 1480
    assert step == pytest.approx(total(found, "us") + launches)
    assert limit == pytest.approx(total(found, "limit") + launches)
    # docs/training.md: 267.8 by two kernels each, and less by what a merged one reads once, by a
    # block's output where the convolution behind it makes it, and by its gradient, twice.
    spared = 2 * sum(math.prod(b.cases[0].input_shape) for _, b, one in tool.folding(BATCH) if one)
    spared += 2 * 2 * sum(math.prod(b.cases[0].input_shape) for _, b, _ in tool.folding(BATCH))
    # And dz, y and the input once more, where all three gradients come from one kernel.
    once = [n.cases[0] for n in tool.step(BATCH) for k in n.kernels if k.op == UNITED]
    spared += sum(2 * (2 * math.prod(c.output_shape) + math.prod(c.input_shape)) for c in once)
    left = 267.8 - saved(tool, found) - spared / BATCH / 1e6
    assert total(found, "gb") * 1e3 / BATCH == pytest.approx(left, abs=0.1)


def saved(tool, found):
    """MB an image that merged kernels move less than two: dz, y, and x where both read it."""
    merged = [(n, k) for n in tool.step(BATCH) for k in n.kernels if k.op == "conv_bn_grad1x1"]
    assert len(merged) == sum(one.op == "conv_bn_grad1x1" for one in found)
    sizes = [(n.cases[k.layer], n.inner(k.layer)) for n, k in merged]
    twice = sum(2 * math.prod(case.output_shape) + math.prod(case.input_shape) for case, _ in sizes)
    # Without a BatchNorm below dgrad does not read x.
    once = sum(math.prod(case.input_shape) for case, inner in sizes if not inner)
    return 2 * (twice - once) / BATCH / 1e6


def test_what_is_merged_is_what_the_docs_say(tool):
    merged = {
        (n.layers[k.layer], n.inner(k.layer))
        for n in tool.step(BATCH)
        for k in n.kernels
        if k.op == "conv_bn_grad1x1"
    }
    # docs/training_cuda.md: the 1x1 layers of the first stage, but those behind a block's end.
    expansions = {(f"layer1.{block}.conv3", True) for block in range(3)}
    first = {("layer1.0.conv1", False), ("layer1.0.downsample.0", False)}
    assert merged == expansions | first
    reductions = [b.cases[0] for _, b, _ in tool.folding(BATCH)]
    alone = [case for case in reductions if tool.merging(case, False)]
    assert [(case.c, case.k) for case in alone] == [(256, 64), (256, 64), (256, 128)]


def test_an_end_is_folded_where_its_plan_is_ahead(tool):
    """As docs/training_cuda.md counts them; each spares what is read twice, and a kernel."""
    gpus = (tool.ABOUT, tool.A100)
    taken = [sum(one for *_, one in tool.folding(BATCH, gpu)) for gpu in gpus]
    assert taken == [FOLDED, 11]
    page = " ".join((ROOT / "docs" / "training_cuda.md").read_text(encoding="utf-8").split())
    assert "takes it at eleven of ResNet-50's fifteen places, and an H200 at twelve" in page
    found = collections.Counter(one.op for one in tool.kernels(BATCH, tool.A100))
    assert (found["conv_bn_stats"], found["bn_add_act"]) == (53 - 11, 16 - 11)
    folded = [(a, b) for a, b, one in tool.folding(BATCH, tool.A100) if one]
    apart = [k for n in tool.step(BATCH, tool.A100) for k in n.kernels]
    spared = 2 * sum(math.prod(behind.cases[0].input_shape) for _, behind in folded)
    together = total(tool.kernels(BATCH, tool.A100), "gb") * 1e9
    assert together == pytest.approx(sum(k.cost.bytes for k in apart) - spared, rel=1e-6)
    made = [
        k for k in tool._calls(BATCH, tool.A100, "resnet50") if k[1].op == "bn_add_act_conv_stats"
    ]
    projected = [len(a.layers) > a.chain for a, _ in folded]
    assert [tool.problem(*call).call[-1] for call in made] == projected
    assert any(projected) and not all(projected)


def test_the_forward_convolutions_are_those_of_the_other_prediction(tool):
    stats = importlib.import_module("predict_stats")
    nodes = stats._nodes(BATCH)
    kinds = ((7, False), (1, False), (3, True), (1, True))
    other = sum(stats.row(nodes, *kind)[1] for kind in kinds)
    found = [one for one in tool.kernels(BATCH) if one.op == "conv_bn_stats"]
    ends = [behind.cases[0] for _, behind, one in tool.folding(BATCH) if one]
    other -= sum(stats.cycles(case, False, stats.H200) for case in ends) / 1480e3
    # Here no kernel is faster than memory, which plans by wgmma do not ask of 1x1 layers.
    assert other <= total(found, "us") / 1e3 < 1.08 * other


def test_deeper_networks_take_longer_and_blocks_of_3x3_fold_no_end(tool):
    for batch in (32, BATCH):
        taken = [tool.step_us(batch, name)[0] for name in tool.DEPTHS]
        assert taken == sorted(taken)
    for name in tool.DEPTHS[:2]:
        assert tool.folding(BATCH, network=name) == []
        assert not [one for one in tool.kernels(BATCH, network=name) if one.op == END]
    # Behind all blocks of the first two stages, and of the third all but the last one.
    assert sum(one for *_, one in tool.folding(BATCH, network="resnet152")) == 3 + 8 + 35


def test_calls_are_the_nodes(tool):
    """Behind a BatchNorm x is read through it, its gradient masked; 16 blocks add a shortcut."""
    read = {"conv_bn_stats": 1, "conv_bn_dgrad": 6, "conv_bn_wgrad": 4, "conv_bn_grad1x1": 4}
    addend = {"conv_bn_dgrad": 4, "conv_bn_grad1x1": 6, BETWEEN: 4, UNITED: 4}
    found = [(k, tool.problem(n, k)) for n in tool.step(32) for k in n.kernels if k.op in OPS]
    through = collections.Counter(
        k.op for k, one in found if k.op in read and one.operands[read[k.op]] is not None
    )
    merged = through["conv_bn_grad1x1"]
    assert through["conv_bn_stats"] == 32 and merged > 0
    assert through["conv_bn_dgrad"] == through["conv_bn_wgrad"] == 32 - merged
    added = [
        k.layer for k, one in found if k.op in addend and one.operands[addend[k.op]] is not None
    ]
    assert added == [0] * 16
    backward = [(k, one) for k, one in found if k.op != "conv_bn_stats"]
    assert all(one.operands[1] is not None for _, one in backward)
    both = sum(k.op in ("conv_bn_grad1x1", UNITED) for k, _ in backward)
    assert len(backward) + both == 105


def test_what_the_page_says_in_words(tool):
    found = tool.kernels(BATCH)
    convolutions = [one for one in found if one.op in (*OPS, END)]
    lost = total(found, "lost")
    assert 0.22 < lost / total(found, "limit") < 0.27
    of = {
        kind: {
            op: total([o for o in found if (o.op, o.kind) == (op, kind)], "lost")
            for op in (*OPS, END)
        }
        for kind in ("1x1", "3x3")
    }
    assert lost * 0.5 < sum(of["3x3"].values())
    alike = [of["3x3"][op] for op in ("conv_bn_stats", "conv_bn_dgrad", "conv_bn_wgrad")]
    assert max(alike) < 1.3 * min(alike)
    assert sum(of["1x1"].values()) == pytest.approx(1652, abs=10)
    assert all(one.plan.startswith("tma_") for one in convolutions if one.kind == "1x1")
    by_two = [one for one in convolutions if one.kind == "3x3" and "/2" in one.call]
    assert len(by_two) == 3 * 3 and total(by_two, "lost") > sum(of["3x3"].values()) / 3
    runs = [one for one in convolutions if one.kind == "3x3" and "/2" not in one.call]
    for one in runs:
        few = one.op == "conv_bn_dgrad" and " 512 to 512 " in one.call
        assert one.plan.startswith("halo_" if few else "tma_win"), one
    assert total([one for one in runs if one.op == "conv_bn_wgrad"], "us") < 4980 / 2
    plans = {one.op: one.plan for one in convolutions if one.kind == "7x7"}
    assert plans["conv_bn_stats"].startswith("tma_image")
    assert plans["conv_bn_wgrad"].startswith("image_")
    reached = total(convolutions, "limit") / total(convolutions, "us")
    assert tool.reached(BATCH) == pytest.approx(reached)


def test_what_loses_most_comes_first(tool):
    ranked = tool.worst(tool.kernels(BATCH))
    lost = [total(group, "lost") for group in ranked]
    assert lost == sorted(lost, reverse=True)
    assert sum(map(len, ranked)) == len(tool.kernels(BATCH))
    assert sum(lost) == pytest.approx(total(tool.kernels(BATCH), "lost"))
