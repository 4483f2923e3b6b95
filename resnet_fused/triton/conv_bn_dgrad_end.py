"""`conv_bn_dgrad_end` in Triton: a convolution's gradient behind the ReLU of the block before.

    dy = A dz + (B y + C)                       as the kernel reads, rounded; 0 outside the image
    dout = conv^T(dy, weight) [+ addend]        rounded, and never stored
    dx = dout where out passed the ReLU, else 0
    sums = (sum dx, sum dx (raw - mean) [, sum dx (residual - residual_mean)])

The product is `conv_bn_dgrad`'s (`_dgrad.tile_sums`), by phases of the stride. Its epilogue reads
the mask off the block's output where that one makes it anew, and takes the reductions of one
BatchNorm, or with a projection of two. A second kernel adds the tiles' sums as there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from . import conv_bn_dgrad as plain
from ._dgrad import tile_sums
from ._gemm import finish, halves, pixel_of
from ._launch import (
    MERGE_TILE,
    call_of,
    fits_32_bits,
    on_device,
    plan_of,
    readable,
    traceable,
    writable,
)


@triton.jit
def finish_end(
    acc,  # [M, COLUMNS] float32 sums
    addend,  # [M, 1] pointers to channel 0 of each pixel's addend; unused without HAS_ADDEND
    place,  # [M, 1] offsets of channel 0 of each pixel in out, raw and residual
    out,  # [N, C, H, W], channels adjacent
    raw,  # likewise
    norm,  # [4, C] float32: of which the mean
    residual,  # likewise, as raw; unused without PROJECTED
    residual_norm,  # [4, C]; unused without PROJECTED
    dx,  # [M, 1] pointers to channel 0 of each pixel
    sums,  # this tile's row of the workspace [2 or 3, C] float32
    added,  # [M] which pixels have an addend
    inside,  # [M] which pixels exist
    first,  # channel of the first column
    last,  # channel behind the last one that exists
    channels,
    HAS_ADDEND: tl.constexpr,
    PROJECTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Epilogue: adds in float32, rounds once, masks and stores; the sums of the rounded values.

    In SLICES (1, 2, 4 or 8) of the columns, one after the other, to keep within the registers.
    """
    if SLICES > 1:
        half: tl.constexpr = COLUMNS // 2
        left, right = halves(acc)
        finish_end(
            left, addend, place, out, raw, norm, residual, residual_norm, dx, sums, added, inside,
            first, last, channels, HAS_ADDEND, PROJECTED, half, SLICES // 2,
        )  # fmt: skip
        finish_end(
            right, addend, place, out, raw, norm, residual, residual_norm, dx, sums, added, inside,
            first + half, last, channels, HAS_ADDEND, PROJECTED, half, SLICES // 2,
        )  # fmt: skip
    else:
        channel = first + tl.arange(0, COLUMNS)
        known = channel < last
        stored = inside[:, None] & known[None, :]
        dout = acc
        if HAS_ADDEND:
            shared = added[:, None] & known[None, :]
            dout += tl.load(addend + channel[None, :], mask=shared, other=0.0).to(tl.float32)
        where = place + channel[None, :]
        passed = tl.load(out + where, mask=stored, other=0.0).to(tl.float32)
        # Not (out > 0): where out is NaN, the gradient passes. Where there is no pixel, it is 0.
        rounded = dout.to(dx.dtype.element_ty).to(tl.float32)
        kept = tl.where(passed <= 0.0, 0.0, rounded)
        tl.store(dx + channel[None, :], kept.to(dx.dtype.element_ty), mask=stored)
        tl.store(sums + channel, tl.sum(kept, 0), mask=known)
        add_centred(
            kept, raw + where, norm + 2 * channels + channel, sums + channels + channel, stored,
            known,
        )  # fmt: skip
        if PROJECTED:
            add_centred(
                kept, residual + where, residual_norm + 2 * channels + channel,
                sums + 2 * channels + channel, stored, known,
            )  # fmt: skip


@triton.jit
def add_centred(
    kept,  # [M, COLUMNS] float32
    raw,  # [M, COLUMNS] pointers
    mean,  # [COLUMNS] pointers to float32
    sums,  # [COLUMNS] pointers to float32
    stored,  # [M, COLUMNS] which elements exist
    known,  # [COLUMNS] which channels exist
):
    """Stores the sums of kept (raw - mean); a mean that is not finite counts where pixels are."""
    y = tl.load(raw, mask=stored, other=0.0).to(tl.float32)
    centred = kept * (y - tl.load(mean, mask=known, other=0.0)[None, :])
    tl.store(sums, tl.sum(tl.where(stored, centred, 0.0), 0), mask=known)


@triton.jit
def finish_end_pixels(
    acc,  # [M, COLUMNS] float32 sums
    addend,  # [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], channels adjacent
    out,  # [N, C, H, W], channels adjacent, as are raw, residual and dx
    raw,
    norm,  # [4, C] float32
    residual,
    residual_norm,  # [4, C] float32
    dx,
    workspace,  # [rows, 2 or 3, C] float32
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
    end_n,
    end_h,
    end_w,
    dx_n,
    dx_h,
    dx_w,
    HAS_ADDEND: tl.constexpr,
    PROJECTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """`finish_end` of the pixels (image, h, w)."""
    up, left = h // addend_stride, w // addend_stride
    added = inside & (up * addend_stride == h) & (left * addend_stride == w)
    finish_end(
        acc,
        addend + (image * addend_n + up * addend_h + left * addend_w)[:, None],
        (image * end_n + h * end_h + w * end_w)[:, None],
        out, raw, norm, residual, residual_norm,
        dx + (image * dx_n + h * dx_h + w * dx_w)[:, None],
        workspace + row.to(tl.int64) * (3 if PROJECTED else 2) * channels,
        added, inside, first, last, channels, HAS_ADDEND, PROJECTED, COLUMNS, SLICES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_bn_dgrad_end_kernel(
    dz,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent; unused without AFFINE
    coefficients,  # [3, K] float32 A, B, C; unused without AFFINE
    weight,  # [K, C / groups, R, S], channels adjacent
    addend,  # [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], channels adjacent
    out,  # [N, C, H, W], channels adjacent
    raw,  # [N, C, H, W], with the steps of out
    norm,  # [4, C] float32
    residual,  # [N, C, H, W], with the steps of out; unused without PROJECTED
    residual_norm,  # [4, C] float32; unused without PROJECTED
    dx,  # [N, C, H, W], channels adjacent
    workspace,  # [rows of tiles, 2 or 3, C] float32; unused with splits
    partial,  # [SPLITS, N H W, C] float32; unused without splits
    pixels,  # of one phase: N ceil(H / stride_h) ceil(W / stride_w)
    height,
    width,
    out_height,  # P
    out_width,  # Q
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
    dz_n,
    dz_h,
    dz_w,
    y_n,
    y_h,
    y_w,
    weight_k,
    weight_r,
    weight_s,
    addend_stride,
    addend_n,
    addend_h,
    addend_w,
    end_n,
    end_h,
    end_w,
    dx_n,
    dx_h,
    dx_w,
    images,
    R: tl.constexpr,
    S: tl.constexpr,
    STEP_R: tl.constexpr,
    STEP_S: tl.constexpr,
    SIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    PROJECTED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One tile of one phase of dx and its sums, or with SPLITS > 1 of one part's products."""
    acc, part, row, image, h, w, inside, first, last = tile_sums(
        dz, y, weight, coefficients, pixels, height, width, out_height, out_width, channels,
        filters, group_in, group_out, stride_h, stride_w, padding_h, padding_w, dilation_h,
        dilation_w, dz_n, dz_h, dz_w, y_n, y_h, y_w, weight_k, weight_r, weight_s, R, S, STEP_R,
        STEP_S, SIDE, "affine" if AFFINE else "none", SPLITS, WIDE, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_K, GROUP_M,
    )  # fmt: skip
    if SPLITS > 1:
        whole = (image.to(tl.int64) * height + h) * width + w
        sums = (part.to(tl.int64) * images * height * width + whole) * channels
        sums = partial + sums[:, None]
        finish(
            acc, norm, norm, sums, sums, inside, first, last, 1, 1, False, False, False, BLOCK_N,
            SLICES,
        )  # fmt: skip
    else:
        finish_end_pixels(
            acc, addend, out, raw, norm, residual, residual_norm, dx, workspace, row, image, h, w,
            inside, first, last, channels, addend_stride, addend_n, addend_h, addend_w, end_n,
            end_h, end_w, dx_n, dx_h, dx_w, HAS_ADDEND, PROJECTED, BLOCK_N, SLICES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def bn_dgrad_end_merge_kernel(
    partial,  # [SPLITS, N H W, C] float32
    addend,  # as of `conv_bn_dgrad_end_kernel`, and so on
    out,
    raw,
    norm,
    residual,
    residual_norm,
    dx,
    workspace,  # [rows of tiles, 2 or 3, C] float32
    pixels,  # N H W
    height,
    width,
    channels,
    addend_stride,
    addend_n,
    addend_h,
    addend_w,
    end_n,
    end_h,
    end_w,
    dx_n,
    dx_h,
    dx_w,
    HAS_ADDEND: tl.constexpr,
    PROJECTED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the splits' products, always in the same order, and finishes."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixel = tl.program_id(0).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1).to(index) * BLOCK_N
    channel = first + tl.arange(0, BLOCK_N)
    inside = pixel < pixels
    there = inside[:, None] & (channel < channels)[None, :]
    source = partial + (pixel.to(tl.int64)[:, None] * channels + channel[None, :])
    step = tl.full((), 1, tl.int64) * pixels * channels  # elements of one part: beyond 2^31
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(source, mask=there, other=0.0)
        source += step
    image, h, w = pixel_of(tl.minimum(pixel, pixels - 1), height, width)
    finish_end_pixels(
        acc, addend, out, raw, norm, residual, residual_norm, dx, workspace, tl.program_id(0),
        image, h, w, inside, first, channels, channels, addend_stride, addend_n, addend_h,
        addend_w, end_n, end_h, end_w, dx_n, dx_h, dx_w, HAS_ADDEND, PROJECTED, BLOCK_N, 1,
    )  # fmt: skip


def product_of(
    dx: Tensor, weight: Tensor, stride: Sequence[int], groups: int, affine: bool
) -> _tiles.Product:
    """The sizes from which the configuration is chosen; as of `conv_bn_dgrad`.

    Args:
        dx: the result [N, C, H, W].
        weight: [K, C / groups, R, S].
        stride: (vertical, horizontal).
        groups: of channels.
        affine: whether the gradient is made as it is read, of two tensors.
    """
    product = plain.product_of(dx, weight, stride, groups, affine)
    return dataclasses.replace(product, most=_tiles.MOST_MADE)


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    out: Tensor,
    raw: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    dx: Tensor,
    sums: Tensor,
    addend_stride: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes the gradient behind a block's last ReLU into `dx` and its reductions into `sums`.

    Args:
        dz: gradient behind the BatchNorm of the convolution [N, K, P, Q], float32, bfloat16 or
            float16. What is not `readable` is copied first, or out, raw and residual not `alike`.
        y: the convolution's raw output [N, K, P, Q], or None: dz is the gradient of that itself.
        coefficients: [3, K] float32; given with y.
        weight: [K, C / groups, R, S].
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        out: the block's output, by whose sign dx is masked [N, C, H, W].
        raw: its last raw output [N, C, H, W].
        norm: [4, C] float32 of its BatchNorm.
        residual: the raw output of its projection [N, C, H, W], or None.
        residual_norm: [4, C] float32; given with residual.
        dx: [N, C, H, W], any layout without overlaps; overwritten, as is sums.
        sums: [2, C] float32, with residual [3, C], contiguous.
        addend_stride: the addend belongs to every addend_stride-th row and column.
        stride: (vertical, horizontal), as padding and dilation.
        padding: see stride.
        dilation: see stride.
        groups: of channels.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
    """
    if dx.numel() == 0:
        sums.zero_()
        return
    product = product_of(dx, weight, stride, groups, y is not None)
    call = call_of("conv_bn_dgrad_end", dx, weight, y, stride, padding, dilation, groups)
    plan = plan or plan_of(product, dx.device, allowed, call)
    dz, weight, target = readable(dz), readable(weight), writable(dx)
    result, more = (dz if t is None else readable(t) for t in (y, addend))
    out, raw, other = alike(out, raw, raw if residual is None else residual)
    (n, channels, h, w), (filters, group_in) = dx.shape, weight.shape[:2]
    tiles_m, split = _tiles.cdiv(product.rows, plan.tile.m), plan.splits > 1
    phases = math.prod(stride)
    partial, workspace = plain.workspaces(dx, tiles_m * phases, plan, len(sums), unused=sums)
    vectors, own = (sums if t is None else t.contiguous() for t in (coefficients, residual_norm))
    ends = (more, out, raw, norm.contiguous(), other, own, target, workspace)
    wide = not fits_32_bits(dz, result, weight, more, out, raw, other, target)
    sizes: dict[str, Any] = {"SPLITS": plan.splits, "WIDE": wide}
    epilogue = {"HAS_ADDEND": addend is not None, "PROJECTED": residual is not None}
    tail = (addend_stride, *plain.steps(more), *plain.steps(out), *plain.steps(target))
    tiles = tiles_m * _tiles.cdiv(product.columns, plan.tile.n) * product.copies
    with on_device(dx):
        traceable(conv_bn_dgrad_end_kernel, dx)[(tiles * plan.splits,)](
            dz, result, vectors, weight, *ends, partial, product.rows, h, w, dz.shape[2],
            dz.shape[3], channels, filters, group_in, filters // groups, stride[0], stride[1],
            padding[0], padding[1], dilation[0], dilation[1], *plain.steps(dz),
            *plain.steps(result), *plain.steps(weight), *tail, n,
            AFFINE=y is not None, **taps(weight, stride, dilation), **plain.blocks(product, plan),
            **sizes, **{name: flag and not split for name, flag in epilogue.items()},
        )  # fmt: skip
        if split:
            merge(dx, partial, ends, tail, **sizes, **epilogue)
        plain.add_rows(workspace, sums, dx)
        if target is not dx:
            dx.copy_(target)


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape as kernels read them, all with the same steps between their pixels."""
    found = tuple(map(readable, tensors))
    if len({_taken_steps(t) for t in found}) == 1:
        return found
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in found)


def _taken_steps(t: Tensor) -> tuple[int, ...]:
    """Its steps in dimensions in which there is more than one element."""
    return tuple(step if size > 1 else 0 for size, step in zip(t.shape, t.stride(), strict=True))


def taps(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> dict[str, int]:
    """The filter's sides, and how far apart the taps of one phase are."""
    apart = [step // math.gcd(step, dil) for step, dil in zip(stride, dilation, strict=True)]
    return {"R": weight.shape[2], "S": weight.shape[3], "STEP_R": apart[0], "STEP_S": apart[1]}


def merge(
    dx: Tensor, partial: Tensor, ends: Sequence[Tensor], tail: Sequence[int], **constants: Any
) -> None:
    """Launches `bn_dgrad_end_merge_kernel` for the result `dx`; its arguments as there."""
    n, channels, h, w = dx.shape
    rows, columns = MERGE_TILE
    grid = (_tiles.cdiv(n * h * w, rows), _tiles.cdiv(channels, columns))
    traceable(bn_dgrad_end_merge_kernel, dx)[grid](
        partial, *ends, n * h * w, h, w, channels, *tail, BLOCK_M=rows, BLOCK_N=columns,
        **constants,
    )  # fmt: skip
