"""conv_bn_act by TMA and wgmma, emulated: its configurations, shapes that try them, one call."""

from __future__ import annotations

import functools
from typing import Any

import emulated
import emulated_shapes
import torch
from emulated import Schedule
from torch import Tensor

from resnet_fused import numerics
from resnet_fused.cases import ConvCase

OP = "conv_bn_act"
DTYPES = (torch.bfloat16, torch.float16)
FEW = (2, *emulated.H200[1:])
"""So few multiprocessors that blocks stay for several tiles."""

CASES = (
    # A tile that is cut along every side, two steps of channels, all of a shortcut.
    ConvCase("1x1", 2, 72, 9, 9, 136, residual=True),
    ConvCase("3x3", 1, 64, 7, 9, 72, 3, 3, (1, 1), (1, 1), residual=True, act="none"),
    ConvCase("3x3_wide", 1, 72, 11, 9, 264, 3, 3, (1, 1), (1, 1), act="none"),
    ConvCase("3x3_stride2", 2, 64, 13, 11, 64, 3, 3, (2, 2), (1, 1), residual=True),
    ConvCase("1x1_stride2", 5, 40, 12, 13, 72, 1, 1, (2, 2)),
    ConvCase("3x3_dilated", 1, 8, 9, 10, 128, 3, 3, (1, 1), (2, 2), (2, 2), residual=True),
    ConvCase("3x3_unpadded", 2, 64, 10, 9, 24, 3, 3),
    ConvCase("5x2", 1, 24, 9, 8, 16, 5, 2, (1, 3), (2, 0), (1, 2), residual=True),
    ConvCase("groups", 2, 128, 6, 7, 144, 3, 3, (1, 1), (1, 1), groups=2, residual=True),
    ConvCase("1x1_groups", 1, 192, 9, 8, 48, groups=3),
    # Many pixels, few steps: tiles follow one another.
    ConvCase("many", 2, 64, 18, 15, 64, residual=True),
    ConvCase("pixel", 1, 16, 1, 1, 8, residual=True),
)


@functools.cache
def tiles() -> dict[int, dict]:
    """The configurations by TMA, by index."""
    table = emulated_shapes.tiles(OP)
    return {index: tile for index, tile in enumerate(table) if tile["tma"]}


def operands(
    case: ConvCase, dtype: torch.dtype, *, exact: bool = True, layout: str = "nhwc"
) -> tuple[Tensor | None, ...]:
    """x, weight, scale, shift, residual; all in channels_last but for x, whose layout is given."""
    layouts = (layout, "nhwc", "nhwc", "nhwc")
    d = emulated_shapes.Draw(7, OP, case, dtype, layouts, exact, 0, 1, Schedule())
    return emulated_shapes.operands(d)


def run(
    case: ConvCase, given: tuple[Tensor | None, ...], index: int, **settings: Any
) -> tuple[Tensor, dict]:
    """The output of a configuration and its report; settings are those of `emulated.using`."""
    settings = {"schedule": Schedule(), "splits": 1, "configuration": index, **settings}
    with emulated.using(**settings) as runs:
        y = emulated_shapes.call(OP, case, given)
    assert runs.reports[-1]["plan"]["configuration"] == index
    return y, runs.reports[-1]


def wrong(case: ConvCase, given: tuple[Tensor | None, ...], y: Tensor) -> str | None:
    """What is wrong with an exact result, or None."""
    oracle, _ = expected(case, given)
    bad = int((y != oracle.to(y.dtype)).sum())
    return f"{bad} of {y.numel()} elements differ" if bad else None


def expected(
    case: ConvCase, given: tuple[Tensor | None, ...], rounding: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """The oracle, and how far each element may be from it."""
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    return emulated_shapes.expected(OP, case, given, accumulation)


def check(
    case: ConvCase, given: tuple[Tensor | None, ...], y: Tensor, rounding: str = "nearest"
) -> numerics.BoundCheck:
    """The bound tier."""
    return numerics.check_bound(y, *expected(case, given, rounding))
