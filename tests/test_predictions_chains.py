"""docs/chains.md holds what benchmarks/predict_chains.py says, and that follows from its rates."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import roofline
from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "benchmarks" / "predict_chains.py"
    spec = importlib.util.spec_from_file_location("predict_chains", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["predict_chains"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.text()}\n{tool.END}" in page, f"run python {tool.__file__} --write"


@pytest.mark.skipif(
    not _cuda_plan.exists("conv_chain"), reason="the extension was built without nvcc"
)
def test_the_cuda_kernels_part_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    for begin, cases, about, end in tool.cuda_tables():
        said = "\n".join(tool.cuda_chains(cases, about))
        assert f"{begin}\n{said}\n{end}" in page, f"run python {tool.__file__} --write"


@pytest.mark.skipif(
    not _cuda_plan.exists("conv_chain"), reason="the extension was built without nvcc"
)
def test_shared_filters_leave_memory_as_the_limit(tool):
    """Of the second stage's chain: 514 MB at what a kernel reaches of memory, and a launch."""
    (case,) = (case for case in tool.RESNET50_CHAINS if case.name == "layer2")
    case = dataclasses.replace(case, n=256)
    found = {
        name: tool._chain_plan.predict_cuda(case, torch.bfloat16, tool.WITH_TMA, frozenset({name}))
        for name in ("tma_128x128_3s_k128", "tma_128x128_3s_k128_2c")
    }
    alone, shared = (one.chain / tool._chain_plan.CLOCK for one in found.values())
    moved = roofline.conv_chain_cost(case, torch.bfloat16).bytes
    least = moved / (tool.MEMORY * tool.REACHED) + tool.LAUNCH
    assert 0.99 * least < shared < 1.01 * least < alone


def test_what_is_not_built_and_why(tool):
    """Whole blocks lose to the cut across the block's end from the second stage on."""
    times = {}
    for k, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        for name, kernels in tool.cuts(k, size).items():
            times[k, name] = 1e6 * sum(one.predicted() for one in kernels)
            assert times[k, name] > 1e6 * sum(one.roof() for one in kernels)
    best = "conv2+conv3+conv1"
    assert times[64, "whole block"] > 0.95 * times[64, best]
    for k in (128, 256, 512):
        assert times[k, "whole block"] > times[k, best]
    # Behind the second stage less than a tenth is to be had by any cut.
    for k in (256, 512):
        assert (
            min(t for (width, _), t in times.items() if width == k) > 0.9 * times[k, "one by one"]
        )
    assert times[64, "conv3+conv1"] < 0.8 * times[64, "one by one"]
