"""Predicts chains in e4m3 with the 3x3 in front, of which no kernel is built.

The model is that of csrc/launch/conv_chain_window.cpp, with its rates, for bytes a channel and
forms of the kernel that it does not have; for bfloat16 it gives the plans' own cycles, which a test
holds it to. What it is compared with, the 3x3 by windows and the chain behind it, are plans.
Nothing of it has been measured. Needs the extension built with nvcc.

    python benchmarks/predict_fp8_front.py            # the tables
    python benchmarks/predict_fp8_front.py --write    # into docs/fp8.md
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_fp8
from predict_chains import with_fronts

from resnet_fused.cases import ChainCase
from resnet_fused.ops import _chain_plan

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "fp8.md"
BEGIN, END = "<!-- front: begin -->", "<!-- front: end -->"
SOURCES = ("conv_plan.h", "conv_chain_rates.h")
ROWS, TAPS = 64, 9
"""Of a warpgroup's part of a tile, and channels of a step; of the 3x3."""


class Form(NamedTuple):
    """A kernel's form.

    Attributes:
        name: in the table.
        warpgroups: that multiply; each has 64 positions of a tile.
        steps: of 64 channels of `out` that are waited for together.
    """

    name: str
    warpgroups: int = 2
    steps: int = 1


BUILT = Form("bfloat16's kernel for e4m3")
FORMS = (BUILT, Form("steps of 128", steps=2), Form("three", 3), Form("both", 3, 2))


@functools.cache
def rate(name: str) -> float:
    """A constant of the C++ models.

    Args:
        name: "kMemoryBytes".
    """
    text = "".join((ROOT / "csrc" / "launch" / source).read_text() for source in SOURCES)
    (found,) = re.findall(rf"constexpr double {name} = ([0-9. *]+);", text)
    return math.prod(map(float, found.split("*")))


class Tile(NamedTuple):
    """Cycles of a multiprocessor that each limit of a tile takes."""

    products: float
    shared: float
    l2: float
    memory: float
    alone: float


def tile(case: ChainCase, size: int, form: Form = BUILT, streams: bool = False) -> Tile:
    """What a tile takes.

    Args:
        case: a chain with 64 channels in front.
        size: bytes of a channel; of one, sums are added up in parts.
        form: of the kernel.
        streams: filters into `next` come with each step.
    """
    m, row = ROWS * form.warpgroups, ROWS * size
    area, steps, boxes = m * ROWS, case.c / ROWS, case.m / ROWS
    window = math.ceil((m + 2 * (case.w + 2)) / 8) * 8 * row
    projects = bool(case.projected)
    products = area * (TAPS * ROWS + steps * (ROWS + case.projected + case.m))
    products *= size / 2 / rate("kChainUnit")
    streamed = steps * case.m * row if streams else 0
    left = (m + form.warpgroups * ROWS) * row  # both sides of a product by shared memory
    of_step = form.warpgroups * (ROWS + case.m) * row + 2 * (1 + (not projects)) * m * row
    of_step += projects * left
    passed = TAPS * left + window + steps * of_step + streamed + (projects + 2 * boxes) * m * row
    beside = (steps * ((not projects) + case.out_stride**-2) + projects + boxes) * m * row
    results = (1 + steps + boxes) * area / rate("kResults")
    parts = math.ceil(TAPS / 2) * m * ROWS + steps / 2 * m * case.m
    adds = parts / rate("kInstructions") if size == 1 else 0
    waits = (1 + steps / form.steps) * rate("kStepWaits")
    return Tile(
        products,
        passed / rate("kSharedBytes"),
        (window + beside) / rate("kCacheBytes") + streamed / rate("kSameLines"),
        (m * row + beside) / rate("kMemoryBytes"),
        products / form.warpgroups + results + adds + waits,
    )


def cycles(case: ChainCase, size: int, form: Form = BUILT, streams: bool = False) -> float:
    """Of the launch; arguments as of `tile`."""
    positions = case.n * (case.h + 1) * (case.w + 1) - (case.w + 1) - 1
    tiles = math.ceil(positions / (ROWS * form.warpgroups))
    each = math.ceil(tiles / min(tiles, predict_fp8.GPU[0]))
    steps = case.c / ROWS
    staying = TAPS * ROWS + steps * (ROWS * (1 + bool(case.projected)) + case.m * (not streams))
    once = staying * ROWS * size / rate("kSameLines")
    return each * max(tile(case, size, form, streams)) + once + 2 * rate("kLatency")


def fronts() -> list[ChainCase]:
    """The first stage's chains with their 3x3, at the batch of the other predictions."""
    return [
        dataclasses.replace(case, n=predict_fp8.BATCH)
        for case in with_fronts(64)
        if case.front == ROWS
    ]


def microseconds(case: ChainCase, form: Form) -> float:
    """Of a chain in e4m3 in one kernel of that form."""
    return cycles(case, 1, form) / _chain_plan.CLOCK * 1e6


def apart(case: ChainCase) -> tuple[float, float]:
    """Microseconds of the 3x3 by windows, and of the chain behind it."""
    behind = predict_fp8.chain(dataclasses.replace(case, front=0), torch.float8_e4m3fn)
    assert behind is not None
    return predict_fp8.convolution(case.parts[0], torch.float8_e4m3fn).us, behind.us


def about(case: ChainCase) -> str:
    """A chain in words."""
    projected = f" + {case.projected} projected" if case.projected else ""
    even = ", even pixels of `out`" if case.out_stride == 2 else ""
    return f"{case.k}{projected}, {case.c}, {case.m}{even}"


def text() -> str:
    """Both tables as Markdown."""
    lines = [
        "| a tile of 128 positions at 56 x 56 | products | shared memory | L2 | memory | one "
        "warpgroup by itself |",
        "| --- " * 6 + "|",
    ]
    for case in fronts():
        lines.append(f"| {about(case)} | {' | '.join(f'{c:,.0f}' for c in tile(case, 1))} |")
    lines += ["", f"| us at batch {predict_fp8.BATCH} | 3x3 + chain | "]
    lines[-1] += " | ".join(form.name for form in FORMS) + " |"
    lines.append("| --- " * (2 + len(FORMS)) + "|")
    for case in fronts():
        cells = [f"{microseconds(case, form):.0f}" for form in FORMS]
        lines.append(f"| {about(case)} | {'{:.0f} + {:.0f}'.format(*apart(case))} | ")
        lines[-1] += " | ".join(cells) + " |"
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/fp8.md.")
def main(write: bool) -> None:
    """Predict chains in e4m3 with the 3x3 in front."""
    said = text()
    click.echo(said)
    if write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{said}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
