"""What a residual layer computes, as graphs for cuDNN's Python frontend.

Inference takes cuDNN's runtime fusion: a convolution with scale, bias, add and ReLU behind it. The
training patterns are those of its specialised engines: ConvBNfprop (BatchNorm and ReLU of the layer
before on the way in, statistics on the way out), DBARCS (two BatchNorms, add and ReLU in front of a
convolution with statistics), ConvBNwgrad and DgradDreluBNBwdWeight, whose last node the Python
frontend does not offer: its two sums stand as reductions. No pattern of cuDNN applies BatchNorm's
backward as a gradient's convolution reads, or adds a shortcut's gradient to its result: those are
graphs of their own before and behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16",
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """A tensor that a graph reads or writes.

    Attributes:
        handle: cuDNN's.
        shape: [N, C, H, W], [K, C, R, S], or [1, C, 1, 1] for a value a channel.
        dtype: of what is bound to it.
    """

    handle: Any
    shape: tuple[int, ...]
    dtype: torch.dtype


class Draft:
    """A graph under construction; every tensor is channels_last.

    Args:
        cudnn: the frontend's module.
        dtype: of activations and weights.
        narrow: intermediate values and vectors in that dtype too, as the specialised engines want.
        where: `handle=`, or `device_property=` to plan for a GPU that is not here.
    """

    def __init__(self, cudnn: Any, dtype: torch.dtype, narrow: bool = False, **where: Any) -> None:
        self.cudnn, self.dtype = cudnn, dtype
        self.vector_dtype = dtype if narrow else torch.float32
        self.graph = cudnn.pygraph(
            io_data_type=self.kind(dtype), intermediate_data_type=self.kind(self.vector_dtype),
            compute_data_type=self.kind(torch.float32), **where,
        )  # fmt: skip
        self.inputs: dict[str, Slot] = {}
        self.outputs: list[Slot] = []

    def kind(self, dtype: torch.dtype) -> Any:
        """The name that cuDNN has for a dtype."""
        return getattr(self.cudnn.data_type, _NAMES[dtype])

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Any:
        """An input of four dimensions."""
        slot_dtype = dtype or self.dtype
        handle = self.graph.tensor(
            name=name, dim=list(shape), stride=strides(shape), data_type=self.kind(slot_dtype)
        )
        self.inputs[name] = Slot(handle, tuple(shape), slot_dtype)
        return handle

    def vector(self, name: str, channels: int) -> Any:
        """An input with a value a channel."""
        return self.tensor(name, (1, channels, 1, 1), self.vector_dtype)

    def affine(self, t: Any, channels: int, scale: str = "scale", shift: str = "shift") -> Any:
        """BatchNorm as scale and shift, which become inputs of these names."""
        scaled = self.graph.scale(input=t, scale=self.vector(scale, channels))
        return self.graph.bias(input=scaled, bias=self.vector(shift, channels))

    def give(self, t: Any, shape: Sequence[int], dtype: torch.dtype | None = None) -> Any:
        """Makes a value an output."""
        slot_dtype = dtype or self.dtype
        t.set_output(True).set_data_type(self.kind(slot_dtype))
        t.set_dim(list(shape)).set_stride(strides(shape))
        self.outputs.append(Slot(t, tuple(shape), slot_dtype))
        return t

    def give_sums(self, t: Any, channels: int) -> None:
        """Sum and sum of squares of a channel become outputs, in float32."""
        for total in self.graph.genstats(input=t):
            self.give(total, (1, channels, 1, 1), torch.float32)


def strides(shape: Sequence[int]) -> list[int]:
    """Of [N, C, H, W] in channels_last."""
    _, c, h, w = shape
    return [c * h * w, 1, c * w, c]


def _geometry(case: Any) -> dict[str, list[int]]:
    return {
        "padding": list(case.padding), "stride": list(case.stride), "dilation": list(case.dilation)
    }  # fmt: skip


def conv_bn_act(d: Draft, case: Any) -> None:
    """act(scale * conv(x, weight) + shift [+ residual])."""
    x, weight = d.tensor("x", case.input_shape), d.tensor("weight", case.weight_shape)
    y = d.affine(d.graph.conv_fprop(image=x, weight=weight, **_geometry(case)), case.k)
    _finish(d, y, case, case.output_shape)


def bn_act(d: Draft, case: Any) -> None:
    """act(scale * x + shift [+ residual])."""
    _finish(d, d.affine(d.tensor("x", case.shape), case.c), case, case.shape)


def _finish(d: Draft, y: Any, case: Any, shape: Sequence[int]) -> None:
    if case.residual:
        y = d.graph.add(a=y, b=d.tensor("residual", shape))
    d.give(d.graph.relu(input=y) if case.act == "relu" else y, shape)


def _masked(d: Draft, case: Any) -> Any:
    """The product scale * dz; dz is dy where y passed the ReLU."""
    dz = d.tensor("dy", case.output_shape)
    if case.act == "relu":
        dz = d.graph.relu_backward(loss=dz, input=d.tensor("y", case.output_shape))
    return d.graph.scale(input=dz, scale=d.vector("scale", case.k)).set_data_type(d.kind(d.dtype))


def conv_dgrad(d: Draft, case: Any) -> None:
    """The gradient of x, with mask and scale as it reads."""
    _dgrad(d, case, _masked(d, case))


def conv_wgrad(d: Draft, case: Any) -> None:
    """The gradient of the weight, with mask and scale as it reads."""
    _wgrad(d, case, _masked(d, case))


def masked_gradient(d: Draft, case: Any) -> None:
    """The product scale * dz alone, where no engine takes it together with the convolution."""
    d.give(_masked(d, case), case.output_shape)


def plain_dgrad(d: Draft, case: Any) -> None:
    """The gradient of x, from scale * dz."""
    _dgrad(d, case, d.tensor("g", case.output_shape))


def plain_wgrad(d: Draft, case: Any) -> None:
    """The gradient of the weight, from scale * dz."""
    _wgrad(d, case, d.tensor("g", case.output_shape))


def _dgrad(d: Draft, case: Any, g: Any) -> None:
    weight = d.tensor("weight", case.weight_shape)
    d.give(d.graph.conv_dgrad(loss=g, filter=weight, **_geometry(case)), case.input_shape)


def _wgrad(d: Draft, case: Any, g: Any) -> None:
    x = d.tensor("x", case.input_shape)
    d.give(d.graph.conv_wgrad(image=x, loss=g, **_geometry(case)), case.weight_shape)


def conv_bn_stats(d: Draft, case: Any) -> None:
    """ConvBNfprop: conv(relu(scale * x + shift)), with sum and sum of squares of a channel."""
    x = d.graph.relu(input=d.affine(d.tensor("x", case.input_shape), case.c))
    _conv_with_sums(d, case, x)


def dual_bn_add_relu_conv_stats(d: Draft, case: Any) -> None:
    """DBARCS: z = relu(scale * x + shift + scale2 * residual + shift2), conv(z), its sums."""
    left = d.affine(d.tensor("x", case.input_shape), case.c)
    right = d.affine(d.tensor("residual", case.input_shape), case.c, "scale2", "shift2")
    z = d.give(d.graph.relu(input=d.graph.add(a=left, b=right)), case.input_shape)
    _conv_with_sums(d, case, z)


def _conv_with_sums(d: Draft, case: Any, x: Any) -> None:
    weight = d.tensor("weight", case.weight_shape)
    y = d.graph.conv_fprop(image=x, weight=weight, **_geometry(case))
    d.give(y, case.output_shape)
    d.give_sums(y, case.k)


def bn_relu_wgrad(d: Draft, case: Any) -> None:
    """ConvBNwgrad: the gradient of a weight whose input is relu(scale * x + shift)."""
    x = d.graph.relu(input=d.affine(d.tensor("x", case.input_shape), case.c))
    g = d.tensor("g", case.output_shape)
    d.give(d.graph.conv_wgrad(image=x, loss=g, **_geometry(case)), case.weight_shape)


def dgrad_relu_bn_sums(d: Draft, case: Any) -> None:
    """DgradDreluBNBwdWeight: dz = mask * conv^T(g, weight), and BatchNorm's two sums over it.

    x [N, C, H, W] is the raw output of the convolution before; its BatchNorm has `mean`, `invstd`,
    `gamma_below` and `beta_below`. Outputs: dz, sum dz, sum dz * xhat.
    """
    graph, shape, add = d.graph, case.input_shape, d.cudnn.reduction_mode.ADD
    g, weight = d.tensor("g", case.output_shape), d.tensor("weight", case.weight_shape)
    dx = graph.conv_dgrad(loss=g, filter=weight, **_geometry(case)).set_dim(list(shape))
    centred = graph.sub(a=d.tensor("x", shape), b=d.vector("mean", case.c))
    xhat = graph.mul(a=centred, b=d.vector("invstd", case.c))
    z = d.affine(xhat, case.c, "gamma_below", "beta_below")
    dz = graph.relu_backward(loss=dx, input=z)
    d.give(dz, shape)
    for term in (dz, graph.mul(a=dz, b=xhat)):
        d.give(graph.reduction(input=term, mode=add), (1, case.c, 1, 1), torch.float32)


def bn_relu(d: Draft, case: Any) -> None:
    """The input relu(scale * x + shift) alone, where no engine takes it with the convolution."""
    x = d.affine(d.tensor("x", case.input_shape), case.c)
    d.give(d.graph.relu(input=x), case.input_shape)


def conv_stats(d: Draft, case: Any) -> None:
    """A convolution of x as it is, with sum and sum of squares of a channel."""
    _conv_with_sums(d, case, d.tensor("x", case.input_shape))


def conv_stats_behind(d: Draft, case: Any) -> None:
    """The same of what the graph before wrote."""
    _conv_with_sums(d, case, d.tensor("g", case.input_shape))


def wgrad_behind(d: Draft, case: Any) -> None:
    """A weight's gradient, from scale * dz, of the stored relu(scale * x + shift)."""
    g = d.tensor("g", case.output_shape)
    h = d.tensor("h", case.input_shape)
    d.give(d.graph.conv_wgrad(image=h, loss=g, **_geometry(case)), case.weight_shape)


def bn_backward(d: Draft, case: Any) -> None:
    """BatchNorm's backward, A dz + B y + C."""
    shape, graph = case.output_shape, d.graph
    left = graph.scale(input=d.tensor("dz", shape), scale=d.vector("a", case.k))
    right = graph.scale(input=d.tensor("y", shape), scale=d.vector("b", case.k))
    total = graph.add(a=left, b=right)
    d.give(graph.bias(input=total, bias=d.vector("c", case.k)), shape)


def added(d: Draft, case: Any) -> None:
    """The shortcut's gradient added to what the graph before wrote."""
    shape = case.input_shape
    d.give(d.graph.add(a=d.tensor("g", shape), b=d.tensor("addend", shape)), shape)


def masked_sums(d: Draft, case: Any) -> None:
    """ReLU's mask and BatchNorm's two sums, over what the graph before wrote."""
    shape = case.input_shape
    _with_sums(d, d.tensor("g", shape), d.affine(d.tensor("x", shape), case.c), "x", shape)


def bn_add_act(d: Draft, case: Any) -> None:
    """A block's end: relu(scale * y + shift + residual)."""
    y = d.affine(d.tensor("y", case.shape), case.c)
    total = d.graph.add(a=y, b=d.tensor("residual", case.shape))
    d.give(d.graph.relu(input=total), case.shape)


def bn_add_act_backward(d: Draft, case: Any) -> None:
    """Its gradient behind the ReLU, and BatchNorm's two sums."""
    shape = case.shape
    _with_sums(d, d.tensor("dz", shape), d.tensor("out", shape), "y", shape)


def _with_sums(d: Draft, loss: Any, passed: Any, raw: str, shape: Sequence[int]) -> None:
    """Gives the masked gradient, its sum and that of its product with raw - mean."""
    graph, add = d.graph, d.cudnn.reduction_mode.ADD
    dz = d.give(graph.relu_backward(loss=loss, input=passed), shape)
    t = d.inputs[raw].handle if raw in d.inputs else d.tensor(raw, shape)
    centred = graph.sub(a=t, b=d.vector("mean", shape[1]))
    for term in (dz, graph.mul(a=dz, b=centred)):
        d.give(graph.reduction(input=term, mode=add), (1, shape[1], 1, 1), torch.float32)


Pattern = Callable[[Draft, Any], None]
KERNELS: dict[str, tuple[tuple[Pattern, ...], ...]] = {
    "conv_bn_act": ((conv_bn_act,),),
    "bn_act": ((bn_act,),),
    "conv_dgrad": ((conv_dgrad,), (masked_gradient, plain_dgrad)),
    "conv_wgrad": ((conv_wgrad,), (masked_gradient, plain_wgrad)),
}
"""Op -> ways to compute it, the best first; each way is graphs that run one after the other."""

TRAINING: dict[str, Pattern] = {
    "conv_bn_stats": conv_bn_stats,
    "dual_bn_add_relu_conv_stats": dual_bn_add_relu_conv_stats,
    "bn_relu_wgrad": bn_relu_wgrad,
    "dgrad_relu_bn_sums": dgrad_relu_bn_sums,
}
"""The patterns of training with batch statistics."""
NARROW = frozenset({"conv_bn_stats", "dual_bn_add_relu_conv_stats", "bn_relu_wgrad"})
"""Those whose engines keep intermediate values in 16 bits."""


@dataclass(frozen=True)
class Graph:
    """A pattern, and whether intermediate values are to be in 16 bits."""

    pattern: Pattern
    narrow: bool = False


Way = tuple[Graph, ...]


def _forward_ways(case: Any) -> list[Way]:
    if case.act != "relu":
        return [(Graph(conv_stats),)]
    apart = Graph(bn_relu), Graph(conv_stats_behind)
    return [(Graph(conv_bn_stats),), (Graph(conv_bn_stats, True),), apart]


def _input_ways(case: Any) -> list[Way]:
    first = Graph(bn_backward)
    if case.act != "relu":
        rest = (Graph(added),) if case.residual else ()
        return [(first, Graph(plain_dgrad), *rest)]
    if case.residual:
        return [(first, Graph(plain_dgrad), Graph(added), Graph(masked_sums))]
    return [(first, Graph(dgrad_relu_bn_sums)), (first, Graph(plain_dgrad), Graph(masked_sums))]


def _weight_ways(case: Any) -> list[Way]:
    first = Graph(bn_backward)
    if case.act != "relu":
        return [(first, Graph(plain_wgrad))]
    # Where no engine applies BatchNorm and ReLU as it reads, it reads what eager has stored.
    last = Graph(bn_relu_wgrad), Graph(bn_relu_wgrad, True), Graph(wgrad_behind)
    return [(first, one) for one in last]


_LIVE: dict[str, Callable[[Any], list[Way]]] = {
    "conv_bn_stats": _forward_ways,
    "conv_bn_dgrad": _input_ways,
    "conv_bn_wgrad": _weight_ways,
    "bn_add_act": lambda case: [(Graph(bn_add_act),)],
    "bn_add_act_backward": lambda case: [(Graph(bn_add_act_backward),)],
}
OPS = (*KERNELS, *_LIVE)
"""The ops that graphs are here for."""


def ways(op: str, case: Any, dtype: torch.dtype) -> list[Way]:
    """How an op can be computed, the best first; graphs of a way run one after the other.

    Args:
        op: of `OPS`.
        case: the call.
        dtype: of the activations; engines that keep 16 bits within are float16's.
    """
    if op in KERNELS:
        return [tuple(map(Graph, way)) for way in KERNELS[op]]
    found = _LIVE[op](case)
    return [
        way for way in found if dtype is torch.float16 or not any(graph.narrow for graph in way)
    ]


def bound(op: str, o: Any) -> dict[str, Tensor]:
    """A set of operands by the names that the graphs have for them.

    A convolution's graphs take scale, shift and mean of the BatchNorm below it, a block's end those
    of its own; a, b and c are the rows of BatchNorm's backward.

    Args:
        op: of `OPS`.
        o: operands.
    """
    given = {name: t for name, t in vars(o).items() if isinstance(t, Tensor)}
    if op in KERNELS:
        return given
    norm = given.get("norm" if op.startswith("conv") else "own")
    if norm is not None:
        scale, shift, mean, invstd = norm
        given |= {"mean": mean, "invstd": invstd, "scale": scale, "shift": shift}
        # DgradDreluBNBwdWeight wants gamma and beta beside mean and invstd.
        given |= {"gamma_below": scale / invstd, "beta_below": shift + mean * scale}
    if "coefficients" in given:
        given |= dict(zip("abc", given["coefficients"], strict=True))
    return given
