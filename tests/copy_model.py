"""What the PTX manual says that bulk copies and mbarriers do, by index arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import _conformance_tma as inputs
import numpy as np
from _conformance_tma import Geometry, Words
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]


def tiled_coordinates(g: Geometry) -> Indices:
    """[rank, elements of the box]: Tensors, tiled mode; elements `steps` apart from `at` on."""
    ranges = [np.arange(count) * step for count, step in zip(g.counts, g.steps, strict=False)]
    grid = np.meshgrid(*ranges[::-1], indexing="ij")[::-1]
    return np.stack([at + axis.ravel() for at, axis in zip(g.at, grid, strict=False)])


def im2col_coordinates(g: Geometry) -> Indices:
    """[rank, elements]: im2col mode; pixels of the bounding box in the order W, H, D, N.

    Each pixel's number within the walk of its dimension, as an odometer with the start's digits.
    """
    spatial = range(1, g.rank - 1)
    radix = [(g.sizes[d] - 1 + g.upper[d - 1] - g.lower[d - 1]) // g.steps[d] + 1 for d in spatial]
    start = [(g.at[d] - g.lower[d - 1]) // g.steps[d] for d in spatial]
    place = np.cumprod([1, *radix])
    number = np.arange(g.pixels) + int(np.dot(start, place[:-1]))
    found = []
    for d, count, weight in zip(spatial, radix, place, strict=False):
        digit = number // weight % count
        offset = (*g.offsets, 0)[d - 1]
        found.append(g.lower[d - 1] + digit * g.steps[d] + offset)
    image = g.at[g.rank - 1] + number // place[-1]
    channels = g.at[0] + np.arange(g.box[0])
    pixels = np.stack([*found, image])
    return np.concatenate([np.tile(channels, g.pixels)[None], np.repeat(pixels, g.box[0], axis=1)])


def places(g: Geometry) -> tuple[Indices, NDArray[np.bool_]]:
    """Of each element of the box its first byte in the tensor, and whether it lies inside."""
    at = im2col_coordinates(g) if g.pixels else tiled_coordinates(g)
    sizes = np.array(g.sizes[: g.rank])[:, None]
    inside = ((at >= 0) & (at < sizes)).all(0)
    strides = [g.element_bytes, g.row_bytes]
    for size in g.sizes[1 : g.rank - 1]:
        strides.append(strides[-1] * size)
    return (at * np.array(strides[: g.rank])[:, None]).sum(0), inside


def swizzled(offset: Indices, span: int) -> Indices:
    """Swizzling modes: in spans of 128, 64, 32 bytes, units of 16 by bits 7-9, 7-8, 7."""
    unit, row = offset // 16, offset // 128
    flips = {0: 0 * row, 32: row % 2, 64: row % 4, 128: row % 8}[span]
    return (unit ^ flips) * 16 + offset % 16


def load(g: Geometry, tensor: Bytes, room: int) -> Bytes:
    """`room` bytes of shared memory that were zeros."""
    result = np.zeros(room, np.uint8)
    first, inside = places(g)
    byte = np.arange(g.element_bytes)
    source = np.where(inside[:, None], first[:, None] + byte, 0)
    values = np.where(inside[:, None], tensor[source], 0)
    target = swizzled(np.arange(g.box_bytes), g.swizzle)
    result[target] = values.ravel()
    return result


def to_tf32(data: Bytes) -> Bytes:
    """Words rounded to the nearest with 10 bits of fraction, ties to even; infinities, NaN stay.

    No manual says it: what is known comes from programs that have tried it.
    """
    words = data.view(np.uint32)
    down = words & np.uint32(0xFFFFE000)
    value = words.view(np.float32).astype(np.float64)
    exponent = np.maximum((words >> 23 & 255).astype(int), 1) - 127
    with np.errstate(invalid="ignore"):
        past = np.abs(value - down.view(np.float32)) / np.exp2(exponent - 10.0)
    up = (past > 0.5) | (past == 0.5) & (words >> 13 & 1 == 1)
    rounded = np.where(up, down + np.uint32(0x2000), down)
    return np.where(np.isfinite(value), rounded, words).astype(np.uint32).view(np.uint8)


def store(g: Geometry, shared: Bytes, room: int) -> Words:
    """`room` bytes of global memory that were zeros; behind them their words' xor."""
    result = np.zeros(room, np.uint8)
    first, inside = places(g)
    values = shared[swizzled(np.arange(g.box_bytes), g.swizzle)].reshape(-1, g.element_bytes)
    target = first[:, None] + np.arange(g.element_bytes)
    result[target[inside]] = values[inside]
    total = np.bitwise_xor.reduce(result.view(np.uint32))
    return np.concatenate([result.view(np.uint32), [total, 0, 0, 0]]).astype(np.uint32)


def halves(g: Geometry, tensor: Bytes) -> Bytes:
    """Both blocks' shared memory: the box, and the one of the next row or tap behind it."""
    if g.pixels:
        other = replace(g, offsets=(g.offsets[0] + 1, g.offsets[1]))
    else:
        other = replace(g, at=(g.at[0], g.at[1] + 1, *g.at[2:]))
    one = np.concatenate([load(each, tensor, 2 * inputs.BOX) for each in (g, other)])
    return np.tile(one, 2)


def _each(apply: Callable[[Geometry, Bytes], NDArray[Any]]) -> Callable[[Words], Words]:
    def run(words: Words) -> Words:
        rows = []
        for case in words:
            data = case[inputs.PARAMETERS :].copy().view(np.uint8)
            rows.append(apply(inputs.read_geometry(case), data).view(np.uint32))
        return np.stack(rows)

    return run


def bulk_copy(words: Words) -> Words:
    """Units of 16 bytes in a row."""
    data, result = words[:, :512].reshape(-1, 128, 4), np.zeros((len(words), 128, 4), np.uint32)
    for case, (start, target, length) in enumerate(words[:, 512:515].astype(int)):
        result[case, target : target + length] = data[case, start : start + length]
    return result.reshape(len(words), -1)


def mbarrier(words: Words) -> Words:
    """A phase is complete with its last arrival and its last byte, the one before always."""
    lane, said, sent = np.arange(32), [], []
    for phase in range(3):
        other = (lane + phase + 1) % 32
        said += [2, 3, 2, 0, 0, 0, 0, 0]
        sent += [100 * phase + other, 1000 * phase + other]
    result = np.tile(np.concatenate([said, *sent]).astype(np.uint32), (len(words), 1))
    result[:, 5] = words[:, 33]
    return result


def cp_async_mbarrier(words: Words) -> Words:
    """What another lane has copied, and the word behind that."""
    rows = np.arange(len(words))[:, None]
    source = words[rows, 96 + np.arange(32)].astype(int)
    word = words[rows, 64 + source].astype(int)
    return np.concatenate([words[rows, word], words[rows, (word + 1) % 64]], axis=1)


def exchange(words: Words, count: int) -> Words:
    """Each of 128 lanes stores `count` words into one of 128 places, and reads one of them."""
    values = words[:, : 128 * count].reshape(-1, 128, count)
    to, found = words[:, 128 * count :].reshape(-1, 2, 128).astype(int).transpose(1, 0, 2)
    memory = np.empty_like(values)
    np.put_along_axis(memory, to[:, :, None], values, 1)
    return np.take_along_axis(memory, found[:, :, None], 1).reshape(len(words), -1)


def handed(words: Words) -> Words:
    """What lanes of the other block have handed over."""
    given, lanes = words[:, :64], words[:, 64:].astype(int)
    other = np.where(np.arange(64) < 32, 32, 0)
    return np.take_along_axis(given, lanes + other, 1)


def expected() -> dict[str, Callable[[Words], Words]]:
    """By kernel: input words -> output words."""
    loads = _each(lambda g, tensor: load(g, tensor, 4 * inputs.BOX))
    rounded = _each(lambda g, tensor: to_tf32(load(g, tensor, 4 * inputs.BOX)))
    stores = _each(lambda g, shared: store(g, shared, 4 * inputs.TENSOR))
    both = _each(halves)
    return {
        "tma_load": loads,
        "tma_load_im2col": loads,
        "tma_load_tf32": rounded,
        "tma_load_im2col_tf32": rounded,
        "tma_store": stores,
        "tma_store_im2col": stores,
        "tma_load_multicast": both,
        "tma_load_im2col_multicast": both,
        "bulk_copy": bulk_copy,
        "mbarrier": mbarrier,
        "cp_async_mbarrier": cp_async_mbarrier,
        **{
            f"shared_cluster_{4 * count}": lambda words, count=count: exchange(words, count)
            for count in (1, 2, 4)
        },
        "mbarrier_cluster": handed,
    }
