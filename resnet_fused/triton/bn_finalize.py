"""`bn_finalize` in Triton: a batch's statistics become scale and shift, in float64."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._launch import on_device, traceable
from ._vectors import BLOCK, WARPS, elements_of, joined, parts_of, step


@triton.jit(do_not_specialize=["count"])
def bn_finalize_kernel(
    stats,  # [2, K] float32: mean, M2
    total,  # [1] float64; unused without TOTAL
    gamma,  # [K]; unused without GAMMA
    beta,  # [K]; unused without BETA
    norm,  # [4, K] float32: scale, shift, mean, invstd
    channels,
    gamma_k,
    beta_k,
    count,
    eps_high,
    eps_middle,
    eps_low,
    TOTAL: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of channels: scale = gamma / sqrt(M2 / m + eps), shift = beta - mean * scale."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < channels
    mean = tl.load(stats + channel, mask=known, other=0.0)
    m2 = tl.load(stats + channels + channel, mask=known, other=0.0).to(tl.float64)
    variance = m2 / elements_of(count, total, TOTAL)
    invstd = 1.0 / tl.sqrt(variance + joined(eps_high, eps_middle, eps_low))
    scale = invstd
    if GAMMA:
        scale *= tl.load(gamma + channel * gamma_k, mask=known, other=0.0).to(tl.float64)
    # The shift is made of the rounded scale: its error then cancels in scale * (y - mean).
    rounded = scale.to(tl.float32)
    shift = -mean.to(tl.float64) * rounded.to(tl.float64)
    if BETA:
        shift += tl.load(beta + channel * beta_k, mask=known, other=0.0).to(tl.float64)
    tl.store(norm + channel, rounded, mask=known)
    tl.store(norm + channels + channel, shift.to(tl.float32), mask=known)
    tl.store(norm + 2 * channels + channel, mean, mask=known)
    tl.store(norm + 3 * channels + channel, invstd.to(tl.float32), mask=known)


def launch(
    stats: Tensor,
    total: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    norm: Tensor,
    count: int,
    eps: float,
) -> None:
    """Writes scale, shift, mean and invstd into `norm`.

    Args:
        stats: [2, K] float32 mean and M2, contiguous.
        total: float64 [1], elements a channel over all ranks, in place of `count`; or None.
        gamma: [K] of any floating dtype and stride; None is 1.
        beta: [K], likewise; None is 0.
        norm: [4, K] float32, contiguous; overwritten.
        count: elements a channel.
        eps: added to the variance.
    """
    channels = stats.shape[1]
    with on_device(stats):
        traceable(bn_finalize_kernel, stats)[(_tiles.cdiv(channels, BLOCK),)](
            stats, stats if total is None else total, stats if gamma is None else gamma,
            stats if beta is None else beta, norm, channels, step(gamma), step(beta),
            count, *parts_of(eps), TOTAL=total is not None, GAMMA=gamma is not None,
            BETA=beta is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
