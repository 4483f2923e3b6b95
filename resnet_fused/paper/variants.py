"""The networks that experiments compare: what [He15] varies, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from resnet_fused import models
from resnet_fused.convert import fuse, unfuse
from resnet_fused.data.sources import Source
from resnet_fused.nn import BasicBlock, Bottleneck
from resnet_fused.paper.scales import Scale

Change = Callable[[nn.Module], None]
_LAYERS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)
}  # fmt: skip
BOTTLENECK_FROM = 50
"""Layers of Table 1's networks from which on their blocks are bottlenecks."""


@dataclass(frozen=True)
class Variant:
    """One network of an experiment.

    Attributes:
        name: of its runs' folders: lower case, no spaces.
        label: for readers.
        group: variants of one group share an axis of the picture.
        depth: layers.
        shortcut: of `resnet_fused.nn.SHORTCUTS`.
        bottleneck: whether its blocks are bottlenecks.
        change: what else is done to the network when it is made, or None.
    """

    name: str
    label: str
    group: str
    depth: int
    shortcut: str
    bottleneck: bool = False
    change: Change | None = None

    def build(self, scale: Scale, source: Source) -> nn.Module:
        """Makes the network with its first weights, from the global random state.

        Args:
            scale: of the experiment: which family.
            source: its data: classes and channels.
        """
        classes = len(source.classes)
        block = Bottleneck if self.bottleneck else BasicBlock
        if scale.family == "cifar":
            model: nn.Module = models.CifarResNet(
                self.depth, classes, source.channels, shortcut=self.shortcut, block=block
            )
        else:
            model = models.ResNet(
                block, _LAYERS[self.depth], classes, version="v1", shortcut=self.shortcut
            )
        if self.change is not None:
            self.change(model)
        return model

    def check(self, scale: Scale) -> None:
        """Refuses depths that no network of the family has.

        Raises:
            ValueError: the message says which there are.
        """
        wide, deep = self.bottleneck, self.depth
        if scale.family == "imagenet" and deep not in _LAYERS:
            known = ", ".join(map(str, _LAYERS))
            raise ValueError(f"--depths: got {deep}, accepted for photographs are {known}")
        layers = 9 if wide else 6
        if scale.family == "cifar" and (deep < layers + 2 or (deep - 2) % layers):
            some = ", ".join(str(layers * n + 2) for n in (1, 2, 3, 5, 9, 18))
            raise ValueError(f"--depths: got {deep}, accepted is {layers}n + 2: {some}, ...")

    def make(
        self, scale: Scale, source: Source, seed: int, impl: str, device: torch.device
    ) -> nn.Module:
        """The network as a run trains it.

        Args:
            scale: of the experiment.
            source: its data.
            seed: of the weights.
            impl: "fused" or "eager".
            device: where to put it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build(scale, source)
        model = fuse(model) if impl == "fused" else unfuse(model)
        return model.to(device).to(memory_format=torch.channels_last)


def plain(scale: Scale, depth: int) -> Variant:
    """A network without shortcuts ([He15] section 3.3, "Plain Network")."""
    return Variant(f"plain{depth}", f"plain-{depth}", "plain", depth, "none", _wide(scale, depth))


def residual(scale: Scale, depth: int, shortcut: str | None = None) -> Variant:
    """A residual network; by default with the shortcuts that [He15] has for such ones.

    Option A for networks of basic blocks (section 4.1, Table 2; section 4.2), B for bottlenecks.

    Args:
        scale: of the experiment.
        depth: layers.
        shortcut: "A", "B" or "C" instead.
    """
    wide = _wide(scale, depth)
    option = shortcut or ("B" if wide else "A")
    name, label = f"resnet{depth}", f"ResNet-{depth}"
    if shortcut is not None:
        name, label = f"{name}-{shortcut.lower()}", f"{label} {shortcut}"
    return Variant(name, label, "residual", depth, option, wide)


def _wide(scale: Scale, depth: int) -> bool:
    return scale.family == "imagenet" and depth >= BOTTLENECK_FROM
