"""What a `conv_chain` is predicted to take as one kernel, and as the kernels that it stands for.

Both by one model, the chooser's: memory, caches or tensor cores at the rates of `triton._tiles`,
whichever takes longest, and a launch for each kernel. A prediction is there to be compared with a
measurement; until one is made it decides which chains a graph is rewritten to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import roofline
from ..cases import ChainCase, ConvCase
from ..triton import _chain_tiles, _tiles, _traffic
from . import _cuda_chain

CLOCK = 1.48e9
"""Cycles a second at which those rates are an H200's: 4.3 TB/s of memory, 790 TFLOP/s."""


class Prediction(NamedTuple):
    """Cycles of one multiprocessor.

    Attributes:
        chain: as one kernel.
        parts: as one kernel for each convolution.
        config: the configuration of the former.
    """

    chain: float
    parts: float
    config: str

    @property
    def gain(self) -> float:
        """Microseconds that the kernel saves."""
        return (self.parts - self.chain) / CLOCK * 1e6

    def measured(self, times: float) -> float:
        """Microseconds saved by what is so many times faster than the way that is predicted."""
        expected = min(self.chain, self.parts)
        return (self.parts - expected / times) / CLOCK * 1e6 if times > 1.0 else 0.0

    def __str__(self) -> str:
        """One sentence, in microseconds of an H200."""
        chain, parts = (cycles / CLOCK * 1e6 for cycles in (self.chain, self.parts))
        return f"predicted {chain:.0f} us as {self.config}, {parts:.0f} us by its parts"


def sizes_of(case: ChainCase, itemsize: int, precision: str = "ieee") -> _chain_tiles.Sizes:
    """A case as the chooser sees it."""
    return _chain_tiles.Sizes(
        case.pixels, case.k, case.c, case.m, case.projected, case.front, case.out_stride,
        itemsize, precision,
    )  # fmt: skip


def part_cost(case: ConvCase, dtype: torch.dtype, limits: _tiles.Limits) -> float:
    """Cycles that one convolution takes, predicted.

    Args:
        case: its sizes; stride 1 or 2, one group.
        dtype: of its tensors, 16 bits.
        limits: the GPU's.
    """
    product = _traffic.product_of(case, dtype.itemsize)
    plan = _tiles.choose(product, limits)
    tile, steps = plan.tile, product.taps * product.steps / plan.splits
    programs = _tiles.cdiv(product.rows, tile.m) * _tiles.cdiv(product.columns, tile.n)
    programs *= plan.splits
    waves = _tiles.cdiv(programs, limits.multiprocessors)
    streaming = _tiles.MEMORY * _chain_tiles.REACHED * limits.multiprocessors
    memory = roofline.conv_cost(case, dtype).bytes / streaming
    read = (tile.m + tile.n) / (tile.m * tile.n) / _chain_tiles.PARTS
    tensor = 2 * tile.m * tile.n * product.step * steps / _tiles.TENSOR * max(1.0, read)
    cache = _traffic.issued_bytes(case, product, plan).total / programs / _tiles.CACHE
    launches = 2 if plan.splits > 1 else 1
    return max(memory, waves * max(tensor, cache)) + launches * _tiles.MERGE


def predict(
    case: ChainCase,
    dtype: torch.dtype,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None = None,
) -> Prediction | str:
    """Both predictions, or why no configuration takes the case.

    Args:
        case: sizes, at least one pixel.
        dtype: of its activations.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
    """
    sizes = sizes_of(case, dtype.itemsize)
    found = _chain_tiles.choose(sizes, limits, allowed)
    if isinstance(found, str):
        return found
    chain = _chain_tiles.cost(found, sizes, limits)
    parts = sum(part_cost(part, dtype, limits) for part in case.parts)
    return Prediction(chain, parts, found.name)


def predict_cuda(
    case: ChainCase,
    dtype: torch.dtype,
    about: Sequence[int],
    allowed: frozenset[str] | None = None,
) -> Prediction | str:
    """Likewise of the CUDA kernels, by the launches' own model, which has the same rates.

    Args:
        case: sizes, at least one pixel.
        dtype: of its activations, 16 bits.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        allowed: names of the configurations to choose among; None for all.
    """
    found = _cuda_chain.predict(case, dtype, about, allowed)
    if isinstance(found, str):
        return found
    cycles, parts, config = found
    streaming = _tiles.MEMORY * _chain_tiles.REACHED * about[0]

    def longest(cycles: float, cost: roofline.Cost) -> float:
        return max(cycles, cost.bytes / streaming) + _tiles.MERGE

    chain = longest(cycles, roofline.conv_chain_cost(case, dtype))
    pairs = zip(parts, case.parts, strict=True)
    return Prediction(
        chain, sum(longest(each, roofline.conv_cost(part, dtype)) for each, part in pairs), config
    )
