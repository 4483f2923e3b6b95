"""Configurations of `conv_chain`: plain values, and which of them takes a call. Needs no Triton.

A program holds a tile of pixels: all channels of what the first convolution reads, of what the
shortcut projects, and the sums of all channels of `next`. `out` it makes a chunk of channels at a
time. So each of those widths is a size of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._tiles import Limits


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
    """

    pixels: int
    k: int
    chunk: int
    m: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """What records call it: "128x64x64_8w2s"."""
        return f"{self.pixels}x{self.k}x{self.m}_{self.warps}w{self.stages}s"


CONFIGS: tuple[Config, ...] = ()
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


def choose(sizes: Sizes, limits: Limits, allowed: frozenset[str] | None = None) -> Config | str:
    """The configuration that takes a call, or why none does.

    Args:
        sizes: of the call.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
    """
    return f"no configuration for {sizes}"
