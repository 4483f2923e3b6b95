"""What the roofline asks of a subject at least: FLOPs, bytes, seconds, fused and pass by pass.

A training step counts for each convolution its forward pass, the gradient of its input (but of the
images) and that of its weight; pooling and the classifier count as forward three times. With batch
statistics a step has to pass over some tensors again, so that this is a lower bound there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from resnet_fused.bench.ceilings import Ceilings
from resnet_fused.bench.gauges import Step
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.subject import walk
from resnet_fused.bench.work import Work
from resnet_fused.cases import ConvCase
from resnet_fused.roofline import (
    Cost,
    ModelCost,
    model_cost,
)

LAYER_KINDS = ("conv", "linear", "pool")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's kernels: fused, and as eager's passes."""

    name: str
    kind: str
    fused: tuple[Cost, ...]
    eager: tuple[Cost, ...]


def limit(work: Work, rates: Ceilings) -> dict[str, Any]:
    """The limit of a subject on a machine with these ceilings, as a record has it.

    Args:
        work: the subject, built.
        rates: the measured peak rates.

    Returns:
        flops, bytes, seconds, eager_bytes, eager_seconds; at level block and model also `layers`
        with the same of each.
    """
    layers = layers_of(work)
    rows = [_numbers(layer, rates) for layer in layers]
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in rows[0]}
    if work.subject.level != "kernel":
        total["layers"] = [
            {"name": layer.name, **row} for layer, row in zip(layers, rows, strict=True)
        ]
    return total


def _numbers(layer: Layer, rates: Ceilings) -> dict[str, float]:
    found: dict[str, float] = {"flops": sum(cost.flops for cost in layer.fused)}
    for prefix, costs in (("", layer.fused), ("eager_", layer.eager)):
        found[f"{prefix}bytes"] = sum(cost.bytes for cost in costs)
        times = (cost.seconds(rates.flops, rates.bandwidth) for cost in costs)
        found[f"{prefix}seconds"] = sum(times)
    return found


def layers_of(work: Work) -> list[Layer]:
    """The layers of a block or model in order of execution; a kernel is one."""
    subject = work.subject
    if work.case is not None:
        kind, dtype = KINDS[subject.op], subject.torch_dtype
        costs = (kind.cost(work.case, dtype),), kind.passes(work.case, dtype)
        return [Layer(work.case.name, "kernel", *costs)]
    assert work.module is not None
    shape = tuple(work.sets[0].x.shape)
    cost = model_cost(work.module, shape, dtype=subject.torch_dtype)
    forward = _forward(cost)
    if not subject.training:
        return forward
    cases = {layer.name: layer for layer in walk(work.module, shape)}
    made = []
    for layer in forward:
        known = cases.get(layer.name)
        if known is None:
            made.append(dataclasses.replace(layer, fused=layer.fused * 3, eager=layer.eager * 3))
            continue
        images = known.first and (subject.level == "model" or subject.name.endswith(".stem"))
        back = _backward(known.case, subject.torch_dtype, images)
        fused, eager = layer.fused + back.fused, layer.eager + back.eager
        made.append(dataclasses.replace(layer, fused=fused, eager=eager))
    return made


def orders(work: Work) -> list[list[Step]]:
    """The layers of a forward pass as they run: eager, and with every projection first."""
    assert work.module is not None
    shape = tuple(work.sets[0].x.shape)
    inputs = {layer.name: layer.case.input_shape for layer in walk(work.module, shape)}
    eager = [
        Step(layer.name, layer.kind, inputs.get(layer.name), "downsample" in layer.name.split("."))
        for layer in layers_of(work)
    ]
    first: list[Step] = []
    for step in eager:
        block = step.name.rpartition("downsample")[0]
        # The layers of the projection's block stand right before it.
        place = next((i for i, s in enumerate(first) if s.name.startswith(block)), len(first))
        first.insert(place if step.projection else len(first), step)
    return [eager, first]


def _forward(cost: ModelCost) -> list[Layer]:
    """The layers of a forward pass; eager's passes belong to the convolution before them.

    An add, and the ReLU behind it, belong to the convolution that ends the block: the one that
    reads the shortcut when fused.
    """
    found: list[Layer] = []
    last = ending = -1
    for row in cost.layers:
        if row.kind in LAYER_KINDS or not found:
            found.append(Layer(row.name, row.kind, (row.fused,), (row.eager,)))
            last = len(found) - 1
            if row.fused.bytes > row.eager.bytes:
                ending = last
            continue
        if row.kind == "add" and ending >= 0:
            last = ending
        layer = found[last]
        fused = (*layer.fused, row.fused) if row.fused.bytes else layer.fused
        found[last] = dataclasses.replace(layer, fused=fused, eager=(*layer.eager, row.eager))
    return found


def _backward(case: ConvCase, dtype: torch.dtype, images: bool) -> Layer:
    """Both gradients, with what eager does to the output's gradient before them once."""
    weight, below = KINDS["conv_wgrad"], KINDS["conv_dgrad"]
    fused, eager = (weight.cost(case, dtype),), weight.passes(case, dtype)
    if not images:
        fused = (*fused, below.cost(case, dtype))
        eager = (*eager, below.passes(case, dtype)[-1])
    return Layer(case.name, "conv", fused, eager)
