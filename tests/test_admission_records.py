"""Records of admission: the user's file, what the package ships, and what belongs to a verdict."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from admitting import (
    ask,
    ask_in_another_process,
    cache,
    clean_machine,  # noqa: F401  (a fixture for every test)
    enter,
    ran,
    warnings,
)
from click.testing import CliRunner

import resnet_fused.ops  # noqa: F401  (importing it enters the implementations)
from resnet_fused import _platform, _selfcheck, _verdicts, admission
from resnet_fused.cli import main
from resnet_fused.cli.info import info

ROOT = admission.PACKAGE.parent


@pytest.mark.parametrize("what", ["sources", "gpu", "driver", "torch", "triton"])
def test_a_verdict_counts_for_the_same_sources_and_gpu_only(what, calls, monkeypatch):
    enter(calls, "right")
    ask()
    gpu = _platform.identify("cpu")
    other = {"gpu": {"name": "another"}, "sources": {}}.get(what, {what: "0.0"})
    if what == "sources":
        (calls.parent / "kernel.py").write_text("# version 2")
    monkeypatch.setattr(_platform, "identify", lambda device: gpu._replace(**other))
    assert ask_in_another_process().source == "self-check"
    assert ran(calls) == ["right", "right"]
    assert len(json.loads(cache().read_text())["verdicts"]) == 2


def test_the_hash_of_sources(calls, tmp_path, monkeypatch):
    kernel = enter(calls, "right")
    first = admission.source_hash(kernel)
    assert len(first) == 64
    admission.source_hash.cache_clear()
    assert admission.source_hash(kernel) == first
    (tmp_path / "other.py").write_text("# version 1")
    renamed = enter(calls, op="other", sources=(str(tmp_path / "other.py"),))
    assert admission.source_hash(renamed) != first
    names = ("csrc/kernels/a.cuh", "csrc/launch/b.cu")
    hashes = []
    for number, digest in enumerate(("1", "1", "2")):
        built = {"sources": {names[0]: digest, names[1]: "0"}}
        monkeypatch.setattr(admission._extension, "build_info", lambda built=built: built)
        sources = names if number else names[::-1]
        hashes.append(admission.source_hash(enter(calls, op=f"op{number}", sources=sources)))
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(FileNotFoundError):
        admission.source_hash(enter(calls, op="gone", sources=("triton/gone.py",)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "verdicts": []}',
        "\x00\xff",
        '{"verdicts": 3}',
    ],
)
def test_a_corrupt_file_costs_a_warning_and_is_replaced(content, calls, caplog):
    enter(calls, "right")
    cache().parent.mkdir()
    cache().write_text(content, encoding="latin-1")
    assert ask().reason is None
    assert len(warnings(caplog)) == 1 and str(cache()) in caplog.text
    assert ask_in_another_process().source == "cache"


def test_damaged_entries_are_checked_again(calls, caplog):
    enter(calls, "right")
    ask()
    content = json.loads(cache().read_text())
    (entry,) = content["verdicts"].values()
    entry["results"] = {"right": 7}
    cache().write_text(json.dumps(content))
    assert ask_in_another_process().source == "self-check"
    assert "1 damaged entries are ignored" in caplog.text


def test_a_folder_that_cannot_be_written(calls, caplog, tmp_path):
    enter(calls, "right", "wrong")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert ask().configurations == {"right"}
    assert ask().configurations == {"right"}
    assert ran(calls) == ["right", "wrong"]
    assert len([w for w in warnings(caplog) if "verdicts on kernels are not kept" in w]) == 1
    assert ask_in_another_process().source == "self-check"


def test_no_trace_of_a_write_that_fails(calls, monkeypatch):
    def fail(*paths):
        raise PermissionError("read-only")

    enter(calls, "right")
    monkeypatch.setattr(_verdicts.os, "replace", fail)
    assert ask().reason is None
    assert [p.name for p in cache().parent.iterdir() if "lock" not in p.name] == []


WRITER = """
import sys
from resnet_fused import _verdicts
for number in range(40):
    _verdicts.save(f"{sys.argv[1]}{number}", _verdicts.Stored({"a": None}), {})
"""


def test_processes_that_write_at_once_lose_nothing():
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name], env=_selfcheck._environment())
        for name in "abc"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    keys = json.loads(cache().read_text())["verdicts"]
    assert keys.keys() == {f"{name}{number}" for name in "abc" for number in range(40)}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RESNET_FUSED_CACHE": "/c"}, "/c/admission.json"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/resnet_fused/admission.json"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/h/.cache/resnet_fused/admission.json"),
        ({}, "/h/.cache/resnet_fused/admission.json"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
def test_where_the_file_lies(variables, expected, monkeypatch):
    for name in ("RESNET_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(admission.cache_path()) == expected


def entry(kernel: admission.Kernel, configuration: str, ok: bool = True, **changes):
    return {
        "op": kernel.op, "implementation": kernel.implementation, "configuration": configuration,
        "ok": ok, "hash": admission.source_hash(kernel), "arch": "cpu", "timings": {"3x3": 12.5},
        **changes,
    }  # fmt: skip


def ship(*entries) -> list[str]:
    content, refused = admission.record(entries)
    admission.SHIPPED.write_text(json.dumps(content))
    admission.forget()
    return refused


def test_a_shipped_record_needs_no_check(calls):
    kernel = enter(calls, "right", "wrong", "hangs")
    assert ship(entry(kernel, "right"), entry(kernel, "wrong", False)) == []
    found = ask()
    assert (found.reason, found.source) == (None, "shipped")
    assert found.configurations == {"right"}
    assert found.refused == (("wrong", "failed on cpu when it was recorded"),)
    ship(entry(kernel, "right", False))
    assert ask().reason == "not admitted: every configuration failed on cpu when it was recorded"
    assert ran(calls) == []


def test_a_shipped_record_of_another_architecture_or_source_does_not_count(calls):
    kernel = enter(calls, "right")
    ship(entry(kernel, "right", False, arch="sm_90"))
    assert ask().source == "self-check"
    ship(entry(kernel, "right"))
    cache().unlink()
    (calls.parent / "kernel.py").write_text("# version 2")
    assert ask_in_another_process().source == "self-check"


def test_what_the_package_ships_is_sound(monkeypatch):
    shipped = admission.PACKAGE / "admitted.json"
    content = json.loads(shipped.read_text(encoding="utf-8"))
    assert content["version"] == 1
    assert [admission.check_record(one) for one in content["records"]] == content["records"]


def test_records_that_are_left_out_are_named(calls):
    kernel = enter(calls, "right", "wrong")
    entries = [
        entry(kernel, "right"),
        entry(kernel, "right", timings={"3x3": 11.0}, note="not a field"),
        entry(kernel, "wrong", hash="0" * 64),
        entry(kernel, "other"),
        entry(kernel, "right", op="elsewhere"),
    ]
    content, refused = admission.record(entries)
    assert [one["timings"] for one in content["records"]] == [{"3x3": 11.0}]
    assert content["records"][0].keys() == admission.RECORD_FIELDS.keys()
    assert len(refused) == 3
    assert "recorded for sources 000000000000, the present ones are" in refused[0]
    assert refused[1:] == [
        "standin.triton other cpu: the kernel has no such configuration",
        "elsewhere.triton right cpu: no such kernel",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ok": 1}, "ok: expected bool, got 1"), ({"arch": None}, "arch: expected str, got None")],
)
def test_malformed_records_name_the_field(change, message, calls):
    kernel = enter(calls, "right")
    with pytest.raises(ValueError, match=message):
        admission.record([entry(kernel, "right", **change)])
    with pytest.raises(ValueError, match="an entry must be an object, got list"):
        admission.record([[]])


@pytest.fixture
def admit():
    """tools/admit.py, called in this process on files and an output."""
    spec = importlib.util.spec_from_file_location("admit", ROOT / "tools" / "admit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_the_tool_writes_what_the_package_ships(calls, admit, tmp_path, capsys):
    kernel = enter(calls, "right")
    good = entry(kernel, "right", arch="sm_90")
    stale = entry(kernel, "right", arch="sm_80", hash="0" * 64)
    (tmp_path / "list.json").write_text(json.dumps([good]))
    (tmp_path / "object.json").write_text(json.dumps({"admission": [stale], "gpu": "any"}))
    output = tmp_path / "output.json"
    assert admit(tmp_path / "list.json", tmp_path / "object.json", "--output", output) == 1
    assert json.loads(output.read_text()) == {"version": 1, "records": [good]}
    refused = f"refused: {tmp_path / 'object.json'}: standin.triton right sm_80: recorded for"
    assert capsys.readouterr().err.startswith(refused)
    # What is there stays while it is of the present sources.
    output.write_text(json.dumps({"version": 1, "records": [good, stale]}))
    (tmp_path / "none.json").write_text("[]")
    assert admit(tmp_path / "none.json", "--output", output) == 0
    assert f"dropped from {output}: standin.triton right sm_80" in capsys.readouterr().out
    assert json.loads(output.read_text())["records"] == [good]


@pytest.mark.parametrize("content", ["{", '{"rows": []}', "3", "[3]", '[{"op": 1}]', None])
def test_the_tool_on_files_that_are_none(content, admit, tmp_path):
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    with pytest.raises(SystemExit, match="^error: "):
        admit(tmp_path / "bad.json", "--output", tmp_path / "output.json")
    assert not (tmp_path / "output.json").exists()


def test_the_tool_runs_by_itself():
    """On the kernels that the package really has."""
    command = [sys.executable, str(ROOT / "tools" / "admit.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "admitted.json" in run.stdout


def info_text(*arguments: str) -> str:
    result = CliRunner().invoke(info, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_info_shows_kernels_and_starts_no_check(calls, monkeypatch):
    kernel = enter(calls, "right1", "wrong", "right2")
    text = info_text()
    reason = _platform.platform_refusal("triton", 0)
    assert f"cache {cache()}" in text
    if not torch.cuda.is_available():
        assert f"standin                triton    GPU 0  {reason}" in text
    monkeypatch.setattr(admission, "platform_refusal", lambda implementation, device: None)
    gpu = _platform.identify("cpu")
    monkeypatch.setattr(_platform, "identify", lambda device: gpu)
    assert "not admitted yet: `resnet-fused info` starts no self-check" in info_text()
    assert ran(calls) == []
    ask()
    (row,) = json.loads(info_text("--json"))["admission"]["kernels"]
    assert row["admitted"] and row["configurations"] == ["right1", "right2"]
    assert row["refused"] == [["wrong", "ArithmeticError: 3 of 8 elements are wrong"]]
    text = info_text()
    assert "admitted (self-check): 2 configurations" in text
    assert "not wrong: ArithmeticError" in text
    ship(entry(kernel, "right1"))
    assert "admitted (shipped): 1 configurations" in info_text()


def test_info_names_a_bad_time_limit(monkeypatch):
    monkeypatch.setenv(_selfcheck.SECONDS, "soon")
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 2
    assert "RESNET_FUSED_SELFCHECK_SECONDS: got 'soon'" in result.output
