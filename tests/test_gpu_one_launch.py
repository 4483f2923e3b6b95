"""A network in one launch beside graphs of single kernels: stand-ins for the driver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_gpu_record import CPU, content_of, gpu_record, program

from gpu import device, driver, frozen, one_launch  # isort: skip


def test_one_launch_stands_beside_the_graph_and_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"milliseconds": 0.3, "warm_milliseconds": 0.25}
    times |= {"graph_milliseconds": 0.6, "warm_graph_milliseconds": 0.5}
    said = json.dumps({"plan": "p", "differing": 0, **times})
    made = program(tmp_path / "driver", f"#!/bin/sh\necho '{said}'\n")
    engine = {"ok": True, "us": {"frozen": {"us": 199.0}}}
    monkeypatch.setattr(frozen, "inference", lambda *given: engine)
    found = one_launch.compare("cpu", made)
    assert found["ok"] and found["gain"] == 2.0
    assert one_launch.line(found).startswith("one_launch 250 us, one_launch_cold 300 us")
    assert one_launch.line(found).endswith(
        "through_memory 250 us, through_memory_cold 300 us, frozen 199 us"
    )
    assert one_launch.check("cpu", made)["calls"][3]["differing"] == 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sleep 60", "no end within 0.5 s"),
        ("echo '{\"differing\": 3}'; exit 1", "exit code 1"),
        ("echo nothing", "exit code 0"),
    ],
)
def test_a_network_that_hangs_or_errs_ends_within_its_limit(
    tmp_path: Path, script: str, words: str
) -> None:
    made = program(tmp_path / "driver", f"#!/bin/sh\n{script}\n")
    found = one_launch.called(("--n", "1"), made, 0.5)
    assert found["ok"] is False and words in found["error"] and "--n 1" in found["error"]


def test_one_launch_is_a_step_that_is_skipped_without_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(driver, "find", lambda given: None)
        assert one_launch.check("cpu")["ok"] is one_launch.compare("cpu")["ok"] is None
    monkeypatch.setattr(gpu_record, "probe", lambda options, scratch: CPU)
    words = ["--device", "cpu", "--steps", "one_launch", "--output", str(tmp_path)]
    assert gpu_record.main([*words, "--driver", program(tmp_path / "d", "#!/bin/sh\n")]) == 1
    first, second, third = content_of(tmp_path)["stages"]["one_launch"]["steps"]
    assert "exit code 0" in first["error"] and second["name"] == "one launch beside frozen@1"
    assert third["name"] == "one launch in frozen@1" and third["ok"]
    assert set(third["us"]) == {"engine_auto", "engine_single", "engine_together"}


def test_the_rule_is_decided_by_the_interval_against_the_faster_rival() -> None:
    slow = tuple(200e-6 + k * 1e-7 for k in range(31))
    timed = {"auto": slow, "single": tuple(1.1 * s for s in slow)}
    fast = device.Samples({**timed, "together": tuple(s * 0.8 for s in slow)})
    found = one_launch.judged(fast)
    assert found["kept"] and found["rival"] == "auto"
    assert found["ratio"]["low"] == pytest.approx(1.25)
    assert one_launch.line(found).startswith("engine_auto 202 us, engine_single 222 us")
    assert one_launch.line(found).endswith("1.250 .. 1.250 of auto: kept")
    # An interval that touches 1 is not enough.
    touching = tuple(s * (0.8 if k % 3 else 1.01) for k, s in enumerate(slow))
    mixed = device.Samples({**timed, "together": tuple(reversed(touching[:4])) + slow[4:]})
    assert not one_launch.judged(mixed)["kept"]
    rival = device.Samples({**timed, "single": timed["auto"], "auto": timed["single"],
                            "together": slow})  # fmt: skip
    found = one_launch.judged(rival)
    assert found["rival"] == "single" and not found["kept"]
    assert one_launch.line(found).endswith("of single: not kept")


def test_what_is_not_in_one_launch_says_why() -> None:
    whys = ["in one launch with 1 other: a; alone: b"] * 2
    assert one_launch.together([*whys, "c; not in one launch: d"]) == (2, "d")
    assert one_launch.together(["e; not in one launch: f", "g"]) == (0, "f")
    assert one_launch.together(["h"]) == (0, "no such layers")


def test_gpu_checks_line_holds_the_verdict() -> None:
    import gpu_check

    found = {"us": {"engine_auto": 2.0}, "rival": "auto", "kept": False}
    found["ratio"] = {"median": 1.0, "low": 0.9, "high": 1.1, "confidence": 0.95}
    assert gpu_check.network_line(found) == "engine_auto 2 us, 0.900 .. 1.100 of auto: not kept"
