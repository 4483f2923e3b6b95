"""conv_bn_act_fp8 by TMA and wgmma, emulated: configurations, shapes that try them, one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import emulated
import torch
from emulated import Schedule
from emulated_fp8 import OP, OUTS
from emulated_shapes import lay_out
from fp8_operands import Fp8Operands, exact_operands, random_fp8
from mutants import HOSTILE, Trial
from torch import Tensor

from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

FEW = (2, *emulated.H200[1:])
"""So few multiprocessors that blocks stay for several tiles."""

TURNS = 2
"""The configuration whose warpgroups take turns."""

CASES = (
    # A tile that is cut along every side, two steps of channels, all of a shortcut.
    ConvCase("1x1", 2, 144, 9, 9, 144, residual=True),
    ConvCase("3x3", 1, 64, 7, 9, 80, 3, 3, (1, 1), (1, 1), residual=True, act="none"),
    ConvCase("3x3_wide", 1, 144, 11, 9, 272, 3, 3, (1, 1), (1, 1), act="none"),
    ConvCase("3x3_stride2", 2, 128, 13, 11, 64, 3, 3, (2, 2), (1, 1), residual=True),
    ConvCase("1x1_stride2", 5, 48, 12, 13, 80, 1, 1, (2, 2)),
    ConvCase("3x3_dilated", 1, 16, 9, 10, 128, 3, 3, (1, 1), (2, 2), (2, 2), residual=True),
    ConvCase("5x2", 1, 32, 9, 8, 16, 5, 2, (1, 3), (2, 0), (1, 2), residual=True),
    ConvCase("groups", 2, 256, 6, 7, 160, 3, 3, (1, 1), (1, 1), groups=2, residual=True),
    # Many pixels, few steps: tiles follow one another.
    ConvCase("many", 2, 64, 18, 15, 64, residual=True),
    ConvCase("deep", 1, 528, 5, 5, 32),
    ConvCase("pixel", 1, 16, 1, 1, 16, residual=True),
)


@functools.cache
def table() -> list[dict]:
    """All configurations."""
    return getattr(emulated.load(), f"{OP}_configurations")()


@functools.cache
def tiles() -> list[dict]:
    """Those that bring each tap by itself: the first ones of the table."""
    return [tile for tile in table() if not tile["window"]]


@functools.cache
def windows() -> dict[int, dict]:
    """Those by windows of the input, by index."""
    return {i: tile for i, tile in enumerate(table()) if tile["window"]}


def operands(
    case: ConvCase, out: torch.dtype, *, exact: bool = True, layout: str = "nhwc"
) -> Fp8Operands:
    """Operands in channels_last but for x, whose layout is given."""
    made = (exact_operands if exact else random_fp8)(case, out_dtype=out)
    residual = None if made.residual is None else lay_out(made.residual, "nhwc")
    return dataclasses.replace(
        made,
        x=lay_out(made.x, layout),
        weight=lay_out(made.weight, "nhwc"),
        residual=residual,
    )


def run(case: ConvCase, given: Fp8Operands, index: int, **settings: Any) -> tuple[Tensor, dict]:
    """The output of a configuration and its report; settings are those of `emulated.using`."""
    settings = {"schedule": Schedule(), "splits": 1, "configuration": index, **settings}
    with emulated.using(**settings) as runs:
        y = overload(OP, emulated.NAME)(*given.tuple(), *given.options(case))
    assert runs.reports[-1]["plan"]["configuration"] == index
    return y, runs.reports[-1]


def wrong(case: ConvCase, given: Fp8Operands, y: Tensor) -> str | None:
    """What is wrong with an exact result, or None."""
    bad = int((y.float() != given.expected(case).float()).sum())
    return f"{bad} of {y.numel()} elements differ" if bad else None


def _judge(case: ConvCase, given: Fp8Operands, *, exact: bool) -> Callable[[Tensor], str | None]:
    """What is wrong with a result, as a `Trial` asks."""

    def bits(y: Tensor) -> str | None:
        return wrong(case, given, y)

    def bound(y: Tensor) -> str | None:
        found = given.check(case, y)
        return None if found.ok else str(found)

    return bits if exact else bound


def trials(
    ways: Iterable[tuple[str, ConvCase, tuple[int, ...]]], gpu: tuple[int, ...]
) -> list[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and on noise.

    Args:
        ways: names of configurations, what they are tried on, places of the results' types.
        gpu: what the grid is chosen for.
    """
    made = []
    index = {tile["name"]: i for i, tile in enumerate(table())}
    for name, case, places in ways:
        for place, out in enumerate(OUTS[i] for i in places):
            for exact in (True, False) if place == 0 else (True,):
                given = operands(case, out, exact=exact)
                # torch compares no e4m3.
                bytes_of = [None if t is None else t.view(torch.uint8) for t in given.tuple()]
                for schedule in HOSTILE if exact else HOSTILE[-1:]:
                    made.append(
                        Trial(
                            f"{name} {case.name} {out} exact={exact} {schedule}",
                            functools.partial(
                                overload(OP, emulated.NAME), *given.tuple(), *given.options(case)
                            ),
                            tuple(bytes_of),
                            _judge(case, given, exact=exact),
                            {
                                "schedule": schedule, "configuration": index[name], "splits": 1,
                                "gpu": gpu, "reverse": False,
                            },
                        )
                    )  # fmt: skip
    return made
