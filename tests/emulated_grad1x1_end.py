"""`conv_bn_grad1x1_end` by the emulated CUDA kernel: one implementation more."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _cuda_grad1x1, _cuda_grad1x1_end, _results

OP = _cuda_grad1x1_end.OP
DTYPES = (torch.bfloat16, torch.float16)
IMAGES = ("dz", "y", "weight", "addend", "out", "raw", "residual", "dx", "dweight")


def problem_of(given: dict[str, Tensor | None], step: int, /, **changes: Any) -> Any:
    """The launch's problem.

    Args:
        given: operands by name, and the results dx, sums and dweight.
        step: the addend's stride.
        changes: of what would follow from these.
    """
    dx, weight, dweight = given["dx"], given["weight"], given["dweight"]
    assert dx is not None and weight is not None and dweight is not None
    geometry = zip(("stride", "padding", "dilation", "groups"), _cuda_grad1x1.GEOMETRY, strict=True)
    values = {
        "dtype": emulated.TYPE_NAMES[dx.dtype],
        "dweight_dtype": emulated.TYPE_NAMES[dweight.dtype],
        "x_size": dx.shape,
        "weight_size": weight.shape,
        "addend_step": step,
        **dict(geometry),
        **{f"{name}_stride": emulated._strides(given[name]) for name in IMAGES},
        **{name: emulated._address(t) for name, t in given.items()},
    }
    return emulated.load().ConvBnGrad1x1End(**(values | changes))


def conv_bn_grad1x1_end(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, by the emulated kernel, in the order of its schema; copied as a launch copies."""
    form, step = _results.FORMS[OP], arguments[-1]
    dx, sums, dweight = form.empty(*arguments)
    made = _cuda_grad1x1_end.problem_of(arguments[:10], dx, step)
    inputs = dict(zip(form.operands, made.operands, strict=True))
    results = {"dx": made.out, "sums": sums, "dweight": dweight}
    guarded = {name: emulated.Guarded(t) for name, t in results.items()}
    given = inputs | {name: one.tensor for name, one in guarded.items()}
    layout = [None if t is None else (tuple(t.shape), t.stride()) for t in given.values()]
    key = (OP, dx.dtype, dweight.dtype, *layout, step)
    found = emulated._run_planned(OP, problem_of(given, step), key, inputs, guarded)
    return torch.empty_like(dx).copy_(found[0]), found[1], found[2]


emulated.DTYPES[OP] = DTYPES
emulated._register(OP, conv_bn_grad1x1_end)
