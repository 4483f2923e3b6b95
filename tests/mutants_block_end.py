"""Trials of bn_add_act_conv_stats for the faults of `mutants`: either shortcut, in parts or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import emulated
import mutants
import torch
from matrix import lay_out
from torch import Tensor

from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_block_end import exact_end

OP = "bn_add_act_conv_stats"
# Steps that go round the stages; two columns of tiles of 64, the second one cut, as is a last tile.
SMALL = cases.ConvCase("block_end", 2, 120, 7, 9, 72)
# Sums of few terms: no average hides an operand that was cut instead of rounded.
SHALLOW = cases.ConvCase("block_end_shallow", 1, 8, 1, 2, 8)
NARROW = cases.ConvCase("block_end_narrow", 1, 4, 4, 4, 64)
# More tiles of 64 pixels than a chunk holds.
MANY = cases.ConvCase("block_end_many", 1, 8, 65, 64, 8)


def trials() -> Iterator[mutants.Trial]:
    """On integers every bit, on noise the bound."""
    runs = [
        (SMALL, 3, torch.bfloat16, True, True, 2),
        (SMALL, 3, torch.float16, False, False, 1),
        (SMALL, 2, torch.float32, True, False, 2),
        (SMALL, 1, torch.bfloat16, True, True, 1),
        (SHALLOW, 3, torch.bfloat16, False, True, 1),
        (NARROW, 3, torch.float32, False, False, 1),
        (MANY, 3, torch.bfloat16, True, False, 1),
    ]
    for case, index, dtype, exact, projected, parts in runs:
        given = _operands(case, dtype, exact, projected)
        hostile = case is SMALL and exact
        for schedule in mutants.HOSTILE if hostile else mutants.HOSTILE[-1:]:
            yield mutants.Trial(
                f"{case.name} {dtype} {index} exact={exact} {projected} {schedule}",
                functools.partial(overload(OP, emulated.NAME), *given),
                given,
                _judged(given, exact),
                {
                    "schedule": schedule,
                    "configuration": index,
                    "splits": parts,
                    "resident_blocks": 2,
                },
            )


def _operands(
    case: cases.ConvCase, dtype: torch.dtype, exact: bool, projected: bool
) -> tuple[Tensor | None, ...]:
    """y, norm, residual, residual_norm, weight."""
    generator = torch.Generator().manual_seed(5)
    made = exact_end(case, dtype, generator)
    if not exact:
        made = tuple(torch.randn(t.shape, generator=generator).to(t) for t in made)
    y, norm, residual, own, weight = made
    for rows in (norm, own):
        rows[2:] = 0  # not NaN, which no comparison finds unchanged
    images = [lay_out(t, "nhwc") for t in (y, residual, weight)]
    return images[0], norm, images[1], own if projected else None, images[2]


def _judged(
    given: tuple[Tensor | None, ...], exact: bool
) -> Callable[[tuple[Tensor, Tensor, Tensor]], str | None]:
    """What is wrong with out, z and the statistics."""
    *end, weight = given
    oracle = numerics.bn_add_act_oracle(*end)
    rounded = oracle.to(weight.dtype)

    def wrong(got: tuple[Tensor, Tensor, Tensor]) -> str | None:
        out, z, _ = got
        product = numerics.conv_bn_stats_oracle(out, None, weight)
        measured = numerics.stats_oracle(z)
        checks = [
            mutants._bits(rounded)
            if exact
            else mutants._bound(oracle, numerics.bn_add_act_bound(*end, 0, oracle)),
            mutants._bits(product.to(z.dtype))
            if exact
            else mutants._bound(
                product,
                numerics.conv_bn_stats_bound(
                    out, None, weight, product, tf32=z.dtype is torch.float32
                ),
            ),
            mutants._bound(measured, numerics.stats_bound(z, measured)),
        ]
        found = [check(one) for check, one in zip(checks, got, strict=True)]
        return next((reason for reason in found if reason is not None), None)

    return wrong


mutants.TRIALS[OP] = trials
