"""Run as a child: kernels on tensors that end, or begin, where memory that may be touched ends.

Any access beyond is a fault of the processor's, so that the parent sees the child die by a signal.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
import sys
import traceback
from collections.abc import Sequence

import pytest
import torch
from matrix import Operands, geometry_args, random_operands
from torch import Tensor
from triton_trace import Programs, every_program, last_program

from resnet_fused import cases, numerics
from resnet_fused.triton import _tiles

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
    """A copy of `t`, channels_last, between unmapped pages."""
    memory = unmapped_around(t.numel(), t.dtype, at)
    if t.dim() == 1:
        return memory.copy_(t)
    n, c, h, w = t.shape
    return memory.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


CASES = (
    # Pixels, channels and filters that no tile divides.
    cases.ConvCase("odd", 1, 70, 7, 5, 69, 2, 2, (1, 1), (1, 1), residual=True),
    # No padding and whole steps: the loads of pixels have no mask at all.
    cases.ConvCase("even", 3, 64, 5, 5, 66, stride=(2, 2), residual=True),
    cases.ConvCase("stem", 1, 3, 9, 9, 33, 7, 7, (2, 2), (3, 3)),
    cases.ConvCase("grouped", 1, 20, 4, 5, 20, 1, 2, groups=5),
    cases.ConvCase("depthwise", 1, 70, 4, 4, 70, 2, 2, groups=70),
)


def run(case: cases.ConvCase, at: str, plan: _tiles.Plan) -> None:
    """One call on guarded memory; its result must be right as well."""
    from resnet_fused.triton import conv_bn_act

    given = random_operands(case, torch.float16)
    operands = Operands(*(t if t is None else guarded(t, at) for t in given.tuple()))
    out = guarded(torch.full(case.output_shape, math.nan, dtype=torch.float16), at)
    conv_bn_act.launch(*operands.tuple(), out, *geometry_args(case), plan=plan)
    oracle = numerics.conv_bn_act_oracle(*operands.tuple(), **case.geometry, act=case.act)
    bound = numerics.conv_bn_act_bound(*operands.tuple(), oracle, **case.geometry)
    assert numerics.check_bound(out, oracle, bound).ok, (case, plan)


def pages(every: str) -> None:
    """Each configuration at both ends, by turns of the cases; all cases if `every` is "all"."""
    for i, tile in enumerate(_tiles.TILES):
        for j, case in enumerate(CASES):
            splits, flat = 1 + (i + j) % 2, tile.warps == 4
            if every == "all" or j in (i % 5, (i + 2) % 5):
                for at in ("end", "start"):
                    run(case, at, _tiles.Plan(tile, splits, flat, "for the test"))


def planted(argument: str, by: str) -> None:
    """One argument of the kernel off by a few: the child must die of it."""
    from resnet_fused.triton import conv_bn_act

    def change(arguments: dict) -> None:
        arguments[argument] += int(by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            conv_bn_act, "traceable", lambda kernel, _: Programs(kernel, every_program, change)
        )
        at = "end" if int(by) > 0 else "start"
        run(CASES[0], at, _tiles.Plan(_tiles.BY_NAME["64x64_4w4s"], 1, True, "for the test"))


def unreserved(shape: Sequence[int]) -> Tensor:
    """[N, C, H, W] float16, channels_last, all zero; takes memory only where it is written."""
    n, c, h, w = shape
    memory = unmapped_around(n * c * h * w, torch.float16, "end", FAR)
    return memory.view(n, h, w, c).permute(0, 3, 1, 2)


HUGE = {
    # More than 65,535 images; x and out of more than 2^31 elements.
    "x": cases.ConvCase("x", 70001, 64, 22, 22, 8, 2, 2, (11, 11)),
    "out": cases.ConvCase("out", 70001, 8, 22, 22, 64, residual=True),
}


def huge(which: str, index: str) -> None:
    """The last program of a call on a huge tensor; with `index` "narrow" in 32-bit offsets."""
    from resnet_fused.triton import conv_bn_act

    case = HUGE[which]
    x, out = unreserved(case.input_shape), unreserved(case.output_shape)
    residual = unreserved(case.output_shape) if case.residual else None
    small = random_operands(
        cases.ConvCase("last", 1, *case.input_shape[1:], case.k, case.r, case.s,
                       case.stride, residual=case.residual), torch.float16,
    )  # fmt: skip
    x[-1] = small.x[0]
    if residual is not None:
        residual[-1] = small.residual[0]
    assert max(x.numel(), out.numel()) > 2**31
    weight = small.weight.contiguous(memory_format=torch.channels_last)
    tile = _tiles.BY_NAME["128x64_4w4s"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_bn_act, "traceable", lambda kernel, _: Programs(kernel, last_program))
        if index == "narrow":
            patch.setattr(conv_bn_act, "fits_32_bits", lambda *tensors: True)
        conv_bn_act.launch(
            x, weight, small.scale, small.shift, residual, out, *geometry_args(case),
            plan=_tiles.Plan(tile, 1, False, "for the test"),
        )  # fmt: skip
    oracle = numerics.conv_bn_act_oracle(*small.tuple(), stride=case.stride)
    bound = numerics.conv_bn_act_bound(*small.tuple(), oracle, stride=case.stride)
    # Of the last image the last tile's pixels: all of them, if it has fewer than a tile.
    image = case.p * case.q
    pixels = min(image, (case.n * image - 1) % tile.m + 1)
    got, oracle, bound = (
        t.permute(0, 2, 3, 1).reshape(image, case.k)[-pixels:] for t in (out[-1:], oracle, bound)
    )
    check = numerics.check_bound(got, oracle, bound)
    assert check.ok, str(check)
    assert got.count_nonzero()


def main(scenarios: Sequence[str]) -> None:
    """Runs each scenario, "huge x wide", in a fork, and prints what became of it.

    A line for each: the exit status (negative: the signal) and the peak of its memory in MB beyond
    what the imports had taken.
    """
    torch.set_num_threads(1)  # a fork has no threads of a pool
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for scenario in scenarios:
        child = os.fork()
        if child == 0:
            kind, *arguments = scenario.split()
            status = 1
            try:
                torch.manual_seed(0)
                {"pages": pages, "planted": planted, "huge": huge}[kind](*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status, usage = os.wait4(child, 0)
        more = (usage.ru_maxrss - before) // 1024
        print(f"{scenario}: {os.waitstatus_to_exitcode(status)} {more}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
