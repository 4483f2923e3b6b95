"""Operands of `conv_bn_act_fp8` for one case, and how a result of it is judged."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from matrix import ACTIVATION
from torch import Tensor

from resnet_fused import cases, numerics

E4M3 = torch.float8_e4m3fn
CODES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
"""What each of the 256 bytes stands for."""


@dataclasses.dataclass
class Fp8Operands:
    """Arguments of the raw overloads, and the options behind the geometry."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    residual_scale: float = 0.5
    out_scale: float = 2.0
    out_dtype: torch.dtype = E4M3

    def tuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.x, self.weight, self.scale, self.shift, self.residual

    def options(self, case: cases.ConvCase) -> tuple[Any, ...]:
        return (
            list(case.stride), list(case.padding), list(case.dilation), case.groups, case.act,
            self.residual_scale, self.out_scale, self.out_dtype,
        )  # fmt: skip

    def scales(self) -> dict[str, float]:
        return {"residual_scale": self.residual_scale, "out_scale": self.out_scale}

    def to_layout(self, layout: str) -> Fp8Operands:
        form = ACTIVATION[layout]
        residual = None if self.residual is None else self.residual.contiguous(memory_format=form)
        return dataclasses.replace(self, x=self.x.contiguous(memory_format=form), residual=residual)

    def oracle(self, case: cases.ConvCase) -> Tensor:
        return numerics.conv_bn_act_fp8_oracle(
            *self.tuple(), **case.geometry, act=case.act, **self.scales()
        )

    def check(self, case: cases.ConvCase, y: Tensor, **how: Any) -> numerics.BoundCheck:
        """Judges a result element by element."""
        oracle = self.oracle(case)
        bound = numerics.conv_bn_act_fp8_bound(
            *self.tuple(), oracle, **case.geometry, **self.scales(), out_dtype=self.out_dtype, **how
        )
        return numerics.check_bound(
            y, numerics.conv_bn_act_fp8_expected(oracle, self.out_dtype), bound
        )

    def expected(self, case: cases.ConvCase) -> Tensor:
        """On integers: the result, bit for bit."""
        return numerics.conv_bn_act_fp8_expected(self.oracle(case), self.out_dtype).to(
            self.out_dtype
        )


def exact_operands(case: cases.ConvCase, **options: Any) -> Fp8Operands:
    """Integers and powers of two: every sum is exact."""
    inputs = numerics.exact_inputs(case, torch.float32)
    residual = None if inputs.residual is None else inputs.residual.to(E4M3)
    operands = inputs.x.to(E4M3), inputs.weight.to(E4M3), inputs.scale, inputs.shift, residual
    return Fp8Operands(*operands, **options)


def random_fp8(case: cases.ConvCase, **options: Any) -> Fp8Operands:
    """Normal values; gammas of both signs and a zero; results of up to some 448 units."""
    taps = (case.c // case.groups) * case.r * case.s
    scale = torch.randn(case.k) / taps**0.5
    scale[0] = 0
    residual = (8 * torch.randn(case.output_shape)).to(E4M3) if case.residual else None
    options = {"residual_scale": 0.3, "out_scale": 0.37, **options}
    return Fp8Operands(
        (8 * torch.randn(case.input_shape)).to(E4M3),
        (8 * torch.randn(case.weight_shape)).to(E4M3),
        scale, 4 * torch.randn(case.k), residual, **options,
    )  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values; torch compares no e4m3."""
    return a.dtype == b.dtype and torch.equal(a.float(), b.float())
