"""Layer by layer, interleaved: eager's modules, a fused layer, and the op on unprepared weights.

A layer of a fused model keeps its weights prepared (folded and packed on the CPU); `rf.ops` is
given bare tensors and prepares them in each call. Both are timed: neither stands for the other.
"""

from __future__ import annotations

import click
import torch
from operands import layers, modules, operands

import resnet_fused as rf
from resnet_fused.bench.model import synchronizer
from resnet_fused.bench.timing import interleaved
from resnet_fused.cases import ConvCase
from resnet_fused.nn._route import conv_bn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@click.command()
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--only", default="", help="Only layers whose name holds this.")
def main(batch: int, dtype: str, device: str, rounds: int, only: str) -> None:
    """Time every distinct convolution of ResNet-50."""
    chosen = [case for case in layers(batch) if only in case.name]
    click.echo(
        f"{'convolution':24} {'eager':>10} {'layer':>10} {'op':>10} {'GFLOP/s':>8}  "
        "layer over eager"
    )
    busy = 0
    for case in chosen:
        busy += not _time(case, DTYPES[dtype], torch.device(device), rounds)
    if busy:
        click.echo(f"no verdict: the machine was busy, or the run too short, in {busy} layers")


def _time(case: ConvCase, dtype: torch.dtype, device: torch.device, rounds: int) -> bool:
    """Times one layer, prints its row; False when no verdict can be given."""
    given = operands(case, dtype, str(device))
    conv, bn = modules(case, given)
    act = torch.relu_ if case.act == "relu" else lambda y: y

    def eager() -> torch.Tensor:
        y = bn(conv(given.x))
        return act(y if given.residual is None else y.add_(given.residual))

    relu = torch.nn.ReLU() if case.act == "relu" else None

    def layer() -> torch.Tensor:
        return conv_bn(given.x, conv, bn, relu, given.residual)

    def op() -> torch.Tensor:
        return rf.ops.conv_bn_act(
            given.x, given.weight, given.scale, given.shift, given.residual, act=case.act,
            **case.geometry,
        )  # fmt: skip

    # Parameters made in inference mode would have no version: nothing could be kept prepared.
    with torch.inference_mode():
        for call in (layer, op):
            torch.testing.assert_close(call().float(), eager().float(), rtol=0.05, atol=0.05)
        timings = interleaved(
            {"eager": eager, "layer": layer, "op": op}, rounds=rounds, min_sample_s=0.03,
            synchronize=synchronizer(device),
        )  # fmt: skip
    medians = " ".join(f"{timings.median(name) * 1e3:7.2f} ms" for name in timings.seconds)
    rate = 2e-9 * case.macs / timings.median("layer")
    click.echo(
        f"{case.name:24} {medians} {rate:8.1f}  "
        f"{timings.ratio('eager', 'layer')}{'' if timings.verdict_allowed else '  busy'}"
    )
    return timings.verdict_allowed


if __name__ == "__main__":
    main()
