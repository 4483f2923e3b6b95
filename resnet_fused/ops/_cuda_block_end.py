"""The CUDA kernel of `bn_add_act_conv_stats` as an implementation of its op, and its worth.

What a launch takes of it is planned as the other convolutions' is, see `_cuda_plan`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _admitted, _cuda_grad1x1, _cuda_plan, _cuda_stats
from ._library import overload

OP = "bn_add_act_conv_stats"
CHECKS = "_cuda_block_end_checks"
PASS = 3
"""Tensors of the block's size that `bn_add_act` reads and writes."""


def problem_of(
    y: Tensor,
    norm: Tensor,
    residual: Tensor,
    residual_norm: Tensor | None,
    weight: Tensor,
    out: Tensor,
    z: Tensor,
    *,
    real: bool = True,
) -> _cuda_plan.Problem:
    """The problem that the kernel is given: what it cannot read is copied to channels_last.

    Args:
        y: [N, C, H, W].
        norm: [4, C].
        residual: shape of y.
        residual_norm: [4, C], or None.
        weight: [K, C, 1, 1].
        out: shape of y, or a tensor like it. Where the kernel cannot write it, the last of the
            problem's `geometry` is another one.
        z: [N, K, H, W], or a tensor like it.
        real: False makes no copies, but what a plan takes for them.
    """

    def like(t: Tensor) -> Tensor:
        device = t.device if real else "meta"
        return torch.empty(t.shape, dtype=t.dtype, device=device, memory_format=torch.channels_last)

    def readable(t: Tensor) -> Tensor:
        if _cuda_grad1x1.in_rows(t):
            return t
        return like(t).copy_(t) if real else like(t)

    given = (readable(y), norm, readable(residual), residual_norm, readable(weight))
    target = out if _cuda_grad1x1.in_rows(out) else like(out)
    call = (y.dtype, y.shape, weight.shape, _cuda_grad1x1.GEOMETRY, residual_norm is not None)
    return _cuda_plan.Problem(OP, given, (_cuda_plan.tf32(), target), z, call=call)


def launch(
    y: Tensor,
    norm: Tensor,
    residual: Tensor,
    residual_norm: Tensor | None,
    weight: Tensor,
    out: Tensor,
    z: Tensor,
    stats: Tensor,
    *,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes relu(scale * y + shift + shortcut) into `out`, its convolution into `z`, and measures.

    An empty problem is computed by plain PyTorch; so is, with a warning, what no admitted
    configuration takes: `refusal` says beforehand what that is.

    Args:
        y: [N, C, H, W] float32, bfloat16 or float16.
        norm: [4, C] float32, contiguous.
        residual: the shortcut, shape and dtype of y.
        residual_norm: [4, C] float32, contiguous, through which `residual` is read; or None.
        weight: [K, C, 1, 1].
        out: [N, C, H, W], any layout without overlaps.
        z: [N, K, H, W], likewise.
        stats: [2, K] float32, contiguous: mean and M2 of z.
        wish: a configuration and splits in place of a choice among the admitted ones.

    Raises:
        RuntimeError: the launch failed, or refused the wish.
    """
    operands = (y, norm, residual, residual_norm, weight)
    if not y.numel() or not z.numel():
        _by_reference(operands, (out, z, stats))
        return
    projected = residual_norm is not None
    why = None if wish else refusal(y.device, y.dtype, y.shape, weight.shape[0], projected)
    if why is not None:
        warnings.warn(f"{OP}.cuda: {why}; plain PyTorch computes it", stacklevel=2)
        _by_reference(operands, (out, z, stats))
        return
    made = problem_of(*operands, out, z)
    target = made.geometry[-1]
    _cuda_plan.raw(OP, "out")(
        *made.operands, *made.geometry, *(wish or _cuda_plan.wanted(made)), z, stats
    )
    if target is not out:
        out.copy_(target)


def _by_reference(operands: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
    for to, result in zip(results, overload(OP, "reference")(*operands), strict=True):
        to.copy_(result)


class Verdict(NamedTuple):
    """How a block's end and the next block's first convolution are made.

    Attributes:
        folded: whether by one kernel; else by two.
        why: one clause.
    """

    folded: bool
    why: str


def _problems(
    dtype: torch.dtype, shape: Sequence[int], filters: int, projected: bool
) -> tuple[_cuda_plan.Problem, _cuda_plan.Problem]:
    """Of one kernel and of the convolution alone, of tensors without memory in channels_last."""

    def image(*sizes: int) -> Tensor:
        last = torch.channels_last
        return torch.empty(sizes, dtype=dtype, device="meta", memory_format=last)

    n, channels, h, w = shape
    out, z, weight = image(*shape), image(n, filters, h, w), image(filters, channels, 1, 1)
    norm = torch.empty(4, channels, device="meta")
    one = problem_of(out, norm, out, norm if projected else None, weight, out, z, real=False)
    alone = _cuda_stats.problem_of(out, None, weight, z, _cuda_grad1x1.GEOMETRY, real=False)
    return one, alone


@functools.lru_cache(maxsize=4096)
def choose(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    filters: int,
    about: tuple[int, ...],
    names: frozenset[str] | None = None,
    *,
    projected: bool = False,
) -> Verdict:
    """Whether one CUDA kernel should make both: where it is clearly predicted faster.

    It is compared with `bn_add_act`, three tensors through memory, and `conv_bn_stats` in CUDA. The
    rule is arithmetic, not measured.

    Args:
        dtype: of the activations.
        shape: [N, C, H, W] of the block's output.
        filters: K.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        names: configurations to choose among; None for all.
        projected: whether the shortcut has a BatchNorm of its own.
    """
    one, alone = _problems(dtype, shape, filters, projected)
    found = _cuda_plan.choose(one, about, names)
    if found.configuration < 0:
        return Verdict(False, found.why)
    if not found.workspace_bytes:
        return Verdict(False, "an empty batch")
    end = _cuda_plan.memory_cycles(PASS * dtype.itemsize * math.prod(shape), about)
    apart = end + _cuda_plan.predicted(alone, about)
    said = f"{found.cycles / 1e3:.0f} thousand cycles predicted, of two kernels {apart / 1e3:.0f}"
    return Verdict(found.cycles < _cuda_grad1x1.WORTH * apart, said)


def fits(index: int, about: Sequence[int]) -> bool:
    """Whether a configuration takes any call in bfloat16 on a GPU.

    Args:
        index: of the configuration.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
    """
    one, _ = _problems(torch.bfloat16, (1, 64, 8, 8), 64, False)
    return _cuda_plan.plan(one, about, index).configuration == index


@functools.lru_cache(maxsize=4096)
def _refusal(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    filters: int,
    about: tuple[int, ...],
    names: frozenset[str] | None,
    projected: bool,
) -> str | None:
    found = _cuda_plan.choose(_problems(dtype, shape, filters, projected)[0], about, names)
    return found.why if found.configuration < 0 else None


def refusal(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int], filters: int, projected: bool
) -> str | None:
    """Why no admitted configuration takes a block's end and a 1x1 convolution, or None.

    Args:
        device: where.
        dtype: of the activations.
        shape: [N, C, H, W] of the block's output.
        filters: K.
        projected: whether the shortcut has a BatchNorm of its own.
    """
    names = _admitted.names(OP, "cuda", device)
    return _refusal(dtype, tuple(shape), filters, _cuda_plan.gpu(device), names, projected)


def verdict(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int], filters: int, projected: bool
) -> Verdict:
    """`choose` on a device, among the admitted configurations; arguments as of `refusal`."""
    names, about = _admitted.names(OP, "cuda", device), _cuda_plan.gpu(device)
    return choose(dtype, tuple(shape), filters, about, names, projected=projected)
