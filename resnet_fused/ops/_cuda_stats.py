"""The CUDA kernel of `conv_bn_stats` as an implementation of its op.

What a launch takes of it is planned as the other convolutions' is, see `_cuda_plan`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _cuda_plan
from ._library import overload

OP = "conv_bn_stats"
CHECKS = "_cuda_stats_checks"


def problem_of(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    y: Tensor,
    geometry: Sequence[Any],
    *,
    real: bool = True,
) -> _cuda_plan.Problem:
    """The problem that the kernel is given: x and weight are copied where that is worth it.

    Args:
        x: [N, C, H, W].
        norm: [4, C], or None.
        weight: [K, C/groups, R, S].
        y: [N, K, P, Q], or a tensor like it.
        geometry: stride, padding, dilation, groups.
        real: False makes no copies, but what a plan takes for them.
    """
    stride, padding, dilation, groups = geometry
    adjacent = _cuda_plan.adjacent if real else _cuda_plan.adjacent_like
    operands = adjacent(x, x.shape[1] // groups), norm, adjacent(weight, weight.shape[1])
    options = (list(stride), list(padding), list(dilation), groups)
    call = (x.dtype, x.shape, weight.shape, tuple(geometry), norm is not None)
    return _cuda_plan.Problem(OP, operands, (*options, _cuda_plan.tf32()), y, call=call)


def launch(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    y: Tensor,
    stats: Tensor,
    *geometry: Any,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes the convolution into `y`, and its mean and M2 into `stats`.

    What no configuration takes, filters of more than 15 taps along an axis or a single image beyond
    what a launch can count, is computed by plain PyTorch, with a warning.

    Args:
        x: [N, C, H, W].
        norm: [4, C] float32, contiguous, or None.
        weight: [K, C/groups, R, S].
        y: [N, K, P, Q], any layout.
        stats: [2, K] float32, contiguous.
        geometry: stride, padding, dilation, groups.
        wish: a configuration and splits in place of a choice among the admitted ones.

    Raises:
        LookupError: the admitted configurations do not take it, though others would.
        RuntimeError: the launch failed, or refused the wish.
    """
    if not y.numel():
        stats.zero_()
        return
    made = problem_of(x, norm, weight, y, geometry)
    ordinary = max(weight.shape[2:]) <= _cuda_plan.MOST_TAPS
    ordinary = ordinary and _cuda_plan.ordinary(x, weight, y, geometry=geometry)
    if wish is None and not ordinary:
        found = _cuda_plan.plan(made, _cuda_plan.gpu(y.device))
        if found.configuration < 0:
            warnings.warn(f"{OP}.cuda: {found.why}; plain PyTorch computes it", stacklevel=2)
            result, measured = overload(OP, "reference")(x, norm, weight, *geometry)
            y.copy_(result)
            stats.copy_(measured)
            return
    _cuda_plan.raw(OP, "out")(
        *made.operands, *made.geometry, *(wish or _cuda_plan.wanted(made)), y, stats
    )
