"""Calls of `stem`'s and `head`'s Triton kernels for the gates, and how they are launched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import _triton_early as early
import torch

from resnet_fused.cases import HeadCase, StemCase
from resnet_fused.triton import _stem_tiles

OPS = ("stem", "head")

Spec = tuple[str, Any, str, str, str | None, bool, str]
"""Of a call: op, shape, type, layout, configuration, whether CI compiles it, form."""

USUAL = StemCase("usual", 32, 3, 224, 224, 64)
STEMS = (
    USUAL,
    dataclasses.replace(USUAL, name="bytes", images="uint8"),
    dataclasses.replace(USUAL, name="float_images", images="float32", normed=True),
    dataclasses.replace(USUAL, name="small", h=128, w=128),
)
"""What each configuration is compiled for; then in other layouts, and for an odd size."""

QUANTISED = "to e4m3"
"""The form of a call whose result is."""

ODD = dataclasses.replace(USUAL, name="odd", h=97, w=131)
HUGE = dataclasses.replace(USUAL, name="huge", n=16384)
"""More than 2^31 elements: offsets of 64 bits."""

ONE_IMAGE = HeadCase("one_image", 1, 2048, 7, 7, 1000)
HEADS = (
    HeadCase("classes1000", 32, 2048, 7, 7, 1000),
    HeadCase("classes10", 128, 64, 8, 8, 10),
    ONE_IMAGE,
)


def calls(types: Iterable[str]) -> list[Spec]:
    """Every configuration for each kind of image, and both of a head's ways.

    Args:
        types: of operands.
    """
    found: list[Spec] = []
    for kind in types:
        for tile in _stem_tiles.TILES:
            for case in STEMS:
                sample = kind == "bf16" and case is USUAL and tile is _stem_tiles.TILES[0]
                found.append(("stem", case, kind, "nhwc", tile.name, sample, ""))
        for case in HEADS:
            sample = kind == "bf16" and case is HEADS[0]
            found.append(("head", case, kind, "nhwc", None, sample, ""))
    for layout in ("nchw", "sliced", "unaligned"):
        found += [("stem", case, "bf16", layout, None, False, "") for case in STEMS]
        found += [("head", case, "bf16", layout, None, False, "") for case in HEADS]
    for n in (1, 256):
        found.append(("stem", dataclasses.replace(USUAL, n=n), "bf16", "nhwc", None, False, ""))
    found.append(("stem", ODD, "bf16", "nhwc", None, False, ""))
    found.append(("stem", HUGE, "bf16", "nhwc", None, False, ""))
    # Only GPUs that multiply e4m3 have a network that wants the result in it.
    for tile in _stem_tiles.TILES:
        sample = tile is _stem_tiles.TILES[0]
        found.append(("stem", USUAL, "bf16", "nhwc", tile.name, sample, QUANTISED))
    return found


def launch(call: Any) -> None:
    """Calls an op's launch on tensors without memory.

    Args:
        call: of `_triton_cases.Call`.

    Raises:
        LookupError: the configuration that is asked for does not take the call.
    """
    from resnet_fused.triton import head, stem

    case = call.shape
    if call.op == "head":
        x = call.tensor(*case.shape)
        weight = x.new_empty((case.classes, case.c))
        bias = x.new_empty((case.classes,)) if case.bias else None
        out = x.new_empty((case.n, case.classes))
        return head.launch(x, weight, bias, out, **early.arguments(call))
    quantised = call.form == QUANTISED
    images = {"uint8": torch.uint8, "float32": torch.float32}.get(case.images)
    p, q = (
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip(
            (case.h, case.w), case.padding, (case.r, case.s), case.stride, strict=True
        )
    )
    vector = call.tensor(case.k)
    norm = torch.empty(2, case.c, device="meta") if case.has_norm else None
    x, weight = call.tensor(*case.shape, dtype=images), call.tensor(*case.weight_shape)
    operands = x, weight, vector, vector, norm
    size = case.n, case.k, (p - 1) // 2 + 1, (q - 1) // 2 + 1
    made = stem.prepare(*operands, *case.geometry) if early.packed(call) else {}
    stem.launch(
        *operands, call.tensor(*size, dtype=torch.float8_e4m3fn if quantised else None),
        *case.geometry, out_scale=0.5 if quantised else None,
        allowed=None if call.tile is None else frozenset({call.tile}), **made,
        **early.arguments(call),
    )  # fmt: skip
