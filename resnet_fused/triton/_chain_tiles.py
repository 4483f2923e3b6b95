"""Configurations of `conv_chain`: plain values, and which of them takes a call. Needs no Triton.

A program holds a tile of pixels: all channels of what the first convolution reads, of what the
shortcut projects, and the sums of all channels of `next`. `out` it makes a chunk of channels at a
time. So each of those widths is a size of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._tiles import CACHE, MEMORY, MERGE, TENSOR, Limits, cdiv


@dataclass(frozen=True)
class Sizes:
    """A call as `choose` sees it.

    Attributes:
        pixels: N H W.
        k: channels that the first 1x1 convolution reads.
        c: channels of out.
        m: channels of next; 0 without.
        projected: channels that the shortcut projects; 0 for an identity.
        front: channels that the 3x3 convolution in front reads; 0 without one.
        out_stride: 1, or 2 where only the even pixels of out are stored.
        itemsize: bytes of an element.
        precision: of float32 products, "tf32" or "tf32x3"; "ieee" for 16-bit operands.
    """

    pixels: int
    k: int
    c: int
    m: int = 0
    projected: int = 0
    front: int = 0
    out_stride: int = 1
    itemsize: int = 2
    precision: str = "ieee"


@dataclass(frozen=True)
class Config:
    """One configuration.

    Attributes:
        pixels: of a tile.
        k: channels at most that the first convolution reads.
        chunk: channels of out that are made at a time.
        m: channels of next at most.
        warps: of a program.
        stages: chunks in flight.
        projected: channels at most that the shortcut projects, found by compiling it.
        why: what it is there for.
        spills: architectures where it does not fit the registers, found by compiling it.
        float32: whether float32 operands, each twice as wide, fit them too, likewise.
    """

    pixels: int
    k: int
    chunk: int
    m: int
    warps: int
    stages: int
    projected: int
    why: str
    spills: tuple[int, ...] = ()
    float32: bool = False

    @property
    def name(self) -> str:
        """What records call it: "128x64x64_4w3s"."""
        return f"{self.pixels}x{self.k}x{self.m}_{self.warps}w{self.stages}s"

    def plan(self, sizes: Sizes) -> dict[str, Any]:
        """What the kernel knows at compile time of a call that the configuration takes."""
        projected = block(sizes.projected)
        following = self.m if sizes.m else 0
        blocks = (self.k, 0, following, projected, 0)
        given = sizes.k, sizes.c % self.chunk, sizes.m, sizes.projected, sizes.front % FRONT_BLOCK
        return {
            "PROJECTED": projected, "NEXT": following, "FRONT": FRONT_BLOCK if sizes.front else 0,
            "OUT_STRIDE": sizes.out_stride, "EVEN": given == blocks, "PRECISION": sizes.precision,
            "BLOCK_M": self.pixels, "BLOCK_K": self.k, "BLOCK_N": self.chunk,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip

    def shared_memory(self, sizes: Sizes) -> int:
        """Bytes of shared memory that a call takes, at most.

        Tiles of pixels that stay, the weights and the shortcut of each chunk in flight, and the
        chunk on its way from the sums' layout to the stores'. The front's stages come before.
        """
        projected, following = block(sizes.projected), self.m if sizes.m else 0
        kept = self.pixels * (self.k + projected)
        flying = self.k + following + (projected or self.pixels)
        front = FRONT_BLOCK * (self.pixels + self.k) if sizes.front else 0
        operands = kept + self.stages * max(self.chunk * flying, front)
        return operands * sizes.itemsize + 4 * self.pixels * self.chunk + VECTORS


VECTORS = 2048
"""Bytes of scales and shifts in flight, and of barriers."""


def block(channels: int) -> int:
    """The block that holds so many channels: a power of two, 64 or more; 0 for none."""
    return max(64, 1 << (channels - 1).bit_length()) if channels else 0


FRONT_BLOCK = 64
"""Channels of a step of the 3x3 convolution in front."""

FRONT_WARPS = 4
"""Its taps and channels run in one loop, which Triton has been seen to miscompile on 8 warps
(pytorch#173068)."""

BOTH = 64 * 64
"""Pixels times channels of next in a tile that has a front and a projection: larger ones spill."""

WHOLE = 16
"""What channel counts must be multiples of: else Triton can't know that 16 bytes lie together, and
loads single elements."""

CONFIGS: tuple[Config, ...] = (
    Config(64, 64, 32, 64, 4, 3, 128, "64 channels, few pixels; float32", float32=True),
    Config(128, 64, 32, 64, 4, 3, 128, "64 channels: the first stage"),
    Config(
        128, 64, 64, 64, 8, 2, 128, "the first stage's first block: more products for each byte"
    ),
    Config(128, 64, 32, 128, 8, 3, 128, "the first stage's end, whose next convolution has 128"),
    Config(64, 128, 32, 128, 4, 3, 256, "128 channels with little shared memory, or few pixels"),
    Config(128, 128, 64, 128, 8, 2, 0, "128 channels: the second stage"),
    Config(
        64, 128, 32, 256, 4, 3, 64, "the second stage's end, with fewer registers", spills=(100,)
    ),
    Config(128, 128, 32, 256, 8, 3, 64, "the second stage's end", spills=(100,)),
    Config(64, 256, 32, 256, 8, 2, 64, "256 channels: the third stage, wide networks"),
)
"""Every configuration that ships: the tests, the gates and the self-check run all of them."""

BY_NAME = {one.name: one for one in CONFIGS}


def sizes_of(
    x: Tensor,
    weight: Tensor,
    projected: Tensor | None,
    next_weight: Tensor | None,
    front_weight: Tensor | None,
    out_stride: int,
    precision: str,
) -> Sizes:
    """The sizes of a call; arguments as `conv_chain.launch`'s."""
    n, _, h, w = x.shape
    return Sizes(
        n * h * w,
        weight.shape[1],
        weight.shape[0],
        0 if next_weight is None else next_weight.shape[0],
        0 if projected is None else projected.shape[1],
        0 if front_weight is None else x.shape[1],
        out_stride,
        x.element_size(),
        precision,
    )


def unfit(config: Config, sizes: Sizes, limits: Limits) -> str | None:
    """Why a configuration can't take a call on a GPU, or None."""
    if sizes.k > config.k or sizes.m > config.m or sizes.projected > config.projected:
        return (
            f"{sizes.k} channels, {sizes.m} of next and {sizes.projected} projected; at most "
            f"{config.k}, {config.m} and {config.projected} fit"
        )
    if sizes.front and config.warps > FRONT_WARPS:
        return f"a 3x3 convolution in front runs on {FRONT_WARPS} warps"
    if sizes.itemsize > 2 and not config.float32:
        return f"{config.k} channels of float32 do not fit the registers"
    if sizes.precision == "tf32x3":
        return "three TF32 products in place of one do not fit the registers"
    if sizes.front and sizes.projected and config.pixels * config.m > BOTH:
        return "a front beside a projection does not fit the registers"
    if limits.capability in config.spills:
        return f"it spills on sm_{limits.capability}"
    need = config.shared_memory(sizes)
    if need > limits.shared_memory:
        return f"{need} bytes of shared memory, {limits.shared_memory} are there"
    return None


REACHED = 0.90
"""Of `MEMORY`, by kernels that stream."""

PARTS = 384 / (128 * 256)
"""Elements that a 128 x 256 tile reads of shared memory for each product: it feeds the tensor cores
fully (see `_tiles.cost`)."""


@dataclass(frozen=True)
class Work:
    """What a call asks of the GPU in one configuration.

    Attributes:
        unique: bytes of memory, each tensor once.
        issued: bytes that its loads and stores ask of the caches, exact for active lanes where
            every block of channels is full.
        tensor: cycles of one multiprocessor's tensor cores for a tile.
        tiles: of pixels.
    """

    unique: int
    issued: int
    tensor: float
    tiles: int


def work(config: Config, sizes: Sizes) -> Work:
    """What a call asks of the GPU; arguments as `unfit`'s.

    Each program reads all weights. The front reads each pixel's nine taps, those at the image's
    edge aside.
    """
    s, pixels = sizes, sizes.pixels
    weights = s.c * (s.k + s.m + s.projected) + 9 * s.k * s.front
    vectors = 2 * (s.c * (2 if s.projected else 1) + s.m + (s.k if s.front else 0))
    read = (s.front or s.k) + (s.projected or s.c)
    written = s.c / s.out_stride**2 + s.m
    tiles = cdiv(pixels, config.pixels)
    unique = (pixels * (read + written) + weights) * s.itemsize + 4 * vectors
    taps = 8 * pixels * s.front
    issued = (pixels * (read + written) + taps + tiles * weights) * s.itemsize + 4 * tiles * vectors
    return Work(int(unique), int(issued), _tensor(config, sizes), tiles)


def _tensor(config: Config, sizes: Sizes) -> float:
    """Cycles of a tile's products: as many as their FLOP, or as shared memory feeds.

    The second product takes its rows from registers.
    """
    m, projected = config.pixels, block(sizes.projected)
    slower = {"ieee": 1, "tf32": 2, "tf32x3": 6}[sizes.precision]

    def cycles(n: int, depth: int, read: float) -> float:
        return 2 * m * n * depth * slower / TENSOR * max(1.0, read / (m * n) / PARTS)

    first = cycles(config.chunk, config.k + projected, m + config.chunk)
    second = cycles(config.m, config.chunk, config.m) if sizes.m else 0.0
    front = 9 * cycles(config.k, FRONT_BLOCK * cdiv(sizes.front, FRONT_BLOCK), m + config.k)
    return cdiv(sizes.c, config.chunk) * (first + second) + (front if sizes.front else 0.0)


def cost(config: Config, sizes: Sizes, limits: Limits) -> float:
    """Cycles that a call takes, predicted: its memory, its caches or its products, and a launch."""
    asked = work(config, sizes)
    waves = cdiv(asked.tiles, limits.multiprocessors)
    memory = asked.unique / (MEMORY * REACHED * limits.multiprocessors)
    each = max(asked.tensor, asked.issued / max(1, asked.tiles) / CACHE)
    return max(memory, waves * each) + MERGE


def choose(sizes: Sizes, limits: Limits, allowed: frozenset[str] | None = None) -> Config | str:
    """The configuration that takes a call, or why none does.

    Of those that can it is the one of the least predicted `cost`.

    Args:
        sizes: of the call.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
    """
    ragged = [n for n in (sizes.k, sizes.c, sizes.m, sizes.projected, sizes.front) if n % WHOLE]
    if ragged:
        return f"{ragged[0]} channels are no multiple of {WHOLE}"
    found, reason = [], "no configuration is left"
    for one in CONFIGS:
        if allowed is not None and one.name not in allowed:
            continue
        why = unfit(one, sizes, limits)
        if why is None:
            found.append(one)
        else:
            reason = why
    if not found:
        return reason
    return min(found, key=lambda one: cost(one, sizes, limits))
