"""Calls of `conv_chain`'s Triton kernel for the gates, and how it is launched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import _triton_early as early

from resnet_fused.cases import RESNET50_CHAINS, ChainCase
from resnet_fused.triton import _chain_tiles

OP = "conv_chain"

Spec = tuple[str, Any, str, str, str | None, bool, str]
"""Of a call: op, shape, type, layout, configuration, whether CI compiles it, form."""

SAMPLE = ("128x64x64_4w3s", "128x128x128_8w2s")
"""Configurations of which CI compiles the first shape; the other one projects."""

HUGE = ChainCase("huge", 4096, 64, 56, 56, 256, 64)
"""More than 2^31 elements: offsets of 64 bits."""


def _shapes(config: _chain_tiles.Config) -> list[ChainCase]:
    k, c, m = config.k, 4 * config.chunk, config.m
    shapes = [
        ChainCase(f"chain_{k}_{m}", 32, k, 28, 28, c, m),
        ChainCase(f"chain_{k}_{m}_end", 32, k, 28, 28, c, m, out_stride=2),
        ChainCase(f"chain_{k}_{m}_no_next", 32, k, 28, 28, c),
        ChainCase(f"chain_{k}_{m}_projected", 32, k, 28, 28, c, m, 64),
        ChainCase(f"chain_{k}_{m}_strided", 32, k, 28, 28, c, m, 2 * k, 2),
        ChainCase(f"chain_{k}_{m}_padded", 32, k - 16, 28, 28, c - 16, m - 16),
    ]
    if config.warps <= _chain_tiles.FRONT_WARPS:
        shapes.append(ChainCase(f"chain_{k}_{m}_front", 32, k, 28, 28, c, m, front=k))
        shapes.append(ChainCase(f"chain_{k}_{m}_all", 32, k, 28, 28, c, m, 64, 1, k, 2))
    return shapes


def calls(types: Iterable[str]) -> list[Spec]:
    """Every configuration with each kind of shortcut and front, and ResNet-50's chains.

    Args:
        types: of operands.
    """
    found: list[Spec] = []
    for config in _chain_tiles.CONFIGS:
        for kind in types:
            for place, shape in enumerate(_shapes(config)):
                if kind == "fp16" and place:
                    continue  # bfloat16 but for conversions
                sample = kind == "bf16" and config.name in SAMPLE and place == 0
                found.append((OP, shape, kind, "nhwc", config.name, sample, ""))
    for n in (1, 32, 256):
        for case in RESNET50_CHAINS:
            found.append((OP, dataclasses.replace(case, n=n), "bf16", "nhwc", None, False, ""))
    for layout in ("nchw", "sliced", "unaligned"):
        shape = dataclasses.replace(RESNET50_CHAINS[1], n=32)
        found.append((OP, shape, "bf16", layout, None, False, ""))
    found.append((OP, HUGE, "bf16", "nhwc", None, False, ""))
    return found


def launch(call: Any) -> None:
    """Calls the op's launch on tensors without memory.

    Args:
        call: of `_triton_cases.Call`.

    Raises:
        LookupError: no configuration, or not the one that is asked for, takes the call.
    """
    from resnet_fused.triton import conv_chain

    case: ChainCase = call.shape
    none = (None, None, None)

    def convolution(filters: int, below: int, size: int = 1) -> tuple[Any, ...]:
        weight = call.tensor(filters, below, size, size)
        return weight, call.tensor(filters), call.tensor(filters)

    size = (case.n, case.c, case.h, case.w)
    run: Any = conv_chain.launch
    run(
        call.tensor(*case.input_shape), *convolution(case.c, case.k),
        None if case.projected else call.tensor(*size),
        call.tensor(*case.projected_shape) if case.projected else None,
        *(convolution(case.c, case.projected) if case.projected else none),
        *(convolution(case.m, case.c) if case.m else none),
        *(convolution(case.k, case.front, 3) if case.front else none),
        call.tensor(*case.stored_shape), call.tensor(case.n, case.m, case.h, case.w),
        case.projection_stride, case.out_stride, False,
        allowed=None if call.tile is None else frozenset({call.tile}), **early.arguments(call),
    )  # fmt: skip
