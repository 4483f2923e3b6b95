"""Predicts ResNet-50's training step by the Triton kernels on an H200, in bf16, kernel by kernel.

Each kernel takes as long as its bytes through memory, what its loads ask of L2, or its products on
the tensor cores, whichever is most, and a launch. The rates are those of `predict_triton.py`. The
blocks' ends are passes of their own in both directions (what else they may be:
`predict_block_end.py`, `predict_end_gradient.py`), and each block is a node of its own. Both
gradients of a 1x1 convolution come from one kernel where the node would take it.

    python benchmarks/predict_training.py            # the table
    python benchmarks/predict_training.py --write    # into docs/measured_facts.md
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from predict_triton import CACHE, H200, LAUNCH, MEMORY, PAGE, TENSOR, efficiency

from resnet_fused import models
from resnet_fused.bench.nodes import Node, by_triton, nodes, saved_bytes, traffic
from resnet_fused.cases import ConvCase
from resnet_fused.roofline import (
    Kernel,
    conv_bn_dgrad_end_cost,
    conv_bn_grad1x1_cost,
    conv_bn_grad1x1_end_cost,
)
from resnet_fused.triton import _end_gradient, _grad1x1, _grad1x1_end, _tiles, _traffic
from resnet_fused.triton._training_traffic import bn_dgrad_end_issued_bytes

BEGIN, END = "<!-- training: begin -->", "<!-- training: end -->"
BATCHES = (32, 256)
SMALL = 6
"""Kernels of a layer's step that work on vectors alone: finalize, merge; forward and backward."""
EAGER_MB = 472.5
"""MB an image that eager PyTorch's passes add up to in ResNet-50's step at 224x224, bf16. Counted,
not measured: over a convolution's output BatchNorm takes 3, ReLU 2, the add 3; backward ReLU 3,
BatchNorm 5, the fork 3; each convolution and each of its gradients reads and writes once."""


@dataclass(frozen=True)
class Sum:
    """All kernels of one op.

    Attributes:
        op: its name.
        kernels: how many.
        ms: their time.
        gb: bytes that must move through memory.
        bound: how many are bound by memory, L2, tensor cores.
    """

    op: str
    kernels: int
    ms: float
    gb: float
    bound: tuple[int, int, int]


def _merged(case: ConvCase, kernel: Kernel, inner: bool) -> tuple[float, float]:
    """As `_issued`, of both gradients in one kernel: two products, of tiles of different sides."""
    sizes = case.n * case.h * case.w, case.k, case.c, 2
    config = _grad1x1.serves(*sizes[1:], H200)
    bare = conv_bn_grad1x1_cost(case, torch.bfloat16, masked=inner)
    addend = (kernel.cost.bytes - bare.bytes) // 2
    issued = _grad1x1.issued_bytes(*sizes, config, H200, masked=inner, addend=addend).total
    return issued, _two_products(kernel, config)


def _united(case: ConvCase, kernel: Kernel) -> tuple[float, float]:
    """Likewise, of both gradients and a block's end in one kernel."""
    sizes = case.n * case.h * case.w, case.k, case.c, 2
    config = _grad1x1_end.serves(*sizes[1:], H200)
    issued = _grad1x1_end.issued_bytes(*sizes, config, H200).total
    # What the shortcut adds, and a projection's raw output: once each.
    issued += kernel.cost.bytes - conv_bn_grad1x1_end_cost(case, torch.bfloat16).bytes
    return issued, _two_products(kernel, config)


def _two_products(kernel: Kernel, config: _grad1x1.Config) -> float:
    """Seconds on the tensor cores of a kernel that multiplies each tile of pixels twice."""
    shared = functools.partial(
        _tiles.Tile, n=config.channels, warps=_grad1x1.WARPS, stages=_grad1x1.STAGES, why=""
    )
    products = shared(m=_grad1x1.PIXELS), shared(m=config.filters)
    each = kernel.cost.flops / 2
    return sum(each / (TENSOR * efficiency(tile)) for tile in products)


def _issued(case: ConvCase, op: str, kernel: Kernel) -> tuple[float, float]:
    """Bytes that the loop asks of L2, and seconds on the tensor cores."""
    masked = dataclasses.replace(case, act="relu", residual=False)  # y is read beside dz
    product = _traffic.product_of(masked, 2)
    if op == "conv_bn_wgrad":
        product = dataclasses.replace(
            product, rows=product.columns * product.copies, columns=case.c // case.groups,
            copies=case.r * case.s, depth=case.n * case.p * case.q, taps=1, narrow=False,
        )  # fmt: skip
        plan = _tiles.choose(product, H200)
        issued = _traffic.wgrad_issued_bytes(masked, product, plan).total
    elif op == "conv_bn_dgrad":
        phases = case.stride[0] * case.stride[1]
        product = dataclasses.replace(
            product, rows=case.n * case.h * case.w // phases, columns=case.c, copies=phases,
            depth=case.k, taps=-(-case.r // case.stride[0]) * -(-case.s // case.stride[1]),
            narrow=False, runtime_taps=True,
        )  # fmt: skip
        plan = _tiles.choose(product, H200)
        issued = _traffic.dgrad_issued_bytes(masked, product, plan).total
    elif op == "conv_bn_dgrad_end":
        product = _end_gradient.product_of(case, 2)
        plan = _tiles.choose(product, H200)
        issued = bn_dgrad_end_issued_bytes(case, product, plan, affine=True).total
        # What the shortcut adds, and a projection's raw output: once each.
        issued += kernel.cost.bytes - conv_bn_dgrad_end_cost(case, torch.bfloat16).bytes
    else:
        plan = _tiles.choose(product, H200)
        issued = _traffic.issued_bytes(masked, product, plan).total
    return issued, kernel.cost.flops / (TENSOR * efficiency(plan.tile))


def seconds(node: Node, kernel: Kernel) -> tuple[float, float, float]:
    """Of one kernel: memory, L2, tensor cores."""
    memory, case = kernel.cost.bytes / MEMORY, node.case_of(kernel)
    if not kernel.op.startswith("conv"):
        return memory, 0.0, 0.0
    if kernel.op == "conv_bn_grad1x1":
        issued, tensor = _merged(case, kernel, node.inner(kernel.layer))
    elif kernel.op == "conv_bn_grad1x1_end":
        issued, tensor = _united(case, kernel)
    else:
        issued, tensor = _issued(case, kernel.op, kernel)
    return memory, issued / CACHE, tensor


@functools.cache
def _nodes(batch: int) -> list[Node]:
    merging = by_triton(torch.bfloat16, H200)
    return nodes(models.resnet50(), (batch, 3, 224, 224), torch.bfloat16, merging=merging)


@functools.cache
def predict(batch: int) -> tuple[list[Sum], int]:
    """The sums over the step's ops, and how many layers it has."""
    found = _nodes(batch)
    rows: dict[str, list[tuple[tuple[float, float, float], int]]] = {}
    for node in found:
        for kernel in node.kernels:
            times = seconds(node, kernel)
            rows.setdefault(kernel.op, []).append((times, kernel.cost.bytes))
    sums = []
    for op, entries in rows.items():
        bound = [entry[0].index(max(entry[0])) for entry in entries]
        ms = sum(max(times) + LAUNCH for times, _ in entries) * 1e3
        counts = bound.count(0), bound.count(1), bound.count(2)
        gb = sum(size for _, size in entries) / 1e9
        sums.append(Sum(op, len(entries), ms, gb, counts))
    return sums, sum(len(node.layers) for node in found)


def table() -> str:
    """The predictions as Markdown."""
    lines = [
        f"Assumed: memory {MEMORY / 1e12:.2f} TB/s, L2 {CACHE / 1e12:.1f} TB/s, tensor cores "
        f"{TENSOR / 1e12:.0f} TFLOP/s times 0.75 times the tile's feed, {LAUNCH * 1e6:.0f} us a "
        f"launch, {SMALL} small kernels a layer beside these. ResNet-50, 224x224, bfloat16.",
        "",
    ]
    for batch in BATCHES:
        sums, layers = predict(batch)
        small = layers * SMALL * LAUNCH * 1e3
        total = sum(row.ms for row in sums) + small
        lines += [
            f"| batch {batch} | kernels | ms | GB | bound by memory, L2, tensor cores |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row.op} | {row.kernels} | {row.ms:.2f} | {row.gb:.2f} | "
            f"{row.bound[0]}, {row.bound[1]}, {row.bound[2]} |"
            for row in sums
        ]
        lines += [
            f"| small ones | {layers * SMALL} | {small:.2f} | | |",
            "",
            f"Sum at batch {batch}: {total:.2f} ms, {batch / total * 1e3:,.0f} images/s without "
            "the classifier and the optimiser.",
            "",
        ]
    batch = BATCHES[-1]
    found = _nodes(batch)
    forward, backward = (part / batch / 1e6 for part in traffic(found))
    both, kept = forward + backward, saved_bytes(found, torch.bfloat16) / batch / 1e6
    lines.append(
        f"Traffic an image at batch {batch}: {forward:.1f} + {backward:.1f} = {both:.1f} MB, "
        f"{both / EAGER_MB:.2f} of the {EAGER_MB} MB that eager's passes add up to. Kept for "
        f"backward: {kept:.1f} MB an image."
    )
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/measured_facts.md.")
def main(write: bool) -> None:
    """Predict the Triton kernels' training step."""
    text = table()
    click.echo(text)
    if write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
