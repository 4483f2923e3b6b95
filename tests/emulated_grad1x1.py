"""`conv_bn_grad1x1` by the emulated CUDA kernel: one more implementation beside `emulated`'s."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _cuda_grad1x1, _results

OP = _cuda_grad1x1.OP
DTYPES = (torch.bfloat16, torch.float16)
IMAGES = ("dz", "y", "x", "weight", "addend", "dx", "dweight")


def problem_of(given: dict[str, Tensor | None], step: int, /, **changes: Any) -> Any:
    """The launch's problem.

    Args:
        given: operands by name, and the results dx, sums and dweight.
        step: the addend's stride.
        changes: of what would follow from these.
    """
    x, weight, dweight = given["x"], given["weight"], given["dweight"]
    assert x is not None and weight is not None and dweight is not None
    geometry = zip(("stride", "padding", "dilation", "groups"), _cuda_grad1x1.GEOMETRY, strict=True)
    values = {
        "dtype": emulated.TYPE_NAMES[x.dtype],
        "dweight_dtype": emulated.TYPE_NAMES[dweight.dtype],
        "x_size": x.shape,
        "weight_size": weight.shape,
        "addend_step": step,
        **dict(geometry),
        **{f"{name}_stride": emulated._strides(given[name]) for name in IMAGES},
        **{name: emulated._address(t) for name, t in given.items()},
    }
    return emulated.load().ConvBnGrad1x1(**(values | changes))


def run(
    inputs: dict[str, Tensor | None], results: tuple[Tensor, Tensor, Tensor], addend_stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel on operands as they lie; results like dx, sums and dweight."""
    names = ("dx", "sums", "dweight")
    guarded = {n: emulated.Guarded(t) for n, t in zip(names, results, strict=True)}
    given = inputs | {name: one.tensor for name, one in guarded.items()}
    layout = [None if t is None else (tuple(t.shape), t.stride()) for t in given.values()]
    key = (OP, results[0].dtype, results[2].dtype, *layout, addend_stride)
    problem = problem_of(given, addend_stride)
    dx, sums, dweight = emulated._run_planned(OP, problem, key, inputs, guarded)
    return dx, sums, dweight


def conv_bn_grad1x1(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, by the emulated kernel, in the order of its schema; copied as a launch copies."""
    form = _results.FORMS[OP]
    dx, sums, dweight = form.empty(*arguments)
    made = _cuda_grad1x1.problem_of(arguments[:7], dx, arguments[-1])
    results = run(dict(zip(form.operands, made.operands, strict=True)), (made.out, sums, dweight),
                  arguments[-1])  # fmt: skip
    return torch.empty_like(dx).copy_(results[0]), results[1], results[2]


emulated.DTYPES[OP] = DTYPES
emulated._register(OP, conv_bn_grad1x1)
