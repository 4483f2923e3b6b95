"""Chains of layers in e4m3 in a network's graph: which they take, and that no bit changes."""

from __future__ import annotations

import pytest
import torch
from nets import images, stir
from test_freeze_gpu import StandIn
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.freeze import _chains, _gpu, _rules, _served
from resnet_fused.ops.conv_chain import Answer

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
X = images(2, 64)


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    model = stir(tv.ResNet(tv.Bottleneck, [2, 2, 1, 1], num_classes=7)).eval()
    return rf.freeze(model, X, fp8=rf.calibrate_fp8(model, X))


class Watched(nn.Module):
    """Gives back what a block makes, which is wide then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = stir(tv.ResNet(tv.Bottleneck, [3, 1, 1, 1], num_classes=7))

    def forward(self, x):
        net = self.net
        x = net.layer1[0](net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        seen = net.layer1[1](x)
        return seen, net.layer1[2](seen)


@pytest.fixture(scope="module")
def watched():
    model = Watched().eval()
    return rf.freeze(model, X, fp8=rf.calibrate_fp8(model, X))


@pytest.fixture
def asked(monkeypatch) -> list:
    """Chains in e4m3 are served wherever they can be cut; the longest wins."""
    cases: list = []

    def serves(case, dtype, device) -> Answer:
        assert dtype is E4M3
        cases.append(case)
        count = len(case.parts) + case.out_stride
        return Answer(None, True, f"saves {count} us", float(count))

    monkeypatch.setattr(_chains, "serves", serves)
    monkeypatch.setattr(
        _served, "refusal", lambda op, *place: None if op == "conv_chain_fp8" else "not asked for"
    )
    return cases


def chained(engine):
    return _rules.apply(_rules.DEVICE, engine._graph, _rules.Place(CPU, X.dtype, (X,)))


def program_of(graph, engine):
    return _gpu.Builder(_gpu.laid_out(graph), StandIn(), engine._free).build([X], True)[0]


def test_blocks_in_e4m3_are_cut(engine, asked):
    graph, notes = chained(engine)
    chains = [step for step in graph.steps if step.kind == "conv_chain_fp8"]
    assert [step.name for step in chains] == [
        "layer1.0.conv2+layer1.0.downsample.0+layer1.0.conv3+layer1.1.conv1",
        "layer1.1.conv2+layer1.1.conv3+layer2.0.conv1",
        "layer2.0.downsample.0+layer2.0.conv3+layer2.1.conv1",
        "layer2.1.conv2+layer2.1.conv3+layer3.0.conv1",
        "layer3.0.downsample.0+layer3.0.conv3+layer4.0.conv1",
    ]  # the last block's result is wide, as the pooling reads it
    assert [step.options["out_stride"] for step in chains] == [1, 2, 1, 2, 2]
    assert [step.options["projection_stride"] for step in chains] == [1] * 5
    assert sum(note.done for note in notes if note.rule == "conv_chain_fp8") == 5
    assert all("in e4m3 > " in step.pattern for step in chains)
    assert {case.h for case in asked} == {16, 8, 4}


def test_a_chained_network_gives_the_same_bits(engine, asked):
    """Each scale goes with its own result: another one changes them."""
    graph, _ = chained(engine)
    expected = program_of(engine._graph, engine)([X])
    assert torch.equal(program_of(graph, engine)([X]), expected)
    for name in ("residual_scale", "out_scale", "next_out_scale", "front_out_scale"):
        step = next(step for step in graph.steps if step.kind == "conv_chain_fp8")
        before = step.options[name]
        step.options[name] = before * 1.25
        assert not torch.equal(program_of(graph, engine)([X]), expected), name
        step.options[name] = before


def test_layers_of_both_kinds_are_not_mixed(watched, asked):
    """Around a layer that stays wide nothing in e4m3 is taken together with it."""
    graph, _ = chained(watched)
    names = [step.name for step in graph.steps if step.kind == "conv_chain_fp8"]
    first = "net.layer1.0.conv2+net.layer1.0.downsample.0+net.layer1.0.conv3+net.layer1.1.conv1"
    assert names == [first]


def test_where_no_kernel_serves_them_the_reason_is_said(engine):
    graph, notes = chained(engine)
    assert not any(step.kind == "conv_chain_fp8" for step in graph.steps)
    why = [note.why for note in notes if note.rule == "conv_chain_fp8"]
    assert why == ["on the CPU it is the same calls one after the other"]
