"""docs/chains.md holds what benchmarks/predict_chains.py says, and that follows from its rates."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

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
    said = "\n".join(tool.cuda_chains())
    assert f"{tool.CUDA_BEGIN}\n{said}\n{tool.CUDA_END}" in page, (
        f"run python {tool.__file__} --write"
    )


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
