"""What images go through before a network sees them, as bytes: cropping, flipping, policies.

Everything random draws from torch's generator, which `Samples` seeds for each image: an image of an
epoch looks the same whichever process makes it, and after whatever interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torchvision.transforms import v2

Policy = Literal["none", "randaugment", "trivialaugment", "augmix"]
Transform = Callable[[Tensor], Tensor]


class Augmentation(BaseModel):
    """How training images are varied.

    Attributes:
        crop: "random_resized" (a part of the image, of random size and shape, as for ImageNet),
            "scaled" (a part of the image whose shorter side has a random length of `sides`:
            [He15] section 3.4), "padded" (the image moved by up to `padding` pixels, as for
            CIFAR), or "none".
        scale: least share of the image's area that "random_resized" takes.
        sides: pixels, least and most, of "scaled".
        padding: pixels on each side.
        flip: mirror half of them.
        lighting: deviation of the colour augmentation of AlexNet, 0.1 there: multiples of the
            principal components of ImageNet's colours are added; 0: none.
        policy: torchvision's RandAugment, TrivialAugmentWide or AugMix behind that.
        erasing: how likely a rectangle is blanked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: Literal["random_resized", "scaled", "padded", "none"] = "random_resized"
    scale: float = Field(0.08, gt=0, le=1)
    sides: tuple[int, int] = (256, 480)
    padding: int = Field(4, ge=0)
    flip: bool = True
    lighting: float = Field(0.0, ge=0)
    policy: Policy = "none"
    erasing: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Augmentation:
        if not 1 <= self.sides[0] <= self.sides[1]:
            raise ValueError(f"sides is {self.sides}; the least stands first")
        return self


def training_transform(augmentation: Augmentation, size: int) -> Transform:
    """Of images to train on.

    Args:
        augmentation: what to do.
        size: side of the result, pixels.

    Returns:
        uint8 [C, H, W] -> uint8 [C, size, size].

    Raises:
        ValueError: sides of "scaled" that are less than `size`.
    """
    steps: list[Transform] = []
    if augmentation.crop == "random_resized":
        steps.append(v2.RandomResizedCrop(size, (augmentation.scale, 1.0), antialias=True))
    elif augmentation.crop == "scaled":
        if augmentation.sides[0] < size:
            raise ValueError(f"sides: expected at least the size, {size}, got {augmentation.sides}")
        steps += [_Scaled(augmentation.sides), v2.RandomCrop(size)]
    else:
        steps += _fitted(size)
        if augmentation.crop == "padded":
            steps.append(v2.RandomCrop(size, padding=augmentation.padding))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.lighting:
        steps.append(_Lighting(augmentation.lighting))
    policies = {
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
    }
    if augmentation.policy != "none":
        steps.append(policies[augmentation.policy]())
    if augmentation.erasing:
        steps.append(v2.RandomErasing(augmentation.erasing))
    return v2.Compose(steps) if steps else _unchanged


def evaluation_transform(size: int, resize: int | None = None) -> Transform:
    """Of images to test with: the shorter side resized, the centre cropped.

    Args:
        size: side of the result, pixels.
        resize: length of the shorter side before; None: `size`.

    Returns:
        uint8 [C, H, W] -> uint8 [C, size, size].

    Raises:
        ValueError: `resize` is less than `size`.
    """
    if resize is not None and resize < size:
        raise ValueError(f"resize: expected at least the crop's {size} pixels, got {resize}")
    return v2.Compose(_fitted(size, resize))


def ten_crops(size: int, resize: int | None = None) -> Transform:
    """The four corners and the centre, and their mirror images ([He15] section 4.1's 10-crop).

    Args:
        size: side of each, pixels.
        resize: length of the shorter side before; None: `size`.

    Returns:
        uint8 [C, H, W] -> uint8 [10, C, size, size].
    """
    resized = _Resized(resize or size)

    def crops(image: Tensor) -> Tensor:
        return torch.stack(v2.functional.ten_crop(resized(image), [size, size]))

    return crops


def _unchanged(image: Tensor) -> Tensor:
    return image


class _Resized:
    """The shorter side resized; images of that size already stay as they are."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.resize = v2.Resize(side, antialias=True)

    def __call__(self, image: Tensor) -> Tensor:
        return image if min(image.shape[-2:]) == self.side else self.resize(image)


class _Scaled:
    """The shorter side resized to a random length."""

    def __init__(self, sides: tuple[int, int]) -> None:
        self.sides = sides

    def __call__(self, image: Tensor) -> Tensor:
        least, most = self.sides
        side = int(torch.randint(least, most + 1, ()))
        return v2.functional.resize(image, [side], antialias=True)


class _Lighting:
    """Multiples of the principal components of ImageNet's colours, added to each pixel.

    Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks"
    (2012), section 4.1, which [He15] section 3.4 refers to. Grey images have one component.
    """

    # Of RGB values from 0 to 255: what the authors' successors measured, and everybody took over.
    DEVIATIONS = (55.46, 4.794, 1.148)
    COMPONENTS = (
        (-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203)
    )  # fmt: skip

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def __call__(self, image: Tensor) -> Tensor:
        alphas = torch.randn(3) * self.deviation
        shift = torch.tensor(self.COMPONENTS) @ (alphas * torch.tensor(self.DEVIATIONS))
        if image.shape[0] == 1:
            shift = shift.mean(0, keepdim=True)
        lit = image.float() + shift.view(-1, 1, 1)
        return lit.round().clamp(0, 255).to(torch.uint8)


def _fitted(size: int, resize: int | None = None) -> list[Transform]:
    return [_Resized(resize or size), v2.CenterCrop(size)]
