"""Trials of conv_bn_dgrad_end for the faults of `mutants`: its own ends, either shortcut below."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import emulated
import emulated_shapes
import mutants
import mutants_bn_dgrad as alone
import torch
from emulated_shapes import lay_out
from mutants import HOSTILE, Trial
from torch import Tensor

from resnet_fused import cases, numerics
from resnet_fused.ops import _training_checks_dgrad_end as checks
from resnet_fused.ops._library import overload

OP = "conv_bn_dgrad_end"


def trials() -> Iterator[Trial]:
    """Units of 16 bytes and elements, in phases, windows, splits and chunks; on noise, too."""
    tiles = emulated_shapes.tiles(OP)
    wide, narrow, window = (
        max(i for i, t in enumerate(tiles) if (t["tma"], t["wide"], t["window"]) == (False, *kind))
        for kind in ((True, False), (False, False), (True, True))
    )
    bfloat, half, single = torch.bfloat16, torch.float16, torch.float32
    runs = (
        (alone.WIDE, wide, bfloat, 2, True, True),
        (alone.WIDE, wide, bfloat, 1, False, True),
        (alone.WIDE, window, bfloat, 1, True, True),
        (alone.WIDE, window, single, 1, False, False),
        (alone.ODD, narrow, single, 1, True, True),
        (alone.STRIDED, wide, half, 1, True, False),
        (alone.STRIDED, narrow, bfloat, 1, True, True),
        (alone.CHUNKS, narrow, bfloat, 1, True, True),
        (alone.SHALLOW, narrow, single, 1, False, True),
    )
    for case, index, dtype, splits, exact, projected in runs:
        layout = "nhwc" if tiles[index]["wide"] or case is alone.STRIDED else "nchw"
        given = _operands(case, dtype, exact, projected, layout)
        step = case.stride[1]
        for schedule in HOSTILE if exact else HOSTILE[-1:]:
            yield Trial(
                f"{case.name} {dtype} {index}/{splits} exact={exact} {projected} {schedule}",
                functools.partial(
                    overload(OP, emulated.NAME), *given, step,
                    *emulated_shapes.geometry_args(case)[:4],
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
    case: cases.ConvCase, dtype: torch.dtype, exact: bool, projected: bool, layout: str
) -> checks.Operands:
    """All of the op's operands, a projection's perhaps."""
    generator = torch.Generator().manual_seed(5)
    made = checks.exact_operands(case, dtype, generator, addend=case.stride[1], projected=projected)
    if not exact:
        made = checks.Operands(
            *(None if t is None else torch.randn(t.shape, generator=generator).to(t) for t in made)
        )
    for norm in (made.norm, made.residual_norm):
        if norm is not None:
            norm.nan_to_num_()  # no comparison finds NaN unchanged
    return checks.Operands(*(t if t is None or t.dim() == 2 else lay_out(t, layout) for t in made))


def _judged(
    case: cases.ConvCase, given: checks.Operands, exact: bool
) -> Callable[[tuple[Tensor, Tensor]], str | None]:
    """What is wrong with a gradient and its sums."""
    step = case.stride[1]
    options = {"addend_stride": step, **case.geometry}
    oracle = numerics.conv_bn_dgrad_end_oracle(*given[:6], **options)
    tf32 = given.dz.dtype == torch.float32
    bound = numerics.conv_bn_dgrad_end_bound(*given[:6], oracle, **options, tf32=tf32)
    dx, sums = checks.expected_end(given, case, step)
    branches = [(given.raw, given.norm)]
    if given.residual is not None and given.residual_norm is not None:
        branches.append((given.residual, given.residual_norm))

    def wrong(got: tuple[Tensor, Tensor]) -> str | None:
        if exact:
            return mutants._bits(dx)(got[0]) or mutants._bits(sums)(got[1])
        reason = mutants._bound(oracle, bound)(got[0])
        if reason:
            return reason
        wanted = numerics.reductions_oracle(got[0], *branches)
        return mutants._bound(wanted, numerics.reductions_bound(got[0], *branches))(got[1])

    return wrong


mutants.TRIALS[OP] = trials
mutants.OWN[OP] = (
    "bn_dgrad_epilogue.h", "conv_bn_dgrad_sm80.cuh", "merge_chunks.h", "merge_gradients.h",
)  # fmt: skip
