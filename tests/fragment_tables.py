"""What the instructions of csrc/ptx do, stated once more, from the PTX manual's text alone.

Written in numpy from the sections that each function names (PTX ISA 9.0), not from csrc/ptx: the
tests hold the emulator against it. Words are in the order that csrc/driver/conformance_*.cu states.
"""

from __future__ import annotations

from collections.abc import Callable

import copy_model
import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Numbers = NDArray[np.float64]

WARP = 32
LANES = np.arange(WARP)
GROUP = LANES >> 2  # "groupID = %laneid >> 2"
IN_GROUP = LANES % 4  # "threadID_in_group = %laneid % 4"


# ---- Matrix fragments: which element of a matrix each element of a lane's fragment is.
# Each table gives (row, column) of element i in lane l, as two arrays [32, elements].


def a_m16n8k16() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Matrix Fragments for mma.m16n8k16 with floating point type, multiplicand A, a0 .. a7."""
    i = np.arange(8)
    first = (i < 2) | ((i >= 4) & (i < 6))
    row = np.where(first, GROUP[:, None], GROUP[:, None] + 8)
    col = IN_GROUP[:, None] * 2 + (i & 1) + np.where(i < 4, 0, 8)
    return row, col


def b_m16n8k16() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same section, multiplicand B, b0 .. b3."""
    i = np.arange(4)
    row = IN_GROUP[:, None] * 2 + (i & 1) + np.where(i < 2, 0, 8)
    col = np.broadcast_to(GROUP[:, None], row.shape)
    return row, col


def a_m16n8k8_tf32() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Matrix Fragments for mma.m16n8k8, multiplicand A of .tf32, a0 .. a3."""
    i = np.arange(4)
    row = np.where((i == 0) | (i == 2), GROUP[:, None], GROUP[:, None] + 8)
    col = np.where(i < 2, IN_GROUP[:, None], IN_GROUP[:, None] + 4)
    return row, col


def b_m16n8k8_tf32() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same section, multiplicand B of .tf32, b0 and b1."""
    i = np.arange(2)
    row = np.where(i == 0, IN_GROUP[:, None], IN_GROUP[:, None] + 4)
    col = np.broadcast_to(GROUP[:, None], row.shape)
    return row, col


def accumulators() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both sections, accumulators C or D of .f32, c0 .. c3."""
    i = np.arange(4)
    row = np.where(i < 2, GROUP[:, None], GROUP[:, None] + 8)
    col = IN_GROUP[:, None] * 2 + (i & 1)
    return row, col


# ---- Numbers


def from_float32(words: Words) -> Numbers:
    return words.view(np.float32).astype(np.float64)


def from_tf32(words: Words) -> Numbers:
    """Alternate Floating-Point Data Formats: as .f32, with 10 bits of fraction."""
    return from_float32(words >> np.uint32(13) << np.uint32(13))


def halves(words: Words) -> NDArray[np.uint16]:
    """[..., n] registers -> [..., 2 n] elements, "low to high"."""
    low, high = words & np.uint32(0xFFFF), words >> np.uint32(16)
    return np.stack([low, high], -1).reshape(*words.shape[:-1], -1).astype(np.uint16)


def from_bf16(words: Words) -> Numbers:
    return from_float32(halves(words).astype(np.uint32) << np.uint32(16))


def from_f16(words: Words) -> Numbers:
    return halves(words).view(np.float16).astype(np.float64)


def to_tf32(words: Words) -> Words:
    """cvt.rna: "round to nearest, ties away from zero", here to 10 bits of fraction.

    Valid for finite numbers and infinities; of NaN the manual says nothing.
    """
    value = np.abs(from_float32(words))
    finite = np.isfinite(value)
    exponent = np.maximum(np.frexp(np.where(finite, value, 1))[1] - 1, -126)
    step = np.exp2((exponent - 10).astype(np.float64))
    rounded = np.where(finite, np.floor(value / step + 0.5) * step, np.inf)
    with np.errstate(over="ignore"):
        magnitude = rounded.astype(np.float32).view(np.uint32)
    return magnitude | (words & np.uint32(0x80000000))


# ---- Matrix products


def product_operands(name: str, words: Words) -> tuple[Numbers, Numbers, Numbers]:
    """The matrices A [cases, 16, k], B [cases, k, 8] and C [cases, 16, 8] of an mma's input."""
    lanes = words.reshape(len(words), WARP, 12)
    registers = lanes[..., 0:4], lanes[..., 4:6]
    if name == "mma_m16n8k8_tf32":
        tables, depth, convert = (a_m16n8k8_tf32(), b_m16n8k8_tf32()), 8, from_tf32
    else:
        tables, depth = (a_m16n8k16(), b_m16n8k16()), 16
        convert = from_bf16 if name == "mma_m16n8k16_bf16" else from_f16
    a = np.full((len(words), 16, depth), np.nan)
    b = np.full((len(words), depth, 8), np.nan)
    a[:, *tables[0]] = convert(registers[0])
    b[:, *tables[1]] = convert(registers[1])
    return a, b, accumulator_matrix(lanes[..., 6:10])


def accumulator_matrix(registers: Words) -> Numbers:
    """[cases, 32, 4] registers -> [cases, 16, 8]."""
    c = np.full((len(registers), 16, 8), np.nan)
    c[:, *accumulators()] = from_float32(np.ascontiguousarray(registers))
    return c


def product(a: Numbers, b: Numbers, c: Numbers) -> tuple[Numbers, Numbers]:
    """A B + C in float64, and the sum of the terms' magnitudes, which bounds rounding errors."""
    with np.errstate(all="ignore"):
        terms = a[:, :, :, None] * b[:, None, :, :]
        return terms.sum(2) + c, np.abs(terms).sum(2) + np.abs(c)


# ---- Matrices in shared memory


def matrices(words: Words, count: int) -> NDArray[np.uint16]:
    """ldmatrix: "addresses addr0-addr7 correspond to the rows of the first matrix", and so on.

    Returns:
        [cases, count, 8, 8] elements, by matrix, row and column.
    """
    rows = halves(words[:, :128].reshape(-1, 32, 4))  # [cases, 32 rows, 8 elements]
    address = words[:, 128 : 128 + 8 * count].astype(np.int64)
    return rows[np.arange(len(words))[:, None], address].reshape(-1, count, 8, 8)


def ldmatrix(words: Words, count: int, transposed: bool) -> Words:
    """Thread l gets row l / 4 (with .trans: column), its elements 2 (l % 4) and the next."""
    found = matrices(words, count)
    if transposed:  # "loaded in column-major format"
        found = found.swapaxes(2, 3)
    low = found[:, :, GROUP, 2 * IN_GROUP].astype(np.uint32)
    high = found[:, :, GROUP, 2 * IN_GROUP + 1].astype(np.uint32)
    return (low | high << np.uint32(16)).swapaxes(1, 2).reshape(len(words), -1)


def stmatrix(words: Words, transposed: bool) -> Words:
    """The same fragments the other way; row r of matrix m goes to the address of lane 8 m + r."""
    registers = words[:, :128].reshape(-1, WARP, 4)
    stored = np.zeros((len(words), 4, 8, 8), np.uint16)
    stored[:, :, GROUP, 2 * IN_GROUP] = (registers & np.uint32(0xFFFF)).swapaxes(1, 2)
    stored[:, :, GROUP, 2 * IN_GROUP + 1] = (registers >> np.uint32(16)).swapaxes(1, 2)
    if transposed:
        stored = stored.swapaxes(2, 3)
    rows = np.ascontiguousarray(stored).reshape(-1, 32, 8).view(np.uint32)
    memory = np.zeros_like(rows)
    memory[np.arange(len(words))[:, None], words[:, 128:160].astype(np.int64)] = rows
    return memory.reshape(len(words), -1)


# ---- Copies, loads and stores


def cp_async(words: Words, size: int) -> Words:
    """cp.async: copies `size` bytes; with a src-size of 0 all of them are "filled with zeros"."""
    slots = words[:, :128].copy().view(np.uint8).reshape(-1, 32, 16)
    source = words[:, 128:256].copy().view(np.uint8).reshape(-1, 32, 16)
    valid, target = words[:, 256:288], words[:, 288:320]
    for case in range(len(words)):
        for lane in range(WARP):
            copied = source[case, lane, :size] if valid[case, lane] else 0
            slots[case, target[case, lane], :size] = copied
    return slots.reshape(len(words), -1).view(np.uint32)


def move(words: Words, size: int) -> Words:
    """Element from[l] of `size` bytes goes to place to[l]; the other bytes are zeros."""
    data = words[:, :128].copy().view(np.uint8).reshape(len(words), -1, size)
    result = np.zeros_like(data)
    case = np.arange(len(words))[:, None]
    result[case, words[:, 160:192]] = data[case, words[:, 128:160]]
    return result.reshape(len(words), -1).view(np.uint32)


# ---- Warps and blocks


def shuffle(name: str, words: Words) -> Words:
    """shfl.sync, its pseudocode, with c = 0x1f (.up: 0) and so a segment mask of 0."""
    value, operand, mask = words[:, :32], words[:, 32:64], words[:, 64]
    bval = (operand & np.uint32(31)).astype(np.int64)
    clamp = 0 if name == "shuffle_up" else 31
    if name == "shuffle_up":
        j = LANES - bval
        valid = j >= clamp
    else:
        sums = {"shuffle": bval, "shuffle_xor": LANES ^ bval, "shuffle_down": LANES + bval}
        j = sums[name]
        valid = j <= clamp
    source = np.where(valid, j, LANES)
    return np.where(members(mask), np.take_along_axis(value, source, 1), 0).astype(np.uint32)


def members(mask: Words) -> NDArray[np.bool_]:
    """[cases, 32]: whether each lane is in the mask."""
    return (mask[:, None] >> LANES.astype(np.uint32) & 1) == 1


def vote(name: str, words: Words) -> Words:
    """vote.sync, over the non-exited threads of the mask."""
    predicate, inside = words[:, :32] != 0, members(words[:, 32])
    if name == "ballot":
        powers = np.uint64(1) << LANES.astype(np.uint64)
        result = ((predicate & inside) * powers).sum(1)
    elif name == "any":
        result = (predicate & inside).any(1)
    else:
        result = (predicate | ~inside).all(1)
    return np.where(inside, result.astype(np.uint32)[:, None], 0).astype(np.uint32)


def taken(words: Words, count: int) -> Words:
    """Thread t gets the value of the thread that it names."""
    return np.take_along_axis(words[:, :count], words[:, count : 2 * count].astype(np.int64), 1)


def flushed(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Subnormal numbers as zeros of their sign."""
    small = np.abs(values) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), values), values)


def atomic_add(words: Words, floats: bool) -> Words:
    """atom.add; of .f32 on global memory "flushes subnormal inputs and results"."""
    before, place = words[:, :33], words[:, 36:68].astype(np.int64)
    addend, common = words[:, 68:100], words[:, 100:132]
    after = before.copy()
    got = np.take_along_axis(before, place, 1)
    if floats:
        with np.errstate(all="ignore"):
            terms = flushed(got.view(np.float32)), flushed(addend.copy().view(np.float32))
            placed = flushed(terms[0] + terms[1]).view(np.uint32)
        terms = np.concatenate([before[:, 32:], common], 1).view(np.float32)
        total = terms.sum(1, dtype=np.float32).view(np.uint32)
    else:
        placed = got + addend
        total = before[:, 32] + common.sum(1, dtype=np.uint32)
    np.put_along_axis(after, place, placed, 1)
    after[:, 32] = total
    return np.concatenate([after, got, np.zeros((len(words), 3), np.uint32)], 1)


def message(words: Words) -> Words:
    """What one warp has written before it raised the flag, the other one sees."""
    flag = np.tile(np.array([1, 0, 0, 0], np.uint32), (len(words), 1))
    return np.concatenate([words[:, :32], taken(words, 32), flag], 1)


def expected() -> dict[str, Callable[[Words], Words]]:
    """By instruction: input words -> output words. The matrix products have `product` instead."""
    found: dict[str, Callable[[Words], Words]] = {
        "to_tf32": to_tf32,
        "cp_async_groups": lambda words: words,
        "grid_dependency": lambda words: words,
        "sync_warp": lambda words: np.where(members(words[:, 64]), taken(words, 32), 0),
        "sync_threads": lambda words: taken(words, 128),
        "barrier_sync": lambda words: taken(words, 128),
        "barrier_arrive": lambda words: taken(words, 64),
        "atomic_add": lambda words: atomic_add(words, floats=False),
        "atomic_add_acq_rel": lambda words: atomic_add(words, floats=False),
        "atomic_add_float": lambda words: atomic_add(words, floats=True),
        "store_release_load_acquire": message,
        "fence_acq_rel_gpu": message,
        "reduce_add_release": message,
    }
    for suffix, transposed in (("", False), ("_trans", True)):
        for count in (2, 4):
            found[f"ldmatrix_x{count}{suffix}"] = lambda words, count=count, t=transposed: ldmatrix(
                words, count, t
            )
        found[f"stmatrix_x4{suffix}"] = lambda words, t=transposed: stmatrix(words, t)
    for name in ("shuffle", "shuffle_xor", "shuffle_down", "shuffle_up"):
        found[name] = lambda words, name=name: shuffle(name, words)
    for name in ("ballot", "any", "all"):
        found[name] = lambda words, name=name: vote(name, words)
    for size in (4, 8, 16):
        found[f"cp_async_{size}"] = lambda words, size=size: cp_async(words, size)
    for size in (1, 2, 4, 8, 16):
        found[f"shared_{size}"] = lambda words, size=size: move(words, size)
        found[f"global_{size}"] = lambda words, size=size: np.tile(move(words, size), 2)
    return found | copy_model.expected()
