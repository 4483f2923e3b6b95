"""gpu-check's steps of the CUDA convolutions, with the emulator in the place of a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import cuda_standins
import pytest
import torch

from resnet_fused import _extension
from resnet_fused.ops import _cuda, _cuda_plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import behaviour, bounds, operands, plan, speed  # noqa: E402

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


@pytest.fixture
def emulator_for_a_gpu(monkeypatch):
    """The CUDA launches run in the emulator, and nothing says that there is no GPU."""

    cuda_standins.emulate_launches(monkeypatch)
    monkeypatch.setattr(operands, "why_no_cuda", lambda device: None)


@needs_cuda_build
@pytest.mark.emulated
@pytest.mark.parametrize("op", plan.OPS)
def test_the_bound_tier_judges_the_cuda_kernels(op, emulator_for_a_gpu, monkeypatch):
    step = plan.conv(op, "3x3_groups4", "fp16", implementation="cuda")
    assert step.name == f"{op}.cuda fp16 3x3_groups4"
    found = bounds.conv("cpu", **step.arguments)
    assert found["ok"] and 0 < found["truncate"] < 1
    assert found["configuration"] in _cuda_plan.configurations(op)
    right = getattr(_cuda, f"launch_{op}")

    def wrong(*given, **more):
        right(*given, **more)
        out = given[5] if op == "conv_bn_act" else given[4]
        out[0, 0, 0, 0] += 1

    monkeypatch.setattr(_cuda, f"launch_{op}", wrong)
    found = bounds.conv("cpu", **step.arguments)
    assert found["ok"] is False and op in found["error"]


@needs_cuda_build
@pytest.mark.emulated
@pytest.mark.parametrize("op", plan.OPS)
def test_a_split_reduction_gives_the_same_bits(op, emulator_for_a_gpu):
    found = behaviour.determinism("cpu", op, "1x1_2048_512_at7", implementation="cuda")
    assert found["ok"] and found["splits"] > 1, found


@needs_cuda_build
def test_variants_of_the_cuda_kernel_are_timed_by_name(emulator_for_a_gpu):
    case = speed.layer_case("3x3_64_64_at56", 1, "cpu")
    given = speed.make_set(case, torch.float16, "cpu", 0)
    plans, found = {}, {"omitted": {}, "plans": {}}
    names = ("", "64x64_4w4s", "narrow_64x32_4w4s")
    speed._add_cuda(case, given, "cpu", names, plans, found)
    assert set(plans) == {"cuda", "cuda 64x64_4w4s", "cuda narrow_64x32_4w4s"}
    assert plans["cuda 64x64_4w4s"].name == "64x64_4w4s" and not found["omitted"]
    assert found["cuda_configuration"] == plans["cuda"].name
    whose = {name: plan.kernel_and_configuration(name, found) for name in plans}
    assert whose["cuda"] == ("cuda", plans["cuda"].name)
    assert whose["cuda 64x64_4w4s"] == ("cuda", "64x64_4w4s")
    assert plan.kernel_and_configuration("64x64_4w4s", found) == ("triton", "64x64_4w4s")
    assert plan.kernel_and_configuration("ours", {"configuration": "a"}) == ("triton", "a")


def test_without_a_gpu_a_step_is_skipped_with_the_reason():
    for found in (
        bounds.conv("cpu", "conv_bn_act", "1x1", "fp16", implementation="cuda"),
        behaviour.graph("cpu", implementation="cuda"),
        behaviour.large("cpu", "conv_wgrad", implementation="cuda"),
    ):
        assert found == {"ok": None, "skipped": "the CUDA convolutions need a GPU"}
    plans, found = {}, {"omitted": {}, "plans": {}}
    speed._add_cuda(speed.layer_case("3x3_64_64_at56", 1, "cpu"), None, "cpu", ("",), plans, found)
    assert not plans and found["omitted"] == {"cuda": "the CUDA convolutions need a GPU"}
