"""Predicts conv_bn_stats by hand in CUDA on an H200, beside the Triton kernel's row, in bf16.

Each convolution of ResNet-50 takes what the kernel's own plan predicts: cycles of the busiest
multiprocessor at the tensor cores, shared memory, L2, memory, latency and instructions, whichever
is most, with what is read through a BatchNorm turned in shared memory and every tile measured;
beside it what mma.sync alone would take, and that if x were read as it is. The plan's proportions
are those of csrc/launch/conv_plan.h, its clock that of the chains. The Triton kernel's row is that
of `predict_training.py`, which counts no instructions.

    python benchmarks/predict_stats.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from predict_training import BATCHES, _nodes, predict

from resnet_fused.bench.nodes import Node
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _chain_plan, _cuda_plan, _cuda_stats

H200 = (132, 232448, 233472, 90)
BY_MMA = (*H200[:3], 80)


def cycles(case: ConvCase, prologue: bool, gpu: tuple[int, ...]) -> float:
    """Of the planned launch, predicted.

    Args:
        case: sizes and geometry; channels_last.
        prologue: whether x is read through a BatchNorm.
        gpu: the GPU's numbers.
    """

    def image(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return made.contiguous(memory_format=torch.channels_last)

    norm = torch.empty(4, case.c, device="meta") if prologue else None
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    operands = image(*case.input_shape), norm, image(*case.weight_shape)
    made = _cuda_stats.problem_of(*operands, image(*case.output_shape), geometry, real=False)
    return _cuda_plan.plan(made, gpu).cycles


def row(found: list[Node], taps: int, inner: bool) -> tuple[int, float, float, float]:
    """How many layers there are of a kind; ms, by mma.sync, and so if x were read as it is."""
    layers = [
        node.cases[kernel.layer]
        for node in found
        for kernel in node.kernels
        if kernel.op == _cuda_stats.OP
        and node.cases[kernel.layer].r == taps
        and node.inner(kernel.layer) == inner
    ]
    ways = ((inner, H200), (inner, BY_MMA), (False, BY_MMA))
    sums = [sum(cycles(case, *way) for case in layers) for way in ways]
    return len(layers), *(1e3 * one / _chain_plan.CLOCK for one in sums)


def main() -> None:
    """Prints the table as Markdown."""
    if not _cuda_plan.exists(_cuda_stats.OP):
        sys.exit("error: the extension holds no CUDA kernel of conv_bn_stats: make run")
    for batch in BATCHES:
        found = _nodes(batch)
        print(f"| batch {batch} | layers | ms | by mma.sync | and without turning |")
        print("| --- | --- | --- | --- | --- |")
        rows = {}
        for taps, inner in ((7, False), (1, False), (3, True), (1, True)):
            rows[taps, inner] = one = row(found, taps, inner)
            kind = f"{taps}x{taps}{' behind a BatchNorm' if inner else ''}"
            print(f"| {kind} | {one[0]} | {one[1]:.2f} | {one[2]:.2f} | {one[3]:.2f} |")
        total = [sum(one[i] for one in rows.values()) for i in range(4)]
        print(f"| all | {total[0]:.0f} | {total[1]:.2f} | {total[2]:.2f} | {total[3]:.2f} |")
        triton = next(one for one in predict(batch)[0] if one.op == _cuda_stats.OP)
        print(f"| the Triton kernel | {triton.kernels} | {triton.ms:.2f} | | |\n")


if __name__ == "__main__":
    main()
