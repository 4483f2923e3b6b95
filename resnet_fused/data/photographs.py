"""Two real photographs that scikit-learn ships, and crops of photographs as network input."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from resnet_fused.data.images import ImageError, load_image, normalise, preprocess

NAMES = ("china.jpg", "flower.jpg")
MIN_AREA = 0.25  # of the photograph, for a random crop: enough that its content stays recognisable


def photographs() -> list[Image.Image]:
    """The photographs that come with scikit-learn: a temple in China and a flower, 640 x 427.

    Raises:
        ImageError: scikit-learn is not installed, or holds no photographs.
    """
    # Found without importing scikit-learn, which would take as long as a small network's run.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ImageError(
            "photographs: scikit-learn, which ships them, is not installed; "
            "run `pip install scikit-learn`, or give images of your own"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "images"
    return [load_image(folder / name) for name in NAMES]


def crops(
    n: int, size: int = 224, seed: int = 0, images: Sequence[Image.Image] | None = None
) -> Tensor:
    """A batch of normalised crops: first each photograph whole, then random parts of them.

    The first crops are the presets' centre crop of each photograph; the rest are random resized
    crops (a quarter of the area or more, aspect ratio 3:4 to 4:3, flipped half of the time).

    Args:
        n: how many.
        size: side of a crop in pixels.
        seed: of the random crops; the same seed gives the same crops.
        images: the photographs to crop; None takes scikit-learn's two.

    Returns:
        float32 [n, 3, size, size], normalised with ImageNet's mean and deviation.

    Raises:
        ValueError: a negative n, a size below 1, or an empty list of images.
    """
    if n < 0:
        raise ValueError(f"n: expected 0 crops or more, got {n}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    sources = photographs() if images is None else list(images)
    if not sources:
        raise ValueError("images: expected at least one image, got an empty list")
    generator = random.Random(seed)
    made = [preprocess(image, size) for image in sources[:n]]
    for index in range(len(made), n):
        made.append(_random_crop(sources[index % len(sources)], size, generator))
    return torch.stack(made) if made else torch.empty(0, 3, size, size)


def _random_crop(image: Image.Image, size: int, generator: random.Random) -> Tensor:
    """A random part of `image` as float32 [3, size, size]."""
    area = image.width * image.height * generator.uniform(MIN_AREA, 1.0)
    aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(image.width, max(1, round(math.sqrt(area * aspect))))
    height = min(image.height, max(1, round(math.sqrt(area / aspect))))
    top = generator.randint(0, image.height - height)
    left = generator.randint(0, image.width - width)
    part = F.resized_crop(
        image, top, left, height, width, [size, size], InterpolationMode.BILINEAR, antialias=True
    )
    return normalise(F.hflip(part) if generator.random() < 0.5 else part)
