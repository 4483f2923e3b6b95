"""Emulated conv_bn_grad1x1 whose offsets are beyond 2^31 elements, exact on integers.

As tests/test_emulated_huge.py: the tensors lie in memory that is reserved and never filled.
"""

from __future__ import annotations

import emulated
import emulated_grad1x1
import pytest
import torch
from test_emulated_grad1x1 import exact, require
from test_emulated_huge import empty, far_apart, pytestmark  # noqa: F401  (where these can run)

from resnet_fused import cases

# Pixels lie one behind the other, so that one stride is that of all.
PIXELS = cases.ConvCase("pixels", 40, 16, 1, 1, 16)
IMAGES = cases.ConvCase("images", 3, 16, 4, 4, 16)


@pytest.mark.parametrize("configuration", [0, 3])
@pytest.mark.parametrize("bits", [31, 32])
@pytest.mark.parametrize(
    ("case", "name", "dim"),
    [(PIXELS, name, 0) for name in ("dz", "y", "x", "dx", "weight", "dweight")]
    + [(PIXELS, "dweight", 1), (IMAGES, "addend", 0), (IMAGES, "addend", 2), (IMAGES, "addend", 3)],
    ids=str,
)
def test_strides_beyond(case, name, dim, bits, configuration):
    step = 2 if case is IMAGES else 1
    o = exact(case, torch.float16, step=step)
    inputs = {
        "dz": o.dz, "y": o.y, "coefficients": o.coefficients, "x": o.raw, "norm": o.norm,
        "weight": o.weight, "addend": o.addend,
    }  # fmt: skip
    results = {
        "dx": torch.full_like(o.raw, torch.nan),
        "sums": torch.full((2, case.c), torch.nan),
        "dweight": torch.full(case.weight_shape, torch.nan, dtype=torch.float16),
    }
    tensors = inputs | results
    tensors[name] = far_apart(tensors[name], dim, 2**bits)
    module = emulated.load()
    problem = emulated_grad1x1.problem_of(tensors, step)
    wish = (configuration, 2 if configuration == 0 else 1)
    plan = module.conv_bn_grad1x1_plan(problem, emulated.H200, *wish)
    workspace = empty(plan["workspace_bytes"] // 4 + 1, torch.float32)
    written = {key: tensors[key] for key in results} | {"workspace": workspace}
    module.conv_bn_grad1x1(
        emulated.settings(("huge",), {key: tensors[key] for key in inputs}, written), problem,
        emulated.H200, *wish, workspace.data_ptr(),
    )  # fmt: skip
    require(case, o, [tensors[key] for key in results], step)
