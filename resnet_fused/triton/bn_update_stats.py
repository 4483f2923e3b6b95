"""`bn_update_stats` in Triton: the running mean and variance, in place, in float64.

One program takes all channels: it alone counts the batch, and averages with the number it counted.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device, traceable
from ._vectors import elements_of, joined, parts_of

BLOCK = 1024
WARPS = 8


@triton.jit(do_not_specialize=["count"])
def bn_update_stats_kernel(
    stats,  # [2, K] float32: mean, M2
    total,  # [1] float64; unused without TOTAL
    running_mean,  # [K]
    running_var,  # [K]
    tracked,  # [] integer; unused without TRACKED
    channels,
    mean_k,
    var_k,
    count,
    momentum_high,
    momentum_middle,
    momentum_low,
    TOTAL: tl.constexpr,
    TRACKED: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes it (1 - f) running + f batch, with the unbiased variance M2 / (m - 1)."""
    factor = joined(momentum_high, momentum_middle, momentum_low)
    if TRACKED:
        # Atomic for its broadcast: one thread counts, and all get the number.
        before = tl.atomic_add(tracked, 1)
        if CUMULATIVE:
            factor = 1.0 / (before + 1).to(tl.float64)
    elements = tl.load(total) if TOTAL else elements_of(count, total, TOTAL)
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        known = channel < channels
        mean = tl.load(stats + channel, mask=known, other=0.0).to(tl.float64)
        m2 = tl.load(stats + channels + channel, mask=known, other=0.0).to(tl.float64)
        place, spread = running_mean + channel * mean_k, running_var + channel * var_k
        kept_mean = tl.load(place, mask=known, other=0.0).to(tl.float64)
        kept_var = tl.load(spread, mask=known, other=0.0).to(tl.float64)
        variance = m2 / (elements - 1.0)
        if TOTAL:  # all ranks may be empty
            mean = tl.where(elements > 0.0, mean, kept_mean)
            variance = tl.where(elements > 0.0, variance, kept_var)
        mean = (1.0 - factor) * kept_mean + factor * mean
        variance = (1.0 - factor) * kept_var + factor * variance
        tl.store(place, mean.to(running_mean.dtype.element_ty), mask=known)
        tl.store(spread, variance.to(running_var.dtype.element_ty), mask=known)


def launch(
    stats: Tensor,
    total: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    count: int,
    momentum: float | None,
) -> None:
    """Takes a batch's statistics into the running ones.

    Args:
        stats: [2, K] float32 mean and M2, contiguous.
        total: float64 [1], elements a channel over all ranks, in place of `count`; or None.
        running_mean: [K] of any floating dtype and stride; overwritten.
        running_var: [K], likewise.
        num_batches_tracked: int64 or int32 [], counted up by one; or None.
        count: elements a channel; 0 leaves both as they are.
        momentum: f; None is 1 / num_batches_tracked, or 0 where that is None.
    """
    if total is None and count == 0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return
    tracked = stats if num_batches_tracked is None else num_batches_tracked
    with on_device(stats):
        traceable(bn_update_stats_kernel, stats)[(1,)](
            stats, stats if total is None else total, running_mean, running_var, tracked,
            stats.shape[1], running_mean.stride(0), running_var.stride(0), count,
            *parts_of(0.0 if momentum is None else momentum), TOTAL=total is not None,
            TRACKED=num_batches_tracked is not None, CUMULATIVE=momentum is None, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
