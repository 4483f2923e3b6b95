"""Calls over a subject's rotating operands, and PyTorch's own way to compute each kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused.bench.subject import KERNEL_OPS, MODEL_OPS
from resnet_fused.bench.training_kernels import KINDS

if TYPE_CHECKING:
    from resnet_fused.bench.work import Work

EPS = 1e-5  # of the BatchNorms that stand for a kernel's scale and shift
EVERYTHING = {"kernel": KERNEL_OPS, "block": MODEL_OPS, "model": MODEL_OPS}
INFERENCE = {"kernel": ("conv_bn_act", "bn_act"), "block": ("inference",), "model": ("inference",)}


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


def unit_statistics(work: Work) -> tuple[Tensor, Tensor]:
    """Mean and variance [K] under which a BatchNorm's weight and bias are scale and shift."""
    scale = work.sets[0].scale
    return torch.zeros_like(scale), torch.full_like(scale, 1.0 - EPS)


def kernel_function(work: Work) -> Callable[[Any], Tensor]:
    """A kernel as PyTorch's modules compute it: one op after the other."""
    case: Any = work.case
    if work.subject.op in KINDS:
        return KINDS[work.subject.op].eager(case)
    mean, variance = unit_statistics(work)

    def finish(y: Tensor, o: Any) -> Tensor:
        y = F.batch_norm(y, mean, variance, o.scale, o.shift, False, 0.0, EPS)
        if o.residual is not None:
            y = y.add_(o.residual)
        return F.relu_(y) if case.act == "relu" else y

    if work.subject.op == "bn_act":
        return lambda o: finish(o.x, o)
    if work.subject.op == "conv_bn_act":
        return lambda o: finish(torch.conv2d(o.x, o.weight, None, **case.geometry), o)
    return _gradient(work)


def _gradient(work: Work) -> Callable[[Any], Tensor]:
    """conv_dgrad or conv_wgrad: ReLU's mask, BatchNorm's scale, the convolution's gradient."""
    case: Any = work.case
    of_input = work.subject.op == "conv_dgrad"
    first = work.sets[0]
    form = torch.channels_last if not first.weight.is_contiguous() else torch.contiguous_format
    # The gradient of the input asks for the input's shape and layout alone.
    shape = torch.empty(
        case.input_shape, dtype=first.dy.dtype, device=first.dy.device, memory_format=form
    )
    stride, padding, dilation, groups = case.geometry.values()
    mask = (of_input, not of_input, False)

    def run(o: Any) -> Tensor:
        dz = o.dy if o.y is None else torch.ops.aten.threshold_backward(o.dy, o.y, 0)
        # As BatchNorm's gradient does, in one pass: float32 within, rounded once.
        g = torch.empty_like(dz)
        torch.mul(dz, o.scale.view(1, -1, 1, 1), out=g)
        found = torch.ops.aten.convolution_backward(
            g, shape if of_input else o.x, o.weight, None, stride, padding, dilation, False, [0, 0],
            groups, mask,
        )  # fmt: skip
        return found[0 if of_input else 1]

    return run


class Layer(nn.Module):
    """conv_bn_act or bn_act as modules that hold one operand set's weights."""

    def __init__(self, work: Work, i: int) -> None:
        super().__init__()
        case: Any = work.case
        o = work.sets[i]
        self.conv: nn.Module = nn.Identity()
        if work.subject.op == "conv_bn_act":
            with torch.device("meta"):
                self.conv = nn.Conv2d(case.c, case.k, (case.r, case.s), bias=False, **case.geometry)
            self.conv.weight = nn.Parameter(o.weight, requires_grad=False)
        with torch.device("meta"):
            self.bn = nn.BatchNorm2d(len(o.scale), eps=EPS)
        mean, variance = unit_statistics(work)
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
