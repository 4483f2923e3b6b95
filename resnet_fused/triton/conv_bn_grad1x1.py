"""`conv_bn_grad1x1` in Triton: both gradients of a 1x1 convolution, each operand read once.

    dy = A dz + (B y + C),  h = relu(scale * x + shift)
    dx = dy weight [+ addend], masked by h and summed;  dweight = sum over pixels of dy h

A program walks over tiles of pixels. Of each it makes dy and h in registers, multiplies them twice,
finishes and stores its tile of dx (`_dgrad`). The sums of its part of dweight, all filters x some
channels, stay in registers for its whole life; a second kernel adds the programs' sums in a fixed
order. dy must hold all filters at once: `serves` says which shapes fit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _limits, _tiles
from ._bn import activated, affine_gradient
from ._dgrad import SUMS_TILE, finish_pixels, sums_kernel
from ._gemm import pixel_of
from ._grad1x1 import BY_NAME, CONFIGS, PIXELS, STAGES, WARPS, Config, programs, serves
from ._launch import (
    fits_32_bits,
    most_registers,
    on_device,
    precision,
    readable,
    traceable,
    writable,
)
from ._wgrad import MERGE_BLOCK, row_of, wgrad_merge_kernel

__all__ = ["BY_NAME", "CONFIGS", "Config", "conv_bn_grad1x1_kernel", "launch", "serves"]


@triton.jit
def operands_of_all(
    weight,  # [K, C, 1, 1], channels adjacent
    coefficients,  # [3, K] float32 A, B, C; unused without AFFINE
    channel,  # [BLOCK_N]
    known,  # [BLOCK_N] which of them exist
    filters,
    weight_k,
    AFFINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loads what a program keeps: filters and which exist, their weights, and A, B, C."""
    k = tl.arange(0, BLOCK_K)
    there = k < filters
    place = k.to(tl.int64)[:, None] * weight_k + channel[None, :]
    weights = tl.load(weight + place, mask=there[:, None] & known[None, :], other=0.0)
    a1 = row_of(coefficients, k, there, AFFINE)
    a2 = row_of(coefficients + filters, k, there, AFFINE)
    a3 = row_of(coefficients + 2 * filters, k, there, AFFINE)
    return k, there, weights, a1, a2, a3


@triton.jit
def gradient_of_tile(
    dz,  # [N, K, H, W], channels adjacent
    y,  # [N, K, H, W], channels adjacent; unused without AFFINE
    a1,  # [BLOCK_K] A, B, C; unused without AFFINE
    a2,
    a3,
    image,  # [BLOCK_M]
    p,  # [BLOCK_M]
    q,  # [BLOCK_M]
    inside,  # [BLOCK_M] which pixels exist
    k,  # [BLOCK_K]
    there,  # [BLOCK_K] which filters exist
    dz_n,
    dz_h,
    dz_w,
    y_n,
    y_h,
    y_w,
    AFFINE: tl.constexpr,
):
    """Makes dy of some pixels and all filters, rounded; 0 where there is no pixel."""
    row = image * dz_n + p * dz_h + q * dz_w
    seen = inside[:, None] & there[None, :]
    z = tl.load(dz + row[:, None] + k[None, :], mask=seen, other=0.0)
    if AFFINE:
        row = image * y_n + p * y_h + q * y_w
        raw = tl.load(y + row[:, None] + k[None, :], mask=seen, other=0.0)
        z = affine_gradient(z, raw, a1[None, :], a2[None, :], a3[None, :])
        # Behind the last pixel it would be C.
        z = tl.where(inside[:, None], z, 0.0).to(dz.dtype.element_ty)
    return z


@triton.jit
def store_part(
    acc,  # [BLOCK_K, BLOCK_N] float32
    partial,  # [parts, K, C] float32
    part,
    k,
    there,
    channel,
    known,
    filters,
    channels,
):
    """Stores a program's sums of dweight."""
    row = (part.to(tl.int64) * filters + k) * channels
    stored = there[:, None] & known[None, :]
    tl.store(partial + row[:, None] + channel[None, :], acc, mask=stored)


@triton.jit(do_not_specialize=["pixels", "height", "width", "parts"])
def conv_bn_grad1x1_kernel(
    dz,  # [N, K, H, W], channels adjacent
    y,  # [N, K, H, W], channels adjacent; unused without AFFINE
    coefficients,  # [3, K] float32 A, B, C; unused without AFFINE
    x,  # [N, C, H, W], channels adjacent
    norm,  # [4, C] float32 scale, shift, mean, invstd; unused without NORM
    weight,  # [K, C, 1, 1], channels adjacent
    addend,  # [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], channels adjacent
    dx,  # [N, C, H, W], channels adjacent
    workspace,  # [tiles of pixels, 2, C] float32; unused without NORM
    partial,  # [parts, K, C] float32
    pixels,  # N H W
    height,
    width,
    channels,
    filters,
    parts,  # programs that share the pixels
    dz_n,
    dz_h,
    dz_w,
    y_n,
    y_h,
    y_w,
    x_n,
    x_h,
    x_w,
    weight_k,
    addend_stride,
    addend_n,
    addend_h,
    addend_w,
    dx_n,
    dx_h,
    dx_w,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Every parts-th tile of dx for BLOCK_N channels, and these tiles' sums of dweight."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_n = tl.cdiv(channels, BLOCK_N)
    # What runs at one time reads the same pixels.
    part = tl.program_id(0) // tiles_n
    first = (tl.program_id(0) % tiles_n) * BLOCK_N
    channel = first + tl.arange(0, BLOCK_N)
    known = channel < channels
    k, there, weights, a1, a2, a3 = operands_of_all(
        weight, coefficients, channel, known, filters, weight_k, AFFINE, BLOCK_K
    )
    scale = row_of(norm, channel, known, NORM)
    shift = row_of(norm + channels, channel, known, NORM)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    zero = tl.full((), 0, index)
    for step in range(part, tl.cdiv(pixels, BLOCK_M), parts):
        tile = zero + step
        pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = pixel < pixels
        image, p, q = pixel_of(tl.minimum(pixel, pixels - 1), height, width)
        z = gradient_of_tile(
            dz, y, a1, a2, a3, image, p, q, inside, k, there, dz_n, dz_h, dz_w, y_n, y_h, y_w,
            AFFINE,
        )  # fmt: skip
        row = image * x_n + p * x_h + q * x_w
        h = tl.load(
            x + row[:, None] + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        if NORM:
            h = activated(h, scale[None, :], shift[None, :])
            h = tl.where(inside[:, None], h, 0.0).to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(z), h, acc, input_precision=PRECISION)
        dh = tl.dot(z, weights, input_precision=PRECISION)
        finish_pixels(
            dh, addend, x, norm, dx, workspace, tile, image, p, q, inside, first.to(index),
            channels, channels, addend_stride, addend_n, addend_h, addend_w, x_n, x_h, x_w, dx_n,
            dx_h, dx_w, HAS_ADDEND, NORM, BLOCK_N, SLICES,
        )  # fmt: skip
    store_part(acc, partial, part, k, there, channel, known, filters, channels)


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    dx: Tensor,
    sums: Tensor,
    dweight: Tensor,
    addend_stride: int,
    *,
    config: Config | None = None,
    parts: int | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes both gradients of a 1x1 convolution and the reductions of the one of its input.

    Args:
        dz: gradient behind the BatchNorm [N, K, H, W], bfloat16 or float16. Copied to channels_last
            first if it is not `readable`, as are y, x, weight and addend; and `dx` by a copy
            afterwards.
        y: the convolution's raw output [N, K, H, W]; None: dz is the gradient of that itself.
        coefficients: [3, K] float32 A, B, C, dense; given with y.
        x: what the convolution read [N, C, H, W], or with `norm` the raw output below.
        norm: [4, C] float32 of the BatchNorm and ReLU below, dense; None: neither is there.
        weight: [K, C, 1, 1], dtype of dz.
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        dx: [N, C, H, W], any layout without overlaps; overwritten.
        sums: [2, C] float32, contiguous; overwritten. [0, C] without norm.
        dweight: [K, C, 1, 1], dtype of dz or float32, any strides without overlaps; overwritten.
        addend_stride: the addend belongs to every addend_stride-th row and column.
        config: configuration to use instead of the chosen one.
        parts: programs that share the pixels, instead of as many as the GPU holds at one time.
        allowed: names of the configurations to choose among; None for all.

    Raises:
        LookupError: no configuration takes the shape; see `serves`.
    """
    if dz.numel() == 0:
        sums.zero_()
        dweight.zero_()
        return
    n, channels, height, width = x.shape
    filters = dz.shape[1]
    limits = _limits.limits(dz.device)
    config = config or serves(filters, channels, dz.element_size(), limits, allowed)
    if config is None:
        raise LookupError(f"no configuration for {filters} filters and {channels} channels")
    dz, x, weight, target = readable(dz), readable(x), readable(weight), writable(dx)
    raw = dz if y is None else readable(y)
    more = dz if addend is None else readable(addend)
    pixels = n * height * width
    tiles, (most, across) = _tiles.cdiv(pixels, PIXELS), programs(pixels, channels, config, limits)
    parts = parts or most
    empty = functools.partial(torch.empty, dtype=torch.float32, device=dz.device)
    workspace = sums if norm is None else empty((tiles, 2, channels))
    partial = empty((parts, filters, channels))
    with on_device(dx):
        traceable(conv_bn_grad1x1_kernel, dx)[(parts * across,)](
            dz, raw, sums if coefficients is None else coefficients, x,
            sums if norm is None else norm, weight, more, target, workspace, partial,
            pixels, height, width, channels, filters, parts, *steps(dz), *steps(raw), *steps(x),
            weight.stride(0), addend_stride, *steps(more), *steps(target),
            AFFINE=coefficients is not None, NORM=norm is not None,
            HAS_ADDEND=addend is not None, WIDE=not fits_32_bits(dz, raw, x, more, target),
            PRECISION=precision(dz.dtype), BLOCK_M=PIXELS, BLOCK_N=config.channels,
            BLOCK_K=config.filters, SLICES=config.slices, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        merge(partial, dweight)
        if norm is not None:
            merge_sums(workspace, sums)
        if target is not dx:
            dx.copy_(target)


def merge(partial: Tensor, dweight: Tensor) -> None:
    """Adds the programs' sums [parts, K, C] in order, into the gradient of the weights."""
    count = dweight.numel()
    traceable(wgrad_merge_kernel, dweight)[(_tiles.cdiv(count, MERGE_BLOCK),)](
        partial, partial, dweight, count, dweight.shape[1], *dweight.stride(), R=1, S=1,
        SCALED=False, SPLITS=partial.shape[0], BLOCK=MERGE_BLOCK,
        maxnreg=most_registers(dweight.device),
    )  # fmt: skip


def merge_sums(workspace: Tensor, sums: Tensor) -> None:
    """Adds the tiles' sums [tiles, 2 or 3, C] in order, in float64."""
    tiles, rows, channels = workspace.shape
    traceable(sums_kernel, sums)[(_tiles.cdiv(rows * channels, SUMS_TILE[1]),)](
        workspace, sums, tiles, rows * channels, BLOCK_M=SUMS_TILE[0], BLOCK_N=SUMS_TILE[1],
        num_warps=8,
    )  # fmt: skip


def steps(t: Tensor) -> tuple[int, int, int]:
    """Elements between the images, rows and columns of [N, C, H, W]."""
    return t.stride(0), t.stride(2), t.stride(3)
