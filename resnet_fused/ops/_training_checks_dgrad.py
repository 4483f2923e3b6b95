"""Self-check of the gradient of a convolution's input between two BatchNorms, in Triton.

On integers and powers of two whose products and sums are exact: every bit is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..cases import ConvCase
from ..triton import _tiles
from ._selfchecks import CONV_CASES, channels_last, guarded, require_exact
from ._triton_checks import _dtypes, plan


class Operands(NamedTuple):
    """What `conv_bn_dgrad` reads; see `exact_operands`."""

    dz: Tensor
    y: Tensor | None
    coefficients: Tensor | None
    weight: Tensor
    addend: Tensor | None
    raw: Tensor | None
    norm: Tensor | None


def exact_operands(
    case: ConvCase,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    *,
    affine: bool = True,
    addend: int = 1,
    below: bool = True,
) -> Operands:
    """Operands on which the gradient before it is rounded, and its sums after, are exact.

    Integers in -4 .. 4, of y and raw in -2 .. 2; A and the scale are +-1/2 .. 2, B, mean and shift
    integers, C never 0: a pixel outside that counts would show. Half of the channels' BatchNorms
    meet raw values on the kink, where scale * raw + shift is 0.

    Args:
        case: sizes and geometry.
        dtype: of the activations.
        generator: torch's own by default.
        affine: whether there are y and coefficients.
        addend: the addend's stride; 0 for none.
        below: whether there are a BatchNorm and a ReLU below.
    """

    def integers(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator)

    def signs(size: int) -> Tensor:
        return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1

    def powers(size: int) -> Tensor:
        return torch.ldexp(signs(size), torch.randint(-1, 2, (size,), generator=generator))

    def nonzero(size: int) -> Tensor:
        return signs(size) * torch.randint(1, 4, (size,), generator=generator)

    dz = integers(4, *case.output_shape).to(dtype)
    y = integers(2, *case.output_shape).to(dtype)
    rows = torch.stack((powers(case.k), integers(1, case.k).float(), nonzero(case.k)))
    weight = integers(4, *case.weight_shape).to(dtype)
    step = max(1, addend)
    more = integers(4, case.n, case.c, -(-case.h // step), -(-case.w // step)).to(dtype)
    raw = integers(2, *case.input_shape).to(dtype)
    # invstd is nobody's business here.
    vectors = [powers(case.c), integers(2, case.c).float(), integers(2, case.c).float()]
    norm = torch.stack((*vectors, torch.full((case.c,), math.nan)))
    return Operands(
        dz,
        y if affine else None,
        rows if affine else None,
        weight,
        more if addend else None,
        raw if below else None,
        norm if below else None,
    )


def expected_dgrad(operands: Operands, case: ConvCase, addend_stride: int) -> tuple[Tensor, Tensor]:
    """The gradient in the operands' dtype and its sums in float32, of `exact_operands`."""
    dz, y, coefficients, weight, addend, raw, norm = operands
    dy = dz.double()
    if coefficients is not None and y is not None:
        a, b, c = (row.double().view(1, -1, 1, 1) for row in coefficients)
        dy = a * dy + b * y.double() + c
    like = torch.zeros(case.input_shape, dtype=torch.float64)
    dh, _, _ = torch.ops.aten.convolution_backward(
        dy, like, weight.double(), None, case.stride, case.padding, case.dilation, False, [0, 0],
        case.groups, [True, False, False],
    )  # fmt: skip
    if addend is not None:
        dh[:, :, ::addend_stride, ::addend_stride] += addend
    dx = dh.to(dz.dtype)
    if raw is None or norm is None:
        return dx, torch.empty(0, case.c)
    scale, shift, mean = (row.double().view(1, -1, 1, 1) for row in norm[:3])
    dx = torch.where(scale * raw.double() + shift <= 0, 0.0, dx)
    terms = dx.double(), dx.double() * (raw.double() - mean)
    return dx, torch.stack([term.sum((0, 2, 3)) for term in terms]).float()


def conv_bn_dgrad_configurations() -> tuple[str, ...]:
    """Those of `_tiles`."""
    return tuple(tile.name for tile in _tiles.TILES)


def conv_bn_dgrad(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_dgrad`, without and with a split reduction.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    generator = torch.Generator().manual_seed(4)
    for case in CONV_CASES[:3]:
        for dtype in _dtypes(case, device):
            # The larger configurations are never used where the gradient is made as it is read.
            for affine in (True, False):
                _check(case, dtype, affine, configuration, device, generator)


def _check(
    case: ConvCase,
    dtype: torch.dtype,
    affine: bool,
    configuration: str,
    device: str,
    generator: torch.Generator,
) -> None:
    """Checks one case, whose addend has a stride where the convolution does."""
    from ..triton import conv_bn_dgrad as kernel

    step = case.stride[1]
    operands = exact_operands(case, dtype, generator, affine=affine, addend=step)
    dx, sums = expected_dgrad(operands, case, step)
    dz, y, weight, addend, raw = (
        channels_last(t, device)
        for t in (operands.dz, operands.y, operands.weight, operands.addend, operands.raw)
    )
    rows, norm = (
        None if t is None else t.to(device) for t in (operands.coefficients, operands.norm)
    )
    buffer, gradient = guarded(case.input_shape, dtype, device)
    reduced = torch.empty(2, case.c, device=device)
    product = kernel.product_of(gradient, operands.weight, case.stride, case.groups, affine)
    for splits in (1, 2) if case.name == "3x3" else (1,):
        chosen = plan(product, configuration, device, splits)
        if chosen is None:
            continue
        gradient.fill_(math.nan)
        reduced.fill_(math.nan)
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        kernel.launch(
            dz, y, rows, weight, addend, raw, norm, gradient, reduced, step, *geometry, plan=chosen
        )  # fmt: skip
        what = f"{case.name}, {dtype}, {chosen.name}"
        require_exact(what, buffer, gradient, dx)
        wrong = (reduced.cpu() != sums).sum().item()
        if wrong:
            raise ArithmeticError(f"{what}: {wrong} of {sums.numel()} sums are wrong")
