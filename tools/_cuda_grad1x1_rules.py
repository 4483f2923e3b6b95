"""What the machine code of conv_bn_grad1x1's kernels for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/warpgroup_shape.h and grad1x1_tma.h.
ROW_BYTES, BOX, CONSUMERS, DEPTH = 128, 64, 2, 16
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024
MERGING_WARPS = 8  # csrc/kernels/conv_bn_grad1x1_merge_sm80.cuh


@dataclass(frozen=True)
class Grad1x1Tile:
    """A configuration, as its kernel's name spells it."""

    filters: int
    channels: int
    pixels: int
    stages: int
    ended: bool = False

    @property
    def inputs(self) -> int:
        """Tensors of the input's size in a stage: x and the addend; behind an end two more."""
        return 4 if self.ended else 2

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of dz, y and inputs, weights, staging tiles, barriers."""
        stage = 2 * self.filters + self.inputs * self.channels
        boxes = self.stages * stage + CONSUMERS * self.channels
        weights = self.filters * self.channels * 2
        return boxes // BOX * self.pixels * ROW_BYTES + weights + 16 * self.stages + 8


@functools.cache
def grad1x1_tile_of(mangled: str) -> Grad1x1Tile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"Grad1x1TmaShapeI" + 4 * r"Li(\d+)E" + r"Lb([01])EE", mangled)
    if shape is None:
        return None
    *sizes, ended = map(int, shape.groups())
    return Grad1x1Tile(*sizes, ended=bool(ended))


def grad1x1_by_tma(kernel: Kernel) -> dict[str, bool]:
    """The rules, as sentences, and whether each is kept."""
    tile = grad1x1_tile_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    blocks, slices = tile.channels // BOX, tile.pixels // DEPTH
    # Of each 64 channels: dx by the filters, the weights' gradient by the pixels.
    products = Counter({f"{tile.pixels}": blocks * (tile.filters // DEPTH)})
    products[f"{tile.filters}"] += blocks * slices
    exact = {
        **{rf"HGMMA\.64x{n}x16\.F32.*": count for n, count in products.items()},
        # dx is finished while the weights' products run.
        r"WARPGROUP\.DEPBAR.*": 2 * blocks,
    }
    least = {
        "UTMALDG.*": 3 + tile.inputs,  # dz, y, weights, inputs
        "UTMASTG.*": 1,
        "SYNCS.*TRYWAIT": 3,
        "USETMAXREG.*": 2,
        # x for h, for mask and sums; the addend, and what an end's sums are against.
        r"LDSM\b.*\.MT88\.4": (1 + tile.inputs) * blocks * slices,
        r"STSM\b.*\.MT88\.4": blocks * slices,
        r"LDS\b.*\.128\b.*": 2,  # dz and y
        r"STS\b.*\.128\b.*": 1,
        r"LDGSTS\b.*\.128\b.*": 1,
        r"SHFL\.BFLY.*": (12 if tile.ended else 8) * blocks,
    }
    if tile.ended:
        # The mask, of two elements at once: of bfloat16 and float16.
        least[r"HSET2\b.*\.GTU\b.*"] = 4 * blocks * slices
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        **{
            f"{kernel.count(pattern)} {pattern}, expected {wanted}": kernel.count(pattern) == wanted
            for pattern, wanted in exact.items()
        },
        **{
            f"{kernel.count(pattern)} {pattern}, at least {few}": kernel.count(pattern) >= few
            for pattern, few in least.items()
        },
    }


def grad1x1_merging(kernel: Kernel) -> dict[str, bool]:
    """The rules, as sentences, of what adds the parts: its warps share them."""
    totals, most = kernel.count(r"LDS\b.*\.64\b.*"), 64
    return {
        f"{kernel.registers} registers, at most {most}": kernel.registers <= most,
        f"{totals} LDS.64, at least {MERGING_WARPS - 1}": totals >= MERGING_WARPS - 1,
    }
