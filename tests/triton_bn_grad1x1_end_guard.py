"""Run as a child: `conv_bn_grad1x1_end` beside memory that can't be touched, with huge steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton_guard
from guarded_memory import guarded
from torch import Tensor
from triton_huge import unreserved
from triton_trace import Programs, every_program

from resnet_fused import cases
from resnet_fused.ops import _training_checks_dgrad_end as end_checks
from resnet_fused.ops import _training_checks_grad1x1_end as checks

CASE = cases.ConvCase("odd", 1, 70, 7, 11, 61)
THREE = cases.ConvCase("three", 3, 64, 2, 2, 64)
STEP = 2**30 + 64
"""Elements between the images: the third begins beyond 2^31."""
ALIKE = ("out", "raw", "residual")


def run(case: cases.ConvCase, place: Callable[[str, Tensor], Tensor], fault: str) -> None:
    """One call; `place` puts a tensor where it is to lie. fault: "argument=what to add", or "-"."""
    from resnet_fused.triton import conv_bn_grad1x1_end as kernel

    operands = end_checks.exact_operands(case, torch.float16)
    dx, sums, dweight = checks.expected(operands, case, 1)
    form = torch.channels_last
    given = {
        name: place(name, t.contiguous(memory_format=form) if t.dim() == 4 else t)
        for name, t in operands._asdict().items()
    }
    like = torch.full(case.input_shape, math.nan, dtype=torch.float16)
    blank = [torch.full_like(t, math.nan) for t in (sums, dweight.half())]
    results = (
        place("dx", like.contiguous(memory_format=form)), place("-", blank[0]), place("-", blank[1])
    )  # fmt: skip

    def programs(launched: Any, _: Tensor) -> Programs:
        def plant(arguments: dict[str, Any]) -> None:
            name, _, by = fault.partition("=")
            if launched.fn.__name__ == "conv_bn_grad1x1_end_kernel" and by:
                arguments[name] += int(by)

        return Programs(launched, every_program, plant)

    def workspace(*shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], Sequence) else shape
        return place("-", torch.full(tuple(sizes), math.nan, dtype=dtype, device=device))

    from resnet_fused.triton import conv_bn_grad1x1 as merging

    with pytest.MonkeyPatch.context() as patch:
        for module in (kernel, merging):
            patch.setattr(module, "traceable", programs)
        patch.setattr(torch, "empty", workspace)
        launch: Any = kernel.launch
        launch(*given.values(), *results, 1, config=kernel.CONFIGS[0])
    for got, wanted in zip(results, (dx, sums, dweight.half()), strict=True):
        assert torch.equal(got, wanted)


def both(at: str, fault: str) -> None:
    """Everything ends, or begins, where memory that may be touched ends."""
    run(CASE, lambda name, t: guarded(t, at), fault)


def wide(which: str, fault: str) -> None:
    """The images of one tensor lie 2^30 elements apart; of raw, with it out and the residual."""
    names = ALIKE if which == "raw" else (which,)

    def place(name: str, t: Tensor) -> Tensor:
        if name not in names:
            return t
        n, c, _, w = t.shape
        whole = unreserved((n * STEP,), t.dtype)
        return whole.as_strided(t.shape, (STEP, 1, w * c, c)).copy_(t)

    run(THREE, place, fault)


if __name__ == "__main__":
    triton_guard.SCENARIOS.update({"both": both, "wide": wide})
    triton_guard.main(sys.argv[1:])
