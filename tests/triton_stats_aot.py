"""Run as a child: compiles `conv_bn_stats` for GPUs that are not there, and gates its code.

Prints one JSON object: for each variant its architecture, kernel, call, registers, bytes of stack
and what the gates of `tools/_triton_rules.py` say. Arguments: architectures by number; `all` for
every configuration or `quick` for two, else a sample.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import _triton_aot as aot
import _triton_cases as calls
import _triton_rules as rules
import torch

from resnet_fused.cases import RESNET50_LAYERS, ConvCase
from resnet_fused.triton import _tiles

LARGE = (
    calls._shape("1x1_large", 256, 64, 56, 256, 1),
    calls._shape("3x3_large", 256, 64, 56, 64, 3),
    ConvCase("stem_large", 256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)),
)
SAMPLE = (
    ("1x1_long", "bf16", "128x128_8w3s"),
    ("3x3_long", "bf16", "128x64_4w4s"),
    ("3x3_short", "bf16", "64x64_4w4s"),
    ("3x3_grouped", "bf16", "64x64_4w4s"),
    ("3x3_odd", "bf16", "32x64_4w4s"),
    ("3x3_split", "bf16", "32x64_4w4s"),
    ("3x3_short", "tf32x3", "64x64_4w4s"),
    ("3x3_large", "bf16", None),
    ("stem_large", "bf16", None),
)
"""One of each kind of loop and of operand: shape, type, configuration."""
QUICK = (("3x3_short", "bf16", "64x64_4w4s"), ("3x3_split", "bf16", "32x64_4w4s"))
"""One loop, and one that is cut into parts."""


def launch(call: calls.Call, prologue: bool) -> None:
    """Launches on tensors without memory.

    Raises:
        LookupError: the chooser does not offer the configuration for this call.
    """
    from resnet_fused.triton import conv_bn_stats

    shape = call.shape
    norm = torch.empty(4, shape.c, device="meta") if prologue else None
    stats = torch.empty(2, shape.k, device="meta")
    x, weight = call.tensor(*shape.input_shape), call.tensor(*shape.weight_shape)
    y = call.tensor(*shape.output_shape)
    allowed = None if call.tile is None else frozenset({call.tile})
    geometry = shape.stride, shape.padding, shape.dilation, shape.groups
    conv_bn_stats.launch(x, norm, weight, y, stats, *geometry, allowed=allowed)


def chosen(everything: bool, quick: bool) -> list[calls.Call]:
    shapes = {shape.name: shape for shape in (*calls.SHAPES, *LARGE)}
    if not everything:
        sample = QUICK if quick else SAMPLE
        return [calls.Call("conv_bn_stats", shapes[s], t, tile=tile) for s, t, tile in sample]
    found = [
        calls.Call("conv_bn_stats", shape, kind, tile=tile.name)
        for kind in calls.CLASSES
        for tile in _tiles.TILES
        for shape in calls.SHAPES
    ]
    for layer in (*RESNET50_LAYERS, *calls.RESNEXT):
        found += [
            calls.Call("conv_bn_stats", dataclasses.replace(layer, n=n)) for n in (1, 32, 256)
        ]
    found += [calls.Call("conv_bn_stats", calls.HUGE)]
    return found


def compiled(call: calls.Call, prologue: bool, capability: int, seen: set[str]) -> list[dict]:
    """What each new variant of a call needs, and which gates it fails."""
    found = []
    limits = aot.ARCHITECTURES[capability].limits
    with aot.recording(limits, tf32=call.type == "tf32") as launches:
        try:
            launch(call, prologue)
        except LookupError:
            return []
    for one in launches:
        variant = one.variant
        key = calls._same_code(variant)
        if key in seen:
            continue
        seen.add(key)
        given = variant.constant("PROLOGUE")
        entry = {
            "arch": capability,
            "kernel": variant.kernel,
            "call": call.name + (" prologue" if given else ""),
        }
        try:
            code = aot.compile_variant(variant)
        except RuntimeError as error:
            found.append({**entry, "failures": [f"does not compile: {error}"]})
            continue
        found.append(
            {
                **entry,
                "tile": f"{variant.constant('BLOCK_M')}x{variant.constant('BLOCK_N')}",
                "registers": code.registers,
                "stack": code.stack,
                "local": code.count("LDL|STL"),
                "local_in_loop": code.count("LDL|STL", loop=True),
                "shared": code.shared,
                "failures": rules.failures(variant, code),
            }
        )
    return found


def main(arguments: list[str]) -> None:
    everything = "all" in arguments
    numbers = [int(a) for a in arguments if a.isdigit()] or [80, 90]
    seen: set[str] = set()
    found = [
        entry
        for number in numbers
        for call in chosen(everything, "quick" in arguments)
        for prologue in (False, True)
        for entry in compiled(call, prologue, number, seen)
    ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
