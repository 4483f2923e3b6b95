"""Transforms taken apart into bytes and a normalisation."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision import models, transforms

from resnet_fused.data import as_pixels, preprocess

NORMALIZE = transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
KNOWN: dict[str, Callable[[Any], Tensor]] = {
    "preprocess": preprocess,
    "sized": functools.partial(preprocess, size=40, resize=50),
    "torchvision v1": models.ResNet50_Weights.IMAGENET1K_V1.transforms(),
    "torchvision v2": models.ResNet50_Weights.IMAGENET1K_V2.transforms(),
    "bicubic": models.RegNet_Y_16GF_Weights.IMAGENET1K_SWAG_E2E_V1.transforms(),
    "timm": timm.data.create_transform((3, 64, 64), is_training=False, crop_pct=0.9),
    "timm bicubic": timm.data.create_transform((3, 64, 64), interpolation="bicubic"),
    "to_tensor": transforms.Compose([transforms.ToTensor(), NORMALIZE]),
    "converted": transforms.Compose([
        transforms.CenterCrop(30), transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float32), NORMALIZE,
    ]),
}  # fmt: skip


def add_one(image: Image.Image, by: float = 1.0) -> Tensor:
    return transforms.functional.to_tensor(image) + by


class Brighter(transforms.ToTensor):
    """Of ToTensor's class, and another function."""

    def __call__(self, pic: Any) -> Tensor:
        return 2 * super().__call__(pic)


UNKNOWN = {
    "function": add_one,
    "partial": functools.partial(add_one, by=2.0),
    "empty": transforms.Compose([]),
    "not normalised": transforms.Compose([transforms.ToTensor()]),
    "alone": transforms.Compose([NORMALIZE]),
    "subclass": transforms.Compose([Brighter(), NORMALIZE]),
    "in between": transforms.Compose([
        transforms.ToTensor(), transforms.RandomErasing(1.0), NORMALIZE,
    ]),
    "grey": transforms.Compose([
        transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5),
    ]),
}  # fmt: skip


@pytest.fixture
def image() -> Image.Image:
    numbers = np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


@pytest.mark.parametrize("name", KNOWN)
def test_bytes_and_normalisation_are_the_transform(name: str, image: Image.Image) -> None:
    pixels = as_pixels(KNOWN[name])
    assert pixels is not None
    found = pickle.loads(pickle.dumps(pixels))(image)
    expected = KNOWN[name](image)
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    factor, summand = pixels.input_norm.double()[:, :, None, None]
    difference = (factor * found + summand - expected).abs()
    # float32's roundings of the transform's three steps.
    assert difference.max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("name", UNKNOWN)
def test_any_other_transform_is_left_whole(name: str) -> None:
    assert as_pixels(UNKNOWN[name]) is None


def test_an_impossible_size_is_refused(image: Image.Image) -> None:
    pixels = as_pixels(functools.partial(preprocess, size=0))
    assert pixels is not None
    with pytest.raises(ValueError, match="size: expected at least 1 pixel"):
        pixels(image)
