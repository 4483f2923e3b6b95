"""Self-check of both gradients of a 1x1 convolution in one kernel, in Triton.

On integers and powers of two whose products and sums are exact: every bit is known.
"""

from __future__ import annotations

import re

import torch

from ..cases import ConvCase
from ..triton import _grad1x1, _limits
from . import _training_checks_dgrad as dgrad_checks
from . import _training_checks_wgrad as wgrad_checks
from ._selfchecks import channels_last, guarded, require_exact

CONFIGURATIONS = tuple(_grad1x1.BY_NAME)


def cases_of(configuration: str) -> tuple[ConvCase, ...]:
    """Shapes that a configuration takes: whole tiles, and sizes that leave each one overhanging.

    Args:
        configuration: one of `CONFIGURATIONS`, or of the CUDA kernel's.
    """
    filters, channels = map(int, re.findall(r"(\d+)x(\d+)", configuration)[0])
    return (
        ConvCase("whole", 3, channels, 8, 8, filters),
        ConvCase("odd", 3, 2 * channels - 8, 7, 9, filters - 8),
    )


def conv_bn_grad1x1_configurations() -> tuple[str, ...]:
    """All of them."""
    return CONFIGURATIONS


def conv_bn_grad1x1(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_grad1x1`, with every prologue and addend.

    Two programs share three tiles of pixels or more: one of them adds up more than one tile.
    Nothing runs on a GPU that it does not serve.

    Args:
        configuration: "64x128_8w2s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import conv_bn_grad1x1 as kernel

    config = kernel.BY_NAME[configuration]
    limits = _limits.limits(torch.device(device))
    if kernel.serves(config.filters, config.channels, 2, limits) is None:
        return
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float16
    generator = torch.Generator().manual_seed(4)
    for case in cases_of(configuration):
        for affine, below, step in ((True, True, 1), (True, False, 2), (False, True, 0)):
            operands = dgrad_checks.exact_operands(
                case, dtype, generator, affine=affine, addend=step, below=True
            )
            if not below:
                operands = operands._replace(norm=None)
            dz, y, coefficients, weight, addend, x, norm = operands
            seen = operands if below else operands._replace(raw=None)
            expected_dx, expected_sums = dgrad_checks.expected_dgrad(seen, case, max(1, step))
            factors = wgrad_checks.Operands(dz, y, coefficients, x, norm)
            expected_dw = wgrad_checks.expected_wgrad(factors, case).float()
            buffer, dx = guarded(case.input_shape, dtype, device)
            kept, dweight = guarded(case.weight_shape, torch.float32, device)
            rows = torch.full((2 if below else 0, case.c), float("nan"), device=device)
            dz, y, x, weight, addend = (
                channels_last(t, device) for t in (dz, y, x, weight, addend)
            )
            coefficients, norm = (None if t is None else t.to(device) for t in (coefficients, norm))
            kernel.launch(
                dz, y, coefficients, x, norm, weight, addend, dx, rows, dweight, max(1, step),
                config=config, parts=2,
            )  # fmt: skip
            what = f"{case.name}, {dtype}, {configuration}"
            require_exact(f"{what}, dx", buffer, dx, expected_dx)
            require_exact(f"{what}, dweight", kept, dweight, expected_dw)
            if not torch.equal(rows.cpu(), expected_sums):
                raise ArithmeticError(f"{what}: the sums are wrong")
