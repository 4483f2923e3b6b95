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
from ..ops import _autocast, _block_end, _end_gradient, _finalize
from . import _training as node
from . import _training_route as route
from ._modules import has_hooks
from ._training_junction import End, packs
from ._training_plan import thinning
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
        self._end: End | None = None

    def take(
        self, x: Tensor, dtype: torch.dtype
    ) -> tuple[node.Made | None, _block_end.Way, End | None]:
        """What the block before has made of this one's first convolution, why or why not; its end.

        The end is there where `leads` has said so.
        """
        out, made, way, end = self._out, self._made, self._way, self._end
        self._out = self._made = self._end = None
        return (made, way, end) if out is x and x.dtype is dtype else (None, route.NO_WAY, None)

    def leave(
        self,
        out: Tensor,
        made: node.Made | None,
        way: _block_end.Way,
        end: End | None = None,
    ) -> None:
        """Keeps what a block has made of the first convolution of the one behind it; its end."""
        self._out, self._made, self._way, self._end = out, made, way, end

    def leads(self, plan: node.Plan) -> bool:
        """Whether the block behind this one may make the gradient behind this one's last ReLU.

        Args:
            plan: what this block computes.
        """
        if not torch.is_grad_enabled() or not _end_gradient.possible(plan.folds):
            return False
        ends = (plan.layers[-1], plan.projection)
        # Sums that go to other processes are left to the node whose they are.
        shared = any(layer is not None and layer.group is not None for layer in ends)
        return not shared and self.following() is not None

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
    made, before, end = row.take(x, dtype)
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
    end, gradient = _ending(x, end, plan, block)
    if block.projection is not None:
        route._record([every[-1]], [None], choice, None, x, dtype)
    acts: list[nn.Module | None] = [act for _, _, act in block.steps]
    route._record(
        pairs, acts, choice, len(pairs) - 1 if block.adds else None, x, dtype, before, gradient
    )
    neighbours = node.Neighbours(
        made, weight, before=end, unites=gradient.united, leads=row.leads(plan)
    )
    y = node.run(plan, x.to(dtype), residual, route._parameters(every), neighbours)
    node.finish(waiting)
    row.leave(y, neighbours.left, way, neighbours.end)
    return y, ""


def _ending(
    x: Tensor, end: End | None, plan: node.Plan, block: Block
) -> tuple[End | None, _end_gradient.Way]:
    """The end of the block before, if this one makes the gradient behind it; why or why not.

    Args:
        x: what lies between.
        end: of the block before, where there is one that leads.
        plan: what this block computes.
        block: its parts.
    """
    # All of the gradient of x must come from this node, and be of all its pixels and channels.
    whole = plan.shortcut in ("identity", "projection", "none")
    if end is None or not x.requires_grad or not whole or packs():
        return None, route.NO_GRADIENT
    added = int(plan.shortcut != "none")
    if block.projection is not None and plan.projection is not None:
        added = thinning(plan.projection.geometry, block.projection[0]._parameters["weight"])
    weight = block.pairs[0].conv._parameters["weight"]
    place = _end_gradient.Place(
        x.device, x.dtype, tuple(x.shape), tuple(weight.shape), plan.layers[0].geometry,
        end.residual is not None, added,
    )  # fmt: skip
    way = _end_gradient.way(place, folds=plan.folds, trained=weight.requires_grad)
    return (end if way.ended else None), way


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
