"""Self-check of `conv_bn_act_fp8` in CUDA: a configuration at a time, on integers, bit for bit.

As of Triton's kernel in `_fp8_checks`: integers of -4 to 4 are numbers of e4m3, sums are exact, and
a result is the sum over its scale, saturated and rounded once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch

from .. import numerics
from . import _cuda_fp8, _cuda_plan
from ._cuda_checks import WINDOW, _names, index_of
from ._e4m3 import E4M3
from ._fp8_checks import OUT_SCALE, RESIDUAL_SCALE
from ._selfchecks import CONV_CASES, channels_last, guarded, require_exact

OP = _cuda_fp8.OP
OUTS = (E4M3, torch.bfloat16, torch.float16)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


CASES = tuple(
    dataclasses.replace(
        case, c=_whole(case.c, 16 if case.groups == 1 else 128 * 2), k=_whole(case.k, 32),
        groups=min(case.groups, 2),
    )
    for case in CONV_CASES
)  # fmt: skip
"""Rows of whole 16 bytes, groups of whole steps: TMA takes no others."""


conv_bn_act_fp8_configurations = functools.partial(_names, OP)


def check(
    configuration: str, device: str, launch: Callable[..., object], about: Sequence[int]
) -> None:
    """Checks one configuration on every case and type of the result; for other GPUs none.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_fp8.launch`.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    index, count = index_of(OP, configuration), 0
    if not _cuda_plan.runs(configuration, about):
        return  # no plan takes it on this GPU: there is nothing that it could do wrong
    generator = torch.Generator().manual_seed(0)
    for case in (*CASES, WINDOW) if _cuda_plan.WINDOW in configuration else CASES:
        *operands, residual = numerics.exact_inputs(case, torch.float32, generator)
        x, weight, scale, shift = operands
        x, weight = x.to(E4M3), weight.to(E4M3)
        residual = None if residual is None else residual.to(E4M3)
        scales = {"residual_scale": RESIDUAL_SCALE, "out_scale": OUT_SCALE}
        oracle = numerics.conv_bn_act_fp8_oracle(
            x, weight, scale, shift, residual, **case.geometry, act=case.act, **scales
        )
        x, weight, residual = (channels_last(t, device) for t in (x, weight, residual))
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        for dtype in OUTS:
            expected = numerics.conv_bn_act_fp8_expected(oracle, dtype).to(dtype)
            buffer, out = guarded(case.output_shape, dtype, device)
            problem = _cuda_fp8.problem_of((x, weight, residual), geometry, out)
            if _cuda_plan.plan(problem, about, index, 1).configuration < 0:
                continue  # it is never used for this
            out.fill_(math.nan)
            launch(
                x, weight, scale.to(device), shift.to(device), residual, out, *geometry, case.act,
                RESIDUAL_SCALE, OUT_SCALE, dtype, wish=(index, 1),
            )  # fmt: skip
            require_exact(f"{case.name}, {dtype}, {configuration}", buffer, out, expected)
            count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def conv_bn_act_fp8(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_act_fp8`.

    Args:
        configuration: "tma_p128x128_6s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    check(configuration, device, _cuda_fp8.launch, _cuda_plan.gpu(torch.device(device)))
