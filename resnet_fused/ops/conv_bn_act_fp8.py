"""`conv_bn_act_fp8`: a layer of a residual network in inference, on e4m3 operands.

    y = act(scale[k] * conv(x, weight)[k] + shift[k] [+ residual_scale * residual]) / out_scale

x and weight are stored numbers of e4m3; what they are worth is in `scale`, one number a channel,
together with BatchNorm's own factor. Sums and epilogue are float32, and y is rounded once. How
scales are found: "FP8 Formats for Deep Learning", Micikevicius et al., 2022, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import _checks, _cuda, _cuda_fp8, _e4m3, _results, _triton
from ._library import define, overload

OP = "conv_bn_act_fp8"
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, str act, float residual_scale, float out_scale, "
    "ScalarType out_dtype) -> Tensor"
)
WIDE = (torch.float32, torch.bfloat16, torch.float16)


def _reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *options: Any,
) -> Tensor:
    """Widened to float32, which holds products of e4m3 exactly: right, not fast."""
    *geometry, act, residual_scale, out_scale, dtype = options
    a, b = (v.view(1, -1, 1, 1) for v in (scale, shift))
    y = torch.conv2d(x.float(), weight.float(), None, *geometry).mul_(a).add_(b)
    if residual is not None:
        y.add_(residual.float(), alpha=residual_scale)
    if act == "relu":
        y.relu_()
    y.div_(out_scale)
    y = _e4m3.stored(y) if dtype is _e4m3.E4M3 else y.to(dtype)
    last = _results.wants_channels_last(x, weight)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _supports_reference(call: backends.Call) -> str | None:
    if call.dtype is not _e4m3.E4M3:
        return f"x has dtype {call.dtype}; accepted is {_e4m3.E4M3}"
    return None


_fake = _results.FORMS[OP].empty
define(f"{OP}.reference", SCHEMA, _reference, _fake)
_triton.declare(OP, SCHEMA, _fake, "_fp8_checks")
_cuda.declare(OP, SCHEMA, _fake, launch=_cuda_fp8.launch, checks="_cuda_fp8_checks")
backends.register(
    backends.Implementation(
        OP,
        "triton",
        ("triton",),
        "Triton, implicit GEMM of e4m3 operands, sums in float32",
        _triton.supports,
        "fused",
    )
)
backends.register(
    backends.Implementation(
        OP,
        "cuda",
        ("cuda",),
        "hand-written CUDA for sm_90a, e4m3 by wgmma, sums in float32",
        _cuda.supports,
        "fused",
    )
)
backends.register(
    backends.Implementation(
        OP,
        "reference",
        ("reference", "cpu"),
        "plain PyTorch in float32, any device: for agreement, not for speed",
        _supports_reference,
        "fused",
    )
)


def choose(x: Tensor, weight: Tensor, residual: Tensor | None, options: Sequence[Any]) -> Any:
    """The implementation for checked arguments, and why.

    Args:
        x: [N, C, H, W].
        weight: [K, C/groups, R, S].
        residual: [N, K, P, Q] or None.
        options: the schema's arguments from stride on.
    """
    device = x.device
    call = backends.Call(
        OP, device.type, x.dtype, residual=residual is not None, act=options[4], index=device.index
    )
    choice = backends.choose(call)
    operands = (x, weight, residual)
    while (reason := _unfit(choice.implementation.name, operands, options)) is not None:
        choice = backends.next_choice(call, choice, reason)
    return choice


def _unfit(name: str, operands: Sequence[Any], options: Sequence[Any]) -> str | None:
    """Why an implementation that serves such calls can't take this very one, or None."""
    x, weight, residual = operands
    if name == "triton":
        shape = _checks.conv_output_shape(OP, x, weight, *options[:4])
        return _triton.unfit(x, weight, shape, options[3], op=OP)
    if name == "cuda":
        return _cuda_fp8.unfit(x, weight, residual, options)
    return None


def conv_bn_act_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    out_dtype: torch.dtype = _e4m3.E4M3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str | None = "relu",
) -> Tensor:
    """Computes act(scale conv(x, weight) + shift [+ residual_scale residual]) / out_scale.

    Scales of tensors are floats, not tensors: they are constants of a frozen network, and a CUDA
    graph holds them as arguments of its kernels.

    Args:
        x: [N, C, H, W] float8_e4m3fn, any layout (fastest in channels_last); see `quantize_e4m3`.
        weight: [K, C/groups, R, S] float8_e4m3fn; see `quantize_weight_e4m3`.
        scale: [K] float32: x's scale times weight's times gamma * invstd.
        shift: [K] float32: beta - mean * gamma * invstd.
        residual: the shortcut [N, K, P, Q], float8_e4m3fn, float32, bfloat16 or float16, or None.
        residual_scale: what a stored 1 of the residual is worth.
        out_scale: what a stored 1 of the result is worth.
        out_dtype: float8_e4m3fn, or float32, bfloat16 or float16 for what is not quantised further.
        stride: an int or (vertical, horizontal).
        padding: zeros on each side, an int or (vertical, horizontal).
        dilation: an int or (vertical, horizontal).
        groups: number of groups, as in `torch.nn.Conv2d`.
        act: "relu" (NaN stays NaN, as in torch) or "none".

    Returns:
        [N, K, P, Q] in `out_dtype`, rounded to nearest even once; e4m3 saturates at 448.
        channels_last where `x` or `weight` is. For inference: it has no derivative.

    Raises:
        RuntimeError: a gradient is wanted.
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices, scales or options do not fit.

    Example:
        >>> q, s = rf.ops.quantize_weight_e4m3(conv.weight.detach())
        >>> x8 = rf.ops.quantize_e4m3(x, x_scale)
        >>> y8 = rf.ops.conv_bn_act_fp8(x8, q, x_scale * s * gain, shift, out_scale=y_scale)
    """
    x = _tensor4("x", x, (_e4m3.E4M3,), None)
    weight = _tensor4("weight", weight, (_e4m3.E4M3,), x)
    stride, padding, dilation = _checks.geometry(OP, stride, padding, dilation)
    shape = _checks.conv_output_shape(OP, x, weight, stride, padding, dilation, groups)
    scale = _checks.check_channel_vector(OP, "scale", scale, x, weight.shape[0])
    shift = _checks.check_channel_vector(OP, "shift", shift, x, weight.shape[0])
    if residual is not None:
        residual = _tensor4("residual", residual, (_e4m3.E4M3, *WIDE), x)
        if list(residual.shape) != shape:
            raise ValueError(
                f"{OP}: residual has shape {tuple(residual.shape)}; the output's {tuple(shape)} is "
                "needed"
            )
    if out_dtype not in (_e4m3.E4M3, *WIDE):
        raise TypeError(f"{OP}: out_dtype is {out_dtype}; accepted are {_named(_e4m3.E4M3, *WIDE)}")
    act = _checks.check_act(OP, act)
    residual_scale = _e4m3.check_scale(OP, "residual_scale", residual_scale)
    out_scale = _e4m3.check_scale(OP, "out_scale", out_scale)
    _checks.no_derivative(OP, *(t for t in (scale, shift, residual) if t is not None))
    options = (stride, padding, dilation, groups, act, residual_scale, out_scale, out_dtype)
    name = "reference"
    if not torch.compiler.is_compiling():
        name = choose(x, weight, residual, options).implementation.name
    return overload(OP, name)(x, weight, scale, shift, residual, *options)


def _tensor4(name: str, t: object, dtypes: tuple[torch.dtype, ...], x: Tensor | None) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{OP}: {name} must be a Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise TypeError(f"{OP}: {name} has dtype {t.dtype}; accepted are {_named(*dtypes)}")
    if t.dim() != 4:
        raise ValueError(
            f"{OP}: {name} must have 4 dimensions, got {t.dim()} (shape {tuple(t.shape)})"
        )
    if x is not None and t.device != x.device:
        raise ValueError(f"{OP}: {name} is on {t.device}, x on {x.device}; both must be on one")
    return t


def _named(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
