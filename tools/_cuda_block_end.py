"""What the machine code of a block's end by TMA and wgmma is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _cuda_stats_rules import MEASURED_BY_TMA

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/block_end_shape.h and warpgroup_shape.h.
HALF, ROW_BYTES, CONSUMERS, STEP_PRODUCTS = 64, 128, 2, 4
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024


@dataclass(frozen=True)
class BlockEndTile:
    """A configuration, as its kernel's name spells it."""

    pixels: int
    channels: int
    stages: int

    @property
    def halves(self) -> int:
        """Of 64 channels, that a warpgroup has."""
        return self.channels // (CONSUMERS * HALF)

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of filters and of both tensors, staging tiles, barriers."""
        rows = self.stages * (self.channels + 2 * self.pixels) + CONSUMERS * self.pixels
        return ROW_BYTES * rows + 8 * (5 * self.stages + CONSUMERS)


@functools.cache
def block_end_of(mangled: str) -> BlockEndTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"13BlockEndShapeI" + 3 * r"Li(\d+)E" + "E", mangled)
    return BlockEndTile(*map(int, shape.groups())) if shape else None


def is_projected(mangled: str) -> bool:
    """Whether the kernel reads the shortcut through a BatchNorm of its own."""
    return "EEEEELb1E" in mangled


def block_end_name(mangled: str) -> str | None:
    """What a readable name says of it, or None."""
    if (tile := block_end_of(mangled)) is None:
        return None
    projected = " projected" if is_projected(mangled) else ""
    return f"channels left {tile.pixels}x{tile.channels} {tile.stages} stages{projected}"


def by_block_end(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    tile = block_end_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    products = kernel.count(rf"HGMMA\.64x{tile.pixels}x16\.F32.*")
    waits = kernel.count(r"WARPGROUP\.DEPBAR.*")
    least = {
        r"UTMALDG\.4D": 2,  # filters: early ones, and those of the loop
        r"UTMALDG\.2D": 2,  # the raw output and the shortcut
        r"UTMASTG\.2D": 1,  # the block's end
        r"UTMASTG\.3D": tile.halves,
        r"STSM\b.*": tile.halves * tile.pixels // 16,
        "SYNCS.*TRYWAIT": 6,
        "USETMAXREG.*": 2,
        # Two units of 16 bytes of each tensor side by side, which the ReLU takes in pairs.
        r"LDS\.128": 2 * 2,
        r"STS\.128": 2,
        r"HMNMX2\.(BF16_V2\.)?NAN.*": 2 * 4,
        # Scale and shift of eight channels, of one BatchNorm or of two.
        r"LDG\b.*\.128\.CONSTANT": 2 * 2 * (2 if is_projected(kernel.name) else 1),
        "FENCE.VIEW.ASYNC.*": tile.halves + 1,  # a half's results, and what is made
        **{name: tile.halves * count for name, count in MEASURED_BY_TMA.items()},
    }
    expected = tile.halves * STEP_PRODUCTS
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{products} products of {tile.pixels} columns, expected {expected}": products == expected,
        # Behind the next step's products, and behind a tile's last ones.
        f"{waits} waits for products, expected 2": waits == 2,
        **{
            f"{kernel.count(pattern)} {pattern}, at least {count}": kernel.count(pattern) >= count
            for pattern, count in least.items()
        },
    }
