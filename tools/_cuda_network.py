"""What the machine code of a whole network's kernel in clusters, for sm_90a, is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _cuda_resident import RESERVED_SHARED, SHARED, most_registers

if TYPE_CHECKING:
    from _cuda_rules import Kernel

MOST_PARTS, STEP_BYTES = 8, 64
# Blocks meet: an arrival that releases, a wait that acquires, pauses in between.
MEETS = {"RED.*STRONG.GPU": 1, "LDG.*STRONG.GPU": 1, "NANOSLEEP.*": 1, r"CCTL\..*PF2.*": 1}


@dataclass(frozen=True)
class NetworkTile:
    """One of a kernel's tiles, as its name spells it."""

    m: int
    n: int
    warps_m: int
    warps_n: int
    stages: int
    blocks: int

    @property
    def products(self) -> int:
        """Instructions of a step, by one warp: 16 x 8 results each, two deep."""
        return 2 * (self.m // self.warps_m // 16) * (self.n // self.warps_n // 8)

    @property
    def put(self) -> int:
        """Pairs of sums that a thread leaves."""
        return self.m * self.n // 2 // self.threads

    @property
    def read(self) -> int:
        """Vectors of four sums that a thread reads, in code for 2, 4 and 8 parts."""
        rows = self.threads // (self.n // 4)
        return sum(n * -(-self.m // n // rows) for n in (2, 4, MOST_PARTS))

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_m * self.warps_n


@dataclass(frozen=True)
class NetworkTiles:
    """The tiles of a kernel, which take turns in its shared memory."""

    tiles: tuple[NetworkTile, ...]

    @property
    def shared(self) -> int:
        """Bytes of a block: the largest ring, and behind it the sums of the largest tile."""
        ring = max(one.stages * (one.m + one.n) * STEP_BYTES for one in self.tiles)
        return ring + max(one.m * one.n * 4 for one in self.tiles)

    @property
    def blocks(self) -> int:
        """That share a multiprocessor."""
        return self.tiles[0].blocks

    @property
    def short(self) -> str:
        """For a readable name."""
        return ", ".join(f"{one.m}x{one.n} {one.stages} stages" for one in self.tiles)


@functools.cache
def network_of(mangled: str) -> NetworkTiles | None:
    """The tiles in a kernel's mangled name, or None."""
    if "network_cluster_kernel" not in mangled:
        return None
    found = re.findall("I" + 6 * r"Li(\d+)E" + "E", mangled)
    return NetworkTiles(tuple(NetworkTile(*map(int, one)) for one in found)) if found else None


def at_least(kernel: Kernel, counts: dict[str, int]) -> dict[str, bool]:
    """Gates of so many instructions by pattern."""
    return {
        f"{kernel.count(pattern)} {pattern}, at least {least}": kernel.count(pattern) >= least
        for pattern, least in counts.items()
    }


def by_network_clusters(kernel: Kernel) -> dict[str, bool]:
    """The gates of a kernel, as sentences."""
    network = network_of(kernel.name)
    if network is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"clusters of this kernel are sm_90a's alone: it is built for nothing else": False}
    tiles, (_, multiprocessor) = network.tiles, SHARED[kernel.arch]
    most = most_registers(tiles[0].threads, network.blocks, network.shared, kernel.arch)
    asked = network.blocks * (network.shared + RESERVED_SHARED)
    exactly = {
        "HMMA.*": sum(one.products for one in tiles),
        # A sum is put down once, and read from each block once, by all ways of cutting.
        r"STS\.64": sum(one.put for one in tiles),
        r"LD\.E\.128": sum(one.read for one in tiles),
        # Each tile: its sums are put down, and have been read.
        "UCGABAR_ARV": 2 * len(tiles),
    }
    return {
        f"{kernel.registers} registers, at most {most}": kernel.registers <= min(most, 255),
        f"{asked} bytes of shared memory for {network.blocks} blocks, at most {multiprocessor}": (
            asked <= multiprocessor
        ),
        f"{kernel.wide('LDGSTS')} LDGSTS.128, at least {4 * len(tiles)}": (
            kernel.wide("LDGSTS") >= 4 * len(tiles)
        ),
        **{
            f"{kernel.count(pattern)} {pattern}, expected {count}": kernel.count(pattern) == count
            for pattern, count in exactly.items()
        },
        # Before a block ends others have read what it has put down.
        **at_least(kernel, MEETS | {"UCGABAR_WAIT": 2 * len(tiles) + 1, r"LDSM\b.*": 4}),
    }
