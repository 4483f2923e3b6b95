"""docs/fp8.md holds what benchmarks/predict_fp8_front.py says, whose model is that of the plans."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused.ops import _cuda_chain, _cuda_plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS = {
    "conv2 + layer1_first": ("tma_win128x64_2s_front64_d64", True),
    "conv2 + layer1": ("tma_win128x64_3s_front64", False),
    "conv2 + layer1_last": ("tma_win128x128_2s_front64", True),
}
"""Of bfloat16, and whether it streams the filters into next."""

pytestmark = pytest.mark.skipif(
    not _cuda_plan.exists("conv_chain_fp8"), reason="the extension was built without nvcc"
)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_fp8_front")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.text()}\n{tool.END}" in page, f"run python {tool.__file__} --write"


def test_of_bfloat16_the_model_is_the_plans(tool):
    """Cycle for cycle, so that its rates and terms are theirs."""
    cases = {case.name: case for case in tool.fronts()}
    assert set(cases) == set(CONFIGURATIONS)
    for name, (configuration, streams) in CONFIGURATIONS.items():
        for batch in (256, 32, 8):
            case = dataclasses.replace(cases[name], n=batch)
            only = frozenset({configuration})
            planned = _cuda_chain.predict(case, torch.bfloat16, tool.predict_fp8.GPU, only)
            assert not isinstance(planned, str), planned
            assert tool.cycles(case, 2, streams=streams) == pytest.approx(planned[0], rel=1e-9)


def test_what_the_page_says_in_words(tool):
    gains = {
        form.name: [sum(tool.apart(c)) - tool.microseconds(c, form) for c in tool.fronts()]
        for form in tool.FORMS
    }
    first, middle, last = gains[tool.BUILT.name]
    assert (round(first), round(middle), round(last)) == (-12, 6, -13)
    assert sum(gains["three"]) == pytest.approx(95, abs=0.5)
    for name in ("steps of 128", "three", "both"):
        assert min(gains[name]) > 0
    for case in tool.fronts():
        limits = tool.tile(case, 1)
        assert max(limits) == limits.alone > 1.25 * limits.memory
