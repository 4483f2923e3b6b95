"""Rewrite rules: several steps become one, or stay and the rule says why.

A rule is a name and a function that looks at the whole graph and returns a new one with notes. The
rules of `PLAIN` hold for every device and go into a saved engine; those of `DEVICE` ask whether an
op exists and is served where the engine is to run, and are applied anew wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn import _prepared
from ..nn._modules import is_frozen_type, structure
from ..ops._e4m3 import E4M3
from . import _chains, _order, _served
from ._ir import Graph, Step


class Note(NamedTuple):
    """What a rule did, or did not do.

    Attributes:
        rule: its name.
        layers: what it is about.
        done: whether it replaced something.
        why: what it made, or why it did not.
    """

    rule: str
    layers: str
    done: bool
    why: str


class Place(NamedTuple):
    """Where an engine is to run.

    Attributes:
        device: the device.
        dtype: of the activations.
        examples: of the inputs: their shapes decide what is predicted to win.
    """

    device: torch.device
    dtype: torch.dtype
    examples: tuple[Tensor, ...] = ()


Applied = tuple[Graph, list[Note]]


class Rule(NamedTuple):
    """A rewrite: `apply` takes a graph and the place, and gives the new graph and notes."""

    name: str
    apply: Callable[[Graph, Place], Applied]


def _joined(*steps: Step) -> str:
    return "+".join(step.name for step in steps)


class _Layer(NamedTuple):
    """A convolution, its BatchNorm and what follows, by their positions."""

    positions: tuple[int, ...]
    residual: int | None
    add: bool
    relu: bool


def _layer_at(graph: Graph, at: int, sole: Callable[[int], int | None], taken: set[int]) -> _Layer:
    """What can be taken together with the convolution and BatchNorm at `at` and behind it."""
    steps = graph.steps
    norm = sole(steps[at].output)
    assert norm is not None
    positions, residual, last = [at, norm], None, norm
    follows = sole(steps[norm].output)
    adds = follows is not None and steps[follows].kind == "add" and follows not in taken
    if follows is not None and adds:
        left, right = steps[follows].inputs
        if left != right:
            residual = right if left == steps[norm].output else left
            positions.append(follows)
            last = follows
            follows = sole(steps[follows].output)
    if follows is not None and steps[follows].kind == "relu":
        positions.append(follows)
        last = follows
    relu = steps[last].kind == "relu"
    return _Layer(tuple(positions), residual, residual is not None, relu)


def _conv_bn_act(graph: Graph, place: Place) -> Applied:
    """Conv + BatchNorm [+ add] [+ ReLU] by one op, BatchNorm as float32 scale and shift."""
    steps, readers, results = graph.steps, graph.readers(), set(graph.results())

    def sole(value: int) -> int | None:
        found = readers.get(value, [])
        return found[0] if len(found) == 1 and value not in results else None

    makers = graph.makers()
    pairs: dict[int, int] = {}  # BatchNorm's position -> the convolution's
    notes: list[Note] = []
    for at, step in enumerate(steps):
        if step.kind != "conv":
            continue
        norm = sole(step.output)
        if norm is None or steps[norm].kind != "bn":
            notes.append(Note("conv_bn_act", step.name, False, "no BatchNorm alone reads it"))
            continue
        reason = structure(step.module, steps[norm].module)  # type: ignore[arg-type]
        if reason is None:
            pairs[norm] = at
        else:
            notes.append(Note("conv_bn_act", step.name, False, reason))
    merges: list[tuple[tuple[int, ...], Step]] = []
    taken = _adds_of_the_right(graph, pairs, makers, sole)
    for norm, at in pairs.items():
        layer = _layer_at(graph, at, sole, taken.get(norm, set()))
        merges.append((layer.positions, _merged(graph, layer, place)))
        made = merges[-1][1]
        notes.append(Note("conv_bn_act", made.name, True, made.pattern))
    return graph.merged(merges), notes


def _adds_of_the_right(
    graph: Graph, pairs: dict[int, int], makers: dict[int, int], sole: Callable[[int], int | None]
) -> dict[int, set[int]]:
    """Where both operands of an add are layers, the left one takes it, as in `out += identity`.

    Returns:
        Position of a BatchNorm -> positions of the adds that are not its own.
    """
    found: dict[int, set[int]] = {}
    for position, step in enumerate(graph.steps):
        if step.kind != "add":
            continue
        left, right = (makers.get(value) for value in step.inputs)
        both = left in pairs and right in pairs and left != right
        if both and sole(step.inputs[0]) == position:
            found.setdefault(right, set()).add(position)  # type: ignore[arg-type]
    return found


def _merged(graph: Graph, layer: _Layer, place: Place) -> Step:
    parts = [graph.steps[position] for position in layer.positions]
    conv, norm = parts[0], parts[1]
    compute = torch.float64 if place.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        scale, shift = _prepared.affine(conv.module, norm.module, compute)  # type: ignore[arg-type]
        weight = conv.module.weight.detach().clone()  # type: ignore[union-attr, operator]
    inputs = conv.inputs if layer.residual is None else (*conv.inputs, layer.residual)
    pattern = "conv+bn" + ("+add" if layer.add else "") + ("+relu" if layer.relu else "")
    return Step(
        "conv_bn_act",
        conv.name,
        inputs,
        parts[-1].outputs,
        {"weight": weight, "scale": scale.clone(), "shift": shift.clone()},
        {**conv.options, "act": "relu" if layer.relu else "none"},
        pattern=pattern,
    )


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _window(pool: Step) -> dict[str, list[int]] | None:
    """The options of a max pooling that `stem` takes, or None."""
    o = pool.options
    if _pair(o["dilation"]) != [1, 1] or o["ceil_mode"]:
        return None
    stride = o["kernel"] if o["stride"] is None else o["stride"]
    return {
        "pool_kernel": _pair(o["kernel"]),
        "pool_stride": _pair(stride),
        "pool_padding": _pair(o["padding"]),
    }


def _stem(graph: Graph, place: Place) -> Applied:
    """Conv + BatchNorm + ReLU + max pooling [+ quantisation] by `stem`, where it is served."""
    merges, notes, makers = [], [], graph.makers()
    for at, step in enumerate(graph.steps):
        if step.kind != "conv_bn_act" or step.options["act"] != "relu" or len(step.inputs) != 1:
            continue
        follows = graph.sole_reader(step.output)
        if follows is None or graph.steps[follows].kind != "max_pool":
            continue
        pool = graph.steps[follows]
        window = _window(pool)
        layers = _joined(step, pool)
        reason = "its pooling has another form" if window is None else None
        reason = reason or _stem_refused(step)
        reason = reason or _served.refusal("stem", place.device, place.dtype)
        if reason is not None or window is None:
            notes.append(Note("stem", layers, False, str(reason)))
            continue
        options = {**step.options, **window}
        inputs, tensors, positions = step.inputs, step.tensors, (at, follows)
        pattern = "conv+bn+relu+max_pool"
        front = makers.get(inputs[0])
        alone = graph.sole_reader(inputs[0]) == at
        if front is not None and alone and graph.steps[front].kind == "images":
            inputs, positions = graph.steps[front].inputs, (front, *positions)
            tensors = {**tensors, **graph.steps[front].tensors}
            pattern = f"images+{pattern}"
        outputs = pool.outputs
        behind = graph.sole_reader(pool.output)
        if behind is not None and graph.steps[behind].kind == "quantize":
            reason = _served.no_e4m3(place.device)
            if reason is None:
                outputs, positions = graph.steps[behind].outputs, (*positions, behind)
                options = {**options, "out_scale": graph.steps[behind].options["scale"]}
                pattern += "+quantize"
            else:
                notes.append(Note("stem", f"{layers} in e4m3", False, reason))
        made = Step("stem", layers, inputs, outputs, tensors, options, pattern=pattern)
        merges.append((positions, made))
        notes.append(Note("stem", layers, True, made.pattern))
    return graph.merged(merges), notes


def _stem_refused(step: Step) -> str | None:
    o = step.options
    if o["groups"] != 1 or list(o["dilation"]) != [1, 1]:
        return "its convolution has groups or dilation"
    return None


def _head(graph: Graph, place: Place) -> Applied:
    """Global average pooling + flatten + linear by `head`, where it is served."""
    merges, notes = [], []
    for at, step in enumerate(graph.steps):
        if step.kind != "avg_pool" or step.options["size"] not in (1, (1, 1)):
            continue
        flat = graph.sole_reader(step.output)
        if flat is None or graph.steps[flat].kind != "flatten":
            continue
        linear = graph.sole_reader(graph.steps[flat].output)
        if linear is None or graph.steps[linear].kind != "linear":
            continue
        parts = step, graph.steps[flat], graph.steps[linear]
        layers = _joined(parts[0], parts[2])
        ends = parts[1].options
        reason = None if (ends["start"], ends["end"]) in ((1, -1), (1, 3)) else "another flatten"
        reason = reason or _served.refusal("head", place.device, place.dtype)
        if reason is not None:
            notes.append(Note("head", layers, False, reason))
            continue
        made = Step(
            "head", layers, step.inputs, parts[2].outputs, parts[2].tensors,
            pattern="avg_pool+linear",
        )  # fmt: skip
        merges.append(((at, flat, linear), made))
        notes.append(Note("head", layers, True, made.pattern))
    return graph.merged(merges), notes


def _conv_chain(graph: Graph, place: Place) -> Applied:
    """Convolutions of neighbouring blocks by `conv_chain`, where that is predicted to win."""
    notes: list[Note] = []
    for op, dtype in (("conv_chain", place.dtype), ("conv_chain_fp8", E4M3)):
        if not _chains.cuts(graph, narrow=dtype is E4M3):
            continue
        reason = _served.refusal(op, place.device, dtype)
        if reason is not None:
            notes.append(Note(op, "all blocks", False, reason))
            continue
        graph, said = _chains.chained(graph, place.examples, dtype, place.device)
        notes += [Note(op, *one) for one in said]
    return graph, notes


def _batch_order(graph: Graph, place: Place) -> Applied:
    """Layers that walk the batch backwards, where the cache does not hold what is ahead of them."""
    held = _order.capacity(place.device)
    if held is None:
        return graph, []
    graph, said = _order.turned(graph, place.examples, place.dtype, held)
    return graph, [Note("batch_order", *one) for one in said]


PLAIN = (Rule("conv_bn_act", _conv_bn_act),)
DEVICE = (
    Rule("stem", _stem),
    Rule("head", _head),
    Rule("conv_chain", _conv_chain),
    Rule("batch_order", _batch_order),
)
APART = tuple(rule for rule in DEVICE if rule.name != "conv_chain")
"""`DEVICE` with every convolution by itself."""


def apply(rules: tuple[Rule, ...], graph: Graph, place: Place) -> Applied:
    """Applies rules one after the other.

    Returns:
        The new graph, and what each rule did and did not do.
    """
    notes: list[Note] = []
    for rule in rules:
        graph, said = rule.apply(graph, place)
        notes.extend(said)
    return graph, notes


def frozen_tensors(step: Step) -> Step | None:
    """A step that still holds one of the model's modules, with copies of its tensors instead.

    Returns:
        None where the module itself must be called.
    """
    module = step.module
    assert module is not None
    wanted: dict[str, Tensor | None]
    if step.kind in ("conv", "linear"):
        wanted = {"weight": module.weight, "bias": module.bias}  # type: ignore[dict-item]
    elif step.kind == "bn" and not is_frozen_type(type(module)) and module.running_mean is not None:
        wanted = {
            "mean": module.running_mean, "var": module.running_var,
            "weight": module.weight, "bias": module.bias,
        }  # type: ignore[dict-item] # fmt: skip
    else:
        return None
    tensors = {name: t.detach().clone() for name, t in wanted.items() if t is not None}
    why = step.why or f"{step.kind} is PyTorch's own"
    return Step(
        step.kind, step.name, step.inputs, step.outputs, tensors, step.options, why,
        pattern=step.kind,
    )  # fmt: skip
