"""What the machine code of weights' gradients is held to: by wgmma, by rows, by windows."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from _cuda_stats_rules import TRANSFORMED, TRANSFORMED_BY_TMA, WIDTH, ZERO_ROWS
from _cuda_window import window_rows

if TYPE_CHECKING:
    from _cuda_rules import Kernel

# csrc/device/warpgroup_shape.h and wgrad_tma.h.
STEP_ROWS, ROW_BYTES, CONSUMERS, STEP_PRODUCTS = 64, 128, 2, 4
STEPS = 2  # of a round of the main loop: the left sides of two lie in registers
REGISTERS = 168  # a launch gives every thread
MOST_SHARED = 227 * 1024
IM2COL = r"UTMALDG\.4D\.IM2COL"


@dataclass(frozen=True)
class WgradTile:
    """A configuration, as its kernel's name spells it."""

    m: int
    n: int
    stages: int
    transforms: bool  # x, where it has landed
    left: int = 1  # blocks of a cluster that share dy and y
    right: int = 1  # and that share x

    @property
    def shares(self) -> bool:
        """Whether it has several."""
        return self.left * self.right > 1

    @property
    def columns(self) -> int:
        """Of one warpgroup: both lie along M, or along N."""
        return self.n * self.m // STEP_ROWS // CONSUMERS

    @property
    def shared(self) -> int:
        """Bytes of a block: stages of dy, y and x, barriers."""
        barriers = 16 + 24 * self.transforms + 16 * self.shares  # a ring of its own, or two more
        return self.stages * ((2 * self.m + self.n) * ROW_BYTES + barriers)


@functools.cache
def wgrad_of(mangled: str) -> WgradTile | None:
    """The configuration in a kernel's mangled name, or None."""
    shape = re.search(r"WgradTmaShapeILi(\d+)ELi(\d+)ELi(\d+)E", mangled)
    if shape is None:
        return None
    m, n, stages = map(int, shape.groups())
    shared = re.search(r"SharedWgradShapeINS_\w+?EEELi(\d+)ELi(\d+)E", mangled)
    sharing = map(int, shared.groups()) if shared else ()
    return WgradTile(m, n, stages, TRANSFORMED in mangled, *sharing)


def wgrad_by_tma(kernel: Kernel) -> dict[str, bool]:
    """The rules, as sentences, and whether each is kept."""
    tile = wgrad_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    # dy, y and x, each by both ways.
    least = {"UTMALDG.*": 6, IM2COL: 3} | _shared(tile)
    if tile.transforms:
        # Without a store of TMA's there is one fence beside it.
        least |= TRANSFORMED_BY_TMA | {"FENCE.VIEW.ASYNC.*": 1 + 1}
    return _gates(kernel, tile.shared, {tile.columns: 1}, least) | _fences(kernel, tile)


def _shared(tile: WgradTile) -> dict[str, int]:
    """What comes to several blocks: by both ways dy and y, and x; nothing of one alone."""
    if not tile.shares:
        return {}
    operands = 2 * (tile.left > 1) + (tile.right > 1)
    return {
        r"UTMALDG\.2D\.MULTICAST": operands,
        r"UTMALDG\.4D\.IM2COL\.MULTICAST": operands,
        IM2COL: 3 - operands,
        "UCGABAR_ARV": 2,
        # x's readers tell other blocks themselves, after each of two steps and the last one; of dy
        # the producer does.
        r"SYNCS\.ARRIVE\.TRANS64\.RED.*": 3 * (tile.right > 1) + (tile.left > 1),
    }


def _fences(kernel: Kernel, tile: WgradTile) -> dict[str, bool]:
    """Fences of the whole GPU.

    Two barriers of a cluster have one each, and one of a step is the producer's, where threads read
    what another block copies over. Readers pay for none.
    """
    if not tile.shares:
        return {}
    found, wanted = kernel.count(r"MEMBAR\.ALL\.GPU"), 2 + (tile.left > 1)
    return {f"{found} MEMBAR.ALL.GPU, expected {wanted}": found == wanted}


@dataclass(frozen=True)
class WgradWindowTile:
    """A configuration by windows, likewise."""

    positions: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of a block for rows of 56 pixels: barriers; stages of dz, y and a window."""
        rows = 2 * self.positions + window_rows(self.positions, WIDTH)
        return 1024 + self.stages * rows * ROW_BYTES


@functools.cache
def wgrad_window_of(mangled: str) -> WgradWindowTile | None:
    """The configuration by windows in a kernel's mangled name, or None."""
    shape = re.search(r"WgradWindowShapeILi(\d+)ELi(\d+)E", mangled)
    return WgradWindowTile(*map(int, shape.groups())) if shape else None


def wgrad_name(mangled: str) -> str | None:
    """What a readable name says of either, or None."""
    if tile := wgrad_of(mangled):
        more = " transformed" * tile.transforms
        if tile.shares:
            more = f" {tile.left} share dy, {tile.right} x"
        return f"{tile.m}x{tile.n} {tile.stages} stages{more}"
    if walked := wgrad_window_of(mangled):
        return f"{walked.positions} positions {walked.stages} stages"
    return None


def wgrad_by_window(kernel: Kernel) -> dict[str, bool]:
    """The rules, as sentences, and whether each is kept."""
    tile = wgrad_window_of(kernel.name)
    if tile is None:
        return {"its name spells no configuration": False}
    if kernel.arch != "90a":
        return {"wgmma is sm_90a's alone: it is built for nothing else": False}
    # Four taps of 64 channels, and half of one; windows are turned by as many loads as stores.
    turned = {r"LDS\.128": 4, r"STS\.128": 4}
    return _gates(kernel, tile.shared, {STEP_ROWS: 4, STEP_ROWS // 2: 1}, {IM2COL: 3} | turned)


def _gates(
    kernel: Kernel, shared: int, products: dict[int, int], least: dict[str, int]
) -> dict[str, bool]:
    """What both are held to. products: by their columns, of each slice of a step."""
    columns = sum(wide * count for wide, count in products.items())
    exact = {
        **{
            rf"HGMMA\.64x{wide}x16\.F32.*": count * STEPS * STEP_PRODUCTS
            for wide, count in products.items()
        },
        # One a step, that lets its own products run on; one behind the last.
        r"WARPGROUP\.DEPBAR.*": STEPS + 1,
        # dy, and with it y, are turned over as they are loaded.
        r"LDSM\.16\.MT88\.4": STEPS * 2 * STEP_PRODUCTS,
        # A thread's sums, four at a time.
        r"STG\.E\.128": columns // 8,
    }
    least = {"SYNCS.*TRYWAIT": 3, "USETMAXREG.*": 2} | least
    return {
        f"{kernel.registers} registers, expected {REGISTERS}": kernel.registers == REGISTERS,
        f"{shared} bytes of shared memory, at most {MOST_SHARED}": shared <= MOST_SHARED,
        **{
            f"{kernel.count(pattern)} {pattern}, expected {wanted}": kernel.count(pattern) == wanted
            for pattern, wanted in exact.items()
        },
        **{
            f"{kernel.count(pattern)} {pattern}, at least {few}": kernel.count(pattern) >= few
            for pattern, few in least.items()
        },
    }


IMAGE_COLUMNS = 7 * 8 * 4
"""Of the weights' gradient of an image by its rows: rows of taps, taps, channels."""


def by_image_rows(kernel: Kernel, tile_of: Callable[..., Any]) -> dict[str, bool]:
    """The rules of an image by its rows: gradients come by 16 bytes, it element by element.

    Args:
        kernel: whose name spells an ImageShape.
        tile_of: `_cuda_rules.Tile`.
    """
    shape = re.search(r"ImageShapeI" + 5 * r"Li(\d+)E" + "E", kernel.name)
    if shape is None:
        return {"its name spells no configuration": False}
    m, warps_m, warps_n, stages, blocks = map(int, shape.groups())
    tile = tile_of(m, IMAGE_COLUMNS, warps_m, warps_n, stages, blocks, masked=True, wide=True)
    products, turned = kernel.count("HMMA.*"), kernel.count(r"LDSM\b.*MT88\.4")
    most = tile.registers(kernel.arch)
    fragments = 2 * (m // warps_m + IMAGE_COLUMNS // warps_n) // 16
    return {
        f"{kernel.registers} registers, at most {most}": kernel.registers <= min(most, 255),
        f"{products} HMMA, at least {tile.matrix_instructions}": (
            products >= tile.matrix_instructions
        ),
        f"{turned} LDSM.MT88.4, at least {fragments}": turned >= fragments,
        f"{kernel.wide('LDGSTS')} LDGSTS.128, at least 4": kernel.wide("LDGSTS") >= 4,
    }


# csrc/device/halo_wgrad_shape.h.
WINDOW_ROW, TAPS, SLICE, STEP_PIXELS = 64, 9, 16, 32


@functools.cache
def along_of(mangled: str) -> tuple[int, ...] | None:
    """M, N, warps along both, stages, blocks of a window along the pixels, or None."""
    shape = re.search("HaloWgradShapeI" + 5 * r"Li(\d+)E" + "E", mangled)
    if shape is None:
        return None
    m, warps_m, warps_n, *more = map(int, shape.groups())
    return m, TAPS * SLICE * warps_n, warps_m, warps_n, *more


def along_bytes(m: int, stages: int) -> int:
    """Shared memory of such a block: stages of dz and y, zeros, the window.

    Its rows are a power of two, in which their numbers wrap: what a step's taps read, and the steps
    under way.
    """
    rows = 64
    while rows < 2 * (WIDTH + 1) + stages * STEP_PIXELS:
        rows *= 2
    return (2 * stages * m + ZERO_ROWS + rows) * WINDOW_ROW


def by_window_along(kernel: Kernel) -> dict[str, bool]:
    """The rules of such a kernel beside a convolution's, as sentences; none of another one."""
    shape = along_of(kernel.name)
    if shape is None:
        return {}
    m, _, warps_m, warps_n, *_ = shape
    rows = 4 * m // (32 * warps_m * warps_n)  # of 16 bytes, a thread's of dz in a step
    least = {
        # dz, y and the window, ahead of the loop and in it.
        r"LDGSTS\b.*\.128\b.*": 2 * (2 * rows + 1),
        # Two slices of pixels of every tap, and of dy.
        r"LDSM\b.*MT88\.4": 2 * (TAPS + m // warps_m // 16),
        # Turned in their place: dz with y, x.
        r"STS\b.*\.128\b.*": 2 * (rows + 1) + 1,
    }
    return {
        f"{kernel.count(pattern)} {pattern}, at least {few}": kernel.count(pattern) >= few
        for pattern, few in least.items()
    }
