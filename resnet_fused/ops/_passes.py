"""The raw ops of training's C++ passes, as launches: launch(*operands, *results, *options).

The device of the tensors decides whether the CPU's kernels run or a GPU's.
"""

from __future__ import annotations

from typing import Any

import torch


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
