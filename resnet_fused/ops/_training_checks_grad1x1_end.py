"""Self-check of both gradients of a 1x1 and a block's end in one kernel, in Triton.

On integers and powers of two whose products and sums are exact: every bit is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import ConvCase
from ..triton import _grad1x1_end, _limits
from . import _training_checks_dgrad_end as end_checks
from . import _training_checks_wgrad as wgrad_checks
from ._selfchecks import channels_last, guarded, require_exact

CONFIGURATIONS = tuple(_grad1x1_end.BY_NAME)
WAYS = ((True, True, 1), (True, False, 2), (False, True, 0))
"""Whether dz is read through a BatchNorm's backward; whether there is a projection; the addend's
stride, 0 for none."""


def cases_of(configuration: str) -> tuple[ConvCase, ...]:
    """Shapes that a configuration takes: whole tiles, and sizes that leave each one overhanging."""
    config = _grad1x1_end.BY_NAME[configuration]
    piece = _grad1x1_end.PIECE
    return (
        ConvCase("whole", 3, config.channels, 8, 8, config.filters),
        ConvCase("odd", 3, 2 * config.channels - piece, 7, 9, config.filters - piece),
    )


def expected(
    operands: end_checks.Operands, case: ConvCase, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All three results of `exact_operands`, the weights' gradient in float64."""
    dx, sums = end_checks.expected_end(operands, case, max(1, step))
    dz, y, coefficients, _, _, out, *_ = operands
    factors = wgrad_checks.Operands(dz, y, coefficients, out, None)
    return dx, sums, wgrad_checks.expected_wgrad(factors, case)


def conv_bn_grad1x1_end_configurations() -> tuple[str, ...]:
    """All of them."""
    return CONFIGURATIONS


def conv_bn_grad1x1_end(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_grad1x1_end`, with every prologue, addend and shortcut.

    Two programs share three tiles of pixels or more: one of them adds up more than one tile.
    Nothing runs on a GPU that it does not serve.

    Args:
        configuration: "64x128_8w2s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import conv_bn_grad1x1_end as kernel

    config = kernel.BY_NAME[configuration]
    limits = _limits.limits(torch.device(device))
    if kernel.serves(config.filters, config.channels, 2, limits) is not config:
        return
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float16
    generator = torch.Generator().manual_seed(4)
    for case in cases_of(configuration):
        for affine, projected, step in WAYS:
            made = end_checks.exact_operands(
                case, dtype, generator, affine=affine, addend=step, projected=projected
            )
            expected_dx, expected_sums, expected_dw = expected(made, case, step)
            buffer, dx = guarded(case.input_shape, dtype, device)
            kept, dweight = guarded(case.weight_shape, torch.float32, device)
            sums = torch.full((2 + projected, case.c), float("nan"), device=device)
            given: list[Any] = [
                None if t is None else t.to(device) if t.dim() == 2 else channels_last(t, device)
                for t in made
            ]
            arguments = [*given, dx, sums, dweight, max(1, step)]
            kernel.launch(*arguments, config=config, parts=2)
            what = f"{case.name}, {dtype}, {configuration}"
            require_exact(f"{what}, dx", buffer, dx, expected_dx)
            require_exact(f"{what}, dweight", kept, dweight, expected_dw.float())
            if not torch.equal(sums.cpu(), expected_sums):
                raise ArithmeticError(f"{what}: the sums are wrong")
