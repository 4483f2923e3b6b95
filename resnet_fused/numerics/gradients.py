"""Oracle and bounds of the gradients of a conv-BN(-ReLU) whose statistics are frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.numerics.bounds import half_subnormal
from resnet_fused.numerics.oracle import IntPair, channels, check_choice, check_like, pair
from resnet_fused.numerics.tolerances import (
    EPILOGUE_STEPS,
    FOLD_DEVIATIONS,
    accumulator_dtype,
    unit_roundoff,
)

ROUNDINGS = ("fused", "folded")


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[IntPair, IntPair, IntPair, int],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, pair(stride), pair(padding), pair(dilation), False, [0, 0], groups,
        [*wanted, False],
    )  # fmt: skip
    return dx, dweight


def conv_gradients_oracle(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """The gradients of input and weight in float64, of the values given.

    Args:
        dy: gradient of the result [N, K, P, Q].
        y: the result [N, K, P, Q], whose saved values make ReLU's mask: none passes where y <= 0.
            None without ReLU.
        x: [N, C, H, W].
        weight: [K, C / groups, R, S].
        scale: [K].
        stride: of the convolution, as are padding, dilation and groups.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
        wanted: whether the first and the second gradient are computed; else None stands there.

    Returns:
        [N, C, H, W] and [K, C / groups, R, S], float64.
    """
    if y is not None:
        check_like("y", y, "dy", dy.shape)
    g = _masked(dy, y) * channels(scale)
    geometry = (stride, padding, dilation, groups)
    return _backward(g, x.double(), weight.double(), geometry, wanted)


def _masked(dy: Tensor, y: Tensor | None) -> Tensor:
    return dy.double() if y is None else torch.where(y <= 0, 0.0, dy.double())


def conv_gradients_bound(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    oracle: tuple[Tensor, Tensor],
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    rounding: str = "fused",
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """How far each element of correct gradients may be from `conv_gradients_oracle`.

    With S the gradient of the magnitudes, |scale dz| against |weight| or |x|, n the length of the
    sum: u |R| + (sqrt(n) + 8) 2^-23 S, as forward. The gradient of the input always takes
    scale * dz rounded to dy's dtype as an operand, which adds 3 u sqrt of the gradient of the
    squares, as folding does forward (`FOLD_DEVIATIONS`), and half a subnormal times |weight|.

    Args:
        dy: as `conv_gradients_oracle`, as are y, x, weight, scale and the geometry.
        y: see dy.
        x: see dy.
        weight: see dy.
        scale: see dy.
        oracle: what `conv_gradients_oracle` returned.
        stride: see dy.
        padding: see dy.
        dilation: see dy.
        groups: see dy.
        rounding: of the gradient of the weight: "fused", scale is applied to the float32 sums;
            "folded", it is taken with scale * dz rounded, like the gradient of the input.
        accumulation: "nearest", or "truncate": n / k in place of sqrt(n).
        k: depth of such a unit's instruction.
        tf32: operands cut to 11 bits: adds 2 * 2^-11 S.

    Returns:
        [N, C, H, W] and [K, C / groups, R, S] float64; 0 where the oracle is NaN or Inf.

    Raises:
        ValueError: for an unknown mode.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    check_choice("accumulation", accumulation, ("nearest", "truncate"))
    dtype = dy.dtype
    u, acc = unit_roundoff(dtype), 2.0 * unit_roundoff(accumulator_dtype(dtype))
    geometry = (stride, padding, dilation, groups)
    g, xm, wm = (
        t.double().abs().nan_to_num_(0.0, 0.0, 0.0)
        for t in (_masked(dy, y) * channels(scale), x, weight)
    )
    if not g.numel():
        return torch.zeros_like(xm), torch.zeros_like(wm)
    total = _backward(g, xm, wm, geometry, (True, True))
    square = _backward(g.square(), xm.square(), wm.square(), geometry, (True, True))
    tiny = _backward(torch.ones_like(g), xm, wm, geometry, (True, True))
    lengths = (weight.shape[0] // groups * wm[0, 0].numel(), g.shape[0] * g[0, 0].numel())
    bounds = []
    for index, n in enumerate(lengths):
        steps = (math.sqrt(n) if accumulation == "nearest" else n / k) + EPILOGUE_STEPS
        error = total[index] * (steps * acc + (2.0 * 2.0**-11 if tf32 else 0.0))
        if index == 0 or rounding == "folded":
            error += (
                FOLD_DEVIATIONS * u * square[index].sqrt() + half_subnormal(dtype) * tiny[index]
            )
        bound = error * (1 + u) + u * oracle[index].abs() + half_subnormal(dtype)
        bound.masked_fill_(~torch.isfinite(oracle[index]), 0.0)
        bounds.append(bound.masked_fill_(total[index] >= torch.finfo(dtype).max, math.inf))
    return bounds[0], bounds[1]
