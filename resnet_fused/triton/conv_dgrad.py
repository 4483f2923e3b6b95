"""`conv_dgrad` in Triton: the gradient of the input, ReLU's mask and BatchNorm's scale as it reads.

    dx = conv^T(scale * dz, weight),  dz = dy where y passed the ReLU, else 0

An implicit GEMM like the forward one, with output pixels and filters in the reduction. An input
pixel (h, w) meets only those taps r for which h + padding - r dilation is a multiple of the stride:
pixels of one remainder, a phase, meet the same taps and share tiles, so that no zero is multiplied
("A guide to convolution arithmetic for deep learning", section 4, without its inserted zeros).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._gemm import finish, merge_kernel, pixel_of, same_group, tile_of
from ._launch import (
    GROUP_M,
    MERGE_TILE,
    call_of,
    fits_32_bits,
    on_device,
    plan_of,
    precision,
    readable,
    traceable,
    writable,
)


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
    scale,  # [K] float32, from the bundle's first filter on
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
    MASKED: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds one part of the reduction, over the phase's taps and a run of filters, to `acc`."""
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
        factor = tl.load(scale + k, mask=there, other=0.0)
        scaled = z.to(tl.float32) * factor[None, :]
        if MASKED:
            offset = (zero + up) * y_h + (zero + left) * y_w + k
            result = tl.load(y + y_base[:, None] + offset[None, :], mask=seen, other=0.0)
            # Not (y > 0): where y is NaN, the gradient passes.
            scaled = tl.where(result.to(tl.float32) <= 0.0, 0.0, scaled)
        else:
            scaled = tl.where(seen, scaled, 0.0)
        a = scaled.to(dy.dtype.element_ty)
        used = there[:, None] & known[None, :]
        if SIDE > 1:
            used = used & same_group(k[:, None], member[None, :], group_out, group_in)
        where = (zero + k) * weight_k + (zero + r) * weight_r + (zero + s) * weight_s
        b = tl.load(weight + where[:, None] + place[None, :], mask=used, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_dgrad_kernel(
    dy,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent; unused without MASKED
    weight,  # [K, C / groups, R, S], channels adjacent
    scale,  # [K] float32
    dx,  # [N, C, H, W], any strides
    partial,  # [SPLITS, N H W, C] float32; unused without splits
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
    dx_n,
    dx_c,
    dx_h,
    dx_w,
    images,
    R: tl.constexpr,
    S: tl.constexpr,
    STEP_R: tl.constexpr,
    STEP_S: tl.constexpr,
    SIDE: tl.constexpr,
    MASKED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One tile of one phase of dx, or with SPLITS > 1 of one part's sums."""
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
            acc, dy, y, weights, scale + first_filter, base, y_base, row, column, inside, place,
            member, known, filters - first_filter, part, group, phase_h + padding_h,
            phase_w + padding_w, out_height, out_width, group_in, group_out, stride_h, stride_w,
            dilation_h, dilation_w, dy_h, dy_w, y_h, y_w, weight_k, weight_r, weight_s,
            R, S, STEP_R, STEP_S, SIDE, MASKED, SPLITS, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        # First all groups at once; if that gave a NaN anywhere, then each alone.
        groups = tl.full((), 0, tl.int32)
        while group < groups:
            fresh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            fresh = accumulate(
                fresh, dy, y, weights, scale + first_filter, base, y_base, row, column, inside,
                place, member, known, filters - first_filter, part, group, phase_h + padding_h,
                phase_w + padding_w, out_height, out_width, group_in, group_out, stride_h,
                stride_w, dilation_h, dilation_w, dy_h, dy_w, y_h, y_w, weight_k, weight_r,
                weight_s, R, S, STEP_R, STEP_S, SIDE, MASKED, SPLITS, PRECISION, BLOCK_K,
            )  # fmt: skip
            own = member // group_in
            mine = own == tl.where(group < 0, own, group)
            acc = tl.where(mine[None, :], fresh, acc)
            lost = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0)
            groups = tl.where(group < 0, lost * SIDE, groups).to(tl.int32)
            group += 1
    if SPLITS > 1:
        whole = (image.to(tl.int64) * height + h) * width + w
        sums = (part.to(tl.int64) * images * height * width + whole) * channels
        sums = partial + sums[:, None]
        finish(
            acc, scale, scale, sums, sums, inside, first_channel + first_member, last_channel, 1,
            1, False, False, False, BLOCK_N, SLICES,
        )  # fmt: skip
    else:
        target = dx + (image * dx_n + h * dx_h + w * dx_w)[:, None]
        finish(
            acc, scale, scale, target, target, inside,
            (first_channel + first_member).to(index), last_channel, dx_c, dx_c,
            False, False, False, BLOCK_N, SLICES,
        )  # fmt: skip


def product_of(dx: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> _tiles.Product:
    """The sizes from which the configuration is chosen; rows are those of one phase."""
    n, channels, h, w = dx.shape
    filters, group_in, r, s = weight.shape
    # In float32 a second tile of sums, for what a NaN spoils, would not fit into registers.
    side = _tiles.side_by_side(group_in, groups) if dx.element_size() == 2 else 1
    phases = stride[0] * stride[1]
    return _tiles.Product(
        rows=n * _tiles.cdiv(h, stride[0]) * _tiles.cdiv(w, stride[1]),
        columns=side * group_in,
        copies=_tiles.cdiv(groups, side) * phases,
        depth=side * (filters // groups),
        taps=_tiles.cdiv(r, stride[0]) * _tiles.cdiv(s, stride[1]),
        itemsize=dx.element_size(),
        side=side,
        precision=precision(dx.dtype),
        runtime_taps=True,
        gathered=2,
        ragged=_tiles.is_ragged(dx.element_size(), channels, filters),
    )


def launch(
    dy: Tensor,
    y: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    dx: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes the gradient of a frozen conv-BN(-ReLU)'s input into `dx`.

    Args:
        dy: gradient of the result [N, K, P, Q], float32, bfloat16 or float16. Copied to
            channels_last first if its channels are not adjacent, or its pixels not aligned to 16
            bytes where their channels divide so; as are y and weight, and `dx` by a copy
            afterwards.
        y: the result [N, K, P, Q], for ReLU's mask; None without ReLU.
        weight: [K, C / groups, R, S].
        scale: [K] float32. scale * dz is rounded to dy's dtype before it is multiplied.
        dx: [N, C, H, W], any layout without overlaps; overwritten.
        stride: (vertical, horizontal), as padding and dilation.
        padding: see stride.
        dilation: see stride.
        groups: of channels.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
    """
    if dx.numel() == 0:
        return
    product = product_of(dx, weight, stride, groups)
    call = call_of("conv_dgrad", dx, weight, y, stride, padding, dilation, groups)
    plan = plan or plan_of(product, dx.device, allowed, call)
    dy, weight = readable(dy), readable(weight)
    result = dy if y is None else readable(y)
    target = writable(dx)
    n, channels, h, w = dx.shape
    filters, group_in, r, s = weight.shape
    tile, side = plan.tile, product.side
    partial = target
    if plan.splits > 1:
        shape = (plan.splits, n * h * w, channels)
        partial = torch.empty(shape, dtype=torch.float32, device=dx.device)
    wide = not fits_32_bits(dy, result, weight, target)
    tiles = _tiles.cdiv(product.rows, tile.m) * _tiles.cdiv(product.columns, tile.n)
    with on_device(dx):
        traceable(conv_dgrad_kernel, dx)[(tiles * product.copies * plan.splits,)](
            dy, result, weight, scale, target, partial,
            product.rows, h, w, dy.shape[2], dy.shape[3], channels, filters, group_in,
            filters // groups, stride[0], stride[1], padding[0], padding[1], dilation[0],
            dilation[1], dy.stride(0), dy.stride(2), dy.stride(3),
            result.stride(0), result.stride(2), result.stride(3),
            weight.stride(0), weight.stride(2), weight.stride(3), *target.stride(), n,
            R=r, S=s, STEP_R=stride[0] // math.gcd(stride[0], dilation[0]),
            STEP_S=stride[1] // math.gcd(stride[1], dilation[1]), SIDE=side,
            MASKED=y is not None, SPLITS=plan.splits, WIDE=wide, PRECISION=product.precision,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=product.step,
            GROUP_M=GROUP_M, SLICES=tile.slices, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if plan.splits > 1:
            rows, columns = MERGE_TILE
            grid = (_tiles.cdiv(n * h * w, rows), _tiles.cdiv(channels, columns))
            traceable(merge_kernel, dx)[grid](
                partial, scale, scale, target, target, n * h * w, h, w, channels,
                *target.stride(), *target.stride(), SPLITS=plan.splits, AFFINE=False,
                HAS_RESIDUAL=False, RELU=False, WIDE=wide, BLOCK_M=rows, BLOCK_N=columns,
            )  # fmt: skip
        if target is not dx:
            dx.copy_(target)
