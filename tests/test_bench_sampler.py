"""The GPU's sampler, on stand-ins for streams, events and graphs that move a clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from resnet_fused.bench import sampler
from resnet_fused.bench.sampler import CudaSampler, DeviceLostError, check_device


class Gpu:
    """Work takes 1 s a call when launched by Python, 0.25 s when replayed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing = self.lost = False
        self.calls: list[tuple[int, bool]] = []

    def call(self, i: int) -> str:
        self.calls.append((i, self.capturing))
        if not self.capturing:
            self.now += 1.0
        return f"output {i}"


class _Event:
    gpu: Gpu

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = self.gpu.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()

    class Event(_Event):
        gpu = made

    class Graph:
        held = 0

        def replay(self) -> None:
            made.now += 0.25 * self.held

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        made.capturing, before = True, len(made.calls)
        try:
            yield
        finally:
            made.capturing = False
        graph.held = len(made.calls) - before

    def synchronize() -> None:
        if made.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    for name, value in (
        ("Event", Event), ("CUDAGraph", Graph), ("graph", capture), ("Stream", _Stream),
        ("current_stream", _Stream), ("stream", lambda stream: contextlib.nullcontext()),
        ("synchronize", synchronize),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(sampler, "check_device", lambda: synchronize())
    return made


def test_a_graph_holds_every_set_once_and_a_sample_is_by_call(gpu: Gpu) -> None:
    made = CudaSampler(gpu.call, 4, torch.inference_mode)
    assert (made.method, made.note) == ("cuda_graph", "")
    assert [i for i, captured in gpu.calls if captured] == [0, 1, 2, 3]
    assert made.outputs == [f"output {i}" for i in range(4)]
    # Warmed up before: a compiler fits into no capture.
    assert [captured for _, captured in gpu.calls[:12]] == [False] * 12
    launched = len(gpu.calls)
    for calls in (1, 4, 9):
        assert made.sample(calls) == pytest.approx(0.25)
    assert len(gpu.calls) == launched
    made.close()
    assert made.outputs == []


def test_without_a_graph_calls_rotate_between_events(gpu: Gpu) -> None:
    made = CudaSampler(gpu.call, 3, torch.inference_mode, graphs=False)
    assert (made.method, made.note) == ("cuda_events", "graphs are switched off")
    assert made.sample(2) == pytest.approx(1.0)
    made.sample(2)
    assert [i for i, _ in gpu.calls] == [0, 1, 2, 0]


def test_a_call_that_no_graph_bears_is_timed_by_events_and_says_so(gpu: Gpu) -> None:
    def call(i: int) -> Any:
        if gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return gpu.call(i)

    made = CudaSampler(call, 2, torch.inference_mode)
    assert made.method == "cuda_events" and made.outputs == []
    assert made.note == "no graph: RuntimeError: operation not permitted when stream is capturing"
    assert made.sample(4) == pytest.approx(1.0)


def test_a_fault_that_stays_is_told_from_one_that_does_not(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(1))
    check_device()
    gpu.lost = True
    with pytest.raises(DeviceLostError, match="the GPU is lost to this process: RuntimeError"):
        check_device()
