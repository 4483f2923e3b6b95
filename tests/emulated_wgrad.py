"""`conv_bn_wgrad` by the emulated CUDA kernel: one more implementation beside `emulated`'s."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _cuda_wgrad, _results

OP = _cuda_wgrad.OP
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem_of(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    dweight: Tensor,
    *geometry: Any,
) -> Any:
    """The launch's problem, float32 in TF32; `geometry` is stride, padding, dilation, groups."""
    images = {"dz": dz, "y": y, "x": x, "weight": dweight}
    return emulated.load().ConvBnWgrad(
        dtype=emulated.TYPE_NAMES[dz.dtype],
        weight_dtype=emulated.TYPE_NAMES[dweight.dtype],
        allow_tf32=True,
        x_size=x.shape,
        weight_size=dweight.shape,
        **dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True)),
        **{f"{name}_stride": emulated._strides(t) for name, t in images.items()},
        **{name: emulated._address(t) for name, t in images.items()},
        coefficients=emulated._address(coefficients),
        norm=emulated._address(norm),
    )


def conv_bn_wgrad(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    *geometry: Any,
) -> Tensor:
    """The op, by the emulated kernel, in the order of its schema."""
    inputs = {"dz": dz, "y": y, "coefficients": coefficients, "x": x, "norm": norm}
    guarded = emulated.Guarded(_results.FORMS[OP].empty(*inputs.values(), weight.to("meta")))
    layout = [(tuple(t.shape), t.stride()) for t in (dz, x, weight)]
    key = (OP, dz.dtype, weight.dtype, *layout, *geometry, y is None, norm is None)
    problem = problem_of(*inputs.values(), guarded.tensor, *geometry)
    return emulated._run_planned(OP, problem, key, inputs, {"weight": guarded})[0]


emulated.DTYPES[OP] = DTYPES
emulated._register(OP, conv_bn_wgrad)
