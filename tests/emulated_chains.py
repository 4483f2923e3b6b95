"""Calls of the emulated conv_chain: operands, runs, what is wrong with results, plans."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import emulated
import torch
from emulated_shapes import lay_out
from mutants import HOSTILE, Trial

from resnet_fused import numerics
from resnet_fused.cases import ChainCase
from resnet_fused.ops._library import overload

DTYPES = emulated.DTYPES["conv_chain"]


def configurations() -> list[dict]:
    """The kernels' table."""
    return emulated.load().conv_chain_configurations()


def operands_of(case, dtype, exact=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = numerics.chain_operands(case, dtype, generator, exact=exact)
    return numerics.ChainOperands(
        *(t if t is None or t.dim() == 1 else lay_out(t, "nhwc") for t in made)
    )


def run(operands, case, *, reverse=False, **settings):
    """Results of the emulated kernel, and its report."""
    with emulated.using(**{"splits": 1, **settings}) as found:
        got = overload("conv_chain", emulated.NAME)(
            *operands, case.projection_stride, case.out_stride, reverse
        )
    return got, found.reports[-1]


def wrong(got, operands, case):
    """Which results are not what they must be, bit for bit."""
    strides = case.projection_stride, case.out_stride
    expected = numerics.conv_chain_expected(operands, operands.x.dtype, *strides)
    pairs = zip(("out", "next"), got, expected, strict=True)
    return [name for name, y, t in pairs if t is not None and not torch.equal(y, t.to(y.dtype))]


def limits_of(operands, case, accumulation):
    """What the results must be near to, and how near."""
    strides = case.projection_stride, case.out_stride
    bound = numerics.conv_chain_bound(operands, *strides, accumulation=accumulation)
    return numerics.conv_chain_oracle(operands, *strides), bound


def beyond(got, operands, case, limits, accumulation="nearest"):
    """Which results leave their bound, and how; next also its own, on the out that was written."""
    found = [
        numerics.check_bound(y, expected, most)
        for y, expected, most in zip(got, *limits, strict=True)
        if expected is not None
    ]
    if case.m and case.out_stride == 1:
        wanted = numerics.conv_bn_act_oracle(got[0], *operands.next)
        most = numerics.conv_bn_act_bound(
            got[0], *operands.next, None, wanted, rounding="fused", accumulation=accumulation, k=16
        )
        found.append(numerics.check_bound(got[1], wanted, most))
    return [str(one) for one in found if not one.ok or one.unchecked]


def trials(faulty: Iterable[tuple[int, ChainCase]], gpu: tuple[int, ...]) -> Iterator[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and one on noise.

    Args:
        faulty: configurations, and what they run.
        gpu: what the grid is chosen for.
    """
    for number, ((index, case), exact) in enumerate(itertools.product(faulty, (True, False))):
        dtype = DTYPES[(number // 2 + exact) % 2]  # sums that are cut show on noise alone
        operands = operands_of(case, dtype, exact=exact)
        limits = limits_of(operands, case, "nearest")

        def check(got, operands=operands, case=case, exact=exact, limits=limits):
            bad = wrong(got, operands, case) if exact else beyond(got, operands, case, limits)
            return str(bad) if bad else None

        for schedule in HOSTILE if exact else HOSTILE[-1:]:
            yield Trial(
                f"{case} {dtype} {index} {schedule}",
                functools.partial(
                    overload("conv_chain", emulated.NAME),
                    *operands, case.projection_stride, case.out_stride, False,
                ),
                tuple(operands),
                check,
                {"schedule": schedule, "configuration": index, "gpu": gpu,
                 "splits": 1, "flow": (False, True)},
            )  # fmt: skip


SCALES = ("scale", "shift")


def plan(case, dtype=DTYPES[0], gpu=emulated.H200, configuration=-1, **changes):
    """A plan of a channels_last call in memory that is never touched."""
    meta = {"dtype": dtype, "device": "meta", "memory_format": torch.channels_last}

    def image(*shape):
        return torch.empty(shape, **meta)

    shape = case.n, case.c, case.h, case.w
    tensors = {
        "x": image(*case.input_shape),
        "weight": image(case.c, case.k, 1, 1),
        "residual": None if case.projected else image(*shape),
        "projected": image(*case.projected_shape) if case.projected else None,
        "projection_weight": image(case.c, case.projected, 1, 1) if case.projected else None,
        "next_weight": image(case.m, case.c, 1, 1) if case.m else None,
        "front_weight": image(case.k, case.front, 3, 3) if case.front else None,
        "out": image(*case.stored_shape),
        "following": image(case.n, case.m, case.h, case.w),
    }
    addresses = {name: 0 if t is None else 4096 for name, t in tensors.items()}
    vectors = dict.fromkeys(
        (f"{of}{name}" for of in ("", "projection_", "next_", "front_") for name in SCALES), 4096
    )
    options = case.projection_stride, case.out_stride, False
    made = emulated.chain_problem(tensors, options, **(addresses | vectors | changes))
    return emulated.load().conv_chain_plan(made, gpu, configuration, 0)
