"""The program of an engine on a GPU: one CUDA graph for each input shape.

A shape that comes for the first time runs step by step, which also compiles what Triton compiles.
When it comes again its steps are captured: inputs and results lie in memory of the graph's own, the
kernels of this package write into one planned arena. A replay copies the input in, launches the
graph and copies the result out, so that the caller's tensor is his alone.

What there is to know about CUDA is in `_driver`; everything else is the same on any device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from . import _calls, _kernels, _memory, _one_launch
from ._driver import Driver
from ._ir import FUSED, Graph, Step, fill

logger = logging.getLogger("resnet_fused")

OTHER = (
    "kernels that begin before the one ahead has ended gave another result than one after the "
    "other: each waits"
)
Registers = list[Any]


class Steps:
    """A graph's steps for one shape, implementations chosen: run with or without an arena.

    Attributes:
        served: position of a step -> (implementation, why).
        plan: the arena for what the kernels write.
        outside: bytes of the values that PyTorch's ops allocate themselves.
        us: predicted, once `join` has looked, to compare the shape's graphs by; None: unknown.
    """

    def __init__(self, graph: Graph, args: Sequence[Tensor]) -> None:
        self.graph = graph
        self._count = 1 + max([*graph.inputs, *graph.makers()], default=0)
        self._kernels: dict[int, _kernels.Kernel] = {}
        self._forms: dict[int, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        self._runs: dict[int, _one_launch.Run] = {}  # by the position of each of their steps
        self.us: float | None = None
        self.served: dict[int, tuple[str, str]] = {}
        last = graph.last_use()
        self._dead = [
            tuple(v for v in dict.fromkeys((*s.inputs, *s.outputs)) if last[v] == at)
            for at, s in enumerate(graph.steps)
        ]
        sizes: dict[int, tuple[int, torch.dtype]] = {}
        self.outside = 0

        def noted(at: int, step: Step, values: Sequence[Any]) -> list[Any]:
            made = self._first(at, step, values)
            kernel = self._kernels.get(at)
            for value, result in zip(step.outputs, made, strict=True):
                found = _memory.size_of(result)
                if found is not None and kernel is not None and kernel.writes:
                    sizes[value] = found
                    self._forms[value] = (result.shape, result.stride(), result.dtype)
                elif found is not None and step.kind != "flatten":
                    self.outside += found[0]
            return made

        self.result = self._walk(args, noted)
        self.plan = _memory.plan(_memory.lives(graph, sizes, {}))

    def _walk(
        self, args: Sequence[Tensor], run: Callable[[int, Step, Sequence[Any]], list[Any]]
    ) -> Any:
        registers: Registers = [None] * self._count
        for value, given in zip(self.graph.inputs, args, strict=True):
            registers[value] = given
        for at, step in enumerate(self.graph.steps):
            made = run(at, step, [registers[value] for value in step.inputs])
            for value, result in zip(step.outputs, made, strict=True):
                registers[value] = result
            for value in self._dead[at]:
                registers[value] = None
        return fill(self.graph.output, lambda ref: registers[ref.value])

    def _first(self, at: int, step: Step, values: Sequence[Any]) -> list[Any]:
        if step.kind not in _kernels.KINDS:
            self.served[at] = "modules" if step.module is not None else "torch", step.why
            return [_calls.run(step, values)]
        if _broadcasts(step, values):
            self.served[at] = "torch", "its shortcut is broadcast: added apart"
            return [_apart(step, values)]
        kernel = self._kernels[at] = _kernels.Kernel(step, values)
        self.served[at] = kernel.name, kernel.why
        made = kernel(values)
        return list(made) if isinstance(made, tuple) else [made]

    def _again(self, at: int, step: Step, values: Sequence[Any]) -> list[Any]:
        kernel = self._kernels.get(at)
        if kernel is not None:
            made = kernel(values)
            return list(made) if isinstance(made, tuple) else [made]
        if step.kind in _kernels.KINDS:
            return [_apart(step, values)]
        return [_calls.run(step, values)]

    def run(self, args: Sequence[Tensor]) -> Any:
        """The results, each step allocating its own."""
        return self._walk(args, self._again)

    def run_alike(self, args: Sequence[Tensor]) -> Any:
        """Likewise; layers that `run_in` has in one launch by kernels that give the same bits."""

        def run(at: int, step: Step, values: Sequence[Any]) -> list[Any]:
            joined = self._runs.get(at)
            if joined is None:
                return self._again(at, step, values)
            return [self._kernels[at].alike(values, joined.alone(at))]

        return self._walk(args, run)

    @property
    def joined(self) -> bool:
        """Whether `run_in` has several layers in one launch."""
        return bool(self._runs)

    def join(self, args: Sequence[Tensor]) -> None:
        """Has runs of layers be one launch in `run_in`, where `_one_launch` finds that right."""
        single = self.plan
        self.plan = _memory.plan(_memory.beside(self.graph, single.lives, _one_launch.KIND))
        try:
            seen: dict[int, tuple[Sequence[Tensor], Sequence[Tensor]]] = {}
            device = args[0].device
            self.run_in(args, self.arena(device), seen)
            found = _one_launch.find(self.graph.steps, self._kernels, seen, device)
            self._runs, self.us = {at: run for run in found.runs for at in run.positions}, found.us
        finally:
            if not self.joined:
                self.plan = single
        for at, run in self._runs.items():
            self.served[at] = "cuda", f"{run}; alone: {self._kernels[at].why}"
        for at, why in found.refused.items():
            self._say_alone(at, why)

    def separate(self, why: str) -> None:
        """Has every layer of `run_in` be a launch of its own."""
        for at in self._runs:
            self._say_alone(at, why)
        self._runs = {}

    def _say_alone(self, at: int, why: str) -> None:
        kernel = self._kernels[at]
        self.served[at] = kernel.name, f"{kernel.why}; not in one launch: {why}"

    def arena(self, device: torch.device) -> dict[str, Tensor]:
        """Fresh memory for `run_in`: bytes by dtype."""
        return {
            dtype: torch.empty(size, dtype=torch.uint8, device=device)
            for dtype, size in self.plan.arenas.items()
        }

    @property
    def compiles(self) -> bool:
        """Whether `run_in` must have run once before it is captured.

        Triton's kernels that know what is ahead of them are others than those of the first run,
        compiled when they are first launched; and what kernels share between calls is made then.
        """
        return any(kernel.name in _kernels.ORDERS for kernel in self._kernels.values())

    @property
    def early(self) -> bool:
        """Whether `run_in` has kernels that begin before the one ahead has ended."""
        return any(kernel.writes and kernel.late is None for kernel in self._kernels.values())

    def wait_for_each(self, why: str) -> None:
        """Has every kernel of `run_in` begin when the one ahead has ended."""
        for at, kernel in self._kernels.items():
            if kernel.late is None:
                kernel.late = why
                self.served[at] = kernel.name, f"{kernel.why}, but not so: {why}"

    def run_in(
        self,
        args: Sequence[Tensor],
        arena: dict[str, Tensor],
        seen: dict[int, tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None,
    ) -> Any:
        """The results, this package's kernels writing into the arena.

        A kernel may begin before the one ahead has ended only where that is this package's too and
        waited itself: what another library launches is not known, and layers in one launch do not.

        Args:
            args: of the graph.
            arena: as of `arena`.
            seen: takes what each of these kernels reads and writes, by the step's position.
        """
        follows = False

        def run(at: int, step: Step, values: Sequence[Any]) -> list[Any]:
            nonlocal follows
            kernel = self._kernels.get(at)
            if kernel is None or not kernel.writes:
                follows = False
                return self._again(at, step, values)
            results = [self._place(value, arena) for value in step.outputs]
            if seen is not None:
                seen[at] = values, results
            if (joined := self._runs.get(at)) is not None:
                joined.take(at, _one_launch.layer(step, values, results))
                follows = False
            else:
                follows = kernel.into(values, results, follows)
            return results

        return self._walk(args, run)

    def _place(self, value: int, arena: dict[str, Tensor]) -> Tensor:
        shape, stride, dtype = self._forms[value]
        memory = arena[str(dtype).removeprefix("torch.")]
        typed = memory[self.plan.offsets[value] :]
        typed = typed[: typed.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return typed.as_strided(shape, stride)


class Captured:
    """One shape's graph; replays are one after the other, in whatever streams and threads.

    Args:
        steps: of the shape.
        args: an example.
        driver: of the GPU.
    """

    arena = True

    def __init__(self, steps: Steps, args: Sequence[Tensor], driver: Driver) -> None:
        self.served, self.plan, self.outside = steps.served, steps.plan, steps.outside
        self.graph = steps.graph
        self._steps, self._driver, self._lock = steps, driver, threading.Lock()
        # Not of inference mode, even inside of it: outside nobody may write into such a tensor.
        with torch.inference_mode(False), torch.no_grad(), driver.active():
            self._inputs = [torch.empty_like(arg).copy_(arg) for arg in args]
            self._memory = steps.arena(args[0].device)
            self._stream = driver.stream()
            if steps.joined and (why := self._not_joined()) is not None:
                logger.warning("freeze: %s: %s: each layer is a launch", _of(args), why)
                steps.separate(why)
            if not steps.joined:
                self._capture_apart(args)
            self._done = driver.mark()

    def _not_joined(self) -> str | None:
        """Captures with layers in one launch; why that is not what is replayed, or None."""
        try:
            # A launch that the GPU refuses says so here, where no capture is lost with it.
            self._steps.run_in(self._inputs, self._memory)
            self._capture()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return None if self._agrees() else _one_launch.OTHER

    def _capture_apart(self, args: Sequence[Tensor]) -> None:
        """Captures with each layer a launch."""
        steps = self._steps
        if steps.compiles:
            steps.run_in(self._inputs, self._memory)
        self._capture()
        if steps.early and not self._agrees():
            logger.warning("freeze: %s: %s", _of(args), OTHER)
            steps.wait_for_each(OTHER)
            self._capture()

    def _capture(self) -> None:
        self._replay, self._results = self._driver.capture(
            lambda: self._steps.run_in(self._inputs, self._memory)
        )

    def _agrees(self) -> bool:
        """Whether a replay gives, bit for bit, what the steps give one after the other."""
        expected = _pytree.tree_leaves(self._steps.run_alike(self._inputs))
        self._replay()
        found = _pytree.tree_leaves(self._results)
        return all(
            not isinstance(a, Tensor) or bool(((a == b) | (a.isnan() & b.isnan())).all())
            for a, b in zip(found, expected, strict=True)
        )

    def __call__(self, args: Sequence[Tensor]) -> Any:
        """Copies the input in, replays, copies the result out."""
        with self._driver.active():
            if self._driver.capturing():  # a graph of the caller's own, which can hold no other
                return self._steps.run(args)
        with self._lock, self._driver.active():
            self._driver.wait(self._done)
            for mine, given in zip(self._inputs, args, strict=True):
                mine.copy_(given)
            self._replay()
            result = _pytree.tree_map_only(Tensor, torch.clone, self._results)
            self._done = self._driver.mark()
            if self._driver.stream() != self._stream:
                # The engine may drop this program while another thread's call of it still runs.
                self._driver.hold([*self._inputs, *self._memory.values()])
        return result


class Plain:
    """One shape's steps, launched one by one: where a graph could not be captured."""

    arena = False

    def __init__(self, steps: Steps, why: str) -> None:
        self._steps, self.why, self.graph = steps, why, steps.graph
        if steps.joined:
            steps.separate(why)
        self.served, self.plan, self.outside = steps.served, steps.plan, steps.outside

    def __call__(self, args: Sequence[Tensor]) -> Any:
        """The results."""
        return self._steps.run(args)


class Builder:
    """Makes the programs of one graph.

    Args:
        graph: after all rules.
        driver: of the GPU.
        free: drops the programs that the engine keeps, for their memory.
        apart: the same network without chains, for layers in one launch; None: it has none, or
            nobody wants that.
    """

    def __init__(
        self,
        graph: Graph,
        driver: Driver,
        free: Callable[[], None],
        apart: Graph | None = None,
    ) -> None:
        self.graph, self._driver, self._free, self._apart = graph, driver, free, apart

    def constants(self) -> int:
        """Bytes of all weights and vectors."""
        return _memory.constants(self.graph)

    def build(self, args: Sequence[Tensor], pack: bool) -> tuple[Captured | Plain, Any]:
        """The program for these arguments' shapes, and what it gives for them.

        Args:
            args: the caller's tensors.
            pack: whether to capture a graph.
        """
        with self._driver.active():
            steps = Steps(self.graph, args)
            result, steps.result = steps.result, None
            if not pack:
                return Plain(steps, "the shape came for the first time"), result
            if self._driver.capturing():
                return Plain(steps, "the caller captures a graph of his own"), result
            steps = self._joined(steps, args)
            try:
                return Captured(steps, args, self._driver), result
            except torch.OutOfMemoryError as error:
                logger.warning("freeze: out of memory for a graph of %s: %s", _of(args), error)
            except RuntimeError as error:
                return self._step_by_step(steps, args, error), result
            # Outside of the handler, whose traceback holds the memory.
            self._free()
            self._driver.release()
            try:
                return Captured(steps, args, self._driver), result
            except RuntimeError as error:
                return self._step_by_step(steps, args, error), result

    def _joined(self, steps: Steps, args: Sequence[Tensor]) -> Steps:
        """The steps with layers in one launch; those without chains where that is better."""
        if not _one_launch.asked(args[0].device):
            return steps
        try:
            return self._better(steps, args)
        except RuntimeError as error:  # such as no memory to look
            why = str(error).partition("\n")[0]
            logger.warning("freeze: %s: no layers in one launch: %s", _of(args), why)
            return steps

    def _better(self, steps: Steps, args: Sequence[Tensor]) -> Steps:
        steps.join(args)
        if self._apart is None:
            return steps
        apart = Steps(self._apart, args)
        apart.result = None
        apart.join(args)
        if not apart.joined:
            return steps
        if _one_launch.word() == "always":
            return apart
        known = apart.us is not None and steps.us is not None
        return apart if known and apart.us < steps.us else steps

    def _step_by_step(self, steps: Steps, args: Sequence[Tensor], error: RuntimeError) -> Plain:
        why = f"no graph: {str(error).partition(chr(10))[0]}"
        logger.warning("freeze: %s runs step by step, %s", _of(args), why)
        return Plain(steps, why)


def laid_out(graph: Graph) -> Graph:
    """The graph with the weights of this package's convolutions in channels_last."""
    steps = []
    for step in graph.steps:
        if step.kind in FUSED and step.kind != "head":
            tensors = {
                name: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
                for name, t in step.tensors.items()
            }
            step = replace(step, tensors=tensors)
        steps.append(step)
    return replace(graph, steps=tuple(steps))


def _of(args: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(arg.shape)) for arg in args)


def _broadcasts(step: Step, values: Sequence[Any]) -> bool:
    """Whether a layer's shortcut has another shape than its result."""
    if step.kind != "conv_bn_act" or len(values) != 2:
        return False
    x, residual = values
    o, weight = step.options, step.tensors["weight"]
    spatial = [
        (size + 2 * pad - spread * (taps - 1) - 1) // by + 1
        for size, pad, spread, taps, by in zip(
            x.shape[2:], o["padding"], o["dilation"], weight.shape[2:], o["stride"], strict=True
        )
    ]
    return tuple(residual.shape) != (x.shape[0], weight.shape[0], *spatial)


def _apart(step: Step, values: Sequence[Any]) -> Tensor:
    """The layer without its shortcut, then PyTorch's add and ReLU."""
    bare = Step(
        step.kind, step.name, step.inputs[:1], step.outputs, step.tensors,
        {**step.options, "act": "none"},
    )  # fmt: skip
    y = _kernels.Kernel(bare, values[:1])(values[:1]) + values[1]
    return torch.relu(y) if step.options["act"] == "relu" else y
