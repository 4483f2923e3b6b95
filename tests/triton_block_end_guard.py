"""Run as a child: `bn_add_act_conv_stats` beside memory that can't be touched; with huge steps."""

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

from resnet_fused import cases, numerics
from resnet_fused.ops import _training_checks_block_end as checks
from resnet_fused.triton import _tiles, conv_bn_stats
from resnet_fused.triton import bn_add_act_conv_stats as kernel

CASE = cases.ConvCase("odd", 1, 70, 7, 11, 69)
THREE = cases.ConvCase("three", 3, 64, 2, 2, 80)
STEP = 2**30 + 64
"""Elements between the images: the third begins beyond 2^31."""
NAMES = ("y", "norm", "residual", "residual_norm", "weight")


def run(
    case: cases.ConvCase, splits: int, place: Callable[[str, Tensor], Tensor], fault: str
) -> None:
    """One call; `place` puts a tensor where it is to lie. fault: "argument=what to add", or "-"."""
    generator = torch.Generator().manual_seed(6)
    operands = checks.exact_end(case, torch.float16, generator)
    form = torch.channels_last
    given = [
        place(name, t.contiguous(memory_format=form) if t.dim() == 4 else t)
        for name, t in zip(NAMES, operands, strict=True)
    ]
    end = numerics.bn_add_act_oracle(*operands[:4]).half()
    product = numerics.conv_bn_stats_oracle(end, None, operands[4]).half()
    blank = (torch.full_like(t, math.nan, memory_format=form) for t in (end, product))
    out, z = (place(name, t) for name, t in zip(("out", "z"), blank, strict=True))
    stats = place("-", torch.full((2, case.k), math.nan))

    def programs(launched: Any, _: Tensor) -> Programs:
        def plant(arguments: dict[str, Any]) -> None:
            name, _, by = fault.partition("=")
            if launched.fn.__name__ == "bn_add_act_conv_stats_kernel" and by:
                arguments[name] += int(by)

        return Programs(launched, every_program, plant)

    def workspace(*shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], Sequence) else shape
        return place("-", torch.full(tuple(sizes), math.nan, dtype=dtype, device=device))

    with pytest.MonkeyPatch.context() as patch:
        for module in (kernel, conv_bn_stats):
            patch.setattr(module, "traceable", programs)
        patch.setattr(torch, "empty", workspace)
        tile = _tiles.BY_NAME["32x64_4w4s"]
        plan = _tiles.Plan(tile, splits, False, "for the test")
        kernel.launch(*given, out, z, stats, plan=plan)
    assert torch.equal(out, end) and torch.equal(z, product)
    oracle = numerics.stats_oracle(product)
    check = numerics.check_bound(stats, oracle, numerics.stats_bound(product, oracle))
    assert check.ok, str(check)


def both(at: str, splits: str, fault: str) -> None:
    """Everything ends, or begins, where memory that may be touched ends."""
    run(CASE, int(splits), lambda name, t: guarded(t, at), fault)


def wide(which: str, fault: str) -> None:
    """The images of one tensor lie 2^30 elements apart."""

    def place(name: str, t: Tensor) -> Tensor:
        if name != which:
            return t
        n, c, _, w = t.shape
        whole = unreserved((n * STEP,), t.dtype)
        return whole.as_strided(t.shape, (STEP, 1, w * c, c)).copy_(t)

    run(THREE, 1, place, fault)


if __name__ == "__main__":
    triton_guard.SCENARIOS.update({"both": both, "wide": wide})
    triton_guard.main(sys.argv[1:])
