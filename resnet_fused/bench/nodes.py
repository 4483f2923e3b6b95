"""A model's training step as the kernels of its autograd nodes: blocks, stem, single layers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnet_fused.bench.subject import walk
from resnet_fused.cases import ConvCase
from resnet_fused.convert import fuse
from resnet_fused.nn import PaddedShortcut
from resnet_fused.nn._blocks import FusedBlock, FusedSequential, FusedStem, projection_of
from resnet_fused.ops import _end_gradient, _grad1x1
from resnet_fused.roofline import Kernel, node_kernels
from resnet_fused.roofline.training import thins
from resnet_fused.triton import _end_gradient as _between
from resnet_fused.triton import _grad1x1 as _rule
from resnet_fused.triton import _tiles

Merging = Callable[[ConvCase, bool], bool]
"""Whether one kernel makes both gradients of a convolution that may read another of its node."""
Ending = Callable[[ConvCase, bool, int], bool]
"""Whether a block's first convolution makes the gradient behind the end of the block before: its
sizes, whether that block has a projection, of how many rows and columns one has a shortcut's
gradient (0: none)."""


@dataclass(frozen=True)
class Node:
    """One autograd node.

    Attributes:
        name: of the block, or of the convolution that stands alone.
        layers: names of its convolutions, the projection's last.
        cases: their sizes.
        kernels: of a whole step, forward then backward.
        chain: how many of them stand one behind the other; a projection's is none of these.
    """

    name: str
    layers: tuple[str, ...]
    cases: tuple[ConvCase, ...]
    kernels: tuple[Kernel, ...]
    chain: int

    def inner(self, layer: int) -> bool:
        """Whether a convolution reads another one of the node."""
        return 0 < layer < self.chain

    def case_of(self, kernel: Kernel) -> ConvCase:
        """The sizes of a convolution as a kernel is called with them.

        Of a projection's input a node wants the gradient of the pixels alone that it reads.
        """
        case = self.cases[kernel.layer]
        if kernel.op == "conv_bn_dgrad" and kernel.layer >= self.chain and thins(case):
            return dataclasses.replace(case, h=case.p, w=case.q, stride=(1, 1))
        return case

    @property
    def addend_stride(self) -> int:
        """Of how many rows and columns of the input one has a gradient through a projection."""
        return next((case.stride[0] for case in self.cases[self.chain :] if thins(case)), 1)


def nodes(
    module: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    folds: bool = True,
    parameter: torch.dtype | None = None,
    merging: Merging | None = None,
    ending: Ending | bool = False,
    uniting: Ending | None = None,
) -> list[Node]:
    """The nodes of a training step, in order of execution.

    Args:
        module: plain modules.
        shape: of the input, [N, C, H, W].
        dtype: of the activations.
        folds: whether BatchNorm is applied as kernels read.
        parameter: dtype of the weights; that of the activations by default.
        merging: which 1x1 convolutions of stride 1 have both gradients made by one kernel. None: no
            one has.
        ending: which blocks in a row have the gradient between them made behind the earlier one's
            ReLU; True: all.
        uniting: of these, where one kernel makes both gradients of the 1x1 convolution as well.
            None: nowhere.
    """
    cases = {layer.name: layer for layer in walk(module, shape)}
    fused = fuse(module)
    names = {id(child): name for name, child in fused.named_modules()}
    found: dict[str, Node] = {}

    def add(name: str, convs: list[str], projection: str | None, **options: Any) -> None:
        inner = [cases[conv].case for conv in convs]
        if projection is not None:
            options["projection"] = cases[projection].case
        options["input_gradient"] = not cases[convs[0]].first
        every = [*convs, *([] if projection is None else [projection])]
        if folds and merging is not None:
            options["merged"] = [
                index
                for index, conv in enumerate(every)
                if not cases[conv].first
                and merges(cases[conv].case, merging, inner=0 < index < len(convs))
            ]
        kernels = node_kernels(inner, dtype, folds=folds, parameter=parameter, **options)
        sizes = tuple(cases[conv].case for conv in every)
        found[convs[0]] = Node(name, tuple(every), sizes, tuple(kernels), len(convs))

    ends = _ends(fused, cases, ending, uniting if folds else None) if ending else {}
    for name, child in fused.named_modules():
        if isinstance(child, FusedBlock):
            options = ends.get(name, {})
            convs = [f"{name}.{step.conv}".lstrip(".") for step in child.steps]
            downsample = child._modules.get("downsample")
            pair = None if downsample is None else projection_of(downsample)
            shortcut = "identity" if downsample is None else "given"
            if isinstance(downsample, PaddedShortcut):
                shortcut = "padded"
            if not child.residual:
                shortcut = "none"
            projection = None if pair is None else names[id(pair[0])]
            add(name, convs, projection, shortcut=shortcut, **options)
        elif isinstance(child, FusedStem):
            pool = child._modules.get("maxpool")
            stem = f"{name}.{child.stem.conv}".lstrip(".")
            add(
                stem, [stem], None, pooled=None if pool is None else _pooled(pool, cases[stem].case)
            )
    taken = {layer for node in found.values() for layer in node.layers}
    for name in cases:
        if name not in taken:
            add(name, [name], None)
    return [found[name] for name in cases if name in found]


def _ends(
    model: nn.Module, cases: Mapping[str, Any], ending: Ending | bool, uniting: Ending | None
) -> dict[str, dict[str, Any]]:
    """By block: what `node_kernels` is to know of the gradients behind its end and the one before.

    The block behind must be the next one, of the same stage or of the next, and add all of its
    input, by itself or through a projection, or nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(model):
        for (first, one), (second, other) in itertools.pairwise(row):
            if not isinstance(one, FusedBlock) or not isinstance(other, FusedBlock):
                continue
            shortcut = other._modules.get("downsample")
            if shortcut is not None and projection_of(shortcut) is None:
                continue
            projected = one._modules.get("downsample")
            has = projected is not None and projection_of(projected) is not None
            case = cases[f"{second}.{other.steps[0].conv}"].case
            step = int(other.residual)
            if shortcut is not None:
                below = cases[f"{second}.downsample.0"].case
                step = below.stride[0] if thins(below) else 1
            if ending is True or (callable(ending) and ending(case, has, step)):
                found.setdefault(first, {})["ended"] = True
                plain = _grad1x1.fits_geometry(
                    case.weight_shape, case.stride, case.padding, case.groups
                )
                united = uniting is not None and plain and uniting(case, has, step)
                found.setdefault(second, {}).update(before=has, united=united)
    return found


def _rows(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Modules that run one behind the other, by name: a network's stages together."""
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    joined: set[nn.Module] = set()
    for module in names:
        stages = [module] if isinstance(module, FusedSequential) else []
        if isinstance(module, FusedStem):
            parts = (module._modules.get(name) for name in module.stages)
            stages = [part for part in parts if isinstance(part, FusedSequential)]
        if joined.isdisjoint(stages):
            joined.update(stages)
            yield [
                (names[stage] + name, child)
                for stage in stages
                for name, child in stage.named_children()
            ]


def merges(case: ConvCase, merging: Merging, *, inner: bool) -> bool:
    """Whether a node has both gradients of a convolution made by one kernel.

    Args:
        case: its sizes.
        merging: which 1x1 convolutions do.
        inner: whether it reads another one of its node.
    """
    fits = _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups)
    return fits and merging(case, inner)


def by_triton(dtype: torch.dtype, limits: _tiles.Limits) -> Merging:
    """What Triton's kernels merge on a GPU.

    Args:
        dtype: of the activations.
        limits: the GPU's.
    """

    def merging(case: ConvCase, inner: bool) -> bool:
        sizes = case.n * case.h * case.w, case.k, case.c, dtype.itemsize
        return _rule.choose(*sizes, limits, masked=inner).config is not None

    return merging


def ends_by_triton(dtype: torch.dtype, limits: _tiles.Limits) -> Ending:
    """Which gradients between blocks Triton's kernels make behind a ReLU on a GPU.

    By the kernel of all three gradients too: `unites_by_triton` says where.

    Args:
        dtype: of the activations.
        limits: the GPU's.
    """
    merging, uniting = by_triton(dtype, limits), unites_by_triton(dtype, limits)

    def ending(case: ConvCase, projected: bool, added: int) -> bool:
        if uniting(case, projected, added):
            return True
        place = _place(case, dtype, projected, added)
        merged = merges(case, merging, inner=False)
        return _between.choose(
            case, dtype.itemsize, limits, projected=projected,
            added=_end_gradient.added_elements(place), merged=merged,
            less=_end_gradient.less_bytes(place, merged=merged),
        ).ended  # fmt: skip

    return ending


def unites_by_triton(dtype: torch.dtype, limits: _tiles.Limits) -> Ending:
    """Where one Triton kernel makes both gradients and the end between two blocks on a GPU.

    Args:
        dtype: of the activations.
        limits: the GPU's.
    """

    def uniting(case: ConvCase, projected: bool, added: int) -> bool:
        if not _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups):
            return False
        elements = _end_gradient.added_elements(_place(case, dtype, projected, added))
        size = dtype.itemsize
        return _between.unite(case, size, limits, projected=projected, added=elements).ended

    return uniting


def _place(case: ConvCase, dtype: torch.dtype, projected: bool, added: int) -> _end_gradient.Place:
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    return _end_gradient.Place(
        torch.device("meta"), dtype, case.input_shape, case.weight_shape, geometry, projected,
        added,
    )  # fmt: skip


def _pooled(pool: Any, case: ConvCase) -> tuple[int, ...]:
    n, k, h, w = case.output_shape
    step, window, pad = (
        value if isinstance(value, int) else value[0]
        for value in (pool.stride, pool.kernel_size, pool.padding)
    )
    return (n, k, *((side + 2 * pad - window) // step + 1 for side in (h, w)))


def traffic(found: Sequence[Node]) -> tuple[int, int]:
    """Bytes of all nodes' forward and backward kernels."""
    sums = [
        sum(k.cost.bytes for node in found for k in node.kernels if k.backward is backward)
        for backward in (False, True)
    ]
    return sums[0], sums[1]


def saved_bytes(found: Sequence[Node], dtype: torch.dtype) -> int:
    """Bytes of activations that backward needs: raw outputs, block outputs, the stem's taps.

    A node's input is the output of the one before it, and is counted there; the images are not.
    """
    total = 0
    for node in found:
        total += sum(math.prod(case.output_shape) for case in node.cases) * dtype.itemsize
        pool = [kernel for kernel in node.kernels if kernel.op == "bn_act_pool"]
        final = node.cases[node.chain - 1]
        if pool:
            # What bn_act_pool moves beside its input and two vectors: the result and the taps.
            size = math.prod(final.output_shape) * dtype.itemsize
            total += pool[0].cost.bytes - size - 2 * final.k * max(4, dtype.itemsize)
        elif len(node.layers) > 1:
            total += math.prod(final.output_shape) * dtype.itemsize
    return total
