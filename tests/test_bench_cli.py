"""`resnet-fused bench`: what it refuses, what it shows, and when it exits with 1."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import random
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_records
import command
import pytest
import torch
from click.testing import CliRunner

from resnet_fused.bench import ceilings, load, model, peers, record, runner, timing
from resnet_fused.bench import subject as subjects
from resnet_fused.bench.peers import Peer, Prepared
from resnet_fused.bench.sampler import CpuSampler
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.work import Work
from resnet_fused.cli import main
from resnet_fused.report import bench_page, plots

ROOT = Path(__file__).resolve().parent.parent


run = functools.partial(command.run, "bench")
as_json = functools.partial(command.as_json, "bench")


@pytest.fixture
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are refused before anything is timed."""

    def timed(*_: object, **__: object) -> None:
        raise AssertionError("something was timed")

    # Modules that are imported already: one that came while a name is replaced would keep that.
    for module in (model, runner, timing):
        monkeypatch.setattr(module, "interleaved", timed)
    monkeypatch.setattr(ceilings, "measure", timed)


def test_the_options_know_what_subjects_know() -> None:
    bench: Any = sys.modules["resnet_fused.cli.bench"]  # the name is the command's, too
    assert bench.LEVELS == subjects.LEVELS
    assert set(bench.OPS) == set(subjects.KERNEL_OPS)
    assert bench.MODES == subjects.MODEL_OPS
    assert bench.DTYPES == subjects.DTYPES
    assert set(bench.QUICK) <= set(peers.PEERS)


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--level", "layer"], ["--level", "'layer'", "kernel"]),
        (["--level", "kernel", "--op", "conv"], ["--op", "'conv'", "conv_dgrad"]),
        (["--op", "bn_act"], ["--op: is for --level kernel, and --level is model"]),
        (["--level", "kernel", "--mode", "training"], ["--mode: is for --level block or model"]),
        (["--mode", "trained"], ["--mode", "'trained'", "training_frozen"]),
        (["--peers", "eager,tensorflow"], ["--peers: there is no 'tensorflow'", "openvino"]),
        (["--peers", ""], ["--peers: there is no ''"]),
        (["--only", "conv9"], ["--only: no key holds conv9", "model/inference/resnet50/b1"]),
        (["--budget-min", "0"], ["--budget-min", "0"]),
        (["--budget-min", "soon"], ["--budget-min", "'soon'"]),
        (["resnet51", "--level", "model"], ["MODEL", "'resnet51'", "did you mean resnet50"]),
        (["timm:resnet50", "--level", "block"], ["MODEL: of timm:resnet50 only", "resnet50, "]),
        (["vgg16", "--mode", "training"], ["MODEL: of vgg16 only", "resnet50, "]),
        (["--level", "block", "--device", "cuda:7"], ["--device", "'cuda:7'"]),
        (["--gate", "5%"], ["--gate: goes with --compare A B alone"]),
        (["--force-compare"], ["--force-compare: goes with --compare"]),
        (["--compare", "a.json"], ["--compare", "2 arguments"]),
        (["--compare", "a.json", "b.json"], ["a.json: cannot be read (No such file"]),
        (["--compare", "a", "b", "--batch", "1"], ["times nothing, so --batch cannot go"]),
        (["resnet18", "--compare", "a", "b"], ["times nothing, so MODEL cannot go with it"]),
        (["--compare", "a", "b", "--gate", "5"], ["--gate", "'5'", "5%, or 0.05"]),
        (["--compare", "a", "b", "--gate", "-1%"], ["--gate", "'-1%'"]),
        (["--compare", "a", "b", "--gate", "nan"], ["--gate", "'nan'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_before_anything_is_timed(arguments: list[str], parts: list[str]) -> None:
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize("option", ["--output", "--html", "--png-dir"])
def test_where_nothing_can_be_written(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("--level", "model", option, tmp_path / "file" / "x", code=2)
    assert result.stderr.startswith(f"error: {option}: cannot make folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("nothing_is_timed")
def test_a_folder_is_no_file_and_two_files_are_two(tmp_path: Path) -> None:
    assert "is a folder; give a file" in run("--output", tmp_path, code=2).stderr
    twice = run("--html", tmp_path / "x", "--output", tmp_path / "x", code=2).stderr
    assert twice.startswith("error: --output and --html: both name")


@pytest.mark.usefixtures("nothing_is_timed")
def test_a_page_needs_what_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else real(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", without)
    result = run("--level", "model", "--html", tmp_path / "x.html", code=2)
    assert result.stderr.startswith("error: --html: this needs matplotlib")


def write(path: Path, **changes: Any) -> Path:
    """An example record of a CPU's models; `slow` slows our variant in all of them."""
    slow = changes.pop("slow", 1.0)
    made = bench_records.example(
        0, device="cpu", levels=("model",), change=lambda about: {"fused": slow}
    )
    path.write_text(json.dumps(made | changes))
    return path


def test_compare_says_what_became_slower_and_the_gate_bites(tmp_path: Path) -> None:
    old, same = write(tmp_path / "old.json"), write(tmp_path / "same.json")
    slow = write(tmp_path / "slow.json", slow=1.3)
    assert "gate: passed" in run("--compare", old, same, "--gate", "5%").stdout
    result = run("--compare", old, slow, "--gate", "5%", code=1)
    assert "gate: FAILED at 5.0%" in result.stdout
    assert "model/inference/resnet50/b8/float32: fused is at least" in result.stdout
    run("--compare", old, slow)  # without a gate a comparison fails nothing
    run("--compare", old, slow, "--gate", "60%")
    run("--compare", old, slow, "--gate", "0.6")
    back = run("--compare", slow, old, "--gate", "0%").stdout
    assert len(re.findall(r"fused .* faster\s*$", back, re.MULTILINE)) == 4


def test_compare_as_json(tmp_path: Path) -> None:
    old, slow = write(tmp_path / "old.json"), write(tmp_path / "slow.json", slow=1.3)
    found = as_json("--compare", old, slow, "--gate", "5%", code=1)
    assert found["gate"]["ok"] is False
    verdicts = {c["verdict"] for c in found["changes"] if c["variant"] == "fused"}
    assert verdicts == {"slower"}
    assert as_json("--compare", old, slow)["gate"] is None


def test_compare_takes_rows_by_their_keys(tmp_path: Path) -> None:
    old, slow = write(tmp_path / "old.json"), write(tmp_path / "slow.json", slow=1.3)
    found = as_json("--compare", old, slow, "--only", "/b8/,nothing")
    assert {c["key"].split("/")[3] for c in found["changes"]} == {"b8"}
    assert "no row of either record holds nope" in (
        run("--compare", old, slow, "--only", "nope", code=2).stderr
    )


def test_compare_knows_machines(tmp_path: Path) -> None:
    machine = {**bench_records.example(levels=(), device="cpu")["machine"], "cpu": "Elsewhere"}
    old = write(tmp_path / "old.json")
    other = write(tmp_path / "other.json", machine=machine, slow=1.3)
    said = run("--compare", old, other, "--gate", "5%", code=1).stdout
    assert "other machine, CPU: Example processor against Elsewhere" in said
    assert "nothing could be judged" in said
    forced = run("--compare", old, other, "--gate", "5%", "--force-compare", code=1).stdout
    assert "fused is at least" in forced


def test_compare_reads_the_committed_records() -> None:
    results = ROOT / "benchmarks" / "results" / "cpu"
    file = results / "resnet50-float32.json"
    said = run("--compare", file, file, "--gate", "0%").stdout
    assert "model/inference/resnet50/b8/float32" in said and "the same within" in said


class OwnClock:
    """What calls pretend to take, give or take 1%: no neighbour can lengthen a sample."""

    def __init__(self) -> None:
        self._now, self._random = 0.0, random.Random(0)

    def __call__(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds * self._random.uniform(0.99, 1.01)


class Planted:
    """A peer with a fault: each call does something more, or gives something else."""

    isolated = False

    def __init__(
        self, inner: Peer, more: Callable[[], object] = lambda: None, off: float = 0.0
    ) -> None:
        self.name, self.limit_s = inner.name, inner.limit_s
        self._inner, self._more, self._off = inner, more, off

    def why_not(self, subject: Subject) -> str | None:
        return self._inner.why_not(subject)

    def prepare(self, work: Work) -> Prepared:
        made = self._inner.prepare(work)

        def call(i: int) -> Any:
            self._more()
            return made.call(i) + self._off

        return Prepared(call, made.kernels, made.close)


TINY = ["resnet18", "--level", "block", "--only", "layer1.0", "--batch", "1", "--size", "32",
        "--rounds", "7", "--peers", "none"]  # fmt: skip


OURS_TWICE = ["fused", "fused_again"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> OwnClock:
    """Real runs that read the load as nothing, on a clock that only the variants' calls move."""
    readings, own = iter(range(10**6)), OwnClock()

    def idle() -> load.CpuTimes:
        step = next(readings)
        return load.CpuTimes(10.0 * step, 18.1 * step, 18.0 * step)

    monkeypatch.setattr(load.LoadMeter.__init__, "__defaults__", (2, idle))
    monkeypatch.setattr(CpuSampler.__init__, "__defaults__", (contextlib.nullcontext, own))
    monkeypatch.setattr(runner.Settings, "sample_s", lambda self, device: 0.02)
    rates = ceilings.Ceilings(1e11, 1e10, "float32")
    monkeypatch.setattr(ceilings, "measure", lambda *_: rates)
    for name, seconds in (("eager", 0.012), ("fused", 0.01)):
        timed = Planted(peers.PEERS[name], more=functools.partial(own.sleep, seconds))
        monkeypatch.setitem(peers.PEERS, name, timed)
    return own


def test_planted_slowness_fails_the_gate_and_a_second_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: OwnClock
) -> None:
    """From the peer to the exit code."""
    before, again, after = (tmp_path / f"{name}.json" for name in ("before", "again", "after"))
    first = as_json(*TINY, "--output", before)
    record.validate(first)
    assert json.loads(before.read_text()) == first
    assert first["command"] == (
        "resnet-fused bench resnet18 --level block --batch 1 --peers none --only layer1.0 "
        f"--rounds 7 --size 32 --output {before} --json"
    )
    run(*TINY, "--output", again)
    slow = Planted(peers.PEERS["fused"], more=lambda: clock.sleep(0.005))
    monkeypatch.setitem(peers.PEERS, "fused", slow)
    run(*TINY, "--output", after)
    gate = ["--gate", "5%"]
    assert "gate: passed" in run("--compare", before, again, *gate).stdout
    said = run("--compare", before, after, *gate, code=1).stdout
    assert "gate: FAILED" in said and "fused is at least" in said
    assert "faster" in run("--compare", after, before, *gate).stdout


@pytest.mark.usefixtures("clock")
def test_what_is_wrong_has_no_time_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "wrong.json"
    monkeypatch.setitem(peers.PEERS, "fused", Planted(peers.PEERS["fused"], off=0.5))
    said = run(*TINY, "--output", file, code=1).stdout
    assert "fused is WRONG and has no time" in said
    assert "WRONG: block/inference/resnet18.layer1.0/b1/float32/32px: fused" in said
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["variants"]["fused"]) == {"wrong"}
    assert "samples_s" in row["variants"]["eager"]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("after", [0, 9], ids=["preparing", "timing"])
def test_what_crashes_of_ours_is_named_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls, file = itertools.count(), tmp_path / "crashed.json"

    def crash() -> None:
        if next(calls) >= after:
            raise RuntimeError("an illegal instruction")

    monkeypatch.setitem(peers.PEERS, "fused", Planted(peers.PEERS["fused"], more=crash))
    said = run(*TINY, "--output", file, code=1).stdout
    key = "block/inference/resnet18.layer1.0/b1/float32/32px"
    assert said.splitlines()[-2:] == [f"CRASHED: {key}: {name}" for name in OURS_TWICE]
    made = json.loads(file.read_text())
    record.validate(made)
    (row,) = made["rows"]
    assert sorted(row["crashed"]) == OURS_TWICE and "fused" not in row["variants"]
    what = "fused crashed and has no time, the call failed: RuntimeError: an illegal instruction"
    assert what in said and what in row["verdicts"]
    assert "samples_s" in row["variants"]["eager"]


@pytest.mark.usefixtures("clock")
def test_a_peers_crash_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setitem(peers.PEERS, "onednn", Planted(peers.PEERS["onednn"], more=crash))
    (row,) = as_json(*TINY[:-1], "onednn")["rows"]
    assert row["crashed"] == ["onednn"] and "illegal" in row["omitted"]["onednn"]
    assert "samples_s" in row["variants"]["fused"]
    assert not any("crashed" in sentence for sentence in row["verdicts"])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A runner that measures nothing and remembers what it was asked for."""
    asked: dict[str, Any] = {}

    def bench(chosen: Any, taking: Any, settings: Any = None, **more: Any) -> dict[str, Any]:
        asked.update(subjects=chosen, peers=[p.name for p in taking], settings=settings, **more)
        made = bench_records.example(0, device="cpu", levels=("model",))
        if more["report"]:
            more["report"](made | {"complete": False})
        return made

    monkeypatch.setattr(runner, "bench", bench)
    return asked


def test_options_reach_the_runner(pretended: dict[str, Any]) -> None:
    run("resnet18", "--level", "model,block", "--mode", "inference,training", "--dtype", "bfloat16",
        "--only", "model/,stem", "--peers", "openvino, timm", "--rounds", "9", "--at-least", "1.2",
        "--budget-min", "2", "--size", "64")  # fmt: skip
    keys = [subject.key for subject in pretended["subjects"]]
    assert keys == [
        f"{what}/b{batch}/bfloat16/64px"
        for what in ("model/inference/resnet18", "model/training/resnet18",
                     "block/inference/resnet18.stem", "block/training/resnet18.stem")
        for batch in (1, 8)
    ]  # fmt: skip
    assert pretended["peers"] == ["eager", "fused", "triton", "cuda", "openvino", "timm"]
    settings = pretended["settings"]
    assert (settings.rounds, settings.at_least, settings.total_s) == (9, 1.2, 120.0)
    assert settings.subject_s == pytest.approx(0.3 * 120)  # one of eight rows


def test_one_row_may_take_the_whole_budget(pretended: dict[str, Any]) -> None:
    run("resnet18", "--level", "model", "--batch", "1", "--budget-min", "2")
    assert pretended["settings"].subject_s == pretended["settings"].total_s == 120.0


def test_by_default_everybody_is_asked_without_a_limit(pretended: dict[str, Any]) -> None:
    run("resnet18", "--level", "model")
    assert pretended["peers"] == list(peers.PEERS)
    assert [s.batch for s in pretended["subjects"]] == [1, 8]
    assert pretended["settings"] == runner.Settings()


def test_alone_it_asks_the_quick_peers_of_any_network(pretended: dict[str, Any]) -> None:
    for name, key in (
        ("resnet18", "resnet18"),
        ("rf:resnet18", "resnet18"),
        ("timm:resnet18", "timm:resnet18"),
        ("mobilenet_v2", "mobilenet_v2"),
    ):
        run(name, "--size", "64")  # fmt: skip
        assert pretended["peers"] == ["eager", "fused", "onednn"]
        keys = [subject.key for subject in pretended["subjects"]]
        assert keys == [f"model/inference/{key}/b{n}/float32/64px" for n in (1, 8)]
    run("timm:resnet18", "--level", "model")
    assert pretended["peers"] == list(peers.PEERS)
    run("resnet18", "--peers", "openvino")
    assert pretended["peers"] == ["eager", "fused", "triton", "cuda", "openvino"]


def test_another_gpu_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, pretended: dict[str, Any]
) -> None:
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    run("resnet18", "--device", "cuda:1", "--batch", "1")
    assert made_current == [torch.device("cuda:1")]
    assert [subject.device for subject in pretended["subjects"]] == ["cuda"]


@pytest.mark.usefixtures("pretended")
def test_record_page_and_pictures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page and the pictures show is test_bench_page's and test_bench_plots' affair."""

    def nothing(_: object) -> bytes:
        raise plots.NothingToDrawError("no layer has a time")

    monkeypatch.setattr(bench_page, "render", lambda made: f"<!doctype html>{made['kind']}")
    for name in ("roofline", "peers", "memory"):
        monkeypatch.setattr(plots, name, lambda made: b"png")
    monkeypatch.setattr(plots, "waterfall", nothing)
    where = [tmp_path / "a" / "r.json", tmp_path / "b" / "r.html", tmp_path / "pictures"]
    said = run("--level", "model", "--output", where[0], "--html", where[1], "--png-dir", where[2])
    record.validate(json.loads(where[0].read_text()))
    assert json.loads(where[0].read_text())["complete"] is True
    assert where[1].read_text() == "<!doctype html>bench"
    drawn = sorted(path.name for path in where[2].iterdir())
    assert drawn == ["memory.png", "peers.png", "roofline.png"]
    assert "no waterfall picture: no layer has a time" in said.stdout
    for path in (*where[:2], *where[2].iterdir()):
        assert str(path) in said.stdout
    assert "machine: Example processor, 16 cores, 8 threads" in said.stdout
    assert "model/inference/resnet50/b8/float32, noise" in said.stdout
    assert "without tensorrt: not installed" in said.stdout


def test_the_make_target_asks_for_the_cpus_report(
    tmp_path: Path, pretended: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three levels of ResNet-50 at batch 1 and 8, beside the four, within ten minutes."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    values = dict(re.findall(r"^(BENCH_\w+) \?= (\S+)$", makefile, re.MULTILINE))
    (line,) = re.findall(
        r"^bench: .*\n\t\$\(PY\) -m resnet_fused bench (.*)$", makefile, re.MULTILINE
    )
    typed = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], line)
    monkeypatch.chdir(tmp_path)  # it writes into build/bench
    monkeypatch.setattr("resnet_fused.cli._bench_output.write_outputs", lambda *_: [])
    run(*shlex.split(typed))
    chosen = pretended["subjects"]
    assert {(s.level, s.batch) for s in chosen} == {
        (level, batch) for level in ("kernel", "block", "model") for batch in (1, 8)
    }
    assert chosen[0].level == "model"  # the most telling first
    assert {s.name.partition(".")[0] for s in chosen if s.level != "kernel"} == {"resnet50"}
    assert {"eager", "inductor", "onnxruntime", "openvino"} <= set(pretended["peers"])
    assert pretended["settings"].total_s <= 540  # and a minute for the pictures


def test_an_interrupted_run_leaves_what_was_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended: dict[str, Any]
) -> None:
    file, real = tmp_path / "r.json", runner.bench

    def interrupted(*given: Any, **more: Any) -> None:
        real(*given, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "bench", interrupted)
    result = CliRunner().invoke(main, ["bench", "--level", "model", "--output", str(file)])
    assert result.exit_code == 130
    left = json.loads(file.read_text())
    record.validate(left)
    assert left["complete"] is False


def test_what_was_not_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench_records.example(0, device="cpu", levels=("model",))["rows"]
    cut = bench_records.record(rows[:1], device="cpu", of=4)
    monkeypatch.setattr(
        runner, "bench", lambda *_, **__: cut | {"failed": {"model/x": "no memory"}}
    )
    said = run("--level", "model").stdout
    assert "not measured: model/x: no memory" in said
    assert "not complete: 1 of 4 rows were reached" in said
    monkeypatch.setattr(runner, "bench", lambda *_, **__: cut | {"stopped": "the GPU is lost"})
    assert "STOPPED: the GPU is lost" in run("--level", "model", code=1).stdout
    assert as_json("--level", "model", code=1)["stopped"] == "the GPU is lost"


def test_list_peers_says_who_joins_and_why_not() -> None:
    said = run("resnet18", "--level", "model", "--list-peers").stdout
    assert re.search(r"^  eager +joins$", said, re.MULTILINE)
    assert re.search(r"^  cuda +left out: for a GPU", said, re.MULTILINE)
    found = as_json("resnet18", "--level", "model", "--list-peers", "--peers", "tensorrt")
    (why,) = found.values()
    assert why["fused"] is None and "GPU" in why["tensorrt"]
