"""`conv_bn_dgrad` in Triton: a convolution's gradient between two live BatchNorms, in one pass.

    dy = A dz + (B y + C)                       as the kernel reads, rounded; 0 outside the image
    dh = conv^T(dy, weight) [+ addend]
    dx = dh where h passed the ReLU, else 0     h = relu(scale * raw + shift), as forward made it
    sums = (sum dx, sum dx (raw - mean))

The implicit GEMM of `conv_dgrad`, by phases of the stride (`_dgrad`). Behind it each tile adds what
came through the shortcut, rounds once, masks, stores, and leaves its sums of each channel in a
workspace; a second kernel adds those in float64, always in the same order.
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

from . import _tiles, conv_dgrad
from ._dgrad import SUMS_TILE, finish_pixels, sums_kernel, tile_sums
from ._gemm import finish, pixel_of
from ._launch import (
    GROUP_M,
    MERGE_TILE,
    call_of,
    fits_32_bits,
    on_device,
    plan_of,
    readable,
    traceable,
    writable,
)

SLICE = 32
"""Values a thread finishes at a time: beside each stand its addend, its raw output and h. Half of
it where a thread keeps 128 sums and the gradient is read as it is: found by compiling, as
`_tiles.most_sums` was."""


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_bn_dgrad_kernel(
    dz,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent; unused without AFFINE
    coefficients,  # [3, K] float32 A, B, C; unused without AFFINE
    weight,  # [K, C / groups, R, S], channels adjacent
    addend,  # [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], channels adjacent
    raw,  # [N, C, H, W], channels adjacent; unused without REDUCED
    norm,  # [4, C] float32; unused without REDUCED
    dx,  # [N, C, H, W], channels adjacent
    workspace,  # [rows of tiles, 2, C] float32; unused without REDUCED and with splits
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
    raw_n,
    raw_h,
    raw_w,
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
    REDUCED: tl.constexpr,
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
        finish_pixels(
            acc, addend, raw, norm, dx, workspace, row, image, h, w, inside, first, last, channels,
            addend_stride, addend_n, addend_h, addend_w, raw_n, raw_h, raw_w, dx_n, dx_h, dx_w,
            HAS_ADDEND, REDUCED, BLOCK_N, SLICES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def bn_dgrad_merge_kernel(
    partial,  # [SPLITS, N H W, C] float32
    addend,  # as of `conv_bn_dgrad_kernel`, and so on
    raw,
    norm,
    dx,
    workspace,  # [rows of tiles, 2, C] float32; unused without REDUCED
    pixels,  # N H W
    height,
    width,
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
    finish_pixels(
        acc, addend, raw, norm, dx, workspace, tl.program_id(0), image, h, w, inside, first,
        channels, channels, addend_stride, addend_n, addend_h, addend_w, raw_n, raw_h, raw_w, dx_n,
        dx_h, dx_w, HAS_ADDEND, REDUCED, BLOCK_N, 1,
    )  # fmt: skip


def product_of(
    dx: Tensor, weight: Tensor, stride: Sequence[int], groups: int, affine: bool
) -> _tiles.Product:
    """The sizes from which the configuration is chosen; as of `conv_dgrad`.

    Args:
        dx: the result [N, C, H, W].
        weight: [K, C / groups, R, S].
        stride: (vertical, horizontal).
        groups: of channels.
        affine: whether the gradient is made as it is read, of two tensors.
    """
    product = conv_dgrad.product_of(dx, weight, stride, groups)
    if not affine:
        return dataclasses.replace(product, gathered=0)
    return dataclasses.replace(product, most=_tiles.MOST_MADE)


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    raw: Tensor | None,
    norm: Tensor | None,
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
    """Writes the gradient of a convolution's input into `dx` and its reductions into `sums`.

    Args:
        dz: gradient behind the BatchNorm [N, K, P, Q], float32, bfloat16 or float16. Operands that
            are not `readable` are copied to channels_last first; `dx` likewise, afterwards.
        y: the convolution's raw output [N, K, P, Q], or None: dz is the gradient of that itself.
        coefficients: [3, K] float32; given with y.
        weight: [K, C / groups, R, S].
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        raw: what went into the BatchNorm and ReLU below [N, C, H, W]; None without ReLU.
        norm: [4, C] float32 of that BatchNorm; given with raw.
        dx: [N, C, H, W], any layout without overlaps; overwritten.
        sums: [2, C] float32, contiguous; overwritten. [0, C] without raw.
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
    call = call_of("conv_bn_dgrad", dx, weight, y, stride, padding, dilation, groups)
    plan = plan or plan_of(product, dx.device, allowed, call)
    dz, weight, target = readable(dz), readable(weight), writable(dx)
    result, more, below = (dz if t is None else readable(t) for t in (y, addend, raw))
    n, channels, h, w = dx.shape
    filters, group_in, r, s = weight.shape
    tile, split = plan.tile, plan.splits > 1
    tiles_m = _tiles.cdiv(product.rows, tile.m)
    partial, workspace = workspaces(dx, tiles_m * math.prod(stride), plan, len(sums), unused=sums)
    vectors, norms = (sums if t is None else t.contiguous() for t in (coefficients, norm))
    epilogue = {"HAS_ADDEND": addend is not None, "REDUCED": raw is not None}
    wide = not fits_32_bits(dz, result, weight, more, below, target)
    sizes = {"SPLITS": plan.splits, "WIDE": wide}
    tail = (addend_stride, *steps(more), *steps(below), *steps(target))
    tiles = tiles_m * _tiles.cdiv(product.columns, tile.n) * product.copies
    with on_device(dx):
        traceable(conv_bn_dgrad_kernel, dx)[(tiles * plan.splits,)](
            dz, result, vectors, weight, more, below, norms, target, workspace, partial,
            product.rows, h, w, dz.shape[2], dz.shape[3], channels, filters, group_in,
            filters // groups, stride[0], stride[1], padding[0], padding[1], dilation[0],
            dilation[1], *steps(dz), *steps(result), *steps(weight), *tail, n,
            STEP_R=stride[0] // math.gcd(stride[0], dilation[0]),
            STEP_S=stride[1] // math.gcd(stride[1], dilation[1]), R=r, S=s, AFFINE=y is not None,
            **blocks(product, plan), **sizes,
            **{name: flag and not split for name, flag in epilogue.items()},
        )  # fmt: skip
        if split:
            grid = (_tiles.cdiv(n * h * w, MERGE_TILE[0]), _tiles.cdiv(channels, MERGE_TILE[1]))
            traceable(bn_dgrad_merge_kernel, dx)[grid](
                partial, more, below, norms, target, workspace, n * h * w, h, w, channels, *tail,
                BLOCK_M=MERGE_TILE[0], BLOCK_N=MERGE_TILE[1], **sizes, **epilogue,
            )  # fmt: skip
        if raw is not None:
            add_rows(workspace, sums, dx)
        if target is not dx:
            dx.copy_(target)


def workspaces(
    dx: Tensor, rows: int, plan: _tiles.Plan, kinds: int, *, unused: Tensor
) -> tuple[Tensor, Tensor]:
    """The splits' products [splits, N H W, C], and each tile's sums [rows of tiles, kinds, C].

    Args:
        dx: the result.
        rows: of tiles of all phases, where the reduction is not split.
        plan: how it runs.
        kinds: of sums that there are; may be none.
        unused: stands for what is not needed.
    """
    n, channels, h, w = dx.shape
    partial = workspace = unused
    if plan.splits > 1:
        shape = (plan.splits, n * h * w, channels)
        partial = torch.empty(shape, dtype=torch.float32, device=dx.device)
        rows = _tiles.cdiv(n * h * w, MERGE_TILE[0])
    if kinds:
        workspace = torch.empty((rows, kinds, channels), dtype=torch.float32, device=dx.device)
    return partial, workspace


def add_rows(workspace: Tensor, sums: Tensor, dx: Tensor) -> None:
    """Launches `sums_kernel` [rows, kinds, C] -> [kinds, C], for the result `dx`."""
    rows, columns = SUMS_TILE
    values = sums.numel()
    traceable(sums_kernel, dx)[(_tiles.cdiv(values, columns),)](
        workspace, sums, workspace.shape[0], values, BLOCK_M=rows, BLOCK_N=columns, num_warps=8
    )


def blocks(product: _tiles.Product, plan: _tiles.Plan) -> dict[str, Any]:
    """What a configuration fixes at compile time."""
    tile, slice_ = plan.tile, SLICE
    if tile.sums > 64:  # without the affine
        slice_ //= 2
    return {
        "SIDE": product.side,
        "PRECISION": product.precision,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": product.step,
        "GROUP_M": GROUP_M,
        "SLICES": tile.slices if plan.splits > 1 else max(1, tile.sums // slice_),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def steps(t: Tensor) -> tuple[int, int, int]:
    """Elements between the images, rows and columns of [N, C, H, W]."""
    return t.stride(0), t.stride(2), t.stride(3)
