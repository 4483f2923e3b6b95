"""The program of an engine on the CPU: one list of calls for each input shape.

Everything that can be decided before a call is: which implementation serves a layer, its weights
folded and packed for the shape, which result may take the memory of its shortcut. What is left for
a call is a look at the input and one op a step. Programs are never written to after they are made,
and each call has registers of its own, so any number of threads may run one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops import onednn
from ..ops._library import overload
from . import _bounds, _calls, _fp8, _kernels, _memory
from ._ir import Graph, Step, fill

Registers = list[Any]
Run = Callable[[Registers], None]
_MKLDNN = torch.ops.mkldnn
_PLAIN = _MKLDNN._convolution_pointwise.default
_ADD = _MKLDNN._convolution_pointwise.binary
_ADD_IN_PLACE = _MKLDNN._convolution_pointwise_.binary


class Layer:
    """A `conv_bn_act` step on the CPU: who serves it, and its weights as oneDNN wants them.

    Attributes:
        step: the step.
        choice: by the facts of the call; the shape may still speak against it.
        packs: the packed weights, each layout once.
    """

    def __init__(self, step: Step, dtype: torch.dtype) -> None:
        self.step, self._dtype = step, dtype
        residual = len(step.inputs) == 2
        act = step.options["act"]
        self.call = backends.Call("conv_bn_act", "cpu", dtype, residual=residual, act=act)
        self.choice = backends.choose(self.call)
        # A layout lives as long as a program that uses it.
        self.packs: weakref.WeakValueDictionary[bytes, Tensor] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        options = step.options
        self._geometry = tuple(options[n] for n in ("stride", "padding", "dilation", "groups"))
        if self.served and not self.fold().tame:
            why = "folded weights that are huge or not finite"
            self.choice = backends.next_choice(self.call, self.choice, why)

    @property
    def served(self) -> bool:
        """Whether oneDNN serves it, as far as the facts of the call go."""
        return self.choice.implementation.name in ("cpu", "cpu32")

    @property
    def narrow(self) -> bool:
        """Whether 16-bit activations are widened for it."""
        return self.choice.implementation.name == "cpu32"

    @property
    def looks_itself(self) -> bool:
        """Whether it looks for NaN by itself: float16 overflows too early for a network's bound."""
        return self.narrow and self._dtype == torch.float16

    def fold(self) -> onednn.Folded:
        """The weights with BatchNorm folded in: made anew, because only packed ones are kept."""
        t = self.step.tensors
        compute = torch.float32 if self.narrow else self._dtype
        return onednn.fold(t["weight"], t["scale"], t["shift"], compute, self._geometry)

    def refused(self, x: Tensor) -> str | None:
        """Why oneDNN can't take this very input [N, C, H, W], or None."""
        weight, geometry = self.step.tensors["weight"], self._geometry
        if not onednn.shape_fits(x, weight, *geometry[:3]):
            return "a shape of which oneDNN has been seen to err"
        if not self.narrow and not onednn.pytorch_agrees(x, weight, geometry):
            return "PyTorch does not give a convolution this small to oneDNN either"
        return None

    def packed(self, folded: onednn.Folded, shape: torch.Size, exactly: bool) -> Tensor:
        """The weights in oneDNN's layout for an input shape; the same layout is kept once.

        Args:
            folded: the weights.
            shape: of the input.
            exactly: else a layout for another shape will do, which oneDNN reorders in every call.
        """
        if not exactly:
            with self._lock:
                other = next(iter(self.packs.values()), None)
            if other is not None:
                return other
        made = folded.pack(shape)
        layout = _MKLDNN._get_mkldnn_serialized_md(made).numpy().tobytes()
        with self._lock:
            return self.packs.setdefault(layout, made)

    def plain(self) -> Callable[..., Tensor]:
        """The layer by the implementation behind oneDNN, as a function of x and the residual."""
        choice = self.choice
        while choice.implementation.name in ("cpu", "cpu32"):
            choice = backends.next_choice(self.call, choice, "the shape speaks against it")
        run = overload("conv_bn_act", choice.implementation.name)
        t, rest = self.step.tensors, (*self._geometry, self.step.options["act"])
        weight, scale, shift = t["weight"].to(self._dtype), t["scale"], t["shift"]
        return lambda x, residual=None: run(x, weight, scale, shift, residual, *rest)


@dataclass(frozen=True)
class _Part:
    """A segment, ready to run."""

    looks: tuple[int, ...]
    fast: tuple[tuple[Run, tuple[int, ...]], ...]
    safe: tuple[tuple[Run, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Program:
    """What one input shape runs.

    Attributes:
        parts: the segments in order.
        count: how many registers a call needs.
        plan: lifetimes and arena of the values.
        served: position of a step -> (implementation, why).
    """

    parts: tuple[_Part, ...]
    count: int
    graph: Graph
    plan: _memory.Plan
    served: dict[int, tuple[str, str]]

    def __call__(self, args: Sequence[Tensor]) -> Any:
        """Runs it on the caller's tensors."""
        registers: Registers = [None] * self.count
        for value, given in zip(self.graph.inputs, args, strict=True):
            registers[value] = given
        for part in self.parts:
            steps = part.fast
            for value in part.looks:
                if not _small(registers[value]):
                    steps = part.safe
                    break
            for run, dead in steps:
                run(registers)
                for value in dead:
                    registers[value] = None
        return fill(self.graph.output, lambda ref: registers[ref.value])


def _small(x: Any) -> bool:
    """Whether a value is finite and far from overflow; what is no such tensor has no part in it."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return True
    if x.dtype is torch.float8_e4m3fn:
        return not bool(x.float().isnan().any())  # it has no Inf, and 448 is its largest
    return x.numel() == 0 or onednn.largest(x) < _bounds.LIMIT


class Builder:
    """Makes the programs of one graph.

    Args:
        graph: after all rules.
        dtype: of the activations.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        self.graph = graph
        self.layers = {
            at: Layer(step, dtype)
            for at, step in enumerate(graph.steps)
            if step.kind == "conv_bn_act"
        }
        kept = {
            at for at, layer in self.layers.items()
            if layer.served and not layer.looks_itself and layer.step.options["act"] == "relu"
        }  # fmt: skip
        self.segments = _bounds.segments(graph, kept)
        self._fresh = _memory.fresh(graph)
        self._last = graph.last_use()
        self._count = 1 + max([*graph.inputs, *graph.makers()], default=0)

    def constants(self) -> int:
        """Bytes of all weights and vectors, packed ones included."""
        packs = [pack for layer in self.layers.values() for pack in list(layer.packs.values())]
        return _memory.constants(self.graph) + sum(map(_MKLDNN._nbytes, packs))

    def build(self, args: Sequence[Tensor], pack: bool) -> tuple[Program, Any]:
        """The program for these arguments' shapes, and what it gives for them.

        Args:
            args: the caller's tensors.
            pack: whether to pack weights for the shapes, or to take those packed for others, which
                oneDNN then reorders in every call.
        """
        registers: Registers = [None] * self._count
        sizes: dict[int, tuple[int, torch.dtype]] = {}
        in_place: dict[int, int] = {}
        served: dict[int, tuple[str, str]] = {}
        for value, given in zip(self.graph.inputs, args, strict=True):
            registers[value] = given
        parts = []
        for segment in self.segments:
            fine = all(_small(registers[value]) for value in segment.looks)
            fast, safe = [], []
            for at in range(segment.start, segment.stop):
                step = self.graph.steps[at]
                layer = self.layers.get(at)
                if step.kind == _fp8.KIND:
                    quick, served[at] = _by_kernel(step, registers)
                    sure = quick
                elif layer is None:
                    quick = sure = _own(step)
                    served[at] = "modules" if step.module is not None else "torch", step.why
                else:
                    unit = _Unit(layer, at, registers, self._gives(step, at, registers), pack)
                    quick, sure, served[at] = unit.runs(at in segment.never)
                    if unit.in_place:
                        in_place[step.output] = step.inputs[1]
                dead = self._dead(step, at)
                fast.append((quick, dead))
                safe.append((sure, dead))
                (quick if fine else sure)(registers)
                for value in step.outputs:
                    found = _memory.size_of(registers[value])
                    if found is not None:
                        sizes[value] = found
                for value in dead:
                    registers[value] = None
            parts.append(_Part(segment.looks, tuple(fast), tuple(safe)))
        plan = _memory.plan(_memory.lives(self.graph, sizes, in_place))
        result = fill(self.graph.output, lambda ref: registers[ref.value])
        return Program(tuple(parts), self._count, self.graph, plan, served), result

    def _dead(self, step: Step, at: int) -> tuple[int, ...]:
        values = dict.fromkeys((*step.inputs, *step.outputs))
        return tuple(value for value in values if self._last[value] == at)

    def _gives(self, step: Step, at: int, registers: Registers) -> bool:
        """Whether the shortcut's memory may become the result's."""
        if len(step.inputs) < 2 or step.inputs[0] == step.inputs[1]:
            return False
        value = step.inputs[1]
        return value in self._fresh and self._last[value] == at


def _own(step: Step) -> Run:
    """A step of PyTorch's own."""
    run, inputs, outputs = _calls.run, step.inputs, step.outputs
    if len(inputs) == 1 and len(outputs) == 1:
        source, target = inputs[0], outputs[0]

        def single(registers: Registers) -> None:
            registers[target] = run(step, (registers[source],))

        return single

    def several(registers: Registers) -> None:
        registers[outputs[0]] = run(step, [registers[value] for value in inputs])

    return several


def _by_kernel(step: Step, registers: Registers) -> tuple[Run, tuple[str, str]]:
    """A step by the op that it is, and (implementation, why)."""
    inputs, target = step.inputs, step.output
    kernel = _kernels.Kernel(step, [registers[value] for value in inputs])

    def run(registers: Registers) -> None:
        registers[target] = kernel([registers[value] for value in inputs])

    return run, (kernel.name, kernel.why)


class _Unit:
    """One layer for one shape: the two calls that it may be, with the post-op and without."""

    def __init__(
        self, layer: Layer, at: int, registers: Registers, gives: bool, pack: bool
    ) -> None:
        self._layer, self._pack = layer, pack
        step = layer.step
        self._source, self._target = step.inputs[0], step.output
        self._other = step.inputs[1] if len(step.inputs) == 2 else None
        self._x = registers[self._source]
        self._residual = None if self._other is None else registers[self._other]
        self._gives = gives
        self._relu = step.options["act"] == "relu"
        self.in_place = False

    def runs(self, never: bool) -> tuple[Run, Run, tuple[str, str]]:
        """(where no NaN can come, where it may, (implementation, why))."""
        layer, x = self._layer, self._x
        if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype != layer._dtype:
            raise ValueError(
                f"{layer.step.name} got {_described(x)}; accepted is a tensor [N, C, H, W] of "
                f"{layer._dtype}"
            )
        shape = onednn.fake_output(x.to("meta"), layer.step.tensors["weight"], *self._sizes()).shape
        if self._residual is not None and self._residual.shape != shape:
            run = self._added()
            return run, run, ("split", "its shortcut is broadcast: added apart")
        reason = layer.refused(x) if layer.served else None
        why = layer.choice.why
        if not layer.served or reason is not None or x.shape[0] == 0:
            run = self._by(layer.plain())
            name = "split" if reason else layer.choice.implementation.name
            return run, run, (name, reason or why)
        folded = layer.fold()
        weight = layer.packed(folded, x.shape, self._pack)
        name = layer.choice.implementation.name
        if layer.narrow:
            quick, sure = (self._narrow(folded, weight, post) for post in (True, False))
        else:
            quick, sure = (self._wide(folded, weight, post) for post in (True, False))
        return (sure if never else quick), sure, (name, why)

    def _sizes(self) -> tuple[Any, Any, Any]:
        o = self._layer.step.options
        return o["stride"], o["padding"], o["dilation"]

    def _by(self, function: Callable[..., Tensor]) -> Run:
        source, other, target = self._source, self._other, self._target
        if other is None:

            def alone(registers: Registers) -> None:
                registers[target] = function(registers[source])

            return alone

        def added(registers: Registers) -> None:
            registers[target] = function(registers[source], registers[other])

        return added

    def _added(self) -> Run:
        """For a shortcut that is broadcast: the layer without it, then PyTorch's add and ReLU."""
        step = self._layer.step
        options = {**step.options, "act": "none"}
        bare = Layer(
            Step("conv_bn_act", step.name, step.inputs[:1], step.outputs, step.tensors, options),
            self._layer._dtype,
        ).plain()
        relu = self._relu

        def function(x: Tensor, residual: Tensor) -> Tensor:
            y = bare(x) + residual
            return torch.relu(y) if relu else y

        return self._by(function)

    def _wide(self, folded: onednn.Folded, weight: Tensor, post: bool) -> Run:
        source, other, target = self._source, self._other, self._target
        geometry, late = folded.geometry, self._relu and not post
        if other is None:
            bias, attr = folded.bias, "relu" if self._relu and post else "none"

            def alone(registers: Registers) -> None:
                y = _PLAIN(registers[source], weight, bias, *geometry, attr, [], None)
                registers[target] = y.relu_() if late else y

            return alone
        unary = "relu" if self._relu and post else None
        tail = (weight, folded.add_bias, *geometry, "add", 1.0, unary, [], None)
        exact = _is_exact(self._residual)
        # With groups PyTorch's out-of-place form adds after a rounding; with one channel or one
        # pixel PyTorch 2.11's fails. In place both are oneDNN's own.
        copy = not self._gives and (geometry[3] > 1 or self._residual.is_contiguous())
        if not (copy or self._gives):

            def added(registers: Registers) -> None:
                residual = registers[other]
                if not exact:
                    residual = onednn.channels_last(residual)
                y = _ADD(registers[source], residual, *tail)
                registers[target] = y.relu_() if late else y

            return added
        self.in_place = not copy

        def written(registers: Registers) -> None:
            residual = registers[other]
            if copy:
                residual = residual.clone()
            if not exact:
                residual = onednn.channels_last(residual)
            y = _ADD_IN_PLACE(residual, registers[source], *tail)
            registers[target] = y.relu_() if late else y

        return written

    def _narrow(self, folded: onednn.Folded, weight: Tensor, post: bool) -> Run:
        """16-bit activations, convolved in float32 and rounded once."""
        relu, dtype, itself = self._relu, self._layer._dtype, self._layer.looks_itself
        gain, offset = folded.gain, folded.offset
        bias, add_bias, geometry = folded.bias, folded.add_bias, folded.geometry

        def function(x: Tensor, residual: Tensor | None = None) -> Tensor:
            wide = x.float()
            other = None if residual is None else onednn.channels_last(residual.float())
            safe = post
            if itself:
                bound = onednn.largest(wide) * gain + offset
                bound += 0.0 if other is None else onednn.largest(other)
                safe = bound < onednn.LARGEST
            attr = "relu" if relu and safe else None
            if other is None:
                y = _PLAIN(wide, weight, bias, *geometry, attr or "none", [], None)
            else:
                # The widened shortcut is ours to overwrite.
                tail = (*geometry, "add", 1.0, attr, [], None)
                y = _ADD_IN_PLACE(other, wide, weight, add_bias, *tail)
            y = y.relu_() if relu and not safe else y
            return y.to(dtype)

        return self._by(function)


def _is_exact(residual: Tensor) -> bool:
    """Whether a tensor has the very strides that oneDNN expects of channels_last."""
    _, c, h, w = residual.shape
    return residual.stride() == (c * h * w, 1, w * c, c)


def _described(x: Any) -> str:
    return f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
