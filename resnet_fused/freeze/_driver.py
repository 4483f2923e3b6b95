"""What an engine's program has to know about CUDA: graph capture and the order of streams."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Driver:
    """Graph capture and the order of streams on one GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes the GPU the current one."""
        with torch.cuda.device(self.device):
            yield

    def capturing(self) -> bool:
        """Whether the caller is capturing a graph of his own, into which the steps then go."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures what `run` launches.

        Returns:
            What replays it on the current stream, and what `run` returned.
        """
        graph = torch.cuda.CUDAGraph()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        # Only what this thread does may break the capture: others go on with their work.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = run()
        current.wait_stream(side)
        return graph.replay, result

    def mark(self) -> Any:
        """A point on the current stream."""
        return torch.cuda.current_stream().record_event()

    def wait(self, mark: Any) -> None:
        """Lets the current stream wait for a point on another."""
        torch.cuda.current_stream().wait_event(mark)

    def stream(self) -> int:
        """The current stream."""
        return torch.cuda.current_stream().cuda_stream

    def hold(self, memory: Iterable[Tensor]) -> None:
        """Keeps memory of another stream from its next owner until this one has come so far."""
        for tensor in memory:
            tensor.record_stream(torch.cuda.current_stream())

    def release(self) -> None:
        """Gives memory that nobody uses back to the GPU."""
        torch.cuda.empty_cache()
