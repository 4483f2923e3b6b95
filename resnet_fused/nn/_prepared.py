"""What a layer derives from its parameters once and keeps: scale, shift, folded packed weights.

The values hang on the convolution that they came from, because a fused tree and the plain one share
it. They hold as long as their sources are the same memory at the same version: an optimiser step, a
`load_state_dict`, `.to()`, a training forward of the BatchNorm (which counts its batches) all show
there. A write through `.data` does not: call `rf.refresh(model)` after one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops import onednn

ATTRIBUTE = "_resnet_fused_cache"


class Snapshot:
    """Tensors as they were: storages, held weakly so that no address is reused, and versions."""

    __slots__ = ("_marks", "_storages")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._storages = [
            None if t is None else StorageWeakRef(t.untyped_storage()) for t in tensors
        ]
        self._marks = [self._mark(t) for t in tensors]

    @staticmethod
    def _mark(t: Tensor | None) -> tuple[Any, ...] | None:
        if t is None:
            return None
        return t._version, t.untyped_storage()._cdata, t.storage_offset(), t.dtype

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether they are still the same memory at the same version."""
        return self._marks == [self._mark(t) for t in tensors]


class Cache:
    """The derived values of one convolution; a copy or a pickle of it starts empty."""

    __slots__ = ("entry",)

    def __init__(self) -> None:
        # One tuple, replaced whole: threads that race build it twice and agree.
        self.entry: tuple[Any, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __copy__(self) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


def sources(conv: nn.Module, bn: nn.Module) -> tuple[Tensor | None, ...]:
    """Every tensor that the derived values depend on.

    A training forward writes running_mean without a new version, but counts in num_batches_tracked.
    """
    # The dictionaries themselves: `nn.Module.__getattr__` is slow, and this runs in each forward.
    layer, norm, statistics = conv._parameters, bn._parameters, bn._buffers
    if "weight" not in norm:  # FrozenBatchNorm2d: four buffers
        norm = statistics
    return (
        layer["weight"],
        layer["bias"],
        norm["weight"],
        norm["bias"],
        statistics["running_mean"],
        statistics["running_var"],
        statistics.get("num_batches_tracked"),
    )


def drop(module: nn.Module) -> None:
    """Forgets what is kept on this module and those below it."""
    for child in module.modules():
        child.__dict__.pop(ATTRIBUTE, None)


def affine(conv: nn.Conv2d, bn: nn.Module, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """BatchNorm with given statistics as scale and shift, differentiable in its parameters.

    Args:
        conv: the convolution in front, whose bias goes into the shift.
        bn: BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d with running statistics.
        compute: float32 or float64; the square root and quotient are taken in float64 and rounded
            once, and the shift uses the rounded scale, so that its rounding cancels.

    Returns:
        scale [K] = gamma / sqrt(var + eps) and shift [K] = beta - (mean - bias) * scale.
    """
    invstd = (bn.running_var.double() + bn.eps).rsqrt()
    scale = (invstd if bn.weight is None else bn.weight.double() * invstd).to(compute)
    mean = bn.running_mean.double()
    if conv.bias is not None:
        mean = mean - conv.bias.double()
    shift = -mean * scale.double()
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    return scale, shift.to(compute)


def folded(conv: nn.Conv2d, bn: nn.Module, dtype: torch.dtype) -> onednn.Folded:
    """The layer's folded weights for oneDNN, from the cache while they hold.

    Args:
        conv: the convolution.
        bn: the normalisation behind it.
        dtype: dtype of the activations.
    """
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    options = (dtype, bn.eps, geometry)
    now = sources(conv, bn)
    cache = conv.__dict__.get(ATTRIBUTE)
    if cache is not None and cache.entry is not None:
        kept_options, kept, value = cache.entry
        if kept_options == options and kept.holds(now):
            return value
    # Versions are read before the values: a write in between makes the entry stale, never wrong.
    inference = any(t is not None and t.is_inference() for t in now)
    taken = None if inference else Snapshot(now)
    with torch.no_grad():
        scale, shift = affine(conv, bn, torch.float32)
        value = onednn.fold(conv.weight.detach(), scale, shift, dtype, geometry)
    if not inference:  # tensors made in inference mode have no version to go by
        if cache is None:
            cache = conv.__dict__.setdefault(ATTRIBUTE, Cache())
        cache.entry = (options, taken, value)
    return value
