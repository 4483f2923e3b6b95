"""Element-wise bounds on the error of a correct implementation (the bound tier)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.numerics.oracle import IntPair, channels, check_choice, check_like, convolve, pair
from resnet_fused.numerics.tolerances import (
    BN_ACT_STEPS,
    EPILOGUE_STEPS,
    FOLD_DEVIATIONS,
    accumulator_dtype,
    unit_roundoff,
)

ROUNDINGS = ("fused", "folded", "stored_conv", "modules")
ACCUMULATIONS = ("nearest", "truncate")


def half_subnormal(dtype: torch.dtype) -> float:
    """Half of the smallest subnormal: the absolute error of rounding a subnormal to ``dtype``."""
    return torch.finfo(dtype).smallest_normal * unit_roundoff(dtype)


def conv_bn_act_bound(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    oracle: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    rounding: str = "fused",
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
    shift_magnitude: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """How far each element of a correct ``conv_bn_act`` may be from `conv_bn_act_oracle`.

    With n = C/groups R S and S = |scale| conv(|x|, |w|) + |shift| + |residual|, the bound is
    u |R| + (sqrt(n) + 8) 2^-23 S: one rounding of the result, and sums in float32 (2^-52 in place
    of 2^-23 for float64). Half of the smallest subnormal is added, and all but the first term are
    multiplied by 1 + u, because what is rounded at the end carries the other errors already.

    Args:
        x: [N, C, H, W]; its dtype sets u for what is stored on the way.
        weight: [K, C / groups, R, S].
        scale: [K].
        shift: [K].
        residual: [N, K, P, Q] or None.
        oracle: what `conv_bn_act_oracle` returned.
        stride: of the convolution, as are padding, dilation and groups.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
        rounding: "fused", one rounding; "folded", scale rounded into the weights, which adds
            3 u |scale| sqrt(conv(x^2, w^2)), and with a residual u |shift|, because the shift is
            then a bias in x's dtype; "stored_conv", the convolution rounded before the affine,
            which adds u |scale conv|; "modules", conv, BN and add rounded one after the other.
        accumulation: "nearest", or "truncate" for units that cut their sums, a bias that grows with
            the number of steps: n / k in place of sqrt(n).
        k: depth of such a unit's instruction.
        tf32: operands cut to 11 bits: adds 2 * 2^-11 S.
        shift_magnitude: [K], in place of |shift| in S; where the implementation computes the shift
            as a difference that cancels, |beta| + |mean * scale|, since rounding follows those.
        out_dtype: dtype of the output; x's by default.

    Returns:
        [N, K, P, Q] float64. 0 where the oracle is NaN or Inf (the output must be just that), inf
        where anything goes: where an intermediate may overflow, and where a window meets padding
        at an infinite or NaN weight (implementations multiply or skip those zeros).

    Raises:
        ValueError: for an unknown mode, k < 1, or an oracle of another shape.
    """
    _check_modes(rounding, accumulation, k)
    dtype, out, acc = x.dtype, out_dtype or x.dtype, accumulator_dtype(x.dtype)
    geometry = (stride, padding, dilation, groups)
    n = weight[0].numel() if weight.shape[0] else 0
    enlarge = _enlarge(n, acc)
    xm, wm, a = _magnitude(x, acc), _magnitude(weight, acc), _magnitude(channels(scale))
    total = convolve(xm, wm, *geometry).double().mul_(a * enlarge)
    check_like("oracle", oracle, "the convolution", total.shape)
    total += _magnitude(channels(shift if shift_magnitude is None else shift_magnitude))
    total += 0 if residual is None else _magnitude(residual, residual.dtype)
    steps = (math.sqrt(n) if accumulation == "nearest" else n / k) + EPILOGUE_STEPS
    factor = steps * 2.0 * unit_roundoff(acc) + (2.0 * 2.0**-11 if tf32 else 0.0)
    error = total * factor
    if rounding == "folded":
        error += _folded_error(xm, wm, a, enlarge, geometry, dtype)
        if residual is not None:
            # oneDNN's add takes its bias in the activations' dtype alone.
            error += unit_roundoff(dtype) * _magnitude(channels(shift))
    elif rounding != "fused":
        both = rounding == "modules" and residual is not None
        error += _stored_error(x, weight, scale, shift if both else None, geometry)
    bound = _close(error, total, oracle, unit_roundoff(out), out)
    return _free_padding(bound, weight, x.shape, geometry)


def _check_modes(rounding: str, accumulation: str, k: int) -> None:
    check_choice("rounding", rounding, ROUNDINGS)
    check_choice("accumulation", accumulation, ACCUMULATIONS)
    if k < 1:
        raise ValueError(f"k is {k}; accepted is an instruction's depth, 1 or more")


def _enlarge(n: int, dtype: torch.dtype) -> float:
    """What makes a sum of n positive terms in ``dtype`` an upper bound of the exact one.

    Such a sum is off by n u of itself at most, so that magnitudes need no float64, in which a
    convolution costs more than the oracle's own.
    """
    return 1.0 + (n + 2) * 2.0 * unit_roundoff(dtype)


def _magnitude(t: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """|t| with NaN and Inf as 0: where those appear the oracle decides, not the bound."""
    if t.dtype is not dtype:
        t = t.to(dtype)
    return t.abs().nan_to_num_(nan=0.0, posinf=0.0)


def _folded_error(
    xm: Tensor,
    wm: Tensor,
    a: Tensor,
    enlarge: float,
    geometry: tuple[IntPair, IntPair, IntPair, int],
    dtype: torch.dtype,
) -> Tensor:
    """Effect of rounding scale * w; a product that is subnormal in ``dtype`` loses more than u."""
    u = unit_roundoff(dtype)
    folded = a.to(wm.dtype).view(-1, 1, 1, 1) * wm
    taps = folded.clamp_min(half_subnormal(dtype) / u) if dtype is torch.float16 else folded
    root = convolve(xm.square(), taps.square(), *geometry).double().mul_(enlarge).sqrt_()
    return root.mul_(FOLD_DEVIATIONS * u)


def _stored_error(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    geometry: tuple[IntPair, IntPair, IntPair, int],
) -> Tensor:
    """Effect of storing the convolution in x's dtype and, if shift is given, BatchNorm's output."""
    u, dtype = unit_roundoff(x.dtype), x.dtype
    acc = accumulator_dtype(dtype)
    # float32 is enough: its error of 2^-24 S is far below the accumulation term.
    conv = convolve(x.to(acc), weight.to(acc), *geometry).double().nan_to_num_(0.0, 0.0, 0.0)
    half = half_subnormal(dtype)
    error = (conv.abs().mul_(u).add_(half)).mul_(_magnitude(channels(scale)))
    most = conv.abs()
    if shift is not None:
        bn = conv.mul_(channels(scale)).add_(channels(shift)).nan_to_num_(0.0, 0.0, 0.0).abs_()
        error += bn * (u * (1 + u)) + half
        most = torch.maximum(most, bn)
    # Where what is stored on the way may overflow, eager overflows or not by chance; 1% leaves room
    # for the float32 sum's own error.
    return error.masked_fill_(most * 1.01 >= torch.finfo(dtype).max, math.inf)


def _close(
    error: Tensor, total: Tensor, oracle: Tensor, u: float, out_dtype: torch.dtype
) -> Tensor:
    """Adds the last rounding to ``error`` (in place) and settles NaN, Inf and overflow."""
    size = oracle.abs()
    bound = error.mul_(1.0 + u).add_(size, alpha=u).add_(half_subnormal(out_dtype))
    if not math.isfinite(float(size.sum())):
        bound.masked_fill_(~torch.isfinite(oracle), 0.0)
    limit = torch.finfo(accumulator_dtype(out_dtype)).max
    if total.numel() and not float(total.max()) < limit:
        bound.masked_fill_(total >= limit, math.inf)
    return bound


def _free_padding(
    bound: Tensor,
    weight: Tensor,
    shape: torch.Size,
    geometry: tuple[IntPair, IntPair, IntPair, int],
) -> Tensor:
    stride, padding, dilation, groups = geometry
    odd = ~torch.isfinite(weight)
    if not bool(odd.any()) or pair(padding) == (0, 0):
        return bound
    ph, pw = pair(padding)
    outside = F.pad(torch.zeros(shape), (pw, pw, ph, ph), value=1.0)
    met = convolve(outside.to(bound.device), odd.float(), stride, 0, dilation, groups) > 0
    return bound.masked_fill_(met, math.inf)


def bn_act_bound(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    oracle: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """How far each element of a correct ``bn_act`` may be from `bn_act_oracle`.

    u |R| + 2 * 2^-23 S, S = |scale x| + |shift| + |residual|; arguments and result as
    `conv_bn_act_bound`.
    """
    out = out_dtype or x.dtype
    check_like("oracle", oracle, "x", x.shape)
    total = _magnitude(x.double() * channels(scale)) + _magnitude(channels(shift))
    if residual is not None:
        total += _magnitude(residual.double())
    factor = BN_ACT_STEPS * 2.0 * unit_roundoff(accumulator_dtype(x.dtype))
    return _close(total * factor, total, oracle, unit_roundoff(out), out)
