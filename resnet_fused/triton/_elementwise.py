"""What the kernels share that pass over activations once: tiles, places in memory, sums.

A tile is rows x columns of an activation, columns along memory: channels of a pixel where channels
are adjacent (NHWC), else pixels of a channel (NCHW). A pass that sums over pixels as it goes gives
each program a run of tiles of its own channels; a second kernel adds the programs' sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._gemm import pixel_of
from ._launch import MOST_REGISTERS, begins_at_a_piece, fits_32_bits, on_device, traceable

WARPS = 4
ELEMENTS = 4096
"""Elements of a tile: 32 a thread, four 16-byte loads of 16-bit values in flight a tensor."""
ELEMENTS_OFF = 2048
"""The same where an address is no multiple of 16 bytes: each element then needs a pointer of its
own, and those of 32 elements of three tensors are more than a thread's registers hold."""
MAX_COLUMNS = 1024

SUMMED = 2048
"""Elements of a tile of a pass that sums: its sums stay in registers beside what it reads."""
SUMMED_COLUMNS = 256
"""512 bytes in 16 bits, a 16-byte access of each thread of a warp. More columns would leave each
program more sums to write, and fewer rows for them."""
PROGRAMS = 1024
"""Programs that share the pixels: two waves and more of an H200's, four blocks a multiprocessor.
A number of its own, not the GPU's: the sums' order, and with it their bits, is the same on all."""

MERGE_PARTS = 64
MERGE_COLUMNS = 16
"""Tile of the merge: 8 elements a thread, 64 bytes of each program's sums."""

MOST_UNROLLED = 9
"""Taps of a window that are unrolled, so that all of their loads are in flight."""


@triton.jit
def offsets(
    row, column, sizes_h, sizes_w, channels, n, c, h, w, BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile's rows [R] and columns [C] in a tensor with strides n, c, h, w."""
    if BY_CHANNEL:
        image, y, x = pixel_of(row, sizes_h, sizes_w)
        return image * n + y * h + x * w, column * c
    rows = (row // channels) * n + (row % channels) * c
    if DENSE:
        return rows, column * w
    return rows, (column // sizes_w) * h + (column % sizes_w) * w


@triton.jit
def offsets_of_channel(
    row, column, channel, sizes_h, sizes_w, n, c, h, w, BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Offsets [R, C] of a tile whose columns are channels, or else of one channel.

    Of the one channel a row is an image, and a column a pixel.
    """
    down, along = offsets(row, column, sizes_h, sizes_w, 1, n, c, h, w, BY_CHANNEL, DENSE)
    if not BY_CHANNEL:
        down += channel * c
    return down[:, None] + along[None, :]


@triton.jit
def place(image, channel, y, x, n, c, h, w, BY_CHANNEL: tl.constexpr):
    """Offsets [R, C] of elements given by coordinates [R, 1] and [1, C].

    With BY_CHANNEL the channel is [1, C] and all others are [R, 1]; else y and x are [1, C].
    """
    if BY_CHANNEL:
        found = (image * n + y * h + x * w) + channel * c
    else:
        found = (image * n + channel * c) + (y * h + x * w)
    return found


@triton.jit
def first_program(channels, columns, BY_CHANNEL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a pass that sums: (part of the pixels, channel: [BLOCK_N], or without BY_CHANNEL one)."""
    groups = tl.cdiv(columns, BLOCK_N) if BY_CHANNEL else channels
    channel = tl.program_id(0) % groups
    if BY_CHANNEL:
        channel = channel * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.program_id(0) // groups, channel


@triton.jit
def summed_tile(
    tile, channel, columns, BY_CHANNEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Rows [R] and columns [C] of one tile of a pass that sums; `channel` has the index's width."""
    high, wide = tl.full((), BLOCK_M, channel.dtype), tl.full((), BLOCK_N, channel.dtype)
    if BY_CHANNEL:
        row, column = high * tile, channel
    else:
        blocks = tl.cdiv(columns, BLOCK_N)
        row = high * (tile // blocks)
        column = wide * (tile % blocks) + tl.arange(0, BLOCK_N)
    return row + tl.arange(0, BLOCK_M), column


@triton.jit
def channel_values(rows, index, channel, channels, BY_CHANNEL: tl.constexpr):
    """Row `index` of per-channel values [., channels], for a tile: [1, C], or one value."""
    source = rows + index * channels + channel
    if BY_CHANNEL:
        values = tl.load(source, mask=channel < channels, other=0.0)[None, :]
    else:
        values = tl.load(source)
    return values


@triton.jit
def tile_values(
    rows, index, row, column, inside_m, channels, columns, BY_CHANNEL: tl.constexpr
):  # fmt: skip
    """The same for a tile of all channels: [1, C], or [R, 1] where rows are (image, channel)."""
    source = rows + index * channels
    if BY_CHANNEL:
        values = tl.load(source + column, mask=column < columns, other=0.0)[None, :]
    else:
        values = tl.load(source + row % channels, mask=inside_m, other=0.0)[:, None]
    return values


@triton.jit
def store_sum(partial, acc, channel, channels, BY_CHANNEL: tl.constexpr):
    """Adds up a program's sums [R, C] over its pixels, and stores them by channel."""
    if BY_CHANNEL:
        tl.store(partial + channel, tl.sum(acc, 0), mask=channel < channels)
    else:
        tl.store(partial + channel, tl.sum(tl.sum(acc, 1), 0))


@triton.jit
def merge_sums_kernel(
    partial,  # [parts, width] float32
    sums,  # [width] float32
    parts,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds up what the programs summed, in float64 and always in the same order."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = column < width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    for first in range(0, parts, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        source = partial + row.to(tl.int64)[:, None] * width + column[None, :]
        found = tl.load(source, mask=(row < parts)[:, None] & known[None, :], other=0.0)
        acc += found.to(tl.float64)
    tl.store(sums + column, tl.sum(acc, 0).to(tl.float32), mask=known)


class Tiles(NamedTuple):
    """How a pass over an activation is cut.

    Attributes:
        programs: how many.
        rows: of the activation, as its layout has them.
        columns: likewise.
        options: the kernel's constants.
        of_channel: tiles of a channel, where its pixels are summed.
        parts: programs that share them.
        each: tiles of such a part.
    """

    programs: int
    rows: int
    columns: int
    options: dict[str, int | bool]
    of_channel: int = 0
    parts: int = 1
    each: int = 0


def power_of_two(size: int) -> int:
    """The next power of two, 16 at least: a tile's side."""
    return max(16, 1 << (size - 1).bit_length())


def _options(by_channel: bool, out: Tensor, tensors: tuple[Tensor, ...]) -> dict[str, int | bool]:
    height, width = out.shape[2:]
    dense = all(height == 1 or t.stride(2) == width * t.stride(3) for t in (out, *tensors))
    return {
        "BY_CHANNEL": by_channel,
        "DENSE": dense,
        "WIDE": not fits_32_bits(out, *tensors),
        "num_warps": WARPS,
        "maxnreg": MOST_REGISTERS,
    }


def is_by_channel(out: Tensor) -> bool:
    """Whether a tile's columns are channels: where those of the result lie side by side."""
    return out.stride(1) == 1 and out.shape[1] > 1


def tiles_of(out: Tensor, *tensors: Tensor, elements: int = ELEMENTS) -> Tiles:
    """The tiles of a pass that writes `out` [N, C, H, W].

    Args:
        out: the result.
        tensors: others of its height and width that are read or written along with it.
        elements: of a tile, at most.
    """
    n, channels, height, width = out.shape
    by_channel = is_by_channel(out)
    rows, columns = (n * height * width, channels) if by_channel else (n * channels, height * width)
    block_n = min(MAX_COLUMNS, power_of_two(columns))
    aligned = all(begins_at_a_piece(t) for t in (out, *tensors))
    block_m = (elements if aligned else min(elements, ELEMENTS_OFF)) // block_n
    programs = _tiles.cdiv(rows, block_m) * _tiles.cdiv(columns, block_n)
    options = _options(by_channel, out, tensors) | {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return Tiles(programs, rows, columns, options)


def summed_tiles(out: Tensor, *tensors: Tensor, elements: int = SUMMED) -> Tiles:
    """The tiles of a pass that writes `out` [N, C, H, W] and sums over its pixels.

    How many programs share a channel depends on shape and layout alone.

    Args:
        out: the result.
        tensors: others of its height and width that are read or written along with it.
        elements: of a tile.
    """
    n, channels, height, width = out.shape
    by_channel = is_by_channel(out)
    rows, columns = (n * height * width, channels) if by_channel else (n, height * width)
    block_n = min(SUMMED_COLUMNS if by_channel else MAX_COLUMNS, power_of_two(columns))
    block_m = elements // block_n
    blocks = _tiles.cdiv(columns, block_n)
    groups = blocks if by_channel else channels
    tiles = _tiles.cdiv(rows, block_m) * (1 if by_channel else blocks)
    each = _tiles.cdiv(tiles, min(tiles, max(1, PROGRAMS // groups)))
    parts = _tiles.cdiv(tiles, each)
    options = _options(by_channel, out, tensors) | {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return Tiles(parts * groups, rows, columns, options, tiles, parts, each)


def workspace(sums: Tensor, tiles: Tiles) -> Tensor:
    """Where the programs' sums go: [parts, rows of sums, C] float32."""
    return torch.empty((tiles.parts, *sums.shape), dtype=torch.float32, device=sums.device)


def merge(partial: Tensor, sums: Tensor) -> None:
    """Adds up the programs' sums.

    Args:
        partial: [parts, rows, C] float32.
        sums: [rows, C] float32, contiguous; overwritten.
    """
    grid = (_tiles.cdiv(sums.numel(), MERGE_COLUMNS),)
    with on_device(sums):
        traceable(merge_sums_kernel, sums)[grid](
            partial, sums, partial.shape[0], sums.numel(),
            BLOCK_M=MERGE_PARTS, BLOCK_N=MERGE_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
