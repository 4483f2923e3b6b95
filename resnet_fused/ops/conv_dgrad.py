"""`conv_dgrad`: the gradient of the input of a conv-BN(-ReLU) whose statistics are frozen.

    dx = conv^T(scale * dz, weight),  dz = dy where y passed the ReLU, else 0

What backpropagation through a residual block's layer takes in three passes ("Deep Residual Learning
for Image Recognition", section 3.3, whose networks are fine-tuned so in its appendix A): the mask
and the scale are applied as the kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import _autocast, _checks, _convolution, _cuda_plan, _results, _training
from ._library import overload
from .bn_act import masked

SCHEMA = (
    "(Tensor dy, Tensor? y, Tensor weight, Tensor scale, SymInt[4] input_size, bool channels_last, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor"
)


def scaled(dy: Tensor, y: Tensor | None, scale: Tensor) -> Tensor:
    """The gradient of the convolution's own output [N, K, P, Q]: mask, scale, one rounding."""
    dz = masked(dy, y)
    return (dz.to(scale.dtype) * scale.view(1, -1, 1, 1)).to(dy.dtype)


def widened(dy: Tensor) -> torch.dtype:
    """The dtype for PyTorch's own gradients: on the CPU it would add them up in float16."""
    narrow = dy.device.type == "cpu" and dy.dtype is torch.float16
    return torch.float32 if narrow else dy.dtype


def _reference(
    dy: Tensor,
    y: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    input_size: list[int],
    channels_last: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    dx = _results.empty_like(dy, input_size, channels_last)
    wide = widened(dy)
    g = scaled(dy, y, scale).to(wide)
    # Only the input's shape and layout are looked at.
    result = _convolution.input_gradient(
        g, dx.to(wide), weight.to(wide), stride, padding, dilation, groups
    )
    same = result.stride() == dx.stride() and result.dtype is dx.dtype
    return result if same else dx.copy_(result)


_training.enter(
    "conv_dgrad",
    SCHEMA,
    _reference,
    "implicit GEMM, mask and scale as it reads",
    triton="_triton_checks",
    cuda=True,
)


def choose_gradient(
    op: str, operands: Sequence[Tensor | None], shape: Sequence[int], geometry: Sequence[Any]
) -> str:
    """The implementation that serves a call of an op that is a gradient: overload name.

    Args:
        op: "conv_dgrad" or "conv_wgrad".
        operands: dy, y, and weight or x.
        shape: of the result.
        geometry: stride, padding, dilation, groups.
    """
    dy = operands[0]
    if torch.compiler.is_compiling() or dy is None:
        return "reference"
    call = backends.Call(op, dy.device.type, dy.dtype, index=dy.device.index)
    choice = backends.choose(call)
    if choice.implementation.name == "cuda":
        reason = _cuda_plan.unfit(op, operands, geometry, shape)
        if reason is not None:
            choice = backends.next_choice(call, choice, reason)
    return choice.implementation.name


def choose(
    dy: Tensor,
    y: Tensor | None,
    weight: Tensor,
    input_size: Sequence[int],
    geometry: Sequence[Any],
) -> str:
    """The implementation that serves a call: overload name."""
    return choose_gradient("conv_dgrad", (dy, y, weight), input_size, geometry)


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    scale: Tensor,
    y: Tensor | None = None,
    *,
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Computes the gradient of `conv_bn_act`'s input.

    Args:
        dy: gradient of the result [N, K, P, Q]; float32, bfloat16, float16 or float64.
        weight: [K, C/groups, R, S], dtype of `dy`.
        scale: [K]; used in float32 (float64 when `dy` is float64).
        y: the result [N, K, P, Q]: where it is <= 0 no gradient passes. None if there was no ReLU.
        input_size: (N, C, H, W).
        stride: an int or (vertical, horizontal), as of the forward call.
        padding: likewise.
        dilation: likewise.
        groups: likewise.

    Returns:
        [N, C, H, W] in `dy`'s dtype; channels_last where `dy` or `weight` is. scale * dy is rounded
        to that dtype before it is multiplied. Where dz is 0, a scale that is not finite gives 0
        or NaN, as the implementation likes; eager PyTorch gives NaN. It has no derivative of its
        own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.
    """
    op = "conv_dgrad"
    dy, weight, y = _autocast.cast(dy, weight, y)
    dy = _checks.check_activation_tensor(op, "dy", dy)
    weight = _checks.check_like(op, "weight", weight, dy, None)
    size = _checks.size4(op, "input_size", input_size)
    stride, padding, dilation = _checks.geometry(op, stride, padding, dilation)
    probe = torch.empty(size, device="meta")
    shape = _checks.conv_output_shape(op, probe, weight, stride, padding, dilation, groups)
    dy = _checks.check_like(op, "dy", dy, dy, shape)
    scale = _checks.check_channel_vector(op, "scale", scale, dy, weight.shape[0])
    if y is not None:
        y = _checks.check_like(op, "y", y, dy, shape)
    _checks.no_derivative(op, dy, weight, scale)
    layout = _results.wants_channels_last(dy, weight)
    run = overload(op, choose(dy, y, weight, size, (stride, padding, dilation, groups)))
    return run(dy, y, weight, scale, size, layout, stride, padding, dilation, groups)
