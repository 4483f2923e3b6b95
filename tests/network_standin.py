"""The emulator in the place of a GPU: a network's convolutions in one launch, on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import emulated
from torch import Tensor

from resnet_fused.ops._cuda_network import Layer, Plan


def problem(one: Layer) -> Any:
    """A layer as the emulator's module takes it."""
    images = {"x": one.x, "weight": one.weight, "residual": one.residual, "out": one.out}
    return emulated.load().ConvBnAct(
        dtype=emulated.TYPE_NAMES[one.out.dtype], allow_tf32=False, x_size=one.x.shape,
        weight_size=one.weight.shape, stride=list(one.stride), padding=list(one.padding),
        dilation=list(one.dilation), groups=one.groups, relu=one.act == "relu", reverse=False,
        dependent=False, follows=False, arrivals=0, arrivals_count=0, scale=one.scale.data_ptr(),
        shift=one.shift.data_ptr(),
        **{name: 0 if t is None else t.data_ptr() for name, t in images.items()},
        **{f"{name}_stride": (0,) * 4 if t is None else t.stride() for name, t in images.items()},
    )  # fmt: skip


def launch(layers: Sequence[Layer], made: Plan, memory: Tensor) -> None:
    """In the place of `_cuda_network.launch`."""
    inputs: dict[str, Tensor | None] = {}
    for i, one in enumerate(layers):
        inputs |= {f"{i} {name}": getattr(one, name) for name in ("weight", "scale", "shift")}
    outputs = {f"out {i}": one.out for i, one in enumerate(layers)} | {"workspace": memory}
    written = [one.out.data_ptr() for one in layers]
    for i, one in enumerate(layers):
        for name in ("x", "residual"):
            t = getattr(one, name)
            if t is not None and t.data_ptr() not in written:
                inputs[f"{i} {name}"] = t
    settings = emulated.settings(("network", len(layers), *made.splits), inputs, outputs)
    emulated.load().network(
        settings, [problem(one) for one in layers], emulated.H200, list(made.splits), made.blocks,
        memory.data_ptr(), pixels=list(made.pixels), cluster=made.cluster,
    )  # fmt: skip
