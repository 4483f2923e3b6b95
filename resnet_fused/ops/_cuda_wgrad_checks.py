"""Self-check of `conv_bn_wgrad` in CUDA, a configuration at a time.

On integers and powers of two both factors, their products and all sums are exact: every bit is
known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from . import _cuda_plan, _cuda_wgrad
from ._cuda_checks import DTYPES, WINDOW, _names, by_the_extension, place_of
from ._selfchecks import CONV_CASES, channels_last, guarded, require_exact
from ._training_checks_wgrad import exact_operands, expected_wgrad

NORMED = {
    "3x3": ((1, True), (3, True), (1, False), (3, False)),
    "groups": ((1, True), (1, False)),
    "window": ((1, True), (2, True), (2, False)),
}
"""Splits, and whether x is read through a BatchNorm, of cases by name. The stem and projections
read an activation as it is, in one part."""

conv_bn_wgrad_configurations = functools.partial(_names, _cuda_wgrad.OP)


def check(
    configuration: str,
    device: str,
    launch: Callable[..., None],
    plan: Callable[[_cuda_plan.Problem, int, int], int],
    names: Sequence[str],
) -> None:
    """Checks one configuration on every case and dtype that it serves.

    The result is float32 beside 16-bit activations where the reduction is split.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_wgrad.launch`.
        plan: of a problem, configuration and splits: the configuration, or -1.
        names: of all configurations.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    index, count = place_of(configuration, names), 0
    generator = torch.Generator().manual_seed(4)
    cases = (*CONV_CASES, WINDOW) if _cuda_plan.WINDOW in configuration else CONV_CASES
    for case in cases:
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        for dtype in DTYPES:
            for splits, normed in NORMED.get(case.name, ((1, False),)):
                operands = exact_operands(case, dtype, generator, norm=normed)
                expected = expected_wgrad(operands, case)
                dz, y, x = (channels_last(t, device) for t in (operands.dz, operands.y, operands.x))
                rows, below = (
                    None if t is None else t.to(device)
                    for t in (operands.coefficients, operands.norm)
                )
                kept = torch.float32 if splits > 1 else dtype
                buffer, dweight = guarded(case.weight_shape, kept, device)
                given = (dz, y, rows, x, below, dweight)
                problem = _cuda_wgrad.problem_of(*given, geometry)
                if plan(problem, index, splits) < 0:
                    continue  # it is never used for this
                launch(*given, *geometry, wish=(index, splits))
                what = f"{case.name}, {dtype}, {normed}, {configuration}/{splits}"
                require_exact(what, buffer, dweight, expected.to(kept))
                count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def conv_bn_wgrad(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_wgrad`, without and with a split reduction.

    Args:
        configuration: "128x128_4w3s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    by_the_extension(_cuda_wgrad.OP, configuration, device, check, _cuda_wgrad.launch)
