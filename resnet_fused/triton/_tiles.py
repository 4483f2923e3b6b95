"""Configurations of the matrix kernels: plain values, and the pure functions that choose them.

Every convolution here is a product [M, T] x [T, N] whose result is cut into tiles of M x N:

| kernel       | M                     | N                    | T, the reduction          |
| ------------ | --------------------- | -------------------- | ------------------------- |
| conv_bn_act  | output pixels         | output channels      | taps x input channels     |
| conv_bn_stats| output pixels         | output channels      | taps x input channels     |
| conv_dgrad   | input pixels, a phase | input channels       | taps x output channels    |
| conv_wgrad   | output channels       | input channels       | output pixels; N per tap  |

Nothing here needs a GPU or Triton; rates and thresholds are stated with their reason, and
`docs/triton.md` says which of them hardware has confirmed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

DEPTH_BYTES = 128
"""Bytes of the reduction that a tile takes in one step: a whole cache line of each row, and the
widest shared-memory swizzle. 64 elements in 16 bits, 32 in float32."""

MAX_SPLITS = 32
"""Parts of a reduction at most; beyond, the parts of these networks are a step or two long."""

MIN_STEPS = 4
"""A pipelined loop must run longer than its stages are deep (3 or 4), or it is all prologue."""

MAX_UNROLLED_TAPS = 9
"""Unrolling copies the loop once a tap: 49 copies of it, for the stem, take minutes to compile."""

MOST_MADE = 64
"""Sums that a thread of training's gradients of an input may keep, found by compiling: beside two
operands that are made in registers, and places of the shortcut's and the raw outputs."""

E4M3_CAPABILITY = 89
"""The first compute capability, times ten, whose tensor cores multiply e4m3."""


@dataclass(frozen=True)
class Tile:
    """One configuration.

    Attributes:
        m: rows of the result.
        n: columns of the result.
        warps: warps of 32 threads that share the tile.
        stages: steps of the reduction in flight.
        why: what it is there for.
    """

    m: int
    n: int
    warps: int
    stages: int
    why: str

    @property
    def name(self) -> str:
        """What records and `explain` call it: "128x64_4w4s"."""
        return f"{self.m}x{self.n}_{self.warps}w{self.stages}s"

    @property
    def sums(self) -> int:
        """Sums that each thread keeps in registers."""
        return self.m * self.n // (32 * self.warps)

    @property
    def slices(self) -> int:
        """In how many slices of columns the sums are finished: 64 values a thread at most."""
        return max(1, self.sums // 64)


TILES: tuple[Tile, ...] = (
    Tile(128, 256, 8, 3, "256 or more channels: the input is read once for 256 of them"),
    Tile(256, 128, 8, 3, "128 channels, very many pixels: weights are read half as often"),
    Tile(128, 128, 8, 3, "the work-horse: 64 operations a byte of shared memory"),
    Tile(128, 128, 4, 3, "128 channels in short loops, which are flattened: 4 warps there"),
    Tile(256, 64, 8, 3, "64 channels, very many pixels"),
    Tile(128, 64, 4, 4, "64 channels, and short loops"),
    Tile(64, 128, 4, 4, "too few pixels to fill the GPU with 128 rows"),
    Tile(64, 64, 4, 4, "fewer still"),
    Tile(32, 64, 4, 4, "one image in the last stage: 49 pixels"),
    Tile(128, 32, 4, 4, "up to 32 channels: grouped convolutions, narrow networks"),
)
"""Every configuration that ships: the tests, the gates and the self-check run all of them."""

BY_NAME = {tile.name: tile for tile in TILES}


@dataclass(frozen=True)
class Limits:
    """What a GPU offers.

    Attributes:
        multiprocessors: how many tiles run at once, at least.
        shared_memory: bytes that one block can have.
        capability: compute capability times ten: 90 is sm_90.
        name: for messages.
    """

    multiprocessors: int
    shared_memory: int
    capability: int
    name: str = ""


@dataclass(frozen=True)
class Product:
    """A convolution as `choose` sees it.

    Attributes:
        rows: rows of the result, M.
        columns: columns of the result that can share a tile, N: the channels of one group, or of
            several groups that stand side by side.
        copies: how many such blocks of columns there are: bundles of groups, and taps in wgrad.
        depth: channels (in wgrad: pixels) of the reduction, for one tap.
        taps: taps that the reduction runs over; 1 in wgrad.
        itemsize: bytes of an operand's element.
        splittable: whether partial sums may be merged by a second kernel.
        side: groups that share a tile.
        runtime_taps: whether the taps are known at run time only: their loop is always flat.
        precision: of float32 products, "tf32" or "tf32x3"; "ieee" for 16-bit operands.
        gathered: tensors that the rows' operand is made of in registers: gradient and result in
            dgrad and wgrad, the input behind a BatchNorm; 0 where it goes straight to shared
            memory.
        narrow: whether a filter's row is one run, whose pixels are masked one by one.
        ragged: whether some channel count is no multiple of 16 bytes: loads of single elements.
        most: sums that a thread may keep, at most: fewer where an epilogue needs much beside them.
    """

    rows: int
    columns: int
    copies: int
    depth: int
    taps: int
    itemsize: int
    splittable: bool = True
    side: int = 1
    runtime_taps: bool = False
    precision: str = "ieee"
    gathered: int = 0
    narrow: bool = False
    ragged: bool = False
    most: int = 128

    @property
    def step(self) -> int:
        """Elements of the reduction in one step: `DEPTH_BYTES`, or less where there are less.

        The stem's 21 (three channels of seven taps) take 32; 64 would multiply mostly zeros. An
        instruction takes 32 bytes of a row, of 16-bit elements 16, and no fewer of others. Elements
        that are loaded one by one are 64 at most: more pointers spill.
        """
        least = 32 if self.itemsize == 1 else 16
        most = DEPTH_BYTES // self.itemsize
        if self.ragged:
            most = min(64, most)
        return min(most, max(least, 1 << (max(1, self.depth) - 1).bit_length()))

    @property
    def steps(self) -> int:
        """Steps of the reduction, for one tap."""
        return cdiv(self.depth, self.step)


@dataclass(frozen=True)
class Plan:
    """How one product runs.

    Attributes:
        tile: the configuration.
        splits: parts of the reduction, each summed by a program of its own.
        flat: whether the loops over taps and channels are one loop, else taps are unrolled.
        why: the reasons, one sentence.
    """

    tile: Tile
    splits: int
    flat: bool
    why: str

    @property
    def name(self) -> str:
        """The configuration's name with its split: "64x64_4w4s/4"."""
        return self.tile.name + (f"/{self.splits}" if self.splits > 1 else "")


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def side_by_side(columns: int, groups: int) -> int:
    """How many groups share a tile: as many as fit into 64 columns, where a group has fewer.

    A tile of 16 or 32 columns would leave the tensor cores' instructions half empty; the products
    between channels of different groups are multiplied by zero.
    """
    return 1 if groups == 1 else max(1, min(groups, 64 // columns))


def shared_memory(product: Product, tile: Tile) -> int:
    """Bytes of shared memory that the operands in flight take."""
    rows = tile.m * max(1, product.gathered)
    return tile.stages * (rows + tile.n) * product.step * product.itemsize


def most_sums(product: Product, limits: Limits) -> int:
    """How many sums a thread may keep, so that nothing spills out of its 255 registers.

    Each number was found by compiling every configuration for every architecture, and the gates
    compile them again: on sm_90 the tensor cores read their operands from shared memory, elsewhere
    they pass through registers, and on sm_100 the sums come back through them; three-term products
    need the operands' parts beside them; groups side by side keep a second tile of sums; elements
    that are loaded one by one need a pointer each.
    """
    if product.ragged:
        return 16
    if product.side > 1:
        return 32 if product.itemsize <= 2 and not product.gathered else 16
    if product.precision == "tf32x3" or product.narrow:
        return 32
    if product.itemsize == 1 and product.taps > 1 and limits.capability < 90:
        return 32
    if product.itemsize == 4 and limits.capability == 100:
        return 16 if product.gathered else 32  # operands and sums pass through registers there
    return 128 if product.itemsize == 2 and limits.capability == 90 else 64


def fits(product: Product, tile: Tile, limits: Limits) -> bool:
    """Whether a product can run in a configuration: instructions, shared memory, registers."""
    if product.itemsize == 1 and not _multiplies_e4m3(product, tile, limits.capability):
        return False
    if shared_memory(product, tile) > limits.shared_memory:
        return False
    if tile.n > 4 * max(16, product.columns):
        return False  # more than three quarters of it would be empty
    most = min(product.most, most_sums(product, limits))
    return not crowded(product, tile, limits) and tile.sums <= most


def _multiplies_e4m3(product: Product, tile: Tile, capability: int) -> bool:
    """Whether a tile's instructions do.

    wgmma's and tcgen05's have 64 rows; what Triton takes for fewer becomes 16-bit ones on sm_90.
    Those serve where elements are loaded one by one, which leaves no registers for larger tiles.
    """
    if capability < E4M3_CAPABILITY:
        return False
    return tile.m >= 64 or capability not in (90, 100) or product.ragged


def crowded(product: Product, tile: Tile, limits: Limits) -> bool:
    """Whether an operand that is made in registers leaves too few of them for the sums.

    It takes as many as sums do. One tensor, beside 64 sums a thread or fewer, may have twice the
    rows of two; on sm_90, where it is multiplied from registers, only in a loop over one tap; not
    on sm_100, where sums pass through registers as well, and not in three terms, whose parts take
    the rest: it would go through shared memory once more. More than 64 sums leave no room for the
    loops of several taps, one behind the other.
    """
    if not product.gathered:
        return False
    if tile.sums > 64 and product.taps > 1 and not product.runtime_taps:
        return True
    roomy = product.gathered == 1 and tile.sums <= 64 and product.precision != "tf32x3"
    roomy = roomy and (limits.capability != 90 or product.taps == 1) and limits.capability != 100
    return tile.m > (32 if roomy else 16) * tile.warps


def is_narrow(span: int, s: int) -> bool:
    """Whether a filter's row of s taps goes into one run: channels alone fill no instruction."""
    return s > 1 and span < 16


def is_ragged(itemsize: int, channels: int, filters: int) -> bool:
    """Whether rows of channels are no multiple of 16 bytes.

    Up to 4 input channels do not count: the stem's steps are short, and its filters are aligned.
    """
    return (channels % (16 // itemsize) > 0 and channels > 4) or filters % (16 // itemsize) > 0


# Rates of one multiprocessor of an H200 in a clock cycle; `choose` needs their proportions alone.
TENSOR = 4096 * 0.75
"""FLOP of 16-bit products, and the part of it that a loop without warp specialisation keeps."""
CACHE = 28
"""Bytes from L2, when all multiprocessors read different lines."""
MEMORY = 22
"""Bytes from memory."""
LATENCY = 800
"""Cycles until a load from L2 or memory has come."""
MERGE = 3000
"""Cycles of one launch more."""
MOST_ROWS_IN_PARTS = 128
"""Of a tile whose reduction is cut: larger ones are for so many pixels that none is, and beside the
loops of several taps would spill."""


def cost(product: Product, tile: Tile, splits: int, limits: Limits) -> float:
    """Cycles that a product takes, predicted: the waves of tiles, each step of each at its limit.

    A step's limit is the tensor cores, whose operands a large tile reads from shared memory less
    often, or the cache, or the latency of its loads over the stages and blocks that hide it.
    """
    steps = product.taps * cdiv(product.steps, splits)
    tiles = cdiv(product.rows, tile.m) * cdiv(product.columns, tile.n) * product.copies
    waves = cdiv(tiles * splits, limits.multiprocessors)
    feed = min(1.0, tile.m * tile.n / (tile.m + tile.n) / (128 * 256 / 384))
    slower = {"ieee": 1, "tf32": 2, "tf32x3": 6}[product.precision]
    rate = TENSOR * (2 if product.itemsize == 1 else 1)
    tensor = 2 * tile.m * tile.n * product.step * slower / (rate * feed)
    cache = (tile.m + tile.n) * product.step * product.itemsize / CACHE
    resident = min(waves, max(1, limits.shared_memory // shared_memory(product, tile)))
    latency = LATENCY / ((tile.stages - 1) * resident)
    size = product.itemsize if splits == 1 else 4
    ends = LATENCY + tile.m * tile.n * size / MEMORY
    total = waves * (steps * max(tensor, cache, latency) + ends)
    if splits > 1:
        sums = product.rows * product.columns * product.copies
        total += MERGE + sums * 4 * (splits + 1) / (CACHE * limits.multiprocessors)
    return total


@functools.lru_cache(maxsize=4096)
def choose(product: Product, limits: Limits, allowed: frozenset[str] | None = None) -> Plan:
    """Picks tile, splits and loop of a product: those of the least predicted `cost`.

    Short loops (see `MIN_STEPS`) run over all taps in one, and so do three-term products: beside
    the parts of their operands, unrolled taps spill. Those tiles have 4 warps, since Triton has
    been seen to miscompile flattened convolution loops on 8 (pytorch#173068).

    Args:
        product: the sizes.
        limits: the GPU's.
        allowed: names of the configurations that may be used; None allows all.

    Raises:
        LookupError: no configuration is left.
    """
    best = min(candidates(product, limits, allowed), key=lambda one: one[0], default=None)
    if best is None:
        raise LookupError(
            f"none of the {len(TILES)} configurations is left for this call: "
            f"{limits.shared_memory} bytes of shared memory"
        )
    _, tile, splits, flat = best
    return Plan(tile, splits, flat, _reason(product, tile, splits, flat, limits))


def candidates(
    product: Product, limits: Limits, allowed: frozenset[str] | None = None
) -> list[tuple[float, Tile, int, bool]]:
    """All ways to run a product: (predicted `cost`, tile, splits, whether the loop is flat).

    The arguments are those of `choose`.
    """
    steps, found = product.steps, []
    for tile in TILES:
        if not fits(product, tile, limits) or (allowed is not None and tile.name not in allowed):
            continue
        for splits in _splits(product, steps):
            if splits > 1 and tile.m > MOST_ROWS_IN_PARTS:
                continue
            flat = product.taps > 1 and (
                cdiv(steps, splits) < MIN_STEPS
                or product.taps > MAX_UNROLLED_TAPS
                or product.runtime_taps
                or product.precision == "tf32x3"
            )
            if not (flat and tile.warps > 4):
                found.append((cost(product, tile, splits, limits), tile, splits, flat))
    return found


@functools.lru_cache(maxsize=4096)
def planned(product: Product, limits: Limits, name: str, splits: int, why: str) -> Plan | None:
    """The plan of one configuration and split, or None where they can't take the product.

    Args:
        product: the sizes.
        limits: the GPU's.
        name: of the configuration.
        splits: parts of the reduction.
        why: the reason.
    """
    for _, tile, parts, flat in candidates(product, limits, frozenset({name})):
        if parts == splits:
            return Plan(tile, splits, flat, why)
    return None


def _splits(product: Product, steps: int) -> list[int]:
    """Into how many parts the reduction may be cut: every part has work, the last may have less."""
    if not product.splittable:
        return [1]
    return sorted({cdiv(steps, cdiv(steps, splits)) for splits in range(1, MAX_SPLITS + 1)})


def _reason(product: Product, tile: Tile, splits: int, flat: bool, limits: Limits) -> str:
    tiles = cdiv(product.rows, tile.m) * cdiv(product.columns, tile.n) * product.copies
    why = f"least predicted time: {tiles * splits} programs on {limits.multiprocessors}"
    if splits > 1:
        why += f", the reduction in {splits} parts"
    if product.taps > 1:
        why += ", one loop over taps and channels" if flat else ", a loop for each tap"
    return why
