"""What the machine code of windows in slices beside a ring of filters is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _cuda_stats_rules import MEASURED_BY_TMA, TRANSFORMED, TRANSFORMED_BY_TMA

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/stream_window.h and warpgroup_shape.h.
STEP_PRODUCTS, CONSUMERS, ROW_BYTES, FILTERS = 4, 2, 128, 64
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024
MOST_PART = 256  # rows that a request brings
WIDTH = 28  # of the rows that it is made for


@dataclass(frozen=True)
class StreamTile:
    """A configuration, as its kernel's name spells it."""

    pixels: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 28 pixels: filters, staging tiles, barriers, windows."""
        rows = self.pixels + 2 * (WIDTH + 2)
        part = -(-rows // MOST_PART)
        rows = part * 8 * -(-rows // (8 * part))
        return ROW_BYTES * (self.stages * FILTERS + CONSUMERS * (self.pixels + rows)) + 1024


@functools.cache
def stream_of(mangled: str) -> StreamTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"17StreamWindowShapeI" + 2 * r"Li(\d+)E" + "E", mangled)
    return StreamTile(*map(int, shape.groups())) if shape else None


def stream_name(mangled: str) -> str | None:
    """What a readable name says of it, or None."""
    if (tile := stream_of(mangled)) is None:
        return None
    transformed = " transformed" if TRANSFORMED in mangled else ""
    return f"windows for {tile.pixels} pixels in slices, {tile.stages} stages{transformed}"


def measuring_by_stream(kernel: Kernel) -> dict[str, bool]:
    """The gates of conv_bn_stats, as sentences."""
    tile = stream_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    # One tap's products in the loop; waits for those of the tap before, and for a tile's last ones.
    products = kernel.count(rf"HGMMA\.64x{tile.pixels}x16\.F32.*")
    waits, stored = kernel.count(r"WARPGROUP\.DEPBAR.*"), kernel.wide("STG")
    # Behind results the moments of a chunk.
    results = tile.pixels * ROW_BYTES // 16 // 128 + 1
    counts = {
        r"UTMALDG\.4D": 2,  # filters, before the wait for the kernel ahead and behind it
        r"UTMALDG\.4D\.IM2COL": 1,  # windows
        "SYNCS.*TRYWAIT": 6,
        "USETMAXREG.*": 2,
        r"STSM\b.*": tile.pixels // 16,
        **MEASURED_BY_TMA,
    }
    if TRANSFORMED in kernel.name:  # nothing is stored by TMA, which would take a fence more
        counts |= TRANSFORMED_BY_TMA | {"FENCE.VIEW.ASYNC.*": 2}
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{products} products of {tile.pixels} columns, expected {STEP_PRODUCTS}": (
            products == STEP_PRODUCTS
        ),
        f"{waits} waits for products, expected 2": waits == 2,
        f"{stored} STG.128, expected {results}": stored == results,
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }


RULES = {"conv_bn_stats_stream_kernel": measuring_by_stream}
