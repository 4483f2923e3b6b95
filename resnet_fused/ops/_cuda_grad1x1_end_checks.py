"""Self-check of `conv_bn_grad1x1_end` in CUDA, a configuration at a time.

On integers and powers of two whose products and sums are exact: every bit is known.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..cases import ConvCase
from . import _cuda_grad1x1_end, _cuda_plan
from . import _training_checks_dgrad_end as end_checks
from ._cuda_checks import _names, place_of
from ._selfchecks import channels_last, guarded, require_exact
from ._training_checks_grad1x1_end import expected

DTYPES = (torch.bfloat16, torch.float16)
WAYS = ((True, True, 1, 2), (True, False, 2, 1), (False, True, 0, 3))
"""Whether dz is read through a BatchNorm's backward; whether there is a projection; the addend's
stride, 0 for none; parts of the pixels."""

conv_bn_grad1x1_end_configurations = functools.partial(_names, _cuda_grad1x1_end.OP)


def cases_of(configuration: str) -> tuple[ConvCase, ...]:
    """Shapes that a configuration takes: whole tiles, and sizes that leave each one overhanging."""
    filters, channels = map(int, re.findall(r"(\d+)x(\d+)", configuration)[0])
    return (
        ConvCase("whole", 3, channels, 8, 8, filters),
        ConvCase("odd", 3, 2 * channels - 8, 7, 9, filters - 8),
    )


def check(
    configuration: str, device: str, launch: Callable[..., None], names: Sequence[str]
) -> None:
    """Checks one configuration on every way through it.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_grad1x1_end.launch`.
        names: of all configurations.

    Raises:
        ArithmeticError: a result is wrong.
        ValueError: another configuration.
    """
    index = place_of(configuration, names)
    generator = torch.Generator().manual_seed(4)
    for case in cases_of(configuration):
        for dtype in DTYPES:
            for way in WAYS:
                what = f"{case.name}, {dtype}, {configuration}/{way[-1]}"
                _check(what, case, dtype, way, device, launch, index, generator)


def _check(
    what: str,
    case: ConvCase,
    dtype: torch.dtype,
    way: tuple[bool, bool, int, int],
    device: str,
    launch: Callable[..., None],
    index: int,
    generator: torch.Generator,
) -> None:
    affine, projected, step, parts = way
    made = end_checks.exact_operands(
        case, dtype, generator, affine=affine, addend=step, projected=projected
    )
    expected_dx, expected_sums, expected_dw = expected(made, case, step)
    kept = dtype if parts == 1 else torch.float32
    image, dx = guarded(case.input_shape, dtype, device)
    filters, dweight = guarded(case.weight_shape, kept, device)
    sums = torch.full((2 + projected, case.c), float("nan"), device=device)
    given: list[Any] = [
        None if t is None else t.to(device) if t.dim() == 2 else channels_last(t, device)
        for t in made
    ]
    launch(*given, dx, sums, dweight, max(1, step), wish=(index, parts))
    require_exact(f"{what}, dx", image, dx, expected_dx)
    require_exact(f"{what}, dweight", filters, dweight, expected_dw.to(kept))
    if not torch.equal(sums.cpu(), expected_sums):
        raise ArithmeticError(f"{what}: the sums are wrong")


def conv_bn_grad1x1_end(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_grad1x1_end`, with every prologue, addend and shortcut.

    Nothing runs on a GPU that does not take it: no call comes to it there.

    Args:
        configuration: "tma_64x128_4s", "64x64_8w3s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    names = _names(_cuda_grad1x1_end.OP)
    place_of(configuration, names)
    if _cuda_plan.runs(configuration, _cuda_plan.gpu(torch.device(device))):
        check(configuration, device, _cuda_grad1x1_end.launch, names)
