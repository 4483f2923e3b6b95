"""Self-check of `conv_chain` in Triton: integers whose products and sums are exact, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..cases import ChainCase
from ..triton import _chain_tiles, _limits
from ._chain_plan import sizes_of
from ._selfchecks import channels_last, guarded, require_exact


def conv_chain_configurations() -> tuple[str, ...]:
    """All of them."""
    return tuple(one.name for one in _chain_tiles.CONFIGS)


def cases_of(configuration: str) -> tuple[ChainCase, ...]:
    """Shapes that a configuration takes: whole blocks, and sizes that leave each overhanging.

    Args:
        configuration: a name of `_chain_tiles.CONFIGS`.
    """
    one = _chain_tiles.BY_NAME[configuration]
    whole = ChainCase("whole", 3, one.k, 8, 8, 4 * one.chunk, one.m)
    source = 48 if one.projected else 0
    odd = ChainCase("odd", 3, one.k - 16, 7, 9, 3 * one.chunk - 16, one.m - 16, source, 2, 0, 2)
    if one.warps > _chain_tiles.FRONT_WARPS:
        return whole, odd
    return whole, odd, ChainCase("front", 2, one.k - 16, 7, 9, 2 * one.chunk, one.m, 0, 1, 80)


def on_device(operands: numerics.ChainOperands, device: str) -> list[Tensor | None]:
    """The operands on a device, activations and weights in channels_last."""
    return [
        None if t is None else t.to(device) if t.dim() == 1 else channels_last(t, device)
        for t in operands
    ]


def conv_chain(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_chain`; cases that the GPU has no room for are left out.

    Args:
        configuration: "128x64x64_4w3s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import conv_chain as kernel

    config = _chain_tiles.BY_NAME[configuration]
    limits = _limits.limits(torch.device(device))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float16
    generator = torch.Generator().manual_seed(5)
    for case in cases_of(configuration):
        if _chain_tiles.unfit(config, sizes_of(case, dtype.itemsize), limits):
            continue
        operands = numerics.chain_operands(case, dtype, generator, exact=True)
        strides = case.projection_stride, case.out_stride
        expected, after = numerics.conv_chain_expected(operands, dtype, *strides)
        buffer, out = guarded(case.stored_shape, dtype, device)
        kept, following = guarded((case.n, case.m, case.h, case.w), dtype, device)
        given = on_device(operands, device)
        launch: Any = kernel.launch
        launch(*given, out, following, *strides, case.name == "odd", config=config)
        what = f"{case.name}, {dtype}, {configuration}"
        require_exact(f"{what}, out", buffer, out, expected)
        if after is not None:
            require_exact(f"{what}, next", kept, following, after)
