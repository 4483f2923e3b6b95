"""What training's convolutions hold beside a convolution's machine code: sums, and arrivals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Two channels a thread, each in two sums of two shuffles; arrivals of a chunk of parts, and of the
# chunks; what tiles leave, added up in float64.
MEASURED_BY_TMA = {r"SHFL\.BFLY.*": 2 * 2 * 2, r"ATOM.*STRONG\.GPU.*": 2, "DFMA.*": 4}


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
    return _at_least(kernel, least)


def summing(kernel: Any) -> dict[str, bool]:
    """The gates of conv_bn_dgrad's reductions, as sentences.

    Args:
        kernel: a `_cuda_rules.Kernel`.
    """
    # Its end is there twice: for 16 bytes at a time, and for elements. Raw and addend of four rows
    # are under way in the first one.
    least = {
        r"ATOM.*STRONG\.GPU.*": 1 + 2 * 2,  # of the splits, of a chunk, of the chunks
        "DADD.*": 2 * 2 * 2,
        r"LDG\b.*\.128\b.*": 2 * 4,
        r"STG\b.*\.128\b.*": 4,
    }
    return _at_least(kernel, least)


def _at_least(kernel: Any, least: dict[str, int]) -> dict[str, bool]:
    return {
        f"{kernel.count(pattern)} {pattern}, at least {count}": kernel.count(pattern) >= count
        for pattern, count in least.items()
    }
