"""The networks for small images of [He15], section 4.2: 3x3 convolutions on 16, 32, 64 channels.

[He15] is He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385. Its
networks have 6n + 2 layers: a 3x3 convolution, three stages of n blocks of two 3x3 convolutions on
maps of side 32, 16 and 8, global average pooling, a classifier; shortcuts without parameters
(option A) throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import BasicBlock, PaddedShortcut
from ..nn._blocks import FusedStem, Step

_STAGE_PLANES = (16, 32, 64)  # [He15] section 4.2


class PlainCifarResNet(nn.Module):
    """A residual network for small images; its stem runs PyTorch's own modules.

    Children: ``conv1, bn1, relu`` (the stem), ``layer1`` .. ``layer3``, ``avgpool``, ``fc``.

    Args:
        depth: 6n + 2 layers: 20, 32, 44, 56, 110, 1202 in [He15], Table 6.
        num_classes: outputs of the classifier, at least 1.
        in_channels: channels of the images.

    Shapes:
        input [N, in_channels, H, W], 32x32 in [He15]; output [N, num_classes].

    Raises:
        ValueError: an argument that is not one of the above; the message names it.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: got {depth!r}, accepted is 6n + 2: 8, 14, 20, 26, 32, ...")
        for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument}: got {value!r}, accepted is an integer of at least 1")
        blocks = (depth - 2) // 6
        self.depth = depth
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        planes = 16
        stages = []
        for index, outplanes in enumerate(_STAGE_PLANES):
            stride = 1 if index == 0 else 2
            shortcut = None
            if outplanes != planes:
                shortcut = PaddedShortcut(planes, outplanes, stride)
            first = BasicBlock(planes, outplanes, stride, shortcut)
            rest = [BasicBlock(outplanes, outplanes) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            planes = outplanes
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes, num_classes)
        for module in self.modules():
            # [He15] section 4.2 takes the initialisation of its reference 13, He et al., 2015.
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, num_classes] (logits) of images [N, in_channels, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


class CifarResNet(FusedStem, PlainCifarResNet):
    """A residual network for small images whose layers run fused; see `PlainCifarResNet`."""

    plain_class = PlainCifarResNet
    stem = Step("conv1", "bn1", "relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, num_classes] (logits) of images [N, in_channels, H, W]."""
        return PlainCifarResNet.forward(self._stem_view(x), x)  # type: ignore[arg-type]


CLASSES = (CifarResNet,)


def cifar_resnet20(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """The 20-layer network of [He15], Table 6, 0.27 million parameters.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.

    Raises:
        ValueError: an argument that is not at least 1.
    """
    return CifarResNet(20, num_classes, in_channels)


def list_models() -> list[str]:
    """The names of the networks for small images."""
    return ["cifar_resnet20"]


def get_model(name: str, **arguments: Any) -> CifarResNet:
    """Build a network for small images by name; the arguments are its factory's.

    Raises:
        ValueError: unknown name, or an argument that the factory refuses.
    """
    if name not in list_models():
        raise ValueError(f"name: got {name!r}, accepted is one of {', '.join(list_models())}")
    return globals()[name](**arguments)
