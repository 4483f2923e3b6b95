"""Predicts ResNet-50's convolutions of one image in one launch on an H200, in bfloat16.

The kernel is csrc/kernels/network_sm80.cuh: 264 blocks stay and walk the layers' tiles of 64 x 64,
which csrc/launch/network_plan.cpp cuts into parts. Predicted is

    phases x (barrier + first pixels) + sum over layers of (rounds x steps x step + ends [+ merge])

with, in cycles of a multiprocessor: a step of 64 bytes of 128 rows at the rate of L2 (the tensor
cores and the stages' latency are faster), ends at the rate of memory, a merge that reads all parts
of a tile from L2 behind two exchanges. The rates are those of csrc/launch/conv_plan.h; the barrier
is an assumption. Weights are taken to be in L2 when they are wanted. Nothing of it has been
measured.

    python benchmarks/predict_network.py    # every layer
"""

from __future__ import annotations

from dataclasses import dataclass

import click

from resnet_fused.cases import RESNET50_LAYERS
from resnet_fused.ops._chain_plan import CLOCK
from resnet_fused.triton._tiles import CACHE, LATENCY, MEMORY

MULTIPROCESSORS, RESIDENT = 132, 2
BLOCKS = MULTIPROCESSORS * RESIDENT
TILE, STEP_BYTES, LEAST_STEPS, MOST_PARTS = 64, 64, 4, 32
MATRIX = 4 * 323
"""Products of mma.sync in a cycle of a multiprocessor."""
BARRIER = 1.2
"""Microseconds from the last arrival, by a release and an acquire through L2, to the next phase."""
PHASES, PHASE = 48, BARRIER + 1e6 * LATENCY / CLOCK
"""16 blocks of three: a projection runs beside another layer. Microseconds until a phase begins."""


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

    def cycles(self, parts: int) -> float:
        """Of a multiprocessor, without the ends.

        Args:
            parts: of each tile's reduction.
        """
        rounds = -(-self.tiles * parts // MULTIPROCESSORS)
        step = max(
            TILE * TILE * STEP_BYTES / 2 / MATRIX,
            2 * TILE * STEP_BYTES / CACHE,
            LATENCY / (3 * min(rounds, RESIDENT)),
        )
        loop = rounds * -(-self.steps // parts) * step
        read = (rounds + parts) * TILE * TILE * 4 / CACHE
        return loop if parts == 1 else loop + 2 * LATENCY + read

    @property
    def work(self) -> float:
        """Microseconds without the barrier."""
        moved = TILE * TILE * 2 * (2 if self.residual else 1)
        return 1e6 * (self.cycles(self.parts) + moved / MEMORY) / CLOCK


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


def predicted() -> tuple[int, float, float]:
    """Phases, microseconds of work, and of everything between the stem and the head."""
    found = layers()
    work = sum(one.count * one.work for one in found)
    return PHASES, work, work + PHASES * PHASE


def merges() -> tuple[int, float]:
    """Split layers, and microseconds of what they spend on adding up their parts."""
    split = [one for one in layers() if one.parts > 1]
    each = [(2 * LATENCY + one.parts * TILE * TILE * 4 / CACHE) * one.count for one in split]
    return sum(one.count for one in split), 1e6 * sum(each) / CLOCK


def by_all_blocks() -> float:
    """Microseconds of everything if all blocks added the parts up, behind one more meeting.

    No kernel does so.
    """

    def cycles(one: Layer, parts: int) -> float:
        loop = one.cycles(parts)
        if parts == 1:
            return loop
        alone = 2 * LATENCY + parts * TILE * TILE * 4 / CACHE
        spread = one.tiles * parts * TILE * TILE * 4 / CACHE / MULTIPROCESSORS
        return loop - alone + spread + PHASE * CLOCK / 1e6

    saved = sum(
        one.count * (one.cycles(one.parts) - min(cycles(one, parts) for parts in (1, *one.fit)))
        for one in layers()
    )
    return predicted()[2] - 1e6 * saved / CLOCK


@click.command()
def main() -> None:
    """Predict ResNet-50's convolutions of one image in one launch."""
    for one in layers():
        click.echo(f"{one.count}x {one.tiles:>4} x {one.parts:>2} {one.work:>6.2f}  {one.name}")
    phases, work, total = predicted()
    split, added = merges()
    click.echo(f"{phases} phases, {work:.0f} us of work, {total:.0f} us")
    click.echo(f"{split} layers are split; {added:.0f} us of the work is in their merges")
    click.echo(f"{by_all_blocks():.0f} us if all blocks merged")


if __name__ == "__main__":
    main()
