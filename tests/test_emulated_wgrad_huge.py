"""Emulated conv_bn_wgrad whose offsets are beyond 2^31 elements, exact on integers.

As tests/test_emulated_huge.py: the tensors lie in memory that is reserved and never filled. Sums
beyond 2^31 elements of the workspace are conv_wgrad's, whose kernel merges both.
"""

from __future__ import annotations

import emulated
import emulated_wgrad
import pytest
import torch
from matrix import conv_arguments
from test_emulated_huge import empty, far_apart, pytestmark  # noqa: F401  (where these can run)
from test_emulated_wgrad import configurations, laid_out

from resnet_fused import cases
from resnet_fused.ops import _training_checks_wgrad as checks

# 12 images: wide loads' offsets run over 64 more.
CASE = cases.ConvCase("strides", 12, 16, 5, 5, 16, 3, 3, padding=(1, 1))


@pytest.mark.parametrize("bits", [31, 32])
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("name", ["dz", "y", "x", "weight"])
def test_strides_beyond(name, dim, bits):
    operands = laid_out(checks.exact_operands(CASE, torch.float16))
    tensors = operands._asdict() | {"weight": torch.full(CASE.weight_shape, torch.nan)}
    tensors[name] = far_apart(tensors[name], dim, 2**bits)
    module = emulated.load()
    problem = emulated_wgrad.problem_of(*tensors.values(), *conv_arguments(CASE))
    plan = module.conv_bn_wgrad_plan(problem, emulated.H200)
    # 76 images of 2^32 / 11 elements each are beyond offsets of 16 bytes in 31 bits.
    out_of_reach = name != "weight" and (dim == 1 or (dim == 0 and bits == 32))
    assert configurations()[plan["configuration"]]["wide"] != out_of_reach
    workspace = empty(plan["workspace_bytes"] // 4 + 1, torch.float32)
    inputs = {key: t for key, t in tensors.items() if key != "weight"}
    written = {"weight": tensors["weight"], "workspace": workspace}
    settings = emulated.settings(("huge",), inputs, written)
    module.conv_bn_wgrad(
        settings, problem, emulated.H200, plan["configuration"], plan["splits"],
        workspace.data_ptr(),
    )  # fmt: skip
    assert torch.equal(tensors["weight"].double(), checks.expected_wgrad(operands, CASE))
