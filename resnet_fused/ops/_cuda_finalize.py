"""The CUDA kernels of `conv_bn_stats`, which finalize as they end: `conv_bn_stats_finalize`.

Plans and configurations are those of `conv_bn_stats`; admission knows them by this op's name.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from . import _admitted, _cuda_plan, _cuda_stats, _passes
from ._finalize import OP
from ._library import overload

CHECKS = "_cuda_finalize_checks"


def problem_of(*given: Any, **how: Any) -> _cuda_plan.Problem:
    """As `_cuda_stats.problem_of`, under this op's name."""
    return _cuda_stats.problem_of(*given, **how)._replace(op=OP)


def _wanted(made: _cuda_plan.Problem) -> tuple[int, int]:
    """Configuration and splits to ask for; what tuning found of `conv_bn_stats` counts here."""
    device = made.out.device
    one = _cuda_plan.tuned(made._replace(op=_cuda_stats.OP), device)
    if one is not None:
        names = _admitted.names(OP, "cuda", device)
        if names is None or one.name in names:
            return one.configuration, one.splits
    return _cuda_plan.wanted(made)


def _unplanned(made: _cuda_plan.Problem, geometry: Any) -> str | None:
    """Why no configuration takes sizes that are out of the ordinary, or None."""
    x, _, weight = made.operands
    assert x is not None
    assert weight is not None
    ordinary = max(weight.shape[2:]) <= _cuda_plan.MOST_TAPS
    if ordinary and _cuda_plan.ordinary(x, weight, made.out, geometry=geometry):
        return None
    found = _cuda_plan.plan(made, _cuda_plan.gpu(made.out.device))
    return found.why if found.configuration < 0 else None


def launch(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    y: Tensor,
    stats: Tensor,
    rows: Tensor,
    kept: Tensor,
    *options: Any,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes the convolution into `y`, mean and M2 into `stats`, scale and shift into `rows`.

    What no configuration takes is computed by plain PyTorch, with a warning.

    Args:
        x: [N, C, H, W].
        norm: [4, C] float32, contiguous, or None.
        weight: [K, C/groups, R, S].
        gamma: [K], or None.
        beta: [K], or None.
        running_mean: [K], in place, or None.
        running_var: [K], likewise.
        num_batches_tracked: integer [], in place, or None.
        y: [N, K, P, Q], any layout.
        stats: [2, K] float32, contiguous.
        rows: [4, K] float32, contiguous: scale, shift, mean, invstd.
        kept: [2, K] float64, contiguous: the running statistics as they were.
        options: stride, padding, dilation, groups, eps, momentum.
        wish: a configuration and splits in place of a choice among the admitted ones.

    Raises:
        LookupError: the admitted configurations do not take it, though others would.
        RuntimeError: the launch failed, or refused the wish.
    """
    *geometry, eps, momentum = options
    made = problem_of(x, norm, weight, y, geometry)
    empty = not y.numel() or not weight.numel()
    why = None if empty or wish is not None else _unplanned(made, geometry)
    if empty or why is not None:
        if why is not None:
            warnings.warn(f"{OP}.cuda: {why}; plain PyTorch computes it", stacklevel=2)
        running = (running_mean, running_var, num_batches_tracked)
        found = overload(OP, "reference")(x, norm, weight, gamma, beta, *running, *options)
        for into, result in zip((y, stats, rows, kept), found, strict=True):
            into.copy_(result)
        return
    read = _passes.Running.of(running_mean, running_var, num_batches_tracked, momentum)
    _cuda_plan.raw(OP, "out")(
        *made.operands, _passes.plain(gamma), _passes.plain(beta), eps, *read.tensors, read.factor,
        *made.geometry, *(wish or _wanted(made)), y, stats, rows, kept,
    )  # fmt: skip
    read.write_back()
