"""The floor of the CPU path: bare oneDNN calls on packed weights, BatchNorm folded in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resnet_fused.bench.peers import _calls, _folded, _kernels
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_device,
    for_dtypes,
    for_ops,
)

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

TOLERANCE = 1e-3  # of the largest logit, in float32: 10^4 roundings, far below a wrong layer
_ERRORS = (AttributeError, RuntimeError, ValueError)

_OPS = {**_calls.INFERENCE, "kernel": tuple(_folded.KERNELS)}


@dataclass(frozen=True)
class _Conv:
    """A packed convolution; oneDNN's add takes its bias in the weights' dtype alone."""

    weight: Tensor
    bias: Tensor
    add_bias: Tensor
    geometry: tuple[list[int], list[int], list[int], int]

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, "relu" if relu else "none", [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, self.weight, self.add_bias, *self.geometry, "add", 1.0,
            "relu" if relu else None, [], "",
        )  # fmt: skip


def _make(folded: _folded.Weights, shape: torch.Size, dtype: torch.dtype) -> _Conv:
    geometry = (folded.padding, folded.stride, folded.dilation, folded.groups)
    weight = folded.weight.to(dtype, memory_format=torch.contiguous_format)
    packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, list(shape))
    return _Conv(packed, folded.bias.float(), folded.bias.to(dtype), geometry)


def bare_onednn(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Compiles a ResNet with torchvision's child names into bare oneDNN calls.

    Args:
        model: in evaluation mode, on the CPU, with plain BatchNorm2d layers.
        x: an input [N, C, H, W]; its shape and dtype decide how the weights are packed.

    Returns:
        A function from such an input to the logits [N, classes].

    Raises:
        NoPeerError: no oneDNN in this build of torch, another device, another architecture, or an
            answer that is not the model's own.
    """
    if not torch.backends.mkldnn.is_available():
        raise NoPeerError("this build of torch has no oneDNN")
    if x.device.type != "cpu":
        raise NoPeerError(f"oneDNN calls are for the CPU, the input is on {x.device}")
    try:
        with torch.inference_mode():
            run = _folded.compile_model(model, x, _make)
            # A peer that computes something else measures nothing. The structure is checked in
            # float32: a deep network with random weights turns 16-bit rounding into anything.
            exact, images, twin = model, x, run
            if x.dtype != torch.float32:
                exact, images = copy.deepcopy(model).float(), x[:1].float()
                twin = _folded.compile_model(exact, images, _make)
            found, expected = twin(images), exact(images)
            scale = max(expected.abs().max().item(), 1e-30)
            off = (found - expected).abs().max().item() / scale
            if not off <= TOLERANCE:
                raise NoPeerError(f"the bare oneDNN calls give another answer (off by {off:.1e})")
            return run
    except NoPeerError:
        raise
    except _ERRORS as error:
        line = str(error).partition("\n")[0]
        raise NoPeerError(f"{type(model).__name__} as bare oneDNN calls: {line}") from error


class OneDnn:
    """Bare oneDNN convolutions, for inference."""

    name = "onednn"
    isolated = False
    limit_s = 60.0

    def why_not(self, subject: Subject) -> str | None:
        """It is for the CPU's inference in float32 and bfloat16."""
        return first_reason(
            for_device(subject, "cpu"),
            None if torch.backends.mkldnn.is_available() else "this build of torch has no oneDNN",
            for_ops(subject, _OPS),
            for_dtypes(subject, ("float32", "bfloat16")),
        )

    def prepare(self, work: Work) -> Prepared:
        """Folds, packs and builds the call.

        Raises:
            NoPeerError: oneDNN does not serve the subject on this CPU.
        """
        try:
            with torch.inference_mode():
                call = _folded.call_of(work, _make)
                call(0)
        except _ERRORS as error:
            if isinstance(error, NoPeerError):
                raise
            raise NoPeerError(f"as bare oneDNN calls: {first_line(error)}") from error
        return Prepared(call, lambda: _kernels.traced(call, "cpu"))
