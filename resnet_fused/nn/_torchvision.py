"""torchvision's classes, fused; imported when a model, or a pickle, holds one of theirs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter as PlainLayerGetter
from torchvision.ops.misc import Conv2dNormActivation as PlainConvNormActivation

from ._blocks import FusedBlock, FusedSequential, FusedStem, Step, run_in_order


class BasicBlock(FusedBlock, resnet.BasicBlock):
    """`torchvision.models.resnet.BasicBlock`, two fused layers."""

    plain_class = resnet.BasicBlock
    steps = (Step("conv1", "bn1", "relu"), Step("conv2", "bn2", "relu"))


class Bottleneck(FusedBlock, resnet.Bottleneck):
    """`torchvision.models.resnet.Bottleneck`, three fused layers."""

    plain_class = resnet.Bottleneck
    steps = (
        Step("conv1", "bn1", "relu"),
        Step("conv2", "bn2", "relu"),
        Step("conv3", "bn3", "relu"),
    )


class ResNet(FusedStem, resnet.ResNet):
    """`torchvision.models.resnet.ResNet` with a fused stem."""

    plain_class = resnet.ResNet
    stem = Step("conv1", "bn1", "relu")

    def _forward_impl(self, x: Tensor) -> Tensor:
        return resnet.ResNet._forward_impl(self._stem_view(x, joined=True), x)


class Conv2dNormActivation(FusedSequential, PlainConvNormActivation):
    """`torchvision.ops.misc.Conv2dNormActivation` as one fused layer."""

    plain_class = PlainConvNormActivation


class IntermediateLayerGetter(FusedSequential, PlainLayerGetter):
    """The body of torchvision's detection and segmentation models, its stem fused."""

    plain_class = PlainLayerGetter

    def forward(self, x: Tensor) -> Any:
        """Returns the wanted outputs by name."""
        if self.must_be_plain(x):
            return super(FusedSequential, self).forward(x)
        out = OrderedDict()
        for name, y in run_in_order(self._modules.items(), x, frozenset(self.return_layers)):
            if name in self.return_layers:
                out[self.return_layers[name]] = y
        return out


CLASSES = (BasicBlock, Bottleneck, ResNet, Conv2dNormActivation, IntermediateLayerGetter)
