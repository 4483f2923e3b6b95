"""`bn_act`: scale, shift, shortcut add and ReLU in one pass over an activation.

    y = act(scale[c] * x + shift[c] [+ residual])

What a BatchNorm layer in inference, the shortcut add and the ReLU of a residual block ("Deep
Residual Learning for Image Recognition", section 3.2, equation 1) do in three passes. It also
follows the convolutions that no fused kernel takes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .. import _extension, admission, backends
from . import _autocast, _checks, _results, _triton
from ._library import define, overload

SCHEMA = "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act) -> Tensor"


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    # The arithmetic is the vectors' (float32, or float64): one rounding to x's dtype at the end.
    y = torch.addcmul(_per_channel(shift), x.to(scale.dtype), _per_channel(scale))
    if residual is not None:
        y = y.add_(residual)
    if act == "relu":
        y = y.relu_()
    out = torch.empty_like(x)
    return out.copy_(y)


def _native(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    out = torch.empty_like(x)
    torch.ops.resnet_fused.bn_act_out(x, scale, shift, residual, act == "relu", out)
    return out


_fake = _results.FORMS["bn_act"].empty


def _supports_cpu(call: backends.Call) -> str | None:
    if call.device != "cpu":
        return f"x is on {call.device}"
    if not _extension.available():
        return f"the compiled extension is missing: {_extension.why_not()}"
    return None


def _supports_cuda(call: backends.Call) -> str | None:
    if call.device != "cuda":
        return f"x is on {call.device}"
    if not _extension.available():
        return f"the compiled extension is missing: {_extension.why_not()}"
    if not _extension.has_cuda_kernels():
        return "the extension was built without nvcc"
    return admission.refusal(call, "cuda")


def _supports_reference(call: backends.Call) -> str | None:
    return None


for _name, _body in (("cuda", _native), ("cpu", _native), ("reference", _reference)):
    define(f"bn_act.{_name}", SCHEMA, _body, _fake)
_triton.declare("bn_act", SCHEMA, _fake)
for _implementation in (
    backends.Implementation(
        "bn_act", "triton", ("triton",), "Triton, one pass", _triton.supports, "fused"
    ),
    backends.Implementation(
        "bn_act", "cuda", ("cuda",), "hand-written CUDA, one pass", _supports_cuda, "fused"
    ),
    backends.Implementation(
        "bn_act", "cpu", ("cpu",), "hand-written C++, one pass", _supports_cpu, "fused"
    ),
    backends.Implementation(
        "bn_act", "reference", ("reference",), "plain PyTorch", _supports_reference, "fused"
    ),
):
    backends.register(_implementation)
admission.register(
    admission.Kernel(
        "bn_act",
        "cuda",
        (
            "csrc/bindings/arguments.cpp",
            "csrc/bindings/arguments.h",
            "csrc/bindings/bn_act.cpp",
            "csrc/bindings/layout.cpp",
            "csrc/bindings/layout.h",
            "csrc/bindings/stable.h",
            "csrc/bindings/stream.cpp",
            "csrc/device/bn_act.h",
            "csrc/device/dependent.h",
            "csrc/device/portable.h",
            "csrc/device/scalar.h",
            "csrc/device/vector.h",
            "csrc/kernels/bn_act_sm80.cuh",
            "csrc/launch/bn_act.cu",
            "csrc/launch/bn_act.h",
            "csrc/launch/bn_act_plan.cpp",
            "csrc/launch/flow.h",
            "csrc/launch/launch.h",
            "csrc/ptx/common.h",
            "csrc/ptx/grid_dependency.h",
            "csrc/ptx/memory.h",
            "csrc/ptx/types.h",
        ),
        "resnet_fused.ops._selfchecks:bn_act_configurations",
        "resnet_fused.ops._selfchecks:bn_act",
    )
)


def forward(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """The forward pass on checked arguments, by the chosen implementation, without autograd."""
    if torch.compiler.is_compiling():
        name = "reference"
    else:
        call = backends.Call(
            "bn_act", x.device.type, x.dtype, False, residual is not None, act, x.device.index
        )
        name = backends.choose(call).implementation.name
    return overload("bn_act", name)(x, scale, shift, residual, act)


def masked(dy: Tensor, y: Tensor | None) -> Tensor:
    """The gradient behind the ReLU: `dy` where the result passed it, `!(y <= 0)`, so NaN passes.

    Args:
        dy: gradient of the result [N, C, H, W].
        y: the result [N, C, H, W], or None without activation.
    """
    return dy if y is None else torch.where(y <= 0, torch.zeros((), dtype=dy.dtype).to(dy), dy)


def channel_sum(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over N, H, W in `dtype`: [C]."""
    return t.sum((0, 2, 3), dtype=dtype)


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
    ) -> Tensor:
        y = forward(x, scale, shift, residual, act)
        relu = act == "relu"
        needs_scale = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_scale else None, scale, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, y = ctx.saved_tensors
        wants = ctx.needs_input_grad
        dz = masked(dy, y)
        dx = (dz.to(scale.dtype) * _per_channel(scale)).to(dy.dtype) if wants[0] else None
        dscale = channel_sum(dz.to(scale.dtype) * x, scale.dtype) if wants[1] else None
        dshift = channel_sum(dz, scale.dtype) if wants[2] else None
        return dx, dscale, dshift, dz if wants[3] else None, None


def apply(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """Forward on checked arguments, with autograd where a gradient is wanted."""
    tensors = (x, scale, shift) if residual is None else (x, scale, shift, residual)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _BnAct.apply(x, scale, shift, residual, act)
    return forward(x, scale, shift, residual, act)


def bn_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    act: str | None = "relu",
) -> Tensor:
    """Computes act(scale * x + shift [+ residual]) in one pass.

    Args:
        x: activation [N, C, H, W]; float32, bfloat16, float16 or float64, any layout.
        scale: [C], gamma * invstd; used in float32 (float64 when `x` is float64).
        shift: [C], beta - mean * scale; likewise.
        residual: the shortcut, shape and dtype of `x`, added before the activation.
        act: "relu" (NaN stays NaN, as in torch) or "none".

    Returns:
        [N, C, H, W] in `x`'s dtype and layout, rounded once. Gradients flow to all four tensors;
        a second derivative raises.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or `act` do not fit.
    """
    x, residual = _autocast.cast(x, residual)
    x = _checks.check_activation_tensor("bn_act", "x", x)
    scale = _checks.check_channel_vector("bn_act", "scale", scale, x, x.shape[1])
    shift = _checks.check_channel_vector("bn_act", "shift", shift, x, x.shape[1])
    if residual is not None:
        residual = _checks.check_like("bn_act", "residual", residual, x, x.shape)
    return apply(x, scale, shift, residual, _checks.check_act("bn_act", act))
