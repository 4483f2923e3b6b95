"""What the machine code of conv_chain for sm_90a behind a 1x1 is held to, in e4m3 as well."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import _cuda_fp8_rules
from _cuda_window import CONSUMERS, MOST_SHARED, REGISTERS, ROW_BYTES

if TYPE_CHECKING:
    from _cuda_rules import Kernel

STEP, PRODUCT_BYTES = 64, 32  # channels of a step; of a row, that an instruction takes


@dataclass(frozen=True)
class ChainTmaTile:
    """A configuration of conv_chain or conv_chain_fp8, as its kernel's name spells it."""

    inner: int
    following: int
    stages: int
    projected: int
    element: int
    sharing: int

    @property
    def shared(self) -> int:
        """Bytes of a block, as csrc/device/chain_tma.h lays them out."""
        read, pixels, most = self.inner + self.projected, STEP * CONSUMERS, 1024
        rows = 2 * read // STEP + max(self.following - self.inner, 0) // STEP  # boxes of pixels
        stage = pixels + read + self.following  # rows of a step
        vectors = 8 * (most * (2 if self.projected else 1) + self.following)
        bytes_of_row = STEP * self.element
        made = bytes_of_row * (rows * pixels + self.stages * stage)
        return made + vectors + 16 * (self.stages + 2)

    @property
    def products(self) -> int:
        """Instructions of a step."""
        return STEP * self.element // PRODUCT_BYTES

    @property
    def short(self) -> str:
        """It in words."""
        projected = f" projecting {self.projected}" if self.projected else ""
        shared = " shared filters" if self.sharing > 1 else ""
        return f"{self.inner} to {self.following} {self.stages} stages{projected}{shared}"


@dataclass(frozen=True)
class ChainRingsTile(ChainTmaTile):
    """A configuration of conv_chain in which each part of a step has a ring of its own."""

    making: int
    boxes: int

    @property
    def shared(self) -> int:
        """Bytes of a block, as csrc/device/chain_rings.h lays them out."""
        pixels, most = STEP * CONSUMERS, 1024
        tiles = 1 if self.projected else 2
        boxes = tiles * (self.inner + self.projected) // STEP + self.boxes  # of pixels
        rows = boxes * pixels + self.making * self.inner + self.stages * self.following
        vectors = most * (2 if self.projected else 1) + self.following
        parts = 1 + self.projected // self.inner
        arrivals = 8 * CONSUMERS * parts if self.projected else 16 * 2
        rings = 16 * (self.making + self.stages + self.boxes)
        return ROW_BYTES * rows + 8 * vectors + rings + arrivals


@functools.cache
def chain_tma_tile_of(mangled: str) -> ChainTmaTile | None:
    """The configuration in a kernel's mangled name, or None."""
    if shape := re.search(r"ChainTmaShapeI" + 6 * r"Li(\d+)E" + "E", mangled):
        return ChainTmaTile(*map(int, shape.groups()))
    if shape := re.search(r"ChainRingsShapeI" + 6 * r"Li(\d+)E" + "E", mangled):
        inner, following, making, stages, boxes, projected = map(int, shape.groups())
        return ChainRingsTile(inner, following, stages, projected, 2, 2, making, boxes)
    return None


def is_e4m3_chain(mangled: str) -> bool:
    """Whether a kernel is conv_chain_fp8's."""
    return "conv_chain_tma_kernelINS_10Float8E4M3E" in mangled


def chain_by_tma(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    tile = chain_tma_tile_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    # Into `out` from all that a tile has read, and once from out into next; of 64 columns each.
    wanted = {STEP: tile.products * (tile.inner + tile.projected) // STEP}
    wanted[tile.following] = wanted.get(tile.following, 0) + tile.products
    narrow = is_e4m3_chain(kernel.name)
    found = {n: kernel.count(_product(n, narrow)) for n in wanted}
    unit = "QGMMA" if narrow else "HGMMA"
    boxes = tile.following // STEP
    # Of e4m3 a box of filters is two requests, one of each of two blocks.
    requests = 2 if narrow and tile.sharing == 1 else 1
    counts = {
        # Filters before the wait and behind it; what a tile reads; the shortcut.
        "UTMALDG.*": 2 * 2 * requests + 2,
        "UTMASTG.*": 1 + boxes,
        # Rows, and of a step its stage or the stages of its parts: read, and asked for.
        "SYNCS.*TRYWAIT": 8 if isinstance(tile, ChainRingsTile) else 4,
        "USETMAXREG.*": 2,
        **(_bytes(tile, boxes) if narrow else _halves(tile, boxes)),
    }
    if isinstance(tile, ChainRingsTile) and tile.projected:  # pixels that lie apart
        counts[r"UTMALDG\.4D\.IM2COL"] = tile.projected // STEP
    if tile.sharing > 1:  # filters come to both; barriers when it begins and ends
        box = rf"UTMALDG\.{4 if narrow else 2}D\.MULTICAST"
        counts |= {box: 2 * 2, "UCGABAR.ARV": 2, "UCGABAR.WAIT": 2}
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        **{
            f"{found[n]} {unit} of {n} columns, expected {wanted[n]}": found[n] == wanted[n]
            for n in wanted
        },
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }


def _product(columns: int, narrow: bool) -> str:
    return _cuda_fp8_rules.product(columns) if narrow else rf"HGMMA\.64x{columns}x16\.F32.*"


def _halves(tile: ChainTmaTile, boxes: int) -> dict[str, int]:
    """How results of 16 bits are put into boxes, and shortcuts read there."""
    return {r"STSM\b.*": 4 * (1 + boxes), r"LDSM\b.*": 0 if tile.projected else 4}


def _bytes(tile: ChainTmaTile, boxes: int) -> dict[str, int]:
    """Likewise of e4m3, four neighbours a word; a projection is rounded as well."""
    return {
        "STS": 8 * (1 + boxes),
        "LDS": 0 if tile.projected else 8,
        "F2FP.SATFINITE.E4M3.*": 16 * (1 + boxes + (1 if tile.projected else 0)),
        "FADD.*": tile.following // 2,  # sums in parts
    }
