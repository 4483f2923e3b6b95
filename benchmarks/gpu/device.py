"""What steps need of a device: events, graphs, streams, its memory; the CPU stands in for each.

On the CPU a "graph" is the call itself and events are the wall clock, so that every line around
them runs where there is no GPU.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.bench.timing import median_interval

MIN_SAMPLE_S = 1e-3  # events resolve about half a microsecond
MAX_CALLS = 200
WARM_UP = 3


def is_cuda(device: str) -> bool:
    """Whether a device's name is a GPU's."""
    return device.startswith("cuda")


def synchronize(device: str) -> None:
    """Waits for everything that was launched."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def free_bytes(device: str) -> int | None:
    """Free memory of a GPU; None for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if is_cuda(device) else None


def l2_bytes(device: str) -> int:
    """Size of the L2 cache; a small stand-in for the CPU."""
    if not is_cuda(device):
        return 1 << 14
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[None]:
    """A stream of its own, after what the current one holds; the current one waits for it."""
    if not is_cuda(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(call: Callable[[], Any], device: str, warm_up: int = WARM_UP) -> Callable[[], None]:
    """A CUDA graph of a call, ready to be replayed; the call itself on the CPU.

    Args:
        call: launches work; what it returns must be kept by itself.
        device: where.
        warm_up: calls before, on a side stream: compilers and handles don't fit into a capture.
    """
    with side_stream(device):
        for _ in range(warm_up if is_cuda(device) else 1):
            call()
    synchronize(device)
    if not is_cuda(device):
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    torch.cuda.synchronize(device)
    # The graph must live as long as its replay.
    return lambda: graph.replay()


def elapsed(call: Callable[[], Any], times: int, device: str) -> float:
    """Seconds a call, over several in a row, between two events of the current stream."""
    if not is_cuda(device):
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / times


@dataclass(frozen=True)
class Samples:
    """Seconds a call of variants that were timed in turns."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """The median in seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """The interquartile range over the median."""
        low, _, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return (high - low) / self.median(name)

    def ratio(self, baseline: str, variant: str) -> dict[str, float]:
        """How many times faster the variant is, pair by pair: median and its interval."""
        pairs = zip(self.seconds[baseline], self.seconds[variant], strict=True)
        ratios = sorted(slow / fast for slow, fast in pairs)
        low, high, confidence = median_interval(ratios)
        return {
            "median": statistics.median(ratios), "low": low, "high": high,
            "confidence": confidence,
        }  # fmt: skip

    def to_dict(self, per: int = 1) -> dict[str, Any]:
        """Medians and spreads, for JSON; microseconds for one of `per` equal parts of a call."""
        return {
            name: {"us": 1e6 * self.median(name) / per, "spread": self.spread(name)}
            for name in self.seconds
        }


def interleaved(
    variants: Mapping[str, Callable[[], Any]], device: str, rounds: int = 11
) -> Samples:
    """Times each variant once a round, in an order that is reversed from round to round.

    Args:
        variants: name -> what launches it.
        device: where.
        rounds: samples of each, at least 2; where there is no GPU 2 are enough.
    """
    calls = {}
    rounds = rounds if is_cuda(device) else min(rounds, 2)
    for name, call in variants.items():
        once = elapsed(call, 1, device)
        calls[name] = min(MAX_CALLS, max(1, round(MIN_SAMPLE_S / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                samples[name].append(elapsed(variants[name], calls[name], device))
            order.reverse()
    finally:
        if was_enabled:
            gc.enable()
    return Samples({name: tuple(values) for name, values in samples.items()})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.equal(a.contiguous().view(kinds[a.element_size()]),
                       b.contiguous().view(kinds[b.element_size()]))  # fmt: skip
