"""conv_dgrad by TMA and wgmma, emulated: its configurations, shapes that try them, one call.

Of functions that take an op the same for conv_wgrad, whose shapes are in wgrad_by_tma.py.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import emulated
import emulated_shapes
import mutants
import torch
from emulated import Schedule
from mutants import HOSTILE, Trial
from torch import Tensor

from resnet_fused.cases import ConvCase

OP = "conv_dgrad"
DTYPES = (torch.bfloat16, torch.float16)
FEW = (2, *emulated.H200[1:])
"""So few multiprocessors that blocks stay for several tiles."""

CASES = (
    # Tiles that are cut along every side, two steps of filters, and an odd number of steps.
    ConvCase("1x1", 2, 136, 9, 9, 72),
    ConvCase("3x3", 1, 72, 7, 9, 64, 3, 3, (1, 1), (1, 1)),
    ConvCase("3x3_wide", 1, 264, 11, 9, 72, 3, 3, (1, 1), (1, 1), act="none"),
    ConvCase("3x3_dilated", 1, 128, 9, 10, 8, 3, 3, (1, 1), (2, 2), (2, 2)),
    ConvCase("3x3_unpadded", 2, 24, 10, 9, 64, 3, 3, act="none"),
    # More padding than taps reach, so that dx is further in than dy is.
    ConvCase("5x2", 1, 16, 9, 8, 24, 5, 2, (1, 1), (2, 3), (1, 2)),
    ConvCase("1x1_padded", 2, 8, 5, 6, 16, 1, 1, (1, 1), (2, 1)),
    ConvCase("groups", 2, 144, 6, 7, 128, 3, 3, (1, 1), (1, 1), groups=2),
    ConvCase("1x1_groups", 1, 48, 9, 8, 192, groups=3, act="none"),
    # Many pixels, few steps: tiles follow one another.
    ConvCase("many", 2, 64, 18, 15, 64),
    ConvCase("pixel", 1, 8, 1, 1, 16),
)


@functools.cache
def tiles(op: str = OP) -> dict[int, dict]:
    """The configurations by TMA, by index."""
    return {i: tile for i, tile in enumerate(emulated_shapes.tiles(op)) if tile["tma"]}


def operands(
    case: ConvCase, dtype: torch.dtype, *, exact: bool = True, layout: str = "nhwc"
) -> tuple[Tensor | None, ...]:
    """dy, y (None without ReLU), x, weight, scale; in channels_last but for dy and y."""
    layouts = ("nhwc", "nhwc", layout, layout)
    d = emulated_shapes.Draw(7, OP, case, dtype, layouts, exact, 0, 1, Schedule())
    return emulated_shapes.operands(d)


def run(
    case: ConvCase, given: tuple[Tensor | None, ...], index: int, op: str = OP, **settings: Any
) -> tuple[Tensor, dict]:
    """The gradient by a configuration and its report; settings are those of `emulated.using`."""
    settings = {"schedule": Schedule(), "splits": 1, "configuration": index, **settings}
    with emulated.using(**settings) as runs:
        made = emulated_shapes.call(op, case, given)
    assert runs.reports[-1]["plan"]["configuration"] == index
    return made, runs.reports[-1]


def problem(given: dict[str, Tensor | None], case: ConvCase, **changes: Any) -> Any:
    """The problem for a plan; given: dy, y, x and weight."""
    pointers = {name: 0 if t is None else t.data_ptr() for name, t in given.items()}
    strides = {f"{name}_stride": (0,) * 4 if t is None else t.stride() for name, t in given.items()}
    options = {
        "dtype": "bfloat16", "allow_tf32": True, "scale": 0, "x_size": case.input_shape,
        "weight_size": case.weight_shape, "stride": case.stride, "padding": case.padding,
        "dilation": case.dilation, "groups": case.groups,
    }  # fmt: skip
    return emulated.load().ConvGradient(**{**options, **pointers, **strides, **changes})


def tensors_of(case: ConvCase) -> dict[str, Tensor | None]:
    """What a problem's tensors may be, in channels_last."""
    dy, y, x, weight, _ = operands(case, torch.bfloat16)
    return {"dy": dy, "y": y, "x": x, "weight": weight}


def layer(case: ConvCase, batch: int) -> Any:
    """The problem of a layer at a batch size, with no memory but y's word that it is there."""
    sizes = {"dy": (batch, *case.output_shape[1:]), "x": (batch, *case.input_shape[1:])}
    sizes |= {"y": sizes["dy"], "weight": case.weight_shape}
    made = {
        name: torch.empty(size, dtype=torch.bfloat16, device="meta").contiguous(
            memory_format=torch.channels_last
        )
        for name, size in sizes.items()
    }
    return problem(made, case, y=4096, x_size=sizes["x"])


def planned(
    made: Any,
    index: int = -1,
    splits: int = 0,
    gpu: tuple[int, ...] = emulated.H200,
    op: str = OP,
) -> dict[str, Any]:
    """What would be launched; ValueError says why nothing can be."""
    return getattr(emulated.load(), f"{op}_plan")(made, gpu, index, splits)


def expected(
    case: ConvCase, given: tuple[Tensor | None, ...], rounding: str = "nearest", op: str = OP
) -> tuple[Tensor, Tensor]:
    """The oracle, and how far each element may be from it."""
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    return emulated_shapes.expected(op, case, given, accumulation)


def wrong(
    case: ConvCase, given: tuple[Tensor | None, ...], made: Tensor, op: str = OP
) -> str | None:
    """What is wrong with an exact result, or None."""
    bad = int((made != expected(case, given, op=op)[0].to(made.dtype)).sum())
    return f"{bad} of {made.numel()} elements differ" if bad else None


def trials(
    ways: Iterable[tuple[str, ConvCase]],
    noisy: Collection[str],
    gpu: tuple[int, ...],
    splits: int = 1,
    op: str = OP,
) -> list[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and some on noise.

    Args:
        ways: names of configurations, and what they are tried on.
        noisy: names of the cases that are run on noise too.
        gpu: what the grid is chosen for.
        splits: of the reduction.
        op: whose configurations they are.
    """
    made = []
    index = {tile["name"]: i for i, tile in tiles(op).items()}
    for name, case in ways:
        for exact in (True, False) if case.name in noisy else (True,):
            dtype = DTYPES[0] if exact else DTYPES[1]
            given = operands(case, dtype, exact=exact)
            oracle, bound = expected(case, given, op=op)
            judged = mutants._bits(oracle.to(dtype)) if exact else mutants._bound(oracle, bound)
            for schedule in HOSTILE if exact else HOSTILE[-1:]:
                settings = {
                    "schedule": schedule, "configuration": index[name], "splits": splits,
                    "gpu": gpu,
                }  # fmt: skip
                call = functools.partial(emulated_shapes.call, op, case, given)
                label = f"{name} {case.name} exact={exact} {schedule}"
                made.append(Trial(label, call, given, judged, settings))
    return made
