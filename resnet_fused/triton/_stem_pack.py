"""How `stem` has its filters: packed as the tiles of the image meet them."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _stem_tiles
from ._launch import on_device, traceable
from ._tiles import cdiv

PACKED = 32
"""Channels of a program that packs filters."""


@triton.jit
def lane_of(LANES: tl.constexpr, SHIFT: tl.constexpr, C: tl.constexpr):
    """Of each element of a filter row's run: its place, its tap and its channel; [LANES] each."""
    lane = tl.arange(0, LANES)
    before: tl.constexpr = (SHIFT + C - 1) // C
    run = lane + (before * C - SHIFT)  # never negative, so that / and % round down
    return lane, run // C - before, run % C


@triton.jit
def pack_kernel(
    weight,  # [K, C, R, S], any strides
    packed,  # [R, LANES, 2 K], contiguous
    filters,
    w_k,
    w_c,
    w_r,
    w_s,
    S: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    LANES: tl.constexpr,
    SHIFT: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The filters as the tiles of the image meet them, zero where a tile holds more than a window.

    Column 2 k is output channel k for the even column of the convolution, 2 k + 1 for the odd one.
    """
    r = tl.program_id(0)
    lane, tap, c = lane_of(LANES, SHIFT, C)
    n = tl.program_id(1) * 2 * CHANNELS + tl.arange(0, 2 * CHANNELS)
    s = tap[:, None] - (n % 2)[None, :] * STRIDE
    known = (n < 2 * filters)[None, :]
    offset = (n // 2 * w_k)[None, :] + (c * w_c + r * w_r)[:, None] + s * w_s
    values = tl.load(weight + offset, mask=(s >= 0) & (s < S) & known, other=0.0)
    target = packed + ((r * LANES + lane) * 2 * filters)[:, None] + n[None, :]
    tl.store(target, values, mask=known & (lane >= 0)[:, None])


def layout(weight: Tensor, stride: Sequence[int], sizes: _stem_tiles.Sizes) -> dict[str, int]:
    """How a filter's row lies in a tile, for both kernels."""
    return {"S": weight.shape[3], "C": weight.shape[1], "STRIDE": stride[1],
            "LANES": sizes.lanes, "SHIFT": sizes.shift}  # fmt: skip


def pack(weight: Tensor, stride: Sequence[int], sizes: _stem_tiles.Sizes) -> Tensor:
    """The filters as the kernel reads them; see `pack_kernel`."""
    filters, _, r, _ = weight.shape
    packed = weight.new_empty((r, sizes.lanes, 2 * filters))
    with on_device(weight):
        traceable(pack_kernel, weight)[(r, cdiv(filters, PACKED))](
            weight, packed, filters, *weight.stride(), **layout(weight, stride, sizes),
            CHANNELS=PACKED, num_warps=4,
        )  # fmt: skip
    return packed
