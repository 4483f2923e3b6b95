"""The engine that `freeze` makes: a module that checks its input and runs a program on it."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from ..ops._results import is_channels_last
from . import _cpu, _driver, _file, _gpu, _memory, _one_launch, _rules
from ._ir import FUSED, Graph

# Kinds that are worth a row in a report: the rest takes no time.
_ROWS = (*FUSED, "conv", "linear", "module", "quantize")


class Program(Protocol):
    """What one input shape runs."""

    served: dict[int, tuple[str, str]]
    plan: _memory.Plan

    def __call__(self, args: Sequence[Tensor]) -> Any:
        """The results."""


class Builder(Protocol):
    """Makes programs."""

    def build(self, args: Sequence[Tensor], pack: bool) -> tuple[Program, Any]:
        """The program for these arguments, and its results."""

    def constants(self) -> int:
        """Bytes of all constants."""


@dataclass(frozen=True)
class StepRow:
    """One step of an engine.

    Attributes:
        layer: its name in the model.
        pattern: what was taken together.
        implementation: who runs it; "torch" are PyTorch's functions, "modules" the model's own.
        why: why that one.
    """

    layer: str
    pattern: str
    implementation: str
    why: str


@dataclass(frozen=True)
class Report:
    """What an engine is made of.

    Attributes:
        rows: its steps, in order.
        notes: what each rewrite rule did, and did not do and why.
        memory: of each prepared shape.
    """

    rows: tuple[StepRow, ...]
    notes: tuple[_rules.Note, ...]
    memory: tuple[_memory.Memory, ...]

    @property
    def left(self) -> tuple[_rules.Note, ...]:
        """What was not taken, and why."""
        return tuple(note for note in self.notes if not note.done)

    def __str__(self) -> str:
        lines = [f"{r.layer}: {r.pattern} by {r.implementation} ({r.why})" for r in self.rows]
        lines += [f"not {note.rule} of {note.layers}: {note.why}" for note in self.left]
        return "\n".join([*lines, *map(str, self.memory)])


class Engine(nn.Module):
    """An inference engine; `rf.freeze` makes one.

    Called with what the model takes, it gives what the model gives. It has no parameters, stays on
    its device and in its dtype, and any number of threads may call it at once.

    Attributes:
        device: where it runs.
        dtype: of its inputs.
    """

    def __init__(
        self,
        graph: Graph,
        notes: Sequence[_rules.Note],
        example: Sequence[Tensor],
        max_shapes: int,
        dtype: torch.dtype,
        name: str = "model",
    ) -> None:
        super().__init__()
        self.training = False
        self.device, self.dtype = example[0].device, dtype
        self._name, self._max_shapes = name, max_shapes
        if self.device.type == "cuda":
            graph = _gpu.laid_out(graph)
        self._plain = graph
        self._examples = [torch.empty_like(x, device="meta") for x in example]
        place = _rules.Place(self.device, self.dtype, tuple(example))
        self._plain_notes = tuple(notes)
        graph, more = _rules.apply(_rules.DEVICE, graph, place)
        self._graph, self._notes = graph, (*notes, *more)
        self._expected = [
            _Input(graph, value, x) for value, x in zip(graph.inputs, example, strict=True)
        ]
        self._layout = _nchw(graph)
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = threading.Lock()
        self._last: Hashable = None
        self._builder: Builder = self._builder_of(graph, place)
        key = tuple(x.shape for x in example)
        self._first = key
        self._programs[key], _ = self._built(example, True)

    def _builder_of(self, graph: Graph, place: _rules.Place) -> Builder:
        if self.device.type == "cuda":
            chains = any(step.kind == "conv_chain" for step in graph.steps)
            apart = None
            if chains and _one_launch.asked(self.device):
                apart, _ = _rules.apply(_rules.APART, self._plain, place)
            return _gpu.Builder(graph, _driver.Driver(self.device), self._free, apart)
        return _cpu.Builder(graph, self.dtype)

    def _free(self) -> None:
        with self._lock:
            self._programs.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the engine: `forward`, and what hooks there are."""
        # Not nn.Module's own: torch.fx puts another in its place while somebody traces a model, in
        # every thread.
        return self._wrapped_call_impl(*args, **kwargs)

    def forward(self, *args: Tensor) -> Any:
        """Runs the engine.

        Args:
            args: as many tensors as the example had, of its dtype, on its device, with its number
                of dimensions and channels. Batch and image size are free.

        Returns:
            What the model gives; without gradients.

        Raises:
            TypeError: another number of arguments, or no tensors.
            ValueError: another dtype, device, number of dimensions or of channels.
            RuntimeError: a gradient is wanted, or the engine is traced or exported.
        """
        if len(args) == 1 and isinstance(args[0], fx.Proxy):
            tracer: Any = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})
        self._check(args)
        key = args[0].shape if len(args) == 1 else tuple(x.shape for x in args)
        key = (key,) if len(args) == 1 else key
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(self.device.type, enabled=False):
                result = self._run(key, args)
        else:
            result = self._run(key, args)
        return self._as_given(result, args) if self._layout else result

    def _run(self, key: Hashable, args: Sequence[Tensor]) -> Any:
        program = self._programs.get(key)
        if program is not None:
            if len(self._programs) > 1:
                with self._lock:  # another thread may have dropped it
                    if key in self._programs:
                        self._programs.move_to_end(key)
            return program(args)
        # Packing costs more than a call: it is done for a shape that comes twice, no other one that
        # is not prepared in between.
        again, self._last = self._last == key, key
        program, result = self._built(args, again)
        if again:
            with self._lock:
                self._programs[key] = program
                while len(self._programs) > self._max_shapes:
                    self._programs.popitem(last=False)
        return result

    def _built(self, args: Sequence[Tensor], pack: bool) -> tuple[Program, Any]:
        with torch.no_grad():
            return self._builder.build(args, pack)

    def _check(self, args: Sequence[Any]) -> None:
        if len(args) != len(self._expected):
            raise TypeError(
                f"the engine got {len(args)} arguments; accepted are {len(self._expected)} tensors"
            )
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(
                "an engine cannot be traced or exported, because it looks at its input: trace the "
                "model that it was made of"
            )
        grad = torch.is_grad_enabled()
        for place, (x, expected) in enumerate(zip(args, self._expected, strict=True)):
            if not isinstance(x, Tensor):
                raise TypeError(f"argument {place} is a {type(x).__name__}; accepted is a tensor")
            if grad and x.requires_grad:
                raise RuntimeError(
                    f"argument {place} requires a gradient, an engine has none: call it under "
                    "torch.no_grad() or with x.detach(), or use the fused model"
                )
            expected.check(place, x)

    def _as_given(self, result: Any, args: Sequence[Tensor]) -> Any:
        """Feature maps in the layout that PyTorch's convolutions would give them."""
        if any(x.dim() == 4 and is_channels_last(x) for x in args):
            return result
        return _pytree.tree_map_only(
            Tensor, lambda y: y.contiguous() if y.dim() == 4 else y, result
        )

    def train(self, mode: bool = True) -> Engine:
        """An engine has no training mode.

        Raises:
            RuntimeError: mode is true.
        """
        if mode:
            raise RuntimeError("an engine is for inference: train the model that it was made of")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        """`.to()` and the like: accepted where they change nothing.

        Raises:
            RuntimeError: another device or dtype is asked for.
        """
        probe = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        if (probe.device, probe.dtype) != (self.device, self.dtype):
            raise RuntimeError(
                f"the engine was frozen for {self.dtype} on {self.device} and cannot become "
                f"{probe.dtype} on {probe.device}: freeze the model again there"
            )
        return self

    def _content(self) -> _file.Content:
        return _file.Content(
            self._plain, self._plain_notes, self._examples, self.dtype, self.device,
            self._max_shapes, self._name,
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the engine to a file, whole or not at all.

        The file holds the plain constants, not what was packed or captured for this machine.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            ValueError: a layer runs as a module or calls a function that a file cannot name.
            OSError: the file cannot be written.
        """
        _file.save(self._content(), path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: str | torch.device | None = None
    ) -> Engine:
        """Reads an engine and builds it for this machine.

        Args:
            path: what `save` has written.
            device: where it is to run; None is the kind of device that it was made for.

        Raises:
            ValueError: the file is no engine, damaged, of a newer version, or its device is not
                here.
            OSError: the file cannot be read.
        """
        where = None if device is None else torch.device(device)
        with open(path, "rb") as stream:
            return cls._of(_file.read(stream, where, os.fspath(path)))

    @classmethod
    def _of(cls, content: _file.Content) -> Engine:
        return cls(
            content.graph, content.notes, content.examples, content.max_shapes, content.dtype,
            content.name,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is built anew from the plain constants."""
        stream = io.BytesIO()
        _file.write(self._content(), stream)
        return _unpickled, (stream.getvalue(), str(self.device))

    @property
    def memory(self) -> _memory.Memory:
        """What the example's shape takes, or the last used one's; `report()` has all shapes."""
        programs = dict(self._programs)
        key = self._first if self._first in programs else next(reversed(programs))
        return self._memory(key, programs[key])

    def _memory(self, key: Any, program: Program) -> _memory.Memory:
        plan = program.plan
        shapes = tuple(tuple(shape) for shape in key)
        arena = getattr(program, "arena", False)
        constants = self._builder.constants()
        outside = getattr(program, "outside", 0)
        return _memory.Memory(
            shapes, plan.total, plan.planned, plan.most, arena, constants, outside
        )

    def report(self, *args: Tensor) -> Report:
        """What runs each step, what was not taken and why, and the memory of each shape.

        Args:
            args: inputs, whose shape is what the rows are about if it is prepared; else they are
                about the shape that was used last.
        """
        programs = dict(self._programs)
        served, graph = {}, self._graph
        if programs:
            key = tuple(x.shape for x in args)
            program = programs.get(key) or next(reversed(programs.values()))
            served, graph = program.served, getattr(program, "graph", graph)
        rows = tuple(
            StepRow(step.name or self._name, step.pattern or step.kind, *served.get(at, ("-", "")))
            for at, step in enumerate(graph.steps)
            if step.kind in _ROWS
        )
        memory = tuple(self._memory(key, program) for key, program in programs.items())
        return Report(rows, self._notes, memory)

    def extra_repr(self) -> str:
        """What `print(engine)` shows."""
        kinds = [step.kind for step in self._graph.steps]
        fused = sum(kind in FUSED for kind in kinds)
        return (
            f"{self._name}, {self.dtype} on {self.device}, {len(kinds)} steps, {fused} fused, "
            f"{len(self._programs)} of {self._max_shapes} shapes"
        )


class _Input:
    """What an argument must be."""

    def __init__(self, graph: Graph, value: int, example: Tensor) -> None:
        self.device, self.dtype, self.dims = example.device, example.dtype, example.dim()
        self.channels = None
        for step in graph.steps:
            if step.inputs[:1] != (value,):
                continue
            if step.kind in ("conv", "conv_bn_act", "stem"):
                self.channels = step.tensors["weight"].shape[1] * step.options["groups"]
            elif step.kind == "images":
                self.channels = step.tensors["input_norm"].shape[1]

    def check(self, place: int, x: Tensor) -> None:
        """Raises ValueError where x does not fit."""
        if x.dtype is not self.dtype:
            raise ValueError(f"argument {place} has dtype {x.dtype}; accepted is {self.dtype}")
        if x.device != self.device:
            raise ValueError(f"argument {place} is on {x.device}; accepted is {self.device}")
        if x.dim() != self.dims:
            raise ValueError(
                f"argument {place} has {x.dim()} dimensions, shape {tuple(x.shape)}; accepted are "
                f"{self.dims}"
            )
        if self.channels is not None and x.shape[1] != self.channels:
            raise ValueError(
                f"argument {place} has {x.shape[1]} channels, shape {tuple(x.shape)}; accepted are "
                f"{self.channels}"
            )


def _nchw(graph: Graph) -> bool:
    """Whether results may be feature maps of convolutions whose weights are all NCHW."""
    makers = graph.makers()
    made = [graph.steps[makers[value]] for value in graph.results() if value in makers]
    if all(step.kind in ("linear", "head", "flatten", "module") for step in made):
        return False
    return not any(
        is_channels_last(step.tensors["weight"])
        for step in graph.steps
        if step.kind in ("conv", "conv_bn_act", "stem")
    )


def _unpickled(data: bytes, device: str) -> Engine:
    return Engine._of(_file.read(io.BytesIO(data), torch.device(device), "the pickle"))


def load_engine(
    path: str | os.PathLike[str], *, device: str | torch.device | None = None
) -> Engine:
    """`Engine.load`: reads an engine that `Engine.save` has written."""
    return Engine.load(path, device=device)
