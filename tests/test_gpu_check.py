"""gpu-check without a GPU: its stages in Triton's interpreter, tiny, and stand-ins for CUDA."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu import (  # noqa: E402
    plan,
    pool,
    predicted,
    record,
    sanitizer,
    speed,
    worker,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
STEPS = """
import os, signal, time

def right(device, **arguments):
    return {"ok": True, "device": device, **arguments}

def wrong(device):
    return {"ok": False, "error": "3 of 8 elements are wrong"}

def raises(device):
    raise RuntimeError("out of resource: shared memory")

def lacks(device):
    raise RuntimeError("CUDA out of memory")

def crashes(device):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(device):
    time.sleep(600)

def wrapped(device):
    from torch._library.triton import is_wrap_triton_enabled
    return {"ok": is_wrap_triton_enabled()}

def check(configuration, device):
    globals()[configuration](device)
    if configuration == "wrong":
        raise ArithmeticError("3 of 8 elements are wrong")
"""


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """A module of steps that worker processes can import."""
    (tmp_path / "stand_in_steps.py").write_text(STEPS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in_steps"


def content_of(folder: Path) -> dict:
    return json.loads((folder / "gpu-check.json").read_text())


class Now:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


# The clock and the record.


def test_a_stage_gets_its_share_and_what_others_left():
    now = Now()
    clock = record.Clock(8, now)
    shares = {"a": 1.0, "b": 3.0}
    assert clock.left == 460  # 20 s before the 8 minutes are over
    assert clock.deadline("a", shares) == 100 + 115
    now.time += 15
    assert clock.deadline("b", shares) == 100 + 460
    now.time += 1000
    assert clock.left == 0


def test_the_record_is_whole_after_every_step(tmp_path, monkeypatch):
    lines: list[str] = []
    file = tmp_path / "new" / "gpu-check.json"
    made = record.Record(file, {"commit": "abc"}, record.Clock(1), lines.append)
    made.begin("exact", 3)
    made.step("one", {"ok": True, "worst": float("nan"), "shape": (1, 2)})
    stage = content_of(file.parent)["stages"]["exact"]
    assert (stage["reached"], stage["of"], stage["failed"]) == (1, 3, 0)
    assert stage["steps"][0]["worst"] == "nan"
    made.step("two", {"ok": None, "skipped": "no such device"})
    made.step("three", {"ok": False, "error": "wrong\nresult"})
    made.end()
    made.finish()
    content = content_of(file.parent)
    assert content["ok"] is False and content["complete"] is True
    assert content["stages"]["exact"]["skipped"] == 1
    assert any("FAIL three: wrong result" in line for line in lines)
    assert [path.name for path in file.parent.iterdir()] == ["gpu-check.json"]

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        made.fail("something else")
    assert content_of(file.parent) == content
    assert [path.name for path in file.parent.iterdir()] == ["gpu-check.json"]


def test_a_stage_that_is_cut_says_so(tmp_path):
    made = record.Record(tmp_path / "r.json", {}, record.Clock(1), lambda line: None)
    made.begin("bounds", 5)
    made.step("one", {"ok": True})
    made.end("its time was over")
    made.finish()
    stage = made.content["stages"]["bounds"]
    assert (stage["reached"], stage["of"], stage["cut"]) == (1, 5, "its time was over")
    assert made.content["complete"] is False and made.ok


# Worker processes.


def test_what_a_step_does_to_its_process_costs_that_step(steps):
    names = ("right", "crashes", "wrong", "hangs", "raises", "lacks", "right")
    tasks = [
        pool.Task(f"{name}{number}", f"{steps}:{name}", seconds=1.5)
        for number, name in enumerate(names)
    ]
    found = {}
    with pool.Pool(2, "cpu", time.monotonic() + 100) as workers:
        count = workers.run(
            tasks, time.monotonic() + 60, lambda task, one: found.update({task.name: one})
        )
        # A deadline drops what is under way, whose result nobody knows, and says what that was.
        start = time.monotonic()
        late = [pool.Task("hangs", f"{steps}:hangs")] * 3
        assert workers.run(late, start + 1, lambda task, one: pytest.fail(task.name)) == 0
        assert time.monotonic() - start < 10
        last = [pool.Task("last", f"{steps}:hangs", seconds=600.0)]
        for _ in range(60):  # until a fresh process is ready to take it
            workers.run(last, time.monotonic() + 1, lambda task, one: pytest.fail(task.name))
            if workers.why_cut().startswith("its time was over; under way: last ("):
                break
        else:
            pytest.fail(workers.why_cut())
        workers.run([], time.monotonic() + 1, lambda task, one: None)
        assert workers.why_cut() == "its time was over"
    assert count == len(names) == len(found)
    assert found["right0"]["ok"] and found["right6"]["ok"]
    assert "SIGSEGV" in found["crashes1"]["error"] and found["crashes1"]["ok"] is False
    assert found["wrong2"]["error"] == "3 of 8 elements are wrong"
    assert "no result within 1.5 s" in found["hangs3"]["error"]
    assert "out of resource" in found["raises4"]["error"]
    assert found["lacks5"]["ok"] is None and "out of memory" in found["lacks5"]["skipped"]


def test_a_step_launches_kernels_directly(steps, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert worker.call(f"{steps}:wrapped", "cpu", {})["ok"] is False
    assert importlib.import_module(steps).wrapped("cpu")["ok"] is True


def test_workers_that_cannot_start_end_the_check(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with (
        pool.Pool(1, "cpu", time.monotonic() + 30) as workers,
        pytest.raises(pool.PoolError, match="exit code 1"),
    ):
        workers.run([pool.Task("a", "b:c")], time.monotonic() + 20, lambda task, one: None)


# The command.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "none"], "accepted are 0.1 to 600 minutes"),
        (["--minutes", "0"], "accepted are 0.1 to 600 minutes"),
        (["--stages", "g"], "accepted are environment, exact"),
        (["--processes", "0"], "accepted are 1 to 64"),
        (["--device", "tpu"], "invalid choice"),
        (["--what"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_no_gpu_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: torch") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_stages_by_letter_and_by_name():
    assert gpu_check.parse(["--stages", "c,a"]).stages == ("environment", "bounds")
    assert gpu_check.parse(["--stages", "speed"]).stages == ("environment", "speed")
    assert gpu_check.parse([]).stages == gpu_check.STAGES


def test_make_knows_it():
    # Not what a make that runs these tests hands on.
    clean = {k: v for k, v in os.environ.items() if k != "ARCHS" and not k.startswith("M")}
    made = subprocess.run(
        ["make", "-n", "gpu-check", "PYTHON=python9", "MINUTES=5", "OUT=there", "BUILD=1"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=clean,
    ).stdout  # fmt: skip
    words = " ".join(made.replace("\\\n", " ").split())
    assert "python9 benchmarks/gpu_check.py --minutes 5 --output there --build" in words
    assert "env -u ARCHS" in words  # its long default is for wheels


def fake_kernel(steps: str, *configurations: str, **more) -> dict:
    return {
        "op": "standin", "implementation": "triton", "configurations": list(configurations),
        "hash": "0" * 64, "check": f"{steps}:check", "problem": None, **more,
    }  # fmt: skip


def pretend(monkeypatch, *kernels: dict) -> None:
    """An environment stage that costs nothing."""

    def environment_stage(self, until):
        self.kernels, self.arch = list(kernels), "sm_90"
        self.record.begin("environment", 0)
        self.record.end()

    monkeypatch.setattr(gpu_check.Check, "environment", environment_stage)


def test_a_configuration_that_fails_is_not_admitted(steps, monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, fake_kernel(steps, "right", "wrong", "crashes", "lacks"))
    arguments = ["--device", "cpu", "--stages", "exact", "--minutes", "1"]
    assert gpu_check.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    content = content_of(tmp_path / "out")
    entries = {one["configuration"]: one for one in content["admission"]}
    assert {name: one["ok"] for name, one in entries.items()} == {
        "right": True, "wrong": False, "crashes": False,
    }  # fmt: skip
    assert "SIGSEGV" in entries["crashes"]["error"] and entries["right"]["arch"] == "sm_90"
    assert content["ok"] is False and content["complete"] is True
    assert content["stages"]["exact"]["failed"] == 2
    assert "2 steps failed" in capsys.readouterr().out


def test_the_time_is_kept(steps, monkeypatch, tmp_path):
    pretend(monkeypatch)
    slow = [pool.Task(f"hangs{number}", f"{steps}:hangs") for number in range(5)]
    monkeypatch.setattr(plan, "bounds", lambda *where: slow)
    start = time.monotonic()
    arguments = ["--device", "cpu", "--stages", "bounds,network", "--minutes", "0.1"]
    assert gpu_check.main([*arguments, "--output", str(tmp_path)]) == 0
    assert time.monotonic() - start < 6 + 3  # and what ending the processes takes
    stages = content_of(tmp_path)["stages"]
    assert (stages["bounds"]["reached"], stages["bounds"]["of"]) == (0, 5)
    assert stages["bounds"]["cut"] and content_of(tmp_path)["complete"] is False


def test_the_watchdog_ends_what_nothing_else_ends(monkeypatch, tmp_path):
    ended: list[int] = []
    monkeypatch.setattr(gpu_check.os, "_exit", ended.append)
    clock = record.Clock(8, started=time.monotonic() - 462)
    made = record.Record(tmp_path / "r.json", {}, clock, lambda line: None)
    timer = gpu_check._watch(types.SimpleNamespace(close=lambda: None), made, clock)
    timer.join(10)
    assert ended == [0] and "watchdog" in json.loads((tmp_path / "r.json").read_text())


# Half a minute of work. The check ends by itself before they are over and says what it cut, so that
# a machine with much else to do makes this test fail for that reason, if at all.
MINUTES = 6
SANITIZER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    --tool) tool=$2; shift 2;;
    --report-api-errors|--print-limit) shift 2;;
    *) break;;
  esac
done
"$@"; code=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $code
"""


@pytest.mark.slow
@needs_triton
def test_every_stage_runs_and_what_it_writes_is_admitted(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    row = {"layer": "1x1_256_64_at56", "batch": 1, "us": 3.5}
    (tmp_path / "predictions.json").write_text(json.dumps({"layers": [row]}))
    only = "bn_act.triton,head,stream,memcheck,1x1_256_64_at56@1,frozen@2,inference@1 graph"
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", "cpu",
            "--minutes", str(MINUTES), "--output", str(tmp_path), "--only", only,
            "--sanitizer", str(tool), "--commit", "abc",
            "--predictions", str(tmp_path / "predictions.json"),
        ],
        capture_output=True, text=True, timeout=60 * MINUTES, check=False,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = content_of(tmp_path)
    assert content["schema"] == 1 and content["kind"] == "gpu-check" and content["ok"]
    cut = {name: stage["cut"] for name, stage in content["stages"].items() if stage["cut"]}
    assert content["complete"] and content["commit"] == "abc", f"on this machine: {cut}"
    assert list(content["stages"]) == list(gpu_check.STAGES)
    steps = {name: stage["steps"] for name, stage in content["stages"].items()}
    assert all(steps.values()), {name: len(found) for name, found in steps.items()}
    assert steps["sanitizer"][0]["passed"] == 2 and steps["sanitizer"][0]["total"] == 0
    timed = steps["speed"][-1]
    found = timed["predicted"]["ours"]
    assert (found["implementation"], found["us"]) == ("triton", 3.5)
    assert set(timed["us"]) >= {"ours", "ours_again", "eager"}
    assert timed["ratios"]["over_eager"]["low"] <= timed["ratios"]["over_eager"]["high"]
    assert {"fused", "frozen"} <= steps["network"][0]["images_per_s"].keys()
    assert len(done.stdout) < 12_000
    entries = {entry["op"]: entry for entry in content["admission"]}
    assert entries.keys() == {"bn_act", "head"} and all(one["ok"] for one in entries.values())
    assert entries["bn_act"]["configuration"] == "4096_4w"
    assert list(entries["head"]["timings"]) == ["48_10_at4@1"]
    spec = importlib.util.spec_from_file_location("admit", ROOT / "tools" / "admit.py")
    admit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(admit)
    shipped = tmp_path / "admitted.json"
    assert admit.main([str(tmp_path / "gpu-check.json"), "--output", str(shipped)]) == 0
    assert {one["op"] for one in json.loads(shipped.read_text())["records"]} == entries.keys()


def test_random_data_can_take_an_admission_back(tmp_path):
    made = record.Record(tmp_path / "r.json", {}, record.Clock(1), lambda line: None)
    options = gpu_check.parse(["--device", "cpu"])
    check = gpu_check.Check(options, record.Clock(1), made, "cpu", {})
    entry = {"ok": True, "timings": {}}
    check._entries["conv_bn_act", "triton", "64x64_4w4s"] = entry
    about = {"op": "conv_bn_act", "layer": "1x1@256"}
    task = pool.Task("conv_bn_act bf16 stem", "", about=about)
    timed = {"ok": True, "configuration": "64x64_4w4s", "us": {"ours": {"us": 12.346}}}
    check._note_timings(task, timed)
    assert entry["timings"] == {"1x1@256": 12.35}
    other = {"ok": True, "timings": {}}
    check._entries["conv_bn_act", "cuda", "64x64_4w4s"] = other
    us = {"cuda": {"us": 9.0}, "cuda 64x64_4w4s": {"us": 8.0}}
    check._note_timings(task, timed | {"us": us, "cuda_configuration": "128x64_4w4s"})
    assert other["timings"] == {"1x1@256": 8.0} and entry["timings"] == {"1x1@256": 12.35}
    check._blame(task, {"ok": False, "configuration": "other", "error": "beyond"})
    assert entry["ok"]
    check._blame(task, {"ok": False, "configuration": "64x64_4w4s", "error": "beyond"})
    assert entry["ok"] is False and "stem: beyond" in entry["error"] and other["ok"]
    task.about["implementation"] = "cuda"
    check._blame(task, {"ok": False, "configuration": "64x64_4w4s", "error": "beyond"})
    assert other["ok"] is False


def test_predictions_that_cannot_be_read_cost_a_line(tmp_path, capsys):
    file = tmp_path / "predictions.json"
    assert predicted.read(file, gpu_check.say) == {} and not capsys.readouterr().out
    for content in ("{", "[]", '{"layers": [1]}'):
        file.write_text(content)
        assert predicted.read(file, gpu_check.say) == {}
        assert capsys.readouterr().out.startswith("no predictions: ")


# The lists of steps.


def test_a_kernel_that_hangs_leaves_its_stage_time_for_others(steps):
    """On integers and on random data; what Triton compiles first may take longer."""
    kinds = [fake_kernel(steps, "a"), fake_kernel(steps, "b", implementation="cuda")]
    limits = {task.about["kernel"]["implementation"]: task.seconds for task in plan.exact(kinds)}
    share = plan.SHARES["exact"] / sum(plan.SHARES.values()) * 60 * gpu_check.DEFAULT_MINUTES
    assert limits["cuda"] < share / 2 < limits["triton"]
    judged = {task.about["mode"]: task.seconds for task in plan.cuda_bounds() if task.about}
    assert set(judged.values()) == {plan.BOUNDS_S["cuda"]}


def test_names_of_steps_are_unique_and_functions_exist():
    kernels = [fake_kernel("m", "a", "b"), fake_kernel("m", "a", op="other")]
    rates = {"flops": 1.0, "bandwidth": 1.0}
    lists = {
        "exact": plan.exact(kernels), "bounds": plan.bounds("cuda:0"), "warm": plan.warm(),
        "timings": plan.timings(rates), "network": plan.network("cuda:0"),
    }  # fmt: skip
    for name, tasks in lists.items():
        names = [task.name for task in tasks]
        assert len(set(names)) == len(names), name
        for task in tasks:
            module, _, function = task.function.partition(":")
            assert callable(getattr(importlib.import_module(module), function)), task
            json.dumps(dict(task.arguments))
    assert [task.name for task in lists["exact"]] == [
        "standin.triton a", "other.triton a", "standin.triton b",
    ]  # fmt: skip
    compiled = fake_kernel("m", "64x64", "narrow", "tma_1", "tma_2", "tma_3", implementation="cuda")
    assert [task.about["configuration"] for task in plan.exact([*kernels, compiled])] == [
        "a", "a", "tma_1", "tma_2", "tma_3", "64x64", "b", "narrow",
    ]  # fmt: skip
    assert {task.about.get("mode") for task in lists["bounds"]} >= {"bf16", "fp16", "tf32", "fp32"}
    assert not any("bf16 3x3" in task.name for task in plan.bounds("cpu"))
    assert len(speed.LAYERS) == 10
    assert plan.sanitized(kernels, "other") == ["m:check=a"]
    two = fake_kernel("m", "128x64_4w4s", "64x64_4w4s", "narrow_64x32_4w4s", "narrow_2")
    assert plan.sanitized([two]) == ["m:check=64x64_4w4s", "m:check=narrow_64x32_4w4s"]
    cuda = [t for t in lists["bounds"] if t.arguments.get("implementation") == "cuda"]
    assert {t.about.get("mode") for t in cuda} >= {"bf16", "fp16", "tf32"}
    assert not any(t.about.get("mode") == "fp32" for t in cuda)
    assert not any(t.name.startswith("conv") and "cuda" in t.name for t in plan.bounds("cpu"))
    named = [pool.Task("bn_act.triton 1", ""), pool.Task("conv_bn_act.triton 1", "")]
    assert plan.matching(named, "bn_act,nothing") == named[:1]


def test_a_sanitizer_that_is_absent_has_failed(tmp_path, monkeypatch):
    pretend(monkeypatch, fake_kernel("steps", "right"))
    arguments = ["--device", "cpu", "--stages", "sanitizer", "--minutes", "1"]
    arguments += ["--output", str(tmp_path), "--sanitizer", "no-such-tool"]
    assert gpu_check.main(arguments) == 1
    steps = content_of(tmp_path)["stages"]["sanitizer"]["steps"]
    assert [one["name"] for one in steps] == list(sanitizer.TOOLS)
    assert all("no-such-tool is not found" in one["error"] for one in steps)
