"""What the machine code of the window kernels for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import _cuda_fp8_rules

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
    row_bytes: int
    passes: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 56 pixels: filters, staging tiles, barriers, windows."""
        staging = CONSUMERS * self.pixels * ROW_BYTES
        rows = TAPS * FILTERS + CONSUMERS * _window_rows(self.pixels)
        return self.row_bytes * rows + staging + 1024

    @property
    def parts(self) -> int:
        """Of a tile's sums, which threads add up; one: none are."""
        return -(-TAPS * self.row_bytes // ROW_BYTES) if self.passes > 1 else 1


@dataclass(frozen=True)
class ChainWindowTile:
    """A configuration of conv_chain, likewise."""

    following: int
    steps: int
    stages: int
    streams: int
    projected: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 56 pixels, as csrc/device/chain_window.h lays them out."""
        positions = CONSUMERS * FILTERS
        made = self.steps * FILTERS * (2 if self.projected else 1)  # channels, projected ones too
        rows = TAPS * FILTERS + made
        rows += 2 * positions if self.projected else self.stages * positions
        rows += (self.stages if self.streams else self.steps) * self.following
        rings = self.stages + 1 + bool(self.projected)
        small = 8 * (FILTERS + made + self.following) + 16 * rings + 8
        return ROW_BYTES * (rows + _window_rows(positions)) + -(-small // 1024) * 1024


def _window_rows(positions: int) -> int:
    """In as many equal parts of whole patterns of the swizzle as makes them the fewest rows."""
    rows = positions + 2 * (WIDTH + 2)
    least = -(-rows // MOST_PART)
    return min(count * 8 * -(-rows // (8 * count)) for count in range(least, least + 4))


@functools.cache
def window_of(mangled: str) -> WindowTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"11WindowShapeI" + 3 * r"Li(\d+)E" + "E", mangled)
    return WindowTile(*map(int, shape.groups())) if shape else None


@functools.cache
def chain_window_of(mangled: str) -> ChainWindowTile | None:
    """The configuration of conv_chain in a kernel's mangled name, or None."""
    shape = re.search(
        r"ChainWindowShapeI" + 3 * r"Li(\d+)E" + r"LN\w*?NextFiltersE(\d)ELi(\d+)EE", mangled
    )
    return ChainWindowTile(*map(int, shape.groups())) if shape else None


def by_window(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    tile = window_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    columns = tile.pixels // tile.passes
    wanted = TAPS * STEP_PRODUCTS * tile.row_bytes // ROW_BYTES * tile.passes
    if _cuda_fp8_rules.out_of(kernel.name) is None:
        instruction, row = rf"HGMMA\.64x{columns}x16\.F32.*", ROW_BYTES
        # All products of a tile follow one another: only those of the last tap are waited for
        # apart.
        waited = 2
        # With and without a shortcut.
        staged = {r"STSM\b.*": 2 * columns // 16, r"LDSM\b.*": columns // 16}
    else:
        instruction = _cuda_fp8_rules.product(columns)
        row = FILTERS if _cuda_fp8_rules.in_bytes(kernel.name) else ROW_BYTES
        waited = tile.parts * tile.passes
        staged = _cuda_fp8_rules.epilogue(kernel.name, pixels_left=False, columns=tile.pixels)
        staged["FADD.*"] = tile.parts * tile.pixels // 2
    products = kernel.count(instruction)
    waits = kernel.count(r"WARPGROUP\.DEPBAR.*")
    stored, results = kernel.wide("STG"), tile.pixels * row // 16 // 128
    counts = {
        r"UTMALDG\.4D": 1,  # filters
        r"UTMALDG\.4D\.IM2COL": 2,  # windows, the shortcut
        "SYNCS.*TRYWAIT": 5,
        "USETMAXREG.*": 2,
        **staged,
    }
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        f"{products} products of {columns} columns, expected {wanted}": products == wanted,
        f"{waits} waits for products, expected {waited}": waits == waited,
        f"{stored} STG.128, expected {results}": stored == results,
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }


def chain_by_window(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel of conv_chain, as sentences."""
    tile = chain_window_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    # The 3x3; into `out`, with what is projected, the first step and one in the loop; into `next`
    # one in the loop and one behind. Waits: for the 3x3, for a step in the loop and behind it, for
    # `next`, and in the loop for products that read what came with a step.
    boxes, sources = tile.following // FILTERS, 2 if tile.projected else 1
    wanted = {FILTERS: STEP_PRODUCTS * (TAPS + 2 * sources)}
    wanted[tile.following] = wanted.get(tile.following, 0) + 2 * STEP_PRODUCTS
    products = {n: kernel.count(rf"HGMMA\.64x{n}x16\.F32.*") for n in wanted}
    waits, expected = kernel.count(r"WARPGROUP\.DEPBAR.*"), 4 + tile.streams
    stored, most = kernel.wide("STG"), 4 * (2 + boxes)
    counts = {
        r"UTMALDG\.4D": 1,  # the filters in front
        r"UTMALDG\.2D": 1 + sources,  # those of `out`, of its projection, of `next`
        r"UTMALDG\.4D\.IM2COL": 2,  # windows, the shortcut
        "SYNCS.*TRYWAIT": 6,
        "USETMAXREG.*": 2,
    }
    # Two steps of `out`, of which a projected shortcut is not loaded, and `next`.
    staged = {r"STSM\b.*": 4 * (2 + boxes), r"LDSM\b.*": 0 if tile.projected else 2 * 4}
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        **{
            f"{products[n]} HGMMA of {n} columns, expected {wanted[n]}": products[n] == wanted[n]
            for n in wanted
        },
        f"{waits} waits for products, expected {expected}": waits == expected,
        f"{stored} STG.128, expected {most}": stored == most,
        **{
            f"{kernel.count(pattern)} {pattern}, expected {count}": kernel.count(pattern) == count
            for pattern, count in staged.items()
        },
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }
