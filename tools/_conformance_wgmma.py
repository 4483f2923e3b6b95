"""The words that wgmma, its groups and setmaxnreg are tried on.

The order of the words is that of the kernels in csrc/driver/conformance_wgmma.cu. Shared memory is
full of elements, so that an operand may lie anywhere in it; what differs is how it lies.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

ROWS = 64
PARAMETERS = 16
K_MAJOR, MN_MAJOR, REGISTERS = range(3)
# The descriptor's field -> bytes that the swizzle permutes.
SPANS = {0: 16, 1: 128, 2: 64, 3: 32}
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1}
WIDTHS = {
    "bf16": tuple(range(8, 257, 8)),
    "f16": (16, 128),
    "tf32": (8, 72, 256),
    "e4m3": (8, 176),
}
NAMES = {f"wgmma_{kind}_{n}": (kind, n) for kind, widths in WIDTHS.items() for n in widths}
# Where its rows are tried in places that the manual leaves open; and parts of rows along N.
SHIFTED, PARTS = "wgmma_bf16_64", "wgmma_bf16_32"
SHIFTS = range(1, 10)


@dataclass(frozen=True)
class Operand:
    """How one operand lies in shared memory; the words of its descriptor.

    Attributes:
        start: of its first element, in bytes.
        leading: one of the descriptor's two distances, in bytes.
        stride: the other one.
        swizzle: the descriptor's field.
        base_offset: the descriptor's field.
        where: K_MAJOR, MN_MAJOR or REGISTERS.
    """

    start: int = 0
    leading: int = 0
    stride: int = 0
    swizzle: int = 0
    base_offset: int = 0
    where: int = K_MAJOR

    @property
    def words(self) -> list[int]:
        """In the kernel's order."""
        return [
            self.start,
            self.leading,
            self.stride,
            self.swizzle,
            self.base_offset,
            self.where,
        ]


def image_bytes(columns: int) -> int:
    """Shared memory of the kernel for so many columns."""
    return 128 * (max(columns, ROWS) + 32)


def small(rng: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    """Integers that each kind holds exactly."""
    return rng.integers(-8, 9, shape).astype(np.float64)


def numbers(rng: np.random.Generator, kind: str, *shape: int) -> NDArray[np.float64]:
    """Of either sign, with the kind's bits, between 1/16 and 16."""
    bits = 7 if kind == "bf16" else 10
    fraction = rng.integers(1 << bits, 2 << bits, shape) / (1 << bits)
    return rng.choice([-1.0, 1.0], shape) * fraction * np.exp2(rng.integers(-4, 4, shape))


def pack(rng: np.random.Generator, values: NDArray[np.float64], kind: str) -> Words:
    """[cases, n] elements that the kind holds exactly -> [cases, words].

    TF32's low 13 bits, which do not count, are random.
    """
    if kind == "tf32":
        noise = rng.integers(0, 1 << 13, values.shape, dtype=np.uint32)
        return values.astype(np.float32).view(np.uint32) | np.where(values == 0, 0, noise)
    if kind == "bf16":
        words = (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    elif kind == "f16":
        words = values.astype(np.float16).view(np.uint16)
    else:
        words = e4m3(values)
    return np.ascontiguousarray(words).view(np.uint32)


def e4m3(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Integers of up to four bits -> their bytes: sign, 4 bits of exponent (bias 7), 3 bits."""
    fraction, exponent = np.frexp(np.abs(values))  # [0.5, 1) 2^exponent
    bits = ((exponent + 6) << 3) + ((fraction * 2 - 1) * 8).astype(int)
    return (np.where(values == 0, 0, bits) + 128 * (values < 0)).astype(np.uint8)


def place(
    rng: np.random.Generator, extent: int, where: int, swizzle: int, room: int, size: int
) -> Operand:
    """An operand of so many rows or columns, somewhere in `room` bytes, as the manual allows.

    Args:
        rng: for the distances and the start.
        extent: of M or N.
        where: K_MAJOR or MN_MAJOR.
        swizzle: the descriptor's field.
        room: bytes of shared memory.
        size: bytes of an element.
    """
    span = SPANS[swizzle]
    groups = extent // 8
    if swizzle == 0:
        # Two distances, of eight rows and of the second half of K: one inside of the other.
        pad = 16 * int(rng.integers(0, 3))
        tight = [(128 + pad, groups * (128 + pad)), (256 + pad, 128)]
        eights, halves = tight[int(rng.integers(2))]
        end = (groups - 1) * eights + halves + 128
        leading, stride, unit = halves, eights, 16
    elif where == K_MAJOR:
        stride = 8 * span * (1 + int(rng.integers(2)))
        if (groups - 1) * stride + 8 * span > room:
            stride = 8 * span
        leading, unit, end = 16 * int(rng.integers(2)), 8 * span, (groups - 1) * stride + 8 * span
    else:
        spans = -(-extent * size // span)
        leading, stride = [(16 * span, 8 * span), (8 * span, spans * 8 * span)][
            int(rng.integers(2))
        ]
        unit, end = 8 * span, (spans - 1) * leading + stride + 8 * span
    start = unit * int(rng.integers(0, (room - end) // unit + 1))
    if where == K_MAJOR and swizzle != 0:  # some steps of 32 bytes along K
        start += 32 * int(rng.integers(0, span // 32))
    return Operand(start, leading, stride, swizzle, 0, where)


def layouts(
    rng: np.random.Generator, kind: str, columns: int, count: int, first: int
) -> list[tuple[Operand, Operand]]:
    """Operands that lie in each of the allowed ways in turn, from the `first` way on."""
    majors = (K_MAJOR, MN_MAJOR) if ELEMENT_BYTES[kind] == 2 else (K_MAJOR,)
    ways = list(itertools.product((*majors, REGISTERS), SPANS, majors, SPANS))
    room, size = image_bytes(columns), ELEMENT_BYTES[kind]
    found = []
    for i in range(first, first + count):
        where_a, swizzle_a, where_b, swizzle_b = ways[i * 35 % len(ways)]  # 35: prime to 96 and 32
        in_registers = where_a == REGISTERS
        a = Operand(where=REGISTERS)
        if not in_registers:
            a = place(rng, ROWS, where_a, swizzle_a, room, size)
        found.append((a, place(rng, columns, where_b, swizzle_b, room, size)))
    return found


def input_words(
    rng: np.random.Generator,
    kind: str,
    operands: list[tuple[Operand, Operand]],
    elements: NDArray[np.float64],
    d: NDArray[np.float32],
    counts: NDArray[np.bool_],
) -> Words:
    """One case a pair of operands.

    Args:
        rng: for bits that do not count.
        kind: of the elements.
        operands: a and b of each case.
        elements: [cases, 128 threads' registers of a, then shared memory].
        d: [cases, 128 N / 2].
        counts: [cases], whether d does.
    """
    parameters = np.zeros((len(operands), PARAMETERS), np.uint32)
    for row, (a, b) in zip(parameters, operands, strict=True):
        row[:12] = a.words + b.words
    parameters[:, 12] = counts
    words = pack(rng, elements, kind)
    fragments = 128 * 4
    return np.concatenate(
        [parameters, words[:, :fragments], d.view(np.uint32), words[:, fragments:]], 1
    )


def without_signs(words: Words, kind: str, columns: int) -> Words:
    """The same products of sizes: their result is the sum of the terms' sizes."""
    mask = {"bf16": 0x7FFF7FFF, "f16": 0x7FFF7FFF, "tf32": 0x7FFFFFFF, "e4m3": 0x7F7F7F7F}[kind]
    found = words.copy()
    d = slice(PARAMETERS + 512, PARAMETERS + 512 + 64 * columns)
    sums = found[:, d] & np.uint32(0x7FFFFFFF)
    found[:, PARAMETERS:] &= np.uint32(mask)
    found[:, d] = sums
    return found


def elements_of(kind: str, columns: int) -> int:
    """Elements of a case: those of a's registers and of shared memory."""
    return (128 * 16 + image_bytes(columns)) // ELEMENT_BYTES[kind]


def integers(rng: np.random.Generator, name: str, operands: list[tuple[Operand, Operand]]) -> Words:
    """Products whose every partial sum is exact; in 8 bits the sums are short as well."""
    kind, columns = NAMES[name]
    size = 1 << (9 if kind == "e4m3" else 20)
    cases = len(operands)
    elements = small(rng, cases, elements_of(kind, columns))
    d = rng.integers(-size, size, (cases, 64 * columns)).astype(np.float32)
    return input_words(rng, kind, operands, elements, d, np.arange(cases) % 2 == 0)


def rounded(rng: np.random.Generator, name: str, operands: list[tuple[Operand, Operand]]) -> Words:
    """Products whose sums round."""
    kind, columns = NAMES[name]
    cases = len(operands)
    elements = numbers(rng, kind, cases, elements_of(kind, columns))
    d = (16 * rng.standard_normal((cases, 64 * columns))).astype(np.float32)
    return input_words(rng, kind, operands, elements, d, np.ones(cases, bool))


def shifted(swizzle: int, with_base_offset: bool) -> list[tuple[Operand, Operand]]:
    """Both operands enter a swizzled tile some rows further down.

    Args:
        swizzle: the descriptor's field.
        with_base_offset: the field says by how much; else it is 0.
    """
    span = SPANS[swizzle]
    found = []
    for shift in SHIFTS:
        starts = shift * span, (shift + 16) * span
        bases = [start >> 7 & 7 if with_base_offset else 0 for start in starts]
        a, b = (
            Operand(s, 0, 8 * span, swizzle, base) for s, base in zip(starts, bases, strict=True)
        )
        found.append((a, b))
    return found


def overlapping() -> list[tuple[Operand, Operand]]:
    """No swizzle, rows 16 bytes apart, the second half of K in the next row."""
    return [(Operand(16 * i, 16, 128), Operand(16 * i + 2048, 16, 128)) for i in range(8)]


def across(start: int) -> list[tuple[Operand, Operand]]:
    """Operand b lies along N in rows of 128 bytes, swizzled, and is entered some rows down.

    Args:
        start: in a row, in bytes.
    """
    a = Operand(where=REGISTERS)
    return [(a, Operand(128 * i + start, 1024, 1024, 1, 0, MN_MAJOR)) for i in SHIFTS]


# family -> kernel, and operands whose places the manual leaves open; the GPU's answer is reported.
QUESTIONS = {
    "rows of 128 bytes, shifted": (SHIFTED, lambda: shifted(1, with_base_offset=False)),
    "rows of 64 bytes, shifted": (SHIFTED, lambda: shifted(2, with_base_offset=False)),
    "rows of 32 bytes, shifted": (SHIFTED, lambda: shifted(3, with_base_offset=False)),
    "rows of 128 bytes, base offset": (SHIFTED, lambda: shifted(1, with_base_offset=True)),
    "rows along N, shifted": (SHIFTED, lambda: across(0)),
    "second halves of rows along N, shifted": (PARTS, lambda: across(64)),
    "overlapping halves of K": (SHIFTED, overlapping),
}


def group_words(rng: np.random.Generator, cases: int) -> Words:
    """Shared memory of the kernel of two chains in three groups."""
    return pack(rng, small(rng, cases, 18432 // 2), "f16")
