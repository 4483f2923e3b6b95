"""`conv_bn_grad1x1_end`: both gradients of a 1x1 convolution, its input's behind a block's end.

What `conv_bn_dgrad_end` and `conv_bn_wgrad` compute of the same operands, each of which is then
read once: `out`, the end of the block before, is what the convolution read, and its sign is the
mask ("Deep Residual Learning for Image Recognition", equation 1 and figure 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cuda_grad1x1_end, _end_gradient, _training
from ._library import overload
from .conv_bn_dgrad_end import _reference as end_reference
from .conv_bn_dgrad_end import checked, conv_bn_dgrad_end, place_of
from .conv_bn_grad1x1 import check_parameter
from .conv_bn_wgrad import _reference as wgrad_reference

OP = _end_gradient.UNITED
GEOMETRY = [1, 1], [0, 0], [1, 1], 1
SCHEMA = (
    "(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, Tensor? addend, Tensor out, "
    "Tensor raw, Tensor norm, Tensor? residual, Tensor? residual_norm, Tensor parameter, "
    "int addend_stride) -> (Tensor, Tensor, Tensor)"
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
    parameter: Tensor,
    addend_stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    below, sums = end_reference(
        dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm,
        addend_stride, *GEOMETRY,
    )  # fmt: skip
    return below, sums, wgrad_reference(dz, y, coefficients, out, None, parameter, *GEOMETRY)


_training.enter(
    OP,
    SCHEMA,
    _reference,
    "both products of a tile of pixels, a block's mask and reductions of one of them",
    triton="_training_checks_grad1x1_end",
    cuda=True,
    cuda_launch=_cuda_grad1x1_end.launch,
    cuda_checks=_cuda_grad1x1_end.CHECKS,
)


def conv_bn_grad1x1_end(
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
    parameter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes both gradients of a 1x1 convolution, that of its input behind a block's last ReLU.

    The convolution has a stride of 1, no padding and one group. Where a kernel serves the call, in
    one pass over its operands; else by `conv_bn_dgrad_end` and `conv_bn_wgrad`, whose results these
    are.

    Args:
        dz: gradient behind the BatchNorm of the next block's first convolution [N, K, H, W];
            float32, bfloat16, float16 or float64.
        weight: [K, C, 1, 1] of that convolution, dtype of `dz`.
        y: its raw output [N, K, H, W]. None: `dz` is the gradient of that itself.
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
        parameter: [K, C, 1, 1], whose dtype (also float32) and strides the weights' gradient gets.
            None: `weight`'s.

    Returns:
        [N, C, H, W] in `raw`'s dtype and layout, rounded before it is masked; in `norm`'s dtype
        [2, C] sums of it and of it times (raw - mean), with a third row for the projection;
        dweight [K, C, 1, 1]. None has a derivative of its own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.
    """
    given = (dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm)
    if isinstance(weight, Tensor) and weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"{OP}: weight has shape {tuple(weight.shape)}; [K, C, 1, 1] is accepted")
    operands = checked(OP, given, addend_stride, GEOMETRY)
    parameter = check_parameter(OP, weight if parameter is None else parameter, operands[3])
    if served := _serving(operands, addend_stride):
        return overload(OP, served)(*operands, parameter, addend_stride)
    dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm = operands
    below, sums = conv_bn_dgrad_end(
        dz, weight, y, coefficients, out=out, raw=raw, norm=norm, residual=residual,
        residual_norm=residual_norm, addend=addend, addend_stride=addend_stride,
    )  # fmt: skip
    dweight = _training.run(
        "conv_bn_wgrad", dz, dz, y, coefficients, out, None, parameter, *GEOMETRY
    )
    return below, sums, dweight


def _serving(operands: Sequence[Any], addend_stride: int) -> str | None:
    """The kernel that takes a call, or None: two ops do."""
    if torch.compiler.is_compiling() or not _end_gradient.unites():
        return None
    chosen = _training.choice(OP, operands[0]).implementation.name
    kernel = _end_gradient.UNITING.get(chosen)
    if kernel is None:
        return None
    refused = kernel.refusal(place_of(operands, addend_stride, GEOMETRY))
    return chosen if refused is None else None
