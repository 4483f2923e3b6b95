"""`bn_add_act`: the end of a residual block in one pass, BatchNorm, shortcut add and ReLU.

    out = act(scale * y + shift + r),  r = residual, or residual_scale * residual + residual_shift

"Deep Residual Learning for Image Recognition", equations 1 and 2: the identity shortcut, the
projection with its own BatchNorm, and option A of section 3.3, whose shortcut has fewer channels.
Without a residual it is a layer's BatchNorm and ReLU alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import _autocast, _checks, _training, _training_cpu
from ._training import SCALE, SHIFT, fma, per_channel

SCHEMA = (
    "(Tensor y, Tensor norm, Tensor? residual, Tensor? residual_norm, int offset, str act) "
    "-> Tensor"
)


def _sum(
    y: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, offset: int
) -> Tensor:
    """Everything but activation and rounding, in the arithmetic's dtype."""
    z = fma(per_channel(norm[SCALE]), y.to(norm.dtype), per_channel(norm[SHIFT]))
    if residual is None:
        return z
    r = residual.to(norm.dtype)
    if residual_norm is not None:
        r = fma(per_channel(residual_norm[SCALE]), r, per_channel(residual_norm[SHIFT]))
    if r.shape[1] == z.shape[1]:
        return z + r
    z[:, offset : offset + r.shape[1]] += r
    return z


def _reference(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    offset: int,
    act: str,
) -> Tensor:
    z = _sum(y, norm, residual, residual_norm, offset)
    if act == "relu":
        z = torch.where(z < 0, torch.zeros((), dtype=z.dtype).to(z), z)
    return torch.empty_like(y).copy_(z)


_training.enter(
    "bn_add_act",
    SCHEMA,
    _reference,
    "one pass",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    cpu=_training_cpu.bn_add_act,
)


class _BnAddAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        norm: Tensor,
        residual: Tensor | None,
        residual_norm: Tensor | None,
        offset: int,
        act: str,
    ) -> Tensor:
        out = _training.run("bn_add_act", y, y, norm, residual, residual_norm, offset, act)
        ctx.save_for_backward(y, norm, residual, residual_norm, out if act == "relu" else None)
        ctx.offset = offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, norm, residual, residual_norm, out = ctx.saved_tensors
        dz = dout if out is None else torch.where(out <= 0, 0, dout)

        def through(g: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            wide = g.to(rows.dtype)
            drows = torch.zeros_like(rows)
            drows[SCALE] = (wide * t.to(rows.dtype)).sum((0, 2, 3))
            drows[SHIFT] = wide.sum((0, 2, 3))
            return (wide * per_channel(rows[SCALE])).to(t.dtype), drows

        dy, dnorm = through(dz, y, norm)
        dresidual = dresidual_norm = None
        if residual is not None:
            dresidual = dz[:, ctx.offset : ctx.offset + residual.shape[1]]
            if residual_norm is not None:
                dresidual, dresidual_norm = through(dresidual, residual, residual_norm)
        return dy, dnorm, dresidual, dresidual_norm, None, None


def bn_add_act(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    *,
    offset: int = 0,
    act: str | None = "relu",
) -> Tensor:
    """Computes act(scale * y + shift + shortcut).

    Args:
        y: the last convolution's raw output [N, K, P, Q]; float32, bfloat16, float16 or float64.
        norm: [4, K] of its BatchNorm, as `bn_finalize` returns it.
        residual: the shortcut, dtype of `y`: [N, K, P, Q], or with fewer channels.
        residual_norm: [4, K] of a projection's BatchNorm, through which `residual` is read.
        offset: the channel of `y` that the shortcut's first one is added to.
        act: "relu" (NaN stays NaN, as in torch) or "none".

    Returns:
        [N, K, P, Q] in `y`'s dtype and layout, rounded once. Gradients flow to all four tensors; a
        second derivative raises.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices, `offset` or `act` do not fit.
    """
    op = "bn_add_act"
    y, residual = _autocast.cast(y, residual)
    y = _checks.check_activation_tensor(op, "y", y)
    channels = y.shape[1]
    norm = _training.check_norm(op, "norm", norm, y, channels)
    if residual is not None:
        residual = _checks.check_like(op, "residual", residual, y, None)
        if not isinstance(offset, int):
            raise TypeError(f"{op}: offset is {offset!r}; an int is needed")
        held = residual.shape[1]
        fits = residual.shape[0] == y.shape[0] and residual.shape[2:] == y.shape[2:]
        if not fits or not 0 <= offset <= channels - held:
            raise ValueError(
                f"{op}: residual has shape {tuple(residual.shape)} at offset {offset}; y's "
                f"{tuple(y.shape)}, or fewer channels within it, is needed"
            )
    if residual_norm is not None:
        if residual is None or residual.shape[1] != channels:
            raise ValueError(f"{op}: residual_norm is given, but no residual of y's shape")
        residual_norm = _training.check_norm(op, "residual_norm", residual_norm, y, channels)
    act = _checks.check_act(op, act)
    arguments = (y, norm, residual, residual_norm, offset, act)
    tensors = [t for t in arguments[:4] if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _BnAddAct.apply(*arguments)
    return _training.run(op, y, *arguments)
