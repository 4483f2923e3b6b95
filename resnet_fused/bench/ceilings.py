"""What this machine reaches: its best product and copy, measured, for the roofline.

On a CPU PyTorch multiplies matrices with one library and convolves with another, and which of them
knows the processor better depends on who made it: the product is measured with both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

# Sides of the product and elements of the copy: large enough to be past every cache and launch
# cost, small enough to take a fraction of a second each on two cores.
_SIDE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
_IMAGE = (32, 48)  # a CPU's product as a 1x1 convolution: an image of so many pixels
_IN_A_ROW = 5


@dataclass(frozen=True)
class Ceilings:
    """Peak rates: FLOP/s of a large product in `dtype`, bytes/s of a copy (read plus written)."""

    flops: float
    bandwidth: float
    dtype: str

    def to_dict(self) -> dict[str, float | str]:
        """The fields, for JSON."""
        return asdict(self)


def measure(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Ceilings:
    """Measures both ceilings, the best of a few runs each.

    Args:
        device: where.
        dtype: of the product.
        repeats: runs, of which the fastest counts.
    """
    side = _SIDE[device.type]
    source = torch.empty(_COPY_BYTES[device.type] // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        timed = _by_events if device.type == "cuda" else _by_clock
        return min([timed(call) for _ in range(repeats + 1)][1:])

    with torch.inference_mode():
        flops = 2 * side**3 / min(best(product) for product in _products(device, dtype, side))
        bandwidth = 2 * _COPY_BYTES[device.type] / best(lambda: target.copy_(source))
    return Ceilings(flops, bandwidth, str(dtype).removeprefix("torch."))


def _products(
    device: torch.device, dtype: torch.dtype, side: int
) -> Iterator[Callable[[], object]]:
    """The ways to multiply two matrices of `side` rows and columns."""
    a = torch.randn(side, side, device=device).to(dtype)
    yield lambda: a @ a
    if device.type == "cpu":
        x = a.view(1, *_IMAGE, side).permute(0, 3, 1, 2)
        weight = a.view(side, side, 1, 1)
        yield lambda: F.conv2d(x, weight)


def _by_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_events(call: Callable[[], object]) -> float:
    """Seconds of a call among several in a row, so that launching the first costs nothing."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(_IN_A_ROW):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / _IN_A_ROW
