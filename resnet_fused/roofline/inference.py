"""FLOPs and bytes of ops and whole models, and the time that a machine needs for them at least.

The model of time is the roofline (Williams, Waterman, Patterson, Roofline: an insightful visual
performance model for multicore architectures, 2009): a kernel takes as long as its arithmetic or
its traffic, whichever is more. Every tensor is read and written once per kernel, whatever stays in
a cache; nothing is counted for launches. A multiply-add is two FLOPs; the arithmetic of BatchNorm,
ReLU and adds is not counted, their traffic is.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class ConvShape(Protocol):
    """What `conv_cost` reads of a case (see `resnet_fused.cases.ConvCase`)."""

    @property
    def input_shape(self) -> tuple[int, int, int, int]: ...  # noqa: D102
    @property
    def weight_shape(self) -> tuple[int, int, int, int]: ...  # noqa: D102
    @property
    def output_shape(self) -> tuple[int, int, int, int]: ...  # noqa: D102
    @property
    def stride(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def residual(self) -> bool: ...  # noqa: D102
    @property
    def act(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Cost:
    """Work of one or more kernels.

    Attributes:
        flops: floating-point operations, two per multiply-add.
        bytes: read and written.
    """

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        """The work of both."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """FLOPs per byte; inf without traffic."""
        return self.flops / self.bytes if self.bytes else math.inf

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The least time as one kernel.

        Args:
            peak_flops: FLOP/s that the machine reaches.
            bandwidth: bytes/s that it moves.

        Raises:
            ValueError: if one of them is not positive.
        """
        _check_positive("peak_flops", peak_flops)
        _check_positive("bandwidth", bandwidth)
        return max(self.flops / peak_flops, self.bytes / bandwidth)


@dataclass(frozen=True)
class LayerCost:
    """One operation of a model.

    Attributes:
        name: of the module that ran it.
        kind: "conv", "batch_norm", "relu", "add", "pool", "linear" or the op's own name.
        shape: of the output.
        eager: its work as a kernel of its own.
        fused: its work where BatchNorm, ReLU and the add go into the convolution before them: those
            have none, and the convolution reads the other operand of the add.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    eager: Cost
    fused: Cost

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.eager.flops // 2


@dataclass(frozen=True)
class ModelCost:
    """The operations of a model's forward pass in inference, in order of execution."""

    layers: tuple[LayerCost, ...]
    input_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def gmac(self) -> float:
        """Multiply-adds of convolutions and linear layers, in 1e9."""
        return sum(layer.macs for layer in self.layers) / 1e9

    @property
    def conv_outputs(self) -> int:
        """Elements that the convolutions write."""
        return sum(math.prod(layer.shape) for layer in self.layers if layer.kind == "conv")

    def cost(self, *, fused: bool) -> Cost:
        """The work of all layers."""
        return sum((self._of(layer, fused) for layer in self.layers), Cost(0, 0))

    def kernels(self, *, fused: bool) -> int:
        """How many layers have work of their own."""
        return sum(self._of(layer, fused).bytes > 0 for layer in self.layers)

    def seconds(
        self, peak_flops: float, bandwidth: float, *, fused: bool, per_kernel: float = 0.0
    ) -> float:
        """The least time of the whole model: the sum over its kernels.

        Args:
            peak_flops: FLOP/s that the machine reaches.
            bandwidth: bytes/s that it moves.
            fused: with or without BatchNorm, ReLU and adds in the convolutions.
            per_kernel: seconds added for each kernel.

        Raises:
            ValueError: if peak_flops or bandwidth is not positive.
        """
        times = (self._of(layer, fused).seconds(peak_flops, bandwidth) for layer in self.layers)
        return sum(times) + per_kernel * self.kernels(fused=fused)

    def to_dict(self) -> dict[str, Any]:
        """The whole table, ready for JSON."""
        total = {name: self.cost(fused=name == "fused") for name in ("eager", "fused")}
        return {
            "input_shape": list(self.input_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "gmac": self.gmac,
            "conv_outputs": self.conv_outputs,
            **{f"{name}_bytes": cost.bytes for name, cost in total.items()},
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "macs": layer.macs,
                    "eager_bytes": layer.eager.bytes,
                    "fused_bytes": layer.fused.bytes,
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        """A table of the layers that have work when fused, and the totals."""
        rows = [
            f"{'layer':32} {'kind':12} {'output':>20} {'GMAC':>8} {'eager MB':>9} {'fused MB':>9}"
        ]
        for layer in self.layers:
            rows.append(
                f"{layer.name:32} {layer.kind:12} {'x'.join(map(str, layer.shape)):>20} "
                f"{layer.macs / 1e9:8.3f} {layer.eager.bytes / 1e6:9.2f} "
                f"{layer.fused.bytes / 1e6:9.2f}"
            )
        eager, fused = self.cost(fused=False), self.cost(fused=True)
        rows.append(
            f"{'total':66} {self.gmac:8.3f} {eager.bytes / 1e6:9.2f} {fused.bytes / 1e6:9.2f}"
        )
        return "\n".join(rows)

    @staticmethod
    def _of(layer: LayerCost, fused: bool) -> Cost:
        return layer.fused if fused else layer.eager


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; accepted is a positive number")


def _touched(
    shape: Sequence[int], weight: Sequence[int], out: Sequence[int], stride: Sequence[int]
) -> int:
    """Elements of the input that a convolution reads: a stride beyond the filter skips pixels."""
    size = shape[0] * shape[1]
    for axis in (0, 1):
        step = stride[axis] if len(stride) > 1 else stride[0]
        full, taps = shape[2 + axis], weight[2 + axis]
        size *= min(full, out[2 + axis] * taps) if step > taps else full
    return size


def conv_cost(case: ConvShape, dtype: torch.dtype, *, fused: bool = True) -> Cost:
    """The work of one ``conv_bn_act``.

    Args:
        case: its sizes.
        dtype: of input, weight, residual and output.
        fused: as one kernel that reads input, weight, residual, and scale and shift in the
            accumulator's dtype, and writes the output; else as eager PyTorch's passes, with
            BatchNorm, add and ReLU each reading and writing the whole tensor.
    """
    x, weight, out = case.input_shape, case.weight_shape, case.output_shape
    size, y = dtype.itemsize, math.prod(out)
    moved = _touched(x, weight, out, case.stride) + math.prod(weight) + y
    if fused:
        moved += y if case.residual else 0
    else:
        moved += 2 * y + (3 * y if case.residual else 0) + (2 * y if case.act == "relu" else 0)
    return Cost(_conv_flops(case), moved * size + 2 * weight[0] * _vector(dtype))


def conv_dgrad_cost(case: ConvShape, dtype: torch.dtype) -> Cost:
    """The work of the gradient of a frozen ``conv_bn_act``'s input, as one kernel.

    It reads the result's gradient, for a ReLU the result, the weight, and scale in the
    accumulator's dtype, and writes the input's gradient, also where no output had read it.

    Args:
        case: the sizes of the forward call; its residual takes no part.
        dtype: of all tensors but scale.
    """
    x, weight, y = (math.prod(s) for s in (case.input_shape, case.weight_shape, case.output_shape))
    moved = y * (2 if case.act == "relu" else 1) + weight + x
    return Cost(_conv_flops(case), moved * dtype.itemsize + case.weight_shape[0] * _vector(dtype))


def conv_wgrad_cost(case: ConvShape, dtype: torch.dtype) -> Cost:
    """The work of the gradient of a frozen ``conv_bn_act``'s weight, as one kernel.

    It reads the result's gradient, for a ReLU the result, what the convolution reads of the input,
    and scale in the accumulator's dtype, and writes the weight's gradient. Partial sums are no part
    of it.

    Args:
        case: the sizes of the forward call; its residual takes no part.
        dtype: of all tensors but scale.
    """
    weight, y = math.prod(case.weight_shape), math.prod(case.output_shape)
    x = _touched(case.input_shape, case.weight_shape, case.output_shape, case.stride)
    moved = y * (2 if case.act == "relu" else 1) + weight + x
    return Cost(_conv_flops(case), moved * dtype.itemsize + case.weight_shape[0] * _vector(dtype))


def bn_act_cost(shape: Sequence[int], dtype: torch.dtype, *, residual: bool = False) -> Cost:
    """The work of one ``bn_act``: input, shortcut, scale and shift read, output written.

    Args:
        shape: [N, C, H, W].
        dtype: of input, residual and output; scale and shift are in the accumulator's dtype.
        residual: whether there is a shortcut.
    """
    moved = math.prod(shape) * (3 if residual else 2)
    return Cost(0, moved * dtype.itemsize + 2 * shape[1] * _vector(dtype))


def _conv_flops(case: ConvShape) -> int:
    return 2 * math.prod(case.output_shape) * math.prod(case.weight_shape[1:])


def _vector(dtype: torch.dtype) -> int:
    """Bytes of an element of scale and shift."""
    return max(dtype.itemsize, 4)


@dataclass
class _Layer:
    name: str
    kind: str
    shape: tuple[int, ...]
    flops: int
    eager: int
    fused: int


@dataclass
class _Chain:
    """Tensors that a convolution could still work on before it writes them.

    Held by identity, and kept alive so that no identity is given twice.
    """

    by_id: dict[int, tuple[Tensor, _Layer]] = field(default_factory=dict)

    def owner(self, t: Tensor) -> _Layer | None:
        return self.by_id[id(t)][1] if id(t) in self.by_id else None

    def put(self, t: Tensor, layer: _Layer) -> None:
        self.by_id[id(t)] = (t, layer)

    def end(self, t: Tensor) -> None:
        self.by_id.pop(id(t), None)


class _Counter(TorchDispatchMode):
    """Notes every op's elements moved; what does no work (views, allocation) is left out."""

    def __init__(self, name: Callable[[], str]) -> None:
        super().__init__()
        self.layers: list[_Layer] = []
        self._name, self._chain = name, _Chain()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func._schema.name.split("::")[-1]
        out = result[0] if isinstance(result, (tuple, list)) else result
        operands = [a for a in args if isinstance(a, Tensor)]
        if isinstance(out, Tensor) and operands and not _is_view(func) and out.dim() > 1:
            self._note(op.removesuffix("_"), args, operands, out)
        return result

    def _note(self, op: str, args: tuple[Any, ...], operands: list[Tensor], out: Tensor) -> None:
        y = out.numel()
        if op == "convolution":
            x, weight = operands[:2]
            moved = _touched(x.shape, weight.shape, out.shape, args[3]) + weight.numel() + y
            taps = (x if args[6] else out).numel() * weight[0].numel()
            self._chain.put(out, self._add("conv", out, 2 * taps, moved, moved))
        elif "batch_norm" in op:
            self._into_conv("batch_norm", out, operands[:1], 2 * y)
        elif op in ("relu", "add"):
            pixels = [t for t in operands if t.dim() > 1]
            self._into_conv(op, out, pixels, y + sum(t.numel() for t in pixels))
        elif op in ("addmm", "mm", "linear", "bmm"):
            left, right = operands[-2:] if op != "linear" else operands[:2]
            moved = left.numel() + right.numel() + y
            self._add("linear", out, 2 * y * left.shape[-1], moved, moved)
        else:
            pool = "pool" in op or op == "mean"
            moved = y + sum(t.numel() for t in operands)
            self._add("pool" if pool else op, out, 0, moved, moved)

    def _into_conv(self, kind: str, out: Tensor, operands: list[Tensor], moved: int) -> None:
        """Counts an op that a fused convolution absorbs, if its operand comes from one."""
        found = [(t, owner) for t in operands if (owner := self._chain.owner(t)) is not None]
        self._add(kind, out, 0, moved, 0 if found else moved)
        if not found:
            return
        mine, owner = found[0]
        owner.fused += sum(t.numel() for t in operands if t is not mine)
        for t, _ in found:
            self._chain.end(t)
        if kind != "relu":
            self._chain.put(out, owner)

    def _add(self, kind: str, out: Tensor, flops: int, eager: int, fused: int) -> _Layer:
        layer = _Layer(self._name(), kind, tuple(out.shape), flops, eager, fused)
        self.layers.append(layer)
        return layer


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


@contextlib.contextmanager
def _named(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yields what names the innermost module that runs."""
    stack = [""]
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda _m, _a, name=name: stack.append(name))
        )
        handles.append(
            module.register_forward_hook(lambda _m, _a, _y: stack.pop() and None, always_call=True)
        )
    try:
        yield lambda: stack[-1]
    finally:
        for handle in handles:
            handle.remove()


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have sizes only; the model's own are not copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


def model_cost(
    model: nn.Module, input_shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> ModelCost:
    """Counts a model's inference on tensors that have a size and no data.

    Args:
        model: plain modules (unfuse a fused model first: its convolutions run inside other ops).
            It is not run, changed or copied, apart from its sizes.
        input_shape: [N, C, H, W].
        dtype: what weights and activations would be stored in.

    Returns:
        One row per operation.

    Raises:
        ValueError: for an input_shape that is not made of positive ints, or a model that has
            convolutions of which none ran as PyTorch's own.
    """
    shape = tuple(input_shape)
    if not shape or not all(isinstance(v, int) and v > 0 for v in shape):
        raise ValueError(f"input_shape is {input_shape!r}; accepted are positive ints N, C, H, W")
    copied = _meta_copy(model)
    floating = next((p.dtype for p in copied.parameters() if p.is_floating_point()), dtype)
    with torch.no_grad(), _named(copied) as name, _Counter(name) as counter:
        copied(torch.empty(shape, device="meta", dtype=floating))
    convs = any(isinstance(m, nn.Conv2d) for m in copied.modules())
    if convs and not any(layer.kind == "conv" for layer in counter.layers):
        raise ValueError("model has convolutions but none ran as such; unfuse a fused model first")
    size = dtype.itemsize
    layers = tuple(
        LayerCost(
            layer.name,
            layer.kind,
            layer.shape,
            Cost(layer.flops, layer.eager * size),
            Cost(layer.flops, layer.fused * size),
        )
        for layer in counter.layers
    )
    return ModelCost(layers, shape, dtype)
