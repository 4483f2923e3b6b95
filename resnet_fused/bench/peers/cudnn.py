"""cuDNN's fused convolutions as PyTorch offers them: bias, add and ReLU, BatchNorm folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnet_fused.bench.peers import _calls, _folded, _kernels
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_capability,
    for_device,
    for_ops,
)

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

_OPS = {**_calls.INFERENCE, "kernel": tuple(_folded.KERNELS)}


@dataclass(frozen=True)
class _Conv:
    weight: Tensor
    bias: Tensor
    geometry: tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        if not relu:  # a projection: cuDNN's fused ops end in a ReLU
            y = torch.conv2d(x, self.weight, self.bias, *self.geometry)
            return y if residual is None else y.add_(residual)
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
        return torch.cudnn_convolution_add_relu(
            x, self.weight, residual, 1.0, self.bias, *self.geometry
        )


def _make(folded: _folded.Weights, _shape: torch.Size, dtype: torch.dtype) -> _Conv:
    weight = folded.weight.to(dtype).contiguous(memory_format=torch.channels_last)
    geometry = (folded.stride, folded.padding, folded.dilation, folded.groups)
    return _Conv(weight, folded.bias.to(dtype), geometry)


class Cudnn:
    """`torch.cudnn_convolution_relu` and `_add_relu`, for inference."""

    name = "cudnn"
    isolated = False
    limit_s = 60.0

    def why_not(self, subject: Subject) -> str | None:
        """It is for a GPU's inference, and for kernels that end in a ReLU."""
        act = subject.call.act if subject.level == "kernel" else "relu"
        return first_reason(
            for_device(subject, "cuda"),
            for_ops(subject, _OPS),
            "cuDNN's fused convolutions end in a ReLU" if act != "relu" else None,
            None if torch.backends.cudnn.is_available() else "this build of torch has no cuDNN",
            for_capability(subject, 8) if subject.dtype == "bfloat16" else None,
        )

    def prepare(self, work: Work) -> Prepared:
        """Folds and builds the call.

        Raises:
            NoPeerError: cuDNN refuses the first call.
        """
        try:
            with torch.inference_mode():
                call = _folded.call_of(work, _make)
                call(0)
        except (AttributeError, RuntimeError) as error:
            raise NoPeerError(f"as cuDNN calls: {first_line(error)}") from error
        return Prepared(call, lambda: _kernels.traced(call, work.subject.device))
