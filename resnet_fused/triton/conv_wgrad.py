"""`conv_wgrad` in Triton: the gradient of the weights, ReLU's mask as it reads, scale as it writes.

    dweight[k] = scale[k] * sum over pixels of dz[k] x,  dz = dy where y passed the ReLU, else 0

A product [K, pixels] x [pixels, C] for each tap. The reduction, all output pixels of the batch, is
long and the result small: it is cut into parts whose float32 sums a second kernel adds in a fixed
order. Narrow groups stand side by side; what belongs to two different groups is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _limits, _tiles
from ._launch import (
    MOST_REGISTERS,
    call_of,
    fits_32_bits,
    most_registers,
    on_device,
    plan_of,
    precision,
    readable,
    traceable,
)
from ._wgrad import MERGE_BLOCK, weight_sums, wgrad_merge_kernel


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_wgrad_kernel(
    dy,  # [N, K, P, Q], channels adjacent
    y,  # [N, K, P, Q], channels adjacent; unused without MASKED
    x,  # [N, C, H, W], channels adjacent
    scale,  # [K] float32
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
    dy_n,
    dy_h,
    dy_w,
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
    MASKED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [filters, channels] of one tap's gradient, or with SPLITS > 1 of one part's sums."""
    acc, part, k, known, r, s, own, stored = weight_sums(
        dy, y, scale, x, scale, pixels, height, width, out_height, out_width, channels, filters,
        group_in, group_out, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        dy_n, dy_h, dy_w, y_n, y_h, y_w, x_n, x_h, x_w, R, S, SIDE, NARROW, MASKED, False, False,
        SPLITS, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        row = ((part.to(tl.int64) * filters + k) * R + r) * S
        place = (row[:, None] + s[None, :] if NARROW else row[:, None] + s) * group_in
        tl.store(partial + place + own[None, :], acc, mask=stored)
    else:
        factor = tl.load(scale + k, mask=known, other=0.0)
        index: tl.constexpr = tl.int64 if WIDE else tl.int32
        row = k.to(index) * dweight_k + r * dweight_r
        side_place = s * dweight_s + own * dweight_c
        target = dweight + row[:, None] + side_place[None, :]
        value = acc * factor[:, None]
        tl.store(target, value.to(dweight.dtype.element_ty), mask=stored)


def product_of(dy: Tensor, dweight: Tensor, groups: int) -> _tiles.Product:
    """The sizes from which the configuration is chosen."""
    filters, group_in, r, s = dweight.shape
    side = _tiles.side_by_side(group_in, groups)
    narrow = _tiles.is_narrow(side * group_in, s)
    return _tiles.Product(
        rows=side * (filters // groups),
        columns=side * group_in * (s if narrow else 1),
        copies=_tiles.cdiv(groups, side) * (r if narrow else r * s),
        depth=dy.shape[0] * dy.shape[2] * dy.shape[3],
        taps=1,
        itemsize=dy.element_size(),
        side=side,
        precision=precision(dy.dtype),
        gathered=2,
        ragged=_tiles.is_ragged(dy.element_size(), group_in * groups, filters),
    )


def launch(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    scale: Tensor,
    dweight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
) -> None:
    """Writes the gradient of a frozen conv-BN(-ReLU)'s weights into `dweight`.

    Args:
        dy: gradient of the result [N, K, P, Q], float32, bfloat16 or float16. Copied to
            channels_last first if its channels are not adjacent, or its pixels not aligned to 16
            bytes where their channels divide so; as are y and x.
        y: the result [N, K, P, Q], for ReLU's mask; None without ReLU.
        x: the layer's input [N, C, H, W].
        scale: [K] float32.
        dweight: [K, C / groups, R, S], any layout without overlaps; overwritten.
        stride: (vertical, horizontal), as padding and dilation.
        padding: see stride.
        dilation: see stride.
        groups: of channels.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
    """
    if dy.numel() == 0:
        dweight.zero_()
        return
    product = product_of(dy, dweight, groups)
    call = call_of("conv_wgrad", x, dweight, y, stride, padding, dilation, groups)
    plan = plan or plan_of(product, dy.device, allowed, call)
    dy, x = readable(dy), readable(x)
    result = dy if y is None else readable(y)
    filters, group_in, r, s = dweight.shape
    tile = plan.tile
    narrow = _tiles.is_narrow(product.side * group_in, s)
    partial = dweight
    if plan.splits > 1:
        shape = (plan.splits, filters, r, s, group_in)
        partial = torch.empty(shape, dtype=torch.float32, device=dy.device)
    tiles = _tiles.cdiv(product.rows, tile.m) * _tiles.cdiv(product.columns, tile.n)
    # There ptxas would make room for a third block, though the chooser counts on two. Elsewhere it
    # does not, and told the number of registers it would spill.
    spills = product.itemsize == 2 and _limits.limits(dy.device).capability < 90
    with on_device(dweight):
        traceable(conv_wgrad_kernel, dweight)[(tiles * product.copies * plan.splits,)](
            dy, result, x, scale, dweight, partial,
            product.depth, x.shape[2], x.shape[3], dy.shape[2], dy.shape[3], x.shape[1],
            filters, group_in, filters // groups, stride[0], stride[1], padding[0], padding[1],
            dilation[0], dilation[1], dy.stride(0), dy.stride(2), dy.stride(3),
            result.stride(0), result.stride(2), result.stride(3),
            x.stride(0), x.stride(2), x.stride(3), *dweight.stride(),
            R=r, S=s, SIDE=product.side, NARROW=narrow, MASKED=y is not None,
            SPLITS=plan.splits, WIDE=not fits_32_bits(dy, result, x, dweight),
            PRECISION=product.precision, BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_K=product.step, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=MOST_REGISTERS if spills else None,
        )  # fmt: skip
        if plan.splits > 1:
            count = dweight.numel()
            traceable(wgrad_merge_kernel, dweight)[(_tiles.cdiv(count, MERGE_BLOCK),)](
                partial, scale, dweight, count, group_in, *dweight.stride(), R=r, S=s,
                SCALED=True, SPLITS=plan.splits, BLOCK=MERGE_BLOCK,
                maxnreg=most_registers(dy.device),
            )  # fmt: skip
