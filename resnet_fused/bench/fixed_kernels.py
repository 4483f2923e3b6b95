"""The ops around a BatchNorm that is a scale and a shift, as subjects: see `kinds`.

Eager's way is PyTorch's calls, one after the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import numerics, ops
from resnet_fused.bench.kinds import Function, Kind, Result, each, weight, widest
from resnet_fused.cases import BnActCase, ConvCase
from resnet_fused.roofline import Cost, bn_act_cost, conv_cost, conv_dgrad_cost, conv_wgrad_cost

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Layer

EPS = 1e-5  # of the BatchNorms that stand for a kernel's scale and shift


@dataclass(frozen=True)
class ConvOperands:
    """Tensors of one call of a convolution's op; None where the op takes none.

    Attributes:
        weight: [K, C / groups, R, S], in the subject's dtype and channels_last.
        scale, shift: [K] float32.
        x: [N, C, H, W]; None for conv_dgrad.
        residual: [N, K, P, Q], for conv_bn_act with a shortcut.
        dy: [N, K, P, Q], the result's gradient, for conv_dgrad and conv_wgrad.
        y: [N, K, P, Q], the result itself, whose sign is ReLU's mask; None without ReLU.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    x: Tensor | None = None
    residual: Tensor | None = None
    dy: Tensor | None = None
    y: Tensor | None = None


@dataclass(frozen=True)
class BnOperands:
    """x and residual [N, C, H, W] in channels_last; scale and shift [C] float32."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None = None


def unit_statistics(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [K] under which a BatchNorm's weight and bias are scale and shift."""
    return torch.zeros_like(scale), torch.full_like(scale, 1.0 - EPS)


def _forward_case(layer: Layer) -> ConvCase:
    return dataclasses.replace(layer.case, name="")


def _weight_case(layer: Layer) -> ConvCase:
    # The shortcut takes no part in these gradients.
    return dataclasses.replace(layer.case, residual=False, name="")


def _input_case(layer: Layer) -> ConvCase | None:
    return None if layer.first else _weight_case(layer)


def _bn_case(layer: Layer) -> BnActCase:
    n, k, p, q = layer.case.output_shape
    return BnActCase("", n, k, p, q, layer.case.residual, layer.case.act)


def _make_forward(make: Any, case: ConvCase) -> ConvOperands:
    made = weight(make, case)
    given = {"x": make.image(*case.input_shape)}
    if case.residual:
        given["residual"] = make.image(*case.output_shape)
    scale, shift = make.affine(case.k)
    return ConvOperands(made, scale, shift, **given)


def _make_gradient(make: Any, case: ConvCase, of_input: bool) -> ConvOperands:
    made = weight(make, case)
    given = {} if of_input else {"x": make.image(*case.input_shape)}
    given["dy"] = make.image(*case.output_shape)
    if case.act == "relu":
        given["y"] = make.image(*case.output_shape).relu_()
    scale, shift = make.affine(case.k)
    return ConvOperands(made, scale, shift, **given)


def _make_bn(make: Any, case: BnActCase) -> BnOperands:
    residual, x = make.image(*case.shape) if case.residual else None, make.image(*case.shape)
    scale, shift = make.affine(case.c)
    return BnOperands(x, scale, shift, residual)


def _eager_bn(case: ConvCase | BnActCase, like: Any) -> Callable[[Tensor, Any], Tensor]:
    mean, variance = unit_statistics(like.scale)

    def finish(y: Tensor, o: Any) -> Tensor:
        y = F.batch_norm(y, mean, variance, o.scale, o.shift, False, 0.0, EPS)
        if o.residual is not None:
            y = y.add_(o.residual)
        return F.relu_(y) if case.act == "relu" else y

    return finish


def _eager_forward(case: ConvCase, like: ConvOperands) -> Function:
    finish, geometry = _eager_bn(case, like), (case.stride, case.padding, case.dilation)
    return lambda o: finish(torch.conv2d(o.x, o.weight, None, *geometry, case.groups), o)


def _eager_alone(case: BnActCase, like: BnOperands) -> Function:
    finish = _eager_bn(case, like)
    return lambda o: finish(o.x, o)


def _eager_gradient(case: ConvCase, like: ConvOperands, of_input: bool) -> Function:
    """ReLU's mask, BatchNorm's scale, the convolution's gradient."""
    stride, padding, dilation, groups = case.geometry.values()
    mask = (of_input, not of_input, False)
    weight = like.weight
    form = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
    # The gradient of the input asks for the input's shape and layout alone.
    shape = torch.empty(
        case.input_shape if of_input else (1, 1, 1, 1), dtype=weight.dtype, device=weight.device,
        memory_format=form,
    )  # fmt: skip

    def run(o: ConvOperands) -> Tensor:
        dz = o.dy if o.y is None else torch.ops.aten.threshold_backward(o.dy, o.y, 0)
        assert dz is not None
        # As BatchNorm's gradient does, in one pass: float32 within, rounded once.
        g = torch.empty_like(dz)
        torch.mul(dz, o.scale.view(1, -1, 1, 1), out=g)
        found = torch.ops.aten.convolution_backward(
            g, shape if of_input else o.x, o.weight, None, stride, padding, dilation, False, [0, 0],
            groups, mask,
        )  # fmt: skip
        return found[0 if of_input else 1]

    return run


def _bound_forward(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    terms = (o.x, o.weight, o.scale, o.shift, o.residual)
    oracle = numerics.conv_bn_act_oracle(*terms, **case.geometry, act=case.act)
    found = (
        numerics.conv_bn_act_bound(
            *terms, oracle=oracle, **case.geometry, rounding=rounding, **sums
        )
        for rounding in numerics.ROUNDINGS
    )
    oracle, bound = widest((oracle, one) for one in found)
    # Libraries that fold take the shift as a bias in the tensors' dtype.
    u = numerics.unit_roundoff(o.x.dtype)
    return oracle, bound + u * o.shift.double().abs().view(1, -1, 1, 1)


def _bound_gradient(case: ConvCase, o: Any, index: int, **sums: Any) -> tuple[Tensor, Tensor]:
    # The gradient of the input does not depend on x, that of the weight not on the weight's values.
    x = o.dy.new_zeros(len(o.dy), *case.input_shape[1:]) if o.x is None else o.x
    given = (o.dy, o.y, x, o.weight, o.scale)
    both = numerics.conv_gradients_oracle(*given, **case.geometry)
    bounds = numerics.conv_gradients_bound(*given, both, **case.geometry, rounding="folded", **sums)
    return both[index], bounds[index]


def _bound_input(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    return _bound_gradient(case, o, 0, **sums)


def _bound_weight(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    return _bound_gradient(case, o, 1, **sums)


def _bound_bn(case: BnActCase, o: Any, **_: Any) -> tuple[Tensor, Tensor]:
    oracle = numerics.bn_act_oracle(o.x, o.scale, o.shift, o.residual, case.act)
    return oracle, numerics.bn_act_bound(o.x, o.scale, o.shift, o.residual, oracle)


def _plain(case: ConvCase) -> ConvCase:
    return dataclasses.replace(case, act="none", residual=False)


def after(shape: tuple[int, ...], dtype: torch.dtype, residual: bool, relu: bool) -> list[Cost]:
    """Eager's passes behind a convolution: BatchNorm, the add, the ReLU."""
    size = math.prod(shape) * dtype.itemsize
    return [Cost(0, n * size) for n in (2, 3 * residual, 2 * relu) if n]


def _forward_passes(case: ConvCase, dtype: torch.dtype) -> tuple[Cost, ...]:
    conv = conv_cost(_plain(case), dtype)
    conv = Cost(conv.flops, conv.bytes - 2 * case.k * max(dtype.itemsize, 4))
    return (conv, *after(case.output_shape, dtype, case.residual, case.act == "relu"))


def _gradient_passes(case: ConvCase, dtype: torch.dtype, cost: Any) -> tuple[Cost, ...]:
    """The mask (3 tensors) and the scale (2), then the convolution's own."""
    size = math.prod(case.output_shape) * dtype.itemsize
    before = [Cost(0, n * size) for n in (3 * (case.act == "relu"), 2) if n]
    return (*before, cost(_plain(case), dtype))


KINDS: dict[str, Kind] = {
    "conv_bn_act": Kind(
        ConvCase,
        each(_forward_case),
        _make_forward,
        lambda case: lambda o: ops.conv_bn_act(
            o.x, o.weight, o.scale, o.shift, o.residual, act=case.act, **case.geometry
        ),
        _eager_forward,
        (Result("y", _bound_forward),),
        lambda case, dtype: conv_cost(case, dtype),
        _forward_passes,
        inference=True,
    ),
    "conv_dgrad": Kind(
        ConvCase,
        each(_input_case),
        lambda make, case: _make_gradient(make, case, True),
        lambda case: lambda o: ops.conv_dgrad(
            o.dy, o.weight, o.scale, o.y, input_size=(o.dy.shape[0], *case.input_shape[1:]),
            **case.geometry,
        ),
        lambda case, like: _eager_gradient(case, like, True),
        (Result("dx", _bound_input),),
        lambda case, dtype: conv_dgrad_cost(case, dtype),
        lambda case, dtype: _gradient_passes(case, dtype, conv_dgrad_cost),
    ),
    "conv_wgrad": Kind(
        ConvCase,
        each(_weight_case),
        lambda make, case: _make_gradient(make, case, False),
        lambda case: lambda o: ops.conv_wgrad(
            o.dy, o.x, o.weight, o.scale, o.y, **case.geometry
        ),
        lambda case, like: _eager_gradient(case, like, False),
        (
            Result(
                "dweight",
                _bound_weight,
                filters={"weight": 0, "scale": 0, "shift": 0, "dy": 1, "y": 1},
            ),
        ),
        lambda case, dtype: conv_wgrad_cost(case, dtype),
        lambda case, dtype: _gradient_passes(case, dtype, conv_wgrad_cost),
    ),
    "bn_act": Kind(
        BnActCase,
        each(_bn_case),
        _make_bn,
        lambda case: lambda o: ops.bn_act(o.x, o.scale, o.shift, o.residual, act=case.act),
        _eager_alone,
        (Result("y", _bound_bn),),
        lambda case, dtype: bn_act_cost(case.shape, dtype, residual=case.residual),
        lambda case, dtype: tuple(after(case.shape, dtype, case.residual, case.act == "relu")),
        inference=True,
    ),
}  # fmt: skip
"""Op -> what the benchmark asks of it."""
