"""Predicts the time of every convolution of ResNet-50 by the Triton kernels, on an H200, in bf16.

What the plan of each layer asks of memory, caches and tensor cores, over rates that others report
for this GPU; the largest of the three is the layer's time. The assumptions are printed with the
table. A prediction is there to be compared with a measurement: `gpu-check` puts them side by side.

    python benchmarks/predict_triton.py            # the table
    python benchmarks/predict_triton.py --write    # into the docs, and as JSON
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from resnet_fused import roofline
from resnet_fused.cases import RESNET50_LAYERS, ConvCase
from resnet_fused.triton import _tiles, _traffic

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "measured_facts.md"
RECORD = ROOT / "benchmarks" / "predictions.json"
BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"

H200 = _tiles.Limits(132, 232448, 90, "NVIDIA H200")
MEMORY = 4.3e12 * 0.90  # bytes/s: a device copy, and the part of it that a kernel reaches
CACHE = 5.5e12  # bytes/s from L2 to the multiprocessors, lines read by one of them at a time
TENSOR = 790e12  # FLOP/s, bf16, a large product
LAUNCH = 2.0e-6  # s a kernel in a CUDA graph: gap, fill and drain
BATCHES = (1, 32, 256)


def efficiency(tile: _tiles.Tile) -> float:
    """The part of TENSOR that a tile's main loop is taken to reach in Triton.

    Each operand element is read from shared memory once for m or n products: 128 x 256 and
    256 x 128 feed the tensor cores fully, smaller tiles in proportion of m n / (m + n), and 0.75 of
    that is what a loop without warp specialisation is taken to keep.
    """
    feed = tile.m * tile.n / (tile.m + tile.n) / (128 * 256 / 384)
    return 0.75 * min(1.0, feed)


@dataclass(frozen=True)
class Prediction:
    """One layer at one batch size; times in microseconds.

    Attributes:
        layer: name in `cases.RESNET50_LAYERS`.
        batch: images.
        count: how often the network has it.
        plan: configuration and splits.
        waves: programs a multiprocessor.
        unique_mb: bytes that must move through memory once, in MB.
        issued_mb: bytes that the loads and stores ask of the caches, in MB.
        memory_us: the first over the memory's rate.
        cache_us: the second over the cache's.
        tensor_us: the tiles' products, padding included, over the tensor cores' rate.
        us: the largest, rounded up to whole waves where it is not memory, and launches.
        bound: which it is.
    """

    layer: str
    batch: int
    count: int
    plan: str
    waves: float
    unique_mb: float
    issued_mb: float
    memory_us: float
    cache_us: float
    tensor_us: float
    us: float
    bound: str


def predict(case: ConvCase) -> Prediction:
    """The prediction for a layer of `cases`, with its batch size."""
    product = _traffic.product_of(case, 2)
    plan = _tiles.choose(product, H200)
    tile = plan.tile
    programs = (
        _tiles.cdiv(product.rows, tile.m)
        * _tiles.cdiv(product.columns, tile.n)
        * product.copies
        * plan.splits
    )
    waves = programs / H200.multiprocessors
    steps = product.taps * product.steps / plan.splits
    flops = programs * 2 * tile.m * tile.n * product.step * steps
    unique = roofline.conv_cost(case, torch.bfloat16).bytes
    issued = _traffic.issued_bytes(case, product, plan).total
    whole = _tiles.cdiv(programs, H200.multiprocessors) / waves
    times = {
        "memory": unique / MEMORY,
        "cache": issued / CACHE * whole,
        "tensor": flops / (TENSOR * efficiency(tile)) * whole,
    }
    bound = max(times, key=lambda name: times[name])
    total = times[bound] + LAUNCH * (2 if plan.splits > 1 else 1)
    return Prediction(
        case.name, case.n, case.count, plan.name, round(waves, 2), round(unique / 1e6, 2),
        round(issued / 1e6, 2), *(round(times[name] * 1e6, 2) for name in times),
        round(total * 1e6, 2), bound,
    )  # fmt: skip


def predictions() -> list[Prediction]:
    """All layers at all batch sizes."""
    return [
        predict(dataclasses.replace(case, n=batch)) for batch in BATCHES for case in RESNET50_LAYERS
    ]


def table() -> str:
    """The predictions as Markdown, with what they assume."""
    found = predictions()
    lines = [
        f"Assumed: memory {MEMORY / 1e12:.2f} TB/s, L2 {CACHE / 1e12:.1f} TB/s, tensor cores "
        f"{TENSOR / 1e12:.0f} TFLOP/s times 0.75 times the tile's feed, {LAUNCH * 1e6:.0f} us a "
        "launch. MB: unique bytes / bytes issued. Time: us (what bounds it). All of it bfloat16.",
        "",
        "| convolution | x | " + " | ".join(f"plan {b} | MB | us" for b in BATCHES) + " |",
        "| --- " * (2 + 3 * len(BATCHES)) + "|",
    ]
    for case in RESNET50_LAYERS:
        cells = [
            f"{p.plan} | {p.unique_mb:g} / {p.issued_mb:g} | {p.us:.1f} ({p.bound})"
            for p in found
            if p.layer == case.name
        ]
        lines.append(f"| {case.name} | {case.count} | " + " | ".join(cells) + " |")
    lines.append("")
    for batch in BATCHES:
        total = sum(p.us * p.count for p in found if p.batch == batch)
        lines.append(
            f"Sum at batch {batch}: {total / 1e3:.3f} ms, {batch / total * 1e6:,.0f} images/s "
            "(convolutions alone)."
        )
    return "\n".join(lines)


def record(**parts: object) -> None:
    """Writes parts of the file that gpu-check reads; what the other predictors wrote stays."""
    known = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    RECORD.write_text(json.dumps({**known, **parts}, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.option("--write", is_flag=True, help="Into docs/measured_facts.md and predictions.json.")
def main(write: bool) -> None:
    """Predict the Triton kernels' times, layer by layer."""
    text = table()
    click.echo(text)
    if not write:
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    rows = [asdict(prediction) for prediction in predictions()]
    record(device=H200.name, layers=rows)


if __name__ == "__main__":
    main()
