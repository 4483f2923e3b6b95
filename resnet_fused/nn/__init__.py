"""Fused layers and blocks; real `nn.Conv2d` and `nn.BatchNorm2d` children hold the parameters."""

from ._blocks import Sequential
from ._prepared import drop as refresh
from .blocks import BasicBlock, Bottleneck, ConvBNAct, Stem
from .shortcuts import PaddedShortcut

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "PaddedShortcut",
    "Sequential",
    "Stem",
    "refresh",
]
