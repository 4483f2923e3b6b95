"""docs/fp8.md holds what benchmarks/predict_fp8.py says, and that follows from the plans."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import pytest

from resnet_fused.cases import RESNET50_LAYERS
from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not _cuda_plan.exists("conv_bn_act_fp8"), reason="the extension was built without nvcc"
)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_fp8")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.text()}\n{tool.END}" in page, f"run python {tool.__file__} --write"


def test_what_it_gains_by_batch(tool):
    begin, end = tool.GAINS
    said = tool.gains()
    assert f"{begin}\n{said}\n{end}" in tool.PAGE.read_text(encoding="utf-8"), "run it --write"
    rows = [line.strip("| ").split(" | ") for line in said.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == [1, 8, 32, 256]
    gains = [(float(row[-2]), float(row[-1])) for row in rows]
    assert all(now > before for now, before in gains[:-1]) and len(set(gains[-1])) == 1
    assert gains[0][0] < 1 < gains[1][0] and gains == sorted(gains)


def test_each_stage_has_its_own_layers(tool):
    """Those of stages behind the second are neither's; all of them are the network's."""
    whole = tool.layers("")
    assert sum(case.count for case in whole) == sum(case.count for case in RESNET50_LAYERS[1:])
    projections = [case for case in whole if case.act == "none"]
    assert [(case.name, case.residual) for case in projections] == [("1x1_64_256_at56", False)]
    first, second = tool.layers("layer1"), tool.layers("layer2")
    assert [case.count for case in first if case.r == 3] == [3]
    assert sum(case.count for case in first) == 11  # three blocks, a projection, the next one's
    assert sum(case.count for case in second) == 13
    assert not {case.name for case in first} & {case.name for case in second}


def test_what_the_page_says_in_words(tool):
    """e4m3 moves half of the bytes, and with windows loses no stage one by one."""
    for stage in ("layer1", "layer2", ""):
        wide, narrow = (tool.total(stage, dtype) for dtype in (tool.BF16, tool.E4M3))
        assert narrow.bytes == pytest.approx(wide.bytes / 2, rel=0.01)
        assert narrow.us < 0.75 * wide.us
    whole = tool.total("", tool.E4M3).us
    assert tool.chained("", tool.BF16).us > 1.25 * whole
    assert tool.chained("", tool.E4M3).us < whole


def test_the_whole_engine_is_counted_as_the_cuda_engine(tool):
    """bfloat16's columns are predict_cuda_engine's first and last step; the gain is as said."""
    cuda = importlib.import_module("predict_cuda_engine")
    alone, chained, narrow, least = tool.engines()
    assert alone == pytest.approx(cuda.engine(tool.BATCH, cuda.STEPS[0][1]).us, rel=1e-6)
    assert chained == pytest.approx(cuda.engine(tool.BATCH, cuda.STEPS[-1][1]).us, rel=1e-3)
    assert tool.AIM < chained / narrow < chained / least
    said = " ".join(tool.PAGE.read_text(encoding="utf-8").split())
    assert f"to gain {chained / least:.2f}**, where the project aims at {tool.AIM};" in said
    assert f"one by one it is {chained / narrow:.2f}." in said
    ends = tool.stem_us(tool.BATCH) + tool.head_us(tool.BATCH)
    assert f"on both sides and take {ends:.0f} us" in said
    stem = cuda.predict_stem.predict_wgmma(tool.BATCH)
    assert max(stem, key=stem.get) == "tensor"


CLUSTERS = {
    "3x3_128_128_at28": "| 3x3 of 128 channels, 28 x 28 |",
    "3x3_256_256_at14": "| 3x3 of 256 at 14 x 14, of 512 at 7 x 7 |",
    "3x3_512_512_at7": "| 3x3 of 256 at 14 x 14, of 512 at 7 x 7 |",
    "1x1_1024_256_at14": "| 1x1 of 1,024 into 256, 14 x 14 |",
    "1x1_1024_512_at14": "| 1x1 of 1,024 into 512, 14 x 14 |",
}
"""Convolutions of ResNet-50 -> their line in the page's table of clusters."""


def test_what_two_blocks_save(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    names = _cuda_plan.configurations("conv_bn_act_fp8")
    found = 0
    for case in tool.layers(""):
        if case.name not in CLUSTERS:
            continue
        made = tool.problem(case, tool.E4M3)
        shared = _cuda_plan.plan(made, tool.GPU)
        name = names[shared.configuration]
        tile, _, by = name.rpartition("_")
        alone = _cuda_plan.plan(made, tool.GPU, names.index(tile), 1)
        us = [1e6 * one.cycles / tool._chain_plan.CLOCK for one in (alone, shared)]
        sides = {"2c": "filters", "2p": "pixels"}
        assert f"{CLUSTERS[case.name]} {us[0]:.0f} | {us[1]:.0f} | {sides[by]} |" in page, us
        found += 1
    assert found == len(CLUSTERS)


FOUR = ("tma_s128x128_6s_2c_2p", "tma_s64x128_8s_2c_2p", "tma_s64x64_12s_t_2c_2p")


def test_what_four_blocks_take(tool):
    """A step's cycles follow from the tiles and the plan's rates; the batches from the plans."""
    page = " ".join(tool.PAGE.read_text(encoding="utf-8").split())
    text = (ROOT / "csrc" / "launch" / "conv_plan.h").read_text(encoding="utf-8")
    rate = {
        name: math.prod(map(float, value.split("*")))
        for name, value in re.findall(r"double (k\w+) = ([\d.* ]+);", text)
    }
    names = _cuda_plan.configurations("conv_bn_act_fp8")
    batches = {name: [] for name in FOUR}
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        plans = [_cuda_plan.plan(tool.problem(case, tool.E4M3), tool.GPU)
                 for case in tool.layers("", batch)]  # fmt: skip
        for name in {names[plan.configuration] for plan in plans} & set(FOUR):
            batches[name].append(batch)
    assert {name for name in names if name.endswith(tool.FOUR)} == set(FOUR)
    for name in FOUR:
        pixels, channels = map(int, re.search(r"s(\d+)x(\d+)", name).groups())
        asked = 128 * (pixels + channels)
        read = 128 * channels + channels / 64 * pixels * 128
        columns = [asked / rate["kCacheBytes"], asked / 2 / rate["kCacheBytes"],
                   (asked + read) / rate["kSharedBytes"],
                   pixels * channels * 64 / rate["kWarpgroupUnit"]]  # fmt: skip
        taken = " to ".join(str(batches[name][i]) for i in (0, -1))
        said = " | ".join(f"{cycles:,.0f}" for cycles in columns)
        assert re.search(rf"\| `{name}` \| {re.escape(said)}[^|]* \| (batch )?{taken} \|", page), (
            said, taken)  # fmt: skip


def test_one_image_shares_reductions_in_bfloat16_alone(tool):
    (case,) = (case for case in tool.layers("", 1) if case.name == "3x3_512_512_at7")
    wide = _cuda_plan.plan(tool.problem(case, tool.BF16), tool.GPU)
    assert _cuda_plan.configurations("conv_bn_act")[wide.configuration].startswith("tma_cluster")
    us = [tool.convolution(case, dtype, tool.ENGINE).us for dtype in (tool.BF16, tool.E4M3)]
    page = " ".join(tool.PAGE.read_text(encoding="utf-8").split())
    said = f"up to {wide.splits} blocks of a cluster, which e4m3 has no kernel for: a 3x3 of 512 "
    assert f"{said}channels takes {us[0]:.0f} us so, {us[1]:.0f} in e4m3" in page
