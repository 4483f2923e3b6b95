"""`bn_act_pool_backward` in Triton: each pixel gathers from its windows; mask and reductions.

A pixel lies in at most ceil(R / stride) x ceil(S / stride) windows, which add up in their own
order: no atomics. Programs and sums as in `bn_add_act_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._bn import activated
from ._elementwise import (
    MOST_UNROLLED,
    channel_values,
    first_program,
    merge,
    offsets_of_channel,
    place,
    store_sum,
    summed_tile,
    summed_tiles,
    workspace,
)
from ._gemm import pixel_of
from ._launch import fits_32_bits, on_device, traceable

ELEMENTS = 1024
"""Elements of a tile: four windows of 8 a thread are in flight, beside two sums of each."""


@triton.jit
def gathered(
    dout, taps, image, channel, u, v, window, out_height, out_width, dout_n, dout_c, dout_h, dout_w,
    taps_n, taps_c, taps_h, taps_w, inside, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DOWN: tl.constexpr, ALONG: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """What a pixel gets of one of its windows; u and v count the padding, and are never negative.

    The last window that it lies in begins at u or before; `window` counts from the first one.
    """
    p = u // STRIDE_H - (DOWN - 1 - window // ALONG)
    q = v // STRIDE_W - (ALONG - 1 - window % ALONG)
    r, s = u - p * STRIDE_H, v - q * STRIDE_W
    exists = (p >= 0) & (p < out_height) & (q >= 0) & (q < out_width) & (r < R) & (s < S)
    exists = inside & exists
    spot = place(image, channel, p, q, taps_n, taps_c, taps_h, taps_w, BY_CHANNEL)
    winner = tl.load(taps + spot, mask=exists, other=0).to(tl.int32)
    spot = place(image, channel, p, q, dout_n, dout_c, dout_h, dout_w, BY_CHANNEL)
    g = tl.load(dout + spot, mask=exists, other=0.0).to(tl.float32)
    return tl.where(exists & (winner == r * S + s), g, 0.0)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "tiles", "each"])
def bn_act_pool_backward_kernel(
    dout,  # [N, C, P, Q], any strides, as all tensors here
    taps,  # [N, C, P, Q] uint8
    y,  # [N, C, H, W]
    norm,  # [4, C] float32: scale, shift, mean, invstd
    dz,  # [N, C, H, W]
    partial,  # [parts, 2, C] float32
    rows,  # N H W by channel, else N
    columns,  # C by channel, else H W
    height,
    width,
    out_height,
    out_width,
    channels,
    pad_h,
    pad_w,
    tiles,  # of a channel
    each,  # of them a program's
    dout_n,
    dout_c,
    dout_h,
    dout_w,
    taps_n,
    taps_c,
    taps_h,
    taps_w,
    y_n,
    y_c,
    y_h,
    y_w,
    dz_n,
    dz_c,
    dz_h,
    dz_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DOWN: tl.constexpr,
    ALONG: tl.constexpr,
    UNROLLED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A run of tiles of dz, and the sums of what was stored, centred."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    part, channel = first_program(channels, columns, BY_CHANNEL, BLOCK_N)
    channel = channel.to(index)
    scale = channel_values(norm, 0, channel, channels, BY_CHANNEL)
    shift = channel_values(norm, 1, channel, channels, BY_CHANNEL)
    mean = channel_values(norm, 2, channel, channels, BY_CHANNEL)
    plain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    centred = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(part * each, tl.minimum((part + 1) * each, tiles)):
        row, column = summed_tile(tile, channel, columns, BY_CHANNEL, BLOCK_M, BLOCK_N)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        if BY_CHANNEL:
            image, u, v = pixel_of(row[:, None], height, width)
            of = channel[None, :]
        else:
            image, of = row[:, None], channel
            u, v = (column // width)[None, :], (column % width)[None, :]
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if UNROLLED:
            for window in tl.static_range(DOWN * ALONG):
                g += gathered(
                    dout, taps, image, of, u + pad_h, v + pad_w, window, out_height, out_width,
                    dout_n, dout_c, dout_h, dout_w, taps_n, taps_c, taps_h, taps_w, inside,
                    R, S, STRIDE_H, STRIDE_W, DOWN, ALONG, BY_CHANNEL,
                )  # fmt: skip
        else:
            for window in range(DOWN * ALONG):
                g += gathered(
                    dout, taps, image, of, u + pad_h, v + pad_w, window, out_height, out_width,
                    dout_n, dout_c, dout_h, dout_w, taps_n, taps_c, taps_h, taps_w, inside,
                    R, S, STRIDE_H, STRIDE_W, DOWN, ALONG, BY_CHANNEL,
                )  # fmt: skip
        spot = offsets_of_channel(
            row, column, channel, height, width, y_n, y_c, y_h, y_w, BY_CHANNEL, DENSE
        )
        value = tl.load(y + spot, mask=inside, other=0.0)
        h = activated(value, scale, shift).to(dz.dtype.element_ty).to(tl.float32)
        # Not (h > 0): where h is NaN, the gradient passes.
        rounded = tl.where(h <= 0.0, 0.0, g).to(dz.dtype.element_ty)
        spot = offsets_of_channel(
            row, column, channel, height, width, dz_n, dz_c, dz_h, dz_w, BY_CHANNEL, DENSE
        )
        tl.store(dz + spot, rounded, mask=inside)
        wide = rounded.to(tl.float32)
        plain += wide
        # Outside wide is 0, but 0 times an infinite mean is none.
        centred = tl.where(inside, tl.math.fma(wide, value.to(tl.float32) - mean, centred), centred)
    partial += part.to(tl.int64) * 2 * channels
    store_sum(partial, plain, channel, channels, BY_CHANNEL)
    store_sum(partial + channels, centred, channel, channels, BY_CHANNEL)


def launch(
    dout: Tensor,
    taps: Tensor,
    y: Tensor,
    norm: Tensor,
    dz: Tensor,
    sums: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    """Writes the gradient behind the ReLU into `dz`, and its reductions into `sums`.

    Args:
        dout: gradient of the pooled result [N, K, P, Q] float32, bfloat16 or float16, any layout.
        taps: shape of dout, uint8, the taps that won; any layout.
        y: [N, K, H, W], dtype of dout, any layout: what was pooled over, raw.
        norm: [4, K] float32 scale, shift, mean, invstd; contiguous.
        dz: shape and dtype of y, any layout without overlaps; overwritten.
        sums: [2, K] float32, contiguous; overwritten.
        kernel: window (vertical, horizontal), as are the others.
        stride: of the windows.
        padding: at most half a window.
    """
    if y.numel() == 0:
        sums.zero_()
        return
    down, along = (_tiles.cdiv(k, s) for k, s in zip(kernel, stride, strict=True))
    tiles = summed_tiles(dz, y, elements=ELEMENTS)
    options = tiles.options | {"WIDE": not fits_32_bits(dout, taps, y, dz)}
    partial = workspace(sums, tiles)
    with on_device(dz):
        traceable(bn_act_pool_backward_kernel, dz)[(tiles.programs,)](
            dout, taps, y, norm, dz, partial, tiles.rows, tiles.columns, *y.shape[2:],
            *dout.shape[2:], y.shape[1], *padding, tiles.of_channel, tiles.each,
            *dout.stride(), *taps.stride(), *y.stride(), *dz.stride(),
            R=kernel[0], S=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
            DOWN=down, ALONG=along, UNROLLED=down * along <= MOST_UNROLLED, **options,
        )  # fmt: skip
    merge(partial, sums)
