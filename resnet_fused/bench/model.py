"""Whole models, for `verify --time`: eager channels_last, `rf.fuse`, bare oneDNN on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.bench import ceilings
from resnet_fused.bench.peers import NoPeerError, bare_onednn
from resnet_fused.bench.runner import NEAR_BARE
from resnet_fused.bench.timing import Timings, interleaved
from resnet_fused.convert import fuse, unfuse
from resnet_fused.data.photographs import crops
from resnet_fused.roofline import model_cost

MIN_SAMPLE_S = 0.1  # a sample of something quick repeats it, past the scheduler's time slices

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Prediction:
    """The least time by the roofline, before anything is timed.

    Attributes:
        batch, dtype: of the input.
        eager_s: seconds with every module's own pass over memory.
        fused_s: seconds with BatchNorm, ReLU and add inside the convolutions.
        ceilings: the rates that the machine reaches, measured just before.
    """

    batch: int
    dtype: str
    eager_s: float
    fused_s: float
    ceilings: ceilings.Ceilings

    @property
    def gain(self) -> float:
        """How many times faster the fused model can be, by traffic and arithmetic alone."""
        return self.eager_s / self.fused_s

    def to_dict(self) -> dict[str, Any]:
        """The fields and the gain, for JSON."""
        return {
            "batch": self.batch, "dtype": self.dtype, "eager_s": self.eager_s,
            "fused_s": self.fused_s, "gain": self.gain, "ceilings": self.ceilings.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One batch size in one dtype: timings, what was predicted, and the peers left out."""

    batch: int
    dtype: str
    timings: Timings
    prediction: Prediction
    omitted: dict[str, str] = field(default_factory=dict)

    @property
    def verdicts(self) -> list[str]:
        """A sentence on the gain, and one on the distance to the bare calls."""
        said = [self.timings.verdict("eager", "fused")]
        if "bare" in self.timings.seconds:
            said.append(self.timings.verdict("bare", "fused", NEAR_BARE))
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        names = list(self.timings.seconds)
        record_ = self.timings.to_dict()
        if "bare" in names:
            record_["ratios"].append(self.timings.ratio("bare", "fused").to_dict())
        return {
            "batch": self.batch,
            "dtype": self.dtype,
            "images_per_s": {name: self.batch / self.timings.median(name) for name in names},
            "omitted": self.omitted,
            "verdicts": self.verdicts,
            "prediction": self.prediction.to_dict(),
            **record_,
        }


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    """What waits for the device, or None where nothing needs to."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None


def predict(model: nn.Module, shape: Sequence[int], rates: ceilings.Ceilings) -> Prediction:
    """The roofline's time of a model, eager and fused, on a machine with these ceilings."""
    dtype = getattr(torch, rates.dtype)
    cost = model_cost(unfuse(model), tuple(shape), dtype=dtype)
    eager, fused = (
        cost.seconds(rates.flops, rates.bandwidth, fused=fused) for fused in (False, True)
    )
    return Prediction(shape[0], rates.dtype, eager, fused, rates)


@contextmanager
def variants(
    model: nn.Module, x: Tensor, *, bare: bool = True
) -> Iterator[tuple[dict[str, Callable[[], object]], dict[str, str]]]:
    """The calls to time, in inference mode: eager, fused, and bare oneDNN where there is one.

    Args:
        model: plain or fused, in evaluation mode, of x's dtype and device; it is not changed.
        x: the input [N, C, H, W] in channels_last.
        bare: whether to add the bare oneDNN calls.

    Yields:
        (name -> call, name -> why it was left out).
    """
    plain, omitted = unfuse(model), {}
    fused = fuse(plain)
    calls: dict[str, Callable[[], object]] = {"eager": lambda: plain(x), "fused": lambda: fused(x)}
    if bare:
        try:
            run = bare_onednn(plain, x)
            calls["bare"] = lambda: run(x)
        except NoPeerError as error:
            omitted["bare"] = str(error)
    with torch.inference_mode():
        yield calls, omitted


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a model for inference: evaluation mode, channels_last weights."""
    made = copy.deepcopy(model).eval().to(device=device, dtype=dtype)
    return made.to(memory_format=torch.channels_last)


def images(batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Crops of the photographs [batch, 3, size, size] in channels_last."""
    return crops(batch, size).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def bench_model(
    model: nn.Module,
    *,
    batches: Sequence[int] = (1, 8),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    size: int = 224,
    device: torch.device | None = None,
    rounds: int = 15,
    budget_s: float = math.inf,
    progress: Progress | None = None,
) -> list[Result]:
    """Predicts, then times every batch size in every dtype.

    Args:
        model: plain or fused; it is copied, not changed.
        batches: numbers of images.
        dtypes: of weights and activations.
        size: side of the images in pixels.
        device: None is the CPU.
        rounds: interleaved samples of each variant.
        budget_s: seconds for one batch size in one dtype; see `interleaved`.
        progress: called as progress(done, total, what).

    Returns:
        One result for each dtype and batch size.
    """
    where = device or torch.device("cpu")
    total, done = len(batches) * len(dtypes) * rounds, 0
    predictions = {}
    for dtype in dtypes:
        rates = ceilings.measure(where, dtype)
        for batch in batches:
            predictions[dtype, batch] = predict(model, (batch, 3, size, size), rates)
    results = []
    for dtype in dtypes:
        ready = cast(model, where, dtype)
        for batch in batches:
            what = f"batch {batch} {str(dtype).removeprefix('torch.')}"

            def step(count: int, _of: int, what: str = what, before: int = done) -> None:
                if progress is not None:
                    progress(before + count, total, what)

            step(0, rounds)
            with variants(ready, images(batch, size, where, dtype)) as (calls, omitted):
                timings = interleaved(
                    calls,
                    rounds=rounds,
                    min_sample_s=MIN_SAMPLE_S,
                    budget_s=budget_s,
                    progress=step,
                    synchronize=synchronizer(where),
                )
            prediction = predictions[dtype, batch]
            result = Result(batch, prediction.dtype, timings, prediction, omitted)
            results.append(result)
            done += rounds
    return results
