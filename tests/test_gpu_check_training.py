"""gpu-check's steps of training, run on the CPU where Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import emulated
import pytest
import torch
from triton_trace import needs_interpreter

from resnet_fused import ops
from resnet_fused.bench.training_kernels import KINDS
from resnet_fused.ops import _grad1x1
from resnet_fused.train.step import Step

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import driver, plan, sanitizer, training, training_driver, training_ends  # noqa: E402

CALLS = [
    ("conv_bn_stats", "3x3_16_16_at5"),
    ("conv_bn_dgrad", "3x3_16_16_at5"),
    ("conv_bn_dgrad_end", "3x3_16_16_at5_add_noact"),
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
    found = [t.name for t in plan.timings({"flops": 1.0, "bandwidth": 1.0})]
    assert {"gradients 1x1_64_256_at56@256", "gradients 1x1_512_128_at28_add_noact@32"} < set(found)
    assert sum(name.startswith("gradients ") for name in found) == 2 * len(training.merging())
    assert len(training.merging()) == 6


def test_the_ways_to_the_gradient_between_two_blocks_are_timed():
    """At every place that a stage of ResNet-50 has, at two batch sizes; a row's step is checked."""
    found = [t.name for t in plan.timings({"flops": 1.0, "bandwidth": 1.0})]
    assert {"ends 1x1_256_64_at56_add_noact@256", "ends 1x1_2048_512_at7_add_noact@32"} < set(found)
    assert sum(name.startswith("ends ") for name in found) == 2 * len(training_ends.ends()) == 8
    assert "training row" in [task.name for task in plan.training("cuda:0")]


def _emulated_driver():
    """The driver of the emulator; it skips where that is not built."""
    reason = emulated.why_not("driver", "plain")
    if reason:
        pytest.skip(reason)
    return str(emulated.builder.output("driver", "plain"))


def _stand_in(folder, text):
    made = folder / "driver"
    made.write_text(f"#!/bin/sh\n{text}\n")
    made.chmod(0o755)
    return str(made)


@pytest.mark.emulated
def test_the_driver_judges_every_op_of_training():
    program = _emulated_driver()
    found = training_driver.check("cpu", program)
    assert found["ok"] and 0 < found["worst"] <= 1
    assert {words[1] for words in driver.TRAINING} == set(found["ops"]) > set(training_driver.TIMED)
    assert set(driver.TRAINING) < set(driver.CALLS)
    for op in training_driver.TIMED:
        timed = training_driver.time("cpu", op, 1e12, program)
        assert timed["ok"] and timed["plan"] and "microseconds" not in timed
        assert training_driver.line(timed) == ""


@pytest.mark.emulated
def test_the_driver_judges_every_call_of_sm_90a(monkeypatch):
    """On a GPU that has no such kernel they are skipped."""
    found = training_driver.check("cpu", _emulated_driver(), "sm90a")
    assert found["ok"] and 0 < found["worst"] <= 1
    assert set(found["ops"]) == {words[1] for words in driver.SM90A_CALLS}
    assert {"conv_bn_act_fp8", "conv_chain_fp8"} < set(found["ops"])
    monkeypatch.setattr(training_driver, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    other = training_driver.check("cuda:0", None, "sm90a")
    assert other["ok"] is None and "capability 9.0" in other["skipped"]


def test_calls_of_the_driver_are_steps(tmp_path):
    names = [task.name for task in plan.training("cuda:0")]
    assert {"training driver", "sm90a driver"} < set(names)
    found = [t for t in plan.timings({"flops": 1.0, "bandwidth": 1.0}) if "driver" in t.name]
    assert {t.arguments["op"] for t in found} == set(training_driver.TIMED)
    missing = training_driver.check("cpu", str(tmp_path / "none"))
    assert missing["ok"] is None and "no resnet_fused_driver" in missing["skipped"]
    wrong = _stand_in(tmp_path, """echo '{"wrong": 3}'; exit 1""")
    found = training_driver.check("cpu", wrong)
    assert not found["ok"] and "exit code 1" in found["error"]
    assert not training_driver.time("cuda:0", "bn_add_act", 1.0, wrong)["ok"]


def test_the_time_of_a_call_stands_beside_a_copy(tmp_path, monkeypatch):
    program = _stand_in(tmp_path, """echo '{"op": "x", "plan": "p", "milliseconds": 0.1}'""")
    monkeypatch.setattr(training_driver, "is_cuda", lambda device: True)
    found = training_driver.time("cuda:0", "bn_backward_apply", 3e12, program)
    moved = 3 * 2 * 32 * 256 * 56 * 56
    assert found["moved"] == moved
    assert found["of_floor"] == pytest.approx(moved / 3e12 / 1e-4)
    assert training_driver.line(found) == "100.0 us, 51% of a copy's rate"
    # Passes that only move memory have a rate that is asked for.
    for bandwidth, said in ((3e12, ", BELOW the 90% that are asked for"), (1e12, "rate")):
        found = training_driver.time("cuda:0", "bn_add_act", bandwidth, program)
        assert found["asked"] == 0.9 and training_driver.line(found).endswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [False, True])
def test_a_captured_step_stands_beside_ordinary_ones(monkeypatch, faulty):
    """Some are skipped, since the loss' scale begins too high, and some are taken."""

    class Planted(Step):
        """Stands in for the captured one: with a weight that is off by its last bit."""

        def __call__(self, images, targets):
            taken = super().__call__(images, targets)
            with torch.no_grad():
                next(self.model.parameters()).mul_(1 + 2.0**-23)
            return taken

        def explain(self):
            return "captured"

    if faulty:
        monkeypatch.setattr(training, "CapturedStep", Planted)
    monkeypatch.setattr(training, "STEPS", 3 if faulty else 8)
    found = training.captured_step("cpu", "float16", "reference")
    assert found["ok"] is not faulty
    assert ("tensors differ" in found.get("error", "")) is faulty
    if not faulty:
        assert found["scales"][:3] == [2.0**19, 2.0**18, 2.0**17] and "on cpu" in found["explain"]
        assert found["scales"][-1] >= 2.0**12
    names = [task.name for task in plan.training("cuda:0")]
    for precision in ("float16", "bfloat16"):
        for kind in ("triton", "cuda"):
            assert f"training captured step {precision} {kind}" in names


def test_the_sanitizers_know_the_name_of_every_kernel():
    """Of CUDA's sources and of Triton's."""
    cuda = [path.read_text() for path in (ROOT / "csrc/kernels").glob("*.cuh")]
    triton = [path.read_text() for path in (ROOT / "resnet_fused/triton").glob("*.py")]
    names = {name for text in cuda for name in re.findall(r"\b(\w+_kernel)\(const", text)}
    names |= {name for text in triton for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert len(names) > 40 and {"bn_add_act_kernel", "conv_bn_stats_kernel"} < names
    assert [n for n in sorted(names) if not any(part in n for part in sanitizer.KERNELS)] == []


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

    def test_a_row_takes_the_gradient_between_its_blocks(self, monkeypatch):
        from resnet_fused.triton import conv_bn_dgrad_end as kernel

        found = training_ends.row("cpu")
        assert found["ok"] and found["ended"] == 2 and 0 < found["worst"] <= 1
        right = kernel.launch

        def wrong(*arguments, **options):
            right(*arguments, **options)
            arguments[11][1] *= 1.5

        monkeypatch.setattr(kernel, "launch", wrong)
        found = training_ends.row("cpu")
        assert not found["ok"] and found["error"].startswith("2 of 2 by one op; x: ")

    def test_the_gradient_between_two_blocks_beside_two_ops(self, monkeypatch):
        from resnet_fused.triton import conv_bn_dgrad_end as kernel

        for name, ways in (
            ("3x3_16_16_at5_add_noact", {"one", "two"}),
            ("1x1_32_16_at5_add_noact", {"one", "two", "merged"}),
        ):
            found = training_ends.time("cpu", name, 1)
            assert found["ok"] and set(found["us"]) == ways
            assert set(found["ratios"]) == {f"{way}_over_one" for way in ways - {"one"}}
            assert found["expected"]["ended"]
        right = kernel.launch

        def wrong(*arguments, **options):
            right(*arguments, **options)
            arguments[10].mul_(1.01)

        monkeypatch.setattr(kernel, "launch", wrong)
        found = training_ends.time("cpu", "1x1_32_16_at5_add_noact", 1)
        assert not found["ok"] and "one: " in found["error"]

    def test_what_needs_a_gpu_says_so(self):
        assert training.captured("cpu")["skipped"]
