"""The CUDA kernel of `conv_bn_dgrad_end` as an implementation of its op, and its worth.

What a launch takes of it is planned as the other convolutions' is, see `_cuda_plan`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _admitted, _cuda_bn_dgrad, _cuda_grad1x1, _cuda_plan
from ._library import overload

OP = "conv_bn_dgrad_end"
CHECKS = "_cuda_bn_dgrad_end_checks"
PASS = 4
"""Tensors of the block's size that `bn_add_act_backward` reads and writes, and a projection's."""
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


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
        operands: dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm, as
            of the op.
        dx: [N, C, H, W], or a tensor like it.
        addend_stride: the addend belongs to every addend_stride-th pixel.
        geometry: stride, padding, dilation, groups.
        real: False makes no copies, but what a plan takes for them.
    """
    multiplied = (*operands[:5], None, None)
    made = _cuda_bn_dgrad.problem_of(multiplied, dx, addend_stride, geometry, real=real)
    return made._replace(op=OP, operands=(*made.operands[:5], *operands[5:]))


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
    addend_stride: int,
    *geometry: Any,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes the gradient behind a block's ReLU into `dx`, and its reductions into `sums`.

    What no configuration takes (see `_cuda_bn_dgrad.launch`) is computed by plain PyTorch, with a
    warning: `refusal` says beforehand what that is.

    Args:
        dz: [N, K, P, Q].
        y: [N, K, P, Q], or None.
        coefficients: [3, K] float32, contiguous; given with y.
        weight: [K, C/groups, R, S].
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        out: [N, C, H, W].
        raw: [N, C, H, W].
        norm: [4, C] float32, contiguous.
        residual: [N, C, H, W], or None.
        residual_norm: [4, C] float32, contiguous; given with residual.
        dx: [N, C, H, W], any layout.
        sums: [2, C] float32, contiguous; [3, C] with residual.
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
    operands = (dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm)
    made = problem_of(operands, dx, addend_stride, geometry)
    why = None if wish else _cuda_bn_dgrad.unserved(made, dz, weight, geometry)
    if why is not None:
        warnings.warn(f"{OP}.cuda: {why}; plain PyTorch computes it", stacklevel=2)
        results = overload(OP, "reference")(*operands, addend_stride, *geometry)
        for to, result in zip((dx, sums), results, strict=True):
            to.copy_(result)
        return
    _cuda_plan.raw(OP, "out")(
        *made.operands, *made.geometry, *(wish or _cuda_plan.wanted(made)), dx, sums
    )


class Verdict(NamedTuple):
    """How the gradient between two blocks is made.

    Attributes:
        ended: whether by one kernel; else by two.
        why: one clause.
    """

    ended: bool
    why: str


def problems(
    dtype: torch.dtype,
    between: Sequence[int],
    weight: Sequence[int],
    geometry: Geometry,
    projected: bool,
    added: int,
) -> tuple[_cuda_plan.Problem, _cuda_plan.Problem]:
    """Of one kernel and of the convolution's alone, of tensors without memory in channels_last."""

    def image(*sizes: int) -> Tensor:
        last = torch.channels_last
        return torch.empty(sizes, dtype=dtype, device="meta", memory_format=last)

    def rows(count: int, of: int) -> Tensor:
        return torch.empty(count, of, device="meta")

    stride, padding, dilation, _ = geometry
    outputs = [
        (between[d + 2] + 2 * padding[d] - dilation[d] * (weight[d + 2] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]
    n, channels, *_ = between
    dz, block = image(n, weight[0], *outputs), image(*between)
    step = max(1, added)
    addend = image(n, channels, *(-(-side // step) for side in between[2:])) if added else None
    first = (dz, dz, rows(3, weight[0]), image(*weight), addend)
    norm = rows(4, channels)
    rest = (block, norm) if projected else (None, None)
    one = problem_of((*first, block, block, norm, *rest), block, step, geometry, real=False)
    alone = _cuda_bn_dgrad.problem_of((*first, None, None), block, step, geometry, real=False)
    return one, alone


@functools.lru_cache(maxsize=4096)
def choose(
    dtype: torch.dtype,
    between: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: Geometry,
    about: tuple[int, ...],
    names: frozenset[str] | None = None,
    *,
    projected: bool = False,
    added: int = 1,
    merged: bool = False,
) -> Verdict:
    """Whether one CUDA kernel should make the gradient between two blocks behind their ReLU.

    It is compared with `conv_bn_dgrad` and `bn_add_act_backward`, whose tensors go through memory.
    Where one kernel would make both gradients of the convolution, that one's cycles beyond those of
    the weights' gradient alone stand for `conv_bn_dgrad`: with this kernel two read dz and y. The
    rule is arithmetic, not measured.

    Args:
        dtype: of the activations.
        between: [N, C, H, W] of the block's output.
        weight: [K, C / groups, R, S] of the convolution behind it.
        geometry: stride, padding, dilation, groups.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        names: configurations to choose among; None for all.
        projected: whether the block has a projection, whose reductions are taken too.
        added: of how many rows and columns one has a shortcut's gradient added; 0: none has.
        merged: whether both gradients of the convolution would come from one kernel.
    """
    one, alone = problems(dtype, between, weight, geometry, projected, added)
    found = _cuda_plan.choose(one, about, names)
    if found.configuration < 0:
        return Verdict(False, found.why)
    if not found.workspace_bytes:
        return Verdict(False, "an empty batch")
    moved = sum(t.nbytes for t in (*one.operands, one.out) if t is not None)
    lasts = max(found.cycles, _cuda_plan.memory_cycles(moved, about))
    passing = (PASS + projected) * dtype.itemsize * math.prod(between)
    apart = _cuda_plan.memory_cycles(passing, about) + (
        _cuda_grad1x1.beyond_weights(dtype, between, weight[0], about)
        if merged
        else _cuda_plan.predicted(alone, about)
    )
    said = f"{lasts / 1e3:.0f} thousand cycles predicted, of two kernels {apart / 1e3:.0f}"
    return Verdict(lasts < _cuda_grad1x1.WORTH * apart, said)


@functools.lru_cache(maxsize=4096)
def _refusal(
    dtype: torch.dtype,
    between: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: Geometry,
    projected: bool,
    added: int,
    about: tuple[int, ...],
    names: frozenset[str] | None,
) -> str | None:
    one, _ = problems(dtype, between, weight, geometry, projected, added)
    found = _cuda_plan.choose(one, about, names)
    return found.why if found.configuration < 0 else None


def _known(geometry: Sequence[Any]) -> Geometry:
    stride, padding, dilation, groups = geometry
    return tuple(stride), tuple(padding), tuple(dilation), groups


def refusal(
    device: torch.device,
    dtype: torch.dtype,
    between: Sequence[int],
    weight: Sequence[int],
    geometry: Sequence[Any],
    projected: bool,
    added: int,
) -> str | None:
    """Why no admitted configuration takes a gradient between two blocks, or None.

    Args:
        device: where.
        dtype: of the activations.
        between: [N, C, H, W] of the block's output.
        weight: [K, C / groups, R, S] of the convolution behind it.
        geometry: its stride, padding, dilation, groups.
        projected: whether the block has a projection.
        added: of how many rows and columns one has a shortcut's gradient added; 0: none has.
    """
    names, about = _admitted.names(OP, "cuda", device), _cuda_plan.gpu(device)
    sizes = tuple(between), tuple(weight), _known(geometry)
    return _refusal(dtype, *sizes, projected, added, about, names)


def verdict(
    device: torch.device,
    dtype: torch.dtype,
    between: Sequence[int],
    weight: Sequence[int],
    geometry: Sequence[Any],
    projected: bool,
    added: int,
    *,
    merged: bool,
) -> Verdict:
    """`choose` on a device, among the admitted configurations; arguments as of `refusal`."""
    names, about = _admitted.names(OP, "cuda", device), _cuda_plan.gpu(device)
    return choose(
        dtype, tuple(between), tuple(weight), _known(geometry), about, names, projected=projected,
        added=added, merged=merged,
    )  # fmt: skip
