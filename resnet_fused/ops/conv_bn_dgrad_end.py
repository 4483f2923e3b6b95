"""`conv_bn_dgrad_end`: the gradient of a convolution's input behind the ReLU of a block's end.

    dy = A dz + B y + C                            BatchNorm's backward, as the kernel reads
    dout = conv^T(dy, weight) [+ addend]           the gradient between two blocks: not written
    dz_below = dout where out passed the ReLU, else 0
    sums = (sum dz_below, sum dz_below (raw - mean) [, sum dz_below (residual - residual_mean)])

What `conv_bn_dgrad` and `bn_add_act_backward` compute one after the other, but for the gradient
between them, which is neither written nor read. `out` is the convolution's input and the end of the
block before it, relu(BN(raw) + shortcut) ("Deep Residual Learning for Image Recognition", equation
1 and figure 5). The addend is the gradient that comes through the next block's shortcut, whose
input `out` is as well: with it all of the gradient of `out` is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _checks, _cuda_bn_dgrad_end, _end_gradient, _results, _training
from ._library import overload
from .bn_add_act_backward import reductions
from .conv_bn_dgrad import _reference as dgrad_reference
from .conv_bn_dgrad import check_affine

SCHEMA = (
    "(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, Tensor? addend, Tensor out, "
    "Tensor raw, Tensor norm, Tensor? residual, Tensor? residual_norm, int addend_stride, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor, Tensor)"
)


def _reference(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    out: Tensor,
    raw: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    addend_stride: int,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    dout, _ = dgrad_reference(
        dz, y, coefficients, weight, addend, None, None, list(out.shape),
        _results.is_channels_last(raw), addend_stride, *geometry,
    )  # fmt: skip
    below = torch.empty_like(raw).copy_(dout)
    # Not (out > 0): where out is NaN, the gradient passes.
    below.masked_fill_(out <= 0, 0)
    sums = reductions(below, raw, norm)
    if residual is not None and residual_norm is not None:
        sums = torch.cat((sums, reductions(below, residual, residual_norm)[1:]))
    return below, sums


_training.enter(
    _end_gradient.OP,
    SCHEMA,
    _reference,
    "implicit GEMM, BN's backward as it reads, a block's mask and reductions in its epilogue",
    triton="_training_checks_dgrad_end",
    cuda=True,
    cuda_launch=_cuda_bn_dgrad_end.launch,
    cuda_checks=_cuda_bn_dgrad_end.CHECKS,
)


def conv_bn_dgrad_end(
    dz: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    *,
    out: Tensor,
    raw: Tensor,
    norm: Tensor,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    addend: Tensor | None = None,
    addend_stride: int = 1,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Computes the gradient behind a block's last ReLU from that of the next block's first layer.

    Where a kernel serves the call, in one pass over its operands; else by `conv_bn_dgrad` and
    `bn_add_act_backward`, whose results these are.

    Args:
        dz: gradient behind the BatchNorm of the next block's first convolution [N, K, P, Q];
            float32, bfloat16, float16 or float64.
        weight: [K, C/groups, R, S] of that convolution, dtype of `dz`.
        y: its raw output [N, K, P, Q]. None: `dz` is the gradient of that itself.
        coefficients: [3, K] A, B, C of `bn_backward_finalize`; given with `y`. A dz + B y + C is
            rounded to `dz`'s dtype before it is multiplied.
        out: what it read, and the block's output [N, C, H, W], dtype of `dz`: its sign is the mask.
        raw: the block's last raw output [N, C, H, W], dtype of `dz`.
        norm: [4, C] of its BatchNorm.
        residual: the raw output of the block's projection [N, C, H, W]; None for other shortcuts.
        residual_norm: [4, C] of its BatchNorm; given with `residual`.
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], dtype of `dz`: what comes
            through the next block's shortcut, added to every addend_stride-th pixel of the gradient
            before it is rounded.
        addend_stride: see addend.
        stride: an int or (vertical, horizontal), as of the forward call.
        padding: likewise.
        dilation: likewise.
        groups: likewise.

    Returns:
        [N, C, H, W] in `raw`'s dtype and layout, rounded before it is masked; and in `norm`'s dtype
        [2, C] sums of it and of it times (raw - mean), with a third row for the projection. It has
        no derivative of its own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.
    """
    geometry = _training.geometry_of(_end_gradient.OP, stride, padding, dilation, groups)
    given = (dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm)
    operands = checked(_end_gradient.OP, given, addend_stride, geometry)
    if served := _serving(operands, addend_stride, geometry):
        return overload(_end_gradient.OP, served)(*operands, addend_stride, *geometry)
    dz, *_, out, raw = operands[:7]
    layout = _results.is_channels_last(raw)
    dout, _ = _training.run(
        "conv_bn_dgrad", dz, *operands[:5], None, None, list(out.shape), layout, addend_stride,
        *geometry,
    )  # fmt: skip
    return _training.run("bn_add_act_backward", raw, dout, *operands[5:], "relu")


def checked(op: str, given: Sequence[Any], addend_stride: Any, geometry: Any) -> tuple[Any, ...]:
    """An op's tensors, in the order of this one's schema, as kernels take them.

    Args:
        op: name for the messages.
        given: as the user gave them.
        addend_stride: likewise.
        geometry: stride, padding, dilation, groups.
    """
    dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm = given
    dz, weight, y, addend, out, raw, residual = _autocast.cast(
        dz, weight, y, addend, out, raw, residual
    )
    dz = _checks.check_activation_tensor(op, "dz", dz)
    weight = _checks.check_like(op, "weight", weight, dz, None)
    out = _checks.check_like(op, "out", out, dz, None)
    shape = _checks.conv_output_shape(op, out, weight, *geometry)
    dz = _checks.check_like(op, "dz", dz, dz, shape)
    y, coefficients = check_affine(op, dz, y, coefficients)
    if not isinstance(addend_stride, int) or addend_stride < 1:
        raise ValueError(f"{op}: addend_stride is {addend_stride!r}; 1 or more is accepted")
    if addend is not None:
        pixels = [-(-side // addend_stride) for side in out.shape[2:]]
        addend = _checks.check_like(op, "addend", addend, dz, [*out.shape[:2], *pixels])
    raw = _checks.check_like(op, "raw", raw, dz, out.shape)
    norm = _training.check_norm(op, "norm", norm, dz, out.shape[1])
    if (residual is None) != (residual_norm is None):
        raise ValueError(f"{op}: residual and residual_norm are given together or not at all")
    if residual is not None:
        residual = _checks.check_like(op, "residual", residual, dz, out.shape)
        residual_norm = _training.check_norm(op, "residual_norm", residual_norm, dz, out.shape[1])
    _checks.no_derivative(op, dz, weight, out, raw, norm)
    return dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm


def _serving(operands: Sequence[Any], addend_stride: int, geometry: Any) -> str | None:
    """The kernel that takes a call, or None: two ops do."""
    if torch.compiler.is_compiling() or not _end_gradient.ENDING:
        return None
    chosen = _training.choice(_end_gradient.OP, operands[0]).implementation.name
    kernel = _end_gradient.ENDING.get(chosen)
    if kernel is None:
        return None
    refused = kernel.refusal(place_of(operands, addend_stride, geometry))
    return chosen if refused is None else None


def place_of(operands: Sequence[Any], addend_stride: int, geometry: Any) -> _end_gradient.Place:
    """Where the two blocks of a call meet."""
    dz, _, _, weight, addend, out, _, _, residual, _ = operands
    return _end_gradient.Place(
        dz.device, dz.dtype, tuple(out.shape), tuple(weight.shape), geometry,
        residual is not None, 0 if addend is None else addend_stride,
    )  # fmt: skip
