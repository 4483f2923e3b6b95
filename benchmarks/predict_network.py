"""Predicts ResNet-50's convolutions of one image in one launch on an H200, in bfloat16.

The kernels are csrc/kernels/network_sm80.cuh and network_sm90.cuh: blocks stay and walk the layers'
tiles, which csrc/launch/network_ways.cpp chooses and cuts into parts. Predicted is

    phases x (barrier + first pixels) + sum over layers of (rounds x steps x step + ends [+ merge])

with, in cycles of a multiprocessor: a step of 64 bytes of a tile's rows at the rate of L2 (the
tensor cores and the stages' latency are faster), but for the filters of the first steps, which come
while the blocks meet; ends at the rate of memory; a merge as `Layer.merge` has it. The rates are
those of csrc/launch/conv_plan.h; the barrier is an assumption. Weights are taken to be in L2 when
they are wanted. Nothing of it has been measured.

What `rf.freeze` compares, by the plans of the extension, stands in a table of its own.

    python benchmarks/predict_network.py            # every layer
    python benchmarks/predict_network.py --write    # into docs/network.md
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from resnet_fused.cases import RESNET50_LAYERS
from resnet_fused.freeze import _one_launch
from resnet_fused.ops import _cuda_network, _cuda_plan
from resnet_fused.ops._chain_plan import CLOCK
from resnet_fused.triton._tiles import CACHE, LATENCY, MEMORY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "network.md"
BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
ENGINE = "<!-- engine: begin -->", "<!-- engine: end -->"
H200 = (132, 232448, 233472, 90)
IMAGES = (1, 2, 4, 8)
DTYPE = torch.bfloat16
RESIDENT, STEP_BYTES, LEAST_STEPS, THREADS = 2, 64, 4, 128
MATRIX = 4 * 323
"""Products of mma.sync in a cycle of a multiprocessor."""
SHARED, NEIGHBOURS = 128, 14
"""Bytes a cycle of a multiprocessor: of its own shared memory, and of others' in a cluster."""
CLUSTER_MEETING = 250
"""Cycles of a cluster's barrier."""
BARRIER = 1.2
"""Microseconds from the last arrival, by a release and an acquire through L2, to the next phase."""
PHASES, PHASE = 48, BARRIER + 1e6 * LATENCY / CLOCK
"""16 blocks of three: a projection runs beside another layer. Microseconds until a phase begins."""


@dataclass(frozen=True)
class Tile:
    """Of results; all have as many threads."""

    pixels: int
    channels: int
    stages: int

    @property
    def sums(self) -> int:
        """Bytes of its sums."""
        return self.pixels * self.channels * 4


@dataclass(frozen=True)
class Way:
    """How the parts of a tile become one.

    Attributes:
        name: for the page.
        multiprocessors: that blocks are on, two on each.
        tiles: of which a layer has one.
        cuts: parts that a tile may be cut into, 1 among them.
        cluster: whether they meet in shared memory.
    """

    name: str
    multiprocessors: int
    tiles: tuple[Tile, ...]
    cuts: tuple[int, ...]
    cluster: bool = False

    @property
    def blocks(self) -> int:
        """Of the launch."""
        return RESIDENT * self.multiprocessors


MEMORY_TILES = (Tile(64, 64, 8),)
CLUSTER_TILES = (Tile(64, 64, 12), Tile(32, 64, 14))
SHARES = Way("shares", 132, MEMORY_TILES, tuple(range(1, 33)))
"""Through global memory: the tile's blocks wait for one another, each finishes a share."""
LAST = Way("last", 132, MEMORY_TILES, tuple(range(1, 33)))
"""The last block of a tile reads all sums."""
MEETING = Way("meeting", 132, MEMORY_TILES, tuple(range(1, 33)))
"""All blocks meet once more, and share all tiles."""
CLUSTERS = Way("clusters", 128, CLUSTER_TILES, (1, 2, 4, 8), cluster=True)
"""In the shared memory of clusters of 8 blocks: 16 multiprocessors of each of eight GPCs."""
FOURS = Way("fours", 128, CLUSTER_TILES, (1, 2, 4), cluster=True)
"""Likewise of 4."""
TAKEN = CLUSTERS
"""The way that the plan takes on an H200."""


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
    def steps(self) -> int:
        """Of the whole reduction."""
        return -(-2 * self.depth // STEP_BYTES)

    def tiles(self, tile: Tile) -> int:
        """Of a shape, that cover the output."""
        return -(-self.pixels // tile.pixels) * -(-self.filters // tile.channels)

    def cuts(self, way: Way) -> Iterator[tuple[Tile, int]]:
        """Tiles and parts with work for each, for which all blocks have room."""
        for tile, parts in itertools.product(way.tiles, way.cuts):
            each = -(-self.steps // parts)
            room = parts * LEAST_STEPS <= self.steps and parts * self.tiles(tile) <= way.blocks
            if parts == 1 or (room and -(-self.steps // each) == parts):
                yield tile, parts

    def cut(self, way: Way = TAKEN) -> tuple[Tile, int]:
        """The tile, and the parts of its reduction, as csrc/launch/network_ways.cpp has them."""
        return min(self.cuts(way), key=lambda cut: self.cycles(*cut, way))

    def rounds(self, tile: Tile, parts: int, way: Way) -> int:
        """Parts of tiles on the busiest multiprocessor."""
        return -(-self.tiles(tile) * parts // way.multiprocessors)

    def loop(self, tile: Tile, parts: int, way: Way) -> float:
        """Cycles of a multiprocessor's main loops."""
        rounds = self.rounds(tile, parts, way)
        step = max(
            tile.pixels * tile.channels * STEP_BYTES / 2 / MATRIX,
            (tile.pixels + tile.channels) * STEP_BYTES / CACHE,
            LATENCY / ((tile.stages - 1) * min(rounds, RESIDENT)),
        )
        return rounds * -(-self.steps // parts) * step

    def merge(self, tile: Tile, parts: int, way: Way) -> float:
        """Cycles from the sums of the parts to those of the tiles.

        Through memory each block writes its sums, and waits until they have arrived and until the
        others' are counted. "shares": then it reads its share of all of them, a vector a thread at
        a time. "last": the last block reads all of them, part by part. "meeting": all blocks meet
        once more, and share all tiles. In clusters each puts its sums down, and behind a barrier
        reads its share of the others'; a second barrier's time is taken for the way to them.
        """
        rounds, passed = self.rounds(tile, parts, way), tile.sums / CACHE
        if parts == 1:
            return 0.0
        if way.cluster:
            others = (parts - 1) / parts * tile.sums
            return 2 * CLUSTER_MEETING + rounds * (tile.sums / SHARED + others / NEIGHBOURS)
        if way is LAST:
            return 2 * LATENCY + rounds * passed + parts * max(LATENCY, passed)
        if way is MEETING:
            read = self.tiles(tile) * parts * passed / way.multiprocessors
            return rounds * passed + PHASE * CLOCK / 1e6 + read
        reads = -(-tile.sums // (16 * THREADS * parts))
        return (2 + reads) * LATENCY + 2 * rounds * passed

    def ahead(self, tile: Tile, parts: int, way: Way) -> float:
        """Cycles of loading filters that fall into the meeting: as many as it has room for."""
        steps = min(tile.stages - 1, -(-self.steps // parts))
        beside = min(self.rounds(tile, parts, way), RESIDENT)
        return min(beside * steps * tile.channels * STEP_BYTES / CACHE, BARRIER * CLOCK / 1e6)

    def ends(self, tile: Tile, parts: int, way: Way) -> float:
        """Cycles of the results' way to memory, and of the shortcut's from there."""
        moved = tile.pixels * tile.channels * 2 * (2 if self.residual else 1)
        return self.rounds(tile, parts, way) * moved / MEMORY / (1 if way is LAST else parts)

    def cycles(self, tile: Tile, parts: int, way: Way) -> float:
        """Of a multiprocessor, without the barrier."""
        cut = (tile, parts, way)
        return self.loop(*cut) - self.ahead(*cut) + self.merge(*cut) + self.ends(*cut)

    def work(self, way: Way = TAKEN) -> float:
        """Microseconds without the barrier, in the tile and the parts that are best for a way."""
        return 1e6 * self.cycles(*self.cut(way), way) / CLOCK


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


def predicted(way: Way = TAKEN) -> tuple[int, float, float]:
    """Phases, microseconds of work, and of everything between the stem and the head."""
    work = sum(one.count * one.work(way) for one in layers())
    return PHASES, work, work + PHASES * PHASE


def merges(way: Way = TAKEN) -> tuple[int, float]:
    """Split layers, and microseconds of what they spend on adding up their parts."""
    split = [(one, one.cut(way)) for one in layers() if one.cut(way)[1] > 1]
    cycles = sum(one.count * one.merge(*cut, way) for one, cut in split)
    return sum(one.count for one, _ in split), 1e6 * cycles / CLOCK


def row(one: Layer) -> str:
    """A layer by clusters and through memory."""
    (tile, parts), (whole, shares) = one.cut(), one.cut(SHARES)
    return (
        f"| {one.name} | {one.count} | {one.tiles(tile)} of {tile.pixels} x {tile.channels} | "
        f"{parts} | {one.work():.1f} | {one.tiles(whole)} | {shares} | {one.work(SHARES):.1f} |"
    )


def table() -> str:
    """Every layer, and the ways of merging, as Markdown."""
    phases, work, total = predicted()
    split, added = merges()
    more, before = merges(SHARES)
    lines = [
        "| convolution | of them | by clusters: tiles | parts | us of each "
        "| through memory: tiles | parts | us of each |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(one) for one in layers()),
        "",
        f"{phases} phases of {PHASE:.2f} us until the first pixels have come, {phases * PHASE:.0f} "
        f"us, and {work:.0f} us of work: **{total:.0f} us** by clusters beside the stem and the "
        f"head. {split} layers are cut; {added:.0f} us of the work are their merges. Through "
        f"memory it is {predicted(SHARES)[2]:.0f} us, with {before:.0f} us of merges in {more} "
        "layers.",
        "",
        f"In clusters of 4 blocks it would be {predicted(FOURS)[2]:.0f} us. Through memory, were a "
        f"tile's sums added up by the last of its blocks, {predicted(LAST)[2]:.0f} us; by all "
        f"blocks behind a meeting more, {predicted(MEETING)[2]:.0f} us.",
    ]
    return "\n".join(lines)


def image(*shape: int) -> torch.Tensor:
    """Memory at an address, in channels_last; nobody writes it."""
    return torch.empty(shape, dtype=DTYPE, memory_format=torch.channels_last)


def engine_layers(images: int) -> list[_cuda_network.Layer]:
    """ResNet-50's convolutions behind the stem, in the order in which the engine runs them."""
    made: list[_cuda_network.Layer] = []

    def layer(
        x: torch.Tensor, k: int, taps: int = 1, by: int = 1, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        size = -(-x.shape[2] // by)
        vectors, pad = (torch.empty(k), torch.empty(k)), (taps // 2, taps // 2)
        geometry = ((by, by), pad, (1, 1), 1, "relu")
        weight, out = image(k, x.shape[1], taps, taps), image(images, k, size, size)
        made.append(_cuda_network.Layer(x, weight, *vectors, residual, *geometry, out))
        return out

    x, width = image(images, 64, 56, 56), 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            by = 2 if stage and not block else 1
            inner = layer(layer(x, width), width, 3, by)
            shortcut = x if block else layer(x, 4 * width, 1, by)
            x = layer(inner, 4 * width, residual=shortcut)
        width *= 2
    return made


def engine_us(images: int) -> tuple[float, float]:
    """Microseconds with launches: of the engine's layers in one launch, and one by one."""
    layers = engine_layers(images)
    plan = _cuda_network.plan(layers, H200)
    assert not isinstance(plan, str), plan
    alone = 0.0
    for one in layers:
        operands, geometry = (one.x, one.weight, one.residual), one[5:9]
        made = _cuda_plan.problem_of("conv_bn_act", operands, geometry, one.out, real=False)
        alone += 1e6 * _cuda_plan.predicted(made, H200) / CLOCK + _one_launch.EARLY
    return _one_launch.together(plan), alone


def engine_table() -> str:
    """What `rf.freeze` compares, as Markdown."""
    lines = ["| images | in one launch | one by one, without chains |", "| --- | --- | --- |"]
    for images in IMAGES:
        one, alone = engine_us(images)
        lines.append(f"| {images} | {one:.0f} | {alone:.0f} |")
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/network.md.")
def main(write: bool) -> None:
    """Predict ResNet-50's convolutions of one image in one launch."""
    click.echo(table())
    found = [(BEGIN, END, table())]
    if _cuda_plan.exists(_cuda_network.OP):
        click.echo(engine_table())
        found.append((*ENGINE, engine_table()))
    if write:
        text = PAGE.read_text(encoding="utf-8")
        for begin, end, made in found:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
