"""Self-check of a block's end within the next block's first convolution, in Triton.

On integers and powers of two every bit of both outputs is known; mean and M2 are held to their
bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..cases import ConvCase
from ..triton import _block_end
from ._selfchecks import GUARD, channels_last, guarded, require_exact
from ._training_checks_stats import exact_operands, require_stats
from ._triton_checks import FLOAT32, _dtypes, plan

CASES = (ConvCase(FLOAT32, 2, 208, 7, 9, 144), ConvCase("even", 3, 128, 8, 8, 64))
"""Several columns of tiles, a last tile and a step that are not full; whole ones. The first one's
name has it checked in float32 too.
"""


def exact_end(case: ConvCase, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """y, norm, residual, residual_norm and weight on which all that is made of them is exact.

    Args:
        case: sizes.
        dtype: of activations and weight.
        generator: of the values.
    """
    y, norm, weight = exact_operands(case, dtype, generator)
    residual, residual_norm, _ = exact_operands(case, dtype, generator)
    return y, norm, residual, residual_norm, weight


def bn_add_act_conv_stats_configurations() -> tuple[str, ...]:
    """Those of `_tiles` that can take a product of two tensors."""
    return tuple(tile.name for tile in _block_end.TILES)


def bn_add_act_conv_stats(configuration: str, device: str) -> None:
    """Checks one configuration of `bn_add_act_conv_stats`, with either kind of shortcut.

    Args:
        configuration: "64x128_4w4s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import bn_add_act_conv_stats as kernel

    generator = torch.Generator().manual_seed(5)
    for case in CASES:
        for dtype in _dtypes(case, device):
            y, norm, residual, own, weight = exact_end(case, dtype, generator)
            given, shortcut, weights = (channels_last(t, device) for t in (y, residual, weight))
            for splits, residual_norm in ((1, own), (2, None), (1, None)):
                product = kernel.product_of(given, weights, residual_norm)
                chosen = plan(product, configuration, device, splits)
                if chosen is None:
                    continue
                buffer, out = guarded(case.input_shape, dtype, device)
                around, z = guarded(case.output_shape, dtype, device)
                band, _ = guarded((1, 2, 1, case.k), torch.float32, device)
                stats = band[GUARD:-GUARD].view(2, case.k)
                vectors = (None if t is None else t.to(device) for t in (norm, residual_norm))
                kernel.launch(
                    given, next(vectors), shortcut, next(vectors), weights, out, z, stats,
                    plan=chosen,
                )  # fmt: skip
                end = numerics.bn_add_act_oracle(y, norm, residual, residual_norm).to(dtype)
                expected = numerics.conv_bn_stats_oracle(end, None, weight).to(dtype)
                what = f"{case.name}, {dtype}, {chosen.name}"
                require_exact(f"{what}, out", buffer, out, end)
                require_exact(f"{what}, z", around, z, expected)
                require_stats(what, band, stats, z)
