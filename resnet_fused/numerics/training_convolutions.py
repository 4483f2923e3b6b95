"""Oracles and bounds of the convolutions of training, and of the stem's pooling.

Both factors of each product are what the contract rounds to the activations' dtype (`training`'s
`normalised` and `affine_gradient`); the sums are judged as `conv_bn_act`'s are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.numerics.bounds import ACCUMULATIONS, conv_bn_act_bound
from resnet_fused.numerics.oracle import IntPair, check_choice, convolve, pair
from resnet_fused.numerics.tolerances import EPILOGUE_STEPS, accumulator_dtype, unit_roundoff
from resnet_fused.numerics.training import (
    affine_gradient,
    gradient_error,
    masked,
    normalised,
    normalised_error,
    rows_of,
    settled,
)


def _read(x: Tensor, norm: Tensor | None) -> Tensor:
    return x if norm is None else normalised(x, norm)


def _magnitude(t: Tensor) -> Tensor:
    return t.double().abs().nan_to_num_(0.0, 0.0, 0.0)


def conv_bn_stats_oracle(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """The raw output conv(relu(scale * x + shift), weight) in float64 [N, K, P, Q].

    Args:
        x: [N, C, H, W].
        norm: [4, C] of the layer before, or None: `x` is read as it is.
        weight: [K, C / groups, R, S].
        stride: of the convolution, as are padding, dilation and groups.
        padding: zeros behind the ReLU.
        dilation: see stride.
        groups: see stride.
    """
    return convolve(_read(x, norm).double(), weight.double(), stride, padding, dilation, groups)


def conv_bn_stats_bound(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    oracle: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
) -> Tensor:
    """How far the raw output may be from `conv_bn_stats_oracle`: `conv_bn_act_bound` of h.

    Args:
        x: as `conv_bn_stats_oracle`, as are norm, weight and the geometry.
        norm: see x.
        weight: see x.
        oracle: what it returned.
        stride: see x.
        padding: see x.
        dilation: see x.
        groups: see x.
        accumulation: as in `conv_bn_act_bound`, as are k and tf32.
        k: see accumulation.
        tf32: see accumulation.
    """
    h, geometry = _read(x, norm), (stride, padding, dilation, groups)
    ones = torch.ones(weight.shape[0], dtype=torch.float64, device=x.device)
    bound = conv_bn_act_bound(
        h, weight, ones, torch.zeros_like(ones), None, oracle, stride=stride, padding=padding,
        dilation=dilation, groups=groups, accumulation=accumulation, k=k, tf32=tf32,
    )  # fmt: skip
    error = normalised_error(x, norm)
    if error is not None:
        bound += convolve(error, _magnitude(weight), *geometry)
        bound.masked_fill_(~torch.isfinite(oracle), 0.0)
    return bound


def _transposed(
    dy: Tensor,
    weight: Tensor,
    size: Sequence[int],
    geometry: tuple[IntPair, IntPair, IntPair, int],
) -> Tensor:
    """The gradient of an input of `size` in the dtype of `dy`."""
    stride, padding, dilation, groups = geometry
    like = torch.zeros(tuple(size), dtype=dy.dtype, device=dy.device)
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, like, weight, None, pair(stride), pair(padding), pair(dilation), False, [0, 0], groups,
        [True, False, False],
    )  # fmt: skip
    return dx


def _correlated(
    dy: Tensor, h: Tensor, weight: Tensor, geometry: tuple[IntPair, IntPair, IntPair, int]
) -> Tensor:
    """The gradient of a weight like `weight` in the dtype of `dy`."""
    stride, padding, dilation, groups = geometry
    _, dweight, _ = torch.ops.aten.convolution_backward(
        dy, h, weight.to(dy.dtype), None, pair(stride), pair(padding), pair(dilation), False,
        [0, 0], groups, [False, True, False],
    )  # fmt: skip
    return dweight


def _factor(n: int, accumulation: str, k: int, tf32: bool, dtype: torch.dtype) -> float:
    """The error of a sum of n products, in units of the sum of their magnitudes."""
    check_choice("accumulation", accumulation, ACCUMULATIONS)
    steps = (math.sqrt(n) if accumulation == "nearest" else n / k) + EPILOGUE_STEPS
    unit = 2.0 * unit_roundoff(accumulator_dtype(dtype))
    return steps * unit + (2.0 * 2.0**-11 if tf32 else 0.0)


def _spread(addend: Tensor, size: Sequence[int], step: int) -> Tensor:
    """The addend at every step-th pixel, zeros elsewhere."""
    wide = torch.zeros(tuple(size), dtype=torch.float64, device=addend.device)
    wide[:, :, ::step, ::step] = addend.double()
    return wide


def conv_bn_dgrad_oracle(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    raw: Tensor | None,
    norm: Tensor | None,
    *,
    input_size: Sequence[int],
    addend_stride: int = 1,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """The gradient of a convolution's input behind the ReLU below, in float64 [N, C, H, W].

    The sums that go with it are `reductions_oracle` of what the op stored.

    Args:
        dz: gradient behind the BatchNorm [N, K, P, Q].
        y: raw output [N, K, P, Q], or None.
        coefficients: [3, K], or None.
        weight: [K, C / groups, R, S].
        addend: what comes through the shortcut, or None.
        raw: what went into the BatchNorm and ReLU below [N, C, H, W], or None.
        norm: [4, C] of that BatchNorm, or None.
        input_size: (N, C, H, W).
        addend_stride: the addend is that of every addend_stride-th pixel.
        stride: of the convolution, as are padding, dilation and groups.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
    """
    dy = affine_gradient(dz, y, coefficients).double()
    dx = _transposed(dy, weight.double(), input_size, (stride, padding, dilation, groups))
    if addend is not None:
        dx = dx + _spread(addend, input_size, addend_stride)
    return dx if raw is None or norm is None else masked(dx, normalised(raw, norm))


def conv_bn_dgrad_bound(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    raw: Tensor | None,
    norm: Tensor | None,
    oracle: Tensor,
    *,
    addend_stride: int = 1,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
) -> Tensor:
    """How far each element may be from `conv_bn_dgrad_oracle`: u |R| + (sqrt(n) + 8) 2^-23 S.

    S is the gradient of the magnitudes and |addend|, n = K / groups R S; where the ReLU below lets
    nothing pass the result is 0.

    Args:
        dz: as `conv_bn_dgrad_oracle`, as are the other operands and the geometry.
        y: see dz.
        coefficients: see dz.
        weight: see dz.
        addend: see dz.
        raw: see dz.
        norm: see dz.
        oracle: what it returned.
        addend_stride: see dz.
        stride: see dz.
        padding: see dz.
        dilation: see dz.
        groups: see dz.
        accumulation: as in `conv_bn_act_bound`, as are k and tf32.
        k: see accumulation.
        tf32: see accumulation.
    """
    geometry, size = (stride, padding, dilation, groups), oracle.shape
    wm = _magnitude(weight)
    total = _transposed(_magnitude(affine_gradient(dz, y, coefficients)), wm, size, geometry)
    if addend is not None:
        total += _magnitude(_spread(addend, size, addend_stride))
    n = weight.shape[0] // groups * weight[0, 0].numel()
    error = total * _factor(n, accumulation, k, tf32, dz.dtype)
    unfused = gradient_error(dz, y, coefficients)
    if unfused is not None:
        error += _transposed(unfused, wm, size, geometry)
    bound = settled(error, oracle, dz.dtype)
    if raw is not None and norm is not None:
        bound.masked_fill_(normalised(raw, norm) <= 0, 0.0)
        bound += _either_way(raw, norm, total)
    return bound.masked_fill_(total >= torch.finfo(accumulator_dtype(dz.dtype)).max, math.inf)


def _either_way(raw: Tensor, norm: Tensor, size: Tensor) -> Tensor:
    """`size` where float64's multiply-adds may disagree about the ReLU, else 0."""
    error = normalised_error(raw, norm)
    if error is None:
        return torch.zeros_like(size)
    scale, shift, *_ = rows_of(norm)
    z = (scale * raw + shift).abs()
    return torch.where((z <= error) & (error > 0), size, 0.0)


def conv_bn_dgrad_end_oracle(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    out: Tensor,
    **options: Any,
) -> Tensor:
    """`conv_bn_dgrad_oracle` where a block's output passed its ReLU, else 0: [N, C, H, W].

    The sums that go with it are `reductions_oracle` of what the op stored.

    Args:
        dz: as there, as are y, coefficients, weight and addend.
        y: see dz.
        coefficients: see dz.
        weight: see dz.
        addend: see dz.
        out: the block's output [N, C, H, W] as it was stored.
        options: the geometry and addend_stride, as there.
    """
    operands = (dz, y, coefficients, weight, addend, None, None)
    return masked(conv_bn_dgrad_oracle(*operands, input_size=out.shape, **options), out)


def conv_bn_dgrad_end_bound(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    out: Tensor,
    oracle: Tensor,
    **options: Any,
) -> Tensor:
    """How far each element may be from `conv_bn_dgrad_end_oracle`: `conv_bn_dgrad_bound`, or 0.

    The mask is read off a stored tensor, and so the same in all implementations.

    Args:
        dz: as `conv_bn_dgrad_end_oracle`, as are the other operands.
        y: see dz.
        coefficients: see dz.
        weight: see dz.
        addend: see dz.
        out: see dz.
        oracle: what it returned.
        options: as `conv_bn_dgrad_bound` takes them.
    """
    operands = (dz, y, coefficients, weight, addend, None, None)
    bound = conv_bn_dgrad_bound(*operands, oracle, **options)
    return bound.masked_fill(out <= 0, 0.0)


def conv_bn_wgrad_oracle(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """The gradient of a convolution's weight in float64 [K, C / groups, R, S].

    Args:
        dz: gradient behind the BatchNorm [N, K, P, Q].
        y: raw output [N, K, P, Q], or None.
        coefficients: [3, K], or None.
        x: what the convolution read, or with `norm` the raw output below [N, C, H, W].
        norm: [4, C], or None.
        weight: only its shape counts.
        stride: of the convolution, as are padding, dilation and groups.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
    """
    dy = affine_gradient(dz, y, coefficients).double()
    return _correlated(dy, _read(x, norm).double(), weight, (stride, padding, dilation, groups))


def conv_bn_wgrad_bound(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    oracle: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
) -> Tensor:
    """How far each element may be from `conv_bn_wgrad_oracle`: u |R| + (sqrt(n) + 8) 2^-23 S.

    u is that of the weight's dtype, n = N P Q.

    Args:
        dz: as `conv_bn_wgrad_oracle`, as are the other operands and the geometry.
        y: see dz.
        coefficients: see dz.
        x: see dz.
        norm: see dz.
        weight: see dz.
        oracle: what it returned.
        stride: see dz.
        padding: see dz.
        dilation: see dz.
        groups: see dz.
        accumulation: as in `conv_bn_act_bound`, as are k and tf32.
        k: see accumulation.
        tf32: see accumulation.
    """
    geometry = (stride, padding, dilation, groups)
    dy, h = _magnitude(affine_gradient(dz, y, coefficients)), _magnitude(_read(x, norm))
    if not dy.numel():
        return torch.zeros_like(oracle)
    total = _correlated(dy, h, weight, geometry)
    n = dy.shape[0] * dy[0, 0].numel()
    error = total * _factor(n, accumulation, k, tf32, dz.dtype)
    for unfused, other in (
        (gradient_error(dz, y, coefficients), lambda e: (e, h)),
        (normalised_error(x, norm), lambda e: (dy, e)),
    ):
        if unfused is not None:
            error += _correlated(*other(unfused), weight, geometry)
    bound = settled(error, oracle, weight.dtype)
    return bound.masked_fill_(total >= torch.finfo(accumulator_dtype(dz.dtype)).max, math.inf)


def _windows(
    shape: Sequence[int], kernel: IntPair, stride: IntPair, padding: IntPair
) -> tuple[list[tuple[slice, slice]], tuple[int, int]]:
    """Where each tap of all windows lies in an image padded on all sides; and (P, Q)."""
    (r, s), (sh, sw), (ph, pw) = pair(kernel), pair(stride), pair(padding)
    p, q = (shape[2] + 2 * ph - r) // sh + 1, (shape[3] + 2 * pw - s) // sw + 1
    return [
        (slice(i, i + (p - 1) * sh + 1, sh), slice(j, j + (q - 1) * sw + 1, sw))
        for i in range(r)
        for j in range(s)
    ], (p, q)


def bn_act_pool_oracle(
    y: Tensor, norm: Tensor, kernel: IntPair, stride: IntPair, padding: IntPair
) -> tuple[Tensor, Tensor]:
    """maxpool(relu(scale * y + shift)) and the tap that won, bit for bit.

    The rounded values are compared in the window's order, from the first tap inside the image: the
    first maximum wins, and the last NaN.

    Args:
        y: [N, K, H, W].
        norm: [4, K].
        kernel: (vertical, horizontal), as are stride and padding.
        stride: see kernel.
        padding: see kernel.

    Returns:
        [N, K, P, Q] in `y`'s dtype, and uint8 of that shape.
    """
    ph, pw = pair(padding)
    places, sizes = _windows(y.shape, kernel, stride, padding)
    h = torch.nn.functional.pad(normalised(y, norm), (pw, pw, ph, ph))
    inside = torch.nn.functional.pad(torch.ones_like(y, dtype=torch.bool), (pw, pw, ph, ph))
    best = torch.zeros((*y.shape[:2], *sizes), dtype=y.dtype, device=y.device)
    taps = torch.zeros_like(best, dtype=torch.uint8)
    started = torch.zeros_like(best, dtype=torch.bool)
    for tap, (rows, columns) in enumerate(places):
        value, here = h[:, :, rows, columns], inside[:, :, rows, columns]
        won = here & (~started | (value > best) | value.isnan())
        best, started = torch.where(won, value, best), started | here
        taps.masked_fill_(won, tap)
    return best, taps


def bn_act_pool_backward_oracle(
    dout: Tensor,
    taps: Tensor,
    y: Tensor,
    norm: Tensor,
    kernel: IntPair,
    stride: IntPair,
    padding: IntPair,
) -> tuple[Tensor, Tensor]:
    """The gradient behind the ReLU below a pooling, and how far an op's may be from it.

    Each pixel adds up the windows that it won: u |R| + (windows + 1) 2^-24 S. The sums that go with
    it are `reductions_oracle` of what the op stored.

    Args:
        dout: gradient of the pooled [N, K, P, Q].
        taps: uint8 of that shape.
        y: [N, K, H, W].
        norm: [4, K].
        kernel: as forward, as are stride and padding.
        stride: see kernel.
        padding: see kernel.

    Returns:
        Two of [N, K, H, W], float64.
    """
    (r, s), (sh, sw), (ph, pw) = pair(kernel), pair(stride), pair(padding)
    height, width = y.shape[2:]
    places, _ = _windows(y.shape, kernel, stride, padding)
    padded = (*y.shape[:2], height + 2 * ph, width + 2 * pw)
    total = torch.zeros((2, *padded), dtype=torch.float64, device=y.device)
    for tap, (rows, columns) in enumerate(places):
        given = torch.where(taps == tap, dout.double(), 0.0)
        total[0, :, :, rows, columns] += given
        total[1, :, :, rows, columns] += given.abs()
    dz, size = total[..., ph : ph + height, pw : pw + width]
    h, windows = normalised(y, norm), math.ceil(r / sh) * math.ceil(s / sw)
    dz = masked(dz, h)
    unit = (windows + 1) * unit_roundoff(accumulator_dtype(y.dtype))
    bound = settled(size.nan_to_num(0.0, 0.0, 0.0) * unit, dz, y.dtype)
    bound = bound.masked_fill(h <= 0, 0.0) + _either_way(y, norm, size)
    return dz, bound
