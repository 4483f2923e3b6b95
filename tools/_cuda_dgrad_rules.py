"""What the machine code of the gradients of an input for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/warpgroup_shape.h, dgrad_tma.h, bn_dgrad_tma.h and bn_dgrad_window.h.
PIXELS, ROW_BYTES, CONSUMERS, STEP_PRODUCTS, BOX = 128, 128, 2, 4, 64
WARPGROUP_THREADS = 128
STEPS = 2  # of a round of the main loop: the left sides of two lie in registers
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024
TAPS, WIDTH = 9, 56  # of a window's rows, and what they are made for
MOST_PART, PARTS_OF_Y, FIXED = 128, 2, 75 * 1024


@dataclass(frozen=True)
class DgradTile:
    """A configuration, as its kernel's name spells it."""

    channels: int
    stages: int
    reduces: bool = False  # between two BatchNorms
    filters: int = 1  # blocks that share filters
    pixels: int = 1  # likewise
    ends: bool = False  # behind a block's end

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of dy, y and filters, a staging tile a consumer, barriers.

        Between two BatchNorms a tile of raw, sums of each thread, scale and shift, and barriers of
        a consumer beside. A ring that blocks share has four barriers a stage in place of two.
        """
        rows = self.stages * (2 * PIXELS + self.channels) + CONSUMERS * self.channels
        more = ROW_BYTES * self.channels + 64 * WARPGROUP_THREADS + 8 * self.channels + 32
        ring = 16 * self.stages * (2 if self.filters * self.pixels > 1 else 1)
        return ROW_BYTES * rows + ring + (CONSUMERS * more if self.reduces else 0)


@dataclass(frozen=True)
class DgradWindow:
    """A configuration of the window kernel, likewise."""

    pixels: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 56 pixels: filters, staging tiles, windows, parts of y."""
        rows = self.pixels + 2 * (WIDTH + 2)
        least = -(-rows // MOST_PART)
        whole, count = min((8 * n * -(-rows // (8 * n)), n) for n in range(least, least + 4))
        parts = CONSUMERS * count + PARTS_OF_Y
        return FIXED + ROW_BYTES * (CONSUMERS * self.pixels + parts * (whole // count))


@functools.cache
def dgrad_window_of(mangled: str) -> DgradWindow | None:
    """The window kernel's configuration in its mangled name, or None."""
    shape = re.search(r"\dBnDgradWindowShapeILi(\d+)E", mangled)
    return DgradWindow(int(shape.group(1))) if shape else None


def dgrad_by_window(kernel: Kernel) -> dict[str, bool]:
    """The rules of the window kernel, as sentences, and whether each is kept."""
    tile = dgrad_window_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    columns = tile.pixels // 16
    exact = {
        rf"HGMMA\.64x{tile.pixels}x16\.F32.*": TAPS * STEP_PRODUCTS,
        # Only the last tap's products are waited for apart.
        r"WARPGROUP\.DEPBAR.*": 2,
        # With and without what is added and raw, each: what is stored, and what is read.
        r"STSM\b.*": 4 * columns,
        r"LDSM\b.*": 4 * columns,
    }
    least = {
        r"UTMALDG\.4D": TAPS,  # filters
        r"UTMALDG\.4D\.IM2COL": 4,  # dz, y, what is added, raw
        "SYNCS.*TRYWAIT": 6,
        "USETMAXREG.*": 2,
        "FENCE.VIEW.ASYNC.*": 2,  # of those who turn, and of what is staged
        "VOTE.ANY.*": tile.pixels // 32,
        "ATOMG.*": 2,
    }
    # Rows by 16 bytes of every thread, and a chunk's sums.
    stored, wanted = kernel.wide("STG"), tile.pixels * ROW_BYTES // 16 // WARPGROUP_THREADS + 1
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{stored} STG.128, expected {wanted}": stored == wanted,
        **_counted(kernel, exact, least),
    }


def _counted(kernel: Kernel, exact: dict[str, int], least: dict[str, int]) -> dict[str, bool]:
    """Sentences on how often instructions stand there."""
    return {
        f"{kernel.count(pattern)} {pattern}, expected {wanted}": kernel.count(pattern) == wanted
        for pattern, wanted in exact.items()
    } | {
        f"{kernel.count(pattern)} {pattern}, at least {few}": kernel.count(pattern) >= few
        for pattern, few in least.items()
    }


@functools.cache
def dgrad_of(mangled: str) -> DgradTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"\d(Bn)?DgradTmaShapeI" + 4 * r"Li(\d+)E" + "E", mangled)
    if shape is None:
        return None
    channels, stages, filters, pixels = map(int, shape.groups()[1:])
    ends = "conv_bn_dgrad_end_tma_kernel" in mangled
    return DgradTile(channels, stages, shape.group(1) is not None, filters, pixels, ends)


def dgrad_by_tma(kernel: Kernel) -> dict[str, bool]:
    """The rules, as sentences, and whether each is kept."""
    tile = dgrad_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    boxes = tile.channels // BOX
    alone = 2 if tile.pixels == 1 else 0  # dy and y, for a block itself
    exact = {
        rf"HGMMA\.64x{tile.channels}x16\.F32.*": STEPS * STEP_PRODUCTS,
        # One a step, that lets its own products run on; one behind the last.
        r"WARPGROUP\.DEPBAR.*": STEPS + 1,
    }
    least = {
        # dy and y, each by both ways, and filters.
        "UTMALDG.*": 5,
        r"UTMALDG\.4D\.IM2COL": alone,
        # dx where pixels lie one behind the other, and where a phase's lie apart.
        r"UTMASTG\.3D": boxes,
        r"UTMASTG\.4D\.IM2COL": boxes,
        "SYNCS.*TRYWAIT": 3,
        "USETMAXREG.*": 2,
        # dy, and with y both; scales in pairs; sums in 16 columns.
        r"LDSM\b.*": STEPS * 3 * STEP_PRODUCTS,
        r"LDG\.E\.64.*": STEPS * 2 * STEP_PRODUCTS,
        r"STSM\b.*": 4 * boxes,
    }
    if tile.ends:
        exact |= {
            # The mask of two elements a word, in a tile with steps and in one without.
            r"HSET2\b.*\.GTU\..*": 2 * tile.channels // 4,
        }
        least |= {
            # The shortcut, `out`, raw and the projection's, likewise.
            r"UTMALDG\.3D": 4 * boxes,
            r"UTMALDG\.4D\.IM2COL": alone + 4 * boxes,
            "SYNCS.*TRYWAIT": 8,
            # `out` twice, as above, and the shortcut.
            r"LDSM\b.*": STEPS * 2 * STEP_PRODUCTS + 4 * boxes * 3,
            r"LDG\.E\.64.*": STEPS * 2 * STEP_PRODUCTS * 3,
            r"STSM\b.*": 2 * 4 * boxes,  # with and without the shortcut
            "ATOMG.*": 2,
        }
    elif tile.reduces:
        least |= {
            # The shortcut and raw, likewise.
            r"UTMALDG\.3D": 2 * boxes,
            r"UTMALDG\.4D\.IM2COL": alone + 2 * boxes,
            r"LDSM\b.*": STEPS * 2 * STEP_PRODUCTS + 4 * boxes * 4,
            r"LDG\.E\.64.*": STEPS * 2 * STEP_PRODUCTS * 3,
            r"STSM\b.*": 4 * 4 * boxes,  # with and without each
            "ATOMG.*": 2,
        }
    least |= _sharing(tile)
    # Fences of the whole GPU: of the sums' meeting; where blocks share, when they begin and end,
    # and in a step one for each neighbour that is told, by the thread that asks.
    fences, shares = kernel.count(r"MEMBAR\.ALL\.GPU"), tile.filters * tile.pixels > 1
    most = (6 if tile.reduces else 0) + (1 + tile.pixels if shares else 0)
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{fences} MEMBAR.ALL.GPU, at most {most}": fences <= most,
        **_counted(kernel, exact, least),
    }


def _sharing(tile: DgradTile) -> dict[str, int]:
    """Instructions of a tile whose cluster shares what its blocks read, at least so many."""
    found: dict[str, int] = {}
    if tile.filters > 1:
        found[r"UTMALDG\.4D\.MULTICAST"] = 1
    if tile.pixels > 1:  # dy and y, each by both ways
        found |= {r"UTMALDG\.4D\.IM2COL\.MULTICAST": 2, r"UTMALDG\.2D\.MULTICAST": 2}
    if tile.filters * tile.pixels > 1:  # barriers when it begins and ends
        found |= {"UCGABAR.ARV": 2, "UCGABAR.WAIT": 2}
    return found
