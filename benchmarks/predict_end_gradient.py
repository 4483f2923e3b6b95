"""Predicts what making the gradient between two blocks behind the earlier one's ReLU wins.

By two kernels `conv_bn_dgrad` of a block's first convolution, or `conv_bn_grad1x1`, writes the
gradient of the earlier block's output, and `bn_add_act_backward` reads it, masks it, and reduces.
By one (`conv_bn_dgrad_end`) it is masked and reduced as it is written; the weights' gradient is
then a kernel of its own, or comes from the same one (`conv_bn_grad1x1_end`). Rates are those of
`predict_training.py`, tiles and choices those of the kernels; forward stays as it is.

    python benchmarks/predict_end_gradient.py            # the table
    python benchmarks/predict_end_gradient.py --write    # into docs/training.md
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_training
from predict_block_end import PAGE, in_a_row
from predict_triton import CACHE, H200, LAUNCH, MEMORY, TENSOR, efficiency

from resnet_fused import models
from resnet_fused.bench.nodes import Ending as Ended
from resnet_fused.bench.nodes import (
    Node,
    by_triton,
    ends_by_triton,
    nodes,
    traffic,
    unites_by_triton,
)
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _end_gradient as places
from resnet_fused.roofline import Kernel, conv_bn_dgrad_cost
from resnet_fused.triton import _end_gradient, _grad1x1_end, _tiles
from resnet_fused.triton._training_traffic import bn_dgrad_issued_bytes

BEGIN, END = "<!-- end gradient: begin -->", "<!-- end gradient: end -->"
BF16 = torch.bfloat16
FIRST = (
    "conv_bn_dgrad", "conv_bn_dgrad_end", "conv_bn_grad1x1", "conv_bn_grad1x1_end", "conv_bn_wgrad"
)  # fmt: skip
PASS, END_ALONE, ALL = "pass", "end", "all in one"
BOUNDS = ("memory", "L2", "tensor cores")


class Ending(NamedTuple):
    """A gradient between two blocks.

    Attributes:
        block: the earlier one.
        into: filters of the convolution behind it, as "256 to 64".
        merged: whether both gradients of that one come from one kernel, where the end does not.
        before: seconds of its gradients and of the pass.
        after: seconds of its gradients, one of them behind the earlier block's ReLU.
        bound: what bounds that one.
        united: seconds of one kernel of all of them; None where there is none.
        taken: what two blocks in a row take.
        less: bytes through memory that this moves less than with the pass.
    """

    block: str
    into: str
    merged: bool
    before: float
    after: float
    bound: str
    united: float | None
    taken: str
    less: int

    @property
    def won(self) -> float:
        """Seconds less."""
        ways = {PASS: self.before, END_ALONE: self.after, ALL: self.united}
        return self.before - (ways[self.taken] or 0.0)


@functools.cache
def _nodes(batch: int, ending: Ended | bool, uniting: Ended | None = None) -> list[Node]:
    merging, shape = by_triton(BF16, H200), (batch, 3, 224, 224)
    return nodes(
        models.resnet50(), shape, BF16, merging=merging, ending=ending, uniting=uniting
    )  # fmt: skip


def _anywhere(case: ConvCase, projected: bool, added: int) -> bool:
    return _grad1x1_end.serves(case.k, case.c, 2, H200) is not None


def _first(node: Node) -> list[Kernel]:
    """The kernels of the gradients of a node's first convolution."""
    return [kernel for kernel in node.kernels if kernel.layer == 0 and kernel.op in FIRST]


def _times(node: Node, kernel: Kernel) -> tuple[float, float, float]:
    """Memory, L2, tensor cores; of `conv_bn_dgrad` in the tiles that the end has, its own."""
    if kernel.op != "conv_bn_dgrad":
        return predict_training.seconds(node, kernel)
    case = node.cases[kernel.layer]
    product = _end_gradient.product_of(case, 2)
    plan = _tiles.choose(product, H200)
    issued = bn_dgrad_issued_bytes(case, product, plan, affine=True).total
    issued += kernel.cost.bytes - conv_bn_dgrad_cost(case, BF16).bytes
    tensor = kernel.cost.flops / (TENSOR * efficiency(plan.tile))
    return kernel.cost.bytes / MEMORY, issued / CACHE, tensor


def _seconds(node: Node, kernels: list[Kernel]) -> float:
    return sum(max(_times(node, kernel)) + LAUNCH for kernel in kernels)


def _ending(block: Node, following: Node, ended: Node, united: Node) -> Ending:
    """The kernels of two blocks, and of the later one that makes the end of the earlier one."""
    case = following.cases[0]
    passing = [kernel for kernel in block.kernels if kernel.op == "bn_add_act_backward"]
    two, one, all_three = _first(following), _first(ended), _first(united)
    times = _times(ended, next(kernel for kernel in one if kernel.op == places.OP))
    merged = any(kernel.op == "conv_bn_grad1x1" for kernel in two)
    projected, step = len(block.layers) > block.chain, following.addend_stride
    taken, kernels = PASS, [*two, *passing]
    if ends_by_triton(BF16, H200)(case, projected, step):
        taken, kernels = END_ALONE, one
    together = _seconds(united, all_three) if all_three[0].op == places.UNITED else None
    if unites_by_triton(BF16, H200)(case, projected, step):
        taken, kernels = ALL, all_three
    less = sum(kernel.cost.bytes for kernel in (*two, *passing))
    less -= sum(kernel.cost.bytes for kernel in kernels)
    return Ending(
        block.name, f"{case.c} to {case.k}", merged,
        _seconds(following, two) + _seconds(block, passing), _seconds(ended, one),
        BOUNDS[times.index(max(times))], together, taken, less,
    )  # fmt: skip


def endings(batch: int) -> list[Ending]:
    """All gradients between blocks in a row."""
    after, united = (
        {node.name: node for node in _nodes(batch, True, uniting)} for uniting in (None, _anywhere)
    )
    return [
        _ending(block, following, after[following.name], united[following.name])
        for block, following in in_a_row(_nodes(batch, False))
    ]


def table(batch: int = 256) -> str:
    """The prediction as Markdown."""
    lines = [
        f"| behind (batch {batch}) | the next convolution | both gradients by one kernel, else | "
        "with the pass, ms | with the end, ms | the end is bound by | all in one, ms | taken | "
        "moved less, MB an image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    every = endings(batch)
    for shape, group in itertools.groupby(every, key=lambda one: one[1:]):
        same = list(group)
        names = [one.block for one in same]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        one = Ending(name, *shape)
        together = "" if one.united is None else f"{len(same)} x {one.united * 1e3:.3f}"
        lines.append(
            f"| {name} | {one.into} | {'yes' if one.merged else 'no'} | "
            f"{len(same)} x {one.before * 1e3:.3f} | {len(same)} x {one.after * 1e3:.3f} | "
            f"{one.bound} | {together} | {one.taken} | "
            f"{len(same)} x {one.less / batch / 1e6:.2f} |"
        )
    won = sum(one.won for one in every) * 1e3
    ways = ends_by_triton(BF16, H200), unites_by_triton(BF16, H200)
    steps = _nodes(batch, False), _nodes(batch, *ways)
    moved = [sum(traffic(step)) / batch / 1e6 for step in steps]
    lines += [
        "",
        f"Together {won:.2f} ms less of a step at batch {batch}; {moved[1]:.1f} MB an image in "
        f"place of {moved[0]:.1f}.",
    ]
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/training.md.")
def main(write: bool) -> None:
    """Predict the gradients between blocks that are made behind a ReLU."""
    text = table()
    click.echo(text)
    if write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
