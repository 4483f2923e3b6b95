"""Quantisation to e4m3: a value is a scale times one of the 253 numbers that 8 bits hold.

e4m3 (`torch.float8_e4m3fn`) has 4 bits of exponent, 3 of mantissa, numbers up to 448 and no
infinity ("FP8 Formats for Deep Learning", Micikevicius et al., 2022, section 3). Weights have one
scale an output channel, activations one a tensor, as in section 4.2 there. Values are rounded to
nearest, ties to even, and saturate: what lies beyond 448 scales becomes 448 of them; NaN stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
_TINY = torch.finfo(torch.float32).tiny  # no scale below: one that is subnormal loses its bits
_HUGE = torch.finfo(torch.float32).max


def stored(y: Tensor) -> Tensor:
    """A float32 tensor's values in e4m3, saturated: the conversion alone leaves that to chance.

    Versions of torch differ in what becomes of values beyond 448: NaN in some, 448 in others.
    """
    return y.clamp(-LARGEST, LARGEST).to(E4M3)


def quantize_e4m3(x: Tensor, scale: float) -> Tensor:
    """X / scale in e4m3: to nearest, ties to even, saturating at 448; NaN stays.

    Args:
        x: any shape and layout; float32, bfloat16 or float16.
        scale: what a stored 1 is worth; positive and finite.

    Returns:
        float8_e4m3fn, of x's shape, strides and device; multiplied by `scale` it is x again, but
        for the rounding: 2^-4 of a value at most, 2^-10 of the scale for values below 2^-6 of it.

    Raises:
        TypeError: x is no tensor of such a dtype.
        ValueError: scale is not positive and finite.

    Example:
        >>> q = rf.ops.quantize_e4m3(x, float(x.abs().max()) / 448)
    """
    _check_wide("quantize_e4m3", "x", x)
    scale = check_scale("quantize_e4m3", "scale", scale)
    return stored(x.float() / scale)


def quantize_weight_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A filter in e4m3 with a scale for each output channel, its largest magnitude over 448.

    Args:
        weight: [K, C/groups, R, S] float32, bfloat16 or float16; finite.

    Returns:
        float8_e4m3fn of weight's shape and strides, and [K] float32: what a stored 1 is worth.
        A channel of zeros has scale 1.

    Raises:
        TypeError: weight is no tensor of such a dtype.
        ValueError: weight has not 4 dimensions, or holds NaN or Inf.

    Example:
        >>> q, scale = rf.ops.quantize_weight_e4m3(conv.weight.detach())
    """
    op = "quantize_weight_e4m3"
    _check_wide(op, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: weight must have 4 dimensions, got {weight.dim()} (shape {tuple(weight.shape)})"
        )
    wide = weight.detach().float()
    most = wide.abs().amax((1, 2, 3)) if wide.numel() else wide.new_zeros(len(wide))
    if not bool(torch.isfinite(most).all()):
        raise ValueError(f"{op}: weight holds NaN or Inf; accepted are finite values")
    scale = torch.where(most > 0, (most / LARGEST).clamp_min(_TINY), torch.ones_like(most))
    return stored(wide / scale.view(-1, 1, 1, 1)), scale


def scale_of(largest: float) -> float:
    """The scale of a tensor whose largest magnitude is to become 448; a float32 number.

    Args:
        largest: finite, not negative; 0 gives scale 1.
    """
    if largest == 0.0:
        return 1.0
    return float(torch.tensor(largest / LARGEST).clamp_min(_TINY))


def check_scale(op: str, name: str, scale: object) -> float:
    """A scale as a float, whose inverse is finite in float32 as well: kernels multiply by it.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite, or no normal number of float32.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{op}: {name} must be a float, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{op}: {name} is {scale!r}; accepted is a positive, finite number")
    if not _TINY <= scale <= _HUGE:
        raise ValueError(
            f"{op}: {name} is {scale!r}; accepted are normal numbers of float32, {_TINY:.4g} to "
            f"{_HUGE:.4g}"
        )
    return float(scale)


def _check_wide(op: str, name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{op}: {name} has dtype {t.dtype}; accepted are float32, bfloat16, float16"
        )
