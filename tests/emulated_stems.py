"""Calls of the emulated `stem`: operands of a case, its result, what is wrong with it, problems."""

from __future__ import annotations

import dataclasses
from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused import numerics
from resnet_fused.cases import StemCase
from resnet_fused.ops._library import overload
from resnet_fused.ops._selfchecks import _lay_out

DTYPES = (torch.bfloat16, torch.float16)


def stem_operands(case: StemCase, dtype: torch.dtype, *, exact: bool) -> tuple[Tensor, ...]:
    """The arguments of `stem` for a case, images in its layout."""
    given = numerics.exact_stem_inputs(case, dtype, torch.Generator().manual_seed(0))
    x, weight, scale, shift, norm = given
    if not exact:
        generator = torch.Generator().manual_seed(1)
        weight, scale, shift = (
            torch.randn(t.shape, generator=generator).to(t.dtype) for t in (weight, scale, shift)
        )
        if x.dtype is torch.uint8:
            x = torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
        else:
            x = torch.randn(x.shape, generator=generator).to(x.dtype)
        if norm is not None:
            norm = norm / 64 + 0.3
    return _lay_out(x, case), weight, scale, shift, norm


def run_stem(
    case: StemCase, operands: tuple[Tensor, ...], out_scale: float | None = None
) -> Tensor:
    return overload("stem", emulated.NAME)(*operands, *case.geometry, out_scale)


def wrong_stem(
    case: StemCase,
    operands: tuple[Tensor, ...],
    got: Tensor,
    *,
    exact: bool,
    out_scale: float | None = None,
) -> str | None:
    """What is wrong with a result, or None: every bit on integers, the bound on noise."""
    oracle = numerics.stem_oracle(*operands, *case.geometry, out_scale=out_scale or 1.0)
    oracle = numerics.conv_bn_act_fp8_expected(oracle, got.dtype)
    if exact:
        bad = (got.float() != oracle.to(got.dtype).float()).sum().item()
        return f"{bad} of {got.numel()} elements differ" if bad else None
    bound = numerics.stem_bound(*operands, *case.geometry, out_scale=out_scale)
    check = numerics.check_bound(got, oracle, bound)
    return None if check.ok else str(check)


def stem_problem(**changed: Any) -> Any:
    """The problem of 32 images of ImageNet, in bytes, for a plan; `changed`: as of a case."""
    case = dataclasses.replace(StemCase("plan", 32, 3, 224, 224, 64), **changed)
    stride, padding, kernel, step, border = case.geometry
    channels_last = (case.h * case.w * case.c, 1, case.w * case.c, case.c)
    return emulated.load().Stem(
        dtype="bfloat16", image="uint8", x=0, weight=0, scale=0, shift=0, input_norm=0, out=0,
        x_size=case.shape, weight_size=case.weight_shape, x_stride=channels_last,
        weight_stride=(147, 49, 7, 1), out_stride=(1, 1, 1, 1), stride=stride, padding=padding,
        pool_kernel=kernel, pool_stride=step, pool_padding=border, dependent=False, follows=False,
    )  # fmt: skip
