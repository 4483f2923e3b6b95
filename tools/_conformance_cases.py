"""The words that each instruction of csrc/ptx is tried on, and how two results are compared.

The order of the words is that of the kernels in csrc/driver/conformance_*.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import _conformance_wgmma as wgmma
import numpy as np
from _conformance_tma import copies
from numpy.typing import NDArray

Words = NDArray[np.uint32]

WARP = 32
# Sign-less bits of fp32 that rounding and special rules hang on: zeros, subnormals, the smallest
# normal, ones, the largest finite, infinity, NaN with payload bits low, high and everywhere.
_SPECIAL = """
    0 1 FFF 1000 7FFFFF 800000 3F800000 3F800FFF 3F801000 3F801001 3FFFFFFF 7F7FEFFF 7F7FFFFF
    7F800000 7F802000 7FC00000 7FC01234 7FFFFFFF"""
SPECIAL_FLOATS = np.array([int(text, 16) for text in _SPECIAL.split()], np.uint32)
MMA = {"mma_m16n8k16_bf16": "bf16", "mma_m16n8k16_f16": "f16", "mma_m16n8k8_tf32": "tf32"}
MMA_WORDS = 12  # a lane: a[4], b[2], d[4], two unused
TF32_MASK = np.uint32(0xFFFFE000)


@dataclass(frozen=True)
class Cases:
    """Inputs of one instruction that are compared in one way.

    Attributes:
        instruction: its name in csrc/driver/conformance_*.cu.
        family: what the inputs have in common.
        words: [cases, words of a case].
        compare: "bits", "floats" (a NaN equals a NaN), "products" (within the error of a sum) or
            "question" (bits that the manual leaves open: the answer is told, none is wrong).
        sizes: of products, the same cases without signs: their result is the sum of the terms'
            sizes.
        depth: of products, terms of a sum.
    """

    instruction: str
    family: str
    words: Words
    compare: str = "bits"
    sizes: Words | None = None
    depth: int = 0


def bits(rng: np.random.Generator, *shape: int) -> Words:
    """Uniform words."""
    return rng.integers(0, 1 << 32, shape, dtype=np.uint32)


def order(rng: np.random.Generator, cases: int, count: int) -> Words:
    """[cases, count]: each row holds 0 .. count - 1 in an order of its own."""
    return np.argsort(rng.random((cases, count)), axis=1).astype(np.uint32)


def below(rng: np.random.Generator, bound: int, *shape: int) -> Words:
    """Uniform words under a bound."""
    return rng.integers(0, bound, shape, dtype=np.uint32)


def special_floats(rng: np.random.Generator, *shape: int) -> Words:
    """Half of them uniform, half special, with either sign."""
    special = rng.choice(SPECIAL_FLOATS, shape)
    special |= below(rng, 2, *shape) << np.uint32(31)
    return np.where(rng.random(shape) < 0.5, special, bits(rng, *shape)).astype(np.uint32)


def masks(rng: np.random.Generator, cases: int) -> Words:
    """[cases]: the whole warp, single lanes, and any other set of lanes but the empty one."""
    found = np.maximum(bits(rng, cases), 1)
    found[::4] = 0xFFFFFFFF
    found[1::8] = np.uint32(1) << below(rng, WARP, len(found[1::8]))
    return found.astype(np.uint32)


def members(rng: np.random.Generator, mask: Words) -> Words:
    """[cases, 32]: for each lane some lane of the mask."""
    rows = [rng.choice([i for i in range(WARP) if int(m) >> i & 1], WARP) for m in mask]
    return np.array(rows, np.uint32)


def joined(*parts: Words) -> Words:
    """Parts [cases, n] side by side, padded to whole groups of four words."""
    words = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    pad = -words.shape[1] % 4
    return np.pad(words, ((0, 0), (0, pad))).astype(np.uint32)


# ---- Shared memory and matrices


def ldmatrix(rng: np.random.Generator, cases: int) -> Words:
    """Rows, and for each lane the row whose address it passes."""
    return joined(bits(rng, cases, 128), below(rng, 32, cases, WARP))


def stmatrix(rng: np.random.Generator, cases: int) -> Words:
    """Registers, and for each lane the row whose address it passes."""
    return joined(bits(rng, cases, 128), order(rng, cases, WARP))


def cp_async(rng: np.random.Generator, cases: int) -> Words:
    """Slots before, sources, validity, target slots."""
    return joined(
        bits(rng, cases, 128),
        bits(rng, cases, 128),
        below(rng, 2, cases, 32),
        order(rng, cases, 32),
    )


def cp_async_mbarrier(rng: np.random.Generator, cases: int) -> Words:
    """Words, which one each lane copies, whose copy it reads."""
    return joined(bits(rng, cases, 64), below(rng, 64, cases, 32), below(rng, 32, cases, 32))


def moves(rng: np.random.Generator, cases: int) -> Words:
    """Words, and for each lane the element it loads and the place where it stores it."""
    return joined(bits(rng, cases, 128), below(rng, 32, cases, 32), order(rng, cases, 32))


# ---- Matrix products


def pack_half(values: NDArray[np.float64], kind: str) -> Words:
    """Pairs of exactly representable numbers [..., 2] -> words, the first in the lower half."""
    if kind == "f16":
        halves = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        halves = values.astype(np.float32).view(np.uint32) >> np.uint32(16)
    return halves[..., 0] | halves[..., 1] << np.uint32(16)


def pack(values: NDArray[np.float64], kind: str) -> Words:
    """Numbers [cases, 32, registers, elements of a register] -> words, rounded toward zero.

    Args:
        values: what the operand's registers are to hold; in fp16 exactly representable.
        kind: "bf16", "f16" or "tf32".
    """
    if kind == "tf32":
        return values[..., 0].astype(np.float32).view(np.uint32) & TF32_MASK
    return pack_half(values, kind)


def product_words(
    kind: str, a: NDArray[np.float64], b: NDArray[np.float64], d: NDArray[np.float64]
) -> Words:
    """Operands as numbers -> [cases, 384] words."""
    cases = len(d)
    lanes = np.zeros((cases, WARP, MMA_WORDS), np.uint32)
    lanes[:, :, 0:4] = pack(a, kind)
    lanes[:, :, 4:6] = pack(b, kind)
    lanes[:, :, 6:10] = d.astype(np.float32).view(np.uint32)
    return lanes.reshape(cases, -1)


def short(rng: np.random.Generator, kind: str, low: int, high: int, *shape: int):
    """Numbers of either sign with few enough bits for `kind`, exponents in [low, high)."""
    fraction_bits = 7 if kind == "bf16" else 10
    fraction = rng.integers(1 << fraction_bits, 2 << fraction_bits, shape) / (1 << fraction_bits)
    sign = rng.choice([-1.0, 1.0], shape)
    return sign * fraction * np.exp2(rng.integers(low, high, shape).astype(np.float64))


def products(rng: np.random.Generator, cases: int, name: str) -> list[Cases]:
    """Four families of operands for one mma."""
    kind = MMA[name]
    pair = 1 if kind == "tf32" else 2
    a_shape, b_shape, d_shape = (cases, WARP, 4, pair), (cases, WARP, 2, pair), (cases, WARP, 4)
    integers = product_words(
        kind,
        rng.integers(-8, 9, a_shape).astype(np.float64),
        rng.integers(-8, 9, b_shape).astype(np.float64),
        rng.integers(-(1 << 20), 1 << 20, d_shape).astype(np.float64),
    )
    numbers = product_words(
        kind,
        short(rng, kind, -4, 4, *a_shape),
        short(rng, kind, -4, 4, *b_shape),
        rng.standard_normal(d_shape) * 16,
    )
    anything = bits(rng, cases, WARP, MMA_WORDS)
    # A third of d is of the products' common size, so that it is neither all nor nothing.
    anything[:, :, 6:10] = np.where(
        rng.random(d_shape) < 0.3, special_floats(rng, *d_shape), anything[:, :, 6:10]
    )

    def rounding(family: str, words: Words) -> Cases:
        return Cases(name, family, words, "products", sizes(words, kind), 8 * pair)

    return [
        Cases(name, "integers", integers),
        rounding("numbers", numbers),
        rounding("any bits", anything.reshape(cases, -1)),
        rounding("one product", one_product(rng, cases, kind)),
    ]


def sizes(words: Words, kind: str) -> Words:
    """The same products without signs."""
    lanes = words.reshape(-1, WARP, MMA_WORDS).copy()
    lanes[:, :, 0:6] &= np.uint32(0x7FFFFFFF if kind == "tf32" else 0x7FFF7FFF)
    lanes[:, :, 6:10] &= np.uint32(0x7FFFFFFF)
    return lanes.reshape(len(lanes), -1)


def wide_products(rng: np.random.Generator, count: int) -> list[Cases]:
    """Of every width of wgmma; each layout comes up in some of them."""
    found = []
    for i, (name, (kind, columns)) in enumerate(wgmma.NAMES.items()):
        ways = wgmma.layouts(rng, kind, columns, 2 * count, 2 * count * i)
        exact = ways if kind == "e4m3" else ways[:count]  # sums of e4m3 round in another way
        found.append(Cases(name, "integers", wgmma.integers(rng, name, exact)))
        if kind == "e4m3":
            continue
        words = wgmma.rounded(rng, name, ways[count:])
        unsigned = wgmma.without_signs(words, kind, columns)
        depth = 32 // wgmma.ELEMENT_BYTES[kind]
        found.append(Cases(name, "numbers", words, "products", unsigned, depth))
    for family, (name, operands) in wgmma.QUESTIONS.items():
        words = wgmma.integers(rng, name, operands())
        found.append(Cases(name, family, words, "question"))
    return found


def one_product(rng: np.random.Generator, cases: int, kind: str) -> Words:
    """Sums of two terms, d and one product some 2^-20 of it: their last bit shows the rounding.

    b is zero but for its row k = 0, which the lanes 0, 4, 8, ... hold in the lower half of b[0].
    """
    pair = 1 if kind == "tf32" else 2
    b = np.zeros((cases, WARP, 2, pair))
    b[:, ::4, 0, 0] = short(rng, kind, -12, -8, cases, 8)
    d = rng.uniform(1, 2, (cases, WARP, 4)) * rng.choice([-1.0, 1.0], (cases, WARP, 4))
    return product_words(kind, short(rng, kind, -12, -8, cases, WARP, 4, pair), b, d)


def tf32_inputs(rng: np.random.Generator, cases: int) -> Words:
    """Every exponent with either sign; most fractions at or beside a tie, some next to 0."""
    count = cases * WARP
    exponents = np.arange(count, dtype=np.uint32) % np.uint32(512) << np.uint32(23)
    fractions = below(rng, 1 << 23, count)
    kept = np.where(rng.random(count) < 0.3, 0, fractions & TF32_MASK)
    beside = kept + rng.choice(np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32), count)
    words = exponents | np.where(rng.random(count) < 0.7, beside, fractions).astype(np.uint32)
    return words.reshape(cases, WARP)


# ---- Warps and blocks


def shuffles(rng: np.random.Generator, cases: int, name: str) -> Words:
    """Values, operands (with bits that do not count) and masks; sources lie in the mask."""
    mask = masks(rng, cases)
    lanes = np.arange(WARP, dtype=np.uint32)
    if name == "shuffle":
        operand = members(rng, mask)
    elif name == "shuffle_xor":
        operand = members(rng, mask) ^ lanes
    else:  # a lane outside of the mask is no source, so these take the whole warp
        mask[:] = 0xFFFFFFFF
        operand = below(rng, 32, cases, WARP)
    noise = below(rng, 1 << 26, cases, WARP) << np.uint32(5)  # five bits count
    return joined(bits(rng, cases, WARP), operand | noise, mask[:, None])


def votes(rng: np.random.Generator, cases: int) -> Words:
    """Predicates, mostly all alike within a case, and masks."""
    share = rng.choice([0.0, 0.03, 0.5, 0.97, 1.0], (cases, 1))
    return joined((rng.random((cases, WARP)) < share).astype(np.uint32), masks(rng, cases)[:, None])


def sync_warp(rng: np.random.Generator, cases: int) -> Words:
    """Values, the lane that each lane reads, masks."""
    mask = masks(rng, cases)
    return joined(bits(rng, cases, WARP), members(rng, mask), mask[:, None])


def exchange(rng: np.random.Generator, cases: int, threads: int) -> Words:
    """A value of each thread, and the thread that each thread reads."""
    return joined(bits(rng, cases, threads), below(rng, threads, cases, threads))


def barrier_sync(rng: np.random.Generator, cases: int) -> Words:
    """Two halves that keep to themselves, and their two barriers of 1 to 15."""
    source = below(rng, 64, cases, 128)
    source[:, 64:] += 64
    barriers = 1 + order(rng, cases, 15)[:, :2]
    return joined(bits(rng, cases, 128), source, barriers)


def barrier_arrive(rng: np.random.Generator, cases: int) -> Words:
    """Values, sources and a barrier."""
    return joined(exchange(rng, cases, 64), 1 + below(rng, 15, cases, 1))


def atomics(rng: np.random.Generator, cases: int, floats: bool) -> Words:
    """Values before, places, addends of the places and of the common place 32."""
    before = special_floats(rng, cases, 36) if floats else bits(rng, cases, 36)
    addends = special_floats(rng, cases, 32) if floats else bits(rng, cases, 32)
    common = below(rng, 1000, cases, 32)
    if floats:  # integers: their sum is exact in any order
        before[:, 32] = np.float32(7).view(np.uint32)
        common = common.astype(np.float32).view(np.uint32)
    before[:, 33:] = 0
    return joined(before, order(rng, cases, 32), addends, common)


def all_cases(seed: int = 0, cases: int = 64) -> list[Cases]:
    """Inputs of every instruction.

    Args:
        seed: of the random bits.
        cases: blocks an instruction and family.
    """
    rng = np.random.default_rng(seed)
    simple: dict[str, Callable[[], Words]] = {
        "to_tf32": lambda: tf32_inputs(rng, max(4 * cases, 64)),
        "sync_warp": lambda: sync_warp(rng, cases),
        "sync_threads": lambda: exchange(rng, cases, 128),
        "barrier_sync": lambda: barrier_sync(rng, cases),
        "barrier_arrive": lambda: barrier_arrive(rng, cases),
        "grid_dependency": lambda: bits(rng, cases, 32),
        "setmaxnreg": lambda: bits(rng, cases, 256),
        "cp_async_groups": lambda: bits(rng, cases, 512),
        "cp_async_mbarrier": lambda: cp_async_mbarrier(rng.spawn(1)[0], cases),
        "store_release_load_acquire": lambda: exchange(rng, cases, 32),
        "fence_acq_rel_gpu": lambda: exchange(rng, cases, 32),
        "reduce_add_release": lambda: exchange(rng.spawn(1)[0], cases, 32),
        "atomic_add": lambda: atomics(rng, cases, floats=False),
        "atomic_add_acq_rel": lambda: atomics(rng, cases, floats=False),
    }
    for name in ("ldmatrix_x4", "ldmatrix_x4_trans", "ldmatrix_x2", "ldmatrix_x2_trans"):
        simple[name] = lambda: ldmatrix(rng, cases)
    for name in ("stmatrix_x4", "stmatrix_x4_trans"):
        simple[name] = lambda: stmatrix(rng, cases)
    for name in ("shuffle", "shuffle_xor", "shuffle_down", "shuffle_up"):
        simple[name] = lambda name=name: shuffles(rng, cases, name)
    for name in ("ballot", "any", "all"):
        simple[name] = lambda: votes(rng, cases)
    for size in (4, 8, 16):
        simple[f"cp_async_{size}"] = lambda: cp_async(rng, cases)
    for size in (1, 2, 4, 8, 16):
        simple[f"global_{size}"] = lambda: moves(rng, cases)
        simple[f"shared_{size}"] = lambda: moves(rng, cases)
    found = [Cases(name, "any bits", make()) for name, make in simple.items()]
    found += [Cases(name, "any bits", words) for name, words in copies(rng, cases).items()]
    floats = atomics(rng, cases, floats=True)
    found.append(Cases("atomic_add_float", "any bits", floats, "floats"))
    for name in MMA:
        found += products(rng, cases, name)
    found.append(Cases("wgmma_groups", "integers", wgmma.group_words(rng, cases)))
    found += wide_products(rng, max(cases // 12, 2))
    return found
