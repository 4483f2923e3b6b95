"""`bn_add_act` in Triton: a block's end, BatchNorm, shortcut and ReLU in one pass.

Tiles as `bn_act`'s. BatchNorm is a fused multiply-add, as everywhere in training.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._elementwise import offsets, tile_values, tiles_of
from ._launch import on_device, traceable

NONE, PLAIN, NORMED = range(3)
"""Kinds of shortcut: none; added as it is; behind a BatchNorm of its own."""


@triton.jit(do_not_specialize=["height", "width"])
def bn_add_act_kernel(
    y,  # [N, C, H, W], any strides
    norm,  # [4, C] float32: scale, shift, mean, invstd
    residual,  # [N, held, H, W], any strides; unused without SHORTCUT
    residual_norm,  # [4, C] float32; unused but for NORMED
    out,  # [N, C, H, W], any strides
    rows,  # N H W by channel, else N C
    columns,  # C by channel, else H W
    height,
    width,
    channels,
    held,  # channels of the shortcut
    offset,  # the channel of y that its first one is added to
    y_n,
    y_c,
    y_h,
    y_w,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
    SHORTCUT: tl.constexpr,
    PARTIAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile: act(scale * y + shift [+ shortcut]) in float32, rounded once as it is stored."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n).to(index) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m = row < rows
    inside = inside_m[:, None] & (column < columns)[None, :]
    down, along = offsets(
        row, column, height, width, channels, y_n, y_c, y_h, y_w, BY_CHANNEL, DENSE
    )
    value = tl.load(y + down[:, None] + along[None, :], mask=inside, other=0.0).to(tl.float32)
    a = tile_values(norm, 0, row, column, inside_m, channels, columns, BY_CHANNEL)
    b = tile_values(norm, 1, row, column, inside_m, channels, columns, BY_CHANNEL)
    z = tl.math.fma(a, value, b)
    if SHORTCUT > 0:
        down, along = offsets(
            row, column, height, width, channels, residual_n, residual_c, residual_h, residual_w,
            BY_CHANNEL, DENSE,
        )  # fmt: skip
        source = residual + down[:, None] + along[None, :]
        has = inside
        if PARTIAL:
            if BY_CHANNEL:
                there = ((column >= offset) & (column < offset + held))[None, :]
            else:
                channel = row % channels
                there = ((channel >= offset) & (channel < offset + held))[:, None]
            has = inside & there
            # A tensor of as many channels as y's would begin so much earlier.
            source -= offset * residual_c
        r = tl.load(source, mask=has, other=0.0).to(tl.float32)
        if SHORTCUT == 2:
            a = tile_values(residual_norm, 0, row, column, inside_m, channels, columns, BY_CHANNEL)
            b = tile_values(residual_norm, 1, row, column, inside_m, channels, columns, BY_CHANNEL)
            r = tl.math.fma(a, r, b)
        # Where nothing is added, -0 stays -0.
        z = tl.where(has, z + r, z) if PARTIAL else z + r
    if RELU:
        # NaN compares false and stays, as in torch.
        z = tl.where(z < 0.0, 0.0, z)
    down, along = offsets(
        row, column, height, width, channels, out_n, out_c, out_h, out_w, BY_CHANNEL, DENSE
    )
    target = out + down[:, None] + along[None, :]
    tl.store(target, z.to(out.dtype.element_ty), mask=inside)


def launch(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    out: Tensor,
    offset: int,
    act: str,
) -> None:
    """Writes act(scale * y + shift [+ shortcut]) into `out`.

    Args:
        y: [N, K, P, Q] float32, bfloat16 or float16, any layout.
        norm: [4, K] float32 scale, shift, mean, invstd; contiguous.
        residual: the shortcut, dtype of y: [N, K, P, Q] or fewer channels, any layout; or None.
        residual_norm: [4, K] float32 through which `residual` is read, contiguous; or None.
        out: shape and dtype of y, any layout without overlaps; overwritten.
        offset: the channel of `y` that the shortcut's first one is added to.
        act: "relu" or "none".
    """
    if y.numel() == 0:
        return
    shortcut = y if residual is None else residual
    kind = NONE if residual is None else PLAIN if residual_norm is None else NORMED
    channels, held = y.shape[1], shortcut.shape[1]
    tiles = tiles_of(out, y, shortcut)
    with on_device(out):
        traceable(bn_add_act_kernel, out)[(tiles.programs,)](
            y, norm, shortcut, norm if residual_norm is None else residual_norm, out,
            tiles.rows, tiles.columns, *y.shape[2:], channels, held, offset,
            *y.stride(), *shortcut.stride(), *out.stride(),
            SHORTCUT=kind, PARTIAL=held < channels, RELU=act == "relu", **tiles.options,
        )  # fmt: skip
