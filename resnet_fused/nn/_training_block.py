"""Residual blocks that train as one autograd node each, alone or in a row of them.

In a row a block makes its successor's first convolution together with its own end, where that is
one kernel's work: it hands on its output as ever, and beside it what it has made, which the
successor takes if nothing has come between. Nobody ever sees a tensor that is not whole, and each
block remains a node of its own: its gradients are there as soon as its backward is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import _autocast, _block_end, _finalize
from . import _training as node
from . import _training_route as route
from ._modules import has_hooks
from .shortcuts import PaddedShortcut


class Block(NamedTuple):
    """A residual block's parts.

    Attributes:
        steps: convolution, normalisation, activation of each layer.
        downsample: the shortcut's module, or None for the identity.
        projection: its convolution and normalisation, where it is nothing else.
        adds: whether there is a shortcut at all.
    """

    steps: list[tuple[nn.Module, nn.Module, nn.Module]]
    downsample: nn.Module | None
    projection: tuple[nn.Module, nn.Module] | None
    adds: bool = True

    @property
    def pairs(self) -> list[route.Pair]:
        """Its layers, in a row."""
        return [route.Pair(conv, bn) for conv, bn, _ in self.steps]

    @property
    def every(self) -> list[route.Pair]:
        """Likewise, and the projection behind them."""
        return (
            self.pairs if self.projection is None else [*self.pairs, route.Pair(*self.projection)]
        )

    def reason(self) -> str | None:
        """Why its modules themselves are left to PyTorch, or None."""
        reasons = (route._pair_reason(*pair) for pair in self.every)
        acts = (route._act_reason(act) for _, _, act in self.steps)
        return next(filter(None, reasons), None) or next(filter(None, acts), None)

    def shape(self, x: torch.Size) -> torch.Size | None:
        """The shape behind it; None where something does not fit.

        Raises:
            ValueError: a live BatchNorm would see one value a channel.
        """
        shape = route._shape_after(x, self.pairs)
        if shape is None or (self.adds and not _fits(x, shape, self.downsample, self.projection)):
            return None
        return shape


class Row:
    """Blocks that run one behind the other, with nobody in between who could see what they hand on.

    Attributes:
        following: gives the parts of the block behind the one that runs, or None.
    """

    def __init__(self) -> None:
        self.following: Callable[[], Block | None] = lambda: None
        self._out: Tensor | None = None
        self._made: node.Made | None = None
        self._way = route.NO_WAY

    def take(self, x: Tensor, dtype: torch.dtype) -> tuple[node.Made | None, _block_end.Way]:
        """What the block before has made of this one's first convolution, and why or why not."""
        fits = self._out is x and x.dtype is dtype
        found = (self._made if fits else None), (self._way if fits else route.NO_WAY)
        self._out = self._made = None
        return found

    def leave(self, out: Tensor, made: node.Made | None, way: _block_end.Way) -> None:
        """Keeps what a block has made of the first convolution of the one behind it."""
        self._out, self._made, self._way = out, made, way

    def ahead(
        self, x: Tensor, shape: torch.Size, dtype: torch.dtype, plan: node.Plan
    ) -> tuple[Tensor | None, _block_end.Way]:
        """The weight of the next block's first convolution, where this block is to make that.

        Args:
            x: what this block reads.
            shape: of its output.
            dtype: of the arithmetic.
            plan: what it computes.
        """
        whole = plan.shortcut in ("identity", "projection", "given")
        if not whole or not _block_end.possible(plan.folds):
            return None, route.NO_WAY
        block = self.following()
        if block is None or block.reason() or route._tensors_reason(x, dtype, block.every):
            return None, route.NO_WAY
        conv, bn = block.pairs[0]
        try:
            if not route.is_live(bn) or block.shape(shape) is None:
                return None, route.NO_WAY
        except ValueError:  # the next block's own to raise
            return None, route.NO_WAY
        weight = conv._parameters["weight"]
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        way = _block_end.way(
            x.device, dtype, shape, weight.shape, geometry, folds=plan.folds,
            projected=plan.projection is not None,
        )  # fmt: skip
        return (weight if way.folded else None), way


def run_block(x: Tensor, block: Block, row: Row | None = None) -> tuple[Tensor | None, str]:
    """A residual block with a live BatchNorm in it.

    Args:
        x: [N, C, H, W].
        block: its parts.
        row: that it stands in; None for a block by itself.

    Returns:
        [N, K, P, Q] and "", or None and why the layers are to run one by one.
    """
    pairs, every = block.pairs, block.every
    reason = block.reason() or route.call_reason(x, pairs[0].conv, None)
    if reason is not None:
        return None, reason
    dtype = _autocast.arithmetic(x)
    choice, reason = route.serving(x, dtype)
    reason = reason or route._tensors_reason(x, dtype, every)
    if reason is not None:
        return None, reason
    shape = block.shape(x.shape)
    if shape is None:
        return None, route.UNFIT
    route._forget(every)
    row = row or Row()
    made, before = row.take(x, dtype)
    folds = choice.implementation.name in backends.GPU_BACKENDS
    residual, waiting = None, []
    downsample = block.downsample
    shortcut, stride, offset = "identity" if block.adds else "none", 1, 0
    if block.projection is not None:
        shortcut = "projection"
    elif _is_padded(downsample):
        shortcut, stride, offset = "padded", downsample.stride, downsample.before
    elif downsample is not None:
        with node.later() as waiting:
            shortcut, residual = "given", downsample(x).to(dtype).broadcast_to(shape)
    projection = None if block.projection is None else route._layer(*block.projection)
    layers = tuple(route._layer(*pair) for pair in pairs)
    finalizes = _finalize.way(choice, x.device, dtype).merged
    plan = node.Plan(layers, shortcut, projection, stride, offset, folds=folds, finalizes=finalizes)
    weight, way = row.ahead(x, shape, dtype, plan)
    if block.projection is not None:
        route._record([every[-1]], [None], choice, None, x, dtype)
    acts: list[nn.Module | None] = [act for _, _, act in block.steps]
    route._record(pairs, acts, choice, len(pairs) - 1 if block.adds else None, x, dtype, before)
    neighbours = node.Neighbours(made, weight)
    y = node.run(plan, x.to(dtype), residual, route._parameters(every), neighbours)
    node.finish(waiting)
    row.leave(y, neighbours.left, way)
    return y, ""


def _is_padded(downsample: nn.Module | None) -> bool:
    return type(downsample) is PaddedShortcut and not has_hooks(downsample)


def _fits(
    x: torch.Size,
    out: torch.Size,
    downsample: nn.Module | None,
    projection: tuple[nn.Module, nn.Module] | None,
) -> bool:
    """Whether a block's shortcut has the shape of what it is added to, where that can be told."""
    if projection is not None:
        return route._shape_after(x, [route.Pair(*projection)]) == out
    if _is_padded(downsample):
        n, channels, *sizes = x
        sizes = [-(-size // downsample.stride) for size in sizes]
        kept = channels == downsample.in_channels
        return kept and out == (n, downsample.out_channels, *sizes)
    return downsample is not None or x == out
