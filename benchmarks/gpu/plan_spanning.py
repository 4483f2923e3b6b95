"""The steps of stem, head and conv_chain, of any implementation, and of the frozen engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu.pool import Task

MAIN = ("stem", "head", "conv_chain")
NETWORKS = ("resnet50", "resnet18")
HEAVIEST = {"stem": 2, "head": 1, "conv_chain": 6}
"""How many calls of an op are timed."""

Kernels = Sequence[Mapping[str, Any]]


def ours(kernels: Kernels) -> list[Mapping[str, Any]]:
    """The kernels of these ops, of those that can run here."""
    return [kernel for kernel in kernels if kernel["op"] in MAIN]


def _name(kernel: Mapping[str, Any]) -> str:
    implementation = kernel["implementation"]
    return kernel["op"] if implementation == "triton" else f"{kernel['op']}.{implementation}"


def _task(kernel: Mapping[str, Any], function: str, words: str, **arguments: Any) -> Task:
    about = {"op": kernel["op"], "implementation": kernel["implementation"]}
    return Task(
        f"{_name(kernel)} {words}", f"gpu.spanning:{function}", {**about, **arguments}, 120,
        about=about,
    )  # fmt: skip


def first(device: str, kernels: Kernels) -> list[Task]:
    """What tells most: engines against float64, the layers of ResNet-50, huge tensors."""
    from gpu import frozen, spanning

    real = device != "cpu"
    modes = ("bf16", "fp16") if real else ("fp16",)
    shapes = range(len(frozen.SHAPES))
    found = [
        Task(
            f"frozen {name} {mode} {place}", "gpu.frozen:check",
            {"name": name, "mode": mode, "place": place}, 150,
        )
        for mode in modes
        for name in NETWORKS[: 2 if real else 1]
        for place in (shapes if real else shapes[:1])
    ]  # fmt: skip
    found.append(Task("frozen bytes", "gpu.frozen:bytes_of", {"name": NETWORKS[-1]}, 150))
    found.append(Task("frozen threads", "gpu.frozen:threads", seconds=150))
    for kernel in ours(kernels):
        op = kernel["op"]
        names = spanning.layers(op, device)
        found += [
            _task(kernel, "layer", f"layer {name}", name=name, **({} if real else {"batch": 1}))
            for name in names
        ]
        found.append(
            _task(
                kernel, "layer", f"repeats {names[0]}", name=names[0], repeats=spanning.REPEATS,
                **({} if real else {"batch": 1}),
            )
        )  # fmt: skip
        if op != "head":
            found.append(_task(kernel, "large", "large"))
    return found


def rest(device: str, kernels: Kernels, modes: Sequence[str]) -> list[Task]:
    """Every configuration in every mode, the public op on every case, NaN and infinities."""
    from gpu import spanning

    chosen, found = ours(kernels), []
    for mode in modes:
        for kernel in chosen:
            found += [
                _task(kernel, "configuration", f"{mode} {name}", configuration=name, mode=mode)
                for name in kernel["configurations"]
            ]
            found.append(_task(kernel, "public", f"{mode} cases", mode=mode))
    for kernel in chosen:
        found += [
            _task(kernel, "special", f"{modes[0]} {place}", place=place, mode=modes[0])
            for place in spanning.places(kernel["op"])
        ]
    return found


def timings(rates: Mapping[str, Any], kernels: Kernels, device: str) -> list[Task]:
    """The heaviest calls: each implementation, its configurations, its parts, eager."""
    from gpu import spanning
    from gpu.speed import BATCHES

    ceilings = {"flops": rates["flops"], "bandwidth": rates["bandwidth"]}
    batches = BATCHES if device != "cpu" else BATCHES[-1:]
    chosen: dict[str, dict[str, list[str]]] = {}
    for kernel in ours(kernels):
        names = list(kernel["configurations"])
        chosen.setdefault(kernel["op"], {})[kernel["implementation"]] = names
    return [
        Task(
            f"{op} {name}@{batch}", "gpu.spanning:time",
            {
                "op": op, "name": name, "batch": batch, "rates": ceilings,
                # Each configuration by itself at the largest batch alone.
                "kernels": {
                    one: names if batch == batches[0] else [] for one, names in kinds.items()
                },
            },
            120,
            about={"layer": f"{name}@{batch}", "op": op},
        )
        for batch in batches
        for op, kinds in chosen.items()
        for name in spanning.layers(op, device)[: HEAVIEST[op]]
    ]  # fmt: skip


def engines(device: str) -> list[Task]:
    """The engine beside eager and the fused model."""
    batches = (256, 1, 32) if device != "cpu" else (2,)
    return [
        Task(f"frozen@{batch}", "gpu.frozen:inference", {"name": NETWORKS[0], "batch": batch}, 150)
        for batch in batches
    ]


def one_launch(program: str | None = None) -> list[Task]:
    """A network's convolutions in one launch: small ones checked, ResNet-50 beside the engine.

    Args:
        program: the driver; None for one that is built.
    """
    given = {"program": program}
    return [
        Task("one launch", "gpu.one_launch:check", given, 170),
        Task("one launch beside frozen@1", "gpu.one_launch:compare", given, 150),
        Task("one launch in frozen@1", "gpu.one_launch:engines", {}, 150),
    ]


def ceilings(program: str | None = None) -> list[Task]:
    """What a multiprocessor can do; arguments as of `one_launch`."""
    return [Task("ceilings of the plans", "gpu.ceilings:measure", {"program": program}, 120)]
