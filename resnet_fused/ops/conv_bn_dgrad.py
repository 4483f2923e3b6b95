"""`conv_bn_dgrad`: the gradient of the input of a convolution between two live BatchNorms.

    dy = A dz + B y + C                            BatchNorm's backward, as the kernel reads
    dh = conv^T(dy, weight) [+ addend]             the addend: what comes through the shortcut
    dz_below = dh where h passed the ReLU, else 0,  h = relu(scale * raw + shift), made again
    sums = (sum dz_below, sum dz_below (raw - mean))    for the BatchNorm below

What eager PyTorch takes five passes for ("Deep Residual Learning for Image Recognition", section
3.4). Nothing but raw outputs is needed: the mask is made as forward made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import (
    _autocast,
    _checks,
    _convolution,
    _cuda_bn_dgrad,
    _results,
    _training,
    _training_cpu,
)
from ._training import affine_gradient, normalised
from .bn_add_act_backward import reductions
from .conv_dgrad import widened

SCHEMA = (
    "(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, Tensor? addend, Tensor? raw, "
    "Tensor? norm, SymInt[4] input_size, bool channels_last, int addend_stride, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups) -> (Tensor, Tensor)"
)


def _reference(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    raw: Tensor | None,
    norm: Tensor | None,
    input_size: list[int],
    channels_last: bool,
    addend_stride: int,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    dx = _results.empty_like(dz, input_size, channels_last)
    dy = affine_gradient(dz, y, coefficients)
    wide = widened(dz)
    if addend is not None:
        # One rounding, behind the sum: the product itself must not be rounded before.
        wide = _training.compute_dtype(dz.dtype)
    dh = _convolution.input_gradient(dy.to(wide), dx.to(wide), weight.to(wide), *geometry)
    if addend is not None:
        dh[:, :, ::addend_stride, ::addend_stride] += addend
    dx.copy_(dh)
    if raw is None or norm is None:
        return dx, norm_less(dz, dx)
    dx.masked_fill_(normalised(raw, norm) <= 0, 0)
    return dx, reductions(dx, raw, norm)


def norm_less(dz: Tensor, dx: Tensor) -> Tensor:
    """The sums where nobody wants any: [0, C]."""
    shape, dtype = (0, dx.shape[1]), _training.compute_dtype(dz.dtype)
    return torch.empty(shape, dtype=dtype, device=dz.device)


_training.enter(
    "conv_bn_dgrad",
    SCHEMA,
    _reference,
    "implicit GEMM, BN's backward as it reads, mask and reductions in its epilogue",
    triton="_training_checks_dgrad",
    cuda=True,
    cuda_launch=_cuda_bn_dgrad.launch,
    cuda_checks=_cuda_bn_dgrad.CHECKS,
    cpu=_training_cpu.conv_bn_dgrad,
)


def conv_bn_dgrad(
    dz: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    *,
    input_size: Sequence[int],
    addend: Tensor | None = None,
    addend_stride: int = 1,
    raw: Tensor | None = None,
    norm: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Computes the gradient of a convolution's input between two BatchNorms.

    Args:
        dz: gradient behind the BatchNorm [N, K, P, Q]; float32, bfloat16, float16 or float64.
        weight: [K, C/groups, R, S], dtype of `dz`.
        y: the convolution's raw output [N, K, P, Q]. None: `dz` is the gradient of that itself.
        coefficients: [3, K] A, B, C of `bn_backward_finalize`; given with `y`. A dz + B y + C is
            rounded to `dz`'s dtype before it is multiplied.
        input_size: (N, C, H, W).
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], dtype of `dz`: added to
            every addend_stride-th pixel of the gradient before it is rounded.
        addend_stride: see addend.
        raw: what went into the BatchNorm and ReLU below [N, C, H, W], dtype of `dz`. None: no ReLU
            stands between this convolution and its input.
        norm: [4, C] of that BatchNorm; given with `raw`.
        stride: an int or (vertical, horizontal), as of the forward call.
        padding: likewise.
        dilation: likewise.
        groups: likewise.

    Returns:
        [N, C, H, W] in `dz`'s dtype, channels_last where `dz` or `weight` is; and, with `raw`,
        [2, C] sums of it and of it times (raw - mean), else [0, C]. It has no derivative of its
        own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.
    """
    op = "conv_bn_dgrad"
    dz, weight, y, addend, raw = _autocast.cast(dz, weight, y, addend, raw)
    dz = _checks.check_activation_tensor(op, "dz", dz)
    weight = _checks.check_like(op, "weight", weight, dz, None)
    size = _checks.size4(op, "input_size", input_size)
    geometry = _training.geometry_of(op, stride, padding, dilation, groups)
    shape = _checks.conv_output_shape(op, torch.empty(size, device="meta"), weight, *geometry)
    dz = _checks.check_like(op, "dz", dz, dz, shape)
    y, coefficients = check_affine(op, dz, y, coefficients)
    if addend is not None:
        if not isinstance(addend_stride, int) or addend_stride < 1:
            raise ValueError(f"{op}: addend_stride is {addend_stride!r}; 1 or more is accepted")
        pixels = [-(-side // addend_stride) for side in size[2:]]
        addend = _checks.check_like(op, "addend", addend, dz, [*size[:2], *pixels])
    raw, norm = check_below(op, dz, raw, norm, size)
    _checks.no_derivative(op, dz, weight)
    layout = _results.wants_channels_last(dz, weight)
    return _training.run(
        op, dz, dz, y, coefficients, weight, addend, raw, norm, size, layout, addend_stride,
        *geometry,
    )  # fmt: skip


def check_affine(
    op: str, dz: Tensor, y: Tensor | None, coefficients: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Checks a raw output and the coefficients that belong to it."""
    if (y is None) != (coefficients is None):
        raise ValueError(f"{op}: y and coefficients are given together or not at all")
    if y is None:
        return None, None
    y = _checks.check_like(op, "y", y, dz, dz.shape)
    shape = (3, dz.shape[1])
    return y, _training.check_rows(op, "coefficients", coefficients, dz, shape, "A, B, C")


def check_below(
    op: str, dz: Tensor, raw: Tensor | None, norm: Tensor | None, size: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the raw output below a convolution and its BatchNorm's values."""
    if (raw is None) != (norm is None):
        raise ValueError(f"{op}: raw and norm are given together or not at all")
    if raw is None:
        return None, None
    raw = _checks.check_like(op, "raw", raw, dz, size)
    return raw, _training.check_norm(op, "norm", norm, dz, size[1])
