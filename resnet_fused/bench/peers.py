"""The floor of the CPU path: a ResNet as bare oneDNN calls on weights prepared beforehand.

No modules, no dispatch between implementations, no caches to check: what is left is what the
convolutions themselves cost. It shares no code with the package's own layers, so that it can
stand beside them in a benchmark.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOLERANCE = 1e-3  # of the largest logit, in float32: 10^4 roundings, far below a wrong layer


class NoPeerError(ValueError):
    """There is no bare oneDNN twin of this model here; the message says why."""


@dataclass(frozen=True)
class _Conv:
    """One convolution with BatchNorm folded in: weight packed for oneDNN, bias [K]."""

    weight: Tensor
    bias: Tensor
    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups,
            "relu" if relu else "none", [], "",
        )  # fmt: skip

    def add_relu(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, self.weight, self.bias, self.padding, self.stride, self.dilation,
            self.groups, "add", 1.0, "relu", [], "",
        )  # fmt: skip


@dataclass(frozen=True)
class _Block:
    convs: tuple[_Conv, ...]
    shortcut: _Conv | None

    def __call__(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x, relu=False)
        y = x
        for conv in self.convs[:-1]:
            y = conv(y, relu=True)
        return self.convs[-1].add_relu(y, residual)


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
    wanted = ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4", "fc")
    missing = [name for name in wanted if not hasattr(model, name)]
    if missing or model.training:
        reason = f"it has no {', '.join(missing)}" if missing else "it is in training mode"
        raise NoPeerError(f"{type(model).__name__} is no ResNet that the peer knows: {reason}")
    try:
        with torch.inference_mode():
            run = _compile(model, x)
            # A peer that computes something else measures nothing. The structure is checked in
            # float32: a deep network with random weights turns 16-bit rounding into anything.
            exact, images, twin = model, x, run
            if x.dtype != torch.float32:
                exact, images = copy.deepcopy(model).float(), x[:1].float()
                twin = _compile(exact, images)
            found, expected = twin(images), exact(images)
            scale = max(expected.abs().max().item(), 1e-30)
            off = (found - expected).abs().max().item() / scale
            if not off <= TOLERANCE:
                raise NoPeerError(f"the bare oneDNN calls give another answer (off by {off:.1e})")
            return run
    except (AttributeError, RuntimeError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise NoPeerError(f"{type(model).__name__} as bare oneDNN calls: {line}") from error


def _compile(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    fc, pool = model.fc, model.maxpool
    stem = _fold(model.conv1, model.bn1, x.shape, x.dtype)
    y = pool(stem(x, relu=True))
    blocks: list[_Block] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for module in stage:  # type: ignore[union-attr]
            blocks.append(_compile_block(module, y))
            y = blocks[-1](y)

    def run(images: Tensor) -> Tensor:
        z = pool(stem(images, relu=True))
        for block in blocks:
            z = block(z)
        return F.linear(z.mean((2, 3)), fc.weight, fc.bias)  # type: ignore[arg-type]

    return run


def _compile_block(module: nn.Module, x: Tensor) -> _Block:
    expected = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu", "downsample"}
    extra = [name for name, child in module.named_children()
             if name not in expected and not isinstance(child, nn.Identity)]  # fmt: skip
    if extra:
        raise NoPeerError(f"{type(module).__name__} has children that it lacks: {extra}")
    shortcut = None
    if module.downsample is not None:
        conv, bn = module.downsample  # type: ignore[misc]
        shortcut = _fold(conv, bn, x.shape, x.dtype)
    convs, y = [], x
    for index in (1, 2, 3):
        if hasattr(module, f"conv{index}"):
            conv, bn = getattr(module, f"conv{index}"), getattr(module, f"bn{index}")
            convs.append(_fold(conv, bn, y.shape, y.dtype))
            y = convs[-1](y, relu=True)
    return _Block(tuple(convs), shortcut)


def _fold(conv: nn.Module, bn: nn.Module, shape: torch.Size, dtype: torch.dtype) -> _Conv:
    """Folds BatchNorm in float64, rounds once, and packs for inputs of `shape`."""
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
        raise NoPeerError(f"{type(conv).__name__} + {type(bn).__name__} is not a pair it folds")
    if bn.running_mean is None or bn.running_var is None or isinstance(conv.padding, str):
        raise NoPeerError("BatchNorm without running statistics, or padding by name")
    gamma = 1.0 if bn.weight is None else bn.weight.double()
    scale = gamma / torch.sqrt(bn.running_var.double() + bn.eps)
    shift = -bn.running_mean.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    weight = (conv.weight.double() * scale[:, None, None, None]).to(dtype)
    padding, stride, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
    packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
        weight.to_mkldnn(), padding, stride, dilation, conv.groups, list(shape)
    )
    return _Conv(packed, shift.to(dtype), padding, stride, dilation, conv.groups)
