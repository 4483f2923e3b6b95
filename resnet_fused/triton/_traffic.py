"""Bytes that a configuration asks of the caches: what its loads and stores add up to.

Pure arithmetic over a case, its product and a plan, for predictions; nothing here needs a GPU or
Triton. Only active lanes count, as the kernels' masks leave them, so that the numbers are exact:
tests hold them against every access that the interpreter makes. What of it misses the caches, and
the whole lines that a GPU moves for a few bytes, is for the reader of the numbers to judge.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from ._launch import MERGE_TILE
from ._tiles import Plan, Product, cdiv, is_narrow, is_ragged, side_by_side

SUM = 4
"""Bytes of scale, shift and partial sums: float32."""


class ConvShape(Protocol):
    """What is read of a case (see `resnet_fused.cases.ConvCase`)."""

    @property
    def n(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def h(self) -> int: ...
    @property
    def w(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def r(self) -> int: ...
    @property
    def s(self) -> int: ...
    @property
    def p(self) -> int: ...
    @property
    def q(self) -> int: ...
    @property
    def stride(self) -> tuple[int, int]: ...
    @property
    def padding(self) -> tuple[int, int]: ...
    @property
    def dilation(self) -> tuple[int, int]: ...
    @property
    def groups(self) -> int: ...
    @property
    def residual(self) -> bool: ...


@dataclass(frozen=True)
class Issued:
    """Bytes loaded and stored by one call, its merge included.

    Attributes:
        x: loads of the input: once for each tile of columns and tap that meets the image.
        weight: loads of the weights: once for each tile of rows.
        vectors: loads of scale and shift.
        residual: loads of the shortcut.
        out: stores of the result.
        partial_stored: stores of partial sums; 0 without splits.
        partial_loaded: loads of partial sums.
    """

    x: int
    weight: int
    vectors: int
    residual: int
    out: int
    partial_stored: int
    partial_loaded: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, f.name) for f in fields(self))


def taps_met(size: int, taps: int, out: int, stride: int, padding: int, dilation: int) -> list[int]:
    """How many taps of a filter meet the image, for each output position along one axis."""
    return [
        sum(0 <= i * stride - padding + tap * dilation < size for tap in range(taps))
        for i in range(out)
    ]


def issued_bytes(case: ConvShape, product: Product, plan: Plan) -> Issued:
    """What `conv_bn_act` asks of L1 and L2 for finite operands with adjacent channels.

    A tile's rows beyond the last pixel load the last pixel once more. Groups that stand side by
    side load all of their bundle's channels for each other's columns, but only their own weights.
    (Where a NaN comes up in such a bundle the kernel sums it again, which is not counted.)

    Args:
        case: sizes and geometry.
        product: as `conv_bn_act.product_of` gives it for the case.
        plan: tile and splits.

    Returns:
        Bytes, exact for active lanes.
    """
    if not product.rows:
        return Issued(0, 0, 0, 0, 0, 0, 0)
    tile, size = plan.tile, product.itemsize
    tiles_m = cdiv(product.rows, tile.m)
    tiles_each = cdiv(product.columns, tile.n)
    axes = zip(
        (case.h, case.w), (case.r, case.s), (case.p, case.q),
        case.stride, case.padding, case.dilation, strict=True,
    )  # fmt: skip
    down, along = (taps_met(*axis) for axis in axes)
    beyond = tiles_m * tile.m - product.rows
    taps = case.n * sum(down) * sum(along) + beyond * down[-1] * along[-1]
    filters = case.k * (case.c // case.groups) * case.r * case.s
    result = product.rows * case.k
    split = plan.splits > 1
    partial = plan.splits * result * SUM if split else 0
    finished = cdiv(product.rows, MERGE_TILE[0]) if split else tiles_m
    return Issued(
        x=tiles_each * case.c * taps * size,
        weight=tiles_m * filters * size,
        vectors=finished * 2 * case.k * SUM,
        residual=result * size if case.residual else 0,
        out=result * size,
        partial_stored=partial,
        partial_loaded=partial,
    )


def product_of(case: ConvShape, itemsize: int, precision: str = "ieee") -> Product:
    """The product of a `conv_bn_act`, without tensors and without Triton.

    Args:
        case: sizes.
        itemsize: bytes of an element of x, weight and out.
        precision: of float32 products, see `_tiles.Product`.
    """
    side = side_by_side(case.k // case.groups, case.groups)
    span = side * (case.c // case.groups)
    narrow = is_narrow(span, case.s)
    return Product(
        rows=case.n * case.p * case.q,
        columns=side * (case.k // case.groups),
        copies=cdiv(case.groups, side),
        depth=span * case.s if narrow else span,
        taps=case.r if narrow else case.r * case.s,
        itemsize=itemsize,
        side=side,
        precision=precision,
        narrow=narrow,
        ragged=is_ragged(itemsize, case.c, case.k),
    )
