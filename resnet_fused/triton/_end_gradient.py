"""Which gradients between two blocks are made behind the earlier one's ReLU, and what that saves.

Pure functions of sizes and limits: no GPU, no Triton. The layers that run, `explain` and the
predictions ask the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from ..cases import ConvCase
from . import _grad1x1, _grad1x1_end, _tiles
from ._block_end import cycles
from ._traffic import dgrad_product_of
from ._training_traffic import (
    bn_dgrad_end_issued_bytes,
    bn_dgrad_issued_bytes,
    bn_wgrad_issued_bytes,
)


@functools.lru_cache(maxsize=4096)
def product_of(
    case: ConvCase, itemsize: int, precision: str = "ieee", *, affine: bool = True
) -> _tiles.Product:
    """The product of a call; rows are those of one phase of the stride.

    Args:
        case: sizes of the forward call.
        itemsize: bytes of an element.
        precision: of float32 products, see `_tiles.Product`.
        affine: whether the gradient is made as it is read, of two tensors.
    """
    product = dgrad_product_of(case, itemsize, precision)
    return dataclasses.replace(product, gathered=2 if affine else 0, most=_tiles.MOST_MADE)


class Verdict(NamedTuple):
    """How the gradient between two blocks is made.

    Attributes:
        ended: whether by one kernel; else by two.
        why: one clause.
    """

    ended: bool
    why: str


@functools.lru_cache(maxsize=4096)
def choose(
    case: ConvCase,
    itemsize: int,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None = None,
    *,
    precision: str = "ieee",
    projected: bool = False,
    added: int = 0,
    less: int = 0,
    merged: bool = False,
) -> Verdict:
    """Whether one kernel should make the gradient between two blocks behind the earlier one's ReLU.

    It neither writes nor reads that gradient, and spares the launch of the pass that would. But
    where both gradients of the convolution would come from one kernel, two read its operands again,
    and no launch is spared. Each kernel is taken to last as long as the slowest of memory, caches
    and tensor cores, at the rates of `_tiles`; the kernels of both gradients, and of the weights'
    alone, as the slower of memory and caches. The rule is arithmetic, not measured.

    Args:
        case: sizes of the forward call of the convolution behind the block.
        itemsize: bytes of an element.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
        precision: of float32 products, see `_tiles.Product`.
        projected: whether the block has a projection, whose reductions are taken too.
        added: elements of the shortcut's gradient.
        less: bytes that one op moves less through memory, `_end_gradient.less_bytes` of the ops.
        merged: whether both gradients of the convolution would come from one kernel.
    """
    product = product_of(case, itemsize, precision)
    reason = unfit(product, limits, allowed)
    if reason is not None or not product.rows:
        return Verdict(False, reason or "an empty batch")
    one, two = lasts(
        case, itemsize, limits, allowed, precision=precision, projected=projected, added=added,
        merged=merged,
    )  # fmt: skip
    text = f"{abs(less) / 1e6:.1f} MB {'less' if less > 0 else 'more'} through memory"
    return Verdict(less > 0 and one < two, text)


@functools.lru_cache(maxsize=4096)
def unite(
    case: ConvCase,
    itemsize: int,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None = None,
    *,
    projected: bool = False,
    added: int = 0,
) -> Verdict:
    """Whether one kernel should make both gradients of a 1x1 and the end of the block before it.

    It is compared with the better of two ways: the end with the input's gradient, and the weights'
    gradient alone; and a pass for the end behind both gradients, from one kernel or two. The rule
    is arithmetic, not measured.

    Args:
        case: sizes of the forward call of the convolution behind the block.
        itemsize: bytes of an element.
        limits: the GPU's.
        allowed: names of the configurations to choose among; None for all.
        projected: whether the block has a projection, whose reductions are taken too.
        added: elements of the shortcut's gradient.
    """
    pixels = case.n * case.h * case.w
    config = _grad1x1_end.serves(case.k, case.c, itemsize, limits, allowed)
    if config is None:
        return Verdict(False, _grad1x1_end.unfit(case.k, case.c, itemsize))
    if not pixels:
        return Verdict(False, "an empty batch")
    one = _grad1x1_end.cycles(case, itemsize, config, limits, projected=projected, added=added)
    merged = _grad1x1.choose(pixels, case.k, case.c, itemsize, limits).config is not None
    apart = min(
        lasts(case, itemsize, limits, None, projected=projected, added=added, merged=merged)
    )
    if not merged:
        apart += _weights_cycles(case, itemsize, limits)
    said = f"{one / 1e3:.0f} thousand cycles predicted, of more kernels {apart / 1e3:.0f}"
    return Verdict(one < apart, said)


def lasts(
    case: ConvCase,
    itemsize: int,
    limits: _tiles.Limits,
    allowed: frozenset[str] | None,
    *,
    precision: str = "ieee",
    projected: bool,
    added: int,
    merged: bool,
) -> tuple[float, float]:
    """Cycles with the end in the gradient of the input, and with a pass behind that; see `choose`.

    Where `merged`, of both gradients of the convolution; else of that of its input alone.
    """
    product = product_of(case, itemsize, precision)
    one = _tiles.choose(product, limits, allowed)
    two = _tiles.choose(product, limits)
    between = case.n * case.c * case.h * case.w * itemsize
    outputs = case.n * case.k * case.p * case.q * itemsize
    weights = case.k * (case.c // case.groups) * case.r * case.s * itemsize
    bare = 2 * outputs + weights + added * itemsize + between
    passing = (4 + projected) * between  # dout, out, raw [and residual] in, dz out
    asked = bn_dgrad_end_issued_bytes(
        case, product, one, affine=True, addend=added, projected=projected
    ).total
    before = bn_dgrad_issued_bytes(case, product, two, affine=True, addend=added).total
    rate = _tiles.MEMORY * limits.multiprocessors
    one_lasts = cycles(product, one, bare + passing - 2 * between, asked, limits)
    if merged:
        one_lasts += _weights_cycles(case, itemsize, limits)
        two_last = _both_cycles(case, itemsize, limits, added, bare + between + weights)
    else:
        two_last = cycles(product, two, bare, before, limits) + _tiles.MERGE
    return one_lasts, two_last + passing / rate


@functools.lru_cache(maxsize=4096)
def _lasts(memory: int, asked: int, limits: _tiles.Limits) -> float:
    return max(memory / _tiles.MEMORY, asked / _tiles.CACHE) / limits.multiprocessors


def _both_cycles(
    case: ConvCase, itemsize: int, limits: _tiles.Limits, added: int, memory: int
) -> float:
    """Cycles of both gradients by one kernel, of which `memory` bytes move."""
    sizes = case.n * case.h * case.w, case.k, case.c, itemsize
    config = _grad1x1.serves(*sizes[1:], limits)
    if config is None:  # another one's than the Triton kernel
        return _lasts(memory, 0, limits)
    asked = _grad1x1.issued_bytes(*sizes, config, limits, addend=added).total
    return _lasts(memory, asked, limits)


def _weights_cycles(case: ConvCase, itemsize: int, limits: _tiles.Limits) -> float:
    """Cycles of the gradient of a 1x1's weights by a kernel of its own."""
    pixels, weights = case.n * case.p * case.q, case.k * case.c
    product = _tiles.Product(
        rows=case.k, columns=case.c, copies=1, depth=pixels, taps=1, itemsize=itemsize, gathered=2
    )
    plan = _tiles.choose(product, limits)
    asked = bn_wgrad_issued_bytes(case, product, plan, affine=True, prologue=False).total
    return _lasts((pixels * (2 * case.k + case.c) + weights) * itemsize, asked, limits)


def unfit(
    product: _tiles.Product, limits: _tiles.Limits, allowed: frozenset[str] | None = None
) -> str | None:
    """Why no configuration takes a product on a GPU, or None; arguments as of `choose`."""
    if not any(
        _tiles.fits(product, tile, limits)
        for tile in _tiles.TILES
        if allowed is None or tile.name in allowed
    ):
        return "none of its configurations is left on this GPU"
    return None


def case_of(
    between: Sequence[int],
    weight: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
) -> ConvCase:
    """The forward call of a convolution, of shapes of its input and weights and its geometry."""
    pairs = [(pair[0], pair[1]) for pair in geometry[:3]]
    return _case(tuple(between), tuple(weight), *pairs, groups=geometry[3])


@functools.lru_cache(maxsize=4096)
def _case(
    between: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> ConvCase:
    (n, c, h, w), (k, _, r, s) = between, weight
    return ConvCase("", n, c, h, w, k, r, s, stride, padding, dilation, groups)
