"""Convolutions of shapes of which oneDNN errs, on the CPU: every way to them is within its bound.

On a CPU with AMX, PyTorch's own bfloat16 convolution is wrong for the first ones.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from matrix import geometry_args, random_operands

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.bench.subject import layers
from resnet_fused.ops import _convolution
from resnet_fused.ops._library import overload

ONE_COLUMN = cases.ConvCase("one column", 2, 64, 16, 2, 64, 3, 3, (2, 2), (1, 1))
CASES = (
    ONE_COLUMN,
    dataclasses.replace(ONE_COLUMN, name="one filter row", r=1, padding=(0, 1)),
    cases.ConvCase("padding alone, vertical", 1, 7, 1, 9, 6, 3, 2, (2, 1), (3, 0), (2, 3)),
    cases.ConvCase("padding alone, dilated", 2, 6, 2, 12, 8, 2, 3, (1, 2), (1, 3), (3, 3)),
)
SOUND = (
    dataclasses.replace(ONE_COLUMN, w=4),
    dataclasses.replace(ONE_COLUMN, stride=(1, 1)),
    cases.ConvCase("projection", 1, 8, 7, 1, 8, 1, 1, (2, 2)),
)


def at_risk(case: cases.ConvCase, dtype: torch.dtype) -> bool:
    x, weight = torch.empty(case.input_shape, dtype=dtype), torch.empty(case.weight_shape)
    return _convolution.errs(x, weight, case.stride, case.padding, case.dilation)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["cpu", "split", "reference"])
def test_bfloat16_is_within_the_bound(name, case):
    torch.manual_seed(0)
    entry = next(one for one in rf.backends.implementations("conv_bn_act") if one.name == name)
    operands = random_operands(case, torch.bfloat16).to_layout("nhwc")
    y = overload("conv_bn_act", name)(*operands.tuple(), *geometry_args(case))
    oracle = numerics.conv_bn_act_oracle(*operands.tuple(), **case.geometry, act=case.act)
    bound = numerics.conv_bn_act_bound(
        *operands.tuple(), oracle, **case.geometry, rounding=entry.rounding, out_dtype=y.dtype
    )
    check = numerics.check_bound(y, oracle, bound)
    assert check.ok, check


def test_they_alone_are_multiplied_in_float32():
    assert all(at_risk(case, torch.bfloat16) for case in CASES)
    assert not any(at_risk(case, torch.float32) for case in CASES)
    assert not any(at_risk(case, torch.bfloat16) for case in SOUND)


def test_no_layer_of_a_resnet_is_among_them():
    """At 224 pixels and at 32; tall and narrow images alone are."""
    for size in (224, 32):
        assert not any(at_risk(one.case, torch.bfloat16) for one in layers("resnet50", size))
