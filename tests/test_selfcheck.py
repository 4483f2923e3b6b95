"""The self-check's child process, on stand-ins that are wrong, raise, fault, hang and print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standins

from resnet_fused import _selfcheck

CHECK = "standins:check"


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line "configuration pid" for each one that ran."""
    file = tmp_path / "calls"
    monkeypatch.setenv(standins.CALLS, str(file))
    return file


def ran(calls: Path) -> list[tuple[str, int]]:
    if not calls.exists():
        return []
    words = [line.split() for line in calls.read_text().splitlines()]
    return [(name, int(pid)) for name, pid in words]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def run(*configurations: str, limit: float = 20.0) -> _selfcheck.Outcome:
    return _selfcheck.run(CHECK, configurations, "cpu", limit=limit)


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        ("right", None),
        ("prints", None),
        ("wrong", "ArithmeticError: 3 of 8 elements are wrong"),
        ("refuses", "RuntimeError: out of resource: shared memory"),
        ("leaves", "SystemExit: the check wants to leave"),
        ("missing", "KeyError: 'missing'"),
        ("faults", "the process ended in it: SIGSEGV"),
        ("exits", "the process ended in it: exit code 0"),
        ("poisons", "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_each_failure_refuses_its_own_configuration_only(configuration, reason, calls):
    outcome = run("right1", configuration, "right2")
    assert outcome.problem is None and not outcome.late
    assert list(outcome.results) == ["right1", configuration, "right2"]
    assert outcome.results["right1"] is None and outcome.results["right2"] is None
    if reason is None:
        assert outcome.results[configuration] is None
    else:
        assert outcome.results[configuration].startswith(reason)
    assert [name for name, _ in ran(calls)] == ["right1", configuration, "right2"]


@pytest.mark.parametrize(
    ("configuration", "children"), [("wrong", 1), ("refuses", 1), ("faults", 2), ("poisons", 2)]
)
def test_a_fresh_process_goes_on_after_a_fault_and_only_then(configuration, children, calls):
    run("right1", configuration, "right2")
    assert len({pid for _, pid in ran(calls)}) == children


def test_many_failures_at_once():
    outcome = run("faults1", "wrong", "exits", "poisons", "right1", "faults2", "refuses", "right2")
    assert [name for name, why in outcome.results.items() if why is None] == ["right1", "right2"]
    assert len(outcome.results) == 8 and outcome.problem is None


def test_children_share_the_configurations(calls):
    names = ["slow1", "faults", "slow2", "wrong", "slow3", "hangs", "slow4"]
    begin = time.monotonic()
    outcome = _selfcheck.run(CHECK, names, "cpu", limit=6, children=3)
    assert time.monotonic() - begin < 6
    assert list(outcome.results) == names and outcome.problem is None
    assert [name for name, why in outcome.results.items() if why is None] == [
        "slow1", "slow2", "slow3", "slow4",
    ]  # fmt: skip
    # Three at a time, and one more after the fault and after the hang, if anything was left there.
    assert len({pid for _, pid in ran(calls)}) == 4
    assert not any(is_alive(pid) for _, pid in ran(calls))


def test_a_problem_of_one_of_several_children_is_told(calls):
    outcome = _selfcheck.run(CHECK, ["right1", "memory", "right2"], "cpu", limit=20, children=2)
    assert outcome.problem is not None and not outcome.late
    assert outcome.problem.startswith("too little memory")
    assert outcome.results == {"right1": None, "right2": None}


def test_how_many_children_there_are(monkeypatch):
    counts = []
    for cores in (None, 1, 2, 4, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        counts.append(_selfcheck.children())
    assert counts == [1, 1, 1, 2, 4]


def test_a_hang_is_ended_and_the_rest_is_checked(calls):
    begin = time.monotonic()
    outcome = run("right1", "hangs", "right2", limit=4)
    assert time.monotonic() - begin < 4
    assert outcome.results == {
        "right1": None, "hangs": "no result within 2 s: it hangs", "right2": None,
    }  # fmt: skip
    assert not any(is_alive(pid) for _, pid in ran(calls))


def test_processes_that_the_child_left_behind_are_ended(calls):
    begin = time.monotonic()
    outcome = run("forks_and_hangs", "right")
    assert time.monotonic() - begin < 10
    assert outcome.results["forks_and_hangs"] == "the process ended in it: exit code 1"
    assert outcome.results["right"] is None
    left = dict(ran(calls))
    assert left["forked"] > 0
    until = time.monotonic() + 5
    while is_alive(left["forked"]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_alive(left["forked"])


def test_the_time_limit_leaves_the_rest_unchecked():
    names = [f"slow{number}" for number in range(9)]
    begin = time.monotonic()
    outcome = run(*names, limit=3)
    assert time.monotonic() - begin < 5
    assert outcome.late and outcome.problem == "not reached within the 3 s of the self-check"
    # The one under way when the time ended has not failed: it was not given its share.
    assert set(outcome.results.values()) <= {None}
    assert len(outcome.results) < 9


def test_a_child_that_nobody_waits_for_ends_itself(calls):
    reading, writing = os.pipe()
    request = {
        "check": CHECK, "configurations": ["hangs"], "device": "cpu", "uuid": None, "seconds": -4.0,
        "package": _selfcheck.PACKAGE,
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-m", "resnet_fused._selfcheck", json.dumps(request), str(writing)],
        pass_fds=(writing,), timeout=15, env=_selfcheck._environment(),
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading) as stream:
        assert [json.loads(line) for line in stream] == [{"start": "hangs"}]
    assert child.returncode == -signal.SIGALRM
    assert [name for name, _ in ran(calls)] == ["hangs"]


def test_too_little_memory_is_not_the_kernels_fault():
    outcome = run("right", "memory", "right2")
    assert outcome.results == {"right": None}
    assert outcome.problem is not None and not outcome.late
    assert outcome.problem.startswith("too little memory for the check: RuntimeError: Triton")


def test_another_copy_of_the_package_is_not_taken_for_this_one(monkeypatch):
    monkeypatch.setattr(_selfcheck, "PACKAGE", "/elsewhere/resnet_fused")
    outcome = run("right")
    assert outcome.results == {}
    assert outcome.problem is not None and "has another resnet_fused, in" in outcome.problem


def test_the_child_looks_for_modules_in_the_parents_order(tmp_path, monkeypatch):
    """What lies behind the standard library, an old backport of it perhaps, stays behind it."""
    monkeypatch.setattr(_selfcheck, "PACKAGE", str(tmp_path / "resnet_fused"))
    folders = _selfcheck._environment()["PYTHONPATH"].split(os.pathsep)
    assert folders == [*dict.fromkeys(map(os.path.abspath, sys.path)), str(tmp_path)]


def test_the_folder_that_the_user_stands_in_comes_not_first(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise ImportError('no module of this name was meant')")
    monkeypatch.chdir(tmp_path)
    assert run("right").results == {"right": None}


@pytest.mark.parametrize("check", ["standins:absent", "no_such_module:check"])
def test_a_check_that_is_not_there(check):
    outcome = _selfcheck.run(check, ["right"], "cpu", limit=20)
    assert outcome.results == {}
    assert outcome.problem is not None and outcome.problem.startswith("the check can't start: ")


def test_the_environment_of_the_child(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "reference")
    assert run("environment").results == {"environment": None}
    with pytest.raises(AssertionError, match="came through"):
        standins.environment()


@pytest.mark.parametrize(
    ("executable", "frozen", "reason"),
    [
        ("", False, "sys.executable is empty"),
        ("/nonexistent/python", False, "/nonexistent/python can't be started: "),
        ("/bin/false", False, "ended before it checked anything: exit code 1"),
        (sys.executable, True, "frozen into an application"),
    ],
)
def test_where_no_child_can_be_started(executable, frozen, reason, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    outcome = run("right")
    assert outcome.results == {} and not outcome.late
    assert outcome.problem is not None and reason in outcome.problem


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
def test_a_bad_time_limit_names_the_variable(value, monkeypatch):
    monkeypatch.setenv(_selfcheck.SECONDS, value)
    with pytest.raises(ValueError, match=f"{_selfcheck.SECONDS}: got '{value}'; accepted"):
        _selfcheck.time_limit()


def test_the_time_limit(monkeypatch):
    monkeypatch.delenv(_selfcheck.SECONDS, raising=False)
    assert _selfcheck.time_limit() == 60
    monkeypatch.setenv(_selfcheck.SECONDS, "0.5")
    assert _selfcheck.time_limit() == 0.5


SCRIPT = """
import resnet_fused._selfcheck as selfcheck
print(selfcheck.run("standins:check", ["right", "faults"], "cpu", limit=20).results)
"""


@pytest.mark.parametrize("how", ["a script without a main guard", "-c", "standard input"])
def test_whatever_the_main_module_is(how, tmp_path):
    (tmp_path / "main.py").write_text(SCRIPT)
    arguments = {"-c": ["-c", SCRIPT], "standard input": ["-"]}.get(how, ["main.py"])
    child = subprocess.run(
        [sys.executable, *arguments], input=SCRIPT, capture_output=True, text=True, cwd=tmp_path,
        timeout=60, env=_selfcheck._environment(),
    )  # fmt: skip
    expected = {"right": None, "faults": "the process ended in it: SIGSEGV"}
    assert child.stdout == f"{expected}\n", child.stderr
