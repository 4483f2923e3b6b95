"""Memory that ends, or begins, where nothing may be touched: an access beyond kills the process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
NO_RESERVE = 0x4000  # MAP_NORESERVE on Linux; the mmap module has a name for it from 3.13 on
FAR = 2**33 + PAGE
"""Bytes that can't be touched around a huge tensor: an offset that wrapped at 2^31 lands there."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def unmapped_around(size: int, dtype: torch.dtype, at: str, gap: int = PAGE) -> Tensor:
    """`size` elements with nothing behind the last ("end") or before the first ("start")."""
    length = size * dtype.itemsize
    whole = -(-length // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    begin = _libc.mmap(None, whole + 2 * gap, 0, flags, -1, 0)
    if begin in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    if _libc.mprotect(begin + gap, whole, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
    first = begin + gap + (whole - length if at == "end" else 0)
    memory = (ctypes.c_char * length).from_address(first)
    return torch.frombuffer(memory, dtype=dtype)


def guarded(t: Tensor, at: str) -> Tensor:
    """A copy of a dense `t`, in the same layout, between unmapped pages."""
    memory = unmapped_around(t.numel(), t.dtype, at)
    return memory.as_strided(t.shape, t.stride()).copy_(t)


def unreserved(
    shape: Sequence[int], dtype: torch.dtype = torch.float16, layout: str = "nhwc"
) -> Tensor:
    """All zero, [N, C, H, W] channels_last or as `layout` says; takes memory where it is written.

    An element that is 2^31 or more away from it in 32-bit arithmetic can't be touched.
    """
    size = 1
    for extent in shape:
        size *= extent
    memory = unmapped_around(size, dtype, "end", FAR)
    if layout == "nchw" or len(shape) != 4:
        return memory.view(shape)
    n, c, h, w = shape
    return memory.view(n, h, w, c).permute(0, 3, 1, 2)
