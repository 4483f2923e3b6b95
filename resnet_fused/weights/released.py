"""What a file of weights holds: tensors in torchvision's names, and what they were trained in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# The mean image of the Caffe release (ResNet_mean.binaryproto), averaged over its pixels, in RGB.
# Caffe subtracts the image itself; its corners are a few grey levels off this average.
_MSRA_MEAN = (123.15163, 115.90288, 103.06262)
# PIXEL_MEAN of detectron2's configurations, and PIXEL_STD of its ResNeXt's, in RGB.
_DETECTRON_MEAN = (123.675, 116.28, 103.53)
_DETECTRON_STD = (58.395, 57.12, 57.375)


class WeightsError(ValueError):
    """A file that cannot be used as weights; the message names it and says what is wrong."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input: (values from 0 to 1 - mean) / std.

    It cannot be folded into the first convolution: that pads with zeros behind the mean.

    Attributes:
        mean: of red, green, blue, of values from 0 to 1.
        std: likewise.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Architecture:
    """What names and shapes do not tell of the network that the weights were trained in.

    Attributes:
        version: "v1" where a bottleneck that halves the resolution does so in its first 1x1
            convolution ([He15] section 3.4's released networks), "v1.5" where in its 3x3.
        pool_padding: of the 3x3/2 max pooling behind conv1.
        pool_ceil_mode: whether its last window may reach over the edge, as Caffe's does.
        eps: of every BatchNorm.
    """

    version: str
    pool_padding: int
    pool_ceil_mode: bool
    eps: float


@dataclass(frozen=True, eq=False)
class Weights(Mapping[str, Tensor]):
    """A state_dict in torchvision's names, with what its file says beside it.

    ``model.load_state_dict(weights)`` takes it as it is; :func:`resnet_fused.weights.load` checks
    more.

    Attributes:
        state: name -> tensor, on the CPU; the first convolution takes RGB.
        format: of `FORMATS`.
        source: the file, for messages.
        preprocessing: of images; None where the format does not say.
        architecture: of the network; None where the format does not say.
        foreign: tensors of the file that belong to no layer of a ResNet, by its own names.
    """

    state: Mapping[str, Tensor] = field(repr=False)
    format: str
    source: str
    preprocessing: Preprocessing | None = None
    architecture: Architecture | None = None
    foreign: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


EPS = 1e-5
"""Of Caffe's, Caffe2's and PyTorch's BatchNorm where nothing else is said."""

V1 = Architecture("v1", pool_padding=0, pool_ceil_mode=True, eps=EPS)
"""ResNet-50, 101 and 152 of Microsoft Research Asia."""
V1_5 = Architecture("v1.5", pool_padding=1, pool_ceil_mode=False, eps=EPS)
"""Facebook's Caffe2 networks."""


def _scaled(values: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red / 255, green / 255, blue / 255


MSRA = Preprocessing(_scaled(_MSRA_MEAN), _scaled((1.0, 1.0, 1.0)))
"""Of Caffe's release: bytes less the mean."""
DETECTRON = Preprocessing(_scaled(_DETECTRON_MEAN), _scaled((1.0, 1.0, 1.0)))
"""Of detectron2 with the same networks."""
DETECTRON_SCALED = Preprocessing(_scaled(_DETECTRON_MEAN), _scaled(_DETECTRON_STD))
"""Of detectron2 with networks that Facebook trained."""
