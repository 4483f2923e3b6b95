"""What is predicted of the engine by the CUDA kernels follows from their plans, and is written."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path

import pytest

from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not _cuda_plan.exists("conv_chain"), reason="the extension was built without nvcc"
)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_cuda_engine")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_up_to_date(tool):
    page = tool.rates.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.text()}\n{tool.END}" in page, f"run python {tool.__file__} --write"


def test_what_more_is_allowed_takes_no_longer(tool):
    for batch in tool.AIMS:
        times = [tool.engine(batch, allowed) for _, allowed in tool.STEPS]
        assert times[0][1] == 0
        assert all(later[0] <= before[0] for before, later in itertools.pairwise(times))


def test_every_convolution_is_in_one_launch(tool):
    """Launches add up to the engine, and none beats memory or the tensor cores."""
    for batch in tool.AIMS:
        launches = tool.launches(batch)
        total, chains = tool.engine(batch, tool.STEPS[-1][1])
        named = sum(one.count for one in launches if one.name.startswith("chain"))
        assert named == chains
        work = sum(one.count * one.us for one in launches)
        ends = tool.stem_us(batch) + tool.head_us(batch)
        assert work + ends == pytest.approx(total, rel=1e-9)
        assert all(one.us > one.least > 0 for one in launches)
        lost = [one.lost for one in launches]
        assert lost == sorted(lost, reverse=True)


def test_a_convolution_is_predicted_as_its_plan_says(tool):
    case = dataclasses.replace(tool.NETWORK[5].case, n=32)
    shorter = dataclasses.replace(case, n=16)
    assert 0 < tool.conv_us(shorter) < tool.conv_us(case) < 2 * tool.conv_us(shorter)
