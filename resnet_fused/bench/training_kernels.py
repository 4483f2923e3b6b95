"""The ops of training with batch statistics as subjects: see `kinds`.

In a case, `act="relu"` says that a BatchNorm and ReLU stand below the convolution (it reads through
them, and its gradient is masked), `residual` that a shortcut's gradient is added. Eager's way is
the calls of PyTorch that give the same results.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import numerics, ops, roofline
from resnet_fused.bench.kinds import (
    Function,
    Kind,
    Result,
    by_channels,
    each,
    elements,
    tensor_pass,
    weight,
)
from resnet_fused.cases import BnActCase, ConvCase
from resnet_fused.ops import _grad1x1
from resnet_fused.roofline import Cost

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Layer

EPS = 1e-5
SCALE, SHIFT, MEAN, INVSTD = range(4)


@dataclass(frozen=True)
class TrainingOperands:
    """Tensors of one call; None where the op takes none.

    Attributes:
        weight: [K, C / groups, R, S].
        x: [N, C, H, W], what the convolution reads, or the raw output that it reads through `norm`.
        norm: [4, C] of the BatchNorm below.
        h: relu(scale * x + shift), which eager has stored; x itself without `norm`.
        dz: [N, K, P, Q], gradient behind the convolution's BatchNorm.
        y: [N, K, P, Q], raw output.
        own: [4, K] of its BatchNorm.
        gamma: [K] of it.
        coefficients: [3, K].
        dy: [N, K, P, Q], A dz + B y + C.
        addend: [N, C, H, W].
        residual: [N, K, P, Q].
        out: [N, K, P, Q], the block's output.
    """

    weight: Tensor | None = None
    x: Tensor | None = None
    norm: Tensor | None = None
    h: Tensor | None = None
    dz: Tensor | None = None
    y: Tensor | None = None
    own: Tensor | None = None
    gamma: Tensor | None = None
    coefficients: Tensor | None = None
    dy: Tensor | None = None
    addend: Tensor | None = None
    residual: Tensor | None = None
    out: Tensor | None = None


def _inner(layer: Layer) -> bool:
    """Whether a layer reads another one of its block."""
    return re.search(r"\.conv[2-9]$", layer.name) is not None


def _forward_case(layer: Layer) -> ConvCase:
    act = "relu" if _inner(layer) else "none"
    return dataclasses.replace(layer.case, act=act, residual=False, name="")


def _input_gradient_case(layer: Layer) -> ConvCase | None:
    if layer.first:
        return None
    first = layer.name.endswith(".conv1")
    return dataclasses.replace(_forward_case(layer), residual=first)


def _both_gradients_case(layer: Layer) -> ConvCase | None:
    case = _input_gradient_case(layer)
    if case is None:
        return None
    plain = _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups)
    return case if plain else None


def _end_case(layer: Layer) -> BnActCase | None:
    if not layer.case.residual:
        return None
    _, k, p, q = layer.case.output_shape
    return BnActCase("", layer.case.n, k, p, q, True, "relu")


def _following_case(layer: Layer) -> ConvCase | None:
    """Of a 1x1 convolution behind another block of its stage."""
    case = layer.case
    behind = layer.name.endswith(".conv1") and not layer.name.endswith(".0.conv1")
    plain = _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups)
    return (
        dataclasses.replace(case, act="none", residual=False, name="") if behind and plain else None
    )


def _norm_of(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """[4, K] of a raw output's own statistics."""
    variance, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    return ops.bn_finalize(torch.stack((mean, variance * count)), count, gamma, beta, eps=EPS)


def _below(make: Any, case: ConvCase) -> dict[str, Tensor]:
    x = make.image(*case.input_shape)
    if case.act != "relu":
        return {"x": x, "h": x}
    norm = _norm_of(x, *make.affine(case.c))
    return {"x": x, "norm": norm, "h": ops.bn_add_act(x, norm)}


def _above(make: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    dz, y = make.image(*shape), make.image(*shape)
    gamma, beta = make.affine(shape[1])
    own = _norm_of(y, gamma, beta)
    _, sums = ops.bn_add_act_backward(dz, None, y, own, act="none")
    coefficients, _, _ = ops.bn_backward_finalize(sums, own, dz.numel() // shape[1])
    dy = ops.bn_backward_apply(dz, y, coefficients)
    return {
        "dz": dz, "y": y, "own": own, "gamma": gamma, "coefficients": coefficients, "dy": dy,
    }  # fmt: skip


def _make_forward(make: Any, case: ConvCase) -> TrainingOperands:
    return TrainingOperands(weight(make, case), **_below(make, case))


def _make_finalized(make: Any, case: ConvCase) -> TrainingOperands:
    """Rows 2 and 3 of `own` are the running statistics, which each call updates."""
    gamma, beta = make.affine(case.k)
    own = torch.stack((gamma, beta, torch.zeros_like(gamma), torch.ones_like(gamma)))
    return dataclasses.replace(_make_forward(make, case), gamma=gamma, own=own)


def _make_gradient(make: Any, case: ConvCase) -> TrainingOperands:
    given = {**_below(make, case), **_above(make, case.output_shape)}
    if case.residual:
        given["addend"] = make.image(*case.input_shape)
    return TrainingOperands(weight(make, case), **given)


def _make_end(make: Any, case: BnActCase) -> TrainingOperands:
    given = _above(make, case.shape)
    residual = make.image(*case.shape)
    out = ops.bn_add_act(given["y"], given["own"], residual)
    return TrainingOperands(**given, residual=residual, out=out)


def _make_following(make: Any, case: ConvCase) -> TrainingOperands:
    y, residual = make.image(*case.input_shape), make.image(*case.input_shape)
    own = _norm_of(y, *make.affine(case.c))
    out = ops.bn_add_act(y, own, residual)
    return TrainingOperands(weight(make, case), y=y, own=own, residual=residual, out=out)


def _apply(x: Tensor, norm: Tensor) -> Tensor:
    """BatchNorm by PyTorch's own call, with statistics that are known."""
    gamma = norm[SCALE] / norm[INVSTD]
    beta = norm[SHIFT] + norm[MEAN] * norm[SCALE]
    variance = norm[INVSTD].double().square().reciprocal().float() - EPS
    return F.batch_norm(x, norm[MEAN], variance, gamma, beta, False, 0.0, EPS)


def _eager_forward(case: ConvCase, _like: Any) -> Function:
    stride, padding, dilation, groups = case.stride, case.padding, case.dilation, case.groups

    def run(o: TrainingOperands) -> Tensor:
        assert o.x is not None
        assert o.weight is not None
        h = o.x if o.norm is None else F.relu_(_apply(o.x, o.norm))
        y = F.conv2d(h, o.weight, None, stride, padding, dilation, groups)
        running = (None, None) if o.own is None else (o.own[MEAN], o.own[INVSTD])
        torch.batch_norm_update_stats(y, *running, 0.1)
        return y

    return run


def _ours_finalized(case: ConvCase) -> Function:
    def run(o: TrainingOperands) -> tuple[Tensor, Tensor]:
        assert o.own is not None
        _, beta, mean, variance = o.own
        y, stats, _ = ops.conv_bn_stats_finalize(
            o.x, o.weight, o.norm, o.gamma, beta, running_mean=mean, running_var=variance,
            **case.geometry,
        )  # fmt: skip
        return y, stats

    return run


def _eager_normalised(o: TrainingOperands) -> Tensor:
    """The gradient of the raw output by BatchNorm's own backward."""
    assert o.own is not None
    found = torch.ops.aten.native_batch_norm_backward(
        o.dz, o.y, o.gamma, None, None, o.own[MEAN], o.own[INVSTD], True, EPS, [True, False, False]
    )
    return found[0]


def _eager_gradient(case: ConvCase, of_input: bool, of_weight: bool) -> Function:
    stride, padding, dilation, groups = case.geometry.values()

    def run(o: TrainingOperands) -> Any:
        dy = _eager_normalised(o)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, o.h, o.weight, None, stride, padding, dilation, False, [0, 0], groups,
            [of_input, of_weight, False],
        )  # fmt: skip
        if not of_input:
            return dweight
        if o.addend is not None:
            dx = dx + o.addend
        dx = dx if o.norm is None else torch.ops.aten.threshold_backward(dx, o.h, 0)
        return (dx, dweight) if of_weight else dx

    return run


def _eager_end(_case: BnActCase, _like: Any) -> Function:
    def run(o: TrainingOperands) -> Tensor:
        assert o.y is not None
        assert o.own is not None
        return F.relu_(_apply(o.y, o.own).add_(o.residual))

    return run


def _eager_following(case: ConvCase, _like: Any) -> Function:
    end = _eager_end(_as_end(case), None)

    def run(o: TrainingOperands) -> tuple[Tensor, Tensor]:
        assert o.weight is not None
        out = end(o)
        z = F.conv2d(out, o.weight)
        torch.batch_norm_update_stats(z, None, None, 0.1)
        return z, out

    return run


def _as_end(case: ConvCase) -> BnActCase:
    """The end that a convolution stands behind."""
    return BnActCase("", *case.input_shape, True, "relu")


def _ours_following(_case: ConvCase) -> Function:
    def run(o: TrainingOperands) -> tuple[Tensor, Tensor, Tensor]:
        out, z, stats = ops.bn_add_act_conv_stats(o.y, o.own, o.residual, o.weight)
        return z, out, stats

    return run


def _eager_end_backward(_case: BnActCase, _like: Any) -> Function:
    def run(o: TrainingOperands) -> Tensor:
        assert o.own is not None
        dz = torch.ops.aten.threshold_backward(o.dz, o.out, 0)
        torch.ops.aten.native_batch_norm_backward(
            dz, o.y, o.gamma, None, None, o.own[MEAN], o.own[INVSTD], True, EPS,
            [False, True, True],
        )  # fmt: skip
        return dz

    return run


def _ours_dgrad(case: ConvCase) -> Function:
    size = case.input_shape
    return lambda o: ops.conv_bn_dgrad(
        o.dz, o.weight, o.y, o.coefficients, input_size=(o.dz.shape[0], *size[1:]),
        addend=o.addend, raw=None if o.norm is None else o.x, norm=o.norm, **case.geometry,
    )  # fmt: skip


def _ours_both(_case: ConvCase) -> Function:
    def run(o: TrainingOperands) -> tuple[Tensor, Tensor, Tensor]:
        dx, sums, dweight = ops.conv_bn_grad1x1(
            o.dz, o.x, o.weight, o.y, o.coefficients, o.norm, addend=o.addend
        )
        return dx, dweight, sums

    return run


def _bound_forward(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    oracle = numerics.conv_bn_stats_oracle(o.x, o.norm, o.weight, **case.geometry)
    bound = numerics.conv_bn_stats_bound(o.x, o.norm, o.weight, oracle, **case.geometry, **sums)
    return oracle, bound


def _bound_dgrad(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    raw = None if o.norm is None else o.x
    given = (o.dz, o.y, o.coefficients, o.weight, o.addend, raw, o.norm)
    size = (o.dz.shape[0], *case.input_shape[1:])
    oracle = numerics.conv_bn_dgrad_oracle(*given, input_size=size, **case.geometry)
    return oracle, numerics.conv_bn_dgrad_bound(*given, oracle, **case.geometry, **sums)


def _bound_wgrad(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    given = (o.dz, o.y, o.coefficients, o.x, o.norm, o.weight)
    oracle = numerics.conv_bn_wgrad_oracle(*given, **case.geometry)
    return oracle, numerics.conv_bn_wgrad_bound(*given, oracle, **case.geometry, **sums)


def _bound_end(case: BnActCase, o: Any, **_: Any) -> tuple[Tensor, Tensor]:
    oracle = numerics.bn_add_act_oracle(o.y, o.own, o.residual)
    return oracle, numerics.bn_add_act_bound(o.y, o.own, o.residual, None, 0, oracle)


def _bound_following(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    return _bound_forward(case, dataclasses.replace(o, x=o.out), **sums)


def _bound_end_backward(case: BnActCase, o: Any, **_: Any) -> tuple[Tensor, Tensor]:
    dz = torch.where(o.out <= 0, 0.0, o.dz.double())
    return dz, torch.zeros_like(dz)


def _stats_of(_case: ConvCase, _o: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 of what was written."""
    oracle = by_channels(numerics.stats_oracle, y)
    return oracle, numerics.stats_bound(y, oracle)


def _reductions(dz: Tensor, raw: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    branch = (raw, norm)
    return (
        by_channels(numerics.reductions_oracle, dz, branch),
        by_channels(numerics.reductions_bound, dz, branch),
    )


def _sums_below(_case: ConvCase, o: Any, dz: Tensor) -> tuple[Tensor, Tensor] | None:
    return None if o.norm is None else _reductions(dz, o.x, o.norm)


def _sums_of_end(_case: BnActCase, o: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
    return _reductions(dz, o.y, o.own)


OF_FILTERS = {"weight": 0, "dz": 1, "y": 1, "coefficients": 1}
"""Operands with a dimension of output channels, and which it is."""


def _forward_passes(case: ConvCase, dtype: torch.dtype) -> tuple[Cost, ...]:
    conv = roofline.conv_bn_stats_cost(case, dtype)
    below = (tensor_pass(case.input_shape, dtype, 2),) * (2 if case.act == "relu" else 0)
    statistics = Cost(0, tensor_pass(case.output_shape, dtype, 2).bytes // 2)
    return (*below, conv, statistics)


def _following_passes(case: ConvCase, dtype: torch.dtype) -> tuple[Cost, ...]:
    end = tuple(tensor_pass(case.input_shape, dtype, n) for n in (2, 3, 2))
    return (*end, *_forward_passes(case, dtype))


def _gradient_passes(
    case: ConvCase, dtype: torch.dtype, of_input: bool, of_weight: bool
) -> tuple[Cost, ...]:
    found = [tensor_pass(case.output_shape, dtype, 2), tensor_pass(case.output_shape, dtype, 3)]
    if of_weight:
        found.append(roofline.conv_bn_wgrad_cost(case, dtype, affine=False))
    if of_input:
        after = [tensor_pass(case.input_shape, dtype, 3)] * (case.residual + (case.act == "relu"))
        found += [roofline.conv_bn_dgrad_cost(case, dtype, affine=False), *after]
    return tuple(found)


KINDS: dict[str, Kind] = {
    "conv_bn_stats": Kind(
        ConvCase,
        each(_forward_case),
        _make_forward,
        lambda case: lambda o: ops.conv_bn_stats(o.x, o.weight, o.norm, **case.geometry),
        _eager_forward,
        (Result("y", _bound_forward), Result("stats", follows=_stats_of)),
        lambda case, dtype: roofline.conv_bn_stats_cost(
            case, dtype, prologue=case.act == "relu"
        ),
        _forward_passes,
    ),
    "conv_bn_stats_finalize": Kind(
        ConvCase,
        each(_forward_case),
        _make_finalized,
        _ours_finalized,
        _eager_forward,
        (Result("y", _bound_forward), Result("stats", follows=_stats_of)),
        lambda case, dtype: roofline.conv_bn_stats_cost(
            case, dtype, prologue=case.act == "relu"
        ),
        _forward_passes,
    ),
    "conv_bn_dgrad": Kind(
        ConvCase,
        each(_input_gradient_case),
        _make_gradient,
        _ours_dgrad,
        lambda case, _: _eager_gradient(case, True, False),
        (Result("dz", _bound_dgrad), Result("sums", follows=_sums_below)),
        lambda case, dtype: roofline.conv_bn_dgrad_cost(
            case, dtype, addend=elements(case.input_shape) * case.residual,
            masked=case.act == "relu",
        ),
        lambda case, dtype: _gradient_passes(case, dtype, True, False),
    ),
    "conv_bn_wgrad": Kind(
        ConvCase,
        each(_forward_case),
        _make_gradient,
        lambda case: lambda o: ops.conv_bn_wgrad(
            o.dz, o.x, o.weight, o.y, o.coefficients, o.norm, **case.geometry
        ),
        lambda case, _: _eager_gradient(case, False, True),
        (Result("dweight", _bound_wgrad, filters=OF_FILTERS),),
        lambda case, dtype: roofline.conv_bn_wgrad_cost(
            case, dtype, prologue=case.act == "relu"
        ),
        lambda case, dtype: _gradient_passes(case, dtype, False, True),
    ),
    "conv_bn_grad1x1": Kind(
        ConvCase,
        each(_both_gradients_case),
        _make_gradient,
        _ours_both,
        lambda case, _: _eager_gradient(case, True, True),
        (
            Result("dz", _bound_dgrad),
            Result("dweight", _bound_wgrad, filters=OF_FILTERS),
            Result("sums", follows=_sums_below),
        ),
        lambda case, dtype: roofline.conv_bn_grad1x1_cost(
            case, dtype, addend=elements(case.input_shape) * case.residual,
            masked=case.act == "relu",
        ),
        lambda case, dtype: _gradient_passes(case, dtype, True, True),
    ),
    "bn_add_act": Kind(
        BnActCase,
        each(_end_case),
        _make_end,
        lambda case: lambda o: ops.bn_add_act(o.y, o.own, o.residual),
        _eager_end,
        (Result("out", _bound_end),),
        lambda case, dtype: roofline.bn_add_act_cost(
            case.shape, dtype, residual=elements(case.shape)
        ),
        lambda case, dtype: tuple(tensor_pass(case.shape, dtype, n) for n in (2, 3, 2)),
    ),
    "bn_add_act_conv_stats": Kind(
        ConvCase,
        each(_following_case),
        _make_following,
        _ours_following,
        _eager_following,
        (
            Result("z", _bound_following),
            Result("out", _bound_end),
            Result("stats", follows=_stats_of),
        ),
        roofline.bn_add_act_conv_stats_cost,
        _following_passes,
    ),
    "bn_add_act_backward": Kind(
        BnActCase,
        each(_end_case),
        _make_end,
        lambda case: lambda o: ops.bn_add_act_backward(o.dz, o.out, o.y, o.own),
        _eager_end_backward,
        (Result("dz", _bound_end_backward), Result("sums", follows=_sums_of_end)),
        lambda case, dtype: roofline.bn_add_act_backward_cost(case.shape, dtype),
        lambda case, dtype: (tensor_pass(case.shape, dtype, 3), tensor_pass(case.shape, dtype, 2)),
    ),
}  # fmt: skip
"""Op -> what the benchmark asks of it."""
