"""What the machine code of the window kernels for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import _cuda_fp8_rules
from _cuda_stats_rules import MEASURED_BY_TMA, TRANSFORMED, TRANSFORMED_BY_TMA

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
        rows = TAPS * FILTERS + CONSUMERS * window_rows(self.pixels)
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
        return ROW_BYTES * (rows + window_rows(positions)) + -(-small // 1024) * 1024


@dataclass(frozen=True)
class ChainStreamTile:
    """A configuration of conv_chain all of whose filters are streamed, likewise."""

    following: int
    steps: int
    stages: int
    boxes: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 28 pixels, as csrc/device/chain_stream.h lays them out."""
        positions = CONSUMERS * FILTERS
        rows = self.stages * self.following + self.boxes * positions
        rows += self.following // FILTERS * window_rows(positions, WIDTH // 2)
        small = 8 * (2 * self.following + self.steps * FILTERS)
        small += 16 * (self.stages + self.boxes + 1)
        return ROW_BYTES * rows + -(-small // 1024) * 1024


def window_rows(positions: int, width: int = WIDTH) -> int:
    """In as many equal parts of whole patterns of the swizzle as makes them the fewest rows."""
    rows = positions + 2 * (width + 2)
    least = -(-rows // MOST_PART)
    return min(count * 8 * -(-rows // (8 * count)) for count in range(least, least + 4))


@functools.cache
def window_of(mangled: str) -> WindowTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"11WindowShapeI" + 3 * r"Li(\d+)E" + "E", mangled)
    return WindowTile(*map(int, shape.groups())) if shape else None


def window_name(mangled: str) -> str | None:
    """What a readable name says of it, or None."""
    if (tile := window_of(mangled)) is None:
        return None
    return f"windows for {tile.pixels} pixels{' transformed' if TRANSFORMED in mangled else ''}"


@functools.cache
def chain_window_of(mangled: str) -> ChainWindowTile | None:
    """The configuration of conv_chain in a kernel's mangled name, or None."""
    shape = re.search(
        r"ChainWindowShapeI" + 3 * r"Li(\d+)E" + r"LN\w*?NextFiltersE(\d)ELi(\d+)EE", mangled
    )
    return ChainWindowTile(*map(int, shape.groups())) if shape else None


@functools.cache
def chain_stream_of(mangled: str) -> ChainStreamTile | None:
    """The configuration of conv_chain with streamed filters in a kernel's mangled name, or None."""
    shape = re.search(r"ChainStreamShapeI" + 4 * r"Li(\d+)E" + "E", mangled)
    return ChainStreamTile(*map(int, shape.groups())) if shape else None


def chain_name(mangled: str) -> str | None:
    """What a readable name says of either, or None."""
    if tile := chain_window_of(mangled):
        projected = f" projecting {tile.projected}" if tile.projected else ""
        return f"windows, 64 to {tile.following} {tile.stages} stages behind 64{projected}"
    if shared := chain_stream_of(mangled):
        n = shared.following
        return f"windows, {n} to {n} {shared.stages} stages behind {n} shared filters"
    return None


def by_window(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    tile = window_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    columns = tile.pixels // tile.passes
    wanted = TAPS * STEP_PRODUCTS * tile.row_bytes // ROW_BYTES * tile.passes
    measures = "conv_bn_stats_" in kernel.name
    if _cuda_fp8_rules.out_of(kernel.name) is None:
        instruction, row = rf"HGMMA\.64x{columns}x16\.F32.*", ROW_BYTES
        # All products of a tile follow one another: only those of the last tap are waited for
        # apart.
        waited = 2
        # With and without a shortcut; of what is measured there is none.
        staged = {r"STSM\b.*": 2 * columns // 16, r"LDSM\b.*": columns // 16}
        if measures:
            staged = {r"STSM\b.*": columns // 16, **MEASURED_BY_TMA}
    else:
        instruction = _cuda_fp8_rules.product(columns)
        row = FILTERS if _cuda_fp8_rules.in_bytes(kernel.name) else ROW_BYTES
        waited = tile.parts * tile.passes
        staged = _cuda_fp8_rules.epilogue(kernel.name, pixels_left=False, columns=tile.pixels)
        staged["FADD.*"] = tile.parts * tile.pixels // 2
    products = kernel.count(instruction)
    waits = kernel.count(r"WARPGROUP\.DEPBAR.*")
    # Behind results the moments of a chunk.
    stored, results = kernel.wide("STG"), tile.pixels * row // 16 // 128 + measures
    counts = {
        r"UTMALDG\.4D": 1,  # filters
        r"UTMALDG\.4D\.IM2COL": 1 if measures else 2,  # windows, the shortcut
        "SYNCS.*TRYWAIT": 5,
        "USETMAXREG.*": 2,
        **staged,
    }
    if TRANSFORMED in kernel.name:  # nothing is stored by TMA, which would take a fence more
        counts |= TRANSFORMED_BY_TMA | {"FENCE.VIEW.ASYNC.*": 2}
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
    expected, most = 4 + tile.streams, 4 * (2 + boxes)
    counts = {
        r"UTMALDG\.4D": 1,  # the filters in front
        r"UTMALDG\.2D": 1 + sources,  # those of `out`, of its projection, of `next`
        r"UTMALDG\.4D\.IM2COL": 2,  # windows, the shortcut
        "SYNCS.*TRYWAIT": 6,
        "USETMAXREG.*": 2,
    }
    # Two steps of `out`, of which a projected shortcut is not loaded, and `next`.
    staged = {r"STSM\b.*": 4 * (2 + boxes), r"LDSM\b.*": 0 if tile.projected else 2 * 4}
    return _chain_gates(kernel, tile.shared, wanted, expected, most, staged, counts)


def chain_by_stream(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel of conv_chain all of whose filters are streamed, as sentences."""
    tile = chain_stream_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    # Of the 3x3 one unit in the loop, and apart from it the first one of 64 channels; into `next`
    # one in the loop and one behind; into `out` the first step and one in the loop, of as many
    # halves of the reduction as there are boxes. Waits: for the unit before of the 3x3 and for its
    # last one, and as behind windows.
    boxes = tile.following // FILTERS
    wanted = {FILTERS: STEP_PRODUCTS * 2 * boxes, tile.following: STEP_PRODUCTS * 4}
    counts = {
        r"UTMALDG\.4D\.MULTICAST": 2,  # filters in front, before the wait and behind it
        r"UTMALDG\.2D\.MULTICAST": 3,  # those of `out`, of the first step and others; of `next`
        r"UTMALDG\.4D\.IM2COL": 2,  # windows, the shortcut
        "SYNCS.*TRYWAIT": 9,
        "USETMAXREG.*": 2,
        "UCGABAR.ARV": 2,  # when it begins and when it ends
        "UCGABAR.WAIT": 2,
    }
    staged = {r"STSM\b.*": 4 * (2 + boxes), r"LDSM\b.*": 2 * 4}
    return _chain_gates(kernel, tile.shared, wanted, 7, 4 * (2 + boxes), staged, counts)


def _chain_gates(
    kernel: Kernel,
    shared: int,
    wanted: dict[int, int],
    expected: int,
    most: int,
    staged: dict[str, int],
    counts: dict[str, int],
) -> dict[str, bool]:
    """What is said of both.

    Args:
        kernel: its machine code.
        shared: bytes of a block.
        wanted: products by their columns.
        expected: waits for products.
        most: vectors that a thread stores.
        staged: instructions as patterns, exactly so many.
        counts: likewise, at least so many.
    """
    products = {n: kernel.count(rf"HGMMA\.64x{n}x16\.F32.*") for n in wanted}
    waits, stored = kernel.count(r"WARPGROUP\.DEPBAR.*"), kernel.wide("STG")
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{shared} bytes of shared memory, at most {MOST_SHARED}": shared <= MOST_SHARED,
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
