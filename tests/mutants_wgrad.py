"""Trials of conv_bn_wgrad for the faults of `mutants`: every way of reading, turning, splitting."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import emulated
import emulated_shapes
import mutants
import torch
from emulated_shapes import lay_out

from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_wgrad import Operands, exact_operands, expected_wgrad

OP = "conv_bn_wgrad"
SHALLOW = dataclasses.replace(mutants.SHALLOW, h=1, w=1)
# A cut tile along each axis; steps of two images, in which the window's rows wrap.
WINDOWED = cases.ConvCase("windowed", 3, 48, 7, 9, 72, 3, 3, padding=(1, 1))
PROLOGUES = ((True, True), (True, False), (False, True))


def operands(
    case: cases.ConvCase, dtype: torch.dtype, layout: str, *, exact: bool, affine: bool, norm: bool
) -> Operands:
    """What the op reads, laid out; the rows that nobody reads are no NaN."""
    generator = torch.Generator().manual_seed(7)
    made = exact_operands(case, dtype, generator, affine=affine, norm=norm)
    if made.norm is not None:
        made.norm[2:] = 0
    if not exact:
        images = {
            name: torch.randn(t.shape, generator=generator).to(dtype)
            for name, t in made._asdict().items()
            if t is not None and t.dim() == 4
        }
        made = made._replace(**images)
    return Operands(*(t if t is None or t.dim() == 2 else lay_out(t, layout) for t in made))


def trials() -> Iterator[mutants.Trial]:
    """On integers every bit, on noise the bound; a result in the operands' dtype and in float32."""
    tiles = emulated_shapes.tiles(OP)
    by_mma = [(i, t) for i, t in enumerate(tiles) if not t["tma"]]
    wide, narrow, image, window = (
        max(i for i, t in by_mma if (t["wide"], t["image"], t["window"]) == kind)
        for kind in (
            (True, False, False), (False, False, False), (True, True, False), (True, False, True)
        )
    )  # fmt: skip
    runs = [
        (case, index, dtype, splits, exact, prologue)
        for (case, index), dtype, splits, (exact, prologue) in itertools.product(
            ((mutants.CONV, wide), (mutants.ODD, narrow)),
            (torch.bfloat16, torch.float32),
            (1, 2),
            (*((True, prologue) for prologue in PROLOGUES), (False, PROLOGUES[0])),
        )
    ]
    runs += [
        (mutants.STEM, image, torch.bfloat16, splits, exact, (affine, False))
        for splits, exact, affine in ((1, True, True), (2, True, False), (2, False, True))
    ]
    runs += [
        (WINDOWED, window, torch.bfloat16, splits, exact, prologue)
        for splits, (exact, prologue) in itertools.product(
            (1, 2), (*((True, prologue) for prologue in PROLOGUES), (False, PROLOGUES[0]))
        )
    ]
    runs.append((SHALLOW, narrow, torch.float32, 1, False, PROLOGUES[0]))
    for case, index, dtype, splits, exact, (affine, norm) in runs:
        layout = "nhwc" if tiles[index]["wide"] else "nchw"
        given = operands(case, dtype, layout, exact=exact, affine=affine, norm=norm)
        kept = torch.float32 if splits > 1 else dtype
        weight = torch.zeros(case.weight_shape, dtype=kept)
        if exact:
            wrong = mutants._bits(expected_wgrad(given, case).to(kept))
        else:
            oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
            bound = numerics.conv_bn_wgrad_bound(
                *given, weight, oracle, **case.geometry, tf32=dtype == torch.float32
            )
            wrong = mutants._bound(oracle, bound)
        for schedule in mutants.HOSTILE if exact else mutants.HOSTILE[-1:]:
            yield mutants.Trial(
                f"{case.name} {dtype} {index}/{splits} {exact=} {affine=} {norm=} {schedule}",
                functools.partial(
                    overload(OP, emulated.NAME),
                    *given, weight, *emulated_shapes.geometry_args(case)[:4],
                ),
                given,
                wrong,
                {"schedule": schedule, "configuration": index, "splits": splits},
            )  # fmt: skip


mutants.TRIALS[OP] = trials
