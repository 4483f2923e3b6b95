"""The raw ops of training's C++ passes, as launches: launch(*operands, *results, *options).

The device of the tensors decides whether the CPU's kernels run or a GPU's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Running(NamedTuple):
    """Running statistics as a GPU's kernels take them.

    Attributes:
        given: mean, variance and number of batches, as the user holds them; None for absent ones.
        tensors: the same, as the kernels update them in place.
        factor: of this batch; None where it is 1 / the number of batches.
    """

    given: tuple[Tensor | None, Tensor | None, Tensor | None]
    tensors: tuple[Tensor | None, Tensor | None, Tensor | None]
    factor: float | None

    @classmethod
    def of(
        cls,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
    ) -> Running:
        """Copies what is of another dtype; `write_back` brings that back."""
        given = (running_mean, running_var, num_batches_tracked)
        tracked, factor = num_batches_tracked, momentum
        if tracked is None:
            # Without a counter PyTorch's factor is 0: nothing is averaged.
            factor = 0.0 if factor is None else factor
        elif tracked.dtype not in (torch.int64, torch.int32):
            tracked = tracked.long()
        return cls(given, (plain(running_mean), plain(running_var), tracked), factor)

    def write_back(self) -> None:
        """Behind the kernel, into what was copied."""
        for running, found in zip(self.given, self.tensors, strict=True):
            if running is not None and found is not None and running is not found:
                running.copy_(found)


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
    read = Running.of(running_mean, running_var, num_batches_tracked, momentum)
    mean, variance, tracked = read.tensors
    passes.bn_update_stats_out(stats, total, mean, variance, count, read.factor, tracked)
    read.write_back()
