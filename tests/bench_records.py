"""Example records of schema 2 for tests: synthetic and seeded. No machine measured any of it.

The sizes are those of ResNet-50's layers; the times are the roofline's on made-up ceilings, with
seeded noise on top, so that medians, spreads and ratios are what the package makes of the samples.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from resnet_fused.bench.load import Load
from resnet_fused.bench.timing import Timings
from resnet_fused.cases import RESNET50_LAYERS

LEVELS = ("kernel", "block", "model")
OPS = ("conv_bn_act", "conv_dgrad", "conv_wgrad")
CEILINGS = {
    "cuda": {"bfloat16": {"flops": 8.0e14, "bandwidth": 4.0e12, "dtype": "bfloat16"}},
    "cpu": {
        "float32": {"flops": 2.0e11, "bandwidth": 2.0e10, "dtype": "float32"},
        "bfloat16": {"flops": 6.0e11, "bandwidth": 1.9e10, "dtype": "bfloat16"},
    },
}
# How many times as long as eager a peer takes here; fused takes its own limit's share.
PEERS = {
    "cuda": {
        "eager_nchw": 1.3, "triton": 0.61, "cuda": 0.56, "inductor": 0.72,
        "inductor_max_autotune": 0.66, "cudnn": 0.8, "cudnn_graph": 0.6, "timm": 1.02,
    },
    "cpu": {
        "eager_nchw": 1.1, "onednn": 0.79, "inductor": 0.9, "inductor_freezing": 0.84,
        "timm": 1.01, "onnxruntime": 0.95, "openvino": 0.82,
    },
}  # fmt: skip
ONLY_KERNELS = frozenset({"cudnn", "cudnn_graph", "onednn"})
ONLY_MODELS = frozenset({"timm", "onnxruntime", "openvino"})
OMITTED = {"tensorrt": "not installed", "apex": "not installed: needs a build from source"}

Layer = dict[str, Any]


def layers(depths: Sequence[int] = (3, 4, 6, 3), batch: int = 1, size: int = 224) -> list[Layer]:
    """The convolutions and the classifier of a bottleneck ResNet: name, FLOPs, elements moved."""
    found: list[Layer] = []

    def add(name: str, c: int, k: int, r: int, side: int, out: int, extra: int = 0) -> None:
        flops = 2 * batch * k * out * out * c * r * r
        moved = batch * (c * side * side + k * out * out * (1 + extra)) + k * c * r * r
        # Eager passes over the output again: batch_norm and ReLU read and write it, an add reads
        # two and writes one.
        again = batch * k * out * out * (4 + 3 * extra)
        found.append({"name": name, "flops": flops, "elements": moved, "eager": moved + again})

    side = size // 2
    add("conv1", 3, 64, 7, size, side)
    side, channels = side // 2, 64
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=False), 1):
        for block in range(depth):
            stride = 2 if block == 0 and stage > 1 else 1
            prefix, out = f"layer{stage}.{block}", max(1, side // stride)
            add(f"{prefix}.conv1", channels, width, 1, side, side)
            add(f"{prefix}.conv2", width, width, 3, side, out)
            if block == 0:
                add(f"{prefix}.downsample.0", channels, 4 * width, 1, side, out)
            add(f"{prefix}.conv3", width, 4 * width, 1, out, out, extra=1)
            side, channels = out, 4 * width
    add("fc", channels, 1000, 1, 1, 1)
    return found


def limit(work: Sequence[Layer], ceiling: Mapping[str, Any], *, by_layer: bool) -> dict[str, Any]:
    """The `limit` of a row: the roofline's time of these layers, fused and eager."""
    element = {"float32": 4, "bfloat16": 2, "float16": 2}[ceiling["dtype"]]
    rows = []
    for layer in work:
        moved, eager = layer["elements"] * element, layer["eager"] * element
        rows.append({
            "name": layer["name"], "flops": layer["flops"], "bytes": moved, "eager_bytes": eager,
            "seconds": max(layer["flops"] / ceiling["flops"], moved / ceiling["bandwidth"]),
            "eager_seconds": max(layer["flops"] / ceiling["flops"], eager / ceiling["bandwidth"]),
        })  # fmt: skip
    keys = ("flops", "bytes", "seconds", "eager_bytes", "eager_seconds")
    found: dict[str, Any] = {key: sum(row[key] for row in rows) for key in keys}
    if by_layer:
        found["layers"] = rows
    return found


def subject(level: str, op: str, name: str, batch: int, dtype: str, device: str) -> dict[str, Any]:
    """The `subject` of a row."""
    return {"level": level, "op": op, "name": name, "batch": batch, "dtype": dtype,
            "device": device, "size": 224, "seed": 0}  # fmt: skip


def key(about: Mapping[str, Any]) -> str:
    """The `key` of a row."""
    parts = (about["level"], about["op"], about["name"], f"b{about['batch']}", about["dtype"])
    return "/".join(parts)


def row(
    about: Mapping[str, Any],
    work: Sequence[Layer],
    draw: random.Random,
    *,
    peers: Mapping[str, float] | None = None,
    slower: Mapping[str, float] | None = None,
    wrong: Sequence[str] = (),
    rounds: int = 15,
    foreign: float = 0.01,
) -> dict[str, Any]:
    """One row: its samples drawn around the limit's time, everything else made from them.

    Args:
        about: its `subject`.
        work: its layers (one for a kernel).
        draw: the source of noise.
        peers: name -> how many times as long as eager; None takes those of the device.
        slower: name -> a factor on that variant's time (a planted slowness).
        wrong: names of variants that get no time.
        rounds: samples of each variant.
        foreign: load of other programs, as a fraction of the cores.
    """
    by_layer = about["level"] != "kernel"
    least = limit(work, CEILINGS[about["device"]][about["dtype"]], by_layer=by_layer)
    eager = least["eager_seconds"] / draw.uniform(0.55, 0.8)
    fused = least["seconds"] / draw.uniform(0.5, 0.75)
    times = {"eager": eager, "fused": fused, "fused_again": fused}
    leave_out = ONLY_KERNELS if by_layer else ONLY_MODELS
    given = PEERS[about["device"]] if peers is None else peers
    times |= {name: eager * share for name, share in given.items() if name not in leave_out}
    times |= {name: times[name] * by for name, by in (slower or {}).items() if name in times}
    samples = {
        name: tuple(seconds * math.exp(draw.gauss(0, 0.012)) for _ in range(rounds))
        for name, seconds in times.items()
        if name not in wrong
    }
    load = Load(foreign, 0.97 - foreign, 16, 12.5)
    timings = Timings(samples, load)
    variants: dict[str, Any] = {name: {"wrong": "max error 3.2x the bound"} for name in wrong}
    for name in samples:
        variants[name] = _variant(about, name, timings, least, draw)
    pairs = [("eager", name) for name in samples if name != "eager"] + [("fused_again", "fused")]
    ratios = [
        timings.ratio(base, name).to_dict()
        for base, name in pairs
        if base in samples and name in samples
    ]
    return {
        "key": key(about), "subject": dict(about), "limit": least, "variants": variants,
        "omitted": {**OMITTED, **{n: "times another level" for n in given if n in leave_out}},
        "ratios": ratios, "noise": round(draw.uniform(0.004, 0.02), 4), "load": load.to_dict(),
        "verdicts": [timings.verdict("eager", "fused")] if "fused" in samples else [],
    }  # fmt: skip


def _variant(
    about: Mapping[str, Any],
    name: str,
    timings: Timings,
    least: dict[str, Any],
    draw: random.Random,
) -> dict[str, Any]:
    """What a row says of one variant that was right."""
    median = timings.median(name)
    eager = name.startswith(("eager", "timm"))
    moved = least["eager_bytes" if eager else "bytes"]
    gpu = about["device"] == "cuda"
    found = {
        "samples_s": list(timings.seconds[name]), "median_s": median,
        "spread": timings.spread(name), "tflops": least["flops"] / median / 1e12,
        "gbs": moved / median / 1e9, "of_limit": least["seconds"] / median,
        "images_per_s": about["batch"] / median, "kernels": [f"example_{name}_kernel"],
        "peak_memory_bytes": int(moved * (0.5 if eager else 0.45)) + 10**6,
        "prepare_s": draw.uniform(0.05, 30), "worst": draw.uniform(0.1, 0.6), "calls": 3,
        "method": "cuda_graph" if gpu else "perf_counter",
        "process": "child" if name.startswith("inductor") else "own",
    }  # fmt: skip
    if "layers" in least and name in ("eager", "fused"):
        seconds = "eager_seconds" if eager else "seconds"
        rate = least[seconds] / median
        found["layer_s"] = {
            layer["name"]: layer[seconds] / rate * draw.uniform(0.85, 1.2)
            for layer in least["layers"]
        }
    return found


Plan = list[tuple[dict[str, Any], list[Layer]]]


def _kernels(device: str, dtype: str, batches: Sequence[int], ops: Sequence[str]) -> Plan:
    """ResNet-50's 23 distinct convolutions, at the largest batch, for each op."""
    plan, batch = [], batches[-1]
    for op in ops:
        for case in RESNET50_LAYERS:
            out = batch * case.k * case.p * case.q
            moved = batch * case.c * case.h * case.w + out * (1 + case.residual)
            moved += case.k * case.c * case.r * case.s
            eager = moved + out * (4 + 3 * case.residual)
            work = {"name": case.name, "flops": 2 * case.macs * batch, "elements": moved,
                    "eager": eager}  # fmt: skip
            plan.append((subject("kernel", op, case.name, batch, dtype, device), [work]))
    return plan


def _blocks(device: str, dtype: str, batches: Sequence[int], _ops: Sequence[str]) -> Plan:
    """ResNet-50's 16 blocks, at the largest batch."""
    plan, batch = [], batches[-1]
    every = layers(batch=batch)
    # "layer1.0.conv2" stands in block "layer1.0"; conv1 and fc stand in none.
    names = (layer["name"].rpartition(".conv")[0] for layer in every)
    for name in dict.fromkeys(name for name in names if name):
        own = [layer for layer in every if layer["name"].startswith(f"{name}.")]
        about = subject("block", "inference", f"resnet50.{name}", batch, dtype, device)
        plan.append((about, own))
    return plan


def _models(device: str, dtype: str, batches: Sequence[int], _ops: Sequence[str]) -> Plan:
    """ResNet-50 in inference, and its training step as three times the work."""
    plan: Plan = []
    for op, times in (("inference", 1), ("training", 3)):
        for batch in batches:
            work = [
                {**layer, **{name: times * layer[name] for name in ("flops", "elements", "eager")}}
                for layer in layers(batch=batch)
            ]
            plan.append((subject("model", op, "resnet50", batch, dtype, device), work))
    return plan


def example(
    seed: int = 0,
    *,
    device: str = "cuda",
    levels: Sequence[str] = LEVELS,
    ops: Sequence[str] = OPS,
    batches: Sequence[int] | None = None,
    change: Callable[[dict[str, Any]], Mapping[str, float]] = lambda about: {},
    wrong: Mapping[str, Sequence[str]] | None = None,
    commit: str = "0" * 40,
    foreign: float = 0.01,
) -> dict[str, Any]:
    """A whole record.

    Args:
        seed: of the noise. Two seeds are two runs of one commit.
        device: "cuda" or "cpu".
        levels: which of `LEVELS` it holds.
        ops: of the kernel level.
        batches: of the model level; None is 1, 32, 256 on a GPU and 1, 8 on the CPU.
        change: given a row's subject, name of a variant -> a factor on its time.
        wrong: a row's key -> its wrong variants; None plants one wrong kernel.
        commit: of the record.
        foreign: load of other programs in each row, as a fraction of the cores.

    Returns:
        A record of schema 2, with 23 rows an op at level kernel, 16 at block, an inference and a
        training row for each batch at model.
    """
    draw = random.Random(f"example {seed}")
    dtype = "bfloat16" if device == "cuda" else "float32"
    many = batches or ((1, 32, 256) if device == "cuda" else (1, 8))
    plan = [
        step
        for level, make in (("kernel", _kernels), ("block", _blocks), ("model", _models))
        if level in levels
        for step in make(device, dtype, many, ops)
    ]
    if wrong is None and "kernel" in levels and ops:
        peer = "cudnn" if device == "cuda" else "onednn"
        wrong = {key(plan[2][0]): [peer]}  # the third kernel
    rows = [
        row(about, work, draw, slower=change(about), wrong=(wrong or {}).get(key(about), ()),
            foreign=foreign)
        for about, work in plan
    ]  # fmt: skip
    return record(rows, device=device, commit=commit)


def record(
    rows: list[dict[str, Any]],
    *,
    device: str = "cuda",
    commit: str = "0" * 40,
    of: int | None = None,
) -> dict[str, Any]:
    """A record around rows; `of` above their number makes it one that was cut short."""
    gpu = {"name": "Example GPU", "capability": "9.0", "memory_gib": 80.0}
    return {
        "schema": 2,
        "kind": "bench",
        "date": "2000-01-01T00:00:00+00:00",
        "commit": commit,
        "command": "an example of a record: no machine measured it",
        "versions": {"python": "3.11.0", "resnet_fused": "0.1.0", "torch": "2.15.0", "timm": None},
        "machine": {
            "system": "Example 1.0", "cpu": "Example processor", "cores": 16,
            "cpu_capability": "AVX512", "threads": 8, "memory_gib": 64.0,
            "gpus": [gpu] if device == "cuda" else [],
            "driver": "000.00" if device == "cuda" else None,
        },
        "sources": {"conv_bn_act": "0123456789abcdef", "bn_act": "fedcba9876543210"},
        "settings": {"rounds": 15, "budget_s": None, "levels": list(LEVELS)},
        "ceilings": {name: dict(rates) for name, rates in CEILINGS[device].items()},
        "complete": of is None or of <= len(rows),
        "reached": len(rows),
        "of": len(rows) if of is None else of,
        "seconds": 412.5,
        "rows": rows,
    }  # fmt: skip


def one_kernel() -> dict[str, Any]:
    """One row of level kernel."""
    made = example(levels=("kernel",), ops=("conv_bn_act",))
    return {**made, "rows": made["rows"][1:2]}


def one_model() -> dict[str, Any]:
    """One row of level model, on a CPU."""
    made = example(levels=("model",), device="cpu", batches=(8,))
    return {**made, "rows": made["rows"][:1]}


def many() -> dict[str, Any]:
    """300 kernels in one group, and a model of 300 layers."""
    draw = random.Random(3)
    one, model = one_kernel()["rows"][0], one_model()["rows"][0]
    rows = []
    for index in range(300):
        row = copy.deepcopy(one)
        row["subject"]["name"] = row["key"] = f"case_{index}"
        row["limit"]["flops"] *= draw.uniform(0.01, 1)
        for pair in row["ratios"]:
            factor = draw.uniform(0.2, 3)
            pair |= {name: pair[name] * factor for name in ("median", "low", "high")}
        rows.append(row)
    layers = model["limit"]["layers"]
    model["limit"]["layers"] = [{**layers[i % 54], "name": f"name{i}.{i}.x"} for i in range(300)]
    for name in ("eager", "fused"):
        model["variants"][name]["layer_s"] = {f"name{i}.{i}.x": 1e-3 for i in range(300)}
    return record([*rows, model])


def long() -> dict[str, Any]:
    """Names, reasons and messages that no line can hold."""
    word = "W" * 90 + "_" + "m" * 90
    made_long = one_model()
    for row in [*made_long["rows"], *one_kernel()["rows"]]:
        made = copy.deepcopy(row)
        made["subject"] |= {"name": word, "dtype": "float32"}
        made["variants"] = {
            name if name in ("eager", "fused") else f"{name}{word}": variant
            for name, variant in made["variants"].items()
        }
        made["variants"][f"wrong_{word}"] = {"wrong": f"{word} {word} {word}"}
        made["omitted"] = {f"{word}{i}": f"{word} is not there, because of {i}" for i in range(12)}
        for layer in made["limit"].get("layers", []):
            layer["name"] = f"{layer['name']}.{word}"
        for variant in made["variants"].values():
            if variant.get("layer_s"):
                variant["layer_s"] = {f"{n}.{word}": t for n, t in variant["layer_s"].items()}
        made_long["rows"].append(made)
    made_long["rows"] = made_long["rows"][1:]
    return made_long


def absent() -> dict[str, Any]:
    """Numbers that are NaN, None or not there, beside one row that has them."""
    model, kernel = one_model(), one_kernel()
    kernel["rows"].append(copy.deepcopy(kernel["rows"][0]))
    broken = kernel["rows"][0]
    broken["limit"] |= {"bytes": None, "eager_bytes": math.nan}
    broken["variants"]["eager"] |= {"median_s": math.nan, "peak_memory_bytes": None}
    broken["variants"]["fused"] = {}
    broken["ratios"] = [{"baseline": "eager", "variant": "triton", "median": None}]
    del broken["omitted"], broken["noise"], broken["load"]
    layers = model["rows"][0]["variants"]["fused"]["layer_s"]
    layers |= dict.fromkeys(list(layers)[:3])
    model["rows"][0]["variants"]["eager"]["images_per_s"] = math.inf
    return {**model, "ceilings": {}, "rows": [*model["rows"], *kernel["rows"]]}


def single() -> dict[str, Any]:
    """One variant, which is not even eager."""
    model = one_model()
    row = model["rows"][0]
    row["variants"] = {"fused": row["variants"]["fused"]}
    row["ratios"] = []
    return model


EXTREMES: dict[str, Callable[[], dict[str, Any]]] = {
    "kernel": one_kernel, "model": one_model, "many": many, "long": long, "absent": absent,
    "single": single,
}  # fmt: skip
"""Records that a plot or a page may find hard, by name."""
