"""What every launch needs: index widths, layouts, precision, the device's guard."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from .. import _tuned
from . import _limits, _tiles

GROUP_M = 8
"""Rows of tiles that are walked together: with 128 rows each, 1024 pixels of operands in L2."""

MERGE_TILE = (16, 64)
"""Pixels x channels a program of the merge: 8 elements a thread, 16 KB of each split."""

LARGEST_OFFSET = 2**31 - 1

MOST_REGISTERS = 255
"""What a thread may have. Left to itself, ptxas spills some to make room for one more block; told
so of a kernel that stays below it anyway, it spills nothing."""


def most_registers(device: torch.device) -> int | None:
    """What ptxas is told of a kernel that multiplies or adds up in a loop.

    Nothing on sm_90, where it does not spill for one block more, but does if it is told.
    """
    return None if _limits.limits(device).capability == 90 else MOST_REGISTERS


def fits_32_bits(*tensors: Tensor | None) -> bool:
    """Whether every element's offset within its tensor fits into 32 bits, signed.

    A tile's last row may lie a tile beyond the last pixel, hence the margin.
    """
    for t in tensors:
        if t is None:
            continue
        reach = sum((size - 1) * abs(step) for size, step in zip(t.shape, t.stride(), strict=True))
        if reach >= LARGEST_OFFSET - 2**20 or t.numel() >= LARGEST_OFFSET - 2**20:
            return False
    return True


PIECE = 16
"""Bytes of the widest access of a thread; addresses must be multiples of it."""


def begins_at_a_piece(t: Tensor) -> bool:
    """Whether the first element's address is a multiple of `PIECE`.

    Tensors of tracing and of device "meta" have no address; a compiler's inputs are aligned.
    """
    real = type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"
    start = t.data_ptr() if real else t.storage_offset() * t.element_size()
    return start % PIECE == 0


def _fits_kernels(t: Tensor) -> bool:
    """Whether channels lie side by side and, where they divide so, in whole `PIECE`s.

    An address that is off, or a step between pixels that is, would have every element loaded and
    stored by itself: hundreds of pointers, which spill.
    """
    if t.shape[1] <= 1:
        return True
    if t.stride(1) != 1:
        return False
    size = t.element_size()
    if t.shape[1] * size % PIECE:
        return True  # no copy would help
    steps = [t.stride(dim) * size for dim in (0, 2, 3) if t.shape[dim] > 1]
    return begins_at_a_piece(t) and all(step % PIECE == 0 for step in steps)


def readable(t: Tensor) -> Tensor:
    """`t` [N, C, H, W] as a kernel reads it well: itself, or a channels_last copy.

    Strides over N, H and W may be anything that keeps pixels aligned: slices and expanded tensors
    are read where they lie.
    """
    return t if _fits_kernels(t) else t.clone(memory_format=torch.channels_last)


def writable(out: Tensor) -> Tensor:
    """Where a kernel stores `out` [N, C, H, W]: `out` itself, or a channels_last tensor.

    What is in the latter goes to `out` by a copy: one pass more, but element by element it would
    be many.
    """
    return out if _fits_kernels(out) else torch.empty_like(out, memory_format=torch.channels_last)


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: "tf32" where torch lets convolutions, else "tf32x3".

    Three products of the operands' leading and trailing 11 bits give float32's accuracy but for
    the last 2 bits of a product. For 16-bit operands it means nothing.
    """
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"


def traceable(kernel: Any, t: Tensor) -> Any:
    """A kernel for an operand: wrapped for Inductor to see where something traces.

    Tensors of tracing are of types of their own, or have no memory. On others the wrapper would
    take a millisecond, and interpreted kernels can't be traced at all.
    """
    plain = type(t) is Tensor and t.device.type != "meta"
    return kernel if plain or _limits.interpreted() else wrap_triton(kernel)


def on_device(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one; nothing for the CPU and for tensors of tracing."""
    if t.device.type != "cuda" or type(t) is not Tensor or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def call_of(
    op: str, x: Tensor, weight: Tensor, third: Tensor | None, *geometry: Any
) -> tuple[Any, ...]:
    """What tuning finds a call by; see `_tuned.key`.

    Args:
        op: a convolution's, "conv_bn_act".
        x: the input [N, C, H, W], or its gradient.
        weight: [K, C / groups, R, S], or its gradient.
        third: the residual (conv_bn_act), the BatchNorm below (conv_bn_stats), or the result or raw
            output (the gradients' ops).
        geometry: stride, padding, dilation, groups.
    """
    return op, x.dtype, x.shape, weight.shape, geometry, third is not None


def plan_of(
    product: _tiles.Product,
    device: torch.device,
    allowed: frozenset[str] | None,
    call: tuple[Any, ...] | None = None,
) -> _tiles.Plan:
    """What tuning found for a call on this GPU, else `_tiles.choose` for the device.

    Args:
        product: the sizes from which is chosen.
        device: of the tensors.
        allowed: names of the configurations to choose among; None for all.
        call: as of `call_of`; None asks the chooser alone.
    """
    limits = _limits.limits(device)
    found = None if call is None else _tuned.find("triton", device, *call)
    if found is not None and (allowed is None or found.configuration in allowed):
        tuned = _tiles.planned(product, limits, found.configuration, found.splits, found.why)
        if tuned is not None:
            return tuned
    return _tiles.choose(product, limits, allowed)
