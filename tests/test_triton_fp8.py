"""conv_bn_act_fp8's Triton kernel: every configuration bit for bit, splits, planted faults."""

from __future__ import annotations

import pytest
import torch
from fp8_operands import E4M3, exact_operands, random_fp8, same_bits
from triton_trace import PROOF, needs_interpreter

from resnet_fused import cases
from resnet_fused.ops import _fp8_checks
from resnet_fused.triton import _tiles

pytestmark = needs_interpreter
# 35 pixels, 80 filters, two steps for each of four taps.
ODD = cases.ConvCase("odd", 1, 160, 9, 8, 80, 2, 2, (2, 1), (1, 0), residual=True)
NAMES = [tile.name for tile in _tiles.TILES]


def plan(splits, name="64x64_4w4s"):
    return _tiles.Plan(_tiles.BY_NAME[name], splits, False, "for the test")


def run(case, operands, p):
    from resnet_fused.triton import conv_bn_act_fp8

    n, k, h, w = case.output_shape
    memory = torch.full((n, h + 2, w + 3, k + 16), 77.0).to(operands.out_dtype)
    out = memory[:, 1:-1, 1:-2, 8 : 8 + k].permute(0, 3, 1, 2)
    out.fill_(float("nan"))
    conv_bn_act_fp8.launch(*operands.tuple(), out, *operands.options(case), plan=p)
    written = out.clone()
    out.fill_(72.0)
    memory = memory.float()
    assert ((memory == 72) | (memory == torch.tensor(77.0).to(out.dtype).float())).all()
    return written


@pytest.mark.parametrize("name", NAMES if PROOF else NAMES[::3])
def test_the_self_check_passes_every_configuration(name):
    _fp8_checks.conv_bn_act_fp8(name, "cpu")


@pytest.mark.parametrize("fault", ["residual's scale", "result's scale", "no saturation"])
def test_the_self_check_finds_what_is_planted(fault, monkeypatch):
    from resnet_fused.triton import conv_bn_act_fp8

    right = conv_bn_act_fp8.launch

    def wrong(*arguments, **how):
        *rest, residual_scale, out_scale, dtype = arguments
        if fault == "residual's scale":
            residual_scale *= 2
        elif fault == "result's scale":
            out_scale = 1 / out_scale
        right(*rest, residual_scale, out_scale, dtype, **how)
        if fault == "no saturation":
            out = arguments[5]
            large = out.float().abs() == 448
            out.copy_(torch.where(large, 416.0, out.float()).to(out.dtype))

    monkeypatch.setattr(conv_bn_act_fp8, "launch", wrong)
    with pytest.raises(ArithmeticError, match="elements are wrong"):
        _fp8_checks.conv_bn_act_fp8("128x64_4w4s", "cpu")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out", [E4M3, torch.float16])
def test_splits_are_exact_and_within_the_bound(splits, out):
    operands = exact_operands(ODD, out_dtype=out).to_layout("nhwc")
    assert same_bits(run(ODD, operands, plan(splits)), operands.expected(ODD))
    operands = random_fp8(ODD, out_dtype=out).to_layout("nhwc")
    first = run(ODD, operands, plan(splits))
    assert operands.check(ODD, first).ok
    assert same_bits(run(ODD, operands, plan(splits)), first)


def test_slices_of_larger_tensors_are_read_where_they_lie():
    operands = random_fp8(ODD).to_layout("nhwc")
    n, c, h, w = ODD.input_shape
    wide = torch.full((n, h, 2 * w, c + 16), float("nan")).to(E4M3)
    wide[:, :, ::2, :c] = operands.x.permute(0, 2, 3, 1)
    operands.x = wide[:, :, ::2, :c].permute(0, 3, 1, 2)
    assert operands.check(ODD, run(ODD, operands, plan(1))).ok
