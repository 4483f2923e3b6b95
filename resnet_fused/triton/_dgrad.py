"""What the gradients of an input share: the product of one tile, and training's epilogue behind it.

An input pixel (h, w) meets only those taps r for which h + padding - r dilation is a multiple of
the stride: pixels of one remainder, a phase, meet the same taps and share tiles, so that no zero is
multiplied ("A guide to convolution arithmetic for deep learning", section 4, without its inserted
zeros).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._bn import activated, affine_gradient
from ._gemm import halves, pixel_of, same_group, tile_of

SUMS_TILE = (1024, 8)
"""Rows of the workspace x values of each that a program adds at a time: one sector of memory a row,
so that a ResNet's first layers, with thousands of rows of 64 channels, keep 16 programs busy."""


@triton.jit
def first_tap(start, stride, dilation, TAPS: tl.constexpr):
    """The first tap r with (start - r dilation) a multiple of the stride; TAPS if there is none."""
    first = tl.full((), TAPS, tl.int32)
    for back in tl.static_range(TAPS):
        r = TAPS - 1 - back
        first = tl.where((start - r * dilation) % stride == 0, r, first)
    return first


@triton.jit
def accumulate(
    acc,  # [BLOCK_M, BLOCK_N] float32
    dy,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent
    weight,  # [K, C / groups, R, S], channels adjacent
    vectors,  # [K] or [3, K] float32, from the bundle's first filter on
    pitch,  # K
    base,  # [BLOCK_M] offset in dy of row i, column j and the bundle's first filter
    y_base,  # [BLOCK_M] likewise in y
    row,  # [BLOCK_M] i: the input row without its phase, divided by the stride
    column,  # [BLOCK_M] j
    inside,  # [BLOCK_M] which pixels exist
    place,  # [BLOCK_N] input channel counted within its group
    member,  # [BLOCK_N] input channel counted within the bundle
    known,  # [BLOCK_N] which of them exist
    filters,  # of dy, from the bundle's first on
    part,  # which split of the reduction
    group,  # the only group of the bundle that is summed; -1 for all
    start_h,  # phase + padding
    start_w,
    out_height,
    out_width,
    group_in,
    group_out,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    dy_h,
    dy_w,
    y_h,
    y_w,
    weight_k,
    weight_r,
    weight_s,
    R: tl.constexpr,
    S: tl.constexpr,
    STEP_R: tl.constexpr,
    STEP_S: tl.constexpr,
    SIDE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds one part of the reduction, over the phase's taps and a run of filters, to `acc`.

    PROLOGUE says what of dy and y is multiplied, rounded to their dtype: "none", dy itself;
    "scale", vectors * dy; "mask", that where y passed the ReLU; "affine", A dy + B y + C.
    """
    run = SIDE * group_out
    blocks = tl.cdiv(run, BLOCK_K)
    each = tl.cdiv(blocks, SPLITS)
    begin = part * each
    count = tl.minimum(each, blocks - begin)
    first_r = first_tap(start_h, stride_h, dilation_h, R)
    first_s = first_tap(start_w, stride_w, dilation_w, S)
    taps_h = tl.cdiv(R - first_r, STEP_R)
    taps_w = tl.cdiv(S - first_s, STEP_S)
    taps = taps_h * taps_w
    lane = tl.arange(0, BLOCK_K)
    zero = tl.full((), 0, base.dtype)
    for step in range(count * taps):
        tap = step % taps
        k = (begin + step // taps) * BLOCK_K + lane
        r = first_r + (tap // taps_w) * STEP_R
        s = first_s + (tap % taps_w) * STEP_S
        # Exact quotients, of either sign.
        up = (start_h - r * dilation_h) // stride_h
        left = (start_w - s * dilation_w) // stride_w
        p = row + up
        q = column + left
        there = (k < run) & (k < filters)
        if SIDE > 1:
            own = k // group_out
            there = there & (own == tl.where(group < 0, own, group))
        seen = (inside & (p >= 0) & (p < out_height) & (q >= 0) & (q < out_width))[:, None]
        seen = seen & there[None, :]
        offset = (zero + up) * dy_h + (zero + left) * dy_w + k
        z = tl.load(dy + base[:, None] + offset[None, :], mask=seen, other=0.0)
        if PROLOGUE == "none":
            a = z
        else:
            factor = tl.load(vectors + k, mask=there, other=0.0)
            if PROLOGUE != "affine":
                made = z.to(tl.float32) * factor[None, :]
            if PROLOGUE != "scale":
                offset = (zero + up) * y_h + (zero + left) * y_w + k
                result = tl.load(y + y_base[:, None] + offset[None, :], mask=seen, other=0.0)
            if PROLOGUE == "mask":
                # Not (y > 0): where y is NaN, the gradient passes.
                made = tl.where(result.to(tl.float32) <= 0.0, 0.0, made)
            else:
                if PROLOGUE == "affine":
                    slope = tl.load(vectors + pitch + k, mask=there, other=0.0)
                    rest = tl.load(vectors + 2 * pitch + k, mask=there, other=0.0)
                    made = affine_gradient(
                        z, result, factor[None, :], slope[None, :], rest[None, :]
                    )
                # Outside the image there is no gradient: neither 0 * Inf nor the affine's C.
                made = tl.where(seen, made, 0.0)
            a = made.to(dy.dtype.element_ty)
        used = there[:, None] & known[None, :]
        if SIDE > 1:
            used = used & same_group(k[:, None], member[None, :], group_out, group_in)
        where = (zero + k) * weight_k + (zero + r) * weight_r + (zero + s) * weight_s
        b = tl.load(weight + where[:, None] + place[None, :], mask=used, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_sums(
    dy,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent; unused but for the PROLOGUEs "mask" and "affine"
    weight,  # [K, C / groups, R, S], channels adjacent
    vectors,  # [K] or [3, K] float32; see `accumulate`
    pixels,  # of one phase: N ceil(H / stride_h) ceil(W / stride_w)
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
    dy_n,
    dy_h,
    dy_w,
    y_n,
    y_h,
    y_w,
    weight_k,
    weight_r,
    weight_s,
    R: tl.constexpr,
    S: tl.constexpr,
    STEP_R: tl.constexpr,
    STEP_S: tl.constexpr,
    SIDE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The sums of this program's tile, or of one part of them, and where they belong.

    Returns:
        The sums [BLOCK_M, BLOCK_N] float32; the part; the row of tiles, counted through the phases;
        each row's image, input row and input column, and whether it exists; the channel of the
        first column, and the one behind the last that exists.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    tiles_each = tl.cdiv(SIDE * group_in, BLOCK_N)
    tiles_n = tiles_each * tl.cdiv(channels, SIDE * group_in)
    part = tl.program_id(0) % SPLITS
    program = tl.program_id(0) // SPLITS
    phase = program // (tiles_m * tiles_n)
    tile_m, tile_n = tile_of(program % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    phase_h = phase // stride_w
    phase_w = phase % stride_w
    pixel = tile_m.to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.cdiv(height, stride_h)
    columns = tl.cdiv(width, stride_w)
    image, row, column = pixel_of(tl.minimum(pixel, pixels - 1), rows, columns)
    h = row * stride_h + phase_h
    w = column * stride_w + phase_w
    inside = (pixel < pixels) & (h < height) & (w < width)
    bundle = tile_n // tiles_each
    first_member = (tile_n % tiles_each) * BLOCK_N
    first_channel = bundle * SIDE * group_in
    last_channel = tl.minimum(first_channel + SIDE * group_in, channels)
    member = first_member + tl.arange(0, BLOCK_N)
    known = first_channel + member < last_channel
    first_filter = bundle * SIDE * group_out
    base = image * dy_n + row * dy_h + column * dy_w + first_filter
    y_base = image * y_n + row * y_h + column * y_w + first_filter
    place = member % group_in if SIDE > 1 else member
    weights = weight + first_filter.to(tl.int64) * weight_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    group = tl.full((), -1, tl.int32)
    if SIDE == 1:
        acc = accumulate(
            acc, dy, y, weights, vectors + first_filter, filters, base, y_base, row, column,
            inside, place, member, known, filters - first_filter, part, group, phase_h + padding_h,
            phase_w + padding_w, out_height, out_width, group_in, group_out, stride_h, stride_w,
            dilation_h, dilation_w, dy_h, dy_w, y_h, y_w, weight_k, weight_r, weight_s,
            R, S, STEP_R, STEP_S, SIDE, PROLOGUE, SPLITS, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        # First all groups at once; if that gave a NaN anywhere, then each alone.
        groups = tl.full((), 0, tl.int32)
        while group < groups:
            fresh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            fresh = accumulate(
                fresh, dy, y, weights, vectors + first_filter, filters, base, y_base, row, column,
                inside, place, member, known, filters - first_filter, part, group,
                phase_h + padding_h, phase_w + padding_w, out_height, out_width, group_in,
                group_out, stride_h, stride_w, dilation_h, dilation_w, dy_h, dy_w, y_h, y_w,
                weight_k, weight_r, weight_s, R, S, STEP_R, STEP_S, SIDE, PROLOGUE, SPLITS,
                PRECISION, BLOCK_K,
            )  # fmt: skip
            own = member // group_in
            mine = own == tl.where(group < 0, own, group)
            acc = tl.where(mine[None, :], fresh, acc)
            lost = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0)
            groups = tl.where(group < 0, lost * SIDE, groups).to(tl.int32)
            group += 1
    row_of_tiles = phase * tiles_m + tile_m
    first = (first_channel + first_member).to(index)
    return acc, part, row_of_tiles, image, h, w, inside, first, last_channel


@triton.jit
def finish_gradient(
    acc,  # [M, COLUMNS] float32 sums
    addend,  # [M, 1] pointers to channel 0 of each pixel's addend; unused without HAS_ADDEND
    raw,  # [M, 1] pointers to channel 0 of each pixel; unused without REDUCED
    norm,  # [4, C] float32: scale, shift, mean; unused without REDUCED
    dx,  # [M, 1] pointers to channel 0 of each pixel
    sums,  # this tile's row of the workspace [2, C] float32; unused without REDUCED
    added,  # [M] which pixels have an addend
    inside,  # [M] which pixels exist
    first,  # channel of the first column
    last,  # channel behind the last one that exists
    channels,
    HAS_ADDEND: tl.constexpr,
    REDUCED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Epilogue: adds in float32, rounds once, masks and stores; the sums of the rounded values.

    In SLICES (1, 2, 4 or 8) of the columns, one after the other, to keep within the registers.
    """
    if SLICES > 1:
        half: tl.constexpr = COLUMNS // 2
        left, right = halves(acc)
        finish_gradient(
            left, addend, raw, norm, dx, sums, added, inside, first, last, channels,
            HAS_ADDEND, REDUCED, half, SLICES // 2,
        )  # fmt: skip
        finish_gradient(
            right, addend, raw, norm, dx, sums, added, inside, first + half, last, channels,
            HAS_ADDEND, REDUCED, half, SLICES // 2,
        )  # fmt: skip
    else:
        channel = first + tl.arange(0, COLUMNS)
        known = channel < last
        stored = inside[:, None] & known[None, :]
        dh = acc
        if HAS_ADDEND:
            shared = added[:, None] & known[None, :]
            dh += tl.load(addend + channel[None, :], mask=shared, other=0.0).to(tl.float32)
        dz = dh.to(dx.dtype.element_ty)
        if REDUCED:
            y = tl.load(raw + channel[None, :], mask=stored, other=0.0)
            scale = tl.load(norm + channel, mask=known, other=0.0)
            shift = tl.load(norm + channels + channel, mask=known, other=0.0)
            mean = tl.load(norm + 2 * channels + channel, mask=known, other=0.0)
            h = activated(y, scale[None, :], shift[None, :]).to(raw.dtype.element_ty)
            # Not (h > 0): where h is NaN, the gradient passes. Where there is no pixel, neither
            # a NaN among the weights nor one among the means may reach the sums.
            kept = tl.where((h.to(tl.float32) <= 0.0) | (stored == 0), 0.0, dz.to(tl.float32))
            dz = kept.to(dx.dtype.element_ty)
            centred = tl.where(stored, kept * (y.to(tl.float32) - mean[None, :]), 0.0)
            tl.store(sums + channel, tl.sum(kept, 0), mask=known)
            tl.store(sums + channels + channel, tl.sum(centred, 0), mask=known)
        tl.store(dx + channel[None, :], dz, mask=stored)


@triton.jit
def finish_pixels(
    acc,  # [M, COLUMNS] float32 sums
    addend,  # [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], channels adjacent
    raw,  # [N, C, H, W], channels adjacent
    norm,  # [4, C] float32
    dx,  # [N, C, H, W], channels adjacent
    workspace,  # [rows, 2, C] float32
    row,  # of the workspace
    image,  # [M]
    h,  # [M]
    w,  # [M]
    inside,  # [M] which pixels exist
    first,  # channel of the first column
    last,  # channel behind the last one that exists
    channels,
    addend_stride,
    addend_n,
    addend_h,
    addend_w,
    raw_n,
    raw_h,
    raw_w,
    dx_n,
    dx_h,
    dx_w,
    HAS_ADDEND: tl.constexpr,
    REDUCED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """`finish_gradient` of the pixels (image, h, w)."""
    up, left = h // addend_stride, w // addend_stride
    added = inside & (up * addend_stride == h) & (left * addend_stride == w)
    finish_gradient(
        acc,
        addend + (image * addend_n + up * addend_h + left * addend_w)[:, None],
        raw + (image * raw_n + h * raw_h + w * raw_w)[:, None],
        norm,
        dx + (image * dx_n + h * dx_h + w * dx_w)[:, None],
        workspace + row.to(tl.int64) * 2 * channels,
        added, inside, first, last, channels, HAS_ADDEND, REDUCED, COLUMNS, SLICES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    workspace,  # [rows, columns] float32
    sums,  # [columns] float32
    rows,
    columns,  # 2 C
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the tiles' sums in float64: each thread its rows, then the threads, in fixed order."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = column < columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        there = (row < rows)[:, None] & known[None, :]
        total += tl.load(workspace + place, mask=there, other=0.0).to(tl.float64)
    tl.store(sums + column, tl.sum(total, 0).to(tl.float32), mask=known)
