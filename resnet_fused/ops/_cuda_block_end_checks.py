"""Self-check of `bn_add_act_conv_stats` in CUDA, a configuration at a time.

On integers and powers of two every bit of both outputs is known; mean and M2 are held to their
bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from .. import numerics
from . import _cuda_block_end, _cuda_plan
from ._cuda_checks import DTYPES, _names, by_the_extension, place_of
from ._selfchecks import GUARD, channels_last, guarded, require_exact
from ._training_checks_block_end import CASES, exact_end
from ._training_checks_stats import require_stats

WAYS = ((1, True), (2, False), (1, False))
"""Splits, and whether the shortcut has a BatchNorm of its own."""

bn_add_act_conv_stats_configurations = functools.partial(_names, _cuda_block_end.OP)


def check(
    configuration: str,
    device: str,
    launch: Callable[..., None],
    plan: Callable[[_cuda_plan.Problem, int, int], int],
    names: Sequence[str],
) -> None:
    """Checks one configuration on every case, dtype and shortcut that it serves.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_block_end.launch`.
        plan: of a problem, configuration and splits: the configuration, or -1.
        names: of all configurations.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    index, count = place_of(configuration, names), 0
    generator = torch.Generator().manual_seed(5)
    for case in CASES:
        for dtype in DTYPES:
            y, norm, residual, own, weight = exact_end(case, dtype, generator)
            given, shortcut, weights = (channels_last(t, device) for t in (y, residual, weight))
            for splits, projected in WAYS:
                below = own if projected else None
                rows = [None if t is None else t.to(device) for t in (norm, below)]
                operands = (given, rows[0], shortcut, rows[1], weights)
                buffer, out = guarded(case.input_shape, dtype, device)
                around, z = guarded(case.output_shape, dtype, device)
                band, _ = guarded((1, 2, 1, case.k), torch.float32, device)
                stats = band[GUARD:-GUARD].view(2, case.k)
                if plan(_cuda_block_end.problem_of(*operands, out, z), index, splits) < 0:
                    continue  # it is never used for this
                launch(*operands, out, z, stats, wish=(index, splits))
                end = numerics.bn_add_act_oracle(y, norm, residual, below).to(dtype)
                expected = numerics.conv_bn_stats_oracle(end, None, weight).to(dtype)
                what = f"{case.name}, {dtype}, {projected}, {configuration}/{splits}"
                require_exact(f"{what}, out", buffer, out, end)
                require_exact(f"{what}, z", around, z, expected)
                require_stats(what, band, stats, z)
                count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def bn_add_act_conv_stats(configuration: str, device: str) -> None:
    """Checks one configuration of `bn_add_act_conv_stats`, with either kind of shortcut.

    Nothing runs on a GPU that has too little shared memory for it: no call comes to it there.

    Args:
        configuration: "128x64_4w3s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    op, launch = _cuda_block_end.OP, _cuda_block_end.launch
    index = place_of(configuration, _names(op))
    if _cuda_block_end.fits(index, _cuda_plan.gpu(torch.device(device))):
        by_the_extension(op, configuration, device, check, launch)
