"""`conv_bn_dgrad_end` by the emulated CUDA kernel: one more implementation beside `emulated`'s."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _end_gradient, _results

OP = _end_gradient.OP
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = ("dz", "y", "weight", "addend", "out", "raw", "residual", "x")


def problem_of(given: dict[str, Tensor | None], addend_stride: int, *geometry: Any) -> Any:
    """The launch's problem, float32 in TF32.

    Args:
        given: operands by name, and the results x and sums.
        addend_stride: of the op.
        geometry: stride, padding, dilation, groups.
    """
    x, weight = given["x"], given["weight"]
    assert x is not None and weight is not None
    return emulated.load().ConvBnDgradEnd(
        dtype=emulated.TYPE_NAMES[x.dtype],
        allow_tf32=True,
        x_size=x.shape,
        weight_size=weight.shape,
        addend_step=addend_stride,
        **dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True)),
        **{f"{name}_stride": emulated._strides(given[name]) for name in IMAGES},
        **{name: emulated._address(t) for name, t in given.items()},
    )


def conv_bn_dgrad_end(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op, by the emulated kernel, in the order of its schema."""
    form = _results.FORMS[OP]
    dx, sums = form.empty(*arguments)
    if not dx.numel():
        return dx, sums.zero_()
    inputs = {name: arguments[place] for name, place in form.operands.items()}
    options = arguments[form.options :]
    guarded = {"x": emulated.Guarded(dx), "sums": emulated.Guarded(sums)}
    given = inputs | {name: one.tensor for name, one in guarded.items()}
    layout = [None if t is None else (tuple(t.shape), t.stride()) for t in given.values()]
    key = (OP, dx.dtype, *layout, *options, arguments[0].data_ptr() % 16)
    found, reduced = emulated._run_planned(OP, problem_of(given, *options), key, inputs, guarded)
    return found, reduced


emulated.DTYPES[OP] = DTYPES
emulated.COUNTED.add(OP)
emulated._register(OP, conv_bn_dgrad_end)
