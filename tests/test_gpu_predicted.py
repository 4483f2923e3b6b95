"""gpu-check puts beside a time what was predicted of the implementation that was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import plan_spanning, predicted, speed  # noqa: E402
from gpu.training_driver import TIMED  # noqa: E402

FILE = {
    "layers": [{"layer": "3x3_64_64_at56", "batch": 32, "plan": "128x64_4w4s", "us": 20.0}],
    "spanning": [{"op": "stem", "layer": "s", "batch": 1, "us": 4.0}],
    "engine": [{"batch": 2, "us": 50.0}],
    "cuda_inference": [
        {"op": "conv_bn_act", "layer": "3x3_64_64_at56", "batch": 32, "plan": "tma_win96x64_2w/1",
         "us": 10.0},
    ],
    "cuda_training": [
        {"op": "conv_bn_dgrad", "layer": "driver", "batch": 8, "plan": "tma_win96x64_2w/1",
         "us": 10.0},
        {"op": "bn_add_act", "layer": "driver", "batch": 32, "plan": "", "us": 40.0},
    ],
}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path):
    (tmp_path / "p.json").write_text(json.dumps(FILE))
    said: list[str] = []
    found = predicted.read(tmp_path / "p.json", said.append)
    assert not said and len(found) == 6
    return found


def test_each_implementation_has_its_own_prediction(rows) -> None:
    about = {"layer": "3x3_64_64_at56@32"}
    us = {"ours": {"us": 25.0}, "ours_again": {"us": 25.0}, "cuda": {"us": 9.0}, "eager": {"us": 1}}
    plans = {"cuda": {"name": "tma_win96x64_2w/1"}, "ours": {"name": "64x64_4w4s"}}
    found = predicted.beside(
        "3x3_64_64_at56@32", about, {"us": us, "plans": plans, "plan": "64x64_4w4s"}, rows
    )
    assert found == {
        "ours": {
            "implementation": "triton", "plan": "128x64_4w4s", "us": 20.0,
            "measured_over_predicted": 1.25, "measured_plan": "64x64_4w4s",
        },
        "cuda": {
            "implementation": "cuda", "plan": "tma_win96x64_2w/1", "us": 10.0,
            "measured_over_predicted": 0.9,
        },
    }  # fmt: skip
    assert predicted.line(found) == (
        ", predicted 20.0 us 128x64_4w4s (triton): 1.25x, measured 64x64_4w4s"
        ", predicted 10.0 us tma_win96x64_2w/1 (cuda): 0.90x"
    )


def test_a_missing_one_is_said(rows) -> None:
    us = {"triton": {"us": 5.0}, "cuda": {"us": 5.0}, "parts": {"us": 9.0}}
    found = predicted.beside("stem s@1", {"layer": "s@1", "op": "stem"}, {"us": us}, rows)
    assert found["triton"]["measured_over_predicted"] == 1.25
    assert found["cuda"] == {
        "implementation": "cuda",
        "missing": "no prediction of stem s@1 by cuda",
    }
    assert predicted.line(found).endswith(", no prediction of stem s@1 by cuda")
    assert set(found) == {"triton", "cuda"}
    assert predicted.beside("stem s@1", {"layer": "s@1", "op": "stem"}, {"us": us}, {}) == {}


def test_calls_of_the_driver_and_engines_find_theirs(rows) -> None:
    one = {"plan": "tma_win96x64_2w, 1 part", "microseconds": 12.0}
    found = predicted.beside("driver conv_bn_dgrad", {}, one, rows)
    assert found["cuda"]["measured_over_predicted"] == 1.2 and "measured_plan" not in found["cuda"]
    other = predicted.beside("driver conv_bn_dgrad", {}, {**one, "plan": "64x64_4w4s: why"}, rows)
    assert other["cuda"]["measured_plan"] == "64x64_4w4s: why"
    of_pass = predicted.beside("driver bn_add_act", {}, {"plan": "x", "microseconds": 50.0}, rows)
    assert predicted.line(of_pass) == ", predicted 40.0 us (cuda): 1.25x"
    none = predicted.beside("driver bn_act_pool", {}, {"microseconds": 1.0}, rows)
    assert none["cuda"]["missing"] == "no prediction of bn_act_pool driver by cuda"
    engine = predicted.beside("frozen@2", {}, {"us": {"frozen": {"us": 60.0}}}, rows)
    assert engine["frozen"]["measured_over_predicted"] == 1.2
    assert predicted.beside("inference@1", {}, {"us": {"frozen": {"us": 60.0}}}, rows) == {}


def test_the_file_has_all_that_is_measured_on_a_gpu() -> None:
    """Of the layers and calls that gpu-check times, by both implementations where both serve."""
    rows = predicted.read(ROOT / "benchmarks" / "predictions.json", pytest.fail)
    for layer in speed.LAYERS:
        for batch in speed.BATCHES:
            for kind in ("triton", "cuda"):
                assert predicted.key("conv_bn_act", kind, f"{layer}@{batch}") in rows
    kernels = [
        {"op": op, "implementation": kind, "configurations": []}
        for op in plan_spanning.MAIN
        for kind in ("triton", "cuda")
    ]
    for task in plan_spanning.timings({"flops": 1.0, "bandwidth": 1.0}, kernels, "cuda:0"):
        for kind in ("triton", "cuda"):
            found = predicted.key(task.about["op"], kind, task.about["layer"]) in rows
            # Bytes: no predictor has them. A wide 3x3 in front: no kernel takes it.
            none = "uint8" in task.name or "_front256" in task.name
            assert found != none, task.name
    for op in TIMED:
        assert "cuda" in predicted.beside(f"driver {op}", {}, {"microseconds": 1.0}, rows)
        found = predicted.beside(f"driver {op}", {}, {"microseconds": 1.0}, rows)
        assert "missing" not in found["cuda"], op
