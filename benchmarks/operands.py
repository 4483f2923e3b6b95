"""Operands for a case: what both the pytest entries and the script time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused.cases import RESNET50_LAYERS, ConvCase


@dataclass(frozen=True)
class Operands:
    """x [N, C, H, W], weight [K, C / groups, R, S], scale and shift [K], residual [N, K, P, Q]."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None


def layers(batch: int) -> list[ConvCase]:
    """ResNet-50's distinct convolutions at this batch size."""
    return [dataclasses.replace(case, n=batch) for case in RESNET50_LAYERS]


def operands(case: ConvCase, dtype: torch.dtype, device: str = "cpu") -> Operands:
    """Random operands in channels_last, the same in each run."""
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.to(memory_format=torch.channels_last)

    fan_in = case.c // case.groups * case.r * case.s
    return Operands(
        image(*case.input_shape),
        image(*case.weight_shape) / fan_in**0.5,
        (0.5 + torch.rand(case.k, generator=generator)).to(device),
        torch.randn(case.k, generator=generator).to(device),
        image(*case.output_shape) if case.residual else None,
    )


def modules(case: ConvCase, given: Operands) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """The eager modules of a case: a convolution, and a BatchNorm that is its scale and shift."""
    conv = nn.Conv2d(case.c, case.k, (case.r, case.s), bias=False, **case.geometry)  # type: ignore[arg-type]
    conv.weight = nn.Parameter(given.weight)
    bn = nn.BatchNorm2d(case.k, eps=1e-30)  # 1 + eps is 1; torch 2.11 refuses 0
    bn = bn.to(given.x.device)
    with torch.no_grad():
        bn.weight.copy_(given.scale)
        bn.bias.copy_(given.shift)
    return conv.eval(), bn.to(given.x.dtype).eval()
