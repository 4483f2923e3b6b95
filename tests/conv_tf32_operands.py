"""Operands on which it shows whether float32 was rounded to TF32, or cut."""

from __future__ import annotations

import torch
from conv_by_tma import operands
from emulated_shapes import lay_out
from torch import Tensor

from resnet_fused.cases import ConvCase


def rounded(t: Tensor) -> Tensor:
    """To 10 bits of fraction, to the nearest, ties to even; of finite numbers alone."""
    bits = t.contiguous().view(torch.int32)
    return (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)


def cut(t: Tensor) -> Tensor:
    """To 10 bits of fraction, towards zero."""
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def fractions(case: ConvCase, side: int) -> tuple[Tensor | None, ...]:
    """Operands of which x (0) or the filters (1) have 12 bits of fraction: 0 to 3 quarters of the
    last that TF32 keeps. The sums of what they are rounded to are exact."""
    x, weight, *_ = (t for t in operands(case, torch.float32))
    made = [x.sign(), weight.sign()]
    quarters = torch.arange(made[side].numel()).reshape(made[side].shape) % 8
    made[side] = made[side] * (1 + quarters / 4096)
    one, none = torch.ones(case.k), torch.zeros(case.k)
    return (*(lay_out(t, "nhwc") for t in made), one, none, None)
