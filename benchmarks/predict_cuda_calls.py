"""What calls of the CUDA kernels are predicted to take, for gpu-check to put beside their times.

These are the rows that `predict_cuda_engine.py --write` and `predict_cuda_training.py --write`
leave in benchmarks/predictions.json: a call's name as gpu-check has it, the configuration that the
plan picks on a GPU of capability 9.0, microseconds with a launch. None has been measured. Needs the
extension built with nvcc, which holds the plans.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import predict_cuda_engine as inference
import predict_cuda_training as training
import predict_stem
import predict_triton as rates
from gpu.training_driver import TIMED
from predict_chains import WITH_TMA
from predict_engine import NETWORK, head_us

from resnet_fused.bench.names import name_of
from resnet_fused.bench.spanning_kernels import KINDS
from resnet_fused.cases import RESNET50_LAYERS, ConvCase, HeadCase, StemCase
from resnet_fused.ops import _chain_plan, _cuda_plan, _cuda_stem

DTYPE = torch.bfloat16
Row = dict[str, Any]


def _row(op: str, layer: str, batch: int, plan: str, us: float) -> Row:
    return {
        "op": op, "layer": layer, "batch": batch, "dtype": "bfloat16", "capability": "9.0",
        "plan": plan, "us": round(us, 2),
    }  # fmt: skip


def _needs(*ops: str) -> None:
    missing = [op for op in ops if not _cuda_plan.exists(op)]
    if missing:
        raise RuntimeError(f"the extension holds no CUDA kernel of {missing[0]}: make run")


def _title(plan: _cuda_plan.Plan) -> str:
    return f"{plan.name}/{plan.splits}"


def _image(*shape: int) -> torch.Tensor:
    last = torch.channels_last
    return torch.empty(shape, dtype=DTYPE, device="meta", memory_format=last)


def _stem(case: StemCase) -> tuple[str, float]:
    """The plan, and the microseconds of the kernel that it picks: on wgmma or mma.sync."""
    weight = torch.empty(case.weight_shape, dtype=DTYPE, device="meta")
    out = _image(case.n, case.k, case.h // 4, case.w // 4)
    problem = _cuda_stem.stem_problem(_image(*case.shape), weight, case.geometry, out)
    plan = _cuda_plan.plan(problem, WITH_TMA)
    by_wgmma = plan.name.startswith(_cuda_plan.TMA)
    model = predict_stem.predict_wgmma if by_wgmma else predict_stem.predict_cuda
    return _title(plan), max(model(case.n).values()) + 1e6 * rates.LAUNCH


def _head_plan(case: HeadCase) -> str:
    weight = torch.empty(case.classes, case.shape[1], dtype=DTYPE, device="meta")
    out = torch.empty(case.n, case.classes, dtype=DTYPE, device="meta")
    return _title(
        _cuda_plan.plan(_cuda_stem.head_problem(_image(*case.shape), weight, out), WITH_TMA)
    )


def _of_inference(batch: int) -> Iterator[Row]:
    for case in RESNET50_LAYERS:
        plan, us = inference.conv_plan(dataclasses.replace(case, n=batch))
        yield _row("conv_bn_act", case.name, batch, _title(plan), us)
    for _, case in KINDS["stem"].cases(NETWORK):
        if isinstance(case, StemCase) and case.images == "same":
            yield _row("stem", name_of(case), batch, *_stem(dataclasses.replace(case, n=batch)))
    ((_, head),) = KINDS["head"].cases(NETWORK)
    plan = _head_plan(dataclasses.replace(head, n=batch))
    yield _row("head", name_of(head), batch, plan, head_us(batch))
    for case in dict.fromkeys(case for _, case in KINDS["conv_chain"].cases(NETWORK)):
        sized = dataclasses.replace(case, n=batch)
        found = _chain_plan.predict_cuda(sized, DTYPE, WITH_TMA)
        if not isinstance(found, str):
            us = 1e6 * found.chain / _chain_plan.CLOCK
            yield _row("conv_chain", name_of(case), batch, found.config, us)


def of_inference() -> list[Row]:
    """Convolutions, stem, head and chains of ResNet-50 at gpu-check's batch sizes.

    Raises:
        RuntimeError: the extension was built without the kernels.
    """
    _needs("conv_bn_act", "stem", "head", "conv_chain")
    return [row for batch in rates.BATCHES for row in _of_inference(batch)]


def driver_case(words: tuple[str, ...]) -> ConvCase:
    """The convolution that a call of the driver makes, or the sizes of a pass.

    Args:
        words: the call's options; the driver's own defaults stand for those that are not there.
    """
    given = dict(itertools.pairwise(words))
    sizes = {name: int(given[f"--{name}"]) for name in "nchw"}
    taps, k = int(given.get("--r", 3)), int(given.get("--k", 32))
    stride, padding = int(given.get("--stride", 1)), int(given.get("--padding", 1))
    return ConvCase(
        "driver", **sizes, k=k, r=taps, s=taps, stride=(stride, stride),
        padding=(padding, padding),
    )  # fmt: skip


def _of_driver(op: str) -> Row:
    timed = TIMED[op]
    us, plan, case = 1e6 * timed.moved / rates.MEMORY, "", driver_case(timed.words)
    if op in training.PROBLEMS:
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        made = training.PROBLEMS[op](case, geometry, "--normed" in timed.words, False)
        found = _cuda_plan.plan(made, training.ABOUT)
        us, plan = max(us, 1e6 * found.cycles / _chain_plan.CLOCK), _title(found)
    return _row(op, "driver", case.n, plan, us + 1e6 * rates.LAUNCH)


def of_training() -> list[Row]:
    """The driver's timed calls; then the kernels of ResNet-50's step, each distinct one once.

    Raises:
        RuntimeError: the extension was built without the kernels.
    """
    _needs(*training.PROBLEMS)
    found = [_of_driver(op) for op in TIMED]
    for batch in training.BATCHES:
        for one in dict.fromkeys(training.kernels(batch)):
            us = one.us + 1e6 * rates.LAUNCH
            found.append(_row(one.op, one.call, batch, one.plan, us))
    return found
