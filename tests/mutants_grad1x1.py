"""Trials of conv_bn_grad1x1 for the faults of `mutants`: every way of reading and ending."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import emulated
import mutants
import torch
from matrix import lay_out
from torch import Tensor

from resnet_fused import cases, numerics
from resnet_fused.ops import _training_checks_dgrad as dgrad_checks
from resnet_fused.ops import _training_checks_wgrad as wgrad_checks
from resnet_fused.ops._library import overload

OP = "conv_bn_grad1x1"
# Steps that go round the stages; two tiles of channels, the second one and the filters cut.
SMALL = cases.ConvCase("grad1x1", 3, 120, 7, 9, 56)
TALL = cases.ConvCase("grad1x1_tall", 3, 72, 7, 9, 248)
# Sums of one term: no average hides an operand that was cut instead of rounded.
SHALLOW = cases.ConvCase("grad1x1_shallow", 1, 8, 1, 1, 8)
# Affine, norm, the addend's stride.
WHOLE, BARE, THINNED = (True, True, 1), (False, False, 0), (True, True, 2)


Run = tuple[cases.ConvCase, int, torch.dtype, bool, tuple[bool, bool, int], int]
"""Case, configuration, dtype, whether on integers, way, parts of the pixels."""


def trials() -> Iterator[mutants.Trial]:
    """Of the configurations for sm_80, in every way."""
    runs: list[Run] = [
        (case, index, dtype, exact, way, 2)
        for case, index in ((SMALL, 0), (TALL, 2))
        for dtype, exact, way in (
            (torch.bfloat16, True, WHOLE), (torch.float16, False, WHOLE),
            (torch.float16, True, BARE), (torch.bfloat16, True, THINNED),
        )
    ]  # fmt: skip
    runs.append((SHALLOW, 0, torch.bfloat16, False, WHOLE, 1))
    return trials_of(runs)


def trials_of(runs: Iterable[Run]) -> Iterator[mutants.Trial]:
    """On integers every bit, on noise the bound; a result in the operands' dtype and in float32."""
    for case, index, dtype, exact, way, parts in runs:
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
) -> dgrad_checks.Operands:
    affine, norm, step = way
    generator = torch.Generator().manual_seed(5)
    made = dgrad_checks.exact_operands(case, dtype, generator, affine=affine, addend=step)
    if not norm:
        made = made._replace(norm=None)
    elif made.norm is not None:
        made.norm[3] = 0  # not NaN, which no comparison finds unchanged
    if not exact:
        made = dgrad_checks.Operands(
            *(None if t is None else torch.randn(t.shape, generator=generator).to(t) for t in made)
        )
    return dgrad_checks.Operands(
        *(t if t is None or t.dim() == 2 else lay_out(t, "nhwc") for t in made)
    )


def _call(o: dgrad_checks.Operands, step: int, kept: torch.dtype) -> tuple[Tensor, ...]:
    parameter = torch.empty(o.weight.shape, dtype=kept)
    return overload(OP, emulated.NAME)(
        o.dz, o.y, o.coefficients, o.raw, o.norm, o.weight, o.addend, parameter, True, step
    )


def _judged(
    case: cases.ConvCase, o: dgrad_checks.Operands, exact: bool, step: int, kept: torch.dtype
) -> Callable[[tuple[Tensor, Tensor, Tensor]], str | None]:
    """What is wrong with both gradients and the sums."""
    seen = o if o.norm is not None else o._replace(raw=None)
    factors = wgrad_checks.Operands(o.dz, o.y, o.coefficients, o.raw, o.norm)
    parameter = torch.empty(o.weight.shape, dtype=kept)
    if exact:
        dx, sums = dgrad_checks.expected_dgrad(seen, case, step)
        dweight = wgrad_checks.expected_wgrad(factors, case).to(kept)
        checks = [mutants._bits(t) for t in (dx, sums, dweight)]
    else:
        image = numerics.conv_bn_dgrad_oracle(
            *seen, input_size=case.input_shape, addend_stride=step
        )
        weights = numerics.conv_bn_wgrad_oracle(*factors, parameter)
        checks = [
            mutants._bound(
                image, numerics.conv_bn_dgrad_bound(*seen, image, addend_stride=step)
            ),
            lambda sums: None,
            mutants._bound(
                weights, numerics.conv_bn_wgrad_bound(*factors, parameter, weights)
            ),
        ]  # fmt: skip

    def wrong(got: tuple[Tensor, Tensor, Tensor]) -> str | None:
        found = [check(one) for check, one in zip(checks, got, strict=True)]
        if not exact and o.raw is not None and o.norm is not None:
            below = o.raw, o.norm
            wanted = numerics.reductions_oracle(got[0], below)
            bound = numerics.reductions_bound(got[0], below)
            found.append(mutants._bound(wanted, bound)(got[1]))
        return next((reason for reason in found if reason is not None), None)

    return wrong


mutants.TRIALS[OP] = trials
