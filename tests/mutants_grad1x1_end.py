"""Trials of conv_bn_grad1x1_end for the faults of `mutants`: every way of reading and ending."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import emulated
import mutants
import torch
from matrix import lay_out
from torch import Tensor

from resnet_fused import cases, numerics
from resnet_fused.ops import _cuda_grad1x1_end_checks as checks
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_dgrad_end import Operands, exact_operands

OP = "conv_bn_grad1x1_end"
# Affine, projected, the addend's stride.
WHOLE, BARE, THINNED = (True, True, 1), (False, False, 0), (True, True, 2)

Run = tuple[cases.ConvCase, int, torch.dtype, bool, tuple[bool, bool, int]]
"""Case, configuration, dtype, whether on integers, way."""


# By mma.sync: steps that go round the stages; two tiles of channels, the second one and the filters
# cut. Sums of one term: no average hides an operand that was cut instead of rounded.
SMALL = cases.ConvCase("grad1x1_end", 3, 120, 7, 9, 56)
WIDE = cases.ConvCase("grad1x1_end_wide", 3, 136, 7, 9, 120)
SHALLOW = cases.ConvCase("grad1x1_end_shallow", 1, 8, 1, 1, 8)
SMALL_TILE, WIDE_TILE = 2, 3


def trials() -> Iterator[mutants.Trial]:
    """Of the configurations for sm_80, in every way."""
    runs: list[Run] = [
        (case, index, dtype, exact, way)
        for case, index in ((SMALL, SMALL_TILE), (WIDE, WIDE_TILE))
        for dtype, exact, way in (
            (torch.bfloat16, True, WHOLE), (torch.float16, False, WHOLE),
            (torch.float16, True, BARE), (torch.bfloat16, True, THINNED),
        )
    ]  # fmt: skip
    yield from trials_of(runs, 2)
    yield from trials_of([(SHALLOW, SMALL_TILE, torch.bfloat16, False, WHOLE)])


def trials_of(runs: Iterable[Run], parts: int = 1) -> Iterator[mutants.Trial]:
    """On integers every bit, on noise the bound; a result in the operands' dtype and in float32.

    Args:
        runs: of the op.
        parts: of the pixels.
    """
    for case, index, dtype, exact, way in runs:
        given = _operands(case, dtype, exact, way)
        kept = dtype if way == BARE else torch.float32
        for schedule in mutants.HOSTILE if exact else mutants.HOSTILE[-1:]:
            yield mutants.Trial(
                f"{case.name} {dtype} {index} exact={exact} {way} {schedule}",
                functools.partial(_call, given, max(1, way[2]), kept),
                tuple(given),
                _judged(case, given, exact, max(1, way[2]), kept),
                {
                    "schedule": schedule,
                    "configuration": index,
                    "splits": parts,
                    "resident_blocks": 2,
                },
            )


def _operands(
    case: cases.ConvCase, dtype: torch.dtype, exact: bool, way: tuple[bool, bool, int]
) -> Operands:
    affine, projected, step = way
    generator = torch.Generator().manual_seed(5)
    made = exact_operands(case, dtype, generator, affine=affine, addend=step, projected=projected)
    for norm in (made.norm, made.residual_norm):
        if norm is not None:
            norm.nan_to_num_(0)  # not NaN, which no comparison finds unchanged
    if not exact:
        made = Operands(
            *(None if t is None else torch.randn(t.shape, generator=generator).to(t) for t in made)
        )
    return Operands(*(t if t is None or t.dim() == 2 else lay_out(t, "nhwc") for t in made))


def _call(o: Operands, step: int, kept: torch.dtype) -> tuple[Tensor, ...]:
    return overload(OP, emulated.NAME)(*o, torch.empty(o.weight.shape, dtype=kept), step)


def _judged(
    case: cases.ConvCase, o: Operands, exact: bool, step: int, kept: torch.dtype
) -> Callable[[tuple[Tensor, Tensor, Tensor]], str | None]:
    """What is wrong with both gradients and the sums."""
    branches = [(o.raw, o.norm)]
    if o.residual is not None and o.residual_norm is not None:
        branches.append((o.residual, o.residual_norm))
    if exact:
        dx, sums, dweight = checks.expected(o, case, step)
        found = [mutants._bits(t) for t in (dx, sums, dweight.to(kept))]
    else:
        parameter = torch.empty(o.weight.shape, dtype=kept)
        factors = (o.dz, o.y, o.coefficients, o.out, None, parameter)
        image = numerics.conv_bn_dgrad_end_oracle(*o[:6], addend_stride=step)
        weights = numerics.conv_bn_wgrad_oracle(*factors)
        found = [
            mutants._bound(
                image, numerics.conv_bn_dgrad_end_bound(*o[:6], image, addend_stride=step)
            ),
            lambda sums: None,
            mutants._bound(weights, numerics.conv_bn_wgrad_bound(*factors, weights)),
        ]

    def wrong(got: tuple[Tensor, Tensor, Tensor]) -> str | None:
        reasons = [check(one) for check, one in zip(found, got, strict=True)]
        if not exact:
            wanted = numerics.reductions_oracle(got[0], *branches)
            reasons.append(
                mutants._bound(wanted, numerics.reductions_bound(got[0], *branches))(got[1])
            )
        return next((reason for reason in reasons if reason is not None), None)

    return wrong


mutants.TRIALS[OP] = trials
