"""Calls of `conv_bn_act_fp8`'s Triton kernel for the gates, and how they are launched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import _triton_early as early
import torch

from resnet_fused.triton import _tiles

OP = "conv_bn_act_fp8"
WIDE = "wide"
"""Form of a call whose result, and residual, are bfloat16: a network's last layer."""

Spec = tuple[str, Any, str, str, str | None, bool, str]
"""Of a call: op, shape, type, layout, configuration, whether CI compiles it, form."""


def calls(shapes: Sequence[Any], layers: Iterable[Any]) -> list[Spec]:
    """Every configuration for each kind of loop; ResNet-50's layers but the first; early ones.

    Args:
        shapes: of convolutions.
        layers: of ResNet-50.
    """
    found: list[Spec] = []
    for tile in _tiles.TILES:
        for shape in shapes:
            sample = shape.name == "1x1_residual"
            found.append((OP, shape, "e4m3", "nhwc", tile.name, sample, ""))
    found += [(OP, shape, "e4m3", "nhwc", None, False, WIDE) for shape in shapes]
    found += [(OP, shape, "e4m3", "nhwc", None, False, early.FORM) for shape in shapes]
    inner = [layer for layer in layers if "stem" not in layer.name and layer.c > 3]
    for n in (1, 32, 256):
        same = (dataclasses.replace(layer, n=n) for layer in inner)
        found += [(OP, layer, "e4m3", "nhwc", None, False, "") for layer in same]
    return found


def launch(call: Any) -> None:
    """Calls the op's launch on tensors without memory.

    Args:
        call: of `_triton_cases.Call`.

    Raises:
        LookupError: the configuration that is asked for does not take the call, or the GPU
            multiplies no e4m3.
    """
    from resnet_fused.triton import conv_bn_act_fp8

    shape = call.shape
    dtype = torch.bfloat16 if call.form == WIDE else torch.float8_e4m3fn
    vector = call.tensor(shape.k)
    residual = call.tensor(*shape.output_shape, dtype=dtype) if shape.residual else None
    conv_bn_act_fp8.launch(
        call.tensor(*shape.input_shape), call.tensor(*shape.weight_shape), vector, vector, residual,
        call.tensor(*shape.output_shape, dtype=dtype), shape.stride, shape.padding, shape.dilation,
        shape.groups, shape.act, 0.25, 0.5, dtype,
        allowed=None if call.tile is None else frozenset({call.tile}), **early.arguments(call),
    )  # fmt: skip
