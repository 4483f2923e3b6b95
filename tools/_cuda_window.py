"""What the machine code of conv_bn_act's window kernel for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/conv_window.h and warpgroup_shape.h.
TAPS, STEP_PRODUCTS, CONSUMERS, ROW_BYTES, FILTERS = 9, 4, 2, 128, 64
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024
MOST_PART = 256  # rows that a request brings
WIDTH = 56  # of the rows that it is made for


@dataclass(frozen=True)
class WindowTile:
    """A configuration, as its kernel's name spells it."""

    pixels: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 56 pixels: filters, staging tiles, barriers, windows."""
        fixed = ROW_BYTES * (TAPS * FILTERS + CONSUMERS * self.pixels) + 1024
        rows = self.pixels + 2 * (WIDTH + 2)
        least = -(-rows // MOST_PART)
        # In as many equal parts of whole patterns of the swizzle as makes them the fewest rows.
        window = min(count * 8 * -(-rows // (8 * count)) for count in range(least, least + 4))
        return fixed + CONSUMERS * ROW_BYTES * window


@functools.cache
def window_of(mangled: str) -> WindowTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"11WindowShapeILi(\d+)EE", mangled)
    return WindowTile(int(shape.group(1))) if shape else None


def by_window(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    tile = window_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    columns, wanted = tile.pixels, TAPS * STEP_PRODUCTS
    products = kernel.count(rf"HGMMA\.64x{columns}x16\.F32.*")
    # All products of a tile follow one another: only those of the last tap are waited for apart.
    waits = kernel.count(r"WARPGROUP\.DEPBAR.*")
    stored = kernel.wide("STG")
    counts = {
        r"UTMALDG\.4D": 1,  # filters
        r"UTMALDG\.4D\.IM2COL": 2,  # windows, the shortcut
        "SYNCS.*TRYWAIT": 5,
        "USETMAXREG.*": 2,
        r"STSM\b.*": 2 * columns // 16,  # with and without a shortcut
        r"LDSM\b.*": columns // 16,
    }
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{products} HGMMA of {columns} columns, expected {wanted}": products == wanted,
        f"{waits} waits for products, expected 2": waits == 2,
        f"{stored} STG.128, expected {columns // 16}": stored == columns // 16,
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }
