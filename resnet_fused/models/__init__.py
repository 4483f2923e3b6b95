"""ResNet, ResNeXt, Wide ResNet and the paper's own networks, built from fused layers.

Those that torchvision has hold the same parameters under the same names as ``torchvision.models``,
start from the same random numbers and compute the same function; only the layers in between are
fused. torchvision itself is imported only when trained weights are asked for.
"""

from . import cifar, resnet
from ._zoo import (
    ARCHITECTURES,
    Architecture,
    get_model,
    get_model_weights,
    list_models,
    plain18,
    plain34,
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
from .cifar import (
    CifarResNet,
    PlainCifarResNet,
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
    cifar_plain110,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
)
from .ensemble import Ensemble
from .resnet import PlainResNet, ResNet

CLASSES = (*resnet.CLASSES, *cifar.CLASSES)
"""What `rf.fuse` makes of the plain classes of this package."""

__all__ = [
    "ARCHITECTURES",
    "CLASSES",
    "Architecture",
    "CifarResNet",
    "Ensemble",
    "PlainCifarResNet",
    "PlainResNet",
    "ResNet",
    "cifar_plain20",
    "cifar_plain32",
    "cifar_plain44",
    "cifar_plain56",
    "cifar_plain110",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet1202",
    "get_model",
    "get_model_weights",
    "list_models",
    "plain18",
    "plain34",
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
