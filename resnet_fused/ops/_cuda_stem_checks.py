"""Self-checks of the CUDA kernels of `stem` and `head`: on integers, where every bit is known.

They run in the child process of `resnet_fused._selfcheck`, and as the first stage of `gpu-check`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch

from .. import numerics
from ..cases import HEAD_CASES, STEM_CASES, StemCase
from . import _cuda_plan, _cuda_stem
from ._cuda_checks import _names, index_of
from ._selfchecks import GUARD, _lay_out, guarded, require_exact
from ._stem_checks import _integers, expected_of, out_scales

STRIPS = (1, 3)
CASES = (
    *STEM_CASES,
    # Tiles side by side, of which the last overhangs, and filters of two blocks.
    StemCase("wide", 1, 3, 33, 131, 72, images="uint8"),
)

stem_configurations = functools.partial(_names, "stem")
head_configurations = functools.partial(_names, "head")


def check_stem(
    index: int,
    name: str,
    device: str,
    launch: Callable[..., None],
    plan: Callable[[_cuda_plan.Problem, int, int], int],
) -> None:
    """Checks one configuration of `stem` on every case and dtype that it serves.

    Args:
        index: of the configuration.
        name: its name.
        device: where.
        launch: as `_cuda_stem.launch_stem`.
        plan: of a problem, configuration and strips: the configuration, or -1.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
    """
    count = 0
    for case, dtype, out_scale in itertools.product(CASES, _cuda_stem.DTYPES, out_scales(device)):
        given = numerics.exact_stem_inputs(case, dtype, torch.Generator().manual_seed(0))
        expected = expected_of(given, case, dtype, out_scale)
        x, *more = (None if t is None else t.to(device) for t in given)
        assert x is not None
        assert more[0] is not None
        x = _lay_out(x, case)
        buffer, out = guarded(tuple(expected.shape), expected.dtype, device)
        problem = _cuda_stem.stem_problem(x, more[0], case.geometry, out)
        for strips in STRIPS:
            if plan(problem, index, strips) < 0:
                continue  # it is never used for this
            out.fill_(math.nan)
            launch(x, *more, out, *case.geometry, out_scale, wish=(index, strips))
            about = f"{case.name}, {dtype} to {out.dtype}, {name}/{strips}"
            require_exact(about, buffer, out, expected)
            count += bool(case.n)
    if count == 0:
        raise ArithmeticError(f"{name}: no case of the self-check fits it")


def check_head(index: int, name: str, device: str, launch: Callable[..., None]) -> None:
    """Checks one configuration of `head` on every case.

    Args:
        index: of the configuration.
        name: its name.
        device: where.
        launch: as `_cuda_stem.launch_head`.

    Raises:
        ArithmeticError: a result is wrong.
    """
    for case in HEAD_CASES:
        for dtype in _cuda_stem.DTYPES:
            # Every pixel of a channel holds the same integer: its mean is that.
            x = _integers((case.n, case.c, 1, 1), 4, 1).to(dtype).expand(case.shape)
            weight = _integers((case.classes, case.c), 1, 2).to(dtype)
            bias = _integers((case.classes,), 4, 3).to(dtype) if case.bias else None
            expected = numerics.head_oracle(x, weight, bias).to(dtype)
            size = expected.numel() + 2 * GUARD
            buffer = torch.full((size,), math.nan, dtype=dtype, device=device)
            out = buffer[GUARD:-GUARD].view(expected.shape)
            bias = None if bias is None else bias.to(device)
            image = _lay_out(x.to(device), case)
            launch(image, weight.to(device), bias, out, wish=(index, 1))
            require_exact(f"{case.name}, {dtype}, {name}", buffer, out, expected)


def _plan_on(device: str) -> Callable[[_cuda_plan.Problem, int, int], int]:
    about: Sequence[int] = _cuda_plan.gpu(torch.device(device))
    return lambda problem, index, strips: (
        _cuda_plan.plan(problem, about, index, strips).configuration
    )


def stem(configuration: str, device: str) -> None:
    """Checks one configuration of `stem`, an image in one strip and in several.

    Args:
        configuration: "56x64_8w".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    index = index_of("stem", configuration)
    check_stem(index, configuration, device, _cuda_stem.launch_stem, _plan_on(device))


def head(configuration: str, device: str) -> None:
    """Checks one configuration of `head`; arguments and errors as `stem`'s."""
    check_head(index_of("head", configuration), configuration, device, _cuda_stem.launch_head)
