"""What the machine code of the kernel for sm_90a whose filters stay is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _cuda_stats_rules import MEASURED_BY_TMA, TRANSFORMED, TRANSFORMED_BY_TMA

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/stationary_shape.h and warpgroup_shape.h.
PIXELS, HALVES, HALF, ROW_BYTES, CONSUMERS, STEP_PRODUCTS = 128, 2, 64, 128, 2, 4
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024


@dataclass(frozen=True)
class StationaryTile:
    """A configuration, as its kernel's name spells it."""

    stages: int
    steps: int

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of pixels, filters, a staging tile a consumer, barriers."""
        rows = self.stages * PIXELS + self.steps * HALVES * HALF + CONSUMERS * PIXELS
        return ROW_BYTES * rows + 8 * (3 * self.stages + 1 + CONSUMERS)


@functools.cache
def stationary_of(mangled: str) -> StationaryTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"15StationaryShapeI" + 2 * r"Li(\d+)E" + "E", mangled)
    return StationaryTile(*map(int, shape.groups())) if shape else None


def stationary_name(mangled: str) -> str | None:
    """What a readable name says of it, or None."""
    if (tile := stationary_of(mangled)) is None:
        return None
    transformed = " transformed" if TRANSFORMED in mangled else ""
    return f"filters of {tile.steps} steps stay, {tile.stages} stages{transformed}"


def by_stationary(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    tile = stationary_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    products = kernel.count(rf"HGMMA\.64x{PIXELS}x16\.F32.*")
    waits = kernel.count(r"WARPGROUP\.DEPBAR.*")
    counts = {
        r"UTMALDG\.4D": 1,  # filters, once; pixels by both ways
        r"UTMALDG\.2D": 1,
        r"UTMALDG\.4D\.IM2COL.*": 1,
        "UTMASTG.*": HALVES,
        r"STSM\b.*": HALVES * PIXELS // 16,
        "SYNCS.*TRYWAIT": 5,
        "USETMAXREG.*": 2,
        **{name: HALVES * count for name, count in MEASURED_BY_TMA.items()},
    }
    if TRANSFORMED in kernel.name:  # a fence a half and a transform
        counts |= TRANSFORMED_BY_TMA | {"FENCE.VIEW.ASYNC.*": HALVES + 1}
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{products} products of {PIXELS} columns, expected {HALVES * STEP_PRODUCTS}": (
            products == HALVES * STEP_PRODUCTS
        ),
        # Behind the next step's products, and behind a tile's last ones.
        f"{waits} waits for products, expected 2": waits == 2,
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }
