"""timm's ResNet classes, fused; imported when a model, or a pickle, holds one of theirs."""

from __future__ import annotations

from typing import Any

from timm.models import _features, resnet
from torch import Tensor

from ._blocks import FusedBlock, FusedSequential, FusedStem, Step, run_in_order

# What stands between timm's layers; a block with a live one keeps timm's own forward.
_EXTRAS = ("drop_block", "aa", "se", "drop_path")


class BasicBlock(FusedBlock, resnet.BasicBlock):
    """`timm.models.resnet.BasicBlock`, two fused layers."""

    plain_class = resnet.BasicBlock
    steps = (Step("conv1", "bn1", "act1"), Step("conv2", "bn2", "act2"))
    extras = _EXTRAS


class Bottleneck(FusedBlock, resnet.Bottleneck):
    """`timm.models.resnet.Bottleneck`, three fused layers."""

    plain_class = resnet.Bottleneck
    steps = (
        Step("conv1", "bn1", "act1"),
        Step("conv2", "bn2", "act2"),
        Step("conv3", "bn3", "act3"),
    )
    extras = _EXTRAS


class ResNet(FusedStem, resnet.ResNet):
    """`timm.models.resnet.ResNet` with a fused stem."""

    plain_class = resnet.ResNet
    stem = Step("conv1", "bn1", "act1")

    def forward_features(self, x: Tensor) -> Tensor:
        """The feature map in front of the head."""
        joined = not self.grad_checkpointing  # which calls the stages itself
        return resnet.ResNet.forward_features(self._stem_view(x, joined=joined), x)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Feature maps of the stages, as in timm."""
        return resnet.ResNet.forward_intermediates(self._stem_view(x), x, *args, **kwargs)


class FeatureListNet(FusedSequential, _features.FeatureListNet):
    """What `features_only=True` makes of a network, its stem fused."""

    plain_class = _features.FeatureListNet

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the wanted feature maps in order."""
        if self.must_be_plain(x) or self.grad_checkpointing or self.concat:
            return super(FusedSequential, self).forward(x)
        layers = run_in_order(self._modules.items(), x, frozenset(self.return_layers))
        return [y for name, y in layers if name in self.return_layers]


CLASSES = (BasicBlock, Bottleneck, ResNet, FeatureListNet)
