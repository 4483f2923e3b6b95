"""What this machine reaches: its best matrix product and copy, measured, for the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

# Sides of the product and elements of the copy: large enough to be past every cache and launch
# cost, small enough to take a fraction of a second each on two cores.
_SIDE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
_IN_A_ROW = 5


@dataclass(frozen=True)
class Ceilings:
    """Peak rates: FLOP/s of a matrix product in `dtype`, bytes/s of a copy (read plus written)."""

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
    a = torch.randn(side, side, device=device).to(dtype)
    source = torch.empty(_COPY_BYTES[device.type] // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        timed = _by_events if device.type == "cuda" else _by_clock
        return min([timed(call) for _ in range(repeats + 1)][1:])

    with torch.inference_mode():
        flops = 2 * side**3 / best(lambda: a @ a)
        bandwidth = 2 * _COPY_BYTES[device.type] / best(lambda: target.copy_(source))
    return Ceilings(flops, bandwidth, str(dtype).removeprefix("torch."))


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
