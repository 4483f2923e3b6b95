"""Run as a child: `conv_chain` beside memory that can't be touched, and with huge steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_guard
from guarded_memory import guarded
from torch import Tensor
from triton_huge import unreserved
from triton_trace import Programs, every_program

from resnet_fused import cases, numerics
from resnet_fused.triton import _chain_tiles

CASE = cases.ChainCase("odd", 1, 17, 7, 11, 70, 19, 13, 2, 11, 2)
PLAIN = cases.ChainCase("plain", 1, 17, 7, 11, 70, 19)
THREE = cases.ChainCase("three", 3, 64, 2, 2, 64, 64)
PROJECTED = cases.ChainCase("projected", 3, 64, 2, 2, 64, 64, 64)
STEP = 2**30 + 64
"""Elements between the images: the third begins beyond 2^31."""


def run(case: cases.ChainCase, place: Callable[[str, Tensor], Tensor], fault: str) -> None:
    """One call; `place` puts a tensor where it is to lie. fault: "argument=what to add", or "-"."""
    from resnet_fused.triton import conv_chain as kernel

    operands = numerics.chain_operands(case, torch.float16, exact=True)
    strides = case.projection_stride, case.out_stride
    expected = numerics.conv_chain_expected(operands, torch.float16, *strides)
    form = torch.channels_last
    given = [
        None if t is None else place(name, t if t.dim() == 1 else t.contiguous(memory_format=form))
        for name, t in operands._asdict().items()
    ]
    shapes = {"out": case.stored_shape, "following": (case.n, case.m, case.h, case.w)}
    results = [
        place(name, torch.full(shape, math.nan, dtype=torch.float16).to(memory_format=form))
        for name, shape in shapes.items()
    ]

    def programs(launched: Any, _: Tensor) -> Programs:
        def plant(arguments: dict[str, Any]) -> None:
            name, _, by = fault.partition("=")
            if by:
                arguments[name] += int(by)

        return Programs(launched, every_program, plant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "traceable", programs)
        kernel.launch(*given, *results, *strides, False, config=_chain_tiles.CONFIGS[0])
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


def both(at: str, fault: str) -> None:
    """Everything ends, or begins, where memory that may be touched ends."""
    run(CASE, lambda name, t: guarded(t, at), fault)
    run(PLAIN, lambda name, t: guarded(t, at), fault)


def wide(which: str, fault: str) -> None:
    """The images of one tensor lie 2^30 elements apart."""

    def place(name: str, t: Tensor) -> Tensor:
        if name != which:
            return t
        n, c, _, w = t.shape
        whole = unreserved((n * STEP,), t.dtype)
        return whole.as_strided(t.shape, (STEP, 1, w * c, c)).copy_(t)

    run(PROJECTED if which == "projected" else THREE, place, fault)


if __name__ == "__main__":
    triton_guard.SCENARIOS.update({"both": both, "wide": wide})
    triton_guard.main(sys.argv[1:])
