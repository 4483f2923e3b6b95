"""Layers of a ResNet by the names of Caffe's and Caffe2's releases, and how they are put together.

res4b6_branch2a, bn4b6_branch2a, scale4b6_branch2a    Caffe:  layer3.6.conv1 and layer3.6.bn1
res4_6_branch2a_w, res4_6_branch2a_bn_gamma           Caffe2: the same
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.weights.released import WeightsError

_BRANCHES = {
    "1": ("downsample.0", "downsample.1"),
    "2a": ("conv1", "bn1"),
    "2b": ("conv2", "bn2"),
    "2c": ("conv3", "bn3"),
}
_NORM = ("weight", "bias", "running_mean", "running_var")
_BGR_TO_RGB = [2, 1, 0]
_SHOWN = 5


class Layer(NamedTuple):
    """A convolution and the BatchNorm behind it, or a classifier, by torchvision's names.

    Attributes:
        conv: of the module that holds the weight.
        norm: of its BatchNorm; None for a classifier.
    """

    conv: str
    norm: str | None


STEM = Layer("conv1", "bn1")
HEAD = Layer("fc", None)


def layer_of(stage: int, block: int, branch: str) -> Layer:
    """A layer of a block.

    Args:
        stage: 2 to 5, as [He15], Table 1, numbers them.
        block: from 0.
        branch: "1" (the projection), "2a", "2b" or "2c".
    """
    conv, norm = _BRANCHES[branch]
    place = f"layer{stage - 1}.{block}"
    return Layer(f"{place}.{conv}", f"{place}.{norm}")


class Parts:
    """What a file of a network that takes BGR says of each layer, part by part.

    Args:
        source: the file, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._layers: dict[Layer, dict[str, Tensor]] = {}
        self._blocks: dict[int, set[tuple[int, str]]] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def items(self) -> list[tuple[Layer, dict[str, Tensor]]]:
        """The layers so far, and their parts."""
        return list(self._layers.items())

    def block(self, stage: int, block: int, branch: str) -> Layer:
        """A layer as `layer_of` names it, which the file has."""
        self._blocks.setdefault(stage, set()).add((block, branch))
        return layer_of(stage, block, branch)

    def put(self, layer: Layer, part: str, value: Tensor) -> None:
        """Takes a tensor.

        Args:
            layer: it belongs to.
            part: "conv.weight" or "conv.bias", or as nn.BatchNorm2d names it.
            value: float32.

        Raises:
            WeightsError: there is one already.
        """
        known = self._layers.setdefault(layer, {})
        if part in known:
            raise WeightsError(f"{self.source} has two tensors for {part!r} of {layer.conv!r}")
        known[part] = value

    def state_dict(self) -> dict[str, Tensor]:
        """All layers in torchvision's names; the first convolution takes RGB.

        A bias in front of a BatchNorm goes into the running mean: ResNet-50's conv1 has one, in
        Caffe's release and in those made of it.

        Raises:
            WeightsError: a layer that is not whole, blocks that lack layers, or a variance that is
                none: the file is cut short or was changed.
        """
        self._check_blocks()
        state: dict[str, Tensor] = {}
        for layer, parts in self._layers.items():
            self._check(layer, parts)
            weight, bias = parts["conv.weight"], parts.get("conv.bias")
            if layer == STEM and weight.dim() == 4 and weight.shape[1] == len(_BGR_TO_RGB):
                weight = weight[:, _BGR_TO_RGB]
            state[f"{layer.conv}.weight"] = weight
            if layer.norm is None:
                if bias is not None:
                    state[f"{layer.conv}.bias"] = bias
                continue
            if bias is not None:
                parts["running_mean"] -= bias
            state |= {f"{layer.norm}.{part}": parts[part] for part in _NORM}
        return state

    def _check_blocks(self) -> None:
        branches = {branch for found in self._blocks.values() for _, branch in found} - {"1"}
        lacking = [
            layer_of(stage, block, branch).conv
            for stage, found in sorted(self._blocks.items())
            for block in range(max(found)[0] + 1)
            for branch in sorted(branches)
            if (block, branch) not in found
        ]
        if lacking:
            more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
            raise WeightsError(
                f"{self.source} is cut short or not whole: it lacks "
                f"{', '.join(lacking[:_SHOWN])}{more}"
            )

    def _check(self, layer: Layer, parts: dict[str, Tensor]) -> None:
        needed = ("conv.weight", *(() if layer.norm is None else _NORM))
        lacking = [part for part in needed if part not in parts]
        if lacking:
            raise WeightsError(
                f"{self.source} is cut short or not whole: of {layer.conv} it lacks "
                f"{', '.join(lacking)}"
            )
        if layer.norm is None:
            return
        sizes = {name: tuple(value.shape) for name, value in parts.items()}
        channels = sizes.pop("conv.weight")[:1]
        if set(sizes.values()) != {channels}:
            raise WeightsError(
                f"{self.source}: {layer.conv} has {channels[0]} channels, its other tensors have "
                f"the shapes {sizes}"
            )
        if not bool((parts["running_var"] >= 0).all()):
            raise WeightsError(
                f"{self.source}: a variance of {layer.norm} is negative or no number"
            )
