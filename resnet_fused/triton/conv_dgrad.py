"""`conv_dgrad` in Triton: the gradient of the input, ReLU's mask and BatchNorm's scale as it reads.

    dx = conv^T(scale * dz, weight),  dz = dy where y passed the ReLU, else 0

An implicit GEMM like the forward one, with output pixels and filters in the reduction, by phases of
the stride (`_dgrad`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cases import ConvCase
from . import _tiles
from ._dgrad import tile_sums
from ._gemm import finish, merge_kernel
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
from ._traffic import dgrad_product_of


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
    acc, part, _, image, h, w, inside, first, last = tile_sums(
        dy, y, weight, scale, pixels, height, width, out_height, out_width, channels, filters,
        group_in, group_out, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        dy_n, dy_h, dy_w, y_n, y_h, y_w, weight_k, weight_r, weight_s, R, S, STEP_R, STEP_S, SIDE,
        "mask" if MASKED else "scale", SPLITS, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip
    if SPLITS > 1:
        whole = (image.to(tl.int64) * height + h) * width + w
        sums = (part.to(tl.int64) * images * height * width + whole) * channels
        sums = partial + sums[:, None]
        finish(
            acc, scale, scale, sums, sums, inside, first, last, 1, 1, False, False, False, BLOCK_N,
            SLICES,
        )  # fmt: skip
    else:
        target = dx + (image * dx_n + h * dx_h + w * dx_w)[:, None]
        finish(
            acc, scale, scale, target, target, inside, first, last, dx_c, dx_c, False, False, False,
            BLOCK_N, SLICES,
        )  # fmt: skip


def product_of(dx: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> _tiles.Product:
    """The sizes from which the configuration is chosen; rows are those of one phase."""
    (n, channels, h, w), (filters, _, r, s) = dx.shape, weight.shape
    strides = stride[0], stride[1]
    case = ConvCase("", n, channels, h, w, filters, r, s, stride=strides, groups=groups)
    return dgrad_product_of(case, dx.element_size(), precision(dx.dtype))


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
