"""Predicts a frozen ResNet-50 of one image on an H200 in bfloat16, kernel by kernel.

The graph is that of `rf.freeze`, rewritten by its rules as for an H200; each step's kernels are
those that Triton's choosers pick. Work is predicted as elsewhere (`predict_triton.py`, and
`ops/_chain_plan.py` for chains); a launch costs more where a kernel waits for the one ahead to end
than where it begins before. Nothing of it has been measured.

    python benchmarks/predict_batch1.py            # the table
    python benchmarks/predict_batch1.py --write    # into docs/freeze.md
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_network
import predict_triton

import resnet_fused as rf
from resnet_fused.cases import ChainCase, ConvCase
from resnet_fused.freeze import _chains, _order, _rules, _served
from resnet_fused.freeze._ir import Graph, Step
from resnet_fused.ops import _chain_plan
from resnet_fused.ops.conv_chain import Answer
from resnet_fused.triton import _tiles, _traffic

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "freeze.md"
BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
H200 = predict_triton.H200
DTYPE = torch.bfloat16
HELD = int(_order.HELD * 50e6)  # bytes of its L2 cache
ORDINARY, EARLY = 2.0, 1.2
"""Microseconds of a launch in a CUDA graph: gap, fill and drain; the latter where a kernel begins
before the one ahead has ended. Both are guesses until they are measured."""


Serving = Callable[[ChainCase, torch.dtype, torch.device], Answer]
"""What is said of a chain, as `ops.conv_chain.serves` does."""


def by_triton(case: ChainCase, dtype: torch.dtype, device: torch.device) -> Answer:
    """Triton's kernel on an H200."""
    found = _chain_plan.predict(case, DTYPE, H200)
    if isinstance(found, str):
        return Answer(found, False, found)
    return Answer(None, found.gain > 0, str(found), found.gain)


@contextlib.contextmanager
def on_h200(serves: Serving = by_triton) -> Iterator[None]:
    """Has the rules decide as on an H200 on which every kernel is admitted."""
    with (
        mock.patch.object(_served, "refusal", return_value=None),
        mock.patch.object(_chains, "serves", serves),
        mock.patch.object(_order, "capacity", return_value=HELD),
    ):
        yield


@functools.cache
def graph_of(
    batch: int, size: int = 224, serves: Serving = by_triton
) -> tuple[Graph, _chains.Shapes]:
    """ResNet-50 after all rules, and the shapes of its values.

    Args:
        batch: images that the rules are told of.
        size: their height and width.
        serves: says which chains are taken.
    """
    graph = rf.freeze(rf.models.resnet50().eval(), torch.zeros(1, 3, 32, 32))._plain
    example = torch.empty(batch, 3, size, size, device="meta")
    with on_h200(serves):
        place = _rules.Place(torch.device("cpu"), DTYPE, (example,))
        graph, _ = _rules.apply(_rules.DEVICE, graph, place)
    return graph, _chains.shapes_of(graph, (example,))


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        name: its layers.
        kernels: how many it launches.
        programs: of the first of them.
        work: microseconds without launches.
    """

    name: str
    kernels: int
    programs: int
    work: float


def _conv_case(step: Step, shapes: _chains.Shapes) -> ConvCase:
    n, c, h, w = shapes[step.inputs[0]]
    weight, o = step.tensors["weight"], step.options
    return ConvCase(
        step.name, n, c, h, w, weight.shape[0], *weight.shape[2:], tuple(o["stride"]),
        tuple(o["padding"]), tuple(o["dilation"]), o["groups"], len(step.inputs) == 2, o["act"],
    )  # fmt: skip


def _conv(step: Step, shapes: _chains.Shapes) -> Row:
    case = _conv_case(step, shapes)
    found = predict_triton.predict(case)
    product = _traffic.product_of(case, DTYPE.itemsize)
    plan = _tiles.choose(product, H200)
    kernels = 1 if plan.splits == 1 else 2
    tiles = _tiles.cdiv(product.rows, plan.tile.m) * _tiles.cdiv(product.columns, plan.tile.n)
    programs = tiles * product.copies * plan.splits
    return Row(step.name, kernels, programs, found.us - 1e6 * predict_triton.LAUNCH * kernels)


def _chain(step: Step, shapes: _chains.Shapes) -> Row:
    from resnet_fused.triton import _chain_tiles

    t, o = step.tensors, step.options
    n, below, h, w = shapes[step.inputs[0]]
    c, k = t["weight"].shape[:2]
    sizes = _chain_tiles.Sizes(
        n * h * w, k, c, t["next_weight"].shape[0] if "next_weight" in t else 0,
        t["projection_weight"].shape[1] if "projection_weight" in t else 0,
        below if "front_weight" in t else 0, o["out_stride"], DTYPE.itemsize,
    )  # fmt: skip
    config = _chain_tiles.choose(sizes, H200)
    assert not isinstance(config, str), config
    cycles = _chain_tiles.cost(config, sizes, H200) - _tiles.MERGE
    tiles = _tiles.cdiv(sizes.pixels, config.pixels)
    return Row(step.name, 1, tiles, 1e6 * cycles / _chain_plan.CLOCK)


def _stem(step: Step, shapes: _chains.Shapes) -> Row:
    """As its convolution: the pooling is in its tail; filters are packed before."""
    from resnet_fused.triton import _stem_tiles

    case = _conv_case(step, shapes)
    weight = torch.empty(case.weight_shape, dtype=DTYPE, device="meta")
    window = step.options["pool_kernel"], step.options["pool_stride"], step.options["pool_padding"]
    sizes = _stem_tiles.sizes_of(case.input_shape, weight, case.stride, case.padding, window)
    plan = None if isinstance(sizes, str) else _stem_tiles.choose(sizes, H200)
    assert not isinstance(sizes, str), sizes
    assert isinstance(plan, _stem_tiles.Plan), plan
    strips, _ = _stem_tiles.strips_of(sizes, plan.tile)
    programs = case.n * strips * _tiles.cdiv(sizes.rows, plan.rows)
    programs *= _tiles.cdiv(case.k, plan.tile.channels)
    alone = predict_triton.predict(case)
    return Row(step.name, 1, programs, max(alone.memory_us, alone.cache_us, alone.tensor_us))


def _head(step: Step, shapes: _chains.Shapes) -> Row:
    """The weights through the cache of as many multiprocessors as there are programs."""
    from resnet_fused.triton import head

    n, c = shapes[step.inputs[0]][:2]
    classes = step.tensors["weight"].shape[0]
    each = head.classes_each(n, classes, H200.multiprocessors)
    programs = _tiles.cdiv(n, head.IMAGES) * _tiles.cdiv(classes, each)
    cycles = (each + min(n, head.IMAGES)) * c * DTYPE.itemsize / _tiles.CACHE
    return Row(step.name, 2, programs, 1e6 * (cycles + _tiles.LATENCY) / _chain_plan.CLOCK)


_KINDS = {"conv_bn_act": _conv, "conv_chain": _chain, "stem": _stem, "head": _head}


def rows(batch: int = 1) -> list[Row]:
    """Every step that launches kernels."""
    graph, shapes = graph_of(batch)
    return [_KINDS[step.kind](step, shapes) for step in graph.steps]


def merges(launch: float) -> tuple[float, float]:
    """Microseconds of all merges of split reductions, as kernels and by the last program.

    The last program of a tile to end could add the tile's parts itself (stream-K does that): no
    launch, but one program reads all of them, behind an exchange through L2 of which two latencies
    are counted.

    Args:
        launch: microseconds of one.
    """
    graph, shapes = graph_of(1)
    kernels = last = 0.0
    for step in graph.steps:
        if step.kind != "conv_bn_act":
            continue
        product = _traffic.product_of(_conv_case(step, shapes), DTYPE.itemsize)
        plan = _tiles.choose(product, H200)
        if plan.splits == 1:
            continue
        sums = product.rows * product.columns * product.copies * 4
        read = sums * plan.splits / (_tiles.CACHE * H200.multiprocessors)
        kernels += launch + 1e6 * (_tiles.LATENCY + read) / _chain_plan.CLOCK
        tile = plan.tile.m * plan.tile.n * 4 * plan.splits
        last += 1e6 * (2 * _tiles.LATENCY + tile / _tiles.CACHE) / _chain_plan.CLOCK
    return kernels, last


def smaller_tiles() -> tuple[int, float]:
    """What a tile of 32 x 32 would change: (merges fewer, microseconds fewer), by the chooser.

    No op has such a configuration.
    """
    graph, shapes = graph_of(1)
    cases = [_conv_case(step, shapes) for step in graph.steps if step.kind == "conv_bn_act"]
    products = [_traffic.product_of(case, DTYPE.itemsize) for case in cases]

    def chosen() -> tuple[int, float]:
        best = [
            min(_tiles.candidates(product, H200), key=lambda one: one[0]) for product in products
        ]
        return sum(splits > 1 for _, _, splits, _ in best), sum(cost for cost, *_ in best)

    extra = _tiles.Tile(32, 32, 4, 4, "imagined")
    before = chosen()
    with mock.patch.object(_tiles, "TILES", (*_tiles.TILES, extra)):
        after = chosen()
    return before[0] - after[0], 1e6 * (before[1] - after[1]) / _chain_plan.CLOCK


def in_one_launch() -> str:
    """The convolutions by csrc/kernels/network_sm90.cuh, in words."""
    phases, work, total = predict_network.predicted()
    return (
        "The convolutions in one persistent launch ([network.md]"
        f"(network.md)): {phases} phases of {predict_network.PHASE:.1f} us until the first pixels "
        f"have come, and {work:.0f} us of work, {total:.0f} us beside the stem and the head."
    )


def table() -> str:
    """The predictions as Markdown."""
    found = rows()
    kernels, work = sum(row.kernels for row in found), sum(row.work for row in found)
    few = [row for row in found if row.programs < 64]
    (ordinary, last), (early, _) = merges(ORDINARY), merges(EARLY)
    fewer, saved = smaller_tiles()
    split = sum(row.kernels == 2 and "fc" not in row.name for row in found)
    lines = [
        f"ResNet-50, one image of 224x224, bfloat16, an H200: {len(found)} steps, **{kernels} "
        f"kernels**, of which {split} merge the parts of a reduction; {work:.0f} us of work. "
        f"With {ORDINARY} us a launch {work + kernels * ORDINARY:.0f} us, with {EARLY} us where a "
        f"kernel begins early {work + kernels * EARLY:.0f} us.",
        "",
        f"{len(found) - len(few)} of the steps have 64 programs or more on its "
        f"{H200.multiprocessors} multiprocessors; the others:",
        "",
        "| step | programs | us |",
        "| --- | --- | --- |",
        *(f"| {row.name} | {row.programs} | {row.work:.1f} |" for row in few),
        "",
        f"The {split} merges take {ordinary:.0f} us as kernels of their own, {early:.0f} us where "
        f"those begin early, and {last:.0f} us by the last program of each tile (stream-K). With "
        f"tiles of 32 x 32, which no op has, there would be {fewer} fewer, and {saved:.0f} us "
        "less.",
        "",
        in_one_launch(),
    ]
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/freeze.md.")
@click.option("--steps", is_flag=True, help="Every step.")
def main(write: bool, steps: bool) -> None:
    """Predict a frozen ResNet-50 of one image."""
    text = table()
    click.echo(text)
    if steps:
        for row in rows():
            click.echo(f"{row.kernels} {row.programs:>4} {row.work:>6.2f}  {row.name}")
    if write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
