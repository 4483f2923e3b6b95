"""`bn_add_act_conv_stats`: a residual block's end and the next block's first convolution.

    out = relu(scale * y + shift + r),  r = residual, or residual_scale * residual + residual_shift
    z = conv(out, weight), 1x1
    stats = mean and M2 of z            over N, H, W, of the rounded z

What `bn_add_act` and `conv_bn_stats` compute one after the other, but for one reading of `out`. A
bottleneck begins with a 1x1 convolution ("Deep Residual Learning for Image Recognition", figure 5),
and out is its shortcut too: it is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _autocast, _block_end, _checks, _cuda_block_end, _training
from ._grad1x1 import GEOMETRY
from ._library import overload
from .bn_add_act import _reference as end_reference
from .bn_add_act import bn_add_act
from .conv_bn_stats import _reference as stats_reference
from .conv_bn_stats import conv_bn_stats

SCHEMA = (
    "(Tensor y, Tensor norm, Tensor residual, Tensor? residual_norm, Tensor weight) "
    "-> (Tensor, Tensor, Tensor)"
)


def _reference(
    y: Tensor, norm: Tensor, residual: Tensor, residual_norm: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out = end_reference(y, norm, residual, residual_norm, 0, "relu")
    return out, *stats_reference(out, None, weight, *GEOMETRY)


_training.enter(
    _block_end.OP,
    SCHEMA,
    _reference,
    "a block's end made as the 1x1 convolution behind it reads, statistics in its epilogue",
    triton="_training_checks_block_end",
    cuda=True,
    cuda_launch=_cuda_block_end.launch,
    cuda_checks=_cuda_block_end.CHECKS,
)


def bn_add_act_conv_stats(
    y: Tensor,
    norm: Tensor,
    residual: Tensor,
    weight: Tensor,
    residual_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes relu(scale * y + shift + shortcut), its 1x1 convolution, and that one's statistics.

    Where a kernel serves the call and no gradient is wanted, in one pass over its operands; else by
    `bn_add_act` and `conv_bn_stats`, whose results and gradients these are.

    Args:
        y: the last convolution's raw output [N, C, H, W]; float32, bfloat16, float16 or float64.
        norm: [4, C] of its BatchNorm, as `bn_finalize` returns it.
        residual: the shortcut, shape and dtype of `y`.
        weight: [K, C, 1, 1] of the convolution behind it, stride 1, no padding, one group; dtype of
            `y`.
        residual_norm: [4, C] of a projection's BatchNorm, through which `residual` is read.

    Returns:
        out [N, C, H, W] in `y`'s dtype and layout; z [N, K, H, W] in its dtype, channels_last where
        `y` or `weight` is; [2, K] in the dtype of `norm`: mean and M2 of z as it is stored.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices do not fit.

    Example:
        >>> out, z, stats = rf.ops.bn_add_act_conv_stats(y, norm, x, following.conv1.weight)
    """
    op = _block_end.OP
    y, residual, weight = _autocast.cast(y, residual, weight)
    y = _checks.check_activation_tensor(op, "y", y)
    channels = y.shape[1]
    norm = _training.check_norm(op, "norm", norm, y, channels)
    residual = _checks.check_like(op, "residual", residual, y, None)
    if residual.shape != y.shape:
        raise ValueError(
            f"{op}: residual has shape {tuple(residual.shape)}; y's {tuple(y.shape)} is needed"
        )
    if residual_norm is not None:
        residual_norm = _training.check_norm(op, "residual_norm", residual_norm, y, channels)
    weight = _checks.check_like(op, "weight", weight, y, None)
    if tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; [K, C, 1, 1] is accepted")
    _checks.conv_output_shape(op, y, weight, *GEOMETRY)
    arguments = (y, norm, residual, residual_norm, weight)
    derived = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    if not derived and not torch.compiler.is_compiling():
        chosen = _training.choice(op, y).implementation.name
        shapes = y.shape, weight.shape
        if chosen in _block_end.FOLDING and not _block_end.refusal(
            chosen, y.device, y.dtype, *shapes, residual_norm is not None
        ):
            return overload(op, chosen)(*arguments)
    out = bn_add_act(y, norm, residual, residual_norm)
    return out, *conv_bn_stats(out, weight)
