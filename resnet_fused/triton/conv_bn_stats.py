"""`conv_bn_stats` in Triton: implicit GEMM that reads through BatchNorm, and measures its output.

    h = relu(scale * x + shift)          as it is read; zero beyond the image
    y = conv(h, weight)                  raw, stored once
    stats = mean and M2 of the rounded y

One program computes a tile of pixels x output channels (see `_implicit`) and, from the registers
that hold the rounded values, the mean of each column and then the squares around it (the corrected
two-pass algorithm of Chan, Golub and LeVeque): sums of y^2 would be lost where the mean is large.
The tiles' moments are merged in float64, in a fixed order, around the first tile's mean p:

    d_i = mean_i - p;  S = sum n_i d_i;  Q = sum (M2_i + n_i d_i^2)
    mean = p + S / n;  M2 = Q - S^2 / n

The subtraction is harmless here. The mean of one of t tiles, p too, is at most sqrt(t) standard
deviations from the mean of all: Q is at most (1 + t) M2, which float64 has the bits for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _implicit, _tiles
from ._gemm import finish, halves, pixel_of
from ._implicit import constants, sizes, tile_sums
from ._launch import (
    MERGE_TILE,
    call_of,
    fits_32_bits,
    on_device,
    plan_of,
    readable,
    traceable,
    writable,
)

MOMENTS_TILE = (64, 32)
"""Tiles x channels whose moments a program merges in one step: lines of 128 bytes, and 16 values
of each kind a thread."""

MOST_AT_ONCE = 256
"""Tiles that one program merges to the end. More of them are merged in chunks of half as many, for
which a second launch pays: one program alone would read for longer than it takes."""


@triton.jit
def finish_measured(
    acc,  # [M, COLUMNS] float32 sums
    out,  # [M, 1] pointers to each pixel's channel 0
    moments,  # this tile's means, of channel 0; its M2 lie `channels` behind them
    inside,  # [M] which pixels exist
    count,  # of them, float32
    first,  # channel of the first column
    last,  # channel behind the last one that exists
    out_c,
    channels,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Epilogue: stores the rounded sums, and of those the mean and M2 of each column.

    In SLICES of the columns, one after the other, as `_gemm.finish`.
    """
    if SLICES > 1:
        half: tl.constexpr = COLUMNS // 2
        left, right = halves(acc)
        finish_measured(
            left, out, moments, inside, count, first, last, out_c, channels, half, SLICES // 2
        )
        finish_measured(
            right, out, moments, inside, count, first + half, last, out_c, channels, half,
            SLICES // 2,
        )  # fmt: skip
    else:
        channel = first + tl.arange(0, COLUMNS)
        known = channel < last
        y = acc.to(out.dtype.element_ty)
        tl.store(out + (channel * out_c)[None, :], y, mask=inside[:, None] & known[None, :])
        # Rows beyond the last pixel hold 0, also once they are centred: one multiply-add for both.
        value = tl.where(inside[:, None], y.to(tl.float32), 0.0)
        mean = tl.math.div_rn(tl.sum(value, 0), count)
        centred = tl.math.fma(inside.to(tl.float32)[:, None], -mean[None, :], value)
        # What the first sum has rounded away is left over; so the order of sums does not matter.
        left_over = tl.sum(centred, 0)
        rest = tl.math.div_rn(left_over, count)
        mean += rest
        m2 = tl.math.fma(-rest, left_over, tl.sum(centred * centred, 0))
        m2 = tl.where(m2 < 0.0, 0.0, m2)
        tl.store(moments + channel, mean, mask=known)
        tl.store(moments + channels + channel, m2, mask=known)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_bn_stats_kernel(
    x,  # [N, C, H, W], channels adjacent
    weight,  # [K, C / groups, R, S], channels adjacent
    norm,  # [4, C] float32: scale, shift and more; unused without PROLOGUE
    out,  # [N, K, P, Q], any strides
    moments,  # [tiles of pixels, 2, K] float32; unused with splits
    partial,  # [SPLITS, N P Q, K] float32; unused without splits
    pixels,  # N P Q
    height,
    width,
    out_height,
    out_width,
    channels,
    filters,
    group_in,
    group_out,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    x_n,
    x_h,
    x_w,
    weight_k,
    weight_r,
    weight_s,
    out_n,
    out_c,
    out_h,
    out_w,
    R: tl.constexpr,
    S: tl.constexpr,
    SIDE: tl.constexpr,
    NARROW: tl.constexpr,
    FLAT: tl.constexpr,
    CHECKED: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One tile of the output and its moments, or with SPLITS > 1 of one part's sums."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    acc, tile, part, pixel, inside, image, p, q, first_filter, first_member, last = tile_sums(
        x, weight, norm, norm + channels, pixels, height, width, out_height, out_width, channels,
        filters, group_in, group_out, stride_h, stride_w, padding_h, padding_w, dilation_h,
        dilation_w, x_n, x_h, x_w, weight_k, weight_r, weight_s, R, S, SIDE, NARROW, FLAT, CHECKED,
        EVEN, SPLITS, PROLOGUE, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip
    first = first_filter + first_member
    if SPLITS > 1:
        sums = partial + ((part.to(tl.int64) * pixels + pixel) * filters)[:, None]
        finish(
            acc, norm, norm, sums, sums, inside, first, last, 1, 1, False, False, False, BLOCK_N,
            SLICES,
        )  # fmt: skip
    else:
        place = out + (image * out_n + p * out_h + q * out_w)[:, None]
        count = tl.minimum(pixels - tile.to(index) * BLOCK_M, BLOCK_M).to(tl.float32)
        finish_measured(
            acc, place, moments + tile.to(tl.int64) * 2 * filters, inside, count,
            first.to(index), last, out_c, filters, BLOCK_N, SLICES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def stats_merge_kernel(
    partial,  # [SPLITS, N P Q, K] float32
    out,  # [N, K, P, Q], any strides
    moments,  # [tiles of pixels, 2, K] float32
    pixels,  # N P Q
    height,  # P
    width,  # Q
    channels,  # K
    out_n,
    out_c,
    out_h,
    out_w,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the splits' sums, always in the same order; stores them and the tile's moments."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    begin = tl.program_id(0).to(index) * BLOCK_M
    pixel = begin + tl.arange(0, BLOCK_M)
    first = tl.program_id(1).to(index) * BLOCK_N
    channel = first + tl.arange(0, BLOCK_N)
    inside = pixel < pixels
    given = inside[:, None] & (channel < channels)[None, :]
    source = partial + (pixel.to(tl.int64)[:, None] * channels + channel[None, :])
    step = tl.full((), 1, tl.int64) * pixels * channels  # elements of one part: beyond 2^31
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(source, mask=given, other=0.0)
        source += step
    image, p, q = pixel_of(tl.minimum(pixel, pixels - 1), height, width)
    place = out + (image * out_n + p * out_h + q * out_w)[:, None]
    count = tl.minimum(pixels - begin, BLOCK_M).to(tl.float32)
    own = moments + tl.program_id(0).to(tl.int64) * 2 * channels
    finish_measured(acc, place, own, inside, count, first, channels, out_c, channels, BLOCK_N, 1)


@triton.jit
def store_stats(stats, channel, channels, pivot, shifted, squares, pixels):
    """Mean and M2 from sums over the tiles of n d and of M2 + n d^2, d = mean - pivot."""
    mean = pivot + shifted / pixels
    # Inf less Inf: torch's mean of what holds an Inf is NaN, whichever tile the Inf is in.
    mean = tl.where(tl.abs(mean) == float("inf"), float("nan"), mean)
    known = channel < channels
    tl.store(stats + channel, mean.to(tl.float32), mask=known)
    m2 = squares - shifted * shifted / pixels
    tl.store(stats + channels + channel, m2.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=["pixels", "tiles", "each"])
def merge_moments_kernel(
    moments,  # [tiles, 2, K] float32: mean and M2
    chunks,  # [chunks, 2, K] float64: sums of n d and of M2 + n d^2; unused if LAST
    stats,  # [2, K] float32; unused unless LAST
    pixels,  # of all tiles
    tiles,
    each,  # tiles that a program merges
    channels,
    ROWS: tl.constexpr,  # pixels of a tile; the last one may have less
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merges a chunk of tiles, or all of them."""
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = channel < channels
    pivot = tl.load(moments + channel, mask=known, other=0.0).to(tl.float64)
    shifted = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    begin = tl.program_id(0) * each
    end = tl.minimum(begin + each, tiles)
    for start in range(begin, end, BLOCK_M):
        tile = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        given = (tile < end)[:, None] & known[None, :]
        place = moments + (tile * 2 * channels)[:, None] + channel[None, :]
        mean = tl.load(place, mask=given, other=0.0).to(tl.float64)
        m2 = tl.load(place + channels, mask=given, other=0.0).to(tl.float64)
        count = tl.maximum(tl.minimum(pixels - tile * ROWS, ROWS), 0).to(tl.float64)[:, None]
        d = tl.where(given, mean - pivot[None, :], 0.0)
        shifted += count * d
        squares += m2 + count * d * d
    shifted, squares = tl.sum(shifted, 0), tl.sum(squares, 0)
    if LAST:
        store_stats(stats, channel, channels, pivot, shifted, squares, tl.cast(pixels, tl.float64))
    else:
        own = chunks + tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(own, shifted, mask=known)
        tl.store(own + channels, squares, mask=known)


@triton.jit(do_not_specialize=["pixels", "count"])
def merge_chunks_kernel(
    moments,  # [tiles, 2, K] float32, of which the first tile's means are read
    chunks,  # [count, 2, K] float64
    stats,  # [2, K] float32
    pixels,
    count,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merges what `merge_moments_kernel` made of the chunks."""
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = channel < channels
    shifted = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    for start in range(0, count, BLOCK_M):
        chunk = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        given = (chunk < count)[:, None] & known[None, :]
        place = chunks + (chunk * 2 * channels)[:, None] + channel[None, :]
        shifted += tl.load(place, mask=given, other=0.0)
        squares += tl.load(place + channels, mask=given, other=0.0)
    pivot = tl.load(moments + channel, mask=known, other=0.0).to(tl.float64)
    shifted, squares = tl.sum(shifted, 0), tl.sum(squares, 0)
    store_stats(stats, channel, channels, pivot, shifted, squares, tl.cast(pixels, tl.float64))


def product_of(
    x: Tensor, norm: Tensor | None, weight: Tensor, y: Tensor, groups: int
) -> _tiles.Product:
    """The sizes from which the configuration is chosen."""
    return _implicit.product_of(x, weight, y, groups, prologue=norm is not None)


def slices_of(tile: _tiles.Tile) -> int:
    """In how many slices a tile is measured: 32 values a thread at a time."""
    return max(1, tile.sums // 32)


def chunk_of(tiles: int) -> int:
    """How many tiles one program merges: all of them, or whole steps of a chunk."""
    if tiles <= MOST_AT_ONCE:
        return tiles
    step = MOMENTS_TILE[0]
    return max(MOST_AT_ONCE // 2, step * _tiles.cdiv(tiles, step * MOST_AT_ONCE))


def merge(moments: Tensor, stats: Tensor, pixels: int, rows: int) -> None:
    """Merges the tiles' moments [tiles, 2, K] into `stats` [2, K].

    Args:
        moments: mean and M2 of each tile, float32, contiguous.
        stats: overwritten.
        pixels: of all tiles together.
        rows: pixels of a tile; the last one has what is left.
    """
    tiles, _, filters = moments.shape
    each = chunk_of(tiles)
    count = _tiles.cdiv(tiles, each)
    block_m, block_n = MOMENTS_TILE
    across = _tiles.cdiv(filters, block_n)
    chunks = stats
    if count > 1:
        chunks = torch.empty(count, 2, filters, dtype=torch.float64, device=stats.device)
    traceable(merge_moments_kernel, stats)[(count, across)](
        moments, chunks, stats, pixels, tiles, each, filters,
        ROWS=rows, LAST=count == 1, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    if count > 1:
        traceable(merge_chunks_kernel, stats)[(across,)](
            moments, chunks, stats, pixels, count, filters, BLOCK_M=block_m, BLOCK_N=block_n
        )


class Measured(NamedTuple):
    """Where a launch leaves what makes a measured output, and how that is put together.

    Attributes:
        moments: [tiles of pixels, 2, K] float32 mean and M2.
        partial: [splits, N P Q, K] float32 sums; anything without splits.
        rows: pixels of a tile whose moments are taken.
        pixels: N P Q.
        splits: parts of the reduction.
    """

    moments: Tensor
    partial: Tensor
    rows: int
    pixels: int
    splits: int

    @classmethod
    def of(cls, plan: _tiles.Plan, pixels: int, target: Tensor) -> Measured:
        """The workspace of a plan for `pixels` of an output [N, K, P, Q]."""
        split, filters = plan.splits > 1, target.shape[1]
        rows = MERGE_TILE[0] if split else plan.tile.m
        empty = functools.partial(torch.empty, dtype=torch.float32, device=target.device)
        moments = empty((_tiles.cdiv(pixels, rows), 2, filters))
        partial = empty((plan.splits, pixels, filters)) if split else target
        return cls(moments, partial, rows, pixels, plan.splits)

    def finish(self, target: Tensor, stats: Tensor, wide: bool) -> None:
        """Adds the parts' sums into the output, where there are parts, and merges the moments.

        Args:
            target: the output [N, K, P, Q]; with splits overwritten.
            stats: [2, K] float32; overwritten.
            wide: whether offsets within the output may need 64 bits.
        """
        filters, p, q = target.shape[1:]
        if self.splits > 1:
            across = _tiles.cdiv(filters, MERGE_TILE[1])
            traceable(stats_merge_kernel, target)[(self.moments.shape[0], across)](
                self.partial, target, self.moments, self.pixels, p, q, filters, *target.stride(),
                SPLITS=self.splits, WIDE=wide, BLOCK_M=self.rows, BLOCK_N=MERGE_TILE[1],
            )  # fmt: skip
        merge(self.moments, stats, self.pixels, self.rows)


def launch(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    y: Tensor,
    stats: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes conv(relu(scale * x + shift), weight) into `y`, and its statistics into `stats`.

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16. Copied to channels_last first if it is not
            `readable`, as is weight; `y` likewise, by a copy afterwards.
        norm: [4, C] float32, contiguous: scale, shift, mean, invstd; None reads x as it is.
        weight: [K, C / groups, R, S], dtype of x.
        y: [N, K, P, Q], any layout without overlaps; overwritten.
        stats: [2, K] float32, contiguous: mean and M2 of y; overwritten, with zeros if y is empty.
        stride: (vertical, horizontal), as padding and dilation.
        padding: see stride.
        dilation: see stride.
        groups: of channels.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
    """
    if y.numel() == 0:
        stats.zero_()
        return
    product = product_of(x, norm, weight, y, groups)
    call = call_of("conv_bn_stats", x, weight, norm, stride, padding, dilation, groups)
    plan = plan or plan_of(product, x.device, allowed, call)
    x, weight = readable(x), readable(weight)
    target = writable(y)
    tile, pixels = plan.tile, product.rows
    measured = Measured.of(plan, pixels, target)
    wide = not fits_32_bits(x, weight, target)
    across = _tiles.cdiv(product.columns, tile.n) * product.copies
    with on_device(y):
        traceable(conv_bn_stats_kernel, y)[(_tiles.cdiv(pixels, tile.m) * across * plan.splits,)](
            x, weight, stats if norm is None else norm, target, measured.moments, measured.partial,
            *sizes(x, weight, y, stride, padding, dilation, groups), *target.stride(),
            PROLOGUE=norm is not None, WIDE=wide,
            **(constants(product, plan, weight, padding, groups) | {"SLICES": slices_of(tile)}),
        )  # fmt: skip
        measured.finish(target, stats, wide)
        if target is not y:
            y.copy_(target)
