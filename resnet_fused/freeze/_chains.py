"""The rule that makes chains: a block's last convolution with the next one's first, and the front.

Around each convolution that ends a bottleneck (1x1, with a shortcut and ReLU) there are up to eight
ways to cut: with the 3x3 in front of it or not, with the next block's first 1x1 or not, its own
projection inside or before. A convolution stands in one of these neighbourhoods alone, so that each
end takes the way that `conv_chain.serves` predicts to save most, for the shapes of the example.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..cases import ChainCase
from ..ops import _e4m3
from ..ops.conv_chain import Answer, serves
from ._ir import Graph, Step

Shapes = dict[int, tuple[int, ...]]
_SAME = frozenset({"add", "images", "quantize", "relu"})
_CONVS = frozenset({"conv_bn_act", "conv_bn_act_fp8"})
_CHAINS = frozenset({"conv_chain", "conv_chain_fp8"})


class Cut(NamedTuple):
    """One way to take steps together.

    Attributes:
        end: position of the block's last convolution.
        front: of the 3x3 before it, or None.
        projection: of the shortcut's projection, or None.
        following: of the next block's first, or None.
        reader: of the stride-2 convolution that alone reads the result besides, or None.
    """

    end: int
    front: int | None
    projection: int | None
    following: int | None
    reader: int | None

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the steps that go."""
        found = (self.end, self.front, self.projection, self.following)
        return tuple(sorted(at for at in found if at is not None))


def shapes_of(graph: Graph, examples: Sequence[torch.Tensor]) -> Shapes:
    """Value -> shape, for the values that follow from the inputs by known steps."""
    found: Shapes = {v: tuple(x.shape) for v, x in zip(graph.inputs, examples, strict=True)}
    for step in graph.steps:
        given = found.get(step.inputs[0]) if step.inputs else None
        if given is None or len(given) != 4:
            continue
        o = step.options
        if step.kind in _SAME:
            found[step.output] = given
        elif step.kind in _CONVS:
            sizes = _sizes(given, step.tensors["weight"].shape[2:], o)
            found[step.output] = (given[0], step.tensors["weight"].shape[0], *sizes)
        elif step.kind == "max_pool":
            pool = torch.nn.MaxPool2d(
                o["kernel"], o["stride"], o["padding"], o["dilation"], ceil_mode=o["ceil_mode"]
            )
            found[step.output] = tuple(pool(torch.empty(given, device="meta")).shape)
        elif step.kind == "stem":
            inner = (*given[:2], *_sizes(given, step.tensors["weight"].shape[2:], o))
            window = {"padding": o["pool_padding"], "stride": o["pool_stride"]}
            outer = _sizes(inner, o["pool_kernel"], {**window, "dilation": [1, 1]})
            found[step.output] = (given[0], step.tensors["weight"].shape[0], *outer)
        elif step.kind in _CHAINS:
            by, after = o["out_stride"], step.tensors.get("next_weight")
            stored = (-(-size // by) for size in given[2:])
            found[step.outputs[0]] = (given[0], step.tensors["weight"].shape[0], *stored)
            if after is not None:
                found[step.outputs[1]] = (given[0], after.shape[0], *given[2:])
    return found


def narrow_values(graph: Graph) -> frozenset[int]:
    """The values that are stored in e4m3."""
    found: set[int] = set()
    for step in graph.steps:
        made = step.kind in ("quantize", "conv_chain_fp8")
        made = made or (step.kind == "stem" and step.options.get("out_scale") is not None)
        if made or step.options.get("out_dtype") is _e4m3.E4M3:
            found.update(step.outputs)
    return frozenset(found)


def _sizes(given: Sequence[int], kernel: Sequence[int], o: dict[str, Any]) -> tuple[int, ...]:
    return tuple(
        (size + 2 * pad - spread * (taps - 1) - 1) // by + 1
        for size, pad, spread, taps, by in zip(
            given[2:], o["padding"], o["dilation"], kernel, o["stride"], strict=True
        )
    )


def _is_conv(step: Step, taps: int, stride: int, act: str, inputs: int) -> bool:
    """Whether a step is such a square convolution, padded to keep the size, of one group."""
    if step.kind not in _CONVS or len(step.inputs) != inputs:
        return False
    o, pad = step.options, taps // 2
    window = list(step.tensors["weight"].shape[2:])
    return (window, list(o["stride"]), list(o["padding"]), list(o["dilation"]), o["groups"]) == (
        [taps] * 2, [stride] * 2, [pad] * 2, [1, 1], 1,
    ) and o["act"] == act  # fmt: skip


class _Finder:
    """Looks for cuts in one graph, of layers in e4m3 or of the others."""

    def __init__(self, graph: Graph, narrow: bool) -> None:
        self._steps, self._makers, self._readers = graph.steps, graph.makers(), graph.readers()
        self._results = set(graph.results())
        self._narrow, self._in_e4m3 = narrow, narrow_values(graph)

    def cuts(self) -> list[list[Cut]]:
        """For each end the ways to cut around it, of two convolutions and more."""
        ends = (at for at in range(len(self._steps)) if self._is(at, 1, 1, "relu", 2))
        return [found for found in map(self._around, ends) if found]

    def _around(self, end: int) -> list[Cut]:
        step = self._steps[end]
        if step.inputs[0] == step.inputs[1]:
            return []
        front = self._only(step.inputs[0], end)
        if front is not None and not self._is(front, 3, 1, "relu", 1):
            front = None
        projection = self._only(step.inputs[1], end)
        if projection is not None and not any(
            self._is(projection, 1, stride, "none", 1) for stride in (1, 2)
        ):
            projection = None
        readers = self._readers.get(step.output, [])
        nexts = [at for at in readers if self._is(at, 1, 1, "relu", 1)]
        following = nexts[0] if nexts else None
        ways = itertools.product({front, None}, {projection, None}, {following, None})
        cuts = (Cut(end, *way, self._reader(step.output, way[2])) for way in ways)
        return [cut for cut in cuts if len(cut.positions) > 1]

    def _is(self, at: int, *what: Any) -> bool:
        """Whether a step is such a convolution of these layers; of e4m3 all that it has is."""
        step = self._steps[at]
        values = (*step.inputs, *step.outputs)
        if self._narrow != (step.kind == "conv_bn_act_fp8") or not _is_conv(step, *what):
            return False
        return not self._narrow or self._in_e4m3.issuperset(values)

    def _only(self, value: int, reader: int) -> int | None:
        """The position of a value's maker, if nobody but `reader` sees it."""
        alone = self._readers[value] == [reader] and value not in self._results
        return self._makers.get(value) if alone else None

    def _reader(self, value: int, following: int | None) -> int | None:
        others = [at for at in self._readers.get(value, []) if at != following]
        if value in self._results or len(others) != 1:
            return None
        return others[0] if _is_conv(self._steps[others[0]], 1, 2, "none", 1) else None


def cuts(graph: Graph, *, narrow: bool = False) -> list[list[Cut]]:
    """For each block's last convolution the ways to take it together with its neighbours.

    Args:
        graph: with its layers fused.
        narrow: of the layers in e4m3, in place of the others.
    """
    return _Finder(graph, narrow).cuts()


def _case(graph: Graph, cut: Cut, shapes: Shapes) -> ChainCase | None:
    """The sizes of a cut, as `serves` is asked; None where they are not known."""
    steps = graph.steps
    end = steps[cut.end]
    first = end if cut.front is None else steps[cut.front]
    given = shapes.get(first.inputs[0])
    if given is None:
        return None
    c, k = end.tensors["weight"].shape[:2]
    projection = None if cut.projection is None else steps[cut.projection]
    following = None if cut.following is None else steps[cut.following]
    return ChainCase(
        "asked", given[0], k, given[2], given[3], c,
        m=0 if following is None else following.tensors["weight"].shape[0],
        projected=0 if projection is None else projection.tensors["weight"].shape[1],
        projection_stride=1 if projection is None else projection.options["stride"][0],
        front=0 if cut.front is None else first.tensors["weight"].shape[1],
        out_stride=1 if cut.reader is None else 2,
    )  # fmt: skip


def _chain(graph: Graph, cut: Cut, spare: int) -> Step:
    """The step of a cut; `spare` is the number of what a chain without a next one gives besides."""
    steps = graph.steps
    end = steps[cut.end]
    x, tensors = end.inputs[0], dict(end.tensors)
    other, options = end.inputs[1], {"projection_stride": 1}
    if cut.front is not None:
        front = steps[cut.front]
        x = front.inputs[0]
        tensors.update({f"front_{name}": t for name, t in front.tensors.items()})
    if cut.projection is not None:
        projection = steps[cut.projection]
        other = projection.inputs[0]
        options["projection_stride"] = projection.options["stride"][0]
        tensors.update({f"projection_{name}": t for name, t in projection.tensors.items()})
    after = spare
    if cut.following is not None:
        following = steps[cut.following]
        after = following.output
        tensors.update({f"next_{name}": t for name, t in following.tensors.items()})
    options["out_stride"] = 1 if cut.reader is None else 2
    kind = "conv_chain_fp8" if end.kind == "conv_bn_act_fp8" else "conv_chain"
    if kind == "conv_chain":
        options["reverse"] = False
    else:
        beside = (None if at is None else steps[at] for at in (cut.following, cut.front))
        options |= _scales(end, *beside)
    parts = [steps[at] for at in cut.positions]
    return Step(
        kind, "+".join(part.name for part in parts), (x, other), (end.output, after),
        tensors, options, pattern=" > ".join(part.pattern for part in parts),
    )  # fmt: skip


def _scales(end: Step, following: Step | None, front: Step | None) -> dict[str, float]:
    """What stored numbers of a chain in e4m3 are worth; a projection's is the shortcut's."""
    others = {"next_out_scale": following, "front_out_scale": front}
    found = {name: end.options[name] for name in ("residual_scale", "out_scale")}
    return found | {
        name: 1.0 if step is None else step.options["out_scale"] for name, step in others.items()
    }


def chained(
    graph: Graph, examples: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Graph, list[tuple[str, bool, str]]]:
    """The graph with the chains that are predicted to win.

    Args:
        graph: with its layers fused.
        examples: of the inputs.
        dtype: of the activations; e4m3 for chains of the layers in that.
        device: where it is to run.

    Returns:
        The new graph; for each end of a block (its name, whether a chain was made, why).
    """
    shapes = shapes_of(graph, examples)
    merges: list[tuple[tuple[int, ...], Step]] = []
    halved: set[int] = set()
    said: list[tuple[str, bool, str]] = []
    spare = 1 + max([*graph.inputs, *graph.makers()], default=0)
    for around in cuts(graph, narrow=dtype is _e4m3.E4M3):
        best: tuple[Cut, Answer] | None = None
        refusal = "its sizes are not known"
        for cut in around:
            case = _case(graph, cut, shapes)
            answer = None if case is None else serves(case, dtype, device)
            if answer is None:
                continue
            refusal = answer.why
            if answer.reason is None and answer.wins:
                best = (cut, answer) if best is None or answer.gain > best[1].gain else best
        if best is None:
            said.append((graph.steps[around[0].end].name, False, refusal))
            continue
        cut, answer = best
        merges.append((cut.positions, _chain(graph, cut, spare)))
        spare += 1
        if cut.reader is not None:
            halved.add(cut.reader)
        said.append((merges[-1][1].name, True, answer.why))
    return _ordered(_with_halves(graph, halved).merged(_read(merges, halved))), said


def _read(
    merges: list[tuple[tuple[int, ...], Step]], halved: set[int]
) -> list[tuple[tuple[int, ...], Step]]:
    """Chains whose projection reads what was stored at its stride already."""
    return [
        (positions, replace(step, options={**step.options, "projection_stride": 1})
         if halved.intersection(positions) else step)
        for positions, step in merges
    ]  # fmt: skip


def _with_halves(graph: Graph, halved: set[int]) -> Graph:
    """The readers of results of which the even pixels alone are stored read all of those."""
    steps = [
        replace(step, options={**step.options, "stride": [1, 1]}) if at in halved else step
        for at, step in enumerate(graph.steps)
    ]
    return replace(graph, steps=tuple(steps))


def _ordered(graph: Graph) -> Graph:
    """The steps in an order that makes every value before it is read, else as they stood."""
    ready, waiting, steps = set(graph.inputs), list(graph.steps), []
    while waiting:
        step = next(s for s in waiting if ready.issuperset(s.inputs))
        waiting.remove(step)
        steps.append(step)
        ready.update(step.outputs)
    return replace(graph, steps=tuple(steps))
