"""Self-checks of the Triton kernels: a configuration at a time, on integers, every bit known.

They run in the child process of `resnet_fused._selfcheck`, and as the first stage of `gpu-check`.
A GPU that can't compile a configuration, or runs it wrongly, loses that configuration alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .. import numerics
from ..cases import BN_ACT_CASES, BnActCase, ConvCase
from ..triton import _limits, _tiles
from ._selfchecks import (
    CONV_CASES,
    channels_last,
    check_bn_act,
    gradient_inputs,
    guarded,
    require_exact,
)

FLOAT32 = "3x3"
"""The case that is checked in float32 too, with one and with three TF32 products: other matrix
instructions. float16 is bfloat16's code but for conversions, and a user waits for each compilation.
"""


def plan(product: _tiles.Product, name: str, device: str, splits: int = 1) -> _tiles.Plan | None:
    """The configuration for this product, or None where it is never used for it."""
    tile = _tiles.BY_NAME[name]
    if not _tiles.fits(product, tile, _limits.limits(torch.device(device))):
        return None
    depth = product.steps
    splits = _tiles.cdiv(depth, _tiles.cdiv(depth, min(splits, depth)))
    flat = product.taps > 1 and (tile.warps == 4 or product.runtime_taps)
    if flat and tile.warps > 4 and product.runtime_taps:
        return None
    return _tiles.Plan(tile, splits, flat and tile.warps == 4, "the self-check asks for it")


def _tile_names() -> tuple[str, ...]:
    return tuple(tile.name for tile in _tiles.TILES)


conv_bn_act_configurations = conv_dgrad_configurations = conv_wgrad_configurations = _tile_names


def bn_act_configurations() -> tuple[str, ...]:
    """One."""
    return ("4096_4w",)


def bn_act(configuration: str, device: str) -> None:
    """Checks `bn_act` on every case.

    Args:
        configuration: its only one.
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        ValueError: another configuration.
    """
    from ..triton import bn_act as kernel

    if configuration not in bn_act_configurations():
        raise ValueError(f"configuration is {configuration!r}; accepted is '4096_4w'")
    for case in BN_ACT_CASES:
        for dtype in _dtypes(case, device):
            check_bn_act(case, dtype, device, kernel.launch)


def _dtypes(case: ConvCase | BnActCase, device: str) -> Iterator[torch.dtype]:
    """What a case is checked in; torch's switch for TF32 is set for as long as each is used."""
    if not device.startswith("cuda"):
        yield torch.float16  # interpreted: no bfloat16
        return
    yield torch.bfloat16
    if case.name == FLOAT32:
        for switch in (True, False):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=switch):
                yield torch.float32


def conv_bn_act(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_act`, without and with a split reduction.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import conv_bn_act as kernel

    generator = torch.Generator().manual_seed(0)
    for case in CONV_CASES:
        for dtype in _dtypes(case, device):
            x, weight, scale, shift, residual = numerics.exact_inputs(case, dtype, generator)
            oracle = numerics.conv_bn_act_oracle(
                x, weight, scale, shift, residual, **case.geometry, act=case.act
            )
            x, weight, residual = (channels_last(t, device) for t in (x, weight, residual))
            buffer, out = guarded(case.output_shape, dtype, device)
            product = kernel.product_of(x, weight, out, case.groups)
            geometry = (case.stride, case.padding, case.dilation, case.groups, case.act)
            for splits in (1, 2) if case.name == "3x3" else (1,):
                chosen = plan(product, configuration, device, splits)
                if chosen is None:
                    continue
                out.fill_(math.nan)
                vectors = (scale.to(device), shift.to(device), residual)
                kernel.launch(x, weight, *vectors, out, *geometry, plan=chosen)
                what = f"{case.name}, {dtype}, {chosen.name}"
                require_exact(what, buffer, out, numerics.exact_expected(oracle, dtype))


def conv_dgrad(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_dgrad`; arguments and errors as `conv_bn_act`'s."""
    from ..triton import conv_dgrad as kernel

    generator = torch.Generator().manual_seed(1)
    for case in CONV_CASES[:3]:
        for dtype in _dtypes(case, device):
            dy, y, x, weight, scale = gradient_inputs(case, dtype, generator)
            expected, _ = numerics.conv_gradients_oracle(
                dy, y, x, weight, scale, **case.geometry, wanted=(True, False)
            )
            buffer, dx = guarded(case.input_shape, dtype, device)
            given, mask, weights = (channels_last(t, device) for t in (dy, y, weight))
            product = kernel.product_of(dx, weight, case.stride, case.groups)
            for splits in (1, 2) if case.name == "3x3" else (1,):
                chosen = plan(product, configuration, device, splits)
                if chosen is None:
                    continue
                dx.fill_(math.nan)
                geometry = (case.stride, case.padding, case.dilation, case.groups)
                kernel.launch(given, mask, weights, scale.to(device), dx, *geometry, plan=chosen)
                what = f"{case.name}, {dtype}, {chosen.name}"
                require_exact(what, buffer, dx, expected.to(dtype))


def conv_wgrad(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_wgrad`; arguments and errors as `conv_bn_act`'s."""
    from ..triton import conv_wgrad as kernel

    generator = torch.Generator().manual_seed(2)
    for case in CONV_CASES:
        for dtype in _dtypes(case, device):
            dy, y, x, weight, scale = gradient_inputs(case, dtype, generator)
            _, expected = numerics.conv_gradients_oracle(
                dy, y, x, weight, scale, **case.geometry, wanted=(False, True)
            )
            buffer, dweight = guarded(case.weight_shape, dtype, device)
            given, mask, image = (channels_last(t, device) for t in (dy, y, x))
            product = kernel.product_of(dy, weight, case.groups)
            for splits in (1, 3) if case.name == "3x3" else (1,):
                chosen = plan(product, configuration, device, splits)
                if chosen is None:
                    continue
                dweight.fill_(math.nan)
                geometry = (case.stride, case.padding, case.dilation, case.groups)
                kernel.launch(given, mask, image, scale.to(device), dweight, *geometry, plan=chosen)
                what = f"{case.name}, {dtype}, {chosen.name}"
                require_exact(what, buffer, dweight, expected.to(dtype))
