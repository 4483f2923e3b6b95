"""Argument checks of the ops: each message names the argument, what came, what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTS = ("relu", "none")


def check_activation_tensor(op: str, name: str, t: object) -> Tensor:
    """Checks that `t` is a floating [N, C, H, W] tensor and returns it."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    no_tangent(op, name, t)
    if t.dtype not in DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; accepted are {accepted}")
    if t.dim() != 4:
        raise ValueError(
            f"{op}: {name} must have 4 dimensions, got {t.dim()} (shape {tuple(t.shape)})"
        )
    return t


def check_like(op: str, name: str, t: object, x: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Checks a tensor that must share `x`'s device and dtype (and have `shape`)."""
    t = check_activation_tensor(op, name, t)
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}; both must be on one")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}, x has {x.dtype}; both must agree")
    if shape is not None and tuple(t.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} has shape {tuple(t.shape)}; the output's {tuple(shape)} is needed"
        )
    return t


def check_channel_vector(op: str, name: str, t: object, x: Tensor, channels: int) -> Tensor:
    """Checks a [C] vector on `x`'s device; returns it in the dtype of the arithmetic.

    The arithmetic is float32, or float64 when `x` is float64. The cast is differentiable.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; a floating-point dtype is needed")
    no_tangent(op, name, t)
    if tuple(t.shape) != (channels,):
        raise ValueError(
            f"{op}: {name} has shape {tuple(t.shape)}; one value a channel is needed, ({channels},)"
        )
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}; both must be on one")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return t.to(compute).contiguous()


def check_act(op: str, act: object) -> str:
    """Checks the activation's name; None means "none"."""
    if act is None:
        return "none"
    if act not in ACTS:
        raise ValueError(f"{op}: act is {act!r}; accepted are {', '.join(map(repr, ACTS))}")
    return str(act)


def pair(op: str, name: str, value: int | Sequence[int], minimum: int) -> list[int]:
    """An int or two of them as [height, width], each at least `minimum`."""
    values = [value, value] if isinstance(value, int) else list(value)
    if len(values) != 2 or not all(isinstance(v, int) and v >= minimum for v in values):
        raise ValueError(
            f"{op}: {name} is {value!r}; an int or two ints of at least {minimum} are accepted"
        )
    return values


def geometry(
    op: str,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation as pairs."""
    return (
        pair(op, "stride", stride, 1),
        pair(op, "padding", padding, 0),
        pair(op, "dilation", dilation, 1),
    )


def size4(op: str, name: str, value: Sequence[int]) -> list[int]:
    """Four sizes (N, C, H, W), none negative."""
    sizes = list(value) if isinstance(value, Sequence) else []
    if len(sizes) != 4 or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{op}: {name} is {value!r}; four sizes (N, C, H, W) are accepted")
    return sizes


def no_derivative(op: str, *tensors: Tensor) -> None:
    """Refuses tensors whose gradient somebody waits for, in an op that is a gradient itself."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op} has no derivative of its own; call it under torch.no_grad() or detach its inputs"
        )


def no_tangent(op: str, name: str, t: Tensor) -> None:
    """Refuses a tensor of forward-mode differentiation: kernels would drop its tangent unsaid."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
        raise RuntimeError(
            f"{op}: {name} carries a tangent; the op has no forward-mode derivative: PyTorch's own "
            "layers have one, see resnet_fused.unfuse"
        )


def conv_output_shape(
    op: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """Shape [N, K, P, Q] of conv(x, weight), after checking that the two fit together.

    Args:
        op: name for the messages.
        x: [N, C, H, W].
        weight: [K, C/groups, R, S].
        stride: two ints.
        padding: two ints.
        dilation: two ints.
        groups: number of groups.

    Raises:
        ValueError: channels, groups or sizes do not fit.
    """
    n, c, h, w = x.shape
    k, c_group, r, s = weight.shape
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: groups is {groups!r}; an int of at least 1 is accepted")
    if c != c_group * groups:
        raise ValueError(
            f"{op}: x has {c} channels, but weight {tuple(weight.shape)} with groups={groups} "
            f"takes {c_group * groups}"
        )
    if k % groups or k == 0:
        raise ValueError(
            f"{op}: weight has {k} output channels; groups={groups} needs a positive multiple of it"
        )
    out = []
    for size, kernel, st, pad, dil in zip((h, w), (r, s), stride, padding, dilation, strict=True):
        span = dil * (kernel - 1) + 1
        if size + 2 * pad < span:
            raise ValueError(
                f"{op}: weight spans {span} pixels (kernel {kernel}, dilation {dil}), more than "
                f"x's padded {size + 2 * pad}"
            )
        out.append((size + 2 * pad - span) // st + 1)
    return [n, k, *out]
