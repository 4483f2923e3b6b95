"""`resnet-fused bench`: what it refuses, what it shows, and when it exits with 1."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import bench_records
import pytest
from click.testing import CliRunner, Result

from resnet_fused.bench import subject as subjects
from resnet_fused.cli import main

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: object, code: int = 0) -> Any:
    result = run(*arguments, "--json", code=code)
    assert result.stderr == ""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(result.stdout, parse_constant=refuse)


@pytest.fixture
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are refused before anything is timed."""

    def timed(*_: object, **__: object) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr("resnet_fused.bench.timing.interleaved", timed)
    monkeypatch.setattr("resnet_fused.bench.model.interleaved", timed)
    monkeypatch.setattr("resnet_fused.bench.ceilings.measure", timed)


def test_the_options_know_what_subjects_know() -> None:
    command: Any = sys.modules["resnet_fused.cli.bench"]  # the name is the command's, too
    assert command.LEVELS == subjects.LEVELS
    assert set(command.OPS) == set(subjects.KERNEL_OPS)
    assert command.MODES == subjects.MODEL_OPS
    assert command.DTYPES == subjects.DTYPES


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--level", "layer"], ["--level", "'layer'", "kernel"]),
        (["--level", "kernel", "--op", "conv"], ["--op", "'conv'", "conv_dgrad"]),
        (["--op", "bn_act"], ["--op: is for --level kernel, and --level is model"]),
        (["--level", "kernel", "--mode", "training"], ["--mode: is for --level block or model"]),
        (["--mode", "train"], ["--mode", "'train'", "training_frozen"]),
        (["--peers", "eager,tensorflow"], ["--peers: there is no 'tensorflow'", "openvino"]),
        (["--peers", ""], ["--peers: there is no ''"]),
        (["--only", "conv9"], ["--only: no key holds conv9", "model/inference/resnet50/b1"]),
        (["--budget-min", "0"], ["--budget-min", "0"]),
        (["--budget-min", "soon"], ["--budget-min", "'soon'"]),
        (["resnet51", "--level", "model"], ["MODEL", "'resnet51'", "resnet50", "wide_resnet"]),
        (["timm:resnet50", "--level", "model"], ["MODEL", "'timm:resnet50'", "resnet50"]),
        (["--level", "block", "--device", "cuda:7"], ["--device", "'cuda:7'"]),
        (["--gate", "5%"], ["--gate: goes with --compare A B alone"]),
        (["--force-compare"], ["--force-compare: goes with --compare"]),
        (["--compare", "a.json"], ["--compare", "2 arguments"]),
        (["--compare", "a.json", "b.json"], ["a.json: cannot be read (No such file"]),
        (["--compare", "a", "b", "--batch", "1"], ["times nothing, so --batch cannot go"]),
        (["resnet18", "--compare", "a", "b"], ["times nothing, so MODEL cannot go with it"]),
        (["--compare", "a", "b", "--gate", "5"], ["--gate", "'5'", "5%, or 0.05"]),
        (["--compare", "a", "b", "--gate", "-1%"], ["--gate", "'-1%'"]),
        (["--compare", "a", "b", "--gate", "nan"], ["--gate", "'nan'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_before_anything_is_timed(arguments: list[str], parts: list[str]) -> None:
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize("option", ["--output", "--html", "--png-dir"])
def test_where_nothing_can_be_written(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("--level", "model", option, tmp_path / "file" / "x", code=2)
    assert result.stderr.startswith(f"error: {option}: cannot make folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("nothing_is_timed")
def test_a_folder_is_no_file_and_two_files_are_two(tmp_path: Path) -> None:
    assert "is a folder; give a file" in run("--output", tmp_path, code=2).stderr
    twice = run("--html", tmp_path / "x", "--output", tmp_path / "x", code=2).stderr
    assert twice.startswith("error: --output and --html: both name")


@pytest.mark.usefixtures("nothing_is_timed")
def test_a_page_needs_what_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else real(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", without)
    result = run("--level", "model", "--html", tmp_path / "x.html", code=2)
    assert result.stderr.startswith("error: --html: this needs matplotlib")


def write(path: Path, **changes: Any) -> Path:
    """An example record of a CPU's models; `slow` slows our variant in all of them."""
    slow = changes.pop("slow", 1.0)
    made = bench_records.example(
        0, device="cpu", levels=("model",), change=lambda about: {"fused": slow}
    )
    path.write_text(json.dumps(made | changes))
    return path


def test_compare_says_what_became_slower_and_the_gate_bites(tmp_path: Path) -> None:
    old, same = write(tmp_path / "old.json"), write(tmp_path / "same.json")
    slow = write(tmp_path / "slow.json", slow=1.3)
    assert "gate: passed" in run("--compare", old, same, "--gate", "5%").stdout
    result = run("--compare", old, slow, "--gate", "5%", code=1)
    assert "gate: FAILED at 5.0%" in result.stdout
    assert "model/inference/resnet50/b8/float32: fused is at least" in result.stdout
    run("--compare", old, slow)  # without a gate a comparison fails nothing
    run("--compare", old, slow, "--gate", "60%")
    run("--compare", old, slow, "--gate", "0.6")
    back = run("--compare", slow, old, "--gate", "0%").stdout
    assert len(re.findall(r"fused .* faster\s*$", back, re.MULTILINE)) == 4


def test_compare_as_json(tmp_path: Path) -> None:
    old, slow = write(tmp_path / "old.json"), write(tmp_path / "slow.json", slow=1.3)
    found = as_json("--compare", old, slow, "--gate", "5%", code=1)
    assert found["gate"]["ok"] is False
    verdicts = {c["verdict"] for c in found["changes"] if c["variant"] == "fused"}
    assert verdicts == {"slower"}
    assert as_json("--compare", old, slow)["gate"] is None


def test_compare_takes_rows_by_their_keys(tmp_path: Path) -> None:
    old, slow = write(tmp_path / "old.json"), write(tmp_path / "slow.json", slow=1.3)
    found = as_json("--compare", old, slow, "--only", "/b8/,nothing")
    assert {c["key"].split("/")[3] for c in found["changes"]} == {"b8"}
    assert "no row of either record holds nope" in (
        run("--compare", old, slow, "--only", "nope", code=2).stderr
    )


def test_compare_knows_machines(tmp_path: Path) -> None:
    machine = {**bench_records.example(levels=(), device="cpu")["machine"], "cpu": "Elsewhere"}
    old = write(tmp_path / "old.json")
    other = write(tmp_path / "other.json", machine=machine, slow=1.3)
    said = run("--compare", old, other, "--gate", "5%", code=1).stdout
    assert "other machine, CPU: Example processor against Elsewhere" in said
    assert "nothing could be judged" in said
    forced = run("--compare", old, other, "--gate", "5%", "--force-compare", code=1).stdout
    assert "fused is at least" in forced


def test_compare_reads_the_committed_records() -> None:
    results = ROOT / "benchmarks" / "results" / "cpu"
    file = results / "resnet50-float32.json"
    said = run("--compare", file, file, "--gate", "0%").stdout
    assert "model/inference/resnet50/b8/float32" in said and "the same within" in said
