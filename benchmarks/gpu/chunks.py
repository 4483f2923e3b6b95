"""Experiments that decide how kernels are put together: chunks that stay in L2, memory's rates.

What was predicted is a study's, made of published measurements before there were kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import resnet_fused as rf
from gpu.device import capture, interleaved, is_cuda
from gpu.operands import why_no_cuda

MOST_APART = 0.02
"""Of the norm: two ways to compute a block, whose reductions may be split otherwise."""


class Stage(NamedTuple):
    """An identity block of ResNet-50.

    Attributes:
        outer: channels of its input and result.
        inner: between its convolutions.
        side: of its images.
        chunk: images whose tensors L2 holds all at once.
        whole_us: predicted for 256 images, each convolution over all of them.
        chunks_us: the least that was predicted in chunks, each launch with 2 us.
    """

    outer: int
    inner: int
    side: int
    chunk: int
    whole_us: float
    chunks_us: float


STAGES = {
    "layer1": Stage(256, 64, 56, 8, 471, 427),
    "layer2": Stage(512, 128, 28, 16, 286, 273),
    "layer3": Stage(1024, 256, 14, 32, 201, 225),
}
TINY = Stage(16, 8, 6, 2, 0, 0)
STUDIED = 256
RATES = {"write": 3.6e12, "read": 4.2e12, "copy": None, "add": 3.9e12}
"""Bytes a second as predicted: what is written, read, one of each, two reads a write."""


def blocks(device: str, stage: str, batch: int, implementation: str) -> dict[str, Any]:
    """A block by its three convolutions: over the batch, in chunks of it, each convolution alone.

    Args:
        device: where.
        stage: of `STAGES`.
        batch: images.
        implementation: "triton" or "cuda"; elsewhere any that serves.

    Returns:
        "us" of "whole" and "chunks" and of "conv1", "conv2", "conv3" by themselves, of which the
        first two find nothing of theirs in L2; "apart", the sum of those; "predicted".
    """
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    size = STAGES[stage] if is_cuda(device) else TINY
    made = _operands(size, batch if is_cuda(device) else 2 * size.chunk, device)
    kept: dict[str, Any] = {}
    with torch.inference_mode(), rf.backend(implementation):
        conv1, conv2, conv3 = _convolutions(made)
        x = made["x"]
        t = conv1(x)
        u = conv2(t)

        def whole() -> None:
            kept["whole"] = conv3(conv2(conv1(x)), x)

        def chunks() -> None:  # results stay, each in a place of its own, as those of the batch do
            kept["chunks"] = [conv3(conv2(conv1(part)), part) for part in x.split(size.chunk)]

        calls: dict[str, Callable[[], Any]] = {
            "whole": whole,
            "chunks": chunks,
            "conv1": lambda: kept.__setitem__("conv1", conv1(x)),
            "conv2": lambda: kept.__setitem__("conv2", conv2(t)),
            "conv3": lambda: kept.__setitem__("conv3", conv3(u, x)),
        }
        replays = {name: capture(call, device) for name, call in calls.items()}
        for name in ("whole", "chunks"):
            replays[name]()
        one, other = kept["whole"].double(), torch.cat(kept["chunks"]).double()
        error = float((one - other).norm() / one.norm())
        if not error < MOST_APART:
            return {"ok": False, "error": f"chunks differ by {error:.3g} of the result's norm"}
        timed = interleaved(replays, device)
    found = {"ok": True, "us": timed.to_dict(), "chunk": size.chunk, "omitted": {}}
    found["apart_us"] = sum(found["us"][name]["us"] for name in ("conv1", "conv2", "conv3"))
    found["ratios"] = {"chunks_over_whole": timed.ratio("whole", "chunks")}
    if batch == STUDIED:
        studied = STAGES[stage]
        found["predicted_us"] = {"whole": studied.whole_us, "chunks": studied.chunks_us}
    return found


def _operands(size: Stage, batch: int, device: str) -> dict[str, Tensor]:
    dtype = torch.bfloat16 if is_cuda(device) else torch.float32
    generator = torch.Generator(device).manual_seed(6)

    def image(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        return made.normal_(generator=generator)

    outer, inner, side = size.outer, size.inner, size.side
    return {
        "x": image(batch, outer, side, side).relu_(),
        "conv1": image(inner, outer, 1, 1).mul_(outer**-0.5),
        "conv2": image(inner, inner, 3, 3).mul_((9 * inner) ** -0.5),
        "conv3": image(outer, inner, 1, 1).mul_(inner**-0.5),
    }


def _convolutions(made: dict[str, Tensor]) -> list[Callable[..., Tensor]]:
    found = []
    for name in ("conv1", "conv2", "conv3"):
        weight = made[name]
        scale = torch.ones(weight.shape[0], device=weight.device)
        shift = torch.zeros_like(scale)

        def run(
            x: Tensor,
            residual: Tensor | None = None,
            weight: Tensor = weight,
            scale: Tensor = scale,
            shift: Tensor = shift,
        ) -> Tensor:
            padding = weight.shape[2] // 2
            return rf.ops.conv_bn_act(x, weight, scale, shift, residual, padding=padding)

        found.append(run)
    return found


def memory(device: str) -> dict[str, Any]:
    """Bytes a second by PyTorch's own passes over tensors that no cache holds."""
    count = 1 << 29 if is_cuda(device) else 1 << 12
    a, b, c = (torch.ones(count, dtype=torch.bfloat16, device=device) for _ in range(3))
    rows = a.view(-1, 1 << 10)
    calls: dict[str, Callable[[], Any]] = {
        "write": lambda: c.fill_(1.0),
        "read": lambda: rows.amax(1),
        "copy": lambda: c.copy_(a),
        "add": lambda: torch.add(a, b, out=c),
    }
    moved = dict(zip(calls, (1, 1, 2, 3), strict=True))
    timed = interleaved({name: capture(call, device) for name, call in calls.items()}, device)
    rates = {name: moved[name] * a.nbytes / timed.median(name) for name in calls}
    return {
        "ok": True, "us": timed.to_dict(), "bytes_per_s": rates, "predicted": RATES,
        "over_predicted": {n: rates[n] / rate for n, rate in RATES.items() if rate is not None},
        "ratios": {}, "omitted": {},
    }  # fmt: skip
