"""Oracles and bounds of BatchNorm's ops of training, on the very tensors that an op was given.

What an op rounds on its way is part of its contract: h = relu(scale * y + shift) and
dy = A dz + (B y + C) are fused multiply-adds in float32, rounded to the activations' dtype before
anything else is done with them. The oracles round there too, so that ReLU's masks agree element for
element; everything else is float64. A BatchNorm's per-channel values are `norm` [4, K]: scale,
shift, mean, invstd. In float64, where implementations may or may not fuse, h and dy have a bound of
their own. Formulas: Ioffe and Szegedy, "Batch Normalization", sections 3 and 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.numerics.bounds import half_subnormal
from resnet_fused.numerics.oracle import channels, check_choice
from resnet_fused.numerics.tolerances import (
    BN_ACT_STEPS,
    EPILOGUE_STEPS,
    FINALIZE_STEPS,
    STATS_MEAN,
    STATS_SPREAD,
    STATS_VARIANCE,
    accumulator_dtype,
    unit_roundoff,
)

ACTS = ("none", "relu")
PIXELS = (0, 2, 3)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Computes a * b + c in float32, rounded once; in float64 product and sum."""
    z = a.double() * b.double() + c.double()
    return z if a.dtype is torch.float64 else z.float()


def rows_of(norm: Tensor) -> list[Tensor]:
    """The rows of per-channel values [rows, K], each as [1, K, 1, 1]."""
    return [row.view(1, -1, 1, 1) for row in norm]


def normalised(y: Tensor, norm: Tensor, act: str = "relu") -> Tensor:
    """What the layer behind a BatchNorm reads, act(scale * y + shift), rounded to y's dtype.

    Args:
        y: [N, K, P, Q].
        norm: [4, K].
        act: "relu" (keeps NaN) or "none".
    """
    check_choice("act", act, ACTS)
    scale, shift, *_ = rows_of(norm)
    z = fma(scale, y, shift)
    return (z.relu() if act == "relu" else z).to(y.dtype)


def affine_gradient(dz: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """What the gradient of a raw output is before it is multiplied: A dz + (B y + C), rounded.

    Args:
        dz: [N, K, P, Q].
        y: the same, or None: `dz` is that gradient.
        coefficients: [3, K] A, B, C, or None.
    """
    if y is None or coefficients is None:
        return dz
    a, b, c = rows_of(coefficients)
    return fma(a, dz, fma(b, y, c)).to(dz.dtype)


def unfused_error(*terms: Tensor) -> Tensor | None:
    """How far float64's multiply-adds of these terms may lie apart; None for other dtypes."""
    if terms[0].dtype is not torch.float64:
        return None
    size = sum(t.abs() for t in terms)
    return size.nan_to_num_(0.0, 0.0, 0.0) * (BN_ACT_STEPS * 2.0 * unit_roundoff(torch.float64))


def normalised_error(y: Tensor, norm: Tensor | None) -> Tensor | None:
    """How far two right implementations' h may lie apart: nothing but in float64."""
    if norm is None:
        return None
    scale, shift, *_ = rows_of(norm)
    return unfused_error(scale * y, shift)


def gradient_error(dz: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor | None:
    """Like `normalised_error`, of `affine_gradient`."""
    if y is None or coefficients is None:
        return None
    a, b, c = rows_of(coefficients)
    return unfused_error(a * dz, b * y, c)


def settled(bound: Tensor, oracle: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds the last rounding to the other errors; 0 where the result is NaN or Inf."""
    u = unit_roundoff(dtype)
    bound = bound * (1.0 + u) + oracle.abs() * u + half_subnormal(dtype)
    return bound.masked_fill_(~torch.isfinite(oracle), 0.0)


def stats_oracle(y: Tensor) -> Tensor:
    """Mean of each channel and M2, the sum of (y - mean)^2: [2, K] float64; zeros for no pixels."""
    wide = y.double()
    if not y.numel():
        return torch.zeros((2, y.shape[1]), dtype=torch.float64, device=y.device)
    mean = wide.mean(PIXELS)
    return torch.stack((mean, (wide - channels(mean)).square().sum(PIXELS)))


def stats_bound(y: Tensor, oracle: Tensor, *, tiles: int = 1) -> Tensor:
    """How far statistics of `y` may be from `stats_oracle`: [2, K].

    8 u (|mean| + std) for the mean and (32 + 12 kappa / sqrt(tiles)) u M2 for M2, with
    kappa = |mean| / std; and m times the square of the mean's error, which is what a channel of one
    value has. In float64 nothing wider holds the sums: 2 sqrt(m) is added to 8 and to 32.

    Args:
        y: [N, K, P, Q] as it was stored.
        oracle: what `stats_oracle` returned.
        tiles: parts that were merged; 1 is the widest bound.
    """
    acc, m = accumulator_dtype(y.dtype), y.numel() // max(1, y.shape[1])
    u, sums = unit_roundoff(acc), 2.0 * math.sqrt(m) if acc is torch.float64 else 0.0
    mean, m2 = oracle.nan_to_num(0.0, 0.0, 0.0)
    deviation = (m2 / max(1, m)).sqrt()
    off = (STATS_MEAN + sums) * u * (mean.abs() + deviation)
    apart = STATS_SPREAD / math.sqrt(tiles) * mean.abs() * deviation * m
    squares = (STATS_VARIANCE + sums) * m2
    bound = torch.stack((off, u * (squares + apart) + m * off.square()))
    bound += half_subnormal(accumulator_dtype(y.dtype))
    return bound.masked_fill_(~torch.isfinite(oracle), 0.0)


def _elements(count: int, total: Tensor | None) -> float:
    return float(count) if total is None else float(total)


def bn_finalize_oracle(
    stats: Tensor,
    total: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    count: int,
    eps: float,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """Scale, shift, mean and invstd of a batch: [4, K] float64.

    Args:
        stats: [2, K] mean and M2.
        total: elements a channel over all ranks, or None.
        gamma: [K], or None for 1.
        beta: [K], or None for 0.
        count: elements a channel of this rank.
        eps: added to the variance.
        scale: [K] as the op rounded it, of which the shift is made; by default unrounded.
    """
    mean, m2 = stats.double()
    invstd = 1.0 / (m2 / max(1.0, _elements(count, total)) + eps).sqrt()
    unrounded = invstd if gamma is None else gamma.double() * invstd
    used = unrounded if scale is None else scale.double()
    shift = -mean * used if beta is None else beta.double() - mean * used
    return torch.stack((unrounded, shift, mean, invstd))


def bn_finalize_bound(oracle: Tensor, stats: Tensor, beta: Tensor | None) -> Tensor:
    """How far each value may be from `bn_finalize_oracle`: float64 inside, rounded once; [4, K]."""
    scale, _, mean, invstd = oracle
    cancels = (mean * scale).abs() + (0.0 if beta is None else beta.double().abs())
    inside = torch.stack((scale.abs(), cancels, torch.zeros_like(mean), invstd.abs()))
    inside *= FINALIZE_STEPS * 2.0 * unit_roundoff(torch.float64)
    bound = settled(inside.nan_to_num_(0.0, 0.0, 0.0), oracle, stats.dtype)
    bound[2] = 0.0  # the mean is passed on
    return bound


def bn_update_stats_oracle(
    stats: Tensor,
    total: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: int | None,
    count: int,
    momentum: float | None,
) -> Tensor:
    """Running mean and variance behind a batch: [2, K] float64.

    Args:
        stats: [2, K] mean and M2.
        total: elements a channel over all ranks, or None.
        running_mean: [K] before.
        running_var: [K] before.
        tracked: batches, this one too; None where nobody counts.
        count: elements a channel of this rank.
        momentum: None takes 1 / `tracked`, and nothing where nobody counts.
    """
    before = torch.stack((running_mean.double(), running_var.double()))
    m = _elements(count, total)
    if m == 0:
        return before
    factor = momentum if momentum is not None else 1.0 / tracked if tracked else 0.0
    mean, m2 = stats.double()
    return (1.0 - factor) * before + factor * torch.stack((mean, m2 / (m - 1.0)))


def bn_update_stats_bound(
    oracle: Tensor, running_mean: Tensor, running_var: Tensor, dtype: torch.dtype
) -> Tensor:
    """How far the running statistics may be from their oracle: rounded once to `dtype`; [2, K]."""
    before = torch.stack((running_mean.double(), running_var.double())).abs()
    # The batch's own share is at most what the sum and the old value make together.
    inside = (oracle.abs() + 2.0 * before) * (FINALIZE_STEPS * 2.0 * unit_roundoff(torch.float64))
    return settled(inside.nan_to_num_(0.0, 0.0, 0.0), oracle, dtype)


def _widened(residual: Tensor, offset: int, wanted: int) -> Tensor:
    """A shortcut with the channels that it lacks as zeros."""
    n, held, p, q = residual.shape
    wide = torch.zeros((n, wanted, p, q), dtype=torch.float64, device=residual.device)
    wide[:, offset : offset + held] = residual.double()
    return wide


def _terms(
    y: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, offset: int
) -> list[Tensor]:
    """What `bn_add_act` adds up, in float64."""
    scale, shift, *_ = rows_of(norm.double())
    terms = [scale * y.double(), shift.expand(1, y.shape[1], 1, 1)]
    if residual is not None and residual_norm is not None:
        scale, shift, *_ = rows_of(residual_norm.double())
        terms += [scale * residual.double(), shift]
    elif residual is not None:
        terms.append(_widened(residual, offset, y.shape[1]))
    return terms


def bn_add_act_oracle(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    offset: int = 0,
    act: str = "relu",
) -> Tensor:
    """act(scale * y + shift + shortcut) in float64; the shortcut through its own BatchNorm.

    Args:
        y: [N, K, P, Q].
        norm: [4, K].
        residual: [N, K, P, Q], with fewer channels, or None.
        residual_norm: [4, K] through which `residual` is read, or None.
        offset: the channel of `y` at which a narrower shortcut begins.
        act: "relu" (keeps NaN) or "none".
    """
    check_choice("act", act, ACTS)
    z = sum(_terms(y, norm, residual, residual_norm, offset), torch.zeros_like(y.double()))
    return z.relu() if act == "relu" else z


def bn_add_act_bound(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    offset: int,
    oracle: Tensor,
) -> Tensor:
    """How far each element may be from `bn_add_act_oracle`: u |R| + 2 * 2^-23 S, as `bn_act`."""
    terms = _terms(y, norm, residual, residual_norm, offset)
    size = sum((t.abs() for t in terms), torch.zeros_like(oracle)).nan_to_num_(0.0, 0.0, 0.0)
    size *= BN_ACT_STEPS * 2.0 * unit_roundoff(accumulator_dtype(y.dtype))
    return settled(size, oracle, y.dtype)


def masked(dout: Tensor, result: Tensor) -> Tensor:
    """The gradient behind a ReLU, exact: passed where the result is not <= 0, at NaN too."""
    return torch.where(result <= 0, torch.zeros((), dtype=dout.dtype, device=dout.device), dout)


def _factors(dz: Tensor, branches: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """The terms of `reductions_oracle` [rows, N, K, P, Q]."""
    wide = dz.double()
    centred = [wide * (t.double() - channels(norm[2])) for t, norm in branches]
    return torch.stack((wide, *centred))


def reductions_oracle(dz: Tensor, *branches: tuple[Tensor, Tensor]) -> Tensor:
    """Sums of dz, and of dz (t - mean) for each (t, norm): [1 + branches, K] float64.

    Args:
        dz: [N, K, P, Q] as it was stored.
        branches: raw output and [4, K] of a BatchNorm.
    """
    return _factors(dz, branches).sum((1, 3, 4))


def reductions_bound(dz: Tensor, *branches: tuple[Tensor, Tensor]) -> Tensor:
    """How far the sums may be from `reductions_oracle`: (sqrt(m) + 8) 2^-23 sum |terms|."""
    acc, m = accumulator_dtype(dz.dtype), dz.numel() // max(1, dz.shape[1])
    terms = _factors(dz, branches)
    size = terms.abs().nan_to_num_(0.0, 0.0, 0.0).sum((1, 3, 4))
    bound = size * ((math.sqrt(m) + EPILOGUE_STEPS) * 2.0 * unit_roundoff(acc))
    bound += half_subnormal(acc)
    bound.masked_fill_(~torch.isfinite(terms.sum((1, 3, 4))), 0.0)
    return bound.masked_fill_(size >= torch.finfo(acc).max, math.inf)


def bn_backward_finalize_oracle(
    sums: Tensor,
    all_sums: Tensor | None,
    total: Tensor | None,
    norm: Tensor,
    count: int,
    row: int = 1,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, C [3, K], dgamma [K] and dbeta [K] in float64.

    Args:
        sums: [2 or 3, K] of this rank.
        all_sums: of all ranks, or None.
        total: elements a channel over all ranks, or None.
        norm: [4, K].
        count: elements a channel of this rank.
        row: of `sums`, 1 or 2.
        frozen: whether the statistics were given, not the batch's.
    """
    scale, _, mean, invstd = norm.double()
    everywhere, m = sums if all_sums is None else all_sums, max(1.0, _elements(count, total))
    b = -scale * invstd.square() * everywhere[row].double() / m
    c = -scale * everywhere[0].double() / m - b * mean
    if frozen:
        b = c = torch.zeros_like(scale)
    return torch.stack((scale, b, c)), invstd * sums[row].double(), sums[0].double()


def bn_backward_finalize_bound(
    oracle: tuple[Tensor, Tensor, Tensor], norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How far each may be from `bn_backward_finalize_oracle`: float64 inside, rounded once.

    A and dbeta are passed on. C may be made of the rounded B, u |B mean| off.
    """
    (a, b, c), dgamma, dbeta = oracle
    inside = FINALIZE_STEPS * 2.0 * unit_roundoff(torch.float64)
    product = (b * norm[2].double()).abs()
    cancels = inside * (product * 2.0 + c.abs()) + unit_roundoff(norm.dtype) * product
    errors = torch.stack((torch.zeros_like(a), inside * b.abs(), cancels)).nan_to_num_(0.0, 0.0)
    rows = settled(errors, oracle[0], norm.dtype)
    rows[0] = 0.0
    gamma = settled(inside * dgamma.abs().nan_to_num(0.0, 0.0), dgamma, norm.dtype)
    return rows, gamma, torch.zeros_like(dbeta)


def bn_backward_apply_oracle(dz: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """A dz + B y + C in float64."""
    a, b, c = rows_of(coefficients.double())
    return a * dz.double() + b * y.double() + c


def bn_backward_apply_bound(dz: Tensor, y: Tensor, coefficients: Tensor, oracle: Tensor) -> Tensor:
    """How far each element may be from `bn_backward_apply_oracle`: u |R| + 2 * 2^-23 S."""
    a, b, c = rows_of(coefficients.double())
    size = (a * dz.double()).abs() + (b * y.double()).abs() + c.abs()
    size.nan_to_num_(0.0, 0.0, 0.0)
    size *= BN_ACT_STEPS * 2.0 * unit_roundoff(accumulator_dtype(dz.dtype))
    return settled(size, oracle, dz.dtype)
