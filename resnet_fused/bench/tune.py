"""Finds configurations that beat the chooser's picks on the GPU at hand, and keeps them.

For each distinct convolution: every admitted configuration that the chooser thinks well of is
judged against float64, timed in a few interleaved rounds, and the fastest of them is timed again
beside the chooser's pick and the pick's own twin. Those fresh samples alone decide, since the
fastest of many is always flattered by the rounds that made it so: it is kept if the whole interval
of its gain lies above what the twins differ by. `resnet_fused._tuned` holds what is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import _platform, _tuned
from resnet_fused.bench import record, tune_ops, tune_spanning
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.load import LoadMeter
from resnet_fused.bench.names import name_of
from resnet_fused.bench.plain import plain
from resnet_fused.bench.sampler import CudaSampler, DeviceLostError, check_device, first_line
from resnet_fused.bench.subject import Subject, walk
from resnet_fused.bench.timing import Sampler, Timings, interleaved
from resnet_fused.bench.tune_kernels import KERNELS, Kernel, Option, key_of, outputs_of
from resnet_fused.bench.work import Work, build
from resnet_fused.convert import unfuse

INFERENCE = ("conv_bn_act", *tune_spanning.OPS)
OPS = (*INFERENCE, *(op for op in tune_ops.OPS if op not in INFERENCE))
PICK, TWIN = "pick", "pick again"
RIDGE = 200.0  # FLOPs a byte: only the layers' order hangs on it


@dataclass(frozen=True)
class Settings:
    """How to tune.

    Attributes:
        rounds: of the decision; 6 or more for a 95% interval.
        screening: rounds in which all options are compared.
        most: options that are tried beside the pick.
        min_sample_s: how long a sample lasts at least.
        total_s: no convolution is begun later than that.
    """

    rounds: int = 13
    screening: int = 3
    most: int = 10
    min_sample_s: float = 0.01
    total_s: float = math.inf


@dataclass
class Outcome:
    """What tuning found for one convolution and implementation.

    Attributes:
        key: of the subject.
        layers: names of the model's layers that are this convolution.
        implementation: "triton" or "cuda".
        before: the chooser's pick.
        after: what is kept in its place; None keeps the pick.
        gain: {"median", "low", "high", ...} of the best option over the pick; None if none was
            faster.
        best: the best option's name, "" if none was faster.
        noise: what the pick and its twin differ by.
        tried: how many options were timed.
        wrong: option -> the judgement.
        failed: option -> why it could not run.
        problem: why nothing could be said at all.
    """

    key: str
    layers: tuple[str, ...]
    implementation: str
    before: str = ""
    after: str | None = None
    gain: dict[str, Any] | None = None
    best: str = ""
    noise: float | None = None
    tried: int = 0
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return plain(dataclasses.asdict(self))


Samplers = Callable[[Callable[[int], Any], Work], Sampler]


def on_the_gpu(call: Callable[[int], Any], work: Work) -> Sampler:
    """Samples by replayed graphs of all operand sets."""
    return CudaSampler(call, len(work.sets), work.mode)


@dataclass(frozen=True)
class Job:
    """A convolution to tune, and the model's layers that are it."""

    subject: Subject
    layers: tuple[str, ...]


def jobs(
    model: nn.Module,
    device: str,
    *,
    batches: Sequence[int],
    dtypes: Sequence[str],
    ops: Sequence[str] = INFERENCE,
    size: int = 224,
) -> list[Job]:
    """The distinct convolutions of a model, the heaviest first; an op after the other.

    Args:
        model: any network, fused or not; it is not changed.
        device: "cuda", or "cpu" in tests.
        batches: numbers of images.
        dtypes: "bfloat16" and the like.
        ops: of `OPS`.
        size: side of the images in pixels.

    Raises:
        ValueError: a convolution that is not one of a ResNet.
    """
    layers = walk(unfuse(model), (1, 3, size, size))
    found: list[Job] = []
    for op in ops:
        groups: dict[str, list[Any]] = {}
        for layer, case in KINDS[op].cases(layers):
            groups.setdefault(name_of(case), []).append((layer, case))
        weighed = []
        for name, members in groups.items():
            names = tuple(member for member, _ in members)
            for batch in batches:
                case = dataclasses.replace(members[0][1], n=batch)
                cost = KINDS[op].cost(case, torch.bfloat16)
                weight = len(members) * cost.seconds(RIDGE, 1.0)
                for dtype in dtypes:
                    subject = Subject("kernel", op, name, batch, dtype, device)
                    weighed.append((weight, Job(subject, names)))
        found += [job for _, job in sorted(weighed, key=lambda one: -one[0])]
    return found


class _Tuning:
    """One convolution in one implementation."""

    def __init__(
        self, work: Work, kernel: Kernel, outcome: Outcome, settings: Settings, samplers: Samplers,
        clock: Callable[[], float], meter: Callable[[], LoadMeter],
    ) -> None:  # fmt: skip
        self.work, self.kernel, self.outcome, self.settings = work, kernel, outcome, settings
        self._samplers, self._clock, self._meter = samplers, clock, meter
        self._outs = [outputs_of(work) for _ in work.sets]

    def run(self) -> Option | None:
        """What is to be kept, or None."""
        pick, others = self.kernel.options(self.work)
        found = self.outcome
        found.before = pick.name
        if not self._right(pick):
            why = {**found.wrong, **found.failed}[pick.name]
            found.problem = f"the chooser's pick {pick.name}: {why}"
            return None
        right = [option for option in others[: self.settings.most] if self._right(option)]
        found.tried = len(right)
        if not right:
            return None
        every = {PICK: pick, **{option.name: option for option in right}}
        first = self._time(every, self.settings.screening)
        best = min(
            (option for option in right if option.name in first.seconds),
            key=lambda option: first.median(option.name),
            default=None,
        )
        if best is None or PICK not in first.seconds:
            return None
        if first.median(best.name) >= first.median(PICK):
            return None
        return best if self._wins(pick, best) else None

    def _wins(self, pick: Option, best: Option) -> bool:
        """Whether fresh samples say so, beyond what the pick and its twin differ by."""
        timings = self._time({PICK: pick, TWIN: pick, best.name: best}, self.settings.rounds)
        if len(timings.seconds) < 3:
            return False
        ratio = timings.ratio(PICK, best.name)
        found = self.outcome
        found.best, found.gain = best.name, ratio.to_dict()
        found.noise = timings.noise(PICK, TWIN)
        if found.noise is None or ratio.low <= 1 + found.noise:
            return False
        # What was timed is a graph; what it wrote is looked at, not only what plain calls wrote.
        return self._right(best, self._sampler(best))

    def _call(self, option: Option) -> Callable[[int], tuple[Tensor, ...]]:
        def call(i: int) -> tuple[Tensor, ...]:
            self.kernel.launch(self.work, i, self._outs[i], option)
            return self._outs[i]

        return call

    def _sampler(self, option: Option) -> Sampler:
        return self._samplers(self._call(option), self.work)

    def _right(self, option: Option, sampler: Sampler | None = None) -> bool:
        """Whether an option's result is right; else notes why not."""
        for out in itertools.chain(*self._outs):
            out.fill_(math.nan)
        try:
            if sampler is None:
                with self.work.mode():
                    self._call(option)(0)
            else:
                sampler.sample(len(self._outs))
            outs = self._outs[0]
            judged = self.work.judge(outs if len(outs) > 1 else outs[0])
        except DeviceLostError:
            raise
        except Exception as error:
            if self.work.subject.device == "cuda":
                check_device()
            self.outcome.failed[option.name] = first_line(error)
            return False
        if not judged.ok:
            self.outcome.wrong[option.name] = judged.text
        return judged.ok

    def _time(self, options: dict[str, Option], rounds: int) -> Timings:
        samplers = {name: self._sampler(option) for name, option in options.items()}
        # A graph against plain calls would be a contest of launching: only like is held to like.
        alike = {
            name: sampler
            for name, sampler in samplers.items()
            if getattr(sampler, "method", "") == getattr(samplers[PICK], "method", "")
        }
        for name in samplers.keys() - alike.keys():
            note = getattr(samplers[name], "note", "") or "it is timed in another way than the pick"
            self.outcome.failed[options[name].name] = note
        try:
            return interleaved(
                alike, rounds=rounds, warmup=1, min_sample_s=self.settings.min_sample_s,
                clock=self._clock, meter=self._meter,
            )  # fmt: skip
        finally:
            for sampler in samplers.values():
                close = getattr(sampler, "close", None)
                if close is not None:
                    close()


def tune_one(
    job: Job,
    kernel: Kernel,
    settings: Settings,
    *,
    keep: bool = True,
    samplers: Samplers = on_the_gpu,
    clock: Callable[[], float] = time.perf_counter,
    meter: Callable[[], LoadMeter] = LoadMeter,
) -> Outcome:
    """Tunes one convolution in one implementation.

    Args:
        job: the convolution.
        kernel: the implementation.
        settings: how.
        keep: whether to enter a winner into the user's file, and to take out one of before that
            wins no more.
        samplers: how a call is sampled.
        clock: seconds, monotonic.
        meter: of the machine's load.

    Raises:
        DeviceLostError: the GPU answers this process no more.
        OSError: the user's file can't be written.
    """
    outcome = Outcome(job.subject.key, job.layers, kernel.name)
    try:
        work = build(job.subject)
        won = _Tuning(work, kernel, outcome, settings, samplers, clock, meter).run()
    except DeviceLostError:
        raise
    except (LookupError, RuntimeError, MemoryError) as error:
        if job.subject.device == "cuda":
            check_device()
        outcome.problem = first_line(error)
        return outcome
    if won is not None:
        outcome.after = won.name
    if not keep or outcome.problem is not None:
        return outcome
    place: _platform.Device = "cpu"
    if job.subject.device == "cuda":
        place = _platform.current_device()
    key = key_of(work, kernel.name)
    if won is None or outcome.gain is None:
        _tuned.drop(place, [key])
        return outcome
    gain, low, high = (float(outcome.gain[name]) for name in ("median", "low", "high"))
    kept = _tuned.Tuned(won.configuration, won.splits, gain, low, high, outcome.before)
    _tuned.save(place, [(key, kept)])
    return outcome


def tune(
    todo: Sequence[Job],
    settings: Settings | None = None,
    *,
    kernels: Sequence[Kernel] = KERNELS,
    keep: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    one: Callable[..., Outcome] = tune_one,
) -> dict[str, Any]:
    """Tunes convolutions until all are done or the time is over; what is found is kept at once.

    Args:
        todo: the convolutions, in the order in which they are to be reached.
        settings: how; its `total_s` ends the run.
        kernels: the implementations.
        keep: False keeps nothing.
        progress: called as progress(done, all, what is being done).
        report: called with the record after each convolution.
        one: in the place of `tune_one`, for tests.

    Returns:
        The record: {"kind": "tune", "reached", "of", "complete", "layers": outcomes, "omitted":
        implementation -> why it takes no part, "stopped": why the run ended early, ...}.

    Raises:
        OSError: the user's file can't be written.
    """
    settings = settings or Settings()
    start = time.monotonic()
    cuda = bool(todo) and todo[0].subject.device == "cuda"
    place: _platform.Device = _platform.current_device() if cuda else "cpu"
    if keep:
        _tuned.save(place, [])  # before anything is measured in vain
    content: dict[str, Any] = {
        "schema": 1, "kind": "tune", "commit": record.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": _platform.identify(place)._asdict(), "sources": record.sources(),
        "settings": plain(dataclasses.asdict(settings)),
        "kept_in": str(_tuned.path()) if keep else None,
        "complete": False, "reached": 0, "of": len(todo), "seconds": 0.0,
        "omitted": {}, "layers": [],
    }  # fmt: skip
    for done, job in enumerate(todo):
        if time.monotonic() - start >= settings.total_s:
            break
        for kernel in kernels:
            why = kernel.why_not(job.subject)
            if why is not None:
                content["omitted"][f"{job.subject.op}.{kernel.name} {job.subject.dtype}"] = why
                continue
            if progress is not None:
                progress(done, len(todo), f"{job.subject.key}: {kernel.name}")
            try:
                content["layers"].append(one(job, kernel, settings, keep=keep).to_dict())
            except DeviceLostError as error:
                content["stopped"] = str(error)
                break
        if "stopped" in content:
            break
        content["reached"] = done + 1
        content["seconds"] = round(time.monotonic() - start, 2)
        if cuda:
            torch.cuda.empty_cache()
        if report is not None:
            report(content)
    content["complete"] = content["reached"] == len(todo)
    content["seconds"] = round(time.monotonic() - start, 2)
    if report is not None:
        report(content)
    return content


def plans(todo: Sequence[Job], kernels: Sequence[Kernel] = KERNELS) -> list[dict[str, Any]]:
    """What tuning would try; nothing is launched.

    Returns:
        For each convolution and implementation its key, layers, pick and options, or why none.
    """
    found = []
    for job in todo:
        for kernel in kernels:
            about: dict[str, Any] = {
                "key": job.subject.key, "layers": list(job.layers), "implementation": kernel.name,
            }  # fmt: skip
            why = kernel.why_not(job.subject)
            if why is None:
                with contextlib.suppress(LookupError):
                    work = build(job.subject)
                    pick, others = kernel.options(work)
                    about |= {"before": pick.name, "options": [one.name for one in others]}
            found.append({**about, "problem": why})
    return found
