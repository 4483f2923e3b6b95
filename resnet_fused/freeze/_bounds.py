"""Where oneDNN's ReLU may be used: it gives 0 for NaN, so none may arise before it.

A bound on the magnitude of every channel of every value follows from a bound on the input and the
weights alone (interval arithmetic, channel by channel: much tighter than one number for a layer).
So the network is cut into segments, each of which begins with a look at the values that enter it:
are they finite, and below `LIMIT`, the whole segment is far from overflow and may run with the
post-op. Else it runs with PyTorch's own ReLU. The first look is at the input; more are needed only
where the bounds of a deep network grow too large, and then at the narrowest place before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import onednn
from ._ir import Graph, Step

LIMIT = 1e8
"""What a look lets through, as a bound on the values' norm: far above what networks compute."""
_SLACK = 1.02  # the rounding of folded weights, results and sums
_SAME = frozenset({"avg_pool", "max_pool", "relu"})


@dataclass(frozen=True)
class Segment:
    """Steps that run with the post-op, or all without.

    Attributes:
        start: position of the first.
        stop: of the first that is in it no more.
        looks: the values to look at before.
        never: positions at which not even small inputs keep the sums small: always without.
    """

    start: int
    stop: int
    looks: tuple[int, ...]
    never: frozenset[int]


def gains(step: Step) -> Tensor:
    """The sums of |weights| over a filter's window, scaled: [groups, K / groups, C / groups]."""
    weight, scale = step.tensors["weight"], step.tensors["scale"]
    sums = weight.double().abs().sum((2, 3)) * scale.double().abs()[:, None]
    groups = step.options["groups"]
    return sums.view(groups, -1, weight.shape[1])


def _bound(step: Step, known: dict[int, Tensor | None], gain: Tensor | None) -> Tensor | None:
    """A bound on each channel of a step's output, or None if nothing is known."""
    given = [known.get(value) for value in step.inputs]
    if any(bound is None for bound in given):
        return None
    first = given[0]
    assert first is not None
    if step.kind in _SAME:
        return first
    if step.kind == "add":
        return first + given[1]  # type: ignore[operator]
    if gain is None:
        return None
    groups, _, each = gain.shape
    entering = first.expand(groups * each).reshape(groups, each, 1)
    total = (gain @ entering).flatten() + step.tensors["shift"].double().abs()
    if len(given) == 2:
        total = total + given[1]  # type: ignore[operator]
    return total * _SLACK


def _live(graph: Graph) -> list[tuple[int, ...]]:
    """Position -> the values that are made before it and read there or later."""
    made = dict.fromkeys(graph.inputs, -1) | graph.makers()
    read = {value: max(at) for value, at in graph.readers().items()}
    return [
        tuple(value for value, at in made.items() if at < position <= read.get(value, -1))
        for position in range(len(graph.steps))
    ]


def segments(graph: Graph, kept: Collection[int]) -> tuple[Segment, ...]:
    """Cuts a graph into segments.

    Args:
        graph: after all rules.
        kept: positions of the steps whose ReLU is to be oneDNN's.
    """
    live = _live(graph)
    made = graph.makers()
    gain = {
        at: gains(step).cpu() for at, step in enumerate(graph.steps) if step.kind == "conv_bn_act"
    }
    found: list[Segment] = []
    start, never = 0, set()  # type: int, set[int]
    known = _assumed(graph.inputs)
    position = 0
    while position < len(graph.steps):
        step = graph.steps[position]
        bound = _bound(step, known, gain.get(position))
        loose = bound is None or not bool((bound < onednn.LARGEST).all())
        if position in kept and loose:
            unknown = [made.get(v, -1) for v in step.inputs if known.get(v) is None]
            lowest = max([start, *unknown]) + 1
            cuts = sorted(range(lowest, position + 1), key=lambda at: (len(live[at]), -at))
            if cuts:
                found.append(_segment(start, cuts[0], live, never, kept))
                start, never = cuts[0], set()
                known, position = _assumed(live[start]), start
                continue
            never.add(position)
        known.update(dict.fromkeys(step.outputs, None if loose else bound))
        position += 1
    found.append(_segment(start, len(graph.steps), live, never, kept))
    return tuple(found)


def _assumed(values: tuple[int, ...]) -> dict[int, Tensor | None]:
    limit = torch.tensor([LIMIT], dtype=torch.float64)
    return dict.fromkeys(values, limit)


def _segment(
    start: int, stop: int, live: list[tuple[int, ...]], never: set[int], kept: Collection[int]
) -> Segment:
    needed = any(start <= at < stop and at not in never for at in kept)
    return Segment(start, stop, live[start] if needed else (), frozenset(never))
