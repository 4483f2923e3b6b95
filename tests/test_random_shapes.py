"""Random shapes, layouts and options: every element within its bound, whatever comes.

25 shapes for each implementation and dtype in the suite, 1000 in `make proof`.
"""

from __future__ import annotations

import emulated
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from matrix import ACTIVATION, cells, geometry_args, random_operands

from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload

SMALL = st.integers(1, 3)


@st.composite
def conv_cases(draw: st.DrawFn) -> cases.ConvCase:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    r, s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride, dilation = (draw(SMALL), draw(SMALL)), (draw(SMALL), draw(SMALL))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    h, w = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    assume(h + 2 * padding[0] > dilation[0] * (r - 1))
    assume(w + 2 * padding[1] > dilation[1] * (s - 1))
    return cases.ConvCase(
        "random",
        draw(st.integers(0, 3)),
        groups * draw(st.integers(1, 12)),
        h,
        w,
        groups * draw(st.integers(1, 12)),
        r,
        s,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["relu", "none"])),
    )


# The emulated kernels have random shapes of their own, with drawn configurations and schedules.
CELLS = [cell for cell in cells("conv_bn_act") if cell.values[0].name != emulated.NAME]


@pytest.mark.parametrize(("entry", "dtype"), CELLS)
@given(case=conv_cases(), layout=st.sampled_from(["nchw", "nhwc"]), seed=st.integers(0, 2**31))
def test_within_the_bound(entry, dtype, case, layout, seed):
    torch.manual_seed(seed)
    operands = random_operands(case, dtype).to_layout(layout)
    y = overload("conv_bn_act", entry.name)(*operands.tuple(), *geometry_args(case))
    oracle = numerics.conv_bn_act_oracle(*operands.tuple(), **case.geometry, act=case.act)
    bound = numerics.conv_bn_act_bound(
        *operands.tuple(), oracle, **case.geometry, rounding=entry.rounding, out_dtype=dtype
    )
    check = numerics.check_bound(y, oracle, bound)
    assert check.ok, (case, check)
    assert y.shape == case.output_shape
    if y.numel():
        form = ACTIVATION[layout]
        # In float64: in bfloat16 oneDNN ends the process for some shapes (ops/_convolution.py).
        x, weight = operands.x.double(), operands.weight.double()
        eager = torch.conv2d(x, weight, None, **case.geometry)
        assert y.is_contiguous(memory_format=form) == eager.is_contiguous(memory_format=form)
