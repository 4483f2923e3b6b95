"""NVIDIA apex: its fused bottleneck with frozen BatchNorm, and its fused conv-scale-bias-ReLU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_device,
    for_dtypes,
    for_ops,
    installed,
)
from resnet_fused.cases import ConvCase

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

_SOURCE = "build https://github.com/NVIDIA/apex with its contrib extensions"
# Extensions of the C++ side, without which the Python side does not import.
_EXTENSIONS = {"kernel": "fused_conv_bias_relu", "block": "fast_bottleneck"}
_OPS = {"kernel": ("conv_bn_act",), "block": ("inference",)}
_CONVS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))


class Apex:
    """Inference in float16, with BatchNorm's statistics frozen."""

    name = "apex"
    isolated = True
    limit_s = 120.0

    def why_not(self, subject: Subject) -> str | None:
        """It has a fused convolution that ends in a ReLU, and the bottleneck of stride 1."""
        return first_reason(
            for_device(subject, "cuda"),
            for_ops(subject, _OPS),
            installed("apex", _SOURCE),
            _no_such_kernel(subject),
            for_dtypes(subject, ("float16",)),
            installed(_EXTENSIONS.get(subject.level, "apex"), _SOURCE),
        )

    def prepare(self, work: Work) -> Prepared:
        """Fills apex's modules with the subject's weights.

        Raises:
            NoPeerError: a block that apex does not have, or a call that fails.
        """
        try:
            call = _bottleneck(work) if work.module is not None else _conv(work)
            call(0)
        except NoPeerError:
            raise
        except Exception as error:  # its extensions raise what they like
            raise NoPeerError(f"apex refuses it: {first_line(error)}") from error
        return Prepared(call, lambda: _kernels.traced(call, work.subject.device))


def _no_such_kernel(subject: Subject) -> str | None:
    case: Any = subject.case
    if not isinstance(case, ConvCase):  # of other ops `for_ops` speaks
        return None
    if case.act == "relu" and not case.residual and case.groups == 1 and case.dilation == (1, 1):
        return None
    return "its fused convolution has a ReLU, no add, one group and no dilation"


def _conv(work: Work) -> Callable[[int], Tensor]:
    fused = importlib.import_module("apex.contrib.conv_bias_relu").ConvFrozenScaleBiasReLU

    case: Any = work.case
    columns = [
        (o.scale.half().view(1, -1, 1, 1), o.shift.half().view(1, -1, 1, 1)) for o in work.sets
    ]

    def run_with(scale: Tensor, shift: Tensor) -> Callable[[Any], Tensor]:
        return lambda o: fused(o.x, o.weight, scale, shift, case.padding[0], case.stride[0])

    return _calls.over_variants(work, [run_with(*pair) for pair in columns])


def _bottleneck(work: Work) -> Callable[[int], Tensor]:
    bottleneck = importlib.import_module("apex.contrib.bottleneck").Bottleneck

    plain: Any = work.module
    if not hasattr(plain, "conv3"):
        raise NoPeerError(f"apex has bottlenecks, no {type(plain).__name__}")
    if plain.conv2.stride != (1, 1) or plain.conv2.groups != 1 or plain.conv2.dilation != (1, 1):
        raise NoPeerError("apex strides in the first convolution, and has one group, no dilation")
    fused = bottleneck(
        plain.conv1.in_channels, plain.conv1.out_channels, plain.conv3.out_channels,
        use_cudnn=True, explicit_nhwc=False,
    )  # fmt: skip
    pairs = [(getattr(plain, c), getattr(plain, b), getattr(fused, c), getattr(fused, b))
             for c, b in _CONVS]  # fmt: skip
    if (plain.downsample is None) != (fused.downsample is None):
        raise NoPeerError("apex has a projection where channels change, and nowhere else")
    if plain.downsample is not None:
        pairs.append((*plain.downsample, *fused.downsample))
    with torch.no_grad():
        for conv, bn, fused_conv, frozen in pairs:
            fused_conv.weight.copy_(conv.weight)
            frozen.weight.copy_(bn.weight)
            frozen.bias.copy_(bn.bias)
            frozen.running_mean.copy_(bn.running_mean)
            frozen.running_var.copy_(bn.running_var + bn.eps)  # it has no eps of its own
    fused = fused.to(work.sets[0].x.device).half().to(memory_format=torch.channels_last).eval()
    fused.get_scale_bias_callable()()  # once, not in each call
    return _calls.over_operands(work, lambda batch: fused(batch.x))
