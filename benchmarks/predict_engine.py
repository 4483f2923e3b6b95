"""Predicts the frozen ResNet-50 on an H200 in bfloat16: its stem, chains, convolutions and head.

By the models of predict_stem.py, of `ops._chain_plan` (chains and the convolutions beside them)
and, for the head, by bytes. Of each block's end the cut is taken that saves most: no chain, one, or
one with the 3x3 before, as `rf.freeze` does. A prediction is there to be compared with a
measurement: gpu-check puts those of the ops side by side. Nothing here has run on hardware.

    python benchmarks/predict_engine.py            # the table
    python benchmarks/predict_engine.py --write    # into the docs, and as JSON
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import click
import predict_stem
import predict_triton as rates
import torch

from resnet_fused import roofline
from resnet_fused.bench.names import name_of
from resnet_fused.bench.spanning_kernels import KINDS
from resnet_fused.bench.subject import Layer, layers
from resnet_fused.cases import ChainCase, HeadCase
from resnet_fused.ops import _chain_plan
from resnet_fused.triton import head as head_kernel

BEGIN, END = "<!-- engine: begin -->", "<!-- engine: end -->"
DTYPE = torch.bfloat16
NETWORK = layers("resnet50")


def stem_us(batch: int) -> float:
    """One kernel for the filters, one for the rest, by the way that was built."""
    return max(predict_stem.predict(predict_stem.WAYS[-1], batch).values()) + 2e6 * rates.LAUNCH


def head_case(batch: int, network: Sequence[Layer] = NETWORK) -> HeadCase:
    """The network's."""
    ((_, case),) = KINDS["head"].cases(network)
    return dataclasses.replace(case, n=batch)


def head_kernels(batch: int, network: Sequence[Layer] = NETWORK) -> int:
    """Two where one would read the images again."""
    case = head_case(batch, network)
    x = torch.empty(case.shape, dtype=DTYPE, device="meta")
    return 1 if head_kernel.together(x, case.classes) else 2


def head_us(batch: int, network: Sequence[Layer] = NETWORK) -> float:
    """By bytes, and its kernels' launches."""
    case = head_case(batch, network)
    cost = roofline.head_cost(case.shape, case.classes, DTYPE)
    return 1e6 * (cost.bytes / rates.MEMORY + head_kernels(batch, network) * rates.LAUNCH)


def conv_us(layer: Layer, batch: int) -> float:
    """A convolution by itself, as the chains' rivals are predicted."""
    case = dataclasses.replace(layer.case, n=batch)
    return 1e6 * _chain_plan.part_cost(case, DTYPE, rates.H200) / _chain_plan.CLOCK


def chain_us(case: ChainCase, batch: int) -> tuple[float, float] | None:
    """As one kernel, and what that saves; None where no configuration takes it."""
    found = _chain_plan.predict(dataclasses.replace(case, n=batch), DTYPE, rates.H200)
    if isinstance(found, str):
        return None
    return 1e6 * found.chain / _chain_plan.CLOCK, found.gain


def chosen(batch: int) -> list[tuple[ChainCase, float, float]]:
    """The chains that win, the best cut of each block's end: (sizes, its time, what it saves)."""
    ends: dict[str, list[tuple[ChainCase, float, float]]] = {}
    for layer, case in KINDS["conv_chain"].cases(NETWORK):
        found = chain_us(case, batch)
        if found is not None and found[1] > 0:
            ends.setdefault(layer, []).append((case, *found))
    return [max(cuts, key=lambda cut: cut[2]) for cuts in ends.values()]


def engine(batch: int) -> dict[str, Any]:
    """Microseconds of the whole engine and of the same without chains, and how many of them."""
    convolutions = sum(conv_us(layer, batch) for layer in NETWORK[1:])
    chains = chosen(batch)
    saved = sum(gain for _, _, gain in chains)
    ends = stem_us(batch) + head_us(batch)
    return {
        "batch": batch, "us": round(ends + convolutions - saved, 1),
        "without_chains_us": round(ends + convolutions, 1), "stem_us": round(stem_us(batch), 1),
        "head_us": round(head_us(batch), 1), "chains": len(chains),
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Each op's calls, as gpu-check names them: {"op", "layer", "batch", "us", "parts_us"}."""
    found = []
    for batch in rates.BATCHES:
        for _, case in KINDS["stem"].cases(NETWORK):
            if case.images == "same":
                found.append(("stem", name_of(case), batch, stem_us(batch), None))
        ((_, head),) = KINDS["head"].cases(NETWORK)
        found.append(("head", name_of(head), batch, head_us(batch), None))
        for case in dict.fromkeys(case for _, case in KINDS["conv_chain"].cases(NETWORK)):
            taken = chain_us(case, batch)
            if taken is not None:
                us, gain = taken
                found.append(("conv_chain", name_of(case), batch, us, round(us + gain, 2)))
    return [
        {"op": op, "layer": layer, "batch": batch, "us": round(us, 2), "parts_us": parts}
        for op, layer, batch, us, parts in found
    ]


def table() -> str:
    """The engine at each batch size as Markdown."""
    lines = [
        f"Assumed: memory {rates.MEMORY / 1e12:.2f} TB/s, tensor cores {rates.TENSOR / 1e12:.0f} "
        f"TFLOP/s, {rates.LAUNCH * 1e6:.0f} us a launch. ResNet-50, 224x224, bfloat16.",
        "",
        "| batch | us | without chains | of it the stem | the head | chains | images/s |",
        "| --- " * 7 + "|",
    ]
    for batch in rates.BATCHES:
        one = engine(batch)
        lines.append(
            f"| {batch} | {one['us']:.0f} | {one['without_chains_us']:.0f} | {one['stem_us']:.0f} "
            f"| {one['head_us']:.0f} | {one['chains']} | {batch / one['us'] * 1e6:,.0f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help="Into docs/measured_facts.md and predictions.json.")
def main(write: bool) -> None:
    """Predict the frozen ResNet-50."""
    click.echo(table())
    if not write:
        return
    page = rates.PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    text = f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    rates.PAGE.write_text(text, encoding="utf-8")
    rates.record(spanning=rows(), engine=[engine(batch) for batch in rates.BATCHES])


if __name__ == "__main__":
    main()
