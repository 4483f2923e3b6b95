"""gpu-check's steps of training, run on the CPU where Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from triton_trace import needs_interpreter

from resnet_fused import ops
from resnet_fused.bench.training_kernels import KINDS
from resnet_fused.ops import _grad1x1

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import plan, training  # noqa: E402

CALLS = [
    ("conv_bn_stats", "3x3_16_16_at5"),
    ("conv_bn_dgrad", "3x3_16_16_at5"),
    ("conv_bn_wgrad", "1x1_16_32_at5_noact"),
    ("bn_add_act_backward", "32_at4_add"),
]


def test_the_plan_names_every_op_and_block():
    """On a GPU: all blocks of ResNet-50, a captured step, the heaviest calls of each op."""
    names = [task.name for task in plan.training("cuda:0")]
    assert sum(name.startswith("training resnet50.") for name in names) == len(training.blocks())
    assert "training captured" in names
    for op in KINDS:
        assert sum(name.startswith(f"{op} ") for name in names) >= 4, op
    for name in training.merging_blocks():
        assert f"training merged {name}" in names
    every = [task.name for task in plan.bounds("cuda:0")]
    assert set(names) < set(every)
    assert len(every) == len(set(every))


def test_both_ways_to_the_gradients_are_timed():
    """Of every 1x1 convolution that has a kernel for both, at two batch sizes."""
    found = [t.name for t in plan.timings({"flops": 1.0, "bandwidth": 1.0}, {})]
    assert {"gradients 1x1_64_256_at56@256", "gradients 1x1_512_128_at28_add_noact@32"} < set(found)
    assert sum(name.startswith("gradients ") for name in found) == 2 * len(training.merging())
    assert len(training.merging()) == 6


class TestInterpreted:
    """The steps themselves."""

    pytestmark = needs_interpreter

    @pytest.mark.parametrize(("op", "name"), CALLS)
    def test_a_right_kernel_passes(self, op, name):
        found = training.kernel("cpu", op, name, batch=1)
        assert found["ok"], found
        assert found["worst"] <= 1.0

    def test_a_wrong_result_and_wrong_sums_fail(self, monkeypatch):
        op, name = CALLS[0]
        right = ops.conv_bn_stats

        def wrong(*args, **options):
            y, stats = right(*args, **options)
            return y, stats * torch.tensor([[1.0], [1.001]])

        monkeypatch.setattr(ops, "conv_bn_stats", wrong)
        found = training.kernel("cpu", op, name, batch=1)
        assert not found["ok"]
        assert "stats: " in found["error"]
        monkeypatch.setattr(ops, "conv_bn_stats", lambda *a, **o: right(*a, **o)[0])
        assert "every result there: False" in training.kernel("cpu", op, name, batch=1)["error"]

        def other(*args, **options):
            y, stats = right(*args, **options)
            return y * 1.01, stats

        monkeypatch.setattr(ops, "conv_bn_stats", other)
        assert not training.kernel("cpu", op, name, batch=1)["ok"]

    @pytest.mark.parametrize("name", ["1x1_16_32_at5", "1x1_32_16_at5_add_noact"])
    def test_the_merged_gradient_beside_two(self, name):
        assert training.kernel("cpu", _grad1x1.OP, name, "float16", batch=1)["ok"]
        found = training.gradients("cpu", name, 1)
        assert found["ok"] and set(found["us"]) == {"merged", "two"}
        assert not found["expected"]["merged"]  # 25 pixels
        assert training.gradients("cpu", "1x1_16_512_at5", 1)["skipped"].startswith("512 filters")

    def test_a_merged_gradient_that_errs_fails(self, monkeypatch):
        from resnet_fused.triton import conv_bn_grad1x1 as kernel

        right = kernel.merge

        def wrong(partial, dweight):
            right(partial, dweight)
            dweight[0] *= 1.01

        monkeypatch.setattr(kernel, "merge", wrong)
        found = training.gradients("cpu", "1x1_16_32_at5", 1)
        assert not found["ok"] and "merged: dweight" in found["error"]
        assert not training.kernel("cpu", _grad1x1.OP, "1x1_16_32_at5", "float16", batch=1)["ok"]

    def test_what_needs_a_gpu_says_so(self):
        assert training.captured("cpu")["skipped"]
