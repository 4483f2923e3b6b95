"""Configurations of `stem`'s kernel: plain values, and the pure functions that choose them.

A program computes a strip of the pooled image: so many pooled columns wide, some or all of the
channels, and a run of pooled rows, which it walks down. Nothing here needs a GPU or Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ._tiles import Limits, cdiv

POOL = ([3, 3], [2, 2], [1, 1])
"""The pooling that the kernel is made for: windows overlap by one row and one column."""

MOST_ROWS = 7
"""Of a filter: each is a product of its own, unrolled, and its weights stay in shared memory."""

MOST_LANES = 64
"""Elements of the image that a row of a filter may meet, taps times channels."""

SLACK = 1024
"""Bytes of shared memory beside operands and the tile of neighbours: reductions over warps."""


@dataclass(frozen=True)
class Tile:
    """One configuration.

    Attributes:
        columns: pooled pixels of a row.
        channels: output channels.
        warps: warps of 32 threads that share the tile.
        stages: rows of the convolution in flight.
        why: what it is there for.
    """

    columns: int
    channels: int
    warps: int
    stages: int
    why: str

    @property
    def name(self) -> str:
        """What records and `explain` call it: "64x64_8w2s"."""
        return f"{self.columns}x{self.channels}_{self.warps}w{self.stages}s"


TILES: tuple[Tile, ...] = (
    Tile(64, 64, 8, 2, "the usual stem: all channels, a row of 224 pixels pooled to 56"),
    Tile(64, 32, 8, 2, "99 KB of shared memory, and float32"),
    Tile(32, 32, 8, 2, "images of 128 pixels and less"),
    Tile(16, 32, 8, 2, "float32 where more would spill"),
)
"""Every configuration that ships: the tests, the gates and the self-check run all of them."""

BY_NAME = {tile.name: tile for tile in TILES}


@dataclass(frozen=True)
class Sizes:
    """A call as `choose` sees it.

    Attributes:
        images: N.
        rows: pooled rows.
        columns: pooled columns.
        filters: output channels.
        taps: rows of a filter.
        lanes: elements of a tile's row, a power of two.
        shift: elements of it in front of the first tap.
        itemsize: bytes of an element of the product.
        precision: of float32 products, "tf32" or "tf32x3"; "ieee" for 16 bits.
        dense: whether a row of the image is one run in memory, pixel after pixel.
    """

    images: int
    rows: int
    columns: int
    filters: int
    taps: int
    lanes: int
    shift: int
    itemsize: int
    precision: str = "ieee"
    dense: bool = True


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        tile: the configuration.
        rows: pooled rows of a strip.
        why: the reasons.
    """

    tile: Tile
    rows: int
    why: str


def shift_of(stride: int, padding: int, channels: int) -> int:
    """Elements in front of a window's first that make its place a multiple of four.

    The windows of neighbouring tiles' pixels are 2 * stride * channels elements apart. Where that
    is no multiple of four, no shift makes all of them one.
    """
    return (-padding * channels) % 4 if (2 * stride * channels) % 4 == 0 else 0


def is_dense(x: Tensor) -> bool:
    """Whether a row of the images [N, C, H, W] is one run in memory, pixel after pixel."""
    return (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(3) == x.shape[1]


def sizes_of(
    shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    pool: Sequence[Sequence[int]],
    precision: str = "ieee",
    dense: bool = True,
) -> Sizes | str:
    """The sizes of a call, or why the kernel is not made for it.

    Args:
        shape: of the images [N, C, H, W].
        weight: [K, C, R, S].
        stride: of the convolution (vertical, horizontal), as is padding.
        padding: see stride.
        pool: kernel, stride and padding of the pooling.
        precision: of float32 products.
        dense: see `is_dense`.
    """
    if [list(part) for part in pool] != list(POOL):
        return f"pooling {[list(part) for part in pool]}; the kernel's is {list(POOL)}"
    if precision == "tf32x3":  # their parts beside the rows that are carried: on sm_90 they spill
        return "float32 in three TF32 products, for which there are not enough registers"
    filters, channels, r, s = weight.shape
    if r > MOST_ROWS:
        return f"a filter of {r} rows; the kernel takes {MOST_ROWS} at most"
    shift = shift_of(stride[1], padding[1], channels)
    run = (s + stride[1]) * channels + shift
    if run > MOST_LANES:
        return f"{channels} channels: rows of {run} elements, the kernel takes {MOST_LANES}"
    p, q = (
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip(shape[2:], padding, (r, s), stride, strict=True)
    )
    lanes = max(16, 1 << (run - 1).bit_length())
    return Sizes(
        shape[0], (p - 1) // 2 + 1, (q - 1) // 2 + 1, filters, r, lanes, shift,
        weight.element_size(), precision, dense,
    )  # fmt: skip


def shared_memory(sizes: Sizes, tile: Tile, limits: Limits) -> int:
    """Bytes of shared memory: the weights, the rows in flight, columns fetched from neighbours.

    On sm_90, whose products read shared memory as they run, one more row is in flight. Compiled
    for sm_80, 90 and 100 the kernels take just this much, but for the slack.
    """
    run = sizes.taps * sizes.lanes * sizes.itemsize
    rows = tile.stages if limits.capability == 90 else tile.stages - 1
    neighbours = 4 * tile.columns * tile.channels
    return run * (2 * tile.channels + rows * tile.columns) + neighbours + SLACK


def most_columns(sizes: Sizes, capability: int) -> int:
    """Columns of a tile from which ptxas still spills nothing, as the gates find it.

    Args:
        sizes: of the call.
        capability: of the GPU, such as 86.
    """
    if capability in (80, 90):
        return 64
    if sizes.itemsize == 4:  # of bytes, which are widened on the way
        return 16
    # On sm_100 the sums pass through registers too, on sm_120 fewer are left to them.
    return 32 if capability >= 120 or (capability >= 100 and not sizes.dense) else 64


def fits(sizes: Sizes, tile: Tile, limits: Limits) -> bool:
    """Whether a call can run in a configuration: shared memory, and the products' registers."""
    # Single elements that are loaded one by one need a pointer each, beside the sums.
    if (sizes.itemsize == 4 or not sizes.dense) and tile.channels > 32:
        return False
    if tile.columns > most_columns(sizes, limits.capability):
        return False
    if tile.columns < 32 and sizes.itemsize != 4 and limits.capability == 90:  # it spills
        return False
    return shared_memory(sizes, tile, limits) <= limits.shared_memory


def strips_of(sizes: Sizes, tile: Tile) -> tuple[int, int]:
    """(strips in a row of the pooled image, whether each has a pixel for its neighbour alone)."""
    if sizes.columns <= tile.columns:
        return 1, 0
    return cdiv(sizes.columns, tile.columns - 1), 1


def cost(sizes: Sizes, tile: Tile, rows: int, limits: Limits) -> float:
    """Products of the busiest multiprocessor, in rows of 64 x 64: waves times a strip's rows."""
    strips, _ = strips_of(sizes, tile)
    programs = sizes.images * strips * cdiv(sizes.rows, rows) * cdiv(sizes.filters, tile.channels)
    waves = cdiv(programs, limits.multiprocessors)
    # A tile's image is loaded again for each of its blocks of channels: half of a row's time.
    each = tile.columns / 64 * (0.5 + tile.channels / 128)
    return waves * (2 * rows + 1 + 1) * each  # the row above, and the weights' load


@functools.lru_cache(maxsize=1024)
def choose(sizes: Sizes, limits: Limits, allowed: frozenset[str] | None = None) -> Plan | str:
    """The configuration of the least predicted `cost`, or why there is none.

    Args:
        sizes: of the call.
        limits: the GPU's.
        allowed: names of the configurations that may be used; None allows all.
    """
    found = [
        (cost(sizes, tile, rows, limits), place, rows)
        for place, tile in enumerate(TILES)
        if (allowed is None or tile.name in allowed) and fits(sizes, tile, limits)
        for rows in sorted({cdiv(sizes.rows, parts) for parts in range(1, sizes.rows + 1)})
    ]
    if not found:
        return (
            f"none of the {len(TILES)} configurations is left for this call: "
            f"{limits.shared_memory} bytes of shared memory"
        )
    _, place, rows = min(found)
    why = f"least predicted time on {limits.multiprocessors} multiprocessors, strips of {rows} rows"
    return Plan(TILES[place], rows, why)
