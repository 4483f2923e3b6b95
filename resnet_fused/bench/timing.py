"""Times variants of one computation side by side, and says what their ratio is worth.

A machine drifts (frequency, temperature, neighbours), so variants are interleaved: each round runs
every variant once, in an order that alternates, and a ratio is taken inside a round. The median of
these ratios is reported with a distribution-free interval from their order statistics.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from resnet_fused.bench.load import Load, LoadMeter

CONFIDENCE = 0.95
ENOUGH_ROUNDS = 6  # the fewest pairs whose range holds the median at 95%
MAX_CALLS = 10_000  # in one sample, of something too quick for the clock


class SampleError(RuntimeError):
    """A variant could not be timed any further; the message says why."""


@runtime_checkable
class Sampler(Protocol):
    """What times itself: in another process, or by a GPU's events."""

    def sample(self, calls: int) -> float:
        """Seconds a call, over about so many calls in a row.

        Raises:
            SampleError: it failed, and will again.
        """


@dataclass(frozen=True)
class Ratio:
    """How many times faster `variant` is than `baseline`: above 1 is a gain.

    Attributes:
        baseline, variant: names.
        median: of the ratios baseline / variant, one a round.
        low, high: the interval that holds the true median with probability `confidence`.
        confidence: of the interval. Few rounds cannot reach 95%: then it says what they reach.
        rounds: number of pairs.
    """

    baseline: str
    variant: str
    median: float
    low: float
    high: float
    confidence: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.median:.3f}x ({self.low:.3f} .. {self.high:.3f} "
            f"at {self.confidence:.0%}, {self.rounds} pairs)"
        )

    def to_dict(self) -> dict[str, object]:
        """The fields, for JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Timings:
    """Seconds a call, one sample a round for each variant, and the load meanwhile.

    Attributes:
        seconds: name -> its samples.
        load: of the machine while they were taken.
        calls: name -> how many calls a sample is the mean of.
        dropped: name -> why it has no samples.
    """

    seconds: Mapping[str, tuple[float, ...]]
    load: Load
    calls: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict_allowed(self) -> bool:
        """False when the machine was too busy (or the run too short) for a verdict."""
        return self.load.quiet

    def median(self, name: str) -> float:
        """The median of a variant's samples in seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """The interquartile range of a variant's samples over their median (the noise)."""
        samples = self.seconds[name]
        if len(samples) < 2:
            return math.nan
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return (high - low) / statistics.median(samples)

    def ratio(self, baseline: str, variant: str) -> Ratio:
        """How many times faster `variant` is than `baseline`, pair by pair."""
        pairs = zip(self.seconds[baseline], self.seconds[variant], strict=True)
        ratios = sorted(slow / fast for slow, fast in pairs)
        low, high, confidence = median_interval(ratios)
        middle = statistics.median(ratios)
        return Ratio(baseline, variant, middle, low, high, confidence, len(ratios))

    def noise(self, variant: str, again: str, baseline: str | None = None) -> float | None:
        """What two runs of one thing may differ by, as a fraction.

        The larger of two: how far from 1 the ratio of a variant to its second preparation may be,
        by its whole interval (it holds what hangs on where a preparation lies in memory); and what
        the medians of two runs' gains over the baseline differ by, sqrt(2) times half the interval
        of one.

        Args:
            variant: the one that was prepared twice.
            again: its second preparation.
            baseline: what gains are measured against; None where there is none.

        Returns:
            None with fewer than six pairs, which bound nothing.
        """
        if len(self.seconds[variant]) < ENOUGH_ROUNDS:
            return None
        twice = self.ratio(variant, again)
        found = max(abs(1 - twice.low), abs(twice.high - 1))
        if baseline is not None:
            gain = self.ratio(baseline, variant)
            found = max(found, math.sqrt(0.5) * (gain.high - gain.low) / gain.median)
        return found

    def verdict(self, baseline: str, variant: str, at_least: float = 1.0) -> str:
        """One sentence on whether `variant` is `at_least` times as fast, or why it is not said.

        The median decides nothing alone: the whole interval has to lie on one side.
        """
        ratio = self.ratio(baseline, variant)
        if self.load.refusal is not None:
            return f"no verdict, {self.load.refusal}; {variant} measured {ratio} against {baseline}"
        if ratio.low >= at_least:
            return f"{variant} is at least {at_least:.2f}x as fast as {baseline}: {ratio}"
        if ratio.high < at_least:
            return f"{variant} is not {at_least:.2f}x as fast as {baseline}: {ratio}"
        return f"undecided at {at_least:.2f}x, the interval holds both answers: {ratio}"

    def to_dict(self) -> dict[str, object]:
        """Samples, medians, spreads, ratios to the first variant, and the load, for JSON."""
        names = list(self.seconds)
        return {
            "seconds": {name: list(self.seconds[name]) for name in names},
            "median_s": {name: self.median(name) for name in names},
            "spread": {name: self.spread(name) for name in names},
            "ratios": [self.ratio(names[0], name).to_dict() for name in names[1:]],
            "load": self.load.to_dict(),
            "verdict_allowed": self.verdict_allowed,
            "refusal": self.load.refusal,
        }


def median_interval(
    ordered: list[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """A distribution-free interval for the median: the sign test's order statistics.

    The interval from the k-th smallest to the k-th largest of n values misses the true median with
    probability 2 P(Binomial(n, 1/2) < k); the largest k that keeps `confidence` is taken.

    Args:
        ordered: values in ascending order, at least one.
        confidence: wanted, between 0 and 1.

    Returns:
        (low, high, confidence that this interval really has). With few values not even the whole
        range has the wanted confidence; it is returned with what it has.
    """
    n = len(ordered)
    if n == 0:
        raise ValueError("ordered: expected at least one value, got none")
    missed = 2 * 0.5**n  # with k = 1, the whole range
    k = 1
    while k < n // 2:
        more = missed + 2 * math.comb(n, k) * 0.5**n
        if 1 - more < confidence:
            break
        missed, k = more, k + 1
    return ordered[k - 1], ordered[n - k], max(0.0, 1 - missed)


def interleaved(
    variants: Mapping[str, Callable[[], object] | Sampler],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_sample_s: float = 0.0,
    budget_s: float = math.inf,
    limit_s: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    meter: Callable[[], LoadMeter] = LoadMeter,
) -> Timings:
    """Times each variant once a round, in an order that is reversed from round to round.

    Args:
        variants: name -> a call to time, or a `Sampler` that times itself. The first one is the
            baseline.
        rounds: number of samples of each variant, and of pairs.
        warmup: calls of each variant before anything is timed.
        min_sample_s: a sample repeats its call until it lasts about this long (0: one call).
        budget_s: once this much time is used, no round is begun beyond the sixth: a busy machine
            shall not keep a person waiting for a verdict that it prevents.
        limit_s: once this much time is used, no round is begun beyond the first: what the whole run
            has left.
        progress: called with (rounds done, rounds) after each round.
        synchronize: waits for the device; called before each reading of the clock. Samplers do so
            themselves.
        clock: seconds, monotonic.
        meter: makes the load meter, when the timing begins.

    Returns:
        The samples in seconds a call and the load while they were taken (warm-up excluded). A
        sampler that raised `SampleError` has none, and its reason stands in `dropped`.

    Raises:
        ValueError: no variants, fewer than one round, or a negative warmup or min_sample_s.
    """
    if not variants:
        raise ValueError("variants: expected at least one callable, got none")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if warmup < 0 or min_sample_s < 0:
        raise ValueError(
            f"warmup, min_sample_s: expected 0 or more, got {warmup} and {min_sample_s}"
        )
    taking = _Taking(
        {
            name: one if isinstance(one, Sampler) else _Call(one, synchronize, clock)
            for name, one in variants.items()
        }
    )
    for name in variants:
        taking.warm_up(name, warmup, min_sample_s)
    with _no_garbage_collection():
        load_meter = meter()
        start = clock()
        for done in range(1, rounds + 1):
            for name in list(taking.samples)[:: 1 if done % 2 else -1]:
                taking.take(name)
            if progress is not None:
                progress(done, rounds)
            used = clock() - start
            if used > limit_s or (done >= ENOUGH_ROUNDS and used > budget_s):
                break
        load = load_meter.read()
    seconds = {name: tuple(values) for name, values in taking.samples.items()}
    return Timings(seconds, load, taking.calls, taking.dropped)


class _Taking:
    """The samples that are being taken, of the variants that are still in."""

    def __init__(self, samplers: dict[str, Sampler]) -> None:
        self._samplers = samplers
        self.samples: dict[str, list[float]] = {name: [] for name in samplers}
        self.calls: dict[str, int] = {}
        self.dropped: dict[str, str] = {}

    def _sample(self, name: str, calls: int) -> float | None:
        """Seconds a call, or None once the variant has failed: then it is out."""
        try:
            return self._samplers[name].sample(calls)
        except SampleError as error:
            self.dropped[name] = str(error)
            self.samples.pop(name)
            return None

    def warm_up(self, name: str, warmup: int, min_sample_s: float) -> None:
        """Every variant gets a fixed count, from its last warm-up call: samples stay comparable."""
        once = math.inf
        for _ in range(warmup or bool(min_sample_s)):
            taken = self._sample(name, 1)
            if taken is None:
                return
            once = taken
        self.calls[name] = min(MAX_CALLS, max(1, math.ceil(min_sample_s / max(once, 1e-9))))

    def take(self, name: str) -> None:
        """One sample of a variant."""
        taken = self._sample(name, self.calls[name])
        if taken is not None:
            self.samples[name].append(taken)


class _Call:
    """A plain call as a sampler."""

    def __init__(
        self,
        call: Callable[[], object],
        wait: Callable[[], object] | None,
        clock: Callable[[], float],
    ) -> None:
        self._call, self._wait, self._clock = call, wait or (lambda: None), clock

    def sample(self, calls: int) -> float:
        """Seconds a call, over `calls` calls in a row."""
        self._wait()
        start = self._clock()
        for _ in range(calls):
            self._call()
        self._wait()
        return (self._clock() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects once, then keeps the collector from running inside a sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
