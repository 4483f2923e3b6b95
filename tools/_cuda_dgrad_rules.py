"""What the machine code of the gradients of an input for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/warpgroup_shape.h, dgrad_tma.h and bn_dgrad_tma.h.
PIXELS, ROW_BYTES, CONSUMERS, STEP_PRODUCTS, BOX = 128, 128, 2, 4, 64
WARPGROUP_THREADS = 128
STEPS = 2  # of a round of the main loop: the left sides of two lie in registers
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024


@dataclass(frozen=True)
class DgradTile:
    """A configuration, as its kernel's name spells it."""

    channels: int
    stages: int
    reduces: bool = False  # between two BatchNorms

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of dy, y and filters, a staging tile a consumer, barriers.

        Between two BatchNorms a tile of raw, sums of each thread, scale and shift, and barriers of
        a consumer beside.
        """
        rows = self.stages * (2 * PIXELS + self.channels) + CONSUMERS * self.channels
        more = ROW_BYTES * self.channels + 64 * WARPGROUP_THREADS + 8 * self.channels + 32
        return ROW_BYTES * rows + 16 * self.stages + (CONSUMERS * more if self.reduces else 0)


@functools.cache
def dgrad_of(mangled: str) -> DgradTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"\d(Bn)?DgradTmaShapeILi(\d+)ELi(\d+)E", mangled)
    if shape is None:
        return None
    return DgradTile(int(shape.group(2)), int(shape.group(3)), shape.group(1) is not None)


def dgrad_by_tma(kernel: Kernel) -> dict[str, bool]:
    """The rules, as sentences, and whether each is kept."""
    tile = dgrad_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    boxes = tile.channels // BOX
    exact = {
        rf"HGMMA\.64x{tile.channels}x16\.F32.*": STEPS * STEP_PRODUCTS,
        # One a step, that lets its own products run on; one behind the last.
        r"WARPGROUP\.DEPBAR.*": STEPS + 1,
    }
    least = {
        # dy and y, each by both ways, and filters.
        "UTMALDG.*": 5,
        r"UTMALDG\.4D\.IM2COL": 2,
        "UTMASTG.*": boxes,
        "SYNCS.*TRYWAIT": 3,
        "USETMAXREG.*": 2,
        # dy, and with y both; scales in pairs; sums in 16 columns.
        r"LDSM\b.*": STEPS * 3 * STEP_PRODUCTS,
        r"LDG\.E\.64.*": STEPS * 2 * STEP_PRODUCTS,
        r"STSM\b.*": 4 * boxes,
    }
    if tile.reduces:
        least |= {
            "UTMALDG.*": 5 + 2 * boxes,  # the shortcut and raw
            r"LDSM\b.*": STEPS * 2 * STEP_PRODUCTS + 4 * boxes * 4,
            r"LDG\.E\.64.*": STEPS * 2 * STEP_PRODUCTS * 3,
            r"STSM\b.*": 4 * 4 * boxes,  # with and without each
            "ATOMG.*": 2,
        }
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
