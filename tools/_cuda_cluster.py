"""What the machine code of conv_bn_act by clusters, for sm_90a, is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/cluster_shape.h.
CHANNELS, ROW_BYTES, STEP_PRODUCTS, AT_ONCE = 64, 128, 4, 8
THREADS, RESIDENT = 160, 2
MOST_REGISTERS = 200  # of 65,536, for two blocks of five warps
MOST_SHARED = 227 * 1024 // RESIDENT - 1024


@dataclass(frozen=True)
class ClusterTile:
    """A configuration, as its kernel's name spells it."""

    pixels: int
    stages: int
    blocks: int

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of filters and pixels, two barriers each."""
        return self.stages * (ROW_BYTES * (self.pixels + CHANNELS) + 16)

    @property
    def rounds(self) -> int:
        """Pixels of a thread, each eight apart in the block's share."""
        return -(-self.pixels // self.blocks // AT_ONCE)


@functools.cache
def cluster_of(mangled: str) -> ClusterTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"12ClusterShapeILi(\d+)ELi(\d+)EEELi(\d+)E", mangled)
    return ClusterTile(*map(int, shape.groups())) if shape else None


def by_cluster(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    tile = cluster_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    # Every sum is put down once, and each of the share's is read from each block; stored once.
    exactly = {
        rf"HGMMA\.64x{tile.pixels}x16\.F32.*": STEP_PRODUCTS,
        r"WARPGROUP\.DEPBAR.*": 2,
        "STS": tile.pixels // 2,
        r"LD\.E\.128": tile.blocks * tile.rounds,
        r"STG\.E\.64": tile.rounds,
    }
    # Filters twice, before the wait and behind it; pixels by both ways.
    least = {
        r"UTMALDG\.4D": 2,
        r"UTMALDG\.2D": 1,
        r"UTMALDG\.4D\.IM2COL": 1,
        "SYNCS.*TRYWAIT": 3,
        "UCGABAR_ARV": 2,
        "UCGABAR_WAIT": 2,
    }
    return {
        f"{kernel.registers} registers, at most {MOST_REGISTERS}": (
            kernel.registers <= MOST_REGISTERS
        ),
        f"{tile.shared} bytes of shared memory, at most {MOST_SHARED}": tile.shared <= MOST_SHARED,
        **{
            f"{kernel.count(pattern)} {pattern}, expected {count}": kernel.count(pattern) == count
            for pattern, count in exactly.items()
        },
        **{
            f"{kernel.count(pattern)} {pattern}, at least {count}": kernel.count(pattern) >= count
            for pattern, count in least.items()
        },
    }


def sharing(filters: int, pixels: int) -> dict[str, int]:
    """Instructions of a convolution whose cluster shares rows of its steps, at least so many.

    Args:
        filters: blocks that share filters, which are asked for in two places; 1: none does.
        pixels: blocks that share pixels, which come by two ways.
    """
    found: dict[str, int] = {}
    if filters > 1:
        found[r"UTMALDG\.4D\.MULTICAST"] = 2
    if pixels > 1:
        found |= {r"UTMALDG\.4D\.IM2COL\.MULTICAST": 1, r"UTMALDG\.2D\.MULTICAST": 1}
    if filters * pixels > 1:  # barriers when it begins and ends
        found |= {"UCGABAR.ARV": 2, "UCGABAR.WAIT": 2}
    return found
