"""conv_bn_act by TMA and wgmma, emulated: its configurations, shapes that try them, one call."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import emulated
import emulated_shapes
import mutants
import torch
from emulated import Schedule
from mutants import HOSTILE, Trial
from torch import Tensor

from resnet_fused import numerics
from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

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
    """The configurations by TMA that bring each tap by itself, by index."""
    return {
        i: tile
        for i, tile in enumerate(_table())
        if tile["tma"] and not (tile["window"] or tile["cluster"] or tile["float32"])
    }


@functools.cache
def tf32_tiles() -> dict[int, dict]:
    """The same on float32, by index."""
    return {i: tile for i, tile in enumerate(_table()) if tile["tma"] and tile["float32"]}


@functools.cache
def windows() -> dict[int, dict]:
    """The configurations by windows of the input, by index."""
    return {i: tile for i, tile in enumerate(_table()) if tile["window"]}


@functools.cache
def clusters() -> dict[int, dict]:
    """The configurations by clusters that share a reduction, by index."""
    return {i: tile for i, tile in enumerate(_table()) if tile["cluster"]}


def sharing(name: str) -> tuple[int, int]:
    """Blocks of a cluster that share filters, and that share pixels."""
    filters, pixels = re.search(r"_(\d)c", name), re.search(r"_(\d)p", name)
    return int(filters.group(1)) if filters else 1, int(pixels.group(1)) if pixels else 1


def _table() -> list[dict]:
    return emulated_shapes.tiles(OP)


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


def run_into(
    case: ConvCase, given: tuple[Tensor | None, ...], out: Tensor, index: int, splits: int = 1
) -> dict[str, Any]:
    """Runs a configuration into an output of any strides; its report."""
    names = ("x", "weight", "scale", "shift", "residual")
    inputs = dict(zip(names, given, strict=True))
    vectors = {name: inputs[name].data_ptr() for name in ("scale", "shift")}
    made = problem(
        inputs["x"], inputs["weight"], inputs["residual"], out, case=case,
        dtype=emulated.TYPE_NAMES[out.dtype], relu=case.act == "relu", **vectors,
    )  # fmt: skip
    with emulated.using(schedule=Schedule()):
        settings = emulated.settings(("into",), inputs, {"out": out})
    return getattr(emulated.load(), OP)(settings, made, emulated.H200, index, splits, 0)


def problem(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    out: Tensor,
    case: ConvCase = CASES[1],
    **changes: Any,
) -> Any:
    """The problem for a plan."""
    tensors = {"x": x, "weight": weight, "residual": residual, "out": out}
    given = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
    strides = {
        f"{name}_stride": (0,) * 4 if t is None else t.stride() for name, t in tensors.items()
    }
    options = {
        "dtype": "bfloat16", "relu": True, "allow_tf32": True, "scale": 0, "shift": 0,
        "x_size": x.shape, "weight_size": weight.shape, "stride": case.stride,
        "padding": case.padding, "dilation": case.dilation, "groups": case.groups,
        "reverse": False, "dependent": False, "follows": False, "arrivals": 0, "arrivals_count": 0,
    }  # fmt: skip
    return emulated.load().ConvBnAct(**{**options, **given, **strides, **changes})


def tensors_of(case: ConvCase, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor | None]:
    """What a problem's tensors may be, in channels_last."""
    x, weight, _, _, residual = operands(case, dtype)
    out = emulated_shapes.lay_out(torch.zeros(case.output_shape, dtype=dtype), "nhwc")
    return {"x": x, "weight": weight, "residual": residual, "out": out}


def layer(case: ConvCase, batch: int, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """The problem of a layer at a batch size, with no memory and no shortcut."""
    sizes = (batch, *case.input_shape[1:]), case.weight_shape, (batch, *case.output_shape[1:])
    x, weight, out = (
        torch.empty(size, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
        for size in sizes
    )
    return problem(x, weight, None, out, case, dtype=emulated.TYPE_NAMES[dtype], **changes)


def planned(
    made: Any, index: int = -1, splits: int = 0, gpu: tuple[int, ...] = emulated.H200
) -> dict[str, Any]:
    """What would be launched; ValueError says why nothing can be."""
    return getattr(emulated.load(), f"{OP}_plan")(made, gpu, index, splits)


def in_rank_order() -> tuple[ConvCase, tuple[Tensor | None, ...], Tensor]:
    """A call whose result hangs on the order of four blocks' sums, and the one in theirs.

    2^25 and -2^25 meet before 1 comes: in float32 2^25 - 1 is no number.
    """
    case = ConvCase("ranks", 1, 256, 3, 5, 72, act="none")
    x = torch.zeros(case.input_shape, dtype=torch.bfloat16)
    weight = torch.zeros(case.weight_shape, dtype=torch.bfloat16)
    for channel, (a, b) in {0: (4096, 8192), 64: (4096, -8192), 128: (1, 1)}.items():
        x[:, channel], weight[:, channel] = a, b
    given = tuple(emulated_shapes.lay_out(t, "nhwc") for t in (x, weight))
    vectors = torch.ones(case.k), torch.zeros(case.k)
    expected = torch.ones(case.output_shape, dtype=torch.bfloat16)
    return case, (*given, *vectors, None), expected


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


def trial(
    label: str,
    name: str,
    case: ConvCase,
    given: tuple[Tensor | None, ...],
    wrong: Callable[[Any], str | None],
    settings: dict[str, Any],
) -> Trial:
    """One call of a configuration that notices faults.

    Args:
        label: what it is called.
        name: the configuration's.
        case: of it.
        given: operands.
        wrong: what is wrong with a result, or None.
        settings: schedule, gpu and splits.
    """
    geometry = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
    call = functools.partial(overload(OP, emulated.NAME), *given, *geometry, case.act)
    index = next(i for i, tile in enumerate(_table()) if tile["name"] == name)
    more = {"configuration": index, "reverse": False, "kept": False}
    return Trial(label, call, given, wrong, {**settings, **more})


def trials(
    ways: Iterable[tuple[str, ConvCase]],
    noisy: Collection[str],
    gpu: tuple[int, ...],
    splits: int = 1,
    dtypes: tuple[torch.dtype, torch.dtype] = DTYPES,
) -> list[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and some on noise.

    Args:
        ways: names of configurations, and what they are tried on.
        noisy: names of the cases that are run on noise too.
        gpu: what the grid is chosen for.
        splits: of each.
        dtypes: of integers, and of noise.
    """
    made = []
    for name, case in ways:
        for exact in (True, False) if case.name in noisy else (True,):
            dtype = dtypes[0] if exact else dtypes[1]
            given = operands(case, dtype, exact=exact)
            oracle, bound = expected(case, given)
            wrong = mutants._bits(oracle.to(dtype)) if exact else mutants._bound(oracle, bound)
            for schedule in HOSTILE if exact else HOSTILE[-1:]:
                label = f"{name} {case.name} exact={exact} {schedule}"
                settings = {"schedule": schedule, "gpu": gpu, "splits": splits}
                made.append(trial(label, name, case, given, wrong, settings))
    return made
