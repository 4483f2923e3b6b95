"""The CUDA kernel of `conv_bn_wgrad` as an implementation of its op.

What a launch takes of it is planned as the other convolutions' is, see `_cuda_plan`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _cuda_plan
from ._library import overload

OP = "conv_bn_wgrad"
CHECKS = "_cuda_wgrad_checks"


def problem_of(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    dweight: Tensor,
    geometry: Sequence[Any],
    *,
    real: bool = True,
) -> _cuda_plan.Problem:
    """The problem that the kernel is given: dz, y and x are copied where that is worth it.

    Args:
        dz: [N, K, P, Q].
        y: likewise, or None.
        coefficients: [3, K], or None.
        x: [N, C, H, W].
        norm: [4, C], or None.
        dweight: [K, C/groups, R, S], or a tensor like it.
        geometry: stride, padding, dilation, groups.
        real: False makes no copies, but what a plan takes for them.
    """
    stride, padding, dilation, groups = geometry

    def adjacent(t: Tensor) -> Tensor:
        made = _cuda_plan.adjacent if real else _cuda_plan.adjacent_like
        return made(t, t.shape[1] // groups)

    operands = (adjacent(dz), None if y is None else adjacent(y), coefficients, adjacent(x), norm)
    options = (list(stride), list(padding), list(dilation), groups)
    call = (dz.dtype, x.shape, dweight.shape, tuple(geometry), y is not None)
    return _cuda_plan.Problem(OP, operands, (*options, _cuda_plan.tf32()), dweight, call=call)


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    dweight: Tensor,
    *geometry: Any,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes the gradient of a convolution's weights between two BatchNorms into `dweight`.

    What no configuration takes, filters of more than 15 taps along an axis or more pixels than a
    launch can count, is computed by plain PyTorch, with a warning.

    Args:
        dz: [N, K, P, Q].
        y: likewise, or None.
        coefficients: [3, K] float32, contiguous; given with y.
        x: [N, C, H, W].
        norm: [4, C] float32, contiguous, or None.
        dweight: [K, C/groups, R, S], dtype of dz or float32, any layout.
        geometry: stride, padding, dilation, groups.
        wish: a configuration and splits in place of a choice among the admitted ones.

    Raises:
        LookupError: the admitted configurations do not take it, though others would.
        RuntimeError: the launch failed, or refused the wish.
    """
    if not dz.numel() or not x.numel():
        dweight.zero_()
        return
    made = problem_of(dz, y, coefficients, x, norm, dweight, geometry)
    ordinary = max(dweight.shape[2:]) <= _cuda_plan.MOST_TAPS
    ordinary = ordinary and _cuda_plan.ordinary(dz, x, dweight, geometry=geometry)
    if wish is None and not ordinary:
        found = _cuda_plan.plan(made, _cuda_plan.gpu(dz.device))
        if found.configuration < 0:
            warnings.warn(f"{OP}.cuda: {found.why}; plain PyTorch computes it", stacklevel=2)
            reference = overload(OP, "reference")
            dweight.copy_(reference(dz, y, coefficients, x, norm, dweight, *geometry))
            return
    _cuda_plan.raw(OP, "out")(
        *made.operands, *made.geometry, *(wish or _cuda_plan.wanted(made)), dweight
    )
