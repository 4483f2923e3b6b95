"""Oracle, bound and exact tier of `conv_chain`: convolutions that read each other's results.

A convolution passes on what its input is off by. The input was rounded as it was stored: those
errors are independent of each other and add up as a fold's do (`tolerances.FOLD_DEVIATIONS`), to
at most 3 u sqrt(conv(t^2, w^2)), and never to more than u conv(|t|, |w|). What its own sums were
off by before that rounding may be alike from channel to channel, and adds up as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused._shapes import ChainShape
from resnet_fused.numerics.bounds import conv_bn_act_bound, half_subnormal
from resnet_fused.numerics.exact import exact_expected
from resnet_fused.numerics.fp8 import E4M3, conv_bn_act_fp8_expected, conv_bn_act_fp8_oracle
from resnet_fused.numerics.oracle import channels, check_choice, conv_bn_act_oracle, convolve
from resnet_fused.numerics.tolerances import FOLD_DEVIATIONS, accumulator_dtype, unit_roundoff

CHAIN_ROUNDINGS = {
    "fused": ("fused",),
    "stored_conv": ("stored_conv",),
    "parts": ("fused", "folded", "stored_conv"),
}
"""How each convolution of a chain may round; "parts" is whatever `conv_bn_act` takes for it."""


class ChainOperands(NamedTuple):
    """The tensors of a `conv_chain`, in the order of its schema; None where one is not there."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    projected: Tensor | None = None
    projection_weight: Tensor | None = None
    projection_scale: Tensor | None = None
    projection_shift: Tensor | None = None
    next_weight: Tensor | None = None
    next_scale: Tensor | None = None
    next_shift: Tensor | None = None
    front_weight: Tensor | None = None
    front_scale: Tensor | None = None
    front_shift: Tensor | None = None

    @property
    def front(self) -> tuple[Any, Any, Any]:
        """Weight, scale and shift of the 3x3 convolution."""
        return self.front_weight, self.front_scale, self.front_shift

    @property
    def projection(self) -> tuple[Any, Any, Any]:
        """Weight, scale and shift of the shortcut's convolution."""
        return self.projection_weight, self.projection_scale, self.projection_shift

    @property
    def next(self) -> tuple[Any, Any, Any]:
        """Weight, scale and shift of the convolution that reads out."""
        return self.next_weight, self.next_scale, self.next_shift


def chain_operands(
    case: ChainShape,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    *,
    exact: bool = False,
) -> ChainOperands:
    """Values for a case, random normal ones, or such that no order of sums in float32 rounds.

    Exact ones are integers in -1 .. 1 (the shortcut and shifts in -4 .. 4) and scales of +-2^-1 ..
    2^0: the sums of `next` stay below 2^24 of the smallest unit for every case and dtype.

    Args:
        case: sizes.
        dtype: of activations and convolution weights; scale and shift are in the accumulator's.
        generator: torch's own by default.
        exact: see above.
    """
    acc = accumulator_dtype(dtype)

    def values(most: int, *shape: int) -> Tensor:
        if exact:
            return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    def convolution(filters: int, below: int, size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        weight = values(1, filters, below, size, size)
        if exact:
            scale = torch.randint(1, 3, (filters,), generator=generator) / 2.0
            scale *= torch.randint(0, 2, (filters,), generator=generator) * 2 - 1
            shift = torch.randint(-4, 5, (filters,), generator=generator)
        else:
            # Sums of normal values keep their size, as trained layers have it.
            scale = torch.randn(filters, generator=generator) / math.sqrt(below * size * size)
            shift = torch.randn(filters, generator=generator)
        return weight, scale.to(acc), shift.to(acc)

    none = (None, None, None)
    projected = values(1, *case.projected_shape) if case.projected else None
    return ChainOperands(
        values(1, *case.input_shape),
        *convolution(case.c, case.k),
        None if case.projected else values(4, case.n, case.c, case.h, case.w),
        projected,
        *(convolution(case.c, case.projected) if case.projected else none),
        *(convolution(case.m, case.c) if case.m else none),
        *(convolution(case.k, case.front, 3) if case.front else none),
    )


def conv_chain_oracle(
    operands: ChainOperands, projection_stride: int = 1, out_stride: int = 1
) -> tuple[Tensor, Tensor | None]:
    """`conv_chain` in float64, nothing rounded on the way.

    Args:
        operands: of the call.
        projection_stride: of the projection.
        out_stride: 2 for the even pixels of out.

    Returns:
        out [N, C, ceil(H / out_stride), ceil(W / out_stride)] and next [N, M, H, W] or None.
    """
    _, _, out, following = _stages(operands, projection_stride)
    return out[:, :, ::out_stride, ::out_stride], following


def _stages(
    o: ChainOperands, projection_stride: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What the first convolution reads, its shortcut, out and next, in float64."""
    t = o.x.double()
    if o.front_weight is not None:
        t = conv_bn_act_oracle(o.x, *o.front, padding=1)
    shortcut = o.residual
    if o.projected is not None:
        shortcut = conv_bn_act_oracle(
            o.projected, *o.projection, stride=projection_stride, act="none"
        )
    out = conv_bn_act_oracle(t, o.weight, o.scale, o.shift, shortcut)
    following = None if o.next_weight is None else conv_bn_act_oracle(out, *o.next)
    return t, shortcut, out, following


def conv_chain_expected(
    operands: ChainOperands,
    dtype: torch.dtype,
    projection_stride: int = 1,
    out_stride: int = 1,
    *,
    rounding: str = "fused",
) -> tuple[Tensor, Tensor | None]:
    """What an implementation must return, bit for bit, on exact `chain_operands`.

    Args:
        operands: of the call.
        dtype: of the activations.
        projection_stride: see `conv_chain_oracle`, as out_stride.
        out_stride: see projection_stride.
        rounding: "fused" or "stored_conv", which also rounds the projection.
    """
    check_choice("rounding", rounding, ("fused", "stored_conv"))
    o = operands

    def stage(x: Tensor, weights: Any, shortcut: Tensor | None, act: str, **geometry: int) -> Any:
        weight, scale, shift = weights
        one, zero = torch.ones_like(scale), torch.zeros_like(shift)
        conv = conv_bn_act_oracle(x, weight, one, zero, act="none", **geometry)
        oracle = conv_bn_act_oracle(x, weight, scale, shift, shortcut, act=act, **geometry)
        if act == "none" and rounding == "fused":
            return oracle
        return exact_expected(
            oracle, dtype, rounding, conv=conv, scale=scale, shift=shift, residual=shortcut, act=act
        )

    t = o.x if o.front_weight is None else stage(o.x, o.front, None, "relu", padding=1)
    shortcut = o.residual
    if o.projected is not None:
        shortcut = stage(o.projected, o.projection, None, "none", stride=projection_stride)
    out = stage(t, (o.weight, o.scale, o.shift), shortcut, "relu")
    following = None if o.next_weight is None else stage(out, o.next, None, "relu")
    return out[:, :, ::out_stride, ::out_stride], following


def conv_chain_fp8_expected(
    operands: ChainOperands,
    projection_stride: int,
    out_stride: int,
    scales: Sequence[float],
) -> tuple[Tensor, Tensor | None]:
    """What `conv_chain_fp8` must return, bit for bit, on `chain_operands` whose sums are exact.

    Each convolution's result is rounded to e4m3, saturated, the projection's too.

    Args:
        operands: of the call, in e4m3.
        projection_stride: of the projection.
        out_stride: 2 for the even pixels of out.
        scales: what a stored 1 of the shortcut, of out, of next and of the front's is worth.

    Returns:
        out and next, or None for it, in e4m3.
    """
    o = operands
    residual_scale, out_scale, next_scale, front_scale = scales

    def stage(
        x: Tensor, weights: Any, scale: float, residual: Tensor | None = None, **how: Any
    ) -> Tensor:
        weight, factor, shift = weights
        how |= {"residual_scale": residual_scale, "out_scale": scale}
        oracle = conv_bn_act_fp8_oracle(x, weight, factor, shift, residual, **how)
        return conv_bn_act_fp8_expected(oracle, E4M3).to(E4M3)

    t = o.x if o.front_weight is None else stage(o.x, o.front, front_scale, padding=1)
    shortcut = o.residual
    if o.projected is not None:
        how = {"stride": projection_stride, "act": "none"}
        shortcut = stage(o.projected, o.projection, residual_scale, **how)
    out = stage(t, (o.weight, o.scale, o.shift), out_scale, shortcut)
    following = None if o.next_weight is None else stage(out, o.next, next_scale)
    return out[:, :, ::out_stride, ::out_stride], following


def conv_chain_bound(
    operands: ChainOperands,
    projection_stride: int = 1,
    out_stride: int = 1,
    *,
    rounding: str = "fused",
    accumulation: str = "nearest",
    k: int = 16,
    tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """How far each element of a correct `conv_chain` may be from `conv_chain_oracle`.

    Each convolution has `conv_bn_act_bound`'s own error on the values that it would read without
    any, and what it passes on of its input's (see above). A kernel's projection is in float32.

    Args:
        operands: of the call.
        projection_stride: see `conv_chain_oracle`, as out_stride.
        out_stride: see projection_stride.
        rounding: a key of `CHAIN_ROUNDINGS`; of several ways the largest bound holds.
        accumulation: see `conv_bn_act_bound`, as k and tf32.
        k: see accumulation.
        tf32: see accumulation.

    Returns:
        As the oracle, float64; 0 where it is NaN or Inf, inf where anything goes.
    """
    check_choice("rounding", rounding, tuple(CHAIN_ROUNDINGS))
    options = {"accumulation": accumulation, "k": k, "tf32": tf32}
    out = following = None
    for way in CHAIN_ROUNDINGS[rounding]:
        one, other = _bound(operands, projection_stride, {**options, "rounding": way})
        out = one if out is None else torch.maximum(out, one)
        if other is not None:
            following = other if following is None else torch.maximum(following, other)
    return out[:, :, ::out_stride, ::out_stride], following


def _bound(
    o: ChainOperands, projection_stride: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    dtype = o.x.dtype
    t, shortcut, out, following = _stages(o, projection_stride)
    error = None
    if o.front_weight is not None:
        error = conv_bn_act_bound(o.x, *o.front, None, t, padding=1, **options)
    bound = conv_bn_act_bound(t.to(dtype), o.weight, o.scale, o.shift, shortcut, out, **options)
    if o.projected is not None:
        kept = accumulator_dtype(dtype) if options["rounding"] == "fused" else dtype
        bound = bound + conv_bn_act_bound(
            o.projected, *o.projection, None, shortcut,
            stride=projection_stride, out_dtype=kept, **options,
        )  # fmt: skip
    bound = _passed_on(bound, t, error, o.weight, o.scale, out, dtype)
    if following is None:
        return bound, None
    last = conv_bn_act_bound(out.to(dtype), *o.next, None, following, **options)
    weight, scale, _ = o.next
    return bound, _passed_on(last, out, bound, weight, scale, following, dtype)


def _passed_on(
    bound: Tensor,
    t: Tensor,
    error: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Adds what a 1x1 convolution makes of its input's error to its own bound.

    Args:
        bound: its own [N, K, H, W].
        t: what it reads [N, C, H, W], float64.
        error: the bound of that, its rounding included; None where it is exact.
        weight: [K, C, 1, 1].
        scale: [K].
        oracle: [N, K, H, W].
        dtype: that t is stored in.
    """
    if error is None:
        return bound
    u = unit_roundoff(dtype)
    size, w = t.abs().nan_to_num_(0.0, 0.0, 0.0), weight.double().abs().nan_to_num_(0.0, 0.0, 0.0)
    lost = ~torch.isfinite(error) | (size * 1.01 >= torch.finfo(dtype).max)
    rounded = size * u + half_subnormal(dtype)
    summed = (error.masked_fill(lost, 0.0) - rounded).clamp_(min=0.0)

    def conv(x: Tensor, weights: Tensor) -> Tensor:
        return convolve(x, weights, 1, 0, 1, 1)

    independent = FOLD_DEVIATIONS * conv(rounded.square(), w.square()).sqrt()
    passed = torch.minimum(independent, conv(rounded, w)) + conv(summed, w)
    passed *= channels(scale).abs().nan_to_num_(0.0, 0.0, 0.0) * (1.0 + u)
    passed = passed.masked_fill(conv(lost.double(), (w > 0).double()) > 0, math.inf)
    # NaN and Inf that arise from the operands must be there; not those of an overflow on the way.
    settled = ~torch.isfinite(oracle) & torch.isfinite(passed)
    return (bound + passed).masked_fill_(settled, 0.0)
