"""Emulated conv_bn_stats whose offsets are beyond 2^31 elements, exact on integers.

As tests/test_emulated_huge.py: the tensors lie in memory that is reserved and never filled.
"""

from __future__ import annotations

import emulated
import emulated_stats
import pytest
import torch
from matrix import conv_arguments
from test_emulated_huge import empty, far_apart, pytestmark  # noqa: F401  (where these can run)
from test_emulated_stats import configurations, require_stats

from resnet_fused import cases, numerics
from resnet_fused.ops import _training_checks_stats as checks

CASE = cases.ConvCase("strides", 3, 16, 5, 5, 16, 3, 3, padding=(1, 1))
# Offsets of 16 bytes run over 32 rows of taps that do not exist.
REFUSED = {("x", 2), ("weight", 2)}


def run(tensors, **choice):
    """Runs the kernel on tensors by name; the plan."""
    module = emulated.load()
    problem = emulated_stats.problem_of(*tensors.values(), *conv_arguments(CASE))
    plan = module.conv_bn_stats_plan(problem, emulated.H200, **choice)
    workspace = empty(plan["workspace_bytes"] // 4 + 1, torch.float32)
    inputs = {name: tensors[name] for name in ("x", "norm", "weight")}
    written = {"y": tensors["y"], "stats": tensors["stats"], "workspace": workspace}
    settings = emulated.settings(("huge",), inputs, written)
    module.conv_bn_stats(
        settings, problem, emulated.H200, plan["configuration"], plan["splits"],
        workspace.data_ptr(),
    )  # fmt: skip
    return plan


@pytest.mark.parametrize("bits", [31, 32])
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("name", ["x", "weight", "y"])
def test_strides_beyond(name, dim, bits):
    x, norm, weight = checks.exact_operands(CASE, torch.float16)
    y = torch.full(CASE.output_shape, torch.nan, dtype=torch.float16)
    last = {"memory_format": torch.channels_last}
    tensors = {
        "x": x.contiguous(**last),
        "norm": norm,
        "weight": weight.contiguous(**last),
        "y": y.contiguous(**last),
        "stats": torch.full((2, CASE.k), torch.nan),
    }
    tensors[name] = far_apart(tensors[name], dim, 2**bits)
    chosen = -1
    if (name, dim) in REFUSED:
        with pytest.raises(ValueError, match="one image is more than a launch can take"):
            run(tensors, configuration=0)
        chosen = next(i for i, tile in enumerate(configurations()) if not tile["wide"])
    run(tensors, configuration=chosen)
    expected = numerics.conv_bn_stats_oracle(x, norm, weight, **CASE.geometry)
    assert torch.equal(tensors["y"], expected.to(torch.float16))
    require_stats(expected.to(torch.float16), tensors["stats"])
