"""Timing: with injected clocks every number is known beforehand."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision

from resnet_fused.bench import runner
from resnet_fused.bench.load import CpuTimes, Load, LoadMeter, read_cpu_times
from resnet_fused.bench.peers import NoPeerError, bare_onednn
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.timing import Timings, interleaved, median_interval

QUIET = Load(foreign=0.01, own=0.9, cores=2, seconds=10.0)


class FakeClock:
    """A clock that moves only when a variant runs."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Callable[[], None]:
        """A variant that takes the given times in turn, the last one for ever."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def _quiet_meter() -> LoadMeter:
    readings = iter([CpuTimes(0.0, 0.0, 0.0), CpuTimes(10.0, 18.1, 18.0)])
    return LoadMeter(cores=2, reader=lambda: next(readings))


def _timings(**seconds: tuple[float, ...]) -> Timings:
    return Timings(seconds, QUIET)


def test_interleaved_takes_one_sample_a_round_and_reverses_the_order() -> None:
    calls: list[str] = []
    timings = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        warmup=1,
        meter=_quiet_meter,
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(samples) for name, samples in timings.seconds.items()} == {"a": 3, "b": 3}


def test_interleaved_measures_with_the_clock_it_is_given() -> None:
    clock = FakeClock()
    timings = interleaved(
        {"slow": clock.work(9.0, 0.4, 0.2), "fast": clock.work(7.0, 0.1)},
        rounds=2,
        warmup=1,
        clock=clock,
        meter=_quiet_meter,
    )
    assert timings.seconds["slow"] == pytest.approx((0.4, 0.2))
    assert timings.seconds["fast"] == pytest.approx((0.1, 0.1))
    assert timings.ratio("slow", "fast").median == pytest.approx(3.0)


def test_a_drifting_machine_does_not_change_a_ratio() -> None:
    clock = FakeClock()
    drift = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0]
    timings = interleaved(
        {"a": clock.work(*(1.2 * d for d in drift)), "b": clock.work(*drift)},
        rounds=len(drift),
        warmup=0,
        clock=clock,
        meter=_quiet_meter,
    )
    ratio = timings.ratio("a", "b")
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.2, 1.2, 1.2))
    assert timings.spread("a") > 1


def test_quick_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    clock = FakeClock()
    counted: list[int] = []
    work = clock.work(0.001)

    def quick() -> None:
        counted.append(1)
        work()

    timings = interleaved(
        {"quick": quick}, rounds=2, warmup=0, min_sample_s=0.01, clock=clock, meter=_quiet_meter
    )
    assert len(counted) == 1 + 2 * 10
    assert timings.seconds["quick"] == pytest.approx((0.001, 0.001))


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 6), (7.5, 8), (100.0, 9)])
def test_a_budget_stops_early_but_not_before_an_interval(budget: float, rounds: int) -> None:
    clock = FakeClock()
    timings = interleaved(
        {"a": clock.work(1.0)}, rounds=9, budget_s=budget, clock=clock, meter=_quiet_meter
    )
    assert len(timings.seconds["a"]) == rounds
    assert timings.ratio("a", "a").confidence > 0.95


def test_progress_and_synchronize_are_called() -> None:
    seen: list[tuple[int, int]] = []
    waits: list[int] = []
    interleaved(
        {"a": lambda: None},
        rounds=2,
        warmup=0,
        progress=lambda done, total: seen.append((done, total)),
        synchronize=lambda: waits.append(1),
        meter=_quiet_meter,
    )
    assert seen == [(1, 2), (2, 2)]
    assert len(waits) == 2 * 2  # before and after each sample


def test_the_garbage_collector_rests_during_samples_and_comes_back_after_an_error() -> None:
    states: list[bool] = []

    def fail() -> None:
        states.append(gc.isenabled())
        raise RuntimeError("planted")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="planted"):
        interleaved({"a": fail}, rounds=1, warmup=0, meter=_quiet_meter)
    assert states == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"variants": {}}, "variants: expected at least one"),
        ({"variants": {"a": print}, "rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"variants": {"a": print}, "warmup": -1}, "warmup, min_sample_s: expected 0 or more"),
    ],
)
def test_interleaved_refuses(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        interleaved(**arguments)  # type: ignore[arg-type]


def test_median_interval_matches_the_binomial_table() -> None:
    # The sign test's published ranks for a 95% interval of the median.
    for n, rank, confidence in [(6, 1, 0.969), (10, 2, 0.979), (15, 4, 0.965), (20, 6, 0.959)]:
        low, high, reached = median_interval([float(i) for i in range(1, n + 1)])
        assert (low, high) == (rank, n + 1 - rank)
        assert reached == pytest.approx(confidence, abs=5e-4)


def test_median_interval_of_few_values_states_a_lower_confidence() -> None:
    assert median_interval([1.0]) == (1.0, 1.0, 0.0)
    assert median_interval([1.0, 2.0, 4.0]) == (1.0, 4.0, 0.75)
    with pytest.raises(ValueError, match="at least one value"):
        median_interval([])


def test_load_is_what_others_used() -> None:
    readings = iter([CpuTimes(5.0, 100.0, 50.0), CpuTimes(15.0, 115.2, 64.0)])
    load = LoadMeter(cores=2, reader=lambda: next(readings)).read()
    assert load.seconds == 10.0
    assert load.foreign == pytest.approx((15.2 - 14.0) / 20)
    assert load.own == pytest.approx(14.0 / 20)


def test_ticks_that_round_below_zero_count_as_no_load() -> None:
    readings = iter([CpuTimes(0.0, 0.0, 0.0), CpuTimes(1.0, 1.98, 2.0)])
    assert LoadMeter(cores=2, reader=lambda: next(readings)).read().foreign == 0.0


@pytest.mark.parametrize(
    ("foreign", "seconds", "allowed"),
    [
        (0.06, 10.0, False),
        (0.051, 10.0, False),
        (0.05, 10.0, True),
        (0.0, 10.0, True),
        (0.0, 0.4, False),
    ],
)
def test_a_verdict_needs_a_quiet_machine(foreign: float, seconds: float, allowed: bool) -> None:
    timings = Timings({"eager": (2.0,) * 8, "fused": (1.0,) * 8}, Load(foreign, 0.9, 2, seconds))
    assert timings.verdict_allowed is allowed
    verdict = timings.verdict("eager", "fused", at_least=1.15)
    assert verdict.startswith("fused is at least" if allowed else "no verdict,")
    assert ("other programs used" in verdict) is (foreign > 0.05)
    assert timings.to_dict()["verdict_allowed"] is allowed


def test_a_load_of_six_percent_refuses_through_the_whole_path() -> None:
    readings = iter([CpuTimes(0.0, 0.0, 0.0), CpuTimes(10.0, 19.2, 18.0)])
    timings = interleaved(
        {"a": lambda: None, "b": lambda: None},
        rounds=6,
        clock=iter(range(1000)).__next__,
        meter=lambda: LoadMeter(cores=2, reader=lambda: next(readings)),
    )
    assert timings.load.foreign == pytest.approx(0.06)
    assert "no verdict, other programs used 6.0% of the 2 cores" in timings.verdict("a", "b")


def test_verdicts() -> None:
    fast = _timings(eager=(1.3,) * 7, fused=(1.0,) * 7)
    assert fast.verdict("eager", "fused", 1.2).startswith("fused is at least 1.20x")
    assert fast.verdict("eager", "fused", 1.4).startswith("fused is not 1.40x")
    noisy = _timings(eager=(0.8, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6), fused=(1.0,) * 7)
    assert noisy.verdict("eager", "fused", 1.2).startswith("undecided at 1.20x")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_verdicts_name_everybody_who_is_to_be_beaten(device: str) -> None:
    seconds = {"eager": 3.0, "fused": 1.2, "fused_again": 1.2, "inductor": 1.1, "cudnn": 1.3}

    def said(**more: float) -> list[str]:
        timings = _timings(**{name: (value,) * 7 for name, value in (seconds | more).items()})
        running: Any = SimpleNamespace(
            variants={name: SimpleNamespace(method="cuda_graph") for name in timings.seconds}
        )
        subject = Subject("model", "inference", "resnet18", 2, "bfloat16", device)
        row = runner.Row(subject, {})
        runner._conclude(row, timings, running, runner.Settings())
        return [" ".join(verdict.partition(":")[0].split()) for verdict in row.verdicts]

    first = "fused is at least 1.00x as fast as eager"
    others = ["fused is not 1.00x as fast as inductor", "fused is at least 1.00x as fast as cudnn"]
    assert said() == [first, *(others if device == "cuda" else ())]
    engine = [f"frozen is at least 1.00x as fast as {name}" for name in ("inductor", "cudnn")]
    assert said(frozen=1.0) == [first, *(engine if device == "cuda" else ())]


def test_timings_to_dict_is_json() -> None:
    timings = _timings(eager=(2.0, 2.2, 2.4), fused=(1.0, 1.0, 1.2), bare=(1.0, 1.1, 1.2))
    record = json.loads(json.dumps(timings.to_dict()))
    assert record["median_s"] == {"eager": 2.2, "fused": 1.0, "bare": 1.1}
    assert [ratio["variant"] for ratio in record["ratios"]] == ["fused", "bare"]
    assert record["load"]["foreign"] == QUIET.foreign
    assert math.isnan(_timings(a=(1.0,)).spread("a"))


def test_the_real_clocks_move_together() -> None:
    start = read_cpu_times()
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    now = read_cpu_times()
    assert now.wall - start.wall >= 0.2
    assert 0.0 < now.own - start.own < 30.0
    assert now.busy - start.busy >= 0.05


def _resnet(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval().to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    return model, x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bare_peer_gives_the_models_answer(dtype: torch.dtype) -> None:
    model, x = _resnet(dtype)
    with torch.inference_mode():
        expected = model(x).float()
        found = bare_onednn(model, x)(x).float()
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peer_with_another_answer_is_refused(dtype: torch.dtype) -> None:
    model, x = _resnet(dtype)
    model.layer2[0].relu = torch.nn.ReLU6()  # a network that only looks like a ResNet
    with torch.no_grad():
        model.layer2[0].bn1.bias.fill_(20)
    with pytest.raises(NoPeerError, match="give another answer"):
        bare_onednn(model, x)


def test_models_without_a_peer_say_why() -> None:
    model, x = _resnet(torch.float32)
    with pytest.raises(NoPeerError, match="it is in training mode"):
        bare_onednn(model.train(), x)
    with pytest.raises(NoPeerError, match="it has no conv1, bn1"):
        bare_onednn(torchvision.models.mobilenet_v2().eval(), x)
    model.eval().layer1[0].bn1 = torch.nn.GroupNorm(4, 64)
    with pytest.raises(NoPeerError, match=r"Conv2d \+ GroupNorm is not a pair"):
        bare_onednn(model, x)
