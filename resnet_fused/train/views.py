"""What a network is asked of an image: its centre, ten crops, or all of it at several scales.

[He15] section 3.4, "Deep Residual Learning for Image Recognition", arXiv:1512.03385: 10-crop
testing for comparison, and for best results the fully-convolutional form whose scores are averaged
over scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from resnet_fused.convert import fuse
from resnet_fused.data.augment import Transform, evaluation_transform, ten_crops
from resnet_fused.freeze import freeze
from resnet_fused.models import Ensemble
from resnet_fused.ops import stem_input_norm

PAPER_SCALES = (224, 256, 384, 480, 640)
"""Shorter sides in pixels ([He15] section 3.4)."""


@dataclass(frozen=True)
class Views:
    """Which parts of an image are looked at.

    Attributes:
        size: side of a crop, pixels.
        resize: the image's shorter side before it is cropped.
        crops: 1, the centre; 10, corners and centre and their mirror images.
        scales: shorter sides at which the whole image is looked at, instead of crops.

    Raises:
        ValueError: when the transform is made, a `resize` that is less than `size`.
    """

    size: int
    resize: int
    crops: int = 1
    scales: tuple[int, ...] = ()

    def transform(self) -> Transform:
        """uint8 [C, H, W] -> what a `View` takes of it."""
        if self.scales:
            return _whole
        return (ten_crops if self.crops == 10 else evaluation_transform)(self.size, self.resize)


def _whole(image: Tensor) -> Tensor:
    return image


class View(nn.Module):
    """A network that answers for images of bytes.

    Args:
        model: in evaluation mode.
        views: of each image.
        channels: that the model wants; one of grey images becomes so many.
        mean: of these, of values from 0 to 1.
        std: likewise.
        device: where it computes.
        dtype: in which.
    """

    def __init__(
        self, model: nn.Module, views: Views, channels: int,
        mean: Sequence[float], std: Sequence[float],
        device: torch.device, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.views, self.channels, self.dtype = views, channels, dtype
        self.mean, self.std = list(mean), list(std)
        self.model = model.to(device, dtype).to(memory_format=torch.channels_last)
        self.engine: nn.Module | None = None
        if views.scales:
            # Each photograph has sizes of its own: an engine would plan anew for each.
            self.model = fuse(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, classes], float32.

        Args:
            images: uint8 [N, C, H, W], or [N, 10, C, H, W] of ten crops.

        Returns:
            Logits of a single crop; of several the logarithm of their mean probability.
        """
        with torch.inference_mode():
            if self.views.scales:
                return Ensemble.combine(self._at(images, side) for side in self.views.scales)
            if self.views.crops == 1:
                return self._cropped(images)
            scores = self._cropped(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            return Ensemble.combine(scores.unbind(1))

    def _cropped(self, images: Tensor) -> Tensor:
        flat = images.expand(-1, self.channels, -1, -1)
        flat = flat.contiguous(memory_format=torch.channels_last)
        if self.engine is None:
            norm = stem_input_norm(self.mean, self.std)
            self.engine = freeze(self.model, flat, input_norm=norm)
        return self.engine(flat).float()

    def _at(self, images: Tensor, side: int) -> Tensor:
        """All of the images, their shorter side this long."""
        sized = v2.functional.resize(images, [side], antialias=True)
        values = v2.functional.to_dtype(sized, torch.float32, scale=True)
        values = values.expand(-1, self.channels, -1, -1)
        values = v2.functional.normalize(values, self.mean, self.std)
        return self.model(
            values.to(self.dtype).contiguous(memory_format=torch.channels_last)
        ).float()


def together(views: Sequence[View]) -> Callable[[Tensor], Tensor]:
    """One network, or several whose probabilities are averaged: images -> scores [N, classes].

    Args:
        views: at least one, of images that are prepared alike.
    """
    return views[0] if len(views) == 1 else Ensemble(views)
