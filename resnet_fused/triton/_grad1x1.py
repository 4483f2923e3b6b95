"""Which 1x1 convolutions have both gradients made by one kernel, and what that saves.

Pure functions of sizes and limits: no GPU, no Triton. The layers that run, `explain` and the
predictions ask the same ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from . import _tiles

PIXELS, WARPS, STAGES = 64, 8, 2
"""Of a tile, of a program, tiles in flight. 128 pixels of 128 channels would spill on sm_90."""

PIECE = 8
"""Channels that a thread loads at a time: one by one they would need a pointer each, and spill."""

MOST_REREADS = 4
"""How many programs may read the same dz and y: beyond, the cache would be busier with them than
memory is with all else."""

SUM = 4
"""Bytes of a sum: float32."""


@dataclass(frozen=True)
class Config:
    """One configuration.

    Attributes:
        filters: that a program holds: all there are.
        channels: of a program.
        slices: of columns in which a tile of dx is finished.
        shared: bytes of shared memory that it takes in 16 bits, at most, found by compiling it.
        capabilities: architectures where it does not spill, found likewise: their tensor cores
            read shared memory, where others take the operands of both products through registers.
            On sm_100 the sums of dweight pass through them too.
    """

    filters: int
    channels: int
    slices: int
    shared: int
    capabilities: tuple[int, ...]

    @property
    def name(self) -> str:
        """What records call it: "64x128_8w2s"."""
        return f"{self.filters}x{self.channels}_{WARPS}w{STAGES}s"


CONFIGS = (
    Config(64, 128, 2, 80 * 1024, (90, 100)),
    Config(128, 128, 2, 128 * 1024, (90, 100)),
    Config(256, 64, 1, 176 * 1024, (90,)),
)
"""Of those that hold all filters the first is taken. Each thread keeps 32 or 64 sums of dweight."""

BY_NAME = {one.name: one for one in CONFIGS}


def serves(
    filters: int,
    channels: int,
    itemsize: int,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None = None,
    configs: tuple[Config, ...] = CONFIGS,
) -> Config | None:
    """The configuration that takes a 1x1 convolution of stride 1, or None: then two kernels do.

    Multiples of 8 channels, up to 256 filters (128 on sm_100), in 16 bits and up to `MOST_REREADS`
    programs side by side: of ResNet-50 all 1x1 layers of the first stage and those that reduce to
    128 channels. What it saves is the second reading of dz, y and x: of an expanding layer's bytes
    almost half, of a reducing one's an eighth.

    Args:
        filters: K.
        channels: C.
        itemsize: bytes of an element.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
        configs: all there are, in order.
    """
    if itemsize != 2 or filters % PIECE or channels % PIECE:
        return None
    for one in configs:
        if one.filters >= filters and limits.capability in one.capabilities:
            few = _tiles.cdiv(channels, one.channels) <= MOST_REREADS
            fits = few and one.shared <= limits.shared_memory
            return one if fits and (allowed is None or one.name in allowed) else None
    return None


def programs(pixels: int, channels: int, config: Config, limits: _tiles.Limits) -> tuple[int, int]:
    """How many programs share the pixels, and how many read the same ones side by side."""
    tiles, across = _tiles.cdiv(pixels, PIXELS), _tiles.cdiv(channels, config.channels)
    return max(1, min(tiles, limits.multiprocessors // across)), across


@dataclass(frozen=True)
class Verdict:
    """How the gradients of a 1x1 convolution are made.

    Attributes:
        config: of the one kernel that makes both; None: two kernels do.
        why: one clause.
    """

    config: Config | None
    why: str


def again_bytes(
    pixels: int, filters: int, channels: int, itemsize: int, *, affine: bool, masked: bool
) -> int:
    """Bytes that the second of two kernels reads again: dz and y, and x where dx is masked by it.

    Args:
        pixels: N H W.
        filters: K.
        channels: C.
        itemsize: bytes of an element.
        affine: whether y is read beside dz.
        masked: whether x is the raw output below, of which the mask of dx is made.
    """
    return pixels * (filters * (1 + affine) + channels * masked) * itemsize


@functools.lru_cache(maxsize=4096)
def choose(
    pixels: int,
    filters: int,
    channels: int,
    itemsize: int,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None = None,
    *,
    affine: bool = True,
    masked: bool = False,
) -> Verdict:
    """Whether one kernel should make both gradients of a 1x1 convolution of stride 1.

    It should where it takes the sizes, has a tile of pixels for every multiprocessor, and moves
    fewer bytes: what two kernels would read again must be more than what its programs' sums of
    dweight, written and read, are above those of `conv_bn_wgrad`. There is one set of sums a
    program however small the batch is, so that a batch of few images goes to two kernels. The rule
    is arithmetic, not measured: what `_tuned` knows of a GPU overrules it.

    Args:
        pixels: N H W.
        filters: K.
        channels: C.
        itemsize: bytes of an element.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
        affine: whether BatchNorm's backward is applied as dz is read: y is read beside it.
        masked: whether x is the raw output below, of which the mask of dx is made.
    """
    config = serves(filters, channels, itemsize, limits, allowed)
    if config is None:
        return Verdict(None, unfit(filters, channels, itemsize))
    if not pixels:
        return Verdict(None, "an empty batch")
    saved = again_bytes(pixels, filters, channels, itemsize, affine=affine, masked=masked)
    parts, across = programs(pixels, channels, config, limits)
    tiles = _tiles.cdiv(pixels, PIXELS)
    if tiles * across < limits.multiprocessors:
        return Verdict(None, f"{tiles} tiles of pixels do not fill {limits.multiprocessors} SMs")
    product = _tiles.Product(
        rows=filters, columns=channels, copies=1, depth=pixels, taps=1, itemsize=itemsize,
        gathered=2,
    )  # fmt: skip
    splits = _tiles.choose(product, limits).splits
    more = 2 * (parts - (splits if splits > 1 else 0)) * filters * channels * SUM
    text = f"{saved / 1e6:.1f} MB less to read, {max(0, more) / 1e6:.1f} MB of sums more"
    return Verdict(config if saved > more else None, text)


def unfit(filters: int, channels: int, itemsize: int) -> str:
    """What to say of sizes that no configuration takes."""
    return f"{filters} filters and {channels} channels of {itemsize} bytes do not fit one kernel"


@dataclass(frozen=True)
class Issued:
    """Bytes loaded and stored by one call of `conv_bn_grad1x1`, its merges included.

    Attributes:
        dz: loads of the gradient: once for each run of channels.
        y: loads of the raw output, likewise.
        x: loads of what the convolution read; twice where dx is masked by it.
        weight: loads of the weights: once a program.
        vectors: loads of coefficients and norm: once a program, mean and shift once more a tile.
        addend: loads of what is added.
        dx: stores.
        dweight: stores.
        sums: stores and loads of the programs' sums of dweight and of the tiles' sums of dx.
    """

    dz: int
    y: int
    x: int
    weight: int
    vectors: int
    addend: int
    dx: int
    dweight: int
    sums: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def issued_bytes(
    pixels: int,
    filters: int,
    channels: int,
    itemsize: int,
    config: Config,
    limits: _tiles.Limits,
    *,
    affine: bool = True,
    masked: bool = False,
    addend: int = 0,
    parameter: int | None = None,
) -> Issued:
    """What the kernel asks of L1 and L2 for operands with adjacent channels.

    Args:
        pixels: N H W.
        filters: K.
        channels: C.
        itemsize: bytes of an element.
        config: the configuration.
        limits: the GPU's.
        affine: whether y is read beside dz.
        masked: whether x is read through a BatchNorm and ReLU, by which dx is masked.
        addend: elements of what is added.
        parameter: bytes of an element of dweight; `itemsize` by default.

    Returns:
        Bytes, exact for active lanes.
    """
    parts, across = programs(pixels, channels, config, limits)
    tiles, weights = _tiles.cdiv(pixels, PIXELS), filters * channels
    rows = 2 * tiles * channels if masked else 0
    coefficients = 3 * filters * parts * across if affine else 0
    norm = channels * (2 * parts + 3 * tiles) if masked else 0
    return Issued(
        dz=across * pixels * filters * itemsize,
        y=across * pixels * filters * itemsize if affine else 0,
        x=pixels * channels * itemsize * (1 + masked),
        weight=parts * weights * itemsize,
        vectors=(coefficients + norm) * SUM,
        addend=addend * itemsize,
        dx=pixels * channels * itemsize,
        dweight=weights * (parameter or itemsize),
        sums=(2 * parts * weights + 2 * rows + (2 * channels if masked else 0)) * SUM,
    )
