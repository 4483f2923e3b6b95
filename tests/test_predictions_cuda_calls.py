"""The rows of the CUDA kernels in predictions.json are those of the plans, by the same models."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from resnet_fused.cases import RESNET50_LAYERS
from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not _cuda_plan.exists("conv_chain"), reason="the extension was built without nvcc"
)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_cuda_calls")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_record_is_up_to_date(tool):
    record = json.loads(tool.rates.RECORD.read_text(encoding="utf-8"))
    for part, rows, writer in (
        ("cuda_inference", tool.of_inference(), "engine"),
        ("cuda_training", tool.of_training(), "training"),
    ):
        assert record[part] == rows, f"run python benchmarks/predict_cuda_{writer}.py --write"


def test_rows_are_what_the_engine_and_the_step_are_predicted_by(tool):
    rows = {(row["op"], row["layer"], row["batch"]): row for row in tool.of_inference()}
    assert len(rows) == len(tool.of_inference())
    for batch in tool.rates.BATCHES:
        for case in RESNET50_LAYERS:
            us = tool.inference.conv_us(dataclasses.replace(case, n=batch))
            assert rows["conv_bn_act", case.name, batch]["us"] == round(us, 2)
    for row in rows.values():
        configuration = row["plan"].partition("/")[0]
        assert configuration in _cuda_plan.configurations(row["op"])
        assert (row["dtype"], row["capability"]) == ("bfloat16", "9.0") and row["us"] > 2
    launch = 1e6 * tool.rates.LAUNCH
    for batch in tool.training.BATCHES:
        step = {
            (one.op, one.call, one.plan): one.us + launch for one in tool.training.kernels(batch)
        }
        found = {
            (row["op"], row["layer"], row["plan"]): row["us"]
            for row in tool.of_training()
            if row["batch"] == batch and row["layer"] != "driver"
        }
        assert found.keys() == step.keys()


def test_calls_of_the_driver_are_read_from_their_words(tool):
    case = tool.driver_case(tool.TIMED["bn_add_act_conv_stats"].words)
    assert (case.n, case.c, case.h, case.k, case.r, case.padding) == (8, 256, 56, 64, 1, (0, 0))
    case = tool.driver_case(tool.TIMED["conv_bn_stats"].words)
    assert (case.k, case.r, case.s, case.padding) == (64, 3, 3, (1, 1))
