"""When each value of a graph lives, and one arena in which those that never meet share memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._ir import Graph

ALIGNMENT = 256  # bytes: what CUDA's allocations have, and a multiple of any vector load
_VIEWS = frozenset({"flatten", "call", "module"})  # may give back the memory of what they read


@dataclass(frozen=True)
class Life:
    """One block of memory.

    Attributes:
        value: whose.
        first: position of the step that writes it.
        last: position of the last that reads it, or a view of it.
        size: bytes, rounded up to `ALIGNMENT`.
        dtype: name of its dtype.
    """

    value: int
    first: int
    last: int
    size: int
    dtype: str


@dataclass(frozen=True)
class Plan:
    """Offsets in one arena a dtype.

    Attributes:
        offsets: value -> bytes from the start of its dtype's arena.
        arenas: dtype -> bytes.
        lives: what was planned.
    """

    offsets: dict[int, int]
    arenas: dict[str, int]
    lives: tuple[Life, ...]

    @property
    def planned(self) -> int:
        """Bytes of the arenas."""
        return sum(self.arenas.values())

    @property
    def total(self) -> int:
        """Bytes that the values would take without reuse."""
        return sum(life.size for life in self.lives)

    @property
    def most(self) -> int:
        """Bytes that are alive at one step at most: no plan can take less."""
        steps = {life.first for life in self.lives}
        return max(
            (
                sum(life.size for life in self.lives if life.first <= at <= life.last)
                for at in steps
            ),
            default=0,
        )


def fresh(graph: Graph) -> frozenset[int]:
    """Values that nothing but their own number can reach: memory of their own, and no views."""
    viewed = {v for step in graph.steps if step.kind in _VIEWS for v in step.inputs}
    kept = viewed.union(graph.results(), graph.inputs)
    own = (v for step in graph.steps if step.kind not in _VIEWS for v in step.outputs)
    return frozenset(value for value in own if value not in kept)


def lives(
    graph: Graph, sizes: dict[int, tuple[int, torch.dtype]], in_place: dict[int, int]
) -> tuple[Life, ...]:
    """The lives of the values that steps make, the caller's inputs and views aside.

    Args:
        graph: the steps.
        sizes: value -> (bytes, dtype).
        in_place: value -> the value whose memory it takes.
    """
    made, last = graph.makers(), graph.last_use()
    for step in reversed(graph.steps):
        held = [in_place[v] for v in step.outputs if v in in_place]
        for value in (*step.inputs, *held) if step.kind in _VIEWS else held:
            last[value] = max(last[value], *(last[v] for v in step.outputs))
    found = []
    for value, first in made.items():
        if value in in_place or value not in sizes or graph.steps[first].kind == "flatten":
            continue
        size, dtype = sizes[value]
        blocks = -(-size // ALIGNMENT) * ALIGNMENT
        name = str(dtype).removeprefix("torch.")
        found.append(Life(value, first, last[value], blocks, name))
    return tuple(found)


def beside(graph: Graph, found: tuple[Life, ...], kind: str) -> tuple[Life, ...]:
    """The lives for steps that may run beside the one ahead, where they do not hang together.

    What the one ahead is the last to read lives until both have run: no result of the second one
    is to lie there.

    Args:
        graph: the steps.
        found: the lives for steps one after the other.
        kind: of the steps.
    """
    ahead = {
        at
        for at, (one, two) in enumerate(itertools.pairwise(graph.steps))
        if one.kind == two.kind == kind and not set(one.outputs).intersection(two.inputs)
    }
    return tuple(replace(life, last=life.last + (life.last in ahead)) for life in found)


def plan(found: tuple[Life, ...]) -> Plan:
    """Places every life, the largest first, at the lowest offset that is free while it lasts."""
    placed: dict[str, list[tuple[Life, int]]] = {}
    offsets: dict[int, int] = {}
    for life in sorted(found, key=lambda one: (-one.size, one.first, one.value)):
        others = placed.setdefault(life.dtype, [])
        meets = sorted(
            (offset, offset + other.size)
            for other, offset in others
            if other.first <= life.last and life.first <= other.last
        )
        at = 0
        for low, high in meets:
            if at + life.size <= low:
                break
            at = max(at, high)
        others.append((life, at))
        offsets[life.value] = at
    arenas = {
        dtype: max(offset + life.size for life, offset in others)
        for dtype, others in placed.items()
    }
    return Plan(offsets, arenas, found)


def size_of(value: Any) -> tuple[int, torch.dtype] | None:
    """(bytes, dtype) of a tensor; None of what is none."""
    if not isinstance(value, Tensor):
        return None
    return value.numel() * value.element_size(), value.dtype


def constants(graph: Graph) -> int:
    """Bytes of a graph's constants, those of its modules included."""
    held = [t for step in graph.steps for t in step.tensors.values()]
    modules = [step.module for step in graph.steps if step.module is not None]
    held += [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum(t.numel() * t.element_size() for t in held)


@dataclass(frozen=True)
class Memory:
    """What an engine's intermediate values take for one input shape, in bytes.

    Attributes:
        shape: of the inputs.
        without_reuse: each value in memory of its own.
        planned: one arena a dtype, with offsets from the lifetimes.
        peak: alive at one time at most; no plan can take less.
        arena: whether the values lie in the planned arena. On the CPU they do not: ATen's oneDNN
            convolution allocates its result itself (it has no form that writes into a given one,
            but for the add in place, which is used), so values are dropped where they die and
            `peak` is what is held at once, but for what a step needs inside, such as float32
            copies of 16-bit activations.
        outside: bytes, without reuse, that PyTorch's own ops allocate beside the arena on a GPU.
        constants: weights, packed or not, scale and shift: of the whole engine.
    """

    shape: tuple[tuple[int, ...], ...]
    without_reuse: int
    planned: int
    peak: int
    arena: bool
    constants: int
    outside: int = 0

    def __str__(self) -> str:
        """One line."""
        mib = 1024 * 1024
        how = "in one arena" if self.arena else "allocated by ATen, dropped where they die"
        return (
            f"{self.shape}: {self.planned / mib:.1f} MiB planned ({self.peak / mib:.1f} MiB alive "
            f"at once, {self.without_reuse / mib:.1f} MiB without reuse), {how}; constants "
            f"{self.constants / mib:.1f} MiB"
        )
