"""The record: what is written is valid, what is not valid is refused with its place."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_records import example

from resnet_fused import admission
from resnet_fused.bench import ceilings, record, runner
from resnet_fused.bench.peers import PEERS
from resnet_fused.bench.subject import Subject

jsonschema = pytest.importorskip(
    "jsonschema", reason="without jsonschema records are not checked: pip install jsonschema"
)
Change = Callable[[dict[str, Any]], object]
RECORD = example(device="cpu", levels=("model",))


def _put(path: str, value: Any) -> Change:
    """Sets a field: "rows/0/noise"; `...` takes it away."""

    def change(found: Any) -> None:
        *parents, last = (int(p) if p.isdigit() else p for p in path.split("/"))
        for parent in parents:
            found = found[parent]
        if value is ...:
            del found[last]
        else:
            found[last] = value

    return change


def test_the_schema_is_one_and_ships_with_the_package() -> None:
    jsonschema.Draft202012Validator.check_schema(record.schema())
    assert record.SCHEMA_FILE.is_file() and record.schema()["properties"]["schema"] == {"const": 2}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_examples_are_valid(device: str) -> None:
    record.validate(json.loads(json.dumps(example(device=device))))


def test_a_record_of_nothing_yet_is_valid() -> None:
    found = record.begin("typed", {"rounds": 15, "total_s": math.inf}, 3)
    record.validate(json.loads(json.dumps(found, allow_nan=False)))
    assert found["settings"]["total_s"] is None
    assert set(found["sources"]) == {kernel.name for kernel in admission.kernels()}
    assert {"conv_bn_act.triton", "conv_bn_act.cuda"} <= set(found["sources"])
    assert found["machine"]["threads"] >= 1 and found["versions"]["torch"]


def test_what_the_runner_writes_of_real_peers_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = ceilings.Ceilings(1e11, 1e10, "float32")
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: rates)
    subjects = [
        Subject("kernel", "conv_bn_act", "3x3_8_8_at6_add", 2, "float32", "cpu"),
        Subject("kernel", "conv_wgrad", "3x3_8_8_at6", 2, "bfloat16", "cpu"),
        Subject("block", "inference", "resnet18.layer2.0", 2, "float32", "cpu", size=32),
        Subject("block", "training_frozen", "resnet18.layer1.0", 2, "float32", "cpu", size=32),
    ]
    peers = [PEERS[name] for name in ("eager_nchw", "eager", "fused", "cudnn")]
    settings = runner.Settings(rounds=6, warmup=1, min_sample_s=1e-4)
    found = runner.bench(subjects, peers, settings)
    again = json.loads(json.dumps(found, allow_nan=False))
    record.validate(again)
    assert again["complete"] and [row["key"] for row in again["rows"]] == [s.key for s in subjects]
    for row in again["rows"]:
        assert set(row["variants"]) == {"eager", "fused", "fused_again", "eager_nchw"}, row["key"]
        assert all("wrong" not in variant for variant in row["variants"].values()), row
        assert "cudnn" in row["omitted"] and row["noise"] is not None and len(row["verdicts"]) == 1
        assert all(variant["kernels"] for variant in row["variants"].values())
    layers = again["rows"][2]["variants"]["fused"]["layer_s"]
    assert {layer["name"] for layer in again["rows"][2]["limit"]["layers"]} == set(layers)
    assert again["ceilings"] == {
        "float32": rates.to_dict(), "bfloat16": rates.to_dict()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_put("schema", 1), "its schema is 1; this version reads 2"),
        (_put("schema", 3), "its schema is 3"),
        (_put("schema", ...), "no record of this package"),
        (_put("kind", "model"), "its kind is 'model'"),
        (_put("rows", ...), "'rows' is a required property"),
        (_put("date", "yesterday"), "date: 'yesterday' does not match"),
        (_put("reached", -1), "reached: -1 is less than"),
        (_put("complete", "yes"), "complete: 'yes' is not of type 'boolean'"),
        (_put("machine/threads", 0), "machine/threads"),
        (_put("ceilings/float32/flops", 0), "ceilings/float32/flops"),
        (_put("sources/conv_bn_act", None), "sources/conv_bn_act"),
        (_put("rows/0/key", ""), "rows/0/key"),
        (_put("rows/0/noise", -0.1), "rows/0/noise"),
        (_put("rows/0/more", 1), "rows/0: .*'more' was unexpected"),
        (_put("rows/0/subject/level", "layer"), "rows/0/subject/level"),
        (_put("rows/0/subject/op", "conv"), "rows/0/subject/op"),
        (_put("rows/0/limit/bytes", ...), "rows/0/limit: 'bytes' is a required"),
        (_put("rows/0/ratios/0/low", 0), "rows/0/ratios/0/low"),
        (_put("rows/0/omitted/apex", None), "rows/0/omitted/apex"),
        (_put("rows/0/load/quiet", 1), "rows/0/load/quiet"),
        (_put("rows/0/variants/eager/samples_s", []), "rows/0/variants/eager"),
        (_put("rows/0/variants/eager/samples_s/0", "fast"), "rows/0/variants/eager"),
        (_put("rows/0/variants/eager/method", "guess"), "rows/0/variants/eager"),
        (_put("rows/0/variants/eager/process", "other"), "rows/0/variants/eager"),
        (_put("rows/0/variants/eager/wrong", "and yet a time"), "rows/0/variants/eager"),
        (_put("rows/0/variants/eager/worst", ...), "rows/0/variants/eager"),
    ],
)
def test_what_is_no_record_is_refused_with_its_place(change: Change, match: str) -> None:
    found = copy.deepcopy(RECORD)
    record.validate(found)
    change(found)
    with pytest.raises(ValueError, match=match):
        record.validate(found)


def test_files_that_are_no_record_say_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    with pytest.raises(ValueError, match=r"record\.json: cannot be read \(No such file"):
        record.read(file)
    for text, match in (
        ("{", "is no JSON"),
        ("[]", "no record of this package"),
        ('{"schema": 1, "kind": "model"}', "its schema is 1"),
        ('{"schema": 2, "kind": "gpu-check"}', "its kind is 'gpu-check'; accepted is 'bench'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"record.json: .*{match}"):
            record.read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no JSON"):
        record.read(file)
    with pytest.raises(ValueError, match="cannot be read"):
        record.read(tmp_path)
    file.write_text(json.dumps(RECORD))
    assert record.read(file) == RECORD


def test_without_jsonschema_the_outermost_fields_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "jsonschema" else real(name)
    )
    found = copy.deepcopy(RECORD)
    record.validate(found)
    del found["rows"], found["of"]
    with pytest.raises(ValueError, match="it lacks of, rows"):
        record.validate(found)


def test_plain_values() -> None:
    assert record.plain({1: (math.nan, 2.0, [math.inf]), "a": "b"}) == {
        "1": [None, 2.0, [None]], "a": "b",
    }  # fmt: skip
