"""Simulates what orders of the batch leave in the L2 cache of an H200, for the frozen ResNet-50.

The graph and its arena are those of `rf.freeze`, rewritten as for an H200 with Triton's kernels.
Every step walks through the images, forwards or backwards: it reads its pixels and writes its
results line by line, into a cache of whole lines, of which the one that nobody has touched for
longest makes room. Lines that were written go to memory when they leave. Counted is the second of
two runs, which finds what the first one left; constants, the image and the scores are left aside.
The orders: all forwards; the rule that `rf.freeze` has; and every step against the one ahead.
`--search` looks for better ones: all orders of four steps in a row, one window after the other.
Nothing of it has been measured.

    python benchmarks/predict_order.py                # the table
    python benchmarks/predict_order.py --search 32    # the best order that it finds for 32 images
    python benchmarks/predict_order.py --write        # into docs/freeze.md
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_batch1
from predict_triton import MEMORY

from resnet_fused.freeze import _memory

BEGIN, END = "<!-- order: begin -->", "<!-- order: end -->"
HELD = predict_batch1.HELD
BATCHES = (32, 64, 128, 256)
LINE = 128 * 1024  # bytes of the simulation's lines
WINDOW = 4  # steps of which all orders are tried
SIZE = 2  # bytes of bfloat16


class Span(NamedTuple):
    """Memory of a value: where it begins, and bytes of each image."""

    start: int
    of_image: int


class Walk(NamedTuple):
    """What a step reads and writes, and whether it goes backwards by `rf.freeze`'s rule."""

    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    backwards: bool


@functools.cache
def walks_of(batch: int, serves: predict_batch1.Serving = predict_batch1.by_triton) -> list[Walk]:
    """The steps of ResNet-50's engine over so many images, in the memory that it would have."""
    graph, shapes = predict_batch1.graph_of(batch, serves=serves)
    sizes = {value: prod(shape) * SIZE for value, shape in shapes.items()}
    typed = {value: (size, predict_batch1.DTYPE) for value, size in sizes.items()}
    placed = _memory.plan(_memory.lives(graph, typed, {})).offsets

    def spans(values: Sequence[int]) -> tuple[Span, ...]:
        return tuple(Span(placed[v], sizes[v] // batch) for v in values if v in placed)

    return [
        Walk(spans(step.inputs), spans(step.outputs), bool(step.options.get("reverse")))
        for step in graph.steps
    ]


class Cache:
    """Lines in the order in which they were touched, and whether they have been written."""

    def __init__(self, capacity: int) -> None:
        self._lines: OrderedDict[int, bool] = OrderedDict()
        self._most = capacity // LINE
        self.moved = 0  # lines through memory

    def touch(self, line: int, writes: bool) -> None:
        """One access."""
        lines = self._lines
        if line in lines:
            lines.move_to_end(line)
            lines[line] |= writes
            return
        self.moved += not writes
        lines[line] = writes
        if len(lines) > self._most:
            self.moved += lines.popitem(last=False)[1]


def simulated(walks: Sequence[Walk], orders: Sequence[bool], batch: int, held: int = HELD) -> int:
    """Bytes through memory, read and written, of the second of two runs.

    Args:
        walks: the steps.
        orders: of each, whether it walks from the end.
        batch: images.
        held: bytes that the cache holds.
    """
    cache = Cache(held)
    before = 0
    for _ in range(2):
        before = cache.moved
        for walk, backwards in zip(walks, orders, strict=True):
            _step(cache, walk, backwards, batch)
    return (cache.moved - before) * LINE


def _step(cache: Cache, walk: Walk, backwards: bool, batch: int) -> None:
    """Of every image what is read and written, in proportion as it goes."""
    spans = [*((span, False) for span in walk.reads), *((span, True) for span in walk.writes)]
    for image in reversed(range(batch)) if backwards else range(batch):
        pieces = max(1, max((span.of_image for span, _ in spans), default=0) // LINE)
        for piece in reversed(range(pieces)) if backwards else range(pieces):
            for span, writes in spans:
                first = span.start + image * span.of_image + span.of_image * piece // pieces
                last = span.start + image * span.of_image + span.of_image * (piece + 1) // pieces
                for line in range(first // LINE, (last - 1) // LINE + 1):
                    cache.touch(line, writes)


def orders_of(walks: Sequence[Walk]) -> dict[str, list[bool]]:
    """The table's orders."""
    return {
        "all forwards": [False] * len(walks),
        "as `rf.freeze` has it": [walk.backwards for walk in walks],
        "each against the one ahead": [at % 2 == 1 for at in range(len(walks))],
    }


def searched(batch: int) -> tuple[int, list[bool]]:
    """Bytes of the best order that is found from the rule's, and that order."""
    walks = walks_of(batch)
    best = [walk.backwards for walk in walks]
    least = simulated(walks, best, batch)
    for first in range(0, len(walks) - WINDOW + 1, WINDOW - 1):
        start = list(best)
        for some in itertools.product((False, True), repeat=WINDOW):
            tried = [*start[:first], *some, *start[first + WINDOW :]]
            moved = simulated(walks, tried, batch)
            if moved < least:
                least, best = moved, tried
    return least, best


def row(batch: int) -> str:
    """Of each order, as a line of Markdown."""
    walks = walks_of(batch)
    moved = [simulated(walks, order, batch) for order in orders_of(walks).values()]
    cells = [f"{moved[0] / 1e6:,.0f} MB"]
    for one in moved[1:]:
        saved = 1e6 * (moved[0] - one) / MEMORY
        cells.append(f"{one / 1e6:,.0f} MB, {saved:.0f} us less")
    return f"| {batch} | {' | '.join(cells)} |"


def table() -> str:
    """Of each batch, as Markdown."""
    names = list(orders_of([]))
    lines = [f"| images | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    return "\n".join([*lines, *map(row, BATCHES)])


@click.command()
@click.option("--write", is_flag=True, help="Into docs/freeze.md.")
@click.option("--search", type=click.IntRange(min=1), help="The best order of so many images.")
def main(write: bool, search: int | None) -> None:
    """Simulate orders of the batch in the L2 cache."""
    if search is not None:
        moved, order = searched(search)
        click.echo(f"{moved / 1e6:,.0f} MB: {''.join('<' if back else '>' for back in order)}")
        return
    said = table()
    click.echo(said)
    if write:
        before, rest = predict_batch1.PAGE.read_text(encoding="utf-8").split(BEGIN)
        page = f"{before}{BEGIN}\n{said}\n{END}{rest.split(END)[1]}"
        predict_batch1.PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
