"""The raw ops of training's C++ passes, as launches: launch(*operands, *results, *options).

The device of the tensors decides whether the CPU's kernels run or a GPU's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Passes:
    """The C++ passes, each looked up once: the extension may be missing when this is imported."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch.ops.resnet_fused, name).default
        setattr(self, name, found)
        return found


passes = _Passes()


def bn_add_act(*arguments: Any) -> None:
    """`bn_add_act` into `out`."""
    *operands, out, offset, act = arguments
    passes.bn_add_act_out(*operands, offset, act == "relu", out)


def bn_add_act_backward(*arguments: Any) -> None:
    """`bn_add_act_backward` into `dz` and `sums`."""
    *operands, dz, sums, act = arguments
    passes.bn_add_act_backward_out(*operands, act == "relu", dz, sums)


def bn_backward_apply(*arguments: Any) -> None:
    """`bn_backward_apply` into `dy`."""
    passes.bn_backward_apply_out(*arguments)


def bn_act_pool(*arguments: Any) -> None:
    """`bn_act_pool` into `out` and `taps`."""
    y, norm, out, taps, *window = arguments
    passes.bn_act_pool_out(y, norm, *window, out, taps)


def bn_act_pool_backward(*arguments: Any) -> None:
    """`bn_act_pool_backward` into `dz` and `sums`."""
    dout, taps, y, norm, dz, sums, *window = arguments
    passes.bn_act_pool_backward_out(dout, taps, y, norm, *window, dz, sums)


def plain(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector as the C++ reads it: dense, float32 or float64."""
    if vector is None or vector.dtype in (torch.float32, torch.float64):
        return vector if vector is None else vector.contiguous()
    return vector.double().contiguous()


def bn_finalize(*arguments: Any) -> None:
    """`bn_finalize` into `norm`."""
    stats, total, gamma, beta, norm, count, eps = arguments
    passes.bn_finalize_out(stats, total, plain(gamma), plain(beta), count, eps, norm)


def bn_backward_finalize(*arguments: Any) -> None:
    """`bn_backward_finalize` into coefficients and both gradients."""
    *operands, coefficients, dgamma, dbeta, count, row, frozen = arguments
    results = (coefficients, dgamma, dbeta)
    passes.bn_backward_finalize_out(*operands, count, row, frozen, *results)


def bn_update_stats(
    stats: Tensor,
    total: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    count: int,
    momentum: float | None,
) -> None:
    """`bn_update_stats` on a GPU, in place; the kernel counts the batch, and nothing waits for it.

    Without a counter a `momentum` of None is 0, as in PyTorch: nothing is averaged.
    """
    tracked, factor = num_batches_tracked, momentum
    if tracked is None:
        factor = 0.0 if factor is None else factor
    elif tracked.dtype not in (torch.int64, torch.int32):
        tracked = tracked.long()
    mean, variance = plain(running_mean), plain(running_var)
    passes.bn_update_stats_out(stats, total, mean, variance, count, factor, tracked)
    written = ((running_mean, mean), (running_var, variance), (num_batches_tracked, tracked))
    for running, found in written:
        if running is not None and found is not None and running is not found:
            running.copy_(found)
