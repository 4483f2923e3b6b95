"""The steps of every stage, the most telling first; plain lists, made without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu import plan_spanning
from gpu.pool import Task

SHARES = {
    "environment": 25.0,
    "exact": 80.0,
    "bounds": 110.0,
    "sanitizer": 50.0,
    "speed": 120.0,
    "network": 75.0,
}
"""Stage -> its share of the time. What a stage does not need goes to those behind it."""

OPS = ("conv_bn_act", "conv_dgrad", "conv_wgrad")
TMA = "tma_"
"""How the names of configurations begin that GPUs of capability 9.0 take before any other."""
PER_TURN = {"triton": 1, "cuda": 4}
"""Configurations of a kernel on integers before the others' turn: CUDA's need no compiler."""
LIMITS_S = {"triton": 120.0, "cuda": 20.0}
"""Of a configuration on integers. Triton's are compiled first; a kernel that hangs holds a worker
for so long, and a stage has a minute or two."""
BOUNDS_S = {"triton": 60.0, "cuda": 20.0}
"""Of a call on random data, likewise."""
SANITIZED = ("64x64_", "narrow_")
"""How the names of configurations begin that are small enough for every dtype and kind of product,
so that all cases run; the CUDA kernels have two ways to load."""


def matching(tasks: Iterable[Task], only: str) -> list[Task]:
    """Those with one of the texts, which commas part, at a word's begin; all of them for ""."""
    words = [f" {word}" for word in only.split(",") if word]
    return [t for t in tasks if not words or any(word in f" {t.name}" for word in words)]


def exact(kernels: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Every configuration of every kernel, the ops in turns: the first ones are used the most.

    Of a CUDA kernel those by TMA come first. A GPU of another kind than theirs has nothing to do
    for them.
    """
    lists = [
        [
            Task(
                f"{kernel['op']}.{kernel['implementation']} {name}",
                "gpu.exact:check",
                {"check": kernel["check"], "configuration": name},
                LIMITS_S[kernel["implementation"]],
                about={"kernel": kernel, "configuration": name},
            )
            for name in sorted(kernel["configurations"], key=lambda n: not n.startswith(TMA))
        ]
        for kernel in kernels
    ]
    counts = [PER_TURN[kernel["implementation"]] for kernel in kernels]
    turns = [
        [one[first : first + count] for first in range(0, len(one), count)]
        for one, count in zip(lists, counts, strict=True)
    ]
    rounds = itertools.zip_longest(*turns, fillvalue=[])
    return [task for turn in rounds for part in turn for task in part]


def bounds(device: str, kernels: Sequence[Mapping[str, Any]] = ()) -> list[Task]:
    """Random data against float64, and what a result may not depend on.

    Args:
        device: where.
        kernels: those that can run here; see `environment.kernels`.
    """
    from gpu import behaviour
    from gpu.bounds import DTYPES, LAYOUTS, PLACES, SPECIAL_CASES
    from gpu.operands import modes
    from resnet_fused.cases import CONV_CASES, RESNET50_LAYERS

    known = modes(device)
    main = known[0]
    first = [
        Task("network forward", "gpu.network:forward", seconds=150),
        Task("network gradients", "gpu.network:backward", seconds=150),
        *plan_spanning.first(device, kernels),
        *(
            Task(f"large {op}", "gpu.behaviour:large", {"op": op}, 90)
            for op in ("conv_bn_act", "bn_act", "conv_dgrad", "conv_wgrad")
        ),
        *(Task(name, f"gpu.behaviour:{name}") for name in ("stream", "graph", "threads")),
        *(
            Task(f"determinism {op} {case}", "gpu.behaviour:determinism", {"op": op, "case": case})
            for op in OPS
            for case in behaviour.SPLIT_LAYERS
        ),
        *(
            Task(
                f"bn_act.{implementation} {dtype}{' large' * large}",
                "gpu.bounds:bn_act",
                {"implementation": implementation, "dtype": dtype, "large": large},
            )
            for implementation in ("triton", "cuda")
            for dtype in DTYPES
            for large in (False, True)
            if dtype != "bf16" or "bf16" in known or implementation == "cuda"
        ),
    ]

    first += training(device)
    layers = [conv(op, one.name, main, batch=4) for op in OPS for one in RESNET50_LAYERS]
    cuda = cuda_bounds() if device != "cpu" else []
    small = {mode: [conv(op, c.name, mode) for op in OPS for c in CONV_CASES] for mode in known}
    special = [
        conv(op, case, main, special=place)
        for op in OPS
        for case in SPECIAL_CASES
        for place in PLACES
        if place.endswith(("_dy", "_y")) != (op == "conv_bn_act")
    ]
    layouts = [
        Task(
            f"layout {layout} {case}",
            "gpu.bounds:layout",
            {"case": case, "mode": main, "layout": layout},
        )
        for layout in LAYOUTS
        for case in ("3x3_residual", "3x3_groups4", "odd_channels")
    ]
    rest = [task for mode in known[1:] for task in small[mode]]
    spanning = plan_spanning.rest(device, kernels, known)
    return [*first, *layers, *spanning, *small[main], *cuda, *layouts, *special, *rest]


def training(device: str) -> list[Task]:
    """Training with batch statistics: blocks and the captured step first, then the ops."""
    from gpu import training
    from gpu.training_driver import CHECKED
    from resnet_fused.bench.training_kernels import KINDS

    real = device != "cpu"
    names = training.blocks() if real else []
    found = [Task(f"training {name}", "gpu.training:block", {"name": name}) for name in names]
    found += [
        Task(
            f"training merged {name}", "gpu.training:block", {"name": name, "word": "always"},
            about={"op": "conv_bn_grad1x1"},
        )
        for name in (training.merging_blocks() if real else ())
    ]  # fmt: skip
    found.append(Task("training row", "gpu.training_ends:row", about={"op": "conv_bn_dgrad_end"}))
    found.append(Task("training captured", "gpu.training:captured"))
    found += [
        Task(
            f"training captured step {precision} {kind}", "gpu.training:captured_step",
            {"precision": precision, "implementation": kind}, 150,
        )
        for precision in ("float16", "bfloat16")
        for kind in ("triton", "cuda")
        if real
    ]  # fmt: skip
    found += [
        Task(f"{of} driver", "gpu.training_driver:check", {"of": of}, seconds=150) for of in CHECKED
    ]
    return found + [
        Task(
            f"{op} {name}", "gpu.training:kernel",
            {"op": op, "name": name, **({} if real else {"batch": 1})}, about={"op": op},
        )
        for op in KINDS
        for name in (
            training.kernels(op) if real else INTERPRETED.get(op, INTERPRETED[op[:2]])
        )
    ]  # fmt: skip


INTERPRETED = {
    "co": ("3x3_16_16_at5", "1x1_16_32_at5_noact"),
    "bn": ("32_at4_add",),
    "bn_add_act_conv_stats": ("1x1_32_16_at5_noact",),
    "conv_bn_grad1x1": ("1x1_16_32_at5", "1x1_32_16_at5_add_noact"),
    "conv_bn_grad1x1_end": ("1x1_32_16_at5_add_noact",),
}
"""Calls of training's ops for Triton's interpreter, by the op's name or how it begins."""


def conv(op: str, case: str, mode: str, **more: Any) -> Task:
    """One op on random data; `more` as `gpu.bounds.conv` takes it."""
    implementation = more.get("implementation", "triton")
    kernel = op if implementation == "triton" else f"{op}.{implementation}"
    rest = [str(value) for key, value in more.items() if key != "implementation"]
    arguments = {"op": op, "case": case, "mode": mode, **more}
    about = {"op": op, "mode": mode, "implementation": implementation}
    return Task(
        " ".join([kernel, mode, case, *rest]), "gpu.bounds:conv", arguments,
        BOUNDS_S[implementation], about=about,
    )  # fmt: skip


def cuda_bounds() -> list[Task]:
    """The CUDA convolutions on random data: layers, every case in every mode, NaN, behaviour."""
    from gpu import behaviour
    from gpu.bounds import PLACES, SPECIAL_CASES
    from gpu.operands import CUDA_MODES
    from resnet_fused.cases import CONV_CASES, RESNET50_LAYERS

    cuda = {"implementation": "cuda"}
    steps = [
        Task("network forward cuda", "gpu.network:forward", cuda, 150),
        Task("network gradients cuda", "gpu.network:backward", cuda, 150),
        *(Task(f"{name} cuda", f"gpu.behaviour:{name}", cuda)
          for name in ("stream", "graph", "threads")),
        *(Task(f"large {op}.cuda", "gpu.behaviour:large", {"op": op, **cuda}, 90) for op in OPS),
        *(
            Task(
                f"determinism {op}.cuda {case}", "gpu.behaviour:determinism",
                {"op": op, "case": case, **cuda},
            )
            for op in OPS
            for case in behaviour.SPLIT_LAYERS
        ),
    ]  # fmt: skip
    main = CUDA_MODES[0]
    steps += [conv(op, one.name, main, batch=4, **cuda) for op in OPS for one in RESNET50_LAYERS]
    steps += [
        conv(op, c.name, mode, **cuda) for mode in CUDA_MODES for op in OPS for c in CONV_CASES
    ]
    return steps + [
        conv(op, case, main, special=place, **cuda)
        for op in OPS
        for case in SPECIAL_CASES
        for place in PLACES
        if place.endswith(("_dy", "_y")) != (op == "conv_bn_act")
    ]


def sanitized(kernels: Sequence[Mapping[str, Any]], only: str = "") -> list[str]:
    """One or two configurations of every kernel, as `gpu.sanitized` takes them.

    Args:
        kernels: those that can run here.
        only: as of `matching`; if no kernel's name holds such a text, all are taken.
    """
    named = [Task(f"{kernel['op']}.{kernel['implementation']}", "", kernel) for kernel in kernels]
    found = []
    for task in matching(named, only) or named:
        names = list(task.arguments["configurations"])
        small = [next((n for n in names if n.startswith(kind)), None) for kind in SANITIZED]
        chosen = [name for name in small if name is not None] or names[:1]
        found += [f"{task.arguments['check']}={name}" for name in chosen]
    return found


def warm(tuning: bool = True) -> list[Task]:
    """Compiles and checks what the timing will launch, in parallel."""
    from gpu.speed import BATCHES, LAYERS

    chosen = [
        Task(
            f"compile {layer}@{batch}", "gpu.speed:warm", {"layer": layer, "batch": batch},
            about={"op": "conv_bn_act"},
        )
        for batch in BATCHES
        for layer in LAYERS
    ]  # fmt: skip
    return chosen + [
        Task(
            f"compile {layer}@{BATCHES[0]} {tile}", "gpu.speed:warm",
            {"layer": layer, "batch": BATCHES[0], "tile": tile}, about={"op": "conv_bn_act"},
        )
        for layer in LAYERS
        for tile in (tiles() if tuning else ())
    ]  # fmt: skip


def tiles() -> tuple[str, ...]:
    """The names of the configurations of the matrix kernels."""
    from resnet_fused.triton import _tiles

    return tuple(_tiles.BY_NAME)


def kernel_and_configuration(variant: str, one: Mapping[str, Any]) -> tuple[str, str]:
    """Whose time a variant is: the implementation, and the name of its configuration.

    Args:
        variant: "ours", the name of a tile, "cuda", or "cuda NAME" and the like.
        one: what `time_layer` or `spanning.time` found.
    """
    kind, _, name = variant.partition(" ")
    if name:
        return kind, name
    if variant == "cuda":
        return "cuda", one.get("cuda_configuration", "")
    return "triton", one["configuration"] if variant == "ours" else variant


def timings(rates: Mapping[str, Any], cuda: Sequence[str] = ()) -> list[Task]:
    """Ten layers at three batch sizes, `bn_act`, then every other configuration at the largest.

    Args:
        rates: the ceilings.
        cuda: names of the CUDA kernel's configurations, if it can run here.
    """
    from gpu.chunks import STAGES
    from gpu.speed import BATCHES, LAYERS
    from gpu.training import merging
    from gpu.training_driver import TIMED
    from gpu.training_ends import ends

    ceilings = {"flops": rates["flops"], "bandwidth": rates["bandwidth"]}
    found = [
        Task(
            f"{layer}@{batch}", "gpu.speed:time_layer",
            {"layer": layer, "batch": batch, **ceilings, "cuda": [""] if cuda else []}, 90,
            about={"layer": f"{layer}@{batch}"},
        )
        for batch in BATCHES
        for layer in LAYERS
    ]  # fmt: skip
    found.insert(
        len(LAYERS),
        Task(
            f"bn_act@{BATCHES[0]}", "gpu.speed:time_bn_act",
            {"batch": BATCHES[0], "bandwidth": rates["bandwidth"]},
        ),
    )  # fmt: skip
    found += [
        Task(f"gradients {name}@{batch}", "gpu.training:gradients", {"name": name, "batch": batch})
        for batch in BATCHES[:2]
        for name in merging()
    ]
    found += [
        Task(f"ends {name}@{batch}", "gpu.training_ends:time", {"name": name, "batch": batch})
        for batch in BATCHES[:2]
        for name in ends()
    ]
    found += [
        Task(
            f"driver {op}", "gpu.training_driver:time",
            {"op": op, "bandwidth": rates["bandwidth"]}, 90,
        )
        for op in TIMED
    ]  # fmt: skip
    found.append(Task("memory", "gpu.chunks:memory"))
    found += [
        Task(
            f"chunks {stage}@{batch} {kind}", "gpu.chunks:blocks",
            {"stage": stage, "batch": batch, "implementation": kind},
        )
        for batch in BATCHES[:2]
        for stage in STAGES
        for kind in (("cuda", "triton") if cuda else ("triton",))
        if batch > STAGES[stage].chunk
    ]  # fmt: skip
    return found + [
        Task(
            f"{layer}@{BATCHES[0]} tuning", "gpu.speed:time_layer",
            {
                "layer": layer, "batch": BATCHES[0], **ceilings, "tiles": list(tiles()),
                "peers": False, "cuda": list(cuda), "rounds": 7,
            },
            90, about={"layer": f"{layer}@{BATCHES[0]}"},
        )
        for layer in LAYERS
    ]  # fmt: skip


def network(device: str) -> list[Task]:
    """The engine and the whole network in inference, the training step, torch.compile."""
    batches = (256, 32, 1) if device != "cpu" else (2, 1)
    found = plan_spanning.engines(device) + plan_spanning.one_launch() + [
        Task(
            f"inference@{batch}{' graph' * graphs}", "gpu.network:inference",
            {"batch": batch, "graphs": graphs}, 120,
        )
        for batch in batches
        for graphs in (True, False)
    ]  # fmt: skip
    found.append(Task(f"training@{batches[0]}", "gpu.network:training", {"batch": batches[0]}, 150))
    if device != "cpu":
        found += [
            Task(f"torch.compile@{batch}", "gpu.network:compiled", {"batch": batch}, 150)
            for batch in (32, 256)
        ]
    return found
