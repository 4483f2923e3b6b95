"""What the matrix kernels share: the order of tiles, pixels, groups side by side, the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from ._dependent import wait


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Which tile a program computes: (row of tiles, column of tiles).

    GROUP_M rows of tiles are walked column by column, so that the tiles that run at one time share
    their rows' and their columns' operands in L2.
    """
    width = GROUP_M * tiles_n
    first = (program // width) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % width
    return first + inside % rows, inside // rows


@triton.jit
def pixel_of(index, height, width):
    """(image, row, column) of pixels counted through N, H, W."""
    row = index // width
    return row // height, row % height, index % width


@triton.jit
def same_group(rows, columns, rows_per_group, columns_per_group):
    """Where channels [R, 1] and [1, C] of a bundle of groups belong to one group: [R, C]."""
    return rows // rows_per_group == columns // columns_per_group


@triton.jit
def finish(
    acc,  # [M, COLUMNS] float32 sums
    scale,  # [K]
    shift,  # [K]
    residual,  # [M, 1] pointers to each pixel's channel 0
    out,  # [M, 1] pointers, likewise
    inside,  # [M] which pixels exist
    first,  # channel of the first column
    last,  # channel behind the last one that exists
    residual_c,
    out_c,
    AFFINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
    residual_factor=None,
    out_factor=None,
):
    """Epilogue: act([scale * acc + shift] [+ residual]) in float32, rounded once as it is stored.

    What is stored as e4m3 saturates at 448; factors multiply the residual and the result.

    In SLICES (1, 2 or 4) of the columns, one after the other: the shortcut of a whole tile beside
    its sums would need more registers than a thread has.
    """
    if SLICES > 1:
        half: tl.constexpr = COLUMNS // 2
        left, right = halves(acc)
        finish(
            left, scale, shift, residual, out, inside, first, last, residual_c, out_c,
            AFFINE, HAS_RESIDUAL, RELU, half, SLICES // 2, residual_factor, out_factor,
        )  # fmt: skip
        finish(
            right, scale, shift, residual, out, inside, first + half, last, residual_c, out_c,
            AFFINE, HAS_RESIDUAL, RELU, half, SLICES // 2, residual_factor, out_factor,
        )  # fmt: skip
    else:
        channel = first + tl.arange(0, COLUMNS)
        known = channel < last
        stored = inside[:, None] & known[None, :]
        y = acc
        if AFFINE:
            a = tl.load(scale + channel, mask=known, other=0.0)
            b = tl.load(shift + channel, mask=known, other=0.0)
            y = acc * a[None, :] + b[None, :]
        if HAS_RESIDUAL:
            added = tl.load(residual + (channel * residual_c)[None, :], mask=stored, other=0.0)
            if residual_factor is not None:
                y += added.to(tl.float32) * residual_factor
            else:
                y += added.to(tl.float32)
        if RELU:
            # NaN compares false and stays, as in torch.
            y = tl.where(y < 0.0, 0.0, y)
        if out_factor is not None:
            y *= out_factor
        if out.dtype.element_ty == tl.float8e4nv:
            # Here, not left to the conversion: NaN, which compares false, stays.
            y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))
        tl.store(out + (channel * out_c)[None, :], y.to(out.dtype.element_ty), mask=stored)


@triton.jit
def halves(t):
    """The left and the right half of a matrix's columns."""
    rows: tl.constexpr = t.shape[0]
    columns: tl.constexpr = t.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(t, (rows, 2, columns)), (0, 2, 1)))


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def merge_kernel(
    partial,  # [SPLITS, N P Q, K] float32
    scale,  # [K] float32
    shift,  # [K] float32
    residual,  # [N, K, P, Q], any strides; unused without HAS_RESIDUAL
    out,  # [N, K, P, Q], any strides
    pixels,  # N P Q
    height,  # P
    width,  # Q
    channels,  # K
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    SPLITS: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,  # type: ignore[bad-function-definition]
    residual_factor=None,
    out_factor=None,
):
    """Adds the splits' sums, always in the same order, and finishes: bitwise the same each time."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixel = tl.program_id(0).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1).to(index) * BLOCK_N
    channel = first + tl.arange(0, BLOCK_N)
    known = channel < channels
    inside = pixel < pixels
    place = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    source = partial + place
    step = tl.full((), 1, tl.int64) * pixels * channels  # elements of one part: beyond 2^31
    wait(PDL)
    for _ in range(SPLITS):
        acc += tl.load(source, mask=inside[:, None] & known[None, :], other=0.0)
        source += step
    image, p, q = pixel_of(tl.minimum(pixel, pixels - 1), height, width)
    shortcut = residual + (image * residual_n + p * residual_h + q * residual_w)[:, None]
    target = out + (image * out_n + p * out_h + q * out_w)[:, None]
    finish(
        acc, scale, shift, shortcut, target, inside, first, channels, residual_c, out_c,
        AFFINE, HAS_RESIDUAL, RELU, BLOCK_N, 1, residual_factor, out_factor,
    )  # fmt: skip
