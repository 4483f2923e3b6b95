"""A stand-in for CUDA graphs that captures and replays a whole training step on the CPU.

It keeps what a graph keeps: each op with the tensors that it read and wrote, by their memory, and
every number of Python's as it was. Capturing changes nothing; a replay runs the ops again, and no
Python, so that no tensor has a new version behind it. What would wait for a GPU is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")
REFUSED = "operation not permitted when stream is capturing"


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU; notes the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        self.names.append(name)
        if name in WAITS:
            raise RuntimeError(f"{REFUSED}: {name}")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """The ops of a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in WAITS:
            raise RuntimeError(f"{REFUSED}: {func._schema.name}")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def run(self) -> None:
        """Runs the ops again, each writing where it wrote."""
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                if any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
                    continue  # a view
                again = func(*args, **kwargs)
                pairs = zip(_leaves(out), _leaves(again), strict=True)
                for mine, new in pairs:
                    if mine is not new:
                        mine.data.copy_(new)


class StandInGraphs:
    """In the place of `captured.Graphs`.

    Args:
        state: gives the tensors that a step changes: a capture leaves them as they were.
    """

    def __init__(self, state: Callable[[], list[Tensor]]) -> None:
        self._state = state
        self.captured = self.replayed = self.warm = 0
        self.failures: list[Exception] = []
        self.own_capture = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.warm += 1
        yield

    def capturing(self) -> bool:
        return self.own_capture

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.failures:
            run()  # it comes as far as the last op
            raise self.failures.pop(0)
        self.captured += 1
        state = self._state()
        before = [t.detach().clone() for t in state]
        generator = torch.default_generator.get_state()
        tape = Tape()
        try:
            with tape:
                result = run()
        finally:
            torch.default_generator.set_state(generator)
            for t, was in zip(state, before, strict=True):
                t.data.copy_(was)

        def replay() -> None:
            self.replayed += 1
            own = tuple({id(t): t for t in [*state, *self._state()]}.values())
            with _unsafe_preserve_version_counter(own):
                tape.run()

        return replay, result


def _leaves(result: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(result) if isinstance(t, Tensor)]
