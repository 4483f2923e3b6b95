"""The ops of training as subjects of the benchmark: operands, judgement, limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resnet_fused import numerics
from resnet_fused.bench import kinds, limits, subject, work
from resnet_fused.bench.peers import PEERS
from resnet_fused.bench.training_kernels import KINDS

NAMES = {
    "conv_bn_stats": ("3x3_16_16_at6", "1x1s2_16_32_at7_noact"),
    "conv_bn_stats_finalize": ("3x3_16_16_at6", "1x1s2_16_32_at7_noact"),
    "conv_bn_dgrad": ("3x3_16_16_at6", "1x1_32_16_at6_add_noact"),
    "conv_bn_dgrad_end": ("3x3_16_16_at6_add_noact", "1x1_32_16_at6_add_noact"),
    "conv_bn_wgrad": ("3x3s2_16_16_at7", "7x7s2_3_16_at14_noact"),
    "conv_bn_grad1x1": ("1x1_16_32_at6", "1x1_32_16_at6_add_noact"),
    "conv_bn_grad1x1_end": ("1x1_32_16_at6_add_noact",),
    "bn_add_act": ("32_at5_add",),
    "bn_add_act_conv_stats": ("1x1_32_16_at6_noact",),
    "bn_add_act_backward": ("32_at5_add",),
}
CELLS = [(op, name) for op in KINDS for name in NAMES[op]]


def built(op: str, name: str, dtype: str) -> work.Work:
    made = work.build(subject.Subject("kernel", op, name, 3, dtype, "cpu"))
    return dataclasses.replace(made, sets=made.sets[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "name"), CELLS)
def test_eager_and_ours_are_right_and_a_wrong_one_is_not(op, name, dtype):
    made = built(op, name, dtype)
    outs = {peer: PEERS[peer].prepare(made).call(0) for peer in ("eager", "fused")}
    for peer, out in outs.items():
        judged = made.judge(out)
        assert judged.ok, f"{peer}: {judged.text}"
    named = KINDS[op].named(outs["fused"])
    assert list(named) == ["", *(result.name for result in KINDS[op].results[1:])]
    for name, t in named.items():
        if not t.numel():  # the sums that nobody wants
            continue
        wrong = t.clone()
        wrong[0, 0] += 0.25 * float(t.abs().max())
        for other in (wrong, torch.zeros_like(t), t[1:]):
            spoilt = tuple((named | {name: other}).values())
            judged = made.judge(spoilt if len(spoilt) > 1 else spoilt[0])
            assert not judged.ok
            assert judged.text.startswith(name)


def test_a_second_result_off_by_more_than_its_bound_is_seen():
    """Sums that are right for another tensor, and M2 that is a thousandth too large."""
    made = built("conv_bn_stats", "3x3_16_16_at6", "bfloat16")
    y, stats = PEERS["fused"].prepare(made).call(0)
    assert made.judge((y, stats)).ok
    assert not made.judge((y, stats * torch.tensor([[1.0], [1.001]]))).ok
    unrounded = torch.conv2d(made.sets[0].h.double(), made.sets[0].weight.double(), padding=1)
    off = torch.stack((unrounded.mean((0, 2, 3)), stats[1].double())).float()
    assert made.judge((y, off)).text.startswith("stats: ")
    made = built("bn_add_act_backward", "32_at5_add", "bfloat16")
    dz, sums = PEERS["fused"].prepare(made).call(0)
    assert made.judge((dz, sums)).ok
    given = made.sets[0]
    raw = (given.dz.float() * given.y.float()).sum((0, 2, 3))  # without mask and mean
    assert not made.judge((dz, torch.stack((sums[0], raw)))).ok
    assert not made.judge((dz, sums, sums)).ok


def test_values_a_channel_are_the_same_whole_or_in_parts(monkeypatch):
    made = built("bn_add_act_backward", "32_at5_add", "float32")
    given = made.sets[0]
    measure = numerics.reductions_oracle
    whole = measure(given.dz, (given.y, given.own))
    for at_once in (1, given.dz.numel() // 5, 1 << 26):
        monkeypatch.setattr(kinds, "AT_ONCE", at_once)
        torch.testing.assert_close(
            kinds.by_channels(measure, given.dz, (given.y, given.own)), whole
        )


def test_what_a_mask_or_a_prologue_changes_is_seen():
    """The operands are such that leaving out a part of the op gives another result."""
    made = built("conv_bn_dgrad", "3x3_16_16_at6", "float32")
    given = made.sets[0]
    run = KINDS["conv_bn_dgrad"].ours(made.case)
    for field in ("norm", "y"):
        less = {field: None, **({"coefficients": None} if field == "y" else {})}
        assert not made.judge(run(dataclasses.replace(given, **less))[0]).ok, field
    made = built("conv_bn_stats", "3x3_16_16_at6", "float32")
    run = KINDS["conv_bn_stats"].ours(made.case)
    assert not made.judge(run(dataclasses.replace(made.sets[0], norm=None))[0]).ok


@pytest.mark.parametrize(("op", "name"), CELLS)
def test_the_limit_is_below_eagers_passes(op, name):
    (layer,) = limits.layers_of(built(op, name, "bfloat16"))
    eager = sum(cost.bytes for cost in layer.eager)
    assert 0 < layer.fused[0].bytes < 1.05 * eager
    assert layer.fused[0].flops == sum(cost.flops for cost in layer.eager)


@pytest.mark.parametrize("op", KINDS)
def test_every_layer_of_a_network_is_there(op):
    """Every convolution has its statistics and gradients, every block its end."""
    network = subject.layers("resnet18", 64)
    found = [case for _, case in KINDS[op].cases(network)]
    blocks = sum(layer.case.residual for layer in network)
    expected = {
        "conv_bn_stats": len(network), "conv_bn_stats_finalize": len(network),
        "conv_bn_wgrad": len(network),
        "conv_bn_dgrad": len(network) - 1,  # nobody needs the images' gradient
        "conv_bn_dgrad_end": blocks // 2,  # the second of each stage's two
        "conv_bn_grad1x1": 0,  # the projections have stride 2
        "bn_add_act_conv_stats": 0, "conv_bn_grad1x1_end": 0,  # basic blocks begin with 3x3
        "bn_add_act": blocks, "bn_add_act_backward": blocks,
    }  # fmt: skip
    assert len(found) == expected[op]
    keys = [s.key for s in subject.subjects("kernel", "cpu", batches=[1], ops=[op], size=64)]
    # One shape of each of ResNet-50's stages stands behind a block's end.
    behind = op in ("bn_add_act_conv_stats", "conv_bn_dgrad_end", "conv_bn_grad1x1_end")
    assert len(keys) == len(set(keys)) >= (4 if behind else 6)
    inner = [case.act == "relu" for case in found if op.startswith("conv")]
    assert not inner or 0 < sum(inner) < len(inner) or op == "conv_bn_dgrad_end"
