"""Predicts the frozen ResNet-50 on an H200 by the plans of the CUDA kernels, in bfloat16.

As `predict_engine.py` does for Triton's: of each block's end the cut that saves most. Convolutions
and chains take what their plans for a GPU of capability 9.0 predict, or what memory takes, and a
launch; the stem what bounds the kernel on wgmma, the head its bytes. First what the engine takes as
more chains are allowed, beside what the project aims at, and at batch 1 what it takes where kernels
begin early; then the rungs of the plan that the kernels were built by, the last of which takes what
the batch's order leaves in L2 (`predict_order.py`); then the launches that lose most against memory
and tensor cores without any loss, and the other ResNets. Nothing of it has been measured. Needs the
extension built with nvcc, which holds the models.

    python benchmarks/predict_cuda_engine.py            # the tables
    python benchmarks/predict_cuda_engine.py --write    # into the docs, its calls as JSON
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_network
import predict_order
import predict_stem
import predict_triton as rates
from predict_batch1 import EARLY, ORDINARY
from predict_chains import MEMORY, TENSOR, WITH_TMA
from predict_engine import DTYPE, NETWORK, head_kernels, head_us

from resnet_fused import roofline
from resnet_fused.bench.spanning_kernels import KINDS
from resnet_fused.bench.subject import Layer, layers
from resnet_fused.cases import ChainCase, ConvCase
from resnet_fused.ops import _chain_plan, _cuda_plan
from resnet_fused.ops.conv_chain import Answer

BEGIN, END = "<!-- cuda engine: begin -->", "<!-- cuda engine: end -->"
AIMS = {1: 0.15e-3, 32: 32 / 45e3, 256: 256 / 60e3}
"""Images of a batch -> seconds that the project aims at."""
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
DEPTHS_AT = (256, 32)
"""Images of the batches of the table of networks."""
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
PLANNED_AT = 256
PLANNED = (51.6e3, 59e3, 63e3, None, 67e3)
"""Images/s at each of the steps by the plan that the kernels were built by, a study on paper; layer
2 was one of its rungs."""
PLANNED_LAST = "the batch's order", 69e3
"""Its last rung, which is not of the plans but of what is left in L2 (predict_order.py)."""
ORDERS_AT = (32, 256)
"""Images of the batches whose order is simulated."""


def least(cost: roofline.Cost) -> float:
    """Microseconds at the machine's rates."""
    return 1e6 * max(cost.bytes / MEMORY, cost.flops / TENSOR)


def stem_us(batch: int) -> float:
    """On wgmma."""
    return max(predict_stem.predict_wgmma(batch).values()) + 1e6 * rates.LAUNCH


def conv_plan(case: ConvCase) -> tuple[_cuda_plan.Plan, float]:
    """One convolution at its batch: what it takes, and its microseconds."""
    last = torch.channels_last

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device="meta", memory_format=last)

    out = image(*case.output_shape)
    operands = image(*case.input_shape), image(*case.weight_shape), out if case.residual else None
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    made = _cuda_plan.problem_of("conv_bn_act", operands, geometry, out, real=False)
    plan = _cuda_plan.plan(made, WITH_TMA)
    memory = roofline.conv_cost(case, DTYPE).bytes / rates.MEMORY
    return plan, 1e6 * (max(plan.cycles / _chain_plan.CLOCK, memory) + rates.LAUNCH)


def conv_us(case: ConvCase) -> float:
    """Microseconds of one convolution at its batch."""
    return conv_plan(case)[1]


def chain_us(case: ChainCase) -> float | None:
    """A chain at its batch; None where no configuration takes it."""
    found = _chain_plan.predict_cuda(case, DTYPE, WITH_TMA)
    return None if isinstance(found, str) else 1e6 * found.chain / _chain_plan.CLOCK


class Cut(NamedTuple):
    """A chain that is taken: its sizes, microseconds, and of its parts by themselves."""

    case: ChainCase
    us: float
    parts: float


def cuts(
    batch: int, allowed: Callable[[ChainCase], bool], network: Sequence[Layer] = NETWORK
) -> list[Cut]:
    """Of each block's end the chain that saves most, if one does."""
    ends: dict[str, list[Cut]] = {}
    for layer, whole in KINDS["conv_chain"].cases(network):
        if not isinstance(whole, ChainCase) or not allowed(whole):
            continue
        for case in projections(dataclasses.replace(whole, n=batch)):
            us, parts = chain_us(case), sum(conv_us(part) for part in case.parts)
            if us is not None and us < parts:
                ends.setdefault(layer, []).append(Cut(case, us, parts))
    return [max(found, key=lambda cut: cut.parts - cut.us) for found in ends.values()]


def projections(case: ChainCase) -> Iterable[ChainCase]:
    """A chain with its projection, if it has one, and behind it."""
    yield case
    if case.projected:
        yield dataclasses.replace(case, projected=0, projection_stride=1)


class Engine(NamedTuple):
    """All of it: microseconds, its kernels, and how many of those are chains."""

    us: float
    kernels: int
    chains: int

    @property
    def early(self) -> float:
        """Microseconds where every kernel begins before the one ahead has ended."""
        return self.us - self.kernels * (ORDINARY - EARLY)


def engine(
    batch: int, allowed: Callable[[ChainCase], bool], network: Sequence[Layer] = NETWORK
) -> Engine:
    """The whole network."""
    taken = cuts(batch, allowed, network)
    alone = sum(conv_us(dataclasses.replace(one.case, n=batch)) for one in network[1:])
    saved = sum(cut.parts - cut.us for cut in taken)
    fewer = sum(len(cut.case.parts) - 1 for cut in taken)
    us = stem_us(batch) + head_us(batch, network) + alone - saved
    return Engine(us, len(network) - fewer + head_kernels(batch, network), len(taken))


def ladder() -> Iterable[str]:
    """A line for each step and batch."""
    columns = " | ".join(f"batch {batch}: us | images/s" for batch in AIMS)
    yield f"| the engine | batch 1: kernels | us, begun early | {columns} |"
    yield "| --- " * (3 + 2 * len(AIMS)) + "|"
    for name, allowed in STEPS:
        found = {batch: engine(batch, allowed) for batch in AIMS}
        cells = [f"{one.us:,.0f} | {1e6 * batch / one.us:,.0f}" for batch, one in found.items()]
        first = f"{found[1].kernels} | {found[1].early:.0f}"
        yield f"| {name} | {first} | {' | '.join(cells)} |"
    aims = [f"{1e6 * aim:,.0f} | {batch / aim:,.0f}" for batch, aim in AIMS.items()]
    yield f"| aimed at | | {1e6 * AIMS[1]:,.0f} | {' | '.join(aims)} |"


def rungs() -> Iterable[str]:
    """The plan's rungs beside the steps, what is behind them, and how much more at each."""
    yield f"| batch {PLANNED_AT} | the plan: images/s | us | predicted: us | behind: us | more |"
    yield "| --- " * 6 + "|"
    before = 0.0
    for (name, allowed), planned in zip(STEPS, PLANNED, strict=True):
        us = engine(PLANNED_AT, allowed).us
        if planned is None:
            yield f"| {name} | | | {us:,.0f} | | |"
            continue
        meant = 1e6 * PLANNED_AT / planned
        behind = us - meant
        cells = f"{planned:,.0f} | {meant:,.0f} | {us:,.0f} | {behind:.0f} | {behind - before:.0f}"
        yield f"| {name} | {cells} |"
        before = behind
    name, planned = PLANNED_LAST
    us, meant = ordered(PLANNED_AT).us, 1e6 * PLANNED_AT / planned
    cells = f"{planned:,.0f} | {meant:,.0f} | {us:,.0f} | {us - meant:.0f} | "
    yield f"| {name} | {cells}{us - meant - before:.0f} |"


def serves(case: ChainCase, dtype: torch.dtype, device: torch.device) -> Answer:
    """What `rf.freeze`'s rules are told of a chain: as `cuts` takes them."""
    del dtype, device
    us, parts = chain_us(case), sum(conv_us(part) for part in case.parts)
    if us is None:
        return Answer("no configuration takes it", False, "no configuration takes it")
    return Answer(None, us < parts, f"{us:.0f} us, by its parts {parts:.0f}", parts - us)


class Ordered(NamedTuple):
    """The engine whose steps turn round by `rf.freeze`'s rule."""

    us: float
    forwards: int  # bytes through memory where all walk forwards
    moved: int  # by the rule


@functools.cache
def ordered(batch: int) -> Ordered:
    """With all chains, if every byte that the order saves were waited for."""
    walks = predict_order.walks_of(batch, serves)
    forwards, rule, _ = (
        predict_order.simulated(walks, order, batch)
        for order in predict_order.orders_of(walks).values()
    )
    saved = 1e6 * (forwards - rule) / rates.MEMORY
    return Ordered(engine(batch, STEPS[-1][1]).us - saved, forwards, rule)


def order() -> str:
    """What the batch's order is worth at most, in words."""
    said = []
    for batch in ORDERS_AT:
        us, forwards, moved = ordered(batch)
        said.append(
            f"{moved / 1e6:,.0f} MB in the place of {forwards / 1e6:,.0f} at batch {batch}, where "
            f"the engine would take {us:,.0f} us, **{1e6 * batch / us:,.0f} images/s**"
        )
    return (
        "The last rung is the order in which steps walk the batch ([freeze.md](freeze.md#the-order"
        "-of-the-batch)), simulated for the engine of these kernels: through memory go "
        f"{', and '.join(said)}. That is the most that it can bring: where tensor cores or L2 "
        "bound a launch, nobody waits for those bytes."
    )


def one_image() -> str:
    """What one launch of all convolutions is to be compared with, in words."""
    found = engine(1, STEPS[-1][1])
    ends = stem_us(1) + head_us(1)
    kernels = found.kernels - 1 - head_kernels(1)
    behind = found.us - ends
    early = behind - kernels * (ORDINARY - EARLY)
    launch = predict_network.predicted()[2]
    return (
        f"One image, all chains allowed: the {kernels} kernels between stem and head take "
        f"{behind:.0f} us with {ORDINARY} us a launch, **{early:.0f} us** with {EARLY} us where "
        "each begins before the one ahead has ended; all convolutions in one launch ([network.md]"
        f"(network.md)) **{launch:.0f} us** and that launch."
    )


def depths() -> Iterable[str]:
    """ResNets of each depth."""
    columns = " | ".join(f"batch {batch}: one by one | in chains | chains" for batch in DEPTHS_AT)
    yield f"| images/s | {columns} |"
    yield "| --- " * (1 + 3 * len(DEPTHS_AT)) + "|"
    for name in DEPTHS:
        network, cells = layers(name), []
        for batch in DEPTHS_AT:
            alone, chained = (engine(batch, step[1], network) for step in (STEPS[0], STEPS[-1]))
            found = [f"{1e6 * batch / one.us:,.0f}" for one in (alone, chained)]
            cells += [*found, str(chained.chains)]
        yield f"| {name} | {' | '.join(cells)} |"


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
    # Of a strided projection a chain reads no row or column behind the last that counts.
    sizes = [(c.r, c.s, c.c, c.k, c.stride, c.output_shape) for c in (one, other)]
    return sizes[0] == sizes[1]


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
    rung = (
        f"Batch {PLANNED_AT} beside the plan that the kernels were built by, aimed at rung by rung:"
    )
    limits = f"{MEMORY / 1e12:.1f} TB/s or {TENSOR / 1e12:.0f} TFLOP/s and no launch"
    said = f"Batch {LOSSES_AT}, all chains allowed; without loss means {limits}:"
    parts = [
        *ladder(),
        "",
        rung,
        "",
        *rungs(),
        "",
        order(),
        "",
        one_image(),
        "",
        said,
        "",
        *losses(),
    ]
    parts += ["", "ResNets of each depth, one by one and with all chains allowed:", "", *depths()]
    return "\n".join(parts)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/measured_facts.md and predictions.json.")
def main(write: bool) -> None:
    """Predict the frozen ResNet-50 by the CUDA kernels."""
    said = text()
    click.echo(said)
    if write:
        before, rest = rates.PAGE.read_text(encoding="utf-8").split(BEGIN)
        page = f"{before}{BEGIN}\n{said}\n{END}{rest.split(END)[1]}"
        rates.PAGE.write_text(page, encoding="utf-8")
        import predict_cuda_calls

        rates.record(cuda_inference=predict_cuda_calls.of_inference())


if __name__ == "__main__":
    main()
