"""Comparing records and the gate: planted slowness is found, noise is not taken for it."""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.bench import compare as c
from resnet_fused.bench.load import Load

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"eager": 2e-3, "fused": 1e-3, "onednn": 1.1e-3}
Record = dict[str, Any]


def row(
    name: str = "resnet50",
    *,
    seed: int = 0,
    times: Mapping[str, float] = TIMES,
    dtype: str = "float32",
    device: str = "cpu",
    size: int = 224,
    noise: float | None = 0.01,
    jitter: float = 0.01,
    rounds: int = 15,
    foreign: float = 0.01,
) -> Record:
    """A row whose samples lie around `times` in seconds, with that much random jitter."""
    draw = random.Random(f"{name} {seed}")
    samples = {
        n: [t * math.exp(draw.gauss(0, jitter)) for _ in range(rounds)] for n, t in times.items()
    }
    subject = {"level": "model", "op": "inference", "name": name, "batch": 8, "dtype": dtype,
               "device": device, "size": size, "seed": 0}  # fmt: skip
    return {
        "key": f"model/inference/{name}/b8/{dtype}",
        "subject": subject,
        "variants": {
            n: {"samples_s": s, "median_s": statistics.median(s)} for n, s in samples.items()
        },
        "omitted": {},
        "ratios": [],
        "noise": noise,
        "load": Load(foreign, 0.9, 2, 10.0).to_dict(),
        "verdicts": [],
    }  # fmt: skip


def record(*rows: Record, **changes: Any) -> Record:
    """A record of these rows, with what `compare` reads of its head."""
    machine = {"cpu": "Example processor", "cpu_capability": "AVX512", "threads": 2,
               "gpus": [{"name": "Example GPU", "capability": "9.0"}], "driver": "1.0"}  # fmt: skip
    head = {"schema": 2, "kind": "bench", "date": "2000-01-01T00:00:00+00:00", "commit": "0" * 40,
            "versions": {"torch": "2.15.0"}, "machine": machine, "complete": True,
            "reached": len(rows), "of": len(rows)}  # fmt: skip
    return {**head, **copy.deepcopy(changes), "rows": list(rows)}


def only(found: c.Comparison, variant: str) -> c.Change:
    (change,) = [change for change in found.changes if change.variant == variant]
    return change


def slower(factor: float, *variants: str) -> dict[str, float]:
    """TIMES with some of them longer."""
    return {n: t * (factor if n in variants else 1) for n, t in TIMES.items()}


def test_a_planted_slow_variant_is_slower_and_fails_the_gate() -> None:
    found = c.compare(record(row()), record(row(seed=1, times=slower(1.2, "fused"))))
    change = only(found, "fused")
    assert change.verdict == c.SLOWER
    assert change.ratio is not None
    assert change.ratio.median == pytest.approx(1 / 1.2, rel=0.02)
    assert 0.12 < change.slowdown < 0.2
    outcome = c.gate(found, 0.05)
    assert not outcome.ok
    (sentence,) = outcome.failures
    assert "model/inference/resnet50/b8/float32: fused is at least" in sentence
    assert c.gate(found, 0.3).ok  # and a wider gate lets it through


def test_noise_alone_never_trips_the_gate() -> None:
    """A hundred pairs of runs of the same thing; the jitter is as large as the noise says."""
    same = 0
    for seed in range(100):
        found = c.compare(record(row(seed=seed)), record(row(seed=1000 + seed)))
        assert c.gate(found, 0.0).ok, found
        same += only(found, "fused").verdict == c.SAME
    assert same == 100


@pytest.mark.parametrize("jitter", [0.003, 0.05])
def test_a_slowness_just_above_the_noise_is_found_where_samples_allow_it(jitter: float) -> None:
    """5% more: seen through 0.3% of jitter, not through 5%."""
    before = record(row(jitter=jitter))
    after = record(row(seed=1, jitter=jitter, times=slower(1.05, "fused")))
    assert only(c.compare(before, after), "fused").verdict == (
        c.SLOWER if jitter < 0.01 else c.SAME
    )


def test_a_slower_machine_is_no_slower_kernel() -> None:
    found = c.compare(record(row()), record(row(seed=1, times=slower(1.3, *TIMES))))
    change = only(found, "fused")
    assert change.ratio is not None and change.ratio.high < 0.8  # in seconds it is slower
    assert change.verdict == c.SAME
    assert only(found, "eager").verdict == c.SLOWER
    assert c.gate(found, 0.05).ok


def test_a_faster_eager_is_no_slower_kernel() -> None:
    found = c.compare(record(row()), record(row(seed=1, times=slower(0.7, "eager"))))
    assert only(found, "fused").verdict == c.SAME
    assert only(found, "eager").verdict == c.FASTER
    assert c.gate(found, 0.05).ok


def test_faster_and_peers_pass_the_gate() -> None:
    times = {"eager": 2e-3, "fused": 0.8e-3, "onednn": 1.9e-3}
    found = c.compare(record(row()), record(row(seed=1, times=times)))
    assert only(found, "fused").verdict == c.FASTER
    assert only(found, "onednn").verdict == c.SLOWER  # a peer's affair
    assert c.gate(found, 0.05).ok


@pytest.mark.parametrize("ours", c.OURS)
def test_the_gate_guards_each_of_our_variants(ours: str) -> None:
    times = {"eager": 2e-3, ours: 1e-3}
    found = c.compare(record(row(times=times)), record(row(seed=1, times=times | {ours: 1.5e-3})))
    assert not c.gate(found, 0.05).ok


def test_wrong_or_gone_fails_the_gate() -> None:
    before, after = record(row()), record(row(seed=1))
    after["rows"][0]["variants"]["fused"] = {"wrong": "max error 3.2x the bound"}
    found = c.compare(before, after)
    assert only(found, "fused").verdict == c.WRONG
    assert c.gate(found, 0.05).failures[0].endswith("fused is wrong: max error 3.2x the bound")
    del after["rows"][0]["variants"]["fused"]
    after["rows"][0]["omitted"]["fused"] = "it crashed"
    assert c.gate(c.compare(before, after), 0.05).failures[0].endswith("only in A: it crashed")
    gone = c.compare(record(row(), row("resnet18")), record(row(seed=1)))
    assert gone.only_a == ("model/inference/resnet18/b8/float32",)
    assert [f.partition(":")[0] for f in c.gate(gone, 0.05).failures] == list(gone.only_a)


def test_a_peer_that_is_wrong_or_gone_passes_and_is_said() -> None:
    before, after = record(row()), record(row(seed=1))
    after["rows"][0]["variants"]["onednn"] = {"wrong": "off"}
    found = c.compare(before, after)
    assert only(found, "onednn").verdict == c.WRONG
    assert c.gate(found, 0.05).ok
    back = c.compare(after, before)
    assert only(back, "onednn").text == "only in B: it was wrong in A"


def test_new_rows_are_listed() -> None:
    found = c.compare(record(row()), record(row(seed=1), row("resnet18")))
    assert found.only_b == ("model/inference/resnet18/b8/float32",)
    assert {change.key for change in found.changes} == {"model/inference/resnet50/b8/float32"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cpu": "Another processor"}, "other machine, CPU: Example processor against Another"),
        ({"threads": 64}, "other machine, threads: 2 against 64"),
    ],
)
def test_another_machine_is_said_and_not_compared(change: dict[str, Any], said: str) -> None:
    before, after = record(row()), record(row(seed=1, times=slower(3, "fused")))
    after["machine"] = {**after["machine"], **change}
    found = c.compare(before, after)
    assert {one.verdict for one in found.changes} == {c.NOT_COMPARABLE}
    assert said in only(found, "fused").text
    outcome = c.gate(found, 0.05)
    assert outcome.failures == ("nothing could be judged, so the gate guards nothing",)
    assert len(outcome.unjudged) == 1
    assert only(c.compare(before, after, force=True), "fused").verdict == c.SLOWER


def test_another_gpu_matters_to_its_own_rows_alone() -> None:
    rows = [row(seed=s, device=d, name=d) for s in (0, 1) for d in ("cpu", "cuda")]
    before, after = record(*rows[:2]), record(*rows[2:])
    after["machine"] = {**after["machine"], "gpus": [{"name": "Another", "capability": "9.0"}]}
    found = c.compare(before, after)
    verdicts = {(one.key.split("/")[2], one.verdict) for one in found.changes}
    assert verdicts == {("cpu", c.SAME), ("cuda", c.NOT_COMPARABLE)}


def test_another_dtype_is_said_and_not_compared() -> None:
    before, after = record(row()), record(row(seed=1, dtype="bfloat16"))
    found = c.compare(before, after)
    assert (found.only_a, found.only_b) == ((), ())
    assert only(found, "fused").text == "not comparable: other dtype: float32 against bfloat16"
    assert only(c.compare(before, after, force=True), "fused").verdict == c.SAME


def test_another_size_under_the_same_key_is_not_compared() -> None:
    found = c.compare(record(row()), record(row(seed=1, size=64)))
    assert only(found, "fused").text == "not comparable: other size: 224 against 64"


@pytest.mark.parametrize("loaded", [0, 1])
def test_a_loaded_machine_gives_no_verdict(loaded: int) -> None:
    rows = [row(seed=s, foreign=0.2 if s == loaded else 0.01, times=slower(1 + s, "fused"))
            for s in (0, 1)]  # fmt: skip
    found = c.compare(record(rows[0]), record(rows[1]))
    change = only(found, "fused")
    which = "AB"[loaded]
    assert change.text.startswith(f"no verdict: in {which}, other programs used 20.0% of the 2")
    assert not c.gate(found, 0.05).ok  # nothing was judged
    quiet = [row("resnet18", seed=s) for s in (0, 1)]
    outcome = c.gate(c.compare(record(rows[0], quiet[0]), record(rows[1], quiet[1])), 0.05)
    assert outcome.ok and outcome.judged == 1 and len(outcome.unjudged) == 1


def test_a_replayed_graph_does_not_mind_a_busy_cpu() -> None:
    rows = [row(seed=s, foreign=0.2, device="cuda") for s in (0, 1)]
    for one in rows:
        for variant in one["variants"].values():
            variant["method"] = "cuda_graph"
    assert only(c.compare(record(rows[0]), record(rows[1])), "fused").verdict == c.SAME
    rows[1]["variants"]["eager"]["method"] = "cuda_events"
    assert only(c.compare(record(rows[0]), record(rows[1])), "fused").verdict == c.NO_VERDICT


def test_few_samples_give_no_verdict() -> None:
    rows = [row(seed=s, rounds=3, times=slower(1 + s, "fused")) for s in (0, 1)]
    change = only(c.compare(record(rows[0]), record(rows[1])), "fused")
    assert change.text == "no verdict: 3 and 3 samples are too few"
    six = [row(seed=s, rounds=6, times=slower(1 + s, "fused")) for s in (0, 1)]
    assert only(c.compare(record(six[0]), record(six[1])), "fused").verdict == c.SLOWER


def test_without_a_measured_noise_the_spread_stands_for_it() -> None:
    rows = [row(seed=s, noise=None) for s in (0, 1)]
    change = only(c.compare(record(rows[0]), record(rows[1])), "fused")
    spreads = []
    for one in rows:
        samples = one["variants"]["fused"]["samples_s"]
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        spreads.append((high - low) / middle)
    assert change.noise == pytest.approx(max(spreads))


def test_the_noise_floors_second_run_is_no_variant() -> None:
    times = TIMES | {c.AGAIN: 1e-3}
    found = c.compare(record(row(times=times)), record(row(seed=1)))
    assert c.AGAIN not in {change.variant for change in found.changes}


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    """Of 400 pairs of series with a known ratio of 1.1, at least 95% of the intervals hold it."""
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        old, new = ([t * math.exp(draw.gauss(0, 0.05)) for _ in range(15)] for t in (1.1, 1.0))
        found = c.ratio_of_medians(old, new)
        held += found.low <= 1.1 <= found.high
    assert held >= 380
    exact = c.ratio_of_medians([2.0] * 15, [1.0] * 15)
    assert (exact.median, exact.low, exact.high) == (2, 2, 2)
    assert exact.confidence >= 0.95


@pytest.mark.parametrize("limit", [-0.1, math.inf, math.nan])
def test_the_gate_refuses_what_is_no_limit(limit: float) -> None:
    with pytest.raises(ValueError, match="gate: expected a fraction"):
        c.gate(c.compare(record(row()), record(row())), limit)


def test_notes_say_what_else_differs() -> None:
    sources = {"conv_bn_act.cuda": "1", "bn_act.cuda": "2"}
    after = record(
        row(seed=1), versions={"torch": "2.16.0"}, complete=False, of=53, sources=sources
    )
    after["machine"] = {**after["machine"], "driver": "2.0"}
    before = record(row(), sources=sources | {"bn_act.cuda": "3"})
    notes = c.compare(before, after).notes
    assert notes == (
        "torch: 2.15.0 in A, 2.16.0 in B",
        "sources changed: bn_act.cuda",
        "driver: 1.0 in A, 2.0 in B",
        "B is not complete: 1 of 53 rows",
    )


def test_only_chooses_rows() -> None:
    rows = [[row(n, seed=s) for n in ("resnet18", "resnet50")] for s in (0, 1)]
    found = c.compare(record(*rows[0]), record(rows[1][1]), only=lambda key: "resnet50" in key)
    assert found.only_a == ()
    assert {change.key for change in found.changes} == {rows[0][1]["key"]}


def test_to_dict_is_json() -> None:
    found = c.compare(record(row()), record(row(seed=1), row("resnet18")))
    copied = json.loads(json.dumps({**found.to_dict(), "gate": c.gate(found, 0.05).to_dict()}))
    assert copied["gate"]["ok"] is True
    assert copied["changes"][0]["ratio"].keys() == {"median", "low", "high", "confidence"}


def test_records_of_schema_1_are_read() -> None:
    """The committed ones: the same machine, another dtype."""
    old, new = (
        c.load(ROOT / "benchmarks" / "results" / "cpu" / f"resnet50-{dtype}.json")
        for dtype in ("float32", "bfloat16")
    )
    assert [one["key"] for one in old["rows"]] == [
        "model/inference/resnet50/b1/float32", "model/inference/resnet50/b8/float32"
    ]  # fmt: skip
    assert set(old["rows"][0]["variants"]) == {"eager", "fused", "onednn"}
    found = c.compare(old, copy.deepcopy(old))
    assert {change.verdict for change in found.changes} == {c.SAME}
    assert {change.verdict for change in c.compare(old, new).changes} == {c.NOT_COMPARABLE}


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda file: None, r"r\.json: cannot be read \(No such file"),
        (lambda file: file.mkdir(), r"r\.json: cannot be read \(Is a directory"),
        (lambda file: file.write_text("{"), r"r\.json: is no JSON"),
        (lambda file: file.write_text("[]"), r"r\.json"),
        (lambda file: file.write_text('{"schema": 1, "kind": "model"}'), "of schema 1 lacks"),
        (lambda file: file.write_text('{"schema": 7, "kind": "bench"}'), r"r\.json"),
    ],
)
def test_files_that_are_no_record(
    tmp_path: Path, write: Callable[[Path], object], match: str
) -> None:
    file = tmp_path / "r.json"
    write(file)
    with pytest.raises(ValueError, match=match):
        c.load(file)
