"""Transforms taken apart: what an image's pixels go through as bytes, and their normalisation.

A quarter of float32's bytes goes through worker processes, pinned memory and the bus, and the
network's first kernel does the arithmetic (`input_norm` of `rf.freeze` and `rf.ops.stem`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F
from torchvision.transforms._presets import ImageClassification

from resnet_fused.data.images import IMAGENET_MEAN, IMAGENET_STD, crop, preprocess

_PREPROCESS = (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))  # what it takes, and without them


@dataclass(frozen=True)
class Pixels:
    """The first part of a transform: an RGB image -> uint8 [3, H, W].

    Attributes:
        steps: image -> image, one after the other: resizing, cropping.
        mean: of each channel, of values from 0 to 1: what the transform subtracts behind them.
        std: what it divides by.
    """

    steps: Callable[[Image.Image], Image.Image]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image -> its bytes, uint8 [3, H, W]."""
        return F.pil_to_tensor(self.steps(image))

    @property
    def input_norm(self) -> Tensor:
        """[2, 3] float32, as `rf.freeze` and `rf.ops.stem` take it."""
        from resnet_fused.ops import stem_input_norm

        return stem_input_norm(self.mean, self.std)


def as_pixels(transform: Callable[[Any], Tensor]) -> Pixels | None:
    """Takes a transform apart, where it ends in bytes to numbers, less a mean, over a deviation.

    Args:
        transform: an RGB `PIL.Image` -> float32 [3, H, W].

    Returns:
        Its first part, and the rest as two numbers a channel. Known are `preprocess`, torchvision's
        presets of classification, and a Compose that ends in ToTensor (or PILToTensor and
        ConvertImageDtype) and Normalize, as timm makes them; None for any other.

    Example:
        >>> pixels = as_pixels(ResNet50_Weights.DEFAULT.transforms())
        >>> engine = rf.freeze(model, images_of_bytes, input_norm=pixels.input_norm)
    """
    given: dict[str, Any] = {}
    if type(transform) is functools.partial and not transform.args:
        transform, given = transform.func, dict(transform.keywords)
    if transform is preprocess:
        mean, std = (given.pop(key, known) for key, known in _PREPROCESS)
        return Pixels(functools.partial(crop, **given), tuple(mean), tuple(std))
    if given:
        return None
    if type(transform) is ImageClassification:
        steps = functools.partial(_preset, preset=transform)
        return Pixels(steps, tuple(transform.mean), tuple(transform.std))
    if type(transform) is transforms.Compose:
        return _composed(transform.transforms)
    return None


def _preset(image: Image.Image, preset: ImageClassification) -> Image.Image:
    """What torchvision's preset does before it makes a tensor."""
    scaled = F.resize(
        image, preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias
    )
    return F.center_crop(scaled, preset.crop_size)


def _composed(steps: Sequence[Any]) -> Pixels | None:
    *others, last = steps or [None]
    if type(last) is not transforms.Normalize:
        return None
    if others and _scales(others[-1]):
        others = others[:-1]
    elif (
        len(others) > 1
        and type(others[-1]) is transforms.ConvertImageDtype
        and others[-1].dtype == torch.float32
        and type(others[-2]) is transforms.PILToTensor
    ):
        others = others[:-2]
    else:
        return None
    rows = (torch.as_tensor(values).double().reshape(-1) for values in (last.mean, last.std))
    mean, std = (row.tolist() for row in rows)
    if len(mean) != 3 or len(std) != 3:
        return None
    return Pixels(transforms.Compose(others), tuple(mean), tuple(std))


def _scales(step: Any) -> bool:
    """ToTensor: an image of bytes to values from 0 to 1; timm has its own, which does the same."""
    return type(step) is transforms.ToTensor or (
        isinstance(step, transforms.ToTensor) and type(step).__module__.startswith("timm.")
    )
