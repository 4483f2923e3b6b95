"""`conv_bn_stats`: a convolution that reads its input through a BatchNorm and ReLU, and measures.

    h = relu(scale * x + shift)          the layer before, applied as its raw output is read
    y = conv(h, weight)                  raw: its own BatchNorm waits for the statistics
    stats = mean and M2 of y             over N, P, Q, of the rounded y, as BatchNorm sees it

What a residual block's inner layers are in training ("Deep Residual Learning for Image
Recognition", section 3.4: BatchNorm right after each convolution and before activation): each
activation is written once and read once. M2 is the sum of squares of y - mean; the parts of a
batch are merged in closed form and fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import _autocast, _checks, _convolution, _cuda_stats, _training, _training_cpu
from ._training import normalised, per_channel

SCHEMA = (
    "(Tensor x, Tensor? norm, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups) -> (Tensor, Tensor)"
)


def read(x: Tensor, norm: Tensor | None) -> Tensor:
    """What the convolution reads: the input itself, or behind its BatchNorm and ReLU."""
    return x if norm is None else normalised(x, norm)


def statistics(y: Tensor) -> Tensor:
    """Mean and M2 of each channel: [2, K]; zeros for an empty batch."""
    dtype = _training.compute_dtype(y.dtype)
    count = y.numel() // max(1, y.shape[1])
    if count == 0:
        return torch.zeros((2, y.shape[1]), dtype=dtype, device=y.device)
    variance, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    return torch.stack((mean, variance * count)).to(dtype)


def _reference(x: Tensor, norm: Tensor | None, weight: Tensor, *geometry: Any) -> Any:
    y = _convolution.output(read(x, norm), weight, *geometry)
    return y, statistics(y)


_training.enter(
    "conv_bn_stats",
    SCHEMA,
    _reference,
    "implicit GEMM, BN and ReLU as it reads, statistics in its epilogue",
    triton="_training_checks_stats",
    cuda=True,
    cuda_launch=_cuda_stats.launch,
    cuda_checks=_cuda_stats.CHECKS,
    cpu=_training_cpu.conv_bn_stats,
)


class _ConvBnStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        norm: Tensor | None,
        weight: Tensor,
        geometry: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        y, stats = _training.run("conv_bn_stats", x, x, norm, weight, *geometry)
        ctx.save_for_backward(x, norm, weight, y, stats)
        ctx.geometry = geometry
        return y, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, weight, y, stats = ctx.saved_tensors
        count = max(1, y.numel() // max(1, y.shape[1]))
        dmean, dm2 = (per_channel(row) for row in dstats)
        centred = y.to(stats.dtype) - per_channel(stats[0])
        g = (dy.to(stats.dtype) + dmean / count + 2 * dm2 * centred).to(y.dtype)
        h = read(x, norm)
        dh = dweight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dh = _convolution.input_gradient(g, h, weight, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            dweight = _convolution.weight_gradient(g, h, weight, *ctx.geometry)
        if norm is None or dh is None:
            return dh, None, dweight, None
        dz = torch.where(h <= 0, 0, dh.to(norm.dtype))
        dx = (dz * per_channel(norm[_training.SCALE])).to(x.dtype)
        dnorm = torch.zeros_like(norm)
        dnorm[_training.SCALE] = (dz * x.to(norm.dtype)).sum((0, 2, 3))
        dnorm[_training.SHIFT] = dz.sum((0, 2, 3))
        return dx, dnorm, dweight, None


def conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Computes conv(relu(scale * x + shift), weight) and the statistics of its output.

    Args:
        x: [N, C, H, W]; float32, bfloat16, float16 or float64, any layout (fastest in
            channels_last). With `norm` it is the raw output of the layer before.
        weight: [K, C/groups, R, S], dtype of `x`.
        norm: [4, C] of the layer before, as `bn_finalize` returns it: scale, shift, mean, invstd
            in float32 (float64 when `x` is float64). None reads `x` as it is. Padding is zero
            behind the ReLU, not relu(shift).
        stride: an int or (vertical, horizontal).
        padding: zeros on each side, an int or (vertical, horizontal).
        dilation: an int or (vertical, horizontal).
        groups: number of groups, as in `torch.nn.Conv2d`.

    Returns:
        y [N, K, P, Q] in `x`'s dtype, channels_last where `x` or `weight` is; and [2, K] in the
        dtype of `norm`: the mean of y as it is stored, and M2, the sum of (y - mean)^2. Both have
        gradients; a second derivative raises.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.

    Example:
        >>> y, stats = rf.ops.conv_bn_stats(x, conv.weight, padding=1)
    """
    op = "conv_bn_stats"
    x, weight = _autocast.cast(x, weight)
    x = _checks.check_activation_tensor(op, "x", x)
    weight = _checks.check_like(op, "weight", weight, x, None)
    geometry = _training.geometry_of(op, stride, padding, dilation, groups)
    _checks.conv_output_shape(op, x, weight, *geometry)
    if norm is not None:
        norm = _training.check_norm(op, "norm", norm, x, x.shape[1])
    tensors = [t for t in (x, norm, weight) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _ConvBnStats.apply(x, norm, weight, geometry)
    return _training.run(op, x, x, norm, weight, *geometry)
