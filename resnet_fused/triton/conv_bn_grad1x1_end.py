"""`conv_bn_grad1x1_end` in Triton: both gradients of a 1x1 convolution and the end before it.

    dy = A dz + (B y + C)
    dx = dy weight [+ addend], rounded, where out passed the ReLU, else 0
    sums = (sum dx, sum dx (raw - mean) [, sum dx (residual - residual_mean)])
    dweight = sum over pixels of dy out

The programs are `conv_bn_grad1x1`'s, whose input is the block's output: it is multiplied as it was
stored, and by its sign each tile of dx is finished as in `conv_bn_dgrad_end`. dy must hold all
filters at once: `serves` says which shapes fit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _limits, _tiles
from ._gemm import pixel_of
from ._grad1x1 import PIXELS, STAGES, WARPS, Config, programs
from ._grad1x1_end import BY_NAME, CONFIGS, serves
from ._launch import fits_32_bits, on_device, precision, readable, traceable, writable
from .conv_bn_dgrad_end import alike, finish_end_pixels
from .conv_bn_grad1x1 import (
    gradient_of_tile,
    merge,
    merge_sums,
    operands_of_all,
    steps,
    store_part,
)

__all__ = ["BY_NAME", "CONFIGS", "conv_bn_grad1x1_end_kernel", "launch", "serves"]


@triton.jit(do_not_specialize=["pixels", "height", "width", "parts"])
def conv_bn_grad1x1_end_kernel(
    dz,  # [N, K, H, W], channels adjacent
    y,  # [N, K, H, W], channels adjacent; unused without AFFINE
    coefficients,  # [3, K] float32 A, B, C; unused without AFFINE
    weight,  # [K, C, 1, 1], channels adjacent
    addend,  # [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], channels adjacent
    out,  # [N, C, H, W], channels adjacent
    raw,  # [N, C, H, W], with the steps of out
    norm,  # [4, C] float32: of which the mean
    residual,  # [N, C, H, W], with the steps of out; unused without PROJECTED
    residual_norm,  # [4, C] float32; unused without PROJECTED
    dx,  # [N, C, H, W], channels adjacent
    workspace,  # [tiles of pixels, 2 or 3, C] float32
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
    weight_k,
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
    AFFINE: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    PROJECTED: tl.constexpr,
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
        row = image * end_n + p * end_h + q * end_w
        h = tl.load(
            out + row[:, None] + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(z), h, acc, input_precision=PRECISION)
        dout = tl.dot(z, weights, input_precision=PRECISION)
        finish_end_pixels(
            dout, addend, out, raw, norm, residual, residual_norm, dx, workspace, tile, image, p,
            q, inside, first.to(index), channels, channels, addend_stride, addend_n, addend_h,
            addend_w, end_n, end_h, end_w, dx_n, dx_h, dx_w, HAS_ADDEND, PROJECTED, BLOCK_N, SLICES,
        )  # fmt: skip
    store_part(acc, partial, part, k, there, channel, known, filters, channels)


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
    dweight: Tensor,
    addend_stride: int,
    *,
    config: Config | None = None,
    parts: int | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes both gradients of a 1x1 convolution, its input's behind a block's ReLU, and its sums.

    Args:
        dz: gradient behind the BatchNorm [N, K, H, W], bfloat16 or float16. What is not `readable`
            is copied first, or out, raw and residual not `alike`.
        y: the convolution's raw output [N, K, H, W]; None: dz is the gradient of that itself.
        coefficients: [3, K] float32 A, B, C; given with y.
        weight: [K, C, 1, 1], dtype of dz.
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        out: the block's output, which the convolution read [N, C, H, W].
        raw: its last raw output [N, C, H, W].
        norm: [4, C] float32 of its BatchNorm.
        residual: the raw output of its projection [N, C, H, W], or None.
        residual_norm: [4, C] float32; given with residual.
        dx: [N, C, H, W], any layout without overlaps; overwritten, as are sums and dweight.
        sums: [2, C] float32, with residual [3, C], contiguous.
        dweight: [K, C, 1, 1], dtype of dz or float32, any strides without overlaps.
        addend_stride: the addend belongs to every addend_stride-th row and column.
        config: configuration to use instead of the chosen one.
        parts: programs that share the pixels, instead of as many as the GPU holds at one time.
        allowed: names of the configurations to choose among; None for all.

    Raises:
        LookupError: no configuration takes the shape; see `serves`.
    """
    if dz.numel() == 0:
        dx.zero_()
        sums.zero_()
        dweight.zero_()
        return
    (n, channels, height, width), filters = out.shape, dz.shape[1]
    config = config or chosen(dz, channels, allowed)
    dz, weight, target = readable(dz), readable(weight), writable(dx)
    result, more = (dz if t is None else readable(t) for t in (y, addend))
    out, raw, other = alike(out, raw, raw if residual is None else residual)
    vectors, own = (sums if t is None else t.contiguous() for t in (coefficients, residual_norm))
    pixels = n * height * width
    most, across = programs(pixels, channels, config, _limits.limits(dz.device))
    parts = parts or most
    empty = functools.partial(torch.empty, dtype=torch.float32, device=dz.device)
    workspace = empty((_tiles.cdiv(pixels, PIXELS), len(sums), channels))
    partial = empty((parts, filters, channels))
    with on_device(dx):
        traceable(conv_bn_grad1x1_end_kernel, dx)[(parts * across,)](
            dz, result, vectors, weight, more, out, raw, norm.contiguous(), other, own, target,
            workspace, partial, pixels, height, width, channels, filters, parts, *steps(dz),
            *steps(result), weight.stride(0), addend_stride, *steps(more), *steps(out),
            *steps(target), AFFINE=y is not None, HAS_ADDEND=addend is not None,
            PROJECTED=residual is not None,
            WIDE=not fits_32_bits(dz, result, more, out, raw, other, target),
            PRECISION=precision(dz.dtype), BLOCK_M=PIXELS, BLOCK_N=config.channels,
            BLOCK_K=config.filters, SLICES=config.slices, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        merge(partial, dweight)
        merge_sums(workspace, sums)
        if target is not dx:
            dx.copy_(target)


def chosen(dz: Tensor, channels: int, allowed: frozenset[str] | None) -> Config:
    """The configuration of a call.

    Raises:
        LookupError: there is none.
    """
    filters = dz.shape[1]
    config = serves(filters, channels, dz.element_size(), _limits.limits(dz.device), allowed)
    if config is None:
        raise LookupError(f"no configuration for {filters} filters and {channels} channels")
    return config
