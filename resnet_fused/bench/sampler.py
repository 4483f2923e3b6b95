"""A variant that is timed: a peer's call on rotating operands, by a clock or by a GPU's events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from resnet_fused.bench import gauges, waterfall
from resnet_fused.bench.judging import Judgement
from resnet_fused.bench.peers import NoPeerError
from resnet_fused.bench.timing import SampleError

if TYPE_CHECKING:
    from resnet_fused.bench.peers import Peer, Prepared
    from resnet_fused.bench.work import Work

WARM_UP = 3  # calls before a graph is captured: compilers and handles fit into no capture
PERF_COUNTER, CUDA_EVENTS, CUDA_GRAPH = "perf_counter", "cuda_events", "cuda_graph"


class DeviceLostError(RuntimeError):
    """The GPU answers this process no more: nothing can be timed in it from here on."""


class Variant(Protocol):
    """What the runner does with a peer, in this process or in another.

    Attributes:
        name: of the peer.
        process: "own" or "child".
        method: how it is timed, once it is armed.
        note: what is to be known of that, such as why no graph was captured.
        prepare_s: seconds that preparing took.
    """

    name: str
    process: str
    method: str
    note: str
    prepare_s: float

    def prepare(self) -> None:
        """Builds the call; raises NoPeerError or SampleError with the reason."""

    def judge(self) -> Judgement:
        """Runs set 0 and judges it; raises SampleError."""

    def arm(self) -> None:
        """Makes the call ready to be sampled; raises SampleError."""

    def sample(self, calls: int) -> float:
        """Seconds a call; raises SampleError."""

    def kernels(self) -> list[str]:
        """Names of what a call ran."""

    def peak_memory(self) -> int | None:
        """Bytes at a call's peak, above what was in use before."""

    def layers(self, orders: Sequence[Sequence[gauges.Step]]) -> dict[str, float] | None:
        """Seconds of each layer; see `gauges.layer_seconds`."""

    def ops(self) -> dict[str, float]:
        """Seconds of each kind of kernel; see `waterfall.op_seconds`."""

    def close(self) -> None:
        """Ends it, whatever its state; never raises."""


class CpuSampler:
    """Times calls with a clock, set after set.

    Args:
        call: runs operand set i.
        sets: how many there are.
        mode: makes the context of the calls (inference mode).
        clock: seconds, monotonic.
    """

    method = PERF_COUNTER
    note = ""

    def __init__(
        self,
        call: Callable[[int], Any],
        sets: int,
        mode: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._call, self._sets, self._mode, self._clock = call, sets, mode, clock
        self._next = 0

    def sample(self, calls: int) -> float:
        """Seconds a call, over `calls` calls in a row."""
        with self._mode():
            start = self._clock()
            for _ in range(calls):
                self._call(self._next)
                self._next = (self._next + 1) % self._sets
            return (self._clock() - start) / calls


class CudaSampler:
    """Times calls on a GPU between two events; as a replayed graph of all sets where one is made.

    A graph leaves out what Python and launching cost, which events alone would count.

    Args:
        call: launches operand set i.
        sets: how many there are.
        mode: makes the context of the calls.
        graphs: whether to try to capture.
    """

    def __init__(
        self,
        call: Callable[[int], Any],
        sets: int,
        mode: Callable[[], contextlib.AbstractContextManager[Any]],
        graphs: bool = True,
    ) -> None:
        self._call, self._sets, self._mode, self._next = call, sets, mode, 0
        self.method, self.note = CUDA_EVENTS, "" if graphs else "graphs are switched off"
        self.outputs: list[Any] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        if graphs:
            try:
                self._capture()
            except Exception as error:  # whatever a peer's call does that no capture bears
                self._graph, self.outputs = None, []
                self.note = f"no graph: {first_line(error)}"
                check_device()

    def _capture(self) -> None:
        with self._mode():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    for i in range(self._sets):
                        self._call(i)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                # Kept, so that every set has an output of its own: a rotating one, too.
                outputs = [self._call(i) for i in range(self._sets)]
        graph.replay()
        torch.cuda.synchronize()
        self._graph, self.outputs, self.method = graph, outputs, CUDA_GRAPH

    def sample(self, calls: int) -> float:
        """Seconds a call; a graph is replayed whole, with as many calls as it has sets."""
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if self._graph is not None:
            replays = max(1, round(calls / self._sets))
            begin.record()
            for _ in range(replays):
                self._graph.replay()
            end.record()
            made = replays * self._sets
        else:
            made = calls
            with self._mode():
                begin.record()
                for _ in range(calls):
                    self._call(self._next)
                    self._next = (self._next + 1) % self._sets
                end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / made

    def close(self) -> None:
        """Gives the graph and its memory back."""
        self._graph, self.outputs = None, []


class OwnVariant:
    """A peer in this process.

    Args:
        name: what the record calls it; a second preparation of a peer has another name.
        peer: prepares the call.
        work: the operands.
        graphs: on a GPU, whether to capture graphs.
    """

    process = "own"

    def __init__(self, name: str, peer: Peer, work: Work, graphs: bool = True) -> None:
        self.name, self._peer, self._work, self._graphs = name, peer, work, graphs
        self.method, self.note, self.prepare_s = "", "", 0.0
        self._prepared: Prepared | None = None
        self._sampler: CpuSampler | CudaSampler | None = None

    @property
    def _device(self) -> str:
        return self._work.subject.device

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Any:
        """Turns whatever a peer raises into SampleError, and looks whether the GPU still lives."""
        try:
            yield
        except (SampleError, NoPeerError, DeviceLostError):
            raise
        except Exception as error:
            if self._device == "cuda":
                check_device()
            raise SampleError(f"{what} failed: {first_line(error)}") from error

    def _run(self, i: int = 0) -> Any:
        assert self._prepared is not None
        with self._work.mode():
            out = self._prepared.call(i)
        if self._device == "cuda":
            torch.cuda.synchronize()
        return out

    def prepare(self) -> None:
        """Builds the call."""
        start = time.perf_counter()
        with self._guarded("preparing"), self._work.mode():
            self._prepared = self._peer.prepare(self._work)
        self.prepare_s = time.perf_counter() - start

    def judge(self) -> Judgement:
        """Judges a plain call, and a graph's output once it is armed."""
        with self._guarded("the call"):
            if isinstance(self._sampler, CudaSampler) and self._sampler.outputs:
                return self._work.judge(self._sampler.outputs[0])
            return self._work.judge(self._run())

    def arm(self) -> None:
        """Makes the sampler: on a GPU a graph, if its output is right as well."""
        assert self._prepared is not None
        call, sets, mode = self._prepared.call, len(self._work.sets), self._work.mode
        with self._guarded("the call"):
            if self._device == "cuda":
                # A peer whose way of use is a call by Python says `capture = False`.
                graphs = self._graphs and getattr(self._prepared, "capture", True)
                self._sampler = CudaSampler(call, sets, mode, graphs)
            else:
                self._sampler = CpuSampler(call, sets, mode)
        self.method, self.note = self._sampler.method, self._sampler.note

    def sample(self, calls: int) -> float:
        """Seconds a call."""
        assert self._sampler is not None
        with self._guarded("the call"):
            return self._sampler.sample(calls)

    def kernels(self) -> list[str]:
        """What the peer says that it ran."""
        assert self._prepared is not None
        with self._guarded("naming its kernels"), self._work.mode():
            return [str(name) for name in self._prepared.kernels()]

    def peak_memory(self) -> int | None:
        """Of one plain call."""
        with self._guarded("the call"):
            return gauges.peak_memory(self._run, self._device)

    def layers(self, orders: Sequence[Sequence[gauges.Step]]) -> dict[str, float] | None:
        """Of one plain call."""
        with self._guarded("the profiler"):
            return gauges.layer_seconds(self._run, orders, self._device)

    def ops(self) -> dict[str, float]:
        """Of one plain call."""
        with self._guarded("the profiler"):
            return waterfall.op_seconds(self._run, self._device)

    def close(self) -> None:
        """Closes the peer and lets go of its memory."""
        if isinstance(self._sampler, CudaSampler):
            self._sampler.close()
        if self._prepared is not None:
            with contextlib.suppress(Exception):
                self._prepared.close()
        self._prepared = self._sampler = None


def check_device() -> None:
    """Raises DeviceLostError if the GPU has a fault that stays (an illegal access, for example)."""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception as error:
        raise DeviceLostError(f"the GPU is lost to this process: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error's type and first line, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
