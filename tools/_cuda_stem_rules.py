"""What the stem's machine code is held to: for sm_90a, and where it writes e4m3."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

FIRST_E4M3 = 89  # the first architecture that converts to it
# Of the stem, for 16 columns: rows of taps, instructions deep, and those of 8 filters each.
STEM_PRODUCTS = 7 * 2 * 4
WORKERS = 2  # of a block: a consuming warpgroup each


@dataclass(frozen=True)
class StemWgmmaTile:
    """A configuration of the stem for sm_90a, as its kernel's name spells it."""

    columns: int
    measured: bool = False  # conv_bn_stats': a row of y goes out in place of a pooled one

    @property
    def staged(self) -> int:
        """Instructions that bring a pooled row of a warp to shared memory: 16 pixels each."""
        return -(-self.columns // 32)

    @property
    def shared(self) -> int:
        """Bytes of a block, as csrc/device/stem_warpgroup.h lays them out."""
        chunks, pairs = self.columns + 3, 8
        filters = 7 * 4 * (64 + 1) * 16
        rings = WORKERS * pairs * 2 * 2 * chunks * 16
        begun = 2 * 64 * 4 + 128 + filters + rings
        if self.measured:
            begun = -(-begun // 1024) * 1024 + WORKERS * self.columns * 128
        else:
            begun += WORKERS * 4 * self.staged * 16 * 32
        return begun + WORKERS * 2 * pairs * 8


@functools.cache
def stem_wgmma_tile_of(mangled: str) -> StemWgmmaTile | None:
    """The configuration of the stem for sm_90a in a kernel's mangled name, or None."""
    shape = re.search(r"Stem(Warpgroup|Stats)ShapeILi(\d+)EE", mangled)
    return StemWgmmaTile(int(shape.group(2)), shape.group(1) == "Stats") if shape else None


def writes_e4m3(mangled: str) -> bool:
    """Whether a kernel of the stem does, by its mangled name."""
    return "stem" in mangled and "Float8E4M3" in mangled


def left_out(kernel: Kernel) -> bool:
    """Whether it writes e4m3 for an architecture that has no instruction for that."""
    return writes_e4m3(kernel.name) and int(kernel.arch.rstrip("af")) < FIRST_E4M3


def nothing(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel that is to be empty."""
    loads = kernel.count("HMMA.*|LDSM.*|LDG.*|STG.*")
    return {f"{loads} loads, stores and products, expected none": loads == 0}


def results(kernel: Kernel, vectors: int, pairs: int) -> dict[str, int]:
    """Instructions that round and store results, with how many there are at least.

    Args:
        kernel: its machine code.
        vectors: stores of eight filters.
        pairs: of results that are rounded at once.
    """
    if not writes_e4m3(kernel.name):
        return {r"STG\b.*\.128\b.*": vectors, r"F2FP\..*PACK_AB": pairs}
    return {
        r"STG\b.*\.64\b.*": vectors,
        r"F2FP\.SATFINITE\.E4M3\.F32\.PACK_AB.*": pairs,
        r"F2FP\.F16\.E4M3\.UNPACK.*": pairs,
    }


def stem_by_mma(kernel: Kernel, shape: tuple[int, ...], registers: int) -> dict[str, bool]:
    """The gates of a kernel of the stem on mma.sync, as sentences.

    Args:
        kernel: its machine code.
        shape: warps side by side, tiles of each, blocks of a multiprocessor.
        registers: of a multiprocessor.
    """
    if len(shape) != 3:
        return {"its name spells no configuration": False}
    if left_out(kernel):
        return nothing(kernel)
    warps, tiles, blocks = shape
    most = min(255, registers // (64 * warps * blocks))
    products, loads = kernel.count("HMMA.*"), kernel.count(r"LDSM\b.*")
    # Chunks of the image for each row of taps, and the filters once.
    wanted = 7 * (tiles + 1) + 7 * 4
    return {
        f"{kernel.registers} registers, at most {most}": kernel.registers <= most,
        f"{products} HMMA, at least {STEM_PRODUCTS * tiles}": products >= STEM_PRODUCTS * tiles,
        f"{loads} LDSM, at least {wanted}": loads >= wanted,
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in results(kernel, tiles, 8 * tiles).items()
        },
    }


def stem_by_wgmma(kernel: Kernel, registers: int, most: int) -> dict[str, bool]:
    """The gates of a kernel of the stem for sm_90a, as sentences.

    Args:
        kernel: its machine code.
        registers: that each of its threads begins with.
        most: bytes of shared memory that a block may ask for.
    """
    tile = stem_wgmma_tile_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    products = kernel.count(rf"HGMMA\.64x{tile.columns}x16\.F32.*")
    # Asked for at three places: the first row's, and those of two rows by turns.
    wanted = 3 * 7 * 2
    counts = {
        "SYNCS.*TRYWAIT": 2,
        "USETMAXREG.*": 2,
        r"STS\b.*\.128\b.*": 4,
    }
    if tile.measured:  # two rows by turns, two channels a thread, two sums of two shuffles each
        counts |= {
            r"STSM\b.*": 2 * tile.columns // 16,
            "UTMASTG.*": 2,
            r"SHFL\.BFLY.*": 2 * 2 * 2 * 2,
            r"ATOM.*STRONG\.GPU.*": 2,
            "DFMA.*": 4,
        }
    else:
        counts |= {
            r"STSM\b.*": 2 * tile.staged,  # likewise
            r"SHFL\b.*": 2 * tile.columns // 8,
            **results(kernel, 2 * tile.staged, tile.columns),
        }
    return {
        f"{kernel.registers} registers, expected {registers}": kernel.registers == registers,
        f"{tile.shared} bytes of shared memory, at most {most}": tile.shared <= most,
        f"{products} HGMMA of {tile.columns} columns, expected {wanted}": products == wanted,
        **{
            f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
            for pattern, least in counts.items()
        },
    }
