"""Predicts ResNet-50 in e4m3 beside bfloat16 on an H200, by the plans of the CUDA kernels.

Each convolution takes what its plan predicts, or its bytes at a device copy's rate where that is
longer; launches are left aside, as are stem and head. Chains are those that their plans predict to
win; behind a 3x3 there are plans in bfloat16 alone. Then the whole engine as predict_cuda_engine.py
counts it: the part of memory's rate that a kernel reaches, a launch for each, stem and head, which
compute in bfloat16 on both sides. Nothing of it has been measured. Needs the extension built with
nvcc, which holds the models.

    python benchmarks/predict_fp8.py            # the tables
    python benchmarks/predict_fp8.py --write    # into docs/fp8.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import click
import torch
from predict_chains import ABOUT, MEMORY, with_fronts
from predict_cuda_engine import projections, stem_us
from predict_engine import head_us
from predict_triton import LAUNCH
from predict_triton import MEMORY as REACHED

from resnet_fused import roofline
from resnet_fused.cases import RESNET50_LAYERS, ChainCase, ConvCase
from resnet_fused.ops import _chain_plan, _cuda_chain, _cuda_fp8, _cuda_plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "fp8.md"
BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
GAINS = "<!-- gains: begin -->", "<!-- gains: end -->"
BATCH = 256
BATCHES = 1, 8, 32, 256
GPU = (*ABOUT, 90)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
GROUPS = (
    ("layer 1 and the first of layer 2", "layer1"),
    ("layer 2 from there to the first of layer 3", "layer2"),
)
"""What a chain at a stage's end reaches into: the next stage's first convolution."""


AIM = 1.4
"""What e4m3 is to gain over bfloat16, of the whole engine."""


class Rates(NamedTuple):
    """Bytes a second through memory, microseconds of a launch, and how the names of those
    configurations of conv_bn_act_fp8 end that are left out."""

    memory: float
    launch: float
    without: str | None = None


BARE = Rates(MEMORY, 0.0)
ENGINE = Rates(REACHED, 1e6 * LAUNCH)
FOUR = "_2c_2p"
"""Clusters of four blocks that share filters and pixels."""


class Cost(NamedTuple):
    """Of some calls together."""

    bytes: float = 0.0
    us: float = 0.0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        return Cost(self.bytes + times * other.bytes, self.us + times * other.us)


def image(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without memory, its channels side by side."""
    last = torch.channels_last
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)


def problem(case: ConvCase, dtype: torch.dtype) -> _cuda_plan.Problem:
    """What the plan of a convolution is asked, its tensors all of one dtype."""
    out = image(dtype, *case.output_shape)
    residual = out if case.residual else None
    operands = image(dtype, *case.input_shape), image(dtype, *case.weight_shape), residual
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    if dtype is E4M3:
        return _cuda_fp8.problem_of(operands, geometry, out, real=False)
    return _cuda_plan.problem_of("conv_bn_act", operands, geometry, out, real=False)


def convolution(case: ConvCase, dtype: torch.dtype, rates: Rates = BARE) -> Cost:
    """One convolution at its batch."""
    moved = roofline.conv_cost(case, dtype).bytes
    made = problem(case, dtype)
    least = _cuda_plan.plan(made, GPU)
    names = _cuda_plan.configurations("conv_bn_act_fp8") if dtype is E4M3 else ()
    if names and rates.without and names[least.configuration].endswith(rates.without):
        others = [i for i, name in enumerate(names) if not name.endswith(rates.without)]
        plans = [_cuda_plan.plan(made, GPU, i, 1) for i in others if "_win" not in names[i]]
        least = min(plans, key=lambda plan: plan.cycles)
    return timed(least.cycles, moved, rates)


def timed(cycles: float, moved: float, rates: Rates) -> Cost:
    """By cycles or by bytes, whichever takes longer, and a launch."""
    us = 1e6 * max(cycles / _chain_plan.CLOCK, moved / rates.memory)
    return Cost(moved, us + rates.launch)


def chain(case: ChainCase, dtype: torch.dtype, rates: Rates = BARE) -> Cost | None:
    """A chain by its plan; None where no configuration takes it."""
    found = _cuda_chain.predict(case, dtype, GPU, None)
    if isinstance(found, str):
        return None
    return timed(found[0], roofline.conv_chain_cost(case, dtype).bytes, rates)


def layers(stage: str, batch: int = BATCH) -> list[ConvCase]:
    """The convolutions of a stage behind what the chain before it ends in, and the next one's
    first; "" for the whole network but the stem."""
    size = {"layer1": 56, "layer2": 28}.get(stage)
    found = []
    for case in RESNET50_LAYERS[1:]:
        of = case.h // case.stride[0]  # of a stage's images, its first convolution's aside
        if size is not None and of != size:
            continue
        case = dataclasses.replace(case, n=batch)
        if case.c * 4 == case.k and case.c == 64:
            # The first stage's projection, which is counted with these, adds no shortcut.
            found.append(dataclasses.replace(case, residual=False, act="none", count=1))
            case = dataclasses.replace(case, count=case.count - 1)
        found.append(case)
    return found


def total(stage: str, dtype: torch.dtype, rates: Rates = BARE, batch: int = BATCH) -> Cost:
    """A stage's convolutions one by one."""
    found = Cost()
    for case in layers(stage, batch):
        found = found.plus(convolution(case, dtype, rates), case.count)
    return found


def chained(stage: str, dtype: torch.dtype, rates: Rates = BARE, batch: int = BATCH) -> Cost:
    """Likewise, at each block's end by the cut that saves most, if one does."""
    found = total(stage, dtype, rates, batch)
    ends: dict[str, list[tuple[float, float, int]]] = {}
    for case in with_fronts(128):
        if not case.name.removeprefix("conv2 + ").startswith(stage):
            continue
        if case.front and case.projection_stride > 1:
            continue  # the block's 3x3 has the stride
        for sized in projections(dataclasses.replace(case, n=batch)):
            one, parts = chain(sized, dtype, rates), Cost()
            for part in sized.parts:
                parts = parts.plus(convolution(part, dtype, rates))
            if one is not None and one.us < parts.us:
                saved = parts.us - one.us, parts.bytes - one.bytes, case.count
                ends.setdefault(case.name.removeprefix("conv2 + "), []).append(saved)
    for cuts in ends.values():
        us, moved, count = max(cuts)
        found = found.plus(Cost(-moved, -us), count)
    return found


def engines(batch: int = BATCH, rates: Rates = ENGINE) -> list[float]:
    """Microseconds of the whole engine: bfloat16 one by one and in chains, e4m3 likewise."""
    ends = stem_us(batch) + head_us(batch)
    ways = [(way, dtype) for dtype in (BF16, E4M3) for way in (total, chained)]
    return [ends + way("", dtype, rates, batch).us for way, dtype in ways]


def gains() -> str:
    """The engine's gain by batch, as Markdown."""
    lines = [
        "| batch | bfloat16, in chains: us | e4m3, one by one | in chains | over bfloat16 "
        "| the same without clusters of four |",
        "| --- " * 6 + "|",
    ]
    for batch in BATCHES:
        _, wide, alone, least = engines(batch)
        before = engines(batch, ENGINE._replace(without=FOUR))[-1]
        us = f"{wide:,.0f} | {alone:,.0f} | {least:,.0f}"
        lines.append(f"| {batch} | {us} | {wide / least:.2f} | {wide / before:.2f} |")
    return "\n".join(lines)


def rows() -> Iterable[tuple[str, list[str]]]:
    """What the table says, line after line."""
    for name, stage in (*GROUPS, ("the whole network but stem and head", "")):
        columns = [
            total(stage, BF16), chained(stage, BF16), total(stage, E4M3), chained(stage, E4M3),
        ]  # fmt: skip
        yield f"{name}: GB", [f"{one.bytes / 1e9:.2f}" for one in columns]
        yield "the same: us", [f"{one.us:.0f}" for one in columns]
    (window,) = (case for case in layers("layer1") if case.r == 3)
    each = [convolution(window, dtype).us for dtype in (BF16, E4M3)]
    cells = [f"{each[0]:.0f}", "", f"{each[1]:.0f}", ""]
    yield "a 3x3 of 64 channels at 56 x 56: us", cells
    whole = engines()
    yield "the engine, with stem, head and launches: us", [f"{us:,.0f}" for us in whole]
    yield "the same: images/s", [f"{1e6 * BATCH / us:,.0f}" for us in whole]
    yield f"over bfloat16 in chains, aimed at {AIM}", [f"{whole[1] / us:.2f}" for us in whole]


def text() -> str:
    """The table as Markdown.

    Raises:
        RuntimeError: the extension was built without the kernels.
    """
    if not _cuda_plan.exists(_cuda_chain.FP8):
        raise RuntimeError("the extension holds no CUDA kernel of e4m3: build it with nvcc")
    lines = [
        f"| ResNet-50's convolutions at batch {BATCH} | bfloat16, one by one | bfloat16, in chains "
        "| e4m3, one by one | e4m3, in chains |",
        "| --- " * 5 + "|",
    ]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows()]
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/fp8.md.")
def main(write: bool) -> None:
    """Predict ResNet-50 in e4m3 beside bfloat16."""
    for (begin, end), said in (((BEGIN, END), text()), (GAINS, gains())):
        click.echo(said)
        if write:
            before, rest = PAGE.read_text(encoding="utf-8").split(begin)
            page = f"{before}{begin}\n{said}\n{end}{rest.split(end)[1]}"
            PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
