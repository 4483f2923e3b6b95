"""`bn_backward_finalize` in Triton: reductions become three values a channel, in float64."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._launch import on_device, traceable
from ._vectors import BLOCK, WARPS, elements_of


@triton.jit(do_not_specialize=["count", "row"])
def bn_backward_finalize_kernel(
    sums,  # [2 or 3, K] float32
    all_sums,  # [2 or 3, K] float32; sums where there is one rank
    total,  # [1] float64; unused without TOTAL
    norm,  # [4, K] float32: scale, shift, mean, invstd
    coefficients,  # [3, K] float32: A, B, C
    dgamma,  # [K] float32
    dbeta,  # [K] float32
    channels,
    count,
    row,  # of the sums that belongs to this BatchNorm
    TOTAL: tl.constexpr,
    FROZEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of channels: A = scale, B = -scale invstd S2 / m, C = -scale S1 / m - B mean."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < channels
    scale = tl.load(norm + channel, mask=known, other=0.0)
    invstd = tl.load(norm + 3 * channels + channel, mask=known, other=0.0).to(tl.float64)
    plain = tl.load(sums + channel, mask=known, other=0.0)
    centred = tl.load(sums + row * channels + channel, mask=known, other=0.0)
    tl.store(dgamma + channel, (invstd * centred.to(tl.float64)).to(tl.float32), mask=known)
    tl.store(dbeta + channel, plain, mask=known)
    tl.store(coefficients + channel, scale, mask=known)
    if FROZEN:
        b = tl.zeros((BLOCK,), tl.float64)
        c = b
    else:
        m = elements_of(count, total, TOTAL)
        a = scale.to(tl.float64)
        mean = tl.load(norm + 2 * channels + channel, mask=known, other=0.0).to(tl.float64)
        s1 = tl.load(all_sums + channel, mask=known, other=0.0).to(tl.float64)
        s2 = tl.load(all_sums + row * channels + channel, mask=known, other=0.0).to(tl.float64)
        # C of the rounded B, whose error then cancels in B (y - mean).
        b = (-a * invstd * (invstd * s2) / m).to(tl.float32).to(tl.float64)
        c = -a * s1 / m - b * mean
    tl.store(coefficients + channels + channel, b.to(tl.float32), mask=known)
    tl.store(coefficients + 2 * channels + channel, c.to(tl.float32), mask=known)


def launch(
    sums: Tensor,
    all_sums: Tensor | None,
    total: Tensor | None,
    norm: Tensor,
    coefficients: Tensor,
    dgamma: Tensor,
    dbeta: Tensor,
    count: int,
    row: int,
    frozen: bool,
) -> None:
    """Writes the coefficients of dy = A dz + B y + C, and the gradients of gamma and beta.

    Args:
        sums: [2 or 3, K] float32 of this rank; any strides.
        all_sums: the same over all ranks; None is this rank's.
        total: float64 [1], elements a channel over all ranks, in place of `count`; or None.
        norm: [4, K] float32 scale, shift, mean, invstd; contiguous.
        coefficients: [3, K] float32, contiguous; overwritten.
        dgamma: [K] float32, contiguous; overwritten.
        dbeta: [K] float32, contiguous; overwritten.
        count: elements a channel.
        row: of `sums` that belongs to this BatchNorm.
        frozen: the statistics were given: B = C = 0.
    """
    sums = sums.contiguous()
    everywhere = sums if all_sums is None else all_sums.contiguous()
    channels = sums.shape[1]
    with on_device(sums):
        traceable(bn_backward_finalize_kernel, sums)[(_tiles.cdiv(channels, BLOCK),)](
            sums, everywhere, sums if total is None else total, norm, coefficients, dgamma, dbeta,
            channels, count, row, TOTAL=total is not None, FROZEN=frozen, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
