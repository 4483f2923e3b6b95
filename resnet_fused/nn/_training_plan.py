"""What a training node computes, and what it has to do with the nodes beside it: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._training_junction import End

Geometry = tuple[list[int], list[int], list[int], int]


def thinning(geometry: Geometry, weight: Tensor) -> int:
    """Of how many rows and columns a projection reads one, if a 1x1 of its stride does just that.

    Args:
        geometry: of the projection.
        weight: [K, C / groups, R, S].

    Returns:
        The stride; 1 where the gradient of the whole input is to be computed.
    """
    (high, wide), padding, _, _ = geometry
    alike = high == wide and not any(padding) and tuple(weight.shape[2:]) == (1, 1)
    return high if alike else 1


def thin(geometry: Geometry) -> Geometry:
    """A 1x1's geometry over the pixels that it reads."""
    _, padding, dilation, groups = geometry
    return [1, 1], padding, dilation, groups


@dataclass(frozen=True)
class Layer:
    """One convolution and its BatchNorm, without their parameters.

    Attributes:
        geometry: stride, padding, dilation, groups.
        bn: the normalisation: eps, momentum, running statistics.
        live: whether the batch's statistics are used; else the running ones, which stay.
        group: the processes that share live statistics; None for this one alone.
    """

    geometry: Geometry
    bn: nn.Module
    live: bool
    group: Any = None


@dataclass(frozen=True)
class Plan:
    """What a node computes.

    Attributes:
        layers: one behind the other, ReLU between them.
        shortcut: "none"; "identity"; "projection", by the layer of that name; "padded", option A;
            "given", a tensor of the output's shape.
        projection: see shortcut.
        stride: of a padded shortcut's pixels.
        offset: channel that a padded shortcut's first one is added to.
        act: "relu" or "none", at the end.
        window: kernel, stride and padding of the max pooling behind it, or None.
        folds: whether kernels apply BatchNorm as they read, so that nothing is written between two
            convolutions; else one pass writes what PyTorch's convolutions are to read.
        finalizes: whether a convolution's launch makes scale, shift and running statistics, too.
    """

    layers: tuple[Layer, ...]
    shortcut: str = "none"
    projection: Layer | None = None
    stride: int = 1
    offset: int = 0
    act: str = "relu"
    window: tuple[list[int], list[int], list[int]] | None = None
    folds: bool = False
    finalizes: bool = False


class Made(NamedTuple):
    """A node's first convolution, which the node before has made together with its own end.

    Attributes:
        weight: [K, C, 1, 1] in the dtype of the arithmetic.
        y: [N, K, P, Q], raw.
        stats: [2, K] of it.
    """

    weight: Tensor
    y: Tensor
    stats: Tensor


@dataclass
class Neighbours:
    """What a node has to do with those before and behind it in a row of blocks.

    Attributes:
        made: its own first convolution, if the node before has made it.
        weight: of the first convolution of the node behind it, if this one is to make that.
        left: what it has made of that.
        before: the end of the node before, if this one makes the gradient behind its ReLU.
        unites: whether, with it, both gradients of its first convolution come from one op.
        leads: whether the node behind this one may make that of this one's.
        end: then, its own.
    """

    made: Made | None = None
    weight: Tensor | None = None
    left: Made | None = None
    before: End | None = None
    unites: bool = False
    leads: bool = False
    end: End | None = None


class Norm(NamedTuple):
    """A layer's BatchNorm in one forward: its values, and how many elements they were made of.

    Attributes:
        rows: [4, K] scale, shift, mean, invstd.
        count: elements a channel of this process.
        total: of all processes, float64 [1]; None where there is one.
        stats: [2, K] mean and M2 that wait to be taken into the running statistics, or None.
    """

    rows: Tensor
    count: int
    total: Tensor | None
    stats: Tensor | None


class Taken(NamedTuple):
    """Running statistics that a convolution's launch has updated already.

    Attributes:
        running: mean, variance and number of batches (or None), in place.
        kept: the first two as they were, float64 [2, K].
    """

    running: tuple[Tensor, Tensor, Tensor | None]
    kept: Tensor

    def put_back(self) -> None:
        """Has the batch never been taken in. No memory is needed for it."""
        mean, var, tracked = self.running
        mean.copy_(self.kept[0])
        var.copy_(self.kept[1])
        if tracked is not None:
            tracked.sub_(1)

    def tensors(self) -> list[Tensor]:
        """Those that were written."""
        return [t for t in self.running if t is not None]
