"""A network's convolutions in one launch, by the driver, beside graphs of single kernels.

The kernel is an experiment (docs/network.md): what `compare` records decides whether it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu import driver
from gpu.device import is_cuda

SMALL: tuple[tuple[str, ...], ...] = (
    ("--data", "integers", "--depths", "2,1"),
    ("--data", "normals", "--dtype", "float16", "--n", "3", "--h", "15"),
    ("--data", "normals", "--c", "64", "--k", "64", "--splits", "2"),
    ("--data", "normals", "--blocks", "1"),
    ("--data", "normals", "--c", "64", "--k", "64", "--splits", "2", "--cluster", "1"),
)
"""Networks that are held to float64, too."""
RESNET50 = (
    "--n", "1", "--c", "64", "--h", "56", "--w", "56", "--k", "64", "--depths", "3,4,6,3",
    "--data", "normals",
)  # fmt: skip
"""Its convolutions behind the stem, for one image of 224x224."""
REPEATS = 50
LIMIT_S = 40.0
"""Of one call of the driver: blocks that wait for one another in vain would do so for ever."""
TIMES = {
    "one_launch": "warm_milliseconds",
    "one_launch_cold": "milliseconds",
    "single_kernels": "warm_graph_milliseconds",
    "single_kernels_cold": "graph_milliseconds",
}
"""Names here -> those of the driver. Cold: L2 is overwritten before each run."""
THROUGH_MEMORY = ("--cluster", "1")
"""The kernel of GPUs without clusters, which is timed beside the one that the plan takes."""


def called(words: Sequence[str], given: str | None, limit: float = LIMIT_S) -> dict[str, Any]:
    """As `driver.called`, of a network.

    Args:
        words: beside the op.
        given: the driver; None for what lies in build/driver-*.
        limit: seconds.
    """
    return driver.called(("--op", "network", *words), given, limit)


def check(device: str, program: str | None = None) -> dict[str, Any]:
    """Small networks against float64, and bit for bit against their layers alone.

    Args:
        device: where; the driver itself knows whether it is emulated.
        program: the driver.
    """
    calls = []
    for words in SMALL:
        one = called(words, program)
        if not one["ok"]:
            return one
        calls.append({key: one.get(key) for key in ("plan", "differing", "wrong", "worst")})
    return {"ok": True, "calls": calls}


def compare(device: str, program: str | None = None, rounds: int = 11) -> dict[str, Any]:
    """ResNet-50 at one image: one launch, a graph of its layers' kernels, the frozen engine.

    The engine computes the stem and the head besides, and has chains; the others do the same work.
    Microseconds; "gain" above 1: the one launch is faster than the graph.

    Args:
        device: where.
        program: the driver.
        rounds: samples of the engine.
    """
    from gpu import frozen

    words = (*RESNET50, "--repeats", str(REPEATS)) if is_cuda(device) else SMALL[0]
    one = called(words, program)
    if not one["ok"]:
        return one
    found: dict[str, Any] = {key: one.get(key) for key in ("plan", "differing", "layers")}
    us = {name: 1e3 * one[key] for name, key in TIMES.items() if key in one}
    memory = called((*words, *THROUGH_MEMORY), program)
    if not memory["ok"]:
        return memory
    us |= {
        name.replace("one_launch", "through_memory"): 1e3 * memory[key]
        for name, key in TIMES.items()
        if key in memory and name.startswith("one_launch")
    }
    engine = frozen.inference(device, "resnet50", 1, rounds)
    if not engine["ok"]:
        return {**found, "us": us, "ok": False, "error": f"the engine: {engine['error']}"}
    us["frozen"] = engine["us"]["frozen"]["us"]
    if "one_launch" in us:
        found["gain"] = us["single_kernels"] / us["one_launch"]
    return {"ok": True, **found, "us": us}


def line(one: Mapping[str, Any]) -> str:
    """The times in words."""
    return ", ".join(f"{name} {us:.0f} us" for name, us in one.get("us", {}).items())
