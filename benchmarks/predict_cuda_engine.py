"""Predicts the frozen ResNet-50 on an H200 by the plans of the CUDA kernels, in bfloat16.

As `predict_engine.py` does for Triton's: of each block's end the cut that saves most. Convolutions
and chains take what their plans for a GPU of capability 9.0 predict, or what memory takes, and a
launch; the stem what bounds the kernel on wgmma, the head its bytes. First what the engine takes as
more chains are allowed, beside what the project aims at; then the launches that lose most against
memory and tensor cores without any loss. Nothing of it has been measured. Needs the extension built
with nvcc, which holds the models.

    python benchmarks/predict_cuda_engine.py            # the tables
    python benchmarks/predict_cuda_engine.py --write    # into docs/measured_facts.md
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_stem
import predict_triton as rates
from predict_chains import MEMORY, TENSOR, WITH_TMA
from predict_engine import DTYPE, NETWORK, head_us

from resnet_fused import roofline
from resnet_fused.bench.spanning_kernels import KINDS
from resnet_fused.cases import ChainCase, ConvCase
from resnet_fused.ops import _chain_plan, _cuda_plan

BEGIN, END = "<!-- cuda engine: begin -->", "<!-- cuda engine: end -->"
AIMS = {1: 0.15e-3, 32: 32 / 45e3, 256: 256 / 60e3}
"""Images of a batch -> seconds that the project aims at."""
LOSING = 8  # launches in the table of losses
LOSSES_AT = 32


class Launch(NamedTuple):
    """Some like it: what it computes, how often, microseconds of one, and without any loss."""

    name: str
    count: int
    us: float
    least: float

    @property
    def lost(self) -> float:
        """Microseconds of all of them."""
        return self.count * (self.us - self.least)


def _no_chain(case: ChainCase) -> bool:
    del case
    return False


STEPS: tuple[tuple[str, Callable[[ChainCase], bool]], ...] = (
    ("one by one", _no_chain),
    ("chains in layer 1", lambda case: case.k == 64 and not case.front),
    ("with the 3x3 in front", lambda case: case.k == 64),
    ("chains in layer 2", lambda case: case.k == 64 or not case.front),
    ("with the 3x3 in front", lambda case: True),
)
"""What is allowed, step by step; a chain's narrow width says the stage."""


def least(cost: roofline.Cost) -> float:
    """Microseconds at the machine's rates."""
    return 1e6 * max(cost.bytes / MEMORY, cost.flops / TENSOR)


def stem_us(batch: int) -> float:
    """On wgmma."""
    return max(predict_stem.predict_wgmma(batch).values()) + 1e6 * rates.LAUNCH


def conv_us(case: ConvCase) -> float:
    """One convolution at its batch."""
    last = torch.channels_last

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device="meta", memory_format=last)

    out = image(*case.output_shape)
    operands = image(*case.input_shape), image(*case.weight_shape), out if case.residual else None
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    made = _cuda_plan.problem_of("conv_bn_act", operands, geometry, out, real=False)
    cycles = _cuda_plan.plan(made, WITH_TMA).cycles
    memory = roofline.conv_cost(case, DTYPE).bytes / rates.MEMORY
    return 1e6 * (max(cycles / _chain_plan.CLOCK, memory) + rates.LAUNCH)


def chain_us(case: ChainCase) -> float | None:
    """A chain at its batch; None where no configuration takes it."""
    found = _chain_plan.predict_cuda(case, DTYPE, WITH_TMA)
    return None if isinstance(found, str) else 1e6 * found.chain / _chain_plan.CLOCK


class Cut(NamedTuple):
    """A chain that is taken: its sizes, microseconds, and of its parts by themselves."""

    case: ChainCase
    us: float
    parts: float


def cuts(batch: int, allowed: Callable[[ChainCase], bool]) -> list[Cut]:
    """Of each block's end the chain that saves most, if one does."""
    ends: dict[str, list[Cut]] = {}
    for layer, case in KINDS["conv_chain"].cases(NETWORK):
        if not isinstance(case, ChainCase) or not allowed(case):
            continue
        case = dataclasses.replace(case, n=batch)
        us, parts = chain_us(case), sum(conv_us(part) for part in case.parts)
        if us is not None and us < parts:
            ends.setdefault(layer, []).append(Cut(case, us, parts))
    return [max(found, key=lambda cut: cut.parts - cut.us) for found in ends.values()]


def engine(batch: int, allowed: Callable[[ChainCase], bool]) -> tuple[float, int]:
    """Microseconds of the whole engine, and how many chains it has."""
    taken = cuts(batch, allowed)
    alone = sum(conv_us(dataclasses.replace(one.case, n=batch)) for one in NETWORK[1:])
    saved = sum(cut.parts - cut.us for cut in taken)
    return stem_us(batch) + head_us(batch) + alone - saved, len(taken)


def ladder() -> Iterable[str]:
    """A line for each step and batch."""
    columns = " | ".join(f"batch {batch}: us | images/s" for batch in AIMS)
    yield f"| the engine | {columns} |"
    yield "| --- " * (1 + 2 * len(AIMS)) + "|"
    for name, allowed in STEPS:
        times = {batch: engine(batch, allowed)[0] for batch in AIMS}
        cells = [f"{us:,.0f} | {1e6 * batch / us:,.0f}" for batch, us in times.items()]
        yield f"| {name} | {' | '.join(cells)} |"
    aims = [f"{1e6 * aim:,.0f} | {batch / aim:,.0f}" for batch, aim in AIMS.items()]
    yield f"| aimed at | {' | '.join(aims)} |"


def launches(batch: int) -> list[Launch]:
    """Those of the engine with all chains, like ones together, by what they lose."""
    taken = cuts(batch, STEPS[-1][1])
    left = [dataclasses.replace(one.case, n=batch) for one in NETWORK[1:]]
    found: dict[str, Launch] = {}

    def add(name: str, us: float, cost: roofline.Cost) -> None:
        count = found[name].count if name in found else 0
        found[name] = Launch(name, count + 1, us, least(cost))

    for cut in taken:
        for part in cut.case.parts:
            left.remove(next(one for one in left if _alike(one, part)))
        cost = roofline.conv_chain_cost(cut.case, DTYPE)
        add(_chain_name(cut.case), cut.us, cost)
    for case in left:
        add(_conv_name(case), conv_us(case), roofline.conv_cost(case, DTYPE))
    return sorted(found.values(), key=lambda one: -one.lost)


def _alike(one: ConvCase, other: ConvCase) -> bool:
    return _conv_name(one) == _conv_name(other)


def _conv_name(case: ConvCase) -> str:
    stride = f", stride {case.stride[0]}" if case.stride[0] > 1 else ""
    return f"{case.r}x{case.s}, {case.c} to {case.k} at {case.h}{stride}"


def _chain_name(case: ChainCase) -> str:
    front = f"3x3 {case.front}, " if case.front else ""
    projected = f" and {case.projected} projected" if case.projected else ""
    return f"chain {front}{case.k}{projected}, {case.c}, {case.m} at {case.h}"


def losses() -> Iterable[str]:
    """The launches that lose most."""
    yield "| launch | of them | us of each | without loss | lost by all |"
    yield "| --- " * 5 + "|"
    every = launches(LOSSES_AT)
    for one in every[:LOSING]:
        yield f"| {one.name} | {one.count} | {one.us:.1f} | {one.least:.1f} | {one.lost:.0f} |"
    rest = every[LOSING:]
    count, lost = sum(one.count for one in rest), sum(one.lost for one in rest)
    yield f"| the others | {count} | | | {lost:.0f} |"


def text() -> str:
    """All of it as Markdown.

    Raises:
        RuntimeError: the extension was built without the kernels.
    """
    if not _cuda_plan.exists("conv_chain"):
        raise RuntimeError("the extension holds no CUDA kernels: build it with nvcc")
    limits = f"{MEMORY / 1e12:.1f} TB/s or {TENSOR / 1e12:.0f} TFLOP/s and no launch"
    said = f"Batch {LOSSES_AT}, all chains allowed; without loss means {limits}:"
    return "\n".join([*ladder(), "", said, "", *losses()])


@click.command()
@click.option("--write", is_flag=True, help="Into docs/measured_facts.md.")
def main(write: bool) -> None:
    """Predict the frozen ResNet-50 by the CUDA kernels."""
    said = text()
    click.echo(said)
    if write:
        before, rest = rates.PAGE.read_text(encoding="utf-8").split(BEGIN)
        page = f"{before}{BEGIN}\n{said}\n{END}{rest.split(END)[1]}"
        rates.PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
