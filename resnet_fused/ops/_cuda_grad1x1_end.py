"""The CUDA kernel of `conv_bn_grad1x1_end` as an implementation of its op, and its worth.

What a launch takes of it is planned as the other convolutions' is, see `_cuda_plan`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _admitted, _cuda_bn_dgrad_end, _cuda_grad1x1, _cuda_plan
from ._cuda_bn_dgrad_end import PASS, Verdict
from ._library import overload

OP = "conv_bn_grad1x1_end"
CHECKS = "_cuda_grad1x1_end_checks"
ROWS = (0, 1, 3, 5, 6, 8)
"""Places of the operands whose pixels are read one behind the other; the addend's may be thinned,
and the others are vectors."""
ADDEND = 4


def problem_of(
    operands: Sequence[Tensor | None], dx: Tensor, addend_stride: int, *, real: bool = True
) -> _cuda_plan.Problem:
    """The problem that the kernel is given: what it cannot read is copied to channels_last.

    Args:
        operands: dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm, as
            of the op.
        dx: [N, C, H, W], or a tensor like it. Where the kernel cannot write it, the problem's `out`
            is another one.
        addend_stride: the addend belongs to every addend_stride-th pixel.
        real: False makes no copies, but what a plan takes for them.
    """

    def readable(place: int, t: Tensor | None) -> Tensor | None:
        if t is None or (place not in ROWS and place != ADDEND):
            return t
        if _cuda_grad1x1.in_rows(t) if place in ROWS else _cuda_grad1x1.in_chunks(t):
            return t
        made = _cuda_grad1x1.like(t, real)
        return made.copy_(t) if real else made

    given = tuple(readable(place, t) for place, t in enumerate(operands))
    out = dx if _cuda_grad1x1.in_rows(dx) else _cuda_grad1x1.like(dx, real)
    dz, weight = operands[0], operands[3]
    assert dz is not None
    assert weight is not None
    projected = operands[8] is not None
    call = (dz.dtype, dx.shape, weight.shape, _cuda_grad1x1.GEOMETRY, projected)
    return _cuda_plan.Problem(OP, given, (addend_stride,), out, call=call)


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    out: Tensor,
    raw: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    dx: Tensor,
    sums: Tensor,
    dweight: Tensor,
    addend_stride: int,
    *,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes both gradients of a 1x1 convolution, its input's behind a block's ReLU, and its sums.

    An empty problem is computed by plain PyTorch; so is, with a warning, what no admitted
    configuration takes: `refusal` says beforehand what that is.

    Args:
        dz: [N, K, H, W], bfloat16 or float16.
        y: likewise, or None.
        coefficients: [3, K] float32, contiguous; given with y.
        weight: [K, C, 1, 1].
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        out: [N, C, H, W].
        raw: [N, C, H, W].
        norm: [4, C] float32, contiguous.
        residual: [N, C, H, W], or None.
        residual_norm: [4, C] float32, contiguous; given with residual.
        dx: [N, C, H, W], any layout without overlaps.
        sums: [2, C] float32, contiguous; [3, C] with residual.
        dweight: [K, C, 1, 1], dtype of dz or float32, any layout.
        addend_stride: see addend.
        wish: a configuration and parts of the pixels in place of a choice among the admitted ones.

    Raises:
        RuntimeError: the launch failed, or refused the wish.
    """
    operands = (dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm)
    results = (dx, sums, dweight)
    if not dz.numel() or not dx.numel():
        _by_reference(operands, results, addend_stride)
        return
    made = problem_of(operands, dx, addend_stride)
    why = None if wish else _cuda_plan.refused(made, dx.device)
    if why is not None:
        warnings.warn(f"{OP}.cuda: {why}; plain PyTorch computes it", stacklevel=2)
        _by_reference(operands, results, addend_stride)
        return
    _cuda_plan.raw(OP, "out")(
        *made.operands, *made.geometry, *(wish or _cuda_plan.wanted(made)), made.out, sums, dweight
    )
    if made.out is not dx:
        dx.copy_(made.out)


def _by_reference(operands: Sequence[Any], results: Sequence[Tensor], step: int) -> None:
    found = overload(OP, "reference")(*operands, results[2], step)
    for to, result in zip(results, found, strict=True):
        to.copy_(result)


def _problem(
    dtype: torch.dtype,
    between: Sequence[int],
    weight: Sequence[int],
    projected: bool,
    added: int,
) -> _cuda_plan.Problem:
    """Of tensors without memory in channels_last."""
    one, _ = _cuda_bn_dgrad_end.problems(dtype, between, weight, _GEOMETRY, projected, added)
    return problem_of(one.operands, one.out, max(1, added), real=False)


_GEOMETRY = (1, 1), (0, 0), (1, 1), 1


def _lasts(problem: _cuda_plan.Problem, about: Sequence[int]) -> float:
    """Predicted cycles; infinite where no configuration serves."""
    served = _cuda_plan.plan(problem, about).configuration >= 0
    return _cuda_plan.predicted(problem, about) if served else math.inf


@functools.lru_cache(maxsize=4096)
def choose(
    dtype: torch.dtype,
    between: tuple[int, ...],
    weight: tuple[int, ...],
    about: tuple[int, ...],
    names: frozenset[str] | None = None,
    *,
    projected: bool = False,
    added: int = 1,
) -> Verdict:
    """Whether one CUDA kernel should make all three gradients where two blocks meet.

    It is compared with the better of two ways: `conv_bn_dgrad_end` and `conv_bn_wgrad`; and
    `bn_add_act_backward`, whose tensors go through memory, behind both gradients of the
    convolution, from one kernel or two. The rule is arithmetic, not measured.

    Args:
        dtype: of the activations.
        between: [N, C, H, W] of the block's output.
        weight: [K, C, 1, 1] of the convolution behind it.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        names: configurations to choose among; None for all.
        projected: whether the block has a projection, whose reductions are taken too.
        added: of how many rows and columns one has a shortcut's gradient added; 0: none has.
    """
    problem = _problem(dtype, between, weight, projected, added)
    found = _cuda_plan.choose(problem, about, names)
    if found.configuration < 0:
        return Verdict(False, found.why)
    if not found.workspace_bytes:
        return Verdict(False, "an empty batch")
    moved = sum(t.nbytes for t in (*problem.operands, problem.out) if t is not None)
    lasts = max(found.cycles, _cuda_plan.memory_cycles(moved, about))
    end, alone = _cuda_bn_dgrad_end.problems(dtype, between, weight, _GEOMETRY, projected, added)
    merged, (_, weights) = _cuda_grad1x1.problems(dtype, between, weight[0], False)
    both = min(_lasts(merged, about), _lasts(alone, about) + _lasts(weights, about))
    passing = (PASS + projected) * dtype.itemsize * math.prod(between)
    apart = min(
        _lasts(end, about) + _lasts(weights, about), _cuda_plan.memory_cycles(passing, about) + both
    )
    said = f"{lasts / 1e3:.0f} thousand cycles predicted, of more kernels {apart / 1e3:.0f}"
    return Verdict(lasts < _cuda_grad1x1.WORTH * apart, said)


@functools.lru_cache(maxsize=4096)
def _refusal(
    dtype: torch.dtype,
    between: tuple[int, ...],
    weight: tuple[int, ...],
    projected: bool,
    added: int,
    about: tuple[int, ...],
    names: frozenset[str] | None,
) -> str | None:
    found = _cuda_plan.choose(_problem(dtype, between, weight, projected, added), about, names)
    return found.why if found.configuration < 0 else None


def refusal(
    device: torch.device,
    dtype: torch.dtype,
    between: Sequence[int],
    weight: Sequence[int],
    geometry: Sequence[Any],
    projected: bool,
    added: int,
) -> str | None:
    """Why no admitted configuration takes a place, or None.

    Args:
        device: where.
        dtype: of the activations.
        between: [N, C, H, W] of the block's output.
        weight: [K, C, 1, 1] of the convolution behind it.
        geometry: its stride, padding, dilation, groups: those of a 1x1 of stride 1.
        projected: whether the block has a projection.
        added: of how many rows and columns one has a shortcut's gradient added; 0: none has.
    """
    names, about = _admitted.names(OP, "cuda", device), _cuda_plan.gpu(device)
    return _refusal(dtype, tuple(between), tuple(weight), projected, added, about, names)


def verdict(
    device: torch.device,
    dtype: torch.dtype,
    between: Sequence[int],
    weight: Sequence[int],
    geometry: Sequence[Any],
    projected: bool,
    added: int,
) -> Verdict:
    """`choose` on a device, among the admitted configurations; arguments as of `refusal`."""
    names, about = _admitted.names(OP, "cuda", device), _cuda_plan.gpu(device)
    return choose(
        dtype, tuple(between), tuple(weight), about, names, projected=projected, added=added
    )
