"""`bn_add_act_conv_stats` in Triton: a block's end within the next block's 1x1 convolution.

    out = relu(scale * y + shift + r)    made as y and the shortcut are read, stored once
    z = conv(out, weight)                of the rounded out
    stats = mean and M2 of the rounded z

Tiles as `conv_bn_stats`' (the epilogue and all merges are its own), but for the loop: of a 1x1
convolution of stride 1 it runs over channels alone, and a pixel is read where it is written. All
columns of tiles make `out` anew; each stores every tiles-across-th step's channels of it, so that
each element is stored by one program and no column stores more than its share.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _block_end, _limits, _tiles
from ._gemm import finish, pixel_of, tile_of
from ._launch import (
    GROUP_M,
    fits_32_bits,
    on_device,
    plan_of,
    precision,
    readable,
    traceable,
    writable,
)
from .conv_bn_stats import Measured, finish_measured, slices_of


@triton.jit
def ended(
    y,  # [M, K] elements
    residual,  # [M, K] likewise
    norm,  # [4, C] float32
    residual_norm,  # [4, C] float32; unused without NORMED
    channels,
    channel,  # [K]
    there,  # [K] which of them exist
    NORMED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Computes relu(scale * y + shift + shortcut) in float32; NaN stays NaN, as in torch."""
    a, b = affine_of(norm, channels, channel, there, EVEN)
    z = tl.math.fma(a[None, :], y.to(tl.float32), b[None, :])
    r = residual.to(tl.float32)
    if NORMED:
        a, b = affine_of(residual_norm, channels, channel, there, EVEN)
        r = tl.math.fma(a[None, :], r, b[None, :])
    z += r
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def affine_of(norm, channels, channel, there, EVEN: tl.constexpr):
    """Scale and shift of some channels; zero where a channel is not there."""
    if EVEN:
        return tl.load(norm + channel), tl.load(norm + channels + channel)
    return (
        tl.load(norm + channel, mask=there, other=0.0),
        tl.load(norm + channels + channel, mask=there, other=0.0),
    )


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def bn_add_act_conv_stats_kernel(
    y,  # [N, C, H, W], channels adjacent
    norm,  # [4, C] float32: scale, shift and more
    residual,  # [N, C, H, W], channels adjacent
    residual_norm,  # [4, C] float32; unused without NORMED
    weight,  # [K, C, 1, 1], channels adjacent
    out,  # [N, C, H, W], channels adjacent
    z,  # [N, K, H, W], any strides
    moments,  # [tiles of pixels, 2, K] float32; unused with splits
    partial,  # [SPLITS, N H W, K] float32; unused without splits
    pixels,  # N H W
    height,
    width,
    channels,
    filters,
    y_n,
    y_h,
    y_w,
    residual_n,
    residual_h,
    residual_w,
    weight_k,
    out_n,
    out_h,
    out_w,
    z_n,
    z_c,
    z_h,
    z_w,
    NORMED: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One tile of z and its moments, or with SPLITS > 1 of one part's sums; its share of out."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_n = tl.cdiv(filters, BLOCK_N)
    part = tl.program_id(0) % SPLITS
    tile_m, tile_n = tile_of(tl.program_id(0) // SPLITS, tl.cdiv(pixels, BLOCK_M), tiles_n, GROUP_M)
    pixel = tile_m.to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    image, p, q = pixel_of(tl.minimum(pixel, pixels - 1), height, width)
    # Offsets: pointers, which are twice as wide, would be kept for each row as well.
    y_row = (image * y_n + p * y_h + q * y_w)[:, None]
    residual_row = (image * residual_n + p * residual_h + q * residual_w)[:, None]
    out_row = (image * out_n + p * out_h + q * out_w)[:, None]
    first = tile_n * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    known = column < filters
    columns = weight + (column.to(index) * weight_k)[None, :]
    blocks = tl.cdiv(channels, BLOCK_K)
    each = tl.cdiv(blocks, SPLITS)
    begin = part * each
    zeros = tl.zeros((BLOCK_M,), tl.int32)  # a condition for each pixel, not one for all
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(begin, tl.minimum(begin + each, blocks)):
        channel = step * BLOCK_K + tl.arange(0, BLOCK_K)
        there = channel < channels
        stored = (inside & (zeros + step % tiles_n == tile_n))[:, None]
        used = known[None, :]
        raw, shortcut = y + (y_row + channel[None, :]), residual + (residual_row + channel[None, :])
        if EVEN:
            a, r = tl.load(raw), tl.load(shortcut)
        else:
            a = tl.load(raw, mask=there[None, :], other=0.0)
            r = tl.load(shortcut, mask=there[None, :], other=0.0)
            stored = stored & there[None, :]
            used = used & there[:, None]
        a = ended(a, r, norm, residual_norm, channels, channel, there, NORMED, EVEN)
        a = a.to(out.dtype.element_ty)
        tl.store(out + (out_row + channel[None, :]), a, mask=stored)
        b = tl.load(columns + channel[:, None], mask=used, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SPLITS > 1:
        sums = partial + ((part.to(tl.int64) * pixels + pixel) * filters)[:, None]
        finish(
            acc, norm, norm, sums, sums, inside, first.to(index), filters, 1, 1, False, False,
            False, BLOCK_N, SLICES,
        )  # fmt: skip
    else:
        place = z + (image * z_n + p * z_h + q * z_w)[:, None]
        count = tl.minimum(pixels - tile_m.to(index) * BLOCK_M, BLOCK_M).to(tl.float32)
        finish_measured(
            acc, place, moments + tile_m.to(tl.int64) * 2 * filters, inside, count,
            first.to(index), filters, z_c, filters, BLOCK_N, SLICES,
        )  # fmt: skip


def product_of(y: Tensor, weight: Tensor, residual_norm: Tensor | None) -> _tiles.Product:
    """The sizes from which the configuration is chosen.

    Args:
        y: [N, C, H, W].
        weight: [K, C, 1, 1].
        residual_norm: of a projection, or None.
    """
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    return _block_end.product_of(
        pixels, y.shape[1], weight.shape[0], y.element_size(), precision(y.dtype),
        projected=residual_norm is not None, capability=_limits.limits(y.device).capability,
    )  # fmt: skip


def launch(
    y: Tensor,
    norm: Tensor,
    residual: Tensor,
    residual_norm: Tensor | None,
    weight: Tensor,
    out: Tensor,
    z: Tensor,
    stats: Tensor,
    *,
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes relu(scale * y + shift + shortcut) into `out`, its convolution into `z`, and measures.

    Args:
        y: [N, C, H, W] float32, bfloat16 or float16. Copied to channels_last first if it is not
            `readable`, as are residual and weight; `out` and `z` likewise, by a copy afterwards.
        norm: [4, C] float32 scale, shift, mean, invstd; contiguous.
        residual: the shortcut, shape and dtype of y.
        residual_norm: [4, C] float32 through which `residual` is read, contiguous; or None.
        weight: [K, C, 1, 1], dtype of y.
        out: [N, C, H, W], any layout without overlaps; overwritten, as are z and stats.
        z: [N, K, H, W], any layout without overlaps.
        stats: [2, K] float32, contiguous: mean and M2 of z, zeros if it is empty.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.

    Raises:
        LookupError: no configuration takes the call.
    """
    if y.numel() == 0:
        stats.zero_()
        return
    product = product_of(y, weight, residual_norm)
    plan = plan or plan_of(product, y.device, allowed)
    y, residual, weight = readable(y), readable(residual), readable(weight)
    target, result = writable(out), writable(z)
    (_, channels, height, width), filters = y.shape, weight.shape[0]
    tile, pixels = plan.tile, product.rows
    measured = Measured.of(plan, pixels, result)
    wide = not fits_32_bits(y, residual, weight, target, result)
    tiles = _tiles.cdiv(pixels, tile.m) * _tiles.cdiv(filters, tile.n)
    with on_device(z):
        traceable(bn_add_act_conv_stats_kernel, z)[(tiles * plan.splits,)](
            y, norm, residual, norm if residual_norm is None else residual_norm, weight, target,
            result, measured.moments, measured.partial, pixels, height, width, channels, filters,
            *_steps(y), *_steps(residual), weight.stride(0), *_steps(target), *result.stride(),
            NORMED=residual_norm is not None, EVEN=channels % product.step == 0,
            SPLITS=plan.splits, WIDE=wide, PRECISION=product.precision, BLOCK_M=tile.m,
            BLOCK_N=tile.n, BLOCK_K=product.step, GROUP_M=GROUP_M, SLICES=slices_of(tile),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        measured.finish(result, stats, wide)
        for made, wanted in ((target, out), (result, z)):
            if made is not wanted:
                wanted.copy_(made)


def _steps(t: Tensor) -> tuple[int, int, int]:
    """Elements between the images, rows and columns of [N, C, H, W]."""
    return t.stride(0), t.stride(2), t.stride(3)
