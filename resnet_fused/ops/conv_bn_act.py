"""`conv_bn_act`: convolution, BatchNorm as scale and shift, shortcut add and ReLU as one op.

    y = act(scale[k] * conv(x, weight)[k] + shift[k] [+ residual])

One layer of a residual block, and with `residual` its last one ("Deep Residual Learning for Image
Recognition", section 3.2, equations 1 and 2; BatchNorm as in section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .. import backends
from . import _autocast, _checks, onednn
from ._library import define, overload
from .bn_act import channel_sum, masked
from .bn_act import forward as bn_act_forward

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, str act) -> Tensor"
)


def _reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    raw = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    return overload("bn_act", "reference")(raw, scale, shift, residual, act)


def _split(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    raw = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    return bn_act_forward(raw, scale, shift, residual, act)


def _cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    folded = onednn.fold_once(weight, scale, shift, x.dtype, geometry)
    if not (folded.tame and onednn.window_fits(x, weight, dilation)):
        # Inf * w summed is not scale * (w summed): such weights are not folded.
        return _split(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    bound = onednn.largest(x) * folded.gain + folded.offset
    if residual is not None:
        bound += onednn.largest(residual)
    keep_nan = not bound < onednn.LARGEST
    y = folded.run(x, residual, act == "relu", keep_nan)
    return y if wants_channels_last(x, weight) else y.contiguous()


def _cpu32(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    folded = onednn.fold_once(weight, scale, shift, torch.float32, geometry)
    if not folded.tame:
        return _split(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    if not onednn.window_fits(x, weight, dilation):
        wide = None if residual is None else residual.float()
        vectors = (scale, shift, wide)
        y = _split(x.float(), weight.float(), *vectors, stride, padding, dilation, groups, act)
        return y.to(x.dtype)
    y = onednn.run_in_float32(folded, x, residual, act == "relu")
    return y if wants_channels_last(x, weight) else y.contiguous()


def is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch's convolution takes `t` [N, C, H, W] for channels_last."""
    if t.is_contiguous():
        return False
    return t.is_contiguous(memory_format=torch.channels_last) or (
        t.shape[1] > 1 and t.stride(1) == 1
    )


def wants_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's output is channels_last: where x or weight is, as in PyTorch."""
    return is_channels_last(x) or is_channels_last(weight)


def _fake_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    return torch.empty_like(torch.conv2d(x, weight, None, stride, padding, dilation, groups))


def _fake_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    y = onednn.fake_output(x, weight, stride, padding, dilation)
    return y if wants_channels_last(x, weight) else y.contiguous()


def _supports_cpu(call: backends.Call) -> str | None:
    return onednn.supports(call)


def _supports_cpu32(call: backends.Call) -> str | None:
    return onednn.supports_in_float32(call)


def _supports_split(call: backends.Call) -> str | None:
    """Serves what has a hand-written bn_act: PyTorch's convolution, then one pass."""
    wanted = backends.requested()[0]
    if wanted not in ("auto", call.device):
        return f"x is on {call.device}"
    inner = backends.Call("bn_act", call.device, call.dtype, False, call.residual, call.act)
    reasons = [
        implementation.supports(inner)
        for implementation in backends.implementations("bn_act")
        if call.device in implementation.backends
    ]
    if None in reasons:
        return None
    return f"no bn_act kernel serves it: {reasons[0] if reasons else call.device}"


def _supports_reference(call: backends.Call) -> str | None:
    return None


define("conv_bn_act.cpu", SCHEMA, _cpu, _fake_cpu)
define("conv_bn_act.cpu32", SCHEMA, _cpu32, _fake_cpu)
define("conv_bn_act.split", SCHEMA, _split, _fake_conv)
define("conv_bn_act.reference", SCHEMA, _reference, _fake_conv)
for _entry in (
    backends.Implementation(
        "conv_bn_act",
        "cpu",
        ("cpu",),
        "oneDNN, BN folded into packed weights, add and ReLU as post-ops",
        _supports_cpu,
        "folded",
    ),
    backends.Implementation(
        "conv_bn_act",
        "cpu32",
        ("cpu",),
        "oneDNN in float32 for 16-bit activations that the CPU has no arithmetic for",
        _supports_cpu32,
        "fused",
    ),
    backends.Implementation(
        "conv_bn_act",
        "split",
        ("cpu", "cuda"),
        "PyTorch's convolution, then bn_act in one pass",
        _supports_split,
        "stored_conv",
    ),
    backends.Implementation(
        "conv_bn_act",
        "reference",
        ("reference",),
        "plain PyTorch, any device and dtype",
        _supports_reference,
        "stored_conv",
    ),
):
    backends.register(_entry)


def _like_parameter(grad: Tensor | None, weight: Tensor) -> Tensor | None:
    # DDP's buckets want a gradient with its parameter's strides; a 1x1 kernel has two spellings.
    if grad is None or grad.stride() == weight.stride():
        return grad
    if grad.is_contiguous() and weight.is_contiguous():
        return grad.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(grad)


class _ConvBnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        act: str,
    ) -> Tensor:
        raw = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
        y = bn_act_forward(raw, scale, shift, residual, act)
        # The raw output is needed for the gradient of scale alone, the result for ReLU's mask.
        keep_raw = raw if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x, weight, scale, keep_raw, y if act == "relu" else None)
        ctx.geometry = (stride, padding, dilation, groups)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, raw, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wants = ctx.needs_input_grad
        dz = masked(dy, y)
        dscale = channel_sum(dz.to(scale.dtype) * raw, scale.dtype) if wants[2] else None
        dshift = channel_sum(dz, scale.dtype) if wants[3] else None
        dx = dweight = None
        if wants[0] or wants[1]:
            draw = (dz.to(scale.dtype) * scale.view(1, -1, 1, 1)).to(x.dtype)
            mask = [wants[0], wants[1], False]
            dx, dweight, _ = torch.ops.aten.convolution_backward(
                draw, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
            )
            dweight = _like_parameter(dweight, weight)
        return dx, dweight, dscale, dshift, dz if wants[4] else None, *([None] * 5)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str | None = "relu",
) -> Tensor:
    """Computes act(scale * conv(x, weight) + shift [+ residual]).

    Args:
        x: [N, C, H, W]; float32, bfloat16, float16 or float64, any layout (fastest in
            channels_last).
        weight: [K, C/groups, R, S], dtype of `x`.
        scale: [K], gamma * invstd; used in float32 (float64 when `x` is float64).
        shift: [K], beta - mean * scale; likewise.
        residual: the shortcut [N, K, P, Q], dtype of `x`, added before the activation.
        stride: an int or (vertical, horizontal).
        padding: zeros on each side, an int or (vertical, horizontal).
        dilation: an int or (vertical, horizontal).
        groups: number of groups, as in `torch.nn.Conv2d`.
        act: "relu" (NaN stays NaN, as in torch) or "none".

    Returns:
        [N, K, P, Q] in `x`'s dtype; channels_last where `x` or `weight` is. Gradients flow to all
        five tensors; a second derivative raises. Under autocast x, weight and residual are cast.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.

    Example:
        >>> y = rf.ops.conv_bn_act(x, conv.weight, scale, shift, padding=1)
    """
    op = "conv_bn_act"
    x, weight, residual = _autocast.cast(x, weight, residual)
    x = _checks.check_activation_tensor(op, "x", x)
    weight = _checks.check_like(op, "weight", weight, x, None)
    stride = _checks.pair(op, "stride", stride, 1)
    padding = _checks.pair(op, "padding", padding, 0)
    dilation = _checks.pair(op, "dilation", dilation, 1)
    shape = _checks.conv_output_shape(op, x, weight, stride, padding, dilation, groups)
    scale = _checks.check_channel_vector(op, "scale", scale, x, weight.shape[0])
    shift = _checks.check_channel_vector(op, "shift", shift, x, weight.shape[0])
    if residual is not None:
        residual = _checks.check_like(op, "residual", residual, x, shape)
    act = _checks.check_act(op, act)
    geometry = (stride, padding, dilation, groups, act)
    tensors = [t for t in (x, weight, scale, shift, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _ConvBnAct.apply(x, weight, scale, shift, residual, *geometry)
    if torch.compiler.is_compiling():
        name = "reference"
    else:
        call = backends.Call(op, x.device.type, x.dtype, False, residual is not None, act)
        choice = backends.choose(call)
        if choice.implementation.name == "cpu" and not onednn.pytorch_agrees(
            x, weight, geometry[:4]
        ):
            choice = backends.next_choice(call, choice, "PyTorch keeps it from oneDNN")
        name = choice.implementation.name
    return overload(op, name)(x, weight, scale, shift, residual, *geometry)
