"""Self-check of the gradient between two blocks behind the earlier one's ReLU, in Triton.

On the integers and powers of two of `_training_checks_dgrad`: every bit is known.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cases import ConvCase
from . import _training_checks_dgrad as dgrad
from ._selfchecks import CONV_CASES, channels_last, guarded, require_exact
from ._triton_checks import _dtypes, plan

conv_bn_dgrad_end_configurations = dgrad.conv_bn_dgrad_configurations


class Operands(NamedTuple):
    """What `conv_bn_dgrad_end` reads; see `exact_operands`."""

    dz: Tensor
    y: Tensor | None
    coefficients: Tensor | None
    weight: Tensor
    addend: Tensor | None
    out: Tensor
    raw: Tensor
    norm: Tensor
    residual: Tensor | None
    residual_norm: Tensor | None


def exact_operands(
    case: ConvCase,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    *,
    affine: bool = True,
    addend: int = 1,
    projected: bool = True,
) -> Operands:
    """Operands on which the gradient before it is rounded, and its sums after, are exact.

    `out` has all signs and zeros, of which none follows from raw and norm. The kernel has no
    business with the rows of a norm beside the mean: they are NaN.

    Args:
        case: sizes and geometry.
        dtype: of the activations.
        generator: torch's own by default.
        affine: whether there are y and coefficients.
        addend: the addend's stride; 0 for none.
        projected: whether there is a projection's raw output.
    """
    how = {"affine": affine, "addend": addend, "below": False}
    layer = dgrad.exact_operands(case, dtype, generator, **how)

    def image() -> Tensor:
        return torch.randint(-2, 3, case.input_shape, generator=generator).to(dtype)

    def rows() -> Tensor:
        norm = torch.full((4, case.c), math.nan)
        norm[2] = torch.randint(-2, 3, (case.c,), generator=generator).float()
        return norm

    rest = (image(), rows()) if projected else (None, None)
    return Operands(*layer[:5], image(), image(), rows(), *rest)


def expected_end(operands: Operands, case: ConvCase, addend_stride: int) -> tuple[Tensor, Tensor]:
    """The gradient in the operands' dtype and its sums in float32, of `exact_operands`."""
    layer = dgrad.Operands(*operands[:5], None, None)
    dout, _ = dgrad.expected_dgrad(layer, case, addend_stride)
    dx = torch.where(operands.out <= 0, torch.zeros_like(dout), dout)
    wide = dx.double()
    sums = [wide.sum((0, 2, 3))]
    for raw, norm in (operands[6:8], operands[8:10]):
        if raw is not None and norm is not None:
            centred = raw.double() - norm[2].double().view(1, -1, 1, 1)
            sums.append((wide * centred).sum((0, 2, 3)))
    return dx, torch.stack(sums).float()


def conv_bn_dgrad_end(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_dgrad_end`, without and with a split reduction.

    Args:
        configuration: "64x64_4w4s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    generator = torch.Generator().manual_seed(4)
    for case in CONV_CASES[:3]:
        for dtype in _dtypes(case, device):
            for projected in (True, False):
                _check(case, dtype, projected, configuration, device, generator)


def _check(
    case: ConvCase,
    dtype: torch.dtype,
    projected: bool,
    configuration: str,
    device: str,
    generator: torch.Generator,
) -> None:
    """Checks one case, whose addend has a stride where the convolution does."""
    from ..triton import conv_bn_dgrad_end as kernel

    step = case.stride[1]
    # The larger configurations are never used where the gradient is made as it is read.
    forms = (True, False) if projected else (True,)
    for affine in forms:
        operands = exact_operands(
            case, dtype, generator, affine=affine, addend=step, projected=projected
        )
        dx, sums = expected_end(operands, case, step)
        given: list[Any] = [
            None if t is None else t.to(device) if t.dim() == 2 else channels_last(t, device)
            for t in operands
        ]
        buffer, gradient = guarded(case.input_shape, dtype, device)
        reduced = torch.empty(2 + projected, case.c, device=device)
        product = kernel.product_of(gradient, operands.weight, case.stride, case.groups, affine)
        for splits in (1, 2) if case.name == "3x3" else (1,):
            chosen = plan(product, configuration, device, splits)
            if chosen is None:
                continue
            gradient.fill_(math.nan)
            reduced.fill_(math.nan)
            geometry = (case.stride, case.padding, case.dilation, case.groups)
            arguments = [*given, gradient, reduced, step, *geometry]
            kernel.launch(*arguments, plan=chosen)
            what = f"{case.name}, {dtype}, {chosen.name}"
            require_exact(what, buffer, gradient, dx)
            wrong = (reduced.cpu() != sums).sum().item()
            if wrong:
                raise ArithmeticError(f"{what}: {wrong} of {sums.numel()} sums are wrong")
