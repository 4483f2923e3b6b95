"""What the forward convolutions share: the implicit GEMM over NHWC, and how it is called.

One program computes a tile of pixels x output channels. It gathers the input's pixels as they lie
in memory, tap by tap, multiplies them with the weights on the tensor cores and keeps the sums in
float32. With a PROLOGUE it reads the input through BatchNorm and ReLU. No im2col matrix exists.

Narrow groups stand side by side in one tile; products between different groups meet a zero weight.
Since 0 * Inf is NaN, a tile that holds a NaN is summed again, group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._bn import activated
from ._dependent import prefetch, wait
from ._gemm import pixel_of, same_group, tile_of
from ._launch import GROUP_M, precision


@triton.jit
def accumulate(
    acc,  # [BLOCK_M, BLOCK_N] float32
    x,  # [N, C, H, W], channels adjacent
    weight,  # [K, C / groups, R, S], channels adjacent
    scale,  # [C] float32, from the bundle's first channel on; unused without PROLOGUE
    shift,  # likewise
    base,  # [BLOCK_M] offset of each pixel's first tap and the bundle's first channel
    row,  # [BLOCK_M] input row of the first tap
    column,  # [BLOCK_M] input column of the first tap
    filters,  # [BLOCK_N] offset of each output channel's weights
    member,  # [BLOCK_N] output channel counted within the bundle
    known,  # [BLOCK_N] which of them exist
    channels,  # of x, from the bundle's first on
    part,  # which split of the reduction
    group,  # the only group of the bundle that is summed; -1 for all
    height,
    width,
    group_in,
    group_out,
    dilation_h,
    dilation_w,
    x_h,
    x_w,
    weight_r,
    weight_s,
    R: tl.constexpr,
    S: tl.constexpr,
    SIDE: tl.constexpr,
    NARROW: tl.constexpr,
    FLAT: tl.constexpr,
    CHECKED: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds one part of the reduction to `acc`.

    The reduction runs over taps and, in each, over a run of channels. NARROW puts the taps of a
    filter's row into the run as well, for inputs with fewer channels than a step takes. FLAT makes
    one loop of both, which can be pipelined where the runs are short.
    """
    span = SIDE * group_in
    run = span * S if NARROW else span
    taps: tl.constexpr = R if NARROW else R * S
    outer: tl.constexpr = 1 if FLAT else taps
    inner: tl.constexpr = taps if FLAT else 1
    blocks = tl.cdiv(run, BLOCK_K)
    each = tl.cdiv(blocks, SPLITS)
    begin = part * each
    count = tl.minimum(each, blocks - begin)
    lane = tl.arange(0, BLOCK_K)
    zero = tl.full((), 0, base.dtype)  # makes products of indices as wide as offsets
    for unrolled in tl.static_range(outer):
        for step in range(count * inner):
            # Taps innermost: those of one block of channels read nearly the same lines.
            tap = step % inner + unrolled
            k = (begin + step // inner) * BLOCK_K + lane
            if NARROW:
                r = tap
                s = k // span
                c = k % span
            else:
                r = tap // S
                s = tap % S
                c = k
            there = (k < run) & (c < channels)
            if SIDE > 1:
                own = c // group_in
                there = there & (own == tl.where(group < 0, own, group))
            offset = (zero + r * dilation_h) * x_h + (zero + s * dilation_w) * x_w + c
            pointers = x + base[:, None] + offset[None, :]
            seen = there[None, :]
            if CHECKED:
                h = row + r * dilation_h
                if NARROW:
                    w = column[:, None] + (s * dilation_w)[None, :]
                    seen = ((h >= 0) & (h < height))[:, None] & (w >= 0) & (w < width)
                else:
                    w = column + s * dilation_w
                    seen = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
                if EVEN and SIDE == 1:
                    a = tl.load(pointers, mask=seen, other=0.0)
                else:
                    a = tl.load(pointers, mask=seen & there[None, :], other=0.0)
            elif EVEN and SIDE == 1:
                a = tl.load(pointers)
            else:
                a = tl.load(pointers, mask=there[None, :], other=0.0)
            if PROLOGUE:
                if EVEN and SIDE == 1:
                    factor, added = tl.load(scale + c), tl.load(shift + c)
                else:
                    # Zero where a channel is not there, so that what is made of it is zero too.
                    factor = tl.load(scale + c, mask=there, other=0.0)
                    added = tl.load(shift + c, mask=there, other=0.0)
                read = activated(a, factor[None, :], added[None, :])
                if CHECKED:
                    # Padding is zero behind the ReLU, not relu(shift).
                    read = tl.where(seen, read, 0.0)
                a = read.to(x.dtype.element_ty)
            if SIDE == 1:
                place = c
                used = known[None, :]
                if not EVEN:
                    used = used & there[:, None]
            else:
                place = c % group_in
                used = same_group(c[:, None], member[None, :], group_in, group_out)
                used = used & there[:, None] & known[None, :]
            place = (zero + r) * weight_r + (zero + s) * weight_s + place
            b = tl.load(weight + filters[None, :] + place[:, None], mask=used, other=0.0)
            if x.dtype.element_ty == tl.float8e4nv:
                # wgmma is said to keep 14 bits of such sums: those of a step go to float32 ones.
                acc = tl.dot(a, b, acc, max_num_imprecise_acc=BLOCK_K)
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_sums(
    x,  # [N, C, H, W], channels adjacent
    weight,  # [K, C / groups, R, S], channels adjacent
    scale,  # [C] float32, as shift: the BatchNorm that x is read through; unused without PROLOGUE
    shift,
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
    REVERSE: tl.constexpr = False,  # type: ignore[bad-function-definition]
    PDL: tl.constexpr = False,  # type: ignore[bad-function-definition]
    PREFETCH: tl.constexpr = 0,  # type: ignore[bad-function-definition]
):
    """The sums of this program's tile, and where they belong.

    REVERSE walks over the tiles from the last one. PDL waits for the kernel ahead before anything
    but weights is touched; PREFETCH lines of those at a time are asked for before that.

    Returns:
        [BLOCK_M, BLOCK_N] float32; the tile's row of tiles; its part of the reduction; of its
        pixels the number, whether they exist, image, row and column; and the first channel of its
        bundle of groups, the first of the tile counted from there, the one behind the last.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    tiles_each = tl.cdiv(SIDE * group_out, BLOCK_N)
    bundles = tl.cdiv(filters, SIDE * group_out)
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    part = program % SPLITS
    tile_m, tile_n = tile_of(program // SPLITS, tiles_m, tiles_each * bundles, GROUP_M)
    bundle = tile_n // tiles_each
    pixel = tile_m.to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    image, p, q = pixel_of(tl.minimum(pixel, pixels - 1), out_height, out_width)
    row = p * stride_h - padding_h
    column = q * stride_w - padding_w
    first_member = (tile_n % tiles_each) * BLOCK_N
    first_filter = bundle * SIDE * group_out
    last_filter = tl.minimum(first_filter + SIDE * group_out, filters)
    member = first_member + tl.arange(0, BLOCK_N)
    channel = first_filter + member
    known = channel < last_filter
    first = bundle * SIDE * group_in
    base = image * x_n + row * x_h + column * x_w + first
    places = channel.to(index) * weight_k
    if PREFETCH:
        prefetch(weight, filters * weight_k, PREFETCH)
    wait(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SIDE == 1:
        acc = accumulate(
            acc, x, weight, scale + first, shift + first, base, row, column, places, member, known,
            channels - first, part, -1, height, width, group_in, group_out, dilation_h, dilation_w,
            x_h, x_w, weight_r, weight_s, R, S, SIDE, NARROW, FLAT, CHECKED, EVEN, SPLITS,
            PROLOGUE, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        # First all groups at once; if that gave a NaN anywhere, then each alone.
        group = tl.full((), -1, tl.int32)
        groups = tl.full((), 0, tl.int32)
        while group < groups:
            fresh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            fresh = accumulate(
                fresh, x, weight, scale + first, shift + first, base, row, column, places, member,
                known, channels - first, part, group, height, width, group_in, group_out,
                dilation_h, dilation_w, x_h, x_w, weight_r, weight_s, R, S, SIDE, NARROW, FLAT,
                CHECKED, EVEN, SPLITS, PROLOGUE, PRECISION, BLOCK_K,
            )  # fmt: skip
            own = member // group_out
            mine = own == tl.where(group < 0, own, group)
            acc = tl.where(mine[None, :], fresh, acc)
            lost = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0)
            groups = tl.where(group < 0, lost * SIDE, groups).to(tl.int32)
            group += 1
    return (
        acc, tile_m, part, pixel, inside, image, p, q, first_filter, first_member, last_filter
    )  # fmt: skip


def product_of(
    x: Tensor, weight: Tensor, out: Tensor, groups: int, prologue: bool = False
) -> _tiles.Product:
    """The sizes from which the configuration is chosen.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S].
        out: [N, K, P, Q].
        groups: of channels.
        prologue: whether x is read through BatchNorm and ReLU, in registers.
    """
    filters, group_in, r, s = weight.shape
    side = _tiles.side_by_side(filters // groups, groups)
    span = side * group_in
    narrow = _tiles.is_narrow(span, s)
    return _tiles.Product(
        rows=out.shape[0] * out.shape[2] * out.shape[3],
        columns=side * (filters // groups),
        copies=_tiles.cdiv(groups, side),
        depth=span * s if narrow else span,
        taps=r if narrow else r * s,
        itemsize=x.element_size(),
        side=side,
        precision=precision(x.dtype),
        gathered=int(prologue),
        narrow=narrow,
        ragged=_tiles.is_ragged(x.element_size(), x.shape[1], filters),
    )


def sizes(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """The arguments of `tile_sums` from `pixels` to `weight_s`, as a kernel is launched with."""
    n, filters, p, q = out.shape
    return (
        n * p * q, x.shape[2], x.shape[3], p, q, x.shape[1], filters, weight.shape[1],
        filters // groups, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1],
        x.stride(0), x.stride(2), x.stride(3),
        weight.stride(0), weight.stride(2), weight.stride(3),
    )  # fmt: skip


def constants(
    product: _tiles.Product, plan: _tiles.Plan, weight: Tensor, padding: Sequence[int], groups: int
) -> dict[str, Any]:
    """What a kernel around `tile_sums` knows at compile time, and how Triton compiles it."""
    tile = plan.tile
    return {
        "R": weight.shape[2],
        "S": weight.shape[3],
        "SIDE": product.side,
        "NARROW": product.narrow,
        "FLAT": plan.flat,
        "CHECKED": max(padding) > 0,
        "EVEN": product.depth % product.step == 0 and groups % product.side == 0,
        "SPLITS": plan.splits,
        "PRECISION": product.precision,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": product.step,
        "SLICES": tile.slices,
        "GROUP_M": GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
