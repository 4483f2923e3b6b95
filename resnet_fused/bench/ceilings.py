"""What this machine reaches: its best matrix product and copy, measured, for the roofline."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

# Sides of the product and elements of the copy: large enough to be past every cache and launch
# cost, small enough to take a fraction of a second each on two cores.
_SIDE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}


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

    def best(call: object) -> float:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call()  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with torch.inference_mode():
        flops = 2 * side**3 / best(lambda: a @ a)
        bandwidth = 2 * _COPY_BYTES[device.type] / best(lambda: target.copy_(source))
    return Ceilings(flops, bandwidth, str(dtype).removeprefix("torch."))
