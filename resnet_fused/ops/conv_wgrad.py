"""`conv_wgrad`: the gradient of the weights of a conv-BN(-ReLU) whose statistics are frozen.

    dweight[k] = scale[k] * sum over pixels of dz[k] x,  dz = dy where y passed the ReLU, else 0

Used as `conv_dgrad` is ("Deep Residual Learning for Image Recognition", section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _checks, _convolution, _training
from ._library import overload
from .conv_dgrad import choose_gradient, scaled, widened

SCHEMA = (
    "(Tensor dy, Tensor? y, Tensor x, Tensor weight, Tensor scale, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> Tensor"
)


def like_parameter(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient with its parameter's strides, which DDP's buckets want."""
    if grad.stride() == weight.stride():
        return grad
    if grad.is_contiguous() and weight.is_contiguous():
        return grad.as_strided(weight.shape, weight.stride())  # a 1x1 kernel has two spellings
    return torch.empty_like(weight).copy_(grad)


def _reference(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    wide = widened(dy)
    g = scaled(dy, y, scale).to(wide)
    dweight = _convolution.weight_gradient(
        g, x.to(wide), weight.to(wide), stride, padding, dilation, groups
    )
    return like_parameter(dweight.to(weight.dtype), weight)


_training.enter(
    "conv_wgrad",
    SCHEMA,
    _reference,
    "mask as it reads, sums merged in fixed order",
    triton="_triton_checks",
    cuda=True,
    reference_rounding="folded",
)


def choose(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight_shape: Sequence[int],
    geometry: Sequence[Any],
) -> str:
    """The implementation that serves a call: overload name."""
    return choose_gradient("conv_wgrad", (dy, y, x), weight_shape, geometry)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    y: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Computes the gradient of `conv_bn_act`'s weight.

    Args:
        dy: gradient of the result [N, K, P, Q]; float32, bfloat16, float16 or float64.
        x: the layer's input [N, C, H, W], dtype of `dy`.
        weight: [K, C/groups, R, S], dtype of `dy`: its shape and strides are the gradient's.
        scale: [K]; used in float32 (float64 when `dy` is float64).
        y: the result [N, K, P, Q]: where it is <= 0 no gradient passes. None if there was no ReLU.
        stride: an int or (vertical, horizontal), as of the forward call.
        padding: likewise.
        dilation: likewise.
        groups: likewise.

    Returns:
        [K, C/groups, R, S], dtype and strides of `weight`. It has no derivative of its own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.
    """
    op = "conv_wgrad"
    dy, x, weight, y = _autocast.cast(dy, x, weight, y)
    dy = _checks.check_activation_tensor(op, "dy", dy)
    x = _checks.check_like(op, "x", x, dy, None)
    weight = _checks.check_like(op, "weight", weight, dy, None)
    stride, padding, dilation = _checks.geometry(op, stride, padding, dilation)
    shape = _checks.conv_output_shape(op, x, weight, stride, padding, dilation, groups)
    dy = _checks.check_like(op, "dy", dy, dy, shape)
    scale = _checks.check_channel_vector(op, "scale", scale, dy, weight.shape[0])
    if y is not None:
        y = _checks.check_like(op, "y", y, dy, shape)
    _checks.no_derivative(op, dy, x, scale)
    run = overload(op, choose(dy, y, x, weight.shape, (stride, padding, dilation, groups)))
    return run(dy, y, x, weight, scale, stride, padding, dilation, groups)
