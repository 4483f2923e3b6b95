"""Predicts where one kernel across a block's end wins on an H200, in bfloat16.

First what the ops that there are would take, by the chooser's model: `conv_chain` and the
convolutions that it stands for, one by one. Then what kernels of other cuts could take at best, by
bytes and products alone: why those were not built. Nothing of it has been measured.

    python benchmarks/predict_chains.py            # the tables
    python benchmarks/predict_chains.py --write    # into docs/chains.md

The CUDA kernels' part needs the extension built with nvcc, and is left alone without.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from resnet_fused import roofline
from resnet_fused.cases import RESNET50_CHAINS, ChainCase, ConvCase
from resnet_fused.ops import _chain_plan, _cuda_plan
from resnet_fused.triton import _tiles

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "chains.md"
BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
CUDA_BEGIN, CUDA_END = "<!-- cuda: begin -->", "<!-- cuda: end -->"
SM90_BEGIN, SM90_END = "<!-- sm_90a: begin -->", "<!-- sm_90a: end -->"
BATCHES = (1, 32, 256)
ABOUT = (132, 232448, 233472)
"""An H200's multiprocessors, bytes of shared memory of a block and of a multiprocessor."""
WITH_TMA = (*ABOUT, 90)
H200 = _tiles.Limits(132, 232448, 90, "NVIDIA H200")

MEMORY = 4.3e12  # bytes/s: a device copy
TENSOR = 790e12  # FLOP/s, bf16, a large product
REACHED = 0.90  # of MEMORY, by a kernel that streams
EFFICIENCY = {1: 0.80, 2: 0.71, 3: 0.65, 4: 0.62}
"""Of TENSOR, by how many products follow each other in a kernel; 4: with a halo."""
LAUNCH = 2e-6  # s a kernel in a CUDA graph
HALO = 1.03  # x read by tiles of a whole block, over x
RECOMPUTED = {64: 1.118, 128: 1.072, 256: 1.0, 512: 1.0}
"""FLOP of a whole block with the halo's conv1, over those without: tiles of 8 x 16 pixels in the
first stage, 14 x 14 in the second, whole images behind."""


def with_fronts(most: int) -> list[ChainCase]:
    """ResNet-50's chains, up to a width each with the 3x3 convolution in front behind it."""
    rows = []
    for case in RESNET50_CHAINS:
        rows.append(case)
        if case.k <= most:
            rows.append(dataclasses.replace(case, name=f"conv2 + {case.name}", front=case.k))
    return rows


def chains() -> list[str]:
    """ResNet-50's chains as one kernel and by their parts, at each batch size."""
    lines = [
        "| chain | x | " + " | ".join(f"batch {b}: chain | parts" for b in BATCHES) + " |",
        "| --- " * (2 + 2 * len(BATCHES)) + "|",
    ]
    for case in with_fronts(64):
        cells = []
        for batch in BATCHES:
            found = _chain_plan.predict(dataclasses.replace(case, n=batch), torch.bfloat16, H200)
            if isinstance(found, str):
                cells += ["-", f"{parts_us(dataclasses.replace(case, n=batch)):.0f}"]
                continue
            chain, parts = (1e6 * t / _chain_plan.CLOCK for t in (found.chain, found.parts))
            mark = "**" if chain < parts else ""
            cells += [f"{mark}{chain:.0f}{mark}", f"{parts:.0f}"]
        lines.append(f"| {case.name} | {case.count} | {' | '.join(cells)} |")
    return lines


def wide_chains() -> list[ChainCase]:
    """Of the first stage where the narrow width is 128: Wide ResNet's and ResNeXt's."""
    sizes = (("identity", 128, 1), ("last", 256, 2))
    return [
        ChainCase(f"128 wide, {name}", 1, 128, 56, 56, 256, m, out_stride=stride)
        for name, m, stride in sizes
    ]


def cuda_chains(cases: list[ChainCase], about: tuple[int, ...]) -> list[str]:
    """Likewise of the CUDA kernels; needs the extension, which holds their model.

    Args:
        cases: the chains.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.

    Raises:
        RuntimeError: the extension was built without them.
    """
    if not _cuda_plan.exists("conv_chain"):
        raise RuntimeError("the extension holds no CUDA kernel of conv_chain: build it with nvcc")
    lines = [
        "| chain | " + " | ".join(f"batch {b}: chain | parts" for b in BATCHES) + " |",
        "| --- " * (1 + 2 * len(BATCHES)) + "|",
    ]
    for case in cases:
        cells = []
        for batch in BATCHES:
            sized = dataclasses.replace(case, n=batch)
            found = _chain_plan.predict_cuda(sized, torch.bfloat16, about)
            if isinstance(found, str):
                cells += ["-", "-"]
                continue
            chain, parts = (1e6 * t / _chain_plan.CLOCK for t in (found.chain, found.parts))
            mark = "**" if chain < parts else ""
            cells += [f"{mark}{chain:.0f}{mark}", f"{parts:.0f}"]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
    return lines


def parts_us(case: ChainCase) -> float:
    """Microseconds of a chain's convolutions, one by one."""
    parts = (_chain_plan.part_cost(part, torch.bfloat16, H200) for part in case.parts)
    return 1e6 * sum(parts) / _chain_plan.CLOCK


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cut: bytes, FLOP, and how many products follow each other in it."""

    bytes: float
    flops: float
    products: int

    def roof(self) -> float:
        """Seconds at the machine's rates."""
        return max(self.bytes / MEMORY, self.flops / TENSOR)

    def predicted(self) -> float:
        """Seconds at those that a good kernel is taken to reach."""
        tensor = self.flops / (TENSOR * EFFICIENCY[self.products])
        return max(self.bytes / (MEMORY * REACHED), tensor) + LAUNCH


def cuts(k: int, size: int, batch: int = 256) -> dict[str, tuple[Kernel, ...]]:
    """Ways to cut an identity block of a bottleneck network into kernels.

    Args:
        k: its narrow width; the wide one is four times that.
        size: of its images.
        batch: of them.
    """
    pixels = batch * size * size
    q, x = (pixels * channels * 2.0 for channels in (k, 4 * k))
    one = 2.0 * pixels * k * 4 * k  # conv1, and conv3
    nine = 2.0 * pixels * k * k * 9  # conv2
    conv1, conv2, conv3 = Kernel(x + q, one, 1), Kernel(2 * q, nine, 1), Kernel(q + 2 * x, one, 1)
    return {
        "one by one": (conv1, conv2, conv3),
        "conv2+conv3": (conv1, Kernel(q + 2 * x, nine + one, 2)),
        "conv3+conv1": (conv2, Kernel(2 * x + 2 * q, 2 * one, 2)),
        "conv2+conv3+conv1": (Kernel(2 * x + 2 * q, 2 * one + nine, 3),),
        "whole block": (Kernel(2 * x * HALO, (2 * one + nine) * RECOMPUTED[k], 4),),
    }


def blocks() -> list[str]:
    """Roof and prediction of each cut, in microseconds at batch 256."""
    names = list(cuts(64, 56))
    lines = [f"| stage | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for stage, (k, size) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), 1):
        cells = []
        for kernels in cuts(k, size).values():
            roof = 1e6 * sum(one.roof() for one in kernels)
            cells.append(f"{roof:.0f} / {1e6 * sum(one.predicted() for one in kernels):.0f}")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return lines


def basic_block(k: int = 64, size: int = 56, batch: int = 256) -> str:
    """Why two 3x3 convolutions of a basic block are not put into one kernel."""
    case = ConvCase("3x3", batch, k, size, size, k, 3, 3, padding=(1, 1), residual=True)
    cost = roofline.conv_cost(case, torch.bfloat16)
    memory, products = 1e6 * cost.bytes / MEMORY, 1e6 * cost.flops / TENSOR
    halo = (8 + 2) * (16 + 2) / (8 * 16)
    return (
        f"A basic block's 3x3 of {k} channels with its shortcut moves {cost.bytes / 1e6:.0f} MB at "
        f"batch {batch}, {memory:.0f} us, and multiplies for {products:.0f} us: products bound it. "
        f"In one kernel with the 3x3 before, a tile of 8 x 16 pixels would compute that one "
        f"{halo:.2f} times, {100 * (halo - 1) / 2:.0f}% more products in all, to save bytes that "
        "do not bound it."
    )


def text() -> str:
    """All of it as Markdown."""
    rates = (
        f"Assumed: memory {MEMORY / 1e12:.1f} TB/s, of which {REACHED} is reached; tensor cores "
        f"{TENSOR / 1e12:.0f} TFLOP/s; {LAUNCH * 1e6:.0f} us a launch."
    )
    return "\n".join(
        [
            rates, "",
            "Microseconds as one kernel and by the convolutions that it stands for; bold where "
            "the chain is predicted to win, a dash where no configuration takes it:", "",
            *chains(), "",
            "An identity block's cuts at batch 256, in microseconds at those rates / at the part "
            f"of them that a good kernel is taken to reach ({EFFICIENCY[1]} of the tensor cores "
            f"alone, {EFFICIENCY[2]}, {EFFICIENCY[3]} and {EFFICIENCY[4]} for two products, three, "
            "and a whole block):", "",
            *blocks(), "",
            basic_block(),
        ]
    )  # fmt: skip


def cuda_tables() -> list[tuple[str, list[ChainCase], tuple[int, ...], str]]:
    """The tables of the CUDA kernels: where each begins, its chains, the GPU, where it ends."""
    cases = with_fronts(128)
    return [
        (CUDA_BEGIN, cases, ABOUT, CUDA_END),
        (SM90_BEGIN, [*cases, *wide_chains()], WITH_TMA, SM90_END),
    ]


@click.command()
@click.option("--write", is_flag=True, help="Into docs/chains.md.")
def main(write: bool) -> None:
    """Predict chains of convolutions, and cuts that were not built."""
    found = [(BEGIN, text(), END)]
    if _cuda_plan.exists("conv_chain"):
        for begin, cases, about, end in cuda_tables():
            found.append((begin, "\n".join(cuda_chains(cases, about)), end))
    for begin, said, end in found:
        click.echo(said)
        if write:
            before, rest = PAGE.read_text(encoding="utf-8").split(begin)
            PAGE.write_text(f"{before}{begin}\n{said}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
