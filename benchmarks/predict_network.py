"""Predicts ResNet-50's convolutions of one image in one launch on an H200, in bfloat16.

The kernel is csrc/kernels/network_sm80.cuh: 264 blocks stay and walk the layers' tiles of 64 x 64,
which csrc/launch/network_plan.cpp cuts into parts. Predicted is

    phases x (barrier + first pixels) + sum over layers of (rounds x steps x step + ends [+ merge])

with, in cycles of a multiprocessor: a step of 64 bytes of 128 rows at the rate of L2 (the tensor
cores and the stages' latency are faster), but for the filters of the first steps, which come while
the blocks meet; ends at the rate of memory; a merge as `Layer.merge` has it. The rates are those of
csrc/launch/conv_plan.h; the barrier is an assumption. Weights are taken to be in L2 when they are
wanted. Nothing of it has been measured.

    python benchmarks/predict_network.py            # every layer
    python benchmarks/predict_network.py --write    # into docs/network.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from resnet_fused.cases import RESNET50_LAYERS
from resnet_fused.ops._chain_plan import CLOCK
from resnet_fused.triton._tiles import CACHE, LATENCY, MEMORY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "network.md"
BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
MULTIPROCESSORS, RESIDENT = 132, 2
BLOCKS = MULTIPROCESSORS * RESIDENT
TILE, STEP_BYTES, STAGES, LEAST_STEPS, MOST_PARTS = 64, 64, 8, 4, 32
THREADS = 128
SUMS = TILE * TILE * 4 / CACHE
"""Cycles in which the sums of a tile pass between L2 and a multiprocessor."""
MATRIX = 4 * 323
"""Products of mma.sync in a cycle of a multiprocessor."""
BARRIER = 1.2
"""Microseconds from the last arrival, by a release and an acquire through L2, to the next phase."""
PHASES, PHASE = 48, BARRIER + 1e6 * LATENCY / CLOCK
"""16 blocks of three: a projection runs beside another layer. Microseconds until a phase begins."""

Way = Literal["shares", "last", "meeting"]


@dataclass(frozen=True)
class Layer:
    """One convolution, or several alike.

    Attributes:
        name: of its case.
        count: how often the network has it.
        pixels: of its output.
        filters: output channels.
        depth: of its reduction, elements.
        residual: whether a shortcut is added.
    """

    name: str
    count: int
    pixels: int
    filters: int
    depth: int
    residual: bool

    @property
    def tiles(self) -> int:
        """Of 64 x 64 results."""
        return -(-self.pixels // TILE) * -(-self.filters // TILE)

    @property
    def steps(self) -> int:
        """Of the whole reduction."""
        return -(-2 * self.depth // STEP_BYTES)

    @property
    def parts(self) -> int:
        """Of each tile's reduction, as csrc/launch/network_plan.cpp cuts it."""

        return min([1, *self.fit], key=self.cycles)

    @property
    def fit(self) -> list[int]:
        """Parts with work for each, for which all blocks have room."""
        most = min(MOST_PARTS, self.steps // LEAST_STEPS, BLOCKS // self.tiles)
        return [n for n in range(2, most + 1) if -(-self.steps // -(-self.steps // n)) == n]

    def loop(self, parts: int) -> float:
        """Cycles of a multiprocessor's main loops.

        Args:
            parts: of each tile's reduction.
        """
        step = max(
            TILE * TILE * STEP_BYTES / 2 / MATRIX,
            2 * TILE * STEP_BYTES / CACHE,
            LATENCY / ((STAGES - 1) * min(self.rounds(parts), RESIDENT)),
        )
        return self.rounds(parts) * -(-self.steps // parts) * step

    def rounds(self, parts: int) -> int:
        """Parts of tiles on the busiest multiprocessor."""
        return -(-self.tiles * parts // MULTIPROCESSORS)

    def merge(self, parts: int, way: Way = "shares") -> float:
        """Cycles from the sums of the parts to those of the tiles.

        Each block writes its sums, and waits until they have arrived and until the others' are
        counted. "shares": then it reads its share of all of them, a vector a thread at a time.
        "last": the last block reads all of them, part by part. "meeting": all blocks meet once
        more, and share all tiles.

        Args:
            parts: of each tile's reduction.
            way: of the merge.
        """
        written = self.rounds(parts) * SUMS
        if parts == 1:
            return 0.0
        if way == "last":
            return 2 * LATENCY + written + parts * max(LATENCY, SUMS)
        if way == "meeting":
            return written + PHASE * CLOCK / 1e6 + self.tiles * parts * SUMS / MULTIPROCESSORS
        reads = -(-TILE * TILE // (4 * THREADS * parts))
        return (2 + reads) * LATENCY + 2 * written

    def cycles(self, parts: int, way: Way = "shares") -> float:
        """Of a multiprocessor, without the ends."""
        return self.loop(parts) + self.merge(parts, way)

    @property
    def ahead(self) -> float:
        """Cycles of loading filters that fall into the meeting: as many as it has room for."""
        steps = min(STAGES - 1, -(-self.steps // self.parts))
        filters = min(self.rounds(self.parts), RESIDENT) * steps * TILE * STEP_BYTES
        return min(filters / CACHE, BARRIER * CLOCK / 1e6)

    def work(self, way: Way = "shares") -> float:
        """Microseconds without the barrier, in the parts that are best for a way of merging."""
        moved = TILE * TILE * 2 * (2 if self.residual else 1)
        cycles = min(self.cycles(parts, way) for parts in (1, *self.fit))
        return 1e6 * (cycles - self.ahead + moved / MEMORY) / CLOCK


def layers() -> list[Layer]:
    """The convolutions between the stem and the head."""
    return [
        Layer(
            case.name,
            case.count,
            case.p * case.q,
            case.k,
            case.c * case.r * case.s,
            case.residual,
        )
        for case in RESNET50_LAYERS
        if case.c != 3
    ]


def predicted(way: Way = "shares") -> tuple[int, float, float]:
    """Phases, microseconds of work, and of everything between the stem and the head."""
    work = sum(one.count * one.work(way) for one in layers())
    return PHASES, work, work + PHASES * PHASE


def merges() -> tuple[int, float]:
    """Split layers, and microseconds of what they spend on adding up their parts."""
    split = [one for one in layers() if one.parts > 1]
    cycles = sum(one.count * one.merge(one.parts) for one in split)
    return sum(one.count for one in split), 1e6 * cycles / CLOCK


def table() -> str:
    """Every layer, and the ways of merging, as Markdown."""
    phases, work, total = predicted()
    split, added = merges()
    lines = [
        "| convolution | of them | tiles | parts | us of each |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {one.name} | {one.count} | {one.tiles} | {one.parts} | {one.work():.1f} |"
            for one in layers()
        ),
        "",
        f"{phases} phases of {PHASE:.2f} us until the first pixels have come, {phases * PHASE:.0f} "
        f"us, and {work:.0f} us of work: **{total:.0f} us** beside the stem and the head. "
        f"{split} layers are cut; {added:.0f} us of the work are their merges.",
        "",
        f"Were a tile's sums added up by the last of its blocks, it would be "
        f"{predicted('last')[2]:.0f} us; by all blocks behind a meeting more, "
        f"{predicted('meeting')[2]:.0f} us.",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/network.md.")
def main(write: bool) -> None:
    """Predict ResNet-50's convolutions of one image in one launch."""
    click.echo(table())
    if write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        text = f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
