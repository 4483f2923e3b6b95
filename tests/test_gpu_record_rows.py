"""What gpu-record times and tunes, and in which order: rows, ops of several layers, sanitizers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_record  # noqa: E402
from gpu import command, driver, recorded  # noqa: E402


def test_what_is_tuned_first_holds_some_of_every_op() -> None:
    jobs = [SimpleNamespace(subject=SimpleNamespace(op=op, name=name)) for op, name in (
        ("conv_bn_act", "a"), ("conv_bn_act", "b"), ("stem", "c"), ("conv_chain", "d"),
        ("conv_chain", "e"))]  # fmt: skip
    assert [job.subject.name for job in recorded.in_turns(jobs)] == ["a", "c", "d", "b", "e"]


def test_the_engine_is_timed_beside_eager_and_what_compiles() -> None:
    """At every batch, in one row: where the engine joins, eager and Inductor do."""
    models = [one for one in recorded.subjects("cuda") if (one.level, one.op, one.name) == (
        "model", "inference", "resnet50")]  # fmt: skip
    assert {one.batch for one in models} == {256, 32, 1}
    for asked, batches in (((), {256, 1}), (("inductor_max_autotune", "inductor"), {256, 32, 1})):
        found = {peer.name: peer for peer in recorded.peers("cuda", asked)}
        assert {"eager", "fused", "frozen", "inductor", "tensorrt", *asked} <= set(found)
        for one in models:
            assert found["frozen"].why_not(one) is None and found["eager"].why_not(one) is None
            alone = "in inference alone" in (found["inductor"].why_not(one) or "")
            assert alone is (one.batch not in batches)
    compiled = found["inductor_max_autotune"]
    assert not any("inference alone" in (compiled.why_not(one) or "") for one in models)


def test_each_depth_is_timed_and_the_whole_step_with_what_compiles() -> None:
    found = recorded.subjects("cuda")
    assert len({one.key for one in found}) == len(found)
    for op in ("inference", "train"):
        for batch in (256, 32):
            names = {one.name for one in found if (one.level, one.op, one.batch) == (
                "model", op, batch)}  # fmt: skip
            assert names == {f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
    steps = [one for one in found if one.op == "train"]
    assert steps[0].name == "resnet50" and found.index(steps[0]) < 12
    for asked in ((), ("inductor",)):
        inductor = next(p for p in recorded.peers("cuda", asked) if p.name == "inductor")
        for one in steps:
            alone = "prepares too long" in (inductor.why_not(one) or "")
            assert alone is (not asked)


def test_cudnns_graphs_join_kernels_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("resnet_fused.bench.peers.cudnn_graph.installed", lambda *_: None)
    monkeypatch.setattr("resnet_fused.bench.peers.cudnn_graph.for_capability", lambda *_: None)
    assert "cudnn_graph" not in {peer.name for peer in recorded.peers("cuda")}
    peer = next(p for p in recorded.peers("cuda", ("cudnn_graph",)) if p.name == "cudnn_graph")
    taken = {one.op for one in recorded.subjects("cuda")
             if one.level == "kernel" and peer.why_not(one) is None}  # fmt: skip
    assert {"conv_bn_act", "conv_dgrad", "conv_wgrad", "conv_bn_stats"} <= taken
    one = next(one for one in recorded.subjects("cuda") if one.level == "model")
    assert peer.why_not(one) is not None


def test_other_peers_are_asked_for_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ["--output", str(tmp_path)]
    chosen = gpu_record.parse([*out, "--peers", "inductor_max_autotune, tensorrt"])
    assert chosen.peers == ("inductor_max_autotune", "tensorrt")
    with pytest.raises(SystemExit):
        gpu_record.parse([*out, "--peers", "tensorflow"])
    assert "got 'tensorflow'; accepted are eager_nchw" in capsys.readouterr().err


def test_a_sanitizers_calls_share_the_cores_and_one_that_is_cut_costs_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the new kinds of instructions some are reached as soon as of the old ones, too."""
    meeting = threading.Barrier(3)

    def run(words: Sequence[str], *where: object) -> command.Ran:
        meeting.wait(20)
        cut = "--early" in words
        text = "" if cut else "{}\n========= ERROR SUMMARY: 0 errors\n"
        return command.Ran(None if cut else 0, 1.0, text)

    monkeypatch.setattr(driver.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(driver.command, "run", run)
    found: dict[str, dict[str, Any]] = {}
    calls = [("--op", "a"), ("--early",), *[("--op", "b")] * 4]
    driver.run(
        "tool", tmp_path, lambda: 30.0, found.__setitem__, tmp_path, ("memcheck",), calls=calls
    )
    assert found["memcheck"]["ok"] is None
    assert "5 of 6 calls passed" in found["memcheck"]["skipped"]
    first = driver.calls_for([9, 0])[:20]
    assert len(set(first) & set(driver.SM90A_CALLS)) == 10 == len(set(first) & set(driver.CALLS))


def test_paths_are_those_of_where_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its children run in the checkout: a relative path would be another one there.
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "driver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    chosen = gpu_record.parse(["--output", "out", "--results", "kept", "--driver", "bin/driver"])
    assert (chosen.output, chosen.results) == (tmp_path / "out", tmp_path / "kept")
    assert driver.find(chosen.driver) == program
