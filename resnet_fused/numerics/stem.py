"""The oracles and bounds of `stem` and `head`, and integers on which they are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused._shapes import StemShape
from resnet_fused.numerics.bounds import ACCUMULATIONS, conv_bn_act_bound, half_subnormal
from resnet_fused.numerics.fp8 import quantised_bound
from resnet_fused.numerics.oracle import check_choice, conv_bn_act_oracle
from resnet_fused.numerics.tolerances import EPILOGUE_STEPS, accumulator_dtype, unit_roundoff

StemOperands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def exact_stem_inputs(
    case: StemShape, dtype: torch.dtype, generator: torch.Generator
) -> StemOperands:
    """Images, weight, scale, shift and input_norm on which every product and sum is exact.

    Small integers, factors of 1 and 2, scales that are powers of two; images of both signs where
    they are no bytes. Sums stay below 256, so that storing the convolution is exact as well.
    """

    def integers(least: int, most: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(least, most + 1, tuple(shape), generator=generator)

    wide = accumulator_dtype(dtype)
    images = {"uint8": torch.uint8, "float32": torch.float32}.get(case.images, dtype)
    x = integers(0 if images is torch.uint8 else -2, 2, case.shape).to(images)
    weight = integers(-1, 1, case.weight_shape).to(dtype)
    filters, channels = case.weight_shape[:2]
    scale = torch.ldexp(torch.ones(filters), integers(-6, -4, (filters,)))
    scale = (scale * (2 * integers(0, 1, (filters,)) - 1)).to(wide)
    norm = None
    if case.has_norm:
        norm = torch.stack((integers(1, 2, (channels,)), integers(-2, 2, (channels,)))).to(wide)
    return x, weight, scale, integers(-2, 2, (filters,)).to(wide), norm


def stem_reads(x: Tensor, weight: Tensor, input_norm: Tensor | None) -> Tensor:
    """What the convolution reads [N, C, H, W]: rounded once to the weight's dtype."""
    if input_norm is None:
        return x.to(weight.dtype)
    a, b = (row.double().view(1, -1, 1, 1) for row in input_norm)
    return (x.double() * a + b).to(accumulator_dtype(weight.dtype)).to(weight.dtype)


def _pooled(
    h: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    return F.max_pool2d(h, list(kernel), list(stride), list(padding))


def stem_oracle(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    input_norm: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    *pool: Sequence[int],
    out_scale: float = 1.0,
) -> Tensor:
    """Computes maxpool(relu(scale * conv(v, weight) + shift)) / out_scale in float64 [N, K, P, Q].

    Neither rounded nor saturated: `conv_bn_act_fp8_expected` does that for e4m3.

    Args:
        x: [N, C, H, W].
        weight: [K, C, R, S], whose dtype what the convolution reads is rounded to.
        scale: [K].
        shift: [K].
        input_norm: [2, C] or None.
        stride: of the convolution.
        padding: likewise.
        pool: kernel, stride and padding of the pooling.
        out_scale: what a stored 1 of the output is worth.
    """
    v = stem_reads(x, weight, input_norm)
    where = {"stride": tuple(stride), "padding": tuple(padding)}
    h = conv_bn_act_oracle(v, weight, scale, shift, None, **where, act="relu")
    return _pooled(h, *pool).div_(out_scale)


def stem_bound(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    input_norm: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    *pool: Sequence[int],
    rounding: str = "fused",
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
    out_scale: float | None = None,
) -> Tensor:
    """How far each element of a correct `stem` may be from `stem_oracle`: [N, K, P, Q] float64.

    Two maxima differ by no more than the most that two of their elements do, so a window's bound is
    the largest of its pixels' (`conv_bn_act_bound`). The oracle reads the rounded v that every
    implementation makes: the multiply-add rounds once, and to the same value.

    A result in e4m3 is compared with `conv_bn_act_fp8_expected` of the oracle. Fused, it is float32
    sums rounded once, 2^-4 |R| + 2^-10 in units of out_scale; put together, the results of the
    other ops rounded once more. Where R saturates, and sums are off by less than half the distance
    of 448 from its neighbour, it must be 448.

    Args:
        x: as are all others, the call's.
        weight: see x.
        scale: see x.
        shift: see x.
        input_norm: see x.
        stride: see x.
        padding: see x.
        pool: see x.
        rounding: as in `conv_bn_act_bound`; "parts" is whatever `conv_bn_act` takes.
        accumulation: as in `conv_bn_act_bound`, as are k and tf32.
        k: see accumulation.
        tf32: see accumulation.
        out_scale: of a result in e4m3: what a stored 1 is worth. None: of the weight's dtype.
    """
    v = stem_reads(x, weight, input_norm)
    where = {"stride": tuple(stride), "padding": tuple(padding)}
    h = conv_bn_act_oracle(v, weight, scale, shift, None, **where, act="relu")
    kinds = ("folded", "stored_conv") if rounding == "parts" else (rounding,)
    # What is rounded to e4m3 is the float32 sum itself where all is one kernel.
    wide = torch.float32 if out_scale is not None and rounding == "fused" else weight.dtype
    bounds = [
        conv_bn_act_bound(
            v, weight, scale, shift, None, h, **where, rounding=kind,
            accumulation=accumulation, k=k, tf32=tf32, out_dtype=wide,
        )
        for kind in kinds
    ]  # fmt: skip
    error = _pooled(torch.stack(bounds).amax(0), *pool)
    return error if out_scale is None else quantised_bound(error, _pooled(h, *pool), out_scale)


def head_oracle(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over height and width times the weight, plus the bias, in float64 [N, classes].

    Args:
        x: [N, C, H, W].
        weight: [classes, C].
        bias: [classes] or None.
    """
    mean = x.double().mean((2, 3))
    return F.linear(mean, weight.double(), None if bias is None else bias.double())


def head_bound(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
) -> Tensor:
    """How far each element of a correct `head` may be from `head_oracle`: [N, classes] float64.

    The mean is rounded to x's dtype: u |w| |mean|. Before it, and in the product, sums of n terms
    in the accumulator err by (sqrt(n) + 8) 2u of it times the sum of magnitudes, as a
    convolution's; the result is rounded once. Half of a subnormal is added for each rounding.
    0 where the oracle is NaN or Inf: the output must be just that.

    Args:
        x: [N, C, H, W].
        weight: [classes, C].
        bias: [classes] or None.
        accumulation: of the product, as in `conv_bn_act_bound`, as are k and tf32; the mean's sum
            is no matrix instruction's.
        k: see accumulation.
        tf32: see accumulation.
    """
    check_choice("accumulation", accumulation, ACCUMULATIONS)
    u = unit_roundoff(x.dtype)
    step = 2 * unit_roundoff(accumulator_dtype(x.dtype))
    pixels, channels = x.shape[2] * x.shape[3], x.shape[1]
    oracle = head_oracle(x, weight, bias)
    magnitude, w = _finite(x).mean((2, 3)), _finite(weight)
    mean = x.double().mean((2, 3)).abs().nan_to_num_(0.0, 0.0, 0.0)
    summed = (math.sqrt(pixels) + EPILOGUE_STEPS) * step * magnitude
    tiny = half_subnormal(x.dtype)
    error = F.linear(mean * u + summed * (1 + u) + tiny, w)
    total = F.linear(magnitude * (1 + 2 * u), w)
    if bias is not None:
        total += _finite(bias)
    steps = (math.sqrt(channels) if accumulation == "nearest" else channels / k) + EPILOGUE_STEPS
    error += (steps * step + (2.0 * 2.0**-11 if tf32 else 0.0)) * total
    bound = error * (1 + u) + u * oracle.abs() + tiny
    return bound.masked_fill_(~torch.isfinite(oracle), 0.0)


def _finite(t: Tensor) -> Tensor:
    """|t| in float64, NaN and Inf as 0: where those appear the oracle decides."""
    return t.double().abs().nan_to_num_(0.0, 0.0, 0.0)
