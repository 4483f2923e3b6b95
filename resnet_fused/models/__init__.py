"""ResNet, ResNeXt and Wide ResNet built from fused layers, under torchvision's names.

The networks hold the same parameters under the same names as ``torchvision.models``, start from
the same random numbers and compute the same function; only the layers in between are fused.
torchvision itself is imported only when trained weights are asked for.
"""

from . import cifar, resnet
from .cifar import CifarResNet, PlainCifarResNet, cifar_resnet20
from .resnet import (
    ARCHITECTURES,
    Architecture,
    PlainResNet,
    ResNet,
    get_model,
    get_model_weights,
    list_models,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

CLASSES = (*resnet.CLASSES, *cifar.CLASSES)
"""What `rf.fuse` makes of the plain classes of this package."""

__all__ = [
    "ARCHITECTURES",
    "CLASSES",
    "Architecture",
    "CifarResNet",
    "PlainCifarResNet",
    "PlainResNet",
    "ResNet",
    "cifar_resnet20",
    "get_model",
    "get_model_weights",
    "list_models",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
