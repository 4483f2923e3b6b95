"""Self-check of `conv_bn_stats` in CUDA, a configuration at a time.

On integers and powers of two every bit of the output is known; its mean and M2 are held to their
bound, a few units in the last place, which no wrong element passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from .. import numerics
from . import _cuda_plan, _cuda_stats
from ._cuda_checks import DTYPES, SLICED, WINDOW, _names, by_the_extension, place_of
from ._selfchecks import CONV_CASES, GUARD, channels_last, guarded, require_exact
from ._training_checks_stats import exact_operands, require_stats

NORMED = {
    "3x3": ((1, True), (2, True), (1, False)),
    "1x1_stride2": ((1, False), (1, True)),
    "groups": ((1, True),),
    WINDOW.name: ((1, False), (1, True)),
    SLICED.name: ((1, False), (1, True)),
}
"""Splits, and whether x is read through a BatchNorm, of cases by name. The stem and a block's first
convolutions read an activation as it is, in one part."""

conv_bn_stats_configurations = functools.partial(_names, _cuda_stats.OP)


def check(
    configuration: str,
    device: str,
    launch: Callable[..., None],
    plan: Callable[[_cuda_plan.Problem, int, int], int],
    names: Sequence[str],
) -> None:
    """Checks one configuration on every case and dtype that it serves.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_stats.launch`.
        plan: of a problem, configuration and splits: the configuration, or -1.
        names: of all configurations.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    index, count = place_of(configuration, names), 0
    generator = torch.Generator().manual_seed(4)
    windows = (WINDOW, SLICED) if _cuda_plan.WINDOW in configuration else ()
    for case in (*CONV_CASES, *windows):
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        for dtype in DTYPES:
            x, norm, weight = exact_operands(case, dtype, generator)
            given, weights = channels_last(x, device), channels_last(weight, device)
            for splits, normed in NORMED.get(case.name, ((1, False),)):
                read = norm if normed else None
                vectors = None if read is None else read.to(device)
                buffer, y = guarded(case.output_shape, dtype, device)
                band, _ = guarded((1, 2, 1, case.k), torch.float32, device)
                stats = band[GUARD:-GUARD].view(2, case.k)
                problem = _cuda_stats.problem_of(given, vectors, weights, y, geometry)
                if plan(problem, index, splits) < 0:
                    continue  # it is never used for this
                expected = numerics.conv_bn_stats_oracle(x, read, weight, **case.geometry).to(dtype)
                launch(given, vectors, weights, y, stats, *geometry, wish=(index, splits))
                what = f"{case.name}, {dtype}, {normed}, {configuration}/{splits}"
                require_exact(what, buffer, y, expected)
                require_stats(what, band, stats, y)
                count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def conv_bn_stats(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_stats`, without and with a split reduction.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    by_the_extension(_cuda_stats.OP, configuration, device, check, _cuda_stats.launch)
