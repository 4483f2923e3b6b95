"""Trials of conv_bn_dgrad for the faults of `mutants`: every way of reading, meeting and ending."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import emulated
import emulated_shapes
import mutants
import torch
from emulated import Schedule
from emulated_shapes import lay_out
from mutants import HOSTILE, Trial
from torch import Tensor

from resnet_fused import cases, numerics
from resnet_fused.ops import _training_checks_dgrad as checks
from resnet_fused.ops._library import overload

OP = "conv_bn_dgrad"
# Steps that divide by the stages; two tiles of pixels, a cut one of channels.
WIDE = cases.ConvCase("dgrad", 2, 72, 6, 7, 56, 3, 3, padding=(1, 1))
ODD = cases.ConvCase("dgrad_odd", 3, 35, 7, 7, 5, 3, 3, padding=(1, 1))
# Phases, of which pixels of the last row and column are missing.
STRIDED = cases.ConvCase("dgrad_strided", 2, 24, 9, 9, 40, 3, 3, (2, 2), (1, 1))
# One more chunk of tiles than one: 64 tiles of 64 pixels, and a few.
CHUNKS = cases.ConvCase("dgrad_chunks", 1, 40, 66, 67, 8)
# Sums of one term: no average hides an operand that was cut instead of rounded.
SHALLOW = cases.ConvCase("dgrad_shallow", 1, 24, 8, 8, 24, groups=24)


def trials() -> Iterator[Trial]:
    """Every way through the kernel: wide and narrow, split, in phases, in chunks, on noise."""
    tiles = emulated_shapes.tiles(OP)
    wide, narrow, window = (
        max(i for i, t in enumerate(tiles) if (t["tma"], t["wide"], t["window"]) == (False, *kind))
        for kind in ((True, False), (False, False), (True, True))
    )
    dtypes = (torch.bfloat16, torch.float32)
    runs = [
        (case, index, dtype, splits, exact, True)
        for (case, index), dtype, splits, exact in itertools.product(
            ((WIDE, wide), (ODD, narrow), (WIDE, window)), dtypes, (1, 2), (True, False)
        )
    ]
    plain = ((WIDE, wide), (STRIDED, wide), (WIDE, window))
    runs += [(case, index, torch.bfloat16, 1, True, False) for case, index in plain]
    runs += [(STRIDED, index, torch.float16, 1, True, True) for index in (wide, narrow)]
    runs.append((CHUNKS, narrow, torch.bfloat16, 1, True, True))
    runs.append((SHALLOW, narrow, torch.float32, 1, False, False))
    for case, index, dtype, splits, exact, full in runs:
        layout = "nhwc" if tiles[index]["wide"] or case is STRIDED else "nchw"
        given = _operands(case, dtype, exact, full, layout)
        schedules = HOSTILE if exact else HOSTILE[-1:]
        if splits > 1 and exact:  # who arrives when is a matter of luck
            schedules += tuple(Schedule("eager", "shuffled", seed=seed) for seed in range(8))
        for schedule in schedules:
            yield Trial(
                f"{case.name} {dtype} {index}/{splits} exact={exact} {full} {schedule}",
                functools.partial(
                    overload(OP, emulated.NAME), *given, list(case.input_shape), layout == "nhwc",
                    case.stride[1], *emulated_shapes.geometry_args(case)[:4],
                ),
                tuple(given),
                _judged(case, given, exact),
                {
                    "schedule": schedule,
                    "configuration": index,
                    "splits": splits,
                    "resident_blocks": 2 * splits,
                },
            )  # fmt: skip


def _operands(
    case: cases.ConvCase,
    dtype: torch.dtype,
    exact: bool,
    full: bool,
    layout: str,
    step: int | None = None,
) -> checks.Operands:
    """All of the op's operands, or none of what may be left out; `step`: the addend's."""
    generator = torch.Generator().manual_seed(5)
    step = (step or case.stride[1]) if full else 0
    made = checks.exact_operands(case, dtype, generator, affine=full, addend=step, below=full)
    if made.norm is not None:
        made.norm[3] = 0  # not NaN, which no comparison finds unchanged
    if not exact:
        made = checks.Operands(
            *(None if t is None else torch.randn(t.shape, generator=generator).to(t) for t in made)
        )
    return checks.Operands(*(t if t is None or t.dim() == 2 else lay_out(t, layout) for t in made))


def _judged(
    case: cases.ConvCase, given: checks.Operands, exact: bool, step: int | None = None
) -> Callable[[tuple[Tensor, Tensor]], str | None]:
    """What is wrong with a gradient and its sums."""
    step = step or case.stride[1]
    options = {"addend_stride": step, **case.geometry}
    oracle = numerics.conv_bn_dgrad_oracle(*given, input_size=case.input_shape, **options)
    tf32 = given.dz.dtype == torch.float32
    bound = numerics.conv_bn_dgrad_bound(*given, oracle, **options, tf32=tf32)
    dx, sums = checks.expected_dgrad(given, case, step)

    def wrong(got: tuple[Tensor, Tensor]) -> str | None:
        if exact:
            return mutants._bits(dx)(got[0]) or mutants._bits(sums)(got[1])
        reason = mutants._bound(oracle, bound)(got[0])
        if reason or given.raw is None or given.norm is None:
            return reason
        below = given.raw, given.norm
        wanted = numerics.reductions_oracle(got[0], below)
        return mutants._bound(wanted, numerics.reductions_bound(got[0], below))(got[1])

    return wrong


mutants.TRIALS[OP] = trials
