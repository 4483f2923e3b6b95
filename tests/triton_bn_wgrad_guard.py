"""Run as a child: `triton_guard`'s scenarios for `conv_bn_wgrad`, both factors made as read."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton_guard
import triton_huge
from torch import Tensor
from triton_huge import HALF, IMAGES, MANY, MORE, PARTS, RESULT, STEP, TILE, check, integers

from resnet_fused.ops import _training_checks_wgrad as checks

POINTWISE = ((1, 1), (0, 0), (1, 1), 1)


def prepare(op: str, case: Any, place: Callable[[Tensor], Tensor]) -> triton_guard.Prepared:
    """As `triton_guard.prepare`; the parameter is float32 where its case has a shortcut."""
    from resnet_fused.triton import conv_bn_wgrad

    operands = checks.exact_operands(case, HALF)
    form = torch.channels_last
    dz, y, rows, x, norm = (
        place(t.contiguous(memory_format=form) if t.dim() == 4 else t) for t in operands
    )
    dtype = torch.float32 if case.residual else HALF
    gradient = place(torch.full(case.weight_shape, math.nan, dtype=dtype))
    geometry = case.stride, case.padding, case.dilation, case.groups
    launch = functools.partial(conv_bn_wgrad.launch, dz, y, rows, x, norm, gradient, *geometry)
    return launch, gradient, checks.expected_wgrad(operands, case).to(dtype)


def vectors(size: int, last: int) -> tuple[Tensor, Tensor]:
    """[3, size] and [4, size] that leave the first channels 0, to which memory is given nothing."""
    coefficients, norm = torch.zeros(3, size), torch.zeros(4, size)
    coefficients[:, -last:] = integers(3, last).float()
    norm[:2, -last:] = integers(2, last).float()
    return coefficients, norm


def factors(operands: checks.Operands, first: int, rows: int, columns: int) -> Tensor:
    """The last rows and columns of the gradient of 1x1 images; the others must hold zero factors.

    Images before `first` hold dz, y and x of 0, but C and the shift count there too.
    """
    dz, y, coefficients, x, norm = operands
    a, b, c = coefficients[:, -rows:].double()
    scale, shift = norm[:2, -columns:].double()
    dy = a * dz[first:, -rows:, 0, 0].double() + b * y[first:, -rows:, 0, 0].double() + c
    h = (scale * x[first:, -columns:, 0, 0].double() + shift).clamp_min(0)
    return dy.T @ h


def huge(op: str, which: str, narrow: str) -> None:
    """dz and y or x huge by many channels, or dweight by those of both; the last programs run."""
    from resnet_fused.triton import conv_bn_wgrad

    n, k, c = {"dz": (IMAGES, MANY, 8), "x": (IMAGES, 8, MANY), "dweight": (3, MORE, MANY)}[which]
    splits, first = triton_huge.parts(n)
    rows, columns = min(k, (k - 1) % TILE.m + 1), min(c, (c - 1) % TILE.n + 1)
    if splits > 1:
        rows = 1  # the merge's last program has no more
    dz, y, x = (triton_huge.unreserved((n, channels, 1, 1)) for channels in (k, k, c))
    for t, channels in ((dz, rows), (y, rows), (x, columns)):
        t[first:, -channels:] = integers(n - first, channels, 1, 1)
    assert max(t.numel() for t in (dz, x)) > 2**31 or k * c > 2**31
    coefficients, norm = vectors(k, rows)[0], vectors(c, columns)[1]
    operands = checks.Operands(dz, y, coefficients, x, norm)
    dweight = triton_huge.unreserved((k, c, 1, 1))
    with triton_huge.last_programs(conv_bn_wgrad, narrow):
        conv_bn_wgrad.launch(*operands, dweight, *POINTWISE, plan=triton_huge.plan(splits))
    check(dweight[-rows:, -columns:, 0, 0], factors(operands, first, rows, columns))


def sums() -> None:
    """Offsets of the operands fit into 32 bits, those of the partial sums do not."""
    from resnet_fused.triton import conv_bn_wgrad

    (k, c), n = RESULT, PARTS * STEP
    k, c = k // 32 + 8, 32 * c + 16
    last = c % STEP
    dz, y, x = (triton_huge.unreserved((n, channels, 1, 1)) for channels in (k, k, c))
    for t, channels in ((dz, 1), (y, 1), (x, last)):
        t[-STEP:, -channels:] = integers(STEP, channels, 1, 1)
    coefficients, norm = vectors(k, 1)[0], vectors(c, last)[1]
    operands = checks.Operands(dz, y, coefficients, x, norm)
    dweight = triton_huge.unreserved((k, c, 1, 1))
    with triton_huge.last_programs(conv_bn_wgrad, "-"):
        conv_bn_wgrad.launch(*operands, dweight, *POINTWISE, plan=triton_huge.plan(PARTS))
    check(dweight[-1:, -last:, 0, 0], factors(operands, n - STEP, 1, last))


if __name__ == "__main__":
    triton_guard.prepare = prepare
    for which in ("dz", "x", "dweight"):
        triton_huge._HUGE["conv_bn_wgrad", which] = huge
    triton_huge._SUMS["conv_bn_wgrad"] = sums
    triton_guard.main(sys.argv[1:])
