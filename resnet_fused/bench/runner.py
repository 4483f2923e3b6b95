"""Runs benchmarks: every variant of a subject judged, then timed in turns, then written down.

A run has a budget. Subjects come the most telling first, each has its own share, and whatever was
reached when the time is over is a valid record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resnet_fused.bench import ceilings, compare, gauges, limits, process, record, waterfall
from resnet_fused.bench.peers import NoPeerError
from resnet_fused.bench.plain import plain
from resnet_fused.bench.process import ChildVariant
from resnet_fused.bench.sampler import CUDA_GRAPH, DeviceLostError, OwnVariant, Variant, first_line
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.timing import SampleError, Timings, interleaved
from resnet_fused.bench.work import Work, build

if TYPE_CHECKING:
    from resnet_fused.bench.peers import Peer

BASELINE, OURS, AGAIN = "eager", "fused", "fused_again"
ENGINE = "frozen"
# What eager's own passes move; everybody else is measured by what a fused one moves.
UNFUSED = ("eager", "eager_nchw", "timm")
BARE, NEAR_BARE = "onednn", 0.95  # fused is to be within 5% of the bare calls
RIVALS = ("inductor", "inductor_max_autotune", "cudnn", "cudnn_graph")
"""Whom on a GPU nothing of ours is to be slower than: the engine where it joins, else fused."""
LEAST_SUBJECT_S = 2.0  # no subject is begun with less
TIMING_SHARE = 0.5  # of a subject's time is kept from preparing for timing

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure; all of it goes into the record.

    Attributes:
        rounds: interleaved samples of each variant; 6 or more for a 95% interval.
        warmup: untimed calls before.
        min_sample_s: a sample repeats its call until it lasts about so long; None takes 0.1 s on
            the CPU (past the scheduler's time slices) and 0.01 s on a GPU.
        subject_s: seconds for one subject, preparing included.
        total_s: seconds for all of them.
        at_least: the gain over eager that a verdict asks for.
        threads: of torch, here and in children; None leaves what the user has.
        graphs: on a GPU, whether to time replayed graphs.
        cudnn_benchmark: on a GPU, whether cuDNN searches its fastest algorithms, for everybody.
        details: whether to name kernels and measure memory and layers, each in untimed calls.
        request_s: seconds after which a child that answers no short request hangs.
    """

    rounds: int = 15
    warmup: int = 2
    min_sample_s: float | None = None
    subject_s: float = math.inf
    total_s: float = math.inf
    at_least: float = 1.0
    threads: int | None = None
    graphs: bool = True
    cudnn_benchmark: bool = True
    details: bool = True
    request_s: float = process.REQUEST_S

    def __post_init__(self) -> None:
        """Refuses what cannot be measured by, naming the field."""
        for name, value, least in (("rounds", self.rounds, 1), ("warmup", self.warmup, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; accepted is an integer of at least {least}")
        for name in ("min_sample_s", "subject_s", "total_s", "at_least", "threads", "request_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}; accepted is a positive number")

    def sample_s(self, device: str) -> float:
        """How long a sample lasts at least."""
        if self.min_sample_s is not None:
            return self.min_sample_s
        return 0.01 if device == "cuda" else 0.1

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON; no limit is None."""
        return {
            name: None if value == math.inf else value
            for name, value in dataclasses.asdict(self).items()
        }


@dataclass
class Row:
    """A subject's results; see record.schema.json for the fields."""

    subject: Subject
    limit: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    crashed: list[str] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    noise: float | None = None
    load: dict[str, Any] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain({"key": self.subject.key, **fields, "subject": self.subject.to_dict()})


class _Clock:
    """How much of a time is left."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._until = now, now() + seconds

    def left(self) -> float:
        return self._until - self._now()


class _Run:
    """One subject being measured."""

    def __init__(
        self, work: Work, row: Row, settings: Settings, progress: Progress, clock: _Clock
    ) -> None:
        self.work, self.row, self.settings, self.clock = work, row, settings, clock
        self._progress = progress
        self._folder = tempfile.TemporaryDirectory(prefix="resnet_fused_bench_")
        self._shared: Path | None = None
        self.variants: dict[str, Variant] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        for variant in self.variants.values():
            variant.close()
        self._folder.cleanup()

    def say(self, what: str) -> None:
        """Tells where the run is."""
        self._progress(0, self.settings.rounds, what)

    def enter(self, name: str, peer: Peer) -> None:
        """Prepares and judges a variant; what is wrong or fails goes into the row by itself."""
        self.say(f"preparing {name}")
        variant = self._make(name, peer)
        try:
            variant.prepare()
            judged = variant.judge()
            facts: dict[str, Any] = {"worst": judged.worst, "prepare_s": variant.prepare_s}
            if judged.ok and self.settings.details:
                facts["peak_memory_bytes"] = variant.peak_memory()
            if judged.ok:
                variant.arm()
                if variant.method == CUDA_GRAPH:
                    judged = variant.judge()
                    facts["worst"] = max(facts["worst"], judged.worst)
        except NoPeerError as error:
            self.row.omitted[name] = str(error)
        except SampleError as error:
            self._crash(name, str(error))
        except DeviceLostError:
            variant.close()
            raise
        else:
            if judged.ok:
                self.variants[name], self.facts[name] = variant, facts
                return
            self.row.variants[name] = {"wrong": judged.text}
        variant.close()

    def _crash(self, name: str, why: str) -> None:
        """A peer's end is a reason; ours is a finding, which the verdicts name as well."""
        self.row.omitted[name] = why
        self.row.crashed.append(name)
        if name.startswith(compare.OURS):
            self.row.verdicts.append(f"{name} crashed and has no time, {why}")

    def _make(self, name: str, peer: Peer) -> Variant:
        if not peer.isolated:
            return OwnVariant(name, peer, self.work, self.settings.graphs)
        if self._shared is None:
            self._shared = Path(self._folder.name) / "shared.pt"
            self.work.share(self._shared)
        path = getattr(peer, "path", f"{process.PEERS}.{peer.name}")
        return ChildVariant(
            name, path, self.work.subject, self._shared, peer.limit_s, torch.get_num_threads(),
            self.settings.graphs, self.settings.request_s, self.clock.left,
        )  # fmt: skip

    def time(self) -> Timings | None:
        """Times all variants that are right, in turns."""
        if not self.variants:
            return None
        timings = interleaved(
            self.variants,
            rounds=self.settings.rounds,
            warmup=self.settings.warmup,
            min_sample_s=self.settings.sample_s(self.work.subject.device),
            budget_s=TIMING_SHARE * self.clock.left(),
            limit_s=self.clock.left(),
            progress=lambda done, total: self._progress(done, total, "timing"),
        )
        for name, why in timings.dropped.items():
            self._crash(name, why)
            self.variants.pop(name).close()
        return timings if timings.seconds else None

    def describe(self, timings: Timings) -> None:
        """Writes what is known of each variant that has a time."""
        orders = self._orders()
        for name, variant in self.variants.items():
            samples = list(timings.seconds[name])
            found = {
                "samples_s": samples,
                **_rates(self.row, name, timings.median(name)),
                "spread": timings.spread(name),
                **self.facts[name],
                "calls": timings.calls[name],
                "method": variant.method,
                "process": variant.process,
            }
            if variant.note:
                found["note"] = variant.note
            if self.settings.details:
                self.say(f"looking into {name}")
                found["kernels"] = _or_none(variant.kernels) or []
                if orders:
                    first = orders if name in UNFUSED else orders[::-1]
                    by_layer = _or_none(lambda one=variant, first=first: one.layers(first))
                    if by_layer:
                        found["layer_s"] = by_layer
                elif self._whole_step():
                    by_op = _or_none(variant.ops)
                    if by_op:
                        found["op_s"] = waterfall.with_gaps(by_op, timings.median(name))
            self.row.variants[name] = found

    def _whole_step(self) -> bool:
        """Whether it is a network's training, of which the kinds of kernels are told apart."""
        return self.work.subject.level == "model" and self.work.subject.training

    def _orders(self) -> list[list[gauges.Step]]:
        """How layers may run, where the profiler can tell them apart: in a forward pass."""
        subject = self.work.subject
        known = subject.level != "kernel" and not subject.foreign
        if not known or subject.training or not self.settings.details:
            return []
        return limits.orders(self.work)


def _or_none(call: Callable[[], Any]) -> Any:
    with contextlib.suppress(SampleError):
        return call()
    return None


def _rates(row: Row, name: str, median: float) -> dict[str, float]:
    moved = row.limit["eager_bytes" if name in UNFUSED else "bytes"]
    return {
        "median_s": median,
        "tflops": row.limit["flops"] / median / 1e12,
        "gbs": moved / median / 1e9,
        "of_limit": row.limit["seconds"] / median,
        "images_per_s": row.subject.batch / median,
    }


def run(
    subject: Subject,
    peers: Sequence[Peer],
    settings: Settings | None = None,
    progress: Progress | None = None,
    *,
    rates: ceilings.Ceilings | None = None,
    budget_s: float = math.inf,
) -> Row:
    """Measures one subject.

    Args:
        subject: what.
        peers: who takes part; those whose `why_not` has a reason are left out with it. Eager and
            this package are prepared first.
        settings: how.
        progress: called as progress(rounds done, rounds, what).
        rates: the ceilings that the limit is reckoned with; None measures them.
        budget_s: seconds, beside `settings.subject_s`.

    Returns:
        The row. A variant that is wrong has no time; one that fails stands in `omitted` and
        `crashed`, and in the verdicts if it is of this package.

    Raises:
        ValueError: the subject's name is one of nothing.
        DeviceLostError: the GPU answers this process no more.
    """
    settings = settings or Settings()
    clock = _Clock(min(settings.subject_s, budget_s))
    told = progress or (lambda done, total, what: None)
    with _pinned(settings):
        told(0, settings.rounds, "building")
        work = build(subject)
        device = torch.device(subject.device)
        rates = rates or ceilings.measure(device, subject.torch_dtype)
        row = Row(subject, limits.limit(work, rates))
        if subject.level == "model" and subject.op in waterfall.OPS:
            row.limit["ops"] = waterfall.least(work, rates)
        read = functools.partial(gauges.clocks, _gpu())
        before = read() if subject.device == "cuda" else None
        preparing = _Clock((1 - TIMING_SHARE) * clock.left())
        with _Run(work, row, settings, told, clock) as running:
            for name, peer in _in_order(peers):
                if (why := peer.why_not(subject)) is not None:
                    row.omitted.setdefault(name, why)
                elif preparing.left() <= 0 and running.variants:
                    row.omitted[name] = "no time was left to prepare it"
                else:
                    running.enter(name, peer)
            timings = running.time()
            if timings is not None:
                running.describe(timings)
                _conclude(row, timings, running, settings)
        if before is not None:
            row.load["clocks"] = {"before": before, "after": read()}
    return row


def _gpu() -> str:
    return gauges.current_gpu() if torch.cuda.is_available() else "0"


def _in_order(peers: Sequence[Peer]) -> list[tuple[str, Peer]]:
    """What matters most first; this package twice, for the noise floor."""
    ranks = {BASELINE: 0, OURS: 1}
    found: list[tuple[str, Peer]] = []
    for peer in sorted(peers, key=lambda peer: ranks.get(peer.name, 2)):
        found.append((peer.name, peer))
        if peer.name == OURS:
            found.append((AGAIN, peer))
    return found


def _conclude(row: Row, timings: Timings, running: _Run, settings: Settings) -> None:
    """Ratios, the noise floor, the load and the verdict."""
    names = list(timings.seconds)
    pairs = [(BASELINE, name) for name in names if name not in (BASELINE, AGAIN)]
    pairs += [(name, OURS) for name in names if name not in (BASELINE, OURS)]
    pairs += [(name, ENGINE) for name in names if name not in (BASELINE, OURS, AGAIN, ENGINE)]
    row.ratios = [
        timings.ratio(base, name).to_dict()
        for base, name in pairs
        if base in names and name in names
    ]
    if OURS in names and AGAIN in names:
        row.noise = timings.noise(OURS, AGAIN, BASELINE if BASELINE in names else None)
    row.load = timings.load.to_dict()
    # A replayed graph does not wait for the CPU, whoever else uses that.
    replayed = {running.variants[name].method for name in names} == {CUDA_GRAPH}
    if replayed:
        quiet = dataclasses.replace(timings.load, foreign=0.0, seconds=math.inf)
        timings = dataclasses.replace(timings, load=quiet)
    asked = [(BASELINE, OURS, settings.at_least), (BARE, OURS, NEAR_BARE)]
    if row.subject.device == "cuda":
        best = ENGINE if ENGINE in names else OURS
        asked += [(rival, best, 1.0) for rival in RIVALS]
    row.verdicts += [
        timings.verdict(baseline, ours, at_least)
        for baseline, ours, at_least in asked
        if baseline in names and ours in names
    ]


@contextlib.contextmanager
def _pinned(settings: Settings) -> Any:
    """Torch's threads at a number, and cuDNN's search as asked for; the user's come back."""
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(settings.threads or before[0])
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def bench(
    subjects: Sequence[Subject],
    peers: Sequence[Peer] | Mapping[str, Peer],
    settings: Settings | None = None,
    *,
    command: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures subjects until all are done or the time is over.

    Args:
        subjects: what, in the order in which they are to be reached.
        peers: who takes part, `peers.PEERS` for everybody.
        settings: how; its `total_s` ends the run.
        command: for the record; None is this process' own.
        progress: called as progress(subjects done, subjects, what is being done).
        report: called with the record after each row: it is valid each time, and "complete" is
            false until the last.
        options: further fields of the record's settings, such as the options of a command.

    Returns:
        The record, of schema 2.

    Raises:
        ValueError: no subjects.
    """
    if not subjects:
        raise ValueError("subjects is empty; accepted is at least one")
    settings = settings or Settings()
    clock, start = _Clock(settings.total_s), time.monotonic()
    taking = list(peers.values()) if isinstance(peers, Mapping) else list(peers)
    tell, wrote = progress or (lambda done, total, what: None), report or (lambda found: None)
    with _pinned(settings):
        found = record.begin(
            command or " ".join(sys.argv), {**settings.to_dict(), **(options or {})}, len(subjects)
        )
        for done, subject in enumerate(subjects):
            # The first one gets whatever there is.
            if clock.left() <= (LEAST_SUBJECT_S if done else 0.0):
                break
            tell(done, len(subjects), subject.key)
            try:
                rates = _ceilings(found, subject)
                row = run(
                    subject, taking, settings,
                    lambda _d, _t, what, done=done, key=subject.key: tell(
                        done, len(subjects), f"{key}: {what}"
                    ),
                    rates=rates, budget_s=clock.left(),
                ).to_dict()  # fmt: skip
            except DeviceLostError as error:
                found["stopped"] = str(error)
                break
            except (RuntimeError, MemoryError) as error:
                # One subject that does not fit into memory ends no run.
                found.setdefault("failed", {})[subject.key] = first_line(error)
            else:
                found["rows"].append(row)
            found["reached"] = done + 1
            found["complete"] = done + 1 == len(subjects) and "failed" not in found
            found["seconds"] = round(time.monotonic() - start, 3)
            wrote(found)
        tell(found["reached"], len(subjects), "done")
    found["seconds"] = round(time.monotonic() - start, 3)
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found


def _ceilings(found: dict[str, Any], subject: Subject) -> ceilings.Ceilings:
    """The ceilings of a dtype, measured once a run."""
    known = found["ceilings"]
    if subject.dtype not in known:
        measured = ceilings.measure(torch.device(subject.device), subject.torch_dtype)
        known[subject.dtype] = measured.to_dict()
    return ceilings.Ceilings(**known[subject.dtype])
