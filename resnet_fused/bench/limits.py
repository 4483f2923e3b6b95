"""What the roofline asks of a subject at least: FLOPs, bytes, seconds, fused and pass by pass.

A training step counts for each convolution its forward pass, the gradient of its input (but of the
images) and that of its weight; pooling and the classifier count as forward three times. With batch
statistics a step has to pass over some tensors again, so that this is a lower bound there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from resnet_fused.bench.ceilings import Ceilings
from resnet_fused.bench.gauges import Step
from resnet_fused.bench.subject import Subject, walk
from resnet_fused.bench.training_kernels import KINDS
from resnet_fused.bench.work import Work
from resnet_fused.cases import BnActCase, ConvCase
from resnet_fused.roofline import (
    Cost,
    ModelCost,
    bn_act_cost,
    conv_cost,
    conv_dgrad_cost,
    conv_wgrad_cost,
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
    kind = KINDS.get(subject.op)
    if kind is not None and work.case is not None:
        dtype = subject.torch_dtype
        costs = (kind.cost(work.case, dtype),), kind.passes(work.case, dtype)
        return [Layer(work.case.name, "conv", *costs)]
    if isinstance(work.case, BnActCase):
        return [_bn_layer(work.case, subject.torch_dtype)]
    if isinstance(work.case, ConvCase):
        return [_kernel_layer(work.case, subject)]
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


def _passes(case: ConvCase, dtype: torch.dtype, tensors: int) -> tuple[Cost, ...]:
    """A pass that reads and writes so many tensors of the output's size; none for 0."""
    size = math.prod(case.output_shape) * dtype.itemsize
    return (Cost(0, tensors * size),) if tensors else ()


def _backward(case: ConvCase, dtype: torch.dtype, images: bool) -> Layer:
    """Both gradients; eager masks (3 tensors) and scales (2) the output's gradient before."""
    weight = conv_wgrad_cost(case, dtype)
    plain = dataclasses.replace(case, act="none", residual=False)
    relu = _passes(case, dtype, 3 if case.act == "relu" else 0)
    shared = (*relu, *_passes(case, dtype, 2), conv_wgrad_cost(plain, dtype))
    if images:
        return Layer(case.name, "conv", (weight,), shared)
    fused = (weight, conv_dgrad_cost(case, dtype))
    return Layer(case.name, "conv", fused, (*shared, conv_dgrad_cost(plain, dtype)))


def _bn_layer(case: BnActCase, dtype: torch.dtype) -> Layer:
    fused = bn_act_cost(case.shape, dtype, residual=case.residual)
    tensor = math.prod(case.shape) * dtype.itemsize
    passes = [2] + [3] * case.residual + [2] * (case.act == "relu")
    return Layer(case.name, "bn", (fused,), tuple(Cost(0, n * tensor) for n in passes))


def _kernel_layer(case: ConvCase, subject: Subject) -> Layer:
    dtype = subject.torch_dtype
    plain = dataclasses.replace(case, act="none", residual=False)
    if subject.op == "conv_bn_act":
        bare = Cost(0, 2 * case.k * max(dtype.itemsize, 4))
        conv = conv_cost(plain, dtype)
        conv = Cost(conv.flops, conv.bytes - bare.bytes)
        passes = [2] + [3] * case.residual + [2] * (case.act == "relu")
        after = [cost for n in passes for cost in _passes(case, dtype, n)]
        return Layer(case.name, "conv", (conv_cost(case, dtype),), (conv, *after))
    of = conv_dgrad_cost if subject.op == "conv_dgrad" else conv_wgrad_cost
    relu = _passes(case, dtype, 3 if case.act == "relu" else 0)
    eager = (*relu, *_passes(case, dtype, 2), of(plain, dtype))
    return Layer(case.name, "conv", (of(case, dtype),), eager)
