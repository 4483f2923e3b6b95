"""In the place of a GPU's launches: for tests of layers in one launch in the frozen engine.

Plans are the extension's own, for the memory that the layers have.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from nets import stir
from test_freeze_gpu import StandIn
from torch import nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.freeze import _gpu, _kernels, _one_launch
from resnet_fused.ops import _cuda, _cuda_network, _cuda_plan

HALF = torch.bfloat16
H200 = (132, 232448, 233472, 90)
needs_kernel = pytest.mark.skipif(
    not _cuda_plan.exists(_cuda_network.OP),
    reason="the extension was built without nvcc, or is an older one",
)


class Gpu:
    """What the stand-ins were asked, and what they say."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.single: list[tuple[str, bool]] = []
        self.wishes: list[tuple[int, int]] = []
        self.given: list[tuple] = []
        self.refusal: str | None = None
        self.asked = 0
        self.fails: Exception | None = None
        self.wrong = 0.0

    def refused(self, device, dtype):
        self.asked += 1
        return self.refusal

    def launch(self, layers, made, memory):
        assert memory.dtype is torch.int32 and not memory.any()
        assert memory.numel() * 4 >= made.workspace_bytes
        if self.fails is not None:
            raise self.fails
        self.runs.append(len(layers))
        self.given.append((layers, made))
        for one in layers:
            compute(*one[:5], one.out, *one[5:10])
            one.out.add_(self.wrong)

    def alone(self, *given, wish=None, dependent=False, follows=False, **more):
        self.single.append(("wish" if wish else "own", follows))
        if wish is not None:
            self.wishes.append(wish)
        compute(*given)


def compute(x, weight, scale, shift, residual, out, *options):
    y = torch.ops.resnet_fused.conv_bn_act.reference(x, weight, scale, shift, residual, *options)
    out.copy_(y)


def install(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """conv_bn_act served by "cuda" on the CPU, whose launches are stand-ins."""
    made = Gpu()
    choose = _kernels.KINDS["conv_bn_act"].choose

    def chosen(step, args):
        with backends.backend("reference"):
            found = choose(step, args)
        if step.name.startswith("other"):
            return found
        cuda = dataclasses.replace(found.implementation, name="cuda")
        return dataclasses.replace(found, implementation=cuda, why="by CUDA")

    kind = _kernels.KINDS["conv_bn_act"]._replace(choose=chosen)
    monkeypatch.setitem(_kernels.KINDS, "conv_bn_act", kind)
    monkeypatch.setattr(_one_launch, "DEVICE", "cpu")
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_cuda_network, "clusters", lambda device, cluster: 256 // cluster)
    monkeypatch.setattr(_cuda_network, "refusal", made.refused)
    monkeypatch.setattr(_cuda_network, "launch", made.launch)
    monkeypatch.setattr(_cuda, "launch_conv_bn_act", made.alone)
    return made


def engine_of(model, x, word="always", apart=None, graph=None):
    """An engine whose program is a GPU's, and the driver that captured it."""
    engine, driver = rf.freeze(model, x), StandIn()
    engine._programs.clear()
    graph = _gpu.laid_out(graph or engine._graph)
    engine._builder = _gpu.Builder(graph, driver, engine._free, apart)
    with _one_launch.preferring(word):
        engine._programs[engine._first], _ = engine._built([x], True)
    return engine, driver


def run(model, x):
    with torch.inference_mode():
        return model(x)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def whys(engine):
    return {row.layer: (row.implementation, row.why) for row in engine.report().rows}


LAYERS = 11  # of the three bottlenecks


def bottlenecks() -> nn.Module:
    """Three of them, which the reference computes in milliseconds; the first layer is narrow."""
    torch.manual_seed(0)

    def projection(c, k, stride):
        return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        rf.nn.Bottleneck(16, 8, 1, projection(16, 32, 1)), rf.nn.Bottleneck(32, 8),
        rf.nn.Bottleneck(32, 16, 2, projection(32, 64, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    return stir(body).eval().to(HALF)
