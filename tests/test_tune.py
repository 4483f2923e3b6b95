"""Tuning without a GPU: a clock that the test moves, stand-in launches, the real judgement."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_standins
import pytest
import torch
from click.testing import CliRunner
from test_bench import FakeClock, _quiet_meter
from torch import Tensor

from resnet_fused import _tuned, _verdicts, admission, cli
from resnet_fused.bench import tune
from resnet_fused.bench.judging import eager_kernel
from resnet_fused.bench.sampler import CpuSampler, DeviceLostError
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.tune import Job, Settings, tune_one
from resnet_fused.bench.tune_kernels import CudaKernel, Option, TritonKernel, key_of, spread_out
from resnet_fused.bench.tune_ops import OPS
from resnet_fused.bench.work import Work, build
from resnet_fused.models import get_model
from resnet_fused.ops import _cuda_plan, _triton
from resnet_fused.triton import _launch, _limits, _tiles

SUBJECT = Subject("kernel", "conv_bn_act", "3x3_64_64_at6", 2, "float32", "cpu")
JOB = Job(SUBJECT, ("layer1.0.conv1", "layer1.1.conv1"))
QUICK = Settings(rounds=8, screening=2, min_sample_s=0.0)
PICK = Option("64x64_4w4s", 1, 10.0)
CALL = ("conv_bn_act", torch.float32, (2, 64, 6, 6), (64, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user without a history: where the file will lie."""
    monkeypatch.setenv(_verdicts.FOLDER, str(tmp_path / "cache"))
    _tuned.forget()
    _verdicts.forget_warnings()
    yield tmp_path / "cache" / _tuned.FILE
    _tuned.forget()


class StandIn:
    """Launches that take planted seconds and compute with eager, or wrongly, or not at all.

    Args:
        clock: what time is read from.
        seconds: option's name -> seconds of its calls, in turn, the last one for ever.
        wrong: names whose results are wrong in one element.
        breaks: names that raise.
    """

    name = "triton"

    def __init__(
        self,
        clock: FakeClock,
        seconds: dict[str, tuple[float, ...]],
        wrong: tuple[str, ...] = (),
        breaks: tuple[str, ...] = (),
    ) -> None:
        self.wrong, self.breaks = wrong, breaks
        self.takes = {name: clock.work(*values) for name, values in seconds.items()}
        self.calls: list[str] = []

    def why_not(self, subject: Subject) -> str | None:
        return None

    def options(self, work: Work) -> tuple[Option, list[Option]]:
        others = [Option(name, 1, 11.0) for name in self.takes if name != PICK.configuration]
        return PICK, others

    def launch(self, work: Work, i: int, outs: tuple[Tensor, ...], option: Option) -> None:
        self.calls.append(option.configuration)
        if option.configuration in self.breaks:
            raise RuntimeError("out of resource: shared memory")
        y = eager_kernel(work, i)
        if option.configuration in self.wrong:
            y = y.clone()
            y[1, 3, 2, 5] += 1.0
        outs[0].copy_(y)
        self.takes[option.configuration]()


def tuned(kernel: StandIn, clock: FakeClock, **more: Any) -> tune.Outcome:
    def sampler(call: Callable[[int], Any], work: Work) -> CpuSampler:
        return CpuSampler(call, len(work.sets), work.mode, clock)

    return tune_one(JOB, kernel, QUICK, samplers=sampler, clock=clock, meter=_quiet_meter, **more)


def entries(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["tuned"].values())


def found() -> _tuned.Tuned | None:
    return _tuned.find("triton", CPU, *CALL, False)


def test_a_planted_faster_configuration_is_kept_and_taken(file: Path) -> None:
    clock = FakeClock()
    # 128x64 is slow; 32x64 takes 0.8 of the pick's time.
    seconds = {"64x64_4w4s": (0.1,), "128x64_4w4s": (0.2,), "32x64_4w4s": (0.08,)}
    outcome = tuned(StandIn(clock, seconds), clock)
    assert (outcome.before, outcome.after) == ("64x64_4w4s/1", "32x64_4w4s/1")
    assert outcome.gain is not None and outcome.gain["median"] == pytest.approx(1.25)
    (entry,) = entries(file)
    assert entry["configuration"] == "32x64_4w4s" and entry["low"] == pytest.approx(1.25)
    assert entry["gpu"] == admission._platform.identify("cpu")._asdict()
    one = found()
    assert one is not None and one.why == "32x64_4w4s/1: tuned on this GPU: 1.25x"
    # Another size, dtype, geometry, residual or implementation is another call.
    for other in (
        ("triton", CPU, *CALL, True),
        ("cuda", CPU, *CALL, False),
        ("triton", CPU, CALL[0], torch.float16, *CALL[2:], False),
        ("triton", CPU, *CALL[:2], (3, 64, 6, 6), *CALL[3:], False),
        ("triton", CPU, *CALL[:4], ((2, 2), (1, 1), (1, 1), 1), False),
    ):
        assert _tuned.find(*other) is None


def test_a_gain_within_the_noise_is_not_kept(file: Path) -> None:
    clock = FakeClock()
    # The pick's own samples differ by 10%; the other one is 3% faster.
    noisy = tuple(0.1 * factor for factor in (1, 1, 1.1, 1, 1.1, 0.95) * 9)
    outcome = tuned(StandIn(clock, {"64x64_4w4s": noisy, "32x64_4w4s": (0.097,)}), clock)
    assert outcome.after is None and outcome.gain is not None and outcome.best == "32x64_4w4s/1"
    assert outcome.noise is not None and outcome.gain["low"] <= 1 + outcome.noise
    assert entries(file) == [] if file.exists() else found() is None
    # The same 3% without noise are kept: it is the noise that refused them.
    clock = FakeClock()
    outcome = tuned(StandIn(clock, {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.097,)}), clock)
    assert outcome.after == "32x64_4w4s/1"


def test_what_was_fast_in_the_first_rounds_alone_is_not_kept() -> None:
    clock = FakeClock()
    # Judging, warm-up and two rounds of screening are quick; the fresh samples are not.
    lucky = (0.05,) * 4 + (0.1,)
    outcome = tuned(StandIn(clock, {"64x64_4w4s": (0.1,), "32x64_4w4s": lucky}), clock)
    assert outcome.best == "32x64_4w4s/1" and outcome.after is None


def test_a_wrong_configuration_is_never_kept_however_fast(file: Path) -> None:
    clock = FakeClock()
    seconds = {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.01,), "128x64_4w4s": (0.09,)}
    kernel = StandIn(clock, seconds, wrong=("32x64_4w4s",))
    outcome = tuned(kernel, clock)
    assert outcome.after == "128x64_4w4s/1"
    assert list(outcome.wrong) == ["32x64_4w4s/1"]
    assert kernel.calls.count("32x64_4w4s") == 1  # judged, and never timed


def test_one_that_becomes_wrong_when_it_is_timed_is_not_kept() -> None:
    clock = FakeClock()
    kernel = StandIn(clock, {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.05,)})
    launch = kernel.launch

    def later(work: Work, i: int, outs: tuple[Tensor, ...], option: Option) -> None:
        launch(work, i, outs, option)
        if kernel.calls.count("32x64_4w4s") > 3 and option.configuration == "32x64_4w4s":
            outs[0][0, 0, 0, 0] += 1.0

    kernel.launch = later  # type: ignore[method-assign]
    outcome = tuned(kernel, clock)
    assert outcome.after is None and list(outcome.wrong) == ["32x64_4w4s/1"]


def test_one_that_breaks_costs_itself_alone() -> None:
    clock = FakeClock()
    seconds = {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.01,), "128x64_4w4s": (0.09,)}
    outcome = tuned(StandIn(clock, seconds, breaks=("32x64_4w4s",)), clock)
    assert outcome.after == "128x64_4w4s/1"
    assert "out of resource" in outcome.failed["32x64_4w4s/1"]


def test_a_graph_is_not_held_against_plain_calls() -> None:
    clock = FakeClock()
    kernel = StandIn(clock, {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.01,)})
    made: list[CpuSampler] = []

    def sampler(call: Callable[[int], Any], work: Work) -> CpuSampler:
        made.append(CpuSampler(call, len(work.sets), work.mode, clock))
        if len(made) == 2:  # the other one's, in the first rounds
            made[-1].method, made[-1].note = "cuda_events", "no graph: it synchronises"
        return made[-1]

    outcome = tune_one(JOB, kernel, QUICK, samplers=sampler, clock=clock, meter=_quiet_meter)
    assert outcome.after is None and outcome.failed == {"32x64_4w4s/1": "no graph: it synchronises"}


def test_a_wrong_pick_is_a_problem_and_nothing_is_kept(file: Path) -> None:
    clock = FakeClock()
    seconds = {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.01,)}
    outcome = tuned(StandIn(clock, seconds, wrong=("64x64_4w4s",)), clock)
    assert outcome.problem is not None and "the chooser's pick" in outcome.problem
    assert not file.exists()


def test_what_wins_no_more_is_taken_out(file: Path) -> None:
    clock = FakeClock()
    tuned(StandIn(clock, {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.05,)}), clock)
    assert found() is not None
    tuned(StandIn(clock, {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.2,)}), clock, keep=False)
    assert found() is not None
    tuned(StandIn(clock, {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.2,)}), clock)
    assert found() is None and entries(file) == []


# The user's file.


def keep(
    configuration: str = "32x64_4w4s", splits: int = 1, implementation: str = "triton"
) -> None:
    one = _tuned.Tuned(configuration, splits, 1.12, 1.1, 1.15, "64x64_4w4s/1")
    _tuned.save("cpu", [(_tuned.key(implementation, *CALL, False), one)])


def test_a_changed_source_drops_the_entry(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep()
    assert found() is not None
    whole = admission.source_hash

    def other(kernel: admission.Kernel) -> str:
        return "0" * 64 if kernel.name == "conv_bn_act.triton" else whole(kernel)

    monkeypatch.setattr(admission, "source_hash", other)
    _tuned.forget()
    assert found() is None
    _tuned.save("cpu", [])  # the next tuning sweeps it out
    assert entries(file) == []


@pytest.mark.parametrize("field", ["name", "driver", "torch", "triton"])
def test_another_gpu_or_driver_or_version_is_another_table(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep()
    gpu = admission._platform.identify("cpu")._replace(**{field: "another"})
    monkeypatch.setattr(_tuned._platform, "identify", lambda device: gpu)
    _tuned.forget()
    assert found() is None


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"version": 1, "tuned": []}', '{"version": 1, "tuned": {"a": {}}}']
)
def test_a_broken_file_costs_one_warning(
    content: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        for _ in range(3):
            assert found() is None
            _tuned.forget()
    assert len(caplog.records) == 1 and "ignored" in caplog.text
    keep()  # and it is replaced by a sound one
    assert found() is not None


def test_the_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep()
    reads = []
    read = _tuned._read
    monkeypatch.setattr(_tuned, "_read", lambda path: reads.append(path) or read(path))
    for _ in range(5):
        assert found() is not None
    assert len(reads) == 1


# The choosers.


def test_triton_takes_what_was_tuned_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    work = build(SUBJECT)
    given = work.sets[0]
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    pick, others = TritonKernel().options(work)
    other = others[0]
    call = _launch.call_of("conv_bn_act", given.x, given.weight, None, *geometry)
    product = _tiles.Product(72, 64, 1, 64, 9, 4, precision=_launch.precision(torch.float32))
    assert _launch.plan_of(product, CPU, None, call).name == pick.wish.name
    assert _triton.detail(given.x, given.weight, None, geometry) is None
    keep(other.configuration, other.splits)
    plan = _launch.plan_of(product, CPU, None, call)
    assert (plan.tile.name, plan.splits) == (other.configuration, other.splits)
    assert plan.flat == other.wish.flat and "tuned on this GPU: 1.12x" in plan.why
    said = _triton.detail(given.x, given.weight, None, geometry)
    assert said is not None and said.endswith("tuned on this GPU: 1.12x")
    # One that is not admitted any more, or that cannot take the product, is passed over.
    left = frozenset(_tiles.BY_NAME) - {other.configuration}
    assert _launch.plan_of(product, CPU, left, call).tile.name != other.configuration
    keep("128x256_8w3s", 7)
    assert _launch.plan_of(product, CPU, None, call).name == pick.wish.name


def test_cuda_takes_what_was_tuned_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _cuda_plan.exists("conv_bn_act"):
        pytest.skip("the extension holds no CUDA kernels here: its chooser cannot be asked")
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: cuda_standins.H200)
    given = build(SUBJECT).sets[0]
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    operands = (given.x, given.weight, None)
    out = torch.empty(2, 64, 6, 6).contiguous(memory_format=torch.channels_last)
    problem = _cuda_plan.problem_of("conv_bn_act", operands, geometry, out)
    assert _cuda_plan.wanted(problem) == (-1, 0)
    usual = _cuda_plan.choose(problem, cuda_standins.H200, None)
    known = _cuda_plan.configurations("conv_bn_act")
    index = next(
        i
        for i, name in enumerate(known)
        if name != usual.name
        and _cuda_plan.plan(problem, cuda_standins.H200, i, 2).configuration >= 0
    )
    keep(known[index], 2, "cuda")
    assert _cuda_plan.wanted(problem) == (index, 2)
    assert "tuned on this GPU: 1.12x" in _cuda_plan.describe(problem, CPU)
    # What no extension of today holds, and what cannot take these operands, is passed over.
    for name, splits in (("no_such_tile", 1), (known[index], 31)):
        keep(name, splits, "cuda")
        assert _cuda_plan.wanted(problem) == (-1, 0)
        assert "tuned" not in _cuda_plan.describe(problem, CPU)


@pytest.mark.parametrize("op", [op for op, about in OPS.items() if about.cuda is not None])
def test_the_cuda_kernels_options_are_those_that_take_the_call(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _cuda_plan.exists(op):
        pytest.skip("the extension holds no CUDA kernels here: its chooser cannot be asked")
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: cuda_standins.H200)
    subject = Subject("kernel", op, "3x3_64_64_at14", 4, "bfloat16", "cpu")
    pick, others = CudaKernel().options(build(subject))
    names = [one.name for one in others]
    assert pick.name not in names and len(set(names)) == len(names) > 3
    assert not any(name.startswith(_cuda_plan.NARROW) for name in [pick.name, *names])
    known = _cuda_plan.configurations(op)
    assert all(known[one.wish[0]] == one.configuration for one in [pick, *others])
    assert all(one.wish[1] == one.splits >= 1 for one in [pick, *others])
    best = {name.partition("/")[0] for name in names[: len({one.configuration for one in others})]}
    assert best == {one.configuration for one in others}


def test_a_dry_run_launches_nothing(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    kernel = StandIn(FakeClock(), {"64x64_4w4s": (0.1,), "32x64_4w4s": (0.01,)})
    absent = StandIn(FakeClock(), {})
    absent.why_not = lambda subject: "not admitted"  # type: ignore[method-assign]
    first, second = tune.plans([JOB], [kernel, absent])
    assert (first["before"], first["options"]) == ("64x64_4w4s/1", ["32x64_4w4s/1"])
    assert second["problem"] == "not admitted" and not kernel.calls and not file.exists()
    command = sys.modules["resnet_fused.cli.tune"]
    monkeypatch.setattr(command, "_gpu", lambda name: "cpu")
    monkeypatch.setattr(command, "_jobs", lambda *_: [])
    monkeypatch.setattr("resnet_fused.bench.tune.plans", lambda todo: [first, second])
    run = CliRunner().invoke(cli.main, ["tune", "--dry-run"])
    assert run.exit_code == 0 and "1 others" in run.output and "not admitted" in run.output


def test_each_configuration_is_tried_before_any_is_tried_twice() -> None:
    options = [Option("a", 1, 1.0), Option("a", 2, 2.0), Option("b", 1, 5.0), Option("c", 1, 3.0)]
    assert [one.name for one in spread_out(Option("a", 1), options)] == ["a/2", "c/1", "b/1"]


def test_the_interpreters_options_hold_the_chooser_pick_once() -> None:
    pick, others = TritonKernel().options(build(SUBJECT))
    names = [one.name for one in others]
    assert pick.name not in names and len(set(names)) == len(names) > 3
    limits = _limits.limits(CPU)
    assert all(limits.shared_memory and one.wish.tile.name == one.configuration for one in others)


# The run and the command.


def test_jobs_are_the_distinct_convolutions_the_heaviest_first() -> None:
    network = get_model("resnet18")
    jobs = tune.jobs(network, "cpu", batches=[1, 2], dtypes=["float32"], ops=tune.OPS, size=64)
    keys = [job.subject.key for job in jobs]
    assert len(set(keys)) == len(keys) and all("/b1/" in k or "/b2/" in k for k in keys)
    first = [job for job in jobs if job.subject.op == "conv_bn_act" and job.subject.batch == 2]
    assert sum(len(job.layers) for job in first) == 20  # every convolution of ResNet-18
    stem = [job for job in jobs if "conv1" in job.layers]
    # The images' gradient is nobody's; a basic block is no chain; the head is at the other end.
    absent = {"conv_dgrad", "conv_bn_dgrad", "conv_bn_dgrad_end", "conv_chain", "head"}
    assert any(job.subject.op == "head" for job in jobs)
    assert {job.subject.op for job in stem} == set(tune.OPS) - absent
    third = key_of(build(dataclasses.replace(first[0].subject, batch=1)), "triton")[-1]
    assert third is ("_add" in first[0].subject.name)


def test_a_run_ends_with_its_time_and_with_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, kernel = FakeClock(), StandIn(FakeClock(), {})
    monkeypatch.setattr(tune.time, "monotonic", clock)

    def one(job: Job, kernel: Any, settings: Settings, *, keep: bool) -> tune.Outcome:
        clock.now += 10
        return tune.Outcome(job.subject.key, job.layers, kernel.name)

    records: list[dict[str, Any]] = []
    record = tune.tune(
        [JOB] * 5, Settings(total_s=25), kernels=[kernel], one=one,
        report=lambda found: records.append(json.loads(json.dumps(found))),
    )  # fmt: skip
    assert (record["reached"], record["of"], record["complete"]) == (3, 5, False)
    assert [one["reached"] for one in records] == [1, 2, 3, 3]

    def lost(*_: Any, **__: Any) -> tune.Outcome:
        raise DeviceLostError("the GPU is lost")

    record = tune.tune([JOB] * 5, kernels=[kernel], one=lost)
    assert record["stopped"] == "the GPU is lost" and record["reached"] == 0
    kernel.why_not = lambda subject: "no such kernel"  # type: ignore[method-assign]
    record = tune.tune([JOB], kernels=[kernel])
    assert record["omitted"] == {"conv_bn_act.triton float32": "no such kernel"}


def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (
        ([], "there is nothing to tune here"),
        (["--dry-run"], "there is nothing to tune here"),
        (["--device", "cpu"], "accepted: cuda"),
        (["--batch", "none"], "--batch"),
        (["--budget-min", "0"], "--budget-min"),
    ):
        run = CliRunner().invoke(cli.main, ["tune", *arguments])
        assert run.exit_code == 2 and said in run.output, run.output
        assert run.output.count("\n") == 1 or "Usage" in run.output


def test_forget_removes_what_was_kept(file: Path) -> None:
    keep()
    run = CliRunner().invoke(cli.main, ["tune", "--forget", "--dry-run"])
    assert run.exit_code == 0 and "1 entries would be removed" in run.output and file.exists()
    run = CliRunner().invoke(cli.main, ["tune", "--forget", "--json"])
    assert json.loads(run.output) == {"file": str(file), "entries": 1, "removed": True}
    assert not file.exists() and found() is None
    assert CliRunner().invoke(cli.main, ["tune", "--forget"]).exit_code == 0


def test_the_command_prints_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    command = sys.modules["resnet_fused.cli.tune"]  # the package holds the command by that name
    gain = {"median": 1.25, "low": 1.2, "high": 1.3}
    outcomes = iter([
        tune.Outcome("a", (), "triton", "x/1", "y/2", gain, "y/2", 0.01, 3),
        tune.Outcome("b", (), "triton", "x/1", None, gain, "y/2", 0.4, 3),
        tune.Outcome("c", (), "cuda", "x/1", tried=4, wrong={"z/1": "error 3x the bound"}),
    ])  # fmt: skip

    monkeypatch.setattr(command, "_gpu", lambda name: "cpu")
    monkeypatch.setattr(command, "_jobs", lambda *_: [])
    whole = tune.tune
    monkeypatch.setattr(
        "resnet_fused.bench.tune.tune",
        lambda todo, settings, **_: whole(
            [JOB] * 3, settings, kernels=[StandIn(FakeClock(), {})],
            one=lambda *_, **__: next(outcomes),
        ),
    )  # fmt: skip
    run = CliRunner().invoke(cli.main, ["tune"])
    assert run.exit_code == 1, run.output  # one configuration was wrong
    assert "1.250x (1.200 .. 1.300)" in run.output and "within the noise of 40.0%" in run.output
    assert "WRONG c, cuda z/1: error 3x the bound" in run.output
    assert "3 of 3 convolutions, 1 changed" in run.output
