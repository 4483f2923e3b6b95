"""Calls over a subject's rotating operands, and PyTorch's own way to compute each kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fused.bench.fixed_kernels import EPS, unit_statistics
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.subject import BLOCK_OPS, KERNEL_OPS, MODEL_OPS
from resnet_fused.cases import ConvCase

if TYPE_CHECKING:
    from resnet_fused.bench.work import Work

EVERYTHING = {"kernel": KERNEL_OPS, "block": BLOCK_OPS, "model": MODEL_OPS}
INFERENCE = {
    "kernel": tuple(op for op, kind in KINDS.items() if kind.inference),
    "block": ("inference",),
    "model": ("inference",),
}


def over_operands(work: Work, run: Callable[[Any], Any]) -> Callable[[int], Any]:
    """A call that runs a function of one operand set in the subject's mode."""

    def call(i: int) -> Any:
        with work.mode():
            return run(work.sets[i])

    return call


def over_module(work: Work, module: Callable[..., Any]) -> Callable[[int], Any]:
    """A call that runs a module as `Work.run` does, in the subject's mode."""

    def call(i: int) -> Any:
        with work.mode():
            return work.run(module, i)

    return call


def over_variants(work: Work, runs: list[Callable[[Any], Any]]) -> Callable[[int], Any]:
    """A call that runs function i on operand set i: for those that hold a set's weights."""

    def call(i: int) -> Any:
        with work.mode():
            return runs[i](work.sets[i])

    return call


def converted(work: Work, convert: Callable[[Tensor], Tensor]) -> Work:
    """The same work with every [N, C, H, W] tensor of its sets converted."""

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 4:
            return value
        return convert(value.detach()).requires_grad_(value.requires_grad)

    sets = []
    for operands in work.sets:
        fields = dataclasses.fields(operands)
        changed = {field.name: change(getattr(operands, field.name)) for field in fields}
        sets.append(dataclasses.replace(operands, **changed))
    return dataclasses.replace(work, sets=sets)


def kernel_function(work: Work) -> Callable[[Any], Any]:
    """A kernel as PyTorch's modules compute it: one op after the other."""
    return KINDS[work.subject.op].eager(work.case, work.sets[0])


class Layer(nn.Module):
    """conv_bn_act or bn_act as modules that hold one operand set's weights."""

    def __init__(self, work: Work, i: int) -> None:
        super().__init__()
        case: Any = work.case
        o = work.sets[i]
        self.conv: nn.Module = nn.Identity()
        if isinstance(case, ConvCase):
            with torch.device("meta"):
                self.conv = nn.Conv2d(case.c, case.k, (case.r, case.s), bias=False, **case.geometry)
            self.conv.weight = nn.Parameter(o.weight, requires_grad=False)
        with torch.device("meta"):
            self.bn = nn.BatchNorm2d(len(o.scale), eps=EPS)
        mean, variance = unit_statistics(o.scale)
        self.bn.weight = nn.Parameter(o.scale, requires_grad=False)
        self.bn.bias = nn.Parameter(o.shift, requires_grad=False)
        self.bn.running_mean, self.bn.running_var = mean, variance
        self.bn.num_batches_tracked = None
        self.relu = nn.ReLU() if case.act == "relu" else nn.Identity()
        self.eval()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and perhaps [N, K, P, Q] -> [N, K, P, Q]."""
        y = self.bn(self.conv(x))
        return self.relu(y if residual is None else y + residual)


def inputs_of(operands: Any) -> list[Tensor]:
    """What changes from call to call in inference: x, and the residual where there is one."""
    residual = getattr(operands, "residual", None)
    return [operands.x] if residual is None else [operands.x, residual]
