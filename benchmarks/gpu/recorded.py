"""What gpu_record runs in child processes: `python -m gpu.recorded probe|tune|bench|page ...`.

tune and bench let "auto" take what the stage `exact` of the same run has admitted.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCHES = (256, 32, 1)
HEAVIEST = 6  # kernels at the first batch; half of them at the others
ENDING_S = 3.0  # kept for writing
ROW_S = 75.0  # for one row of the benchmark, preparing included: half of it for a compiler
LONG_ROW_S = 300.0  # where the user asks for peers that prepare long
LONG = ("inductor", "tensorrt")
OF_KERNELS = ("cudnn_graph",)
"""Peers in processes of their own that join kernels, if they are asked for."""
STEPS = ("inference", "train")
"""Of the network, where peers that compile may join; the step only those that are asked for."""
OTHERS = ("resnet18", "resnet34", "resnet101", "resnet152")
SPANNING = {"stem": 1, "head": 1, "conv_chain": 4}
"""How many calls are timed of the ops that stand for several layers."""
MEASURED = ("conv_bn_stats", "conv_bn_dgrad", "conv_bn_wgrad", "bn_add_act_backward")
"""Ops of training with batch statistics."""
TINY, TINY_CHAIN = "1x1_8_16_at6_add", "8_16_8_at6"


def probe(device: str) -> dict[str, Any]:
    """The GPU's name and compute capability, or why there is none."""
    import torch

    if device == "cpu":
        return {"name": "cpu", "capability": None, "torch": torch.__version__}
    if torch.version.cuda is None:
        return {"why": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        return {"why": f"torch {torch.__version__} sees no GPU"}
    about = torch.cuda.get_device_properties(0)
    return {"name": about.name, "capability": [about.major, about.minor]}


def admit(file: Path, folder: Path) -> int:
    """Makes what a check has found this process' record of admission.

    Args:
        file: the check's.
        folder: where that record is written.

    Returns:
        How many configurations it holds; with none the package's own record stays.
    """
    import resnet_fused.ops  # noqa: F401  (importing it enters the kernels)
    from resnet_fused import admission

    entries = json.loads(file.read_text(encoding="utf-8"))["admission"]
    content, _ = admission.record(entries)
    if content["records"]:
        made = folder / f"admitted-{os.getpid()}.json"
        made.write_text(json.dumps(content), encoding="utf-8")
        admission.SHIPPED = made
        admission.forget()
    return len(content["records"])


def subjects(device: str) -> list[Any]:
    """What is timed, the most telling first."""
    from resnet_fused.bench.subject import Subject, block_names, kernel_names

    if device == "cpu":
        kernels_of = (("conv_bn_act", TINY), ("conv_chain", TINY_CHAIN))
        small = [Subject("kernel", op, name, 2, "float32", device) for op, name in kernels_of]
        block = Subject("block", "inference", "resnet18.layer1.0", 1, "float32", device, size=32)
        model = Subject("model", "inference", "resnet18", 1, "float32", device, size=32)
        return [*small, block, model]
    make = functools.partial(Subject, dtype="bfloat16", device=device)
    ranked = {
        op: sorted(shares, key=lambda name, shares=shares: -shares[name])
        for op in ("conv_bn_act", *SPANNING, "conv_dgrad", "conv_wgrad", "bn_act", *MEASURED)
        for shares in [kernel_names(op, "resnet50")]
    }

    def kernels(op: str, batch: int, names: Sequence[str]) -> list[Any]:
        return [make("kernel", op, name, batch) for name in names]

    def models(op: str, *batches: int) -> list[Any]:
        return [make("model", op, "resnet50", batch) for batch in batches]

    first, forward = BATCHES[0], ranked["conv_bn_act"]
    blocks = block_names("resnet50")
    found = [
        *kernels("conv_bn_act", first, forward[:HEAVIEST]),
        *models("inference", *BATCHES), *models("train", first),
        *(one for op, most in SPANNING.items() for one in kernels(op, first, ranked[op][:most])),
        *(one for batch in BATCHES[1:]
          for one in kernels("conv_bn_act", batch, forward[: HEAVIEST // 2])),
        *(one for batch in reversed(BATCHES[1:]) for op, most in SPANNING.items()
          for one in kernels(op, batch, ranked[op][:most])),
        *(make("block", "inference", name, first) for name in blocks[:2]),
        *models("training_frozen", first), *models("training", first),
        *(one for op in ("conv_dgrad", "conv_wgrad", "bn_act", *MEASURED)
          for one in kernels(op, first, ranked[op][: HEAVIEST // 2])),
        *(make("block", "training_frozen", name, first) for name in blocks[:2]),
        *(one for op in SPANNING for one in kernels(op, first, ranked[op])),
        *(one for batch in BATCHES for one in kernels("conv_bn_act", batch, forward)),
        *(make("block", "inference", name, first) for name in blocks),
        *models("train", BATCHES[1]),
        *(make("model", op, name, batch)
          for batch in BATCHES[:2] for name in OTHERS for op in STEPS),
    ]  # fmt: skip
    return list({subject.key: subject for subject in found}.values())


class ForModels:
    """A peer that prepares long: it joins where the whole network is timed.

    Args:
        peer: the peer.
        asked: whether somebody has named it: then at every batch, and in the whole step too.
    """

    def __init__(self, peer: Any, asked: bool = False) -> None:
        self._peer, self._asked = peer, asked
        self._batches = BATCHES if asked else (BATCHES[0], BATCHES[-1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peer, name)

    def why_not(self, subject: Any) -> str | None:
        """What the peer says; left out but for the network's inference at its batches."""
        ops = STEPS if self._asked else STEPS[:1]
        if subject.level != "model" or subject.op not in ops or subject.batch not in self._batches:
            alone = " and the whole step" if self._asked else ""
            return f"it prepares too long for this record: the network in inference{alone} alone"
        return self._peer.why_not(subject)


def peers(device: str, asked: Sequence[str] = ()) -> list[Any]:
    """Who is timed: those that join quickly everywhere, Inductor and others on whole networks.

    Args:
        device: "cuda" or "cpu".
        asked: names of more that prepare long; they join at every batch and in the whole step, and
            so do Inductor and TensorRT if they are named. Those of `OF_KERNELS` join kernels.
    """
    from resnet_fused.bench.peers import PEERS

    if device == "cpu":
        return [PEERS["eager"], PEERS["fused"], PEERS["frozen"]]
    names = dict.fromkeys([*asked, *LONG])
    quick = [peer for peer in PEERS.values() if not peer.isolated and peer.name not in names]
    long = [
        PEERS[name] if name in OF_KERNELS else ForModels(PEERS[name], name in asked)
        for name in names
        if name in PEERS
    ]
    return [*quick, *long]


def peer_names(text: str) -> tuple[str, ...]:
    """Names of peers, as the command line gives them.

    Raises:
        ArgumentTypeError: a name of none.
    """
    from resnet_fused.bench.peers import PEERS

    names = tuple(word.strip() for word in text.split(",") if word.strip())
    if not names or set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are {', '.join(PEERS)}")
    return names


def bench(order: dict[str, Any]) -> None:
    """Runs the benchmark from a place in the list on; the record is whole after each row."""
    from gpu.record import write_atomically
    from resnet_fused.bench import runner

    device, output = order["device"], Path(order["output"])
    chosen, asked = subjects(device), order.get("peers", ())
    if set(asked) - set(OF_KERNELS):  # where those join comes first
        chosen.sort(key=lambda one: one.name != "resnet50" or one.op not in STEPS)
    keys = Path(order["keys"])
    write_atomically(keys, {"keys": [subject.key for subject in chosen]})
    seconds = max(1.0, order["seconds"] - ENDING_S)
    tiny = device == "cpu"
    settings = runner.Settings(
        rounds=6 if tiny else 9, warmup=1, min_sample_s=1e-3 if tiny else None,
        total_s=seconds, subject_s=min(LONG_ROW_S if asked else ROW_S, seconds), details=not tiny,
    )  # fmt: skip
    left = chosen[order["skip"] :]
    if left:
        found = runner.bench(
            left, peers(device, asked), settings, command=order["command"],
            report=lambda found: write_atomically(output, found),
            progress=lambda done, of, what: print(f"{done} of {of}: {what}", flush=True),
        )  # fmt: skip
        write_atomically(output, found)  # why it was stopped stands in this one alone


def in_turns(jobs: Sequence[Any]) -> list[Any]:
    """The heaviest of each op, then the second of each: what is reached holds some of all."""
    places: dict[str, int] = {}
    ranked = []
    for job in jobs:
        op = job.subject.op
        places[op] = places.get(op, -1) + 1
        ranked.append((places[op], job))
    return [job for _, job in sorted(ranked, key=lambda one: one[0])]


def tune(order: dict[str, Any]) -> None:
    """Tunes the heaviest layers of ResNet-50; a tiny one in the interpreter on the CPU."""
    import contextlib

    from gpu.record import write_atomically
    from resnet_fused import backends, models
    from resnet_fused.bench import tune as tuning
    from resnet_fused.bench.sampler import CpuSampler
    from resnet_fused.bench.subject import Subject

    output = Path(order["output"])
    seconds = max(1.0, order["seconds"] - ENDING_S)
    more: dict[str, Any] = {
        "report": lambda found: write_atomically(output, found),
        "progress": lambda done, of, what: print(f"{done} of {of}: {what}", flush=True),
    }
    if order["device"] != "cpu":
        todo = in_turns(
            tuning.jobs(
                models.get_model("resnet50"), "cuda", batches=BATCHES[:1], dtypes=["bfloat16"]
            )
        )
        tuning.tune(todo, tuning.Settings(rounds=9, most=6, total_s=seconds), **more)
        return
    subject = Subject("kernel", "conv_bn_act", "1x1_64_64_at4", 1, "float32", "cpu")

    def sampler(call: Any, work: Any) -> CpuSampler:
        return CpuSampler(call, len(work.sets), work.mode)

    settings = tuning.Settings(6, 1, most=2, min_sample_s=0.0, total_s=seconds)
    one = functools.partial(tuning.tune_one, samplers=sampler)
    with contextlib.ExitStack() as stack:
        stack.enter_context(backends.backend("triton"))
        tuning.tune([tuning.Job(subject, ("tiny",))], settings, one=one, **more)


def page(record: str, html: str) -> None:
    """Draws a record."""
    from resnet_fused.report import bench_page

    text = bench_page.render(json.loads(Path(record).read_text(encoding="utf-8")))
    beside = Path(f"{html}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(html)


def main(arguments: list[str]) -> int:
    """Runs one of them; its order is one JSON object, or plain words."""
    from gpu.worker import EXTENSION, add_extension

    what, *rest = arguments
    if what == "probe":
        print(json.dumps(probe(*rest)), flush=True)
        return 0
    add_extension(os.environ.get(EXTENSION))
    if what == "page":
        page(*rest)
        return 0
    order = json.loads(rest[0])
    print(f"{admit(Path(order['admission']), Path(order['scratch']))} configurations are admitted")
    {"bench": bench, "tune": tune}[what](order)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
