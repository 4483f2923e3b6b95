"""`conv_bn_act_fp8` by the emulated CUDA kernel: one more implementation beside `emulated`'s."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _cuda_fp8, _results

OP = _cuda_fp8.OP
E4M3 = torch.float8_e4m3fn
OUTS = (E4M3, torch.bfloat16, torch.float16)
"""Dtypes of a result that the kernel writes."""


def takes(case: Any, out: torch.dtype, residual: torch.dtype | None = None) -> bool:
    """Whether the CUDA kernel of `conv_bn_act_fp8` serves a case: TMA moves 16 bytes of channels.

    Args:
        case: sizes and options.
        out: dtype of the result.
        residual: dtype of the shortcut, if there is one.
    """
    if out not in OUTS or residual not in (None, E4M3):
        return False
    whole = case.c % 16 == 0 and case.k % (16 // out.itemsize * case.groups) == 0
    whole = whole and (residual is None or case.k % 16 == 0)
    grouped = case.groups == 1 or (case.c // case.groups) % 128 == 0
    return (whole and grouped) or 0 in case.output_shape


def conv_bn_act_fp8(*arguments: Any) -> Tensor:
    """The op, by the emulated kernel, copied to channels_last and back as a launch does."""
    x, weight, scale, shift, residual, *geometry, act, residual_scale, out_scale, _ = arguments
    result = _results.FORMS[OP].empty(*arguments)
    made = _cuda_fp8.problem_of((x, weight, residual), geometry, result)
    x, weight, residual = made.operands
    like = torch.empty_strided(made.out.shape, made.out.stride(), dtype=result.dtype, device="meta")
    guarded = emulated.Guarded(like)
    inputs = {"x": x, "weight": weight, "scale": scale, "shift": shift, "residual": residual}
    layout = [emulated._strides(t) for t in (*made.operands, like)]
    key = (OP, tuple(x.shape), tuple(weight.shape), *geometry, act, *layout)
    key = (*key, result.dtype, x.data_ptr() % 16)
    reverse = emulated._run.reverse
    problem = problem_of(
        *inputs.values(), guarded.tensor, *geometry, act, residual_scale, out_scale,
        reverse=emulated.drawn("flow", *key) % 2 == 1 if reverse is None else reverse,
    )  # fmt: skip
    got = emulated._run_planned(OP, problem, key, inputs, {"out": guarded})[0]
    return result.copy_(got)


def problem_of(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *options: Any,
    reverse: bool = False,
) -> Any:
    """The launch's problem; options as of the op, up to out_scale."""
    *geometry, act, residual_scale, out_scale = options
    images = {"x": x, "weight": weight, "residual": residual, "out": out}
    conv = emulated.load().ConvBnAct(
        dtype="bfloat16",
        relu=act == "relu",
        allow_tf32=False,
        x_size=x.shape,
        weight_size=weight.shape,
        **dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True)),
        **{f"{name}_stride": emulated._strides(t) for name, t in images.items()},
        **{name: emulated._address(t) for name, t in images.items()},
        scale=emulated._address(scale),
        shift=emulated._address(shift),
        reverse=reverse,
        arrivals=0,
        arrivals_count=0,
        **emulated._flow(),
    )
    return emulated.load().ConvBnActFp8(
        conv=conv,
        residual_dtype=emulated.TYPE_NAMES[(x if residual is None else residual).dtype],
        out_dtype=emulated.TYPE_NAMES[out.dtype],
        residual_factor=residual_scale,
        out_factor=1.0 / out_scale,
    )


emulated.DTYPES[OP] = (E4M3,)
emulated.TYPE_NAMES[E4M3] = "float8_e4m3fn"
emulated._register(OP, conv_bn_act_fp8)
