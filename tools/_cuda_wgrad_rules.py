"""What the machine code of conv_wgrad's kernel for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/warpgroup_shape.h and wgrad_tma.h.
STEP_ROWS, ROW_BYTES, CONSUMERS, STEP_PRODUCTS = 64, 128, 2, 4
STEPS = 2  # of a round of the main loop: the left sides of two lie in registers
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024


@dataclass(frozen=True)
class WgradTile:
    """A configuration, as its kernel's name spells it."""

    m: int
    n: int
    stages: int

    @property
    def columns(self) -> int:
        """Of one warpgroup: both lie along M, or along N."""
        return self.n * self.m // STEP_ROWS // CONSUMERS

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of dy, y and x, barriers."""
        return self.stages * ((2 * self.m + self.n) * ROW_BYTES + 16)


@functools.cache
def wgrad_of(mangled: str) -> WgradTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"WgradTmaShapeILi(\d+)ELi(\d+)ELi(\d+)E", mangled)
    return WgradTile(*map(int, shape.groups())) if shape else None


def wgrad_by_tma(kernel: Kernel) -> dict[str, bool]:
    """The rules, as sentences, and whether each is kept."""
    tile = wgrad_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    exact = {
        rf"HGMMA\.64x{tile.columns}x16\.F32.*": STEPS * STEP_PRODUCTS,
        # One a step, that lets its own products run on; one behind the last.
        r"WARPGROUP\.DEPBAR.*": STEPS + 1,
        # dy, and with it y, are turned over as they are loaded.
        r"LDSM\.16\.MT88\.4": STEPS * 2 * STEP_PRODUCTS,
        # A thread's sums, four at a time.
        r"STG\.E\.128": tile.columns // 8,
    }
    least = {
        # dy, y and x, each by both ways.
        "UTMALDG.*": 6,
        r"UTMALDG\.4D\.IM2COL": 3,
        "SYNCS.*TRYWAIT": 3,
        "USETMAXREG.*": 2,
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
