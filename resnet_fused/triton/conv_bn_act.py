"""`conv_bn_act` in Triton: implicit GEMM over NHWC, everything behind the convolution in its tail.

One program computes a tile of pixels x output channels. It gathers the input's pixels as they lie
in memory, tap by tap, multiplies them with the weights on the tensor cores, keeps the sums in
float32, and applies scale, shift, shortcut and ReLU before it stores once. No im2col matrix exists.

Narrow groups stand side by side in one tile; products between different groups meet a zero weight.
Since 0 * Inf is NaN, a tile that holds a NaN is summed again, group by group.
"""

from __future__ import annotations

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
def accumulate(
    acc,  # [BLOCK_M, BLOCK_N] float32
    x,  # [N, C, H, W], channels adjacent
    weight,  # [K, C / groups, R, S], channels adjacent
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
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_bn_act_kernel(
    x,  # [N, C, H, W], channels adjacent
    weight,  # [K, C / groups, R, S], channels adjacent
    scale,  # [K] float32
    shift,  # [K] float32
    residual,  # [N, K, P, Q], any strides; unused without HAS_RESIDUAL
    out,  # [N, K, P, Q], any strides
    partial,  # [SPLITS, N P Q, K] float32; unused without splits
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
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    R: tl.constexpr,
    S: tl.constexpr,
    SIDE: tl.constexpr,
    NARROW: tl.constexpr,
    FLAT: tl.constexpr,
    CHECKED: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One tile of the output, or with SPLITS > 1 of one part's sums."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    tiles_each = tl.cdiv(SIDE * group_out, BLOCK_N)
    bundles = tl.cdiv(filters, SIDE * group_out)
    program = tl.program_id(0)
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SIDE == 1:
        acc = accumulate(
            acc, x, weight, base, row, column, places, member, known, channels - first, part, -1,
            height, width, group_in, group_out, dilation_h, dilation_w, x_h, x_w, weight_r,
            weight_s, R, S, SIDE, NARROW, FLAT, CHECKED, EVEN, SPLITS, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        # First all groups at once; if that gave a NaN anywhere, then each alone.
        group = tl.full((), -1, tl.int32)
        groups = tl.full((), 0, tl.int32)
        while group < groups:
            fresh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            fresh = accumulate(
                fresh, x, weight, base, row, column, places, member, known, channels - first,
                part, group, height, width, group_in, group_out, dilation_h, dilation_w, x_h, x_w,
                weight_r, weight_s, R, S, SIDE, NARROW, FLAT, CHECKED, EVEN, SPLITS, PRECISION,
                BLOCK_K,
            )  # fmt: skip
            own = member // group_out
            mine = own == tl.where(group < 0, own, group)
            acc = tl.where(mine[None, :], fresh, acc)
            lost = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0)
            groups = tl.where(group < 0, lost * SIDE, groups).to(tl.int32)
            group += 1
    if SPLITS > 1:
        sums = partial + ((part.to(tl.int64) * pixels + pixel) * filters)[:, None]
        finish(
            acc, scale, shift, sums, sums, inside, first_filter + first_member, last_filter, 1, 1,
            False, False, False, BLOCK_N, SLICES,
        )  # fmt: skip
    else:
        shortcut = residual + (image * residual_n + p * residual_h + q * residual_w)[:, None]
        place = out + (image * out_n + p * out_h + q * out_w)[:, None]
        finish(
            acc, scale, shift, shortcut, place, inside,
            (first_filter + first_member).to(index), last_filter, residual_c, out_c,
            True, HAS_RESIDUAL, RELU, BLOCK_N, SLICES,
        )  # fmt: skip


def product_of(x: Tensor, weight: Tensor, out: Tensor, groups: int) -> _tiles.Product:
    """The sizes from which the configuration is chosen."""
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
        narrow=narrow,
        ragged=_tiles.is_ragged(x.element_size(), x.shape[1], filters),
    )


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    *,
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes act(scale * conv(x, weight) + shift [+ residual]) into `out`.

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16. Copied to channels_last first if it is not
            `readable`, as are weight and residual; `out` likewise, by a copy afterwards.
        weight: [K, C / groups, R, S], likewise.
        scale: [K] float32.
        shift: [K] float32.
        residual: [N, K, P, Q] in any layout, or None.
        out: [N, K, P, Q], any layout without overlaps; overwritten.
        stride: (vertical, horizontal), as padding and dilation.
        padding: see stride.
        dilation: see stride.
        groups: of channels.
        act: "relu" or "none".
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
    """
    if out.numel() == 0:
        return
    product = product_of(x, weight, out, groups)
    call = call_of("conv_bn_act", x, weight, residual, stride, padding, dilation, groups)
    plan = plan or plan_of(product, x.device, allowed, call)
    x, weight = readable(x), readable(weight)
    target = writable(out)
    n, filters, p, q = out.shape
    group_in, r, s = weight.shape[1:]
    group_out = filters // groups
    side, block_k = product.side, product.step
    tile, pixels = plan.tile, n * p * q
    narrow = _tiles.is_narrow(side * group_in, s)
    partial = target
    if plan.splits > 1:
        partial = torch.empty(plan.splits, pixels, filters, dtype=torch.float32, device=x.device)
    shortcut = target if residual is None else readable(residual)
    wide = not fits_32_bits(x, weight, target, shortcut)
    tiles_n = _tiles.cdiv(product.columns, tile.n) * product.copies
    flags = {"HAS_RESIDUAL": residual is not None, "RELU": act == "relu", "WIDE": wide}
    with on_device(out):
        traceable(conv_bn_act_kernel, out)[(_tiles.cdiv(pixels, tile.m) * tiles_n * plan.splits,)](
            x, weight, scale, shift, shortcut, target, partial,
            pixels, x.shape[2], x.shape[3], p, q, x.shape[1], filters, group_in, group_out,
            stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1],
            x.stride(0), x.stride(2), x.stride(3),
            weight.stride(0), weight.stride(2), weight.stride(3),
            *shortcut.stride(), *target.stride(),
            R=r, S=s, SIDE=side, NARROW=narrow, FLAT=plan.flat,
            CHECKED=max(padding) > 0,
            EVEN=product.depth % block_k == 0 and groups % side == 0,
            SPLITS=plan.splits, PRECISION=product.precision,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=block_k, SLICES=tile.slices,
            GROUP_M=GROUP_M, num_warps=tile.warps, num_stages=tile.stages, **flags,
        )  # fmt: skip
        if plan.splits > 1:
            rows, columns = MERGE_TILE
            grid = (_tiles.cdiv(pixels, rows), _tiles.cdiv(filters, columns))
            traceable(merge_kernel, out)[grid](
                partial, scale, shift, shortcut, target, pixels, p, q, filters,
                *shortcut.stride(), *target.stride(),
                SPLITS=plan.splits, AFFINE=True, BLOCK_M=rows, BLOCK_N=columns,
                **flags,
            )  # fmt: skip
        if target is not out:
            out.copy_(target)
