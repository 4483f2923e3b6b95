"""Predicts `stem` on an H200 in bfloat16, and the ways of fusing the pooling that were weighed.

    python benchmarks/predict_stem.py

The rates are those of predict_triton.py; docs/stem.md holds the table, to be compared with a
measurement. Nothing here has run on hardware.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import click
import predict_triton as rates
import torch

from resnet_fused import roofline
from resnet_fused.cases import RESNET50_LAYERS, StemCase
from resnet_fused.ops import _cuda_plan, _cuda_stem
from resnet_fused.ops._chain_plan import CLOCK
from resnet_fused.triton import _stem_tiles, _tiles

CASE = StemCase("usual", 1, 3, 224, 224, 64)
ISSUE = 4 * CLOCK  # warp instructions/s of a multiprocessor
LOAD = 9  # instructions a load: address, bounds, copy
EPILOGUE = 3.5  # instructions a sum: multiply-add, maximum, bounds, rounding

# Of the CUDA kernel, a row of the convolution: instructions of a warp for 16 columns of 32 filters
# (56 products, 35 loads and masks of fragments, 51 of scaling and pooling), and for the image.
CUDA_TILE = 142
CUDA_LOADS = 90
CUDA_RATE = 0.63  # of TENSOR, that mma.sync is taken to reach

# Of the CUDA kernel for sm_90a, likewise: instructions of each of the four warps that multiply for
# a worker, and of each of the two that load; and of TENSOR what wgmma is taken to reach.
WGMMA_ROW, WGMMA_LOADS, WGMMA_RATE = 380, 460, 0.85


@dataclass(frozen=True)
class Way:
    """One way to fuse the pooling.

    Attributes:
        name: for the table.
        rows: rows of the convolution computed for each pooled one.
        columns: columns of it that a product makes at once; 1.5 for a recomputed third.
        recomputed: columns computed for each that is needed.
        lanes: elements of a tile's row: what the window of so many columns holds, padded.
    """

    name: str
    rows: float
    columns: int
    recomputed: float
    lanes: int


WAYS = (
    Way("nine taps of the window, each a product", 3.0, 1, 1.5, 32),
    Way("rows carried, three columns computed for two", 2.0, 1, 1.5, 32),
    Way("rows carried, column fetched, a product a column", 2.0, 1, 1.0, 32),
    Way("rows carried, column fetched, a product for both columns (built)", 2.0, 2, 1.0, 32),
)


def predict(way: Way, batch: int) -> dict[str, float]:
    """Microseconds by what bounds a way: memory, tensor cores, instructions.

    Args:
        way: one of `WAYS`.
        batch: images.
    """
    case = dataclasses.replace(CASE, n=batch)
    weight = torch.empty(case.weight_shape, dtype=torch.bfloat16, device="meta")
    sizes = _stem_tiles.sizes_of(case.shape, weight, *case.geometry[:2], case.geometry[2:])
    assert not isinstance(sizes, str)
    plan = _stem_tiles.choose(sizes, rates.H200)
    assert not isinstance(plan, str)
    tile = plan.tile
    strips = _stem_tiles.strips_of(sizes, tile)[0] * _tiles.cdiv(sizes.rows, plan.rows)
    blocks = _tiles.cdiv(case.k, tile.channels)
    programs = batch * strips * blocks
    waves = _tiles.cdiv(programs, rates.H200.multiprocessors)
    rows = plan.rows * way.rows + 1  # and the one above
    pixels = rows * tile.columns * 2 * way.recomputed  # of the convolution, by a program
    flops = 2 * pixels * tile.channels * sizes.taps * way.lanes
    shape = _tiles.Tile(tile.columns, tile.channels * way.columns, tile.warps, tile.stages, "")
    loads = pixels / way.columns * sizes.taps * way.lanes / 4 / 32
    instructions = loads * LOAD + pixels * tile.channels / 32 * EPILOGUE
    each = rates.TENSOR / rates.H200.multiprocessors * rates.efficiency(shape)
    return {
        "memory": roofline.stem_cost(case, torch.bfloat16).bytes / rates.MEMORY * 1e6,
        "tensor": waves * flops / each * 1e6,
        "issue": waves * instructions / ISSUE * 1e6,
    }


def predict_cuda(batch: int) -> dict[str, float]:
    """As `predict`, of the hand-written CUDA kernel, by the plan that its launch would take.

    Args:
        batch: images.
    """
    case = dataclasses.replace(CASE, n=batch)
    x, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in (case.shape, case.weight_shape)
    )
    pooled = 56
    out = torch.empty(batch, case.k, pooled, pooled, dtype=torch.bfloat16, device="meta")
    problem = _cuda_stem.stem_problem(x, weight, case.geometry, out)
    gpu = (rates.H200.multiprocessors, rates.H200.shared_memory, rates.H200.shared_memory + 1024)
    plan = _cuda_plan.choose(problem, gpu, None)
    columns, warps = (int(part.split("x")[0].rstrip("w")) for part in plan.name.split("_"))
    tiles, rows = _tiles.cdiv(pooled, columns), _tiles.cdiv(pooled, plan.splits)
    each = _tiles.cdiv(batch * plan.splits * tiles, gpu[0])  # tiles of a multiprocessor
    conv_rows = each * (2 * rows + 1)
    of_row = columns // 7  # 16 columns make seven pooled ones
    flops = conv_rows * of_row * 16 * case.k * 2 * case.r * 32
    instructions = conv_rows * (2 * of_row * CUDA_TILE + warps * CUDA_LOADS)
    return {
        "memory": roofline.stem_cost(case, torch.bfloat16).bytes / rates.MEMORY * 1e6,
        "tensor": flops / (rates.TENSOR / gpu[0] * CUDA_RATE) * 1e6,
        "issue": instructions / ISSUE * 1e6,
    }


def predict_wgmma(batch: int) -> dict[str, float]:
    """As `predict_cuda`, of the kernel for sm_90a.

    Args:
        batch: images.
    """
    case = dataclasses.replace(CASE, n=batch)
    x, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in (case.shape, case.weight_shape)
    )
    pooled = 56
    out = torch.empty(batch, case.k, pooled, pooled, dtype=torch.bfloat16, device="meta")
    problem = _cuda_stem.stem_problem(x, weight, case.geometry, out)
    memory = rates.H200.shared_memory
    gpu = (rates.H200.multiprocessors, memory, memory + 1024, _cuda_plan.HOPPER)
    own = (one for one in _cuda_plan.configurations("stem") if one.startswith(_cuda_plan.TMA))
    plan = _cuda_plan.choose(problem, gpu, frozenset(own))
    half = int(plan.name.removeprefix(_cuda_plan.TMA).split("x")[0])  # pooled columns of a tile
    tiles = 1 if pooled <= half else _tiles.cdiv(pooled - 1, half - 1)
    rows = 2 * _tiles.cdiv(pooled, plan.splits) + (plan.splits > 1)
    conv_rows = _tiles.cdiv(batch * plan.splits * tiles, gpu[0]) * rows
    flops = conv_rows * 2 * half * case.k * 2 * case.r * 32
    instructions = conv_rows * (4 * WGMMA_ROW + 2 * WGMMA_LOADS)
    return {
        "memory": roofline.stem_cost(case, torch.bfloat16).bytes / rates.MEMORY * 1e6,
        "tensor": flops / (rates.TENSOR / gpu[0] * WGMMA_RATE) * 1e6,
        "issue": instructions / ISSUE * 1e6,
    }


def table() -> str:
    """The ways at each batch size as Markdown, and the two kernels that they replace."""
    lines = [
        "| way | " + " | ".join(f"batch {b}: memory, tensor, issue" for b in rates.BATCHES) + " |",
        "| --- " * (1 + len(rates.BATCHES)) + "|",
    ]
    for way in WAYS:
        cells = [
            ", ".join(f"{us:.1f}" for us in predict(way, batch).values()) for batch in rates.BATCHES
        ]
        lines.append(f"| {way.name} | " + " | ".join(cells) + " |")
    if _cuda_plan.exists("stem"):
        for name, model in (
            ("in CUDA, filters in registers (built)", predict_cuda),
            ("in CUDA for sm_90a, on wgmma (built)", predict_wgmma),
        ):
            cells = [
                ", ".join(f"{us:.1f}" for us in model(batch).values()) for batch in rates.BATCHES
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = []
    for batch in rates.BATCHES:
        layer = next(layer for layer in RESNET50_LAYERS if layer.r == 7)
        conv = rates.predict(dataclasses.replace(layer, n=batch)).us
        moved = batch * 64 * (112 * 112 + 56 * 56) * 2
        cells.append(f"{conv:.1f} + {moved / rates.MEMORY * 1e6 + rates.LAUNCH * 1e6:.1f}")
    lines.append("| conv_bn_act, then a pooling | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
def main() -> None:
    """Print the table."""
    click.echo(table())


if __name__ == "__main__":
    main()
