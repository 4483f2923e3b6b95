"""Self-check of `conv_bn_grad1x1` in CUDA, a configuration at a time.

On integers and powers of two whose products and sums are exact: every bit is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ..cases import ConvCase
from . import _cuda_grad1x1, _cuda_plan
from . import _training_checks_dgrad as dgrad_checks
from . import _training_checks_wgrad as wgrad_checks
from ._cuda_checks import _names, place_of
from ._selfchecks import channels_last, guarded, require_exact
from ._training_checks_grad1x1 import cases_of

DTYPES = (torch.bfloat16, torch.float16)
WAYS = ((True, True, 1, 2), (True, False, 2, 1), (False, True, 0, 3))
"""Whether dz is read through a BatchNorm's backward, and x through a BatchNorm; the addend's
stride, 0 for none; parts of the pixels."""

conv_bn_grad1x1_configurations = functools.partial(_names, _cuda_grad1x1.OP)


def check(
    configuration: str,
    device: str,
    launch: Callable[..., None],
    names: Sequence[str],
) -> None:
    """Checks one configuration on every way through it.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_grad1x1.launch`.
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
    affine, below, step, parts = way
    made = dgrad_checks.exact_operands(
        case, dtype, generator, affine=affine, addend=step, below=True
    )
    if not below:
        made = made._replace(norm=None)
    dz, y, coefficients, weight, addend, x, norm = made
    seen = made if below else made._replace(raw=None)
    expected_dx, expected_sums = dgrad_checks.expected_dgrad(seen, case, max(1, step))
    factors = wgrad_checks.Operands(dz, y, coefficients, x, norm)
    kept = dtype if parts == 1 else torch.float32
    expected_dw = wgrad_checks.expected_wgrad(factors, case).to(kept)
    image, dx = guarded(case.input_shape, dtype, device)
    filters, dweight = guarded(case.weight_shape, kept, device)
    sums = torch.full((2 if below else 0, case.c), float("nan"), device=device)
    dz, y, x, weight, addend = (channels_last(t, device) for t in (dz, y, x, weight, addend))
    coefficients, norm = (None if t is None else t.to(device) for t in (coefficients, norm))
    launch(
        dz, y, coefficients, x, norm, weight, addend, dx, sums, dweight, max(1, step),
        wish=(index, parts),
    )  # fmt: skip
    require_exact(f"{what}, dx", image, dx, expected_dx)
    require_exact(f"{what}, dweight", filters, dweight, expected_dw)
    if not torch.equal(sums.cpu(), expected_sums):
        raise ArithmeticError(f"{what}: the sums are wrong")


def conv_bn_grad1x1(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_grad1x1`, with every prologue and addend.

    Nothing runs on a GPU that has too little shared memory for it: no call comes to it there.

    Args:
        configuration: "64x256_8w3s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    names = _names(_cuda_grad1x1.OP)
    index = place_of(configuration, names)
    case = cases_of(configuration)[0]
    about = _cuda_plan.gpu(torch.device(device))
    if _cuda_grad1x1.fits(index, case.input_shape, case.k, about):
        check(configuration, device, _cuda_grad1x1.launch, names)
