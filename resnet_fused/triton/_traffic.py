"""Bytes that a configuration asks of the caches: what its loads and stores add up to.

Pure arithmetic over a case, its product and a plan, for predictions; nothing here needs a GPU or
Triton. Only active lanes count, as the kernels' masks leave them, so that the numbers are exact:
tests hold them against every access that the interpreter makes. What of it misses the caches, and
the whole lines that a GPU moves for a few bytes, is for the reader of the numbers to judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    @property
    def act(self) -> str: ...


class BnActShape(Protocol):
    """What is read of a case (see `resnet_fused.cases.BnActCase`)."""

    @property
    def n(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def h(self) -> int: ...
    @property
    def w(self) -> int: ...
    @property
    def residual(self) -> bool: ...


class _Sum:
    """Of the fields of a dataclass."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Issued(_Sum):
    """Bytes loaded and stored by one call of `conv_bn_act`, its merge included.

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


@dataclass(frozen=True)
class GradientIssued(_Sum):
    """Bytes loaded and stored by one call of `conv_dgrad` or `conv_wgrad`, its merge included.

    Attributes:
        dy: loads of the result's gradient.
        y: loads of the result, for ReLU's mask; 0 without ReLU.
        other: loads of the other factor: the weights in dgrad, the input in wgrad.
        scale: loads of scale.
        gradient: stores of dx or dweight.
        partial_stored: stores of partial sums; 0 without splits.
        partial_loaded: loads of partial sums.
    """

    dy: int
    y: int
    other: int
    scale: int
    gradient: int
    partial_stored: int
    partial_loaded: int


@dataclass(frozen=True)
class BnActIssued(_Sum):
    """Bytes loaded and stored by one call of `bn_act`.

    Attributes:
        x: loads of the input.
        vectors: loads of scale and shift.
        residual: loads of the shortcut.
        out: stores of the result.
    """

    x: int
    vectors: int
    residual: int
    out: int


def taps_met(size: int, taps: int, out: int, stride: int, padding: int, dilation: int) -> list[int]:
    """How many taps of a filter meet the image, for each output position along one axis."""
    return [
        sum(0 <= i * stride - padding + tap * dilation < size for tap in range(taps))
        for i in range(out)
    ]


def _met(case: ConvShape) -> tuple[list[int], list[int]]:
    """Taps that meet the image, for each row and each column of the output."""
    axes = zip(
        (case.h, case.w), (case.r, case.s), (case.p, case.q),
        case.stride, case.padding, case.dilation, strict=True,
    )  # fmt: skip
    down, along = (taps_met(*axis) for axis in axes)
    return down, along


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
    down, along = _met(case)
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


def dgrad_issued_bytes(case: ConvShape, product: Product, plan: Plan) -> GradientIssued:
    """What `conv_dgrad` asks of L1 and L2 for finite operands with adjacent channels.

    Over all phases of the stride each tap is met once by each output pixel whose tap lies in the
    image, so dy is loaded as often as the forward kernel loads x; lanes of rows that a phase lacks,
    and of pixels beyond the last, are masked. Each tap belongs to one phase in each direction, so
    every tile of rows and columns loads its weights, and scale for each of its taps, once.

    Args:
        case: sizes and geometry; its ReLU is the mask's.
        product: as `conv_dgrad.product_of` gives it for the case.
        plan: tile and splits.

    Returns:
        Bytes, exact for active lanes.
    """
    if not product.rows:
        return GradientIssued(0, 0, 0, 0, 0, 0, 0)
    size = product.itemsize
    tiles_m = cdiv(product.rows, plan.tile.m)
    tiles_each = cdiv(product.columns, plan.tile.n)
    down, along = _met(case)
    gathered = tiles_each * case.k * case.n * sum(down) * sum(along) * size
    result = case.n * case.h * case.w * case.c
    partial = plan.splits * result * SUM if plan.splits > 1 else 0
    return GradientIssued(
        dy=gathered,
        y=gathered if case.act == "relu" else 0,
        other=tiles_m * case.k * (case.c // case.groups) * case.r * case.s * size,
        scale=tiles_m * tiles_each * case.k * case.r * case.s * SUM,
        gradient=result * size,
        partial_stored=partial,
        partial_loaded=partial,
    )


def wgrad_issued_bytes(case: ConvShape, product: Product, plan: Plan) -> GradientIssued:
    """What `conv_wgrad` asks of L1 and L2 for operands with adjacent channels.

    dy is loaded whole for each tap (in narrow products for each row of the filter) and each tile of
    columns, also where its tap misses the image; x only where the tap meets it. The splits share
    the pixels. Scale is loaded by each tile that it finishes, or by the merge for each weight.

    Args:
        case: sizes and geometry; its ReLU is the mask's.
        product: as `conv_wgrad.product_of` gives it for the case.
        plan: tile and splits.

    Returns:
        Bytes, exact for active lanes.
    """
    if not product.depth:
        return GradientIssued(0, 0, 0, 0, 0, 0, 0)
    size = product.itemsize
    span = product.side * (case.c // case.groups)
    taps = case.r * (1 if is_narrow(span, case.s) else case.s)
    tiles_m = cdiv(product.rows, plan.tile.m)
    tiles_n = cdiv(product.columns, plan.tile.n)
    down, along = _met(case)
    gradients = tiles_n * taps * case.k * product.depth * size
    result = case.k * (case.c // case.groups) * case.r * case.s
    partial = plan.splits * result * SUM if plan.splits > 1 else 0
    return GradientIssued(
        dy=gradients,
        y=gradients if case.act == "relu" else 0,
        other=tiles_m * case.c * case.n * sum(down) * sum(along) * size,
        scale=(result if plan.splits > 1 else tiles_n * taps * case.k) * SUM,
        gradient=result * size,
        partial_stored=partial,
        partial_loaded=partial,
    )


def bn_act_issued_bytes(
    case: BnActShape, itemsize: int, by_channel: bool, block: tuple[int, int]
) -> BnActIssued:
    """What `bn_act` asks of L1 and L2: each activation once, the vectors once for each tile.

    Args:
        case: sizes.
        itemsize: bytes of an element of x, residual and out.
        by_channel: whether a tile's columns are channels (NHWC), else pixels of a channel (NCHW).
        block: rows and columns of a tile.

    Returns:
        Bytes, exact for active lanes.
    """
    pixels, planes = case.n * case.h * case.w, case.n * case.c
    activation = pixels * case.c * itemsize
    tiles = cdiv(pixels, block[0]) if by_channel else cdiv(case.h * case.w, block[1])
    return BnActIssued(
        x=activation,
        vectors=2 * tiles * (case.c if by_channel else planes) * SUM if activation else 0,
        residual=activation if case.residual else 0,
        out=activation,
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


def dgrad_product_of(case: ConvShape, itemsize: int, precision: str = "ieee") -> Product:
    """The product of a `conv_dgrad`, likewise; rows are those of one phase of the stride.

    Args:
        case: sizes of the forward call.
        itemsize: bytes of an element.
        precision: of float32 products, see `_tiles.Product`.
    """
    # In float32 a second tile of sums, for what a NaN spoils, would not fit into registers.
    side = side_by_side(case.c // case.groups, case.groups) if itemsize == 2 else 1
    return Product(
        rows=case.n * cdiv(case.h, case.stride[0]) * cdiv(case.w, case.stride[1]),
        columns=side * (case.c // case.groups),
        copies=cdiv(case.groups, side) * math.prod(case.stride),
        depth=side * (case.k // case.groups),
        taps=cdiv(case.r, case.stride[0]) * cdiv(case.s, case.stride[1]),
        itemsize=itemsize,
        side=side,
        precision=precision,
        runtime_taps=True,
        gathered=2,
        ragged=is_ragged(itemsize, case.c, case.k),
    )
