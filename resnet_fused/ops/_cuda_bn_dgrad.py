"""The CUDA kernel of `conv_bn_dgrad` as an implementation of its op.

What a launch takes of it is planned as the other convolutions' is, see `_cuda_plan`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _cuda_plan, _results
from ._library import overload

OP = "conv_bn_dgrad"
CHECKS = "_cuda_bn_dgrad_checks"


def problem_of(
    operands: Sequence[Tensor | None],
    dx: Tensor,
    addend_stride: int,
    geometry: Sequence[Any],
    *,
    real: bool = True,
) -> _cuda_plan.Problem:
    """The problem that the kernel is given: what it multiplies is copied where that is worth it.

    Args:
        operands: dz, y, coefficients, weight, addend, raw, norm, as of the op.
        dx: [N, C, H, W], or a tensor like it.
        addend_stride: the addend belongs to every addend_stride-th pixel.
        geometry: stride, padding, dilation, groups.
        real: False makes no copies, but what a plan takes for them.
    """
    dz, y, coefficients, weight, addend, raw, norm = operands
    assert dz is not None
    assert weight is not None
    stride, padding, dilation, groups = geometry
    adjacent = _cuda_plan.adjacent if real else _cuda_plan.adjacent_like
    filters = dz.shape[1] // groups
    given = (
        adjacent(dz, filters),
        None if y is None else adjacent(y, filters),
        coefficients,
        adjacent(weight, weight.shape[1]),
        addend,  # these are read once, by the epilogue
        raw,
        norm,
    )
    options = (addend_stride, list(stride), list(padding), list(dilation), groups)
    call = (dz.dtype, dx.shape, weight.shape, tuple(geometry), y is not None)
    return _cuda_plan.Problem(OP, given, (*options, _cuda_plan.tf32()), dx, call=call)


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    raw: Tensor | None,
    norm: Tensor | None,
    dx: Tensor,
    sums: Tensor,
    addend_stride: int,
    *geometry: Any,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes the gradient of a convolution's input into `dx`, and its reductions into `sums`.

    What no configuration takes, filters of more than 15 taps along an axis, a single image beyond
    what a launch can count or a gradient of no elements, is computed by plain PyTorch, with a
    warning.

    Args:
        dz: [N, K, P, Q].
        y: [N, K, P, Q], or None.
        coefficients: [3, K] float32, contiguous; given with y.
        weight: [K, C/groups, R, S].
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        raw: [N, C, H, W], or None.
        norm: [4, C] float32, contiguous; given with raw.
        dx: [N, C, H, W], any layout.
        sums: [2, C] float32, contiguous; [0, C] without raw.
        addend_stride: see addend.
        geometry: stride, padding, dilation, groups.
        wish: a configuration and splits in place of a choice among the admitted ones.

    Raises:
        LookupError: the admitted configurations do not take it, though others would.
        RuntimeError: the launch failed, or refused the wish.
    """
    if not dx.numel():
        sums.zero_()
        return
    operands = (dz, y, coefficients, weight, addend, raw, norm)
    made = problem_of(operands, dx, addend_stride, geometry)
    why = None if wish else unserved(made, dz, weight, geometry)
    if why is not None:
        warnings.warn(f"{OP}.cuda: {why}; plain PyTorch computes it", stacklevel=2)
        channels_last = _results.is_channels_last(dx)
        results = overload(OP, "reference")(
            *operands, list(dx.shape), channels_last, addend_stride, *geometry
        )
        for to, result in zip((dx, sums), results, strict=True):
            to.copy_(result)
        return
    _cuda_plan.raw(OP, "out")(
        *made.operands, *made.geometry, *(wish or _cuda_plan.wanted(made)), dx, sums
    )


def unserved(
    made: _cuda_plan.Problem, dz: Tensor, weight: Tensor, geometry: Sequence[Any]
) -> str | None:
    """Why no configuration at all takes a gradient of an input, or None.

    Args:
        made: its problem.
        dz: as it was given.
        weight: likewise.
        geometry: stride, padding, dilation, groups.
    """
    usual = max(weight.shape[2:]) <= _cuda_plan.MOST_TAPS and dz.numel() > 0
    if usual and _cuda_plan.ordinary(dz, weight, made.out, geometry=geometry):
        return None
    found = _cuda_plan.plan(made, _cuda_plan.gpu(made.out.device))
    return found.why if found.configuration < 0 or not dz.numel() else None
