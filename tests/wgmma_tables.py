"""What wgmma does, stated once more, from the PTX manual and CuTe's canonical layouts alone.

Written in numpy, not from csrc: the tests hold the emulator against it. Words are in the order that
csrc/driver/conformance_wgmma.cu states.
"""

from __future__ import annotations

import fragment_tables as manual
import numpy as np
from fragment_tables import Numbers, Words
from numpy.typing import NDArray

THREADS = 128
WARP_OF_GROUP = (np.arange(THREADS) // 32)[:, None]
GROUP = (np.arange(THREADS) % 32 >> 2)[:, None]  # "groupID = %laneid >> 2"
IN_GROUP = (np.arange(THREADS) % 4)[:, None]  # "threadID_in_group = %laneid % 4"
SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # "swizzle mode": none, 128, 64, 32 bytes
SIZES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1}


def accumulators(columns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """D of every shape: (row, column) of element i of a thread, [128, columns / 2] each."""
    i = np.arange(columns // 2)
    row = 16 * WARP_OF_GROUP + GROUP + np.where(i % 4 < 2, 0, 8)
    return row, 8 * (i // 4) + IN_GROUP * 2 + (i & 1)


def fragment(kind: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A in registers: (row, k) of element i of a thread, [128, 16 / bytes] each."""
    held = 4 // SIZES[kind]  # elements of a register
    i = np.arange(4 * held)
    register = i // held
    row = 16 * WARP_OF_GROUP + GROUP + np.where(register % 2 == 0, 0, 8)
    return row, IN_GROUP * held + i % held + np.where(register < 2, 0, 4 * held)


def addresses(parameters: Words, extent: int, kind: str) -> NDArray[np.int64]:
    """Byte offsets of the elements of an operand in shared memory, [extent, depth].

    CuTe, make_gmma_desc: with T elements of 16 bytes, K-major ((8, m), (T, 2)) : ((S, SBO), (1, LBO
    or T)); MN-major ((T, S / T, m), (8, 2)) : ((1, T, LBO), (S, SBO)), and without a swizzle ((T,
    m), (8, 2)) : ((1, SBO), (T, LBO)). The swizzle XORs bits 4-6 with bits 7-9.
    """
    start, leading, stride, mode, base, where = (int(word) for word in parameters)
    size, span = SIZES[kind], SPANS[mode]
    chunk = 16 // size
    x, k = np.indices((extent, 32 // size))
    if where == 0:
        halves = leading if span == 16 else 16
        found = x % 8 * span + x // 8 * stride + k % chunk * size + k // chunk * halves
    elif span == 16:
        found = x % chunk * size + x // chunk * stride + k % 8 * 16 + k // 8 * leading
    else:
        wide = span // size
        found = x % wide * size + x // wide * leading + k % 8 * span + k // 8 * stride
    found += start
    return found ^ ((found >> 7) - base & span // 16 - 1) << 4


def from_e4m3(codes: NDArray[np.uint8]) -> Numbers:
    """Alternate Floating-Point Data Formats: e4m3, no infinity, one NaN of either sign."""
    exponent, fraction = (codes >> 3 & 15).astype(int), (codes & 7).astype(np.float64)
    normal = (1 + fraction / 8) * np.exp2(exponent - 7.0)
    value = np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)
    value = np.where(codes & 127 == 127, np.nan, value)
    return np.where(codes & 128, -value, value)


def from_words(words: Words, kind: str) -> Numbers:
    """[..., n] words -> the elements in them."""
    if kind == "bf16":
        return manual.from_bf16(words)
    if kind == "f16":
        return manual.from_f16(words)
    if kind == "tf32":
        return manual.from_tf32(words)
    return from_e4m3(words.view(np.uint8))


def operands(words: Words, kind: str, columns: int) -> tuple[Numbers, Numbers, Numbers]:
    """A [64, k], B [k, columns] and C [64, columns] of one case."""
    memory = 16 + 4 * THREADS + columns // 2 * THREADS
    image = from_words(words[memory:], kind)
    size = SIZES[kind]
    if words[5] == 2:
        a = np.full((64, 32 // size), np.nan)
        a[fragment(kind)] = from_words(words[16 : 16 + 4 * THREADS].reshape(THREADS, 4), kind)
    else:
        a = image[addresses(words[0:6], 64, kind) // size]
    b = image[addresses(words[6:12], columns, kind) // size].T
    c = np.full((64, columns), np.nan)
    sums = words[memory - columns // 2 * THREADS : memory].reshape(THREADS, -1)
    c[accumulators(columns)] = manual.from_float32(sums)
    return a, b, c if words[12] else np.zeros_like(c)


def product(words: Words, kind: str, columns: int) -> tuple[Numbers, Numbers]:
    """Of each case the words of D in float64, and the sums of the terms' sizes, [cases, words]."""
    exact, sizes = [], []
    table = accumulators(columns)
    for case in words:
        a, b, c = operands(case, kind, columns)
        exact.append((a @ b + c)[table].reshape(-1))
        sizes.append((np.abs(a) @ np.abs(b) + np.abs(c))[table].reshape(-1))
    return np.stack(exact), np.stack(sizes)


def exact_words(words: Words, kind: str, columns: int) -> Words:
    """The same where every sum is exact."""
    return product(words, kind, columns)[0].astype(np.float32).view(np.uint32)


def groups(words: Words) -> Words:
    """Two sums of two products each, of operands of 128 bytes a row."""
    found = []
    for case in words:
        image = manual.from_f16(case)

        def operand(start: int, extent: int, image: Numbers = image) -> Numbers:
            parameters = np.array([start, 0, 1024, 1, 0, 0], np.uint32)
            return image[addresses(parameters, extent, "f16") // 2]

        a = [operand(start, 64) for start in (0, 8192)]
        b = [operand(start, 8).T for start in (16384, 17408)]
        sums = a[0] @ b[0] + a[1] @ b[1], a[1] @ b[0] + a[0] @ b[1]
        found.append(np.concatenate([d[accumulators(8)].reshape(-1) for d in sums]))
    return np.stack(found).astype(np.float32).view(np.uint32)
