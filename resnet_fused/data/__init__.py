"""Images on their way into a network: reading files, preprocessing, and two photographs to try."""

from resnet_fused.data.images import ImageError, load_image, preprocess
from resnet_fused.data.photographs import crops, photographs

__all__ = ["ImageError", "crops", "load_image", "photographs", "preprocess"]
