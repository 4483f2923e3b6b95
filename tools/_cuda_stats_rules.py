"""What conv_bn_stats' machine code holds beside a convolution's: sums over lanes, arrivals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
    return {
        f"{kernel.count(pattern)} {pattern}, at least {count}": kernel.count(pattern) >= count
        for pattern, count in least.items()
    }
