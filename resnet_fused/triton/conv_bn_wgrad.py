"""`conv_bn_wgrad` in Triton: the gradient of the weights, both factors made as they are read.

    dweight = sum over pixels of dy h,  dy = A dz + B y + C,  h = relu(scale * x + shift)

`conv_wgrad`'s product. What BatchNorm's backward and the layer below contribute costs arithmetic in
registers and no pass over memory; A, B, C, scale and shift are constant along a tile's pixels and
loaded once. The sums stay in float32 until they are stored in the parameter's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _limits, _tiles, conv_wgrad
from ._launch import (
    MOST_REGISTERS,
    call_of,
    fits_32_bits,
    most_registers,
    on_device,
    plan_of,
    readable,
    traceable,
)
from ._wgrad import MERGE_BLOCK, weight_sums, wgrad_merge_kernel


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_bn_wgrad_kernel(
    dz,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent; unused without AFFINE
    coefficients,  # [3, K] float32 A, B, C; unused without AFFINE
    x,  # [N, C, H, W], channels adjacent
    norm,  # [4, C] float32 scale, shift, mean, invstd; unused without NORM
    dweight,  # [K, C / groups, R, S], any strides
    partial,  # [SPLITS, K, R, S, C / groups] float32; unused without splits
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
    dz_n,
    dz_h,
    dz_w,
    y_n,
    y_h,
    y_w,
    x_n,
    x_h,
    x_w,
    dweight_k,
    dweight_c,
    dweight_r,
    dweight_s,
    R: tl.constexpr,
    S: tl.constexpr,
    SIDE: tl.constexpr,
    NARROW: tl.constexpr,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [filters, channels] of one tap's gradient, or with SPLITS > 1 of one part's sums."""
    acc, part, k, _, r, s, own, stored = weight_sums(
        dz, y, coefficients, x, norm, pixels, height, width, out_height, out_width, channels,
        filters, group_in, group_out, stride_h, stride_w, padding_h, padding_w, dilation_h,
        dilation_w, dz_n, dz_h, dz_w, y_n, y_h, y_w, x_n, x_h, x_w, R, S, SIDE, NARROW, False,
        AFFINE, NORM, SPLITS, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        row = ((part.to(tl.int64) * filters + k) * R + r) * S
        place = (row[:, None] + s[None, :] if NARROW else row[:, None] + s) * group_in
        tl.store(partial + place + own[None, :], acc, mask=stored)
    else:
        index: tl.constexpr = tl.int64 if WIDE else tl.int32
        row = k.to(index) * dweight_k + r * dweight_r
        side_place = s * dweight_s + own * dweight_c
        target = dweight + row[:, None] + side_place[None, :]
        tl.store(target, acc.to(dweight.dtype.element_ty), mask=stored)


def product_of(dz: Tensor, dweight: Tensor, groups: int) -> _tiles.Product:
    """The sizes from which the configuration is chosen: those of `conv_wgrad`."""
    return conv_wgrad.product_of(dz, dweight, groups)


def offered(
    product: _tiles.Product,
    affine: bool,
    below: bool,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None = None,
) -> frozenset[str] | None:
    """Names of the configurations to choose among; None for all.

    Args:
        product: the sizes.
        affine: whether dz is read through BatchNorm's backward: beside its arithmetic 64 sums a
            thread do not spill.
        below: whether x is read through a BatchNorm and ReLU. A tile's columns are then made in
            registers like its rows, and up to 16 a warp do not spill. Three-term products go
            through shared memory once more, beside what is in flight.
        limits: the GPU's.
        allowed: names to choose among before that; None for all.
    """
    if not affine and not below:
        return allowed
    again = product.step * product.itemsize if below and product.precision == "tf32x3" else 0
    return frozenset(
        tile.name
        for tile in _tiles.TILES
        if (allowed is None or tile.name in allowed)
        and not (affine and tile.sums > 64)
        and not (below and tile.n > 16 * tile.warps)
        and _tiles.shared_memory(product, tile) + tile.n * again <= limits.shared_memory
    )


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    dweight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes the gradient of a convolution's weights between two BatchNorms into `dweight`.

    Args:
        dz: gradient behind the BatchNorm [N, K, P, Q], float32, bfloat16 or float16. Copied to
            channels_last first if its channels are not adjacent, or its pixels not aligned to 16
            bytes where their channels divide so; as are y and x.
        y: the convolution's raw output [N, K, P, Q]; None: dz is the gradient of that itself.
        coefficients: [3, K] float32 A, B, C, dense; given with y.
        x: what the convolution read [N, C, H, W], or with `norm` the raw output below.
        norm: [4, C] float32 of the BatchNorm below, dense; None reads x as it is.
        dweight: [K, C / groups, R, S], dtype of dz or float32, any layout without overlaps;
            overwritten.
        stride: (vertical, horizontal), as padding and dilation.
        padding: see stride.
        dilation: see stride.
        groups: of channels.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
    """
    if dz.numel() == 0:
        dweight.zero_()
        return
    product = product_of(dz, dweight, groups)
    limits = _limits.limits(dz.device)
    if plan is None:
        call = call_of("conv_bn_wgrad", x, dweight, y, stride, padding, dilation, groups)
        names = offered(product, y is not None, norm is not None, limits, allowed)
        plan = plan_of(product, dz.device, names, call)
    dz, x = readable(dz), readable(x)
    raw = dz if y is None else readable(y)
    affine = dz if coefficients is None else coefficients
    below = dz if norm is None else norm
    filters, group_in, r, s = dweight.shape
    tile = plan.tile
    narrow = _tiles.is_narrow(product.side * group_in, s)
    partial = dweight
    if plan.splits > 1:
        shape = (plan.splits, filters, r, s, group_in)
        partial = torch.empty(shape, dtype=torch.float32, device=dz.device)
    tiles = _tiles.cdiv(product.rows, tile.m) * _tiles.cdiv(product.columns, tile.n)
    # There ptxas would make room for a third block, though the chooser counts on two. Elsewhere it
    # does not, and told the number of registers it would spill.
    spills = product.itemsize == 2 and limits.capability < 90
    with on_device(dweight):
        traceable(conv_bn_wgrad_kernel, dweight)[(tiles * product.copies * plan.splits,)](
            dz, raw, affine, x, below, dweight, partial,
            product.depth, x.shape[2], x.shape[3], dz.shape[2], dz.shape[3], x.shape[1],
            filters, group_in, filters // groups, stride[0], stride[1], padding[0], padding[1],
            dilation[0], dilation[1], dz.stride(0), dz.stride(2), dz.stride(3),
            raw.stride(0), raw.stride(2), raw.stride(3),
            x.stride(0), x.stride(2), x.stride(3), *dweight.stride(),
            R=r, S=s, SIDE=product.side, NARROW=narrow, AFFINE=coefficients is not None,
            NORM=norm is not None, SPLITS=plan.splits,
            WIDE=not fits_32_bits(dz, raw, x, dweight), PRECISION=product.precision,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=product.step, num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=MOST_REGISTERS if spills else None,
        )  # fmt: skip
        if plan.splits > 1:
            count = dweight.numel()
            traceable(wgrad_merge_kernel, dweight)[(_tiles.cdiv(count, MERGE_BLOCK),)](
                partial, partial, dweight, count, group_in, *dweight.stride(), R=r, S=s,
                SCALED=False, SPLITS=plan.splits, BLOCK=MERGE_BLOCK,
                maxnreg=most_registers(dz.device),
            )  # fmt: skip
