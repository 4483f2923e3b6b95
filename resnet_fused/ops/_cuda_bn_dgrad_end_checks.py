"""Self-check of `conv_bn_dgrad_end` in CUDA, a configuration at a time.

On integers and powers of two whose products and sums are exact: every bit is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cases import ConvCase
from . import _cuda_bn_dgrad_end, _cuda_plan
from ._cuda_checks import DTYPES, WINDOW, _names, by_the_extension
from ._selfchecks import CONV_CASES, GUARD, channels_last, guarded, require_exact
from ._training_checks_dgrad_end import Operands, exact_operands, expected_end

SPLITS = (1, 2)
"""Of the case "3x3"; the other ones are not split."""

conv_bn_dgrad_end_configurations = functools.partial(_names, _cuda_bn_dgrad_end.OP)


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
        launch: as `_cuda_bn_dgrad_end.launch`.
        plan: of a problem, configuration and splits: the configuration, or -1.
        names: of all configurations.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    if configuration not in names:
        raise ValueError(
            f"configuration is {configuration!r}; accepted are {', '.join(map(repr, names))}"
        )
    index, count = names.index(configuration), 0
    generator = torch.Generator().manual_seed(4)
    for case in (*CONV_CASES, WINDOW) if _cuda_plan.WINDOW in configuration else CONV_CASES:
        for dtype in DTYPES:
            # Without coefficients, an addend or a projection: ways of their own through the kernel.
            for plain in (False, True) if case.name == "3x3" else (False,):
                operands = exact_operands(
                    case, dtype, generator, affine=not plain,
                    addend=0 if plain else case.stride[1], projected=not plain,
                )  # fmt: skip
                for splits in SPLITS if case.name == "3x3" else (1,):
                    what = f"{case.name}, {dtype}, {configuration}/{splits}"
                    count += _checked(
                        what, case, operands, device, launch, lambda p, s=splits: plan(p, index, s),
                        (index, splits),
                    )  # fmt: skip
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def _checked(
    what: str,
    case: ConvCase,
    operands: Operands,
    device: str,
    launch: Callable[..., None],
    plan: Callable[[_cuda_plan.Problem], int],
    wish: tuple[int, int],
) -> bool:
    """Checks a case; whether the configuration takes it."""

    def on_device(t: Tensor | None) -> Any:
        if t is None:
            return None
        return channels_last(t, device) if t.dim() == 4 else t.to(device)

    given = tuple(map(on_device, operands))
    step = max(1, case.stride[1])
    rows = 2 if operands.residual is None else 3
    buffer, dx = guarded(case.input_shape, operands.dz.dtype, device)
    band, _ = guarded((1, rows, 1, case.c), torch.float32, device)
    sums = band[GUARD : GUARD + rows * case.c].view(rows, case.c)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    if plan(_cuda_bn_dgrad_end.problem_of(given, dx, step, geometry)) < 0:
        return False  # it is never used for this
    launch(*given, dx, sums, step, *geometry, wish=wish)
    expected, reduced = expected_end(operands, case, step)
    require_exact(what, buffer, dx, expected)
    wrong = (sums.cpu() != reduced).sum().item()
    if wrong:
        raise ArithmeticError(f"{what}: {wrong} of {reduced.numel()} sums are wrong")
    outside = torch.cat([band[:GUARD], band[GUARD + rows * case.c :]]).cpu()
    if not bool(outside.isnan().all()):
        raise ArithmeticError(f"{what}: elements beside the sums were written")
    return True


def conv_bn_dgrad_end(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_dgrad_end`, without and with a split reduction.

    Args:
        configuration: "128x64_4w3s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    by_the_extension(_cuda_bn_dgrad_end.OP, configuration, device, check, _cuda_bn_dgrad_end.launch)
