"""Training on the CPU: PyTorch's convolutions between the C++ passes of `csrc/`.

What a GPU's kernels do as they read and write is a pass of its own here, in place where it can be:
BatchNorm and ReLU before a convolution, the statistics behind it, and in backward the affine before
its gradients, mask and sums behind them. Each temporary goes as soon as its reader is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _convolution, _passes, _results, _training
from ._passes import passes
from .conv_dgrad import widened
from .conv_wgrad import like_parameter


def _stats(like: Tensor, rows: int, channels: int) -> Tensor:
    return torch.empty((rows, channels), dtype=_training.compute_dtype(like.dtype))


def _read(x: Tensor, norm: Tensor | None) -> Tensor:
    """What a convolution reads of `x`: itself, or relu(scale * x + shift) in its layout."""
    if norm is None:
        return x
    h = _results.empty_like(x, x.shape, _results.is_channels_last(x))
    passes.bn_add_act_out(x, norm, None, None, 0, True, h)
    return h


def _affine(dz: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """The gradient of a raw output: A dz + B y + C, or `dz` itself."""
    if coefficients is None:
        return dz
    dy = _results.empty_like(dz, dz.shape, _results.is_channels_last(dz))
    passes.bn_backward_apply_out(dz, y, coefficients, dy)
    return dy


def _in_form(t: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """`t` in the dtype and layout that the op promises; itself where it has them."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    if t.dtype is dtype and t.is_contiguous(memory_format=form):
        return t
    return t.to(dtype).contiguous(memory_format=form)


def conv_bn_stats(x: Tensor, norm: Tensor | None, weight: Tensor, *geometry: Any) -> Any:
    """Body of `conv_bn_stats`."""
    y = _convolution.output(_read(x, norm), weight, *geometry)
    y = _in_form(y, x.dtype, _results.wants_channels_last(x, weight))
    stats = _stats(y, 2, y.shape[1])
    passes.bn_stats_out(y, stats)
    return y, stats


def bn_add_act(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    offset: int,
    act: str,
) -> Tensor:
    """Body of `bn_add_act`."""
    out = torch.empty_like(y)
    passes.bn_add_act_out(y, norm, residual, residual_norm, offset, act == "relu", out)
    return out


bn_add_act_backward = _results.body("bn_add_act_backward", _passes.bn_add_act_backward)
bn_backward_apply = _results.body("bn_backward_apply", _passes.bn_backward_apply)
bn_act_pool = _results.body("bn_act_pool", _passes.bn_act_pool)
bn_act_pool_backward = _results.body("bn_act_pool_backward", _passes.bn_act_pool_backward)


def bn_update_stats(
    stats: Tensor,
    total: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    count: int,
    momentum: float | None,
) -> None:
    """Body of `bn_update_stats`."""
    factor = momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if factor is None:
        # Without a counter PyTorch's factor is 0: nothing is averaged.
        factor = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
    mean, variance = _passes.plain(running_mean), _passes.plain(running_var)
    passes.bn_update_stats_out(stats, total, mean, variance, count, factor)
    for running, found in ((running_mean, mean), (running_var, variance)):
        if running is not found:
            running.copy_(found)


bn_finalize = _results.body("bn_finalize", _passes.bn_finalize)
bn_backward_finalize = _results.body("bn_backward_finalize", _passes.bn_backward_finalize)


def conv_bn_dgrad(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    raw: Tensor | None,
    norm: Tensor | None,
    input_size: Sequence[int],
    channels_last: bool,
    addend_stride: int,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    """Body of `conv_bn_dgrad`; the addend goes to the unrounded product, as in the reference."""
    wide = widened(dz) if addend is None else _training.compute_dtype(dz.dtype)
    # Its values are not looked at: shape and layout alone.
    like = _results.empty_like(dz, input_size, channels_last).to(wide)
    dh = _convolution.input_gradient(
        _affine(dz, y, coefficients).to(wide), like, weight.to(wide), *geometry
    )
    del like
    return _below(dh, dz.dtype, addend, addend_stride, raw, norm, channels_last)


def _below(
    dh: Tensor,
    dtype: torch.dtype,
    addend: Tensor | None,
    addend_stride: int,
    raw: Tensor | None,
    norm: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """What stands behind a convolution's input gradient: the addend, the mask and the sums."""
    if addend is not None:
        if addend_stride == 1:
            dh.add_(addend)
        else:
            dh[:, :, ::addend_stride, ::addend_stride] += addend
    dx = _in_form(dh, dtype, channels_last)
    del dh
    sums = _stats(dx, 0 if raw is None else 2, dx.shape[1])
    if raw is not None:
        passes.bn_add_act_backward_out(dx, None, raw, norm, None, None, True, dx, sums)
    return dx, sums


def gradients(
    dz: Tensor,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    parameter: Tensor,
    addend: Tensor | None,
    addend_stride: int,
    channels_last: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `conv_bn_dgrad` and `conv_bn_wgrad` give, of one call of PyTorch's convolution.

    It saves what that does to the gradient and the weight twice otherwise, and a way through the
    dispatcher: for a small map a tenth of the time.

    Args:
        dz: gradient of the raw output itself, no affine on it.
        x: what the convolution read; with `norm` the raw output below.
        norm: of the BatchNorm and ReLU below, or None.
        weight: as the convolution took it.
        parameter: as the user holds it.
        addend: as `conv_bn_dgrad` takes it.
        addend_stride: likewise.
        channels_last: likewise.
        *geometry: stride, padding, dilation, groups.

    Returns:
        dx, its sums and dweight; None where both are not of one dtype throughout.
    """
    dtype = dz.dtype
    wide = widened(dz) if addend is None else _training.compute_dtype(dtype)
    if wide is not dtype or parameter.dtype is not dtype:
        return None
    dh, dweight = _convolution.gradients(dz, _read(x, norm), weight, *geometry)
    raw = None if norm is None else x
    dx, sums = _below(dh, dtype, addend, addend_stride, raw, norm, channels_last)
    return dx, sums, like_parameter(dweight, parameter)


def conv_bn_wgrad(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    *geometry: Any,
) -> Tensor:
    """Body of `conv_bn_wgrad`; the sums go unrounded to a parameter in float32."""
    same = weight.dtype is dz.dtype
    wide = widened(dz) if same else _training.compute_dtype(dz.dtype)
    dweight = _convolution.weight_gradient(
        _affine(dz, y, coefficients).to(wide), _read(x, norm).to(wide), weight.to(wide), *geometry
    )
    return like_parameter(dweight.to(weight.dtype), weight)
