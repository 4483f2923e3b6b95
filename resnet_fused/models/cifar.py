"""The networks for small images of [He15], section 4.2: 3x3 convolutions on 16, 32, 64 channels.

[He15] is He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385. Its
networks have 6n + 2 layers: a 3x3 convolution, three stages of n blocks of two 3x3 convolutions on
maps of side 32, 16 and 8, global average pooling, a classifier; shortcuts without parameters
(option A) throughout. Their plain counterparts have no shortcuts, and all else equal.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..nn import SHORTCUTS, BasicBlock, Bottleneck, make_shortcut
from ..nn._blocks import FusedStem, Step

Block = type[BasicBlock | Bottleneck]
_STAGE_PLANES = (16, 32, 64)  # [He15] section 4.2


class PlainCifarResNet(nn.Module):
    """A residual network for small images; its stem runs PyTorch's own modules.

    Children: ``conv1, bn1, relu`` (the stem), ``layer1`` .. ``layer3``, ``avgpool``, ``fc``.

    Args:
        depth: 6n + 2 layers: 20, 32, 44, 56, 110, 1202 in [He15], Table 6.
        num_classes: outputs of the classifier, at least 1.
        in_channels: channels of the images.
        shortcut: option "A", "B" or "C" of [He15] section 3.3, or "none": a plain network.
        block: `rf.nn.BasicBlock`, or `rf.nn.Bottleneck`, whose three layers cost what a basic
            block's two do ([He15] figure 5); depths are 9n + 2 then: 11, 20, 29, ...

    Shapes:
        input [N, in_channels, H, W], 32x32 in [He15]; output [N, num_classes].

    Raises:
        ValueError: an argument that is not one of the above; the message names it.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        shortcut: str = "A",
        block: Block = BasicBlock,
    ) -> None:
        super().__init__()
        layers = 6 if block.expansion == 1 else 9
        if not isinstance(depth, int) or depth < layers + 2 or (depth - 2) % layers:
            some = ", ".join(str(layers * n + 2) for n in range(1, 6))
            raise ValueError(f"depth: got {depth!r}, accepted is {layers}n + 2: {some}, ...")
        for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument}: got {value!r}, accepted is an integer of at least 1")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut: got {shortcut!r}, accepted are {', '.join(SHORTCUTS)}")
        blocks = (depth - 2) // layers
        self.depth, self.shortcut = depth, shortcut
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        channels = 16
        stages = []
        for index, planes in enumerate(_STAGE_PLANES):
            stage, outputs = [], planes * block.expansion
            for number in range(blocks):
                stride = 2 if index and not number else 1
                downsample = make_shortcut(shortcut, channels, outputs, stride)
                residual = shortcut != "none"
                stage.append(block(channels, planes, stride, downsample, residual=residual))
                channels = outputs
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
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
        return PlainCifarResNet.forward(self._stem_view(x, joined=True), x)  # type: ignore[arg-type]


CLASSES = (CifarResNet,)


DEPTHS = {
    **{f"cifar_resnet{depth}": depth for depth in (20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{depth}": depth for depth in (20, 32, 44, 56, 110)},
}
"""The networks of [He15], Table 6 and figure 6, and their layers."""


class CifarFactory(Protocol):
    """What every factory of this module accepts."""

    __name__: str

    def __call__(
        self, *, num_classes: int = 10, in_channels: int = 3, shortcut: str | None = None
    ) -> CifarResNet:
        """Build the network."""
        ...


_FACTORY_DOC = """Build {name}: the {depth}-layer network of [He15] section 4.2{without}.

Args:
    num_classes: outputs of the classifier.
    in_channels: channels of the images.
    shortcut: {shortcut}

Raises:
    ValueError: a number that is not at least 1, or an unknown shortcut.
"""


def _factory(name: str) -> CifarFactory:
    """The factory for one network, named and documented after it."""
    depth, plain = DEPTHS[name], name.startswith("cifar_plain")

    def build(
        *, num_classes: int = 10, in_channels: int = 3, shortcut: str | None = None
    ) -> CifarResNet:
        if plain and shortcut not in (None, "none"):
            raise ValueError(f"shortcut: {name} got {shortcut!r}, the network's own is 'none'")
        option = "none" if plain else shortcut or "A"
        return CifarResNet(depth, num_classes, in_channels, shortcut=option)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _FACTORY_DOC.format(
        name=name, depth=depth, without=" without its shortcuts" if plain else "",
        shortcut='"none"' if plain else 'option "A" ([He15]), "B" or "C", or "none".',
    )  # fmt: skip
    return build


cifar_resnet20 = _factory("cifar_resnet20")
cifar_resnet32 = _factory("cifar_resnet32")
cifar_resnet44 = _factory("cifar_resnet44")
cifar_resnet56 = _factory("cifar_resnet56")
cifar_resnet110 = _factory("cifar_resnet110")
cifar_resnet1202 = _factory("cifar_resnet1202")
cifar_plain20 = _factory("cifar_plain20")
cifar_plain32 = _factory("cifar_plain32")
cifar_plain44 = _factory("cifar_plain44")
cifar_plain56 = _factory("cifar_plain56")
cifar_plain110 = _factory("cifar_plain110")
