"""`conv_bn_act`: convolution, BatchNorm as scale and shift, shortcut add and ReLU as one op.

    y = act(scale[k] * conv(x, weight)[k] + shift[k] [+ residual])

One layer of a residual block, and with `residual` its last one ("Deep Residual Learning for Image
Recognition", section 3.2, equations 1 and 2; BatchNorm as in section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .. import backends
from . import _autocast, _checks, _convolution, _cuda, _cuda_plan, _triton, onednn
from ._library import define, overload
from ._results import wants_channels_last
from .bn_act import channel_sum, masked
from .bn_act import forward as bn_act_forward
from .conv_dgrad import choose as choose_dgrad
from .conv_wgrad import choose as choose_wgrad

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
    *geometry: Any,
) -> Tensor:
    raw = _convolution.output(x, weight, *geometry[:4])
    return overload("bn_act", "reference")(raw, scale, shift, residual, geometry[4])


def _split(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *geometry: Any,
) -> Tensor:
    raw = _convolution.output(x, weight, *geometry[:4])
    return bn_act_forward(raw, scale, shift, residual, geometry[4])


def _cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *geometry: Any,
) -> Tensor:
    folded = onednn.fold_once(weight, scale, shift, x.dtype, geometry[:4])
    if not (folded.tame and onednn.shape_fits(x, weight, *geometry[:3])):
        # Inf * w summed is not scale * (w summed): such weights are not folded.
        return _split(x, weight, scale, shift, residual, *geometry)
    bound = onednn.largest(x) * folded.gain + folded.offset
    if residual is not None:
        bound += onednn.largest(residual)
    keep_nan = not bound < onednn.LARGEST
    y = folded.run(x, residual, geometry[4] == "relu", keep_nan)
    return y if wants_channels_last(x, weight) else y.contiguous()


def _cpu32(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *geometry: Any,
) -> Tensor:
    folded = onednn.fold_once(weight, scale, shift, torch.float32, geometry[:4])
    if not folded.tame:
        return _split(x, weight, scale, shift, residual, *geometry)
    if not onednn.shape_fits(x, weight, *geometry[:3]):
        wide = None if residual is None else residual.float()
        y = _split(x.float(), weight.float(), scale, shift, wide, *geometry)
        return y.to(x.dtype)
    y = onednn.run_in_float32(folded, x, residual, geometry[4] == "relu")
    return y if wants_channels_last(x, weight) else y.contiguous()


def _fake_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *geometry: Any,
) -> Tensor:
    return torch.empty_like(torch.conv2d(x, weight, None, *geometry[:4]))


def _fake_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *geometry: Any,
) -> Tensor:
    y = onednn.fake_output(x, weight, *geometry[:3])
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
_triton.declare("conv_bn_act", SCHEMA, _fake_conv)
_cuda.declare("conv_bn_act", SCHEMA, _fake_conv)
for _entry in (
    backends.Implementation(
        "conv_bn_act",
        "triton",
        ("triton",),
        "Triton, implicit GEMM, BN, add and ReLU in its epilogue",
        _triton.supports,
        "fused",
    ),
    # Behind Triton where no record says otherwise: on the GPU that both are predicted for, an H200,
    # Triton multiplies by wgmma, and mma.sync reaches 0.63 of its rate.
    backends.Implementation(
        "conv_bn_act",
        "cuda",
        ("cuda",),
        "hand-written CUDA, implicit GEMM, BN, add and ReLU in its epilogue",
        _cuda.supports,
        "fused",
    ),
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


def _call(x: Tensor, residual: Tensor | None, act: str, **facts: bool) -> backends.Call:
    device = x.device
    shortcut = residual is not None
    return backends.Call(
        "conv_bn_act", device.type, x.dtype, residual=shortcut, act=act, index=device.index, **facts
    )


def _choose(
    x: Tensor, weight: Tensor, call: backends.Call, geometry: Sequence[Any]
) -> backends.Choice:
    """The implementation for a call, those left out that its very tensors speak against."""
    choice = backends.choose(call)
    while (reason := unfit(choice.implementation.name, x, weight, geometry)) is not None:
        choice = backends.next_choice(call, choice, reason)
    return choice


def unfit(implementation: str, x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> str | None:
    """Why an implementation that serves such calls can't take this very one, or None.

    Args:
        implementation: its name.
        x: [N, C, H, W].
        weight: [K, C/groups, R, S].
        geometry: stride, padding, dilation, groups.
    """
    if implementation == "cpu":
        agrees = onednn.pytorch_agrees(x, weight, geometry[:4])
        return None if agrees else "PyTorch keeps it from oneDNN"
    if implementation not in backends.GPU_BACKENDS:
        return None
    shape = _checks.conv_output_shape("conv_bn_act", x, weight, *geometry[:4])
    if implementation == "triton":
        return _triton.unfit(x, weight, shape, geometry[3])
    return _cuda_plan.unfit("conv_bn_act", (x, _like(x, weight), None), geometry[:4], shape)


def _like(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in x's dtype, as far as a plan looks at it: autocast has not cast it yet."""
    return weight if weight.dtype is x.dtype else weight.to(device="meta", dtype=x.dtype)


def detail(
    implementation: str,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    geometry: Sequence[Any],
) -> str | None:
    """What `explain` adds on a call: of the CUDA kernel, its configuration and why."""
    if implementation == "triton":
        return _triton.detail(x, weight, residual, geometry)
    if implementation != "cuda":
        return None
    shape = _checks.conv_output_shape("conv_bn_act", x, weight, *geometry[:4])
    out = torch.empty(shape, dtype=x.dtype, device="meta")
    operands = (x, _like(x, weight), residual)
    problem = _cuda_plan.problem_of("conv_bn_act", operands, geometry[:4], out, real=False)
    return _cuda_plan.describe(problem, x.device)


class _ConvBnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        act = geometry[4]
        wants = ctx.needs_input_grad
        name = "split"
        if not torch.compiler.is_compiling():
            call = _call(x, residual, act, grad=True, scale_grad=wants[2])
            name = _choose(x, weight, call, geometry).implementation.name
        raw = None
        if name in backends.GPU_BACKENDS:
            y = overload("conv_bn_act", name)(x, weight, scale, shift, residual, *geometry)
        else:
            raw = _convolution.output(x, weight, *geometry[:4])
            y = bn_act_forward(raw, scale, shift, residual, act)
        # The raw output is needed for the gradient of scale alone, the result for ReLU's mask, and
        # the input for the gradient of the weight.
        ctx.save_for_backward(
            x if wants[1] else None,
            weight,
            scale,
            raw if wants[2] else None,
            y if act == "relu" else None,
        )
        ctx.geometry = geometry[:4]
        ctx.input = (list(x.shape), wants_channels_last(x, weight))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, raw, y = ctx.saved_tensors
        wants = ctx.needs_input_grad
        dz = masked(dy, y) if wants[2] or wants[3] or wants[4] else None
        dscale = channel_sum(dz.to(scale.dtype) * raw, scale.dtype) if wants[2] else None
        dshift = channel_sum(dz, scale.dtype) if wants[3] else None
        dx = dweight = None
        if wants[0]:
            name = choose_dgrad(dy, y, weight, ctx.input[0], ctx.geometry)
            run = overload("conv_dgrad", name)
            dx = run(dy, y, weight, scale, *ctx.input, *ctx.geometry)
        if wants[1]:
            name = choose_wgrad(dy, y, x, weight.shape, ctx.geometry)
            run = overload("conv_wgrad", name)
            dweight = run(dy, y, x, weight, scale, *ctx.geometry)
        return dx, dweight, dscale, dshift, dz if wants[4] else None, None


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
    stride, padding, dilation = _checks.geometry(op, stride, padding, dilation)
    shape = _checks.conv_output_shape(op, x, weight, stride, padding, dilation, groups)
    scale = _checks.check_channel_vector(op, "scale", scale, x, weight.shape[0])
    shift = _checks.check_channel_vector(op, "shift", shift, x, weight.shape[0])
    if residual is not None:
        residual = _checks.check_like(op, "residual", residual, x, shape)
    act = _checks.check_act(op, act)
    geometry = (stride, padding, dilation, groups, act)
    tensors = [t for t in (x, weight, scale, shift, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _ConvBnAct.apply(x, weight, scale, shift, residual, geometry)
    name = "reference"
    if not torch.compiler.is_compiling():
        name = _choose(x, weight, _call(x, residual, act), geometry).implementation.name
    return overload(op, name)(x, weight, scale, shift, residual, *geometry)
