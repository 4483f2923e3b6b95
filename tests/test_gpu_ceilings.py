"""gpu-record's step that measures the ceilings of the plans: a stand-in for the driver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_gpu_record import CPU, content_of, gpu_record, program

from gpu import ceilings, driver  # isort: skip

RATES = {
    "l2_own_rows": {
        "unit": "bytes", "predicted": 28, "constant": "kCacheBytes", "rate": 35, "sm_mhz": 1700,
    },
    "grid_meeting": {
        "unit": "cycles", "predicted": 3000, "constant": "kMeeting", "rate": 1500, "sm_mhz": 1720,
    },
    "graph_kernel": {"unit": "microseconds", "predicted": 1.3},
}  # fmt: skip


def stand_in(folder: Path, **more: object) -> str:
    said = json.dumps({"op": "ceilings", "multiprocessors": 132, "rates": RATES, **more})
    return program(folder / "driver", f"#!/bin/sh\necho \"$@\" > {folder}/words\necho '{said}'\n")


def test_rates_stand_beside_what_was_predicted(tmp_path: Path) -> None:
    found = ceilings.measure("cpu", stand_in(tmp_path))
    assert found["ok"] and found["sm_mhz"] == 1710
    assert found["rates"]["l2_own_rows"]["over_predicted"] == 1.25
    assert found["rates"]["grid_meeting"]["over_predicted"] == 0.5
    assert "over_predicted" not in found["rates"]["graph_kernel"]
    assert ceilings.line(found) == "l2_own_rows 35 (28), grid_meeting 1500 (3000)"
    assert (tmp_path / "words").read_text() == "--op ceilings\n"


def test_it_is_a_step_of_gpu_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_record, "probe", lambda options, scratch: CPU)
    words = ["--device", "cpu", "--steps", "ceilings", "--output", str(tmp_path)]
    assert gpu_record.main([*words, "--driver", stand_in(tmp_path)]) == 0
    (step,) = content_of(tmp_path)["stages"]["ceilings"]["steps"]
    assert step["ok"] and step["rates"]["l2_own_rows"]["constant"] == "kCacheBytes"


def test_it_is_skipped_without_a_driver_and_fails_with_one_that_errs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = program(tmp_path / "wrong", "#!/bin/sh\necho '{\"wrong\": 2}'\nexit 1\n")
    assert "exit code 1" in ceilings.measure("cpu", wrong)["error"]
    monkeypatch.setattr(driver, "find", lambda given: None)
    assert ceilings.measure("cpu")["ok"] is None


def test_sanitizers_go_over_it_where_it_can_run() -> None:
    assert driver.CEILINGS in driver.calls_for((9, 0))
    assert driver.CEILINGS not in driver.calls_for((8, 0))
