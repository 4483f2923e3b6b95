"""What the stem's machine code for sm_90a is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

WORKERS = 2  # of a block: a consuming warpgroup each


@dataclass(frozen=True)
class StemWgmmaTile:
    """A configuration of the stem for sm_90a, as its kernel's name spells it."""

    columns: int

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
        staging = WORKERS * 4 * self.staged * 16 * 32
        return 2 * 64 * 4 + 128 + filters + rings + staging + WORKERS * 2 * pairs * 8


@functools.cache
def stem_wgmma_tile_of(mangled: str) -> StemWgmmaTile | None:
    """The configuration of the stem for sm_90a in a kernel's mangled name, or None."""
    shape = re.search(r"StemWarpgroupShapeILi(\d+)EE", mangled)
    return StemWgmmaTile(int(shape.group(1))) if shape else None


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
        r"STSM\b.*": 2 * tile.staged,  # of two rows by turns
        r"SHFL\b.*": 2 * tile.columns // 8,
        r"STG\b.*\.128\b.*": 2 * tile.staged,
        r"STS\b.*\.128\b.*": 4,
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
