"""Self-check of `conv_bn_stats` in Triton, a configuration at a time.

On integers and powers of two every bit of the output is known; its mean and M2 are held to their
bound, a few units in the last place, which no wrong element passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import numerics
from ..cases import ConvCase
from ..triton import _tiles
from ._selfchecks import CONV_CASES, GUARD, channels_last, guarded, require_exact
from ._triton_checks import _dtypes, plan


def exact_operands(
    case: ConvCase, dtype: torch.dtype, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, norm and weight on which what is read, its products and all sums are exact in any order.

    Integers in -4 .. 4; the scale is +-1/2 .. 2, the shift an integer and never 0: padding that
    was taken for relu(shift) would show.

    Args:
        case: sizes and geometry.
        dtype: of x and weight.
        generator: torch's own by default.
    """

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    def signs() -> Tensor:
        return torch.randint(0, 2, (case.c,), generator=generator) * 2.0 - 1

    scale = torch.ldexp(signs(), torch.randint(-1, 2, (case.c,), generator=generator))
    shift = signs() * torch.randint(1, 4, (case.c,), generator=generator)
    # Mean and invstd are nobody's business here.
    norm = torch.stack((scale, shift, *[torch.full((case.c,), math.nan)] * 2))
    return integers(*case.input_shape), norm, integers(*case.weight_shape)


def require_stats(what: str, buffer: Tensor, stats: Tensor, y: Tensor) -> None:
    """Holds the statistics of an output to their bound.

    Args:
        what: the case, for the message.
        buffer: what `stats` lies in, between guard bands full of NaN.
        stats: [2, K] float32 mean and M2.
        y: the output [N, K, P, Q].

    Raises:
        ArithmeticError: a value is wrong or was not written, or a guard band was.
    """
    oracle = numerics.stats_oracle(y.cpu())
    check = numerics.check_bound(stats.cpu(), oracle, numerics.stats_bound(y.cpu(), oracle))
    if not check.ok:
        raise ArithmeticError(f"{what}: mean and M2 are wrong: {check}")
    bands = torch.cat([buffer[:GUARD], buffer[-GUARD:]]).cpu()
    if not bool(bands.isnan().all()):
        raise ArithmeticError(f"{what}: elements beside mean and M2 were written")


def conv_bn_stats_configurations() -> tuple[str, ...]:
    """Those of `_tiles`."""
    return tuple(tile.name for tile in _tiles.TILES)


def conv_bn_stats(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_stats`, without and with a split reduction.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import conv_bn_stats as kernel

    generator = torch.Generator().manual_seed(4)
    for case in CONV_CASES:
        for dtype in _dtypes(case, device):
            x, norm, weight = exact_operands(case, dtype, generator)
            given, weights = channels_last(x, device), channels_last(weight, device)
            geometry = (case.stride, case.padding, case.dilation, case.groups)
            # The stem and a block's first convolutions read an activation as it is.
            read = norm if case.name in ("3x3", "groups") else None
            expected = numerics.conv_bn_stats_oracle(x, read, weight, **case.geometry).to(dtype)
            vectors = None if read is None else read.to(device)
            for splits in (1, 2) if case.name == "3x3" else (1,):
                buffer, y = guarded(case.output_shape, dtype, device)
                band, _ = guarded((1, 2, 1, case.k), torch.float32, device)
                stats = band[GUARD:-GUARD].view(2, case.k)
                product = kernel.product_of(given, read, weights, y, case.groups)
                chosen = plan(product, configuration, device, splits)
                if chosen is None:
                    continue
                kernel.launch(given, vectors, weights, y, stats, *geometry, plan=chosen)
                what = f"{case.name}, {dtype}, {chosen.name}"
                require_exact(what, buffer, y, expected)
                require_stats(what, band, stats, y)
