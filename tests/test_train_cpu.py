"""benchmarks/train_cpu.py: both networks take the same step, and the record says what was timed."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from training_nets import SERVED

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "train_cpu.py"
spec = importlib.util.spec_from_file_location("train_cpu", PATH)
assert spec is not None and spec.loader is not None
train_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_cpu)


@pytest.mark.parametrize("layout", train_cpu.LAYOUTS)
@pytest.mark.parametrize("case", [("cifar_resnet20", 8, 2), ("bottleneck 4", 6, 3)], ids=str)
def test_both_networks_take_the_same_step(case, layout):
    models, x = train_cpu.build(train_cpu.Case(*case), layout)
    for model in models.values():
        train_cpu.step(model.double(), x.double())
    plain, fused = (dict(model.named_parameters()) for model in models.values())
    assert plain.keys() == fused.keys()
    for name, parameter in plain.items():
        assert parameter is not fused[name]
        torch.testing.assert_close(fused[name].grad, parameter.grad)


@SERVED
def test_the_record_says_what_was_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_cpu, "CASES", (train_cpu.Case("cifar_resnet20", 8, 2),))
    path, threads = tmp_path / "record.json", torch.get_num_threads()
    arguments = ["--clock", "cpu", "--rounds", "3", "--layout", "nchw", "--output", str(path)]
    try:
        result = CliRunner().invoke(train_cpu.main, arguments, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert row["case"] in result.output
    assert row["clock"] == "cpu" and row["threads"] == 1
    assert row["kinds"] == {"cpu": 19}
    pairs = [e / f for e, f in zip(*row["samples"].values(), strict=True)]
    assert len(pairs) == 3
    assert row["ratio"] == pytest.approx(statistics.median(pairs))
    assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    assert {"commit", "machine", "versions", "command", "date"} <= found.keys()
