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
MOST_TURNED, PARTS_OF_Y, FIXED = 128, 2, 3 * 1024  # bn_dgrad_window.h


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
    if turned := dgrad_stream_of(mangled):
        return f"windows for {turned.pixels} pixels in slices, {turned.stages} stages"
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


@dataclass(frozen=True)
class DgradStream:
    """A configuration of conv_bn_dgrad, likewise."""

    pixels: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 28 pixels: filters, staging tiles, windows, parts of y."""
        rows = self.pixels + 2 * (WIDTH + 2)
        least = -(-rows // MOST_TURNED)
        counts = range(least, least + 4)
        whole, part = min((count * 8 * -(-rows // (8 * count)), count) for count in counts)
        rows = CONSUMERS * (self.pixels + whole) + PARTS_OF_Y * whole // part
        return ROW_BYTES * (self.stages * FILTERS + rows) + FIXED


@functools.cache
def dgrad_stream_of(mangled: str) -> DgradStream | None:
    """The configuration of conv_bn_dgrad in a kernel's mangled name, or None."""
    shape = re.search(r"18BnDgradStreamShapeI" + 2 * r"Li(\d+)E" + "E", mangled)
    return DgradStream(*map(int, shape.groups())) if shape else None


def dgrad_by_stream(kernel: Kernel) -> dict[str, bool]:
    """The gates of conv_bn_dgrad, as sentences."""
    tile = dgrad_stream_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    exact = {
        rf"HGMMA\.64x{tile.pixels}x16\.F32.*": STEP_PRODUCTS,  # one tap's, in the loop
        r"WARPGROUP\.DEPBAR.*": 2,
        # With and without what is added and raw, each: what is stored, and what is read.
        r"STSM\b.*": 4 * tile.pixels // 16,
        r"LDSM\b.*": 4 * tile.pixels // 16,
    }
    least = {
        r"UTMALDG\.4D": 2,  # filters, the first taps' and others
        r"UTMALDG\.4D\.IM2COL": 4,  # dz, y, what is added, raw
        "SYNCS.*TRYWAIT": 8,
        "USETMAXREG.*": 2,
        "FENCE.VIEW.ASYNC.*": 2,  # of those who turn, and of what is staged
        "VOTE.ANY.*": tile.pixels // 32,
        "ATOMG.*": 2,
    }
    stored, wanted = kernel.wide("STG"), tile.pixels * ROW_BYTES // 16 // 128 + 1
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{stored} STG.128, expected {wanted}": stored == wanted,
        **{
            f"{kernel.count(pattern)} {pattern}, expected {count}": kernel.count(pattern) == count
            for pattern, count in exact.items()
        },
        **{
            f"{kernel.count(pattern)} {pattern}, at least {few}": kernel.count(pattern) >= few
            for pattern, few in least.items()
        },
    }


RULES = {
    "conv_bn_stats_stream_kernel": measuring_by_stream,
    "conv_bn_dgrad_stream_kernel": dgrad_by_stream,
}
