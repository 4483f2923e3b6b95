"""Predicts what folding a block's end into the next block's first convolution wins.

By two kernels `bn_add_act` reads the last raw output and the shortcut and writes `out`, which the
next block's 1x1 convolution reads. By one (`bn_add_act_conv_stats`) that convolution makes `out` as
it reads both, and writes it once for the shortcut and backward: `out` is read one time less, and a
launch is saved. But each of its column tiles has to read two tensors in the place of one. Rates are
those of `predict_training.py`, tiles and choices those of the kernels; backward stays as it is.

    python benchmarks/predict_block_end.py            # the table
    python benchmarks/predict_block_end.py --write    # into docs/training.md
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_training
from predict_triton import CACHE, H200, LAUNCH, MEMORY, TENSOR, efficiency

from resnet_fused.bench.nodes import Node
from resnet_fused.roofline import Kernel
from resnet_fused.triton import _block_end, _tiles

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- block end: begin -->", "<!-- block end: end -->"
SIZE = 2  # bytes of bfloat16


class Fold(NamedTuple):
    """A block's end and the convolution behind it.

    Attributes:
        block: that ends.
        into: filters of the convolution, as "256 to 64".
        tiles: columns of tiles that each read all pixels.
        before: seconds of the two kernels.
        after: seconds of one.
        bound: what bounds the one.
        taken: whether two blocks in a row take it.
        saved: bytes through memory that it moves less.
    """

    block: str
    into: str
    tiles: int
    before: float
    after: float
    bound: str
    taken: bool
    saved: int


def fold(block: Node, following: Node) -> Fold:
    """The two kernels and the one in their place."""
    end = next(kernel for kernel in block.kernels if kernel.op == "bn_add_act")
    conv = next(
        kernel for kernel in following.kernels if (kernel.op, kernel.layer) == ("conv_bn_stats", 0)
    )
    case = following.cases[0]
    out = math.prod(case.input_shape) * SIZE
    pixels = case.n * case.h * case.w
    projected = len(block.layers) > block.chain
    product = _block_end.product_of(
        pixels, case.c, case.k, SIZE, projected=projected, capability=H200.capability
    )
    plan = _tiles.choose(product, H200)
    asked = _block_end.asked_bytes(product, plan, _block_end.READ) + out
    times = {
        "memory": (end.cost.bytes + conv.cost.bytes - out) / MEMORY,
        "L2": asked / CACHE,
        "tensor cores": conv.cost.flops / (TENSOR * efficiency(plan.tile)),
    }
    bound = max(times, key=lambda name: times[name])
    before = sum(_alone(node, kernel) for node, kernel in ((block, end), (following, conv)))
    columns = -(-product.columns // plan.tile.n)
    taken = _block_end.choose(product, H200).folded
    after = times[bound] + LAUNCH
    return Fold(block.name, f"{case.c} to {case.k}", columns, before, after, bound, taken, out)


def _alone(node: Node, kernel: Kernel) -> float:
    return max(predict_training.seconds(node, kernel)) + LAUNCH


def in_a_row(nodes: Iterable[Node]) -> list[tuple[Node, Node]]:
    """Bottlenecks with the one behind: ends that a 1x1 convolution follows."""
    return list(itertools.pairwise(node for node in nodes if len(node.layers) > 1))


def folds(batch: int) -> list[Fold]:
    """All ends that may be folded."""
    return [fold(*pair) for pair in in_a_row(predict_training._nodes(batch))]


def table(batch: int = 256) -> str:
    """The prediction as Markdown."""
    lines = [
        f"| behind (batch {batch}) | the next 1x1 | column tiles | two kernels, ms | one, ms | "
        "it is bound by | taken | read less, MB an image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    every = folds(batch)
    for shape, group in itertools.groupby(every, key=lambda one: one[1:]):
        same = list(group)
        names = [one.block for one in same]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        one = Fold(name, *shape)
        lines.append(
            f"| {name} | {one.into} | {one.tiles} | {len(same)} x {one.before * 1e3:.3f} | "
            f"{len(same)} x {one.after * 1e3:.3f} | {one.bound} | {'yes' if one.taken else 'no'} | "
            f"{len(same)} x {one.saved / batch / 1e6:.2f} |"
        )
    before, after = (sum(one[at] for one in every) * 1e3 for at in (3, 4))
    sums, layers = predict_training.predict(batch)
    step = sum(row.ms for row in sums) + layers * predict_training.SMALL * LAUNCH * 1e3
    taken = [one for one in every if one.taken]
    saved = sum(one.saved for one in taken) / batch / 1e6
    won = sum(one.before - one.after for one in taken) * 1e3
    return "\n".join([
        *lines,
        "",
        f"Predicted, measured by nobody: {before:.2f} ms in two kernels each, {after:.2f} in one. "
        f"Where one is taken it wins {won:.2f} ms of a step's {step:.2f}, and {saved:.1f} MB an "
        "image less go through memory.",
    ])  # fmt: skip


@click.command()
@click.option("--write", is_flag=True, help="Into docs/training.md.")
def main(write: bool) -> None:
    """Predict a block's end within the next block's first convolution."""
    text = table()
    click.echo(text)
    if write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
