"""The networks for images of [He15], Table 1, and their kin with other bottlenecks.

Sources, cited in the code by their short names:

* [He15] He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
* [Xie16] Xie et al., "Aggregated Residual Transformations for Deep Neural Networks",
  arXiv:1611.05431.
* [Zagoruyko16] Zagoruyko, Komodakis, "Wide Residual Networks", arXiv:1605.07146.
* [Goyal17] Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677.
* [Yu17] Yu, Koltun, Funkhouser, "Dilated Residual Networks", arXiv:1705.09914.

Where torchvision departs from [He15], these networks follow torchvision, so that its checkpoints
load and give the same outputs; `version` and `shortcut` give what [He15] has:

* The stride of a bottleneck that halves the resolution sits in its 3x3 convolution ("v1.5");
  [He15] puts it in the first 1x1 ("v1").
* Every shortcut that changes shape is a 1x1 projection followed by BatchNorm (option B of [He15],
  section 3.3), in ResNet-18 and ResNet-34 as well, for which [He15] Table 2 takes option A.
* The weights are drawn from N(0, 2 / fan_out); the method that [He15] section 3.4 refers to
  derives fan_in and fan_out as equally good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..nn._blocks import FusedStem, Step
from ..nn.blocks import PlainBasicBlock, PlainBottleneck
from ..nn.shortcuts import SHORTCUTS, make_shortcut

Block = type[PlainBasicBlock | PlainBottleneck]

_STAGE_PLANES = (64, 128, 256, 512)  # [He15] Table 1, conv2_x .. conv5_x
_STAGE_STRIDES = (1, 2, 2, 2)  # [He15] Table 1: conv3_1, conv4_1 and conv5_1 downsample
VERSIONS = ("v1", "v1.5")


class PlainResNet(nn.Module):
    """A residual network for images ([He15] Table 1), with torchvision's arguments and names.

    This class runs PyTorch's own modules (its blocks run as they like); :class:`ResNet` is the same
    network with a fused stem.

    Children: ``conv1, bn1, relu, maxpool`` (the stem), ``layer1`` .. ``layer4`` (the stages
    conv2_x .. conv5_x), ``avgpool``, ``fc``. ``inplanes`` is the channel count that ``layer4``
    puts out.

    Args:
        block: the residual block, :class:`resnet_fused.nn.BasicBlock` or
            :class:`resnet_fused.nn.Bottleneck`, or a class with their constructor arguments and
            their ``expansion``.
        layers: blocks in each of the four stages.
        num_classes: outputs of the classifier, at least 1.
        zero_init_residual: start the last BatchNorm of each block at gamma = 0, so that each block
            starts as the identity ([Goyal17] section 5.1).
        groups: groups of each block's 3x3 convolution (the cardinality of [Xie16]).
        width_per_group: channels of one group in a block of 64 planes.
        replace_stride_with_dilation: for ``layer2``, ``layer3``, ``layer4``: keep the resolution
            and dilate the 3x3 convolutions instead ([Yu17]). None means none of them.
        norm_layer: makes the normalisation from its channel count; None is ``nn.BatchNorm2d``.
        version: where a bottleneck has its stride: "v1.5", in the 3x3 convolution, or "v1", in the
            first 1x1 ([He15]); of basic blocks both are the same.
        shortcut: option "A", "B" or "C" of [He15] section 3.3, or "none": a plain network.

    Shapes:
        input [N, 3, H, W], output [N, num_classes], any floating-point dtype.

    Raises:
        TypeError, ValueError: an argument that is not one of the above; the message names it.
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        version: str = "v1.5",
        shortcut: str = "B",
    ) -> None:
        super().__init__()
        if len(layers) != 4 or any(_not_positive(count) for count in layers):
            raise ValueError(f"layers: got {layers!r}, accepted is four block counts of at least 1")
        if _not_positive(num_classes):
            raise ValueError(
                f"num_classes: got {num_classes!r}, accepted is an integer of at least 1 "
                "(to drop the classifier, set model.fc = torch.nn.Identity())"
            )
        for argument, value in (("groups", groups), ("width_per_group", width_per_group)):
            if _not_positive(value):
                raise ValueError(f"{argument}: got {value!r}, accepted is an integer of at least 1")
        for argument, value, known in (
            ("version", version, VERSIONS), ("shortcut", shortcut, SHORTCUTS)
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{argument}: got {value!r}, accepted are {', '.join(known)}")
        dilate = _checked_dilation(replace_stride_with_dilation)

        self._norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.inplanes = _STAGE_PLANES[0]
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.version, self.shortcut = version, shortcut

        # The order of construction is torchvision's: each layer draws its initial values from the
        # same point of the random stream, and a seed gives the same network in both.
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = [
            self._stage(block, planes, count, stride, dilated)
            for planes, count, stride, dilated in zip(
                _STAGE_PLANES, layers, _STAGE_STRIDES, dilate, strict=True
            )
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        _initialise(self, zero_init_residual)

    def _stage(
        self,
        block: Block,
        planes: int,
        count: int,
        stride: int,
        dilated: bool,
    ) -> nn.Sequential:
        """One stage of ``count`` blocks; advances ``inplanes`` and ``dilation``."""
        first_dilation = self.dilation  # the first block still sees the previous stage's sampling
        if dilated:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        norm = self._norm_layer
        # Said only where they are not a block's own, so that blocks need not know of them.
        options: dict[str, bool] = {}
        if self.shortcut == "none":
            options["residual"] = False
        if self.version == "v1" and block.expansion > 1:
            options["stride_in_1x1"] = True
        blocks = []
        for index in range(count):
            inplanes, step = (self.inplanes, stride) if index == 0 else (outplanes, 1)
            downsample = make_shortcut(self.shortcut, inplanes, outplanes, step, norm)
            width = (self.groups, self.base_width, self.dilation if index else first_dilation)
            blocks.append(block(inplanes, planes, step, downsample, *width, norm, **options))
        self.inplanes = outplanes
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, num_classes] (logits) of images [N, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


class ResNet(FusedStem, PlainResNet):
    """A residual network whose convolutions, BatchNorms, ReLUs and shortcut adds run fused.

    Arguments, children, state_dict and initial values are those of ``torchvision.models.ResNet``;
    see :class:`PlainResNet` for each. ``rf.unfuse`` gives the plain network.
    """

    plain_class = PlainResNet
    stem = Step("conv1", "bn1", "relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, num_classes] (logits) of images [N, 3, H, W]."""
        return PlainResNet.forward(self._stem_view(x, joined=True), x)  # type: ignore[arg-type]


CLASSES = (ResNet,)  # what `rf.fuse` makes of the plain classes of this module


def _not_positive(value: object) -> bool:
    return not isinstance(value, int) or isinstance(value, bool) or value < 1


def _checked_dilation(flags: Sequence[bool] | None) -> tuple[bool, bool, bool, bool]:
    """``replace_stride_with_dilation`` with the first stage's False in front."""
    if flags is None:
        return (False, False, False, False)
    if (
        not isinstance(flags, Sequence)
        or len(flags) != 3
        or not all(flag in (False, True) for flag in flags)
    ):
        raise ValueError(
            f"replace_stride_with_dilation: got {flags!r}, accepted is None or three booleans, "
            "for layer2, layer3 and layer4"
        )
    return (False, bool(flags[0]), bool(flags[1]), bool(flags[2]))


def _initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """Draw the initial values as torchvision does, in its order.

    Convolutions: N(0, 2 / fan_out) ([He15] section 3.4 and its reference 13); normalisations:
    gamma = 1, beta = 0; the classifier keeps nn.Linear's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if not zero_init_residual:
        return
    for module in model.modules():
        last = None
        if isinstance(module, PlainBottleneck):
            last = module.bn3
        elif isinstance(module, PlainBasicBlock):
            last = module.bn2
        weight = getattr(last, "weight", None)
        if isinstance(weight, Tensor):
            nn.init.zeros_(weight)
