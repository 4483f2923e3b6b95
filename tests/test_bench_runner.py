"""The runner: right before timed, interleaved, and whatever a peer does, a row comes out."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from bench_standins import PEERS, SLOW_S, StandIn
from test_bench import FakeClock, _quiet_meter

from resnet_fused.bench import ceilings, gauges, record, runner
from resnet_fused.bench.gauges import Step, by_layer, layer_seconds, peak_memory
from resnet_fused.bench.judging import Judgement
from resnet_fused.bench.load import Load, read_cpu_times
from resnet_fused.bench.process import Child, ChildVariant, lookup
from resnet_fused.bench.runner import Settings, bench, run
from resnet_fused.bench.sampler import CpuSampler, DeviceLostError, OwnVariant
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.timing import SampleError, Timings, interleaved
from resnet_fused.bench.work import build

KERNEL = Subject("kernel", "conv_bn_act", "3x3_8_8_at6", 4, "float32", "cpu")
BLOCK = Subject("block", "inference", "resnet18.layer2.0", 2, "float32", "cpu", size=32)
RATES = ceilings.Ceilings(1e11, 1e10, "float32")
QUICK = Settings(rounds=6, warmup=1, min_sample_s=1e-4, threads=1, details=False, request_s=30.0)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: RATES)


def _one_set(subject: Subject = KERNEL) -> Any:
    work = build(subject)
    work.sets = work.sets[:2]
    return work


def _eager(behaviour: str = "quick") -> StandIn:
    return StandIn(behaviour, "eager")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


class Scripted:
    """A sampler whose samples are known; None is a failure."""

    def __init__(self, *seconds: float | None) -> None:
        self.left = list(seconds)

    def sample(self, calls: int) -> float:
        value = self.left.pop(0)
        if value is None:
            raise SampleError("planted")
        return value


def test_a_sampler_that_fails_is_dropped_and_the_others_go_on() -> None:
    timings = interleaved(
        {"a": Scripted(1, *[2.0] * 4), "b": Scripted(1, 1.0, None), "c": Scripted(None)},
        rounds=4, warmup=1, meter=_quiet_meter,
    )  # fmt: skip
    assert timings.seconds == {"a": (2.0,) * 4}
    assert timings.dropped == {"b": "planted", "c": "planted"}


def test_what_the_run_has_left_ends_it_before_the_sixth_round() -> None:
    clock = FakeClock()
    for limit, rounds in ((2.5, 3), (0.0, 1)):
        timings = interleaved(
            {"a": clock.work(1.0)}, rounds=9, limit_s=limit, clock=clock, meter=_quiet_meter
        )
        assert len(timings.seconds["a"]) == rounds


def test_the_cpu_sampler_goes_on_through_the_sets() -> None:
    clock, seen = FakeClock(), []
    work = clock.work(0.5)

    def call(i: int) -> None:
        seen.append((i, torch.is_inference_mode_enabled()))
        work()

    sampler = CpuSampler(call, 3, torch.inference_mode, clock)
    assert sampler.sample(2) == pytest.approx(0.5)
    assert sampler.sample(3) == pytest.approx(0.5)
    assert seen == [(i, True) for i in (0, 1, 2, 0, 1)]


def _noisy(draw: random.Random, seconds: float, rounds: int = 15) -> tuple[float, ...]:
    return tuple(seconds * math.exp(draw.gauss(0, 0.05)) for _ in range(rounds))


def test_two_runs_of_one_thing_agree_within_the_stated_noise() -> None:
    draw = random.Random(0)
    agreed, noises = 0, []
    for _ in range(300):
        runs = [
            Timings(
                {"eager": _noisy(draw, 1.3), "fused": _noisy(draw, 1), "again": _noisy(draw, 1)},
                Load(0.0, 0.9, 2, 10.0),
            )
            for _ in range(2)
        ]
        gains = [one.ratio("eager", "fused").median for one in runs]
        noise = runs[0].noise("fused", "again", "eager")
        assert noise is not None
        noises.append(noise)
        agreed += abs(gains[0] / gains[1] - 1) <= noise
    assert agreed >= 0.95 * 300
    assert 0.02 < sorted(noises)[150] < 0.15  # and it is no excuse for everything


def test_noise_counts_what_a_second_preparation_does() -> None:
    samples = {"eager": (2.0,) * 8, "fused": (1.0,) * 8, "again": (1.25,) * 8}
    timings = Timings(samples, Load(0.0, 0.9, 2, 10.0))
    assert timings.noise("fused", "again") == pytest.approx(0.2)
    few = Timings({name: values[:5] for name, values in samples.items()}, timings.load)
    assert few.noise("fused", "again") is None


def test_a_planted_slow_kernel_shows_in_the_ratio() -> None:
    peers = [StandIn("slow", "fused"), _eager(), StandIn("quick", "cudnn")]
    row = run(KERNEL, peers, QUICK, rates=RATES)
    ratios = {(r["baseline"], r["variant"]): r for r in row.ratios}
    assert set(ratios) == {
        ("eager", "fused"), ("eager", "cudnn"), ("fused_again", "fused"), ("cudnn", "fused"),
    }  # fmt: skip
    assert ratios["eager", "fused"]["high"] < 1.0
    assert ratios["eager", "fused"]["median"] < 0.5
    assert list(row.variants) == ["eager", "fused", "fused_again", "cudnn"]
    fused = row.variants["fused"]
    assert fused["median_s"] >= SLOW_S and len(fused["samples_s"]) == QUICK.rounds
    assert fused["tflops"] == pytest.approx(row.limit["flops"] / fused["median_s"] / 1e12)
    assert fused["images_per_s"] == pytest.approx(4 / fused["median_s"])
    assert row.noise is not None and row.noise >= 0  # how large is the machine's affair
    assert len(row.verdicts) == 1 and "fused" in row.verdicts[0]


def test_a_planted_wrong_kernel_gets_no_time() -> None:
    row = run(KERNEL, [_eager(), StandIn("wrong", "fused")], QUICK, rates=RATES)
    for name in ("fused", "fused_again"):
        assert set(row.variants[name]) == {"wrong"}
        assert "away from eager's" in row.variants[name]["wrong"]
    assert row.ratios == [] and row.verdicts == [] and row.noise is None
    assert "median_s" in row.variants["eager"]


def test_what_fails_is_left_out_with_its_reason() -> None:
    names = ("raises", "refuses", "breaks", "fails_later")
    peers = [_eager("right"), *(StandIn(name, name) for name in names)]
    peers.append(StandIn("right", "absent", absent="not installed: pip install it"))
    row = run(KERNEL, peers, QUICK, rates=RATES)
    assert row.omitted == {
        "absent": "not installed: pip install it",
        "raises": "the call failed: RuntimeError: planted",
        "refuses": "it needs a thing that is not here",
        "breaks": "preparing failed: OSError: no space left",
        "fails_later": "the call failed: RuntimeError: planted in a sample",
    }
    assert list(row.variants) == ["eager"]


def test_a_peer_in_a_child_is_judged_and_timed_like_any_other() -> None:
    peers = [
        _eager("right"),
        *(StandIn(b, n, isolated=True) for b, n in [("prints", "inductor"), ("wrong", "openvino")]),
    ]
    settings = Settings(rounds=6, warmup=1, min_sample_s=1e-3, threads=1)
    row = run(KERNEL, peers, settings, rates=RATES).to_dict()
    found = row["variants"]["inductor"]
    assert (found["process"], found["method"]) == ("child", "perf_counter")
    assert found["kernels"] == ["kernel_of_prints"]
    # What it prints looks like an answer, and is none.
    assert 1e-6 < found["median_s"] < 1.0 and found["worst"] <= 1.0
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] >= 0
    assert row["omitted"] == {}
    assert set(row["variants"]["openvino"]) == {"wrong"}


@pytest.mark.parametrize(
    ("behaviour", "limits", "match"),
    [
        ("crashes", {}, "its process ended in 'judge': SIGSEGV; it said: last words"),
        ("hangs_later", {"request_s": 1.0}, "no answer to 'sample' within 1 s"),
        # Each starts a process, which imports torch: the rest is for the long proof.
        slow("dies_later", {}, "its process ended in 'sample': exit code 3"),
        slow("hangs", {"limit_s": 2.0}, "no answer to 'prepare' within 2 s"),
        slow("refuses", {}, "it needs a thing"),
        slow("raises", {}, "the call failed: RuntimeError: planted"),
    ],
)
def test_a_child_that_fails_is_a_reason(
    behaviour: str, limits: dict[str, float], match: str
) -> None:
    peer = StandIn(behaviour, "inductor", True, limits.get("limit_s", 60.0))
    settings = Settings(
        rounds=2, warmup=3, min_sample_s=1e-4, threads=1, details=False,
        request_s=limits.get("request_s", 30.0),
    )  # fmt: skip
    start = time.monotonic()
    row = run(KERNEL, [_eager("right"), peer], settings, rates=RATES)
    assert match in row.omitted["inductor"] and row.verdicts == []
    assert row.crashed == ([] if behaviour == "refuses" else ["inductor"])
    assert "median_s" in row.variants["eager"]
    assert time.monotonic() - start < 120
    assert not [p for p in psutil.Process().children(recursive=True) if "bench.process" in str(p)]


@pytest.mark.slow
def test_a_child_rests_between_requests_and_ends_with_its_parent() -> None:
    code = (
        "import sys, time; from resnet_fused.bench.process import Child\n"
        "child = Child(1)\n"
        "print(child.request({'do': 'nothing'}, 60.0)['error'], child._process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        said = parent.stdout.readline()
        child = psutil.Process(int(said.split()[-1]))
        assert "do is 'nothing'" in said
        if sys.platform == "linux":
            assert _within(lambda: child.status() == psutil.STATUS_STOPPED)
        parent.kill()
    assert _within(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _within(what: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if what():
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_path_is_looked_up() -> None:
    assert lookup("bench_standins:PEERS.right") is PEERS["right"]
    for path in ("bench_standins:PEERS.nobody", "bench_standins:NONE", "no_such_module:x"):
        with pytest.raises(ValueError, match=f"peer '{path}': nothing is there"):
            lookup(path)


@pytest.mark.slow
def test_a_path_of_nothing_is_a_reason() -> None:
    variant = ChildVariant("x", "bench_standins:NONE", KERNEL, None, 60.0, 1)
    with pytest.raises(SampleError, match="nothing is there"):
        variant.prepare()
    variant.close()
    with pytest.raises(SampleError, match="it has ended before 'judge'"):
        variant.judge()


@pytest.mark.slow
def test_a_child_waits_no_longer_than_the_run_has_left() -> None:
    child = ChildVariant(
        "x", "bench_standins:PEERS.hangs", KERNEL, None, 500.0, 1, left=iter([60.0, 0.0]).__next__
    )
    with pytest.raises(SampleError, match="no answer to 'prepare' within 1 s"):
        child.prepare()


def test_the_time_of_living_children_is_ours() -> None:
    burn = "import time\nend = time.perf_counter() + 60\nwhile time.perf_counter() < end: pass"
    start = read_cpu_times()
    with subprocess.Popen([sys.executable, "-c", burn]) as child:
        assert _within(lambda: sum(psutil.Process(child.pid).cpu_times()[:2]) > 0.2)
        alive = read_cpu_times().own - start.own
        child.kill()
        child.wait()
    ended = read_cpu_times().own - start.own
    assert alive >= 0.2
    assert ended >= alive - 0.05  # counted once more among the ended ones, not lost


def test_a_budget_for_one_subject_leaves_out_who_comes_late() -> None:
    settings = Settings(rounds=2, warmup=1, min_sample_s=1e-4, details=False, subject_s=1e-3)
    row = run(KERNEL, [StandIn("right", "timm"), _eager("right")], settings, rates=RATES)
    assert "median_s" in row.variants["eager"]
    assert row.omitted == {"timm": "no time was left to prepare it"}


def test_a_lost_device_ends_the_run_with_a_valid_record(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [KERNEL, BLOCK]
    real = OwnVariant.prepare

    def prepare(self: OwnVariant) -> None:
        if self._work.subject == BLOCK:
            raise DeviceLostError("the GPU is lost to this process: planted")
        real(self)

    monkeypatch.setattr(OwnVariant, "prepare", prepare)
    found = bench(subjects, [_eager("right")], QUICK)
    record.validate(found)
    assert found["stopped"].endswith("planted")
    assert (found["reached"], found["of"], found["complete"]) == (1, 2, False)
    assert len(found["rows"]) == 1


def test_a_subject_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner.build

    def no_room(subject: Subject) -> Any:
        if subject == KERNEL:
            raise torch.OutOfMemoryError("planted")
        return real(subject)

    monkeypatch.setattr(runner, "build", no_room)
    found = bench([KERNEL, BLOCK], [_eager("right")], QUICK)
    record.validate(found)
    assert found["failed"] == {KERNEL.key: "OutOfMemoryError: planted"}
    assert (found["reached"], found["complete"], len(found["rows"])) == (2, False, 1)


def test_a_run_writes_a_valid_record_after_each_row_and_ends_in_time() -> None:
    others = [Subject("kernel", "bn_act", f"{c}_at4", 2, "float32", "cpu") for c in (4, 8, 16)]
    seen: list[dict[str, Any]] = []
    said: list[tuple[int, int, str]] = []

    def keep(found: dict[str, Any]) -> None:
        record.validate(found)
        seen.append(json.loads(json.dumps(found, allow_nan=False)))

    peers = {"fused": StandIn("right", "fused"), "eager": _eager("right")}
    found = bench(
        [KERNEL, *others], peers, QUICK, command="typed", report=keep,
        progress=lambda *where: said.append(where), options={"level": "kernel"},
    )  # fmt: skip
    assert [one["reached"] for one in seen] == [1, 2, 3, 4]
    assert [one["complete"] for one in seen] == [False, False, False, True]
    assert found["settings"]["level"] == "kernel" and found["command"] == "typed"
    assert found["settings"]["total_s"] is None and found["ceilings"]["float32"]["flops"] == 1e11
    assert said[0][:2] == (0, 4) and said[-1] == (4, 4, "done")
    keys = [row["key"] for row in found["rows"]]
    assert keys == [KERNEL.key, *(subject.key for subject in others)]
    # The second subject would have less than its least.
    short = bench([KERNEL, *others], peers, Settings(total_s=1.5, rounds=1, details=False))
    record.validate(short)
    assert (short["complete"], short["reached"], short["of"]) == (False, 1, 4)
    none = bench([KERNEL], peers, Settings(total_s=1e-9))
    record.validate(none)
    assert (none["complete"], none["reached"], none["rows"]) == (False, 0, [])
    with pytest.raises(ValueError, match="subjects is empty"):
        bench([], peers)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rounds": 0}, "rounds is 0; accepted is an integer of at least 1"),
        ({"warmup": 0}, "warmup is 0"),
        ({"total_s": 0.0}, "total_s is 0.0; accepted is a positive number"),
        ({"threads": -1}, "threads is -1"),
        ({"subject_s": math.nan}, "subject_s is nan"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Settings(**fields)


def test_threads_are_pinned_and_come_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    run(
        KERNEL, [_eager("right")], Settings(rounds=1, threads=before + 1, details=False),
        lambda *where: seen.append(torch.get_num_threads()), rates=RATES,
    )  # fmt: skip
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process' peak memory")
def test_peak_memory_is_that_of_the_call() -> None:
    held = bytearray(64 << 20)  # what was there before does not count
    found = peak_memory(lambda: torch.ones(16 << 20).sum(), "cpu")
    assert found is not None and 60 << 20 <= found < 120 << 20
    small = peak_memory(lambda: torch.ones(16).sum(), "cpu")
    assert small is not None and small < 8 << 20
    assert len(held) == 64 << 20


def test_clocks_are_read_from_nvidia_smi_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gauges.clocks() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '600.01, 1980, 2619, 1980, 412.5, [N/A], 41'\n")
    tool.chmod(0o755)
    assert gauges.clocks() == {
        "driver": "600.01", "sm_mhz": 1980.0, "memory_mhz": 2619.0, "sm_max_mhz": 1980.0,
        "power_w": 412.5, "power_limit_w": None, "temperature_c": 41.0,
    }  # fmt: skip
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gauges.clocks() is None


STEPS = [
    Step("conv1", "conv", (2, 8, 4, 4)),
    Step("conv2", "conv", (2, 16, 2, 2)),
    Step("downsample.0", "conv", (2, 8, 4, 4), True),
    Step("fc", "linear"),
]


def test_operators_are_shared_out_among_layers() -> None:
    spent: list[tuple[str, Any, float]] = [
        ("aten::conv2d", [2, 8, 4, 4], 1.0), ("aten::batch_norm", [2, 16, 2, 2], 0.5),
        ("aten::conv2d", [2, 16, 2, 2], 2.0),
        ("aten::conv2d", [2, 8, 4, 4], 4.0), ("aten::batch_norm", [2, 16, 2, 2], 0.25),
        ("aten::add", [2, 16, 2, 2], 8.0), ("aten::relu", [2, 16, 2, 2], 8.0),
        ("aten::linear", None, 3.0),
    ]  # fmt: skip
    assert by_layer(spent, STEPS) == {"conv1": 1.5, "conv2": 18.0, "downsample.0": 4.25, "fc": 3.0}
    shifted = [*spent[2:4], *spent[:2], *spent[4:]]
    assert by_layer(shifted, STEPS) is None  # by the shapes these are other layers
    assert by_layer(spent[:-1], STEPS) is None
    assert by_layer([*spent, spent[-1]], STEPS) is None


def test_layers_are_told_apart_whatever_their_order() -> None:
    work = _one_set(BLOCK)
    orders = runner.limits.orders(work)
    assert [step.name for step in orders[0]] == ["conv1", "conv2", "downsample.0"]
    assert [step.name for step in orders[1]] == ["downsample.0", "conv1", "conv2"]
    with work.mode():
        found = layer_seconds(lambda: work.run(work.module), orders, "cpu")
        assert found is not None and list(found) == ["conv1", "conv2", "downsample.0"]
        assert all(seconds > 0 for seconds in found.values())
        assert layer_seconds(lambda: torch.ones(2) + 1, orders, "cpu") is None


def test_a_graph_is_judged_again_and_the_load_of_the_cpu_is_not_its() -> None:
    """What a GPU's replayed graph changes in the runner, with a stand-in for the graph."""
    work = _one_set()
    row = runner.Row(KERNEL, runner.limits.limit(work, RATES))
    busy = Load(0.5, 0.4, 2, 10.0)
    timings = Timings({"eager": (2.0,) * 8, "fused": (1.0,) * 8}, busy)
    for method, word in (("cuda_graph", "fused is at least"), ("cuda_events", "no verdict")):
        with runner._Run(work, row, QUICK, lambda *_: None, runner._Clock(10)) as running:
            for name in timings.seconds:
                variant = OwnVariant(name, PEERS["right"], work)
                variant.method = method
                running.variants[name] = variant
            row.verdicts = []
            runner._conclude(row, timings, running, QUICK)
        assert row.verdicts[0].startswith(word)
        assert row.load["foreign"] == 0.5  # what was measured stays in the record


def test_a_graph_whose_output_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts: Iterator[Judgement] = iter(
        [Judgement(True, 0.1, "right"), Judgement(False, 7.0, "stale")]
    )

    def arm(self: OwnVariant) -> None:
        self.method = "cuda_graph"

    monkeypatch.setattr(OwnVariant, "arm", arm)
    monkeypatch.setattr(OwnVariant, "judge", lambda self: next(verdicts))
    row = run(KERNEL, [_eager("right")], QUICK, rates=RATES)
    assert row.variants == {"eager": {"wrong": "stale"}}


def test_no_process_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SampleError, match="no process could be started"):
        Child(1)
    row = run(KERNEL, [_eager("right"), StandIn("right", "timm", True)], QUICK, rates=RATES)
    assert row.omitted["timm"].startswith("no process could be started")
