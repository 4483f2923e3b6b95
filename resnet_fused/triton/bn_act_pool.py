"""`bn_act_pool` in Triton: BatchNorm, ReLU and max pooling in one pass.

A tile is rows x columns of the result, as `bn_act`'s. Neighbouring windows overlap; what they share
comes from the cache, since a program takes windows side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._bn import activated
from ._elementwise import MOST_UNROLLED, offsets, place, tile_values, tiles_of
from ._gemm import pixel_of
from ._launch import fits_32_bits, on_device, traceable

ELEMENTS = 1024
"""Elements of a tile: nine taps of 8 a thread are in flight, 16 bytes each in 16 bits."""


@triton.jit
def visit(
    y, scale, shift, image, channel, top, left, height, width, y_n, y_c, y_h, y_w, inside, tap,
    best, winner, S: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """One tap of all windows: (best, winner) after it, the first maximum or the last NaN."""
    u, v = top + tap // S, left + tap % S
    exists = inside & (u >= 0) & (u < height) & (v >= 0) & (v < width)
    source = y + place(image, channel, u, v, y_n, y_c, y_h, y_w, BY_CHANNEL)
    value = tl.load(source, mask=exists, other=0.0)
    # The rounded values are compared: rounding makes ties.
    h = activated(value, scale, shift).to(y.dtype.element_ty).to(tl.float32)
    takes = exists & ((h > best) | (h != h))
    return tl.where(takes, h, best), tl.where(takes, tap, winner)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def bn_act_pool_kernel(
    y,  # [N, C, H, W], any strides
    norm,  # [4, C] float32: scale, shift, mean, invstd
    out,  # [N, C, P, Q], any strides
    taps,  # [N, C, P, Q] uint8, any strides
    rows,  # N P Q by channel, else N C
    columns,  # C by channel, else P Q
    height,
    width,
    out_height,
    out_width,
    channels,
    pad_h,
    pad_w,
    y_n,
    y_c,
    y_h,
    y_w,
    out_n,
    out_c,
    out_h,
    out_w,
    taps_n,
    taps_c,
    taps_h,
    taps_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    UNROLLED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile: the largest relu(scale * y + shift) of each window, and which tap it is."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n).to(index) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m = row < rows
    inside = inside_m[:, None] & (column < columns)[None, :]
    if BY_CHANNEL:
        image, p, q = pixel_of(row[:, None], out_height, out_width)
        channel = column[None, :]
    else:
        image, channel = (row // channels)[:, None], (row % channels)[:, None]
        p, q = (column // out_width)[None, :], (column % out_width)[None, :]
    top, left = p * STRIDE_H - pad_h, q * STRIDE_W - pad_w
    scale = tile_values(norm, 0, row, column, inside_m, channels, columns, BY_CHANNEL)
    shift = tile_values(norm, 1, row, column, inside_m, channels, columns, BY_CHANNEL)
    best = tl.full((BLOCK_M, BLOCK_N), -1.0, tl.float32)
    winner = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if UNROLLED:
        for tap in tl.static_range(R * S):
            best, winner = visit(
                y, scale, shift, image, channel, top, left, height, width, y_n, y_c, y_h, y_w,
                inside, tap, best, winner, S, BY_CHANNEL,
            )  # fmt: skip
    else:
        for tap in range(R * S):
            best, winner = visit(
                y, scale, shift, image, channel, top, left, height, width, y_n, y_c, y_h, y_w,
                inside, tap, best, winner, S, BY_CHANNEL,
            )  # fmt: skip
    down, along = offsets(
        row, column, out_height, out_width, channels, out_n, out_c, out_h, out_w, BY_CHANNEL, DENSE
    )
    target = out + down[:, None] + along[None, :]
    tl.store(target, best.to(out.dtype.element_ty), mask=inside)
    down, along = offsets(
        row, column, out_height, out_width, channels, taps_n, taps_c, taps_h, taps_w, BY_CHANNEL,
        DENSE,
    )  # fmt: skip
    tl.store(taps + down[:, None] + along[None, :], winner.to(tl.uint8), mask=inside)


def launch(
    y: Tensor,
    norm: Tensor,
    out: Tensor,
    taps: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    """Writes maxpool(relu(scale * y + shift)) into `out`, and the taps that won into `taps`.

    Args:
        y: [N, K, H, W] float32, bfloat16 or float16, any layout.
        norm: [4, K] float32 scale, shift, mean, invstd; contiguous.
        out: [N, K, P, Q], dtype of y, any layout without overlaps; overwritten.
        taps: shape of out, uint8, likewise.
        kernel: window (vertical, horizontal), as are the others.
        stride: of the windows.
        padding: at most half a window.
    """
    if out.numel() == 0:
        return
    tiles = tiles_of(out, taps, elements=ELEMENTS)
    options = tiles.options | {"WIDE": not fits_32_bits(y, out, taps)}
    with on_device(out):
        traceable(bn_act_pool_kernel, out)[(tiles.programs,)](
            y, norm, out, taps, tiles.rows, tiles.columns, *y.shape[2:], *out.shape[2:],
            y.shape[1], *padding, *y.stride(), *out.stride(), *taps.stride(),
            R=kernel[0], S=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
            UNROLLED=kernel[0] * kernel[1] <= MOST_UNROLLED, **options,
        )  # fmt: skip
