"""Counts of ops and networks against published numbers and by hand."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torchvision
from torch import nn

from resnet_fused import roofline
from resnet_fused.cases import CONV_CASES, RESNET50_CHAINS, RESNET50_LAYERS, ChainCase, ConvCase

BY_NAME = {case.name: case for case in CONV_CASES}
GMAC = {18: 1.814, 34: 3.664, 50: 4.089, 101: 7.801, 152: 11.514}


def network(depth: int) -> nn.Module:
    """On meta: weights are not made, only their sizes."""
    with torch.device("meta"):
        return getattr(torchvision.models, f"resnet{depth}")()


@pytest.mark.parametrize("depth", GMAC)
def test_gmac_of_torchvisions_resnets(depth: int) -> None:
    model = network(depth)
    cost = roofline.model_cost(model, (1, 3, 224, 224))
    assert round(cost.gmac, 3) == GMAC[depth]
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert sum(layer.kind == "conv" for layer in cost.layers) == convs


def test_conv_outputs_of_resnet50() -> None:
    cost = roofline.model_cost(network(50), (1, 3, 224, 224))
    assert round(cost.conv_outputs / 1e6, 2) == 11.11
    twice = roofline.model_cost(network(50), (2, 3, 224, 224))
    assert twice.conv_outputs == 2 * cost.conv_outputs and twice.gmac == 2 * cost.gmac


def test_conv_cost_by_hand() -> None:
    case = ConvCase("c", 2, 8, 5, 5, 16, 3, 3, padding=(1, 1), residual=True)
    x, w, y = 2 * 8 * 25, 16 * 8 * 9, 2 * 16 * 25
    fused = roofline.conv_cost(case, torch.bfloat16)
    assert fused.flops == 2 * y * 72 == 2 * case.macs
    assert fused.bytes == 2 * (x + w + 2 * y) + 2 * 16 * 4
    eager = roofline.conv_cost(case, torch.bfloat16, fused=False)
    # convolution; BatchNorm reads and writes; the add reads two and writes one; ReLU.
    assert eager.bytes == 2 * (x + w + y + 2 * y + 3 * y + 2 * y) + 2 * 16 * 4
    assert eager.flops == fused.flops
    wide = roofline.conv_cost(case, torch.float64)
    assert wide.bytes == 8 * (x + w + 2 * y) + 2 * 16 * 8


def test_gradients_and_bn_act_by_hand() -> None:
    case = ConvCase("c", 2, 8, 5, 5, 16, 3, 3, padding=(1, 1), residual=True)
    x, w, y = 2 * 8 * 25, 16 * 8 * 9, 2 * 16 * 25
    for cost in (roofline.conv_dgrad_cost, roofline.conv_wgrad_cost):
        assert cost(case, torch.bfloat16) == roofline.Cost(
            2 * case.macs, 2 * (x + w + 2 * y) + 16 * 4
        )
        linear = dataclasses.replace(case, act="none")
        assert cost(linear, torch.float64).bytes == 8 * (x + w + y) + 16 * 8
    # The input's gradient is written whole; of the input a quarter is read.
    case = ConvCase("s", 1, 8, 9, 9, 4, stride=(2, 2), act="none")
    y = 4 * 25
    assert roofline.conv_dgrad_cost(case, torch.half).bytes == 2 * (8 * 81 + 32 + y) + 4 * 4
    assert roofline.conv_wgrad_cost(case, torch.half).bytes == 2 * (8 * 25 + 32 + y) + 4 * 4

    pixels = 2 * 8 * 5 * 3
    assert roofline.bn_act_cost((2, 8, 5, 3), torch.half) == roofline.Cost(0, 4 * pixels + 64)
    more = roofline.bn_act_cost((2, 8, 5, 3), torch.float64, residual=True)
    assert more.bytes == 24 * pixels + 128


def test_a_stride_beyond_the_filter_skips_pixels() -> None:
    case = ConvCase("s", 1, 8, 9, 9, 4, stride=(2, 2))
    y = 4 * 25
    assert roofline.conv_cost(case, torch.float32).bytes == 4 * (8 * 25 + 32 + y) + 2 * 4 * 4
    assert roofline.conv_cost(BY_NAME["empty_batch"], torch.float32).flops == 0


def test_layers_of_the_list_are_those_of_the_model() -> None:
    cost = roofline.model_cost(network(50), (1, 3, 224, 224))
    convs = sum(layer.macs for layer in cost.layers if layer.kind == "conv")
    assert convs == sum(case.count * case.macs for case in RESNET50_LAYERS)


def test_fused_traffic_by_hand() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = (
                nn.Conv2d(4, 4, 1, bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU(),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn(self.conv(x))
            y += x
            return self.relu(y)

    cost = roofline.model_cost(nn.Sequential(Block(), nn.ReLU()), (2, 4, 3, 3), dtype=torch.float16)
    y, w = 2 * 4 * 9, 16
    kinds = [(layer.name, layer.kind) for layer in cost.layers]
    assert kinds == [
        ("0.conv", "conv"), ("0.bn", "batch_norm"), ("0", "add"), ("0.relu", "relu"), ("1", "relu"),
    ]  # fmt: skip
    assert [layer.eager.bytes for layer in cost.layers] == [
        2 * (2 * y + w), 2 * 2 * y, 2 * 3 * y, 2 * 2 * y, 2 * 2 * y,
    ]  # fmt: skip
    # The convolution reads the shortcut as well; the second ReLU has no convolution before it.
    assert [layer.fused.bytes for layer in cost.layers] == [2 * (3 * y + w), 0, 0, 0, 2 * 2 * y]
    assert cost.kernels(fused=False) == 5 and cost.kernels(fused=True) == 2
    assert cost.cost(fused=True) == roofline.Cost(2 * y * 4, 2 * (5 * y + w))


def test_resnet50_fuses_to_one_kernel_a_convolution() -> None:
    cost = roofline.model_cost(network(50), (256, 3, 224, 224), dtype=torch.half)
    assert cost.kernels(fused=True) == 53 + 3, "and max pool, average pool, the linear layer"
    machine = {"peak_flops": 790e12, "bandwidth": 4.3e12}
    # The analytic limits of an H200 at batch 256: 24.3k images/s as eager, 60.2k fused.
    assert 256 / cost.seconds(**machine, fused=False) == pytest.approx(24.3e3, rel=0.01)
    assert 256 / cost.seconds(**machine, fused=True) == pytest.approx(60.2e3, rel=0.01)
    with_launches = cost.seconds(**machine, fused=True, per_kernel=1.0)
    assert with_launches == pytest.approx(56 + cost.seconds(**machine, fused=True))


def test_seconds_is_the_larger_of_two() -> None:
    cost = roofline.Cost(flops=100, bytes=10)
    assert cost.seconds(10, 1000) == 10 and cost.seconds(1e9, 1) == 10 and cost.intensity == 10
    assert roofline.Cost(1, 0).intensity == float("inf")
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="peak_flops is"):
            cost.seconds(bad, 1)
        with pytest.raises(ValueError, match="bandwidth is"):
            cost.seconds(1, bad)


def test_the_model_is_left_alone() -> None:
    model = torchvision.models.resnet18().train()
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    roofline.model_cost(model, [1, 3, 64, 64])
    assert model.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_table_and_json() -> None:
    cost = roofline.model_cost(torchvision.models.resnet18(), (1, 3, 224, 224))
    record = json.loads(json.dumps(cost.to_dict()))
    assert record["gmac"] == cost.gmac and record["dtype"] == "float32"
    assert sum(row["macs"] for row in record["layers"]) / 1e9 == pytest.approx(cost.gmac)
    assert record["eager_bytes"] == sum(row["eager_bytes"] for row in record["layers"])
    lines = str(cost).splitlines()
    assert len(lines) == len(cost.layers) + 2 and "1.814" in lines[-1]
    assert any("layer2.0.downsample.0" in line for line in lines)


@pytest.mark.parametrize("shape", [(), (0, 3, 8, 8), (1, 3, -8, 8), (1.0, 3, 8, 8)])
def test_bad_input_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input_shape is"):
        roofline.model_cost(torchvision.models.resnet18(), shape)


def test_a_chain_reads_and_writes_each_tensor_once() -> None:
    """With x and q the wide and the narrow activations of a block: 2x + 2q in place of 3x + 4q.

    A front takes the 3x3 convolution's own 2q away; behind a stage's last block 3/4 of out are not
    written.
    """
    first, middle, last = (dataclasses.replace(RESNET50_CHAINS[i], n=256) for i in range(3))
    x, q = (256 * 56 * 56 * channels * 2 for channels in (256, 64))
    half = torch.bfloat16
    small = 2e5  # weights and vectors

    def moved(case: ChainCase) -> int:
        return roofline.conv_chain_cost(case, half).bytes

    assert (round(x / 1e6), round(q / 1e6)) == (411, 103)
    assert 0 < moved(middle) - (2 * x + 2 * q) < small
    assert 0 < moved(dataclasses.replace(middle, front=64)) - (2 * x + 2 * q) < small
    assert 0 < moved(first) - (x + 3 * q) < small
    assert 0 < moved(last) - (1.25 * x + 3 * q) < small
    parts = sum(roofline.conv_cost(part, half).bytes for part in middle.parts)
    assert 0 < parts - (3 * x + 2 * q) < small  # conv3 and conv1; conv2 moves 2q more
    assert roofline.conv_chain_cost(middle, half).flops == 2 * middle.macs
    everything = dataclasses.replace(first, front=64)
    assert roofline.conv_chain_cost(everything, half).flops == 2 * everything.macs
    strided = dataclasses.replace(RESNET50_CHAINS[3], n=1)
    assert roofline.conv_chain_cost(strided, half).flops == 2 * strided.macs
