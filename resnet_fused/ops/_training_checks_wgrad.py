"""Self-checks of the gradients of the weights between two BatchNorms, in Triton.

On integers and powers of two whose products and sums are exact: every bit is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..cases import ConvCase
from ..triton import _limits, _tiles
from ._selfchecks import CONV_CASES, channels_last, guarded, require_exact
from ._triton_checks import _dtypes, plan


class Operands(NamedTuple):
    """What `conv_bn_wgrad` reads; see `exact_operands`."""

    dz: Tensor
    y: Tensor | None
    coefficients: Tensor | None
    x: Tensor
    norm: Tensor | None


def exact_operands(
    case: ConvCase,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    *,
    affine: bool = True,
    norm: bool = True,
) -> Operands:
    """Operands on which both factors, their products and all sums are exact in any order.

    Integers in -4 .. 4, of y in -2 .. 2; A and the scale are +-1/2 .. 2, B and C integers, C and
    the shift never 0: a pixel outside that counts would show.

    Args:
        case: sizes and geometry.
        dtype: of the activations.
        generator: torch's own by default.
        affine: whether there are y and coefficients.
        norm: whether there is a BatchNorm below.
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
    y = integers(2, *case.output_shape).to(dtype) if affine else None
    rows = torch.stack((powers(case.k), integers(1, case.k).float(), nonzero(case.k)))
    x = integers(4, *case.input_shape).to(dtype)
    # Mean and invstd are nobody's business here.
    below = torch.stack((powers(case.c), nonzero(case.c), *[torch.full((case.c,), math.nan)] * 2))
    return Operands(dz, y, rows if affine else None, x, below if norm else None)


def expected_wgrad(operands: Operands, case: ConvCase) -> Tensor:
    """The gradient of the weight in float64, of `exact_operands`."""
    dz, y, coefficients, x, norm = operands
    dy, h = dz.double(), x.double()
    if coefficients is not None and y is not None:
        a, b, c = (row.double().view(1, -1, 1, 1) for row in coefficients)
        dy = a * dy + b * y.double() + c
    if norm is not None:
        scale, shift = (row.double().view(1, -1, 1, 1) for row in norm[:2])
        h = (scale * h + shift).clamp_min(0)
    weight = torch.zeros(case.weight_shape, dtype=torch.float64)
    _, dweight, _ = torch.ops.aten.convolution_backward(
        dy, h, weight, None, case.stride, case.padding, case.dilation, False, [0, 0], case.groups,
        [False, True, False],
    )  # fmt: skip
    return dweight


def conv_bn_wgrad_configurations() -> tuple[str, ...]:
    """Those of `_tiles`."""
    return tuple(tile.name for tile in _tiles.TILES)


def conv_bn_wgrad(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_wgrad`, without and with a split reduction.

    The result is float32 beside 16-bit activations where the reduction is split.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import conv_bn_wgrad as kernel

    generator = torch.Generator().manual_seed(3)
    for case in CONV_CASES:
        for dtype in _dtypes(case, device):
            # The stem and projections read an activation as it is.
            norm = case.name in ("3x3", "groups")
            operands = exact_operands(case, dtype, generator, norm=norm)
            expected = expected_wgrad(operands, case)
            dz, y, coefficients, x, below = operands
            given, raw, image = (channels_last(t, device) for t in (dz, y, x))
            rows, vectors = (None if t is None else t.to(device) for t in (coefficients, below))
            for splits in (1, 3) if case.name == "3x3" else (1,):
                kept = torch.float32 if splits > 1 else dtype
                buffer, dweight = guarded(case.weight_shape, kept, device)
                product = kernel.product_of(dz, dweight, case.groups)
                chosen = plan(product, configuration, device, splits)
                names = kernel.offered(product, True, norm, _limits.limits(torch.device(device)))
                if chosen is None or (names is not None and configuration not in names):
                    continue
                geometry = (case.stride, case.padding, case.dilation, case.groups)
                kernel.launch(given, raw, rows, image, vectors, dweight, *geometry, plan=chosen)
                what = f"{case.name}, {dtype}, {chosen.name}"
                require_exact(what, buffer, dweight, expected.to(kept))
