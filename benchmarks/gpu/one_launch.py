"""A network's convolutions in one launch, by the driver, beside graphs of single kernels.

The kernel is an experiment (docs/network.md): what `engines` records decides whether it is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import resnet_fused as rf
from gpu import driver
from gpu.device import Samples, interleaved, is_cuda, synchronize
from resnet_fused.freeze import _one_launch

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
TOGETHER, APART = "in one launch with", "not in one launch: "
"""What a report's rows say."""
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
ENGINES = {
    "auto": ("auto", "never"), "single": ("cuda", "never"), "together": ("cuda", "always"),
}  # fmt: skip
"""Name -> backend and word of a frozen engine. The rival is the faster one of the first two."""
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
    with _one_launch.preferring("never"):
        engine = frozen.inference(device, "resnet50", 1, rounds)
    if not engine["ok"]:
        return {**found, "us": us, "ok": False, "error": f"the engine: {engine['error']}"}
    us["frozen"] = engine["us"]["frozen"]["us"]
    if "one_launch" in us:
        found["gain"] = us["single_kernels"] / us["one_launch"]
    return {"ok": True, **found, "us": us}


def engines(
    device: str, name: str = "resnet50", batch: int = 1, rounds: int = 31
) -> dict[str, Any]:
    """The frozen engine with its layers in one launch, and without, in turns.

    "kept" is the rule of docs/network.md: the whole interval of the times' ratios is above 1.

    Args:
        device: where.
        name: of the network.
        batch: images.
        rounds: samples of each.
    """
    from gpu import frozen, network

    dtype = network.dtype_of(device)
    plain = frozen.make(device, name, dtype)
    shape = (batch, 224, 224) if is_cuda(device) else frozen.TINY[0]
    x = frozen.images(shape, device, dtype, 4)
    made: dict[str, rf.Engine] = {}
    with torch.inference_mode():
        for key, (backend, word) in ENGINES.items():
            with rf.backend(backend), _one_launch.preferring(word):
                made[key] = frozen.engine_of(plain, x)
        results = {key: engine(x) for key, engine in made.items()}
        synchronize(device)
        count, why = together([row.why for row in made["together"].report().rows])
        found: dict[str, Any] = {"layers": count}
        if count == 0 and is_cuda(device):
            return {**found, "ok": False, "error": why}
        for key, y in results.items():
            if wrong := network.unlike(y, results["auto"]):
                return {**found, "ok": False, "error": f"{key}: {wrong}"}
        calls = {key: functools.partial(engine, x) for key, engine in made.items()}
        timed = interleaved(calls, device, rounds)
    return {"ok": True, **found, **judged(timed)}


def together(whys: Sequence[str]) -> tuple[int, str]:
    """How many layers of a report are in one launch, and what it says of the others.

    Args:
        whys: of its rows.
    """
    apart = {why.partition(APART)[2] for why in whys} - {""}
    return sum(TOGETHER in why for why in whys), "; ".join(sorted(apart)) or "no such layers"


def judged(timed: Samples) -> dict[str, Any]:
    """The times of `ENGINES`, and what follows from them.

    Args:
        timed: in turns.
    """
    rival = min(("auto", "single"), key=timed.median)
    ratio = timed.ratio(rival, "together")
    us = {f"engine_{key}": 1e6 * timed.median(key) for key in ENGINES}
    return {"us": us, "rival": rival, "ratio": ratio, "kept": ratio["low"] > 1}


def line(one: Mapping[str, Any]) -> str:
    """The times in words."""
    said = [f"{name} {us:.0f} us" for name, us in one.get("us", {}).items()]
    if "kept" in one:
        ratio = one["ratio"]
        verdict = "kept" if one["kept"] else "not kept"
        said.append(f"{ratio['low']:.3f} .. {ratio['high']:.3f} of {one['rival']}: {verdict}")
    return ", ".join(said)
