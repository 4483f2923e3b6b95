"""Reading image files and preparing them as torchvision's ImageNet presets do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

# The constants of torchvision's ImageClassification preset.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageError(ValueError):
    """An image that cannot be read; the message names the file and the reason."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads an image file completely, turned upright by its EXIF orientation, as RGB.

    Args:
        path: a file that Pillow can read (JPEG, PNG, WebP, ...).

    Returns:
        The decoded image; the file is closed.

    Raises:
        ImageError: no such file, a directory, not an image, an image that is cut short, or one of
            32-bit pixels, which have no known range.
    """
    file = Path(path)
    if file.is_dir():
        raise ImageError(f"image: '{file}' is a directory; give one image file (JPEG, PNG, ...)")
    try:
        with Image.open(file) as opened:
            # Pillow decodes lazily: converting here makes a truncated file fail in this function.
            if opened.mode not in ("I", "F"):
                return _as_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise ImageError(f"image: no such file: '{file}'; give the path of an image file") from None
    except PermissionError:
        raise ImageError(f"image: no permission to read '{file}'") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"image: '{file}' is not an image that Pillow can read; accepted: JPEG, PNG, WebP, ..."
        ) from None
    except Exception as error:
        # On a broken file Pillow's readers raise nearly anything: SyntaxError, struct.error, ...
        reason = str(error).strip() or type(error).__name__
        raise ImageError(f"image: '{file}' is corrupt or cut short ({reason})") from error
    raise ImageError(f"image: '{file}' has pixels of 32 bits, whose black and white nobody knows")


def _as_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits; alpha is dropped, as torchvision's loader does."""
    if image.mode.startswith("I;16"):
        # Pillow would clip at 255: all but the darkest pixels white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def preprocess(
    image: Image.Image,
    size: int = 224,
    resize: int | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Resizes the shorter side, crops the centre and normalises, as torchvision's presets do.

    Args:
        image: an RGB image.
        size: side of the square crop in pixels.
        resize: length of the shorter side before the crop; None keeps the presets' 256 : 224.
        mean: of red, green, blue, of values from 0 to 1.
        std: likewise.

    Returns:
        float32 [3, size, size], the mean subtracted and divided by the deviation.

    Raises:
        ValueError: a size that is not positive, or a resize that is smaller than the crop.
    """
    return normalise(crop(image, size, resize), mean, std)


def crop(image: Image.Image, size: int = 224, resize: int | None = None) -> Image.Image:
    """The first part of `preprocess`: the shorter side resized, the centre cropped."""
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    resize = round(size * 256 / 224) if resize is None else resize
    if resize < size:
        raise ValueError(f"resize: expected at least the crop's {size} pixels, got {resize}")
    scaled = F.resize(image, [resize], interpolation=InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(scaled, [size, size])


def normalise(
    image: Image.Image,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """An RGB image as a float32 [3, H, W] tensor with a mean and a deviation taken out."""
    scaled = F.convert_image_dtype(F.pil_to_tensor(image), torch.float32)
    return F.normalize(scaled, list(mean), list(std))
