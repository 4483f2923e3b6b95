"""The ops of training with batch statistics as subjects: see `kinds`.

In a case, `act="relu"` says that a BatchNorm and ReLU stand below the convolution (it reads through
them, and its gradient is masked), `residual` that a shortcut's gradient is added. That of
`conv_bn_dgrad_end` and `conv_bn_grad1x1_end` always is, and the block before has no projection.
Eager's way is the calls of PyTorch that give the same results.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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
)
from resnet_fused.bench.training_operands import (
    EPS,
    INVSTD,
    MEAN,
    SCALE,
    SHIFT,
    TrainingOperands,
    behind_case,
    both_gradients_case,
    end_case,
    following_case,
    forward_case,
    input_gradient_case,
    make_behind,
    make_end,
    make_finalized,
    make_following,
    make_forward,
    make_gradient,
    united_case,
)
from resnet_fused.cases import BnActCase, ConvCase
from resnet_fused.roofline import Cost


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


def _eager_behind(case: ConvCase, of_weight: bool) -> Function:
    gradient = _eager_gradient(case, True, of_weight)

    def run(o: TrainingOperands) -> Any:
        assert o.norm is not None
        found = gradient(o)
        dz = found[0] if of_weight else found
        # gamma's place: its shape alone counts for the gradients of gamma and beta.
        torch.ops.aten.native_batch_norm_backward(
            dz, o.x, o.norm[SCALE], None, None, o.norm[MEAN], o.norm[INVSTD], True, EPS,
            [False, True, True],
        )  # fmt: skip
        return found

    return run


def _ours_behind(case: ConvCase) -> Function:
    return lambda o: ops.conv_bn_dgrad_end(
        o.dz, o.weight, o.y, o.coefficients, out=o.h, raw=o.x, norm=o.norm, addend=o.addend,
        **case.geometry,
    )  # fmt: skip


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


def _ours_united(_case: ConvCase) -> Function:
    def run(o: TrainingOperands) -> tuple[Tensor, Tensor, Tensor]:
        dz, sums, dweight = ops.conv_bn_grad1x1_end(
            o.dz, o.weight, o.y, o.coefficients, out=o.h, raw=o.x, norm=o.norm, addend=o.addend
        )
        return dz, dweight, sums

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


def _bound_behind(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    given = (o.dz, o.y, o.coefficients, o.weight, o.addend, o.h)
    oracle = numerics.conv_bn_dgrad_end_oracle(*given, **case.geometry)
    return oracle, numerics.conv_bn_dgrad_end_bound(*given, oracle, **case.geometry, **sums)


def _bound_wgrad(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    given = (o.dz, o.y, o.coefficients, o.x, o.norm, o.weight)
    oracle = numerics.conv_bn_wgrad_oracle(*given, **case.geometry)
    return oracle, numerics.conv_bn_wgrad_bound(*given, oracle, **case.geometry, **sums)


def _bound_united_wgrad(case: ConvCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    return _bound_wgrad(case, dataclasses.replace(o, x=o.h, norm=None), **sums)


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


def _behind_passes(case: ConvCase, dtype: torch.dtype, of_weight: bool) -> tuple[Cost, ...]:
    masked = dataclasses.replace(case, act="relu")
    sums = tensor_pass(case.input_shape, dtype, 2)
    return (*_gradient_passes(masked, dtype, True, of_weight), sums)


KINDS: dict[str, Kind] = {
    "conv_bn_stats": Kind(
        ConvCase,
        each(forward_case),
        make_forward,
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
        each(forward_case),
        make_finalized,
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
        each(input_gradient_case),
        make_gradient,
        _ours_dgrad,
        lambda case, _: _eager_gradient(case, True, False),
        (Result("dz", _bound_dgrad), Result("sums", follows=_sums_below)),
        lambda case, dtype: roofline.conv_bn_dgrad_cost(
            case, dtype, addend=elements(case.input_shape) * case.residual,
            masked=case.act == "relu",
        ),
        lambda case, dtype: _gradient_passes(case, dtype, True, False),
    ),
    "conv_bn_dgrad_end": Kind(
        ConvCase,
        each(behind_case),
        make_behind,
        _ours_behind,
        lambda case, _: _eager_behind(case, False),
        (Result("dz", _bound_behind), Result("sums", follows=_sums_below)),
        lambda case, dtype: roofline.conv_bn_dgrad_end_cost(
            case, dtype, addend=elements(case.input_shape)
        ),
        lambda case, dtype: _behind_passes(case, dtype, False),
    ),
    "conv_bn_wgrad": Kind(
        ConvCase,
        each(forward_case),
        make_gradient,
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
        each(both_gradients_case),
        make_gradient,
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
    "conv_bn_grad1x1_end": Kind(
        ConvCase,
        each(united_case),
        make_behind,
        _ours_united,
        lambda case, _: _eager_behind(case, True),
        (
            Result("dz", _bound_behind),
            Result("dweight", _bound_united_wgrad, filters=OF_FILTERS),
            Result("sums", follows=_sums_below),
        ),
        lambda case, dtype: roofline.conv_bn_grad1x1_end_cost(
            case, dtype, addend=elements(case.input_shape)
        ),
        lambda case, dtype: _behind_passes(case, dtype, True),
    ),
    "bn_add_act": Kind(
        BnActCase,
        each(end_case),
        make_end,
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
        each(following_case),
        make_following,
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
        each(end_case),
        make_end,
        lambda case: lambda o: ops.bn_add_act_backward(o.dz, o.out, o.y, o.own),
        _eager_end_backward,
        (Result("dz", _bound_end_backward), Result("sums", follows=_sums_of_end)),
        lambda case, dtype: roofline.bn_add_act_backward_cost(case.shape, dtype),
        lambda case, dtype: (tensor_pass(case.shape, dtype, 3), tensor_pass(case.shape, dtype, 2)),
    ),
}  # fmt: skip
"""Op -> what the benchmark asks of it."""
