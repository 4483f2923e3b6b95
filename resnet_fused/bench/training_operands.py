"""Operands and cases of the ops of training with batch statistics, for `training_kernels`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused import ops
from resnet_fused.bench.kinds import weight
from resnet_fused.cases import BnActCase, ConvCase
from resnet_fused.ops import _grad1x1

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
        h: what eager has stored: relu(scale * x + shift); x itself without `norm`; where `x` is a
            block's last raw output, the block's output.
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


def inner(layer: Layer) -> bool:
    """Whether a layer reads another one of its block."""
    return re.search(r"\.conv[2-9]$", layer.name) is not None


def forward_case(layer: Layer) -> ConvCase:
    """A layer's call: `act` says whether it reads through a BatchNorm and ReLU."""
    act = "relu" if inner(layer) else "none"
    return dataclasses.replace(layer.case, act=act, residual=False, name="")


def input_gradient_case(layer: Layer) -> ConvCase | None:
    """Likewise its gradient's: a block's first one adds the shortcut's; the images need none."""
    if layer.first:
        return None
    first = layer.name.endswith(".conv1")
    return dataclasses.replace(forward_case(layer), residual=first)


def both_gradients_case(layer: Layer) -> ConvCase | None:
    """Likewise, of a convolution that `conv_bn_grad1x1` may be asked of."""
    case = input_gradient_case(layer)
    if case is None:
        return None
    plain = _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups)
    return case if plain else None


def end_case(layer: Layer) -> BnActCase | None:
    """Of a block's end."""
    if not layer.case.residual:
        return None
    _, k, p, q = layer.case.output_shape
    return BnActCase("", layer.case.n, k, p, q, True, "relu")


def behind_case(layer: Layer) -> ConvCase | None:
    """Of a convolution behind another block of its stage, whose shortcut adds its gradient."""
    behind = layer.name.endswith(".conv1") and not layer.name.endswith(".0.conv1")
    return input_gradient_case(layer) if behind else None


def united_case(layer: Layer) -> ConvCase | None:
    """Likewise, of one that `conv_bn_grad1x1_end` may be asked of."""
    return behind_case(layer) if both_gradients_case(layer) is not None else None


def following_case(layer: Layer) -> ConvCase | None:
    """Of a 1x1 convolution behind another block of its stage."""
    case = united_case(layer)
    return None if case is None else dataclasses.replace(case, residual=False)


def norm_of(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """[4, K] of a raw output's own statistics."""
    variance, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    return ops.bn_finalize(torch.stack((mean, variance * count)), count, gamma, beta, eps=EPS)


def _below(make: Any, case: ConvCase) -> dict[str, Tensor]:
    x = make.image(*case.input_shape)
    if case.act != "relu":
        return {"x": x, "h": x}
    norm = norm_of(x, *make.affine(case.c))
    return {"x": x, "norm": norm, "h": ops.bn_add_act(x, norm)}


def _above(make: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    dz, y = make.image(*shape), make.image(*shape)
    gamma, beta = make.affine(shape[1])
    own = norm_of(y, gamma, beta)
    _, sums = ops.bn_add_act_backward(dz, None, y, own, act="none")
    coefficients, _, _ = ops.bn_backward_finalize(sums, own, dz.numel() // shape[1])
    dy = ops.bn_backward_apply(dz, y, coefficients)
    return {
        "dz": dz, "y": y, "own": own, "gamma": gamma, "coefficients": coefficients, "dy": dy,
    }  # fmt: skip


def make_forward(make: Any, case: ConvCase) -> TrainingOperands:
    """What a convolution reads."""
    return TrainingOperands(weight(make, case), **_below(make, case))


def make_finalized(make: Any, case: ConvCase) -> TrainingOperands:
    """Rows 2 and 3 of `own` are the running statistics, which each call updates."""
    gamma, beta = make.affine(case.k)
    own = torch.stack((gamma, beta, torch.zeros_like(gamma), torch.ones_like(gamma)))
    return dataclasses.replace(make_forward(make, case), gamma=gamma, own=own)


def make_gradient(make: Any, case: ConvCase) -> TrainingOperands:
    """What a convolution's gradients read."""
    given = {**_below(make, case), **_above(make, case.output_shape)}
    if case.residual:
        given["addend"] = make.image(*case.input_shape)
    return TrainingOperands(weight(make, case), **given)


def make_end(make: Any, case: BnActCase) -> TrainingOperands:
    """What a block's end and its backward read."""
    given = _above(make, case.shape)
    residual = make.image(*case.shape)
    out = ops.bn_add_act(given["y"], given["own"], residual)
    return TrainingOperands(**given, residual=residual, out=out)


def make_following(make: Any, case: ConvCase) -> TrainingOperands:
    """What a block's end and the 1x1 convolution behind it read."""
    y, residual = make.image(*case.input_shape), make.image(*case.input_shape)
    own = norm_of(y, *make.affine(case.c))
    out = ops.bn_add_act(y, own, residual)
    return TrainingOperands(weight(make, case), y=y, own=own, residual=residual, out=out)


def make_behind(make: Any, case: ConvCase) -> TrainingOperands:
    """What a convolution's gradient and the backward of the block's end before it read."""
    raw, residual = make.image(*case.input_shape), make.image(*case.input_shape)
    norm = norm_of(raw, *make.affine(case.c))
    below = {"x": raw, "norm": norm, "h": ops.bn_add_act(raw, norm, residual)}
    given = {**below, **_above(make, case.output_shape), "addend": make.image(*case.input_shape)}
    return TrainingOperands(weight(make, case), **given)
