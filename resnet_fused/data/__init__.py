"""Images on their way into a network: reading, preprocessing, streaming; two photographs to try."""

from resnet_fused.data.images import ImageError, load_image, preprocess
from resnet_fused.data.photographs import crops, photographs
from resnet_fused.data.pixels import Pixels, as_pixels
from resnet_fused.data.stream import Batch, Entry, ImageStream, default_workers, find_images

__all__ = [
    "Batch",
    "Entry",
    "ImageError",
    "ImageStream",
    "Pixels",
    "as_pixels",
    "crops",
    "default_workers",
    "find_images",
    "load_image",
    "photographs",
    "preprocess",
]
