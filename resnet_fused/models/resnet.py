"""One network class, one table of architectures, one factory per row.

Sources, cited in the code by their short names:

* [He15] He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
* [Xie16] Xie et al., "Aggregated Residual Transformations for Deep Neural Networks",
  arXiv:1611.05431.
* [Zagoruyko16] Zagoruyko, Komodakis, "Wide Residual Networks", arXiv:1605.07146.
* [Goyal17] Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677.
* [Yu17] Yu, Koltun, Funkhouser, "Dilated Residual Networks", arXiv:1705.09914.

Where torchvision departs from [He15], these networks follow torchvision, so that its checkpoints
load and give the same outputs:

* The stride of a bottleneck that halves the resolution sits in its 3x3 convolution ("v1.5");
  [He15] puts it in the first 1x1.
* Every shortcut that changes shape is a 1x1 projection followed by BatchNorm (option B of [He15],
  section 3.3), in ResNet-18 and ResNet-34 as well.
* The weights are drawn from N(0, 2 / fan_out); the method that [He15] section 3.4 refers to
  derives fan_in and fan_out as equally good.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..nn import BasicBlock, Bottleneck
from ..nn._blocks import FusedStem, Step
from ..nn.blocks import PlainBasicBlock, PlainBottleneck

Block = type[PlainBasicBlock | PlainBottleneck]

_STAGE_PLANES = (64, 128, 256, 512)  # [He15] Table 1, conv2_x .. conv5_x
_STAGE_STRIDES = (1, 2, 2, 2)  # [He15] Table 1: conv3_1, conv4_1 and conv5_1 downsample


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
        dilate = _checked_dilation(replace_stride_with_dilation)

        self._norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.inplanes = _STAGE_PLANES[0]
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group

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
        downsample = None
        if stride != 1 or self.inplanes != outplanes:  # option B, [He15] section 3.3, eq. (2)
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, outplanes, 1, stride=stride, bias=False),
                self._norm_layer(outplanes),
            )
        width = (self.groups, self.base_width)
        norm = self._norm_layer
        blocks = [block(self.inplanes, planes, stride, downsample, *width, first_dilation, norm)]
        self.inplanes = outplanes
        blocks += [
            block(outplanes, planes, 1, None, *width, self.dilation, norm) for _ in range(1, count)
        ]
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
        return PlainResNet.forward(self._stem_view(x), x)  # type: ignore[arg-type]


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


@dataclass(frozen=True)
class Architecture:
    """One row of the table of networks.

    Attributes:
        block: the residual block.
        layers: blocks per stage.
        weights: name of torchvision's enum of trained weights.
        source: where the architecture is defined.
        groups: groups of the 3x3 convolutions, None where the caller may choose.
        width_per_group: channels of a group at 64 planes, None where the caller may choose.
    """

    block: Block
    layers: tuple[int, int, int, int]
    weights: str
    source: str
    groups: int | None = None
    width_per_group: int | None = None


_WIDE = "[Zagoruyko16]: bottlenecks of twice the inner width, the same outer one; v1.5 stride"

ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(
        BasicBlock, (2, 2, 2, 2), "ResNet18_Weights", "[He15] Table 1, 18-layer"
    ),
    "resnet34": Architecture(
        BasicBlock, (3, 4, 6, 3), "ResNet34_Weights", "[He15] Table 1, 34-layer"
    ),
    "resnet50": Architecture(
        Bottleneck, (3, 4, 6, 3), "ResNet50_Weights", "[He15] Table 1, 50-layer; v1.5 stride"
    ),
    "resnet101": Architecture(
        Bottleneck, (3, 4, 23, 3), "ResNet101_Weights", "[He15] Table 1, 101-layer; v1.5 stride"
    ),
    "resnet152": Architecture(
        Bottleneck, (3, 8, 36, 3), "ResNet152_Weights", "[He15] Table 1, 152-layer; v1.5 stride"
    ),
    "resnext50_32x4d": Architecture(
        Bottleneck, (3, 4, 6, 3), "ResNeXt50_32X4D_Weights", "[Xie16] Table 1; v1.5 stride", 32, 4
    ),
    "resnext101_32x8d": Architecture(
        Bottleneck,
        (3, 4, 23, 3),
        "ResNeXt101_32X8D_Weights",
        "[Xie16] section 3.1, 32 groups of 8; v1.5 stride",
        32,
        8,
    ),
    "resnext101_64x4d": Architecture(
        Bottleneck, (3, 4, 23, 3), "ResNeXt101_64X4D_Weights", "[Xie16] Table 4; v1.5 stride", 64, 4
    ),
    "wide_resnet50_2": Architecture(
        Bottleneck, (3, 4, 6, 3), "Wide_ResNet50_2_Weights", _WIDE, None, 128
    ),
    "wide_resnet101_2": Architecture(
        Bottleneck, (3, 4, 23, 3), "Wide_ResNet101_2_Weights", _WIDE, None, 128
    ),
}


class Factory(Protocol):
    """What every factory of this module accepts; the arguments are torchvision's."""

    __name__: str

    def __call__(
        self,
        *,
        weights: Any = None,
        progress: bool = True,
        num_classes: int | None = None,
        zero_init_residual: bool = False,
        groups: int | None = None,
        width_per_group: int | None = None,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> ResNet:
        """Build the network."""
        ...


_FACTORY_DOC = """Build {name}: {source}.

Args:
    weights: trained weights, as a member of torchvision's ``{weights}``, its name
        ("DEFAULT", "IMAGENET1K_V1", ...), or None for random ones. torchvision is imported, and
        the file downloaded to its cache, only when they are asked for.
    progress: show the download's progress on stderr.
    num_classes: outputs of the classifier; None takes that of the weights, else 1000.
    zero_init_residual, groups, width_per_group, replace_stride_with_dilation, norm_layer: see
        :class:`PlainResNet`; None is this network's own value.

Returns:
    A :class:`ResNet` in training mode, as torchvision's factory returns.

Raises:
    ValueError: unknown weights, or a num_classes, groups or width_per_group that contradicts the
        weights or the network.
    TypeError: weights of another network, or something that is no weights at all.
    ImportError: weights asked for and torchvision is missing.
"""


def _factory(name: str) -> Factory:
    """The factory for one row of the table, named and documented after it."""
    row = ARCHITECTURES[name]

    def build(
        *,
        weights: Any = None,
        progress: bool = True,
        num_classes: int | None = None,
        zero_init_residual: bool = False,
        groups: int | None = None,
        width_per_group: int | None = None,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> ResNet:
        trained = None if weights is None else _resolve_weights(name, weights)
        classes = None if trained is None else len(trained.meta["categories"])
        model = ResNet(
            row.block,
            row.layers,
            num_classes=_settled(name, "num_classes", num_classes, classes, 1000),
            zero_init_residual=zero_init_residual,
            groups=_settled(name, "groups", groups, row.groups, 1),
            width_per_group=_settled(
                name, "width_per_group", width_per_group, row.width_per_group, 64
            ),
            replace_stride_with_dilation=replace_stride_with_dilation,
            norm_layer=norm_layer,
        )
        if trained is not None:
            model.load_state_dict(trained.get_state_dict(progress=progress, check_hash=True))
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _FACTORY_DOC.format(name=name, source=row.source, weights=row.weights)
    return build


def _settled(name: str, argument: str, given: int | None, fixed: int | None, default: int) -> int:
    """The value of an argument that the network or its weights may fix."""
    if given is not None and fixed is not None and given != fixed:
        why = "these weights have" if argument == "num_classes" else "the network's own is"
        raise ValueError(f"{argument}: {name} got {given!r}, {why} {fixed}")
    if given is not None:
        return given
    return default if fixed is None else fixed


def get_model_weights(name: str) -> Any:
    """Look up torchvision's enum of trained weights for one network (``ResNet50_Weights``).

    Raises:
        ValueError: unknown network.
        ImportError: torchvision is missing.
    """
    row = _row(name)
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(
            f"weights: {name} takes its trained weights from torchvision, which cannot be "
            f"imported ({error}); install it with: pip install torchvision"
        ) from error
    return getattr(models, row.weights)


def _resolve_weights(name: str, weights: object) -> Any:
    """The member of torchvision's enum that ``weights`` stands for."""
    enum = get_model_weights(name)
    if isinstance(weights, enum):
        return weights
    accepted = ", ".join(repr(member) for member in enum.__members__)
    if isinstance(weights, str):
        member = enum.__members__.get(weights.removeprefix(f"{enum.__name__}."))
        if member is not None:
            return member
        raise ValueError(f"weights: {name} got {weights!r}, accepted are None, {accepted}")
    raise TypeError(
        f"weights: {name} got {weights!r}, accepted are None, a member of {enum.__name__}, "
        f"or one of the names {accepted}"
    )


def _row(name: str) -> Architecture:
    row = ARCHITECTURES.get(name)
    if row is None:
        raise ValueError(f"name: got {name!r}, accepted are {', '.join(ARCHITECTURES)}")
    return row


def list_models() -> list[str]:
    """The names of all networks, in the order of the table."""
    return list(ARCHITECTURES)


def get_model(name: str, **arguments: Any) -> ResNet:
    """Build a network by name; the arguments are its factory's.

    Raises:
        ValueError: unknown name, or an argument that the factory refuses.
    """
    _row(name)
    factory: Factory = globals()[name]
    return factory(**arguments)


resnet18 = _factory("resnet18")
resnet34 = _factory("resnet34")
resnet50 = _factory("resnet50")
resnet101 = _factory("resnet101")
resnet152 = _factory("resnet152")
resnext50_32x4d = _factory("resnext50_32x4d")
resnext101_32x8d = _factory("resnext101_32x8d")
resnext101_64x4d = _factory("resnext101_64x4d")
wide_resnet50_2 = _factory("wide_resnet50_2")
wide_resnet101_2 = _factory("wide_resnet101_2")
