"""`bn_add_act_conv_stats` by the emulated CUDA kernel: one more implementation of its op."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _cuda_block_end, _cuda_grad1x1, _results

OP = _cuda_block_end.OP
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = ("y", "residual", "weight", "out", "z")


def problem_of(given: dict[str, Tensor | None], /, **changes: Any) -> Any:
    """The launch's problem, float32 in TF32.

    Args:
        given: operands by name, and the results out, z and stats.
        changes: of what would follow from these.
    """
    y, weight = given["y"], given["weight"]
    assert y is not None and weight is not None
    geometry = zip(("stride", "padding", "dilation", "groups"), _cuda_grad1x1.GEOMETRY, strict=True)
    values = {
        "dtype": emulated.TYPE_NAMES[y.dtype],
        "allow_tf32": True,
        "y_size": y.shape,
        "weight_size": weight.shape,
        **dict(geometry),
        **{f"{name}_stride": emulated._strides(given[name]) for name in IMAGES},
        **{name: emulated._address(t) for name, t in given.items()},
    }
    return emulated.load().BnAddActConvStats(**(values | changes))


def bn_add_act_conv_stats(*operands: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The op, by the emulated kernel, in the order of its schema; copied as a launch copies."""
    form = _results.FORMS[OP]
    out, z, stats = form.empty(*operands)
    made = _cuda_block_end.problem_of(*operands, out, z)
    inputs = dict(zip(form.operands, made.operands, strict=True))
    results = {"out": made.geometry[-1], "z": z, "stats": stats}
    guarded = {name: emulated.Guarded(t) for name, t in results.items()}
    given = inputs | {name: one.tensor for name, one in guarded.items()}
    layout = [None if t is None else (tuple(t.shape), t.stride()) for t in given.values()]
    problem = problem_of(given)
    found = emulated._run_planned(OP, problem, (OP, z.dtype, *layout), inputs, guarded)
    return torch.empty_like(out).copy_(found[0]), found[1], found[2]


emulated.DTYPES[OP] = DTYPES
emulated._register(OP, bn_add_act_conv_stats)
