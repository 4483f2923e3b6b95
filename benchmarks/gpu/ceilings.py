"""What a multiprocessor can do, by the driver, each rate beside what the plans count with.

docs/gpu_record.md says which decision hangs on which rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from gpu import driver
from gpu.device import is_cuda

REPEATS = 10
LIMIT_S = 90.0
"""Of the one call: the sums of what was read are worked out on the CPU."""
SHOWN = (
    "l2_own_rows", "l2_same_rows", "l2_cluster2_rows", "memory_rows", "wgmma_n64_shared_2w",
    "wgmma_n256_shared_2w", "wgmma_n256_shared_2w_48kb", "grid_meeting",
)  # fmt: skip
"""Those of the line; the record has all."""


def measure(device: str, program: str | None = None) -> dict[str, Any]:
    """All ceilings; off a GPU a little of each, without a rate.

    Args:
        device: where; the driver itself knows whether it is emulated.
        program: the driver; None for one that is built.

    Returns:
        "rates": each with "rate", in "unit", what was "predicted" and by which "constant" of
        csrc/launch/conv_plan.h, and "over_predicted", the one over the other; "sm_mhz".
    """
    if is_cuda(device) and torch.cuda.get_device_capability(device) != (9, 0):
        return {"ok": None, "skipped": "these kernels are for GPUs of capability 9.0"}
    repeats = ("--repeats", str(REPEATS)) if is_cuda(device) else ()
    one = driver.called((*driver.CEILINGS, *repeats), program, LIMIT_S)
    if not one["ok"]:
        return one
    rates = {name: dict(found) for name, found in one["rates"].items()}
    for found in rates.values():
        if found.get("rate"):
            found["over_predicted"] = found["rate"] / found["predicted"]
    clocks = [found["sm_mhz"] for found in rates.values() if found.get("sm_mhz")]
    about = {"sm_mhz": statistics.median(clocks)} if clocks else {}
    return {"ok": True, "multiprocessors": one["multiprocessors"], **about, "rates": rates}


def line(one: Mapping[str, Any]) -> str:
    """The rates that most hangs on, in words."""
    rates = one.get("rates", {})
    return ", ".join(
        f"{name} {rates[name]['rate']:.0f} ({rates[name]['predicted']:.0f})"
        for name in SHOWN
        if "rate" in rates.get(name, {})
    )
