"""What training's convolutions hold beside a convolution's machine code: sums, and arrivals."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from _cuda_resident import most_registers

# csrc/device/halo_shape.h.
ZERO_ROWS = 2
WIDTH = 56  # of the images that they are made for


def windows(pixels: int, count: int) -> int:
    """Rows of shared memory for the pixels of all nine taps: the tile's, and those around it."""
    return ZERO_ROWS + count * (pixels + 2 * (WIDTH + 1))


# Two channels a thread, each in two sums of two shuffles; arrivals of a chunk of parts, and of the
# chunks; what tiles leave, added up in float64.
MEASURED_BY_TMA = {r"SHFL\.BFLY.*": 2 * 2 * 2, r"ATOM.*STRONG\.GPU.*": 2, "DFMA.*": 4}

# csrc/device/transform_ring.h: two units of 16 bytes side by side, of four pairs each, which the
# ReLU takes together; scale and shift of eight channels; a fence, and two waits more.
TRANSFORMED = "TransformShape"
TRANSFORMED_BY_TMA = {
    r"LDS\.128": 2 + 2,
    r"STS\.128": 2 + 2,
    r"HMNMX2\.(BF16_V2\.)?NAN.*": 2 * 4,
    r"LDG\b.*\.128\.CONSTANT": 2 * 2,
    "FENCE.VIEW.ASYNC.*": 2 + 1,
    "SYNCS.*TRYWAIT": 6 + 2,
}


def measuring(kernel: Any, tile_of: Callable[[str], Any]) -> dict[str, bool]:
    """The gates of the statistics, as sentences.

    Args:
        kernel: a `_cuda_rules.Kernel`.
        tile_of: the configuration in a mangled name, or None.
    """
    tile = tile_of(kernel.name)
    if tile is None:
        return {}
    # Columns of a warp, two a thread: a sum and a sum of squares of each, in three shuffles.
    pairs = tile.n // tile.warps_n // 8
    least = {
        r"SHFL\.BFLY.*": 3 * 2 * 2 * pairs,
        # Of a chunk of tiles, and of the chunks.
        r"ATOM.*STRONG\.GPU.*": 2,
        "DFMA.*": 2,
    }
    return _at_least(kernel, least | _copied(tile, 1))


IMAGE_TAP_ROWS, CHUNK_ELEMENTS = 7, 8
"""csrc/device/image_chunk.h: rows of taps, and of each the elements of two pixels."""
TAP_ROW_BYTES = 64  # of a filter


def measuring_by_rows(kernel: Any) -> dict[str, bool]:
    """The gates of conv_bn_stats of an image by its rows, as sentences.

    Args:
        kernel: see `measuring`.
    """
    shape = re.search(r"ImageWindowShapeI" + 5 * r"Li(\d+)E" + "E", kernel.name)
    if shape is None:
        return {"its name spells no configuration": False}
    m, n, warps_m, warps_n, blocks = map(int, shape.groups())
    shared = IMAGE_TAP_ROWS * n * TAP_ROW_BYTES + 2 * m * n
    most = min(255, most_registers(32 * warps_m * warps_n, blocks, shared, kernel.arch))
    rows, columns = m // warps_m // 16, n // warps_n // 8  # of a warp: instructions
    least = {
        "HMMA.*": 2 * rows * columns,
        r"LDSM\b.*\.M88\.4": 2 * rows + columns,
        # All that a thread brings of a tile is asked for before any of it is stored.
        r"LDG\b.*\.U16\.CONSTANT": IMAGE_TAP_ROWS * CHUNK_ELEMENTS,
        r"STS\.128": IMAGE_TAP_ROWS,
        r"SHFL\.BFLY.*": 3 * 2 * 2 * columns,
        r"ATOM.*STRONG\.GPU.*": 2,
        "DFMA.*": 2,
    }
    fits = {f"{kernel.registers} registers, at most {most}": kernel.registers <= most}
    return fits | _at_least(kernel, least)


BLOCK_END = "bn_add_act_conv_stats_kernel"


def ending(kernel: Any, tile_of: Callable[[str], Any]) -> dict[str, bool]:
    """The gates of a block's end within the convolution behind it, as sentences.

    Args:
        kernel: a `_cuda_rules.Kernel`.
        tile_of: as of `measuring`.
    """
    tile = tile_of(kernel.name)
    if tile is None:
        return {}
    rows = tile.m * 4 // tile.threads  # of 16 bytes, a thread's in a step
    filters = tile.n * 4 // tile.threads
    projected = "Lb1E" in kernel.name
    least = {
        # y, the shortcut and filters, ahead of the loop and in it.
        r"LDGSTS\b.*\.128\b.*": 2 * (2 * rows + filters),
        # What is made ahead of the loop and in it, and then z.
        r"STG\b.*\.128\b.*": 2 * rows + 1,
        # A scale and a shift of each channel of 16 bytes, of each BatchNorm.
        r"LDG\b.*\.128\b.*": 2 * 2 * (2 if projected else 1),
    }
    return measuring(kernel, tile_of) | _at_least(kernel, least)


def _copied(tile: Any, operands: int) -> dict[str, int]:
    """Copies of a kernel by windows.

    Filters ahead of the loop and in it; a window of each operand before both, and one in each.
    """
    if not tile.window:
        return {}
    return {r"LDGSTS\b.*\.128\b.*": 2 * 4 * tile.n // tile.threads + 3 * operands}


def summing(kernel: Any, tile_of: Callable[[str], Any], *, end: bool = False) -> dict[str, bool]:
    """The gates of the reductions of conv_bn_dgrad and conv_bn_dgrad_end, as sentences.

    Args:
        kernel: a `_cuda_rules.Kernel`.
        tile_of: the configuration in a mangled name, or None.
        end: whether out and a projection's output are read beside raw, and three sums are taken.
    """
    tile = tile_of(kernel.name)
    if tile is None:
        return {}
    # Its end is there twice: for 16 bytes at a time, and for elements. What it reads of four rows,
    # of an end beside more than two blocks of two, is under way in the first one.
    rows = 2 if end and tile.blocks > 2 else 4
    least = {
        r"ATOM.*STRONG\.GPU.*": 1 + 2 * 2,  # of the splits, of a chunk, of the chunks
        "DADD.*": 2 * 2 * (3 if end else 2),
        r"LDG\b.*\.128\b.*": (4 if end else 2) * rows,
        r"STG\b.*\.128\b.*": rows,
    }
    return _at_least(kernel, least | _copied(tile, 2))


@functools.cache
def _grad1x1_shape(mangled: str) -> tuple[int, ...] | None:
    """Filters, channels, warps along the filters, stages, blocks in a merged kernel's name."""
    found = re.search(r"Grad1x1ShapeI" + 5 * r"Li(\d+)E" + "E", mangled)
    return None if found is None else tuple(map(int, found.groups()))


def grad1x1_name(mangled: str) -> str | None:
    """What a configuration of conv_bn_grad1x1 is called: "64x256 2 stages"."""
    shape = _grad1x1_shape(mangled)
    return None if shape is None else f"{shape[0]}x{shape[1]} {shape[3]} stages"


def merged_gradients(kernel: Any, *, ended: bool = False) -> dict[str, bool]:
    """The gates of conv_bn_grad1x1 and conv_bn_grad1x1_end, as sentences.

    Args:
        kernel: a `_cuda_rules.Kernel`.
        ended: whether it is behind a block's end.
    """
    shape = _grad1x1_shape(kernel.name)
    if shape is None:
        return {"its name spells no configuration": False}
    filters, channels, _, _, blocks = shape
    # A step of 32 pixels by 8 warps, two matrix instructions deep; of dx two slices of filters.
    weights = 2 * filters * channels // (16 * 8 * 8)
    rows = 2 * 32 * channels // (16 * 8 * 8)
    least = {
        "HMMA.*": weights + rows,
        r"LDSM\b.*": 8,
        # A stage's dz, y and x, when a part begins and behind each step; the weights.
        r"LDGSTS\b.*\.128\b.*": 4,
        r"STG\b.*\.128\b.*": channels * 32 // 8 // 256,
        r"SHFL\.BFLY.*": 2 * 3,
    }
    if ended:
        # A thread's pairs of the addend, of raw and of a projection's raw output, with the means of
        # these; of `out` for the mask; three sums of its channels, over eight lanes.
        pairs = 32 * channels // 2 // 256
        least |= {
            r"LDG\.E\.CONSTANT": 3 * pairs + 2 * channels // 16,
            r"LDS": pairs,
            r"SHFL\.BFLY.*": 3 * 3 * channels // 16,
        }
    most = min(255, 65536 // (256 * blocks))
    limit = {f"{kernel.registers} registers, at most {most}": kernel.registers <= most}
    return limit | _at_least(kernel, least)


def _at_least(kernel: Any, least: dict[str, int]) -> dict[str, bool]:
    return {
        f"{kernel.count(pattern)} {pattern}, at least {count}": kernel.count(pattern) >= count
        for pattern, count in least.items()
    }
