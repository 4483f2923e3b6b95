"""Bytes that training's convolutions ask of the caches; see `_traffic`, whose counts these extend.

Counted are the kernels over activations: the products, and the merge of the splits. What merges the
tiles' sums of a channel afterwards reads some bytes a tile and channel and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ._launch import MERGE_TILE
from ._tiles import Plan, Product, cdiv, is_narrow
from ._traffic import SUM, ConvShape, _Sum, dgrad_issued_bytes, issued_bytes, wgrad_issued_bytes

AFFINE, BELOW, MASK, MEAN = 3, 2, 3, 1
"""Vectors of a channel: BatchNorm's backward (A, B, C); the BatchNorm that is read through (scale,
shift); the one that a gradient is masked by and reduced for (scale, shift, mean), or reduced for
alone (mean)."""


@dataclass(frozen=True)
class TrainingIssued(_Sum):
    """Bytes loaded and stored by one call.

    Attributes:
        rows: loads of the product's first factor: x of `conv_bn_stats`, dz of the gradients.
        raw: loads of the raw output beside dz; 0 where dz is the gradient of that itself.
        columns: loads of the second factor: the weights, in `conv_bn_wgrad` the input.
        vectors: loads of values a channel.
        addend: loads of the shortcut's gradient.
        below: loads of what a gradient of the input is masked by and reduced for: the raw output
            below, or a block's output and one or two raw outputs.
        result: stores of y, dx or dweight.
        sums: stores of each tile's sums of a channel.
        partial_stored: stores of partial products; 0 without splits.
        partial_loaded: loads of them.
    """

    rows: int
    raw: int
    columns: int
    vectors: int
    addend: int
    below: int
    result: int
    sums: int
    partial_stored: int
    partial_loaded: int


def _finished(rows: int, plan: Plan) -> int:
    """How many rows of tiles finish their pixels: of the product, or with splits of the merge."""
    return cdiv(rows, MERGE_TILE[0] if plan.splits > 1 else plan.tile.m)


def stats_issued_bytes(
    case: ConvShape, product: Product, plan: Plan, *, prologue: bool
) -> TrainingIssued:
    """What `conv_bn_stats` asks of L1 and L2, for operands as of `issued_bytes`.

    Args:
        case: sizes and geometry.
        product: as `conv_bn_stats.product_of` gives it.
        plan: tile and splits.
        prologue: whether x is read through a BatchNorm and ReLU: each step of each tile loads
            scale and shift of its channels.
    """
    base = issued_bytes(case, product, plan)
    taps = case.c * case.r * case.s  # of one tile of columns
    tiles = cdiv(product.rows, plan.tile.m) * cdiv(product.columns, plan.tile.n)
    return TrainingIssued(
        rows=base.x,
        raw=0,
        columns=base.weight,
        vectors=BELOW * tiles * taps * SUM if prologue else 0,
        addend=0,
        below=0,
        result=base.out,
        sums=_finished(product.rows, plan) * 2 * case.k * SUM,
        partial_stored=base.partial_stored,
        partial_loaded=base.partial_loaded,
    )


def bn_dgrad_issued_bytes(
    case: ConvShape,
    product: Product,
    plan: Plan,
    *,
    affine: bool,
    addend: int = 0,
    masked: bool = False,
) -> TrainingIssued:
    """What `conv_bn_dgrad` asks of L1 and L2, for operands as of `dgrad_issued_bytes`.

    Args:
        case: sizes and geometry.
        product: as `conv_bn_dgrad.product_of` gives it.
        plan: tile and splits.
        affine: whether dz is read through BatchNorm's backward.
        addend: elements of the shortcut's gradient.
        masked: whether a BatchNorm and ReLU stand below, whose mask and sums are made at the end.
    """
    base, ends = dgrad_issued_bytes(case, product, plan), _ends(case, product, plan)
    vectors = AFFINE * base.scale if affine else 0
    return TrainingIssued(
        rows=base.dy,
        raw=base.dy if affine else 0,
        columns=base.other,
        vectors=vectors + (MASK * ends * case.c * SUM if masked else 0),
        addend=addend * product.itemsize,
        below=base.gradient if masked else 0,
        result=base.gradient,
        sums=ends * 2 * case.c * SUM if masked else 0,
        partial_stored=base.partial_stored,
        partial_loaded=base.partial_loaded,
    )


def _ends(case: ConvShape, product: Product, plan: Plan) -> int:
    """How many rows of tiles finish pixels of an input, over all phases of the stride."""
    if plan.splits > 1:
        return _finished(case.n * case.h * case.w, plan)
    return _finished(product.rows, plan) * case.stride[0] * case.stride[1]


def bn_dgrad_end_issued_bytes(
    case: ConvShape,
    product: Product,
    plan: Plan,
    *,
    affine: bool,
    addend: int = 0,
    projected: bool = False,
) -> TrainingIssued:
    """What `conv_bn_dgrad_end` asks of L1 and L2: as `conv_bn_dgrad`, but for what it ends with.

    Args:
        case: sizes and geometry.
        product: as `conv_bn_dgrad_end.product_of` gives it.
        plan: tile and splits.
        affine: whether dz is read through BatchNorm's backward.
        addend: elements of the shortcut's gradient.
        projected: whether a projection's raw output is read for its reductions.
    """
    bare = bn_dgrad_issued_bytes(case, product, plan, affine=affine, addend=addend)
    raws = 1 + projected
    each = _ends(case, product, plan) * case.c * SUM
    return replace(
        bare,
        vectors=bare.vectors + MEAN * raws * each,
        below=(1 + raws) * bare.result,
        sums=(1 + raws) * each,
    )


def bn_wgrad_issued_bytes(
    case: ConvShape,
    product: Product,
    plan: Plan,
    *,
    affine: bool,
    prologue: bool,
    parameter: int = 0,
) -> TrainingIssued:
    """What `conv_bn_wgrad` asks of L1 and L2, for operands as of `wgrad_issued_bytes`.

    Args:
        case: sizes and geometry.
        product: as `conv_bn_wgrad.product_of` gives it.
        plan: tile and splits.
        affine: whether dz is read through BatchNorm's backward: each tile of each tap loads the
            vectors of its filters once.
        prologue: whether x is read through a BatchNorm and ReLU: likewise, of its channels.
        parameter: bytes of an element of the gradient; 0 takes those of the activations.
    """
    base = wgrad_issued_bytes(case, product, plan)
    span = product.side * (case.c // case.groups)
    taps = case.r * (1 if is_narrow(span, case.s) else case.s)
    tiles_m, tiles_n = cdiv(product.rows, plan.tile.m), cdiv(product.columns, plan.tile.n)
    of_filters = AFFINE * tiles_n * taps * case.k if affine else 0
    of_channels = BELOW * tiles_m * case.c * case.r * case.s if prologue else 0
    return TrainingIssued(
        rows=base.dy,
        raw=base.dy if affine else 0,
        columns=base.other,
        vectors=plan.splits * (of_filters + of_channels) * SUM,
        addend=0,
        below=0,
        result=base.gradient * (parameter or product.itemsize) // product.itemsize,
        sums=0,
        partial_stored=base.partial_stored,
        partial_loaded=base.partial_loaded,
    )
