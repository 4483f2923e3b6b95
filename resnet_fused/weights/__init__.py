"""Weights that others released: Caffe's, Detectron's pickles, torch's files and safetensors.

    net = rf.models.resnet50()
    loaded = rf.weights.load(net, "ResNet-50-model.caffemodel", adapt=True)

Reading runs no code of a file's, and a model is filled completely or not at all.
"""

from resnet_fused.weights.files import FORMATS, read
from resnet_fused.weights.loading import Loaded, MismatchError, load
from resnet_fused.weights.released import Architecture, Preprocessing, Weights, WeightsError

__all__ = [
    "FORMATS",
    "Architecture",
    "Loaded",
    "MismatchError",
    "Preprocessing",
    "Weights",
    "WeightsError",
    "load",
    "read",
]
