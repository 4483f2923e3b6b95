"""The ops that are tuned: what a launch takes and writes, and what its choice is found by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.bench.work import Work
from resnet_fused.triton import _limits, _tiles

Names = frozenset[str] | None


@dataclass(frozen=True)
class Op:
    """An op whose configurations are tuned.

    Attributes:
        shapes: (operands, case) -> shapes of its results; behind the first they are per-channel
            values in float32.
        arguments: (operands, results) -> of a launch, up to the geometry.
        product: (its Triton module, operands, case) -> what configurations are chosen by.
        third: operands -> what else decides, see `_tuned.key`.
        offered: (its Triton module, operands, product, allowed) -> names to choose among.
        cuda: operands -> what its CUDA kernel's plan looks at; None without such a kernel.
        behind: case -> arguments of a launch behind the geometry.
    """

    shapes: Callable[[Any, Any], tuple[tuple[int, ...], ...]]
    arguments: Callable[[Any, tuple[Tensor, ...]], tuple[Any, ...]]
    product: Callable[[Any, Any, Any], _tiles.Product]
    third: Callable[[Any], Tensor | None]
    offered: Callable[[Any, Any, _tiles.Product, Names], Names] = lambda _m, _o, _p, names: names
    cuda: Callable[[Any], tuple[Tensor | None, ...]] | None = None
    behind: Callable[[Any], tuple[Any, ...]] = lambda _case: ()


def _like(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=t.dtype, device="meta")


def _offered_wgrad(module: Any, o: Any, product: _tiles.Product, names: Names) -> Names:
    limits = _limits.limits(o.dz.device)
    return module.offered(product, o.y is not None, o.norm is not None, limits, names)


OPS: dict[str, Op] = {
    "conv_bn_act": Op(
        lambda o, case: (case.output_shape,),
        lambda o, outs: (o.x, o.weight, o.scale, o.shift, o.residual, *outs),
        lambda module, o, case: module.product_of(
            o.x, o.weight, _like(o.x, case.output_shape), case.groups
        ),
        lambda o: o.residual,
        cuda=lambda o: (o.x, o.weight, o.residual),
        behind=lambda case: (case.act,),
    ),
    "conv_bn_stats": Op(
        lambda o, case: (case.output_shape, (2, case.k)),
        lambda o, outs: (o.x, o.norm, o.weight, *outs),
        lambda module, o, case: module.product_of(
            o.x, o.norm, o.weight, _like(o.x, case.output_shape), case.groups
        ),
        lambda o: o.norm,
    ),
    "conv_bn_dgrad": Op(
        lambda o, case: (case.input_shape, (0 if o.norm is None else 2, case.c)),
        lambda o, outs: (
            o.dz, o.y, o.coefficients, o.weight, o.addend, None if o.norm is None else o.x, o.norm,
            *outs, 1,
        ),
        lambda module, o, case: module.product_of(
            _like(o.dz, case.input_shape), o.weight, case.stride, case.groups, o.y is not None
        ),
        lambda o: o.y,
    ),
    "conv_bn_dgrad_end": Op(
        lambda o, case: (case.input_shape, (2, case.c)),
        lambda o, outs: (
            o.dz, o.y, o.coefficients, o.weight, o.addend, o.h, o.x, o.norm, None, None, *outs, 1,
        ),
        lambda module, o, case: module.product_of(
            _like(o.dz, case.input_shape), o.weight, case.stride, case.groups, o.y is not None
        ),
        lambda o: o.y,
    ),
    "conv_bn_wgrad": Op(
        lambda o, case: (case.weight_shape,),
        lambda o, outs: (o.dz, o.y, o.coefficients, o.x, o.norm, *outs),
        lambda module, o, case: module.product_of(o.dz, o.weight, case.groups),
        lambda o: o.y,
        _offered_wgrad,
    ),
    "conv_dgrad": Op(
        lambda o, case: (case.input_shape,),
        lambda o, outs: (o.dy, o.y, o.weight, o.scale, *outs),
        lambda module, o, case: module.product_of(
            _like(o.dy, case.input_shape), o.weight, case.stride, case.groups
        ),
        lambda o: o.y,
        cuda=lambda o: (o.dy, o.y, o.weight),
    ),
    "conv_wgrad": Op(
        lambda o, case: (case.weight_shape,),
        lambda o, outs: (o.dy, o.y, o.x, o.scale, *outs),
        lambda module, o, case: module.product_of(o.dy, o.weight, case.groups),
        lambda o: o.y,
        cuda=lambda o: (o.dy, o.y, o.x),
    ),
}  # fmt: skip
"""Those of inference first, then of training with batch statistics, then with fixed ones."""


def geometry_of(case: Any) -> tuple[Any, ...]:
    """Stride, padding, dilation, groups."""
    return case.stride, case.padding, case.dilation, case.groups


def outputs(work: Work) -> tuple[Tensor, ...]:
    """Empty results of the op, channels_last, per-channel values in float32."""
    subject = work.subject
    shapes = OPS[subject.op].shapes(work.sets[0], work.case)
    first = torch.empty(
        shapes[0], dtype=subject.torch_dtype, device=subject.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    rest = (torch.empty(shape, device=subject.device) for shape in shapes[1:])
    return (first, *rest)


def arguments(work: Work, i: int, outs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Of a launch into `outs`, for either implementation."""
    op, case = OPS[work.subject.op], work.case
    return (*op.arguments(work.sets[i], outs), *geometry_of(case), *op.behind(case))
