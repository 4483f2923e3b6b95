"""Which places one kernel of both gradients of a 1x1 and a block's end takes, and its cycles.

Pure functions of sizes and limits: no GPU, no Triton. `_end_gradient` compares it with other ways.
"""

from __future__ import annotations

import dataclasses

from ..cases import ConvCase
from . import _grad1x1, _tiles
from ._grad1x1 import PIXELS, SUM, Config

CONFIGS = (
    Config(64, 128, 2, 80 * 1024, (80, 86, 89, 90, 100)),
    Config(128, 128, 2, 128 * 1024, (90, 100)),
    Config(128, 64, 1, 80 * 1024, (80, 86, 89, 120)),
)
"""As of `_grad1x1`; of those that an architecture takes, the first that holds all filters serves.
256 filters stand behind 1024 channels in a ResNet: too many programs would read the same dz and y.
"""

PIECE = 16
"""Channels that Triton must know rows to be multiples of: beside the raw outputs' places, a pointer
for each element would spill in the loop. Found by compiling, as all else in `CONFIGS`."""

BY_NAME = {one.name: one for one in CONFIGS}


def serves(
    filters: int,
    channels: int,
    itemsize: int,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None = None,
) -> Config | None:
    """The configuration that takes a place, or None; arguments as of `_grad1x1.serves`."""
    if filters % PIECE or channels % PIECE:
        return None
    return _grad1x1.serves(filters, channels, itemsize, limits, allowed, CONFIGS)


def unfit(filters: int, channels: int, itemsize: int) -> str:
    """What to say of sizes that no configuration takes."""
    if filters % PIECE or channels % PIECE:
        return f"{filters} filters and {channels} channels are no multiples of {PIECE}"
    return _grad1x1.unfit(filters, channels, itemsize)


def cycles(
    case: ConvCase,
    itemsize: int,
    config: Config,
    limits: _tiles.Limits,
    *,
    projected: bool = False,
    added: int = 0,
) -> float:
    """Cycles of the one kernel: of memory, caches and tensor cores the slowest.

    The busiest program takes as many tiles of pixels as any other, or one more.

    Args:
        case: sizes of the forward call of the convolution behind the block.
        itemsize: bytes of an element.
        config: the configuration.
        limits: the GPU's.
        projected: whether the block has a projection, whose reductions are taken too.
        added: elements of the shortcut's gradient.
    """
    pixels, weights = case.n * case.h * case.w, case.k * case.c
    sizes = pixels, case.k, case.c, itemsize
    parts, across = _grad1x1.programs(pixels, case.c, config, limits)
    tiles = _tiles.cdiv(pixels, PIXELS)
    steps = _tiles.cdiv(tiles, parts)
    moved = 2 * pixels * case.k + (3 + projected) * pixels * case.c + added + 2 * weights
    asked = issued_bytes(*sizes, config, limits, projected=projected, addend=added).total
    product = 2 * PIXELS * config.filters * config.channels
    feeds = _feed(PIXELS, config.channels), _feed(config.filters, config.channels)
    return max(
        moved * itemsize / (_tiles.MEMORY * limits.multiprocessors),
        asked / (tiles * across) * steps / _tiles.CACHE,
        steps * product / _tiles.TENSOR * sum(1 / feed for feed in feeds),
    )


def _feed(rows: int, columns: int) -> float:
    """The part of the tensor cores' rate that a tile is fed at from shared memory."""
    return min(1.0, rows * columns / (rows + columns) / (128 * 256 / 384))


@dataclasses.dataclass(frozen=True)
class Issued(_grad1x1.Issued):
    """Bytes loaded and stored by one call of `conv_bn_grad1x1_end`, its merges included.

    Attributes:
        raws: loads of one raw output, or behind a projection of two.
    """

    raws: int


def issued_bytes(
    pixels: int,
    filters: int,
    channels: int,
    itemsize: int,
    config: Config,
    limits: _tiles.Limits,
    *,
    affine: bool = True,
    projected: bool = False,
    addend: int = 0,
    parameter: int | None = None,
) -> Issued:
    """What the kernel asks of L1 and L2 for operands with adjacent channels.

    Beside what `conv_bn_grad1x1` asks for: `out`, its x, once more for the mask, the raw outputs,
    their means once a tile, and the tiles' sums.

    Args:
        pixels: N H W.
        filters: K.
        channels: C.
        itemsize: bytes of an element.
        config: the configuration.
        limits: the GPU's.
        affine: whether y is read beside dz.
        projected: whether there is a projection's raw output.
        addend: elements of what is added.
        parameter: bytes of an element of dweight; `itemsize` by default.

    Returns:
        Bytes, exact for active lanes.
    """
    bare = _grad1x1.issued_bytes(
        pixels, filters, channels, itemsize, config, limits, affine=affine, addend=addend,
        parameter=parameter,
    )  # fmt: skip
    raws, each = 1 + projected, pixels * channels * itemsize
    rows = _tiles.cdiv(pixels, PIXELS) * channels * SUM
    found = vars(bare) | {
        "x": 2 * each,
        "vectors": bare.vectors + raws * rows,
        "sums": bare.sums + (1 + raws) * (2 * rows + channels * SUM),
    }
    return Issued(**found, raws=raws * each)
