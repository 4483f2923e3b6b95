"""`bn_add_act_backward` in Triton: ReLU's mask and BatchNorm's reductions in one pass.

Each program masks a run of tiles of its channels and keeps their sums in registers; `merge` adds
the programs' sums in float64 and in fixed order, so that a call gives the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._bn import activated
from ._elementwise import (
    channel_values,
    first_program,
    merge,
    offsets_of_channel,
    store_sum,
    summed_tile,
    summed_tiles,
    workspace,
)
from ._launch import on_device, traceable


@triton.jit(do_not_specialize=["height", "width", "tiles", "each"])
def bn_add_act_backward_kernel(
    dout,  # [N, C, H, W], any strides, as all tensors here
    out,  # unused without FROM_OUT
    y,
    norm,  # [4, C] float32: scale, shift, mean, invstd
    residual,  # unused without PROJECTED
    residual_norm,  # [4, C] float32; unused without PROJECTED
    dz,
    partial,  # [parts, 2 or 3, C] float32
    rows,  # N H W by channel, else N
    columns,  # C by channel, else H W
    height,
    width,
    channels,
    tiles,  # of a channel
    each,  # of them a program's
    dout_n,
    dout_c,
    dout_h,
    dout_w,
    out_n,
    out_c,
    out_h,
    out_w,
    y_n,
    y_c,
    y_h,
    y_w,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    dz_n,
    dz_c,
    dz_h,
    dz_w,
    BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
    RELU: tl.constexpr,
    FROM_OUT: tl.constexpr,
    PROJECTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A run of tiles: dz is dout where the result passed the ReLU; their sums, centred."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    ROWS: tl.constexpr = 3 if PROJECTED else 2
    part, channel = first_program(channels, columns, BY_CHANNEL, BLOCK_N)
    channel = channel.to(index)
    mean = channel_values(norm, 2, channel, channels, BY_CHANNEL)
    # What of these no branch uses the compiler drops, loads too.
    scale = channel_values(norm, 0, channel, channels, BY_CHANNEL)
    shift = channel_values(norm, 1, channel, channels, BY_CHANNEL)
    projected_mean = channel_values(residual_norm, 2, channel, channels, BY_CHANNEL)
    plain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    centred = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    projected = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(part * each, tl.minimum((part + 1) * each, tiles)):
        row, column = summed_tile(tile, channel, columns, BY_CHANNEL, BLOCK_M, BLOCK_N)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = offsets_of_channel(
            row, column, channel, height, width, dout_n, dout_c, dout_h, dout_w, BY_CHANNEL, DENSE
        )
        g = tl.load(dout + place, mask=inside, other=0.0)
        place = offsets_of_channel(
            row, column, channel, height, width, y_n, y_c, y_h, y_w, BY_CHANNEL, DENSE
        )
        value = tl.load(y + place, mask=inside, other=0.0)
        if RELU:
            if FROM_OUT:
                place = offsets_of_channel(
                    row, column, channel, height, width, out_n, out_c, out_h, out_w, BY_CHANNEL,
                    DENSE,
                )  # fmt: skip
                result = tl.load(out + place, mask=inside, other=0.0)
            else:
                result = activated(value, scale, shift).to(dz.dtype.element_ty)
            # Not (result > 0): where the result is NaN, the gradient passes.
            g = tl.where(result.to(tl.float32) <= 0.0, 0.0, g).to(g.dtype)
        place = offsets_of_channel(
            row, column, channel, height, width, dz_n, dz_c, dz_h, dz_w, BY_CHANNEL, DENSE
        )
        tl.store(dz + place, g, mask=inside)
        wide = g.to(tl.float32)
        plain += wide
        # Outside wide is 0, but 0 times an infinite mean is none.
        centred = tl.where(inside, tl.math.fma(wide, value.to(tl.float32) - mean, centred), centred)
        if PROJECTED:
            place = offsets_of_channel(
                row, column, channel, height, width, residual_n, residual_c, residual_h, residual_w,
                BY_CHANNEL, DENSE,
            )  # fmt: skip
            other = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
            projected = tl.where(
                inside, tl.math.fma(wide, other - projected_mean, projected), projected
            )
    partial += part.to(tl.int64) * ROWS * channels
    store_sum(partial, plain, channel, channels, BY_CHANNEL)
    store_sum(partial + channels, centred, channel, channels, BY_CHANNEL)
    if PROJECTED:
        store_sum(partial + 2 * channels, projected, channel, channels, BY_CHANNEL)


def launch(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    dz: Tensor,
    sums: Tensor,
    act: str,
) -> None:
    """Writes the gradient behind the ReLU into `dz`, and its reductions into `sums`.

    Args:
        dout: gradient of the result [N, K, P, Q] float32, bfloat16 or float16, any layout.
        out: the result, shape and dtype of dout, any layout; None: it is made of y and norm again.
        y: the raw output that went in, likewise.
        norm: [4, K] float32 scale, shift, mean, invstd; contiguous.
        residual: the projection's raw output, likewise; or None.
        residual_norm: [4, K] float32 of its BatchNorm; or None.
        dz: shape and dtype of dout, any layout without overlaps; overwritten.
        sums: [2, K], with a residual [3, K], float32, contiguous; overwritten.
        act: "relu" or "none".
    """
    if dout.numel() == 0:
        sums.zero_()
        return
    projected = residual is not None and residual_norm is not None
    result = dout if out is None else out
    other = dout if residual is None else residual
    tiles = summed_tiles(dz, dout, result, y, other)
    partial = workspace(sums, tiles)
    with on_device(dz):
        traceable(bn_add_act_backward_kernel, dz)[(tiles.programs,)](
            dout, result, y, norm, other, residual_norm if projected else norm, dz, partial,
            tiles.rows, tiles.columns, *y.shape[2:], y.shape[1], tiles.of_channel, tiles.each,
            *dout.stride(), *result.stride(), *y.stride(), *other.stride(), *dz.stride(),
            RELU=act == "relu", FROM_OUT=out is not None, PROJECTED=projected, **tiles.options,
        )  # fmt: skip
    merge(partial, sums)
