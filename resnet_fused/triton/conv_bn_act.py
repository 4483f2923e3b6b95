"""`conv_bn_act` in Triton: implicit GEMM over NHWC, everything behind the convolution in its tail.

One program computes a tile of pixels x output channels (see `_implicit`), keeps the sums in
float32, and applies scale, shift, shortcut and ReLU before it stores once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _limits, _tiles
from ._dependent import ALONE, Flow, prefetched
from ._gemm import finish, merge_kernel
from ._implicit import constants, product_of, sizes, tile_sums
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
    REVERSE: tl.constexpr = False,  # type: ignore[bad-function-definition]
    PDL: tl.constexpr = False,  # type: ignore[bad-function-definition]
    PREFETCH: tl.constexpr = 0,  # type: ignore[bad-function-definition]
    residual_factor=None,
    out_factor=None,
):
    """One tile of the output, or with SPLITS > 1 of one part's sums."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    acc, _, part, pixel, inside, image, p, q, first_filter, first_member, last_filter = tile_sums(
        x, weight, scale, shift, pixels, height, width, out_height, out_width, channels, filters,
        group_in, group_out, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        x_n, x_h, x_w, weight_k, weight_r, weight_s, R, S, SIDE, NARROW, FLAT, CHECKED, EVEN,
        SPLITS, False, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, REVERSE, PDL, PREFETCH,
    )  # fmt: skip
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
            True, HAS_RESIDUAL, RELU, BLOCK_N, SLICES, residual_factor, out_factor,
        )  # fmt: skip


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
    reverse: bool = False,
    flow: Flow = ALONE,
    factors: tuple[float, float] | None = None,
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
        reverse: whether the last pixels come first; the result is the same.
        flow: how the launch stands among those around it.
        factors: of `conv_bn_act_fp8` alone: what the residual and the result are multiplied with.
    """
    if out.numel() == 0:
        return
    product = product_of(x, weight, out, groups)
    call = call_of("conv_bn_act", x, weight, residual, stride, padding, dilation, groups)
    plan = plan or plan_of(product, x.device, allowed, None if factors else call)
    x, weight = readable(x), readable(weight)
    target = writable(out)
    filters, p, q = out.shape[1:]
    tile, pixels = plan.tile, product.rows
    partial = target
    if plan.splits > 1:
        partial = torch.empty(plan.splits, pixels, filters, dtype=torch.float32, device=x.device)
    shortcut = target if residual is None else readable(residual)
    wide = not fits_32_bits(x, weight, target, shortcut)
    tiles_n = _tiles.cdiv(product.columns, tile.n) * product.copies
    flags = _flags(residual, act, wide, factors)
    programs = _tiles.cdiv(pixels, tile.m) * tiles_n * plan.splits
    with on_device(out):
        traceable(conv_bn_act_kernel, out)[(programs,)](
            x, weight, scale, shift, shortcut, target, partial,
            *sizes(x, weight, out, stride, padding, dilation, groups),
            *shortcut.stride(), *target.stride(),
            **constants(product, plan, weight, padding, groups), **flags,
            **({"REVERSE": True} if reverse else {}), **flow.options(),
            **prefetched(flow, programs, _limits.limits(x.device), weight),
        )  # fmt: skip
        if plan.splits > 1:
            rows, columns = MERGE_TILE
            if out.element_size() == 1:
                columns *= 2  # so that a thread still stores 16 bytes
            grid = (_tiles.cdiv(pixels, rows), _tiles.cdiv(filters, columns))
            traceable(merge_kernel, out)[grid](
                partial, scale, shift, shortcut, target, pixels, p, q, filters,
                *shortcut.stride(), *target.stride(),
                SPLITS=plan.splits, AFFINE=True, BLOCK_M=rows, BLOCK_N=columns,
                **flags, **flow.then().options(),
            )  # fmt: skip
        if target is not out:
            out.copy_(target)


def _flags(
    residual: Tensor | None, act: str, wide: bool, factors: tuple[float, float] | None
) -> dict[str, Any]:
    """What the epilogues of both kernels are told."""
    found: dict[str, Any] = {"HAS_RESIDUAL": residual is not None, "RELU": act == "relu"}
    if factors is not None:
        found |= {"residual_factor": factors[0], "out_factor": factors[1]}
    return {**found, "WIDE": wide}
