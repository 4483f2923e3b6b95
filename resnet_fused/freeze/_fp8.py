"""Layers in e4m3: what a calibration knows, and the rule that rewrites a graph by it.

Weights have a scale a channel, activations one a tensor, found beforehand on the user's images
("FP8 Formats for Deep Learning", Micikevicius et al., 2022, section 4.2). The first convolution and
the classifier stay in the engine's own dtype: they take little time, and errors there cost most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..ops import _e4m3, quantize_weight_e4m3
from ._ir import Graph, Step
from ._rules import Applied, Note, Place

FORMAT = "resnet_fused fp8 calibration"
VERSION = 1
KIND = "conv_bn_act_fp8"


@dataclass(frozen=True)
class Fp8Calibration:
    """What the activations of one network looked like on some images; `rf.calibrate_fp8` makes it.

    Attributes:
        largest: value -> its largest magnitude, or the percentile that was asked for. A value goes
            by the name of the layer that makes it.
        images: how many images it was made on.
        percentile: of the magnitudes; 100 is the largest.
        wide: layer -> why it can't run in e4m3, as far as the images showed.
    """

    largest: dict[str, float]
    images: int
    percentile: float = 100.0
    wide: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "format": FORMAT, "version": VERSION, "images": self.images,
            "percentile": self.percentile, "largest": self.largest, "wide": self.wide,
        }  # fmt: skip
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fp8Calibration:
        """Reads what `save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no calibration, or of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            largest = {str(name): float(value) for name, value in content["largest"].items()}
            wide = {str(name): str(why) for name, why in content["wide"].items()}
            found = cls(largest, int(content["images"]), float(content["percentile"]), wide)
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError("another format")
            if not all(0 <= value < math.inf for value in largest.values()):
                raise ValueError("a magnitude that is none")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(path)} is no fp8 calibration of version {VERSION}; accepted is what "
                "Fp8Calibration.save has written"
            ) from error
        return found


def value_names(graph: Graph) -> dict[int, str]:
    """Value -> a name of its own: its step's; of a layer that is called again with a number."""
    found = {value: f"input {place}" for place, value in enumerate(graph.inputs)}
    seen: dict[str, int] = {}
    for step in graph.steps:
        name = step.name or step.kind
        seen[name] = seen.get(name, 0) + 1
        name += f" (call {seen[name]})" if seen[name] > 1 else ""
        parts = len(step.outputs)
        found |= {v: name + (f" [{i}]" if parts > 1 else "") for i, v in enumerate(step.outputs)}
    return found


def watched(graph: Graph) -> tuple[int, ...]:
    """The values that layers read and write: those whose size a calibration has to know."""
    layers = [step for step in graph.steps if step.kind == "conv_bn_act"]
    return tuple(dict.fromkeys(v for step in layers for v in (*step.inputs, *step.outputs)))


def quantised(graph: Graph, calibration: Fp8Calibration, place: Place) -> Applied:
    """The graph with its layers in e4m3, as far as they can be.

    Args:
        graph: after the rules of `_rules.PLAIN`.
        calibration: of this model.
        place: where it is to run; `dtype` is what the other layers have.

    Returns:
        The new graph, and a note on each convolution and classifier.

    Raises:
        ValueError: the calibration is of another model, or no layer can be.
    """
    names = value_names(graph)
    missing = [names[v] for v in watched(graph) if names[v] not in calibration.largest]
    if missing:
        raise ValueError(
            f"freeze: fp8 is a calibration of another model: it knows nothing of {missing[0]!r}; "
            "accepted is what rf.calibrate_fp8 made of this one"
        )
    made, notes = _Rewriting(graph, calibration, place, names).apply()
    if not any(note.done for note in notes):
        said = "; ".join(f"{note.layers}: {note.why}" for note in notes) or "it has none"
        raise ValueError(f"freeze: fp8: no layer of the model can run in e4m3 ({said})")
    return made, notes


class _Rewriting:
    """One graph on its way."""

    def __init__(
        self, graph: Graph, calibration: Fp8Calibration, place: Place, names: dict[int, str]
    ) -> None:
        self._graph, self._place = graph, place
        self._scales = {
            value: _e4m3.scale_of(calibration.largest[name])
            for value, name in names.items()
            if name in calibration.largest
        }
        self._names, self._wide = names, calibration.wide
        self._weights: dict[int, Any] = {}  # position -> a filter in e4m3 and its scales
        self._count = 1 + max([*graph.inputs, *graph.makers()])

    def apply(self) -> Applied:
        notes = list(self._chosen())
        graph, readers, makers = self._graph, self._graph.readers(), self._graph.makers()
        results = set(graph.results())
        narrow: dict[int, int] = {}  # value -> the one that holds it in e4m3
        for value in watched(graph):
            mine = [at for at in readers.get(value, []) if at in self._weights]
            first = any(graph.steps[at].inputs[0] == value for at in mine)
            alone = len(mine) == len(readers.get(value, [])) > 0 and value not in results
            if makers.get(value) in self._weights and alone:
                narrow[value] = value
            elif first:
                narrow[value] = self._count
                self._count += 1
        steps = [self._quantising(v, narrow[v]) for v in graph.inputs if v in narrow]
        for at, step in enumerate(graph.steps):
            steps.append(self._layer(at, step, narrow) if at in self._weights else step)
            extra = [v for v in step.outputs if narrow.get(v, v) != v]
            steps += [self._quantising(v, narrow[v]) for v in extra]
        return replace(graph, steps=tuple(steps)), notes

    def _chosen(self) -> Iterator[Note]:
        """Fills `_weights`, and says of each layer what becomes of it."""
        dtype = str(self._place.dtype).removeprefix("torch.")
        pictures = _pictures(self._graph)
        for at, step in enumerate(self._graph.steps):
            if step.kind == "linear":
                yield Note("fp8", step.name, False, f"a linear layer stays in {dtype}")
            if step.kind != "conv_bn_act":
                continue
            reason = self._wide.get(self._names[step.output])
            if step.inputs[0] in pictures:
                reason = f"the first convolution, which reads the image, stays in {dtype}"
            if reason is None:
                try:
                    self._weights[at] = quantize_weight_e4m3(step.tensors["weight"])
                except ValueError as error:
                    reason = str(error)
            yield Note("fp8", step.name, reason is None, reason or f"{step.pattern} in e4m3")

    def _quantising(self, value: int, target: int) -> Step:
        why = "a value that layers in e4m3 read and others make or read too, by PyTorch"
        return Step(
            "quantize", self._names[value], (value,), (target,), {},
            {"scale": self._scales[value]}, why, pattern="quantize",
        )  # fmt: skip

    def _layer(self, at: int, step: Step, narrow: dict[int, int]) -> Step:
        weight, channel = self._weights[at]
        x, *residual = step.inputs
        # In float64, then rounded once.
        scale = step.tensors["scale"].double() * channel.double() * self._scales[x]
        stored = narrow.get(step.output) == step.output
        inside = [v for v in residual if v in narrow]
        return replace(
            step,
            kind=KIND,
            inputs=tuple(narrow.get(v, v) for v in step.inputs),
            tensors={
                "weight": weight,
                "scale": scale.float(),
                "shift": step.tensors["shift"].float(),
            },
            options={
                **step.options,
                "residual_scale": self._scales[inside[0]] if inside else 1.0,
                "out_scale": self._scales[step.output] if stored else 1.0,
                "out_dtype": _e4m3.E4M3 if stored else self._place.dtype,
            },
            pattern=f"{step.pattern} in e4m3",
        )


def _pictures(graph: Graph) -> frozenset[int]:
    """The images, and what is made of them before any layer."""
    found = set(graph.inputs)
    for step in graph.steps:
        layer = step.kind in ("conv", "conv_bn_act", "linear", "module")
        if not layer and found.issuperset(step.inputs):
            found.update(step.outputs)
    return frozenset(found)


def check(calibration: Any, dtype: torch.dtype) -> None:
    """Refuses what `rf.freeze` can't take as `fp8`.

    Raises:
        TypeError: it is no calibration.
        ValueError: the other layers are float64.
    """
    if not isinstance(calibration, Fp8Calibration):
        raise TypeError(
            f"freeze: fp8 must be an Fp8Calibration, got {type(calibration).__name__}; "
            "rf.calibrate_fp8(model, images) makes one"
        )
    if dtype is torch.float64:
        raise ValueError(
            "freeze: fp8 goes with a model in float32, bfloat16 or float16, this one is in float64"
        )
