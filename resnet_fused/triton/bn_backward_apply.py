"""`bn_backward_apply` in Triton: dy = A dz + B y + C in one pass. Tiles as `bn_act`'s."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._bn import affine_gradient
from ._elementwise import offsets, tile_values, tiles_of
from ._launch import on_device, traceable


@triton.jit(do_not_specialize=["height", "width"])
def bn_backward_apply_kernel(
    dz,  # [N, C, H, W], any strides
    y,  # [N, C, H, W], any strides
    coefficients,  # [3, C] float32: A, B, C
    dy,  # [N, C, H, W], any strides
    rows,  # N H W by channel, else N C
    columns,  # C by channel, else H W
    height,
    width,
    channels,
    dz_n,
    dz_c,
    dz_h,
    dz_w,
    y_n,
    y_c,
    y_h,
    y_w,
    dy_n,
    dy_c,
    dy_h,
    dy_w,
    BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile, in float32, rounded once as it is stored."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n).to(index) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m = row < rows
    inside = inside_m[:, None] & (column < columns)[None, :]
    down, along = offsets(
        row, column, height, width, channels, dz_n, dz_c, dz_h, dz_w, BY_CHANNEL, DENSE
    )
    gradient = tl.load(dz + down[:, None] + along[None, :], mask=inside, other=0.0)
    down, along = offsets(
        row, column, height, width, channels, y_n, y_c, y_h, y_w, BY_CHANNEL, DENSE
    )
    value = tl.load(y + down[:, None] + along[None, :], mask=inside, other=0.0)
    a = tile_values(coefficients, 0, row, column, inside_m, channels, columns, BY_CHANNEL)
    b = tile_values(coefficients, 1, row, column, inside_m, channels, columns, BY_CHANNEL)
    c = tile_values(coefficients, 2, row, column, inside_m, channels, columns, BY_CHANNEL)
    result = affine_gradient(gradient, value, a, b, c)
    down, along = offsets(
        row, column, height, width, channels, dy_n, dy_c, dy_h, dy_w, BY_CHANNEL, DENSE
    )
    target = dy + down[:, None] + along[None, :]
    tl.store(target, result.to(dy.dtype.element_ty), mask=inside)


def launch(dz: Tensor, y: Tensor, coefficients: Tensor, dy: Tensor) -> None:
    """Writes A dz + B y + C into `dy`.

    Args:
        dz: [N, K, P, Q] float32, bfloat16 or float16, any layout.
        y: shape and dtype of dz, any layout.
        coefficients: [3, K] float32 A, B, C; contiguous.
        dy: shape and dtype of dz, any layout without overlaps; overwritten.
    """
    if dz.numel() == 0:
        return
    tiles = tiles_of(dy, dz, y)
    with on_device(dy):
        traceable(bn_backward_apply_kernel, dy)[(tiles.programs,)](
            dz, y, coefficients, dy, tiles.rows, tiles.columns, *dz.shape[2:], dz.shape[1],
            *dz.stride(), *y.stride(), *dy.stride(), **tiles.options,
        )  # fmt: skip
