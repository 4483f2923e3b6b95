"""The ops of inference that stand for several layers, as subjects: `stem`, `head`, `conv_chain`.

Eager's way is PyTorch's calls, one after the other. Images of bytes are normalised by it as image
pipelines do: to float32, times a factor, plus a summand, to the network's dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import numerics, ops, roofline
from resnet_fused.bench import fixed_kernels
from resnet_fused.bench.fixed_kernels import EPS, unit_statistics
from resnet_fused.bench.kinds import Function, Kind, Result, each
from resnet_fused.cases import ChainCase, ConvCase, HeadCase, StemCase
from resnet_fused.roofline import Cost

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Layer

IMAGES = ("same", "uint8")  # dtypes of the images that a stem is timed with
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class StemOperands:
    """Images [N, C, H, W], weight [K, C, R, S], scale and shift [K], input_norm [2, C] or None."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    norm: Tensor | None = None


@dataclass(frozen=True)
class HeadOperands:
    """x [N, C, H, W], weight [classes, C], bias [classes] or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class ChainOperands:
    """As `numerics.ChainOperands`: what the op takes, None where there is none."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None = None
    projected: Tensor | None = None
    projection_weight: Tensor | None = None
    projection_scale: Tensor | None = None
    projection_shift: Tensor | None = None
    next_weight: Tensor | None = None
    next_scale: Tensor | None = None
    next_shift: Tensor | None = None
    front_weight: Tensor | None = None
    front_scale: Tensor | None = None
    front_shift: Tensor | None = None

    @property
    def plain(self) -> numerics.ChainOperands:
        """As the oracle takes them."""
        return numerics.ChainOperands(**vars(self))

    def convolution(self, part: str) -> tuple[Any, Any, Any]:
        """Weight, scale and shift of one of `ChainCase.parts`, by its name."""
        if part == "first":
            return self.weight, self.scale, self.shift
        return getattr(self.plain, part)


# The stem.


def _stem_cases(layers: Sequence[Layer]) -> list[tuple[str, Any]]:
    """Where a network begins with convolution, BatchNorm, ReLU and the pooling by halves."""
    if not layers or not layers[0].first:
        return []
    layer, case = layers[0], layers[0].case
    made = [
        StemCase("", case.n, case.c, case.h, case.w, case.k, case.r, case.s, case.stride,
                 case.padding, images=images)
        for images in IMAGES
    ]  # fmt: skip
    halves = (case.n, case.k, (case.p + 1) // 2, (case.q + 1) // 2)
    pooled = [row for row in layer.behind if row.kind == "pool"]
    plain = case.dilation == (1, 1) and case.groups == 1 and case.act == "relu"
    if not plain or not pooled or tuple(pooled[0].shape) != halves:
        return []
    return [(layer.name, one) for one in made]


def _make_stem(make: Any, case: StemCase) -> StemOperands:
    x = make.pixels(*case.shape) if case.images == "uint8" else make.image(*case.shape)
    x = x.float() if case.images == "float32" else x
    weight = make.image(*case.weight_shape).mul_(math.prod(case.weight_shape[1:]) ** -0.5)
    norm = None
    if case.has_norm:
        found = ops.stem_input_norm(
            (MEAN * case.c)[: case.c], (STD * case.c)[: case.c], uint8=case.images == "uint8"
        )
        norm = found.to(make.device)
    scale, shift = make.affine(case.k)
    return StemOperands(x, weight, scale, shift, norm)


def _ours_stem(case: StemCase) -> Function:
    return lambda o: ops.stem(o.x, o.weight, o.scale, o.shift, o.norm, *case.geometry)


def _eager_bn(scale: Tensor, statistics: tuple[Tensor, Tensor], y: Tensor, shift: Tensor) -> Tensor:
    return F.batch_norm(y, *statistics, scale, shift, False, 0.0, EPS)


def normalised(o: StemOperands) -> Tensor:
    """What the convolution reads, in the weight's dtype: a pass for each step, as pipelines do."""
    if o.norm is None:
        return o.x.to(o.weight.dtype)
    a, b = (row.view(1, -1, 1, 1) for row in o.norm)
    return (o.x.float() * a + b).to(o.weight.dtype)


def _eager_stem(case: StemCase, like: StemOperands) -> Function:
    stride, padding, window, by, border = case.geometry
    statistics = unit_statistics(like.scale)

    def run(o: StemOperands) -> Tensor:
        y = F.conv2d(normalised(o), o.weight, None, stride, padding)
        y = F.relu_(_eager_bn(o.scale, statistics, y, o.shift))
        return F.max_pool2d(y, window, by, border)

    return run


def _bound_stem(case: StemCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    terms = (o.x, o.weight, o.scale, o.shift, o.norm, *case.geometry)
    bounds = [
        numerics.stem_bound(*terms, rounding=rounding, **sums) for rounding in numerics.ROUNDINGS
    ]
    # Libraries that fold take the shift as a bias in the tensors' dtype.
    u = numerics.unit_roundoff(o.weight.dtype)
    bound = torch.stack(bounds).amax(0) + u * o.shift.double().abs().view(1, -1, 1, 1)
    return numerics.stem_oracle(*terms), bound


def _stem_conv(case: StemCase) -> ConvCase:
    return ConvCase(
        "", case.n, case.c, case.h, case.w, case.k, case.r, case.s, case.stride, case.padding
    )


def _stem_passes(case: StemCase, dtype: torch.dtype) -> tuple[Cost, ...]:
    conv, size = _stem_conv(case), math.prod(case.shape)
    given = {"uint8": 1, "float32": 4}.get(case.images, dtype.itemsize)
    before = [given + 4, 8, 8, 4 + dtype.itemsize] if case.has_norm else []
    _, _, *pooling = case.geometry
    sides = zip((conv.p, conv.q), *pooling, strict=True)
    out = case.n * case.k * math.prod((n + 2 * pad - k) // by + 1 for n, k, by, pad in sides)
    pool = Cost(0, (math.prod(conv.output_shape) + out) * dtype.itemsize)
    passes = fixed_kernels._forward_passes(conv, dtype)
    return (*(Cost(0, each_byte * size) for each_byte in before), *passes, pool)


# The head.


def _head_case(layer: Layer) -> HeadCase | None:
    """Behind the last convolution: average pooling to one pixel and a linear layer."""
    kinds = {row.kind: row for row in layer.behind}
    n, c, h, w = layer.case.output_shape
    if "linear" not in kinds or "pool" not in kinds or kinds["pool"].shape != (n, c, 1, 1):
        return None
    return HeadCase("", n, c, h, w, kinds["linear"].shape[-1])


def _make_head(make: Any, case: HeadCase) -> HeadOperands:
    weight = make.image(case.classes, case.c, 1, 1).mul_(case.c**-0.5)
    bias = make.image(case.classes, 1, 1, 1).flatten() if case.bias else None
    return HeadOperands(
        make.image(*case.shape), weight.view(case.classes, case.c).contiguous(), bias
    )


def _eager_head(_case: HeadCase, _like: Any) -> Function:
    return lambda o: F.linear(F.adaptive_avg_pool2d(o.x, 1).flatten(1), o.weight, o.bias)


def _bound_head(_case: HeadCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    terms = (o.x, o.weight, o.bias)
    return numerics.head_oracle(*terms), numerics.head_bound(*terms, **sums)


def _head_passes(case: HeadCase, dtype: torch.dtype) -> tuple[Cost, ...]:
    whole = roofline.head_cost(case.shape, case.classes, dtype, bias=case.bias)
    size, mean = math.prod(case.shape) * dtype.itemsize, case.n * case.c * dtype.itemsize
    return Cost(0, size + mean), Cost(whole.flops, whole.bytes - size + mean)


# Chains.


def _chain_cases(layers: Sequence[Layer]) -> list[tuple[str, Any]]:
    """Each bottleneck's last convolution with the next one's first; and with the 3x3 in front."""
    blocks: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        block, _, name = layer.name.replace("downsample.0", "downsample").rpartition(".")
        blocks.setdefault(block, {})[name] = layer
    chained = [block for block in blocks.values() if _is_1x1(block.get("conv3"))]
    found = []
    for block, following in itertools.zip_longest(chained, chained[1:]):
        last = block["conv3"].case
        case = ChainCase("", last.n, last.c, last.h, last.w, last.k)
        if following is not None and _is_1x1(following["conv1"]):
            thinned = following["conv2"].case.stride[0] == 2 and "downsample" in following
            case = dataclasses.replace(
                case, m=following["conv1"].case.k, out_stride=2 if thinned else 1
            )
        if "downsample" in block:
            below = block["downsample"].case
            case = dataclasses.replace(case, projected=below.c, projection_stride=below.stride[0])
        name, middle = block["conv3"].name, block["conv2"].case
        found.append((name, case))
        if _is_3x3(middle):
            found.append((name, dataclasses.replace(case, front=middle.c)))
    return found


def _is_1x1(layer: Layer | None) -> bool:
    if layer is None:
        return False
    case = layer.case
    return (case.r, case.s, case.stride, case.groups) == (1, 1, (1, 1), 1)


def _is_3x3(case: ConvCase) -> bool:
    plain = (case.r, case.s, case.stride, case.dilation, case.padding, case.groups)
    return plain == (3, 3, (1, 1), (1, 1), (1, 1), 1)


def _make_chain(make: Any, case: ChainCase) -> ChainOperands:
    def convolution(filters: int, below: int, size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        weight = make.image(filters, below, size, size).mul_((below * size * size) ** -0.5)
        return weight, *make.affine(filters)

    none = (None, None, None)
    x, first = make.image(*case.input_shape), convolution(case.c, case.k)
    residual = None if case.projected else make.image(case.n, case.c, case.h, case.w)
    projected = make.image(*case.projected_shape) if case.projected else None
    return ChainOperands(
        x, *first, residual, projected,
        *(convolution(case.c, case.projected) if case.projected else none),
        *(convolution(case.m, case.c) if case.m else none),
        *(convolution(case.k, case.front, 3) if case.front else none),
    )  # fmt: skip


def _ours_chain(case: ChainCase) -> Function:
    options = {"projection_stride": case.projection_stride, "out_stride": case.out_stride}

    def run(o: ChainOperands) -> Any:
        found = ops.conv_chain(**vars(o), **options)
        return found if case.m else found[0]

    return run


def _eager_chain(case: ChainCase, like: ChainOperands) -> Function:
    # Statistics that make a BatchNorm of scale and shift hang on their number alone.
    o = like.plain
    counts = {len(s): s for s in (o.scale, o.next_scale, o.front_scale) if s is not None}
    statistics = {count: unit_statistics(scale) for count, scale in counts.items()}

    def conv(x: Any, weights: Any, stride: int = 1, padding: int = 0) -> Tensor:
        weight, scale, shift = weights
        y = F.conv2d(x, weight, None, stride, padding)
        return _eager_bn(scale, statistics[len(scale)], y, shift)

    def run(operands: ChainOperands) -> Any:
        o = operands.plain
        t = o.x if o.front_weight is None else F.relu_(conv(o.x, o.front, padding=1))
        shortcut = o.residual
        if o.projected is not None:
            shortcut = conv(o.projected, o.projection, case.projection_stride)
        out = F.relu_(conv(t, (o.weight, o.scale, o.shift)).add_(shortcut))
        stored = out[:, :, :: case.out_stride, :: case.out_stride]
        return stored if o.next_weight is None else (stored, F.relu_(conv(out, o.next)))

    return run


def _bound_chain(case: ChainCase, o: Any, index: int, **sums: Any) -> tuple[Tensor, Tensor]:
    strides = case.projection_stride, case.out_stride
    oracle = numerics.conv_chain_oracle(o.plain, *strides)[index]
    bound = numerics.conv_chain_bound(o.plain, *strides, rounding="parts", **sums)[index]
    assert oracle is not None
    assert bound is not None
    return oracle, bound


def _bound_out(case: ChainCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    return _bound_chain(case, o, 0, **sums)


def _bound_next(case: ChainCase, o: Any, **sums: Any) -> tuple[Tensor, Tensor]:
    return _bound_chain(case, o, 1, **sums)


def _chain_passes(case: ChainCase, dtype: torch.dtype) -> tuple[Cost, ...]:
    return tuple(one for part in case.parts for one in fixed_kernels._forward_passes(part, dtype))


KINDS: dict[str, Kind] = {
    "stem": Kind(
        StemCase,
        _stem_cases,
        _make_stem,
        _ours_stem,
        _eager_stem,
        (Result("y", _bound_stem),),
        lambda case, dtype: roofline.stem_cost(case, dtype),
        _stem_passes,
        arguments=lambda case: lambda o: (o.x, o.weight, o.scale, o.shift, o.norm, *case.geometry),
    ),
    "head": Kind(
        HeadCase,
        each(_head_case),
        _make_head,
        lambda case: lambda o: ops.head(o.x, o.weight, o.bias),
        _eager_head,
        (Result("logits", _bound_head),),
        lambda case, dtype: roofline.head_cost(case.shape, case.classes, dtype, bias=case.bias),
        _head_passes,
        arguments=lambda case: lambda o: (o.x, o.weight, o.bias),
    ),
    "conv_chain": Kind(
        ChainCase,
        _chain_cases,
        _make_chain,
        _ours_chain,
        _eager_chain,
        (Result("out", _bound_out), Result("next", _bound_next)),
        lambda case, dtype: roofline.conv_chain_cost(case, dtype),
        _chain_passes,
        arguments=lambda case: lambda o: (
            *vars(o).values(), case.projection_stride, case.out_stride, False
        ),
    ),
}  # fmt: skip
"""Op -> what the benchmark asks of it."""
