"""`conv_bn_act_fp8`: its oracle, its error bound, and what quantisation itself does to a layer.

The bound speaks of the op: of the e4m3 values that it is given the products are exact in float32,
so what is left are the sum, the epilogue and one rounding. How far those values are from what they
stand for is another question, `fp8_noise`'s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.numerics.bounds import ACCUMULATIONS, _close, _enlarge, _free_padding, _magnitude
from resnet_fused.numerics.oracle import (
    ACTS,
    IntPair,
    channels,
    check_choice,
    check_like,
    convolve,
    finish,
)
from resnet_fused.numerics.tolerances import (
    E4M3_CHUNK,
    E4M3_DEPTH,
    E4M3_SUM_ROUNDOFF,
    EPILOGUE_STEPS,
    ROUNDING_DEVIATION,
    unit_roundoff,
)

E4M3 = torch.float8_e4m3fn
E4M3_LARGEST = 448.0
_SPACING = 32.0  # of e4m3's largest numbers
FP8_ACCUMULATIONS = (*ACCUMULATIONS, "narrow")


def conv_bn_act_fp8_oracle(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    act: str = "relu",
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
) -> Tensor:
    """act(scale conv(x, weight) + shift [+ residual_scale residual]) / out_scale in float64.

    Neither rounded nor saturated: `conv_bn_act_fp8_expected` does that for e4m3.

    Args:
        x: [N, C, H, W], e4m3 (or any floating dtype): the stored numbers.
        weight: [K, C / groups, R, S], likewise.
        scale: [K], everything that a stored product is worth: x's scale, weight's and BatchNorm's.
        shift: [K].
        residual: [N, K, P, Q] or None, stored numbers as well.
        stride: of the convolution, as are padding, dilation and groups.
        padding: see stride.
        dilation: see stride.
        groups: groups of channels.
        act: "relu" (keeps NaN) or "none".
        residual_scale: what a stored 1 of the residual is worth.
        out_scale: what a stored 1 of the output is worth.

    Returns:
        [N, K, P, Q] float64, in units of out_scale.

    Raises:
        ValueError: for an unknown ``act`` or a residual of another shape than the output.
    """
    check_choice("act", act, ACTS)
    y = convolve(x.double(), weight.double(), stride, padding, dilation, groups)
    y = y.mul_(channels(scale)).add_(channels(shift))
    return finish(y, _worth(residual, residual_scale), act).div_(out_scale)


def conv_bn_act_fp8_expected(oracle: Tensor, dtype: torch.dtype) -> Tensor:
    """The oracle as `check_bound` compares it: for e4m3 within +-448, where values saturate.

    Args:
        oracle: what `conv_bn_act_fp8_oracle` returned.
        dtype: of the output.
    """
    return oracle.clamp(-E4M3_LARGEST, E4M3_LARGEST) if dtype is E4M3 else oracle


def conv_bn_act_fp8_bound(
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
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    out_dtype: torch.dtype = E4M3,
    accumulation: str = "nearest",
) -> Tensor:
    """How far each element of a correct ``conv_bn_act_fp8`` may be from its expected value.

    With n = C/groups R S and S = (|scale| conv(|x|, |w|) + |shift| + |residual_scale residual|) /
    out_scale, an e4m3 output may be off by 2^-4 |R| + 2^-10 + (sqrt(n) + 8) 2^-23 S: one rounding
    (half the distance of two subnormals for the smallest), and a sum in float32. Where R saturates
    and the sum's error is less than half the distance of 448 from its neighbour, the output must be
    448 itself. Wide outputs have their own u in place of 2^-4.

    Args:
        x: as for `conv_bn_act_fp8_oracle`, like all up to out_scale.
        weight: see there.
        scale: see there.
        shift: see there.
        residual: see there.
        oracle: what `conv_bn_act_fp8_oracle` returned, not saturated.
        stride: of the convolution, as are padding, dilation and groups.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
        residual_scale: see there.
        out_scale: see there.
        out_dtype: of the output: e4m3, float32, bfloat16 or float16.
        accumulation: "nearest"; "truncate", for sums that are cut, 32 products at a time; "narrow",
            for a unit that keeps some 14 bits of a sum (`tolerances.E4M3_SUM_ROUNDOFF`) and hands
            it to float32 after 128 products.

    Returns:
        [N, K, P, Q] float64, in units of out_scale. 0 and inf as of `conv_bn_act_bound`.

    Raises:
        ValueError: for an unknown accumulation or an oracle of another shape.
    """
    check_choice("accumulation", accumulation, FP8_ACCUMULATIONS)
    geometry = (stride, padding, dilation, groups)
    n = weight[0].numel() if weight.shape[0] else 0
    enlarge = _enlarge(n, torch.float32)
    xm, wm = _magnitude(x, torch.float32), _magnitude(weight, torch.float32)
    product = convolve(xm, wm, *geometry).double().mul_(_magnitude(channels(scale)) * enlarge)
    check_like("oracle", oracle, "the convolution", product.shape)
    total = product + _magnitude(channels(shift))
    total += 0 if residual is None else _magnitude(_worth(residual, residual_scale))
    steps = (n / E4M3_DEPTH if accumulation == "truncate" else math.sqrt(n)) + EPILOGUE_STEPS
    error = total * (steps * 2.0 * unit_roundoff(torch.float32))
    if accumulation == "narrow":
        error += product * (E4M3_CHUNK / E4M3_DEPTH * E4M3_SUM_ROUNDOFF)
    bound = _rounded(error / out_scale, total / out_scale, oracle, out_dtype)
    return _free_padding(bound, weight.float(), x.shape, geometry)


def quantised_bound(error: Tensor, oracle: Tensor, out_scale: float) -> Tensor:
    """How far oracle / out_scale may be from its expected value in e4m3, rounded once.

    Args:
        error: how far what is rounded may be off, of any shape; inf where anything goes.
        oracle: likewise, in float64.
        out_scale: what a stored 1 of the output is worth.

    Returns:
        float64 of their shape, in units of out_scale: 2^-4 |R| + 2^-10 more, but 0 where R
        saturates whatever the error.
    """
    return _rounded(error / out_scale, error / out_scale, oracle / out_scale, E4M3)


def _rounded(error: Tensor, total: Tensor, oracle: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound behind the last rounding; `error` is overwritten."""
    saturates = (oracle.abs() >= E4M3_LARGEST) & (error < _SPACING / 2)
    value = conv_bn_act_fp8_expected(oracle, dtype)
    bound = _close(error, total, value, unit_roundoff(dtype), dtype)
    return bound.masked_fill_(saturates, 0.0) if dtype is E4M3 else bound


def fp8_noise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """The standard deviation that quantising x and weight is expected to give each output.

    Rounding to nearest moves a value by at most 2^-4 of itself, and by `ROUNDING_DEVIATION` of that
    on average (root mean square, mantissas spread evenly): 2.6%. Errors of different values are
    independent, so those of a sum of products add up in squares: 0.026 sqrt(2) |scale|
    sqrt(conv(x^2, w^2)). Where the products' signs are as good as random, that is 3.6% of the
    output's own size, in each layer, whatever the number of channels. Values below 2^-6 of their
    tensor's scale lose more than that, which the model leaves out.

    Args:
        x: [N, C, H, W], what is quantised, in a wide dtype.
        weight: [K, C / groups, R, S], likewise.
        scale: [K] of BatchNorm.
        stride: of the convolution, as are padding, dilation and groups.
        padding: see stride.
        dilation: see stride.
        groups: see stride.

    Returns:
        [N, K, P, Q] float64.
    """
    geometry = (stride, padding, dilation, groups)
    both = convolve(x.double().square(), weight.double().square(), *geometry)
    deviation = math.sqrt(2.0) * ROUNDING_DEVIATION * unit_roundoff(E4M3)
    return both.sqrt_().mul_(channels(scale).abs()).mul_(deviation)


def _worth(residual: Tensor | None, scale: float) -> Tensor | None:
    return None if residual is None else residual.double() * scale
