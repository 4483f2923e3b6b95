"""FLOPs and bytes of training's ops, and of a layer's, a block's, a stem's whole step.

Every tensor is read and written once per kernel, whatever stays in a cache. Weights and per-channel
vectors count; the small kernels that work on the latter alone do not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .inference import ConvShape, Cost, _conv_flops, _touched, _vector

Shape = Sequence[int]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step.

    Attributes:
        layer: place of its convolution in the block; that of the projection is behind the last.
        op: such as "conv_bn_stats".
        cost: its work.
        backward: whether it belongs to the backward pass.
    """

    layer: int
    op: str
    cost: Cost
    backward: bool


def _elements(shape: Shape) -> int:
    return math.prod(shape)


def conv_bn_stats_cost(case: ConvShape, dtype: torch.dtype, *, prologue: bool = False) -> Cost:
    """The work of one ``conv_bn_stats``.

    Args:
        case: its sizes.
        dtype: of input, weight and output.
        prologue: whether the input is read through scale and shift.
    """
    x, weight, y = case.input_shape, case.weight_shape, case.output_shape
    moved = _touched(x, weight, y, case.stride) + _elements(weight) + _elements(y)
    vectors = 2 * y[1] + (2 * x[1] if prologue else 0)
    return Cost(_conv_flops(case), moved * dtype.itemsize + vectors * _vector(dtype))


def conv_bn_dgrad_cost(
    case: ConvShape,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    addend: int = 0,
    masked: bool = False,
    thinned: bool = False,
) -> Cost:
    """The work of one ``conv_bn_dgrad``.

    Args:
        case: sizes of the forward call.
        dtype: of all tensors but per-channel values.
        affine: whether BatchNorm's backward is applied as it reads: y is read beside dz.
        addend: elements of what is added.
        masked: whether ReLU's mask is made of the raw output below, and reductions are taken.
        thinned: whether the gradient is that of the pixels alone which a strided 1x1 reads.
    """
    x, weight, y = (_elements(s) for s in (case.input_shape, case.weight_shape, case.output_shape))
    if thinned:
        x = _read_by(case)
    moved = y * (2 if affine else 1) + weight + addend + x * (2 if masked else 1)
    vectors = (3 * case.output_shape[1] if affine else 0) + (
        5 * case.input_shape[1] if masked else 0
    )
    return Cost(_conv_flops(case), moved * dtype.itemsize + vectors * _vector(dtype))


def conv_bn_dgrad_end_cost(
    case: ConvShape,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    addend: int = 0,
    projected: bool = False,
) -> Cost:
    """The work of one ``conv_bn_dgrad_end``: the gradient between two blocks stays in registers.

    Args:
        case: sizes of the forward call of the next block's first convolution.
        dtype: of all tensors but per-channel values.
        affine: whether BatchNorm's backward is applied as it reads: y is read beside dz.
        addend: elements of what is added.
        projected: whether a projection's reductions are taken too.
    """
    x, weight, y = (_elements(s) for s in (case.input_shape, case.weight_shape, case.output_shape))
    moved = y * (2 if affine else 1) + weight + addend + x * (3 + projected)
    vectors = 3 * case.output_shape[1] if affine else 0
    vectors += case.input_shape[1] * (3 + 2 * projected)
    return Cost(_conv_flops(case), moved * dtype.itemsize + vectors * _vector(dtype))


def _read_by(case: ConvShape) -> int:
    return _touched(case.input_shape, case.weight_shape, case.output_shape, case.stride)


def thins(case: ConvShape) -> bool:
    """Whether a projection's gradient is computed for the pixels alone that it reads.

    Args:
        case: its sizes.
    """
    (high, wide), shape = case.stride, case.input_shape
    read = tuple(-(-side // high) for side in shape[2:])
    one = tuple(case.weight_shape[2:]) == (1, 1) and high == wide
    return one and tuple(case.output_shape[2:]) == read


def conv_bn_wgrad_cost(
    case: ConvShape,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    prologue: bool = False,
    parameter: torch.dtype | None = None,
) -> Cost:
    """The work of one ``conv_bn_wgrad``; partial sums are no part of it.

    Args:
        case: sizes of the forward call.
        dtype: of the activations.
        affine: whether BatchNorm's backward is applied as it reads.
        prologue: whether the input is read through scale and shift.
        parameter: dtype of the gradient; that of the activations by default.
    """
    weight, y = _elements(case.weight_shape), _elements(case.output_shape)
    moved = y * (2 if affine else 1) + _read_by(case)
    vectors = (3 * case.output_shape[1] if affine else 0) + (
        2 * case.input_shape[1] if prologue else 0
    )
    stored = weight * (parameter or dtype).itemsize
    return Cost(_conv_flops(case), moved * dtype.itemsize + stored + vectors * _vector(dtype))


def conv_bn_grad1x1_cost(
    case: ConvShape,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    addend: int = 0,
    masked: bool = False,
    parameter: torch.dtype | None = None,
) -> Cost:
    """The work of one ``conv_bn_grad1x1``: what both gradients read is read once.

    Args:
        case: sizes of the forward call, a 1x1 convolution of stride 1.
        dtype: of the activations.
        affine: whether BatchNorm's backward is applied as it reads.
        addend: elements of what is added.
        masked: whether the input is read through BatchNorm and ReLU, and its gradient masked.
        parameter: dtype of the weights' gradient; that of the activations by default.
    """
    x, weight, y = (_elements(s) for s in (case.input_shape, case.weight_shape, case.output_shape))
    moved = y * (2 if affine else 1) + weight + addend + 2 * x
    vectors = (3 * case.output_shape[1] if affine else 0) + (
        5 * case.input_shape[1] if masked else 0
    )
    stored = weight * (parameter or dtype).itemsize
    return Cost(2 * _conv_flops(case), moved * dtype.itemsize + stored + vectors * _vector(dtype))


def conv_bn_grad1x1_end_cost(
    case: ConvShape,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    addend: int = 0,
    projected: bool = False,
    parameter: torch.dtype | None = None,
) -> Cost:
    """The work of one ``conv_bn_grad1x1_end``: what all three gradients read is read once.

    Args:
        case: as of `conv_bn_grad1x1_cost`, of the next block's first convolution.
        dtype: of the activations.
        affine: whether BatchNorm's backward is applied as it reads.
        addend: elements of what is added.
        projected: whether a projection's reductions are taken too.
        parameter: dtype of the weights' gradient; that of the activations by default.
    """
    options: dict[str, Any] = {"affine": affine, "addend": addend, "projected": projected}
    end = conv_bn_dgrad_end_cost(case, dtype, **options)
    stored = _elements(case.weight_shape) * (parameter or dtype).itemsize
    return Cost(2 * end.flops, end.bytes + stored)


def bn_add_act_cost(
    shape: Shape, dtype: torch.dtype, *, residual: int = 0, projected: bool = False
) -> Cost:
    """The work of one ``bn_add_act``.

    Args:
        shape: [N, K, P, Q].
        dtype: of the activations.
        residual: elements of the shortcut.
        projected: whether it is read through a BatchNorm of its own.
    """
    vectors = 2 * shape[1] * (2 if projected else 1)
    moved = 2 * _elements(shape) + residual
    return Cost(0, moved * dtype.itemsize + vectors * _vector(dtype))


def bn_add_act_conv_stats_cost(
    case: ConvShape, dtype: torch.dtype, *, projected: bool = False
) -> Cost:
    """The work of one ``bn_add_act_conv_stats``: what is made of two tensors is written once.

    Args:
        case: sizes of the 1x1 convolution behind the block's end.
        dtype: of the activations and the weight.
        projected: whether the shortcut is read through a BatchNorm of its own.
    """
    x, weight, z = (_elements(s) for s in (case.input_shape, case.weight_shape, case.output_shape))
    vectors = 2 * case.output_shape[1] + 2 * case.input_shape[1] * (2 if projected else 1)
    return Cost(_conv_flops(case), (3 * x + weight + z) * dtype.itemsize + vectors * _vector(dtype))


def bn_add_act_backward_cost(
    shape: Shape, dtype: torch.dtype, *, out: bool = True, projected: bool = False
) -> Cost:
    """The work of one ``bn_add_act_backward``.

    Args:
        shape: [N, K, P, Q].
        dtype: of the activations.
        out: whether the mask is read off the result; else it is made of y.
        projected: whether a projection's reductions are taken too.
    """
    moved = _elements(shape) * (3 + out + projected)
    vectors = shape[1] * (5 + 2 * projected)
    return Cost(0, moved * dtype.itemsize + vectors * _vector(dtype))


def bn_backward_apply_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The work of one ``bn_backward_apply`` on [N, K, P, Q]."""
    return Cost(0, 3 * _elements(shape) * dtype.itemsize + 3 * shape[1] * _vector(dtype))


def bn_act_pool_cost(shape: Shape, pooled: Shape, dtype: torch.dtype) -> Cost:
    """The work of one ``bn_act_pool`` from [N, K, H, W] to `pooled`; a tap is one byte."""
    moved = (_elements(shape) + _elements(pooled)) * dtype.itemsize + _elements(pooled)
    return Cost(0, moved + 2 * shape[1] * _vector(dtype))


def bn_act_pool_backward_cost(shape: Shape, pooled: Shape, dtype: torch.dtype) -> Cost:
    """The work of one ``bn_act_pool_backward``."""
    moved = (2 * _elements(shape) + _elements(pooled)) * dtype.itemsize + _elements(pooled)
    return Cost(0, moved + 5 * shape[1] * _vector(dtype))


def node_kernels(
    layers: Sequence[ConvShape],
    dtype: torch.dtype,
    *,
    shortcut: str = "none",
    projection: ConvShape | None = None,
    pooled: Shape | None = None,
    folds: bool = True,
    input_gradient: bool = True,
    parameter: torch.dtype | None = None,
    merged: Collection[int] = (),
    ended: bool = False,
    before: bool | None = None,
    united: bool = False,
) -> list[Kernel]:
    """The kernels of a training step of one layer, residual block or stem.

    Args:
        layers: its convolutions, one behind the other.
        dtype: of the activations.
        shortcut: "none", "identity" or "padded"; a projection says so itself.
        projection: the shortcut's convolution.
        pooled: shape behind the max pooling that ends a stem.
        folds: whether BatchNorm's forward and backward are applied as kernels read; else passes
            of their own write what the convolutions read.
        input_gradient: whether the gradient of the input is wanted.
        parameter: dtype of the weights' gradients.
        merged: places of the convolutions whose two gradients one kernel makes, the projection's
            behind the last.
        ended: whether the node behind this one makes the gradient behind its end.
        before: whether the node before, the gradient behind whose end this one makes, has a
            projection; None: it makes none.
        united: whether with it one kernel makes both gradients of the first convolution.

    Returns:
        In order: forward, then backward.
    """
    found = _convolutions(layers, dtype, folds)
    last = len(layers) - 1
    final = layers[-1].output_shape

    def add(layer: int, op: str, cost: Cost, backward: bool = True) -> None:
        found.append(Kernel(layer, op, cost, backward))

    added = 0
    if projection is not None:
        add(last + 1, "conv_bn_stats", conv_bn_stats_cost(projection, dtype), False)
        added = _elements(final)
    elif shortcut in ("identity", "given"):
        added = _elements(final)
    elif shortcut == "padded":
        added = _elements(final) // final[1] * layers[0].input_shape[1]
    if pooled is not None:
        add(last, "bn_act_pool", bn_act_pool_cost(final, pooled, dtype), False)
        add(last, "bn_act_pool_backward", bn_act_pool_backward_cost(final, pooled, dtype))
    else:
        projected = projection is not None
        forward = bn_add_act_cost(final, dtype, residual=added, projected=projected)
        add(last, "bn_add_act", forward, False)
        backward = bn_add_act_backward_cost(final, dtype, out=added > 0, projected=projected)
        if not ended:
            add(last, "bn_add_act_backward", backward)

    def gradients(index: int, case: ConvShape, inner: bool, addend: int) -> None:
        wanted, below = inner or input_gradient, before if index == 0 else None
        one, thinned = index in merged, index > last and thins(case)
        for op, cost in _gradients(
            case, dtype, inner, addend, folds, wanted, parameter, one, below, thinned, united
        ):
            add(index, op, cost)

    if projection is not None:
        gradients(last + 1, projection, False, 0)
        added = _read_by(projection) if thins(projection) else _elements(projection.input_shape)
    for index in reversed(range(last + 1)):
        gradients(index, layers[index], index > 0, added if index == 0 else 0)
    return found


def _convolutions(layers: Sequence[ConvShape], dtype: torch.dtype, folds: bool) -> list[Kernel]:
    """The kernels of convolutions in a row, forward; see `node_kernels`."""
    found = []
    for index, case in enumerate(layers):
        if index and not folds:
            between = bn_add_act_cost(case.input_shape, dtype)
            found.append(Kernel(index, "bn_add_act", between, False))
        cost = conv_bn_stats_cost(case, dtype, prologue=folds and index > 0)
        found.append(Kernel(index, "conv_bn_stats", cost, False))
    return found


def _gradients(
    case: ConvShape,
    dtype: torch.dtype,
    inner: bool,
    addend: int,
    folds: bool,
    of_input: bool,
    parameter: torch.dtype | None,
    merged: bool,
    before: bool | None,
    thinned: bool,
    united: bool,
) -> list[tuple[str, Cost]]:
    """The kernels of one convolution's gradients; see `node_kernels`."""
    options: dict[str, Any] = {"affine": folds, "addend": addend, "masked": inner}
    ends = of_input and before is not None
    if merged and not ends:
        both = conv_bn_grad1x1_cost(case, dtype, parameter=parameter, **options)
        return [("conv_bn_grad1x1", both)]
    if ends and united and folds:
        options = {"addend": addend, "projected": before, "parameter": parameter}
        return [("conv_bn_grad1x1_end", conv_bn_grad1x1_end_cost(case, dtype, **options))]
    found = []
    if not folds:
        found.append(("bn_backward_apply", bn_backward_apply_cost(case.output_shape, dtype)))
        if inner:
            found.append(("bn_add_act", bn_add_act_cost(case.input_shape, dtype)))
    prologue = folds and inner
    weight = conv_bn_wgrad_cost(case, dtype, affine=folds, prologue=prologue, parameter=parameter)
    found.append(("conv_bn_wgrad", weight))
    if ends:
        options = {"affine": folds, "addend": addend, "projected": before}
        found.append(("conv_bn_dgrad_end", conv_bn_dgrad_end_cost(case, dtype, **options)))
    elif of_input:
        cost = conv_bn_dgrad_cost(case, dtype, thinned=thinned, **options)
        found.append(("conv_bn_dgrad", cost))
    return found
