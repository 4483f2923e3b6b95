"""Blocks in chunks of a batch and memory's rates, as gpu-check times them; here on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu import chunks, plan  # noqa: E402

RATES = {"flops": 1.0, "bandwidth": 1.0}


def test_a_block_is_timed_whole_in_chunks_and_apart() -> None:
    found = chunks.blocks("cpu", "layer1", 256, "reference")
    assert found["ok"] and set(found["us"]) == {"whole", "chunks", "conv1", "conv2", "conv3"}
    apart = sum(found["us"][f"conv{i}"]["us"] for i in (1, 2, 3))
    assert found["apart_us"] == pytest.approx(apart) and apart > 0
    assert found["predicted_us"] == {"whole": 471, "chunks": 427}
    assert "predicted_us" not in chunks.blocks("cpu", "layer1", 32, "reference")
    line = gpu_check.speed_line(found)
    assert "chunks " in line and "chunks_over_whole" in line


def test_chunks_that_compute_something_else_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    made = chunks._convolutions

    def faulty(operands: dict[str, torch.Tensor]) -> list:
        conv1, conv2, conv3 = made(operands)
        return [conv1, conv2, lambda u, x: conv3(u, x) + 0.1 * (len(x) == chunks.TINY.chunk)]

    monkeypatch.setattr(chunks, "_convolutions", faulty)
    found = chunks.blocks("cpu", "layer1", 256, "reference")
    assert found["ok"] is False and "chunks differ by" in found["error"]


def test_memory_is_written_read_and_both() -> None:
    found = chunks.memory("cpu")
    assert found["ok"] and set(found["bytes_per_s"]) == {"write", "read", "copy", "add"}
    moved = {name: rate * found["us"][name]["us"] for name, rate in found["bytes_per_s"].items()}
    assert moved["copy"] == pytest.approx(2 * moved["write"])
    assert moved["add"] == pytest.approx(3 * moved["read"])
    assert set(found["over_predicted"]) == {"write", "read", "add"}


def test_they_are_among_the_timings() -> None:
    for cuda, kinds in (((), ["triton"]), (["any"], ["cuda", "triton"])):
        names = [task.name for task in plan.timings(RATES, cuda)]
        assert "memory" in names
        found = {name for name in names if name.startswith("chunks ")}
        # Of 32 images the third stage's are no more than a chunk.
        places = [f"layer{i}@256" for i in (1, 2, 3)] + ["layer1@32", "layer2@32"]
        assert found == {f"chunks {place} {kind}" for place in places for kind in kinds}
