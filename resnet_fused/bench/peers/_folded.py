"""A ResNet as bare convolution calls, BatchNorm folded into weights prepared beforehand.

No modules, no dispatch between implementations, no caches to check: what is left is what the
convolutions themselves cost. It shares no code with the package's own layers, so that it can
stand beside them in a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused.bench.peers import _calls
from resnet_fused.bench.peers._base import NoPeerError
from resnet_fused.bench.spanning_kernels import normalised

if TYPE_CHECKING:
    from resnet_fused.bench.work import Work


@dataclass(frozen=True)
class Weights:
    """A convolution with BatchNorm folded in, in float64.

    Attributes:
        weight: [K, C / groups, R, S] float64.
        bias: [K] float64.
        padding, stride, dilation: two ints each.
        groups: of channels.
    """

    weight: Tensor
    bias: Tensor
    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int


class Conv(Protocol):
    """One convolution in a library's hands."""

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""


Maker = Callable[[Weights, torch.Size, torch.dtype], Conv]
"""Takes folded weights, the input's shape and its dtype."""


@dataclass(frozen=True)
class _Block:
    convs: tuple[Conv, ...]
    shortcut: Conv | None

    def __call__(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x, relu=False)
        y = x
        for conv in self.convs[:-1]:
            y = conv(y)
        return self.convs[-1](y, residual)


def compile_model(model: Any, x: Tensor, make: Maker) -> Callable[[Tensor], Tensor]:
    """A ResNet with torchvision's child names, for inputs of x's shape [N, 3, H, W] and dtype.

    Raises:
        NoPeerError: it is no such ResNet; the message says why.
    """
    wanted = ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4", "fc")
    missing = [name for name in wanted if not hasattr(model, name)]
    if missing or model.training:
        reason = f"it has no {', '.join(missing)}" if missing else "it is in training mode"
        raise NoPeerError(f"{type(model).__name__} is no ResNet that the peer knows: {reason}")
    fc, pool = model.fc, model.maxpool
    stem = make(fold(model.conv1, model.bn1), x.shape, x.dtype)
    y = pool(stem(x))
    blocks: list[Callable[[Tensor], Tensor]] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for module in stage:
            blocks.append(compile_block(module, y, make))
            y = blocks[-1](y)

    def run(images: Tensor) -> Tensor:
        z = pool(stem(images))
        for block in blocks:
            z = block(z)
        return F.linear(z.mean((2, 3)), fc.weight, fc.bias)

    return run


def compile_block(module: Any, x: Tensor, make: Maker) -> Callable[[Tensor], Tensor]:
    """A residual block, or a stem (conv1, bn1, relu, maxpool), for inputs of x's shape and dtype.

    Raises:
        NoPeerError: it is neither.
    """
    if isinstance(module, nn.Sequential) and hasattr(module, "maxpool"):
        stem, pool = make(fold(module.conv1, module.bn1), x.shape, x.dtype), module.maxpool
        return lambda images: pool(stem(images))
    expected = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu", "downsample"}
    extra = [name for name, child in module.named_children()
             if name not in expected and not isinstance(child, nn.Identity)]  # fmt: skip
    if extra:
        raise NoPeerError(f"{type(module).__name__} has children that it lacks: {extra}")
    shortcut = None
    if module.downsample is not None:
        conv, bn = module.downsample
        shortcut = make(fold(conv, bn), x.shape, x.dtype)
    convs, y = [], x
    for index in (1, 2, 3):
        if hasattr(module, f"conv{index}"):
            pair = getattr(module, f"conv{index}"), getattr(module, f"bn{index}")
            convs.append(make(fold(*pair), y.shape, y.dtype))
            y = convs[-1](y)
    return _Block(tuple(convs), shortcut)


def fold(conv: nn.Module, bn: nn.Module) -> Weights:
    """Folds BatchNorm's running statistics into a convolution, in float64.

    Raises:
        NoPeerError: other modules, no statistics, or padding by name.
    """
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
    geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    return scaled(conv.weight, scale, shift, *geometry)


def scaled(
    weight: Tensor, scale: Tensor, shift: Tensor, padding: Any, stride: Any, dilation: Any,
    groups: int,
) -> Weights:  # fmt: skip
    """Folds scale and shift [K] into weights [K, C / groups, R, S], in float64."""
    folded = weight.double() * scale.double()[:, None, None, None]
    return Weights(folded, shift.double(), list(padding), list(stride), list(dilation), groups)


def of_operands(case: Any, o: Any) -> Weights:
    """The same for a kernel's operands."""
    return scaled(o.weight, o.scale, o.shift, case.padding, case.stride, case.dilation, case.groups)


def call_of(work: Work, make: Maker) -> Callable[[int], Any]:
    """The call of an inference subject: each operand set of a kernel has weights of its own.

    Raises:
        NoPeerError: a block or model that it does not know.
    """
    if work.module is None:
        function = KERNELS[work.subject.op]
        return _calls.over_variants(work, [function(work.case, o, make) for o in work.sets])
    build = compile_model if work.subject.level == "model" else compile_block
    run = build(work.module, work.sets[0].x, make)
    return _calls.over_operands(work, lambda batch: run(batch.x))


def _conv(case: Any, o: Any, make: Maker) -> Callable[[Any], Tensor]:
    conv = make(of_operands(case, o), o.x.shape, o.x.dtype)
    return lambda o: conv(o.x, o.residual, case.act == "relu")


def _stem(case: Any, o: Any, make: Maker) -> Callable[[Any], Tensor]:
    stride, padding, *pool = case.geometry
    weights = scaled(o.weight, o.scale, o.shift, padding, stride, [1, 1], 1)
    conv = make(weights, o.x.shape, o.weight.dtype)
    return lambda o: F.max_pool2d(conv(normalised(o)), *pool)


def _chain(case: Any, o: Any, make: Maker) -> Callable[[Any], Any]:
    convs: dict[str, Conv] = {}
    for part in case.parts:
        weight, scale, shift = o.convolution(part.name)
        folded = scaled(weight, scale, shift, part.padding, part.stride, part.dilation, 1)
        convs[part.name] = make(folded, torch.Size(part.input_shape), o.x.dtype)
    step = case.out_stride

    def run(o: Any) -> Any:
        x = convs["front"](o.x) if "front" in convs else o.x
        projection = convs.get("projection")
        shortcut = o.residual if projection is None else projection(o.projected, relu=False)
        out = convs["first"](x, shortcut)
        stored = out[:, :, ::step, ::step]
        return (stored, convs["next"](out)) if "next" in convs else stored

    return run


KERNELS: dict[str, Callable[..., Callable[[Any], Any]]] = {
    "conv_bn_act": _conv, "stem": _stem, "conv_chain": _chain,
}  # fmt: skip
"""Op of a kernel that is convolutions, and what a call of it is."""
