"""Times training steps on the CPU, fused beside eager: forward, loss and backward of a network.

Both run in turns, the first of them changing, and each pair gives one ratio; what is told is their
median and the interval that holds the true one. Beside the step's time on all cores stands the
processor time of one thread (`--clock cpu`), which other programs disturb less.

    python benchmarks/train_cpu.py                                   # all of it, as a table
    python benchmarks/train_cpu.py --only resnet50 --output FILE     # one network, as a record
    RESNET_FUSED_BACKEND=cpu python benchmarks/train_cpu.py --blocks # blocks, as nodes of any size
"""

from __future__ import annotations

import copy
import datetime
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torchvision
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.bench import load, record, timing

CONFIDENCE = 0.95
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Case(NamedTuple):
    """A network, its images and how many of them."""

    network: str
    size: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.size} b{self.batch}"


CASES = (
    Case("resnet18", 224, 8),
    Case("resnet50", 224, 4),
    Case("resnet18", 64, 8),
    Case("resnet50", 64, 4),
    Case("cifar_resnet20", 32, 32),
    Case("cifar_resnet20", 8, 64),
)
BLOCKS = (
    Case("basic 16", 32, 4),
    Case("basic 64", 16, 8),
    Case("basic 16", 32, 8),
    Case("bottleneck 64", 16, 4),
    Case("bottleneck 128", 14, 4),
    Case("bottleneck 64", 16, 8),
    Case("basic 16", 32, 16),
    Case("basic 64", 16, 16),
    Case("bottleneck 64", 28, 4),
)
"""Rows of `IN_A_ROW` equal blocks: kind and channels; from few elements a layer to many."""
IN_A_ROW = 8
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def build(case: Case, layout: str) -> tuple[dict[str, nn.Module], Tensor]:
    """The plain and the fused network, the same weights in each, and their input."""
    torch.manual_seed(0)
    kind, _, planes = case.network.partition(" ")
    channels = 3
    if planes:
        block = {"basic": rf.nn.BasicBlock, "bottleneck": rf.nn.Bottleneck}[kind]
        channels = int(planes) * block.expansion
        row = [block(channels, int(planes)) for _ in range(IN_A_ROW)]
        plain = rf.unfuse(nn.Sequential(*row))
    elif hasattr(torchvision.models, case.network):
        plain = getattr(torchvision.models, case.network)()
    else:
        plain = rf.unfuse(getattr(rf.models, case.network)())
    plain = plain.train().to(memory_format=LAYOUTS[layout])
    x = torch.randn(case.batch, channels, case.size, case.size).to(memory_format=LAYOUTS[layout])
    return {"eager": plain, "fused": rf.fuse(copy.deepcopy(plain)).train()}, x


def step(model: nn.Module, x: Tensor) -> None:
    """Forward, loss and backward; gradients are made anew."""
    model.zero_grad(set_to_none=True)
    labels = torch.zeros(x.shape[0], dtype=torch.long)
    nn.functional.cross_entropy(model(x).flatten(1), labels).backward()


def measure(case: Case, layout: str, clock: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Samples of both in turns, `rounds` pairs of them, or 5 and as many as `seconds` allow."""
    models, x = build(case, layout)
    now = CLOCKS[clock]
    for model in (*models.values(), *models.values()):
        step(model, x)
    began = time.perf_counter()
    step(models["eager"], x)
    # A sample is at least a twentieth of a second.
    repeats = max(1, round(0.05 / (time.perf_counter() - began)))
    samples: dict[str, list[float]] = {name: [] for name in models}
    deadline = time.perf_counter() + seconds
    meter = load.LoadMeter()
    while (done := len(samples["eager"])) < rounds:
        if done >= 5 and time.perf_counter() > deadline:
            break
        for name in sorted(models, reverse=done % 2 == 1):
            start = now()
            for _ in range(repeats):
                step(models[name], x)
            samples[name].append((now() - start) / repeats)
    with backends.recording() as routes:
        step(models["fused"], x)
    kinds = Counter(route.implementation for route in routes)
    pairs = [e / f for e, f in zip(samples["eager"], samples["fused"], strict=True)]
    low, high = timing.median_interval(sorted(pairs), CONFIDENCE)[:2]
    return {
        "case": case.name,
        "layout": layout,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "kinds": dict(kinds),
        "eager_ms": 1e3 * statistics.median(samples["eager"]),
        "fused_ms": 1e3 * statistics.median(samples["fused"]),
        "ratio": statistics.median(pairs),
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "load": meter.read().to_dict(),
        "samples": samples,
    }


@click.command()
@click.option("--only", default="", help="Cases whose names hold this.")
@click.option("--blocks", is_flag=True, help="Rows of equal blocks, from small ones to large.")
@click.option("--layout", "layouts", default="nchw,nhwc", show_default=True)
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True,
              help="cpu: processor time of one thread.")  # fmt: skip
@click.option("--rounds", default=21, show_default=True)
@click.option("--seconds", default=30.0, show_default=True, help="For one case, about.")
@click.option("--output", type=click.Path(path_type=Path), help="Writes a record.")
def main(
    only: str,
    blocks: bool,
    layouts: str,
    clock: str,
    rounds: int,
    seconds: float,
    output: Path | None,
) -> None:
    """Times training steps on the CPU, fused beside eager."""
    if clock == "cpu":
        torch.set_num_threads(1)
    rows = []
    for case in BLOCKS if blocks else CASES:
        for layout in layouts.split(",") if only in case.name else ():
            row = measure(case, layout, clock, rounds, seconds)
            rows.append(row)
            low, high = row["interval"]
            click.echo(
                f"{row['case']:24} {layout}  eager {row['eager_ms']:8.1f} ms  fused "
                f"{row['fused_ms']:8.1f} ms  {row['ratio']:.3f} ({low:.3f} .. {high:.3f})  "
                f"{row['kinds']}"
            )
    if output is not None:
        found = {
            "schema": 1,
            "kind": "train_cpu",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": record.commit(),
            "command": shlex.join(["python", *sys.argv]),
            "versions": record.versions(),
            "machine": record.machine(),
            "rows": rows,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
