"""What the gradients of the weights share: the loop over pixels, and the merge of its parts."""

from __future__ import annotations

import triton
import triton.language as tl

from ._bn import activated, affine_gradient
from ._gemm import pixel_of

MERGE_BLOCK = 1024
"""Weights a program of the merge: 8 a thread."""


@triton.jit
def row_of(values, place, known, WANTED: tl.constexpr):
    """The channels' values, 0 where there is no channel; places alone where nobody wants them."""
    if WANTED:
        return tl.load(values + place, mask=known, other=0.0)
    else:
        return place


@triton.jit
def weight_sums(
    dy,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent; unused without MASKED and AFFINE
    coefficients,  # [3, K] float32 A, B, C; unused without AFFINE
    x,  # [N, C, H, W], channels adjacent
    norm,  # [4, C] float32 scale, shift, ...; unused without NORM
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
    dy_n,
    dy_h,
    dy_w,
    y_n,
    y_h,
    y_w,
    x_n,
    x_h,
    x_w,
    R: tl.constexpr,
    S: tl.constexpr,
    SIDE: tl.constexpr,
    NARROW: tl.constexpr,
    MASKED: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One part's sums of one tile [filters, channels] of one tap, and where they belong.

    The gradient dy is read through ReLU's mask where MASKED (0 where y <= 0), or as
    A dy + (B y + C) where AFFINE; x as relu(scale * x + shift) where NORM. Both are rounded to
    their own dtype before they are multiplied. A pixel outside the image counts as 0, whatever C
    and shift are.

    Returns:
        Sums [BLOCK_M, BLOCK_N], the part, filters k [BLOCK_M] and which of them exist; row r and
        column s of the filter, channel of the group [BLOCK_N], and which sums are to be stored.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    taps: tl.constexpr = R if NARROW else R * S
    span = SIDE * group_in
    columns = span * S if NARROW else span
    tiles_m = tl.cdiv(SIDE * group_out, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    bundles = tl.cdiv(filters, SIDE * group_out)
    # Parts outermost: what runs at one time reads the same pixels.
    programs = tiles_m * tiles_n * bundles * taps
    part = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    tap = program % taps
    program = program // taps
    tile_n = program % tiles_n
    tile_m = (program // tiles_n) % tiles_m
    bundle = program // (tiles_n * tiles_m)

    member = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = bundle * SIDE * group_out + member
    known = (member < SIDE * group_out) & (k < filters)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if NARROW:
        r = tap
        s = column // span
        c = column % span
    else:
        r = tap // S
        s = tap % S
        c = column
    channel = bundle * span + c
    there = (column < columns) & (channel < channels)
    a1 = row_of(coefficients, k, known, AFFINE)
    a2 = row_of(coefficients + filters, k, known, AFFINE)
    a3 = row_of(coefficients + 2 * filters, k, known, AFFINE)
    scale = row_of(norm, channel, there, NORM)
    shift = row_of(norm + channels, channel, there, NORM)

    steps = tl.cdiv(pixels, BLOCK_K)
    each = tl.cdiv(steps, SPLITS)
    begin = part * each
    lane = tl.arange(0, BLOCK_K)
    zero = tl.full((), 0, index)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(begin, tl.minimum(begin + each, steps)):
        pixel = (zero + step) * BLOCK_K + lane
        inside = pixel < pixels
        image, p, q = pixel_of(pixel, out_height, out_width)
        row = image * dy_n + p * dy_h + q * dy_w
        seen = inside[:, None] & known[None, :]
        z = tl.load(dy + row[:, None] + k[None, :], mask=seen, other=0.0)
        result = z
        if MASKED or AFFINE:
            row = image * y_n + p * y_h + q * y_w
            result = tl.load(y + row[:, None] + k[None, :], mask=seen, other=0.0)
        if MASKED:
            # Not (y > 0): where y is NaN, the gradient passes.
            z = tl.where(result.to(tl.float32) <= 0.0, 0.0, z).to(dy.dtype.element_ty)
        if AFFINE:
            z = affine_gradient(z, result, a1[None, :], a2[None, :], a3[None, :])
            # Behind the last pixel it would be C.
            z = tl.where(inside[:, None], z, 0.0).to(dy.dtype.element_ty)
        h = p * stride_h - padding_h + r * dilation_h
        row = image * x_n + h * x_h
        if NARROW:
            w = (q * stride_w - padding_w)[:, None] + (s * dilation_w)[None, :]
            seen = (inside & (h >= 0) & (h < height))[:, None] & (w >= 0) & (w < width)
            place = row[:, None] + w * x_w + channel[None, :]
        else:
            w = q * stride_w - padding_w + s * dilation_w
            seen = (inside & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            place = (row + w * x_w)[:, None] + channel[None, :]
        b = tl.load(x + place, mask=seen & there[None, :], other=0.0)
        if NORM:
            # Padding is zero behind the ReLU: not relu(shift).
            b = tl.where(seen, activated(b, scale[None, :], shift[None, :]), 0.0)
            b = b.to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(z), b, acc, input_precision=PRECISION)

    own = c % group_in if SIDE > 1 else c
    stored = known[:, None] & there[None, :]
    if SIDE > 1:
        stored = stored & (member[:, None] // group_out == (c // group_in)[None, :])
    return acc, part, k, known, r, s, own, stored


@triton.jit
def wgrad_merge_kernel(
    partial,  # [SPLITS, K, R, S, C / groups] float32
    scale,  # [K] float32; unused without SCALED
    dweight,  # [K, C / groups, R, S], any strides
    count,  # K R S C / groups
    group_in,
    dweight_k,
    dweight_c,
    dweight_r,
    dweight_s,
    R: tl.constexpr,
    S: tl.constexpr,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the splits' sums, always in the same order, [times scale]: the same bits each time."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(SPLITS):
        offset = (tl.full((), 0, tl.int64) + part) * count
        acc += tl.load(partial + offset + element, mask=inside, other=0.0)
    c = element % group_in
    s = (element // group_in) % S
    r = (element // group_in // S) % R
    k = element // group_in // (R * S)
    if SCALED:
        acc = acc * tl.load(scale + k, mask=inside, other=0.0)
    target = dweight + k * dweight_k + c * dweight_c + r * dweight_r + s * dweight_s
    tl.store(target, acc.to(dweight.dtype.element_ty), mask=inside)
