"""Calls of the emulated conv_chain_fp8: operands, runs, what is wrong with results, plans."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import emulated
import torch
from emulated_fp8 import CHAIN as OP
from emulated_fp8 import E4M3, chain_problem
from emulated_shapes import lay_out
from fp8_operands import same_bits
from mutants import HOSTILE, Trial

from resnet_fused import numerics
from resnet_fused.cases import ChainCase
from resnet_fused.ops import _cuda_chain_fp8_checks as checks
from resnet_fused.ops._library import overload

SCALES = checks.SCALES


def configurations() -> list[dict]:
    """The kernels' table."""
    return emulated.load().conv_chain_fp8_configurations()


def operands_of(case: ChainCase, exact: bool = True, seed: int = 0) -> numerics.ChainOperands:
    generator = torch.Generator().manual_seed(seed)
    made = checks.operands_of(case, generator, exact=exact)
    return numerics.ChainOperands(
        *(t if t is None or t.dim() == 1 else lay_out(t, "nhwc") for t in made)
    )


def run(operands, case, **settings):
    """Results of the emulated kernel, and its report."""
    with emulated.using(**{"splits": 1, **settings}) as found:
        got = overload(OP, emulated.NAME)(
            *operands, case.projection_stride, case.out_stride, *SCALES
        )
    return got, found.reports[-1]


def one_by_one(operands, case, **settings):
    """The same by conv_bn_act_fp8's emulated kernels, one after the other."""
    o = operands
    residual_scale, out_scale, next_scale, _ = SCALES

    def conv(x, weights, scale, residual=None, stride=1, act="relu"):
        geometry = ([stride] * 2, [0, 0], [1, 1], 1, act, residual_scale, scale, E4M3)
        return overload("conv_bn_act_fp8", emulated.NAME)(x, *weights, residual, *geometry)

    with emulated.using(**{"configuration": -1, "splits": 1, "reverse": False, **settings}):
        shortcut = o.residual
        if o.projected is not None:
            stride = case.projection_stride
            shortcut = conv(o.projected, o.projection, residual_scale, stride=stride, act="none")
        out = conv(o.x, (o.weight, o.scale, o.shift), out_scale, shortcut)
        following = conv(out, o.next, next_scale)
    return out[:, :, :: case.out_stride, :: case.out_stride], following


def wrong(got, operands, case):
    """Which results are not what they must be, bit for bit."""
    strides = case.projection_stride, case.out_stride
    expected = numerics.conv_chain_fp8_expected(operands, *strides, SCALES)
    pairs = zip(("out", "next"), got, expected, strict=True)
    return [name for name, y, t in pairs if t is not None and not same_bits(y, t)]


def beyond(got, operands, case, accumulation="nearest"):
    """Which results leave their convolution's bound: next on the out that was written."""
    assert case.out_stride == 1 and not case.projected
    residual_scale, out_scale, next_scale, _ = SCALES
    o, (out, following) = operands, got
    first = (o.x, o.weight, o.scale, o.shift, o.residual), out, out_scale
    found = []
    for given, y, scale in (first, ((out, *o.next, None), following, next_scale)):
        scales = {"residual_scale": residual_scale, "out_scale": scale}
        oracle = numerics.conv_bn_act_fp8_oracle(*given, **scales)
        bound = numerics.conv_bn_act_fp8_bound(*given, oracle, **scales, accumulation=accumulation)
        expected = numerics.conv_bn_act_fp8_expected(oracle, E4M3)
        check = numerics.check_bound(y, expected, bound)
        if not check.ok or check.unchecked:
            found.append(str(check))
    return found


def trials(faulty: Iterable[tuple[int, ChainCase]], gpu: tuple[int, ...]) -> Iterator[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and one on noise.

    Args:
        faulty: configurations, and what they run.
        gpu: what the grid is chosen for.
    """
    for (index, case), exact in itertools.product(faulty, (True, False)):
        operands = operands_of(case, exact=exact)
        alone = None if exact else one_by_one(operands, case)

        def check(got, operands=operands, case=case, alone=alone):
            if alone is None:
                bad = wrong(got, operands, case)
            else:  # sums that are cut show on noise alone
                bad = [y.shape for y, t in zip(got, alone, strict=True) if not same_bits(y, t)]
            return str(bad) if bad else None

        for schedule in HOSTILE if exact else HOSTILE[-1:]:
            yield Trial(
                f"{case} {index} {schedule}",
                functools.partial(
                    overload(OP, emulated.NAME), *operands, 1, case.out_stride, *SCALES
                ),
                tuple(operands),
                check,
                {"schedule": schedule, "configuration": index, "gpu": gpu,
                 "splits": 1, "flow": (False, True)},
            )  # fmt: skip


def plan(case, gpu=emulated.H200, configuration=-1, splits=0, **changes):
    """A plan of a channels_last call in memory that is never touched."""
    meta = {"dtype": E4M3, "device": "meta", "memory_format": torch.channels_last}

    def image(*shape):
        return torch.empty(shape, **meta)

    tensors = {
        "x": image(*case.input_shape),
        "weight": image(case.c, case.k, 1, 1),
        "residual": None if case.projected else image(case.n, case.c, case.h, case.w),
        "projected": image(*case.projected_shape) if case.projected else None,
        "projection_weight": image(case.c, case.projected, 1, 1) if case.projected else None,
        "next_weight": image(case.m, case.c, 1, 1) if case.m else None,
        "front_weight": image(case.k, case.front, 3, 3) if case.front else None,
        "out": image(*case.stored_shape),
        "following": image(case.n, case.m, case.h, case.w),
    }
    addresses = {name: 0 if t is None else 4096 for name, t in tensors.items()}
    kinds = itertools.product(("", "projection_", "next_", "front_"), ("scale", "shift"))
    vectors = dict.fromkeys(map("".join, kinds), 4096)
    options = (case.projection_stride, case.out_stride, *SCALES)
    made = chain_problem(tensors, options, **(addresses | vectors | changes))
    return emulated.load().conv_chain_fp8_plan(made, gpu, configuration, splits)
