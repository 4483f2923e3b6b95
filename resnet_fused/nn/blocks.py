"""Layers and blocks to build networks from, with torchvision's constructor arguments and names.

[He15] is "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ._blocks import FusedBlock, FusedSequential, Step
from .shortcuts import Norm, make_shortcut


def _conv3x3(inputs: int, outputs: int, stride: int, groups: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(
        inputs,
        outputs,
        3,
        stride=stride,
        padding=dilation,
        groups=groups,
        dilation=dilation,
        bias=False,
    )


def _conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def _check_shortcut(block: str, residual: bool, downsample: nn.Module | None) -> None:
    if not residual and downsample is not None:
        raise ValueError(
            f"{block}: residual=False and a downsample; a shortcut needs residual=True"
        )


def _ended(block: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """A plain block's end: the shortcut's add, if there is one, and ReLU."""
    if block.residual:
        y = y + (x if block.downsample is None else block.downsample(x))
    return block.relu(y)


class PlainBasicBlock(nn.Module):
    """The block of ResNet-18 and -34, run by PyTorch's own modules ([He15], figure 5, left).

    Args:
        inplanes: channels that come in.
        planes: channels of both 3x3 convolutions.
        stride: of the first convolution.
        downsample: the projection of the shortcut, or None for the identity.
        groups: 1 is accepted.
        base_width: 64 is accepted.
        dilation: 1 is accepted.
        norm_layer: makes a normalisation from a channel count; None is `nn.BatchNorm2d`.
        residual: False leaves the shortcut out: a block of a plain network ([He15], figure 3).

    Raises:
        ValueError: groups or base_width is another; a projection without a shortcut.
        NotImplementedError: dilation is another.
    """

    expansion: ClassVar[int] = 1
    residual: bool = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
        *,
        residual: bool = True,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        _check_shortcut("BasicBlock", residual, downsample)
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock: groups={groups}, base_width={base_width}; it accepts only "
                "groups=1 and base_width=64 (Bottleneck takes others)"
            )
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: dilation={dilation}; only 1 is supported")
        self.conv1 = _conv3x3(inplanes, planes, stride, 1, 1)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes, 1, 1, 1)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Computes relu(F(x) + shortcut(x)); x [N, inplanes, H, W]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return _ended(self, y, x)


class BasicBlock(FusedBlock, PlainBasicBlock):
    """The block of ResNet-18 and -34 ([He15], figure 5, left), two fused layers.

    Arguments, children and state_dict are `torchvision.models.resnet.BasicBlock`'s.
    """

    plain_class = PlainBasicBlock
    steps = (Step("conv1", "bn1", "relu"), Step("conv2", "bn2", "relu"))


class PlainBottleneck(nn.Module):
    """The block of ResNet-50 and deeper, run by PyTorch's own modules ([He15], figure 5, right).

    The stride sits in the 3x3 convolution, as in torchvision ("v1.5"); [He15] and its released
    models have it in the first 1x1 ("v1").

    Args:
        inplanes: channels that come in.
        planes: width of the block before `base_width` and `groups`; 4 * planes come out.
        stride: of the 3x3 convolution, or of the first 1x1.
        downsample: the projection of the shortcut, or None for the identity.
        groups: groups of the 3x3 convolution (ResNeXt's cardinality).
        base_width: channels a group for 64 planes.
        dilation: of the 3x3 convolution.
        norm_layer: makes a normalisation from a channel count; None is `nn.BatchNorm2d`.
        residual: False leaves the shortcut out.
        stride_in_1x1: the stride is the first convolution's.

    Raises:
        ValueError: a projection without a shortcut.
    """

    expansion: ClassVar[int] = 4
    residual: bool = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
        *,
        residual: bool = True,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        _check_shortcut("Bottleneck", residual, downsample)
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv1x1(inplanes, width, first)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, second, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Computes relu(F(x) + shortcut(x)); x [N, inplanes, H, W]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return _ended(self, y, x)


class Bottleneck(FusedBlock, PlainBottleneck):
    """The block of ResNet-50 and deeper ([He15], figure 5, right), three fused layers.

    Arguments, children and state_dict are `torchvision.models.resnet.Bottleneck`'s.
    """

    plain_class = PlainBottleneck
    steps = (
        Step("conv1", "bn1", "relu"),
        Step("conv2", "bn2", "relu"),
        Step("conv3", "bn3", "relu"),
    )


class PlainResidualBlock(nn.Module):
    """y = relu(F(x) + shortcut(x)) with any number of layers in F, by PyTorch's own modules.

    [He15], equations (1) and (2) in section 3.2: F has two or three layers there, more are
    possible, and with a single one, y = W1 x + x, its authors saw no advantage. Children:
    ``conv1, bn1, conv2, bn2, ...``, ``relu``, ``downsample``.

    Args:
        in_channels: channels that come in.
        channels: those that each layer puts out, in order.
        kernel_size: of all layers (odd), or one of each.
        stride: of the block.
        strided: which layer has it, from 0 on.
        shortcut: an option of `SHORTCUTS` ([He15], section 3.3), or a module.
        norm_layer: makes a normalisation from a channel count; None is `nn.BatchNorm2d`.

    Raises:
        ValueError: no layer, an even kernel, a layer that is not there, an unknown option, or
            option A where channels become fewer.
    """

    residual: bool = True

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernel_size: int | Sequence[int] = 3,
        stride: int = 1,
        *,
        strided: int = 0,
        shortcut: str | nn.Module = "B",
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        count = len(channels)
        kernels = [kernel_size] * count if isinstance(kernel_size, int) else list(kernel_size)
        if not count or len(kernels) != count:
            raise ValueError(
                f"ResidualBlock: channels={list(channels)}, kernel_size={kernel_size}; it accepts "
                "at least one layer, and one kernel size or as many as layers"
            )
        if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"ResidualBlock: kernel_size is {kernel_size}; odd ones are accepted")
        if not 0 <= strided < count:
            raise ValueError(f"ResidualBlock: strided is {strided}; 0 to {count - 1} is accepted")
        inputs = [in_channels, *channels[:-1]]
        for index, (ins, outs, kernel) in enumerate(zip(inputs, channels, kernels, strict=True)):
            step = stride if index == strided else 1
            conv = nn.Conv2d(ins, outs, kernel, stride=step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{index + 1}", conv)
            self.add_module(f"bn{index + 1}", norm(outs))
        self.relu = nn.ReLU(inplace=True)
        self.steps = tuple(Step(f"conv{i}", f"bn{i}", "relu") for i in range(1, count + 1))
        self.residual = shortcut != "none"
        self.downsample = (
            make_shortcut(shortcut, in_channels, channels[-1], stride, norm)
            if isinstance(shortcut, str)
            else shortcut
        )

    def forward(self, x: Tensor) -> Tensor:
        """Computes relu(F(x) + shortcut(x)); x [N, in_channels, H, W]."""
        y = x
        for index, step in enumerate(self.steps):
            y = self._modules[step.bn](self._modules[step.conv](y))
            if index < len(self.steps) - 1:
                y = self.relu(y)
        return _ended(self, y, x)


class ResidualBlock(FusedBlock, PlainResidualBlock):
    """y = relu(F(x) + shortcut(x)) with any number of fused layers in F; see `PlainResidualBlock`.

    ([He15], section 3.2.)
    """

    plain_class = PlainResidualBlock

    @classmethod
    def steps_of(cls, module: nn.Module) -> tuple[Step, ...]:
        """The layers of a block that is, or may become, of this class."""
        return module.steps


class PlainConvBNAct(nn.Sequential):
    """Conv2d, BatchNorm2d and ReLU in a row, run by PyTorch's own modules.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        kernel_size: an int or (vertical, horizontal).
        stride: of the convolution.
        padding: zeros on each side; None keeps the size at stride 1 (odd kernels).
        dilation: of the convolution.
        groups: of the convolution.
        act: "relu" or "none".
        norm_layer: makes a normalisation from a channel count; None is `nn.BatchNorm2d`.

    Raises:
        ValueError: act is another.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        act: str = "relu",
        norm_layer: Norm | None = None,
    ) -> None:
        if act not in ("relu", "none"):
            raise ValueError(f"ConvBNAct: act is {act!r}; accepted are 'relu', 'none'")
        if padding is None:
            kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
            spread = (dilation,) * 2 if isinstance(dilation, int) else dilation
            padding = (spread[0] * (kernel[0] - 1) // 2, spread[1] * (kernel[1] - 1) // 2)
        super().__init__()
        self.add_module(
            "conv",
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups,
                bias=False,
            ),
        )
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.add_module("bn", norm(out_channels))
        if act == "relu":
            self.add_module("relu", nn.ReLU(inplace=True))


class ConvBNAct(FusedSequential, PlainConvBNAct):
    """Convolution, BatchNorm and ReLU as one fused layer; children `conv`, `bn`, `relu`."""

    plain_class = PlainConvBNAct


class PlainStem(PlainConvBNAct):
    """The start of an ImageNet ResNet by PyTorch's own modules ([He15], table 1, conv1, pool).

    Args:
        in_channels: channels of the image.
        out_channels: channels of the 7x7 convolution.
        norm_layer: makes a normalisation from a channel count; None is `nn.BatchNorm2d`.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 64, norm_layer: Norm | None = None
    ) -> None:
        super().__init__(in_channels, out_channels, 7, stride=2, padding=3, norm_layer=norm_layer)
        self.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))


class Stem(FusedSequential, PlainStem):
    """7x7/2 convolution, BatchNorm and ReLU as one fused layer, then 3x3/2 max pooling."""

    plain_class = PlainStem
