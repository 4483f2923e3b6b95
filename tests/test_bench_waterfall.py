"""A whole training step: the same weights behind it, and what its time went into."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import bench_records
import pytest
import torch
from command import run

from resnet_fused.bench import ceilings, judging, record, runner, waterfall
from resnet_fused.bench.peers import PEERS
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.waterfall import (
    BOTH,
    COMPILED,
    DGRAD,
    FORWARD,
    GAPS,
    GROUPS,
    HEAD,
    NORM,
    OPTIMIZER,
    OTHER,
    POOL,
    WGRAD,
    group_of,
)
from resnet_fused.bench.work import build
from resnet_fused.convert import fuse
from resnet_fused.report import bench_page, plot_layers
from resnet_fused.report.theme import LIGHT

CPU = torch.device("cpu")


def step_of(dtype: str = "float32", op: str = "train") -> Subject:
    # BatchNorm over the two values of a smaller one has gradients beyond float16, and eager's
    # bfloat16 errors would be as large as the gradients.
    batch, size = (2, 32) if dtype == "float32" else (4, 64)
    return Subject("model", op, "resnet18", batch, dtype, "cpu", size=size)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("resnet_fused::conv_bn_stats", FORWARD), ("resnet_fused::conv_bn_dgrad", DGRAD),
        ("resnet_fused::conv_bn_dgrad_end", DGRAD), ("resnet_fused::conv_bn_wgrad", WGRAD),
        ("resnet_fused::conv_bn_grad1x1", BOTH), ("resnet_fused::conv_bn_grad1x1_end", BOTH),
        ("resnet_fused::bn_add_act_conv_stats", FORWARD),
        ("resnet_fused::bn_add_act_backward", NORM), ("resnet_fused::bn_update_stats_out", NORM),
        ("resnet_fused::bn_act_pool_backward", POOL), ("aten::convolution_backward", BOTH),
        ("aten::mkldnn_convolution_backward", BOTH), ("aten::cudnn_convolution", FORWARD),
        ("aten::native_batch_norm_backward", NORM), ("aten::threshold_backward", NORM),
        ("aten::add_", NORM), ("aten::max_pool2d_with_indices_backward", POOL),
        ("aten::_log_softmax", HEAD), ("aten::addmm", HEAD),
        ("Optimizer.step#SGD.step", OPTIMIZER), ("aten::_fused_sgd_", OPTIMIZER),
        ("aten::_amp_update_scale_", OPTIMIZER), ("CompiledFunctionBackward", COMPILED),
        ("aten::copy_", None), ("_NodeBackward", None), ("resnet_fused_other", None),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", None),
    ],
)  # fmt: skip
def test_an_operator_belongs_to_a_kind(name, group):
    assert group_of(name) == group


def event(name, own=0.0, children=(), kernels=()):
    launched = [SimpleNamespace(name=k, duration=us) for k, us in kernels]
    return SimpleNamespace(
        name=name, self_cpu_time_total=own, cpu_children=list(children), kernels=launched
    )


def summed(events, device):
    found = {}
    for group, seconds in waterfall.spent(events, device):
        found[group] = found.get(group, 0) + round(1e6 * seconds)
    return found


def test_what_a_known_operator_calls_is_its_own():
    tree = event(
        "_NodeBackward", 50,
        [
            event("resnet_fused::conv_bn_dgrad", 1, [event("aten::copy_", 2)]),
            event("aten::copy_", 4),
            event("Optimizer.step#SGD.step", 8, [event("aten::add_", 16)]),
        ],
    )  # fmt: skip
    assert summed([tree], "cpu") == {DGRAD: 3, OTHER: 4, OPTIMIZER: 24}


def test_on_a_gpu_kernels_count_and_their_names_tell_gradients_apart():
    kernels = [("cutlass_dgrad_x", 1), ("cudnn::wgrad_y", 2), ("nchwToNhwc", 4)]
    events = [
        event("aten::convolution_backward", 99, kernels=kernels),
        event("", 99, [event("aten::relu", 99, kernels=[("elementwise", 8)])]),
        event("unknown", 99, kernels=[("triton_poi_fused_relu", 16), ("memcpy", 32)]),
    ]
    expected = {DGRAD: 1, WGRAD: 2, BOTH: 4, NORM: 8, COMPILED: 16, OTHER: 32}
    assert summed(events, "cuda") == expected


def test_gaps_are_what_the_median_has_beyond_the_sum():
    assert waterfall.with_gaps({NORM: 1.0, HEAD: 2.0}, 4.0)[GAPS] == 1.0
    assert waterfall.with_gaps({NORM: 1.0}, 0.5)[GAPS] == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_does_the_optimizers_work_and_leaves_the_weights(dtype):
    work = build(step_of(dtype))
    assert {p.dtype for p in work.module.parameters()} == {torch.float32}
    assert work.sets[0].x.dtype is torch.float32
    before = {name: p.detach().clone() for name, p in work.module.named_parameters()}
    seen = []
    work.module.fc.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    losses = [work.run(work.module)[0] for _ in range(2)]
    assert torch.equal(*losses)
    assert seen == [work.subject.torch_dtype] * 2
    for name, p in work.module.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is not None
    [(_, optimizer, scaler)] = work._optimizers.values()
    assert scaler.is_enabled() is (dtype == "float16")
    buffers = [v["momentum_buffer"] for v in optimizer.state.values()]
    assert len(buffers) == len(before)
    assert all(bool(b.any()) for b in buffers)


def test_gradients_come_without_the_scale():
    plain, scaled = (build(step_of(dtype)) for dtype in ("float32", "float16"))
    name = plain.watched[-1]
    # Other images, and as large.
    expected, found = (work.run(work.module)[1][name].norm() for work in (plain, scaled))
    assert 0.2 < found / expected < 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_step_is_judged_right_and_a_wrong_one_not(dtype):
    work = build(step_of(dtype))
    fused = fuse(work.module)
    assert work.judge(work.run(fused)).ok
    loss, grads = work.run(fused)
    assert not work.judge((loss * 1.1, grads)).ok
    name = work.watched[-1]
    assert not work.judge((loss, {**grads, name: grads[name] * 1.5})).ok


def test_an_oracle_is_computed_without_autocast():
    work = dataclasses.replace(build(step_of("bfloat16")), exact=True)
    seen = []
    work.module.fc.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    work.run(work.module)
    assert seen == [torch.float32]
    assert judging._with_batch(work, work.sets[0]).exact is False


RATES = ceilings.Ceilings(1e12, 1e11, "float32")


@pytest.mark.parametrize("op", waterfall.OPS)
def test_the_least_time_has_every_kind_of_kernel(op):
    found = waterfall.least(build(step_of(op=op)), RATES)
    kinds = {FORWARD, NORM, POOL, HEAD, BOTH}
    assert set(found) == (kinds | {OPTIMIZER} if op == "train" else kinds)
    if op == "train":
        weights = sum(p.numel() for p in build(step_of()).module.parameters())
        assert found[OPTIMIZER] == pytest.approx(5 * 4 * weights / 1e11)
    assert found[BOTH] > found[FORWARD] > found[HEAD]


def test_a_profile_of_both_ways_tells_where_the_time_went():
    work = build(step_of())
    for module in (work.module, fuse(work.module)):
        work.run(module)
        found = waterfall.op_seconds(lambda m=module: work.run(m), "cpu")
        assert {FORWARD, NORM, POOL, HEAD, BOTH, OPTIMIZER} <= set(found)
        assert list(found) == [group for group in GROUPS if group in found]
        assert min(found.values()) > 0


@pytest.fixture(scope="module")
def measured():
    settings = runner.Settings(rounds=2, min_sample_s=0.001, warmup=1)
    return runner.bench([step_of()], [PEERS["eager"], PEERS["fused"]], settings)


def test_the_record_holds_the_step_and_the_limit(measured):
    record.validate(measured)
    [row] = measured["rows"]
    assert row["key"] == "model/train/resnet18/b2/float32/32px"
    for name in ("eager", "fused", "fused_again"):
        variant = row["variants"][name]
        own = {k: v for k, v in variant["op_s"].items() if k != GAPS}
        beyond = max(0.0, variant["median_s"] - sum(own.values()))
        assert variant["op_s"][GAPS] == pytest.approx(beyond)
    assert row["limit"]["ops"][OPTIMIZER] > 0


def waterfall_record():
    made = bench_records.one_model()
    row = made["rows"][0]
    row["subject"] |= {"op": "train"}
    for scale, variant in zip(itertools.count(1), row["variants"].values(), strict=False):
        variant.pop("layer_s", None)
        variant["op_s"] = {FORWARD: 0.01 * scale, OPTIMIZER: 0.002, GAPS: 0.001}
    row["limit"]["ops"] = {FORWARD: 0.004, NORM: 0.003}
    return made


def test_the_picture_has_each_kind_and_the_prediction():
    axis = plot_layers.figure(waterfall_record(), LIGHT).axes[0]
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert labels == [FORWARD, NORM, OPTIMIZER, GAPS]
    assert "by kind of kernel" in axis.get_title(loc="left")
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {
        "eager", "fused", "predicted",
    }  # fmt: skip
    ends = [bar.get_x() + bar.get_width() for bar in axis.patches]
    assert max(ends) == pytest.approx(23.0)  # fused: 20 + 2 + 1 ms


def test_the_page_has_a_table_of_kinds():
    html = bench_page.render(waterfall_record())
    assert "<th>kind of kernel</th>" in html
    assert f"<code>{OPTIMIZER}</code>" in html
    assert "<th>layer</th>" in bench_page.render(bench_records.one_model())


def test_the_command_prints_the_step(tmp_path):
    arguments = [
        "bench", "resnet18", "--level", "model", "--mode", "train", "--batch", 2, "--size", 32,
        "--rounds", 1, "--peers", "none", "--output", tmp_path / "record.json",
    ]  # fmt: skip
    done = run(*arguments)
    for words in ("ms of a step, by kind of kernel", OPTIMIZER, GAPS, "(limit)"):
        assert words in done.stdout
    found = record.read(tmp_path / "record.json")
    assert found["rows"][0]["subject"]["op"] == "train"


def test_a_block_has_no_optimizer():
    with pytest.raises(ValueError, match="accepted are inference, training, training_frozen"):
        Subject("block", "train", "resnet18.layer1.0", 2, "float32", "cpu", size=32)
