"""The self-check of `conv_bn_act_fp8`: a configuration at a time, on integers, every bit known.

As in `_triton_checks`. Integers of -4 to 4 are numbers of e4m3, and so are scales of powers of two:
sums are exact, and an e4m3 result is the sum over its scale, saturated and rounded once.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .. import numerics
from ._e4m3 import E4M3
from ._selfchecks import CONV_CASES, channels_last, guarded, require_exact
from ._triton_checks import conv_bn_act_configurations, plan

conv_bn_act_fp8_configurations = conv_bn_act_configurations
CASES = tuple(dataclasses.replace(case, k=-(-case.k // 16) * 16) for case in CONV_CASES)
"""Rows of whole 16 bytes: of others only the smallest tile is used."""
RAGGED = dataclasses.replace(CONV_CASES[1], name="ragged", c=65)
RESIDUAL_SCALE, OUT_SCALE = 0.5, 2.0
"""So that some results of the long sums saturate, and most need rounding."""


def conv_bn_act_fp8(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_act_fp8`, without and with a split reduction.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        KeyError: another configuration.
    """
    from ..triton import conv_bn_act_fp8 as kernel

    generator = torch.Generator().manual_seed(0)
    wide = torch.bfloat16 if device.startswith("cuda") else torch.float16  # interpreted: no bf16
    for case in (*CASES, RAGGED):
        *operands, residual = numerics.exact_inputs(case, torch.float32, generator)
        x, weight, scale, shift = operands
        x, weight = x.to(E4M3), weight.to(E4M3)
        residual = None if residual is None else residual.to(E4M3)
        scales = {"residual_scale": RESIDUAL_SCALE, "out_scale": OUT_SCALE}
        oracle = numerics.conv_bn_act_fp8_oracle(
            x, weight, scale, shift, residual, **case.geometry, act=case.act, **scales
        )
        x, weight, residual = (channels_last(t, device) for t in (x, weight, residual))
        vectors = (scale.to(device), shift.to(device), residual)
        for dtype in (E4M3, wide) if case.name == "3x3" else (E4M3,):
            expected = numerics.conv_bn_act_fp8_expected(oracle, dtype).to(dtype)
            buffer, out = guarded(case.output_shape, dtype, device)
            product = kernel.product_of(x, weight, out, case.groups)
            options = (
                case.stride, case.padding, case.dilation, case.groups, case.act,
                RESIDUAL_SCALE, OUT_SCALE, dtype,
            )  # fmt: skip
            for splits in (1, 2) if case.name == "3x3" else (1,):
                chosen = plan(product, configuration, device, splits)
                if chosen is None:
                    continue
                out.fill_(math.nan)
                kernel.launch(x, weight, *vectors, out, *options, plan=chosen)
                require_exact(f"{case.name}, {dtype}, {chosen.name}", buffer, out, expected)
