"""Self-checks of the Triton kernels of `stem` and `head`: on integers, where every bit is known.

They run in the child process of `resnet_fused._selfcheck`. Images, weights and factors are small
integers, scales powers of two, so that sums are exact; heads pool 16 pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import numerics
from ..cases import HEAD_CASES, STEM_CASES, HeadCase, StemCase
from ..triton import _limits, _stem_tiles, _tiles
from ..triton._launch import precision
from ._e4m3 import E4M3
from ._selfchecks import GUARD, _lay_out, guarded, require_exact

HEAD = "default"


def stem_configurations() -> tuple[str, ...]:
    """Every one that ships."""
    return tuple(tile.name for tile in _stem_tiles.TILES)


def head_configurations() -> tuple[str, ...]:
    """One: sizes alone choose between its two ways."""
    return (HEAD,)


def _dtypes(name: str, device: str) -> tuple[torch.dtype, ...]:
    half = torch.bfloat16 if device.startswith("cuda") else torch.float16
    return (half, torch.float32) if name in ("usual", "classes10") else (half,)


def stem(configuration: str, device: str) -> None:
    """Checks one configuration of `stem` on every case that it takes.

    Args:
        configuration: "64x64_8w2s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    tile = _stem_tiles.BY_NAME[configuration]
    for case in STEM_CASES:
        for dtype in _dtypes(case.name, device):
            _stem(case, dtype, tile, device)


def out_scales(device: str) -> tuple[float | None, ...]:
    """Of the results that are checked: that in the weight's dtype, and that in e4m3 if it can be.

    Of the scale most results of the integers need rounding, and some saturate.
    """
    quantised = _limits.limits(torch.device(device)).capability >= _tiles.E4M3_CAPABILITY
    return (None, 2.0**-6) if quantised else (None,)


def expected_of(
    operands: numerics.StemOperands, case: StemCase, dtype: torch.dtype, out_scale: float | None
) -> Tensor:
    """What a stem of integers gives, in `dtype` or e4m3."""
    if out_scale is None:
        return numerics.stem_oracle(*operands, *case.geometry).to(dtype)
    oracle = numerics.stem_oracle(*operands, *case.geometry, out_scale=out_scale)
    return numerics.conv_bn_act_fp8_expected(oracle, E4M3).to(E4M3)


def _stem(case: StemCase, dtype: torch.dtype, tile: _stem_tiles.Tile, device: str) -> None:
    from ..triton import stem as kernel

    operands = numerics.exact_stem_inputs(case, dtype, torch.Generator().manual_seed(0))
    x, weight, scale, shift, norm = operands
    stride, padding, *pool = case.geometry
    sizes = _stem_tiles.sizes_of(x.shape, weight, stride, padding, pool, precision(dtype))
    if isinstance(sizes, str) or not case.n:
        return
    if not _stem_tiles.fits(sizes, tile, _limits.limits(torch.device(device))):
        return
    plan = _stem_tiles.Plan(tile, max(1, (sizes.rows + 1) // 2), "the self-check asks for it")
    x = _lay_out(x.to(device), case)
    weight, scale, shift = (t.to(device) for t in (weight, scale, shift))
    norm = None if norm is None else norm.to(device)
    for out_scale in out_scales(device):
        expected = expected_of(operands, case, dtype, out_scale)
        buffer, out = guarded(tuple(expected.shape), expected.dtype, device)
        kernel.launch(
            x, weight, scale, shift, norm, out, *case.geometry, out_scale=out_scale, plan=plan
        )
        require_exact(f"{case.name}, {dtype}, {tile.name}", buffer, out, expected)


def head(configuration: str, device: str) -> None:
    """Checks `head` on every case.

    Args:
        configuration: "default".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        ValueError: another configuration.
    """
    if configuration != HEAD:
        raise ValueError(f"configuration is {configuration!r}; accepted is {HEAD!r}")
    for case in HEAD_CASES:
        for dtype in _dtypes(case.name, device):
            _head(case, dtype, device)


def _integers(shape: tuple[int, ...], most: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator)


def _head(case: HeadCase, dtype: torch.dtype, device: str) -> None:
    from ..triton import head as kernel

    if not case.n:
        return
    # Every pixel of a channel holds the same integer: its mean is that.
    x = _integers((case.n, case.c, 1, 1), 4, 1).to(dtype).expand(case.shape)
    weight = _integers((case.classes, case.c), 1, 2).to(dtype)
    bias = _integers((case.classes,), 4, 3).to(dtype) if case.bias else None
    expected = numerics.head_oracle(x, weight, bias).to(dtype)
    buffer = torch.full((expected.numel() + 2 * GUARD,), math.nan, dtype=dtype, device=device)
    out = buffer[GUARD:-GUARD].view(expected.shape)
    bias = None if bias is None else bias.to(device)
    kernel.launch(_lay_out(x.to(device), case), weight.to(device), bias, out)
    require_exact(f"{case.name}, {dtype}", buffer, out, expected)
