"""Run as a child: `conv_bn_stats` beside memory that can't be touched, and on huge tensors.

See `triton_guard` and `triton_huge`, of which this is the part for an op with two results.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton_guard
import triton_huge
from matrix import conv_arguments
from torch import Tensor
from triton_huge import CASES, HALF, PARTS, RESULT, STEP, TILE

from resnet_fused import numerics
from resnet_fused.ops._training_checks_stats import exact_operands
from resnet_fused.triton import _tiles, conv_bn_stats

OP = "conv_bn_stats"


def prepare(_: str, case: Any, place: Callable[[Tensor], Tensor]) -> triton_guard.Prepared:
    """As `triton_guard.prepare`; the input of every case but one is read through a BatchNorm."""
    x, norm, weight = exact_operands(case, HALF)
    vectors = None if case.name == "grouped" else place(norm)
    expected = numerics.conv_bn_stats_oracle(
        x, None if vectors is None else norm, weight, **case.geometry
    ).half()
    form = torch.channels_last
    y = place(torch.full_like(expected, math.nan, memory_format=form))
    stats = place(torch.full((2, case.k), math.nan))
    operands = (place(t.contiguous(memory_format=form)) for t in (x, weight))
    given = (next(operands), vectors, next(operands), y, stats, *conv_arguments(case))

    def launch(**options: Any) -> None:
        conv_bn_stats.launch(*given, **options)
        oracle = numerics.stats_oracle(y)
        check = numerics.check_bound(stats, oracle, numerics.stats_bound(y, oracle))
        assert check.ok, (case, str(check))

    return launch, y, expected


def pages(every: str) -> None:
    """Each configuration, by turns of cases and ends; a few tiles and chunks of many to merge."""
    triton_guard.pages(OP, every)
    conv_bn_stats.MOST_AT_ONCE = 2
    tile = _tiles.BY_NAME["32x64_4w4s"]
    for case in (triton_guard.CASES[0], dataclasses.replace(triton_guard.CASES[1], h=19, w=17)):
        for at in ("end", "start"):
            triton_guard.run(OP, case, at, _tiles.Plan(tile, 1, True, "for the test"))


def planted(kernel: str, argument: str, by: str) -> None:
    """One argument of a kernel off by a few: the child must die of it."""
    if kernel == "merge_chunks_kernel":
        conv_bn_stats.MOST_AT_ONCE = 2
        conv_bn_stats.MOMENTS_TILE = 1, 64
    triton_guard.planted(OP, kernel, argument, by)


def huge(which: str, narrow: str) -> None:
    """The last programs on a huge input or output; the last tile's moments must be right too."""
    case, notes = CASES[which], {}
    splits = 2 if which == "merged" else 1
    small = dataclasses.replace(case, n=1)
    x, norm, weight = exact_operands(small, HALF)
    # But for the last part of the reduction nothing passes the ReLU.
    norm[0, : case.c - case.c // splits], norm[1, : case.c - case.c // splits] = 0, -1
    given, y = triton_huge.filled(case.input_shape, x), triton_huge.unreserved(case.output_shape)
    assert max(given.numel(), y.numel()) > 2**31
    weight = weight.contiguous(memory_format=torch.channels_last)
    results, p = (y, torch.empty(2, case.k)), triton_huge.plan(splits)
    with triton_huge.last_programs(conv_bn_stats, narrow, notes):
        conv_bn_stats.launch(given, norm, weight, *results, *conv_arguments(case), plan=p)
    oracle = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
    rows = (case.n * case.p * case.q - 1) % (16 if splits > 1 else TILE.m) + 1
    pixels = min(case.p * case.q, rows)
    triton_huge.check(
        triton_huge.last_pixels(y[-1:], pixels), triton_huge.last_pixels(oracle, pixels)
    )
    tile = y.permute(0, 2, 3, 1).view(-1, case.k)[-rows:].double()
    mean, m2 = notes["moments"][-1].double()
    torch.testing.assert_close(mean, tile.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2, tile.var(0, correction=0) * rows, rtol=1e-5, atol=1e-5)


def sums(narrow: str) -> None:
    """Offsets of partial sums beyond 32 bits, where those of the tensors are not."""
    triton_huge._SUMS[OP] = _sums
    triton_huge.sums(OP, narrow)


def _sums() -> None:
    (n, k), c = RESULT, PARTS * STEP
    x, y = triton_huge.unreserved((n, c, 1, 1)), triton_huge.unreserved((n, k, 1, 1))
    weight = triton_huge.integers(k, c, 1, 1)
    x[-7:, -STEP:] = triton_huge.integers(7, STEP, 1, 1)
    results, p = (y, torch.empty(2, k)), triton_huge.plan(PARTS)
    with triton_huge.last_programs(conv_bn_stats, "-"):
        conv_bn_stats.launch(x, None, weight, *results, (1, 1), (0, 0), (1, 1), 1, plan=p)
    triton_huge.check(
        y[-7:, -16:, 0, 0], x[-7:, :, 0, 0].double() @ weight[-16:, :, 0, 0].double().T
    )


if __name__ == "__main__":
    triton_guard.prepare = prepare
    triton_guard.SCENARIOS.update(
        {function.__name__: function for function in (pages, planted, huge, sums)}
    )
    triton_guard.main(sys.argv[1:])
