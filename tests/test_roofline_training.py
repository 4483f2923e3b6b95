"""Bytes of a training step: passes over a block's tensors, counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_fused import roofline
from resnet_fused.cases import ConvCase

SIDE, WIDTH, N = 16, 64, 64


def conv(c: int, k: int, r: int = 1, stride: int = 1, side: int = SIDE) -> ConvCase:
    return ConvCase("c", N, c, side, side, k, r, r, (stride,) * 2, (r // 2,) * 2)


def passes(kernels: list[roofline.Kernel], backward: bool, weights: int) -> float:
    """Passes over a tensor of the block's inner width, without weights and per-channel values."""
    total = sum(kernel.cost.bytes for kernel in kernels if kernel.backward is backward)
    unit = N * WIDTH * SIDE * SIDE * 2
    readers = 2 if backward else 1  # dgrad reads them, wgrad writes their gradient
    return (total - readers * 2 * weights) / unit


def bottleneck(**options) -> tuple[list[roofline.Kernel], int]:
    layers = [conv(4 * WIDTH, WIDTH), conv(WIDTH, WIDTH, 3), conv(WIDTH, 4 * WIDTH)]
    weights = sum(math.prod(layer.weight_shape) for layer in layers)
    return roofline.node_kernels(layers, torch.bfloat16, **options), weights


@pytest.mark.parametrize(
    ("folds", "forward", "backward", "kernels"),
    # Forward by hand: 4+1, 1+1, 1+4; y3, x and out 12. Backward: dout, out, y3 and dS 16; conv3
    # reads dS and y3 (8) twice, y2 twice, writes 1: 19; conv2 likewise 7; conv1 reads 2 twice, x,
    # dS, and writes dx: 16. With passes of their own: y and h of two layers more in forward; in
    # backward 12+2+5+6, 3+2+2+3 and 3+5+9.
    [(True, 24, 16 + 19 + 7 + 16, 7), (False, 28, 16 + 25 + 10 + 17, 12)],
)
def test_passes_of_an_identity_bottleneck(folds, forward, backward, kernels):
    found, weights = bottleneck(shortcut="identity", folds=folds)
    assert passes(found, False, weights) == pytest.approx(forward, rel=2e-3)
    assert passes(found, True, weights) == pytest.approx(backward, rel=2e-3)
    assert sum(kernel.backward for kernel in found) == kernels


def test_passes_of_a_bottleneck_with_merged_gradients():
    """conv3 reads dS, y3 and y2 once less (9 passes), conv1 dz and y1 (2)."""
    two, weights = bottleneck(shortcut="identity")
    one, _ = bottleneck(shortcut="identity", merged=(0, 2))
    assert passes(two, True, weights) - passes(one, True, weights) == pytest.approx(11, rel=2e-3)
    assert [kernel.op for kernel in one if kernel.backward] == [
        "bn_add_act_backward", "conv_bn_grad1x1", "conv_bn_wgrad", "conv_bn_dgrad",
        "conv_bn_grad1x1",
    ]  # fmt: skip
    found, _ = bottleneck(projection=conv(4 * WIDTH, 4 * WIDTH), merged=(3,))
    assert [kernel.layer for kernel in found if kernel.op == "conv_bn_grad1x1"] == [3]


def test_a_basic_block_moves_less_than_half_of_eager():
    """Eager: 17 and 27 passes; fused 7, and 16 with the block's end as a pass of its own."""
    layers = [conv(WIDTH, WIDTH, 3), conv(WIDTH, WIDTH, 3)]
    found = roofline.node_kernels(layers, torch.bfloat16, shortcut="identity")
    weights = sum(math.prod(layer.weight_shape) for layer in layers)
    assert passes(found, False, weights) == pytest.approx(7, rel=5e-3)
    assert passes(found, True, weights) == pytest.approx(4 + 7 + 7, rel=1e-2)


def test_a_projection_and_a_padded_shortcut_count_what_they_read():
    layers = [conv(WIDTH, WIDTH, 3, 2), conv(WIDTH, WIDTH, 3, side=SIDE // 2)]
    plain = roofline.node_kernels(layers, torch.bfloat16)
    padded = roofline.node_kernels(layers, torch.bfloat16, shortcut="padded")
    projected = roofline.node_kernels(layers, torch.bfloat16, projection=conv(WIDTH, WIDTH, 1, 2))

    def ends(kernels, op):
        return [kernel.cost.bytes for kernel in kernels if kernel.op == op]

    quarter = N * WIDTH * (SIDE // 2) ** 2 * 2
    assert ends(padded, "bn_add_act")[0] - ends(plain, "bn_add_act")[0] == quarter
    assert ends(projected, "bn_add_act")[0] - ends(plain, "bn_add_act")[0] == quarter + 8 * WIDTH
    assert {kernel.layer for kernel in projected} == {0, 1, 2}
    assert sum(kernel.op == "conv_bn_dgrad" for kernel in projected) == 3


def test_a_stem_keeps_one_byte_a_window():
    stem = ConvCase("stem", N, 3, 32, 32, 64, 7, 7, (2, 2), (3, 3))
    kernels = roofline.node_kernels(
        [stem], torch.bfloat16, pooled=(N, 64, 8, 8), input_gradient=False
    )
    assert [kernel.op for kernel in kernels] == [
        "conv_bn_stats", "bn_act_pool", "bn_act_pool_backward", "conv_bn_wgrad",
    ]  # fmt: skip
    pooled, full = N * 64 * 64, N * 64 * 256
    assert kernels[1].cost.bytes == (full + pooled) * 2 + pooled + 2 * 64 * 4


def test_float32_parameters_take_unrounded_gradients():
    case = conv(WIDTH, WIDTH)
    narrow = roofline.conv_bn_wgrad_cost(case, torch.bfloat16)
    wide = roofline.conv_bn_wgrad_cost(case, torch.bfloat16, parameter=torch.float32)
    assert wide.bytes - narrow.bytes == 2 * WIDTH * WIDTH
    assert wide.flops == 2 * N * SIDE * SIDE * WIDTH * WIDTH


def test_passes_of_a_bottleneck_with_the_gradients_between_blocks():
    """Its own end's pass (16) is gone; its first layer reads out and raw beside what it did (8)."""
    alone, weights = bottleneck(shortcut="identity")
    within, _ = bottleneck(shortcut="identity", ended=True, before=False)
    projected, _ = bottleneck(shortcut="identity", ended=True, before=True, merged=(0,))
    assert passes(alone, True, weights) - passes(within, True, weights) == pytest.approx(
        8, rel=1e-2
    )
    assert passes(projected, True, weights) - passes(within, True, weights) == pytest.approx(
        4, rel=1e-2
    )
    assert [kernel.op for kernel in projected if kernel.backward] == [
        "conv_bn_wgrad", "conv_bn_dgrad", "conv_bn_wgrad", "conv_bn_dgrad", "conv_bn_wgrad",
        "conv_bn_dgrad_end",
    ]  # fmt: skip
    first, _ = bottleneck(shortcut="identity", before=False, input_gradient=False)
    assert "conv_bn_dgrad_end" not in [kernel.op for kernel in first]


def test_passes_of_a_bottleneck_with_all_three_gradients_from_one_kernel():
    """Its first layer reads dz, y (2) and the input (4) once less."""
    two, weights = bottleneck(shortcut="identity", before=True)
    one, _ = bottleneck(shortcut="identity", before=True, united=True)
    assert passes(two, True, weights) - passes(one, True, weights) == pytest.approx(6, rel=1e-2)
    assert [kernel.op for kernel in one][-1] == "conv_bn_grad1x1_end"
    assert sum(k.cost.flops for k in two) == sum(k.cost.flops for k in one)
    apart, _ = bottleneck(shortcut="identity", before=True, united=True, folds=False)
    assert "conv_bn_grad1x1_end" not in [kernel.op for kernel in apart]
