"""`conv_bn_wgrad`: the gradient of a convolution's weights between two live BatchNorms.

    dweight = sum over pixels of dy h,  dy = A dz + B y + C,  h = relu(scale * x + shift)

Both factors are made as the kernel reads ("Deep Residual Learning for Image Recognition", section
3.4): neither is kept from forward. The sums stay in float32 until they are stored in the
parameter's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _checks, _convolution, _cuda_wgrad, _training, _training_cpu
from ._training import affine_gradient
from .conv_bn_dgrad import check_affine
from .conv_bn_stats import read
from .conv_dgrad import widened
from .conv_wgrad import like_parameter

SCHEMA = (
    "(Tensor dz, Tensor? y, Tensor? coefficients, Tensor x, Tensor? norm, Tensor weight, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor"
)


def _reference(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    *geometry: Any,
) -> Tensor:
    wide = widened(dz)
    if weight.dtype is not dz.dtype:
        wide = _training.compute_dtype(dz.dtype)  # the sums go unrounded to a float32 parameter
    dy = affine_gradient(dz, y, coefficients).to(wide)
    h = read(x, norm).to(wide)
    dweight = _convolution.weight_gradient(dy, h, weight.to(wide), *geometry)
    return like_parameter(dweight.to(weight.dtype), weight)


_training.enter(
    "conv_bn_wgrad",
    SCHEMA,
    _reference,
    "BN's backward and the input's BN and ReLU as it reads, sums merged in fixed order",
    triton="_training_checks_wgrad",
    cuda=True,
    cuda_launch=_cuda_wgrad.launch,
    cuda_checks=_cuda_wgrad.CHECKS,
    cpu=_training_cpu.conv_bn_wgrad,
)


def conv_bn_wgrad(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Computes the gradient of a convolution's weight between two BatchNorms.

    Args:
        dz: gradient behind the BatchNorm [N, K, P, Q]; float32, bfloat16, float16 or float64.
        x: what the convolution read [N, C, H, W], dtype of `dz`; with `norm` the raw output below.
        weight: [K, C/groups, R, S]: its shape, dtype (also float32) and strides are the gradient's.
        y: the convolution's raw output [N, K, P, Q]. None: `dz` is the gradient of that itself.
        coefficients: [3, K] A, B, C of `bn_backward_finalize`; given with `y`.
        norm: [4, C] of the BatchNorm and ReLU below, through which `x` is read.
        stride: an int or (vertical, horizontal), as of the forward call.
        padding: likewise.
        dilation: likewise.
        groups: likewise.

    Returns:
        [K, C/groups, R, S], dtype and strides of `weight`. Both factors are rounded to `dz`'s dtype
        before they are multiplied. It has no derivative of its own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.
    """
    op = "conv_bn_wgrad"
    dz, x, y = _autocast.cast(dz, x, y)
    dz = _checks.check_activation_tensor(op, "dz", dz)
    x = _checks.check_like(op, "x", x, dz, None)
    weight = _checks.check_activation_tensor(op, "weight", weight)
    if weight.dtype not in (dz.dtype, torch.float32):
        raise TypeError(
            f"{op}: weight has dtype {weight.dtype}; dz's {dz.dtype}, or torch.float32, is accepted"
        )
    if weight.device != dz.device:
        raise ValueError(f"{op}: weight is on {weight.device}, dz on {dz.device}")
    geometry = _training.geometry_of(op, stride, padding, dilation, groups)
    shape = _checks.conv_output_shape(op, x, weight, *geometry)
    dz = _checks.check_like(op, "dz", dz, dz, shape)
    y, coefficients = check_affine(op, dz, y, coefficients)
    if norm is not None:
        norm = _training.check_norm(op, "norm", norm, dz, x.shape[1])
    _checks.no_derivative(op, dz, x)
    return _training.run(op, dz, dz, y, coefficients, x, norm, weight, *geometry)
