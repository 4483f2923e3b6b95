"""What every launch needs: index widths, layouts, precision, the device's guard."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from . import _limits, _tiles

GROUP_M = 8
"""Rows of tiles that are walked together: with 128 rows each, 1024 pixels of operands in L2."""

MERGE_TILE = (16, 64)
"""Pixels x channels a program of the merge: 8 elements a thread, 16 KB of each split."""

LARGEST_OFFSET = 2**31 - 1


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


def channels_adjacent(t: Tensor) -> Tensor:
    """`t` [N, C, H, W] with neighbouring channels side by side: itself, or a channels_last copy.

    Strides over N, H and W may be anything: slices and expanded tensors are read where they lie.
    """
    if t.shape[1] <= 1 or t.stride(1) == 1:
        return t
    return t.contiguous(memory_format=torch.channels_last)


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


def plan_of(
    product: _tiles.Product, device: torch.device, allowed: frozenset[str] | None
) -> _tiles.Plan:
    """`_tiles.choose` for a device."""
    return _tiles.choose(product, _limits.limits(device), allowed)
