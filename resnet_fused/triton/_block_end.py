"""Which 1x1 convolutions make the end of the block before them as they read, and what that saves.

Pure functions of sizes and limits: no GPU, no Triton. The layers that run, `explain` and the
predictions ask the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from . import _tiles

READ = 2
"""Tensors that `out` is made of: the last raw output and the shortcut."""

TILES = tuple(tile for tile in _tiles.TILES if tile.m <= 16 * tile.warps)
"""Configurations that a product of two gathered tensors can take: see `_tiles.crowded`."""

PIECE = 16
"""Channels that Triton must know rows to be multiples of: others it would load one by one, with a
pointer each, and spill."""

MOST, MOST_PROJECTED, MOST_ELSEWHERE = 128, 64, 32
"""Sums that a thread may keep, found by compiling: a second BatchNorm's values need registers, and
but for sm_90, whose tensor cores read shared memory, so do the operands."""

MOST_RAGGED = 16
"""Likewise but for sm_90, of a projection whose channels fill no step: masks take registers."""

THREEFOLD_UNTIL = 120
"""Capability from which float32 in three products of TF32 spills at any tile, found likewise."""

SUM = 4
"""Bytes of a partial sum: float32."""


def product_of(
    pixels: int,
    channels: int,
    filters: int,
    itemsize: int,
    precision: str = "ieee",
    *,
    projected: bool,
    capability: int,
) -> _tiles.Product:
    """The product of a 1x1 convolution whose input is made of two tensors in registers.

    Args:
        pixels: N H W.
        channels: C.
        filters: K.
        itemsize: bytes of an element.
        precision: of float32 products, see `_tiles.Product`.
        projected: whether the shortcut has a BatchNorm of its own.
        capability: of the GPU, times ten.
    """
    product = _tiles.Product(
        rows=pixels, columns=filters, copies=1, depth=channels, taps=1, itemsize=itemsize,
        precision=precision, gathered=READ, ragged=not is_whole(channels, filters),
        most=MOST_PROJECTED if projected else MOST,
    )  # fmt: skip
    if capability == 90:
        return product
    most = MOST_RAGGED if projected and channels % product.step else MOST_ELSEWHERE
    if precision == "tf32x3" and capability >= THREEFOLD_UNTIL:
        most = 0
    return dataclasses.replace(product, most=most)


def is_whole(channels: int, filters: int) -> bool:
    """Whether rows of channels are whole `PIECE`s."""
    return not (channels % PIECE or filters % PIECE)


def asked_bytes(product: _tiles.Product, plan: _tiles.Plan, tensors: int) -> int:
    """Bytes of activations and weights that a 1x1 convolution asks of the caches.

    Each column of tiles reads all pixels, each row of them all weights. What is stored beside the
    result is not in it, nor are values a channel.

    Args:
        product: its sizes.
        plan: tile and splits.
        tensors: that a pixel is read from.
    """
    across = _tiles.cdiv(product.columns, plan.tile.n)
    down = _tiles.cdiv(product.rows, plan.tile.m)
    pixels = tensors * across * product.rows * product.depth
    result = product.rows * product.columns
    partial = 2 * plan.splits * result * SUM if plan.splits > 1 else 0
    return (pixels + down * product.columns * product.depth + result) * product.itemsize + partial


class Verdict(NamedTuple):
    """How a block's end and the next block's first convolution are made.

    Attributes:
        folded: whether by one kernel; else by two.
        why: one clause.
    """

    folded: bool
    why: str


@functools.lru_cache(maxsize=4096)
def choose(
    product: _tiles.Product, limits: _tiles.Limits, allowed: frozenset[str] | None = None
) -> Verdict:
    """Whether one kernel should make a block's end and the 1x1 convolution behind it.

    It reads `out` through memory one time less and saves a launch; but each of its columns of tiles
    reads two tensors in the place of one, and what is made in registers leaves room for smaller
    tiles. Each kernel is taken to last as long as the slowest of memory, caches and tensor cores,
    at the rates of `_tiles`. The rule is arithmetic, not measured.

    Args:
        product: as of `product_of`.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
    """
    reason = unfit(product, limits, allowed)
    if reason is not None or not product.rows:
        return Verdict(False, reason or "an empty batch")
    plan = _tiles.choose(product, limits, allowed)
    two = dataclasses.replace(product, gathered=0, most=MOST)
    apart = _tiles.choose(two, limits)
    out = product.rows * product.depth * product.itemsize
    rest = (product.rows + product.depth) * product.columns * product.itemsize
    asked, before = asked_bytes(product, plan, READ) + out, asked_bytes(two, apart, 1)
    one_lasts = cycles(product, plan, 3 * out + rest, asked, limits)
    two_last = 3 * out / (_tiles.MEMORY * limits.multiprocessors) + _tiles.MERGE
    two_last += cycles(two, apart, out + rest, before, limits)
    text = (
        f"{out / 1e6:.1f} MB less through memory, "
        f"{(asked - before - 3 * out) / 1e6:+.1f} MB asked of the caches"
    )
    return Verdict(one_lasts < two_last, text)


def unfit(
    product: _tiles.Product, limits: _tiles.Limits, allowed: frozenset[str] | None = None
) -> str | None:
    """Why no configuration takes a product on a GPU, or None; arguments as of `choose`."""
    if not is_whole(product.depth, product.columns):
        sizes = f"{product.depth} channels and {product.columns} filters"
        return f"{sizes} are no multiples of {PIECE}"
    if not any(
        _tiles.fits(product, tile, limits)
        for tile in TILES
        if allowed is None or tile.name in allowed
    ):
        return "none of its configurations is left on this GPU"
    return None


def cycles(
    product: _tiles.Product, plan: _tiles.Plan, memory: int, asked: int, limits: _tiles.Limits
) -> float:
    """Cycles of a convolution: its slowest part, the last wave of tiles as long as the others.

    Args:
        product: its sizes.
        plan: tile and splits.
        memory: bytes that it moves through memory.
        asked: bytes that it asks of the caches.
        limits: the GPU's.
    """
    tile = plan.tile
    tiles = _tiles.cdiv(product.rows, tile.m) * _tiles.cdiv(product.columns, tile.n)
    tiles *= product.copies * plan.splits
    waves = _tiles.cdiv(tiles, limits.multiprocessors)
    feed = min(1.0, tile.m * tile.n / (tile.m + tile.n) / (128 * 256 / 384))
    slower = {"ieee": 1, "tf32": 2, "tf32x3": 6}[product.precision]
    depth = product.taps * product.depth / plan.splits
    tensor = waves * 2 * tile.m * tile.n * depth * slower / (_tiles.TENSOR * feed)
    cache = asked / tiles * waves / _tiles.CACHE
    through = memory / (_tiles.MEMORY * limits.multiprocessors)
    return max(tensor, cache, through) + (_tiles.MERGE if plan.splits > 1 else 0)
