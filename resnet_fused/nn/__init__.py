"""Fused layers and blocks; real `nn.Conv2d` and `nn.BatchNorm2d` children hold the parameters."""

from ._blocks import Sequential
from ._prepared import drop as refresh
from .blocks import BasicBlock, Bottleneck, ConvBNAct, ResidualBlock, Stem
from .shortcuts import SHORTCUTS, PaddedShortcut, make_shortcut

__all__ = [
    "SHORTCUTS",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "PaddedShortcut",
    "ResidualBlock",
    "Sequential",
    "Stem",
    "make_shortcut",
    "refresh",
]
