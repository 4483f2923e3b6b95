"""gpu-record without a GPU: its steps with stand-ins for what needs one, its archive, its clock."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_records
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_record  # noqa: E402
from gpu import command, driver, parts, recorded, sanitizer  # noqa: E402
from gpu.record import Clock, Record  # noqa: E402
from test_gpu_check import SANITIZER  # noqa: E402

from resnet_fused import admission  # noqa: E402
from resnet_fused.bench import record as bench_record  # noqa: E402

CPU = {"name": "cpu", "capability": None}


def program(file: Path, text: str) -> str:
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu-record.json").read_text())


def members(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / "gpu-record.tar.gz") as made:
        return {
            one.name.removeprefix("gpu-record/"): made.extractfile(one).read()  # type: ignore[union-attr]
            for one in made.getmembers()
        }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a probe nor the machine's step: both import torch in processes of their own."""

    def environment(self: gpu_record.Recording, until: float) -> None:
        self.record.begin("environment", 0)
        self.record.end()

    monkeypatch.setattr(gpu_record, "probe", lambda options, scratch: CPU)
    monkeypatch.setattr(gpu_record.Recording, "environment", environment)


def recording(folder: Path, *words: str) -> gpu_record.Recording:
    options = gpu_record.parse(["--device", "cpu", "--output", str(folder / "out"), *words])
    clock = Clock(1)
    made = Record(folder / "out" / "gpu-record.json", {"commit": "abc"}, clock, lambda line: None)
    scratch = folder / "scratch"
    scratch.mkdir()
    return gpu_record.Recording(options, clock, made, CPU, {}, scratch)


# The command line.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget-min", "none"], "accepted are 0.1 to 600 minutes"),
        (["--steps", "bench,what"], "accepted are environment, conformance"),
        (["--device", "tpu"], "invalid choice"),
        (["--driver", "/no/such/driver"], "--driver: got '/no/such/driver'"),
        (["--output", "/proc/nothing/there"], "--output: '/proc/nothing/there' can't be made"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_record.main(["--output", str(tmp_path), *words])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_no_gpu_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    why = {"why": "torch 2.15.0 sees no GPU"}
    monkeypatch.setattr(gpu_record, "probe", lambda options, scratch: why)
    assert gpu_record.main(["--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: torch 2.15.0 sees no GPU") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_make_knows_it() -> None:
    clean = {k: v for k, v in os.environ.items() if k != "ARCHS" and not k.startswith("M")}
    made = subprocess.run(
        ["make", "-n", "gpu-record", "PYTHON=python9", "BUDGET_MIN=5", "OUT=there", "BUILD=1"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=clean,
    ).stdout  # fmt: skip
    words = " ".join(made.replace("\\\n", " ").split())
    assert "python9 benchmarks/gpu_record.py --budget-min 5 --output there --build" in words
    assert "env -u ARCHS" in words


def test_every_step_has_a_share_and_what_runs_it() -> None:
    steps = gpu_record.parse(["--device", "cpu"]).steps
    assert steps == tuple(gpu_record.SHARES)
    assert all(callable(getattr(gpu_record.Recording, name)) for name in steps)
    assert gpu_record.parse(["--steps", "page,bench"]).steps == ("environment", "bench", "page")


# Commands, and the driver under the sanitizers.


def test_a_command_that_hangs_is_cut_with_what_it_started(tmp_path: Path) -> None:
    child = program(tmp_path / "hangs", f"#!/bin/sh\nsleep 60 &\necho $! >{tmp_path}/pid\nwait\n")
    start = time.monotonic()
    ran = command.run([child], 0.6, tmp_path / "logs" / "log")
    assert ran.code is None and time.monotonic() - start < 10
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} outlived its parent's limit")
    said = command.run(["/bin/sh", "-c", "echo words; exit 3"], 20, tmp_path / "log")
    assert (said.code, said.text) == (3, "words\n")
    absent = command.run([str(tmp_path / "absent")], 20, tmp_path / "log2")
    assert absent.code == 127 and "can't be started" in absent.text


def ran(text: str, code: int | None = 0) -> command.Ran:
    return command.Ran(code, 1.0, text)


CLEAN = ran("{}\n========= ERROR SUMMARY: 0 errors\n")


@pytest.mark.parametrize(
    ("runs", "ok", "said"),
    [
        ([CLEAN, CLEAN], True, ""),
        ([CLEAN], None, "1 of 2 calls passed"),
        ([CLEAN, ran("", None)], None, "1 of 2 calls passed"),
        ([CLEAN, ran("{}\n========= ERROR SUMMARY: 0 errors\n", 1)], False, "exit code 1"),
        ([CLEAN, ran("no words of the tool")], False, "no summary"),
        (
            [ran("========= Invalid __global__ read\n=========     at somewhere()\n=========\n"
                 "========= ERROR SUMMARY: 1 error\n"), CLEAN],
            False, "1 reported",
        ),
        ([ran("========= Error: Device not supported. Please refer to\n", 1)], None,
         "refused: Error: Device not supported"),
    ],
)  # fmt: skip
def test_what_runs_of_a_sanitizer_say_together(
    runs: list[command.Ran], ok: bool | None, said: str
) -> None:
    for tool in ("memcheck", "initcheck"):  # of initcheck too: every kernel of the driver is ours
        found = driver.judge(tool, runs, 2)
        assert found["ok"] is ok, found
        assert said in str(found.get("error") or found.get("skipped") or "")
        assert found.get("refused", False) is ("refused" in said)


def test_every_tool_runs_every_call_of_the_driver(tmp_path: Path) -> None:
    tool = program(tmp_path / "tool", SANITIZER)
    # The wrong result is noticed by the driver itself, under whatever tool.
    made = program(
        tmp_path / "driver", '#!/bin/sh\ncase "$*" in *float32*) exit 1;; esac\necho "{}"\n'
    )
    found: dict[str, dict[str, Any]] = {}
    driver.run(tool, Path(made), lambda: 30.0, found.__setitem__, tmp_path, ("memcheck",))
    assert found["memcheck"]["ok"] is False and "exit code 1" in found["memcheck"]["error"]
    assert found["memcheck"]["passed"] == 3
    program(tmp_path / "driver", '#!/bin/sh\necho "{}"\n')
    every = driver.calls_for([9, 0])
    driver.run(
        tool, Path(made), lambda: 30.0, found.__setitem__, tmp_path / "2", ("memcheck",),
        calls=every,
    )  # fmt: skip
    assert found["memcheck"]["ok"] and found["memcheck"]["passed"] == len(every)
    calls = {log.name for log in (tmp_path / "2").iterdir()}
    assert calls == {f"memcheck-{number}.log" for number in range(len(every))}


def test_kernels_for_sm90a_are_looked_at_on_such_gpus_alone() -> None:
    alone = {*driver.SM90A_CALLS, driver.CEILINGS}
    assert set(driver.calls_for([9, 0])) == {*driver.CALLS, *alone}
    for other in ([8, 0], [8, 9], [10, 0], None):
        assert driver.calls_for(other) == driver.CALLS


def test_an_absent_sanitizer_has_failed(quick: None, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--steps", "sanitizer", "--sanitizer", "no-such-tool"]
    assert gpu_record.main([*words, "--output", str(tmp_path)]) == 1
    steps = content_of(tmp_path)["stages"]["sanitizer"]["steps"]
    assert [one["name"] for one in steps] == list(sanitizer.TOOLS)
    assert all("no-such-tool is not found" in one["error"] for one in steps)


def test_a_refused_device_is_no_failure_of_the_checks_program_either(tmp_path: Path) -> None:
    made = Record(tmp_path / "r.json", {}, Clock(1), lambda line: None)
    made.begin("sanitizer", 2)
    with driver.excusing(made):
        tail = "========= Error: Device not supported. Please refer to"
        made.step("memcheck", {"ok": False, "error": "no summary", "tail": tail})
    made.step("racecheck", {"ok": False, "error": "no summary", "tail": tail})
    one, other = made.content["stages"]["sanitizer"]["steps"]
    assert one["ok"] is None and one["refused"] and "error" not in one and other["ok"] is False


# Conformance.


def test_conformance_is_run_or_says_why_not(quick: None, tmp_path: Path) -> None:
    outcome = '{\\"outcomes\\": [{\\"wrong\\": 0}, {\\"wrong\\": 2}], \\"rounding\\": {}}'
    for code, expected in ((0, True), (1, False)):
        tool = program(tmp_path / "tool", f'#!/bin/sh\necho "{outcome}" >$2\nexit {code}\n')
        words = ["--device", "cpu", "--steps", "conformance", "--conformance", tool]
        assert gpu_record.main([*words, "--output", str(tmp_path / "o")]) == code
        (step,) = content_of(tmp_path / "o")["stages"]["conformance"]["steps"]
        assert step["ok"] is expected and (step["comparisons"], step["wrong"]) == (2, 1)
        assert "conformance.json" in members(tmp_path / "o")
    words = ["--device", "cpu", "--steps", "conformance", "--output", str(tmp_path / "o")]
    assert gpu_record.main(words) == 0
    (step,) = content_of(tmp_path / "o")["stages"]["conformance"]["steps"]
    assert step["ok"] is None and "not run: there is no hardware" in step["skipped"]
    assert "conformance.json" not in members(tmp_path / "o")  # that of an earlier run is gone


# The benchmark in parts.


def cut(whole: dict[str, Any], first: int, last: int, **more: Any) -> dict[str, Any]:
    """What a process would have written that reached some of the rows."""
    rows = copy.deepcopy(whole["rows"][first:last])
    about = {"rows": rows, "reached": len(rows), "of": len(whole["rows"]) - first, "seconds": 5.0}
    return {**copy.deepcopy(whole), "complete": False, **about, **more}


def test_parts_make_one_valid_record() -> None:
    whole = bench_records.example(levels=("kernel",))
    keys = [row["key"] for row in whole["rows"]]
    assert len(keys) >= 4
    made = parts.Parts("gpu_record.py", "abc")
    made.keys = keys
    rows, blamed = made.add(cut(whole, 0, 1), "its process ended: SIGSEGV")
    assert [row["key"] for row in rows] == keys[:1] and blamed == keys[1] and made.done == 2
    assert made.record is not None and not made.record["complete"]
    rows, blamed = made.add(cut(whole, 2, 3, stopped="the GPU is lost"), None)
    assert blamed == keys[3] and made.done == 4
    made.add(cut(whole, 4, len(keys)), None)
    assert not made.left
    assert [row["key"] for row in made.record["rows"]] == [*keys[:1], *keys[2:3], *keys[4:]]
    assert made.record["failed"] == {
        keys[1]: "its process ended: SIGSEGV", keys[3]: "the GPU is lost",
    }  # fmt: skip
    assert made.record["reached"] == made.record["of"] == len(keys)
    assert not made.record["complete"] and "stopped" not in made.record
    assert made.record["seconds"] == 15.0
    bench_record.validate(made.record)


def test_a_process_that_wrote_nothing_is_blamed_for_its_first_subject() -> None:
    whole = bench_records.example(levels=("kernel",))
    made = parts.Parts("c", None)
    made.keys = [row["key"] for row in whole["rows"]]
    assert made.add(None, "SIGSEGV") == ([], made.keys[0]) and made.record is None
    made.add(cut(whole, 1, len(made.keys)), None)
    assert made.record is not None and list(made.record["failed"]) == made.keys[:1]
    bench_record.validate(made.record)


def fake_bench(whole: dict[str, Any], ends: list[tuple[int, int]]) -> Callable[..., command.Ran]:
    """Children that reach so many rows and end with such codes, one after the other."""

    def run(words: list[str], limit: float, log: Path, extra: Any = None) -> command.Ran:
        log.write_text("said")
        if "page" in words:
            Path(words[-1]).write_text("<html>")
            return ran("")
        order = json.loads(words[-1])
        Path(order["keys"]).write_text(json.dumps({"keys": [r["key"] for r in whole["rows"]]}))
        count, code = ends.pop(0)
        found = cut(whole, order["skip"], order["skip"] + count)
        Path(order["output"]).write_text(json.dumps(found))
        return ran("Segmentation fault", code)

    return run


def test_a_lost_process_costs_one_row(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = bench_records.example(levels=("kernel",))
    count = len(whole["rows"])
    monkeypatch.setattr(gpu_record.command, "run", fake_bench(whole, [(2, -11), (count - 3, 0)]))
    words = ["--device", "cpu", "--steps", "bench,page", "--commit", "0123456789abcdef"]
    assert gpu_record.main([*words, "--output", str(tmp_path)]) == 1
    content = content_of(tmp_path)
    stage = content["stages"]["bench"]
    assert (stage["reached"], stage["of"], stage["failed"], stage["cut"]) == (count, count, 1, None)
    lost = [one for one in stage["steps"] if one["ok"] is False]
    assert lost[0]["name"] == whole["rows"][2]["key"] and "Segmentation" in lost[0]["error"]
    written = bench_record.read(tmp_path / "bench.json")
    assert len(written["rows"]) == count - 1
    result = f"results/cpu/{content['date'][:10]}-0123456789ab.json"
    assert bench_record.read(tmp_path / result) == written
    inside = members(tmp_path)
    assert json.loads(inside[f"benchmarks/{result}"]) == written
    assert {"bench.html", "gpu-record.json", "logs/bench-0.log", "logs/bench-1.log"} <= set(inside)
    assert not (tmp_path / "bench-part.json").exists()


def test_a_wrong_result_of_ours_is_a_failure_and_a_peers_is_not(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, code in (("cudnn", 0), ("triton", 1)):
        whole = bench_records.example(levels=("kernel",))
        whole["rows"][0]["variants"][name] = {"wrong": "error 3x the bound"}
        run = fake_bench(whole, [(len(whole["rows"]), 0)])
        monkeypatch.setattr(gpu_record.command, "run", run)
        words = ["--device", "cpu", "--steps", "bench", "--output", str(tmp_path)]
        assert gpu_record.main(words) == code


# The clock.


def test_the_time_is_kept_and_what_was_reached_is_archived(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def order(self: Any, seconds: float, output: Path, cache: str, **more: Any) -> list[str]:
        return ["/bin/sh", "-c", "sleep 600"]

    monkeypatch.setattr(gpu_record.Recording, "_order", order)
    monkeypatch.setattr(gpu_record, "LEAST_S", 0.1)
    start = time.monotonic()
    words = ["--device", "cpu", "--steps", "tuning,bench,page", "--budget-min", "0.1"]
    assert gpu_record.main([*words, "--output", str(tmp_path)]) == 0
    assert time.monotonic() - start < 6 + 3
    content = content_of(tmp_path)
    assert not content["complete"] and content["ok"]
    assert {content["stages"][name]["cut"] for name in ("tuning", "bench")} == {"its time was over"}
    assert json.loads(members(tmp_path)["gpu-record.json"])["stages"].keys() == {
        "environment", "tuning", "bench", "page",
    }  # fmt: skip


def test_the_watchdog_ends_what_nothing_else_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(gpu_record.os, "_exit", ended.append)
    made = recording(tmp_path)
    clock = Clock(8, started=time.monotonic() - 463.9)
    gpu_record._watch(made, clock).join(10)
    assert ended == [0]
    assert "watchdog" in json.loads(members(tmp_path / "out")["gpu-record.json"])


def test_a_step_that_breaks_costs_itself(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def breaks(self: Any, until: float) -> None:
        self.record.begin("tuning", 1)
        raise KeyError("planted")

    monkeypatch.setattr(gpu_record.Recording, "tuning", breaks)
    words = ["--device", "cpu", "--steps", "tuning,page", "--output", str(tmp_path)]
    assert gpu_record.main(words) == 1
    content = content_of(tmp_path)
    assert "planted" in content["problems"][0] and content["stages"]["tuning"]["cut"]
    assert content["stages"]["page"]["steps"][0]["skipped"] == "there is no row to show"


# What the children run.


def test_subjects_come_the_most_telling_first_and_once() -> None:
    found = recorded.subjects("cuda")
    keys = [one.key for one in found]
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("kernel/conv_bn_act/") and "/b256/" in key for key in keys[:6])
    first = {(one.level, one.op, one.batch): place for place, one in reversed([*enumerate(found)])}
    order = [
        ("kernel", "conv_bn_act", 256), ("model", "inference", 256), ("model", "inference", 1),
        ("model", "train", 256), ("kernel", "stem", 256), ("kernel", "conv_chain", 256),
        ("kernel", "conv_bn_act", 32),
        ("kernel", "conv_bn_act", 1), ("block", "inference", 256),
        ("model", "training_frozen", 256), ("model", "training", 256),
        ("kernel", "conv_dgrad", 256), ("kernel", "bn_act", 256),
        ("kernel", "conv_bn_stats", 256), ("kernel", "conv_bn_wgrad", 256),
    ]  # fmt: skip
    assert [first[one] for one in order] == sorted(first[one] for one in order)
    assert all(one.dtype == "bfloat16" and one.device == "cuda" for one in found)
    for op in ("stem", "head", "conv_chain"):
        assert {one.batch for one in found if one.op == op} == {256, 32, 1}


def test_peers_that_compile_join_whole_networks_alone() -> None:
    names = {peer.name: peer for peer in recorded.peers("cuda")}
    assert {"eager", "fused", "triton", "cuda", "cudnn", "inductor"} <= set(names)
    kernel, model = (
        next(one for one in recorded.subjects("cuda") if one.level == level)
        for level in ("kernel", "model")
    )
    assert "the network in inference alone" in names["inductor"].why_not(kernel)
    assert "in inference alone" not in (names["inductor"].why_not(model) or "")
    assert names["inductor"].isolated and names["inductor"].limit_s > 0
    assert not any(peer.isolated and not isinstance(peer, recorded.ForModels)
                   for peer in names.values())  # fmt: skip


def test_what_the_run_admitted_is_what_its_children_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import resnet_fused.ops  # noqa: F401  (importing it enters the kernels)

    monkeypatch.setattr(admission, "SHIPPED", admission.SHIPPED)
    kernel = next(one for one in admission.kernels() if one.name == "bn_act.triton")
    entry = {
        "op": "bn_act", "implementation": "triton", "configuration": "4096_4w", "ok": True,
        "hash": admission.source_hash(kernel), "arch": "cpu", "timings": {}, "seconds": 1.0,
    }  # fmt: skip
    file = tmp_path / "gpu-record.json"
    file.write_text(json.dumps({"admission": [entry, {**entry, "hash": "0" * 64}]}))
    before = admission.SHIPPED
    try:
        assert recorded.admit(file, tmp_path) == 1
        assert admission.verdict("bn_act", "triton", "cpu").source == "shipped"
        file.write_text('{"admission": []}')
        monkeypatch.setattr(admission, "SHIPPED", before)
        assert recorded.admit(file, tmp_path) == 0 and before == admission.SHIPPED
    finally:
        admission.forget()


@pytest.mark.slow
def test_every_step_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    tool = program(tmp_path / "tool", SANITIZER)
    said = json.dumps({"multiprocessors": 1, "rates": {}})
    carried = program(tmp_path / "driver", f"#!/bin/sh\necho '{said}'\n")
    checked = program(tmp_path / "conformance", '#!/bin/sh\necho "{}" >$2\n')
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "gpu_record.py"), "--device", "cpu",
            "--budget-min", "5", "--output", str(tmp_path / "out"), "--commit", "abc",
            "--only", "bn_act.triton,stream", "--sanitizer", tool, "--driver", carried,
            "--conformance", checked, "--processes", "1",
        ],
        capture_output=True, text=True, timeout=310, check=False,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = content_of(tmp_path / "out")
    assert content["kind"] == "gpu-record" and content["ok"] and content["complete"]
    assert list(content["stages"]) == list(gpu_record.SHARES)
    assert all(stage["steps"] for stage in content["stages"].values())
    assert [one["configuration"] for one in content["admission"]] == ["4096_4w"]
    written = bench_record.read(tmp_path / "out" / "bench.json")
    assert written["complete"] and len(written["rows"]) == 4
    assert "eager" in written["rows"][0]["variants"]
    assert "median_s" in written["rows"][-1]["variants"]["frozen"]
    tuned = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert tuned["layers"][0]["tried"] == 2 and tuned["complete"]
    inside = members(tmp_path / "out")
    assert inside["bench.html"].lstrip().lower().startswith(b"<!doctype html")
    assert "benchmarks/results/cpu/" + f"{content['date'][:10]}-abc.json" in inside
