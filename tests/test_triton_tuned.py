"""Training's convolutions in the configurations that tuning chose: found, launched, explained."""

from __future__ import annotations

import pytest
import torch
from triton_trace import needs_interpreter

import resnet_fused as rf
from resnet_fused import _tuned, _verdicts, backends
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.tune import Job, Settings, tune_one
from resnet_fused.bench.tune_kernels import Option, TritonKernel, key_of
from resnet_fused.bench.tune_ops import OPS, outputs
from resnet_fused.bench.work import build

CASES = {
    "conv_bn_act": "3x3_16_32_at6_add",
    "conv_dgrad": "3x3s2_16_32_at6",
    "conv_wgrad": "1x1_16_32_at6",
    "conv_bn_stats": "3x3_16_32_at6",
    "conv_bn_dgrad": "3x3s2_16_32_at6",
    "conv_bn_dgrad_end": "3x3_16_32_at6_add_noact",
    "conv_bn_wgrad": "1x1_16_32_at6_noact",
}


@pytest.fixture(autouse=True)
def history(tmp_path, monkeypatch):
    """A user without one."""
    monkeypatch.setenv(_verdicts.FOLDER, str(tmp_path))
    _tuned.forget()
    yield
    _tuned.forget()


def keep(work, configuration: str) -> None:
    kept = _tuned.Tuned(configuration, 1, 1.25, 1.2, 1.3, "the pick")
    _tuned.save("cpu", [(key_of(work, "triton"), kept)])


class TestInterpreted:
    pytestmark = needs_interpreter

    @pytest.mark.parametrize("op", OPS)
    def test_each_option_is_right_and_what_is_kept_is_launched(self, op, monkeypatch):
        """A launch without a plan takes the kept configuration: the one that was timed."""
        work = build(Subject("kernel", op, CASES[op], 2, "float32", "cpu"))
        kernel = TritonKernel()
        pick, others = kernel.options(work)
        other = next(one for one in others if one.configuration != pick.configuration)
        for option in (pick, other):
            outs = outputs(work)
            for out in outs:
                out.fill_(float("nan"))
            kernel.launch(work, 0, outs, option)
            judged = work.judge(outs if len(outs) > 1 else outs[0])
            assert judged.ok, f"{option.name}: {judged.text}"
        asked = []
        found = _tuned.find
        monkeypatch.setattr(_tuned, "find", lambda *call: asked.append(found(*call)) or asked[-1])
        keep(work, other.configuration)
        outs = outputs(work)
        kernel.launch(work, 0, outs, Option("", 1))  # without a plan, as the op does
        assert [one.configuration for one in asked] == [other.configuration]
        assert work.judge(outs if len(outs) > 1 else outs[0]).ok

    def test_a_wrong_second_result_is_no_winner(self):
        """Sums that are off by a thousandth: the faster configuration is not kept."""

        class Wrong(TritonKernel):
            def launch(self, work, i, outs, option):
                super().launch(work, i, outs, option)
                outs[1].mul_(1.001)

        op = "conv_bn_stats"
        job = Job(Subject("kernel", op, CASES[op], 2, "float32", "cpu"), ())
        outcome = tune_one(job, Wrong(), Settings(rounds=2, screening=1, most=1))
        assert outcome.problem is not None
        assert "stats: " in outcome.problem

    def test_explain_says_what_was_tuned(self):
        work = build(Subject("kernel", "conv_bn_dgrad", "3x3_16_16_at6", 2, "float32", "cpu"))
        _, others = TritonKernel().options(work)
        keep(work, others[0].configuration)
        block = rf.nn.BasicBlock(16, 16).to(memory_format=torch.channels_last).train()
        x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
        with backends.backend("triton"), backends.recording() as routes:
            block(x.requires_grad_())
        assert [route.implementation for route in routes] == ["triton", "triton"]
        said = f"conv_bn_dgrad {others[0].configuration}/1: tuned on this GPU: 1.25x"
        assert all(route.why.endswith(said) for route in routes)

    def test_explain_says_it_of_the_gradient_between_two_blocks(self):
        """At the convolution that makes it, and at no other."""
        op = "conv_bn_dgrad_end"
        work = build(Subject("kernel", op, "3x3_16_16_at6_add_noact", 2, "float32", "cpu"))
        _, others = TritonKernel().options(work)
        keep(work, others[0].configuration)
        row = torch.nn.Sequential(rf.nn.BasicBlock(16, 16), rf.nn.BasicBlock(16, 16))
        row = rf.fuse(rf.unfuse(row).to(memory_format=torch.channels_last).train())
        x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
        with backends.backend("triton"), backends.recording() as routes:
            row(x.requires_grad_())
        said = f"{op} {others[0].configuration}/1: tuned on this GPU: 1.25x"
        assert [said in route.why for route in routes] == [False, False, True, False]
