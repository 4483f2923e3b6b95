"""Convolutions with live BatchNorms as one autograd node: a layer, a residual block, the stem.

Forward writes each convolution's raw output once and reads it through BatchNorm and ReLU where the
next one needs it; backward masks, reduces and applies BatchNorm's backward as it reads. Kept for
backward are the input, the raw outputs and the block's output: nothing that is between them ("Deep
Residual Learning for Image Recognition", figures 2 and 5, in training; section 3.4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .. import backends
from ..ops import (
    _block_end,
    _convolution,
    _end_gradient,
    _finalize,
    _grad1x1,
    _results,
    _training,
    _training_cpu,
)
from . import _prepared
from . import _training_processes as _processes
from ._training_junction import End, Junction, is_watched
from ._training_plan import Layer, Made, Neighbours, Norm, Plan, Taken, thin, thinning

__all__ = ["Layer", "Neighbours", "Plan", "finish", "later", "run"]

Coefficients = tuple[Tensor, Tensor, Tensor]
PARAMETERS = 3
"""Of each layer: weight, gamma, beta."""


_WAITING: ContextVar[list[Callable[[], None]] | None] = ContextVar("_WAITING", default=None)
"""Where forward passes leave the update of their running statistics, inside of `later`."""


@contextlib.contextmanager
def later() -> Iterator[list[Callable[[], None]]]:
    """Has nodes put off the update of their running statistics.

    For parts of a block that are nodes of their own: out of memory in a later part must leave all
    of the block's statistics as they were.

    Yields:
        The updates, for `finish` when all parts have run.
    """
    waiting: list[Callable[[], None]] = []
    token = _WAITING.set(waiting)
    try:
        yield waiting
    finally:
        _WAITING.reset(token)


def finish(updates: list[Callable[[], None]]) -> None:
    """Updates running statistics, or leaves it to the `later` that this is inside of."""
    waiting = _WAITING.get()
    if waiting is not None:
        waiting += updates
        return
    for update in updates:
        update()


def frozen_rows(bn: nn.Module, like: Tensor) -> Tensor:
    """[4, K] of given statistics: scale, shift, mean, invstd."""
    return torch.stack(_prepared.rows(bn, _training.compute_dtype(like.dtype)))


def _cast(weight: Any, like: Tensor) -> Any:
    """A weight as a convolution of `like` takes it."""
    return weight if weight is None or weight.dtype is like.dtype else weight.to(like.dtype)


def updated(layer: Layer) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Running mean, variance and number of batches, where a forward pass updates them."""
    bn = layer.bn
    if not layer.live or not bn.training or bn.running_mean is None:
        return None
    if not bn.track_running_stats:  # turned off behind the constructor's back
        return None
    return bn.running_mean, bn.running_var, bn.num_batches_tracked


class _Forward:
    """One forward pass of a plan: what backward needs of it gathers here."""

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        parameters: tuple[Tensor | None, ...],
        neighbours: Neighbours,
    ) -> None:
        self.plan = plan
        self.x = x
        self.parameters = parameters
        self.neighbours = neighbours
        self.weights: list[Tensor] = []
        self.raw: list[Tensor] = []
        self.norms: list[Norm] = []
        self.taken: list[Taken] = []
        self.taps: Tensor | None = None
        self.ops = _training.table(x)

    def op(self, name: str, *arguments: Any) -> Any:
        return self.ops[name](*arguments)

    def finalized(
        self, layer: Layer, h: Tensor, norm: Tensor | None, given: Any, *affine: Tensor | None
    ) -> tuple[Any, Tensor, Norm]:
        """As `product`, whose launch makes the layer's norm too; its running statistics as well.

        Where others wait for the statistics of a whole block (`later`), these wait with them.
        """
        weight = _cast(given, h)
        running = None if _WAITING.get() is not None else updated(layer)
        eps, momentum = layer.bn.eps, layer.bn.momentum
        y, stats, rows, kept = self.op(
            _finalize.OP, h, norm, weight, *affine, *(running or (None, None, None)),
            *layer.geometry, eps, momentum,
        )  # fmt: skip
        if running is not None:
            self.taken.append(Taken(running, kept))
        count = y.numel() // max(1, y.shape[1])
        return weight, y, Norm(rows, count, None, stats if running is None else None)

    def product(self, layer: Layer, h: Tensor, norm: Tensor | None, given: Any) -> Any:
        """A convolution's weight as it takes it, raw output and, where it is live, statistics."""
        weight = _cast(given, h)
        if layer.live or norm is not None:
            return weight, *self.op("conv_bn_stats", h, norm, weight, *layer.geometry)
        return weight, _convolution.output(h, weight, *layer.geometry), None

    def convolve(self, layer: Layer, index: int, h: Tensor, norm: Tensor | None) -> None:
        given, gamma, beta = self.parameters[PARAMETERS * index :][:PARAMETERS]
        made = self.neighbours.made if index == 0 else None
        if norm is not None and not self.plan.folds:
            h, norm = self.op("bn_add_act", h, norm, None, None, 0, "relu"), None
        if self.plan.finalizes and layer.live and layer.group is None and made is None:
            weight, y, found = self.finalized(layer, h, norm, given, gamma, beta)
            self.norms.append(found)
            self.weights.append(weight)
            self.raw.append(y)
            return
        weight, y, stats = made or self.product(layer, h, norm, given)
        count = y.numel() // max(1, y.shape[1])
        if layer.live:
            total = None
            if layer.group is not None:
                stats, total = _processes.gathered(stats, count, layer.group)
            rows = self.op("bn_finalize", stats, total, gamma, beta, count, layer.bn.eps)
            self.norms.append(Norm(rows, count, total, stats))
        else:
            self.norms.append(Norm(frozen_rows(layer.bn, y), count, None, None))
        self.weights.append(weight)
        self.raw.append(y)

    def run(self, residual: Tensor | None) -> Tensor:
        """Its output; running statistics are as they were where it raises."""
        try:
            out = self.computed(residual)
        except BaseException:
            for taken in reversed(self.taken):
                taken.put_back()
            raise
        finish([self.update])
        return out

    def computed(self, residual: Tensor | None) -> Tensor:
        plan = self.plan
        h, norm = self.x, None
        for index, layer in enumerate(plan.layers):
            self.convolve(layer, index, h, norm)
            h, norm = self.raw[-1], self.norms[-1].rows
        last = len(plan.layers) - 1
        added, added_norm, offset = residual, None, 0
        if plan.projection is not None:
            self.convolve(plan.projection, last + 1, self.x, None)
            added, added_norm = self.raw[-1], self.norms[-1].rows
        elif plan.shortcut == "identity":
            added = self.x
        elif plan.shortcut == "padded":
            added, offset = self.x[:, :, :: plan.stride, :: plan.stride], plan.offset
        y, rows = self.raw[last], self.norms[last].rows
        if plan.window is not None:
            out, self.taps = self.op("bn_act_pool", y, rows, *plan.window)
        elif self.neighbours.weight is not None:
            weight = _cast(self.neighbours.weight, y)
            out, *rest = self.op(_block_end.OP, y, rows, added, added_norm, weight)
            self.neighbours.left = Made(weight, *rest)
        else:
            out = self.op("bn_add_act", y, rows, added, added_norm, offset, plan.act)
        if self.neighbours.leads:
            projected = None if added_norm is None else added
            self.neighbours.end = End(y, rows, projected, added_norm, Junction())
        return out

    def update(self) -> None:
        """Running statistics, when all memory has been had: out of memory leaves them as they were.

        A block that runs twice takes its batch in twice, as the modules would.
        """
        layers = [*self.plan.layers]
        if self.plan.projection is not None:
            layers.append(self.plan.projection)
        changed = [t for taken in self.taken for t in taken.tensors()]
        for layer, norm in zip(layers, self.norms, strict=True):
            running = updated(layer)
            if running is None or norm.stats is None:
                continue
            # Its own checks of them are the route's, made before anything was computed.
            self.op(
                "bn_update_stats", norm.stats, norm.total, *running, norm.count, layer.bn.momentum
            )
            changed += [t for t in running if t is not None]
        # What caches values made of these sees by their version that they are new.
        torch.autograd.graph.increment_version(changed)


class _Backward:
    """One backward pass of a plan, from what forward has kept."""

    def __init__(self, ctx: Any) -> None:
        self.plan: Plan = ctx.plan
        self.wants: tuple[bool, ...] = ctx.needs_input_grad[2:]
        count = len(self.plan.layers) + (self.plan.projection is not None)
        saved = list(ctx.saved_tensors)
        self.x, self.out, self.taps = saved[:3]
        parts = [saved[3 + count * part : 3 + count * (part + 1)] for part in range(5)]
        self.before: list[Tensor] = [] if is_watched(self.x) else saved[3 + count * 5 :]
        self.unites: bool = ctx.unites
        self.gives: Junction | None = ctx.gives
        self.gets: Junction | None = ctx.gets
        self.raw, self.rows, self.totals, cast, self.given = parts
        self.weights = [
            given if w is None else w for w, given in zip(cast, self.given, strict=True)
        ]
        self.counts: list[int] = ctx.counts
        self.dtypes: list[torch.dtype] = ctx.dtypes
        self.grads: list[Tensor | None] = [None] * (PARAMETERS * count)
        self.ops = _training.table(self.x)

    def op(self, name: str, *arguments: Any) -> Any:
        return self.ops[name](*arguments)

    def wants_parameter(self, index: int, which: int) -> bool:
        return self.wants[2 + PARAMETERS * index + which]

    def normalise(
        self, layer: Layer, index: int, sums: Tensor, every: Tensor | None, row: int
    ) -> Tensor:
        """The coefficients of the gradient of layer `index`'s raw output; gamma's and beta's."""
        coefficients, dgamma, dbeta = self.op(
            "bn_backward_finalize", sums, every, self.totals[index], self.rows[index],
            self.counts[index], row, not layer.live,
        )  # fmt: skip
        for which, grad in ((1, dgamma), (2, dbeta)):
            if self.wants_parameter(index, which):
                # BatchNorm's parameters may be of another dtype than its arithmetic.
                place = PARAMETERS * index + which
                dtype = self.dtypes[place]
                self.grads[place] = grad if grad.dtype is dtype else grad.to(dtype)
        return coefficients

    def applied(self, dz: Tensor, y: Tensor, coefficients: Tensor, dead: bool) -> Tensor:
        """The gradient of a raw output; over a dead `dz` where the C++ pass serves."""
        if not dead or not self.ops.is_body("bn_backward_apply"):
            return self.op("bn_backward_apply", dz, y, coefficients)
        _training_cpu.passes.bn_backward_apply_out(dz, y, coefficients, dz)
        return dz

    def merges(self, layer: Layer, weight: Tensor, read: Tensor, inner: bool) -> bool:
        """Whether one op makes both gradients of a layer that reads `read`."""
        found = _grad1x1.way(
            read.device, read.dtype, read.shape, weight.shape, layer.geometry,
            folds=self.plan.folds, masked=inner,
        )  # fmt: skip
        return found.merged

    def convolution(
        self,
        layer: Layer,
        index: int,
        dz: Tensor,
        coefficients: Tensor,
        *,
        dead: bool = False,
        addend: Tensor | None = None,
        addend_stride: int = 1,
        thinned: int = 1,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of layer `index`'s weight and input: (dz below, its sums).

        Where `dz` is dead, nobody reads it behind this layer: its memory may be used again.
        Of a 1x1 whose stride is `thinned` the gradient of the pixels is made that it read.
        """
        y: Tensor | None = self.raw[index]
        affine: Tensor | None = coefficients
        inner = 0 < index < len(self.plan.layers)
        needs_dx = inner or self.wants[0]
        needs_dw = self.wants_parameter(index, 0)
        if not self.plan.folds and (needs_dx or needs_dw):
            dz, y, affine = self.applied(dz, y, coefficients, dead), None, None
        below = self.raw[index - 1] if inner else None
        rows = self.rows[index - 1] if inner else None
        weight = self.weights[index]
        read = self.x if below is None else below
        layout = _results.wants_channels_last(read, weight)
        geometry = layer.geometry if thinned == 1 else thin(layer.geometry)
        ends = index == 0 and needs_dx and bool(self.before)
        both_here = needs_dx and needs_dw and not ends
        if both_here and self.ops.is_body("conv_bn_wgrad"):
            both = _training_cpu.gradients(
                dz, read[:, :, ::thinned, ::thinned], rows, weight, self.given[index], addend,
                addend_stride, layout, *geometry,
            )  # fmt: skip
            if both is not None:
                dx, sums, self.grads[PARAMETERS * index] = both
                return dx, sums
        if both_here and self.merges(layer, weight, read, inner):
            dx, sums, self.grads[PARAMETERS * index] = self.op(
                "conv_bn_grad1x1", dz, y, affine, read, rows, weight, addend, self.given[index],
                layout, addend_stride,
            )  # fmt: skip
            return dx, sums
        if ends and needs_dw and self.unites:
            dx, sums, self.grads[PARAMETERS * index] = self.op(
                _end_gradient.UNITED, dz, y, affine, weight, addend, self.x, *self.before,
                self.given[index], addend_stride,
            )  # fmt: skip
            return dx, sums
        size = [*read.shape[:2], *(-(-side // thinned) for side in read.shape[2:])]
        if needs_dw:
            read_rows = rows
            if inner and not self.plan.folds:
                read, read_rows = self.op("bn_add_act", below, rows, None, None, 0, "relu"), None
            self.grads[PARAMETERS * index] = self.op(
                "conv_bn_wgrad", dz, y, affine, read, read_rows, self.given[index], *layer.geometry
            )
            del read
        if not needs_dx:
            return None, None
        if ends:
            return self.op(
                _end_gradient.OP, dz, y, affine, weight, addend, self.x, *self.before,
                addend_stride, *layer.geometry,
            )  # fmt: skip
        return self.op(
            "conv_bn_dgrad", dz, y, affine, weight, addend, below, rows, size, layout,
            addend_stride, *geometry,
        )  # fmt: skip

    def run(self, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan = self.plan
        last = len(plan.layers) - 1
        y, rows = self.raw[last], self.rows[last]
        yd = rows_d = None
        if plan.projection is not None:
            yd, rows_d = self.raw[last + 1], self.rows[last + 1]
        if plan.window is not None:
            dz, sums = self.op("bn_act_pool_backward", dout, self.taps, y, rows, *plan.window)
        elif self.gets is not None and (left := self.gets.take(dout)) is not None:
            dz, sums = dout, left
        else:
            out = self.out
            dz, sums = self.op("bn_add_act_backward", dout, out, y, rows, yd, rows_d, plan.act)
        every = _processes.reduced(sums, plan.layers[last])
        shortcut, stride = self.through_shortcut(dz, sums, every)
        given = dz if plan.shortcut == "given" and self.wants[1] else None
        # What autograd has brought may be others' too: it is not written.
        ours = dz is not dout and given is None
        dead = ours and (shortcut is None or plan.projection is not None)
        for index in reversed(range(last + 1)):
            layer = plan.layers[index]
            if index < last:
                every = _processes.reduced(sums, layer)
            coefficients = self.normalise(layer, index, sums, every, 1)
            if index > 0:
                dz, sums = self.convolution(layer, index, dz, coefficients, dead=dead)
            else:
                dz, sums = self.convolution(
                    layer, index, dz, coefficients, dead=dead, addend=shortcut,
                    addend_stride=stride,
                )  # fmt: skip
                if self.gives is not None and self.before and dz is not None:
                    self.gives.leave(dz, sums)
            dead = True
        return (dz, given, *self.grads)

    def through_shortcut(
        self, ds: Tensor, sums: Tensor, every: Tensor | None
    ) -> tuple[Tensor | None, int]:
        """What the shortcut adds to the gradient of the input, and at which pixels."""
        plan = self.plan
        if plan.projection is not None:
            index = len(plan.layers)
            if plan.projection.group is not plan.layers[-1].group:
                every = _processes.reduced(sums, plan.projection)
            coefficients = self.normalise(plan.projection, index, sums, every, 2)
            stride = thinning(plan.projection.geometry, self.weights[index])
            dx, _ = self.convolution(plan.projection, index, ds, coefficients, thinned=stride)
            return dx, stride
        if not self.wants[0]:
            return None, 1
        if plan.shortcut == "identity":
            return ds, 1
        if plan.shortcut == "padded":
            return ds[:, plan.offset : plan.offset + self.x.shape[1]], plan.stride
        return None, 1


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        plan: Plan,
        neighbours: Neighbours,
        x: Tensor,
        residual: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        state = _Forward(plan, x, parameters, neighbours)
        out = state.run(residual)
        keeps_out = plan.act == "relu" and plan.shortcut != "none"
        ctx.save_for_backward(
            x,
            out if keeps_out else None,
            state.taps,
            *state.raw,
            *(norm.rows for norm in state.norms),
            *(norm.total for norm in state.norms),
            # Only what a cast made anew: two places would be two copies to whoever packs them.
            *(
                None if weight is given else weight
                for weight, given in zip(state.weights, parameters[::PARAMETERS], strict=True)
            ),
            *parameters[::PARAMETERS],
            *(() if neighbours.before is None else neighbours.before.tensors),
        )
        ctx.unites = neighbours.unites
        ctx.gives = None if neighbours.before is None else neighbours.before.junction
        ctx.gets = None if neighbours.end is None else neighbours.end.junction
        ctx.plan = plan
        ctx.counts = [norm.count for norm in state.norms]
        ctx.dtypes = [None if t is None else t.dtype for t in parameters]
        ctx.asked = backends.requested()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        # Behind forward's `with` block, or in autograd's own thread: what was asked for stands.
        name, source = ctx.asked
        asked = backends.backend(name) if source == "rf.backend" else contextlib.nullcontext()
        with asked:
            return (None, None, *_Backward(ctx).run(dout))


def run(
    plan: Plan,
    x: Tensor,
    residual: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    neighbours: Neighbours | None = None,
) -> Tensor:
    """Runs a plan, with autograd where a gradient is wanted.

    Args:
        plan: what to compute.
        x: [N, C, H, W], in the dtype of the arithmetic.
        residual: a given shortcut, or None.
        parameters: weight, gamma and beta of each layer, the projection's last; as the user holds
            them, so that each gradient comes in its parameter's dtype and strides.
        neighbours: of a block in a row of them; None for a node by itself.

    Returns:
        [N, K, P, Q].
    """
    neighbours = neighbours or Neighbours()
    if torch.is_grad_enabled():
        return _Node.apply(plan, neighbours, x, residual, *parameters)
    return _Forward(plan, x, parameters, neighbours).run(residual)
