"""The CUDA kernel of `conv_bn_grad1x1` as an implementation of its op, and when it is worth it.

What a launch takes of it is planned as the other convolutions' is, see `_cuda_plan`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _admitted, _cuda_bn_dgrad, _cuda_plan, _cuda_wgrad, _results
from ._library import overload

OP = "conv_bn_grad1x1"
CHECKS = "_cuda_grad1x1_checks"
GEOMETRY = [1, 1], [0, 0], [1, 1], 1
WORTH = 0.9
"""Of two kernels' predicted cycles, what one must stay below: nobody has measured the rates, and a
near tie goes to the kernels that each do one thing."""


def in_chunks(t: Tensor) -> bool:
    """Whether [N, C, H, W] can be read 16 bytes at a time: its channels lie side by side."""
    unit = _cuda_plan.CHUNK_BYTES // t.element_size()
    steps = [t.stride(d) for d in (0, 2, 3) if t.shape[d] > 1]
    whole = t.shape[1] % unit == 0 and all(step % unit == 0 for step in steps)
    return whole and t.stride(1) == 1 and t.data_ptr() % _cuda_plan.CHUNK_BYTES == 0


def in_rows(t: Tensor) -> bool:
    """Whether, besides, all pixels of the batch lie one behind the other."""
    step, pixels = None, 1
    for d in (3, 2, 0):
        if t.shape[d] > 1:
            step = t.stride(d) if step is None else step
            if t.stride(d) != step * pixels:
                return False
        pixels *= t.shape[d]
    return in_chunks(t)


def like(t: Tensor, real: bool) -> Tensor:
    """Memory for `t` in channels_last; what a plan takes for it if it is not `real`."""
    device = t.device if real else "meta"
    return torch.empty(t.shape, dtype=t.dtype, device=device, memory_format=torch.channels_last)


def problem_of(
    operands: Sequence[Tensor | None], dx: Tensor, addend_stride: int, *, real: bool = True
) -> _cuda_plan.Problem:
    """The problem that the kernel is given: what it cannot read is copied to channels_last.

    Args:
        operands: dz, y, coefficients, x, norm, weight, addend, as of the op.
        dx: [N, C, H, W], or a tensor like it. Where the kernel cannot write it, the problem's `out`
            is another one.
        addend_stride: the addend belongs to every addend_stride-th pixel.
        real: False makes no copies, but what a plan takes for them.
    """

    def readable(t: Tensor | None, whole: bool = True) -> Tensor | None:
        if t is None or (in_rows(t) if whole else in_chunks(t)):
            return t
        made = like(t, real)
        return made.copy_(t) if real else made

    dz, y, coefficients, x, norm, weight, addend = operands
    assert dz is not None
    assert weight is not None
    given = (
        readable(dz), readable(y), coefficients, readable(x), norm, readable(weight),
        readable(addend, whole=False),
    )  # fmt: skip
    out = dx if in_rows(dx) else like(dx, real)
    call = (dz.dtype, dx.shape, weight.shape, GEOMETRY, norm is not None)
    return _cuda_plan.Problem(OP, given, (addend_stride,), out, call=call)


def launch(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    dx: Tensor,
    sums: Tensor,
    dweight: Tensor,
    addend_stride: int,
    *,
    wish: tuple[int, int] | None = None,
) -> None:
    """Writes both gradients of a 1x1 convolution, and the reductions of the one of its input.

    An empty problem is computed by plain PyTorch; so is, with a warning, what no admitted
    configuration takes: `refusal` says beforehand what that is.

    Args:
        dz: [N, K, H, W], bfloat16 or float16.
        y: likewise, or None.
        coefficients: [3, K] float32, contiguous; given with y.
        x: [N, C, H, W].
        norm: [4, C] float32, contiguous, or None.
        weight: [K, C, 1, 1].
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], or None.
        dx: [N, C, H, W], any layout without overlaps.
        sums: [2, C] float32, contiguous; [0, C] without norm.
        dweight: [K, C, 1, 1], dtype of dz or float32, any layout.
        addend_stride: see addend.
        wish: a configuration and parts of the pixels in place of a choice among the admitted ones.

    Raises:
        RuntimeError: the launch failed, or refused the wish.
    """
    operands = (dz, y, coefficients, x, norm, weight, addend)
    if not dz.numel() or not dx.numel():
        _by_reference(operands, dx, sums, dweight, addend_stride)
        return
    why = None if wish else refusal(dx.device, dx.dtype, dx.shape, dz.shape[1])
    if why is not None:
        warnings.warn(f"{OP}.cuda: {why}; plain PyTorch computes it", stacklevel=2)
        _by_reference(operands, dx, sums, dweight, addend_stride)
        return
    made = problem_of(operands, dx, addend_stride)
    _cuda_plan.raw(OP, "out")(
        *made.operands, *made.geometry, *(wish or _cuda_plan.wanted(made)), made.out, sums, dweight
    )
    if made.out is not dx:
        dx.copy_(made.out)


def _by_reference(
    operands: Sequence[Tensor | None], dx: Tensor, sums: Tensor, dweight: Tensor, step: int
) -> None:
    layout = _results.is_channels_last(dx)
    results = overload(OP, "reference")(*operands, dweight, layout, step)
    for to, result in zip((dx, sums, dweight), results, strict=True):
        to.copy_(result)


class Verdict(NamedTuple):
    """How the gradients of a 1x1 convolution of stride 1 are made.

    Attributes:
        merged: whether one kernel makes both.
        why: one clause.
    """

    merged: bool
    why: str


def problems(
    dtype: torch.dtype, x: Sequence[int], filters: int, masked: bool
) -> tuple[_cuda_plan.Problem, tuple[_cuda_plan.Problem, _cuda_plan.Problem]]:
    """Of one kernel and of two, of tensors without memory in channels_last."""

    def image(*shape: int) -> Tensor:
        last = torch.channels_last
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)

    def rows(count: int, of: int) -> Tensor:
        return torch.empty(count, of, device="meta")

    n, channels, h, w = x
    dz, y, below, dx = (image(n, k, h, w) for k in (filters, filters, channels, channels))
    weight, coefficients = image(filters, channels, 1, 1), rows(3, filters)
    norm = rows(4, channels) if masked else None
    raw = below if masked else None
    # What has no BatchNorm below begins a block: the gradient of the shortcut comes to it.
    addend = None if masked else below
    merged = problem_of((dz, y, coefficients, below, norm, weight, addend), dx, 1, real=False)
    given = (dz, y, coefficients, weight, addend, raw, norm)
    two = (
        _cuda_bn_dgrad.problem_of(given, dx, 1, GEOMETRY, real=False),
        _cuda_wgrad.problem_of(dz, y, coefficients, below, norm, weight, GEOMETRY, real=False),
    )
    return merged, two


@functools.lru_cache(maxsize=4096)
def choose(
    dtype: torch.dtype,
    x: tuple[int, ...],
    filters: int,
    about: tuple[int, ...],
    names: frozenset[str] | None = None,
    *,
    masked: bool = False,
) -> Verdict:
    """Whether one CUDA kernel should make both gradients: where it is clearly predicted faster.

    It is compared with `conv_bn_dgrad` and `conv_bn_wgrad` in CUDA, by the rates that choose among
    configurations, and by memory's (`_cuda_plan.predicted`): two kernels move more bytes. What
    tuning knows of a GPU overrules it.

    Args:
        dtype: of the activations.
        x: [N, C, H, W] of what the convolution read.
        filters: K.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        names: configurations to choose among; None for all.
        masked: whether a BatchNorm and ReLU stand below.
    """
    merged, two = problems(dtype, x, filters, masked)
    found = _cuda_plan.choose(merged, about, names)
    if found.configuration < 0:
        return Verdict(False, found.why)
    if not found.workspace_bytes:
        return Verdict(False, "an empty batch")
    apart = sum(_cuda_plan.predicted(one, about) for one in two)
    said = f"{found.cycles / 1e3:.0f} thousand cycles predicted, of two kernels {apart / 1e3:.0f}"
    return Verdict(found.cycles < WORTH * apart, said)


def beyond_weights(
    dtype: torch.dtype, x: Sequence[int], filters: int, about: Sequence[int]
) -> float:
    """Cycles that both gradients take beyond those of the weights' alone, at a block's beginning.

    Args:
        dtype: of the activations.
        x: [N, C, H, W] of what the convolution read.
        filters: K.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
    """
    merged, (_, weights) = problems(dtype, x, filters, False)
    return _cuda_plan.predicted(merged, about) - _cuda_plan.predicted(weights, about)


def fits(index: int, x: Sequence[int], filters: int, about: Sequence[int]) -> bool:
    """Whether a configuration takes bfloat16 activations of these sizes on a GPU.

    Args:
        index: of the configuration.
        x: [N, C, H, W] of what the convolution read.
        filters: K.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
    """
    merged, _ = problems(torch.bfloat16, x, filters, True)
    return _cuda_plan.plan(merged, about, index).configuration == index


@functools.lru_cache(maxsize=4096)
def _refusal(
    dtype: torch.dtype,
    x: tuple[int, ...],
    filters: int,
    about: tuple[int, ...],
    names: frozenset[str] | None,
) -> str | None:
    found = _cuda_plan.choose(problems(dtype, x, filters, True)[0], about, names)
    return found.why if found.configuration < 0 else None


def refusal(device: torch.device, dtype: torch.dtype, x: Sequence[int], filters: int) -> str | None:
    """Why no admitted configuration takes a 1x1 convolution, or None.

    Args:
        device: where.
        dtype: of the activations.
        x: [N, C, H, W] of what the convolution read.
        filters: K.
    """
    names = _admitted.names(OP, "cuda", device)
    return _refusal(dtype, tuple(x), filters, _cuda_plan.gpu(device), names)


def verdict(
    device: torch.device, dtype: torch.dtype, x: Sequence[int], filters: int, *, masked: bool
) -> Verdict:
    """`choose` on a device, among the admitted configurations.

    Args:
        device: where.
        dtype: of the activations.
        x: [N, C, H, W] of what the convolution read.
        filters: K.
        masked: whether a BatchNorm and ReLU stand below.
    """
    names, about = _admitted.names(OP, "cuda", device), _cuda_plan.gpu(device)
    return choose(dtype, tuple(x), filters, about, names, masked=masked)
