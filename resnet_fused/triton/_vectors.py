"""What the kernels over per-channel values share: float64 numbers, tensors that may be absent."""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
"""Channels of a program: one a thread."""
WARPS = 4


@triton.jit
def joined(high, middle, low):
    """The float64 number that `parts_of` cut up."""
    return tl.full((), 0.0, tl.float64) + high + middle + low


@triton.jit
def elements_of(count, total, TOTAL: tl.constexpr):
    """Elements a channel in float64, 1 at least: from the device where it knows, else `count`."""
    found = tl.load(total) if TOTAL else tl.full((), 0, tl.float64) + count
    return tl.maximum(found, 1.0)


def parts_of(number: float) -> tuple[float, float, float]:
    """Three float32 numbers whose sum is `number`: arguments of kernels are no float64.

    As a constant of the kernel it would have every other momentum or eps compiled anew.
    """
    found = []
    for _ in range(3):
        found.append(ctypes.c_float(number).value)
        number -= found[-1]
    return found[0], found[1], found[2]


def step(t: Tensor | None) -> int:
    """Distance of a vector's elements; 0 where there is none."""
    return 0 if t is None else t.stride(0)
