"""The frozen engine's numbers on the CPU: whole networks, NaN and overflow, and the bounds."""

from __future__ import annotations

import os

import pytest
import torch
from nets import images, stir, tiny_resnet
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import numerics
from resnet_fused.freeze import _bounds, _cpu

PROOF = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NETWORKS = ("resnet18", "resnet50", "resnet34", "resnet101", "resnet152")


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN in the same places."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    )


@pytest.mark.parametrize("dtype", DTYPES if PROOF else DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", NETWORKS if PROOF else NETWORKS[:2])
def test_whole_networks_against_float64(name, dtype):
    model = stir(getattr(tv, name)()).eval()
    with torch.no_grad():
        for block in (m for m in model.modules() if isinstance(m, tv.Bottleneck)):
            block.bn3.weight.mul_(0.25)  # the sums of 50 blocks stay in float16's range
    model = model.to(dtype)
    x = torch.randn(2, 3, *((97, 131) if PROOF else (49, 67))).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    engine, fused = rf.freeze(model, x), rf.fuse(model)
    y = run(engine, x)
    assert y.isfinite().all() and torch.equal(y, run(fused, x))
    assert sum(row.implementation in ("cpu", "cpu32") for row in engine.report().rows) > 15
    for batch in range(3, 8) if PROOF else ():
        more = images(batch, 40, dtype)
        assert torch.equal(run(engine, more), run(fused, more))
    eager, oracle = run(model, x), run(model.double(), x.double())
    check = numerics.gradient_check(y, eager, oracle)
    assert check.ratio <= numerics.END_TO_END_LIMIT * numerics.chance(y.numel())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 3e38, 6e4])
def test_nan_and_inf_go_the_same_ways(value, dtype):
    model = tiny_resnet().to(dtype)
    x = images(2, 32, dtype)
    engine, fused = rf.freeze(model, x), rf.fuse(model)
    x[1, 2, 5, 7] = value
    assert equal(run(engine, x), run(fused, x))
    assert run(engine, x)[0].isfinite().all()


def test_nan_would_be_lost_without_the_look(monkeypatch):
    model = tiny_resnet()
    x = images()
    x[1, 2, 5, 7] = float("nan")
    engine, expected = rf.freeze(model, images()), run(rf.fuse(model), x)
    assert equal(run(engine, x), expected) and expected.isnan().any()
    monkeypatch.setattr(_cpu, "_small", lambda x: True)
    assert not equal(run(engine, x), expected)


@pytest.mark.parametrize("gamma", [1e12, 1e20, 1e36])
def test_overflow_inside_of_the_network(gamma):
    """No look at the input tells of it: the bounds do."""
    model = tiny_resnet(tv.BasicBlock)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(gamma)
    x = images()
    engine, fused = rf.freeze(model, x), rf.fuse(model)
    assert len(engine._builder.segments) > 1
    for scale in (1e-30, 1.0, 1e6):
        assert equal(run(engine, x * scale), run(fused, x * scale)), scale


def test_bounds_hold_and_are_cut_where_they_must():
    model = tiny_resnet(tv.Bottleneck)
    engine = rf.freeze(model, images())
    graph = engine._graph
    kept = [at for at, s in enumerate(graph.steps) if s.options.get("act") == "relu"]
    assert [(s.start, s.stop) for s in _bounds.segments(graph, kept)] == [(0, len(graph.steps))]
    # By hand: the largest |y| of a layer is at most its bound, with the input at LIMIT.
    step = graph.steps[0]
    x = torch.full((1, 3, 9, 9), _bounds.LIMIT, dtype=torch.float64)
    x *= torch.randn(1, 3, 9, 9).sign()
    weight = step.tensors["weight"].double() * step.tensors["scale"].double()[:, None, None, None]
    x[0, :, 1:8, 1:8] = weight[3].sign() * _bounds.LIMIT  # the worst input for channel 3
    y = torch.conv2d(x, weight, step.tensors["shift"].double(), 2, 3)
    bound = _bounds._bound(step, {step.inputs[0]: torch.tensor([_bounds.LIMIT]).double()},
                           _bounds.gains(step))  # fmt: skip
    assert (y.abs().amax((0, 2, 3)) <= bound).all()
    assert y[0, 3].abs().max() > 0.9 * bound[3]  # and no looser than it says
