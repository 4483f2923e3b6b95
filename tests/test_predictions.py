"""The predictions in the docs are those of the code as it is, and follow from what it says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from resnet_fused.cases import RESNET50_LAYERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "benchmarks" / "predict_triton.py"
    spec = importlib.util.spec_from_file_location("predict_triton", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["predict_triton"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_record_are_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.table()}\n{tool.END}" in page, (
        f"run python {tool.__file__} --write"
    )
    record = json.loads(tool.RECORD.read_text(encoding="utf-8"))
    assert record["layers"] == [dataclasses.asdict(p) for p in tool.predictions()]


def test_no_prediction_beats_the_limits(tool):
    for case in RESNET50_LAYERS:
        for batch in tool.BATCHES:
            found = tool.predict(dataclasses.replace(case, n=batch))
            assert found.issued_mb >= 0.99 * found.unique_mb
            products = 2e6 * case.macs * batch / tool.TENSOR
            assert found.us >= max(found.memory_us, found.cache_us, products)
            assert found.tensor_us >= products


def test_larger_batches_take_longer(tool):
    for case in RESNET50_LAYERS:
        times = [tool.predict(dataclasses.replace(case, n=n)).us for n in tool.BATCHES]
        assert times == sorted(times)
