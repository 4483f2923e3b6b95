"""What a layer derives from its parameters once and keeps: scale, shift, folded packed weights.

The values hang on the convolution that they came from, because a fused tree and the plain one share
it. They hold as long as their sources are the same memory at the same version: an optimiser step, a
`load_state_dict`, `.to()`, a training forward of the BatchNorm (which counts its batches) all show
there. A write through `.data` does not: call `rf.refresh(model)` after one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops import onednn

ATTRIBUTE = "_resnet_fused_cache"
VECTORS = "_resnet_fused_vectors"


_COUNTED: ContextVar[bool] = ContextVar("_COUNTED", default=False)


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """For who captures a step and gives what it writes new versions behind each replay."""
    token = _COUNTED.set(True)
    try:
        yield
    finally:
        _COUNTED.reset(token)


class Snapshot:
    """Some of a layer's tensors as they were: memory, place in it, version.

    The first is the weight if its layout matters. Storages are held weakly, so that no address
    comes again while this one is remembered. The comparison is part of each forward, so it goes
    straight to the modules' dictionaries: `nn.Module.__getattr__` would take longer.
    """

    __slots__ = ("_absent", "_marks", "_storages", "_strides")

    def __init__(self, where: list[tuple[dict[str, Any], str]], strides: bool = True) -> None:
        self._marks: list[tuple[dict[str, Any], str, int, int, int]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []
        self._storages = []
        self._strides = where[0][0][where[0][1]].stride() if strides else None
        for slots, name in where:
            t = slots.get(name)
            if t is None:
                self._absent.append((slots, name))
                continue
            storage = t.untyped_storage()
            self._storages.append(StorageWeakRef(storage))
            mark = (slots, name, t._version, storage._cdata, t.storage_offset())
            self._marks.append(mark)

    def holds(self) -> bool:
        """Whether they are still the same memory at the same version."""
        for slots, name, version, storage, offset in self._marks:
            t = slots[name]
            if (
                t is None
                or t._version != version
                or t.untyped_storage()._cdata != storage
                or t.storage_offset() != offset
            ):
                return False
        for slots, name in self._absent:
            if slots.get(name) is not None:
                return False
        if self._strides is None:
            return True
        slots, name = self._marks[0][:2]  # the weight: vectors have no layout to change
        return slots[name].stride() == self._strides


class Entry(NamedTuple):
    """What a convolution keeps: the folded weights, and what they were made from.

    Attributes:
        options: dtype of the activations, eps, and the convolution's geometry.
        snapshot: the tensors.
        norm: type of the normalisation.
        frozen: whether that type ignores `training`.
        value: the weights; or, for a GPU's kernels, scale and shift.
    """

    options: tuple[Any, ...]
    snapshot: Snapshot
    norm: type[nn.Module]
    frozen: bool
    value: Any


class Cache:
    """The derived values of one convolution; a copy or a pickle of it starts empty.

    Attributes:
        entry: what is kept. Replaced whole: threads that race build it twice and agree.
        captured: values whose addresses CUDA graphs hold, which nobody tells when those end.
        trained: whether a graph was captured that may write what the values are made of and whose
            replays leave no versions behind (see `counted`): nothing is kept.
    """

    __slots__ = ("captured", "entry", "trained")

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.captured: list[Any] = []
        self.trained = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __copy__(self) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


def places(conv: nn.Module, bn: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where every tensor is that the derived values depend on; the convolution's weight first.

    A training forward writes running_mean without a new version, but counts in num_batches_tracked.
    """
    layer, norm, statistics = conv._parameters, bn._parameters, bn._buffers
    if "weight" not in norm:  # FrozenBatchNorm2d: four buffers
        norm = statistics
    return [
        (layer, "weight"),
        (layer, "bias"),
        (norm, "weight"),
        (norm, "bias"),
        (statistics, "running_mean"),
        (statistics, "running_var"),
        (statistics, "num_batches_tracked"),
    ]


def sources(conv: nn.Module, bn: nn.Module) -> list[Tensor | None]:
    """Every tensor that the derived values depend on."""
    return [slots.get(name) for slots, name in places(conv, bn)]


def scale_sources(bn: nn.Module) -> list[Tensor]:
    """The parameters that scale depends on: gamma."""
    weight = bn._parameters.get("weight")
    return [] if weight is None else [weight]


def drop(module: nn.Module) -> None:
    """Forgets what is kept on this module and those below it."""
    for child in module.modules():
        child.__dict__.pop(ATTRIBUTE, None)
        child.__dict__.pop(VECTORS, None)
        for parameter in child._parameters.values():
            onednn.forget(parameter)


def is_captured(t: Tensor) -> bool:
    """Whether what is computed on a tensor's device goes into a CUDA graph."""
    # Fake tensors may be on a GPU that is not there.
    return t.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def finish(t: Tensor) -> None:
    """Waits for what the current stream has to compute: whoever reads it next may be on another."""
    if t.is_cuda and torch.cuda.is_initialized():
        torch.cuda.current_stream(t.device).synchronize()


def before_a_step(conv: nn.Module, weight: Tensor) -> None:
    """Drops the vectors of a layer that a step is likely to follow, which may leave no version.

    Args:
        conv: the layer's convolution.
        weight: its weight; where it tells that the step goes into a graph, none are kept any more.
    """
    if is_captured(weight) and not _COUNTED.get():
        conv.__dict__.setdefault(VECTORS, Cache()).trained = True
    cache = conv.__dict__.get(VECTORS)
    if cache is not None:
        cache.entry = None


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
    scale, shift, _, _ = rows(bn, compute, conv.bias)
    return scale, shift


def rows(
    bn: nn.Module, compute: torch.dtype, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, shift, mean and invstd [K] of given statistics, as `affine` makes them.

    Args:
        bn: see `affine`.
        compute: see `affine`.
        bias: of the convolution in front, which goes into the shift alone.
    """
    invstd = (bn.running_var.double() + bn.eps).rsqrt()
    scale = (invstd if bn.weight is None else bn.weight.double() * invstd).to(compute)
    mean = bn.running_mean.double()
    centre = mean if bias is None else mean - bias.double()
    shift = -centre * scale.double()
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    return scale, shift.to(compute), mean.to(compute), invstd.to(compute)


def vectors(conv: nn.Conv2d, bn: nn.Module, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """`affine`, from the cache while its sources hold, unless a gradient flows into them.

    They take seven small kernels, which on a GPU cost more than the layer itself.
    """
    where = places(conv, bn)[1:]
    given = [slots.get(name) for slots, name in where]
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if grad or any(t is not None and t.is_inference() for t in given):
        if grad:
            before_a_step(conv, conv.weight)
        return affine(conv, bn, compute)
    options = (compute, bn.eps, conv.bias is None)
    cache = conv.__dict__.setdefault(VECTORS, Cache())
    entry, captured = cache.entry, is_captured(conv.weight)
    fresh = entry is not None and entry.options == options and entry.norm is type(bn)
    # A graph of a step reads what is there when it is replayed, as the modules would.
    anew = cache.trained or (captured and torch.is_grad_enabled())
    if fresh and not anew and entry.snapshot.holds():
        if captured and all(one is not entry.value for one in cache.captured):
            cache.captured.append(entry.value)
        return entry.value
    snapshot = Snapshot(where, strides=False)
    with torch.no_grad():
        value = affine(conv, bn, compute)
    if captured or cache.trained:
        return value  # in a graph it is computed by each replay, and never before the first
    finish(value[0])
    cache.entry = Entry(options, snapshot, type(bn), False, value)
    return value


def folded(
    conv: nn.Conv2d, bn: nn.Module, dtype: torch.dtype, storage: torch.dtype, frozen: bool
) -> onednn.Folded:
    """The layer's folded weights for oneDNN, from the cache while they hold.

    Args:
        conv: the convolution.
        bn: the normalisation behind it.
        dtype: dtype of the convolution.
        storage: dtype of the activations; autocast rounds the weights to it, so they are here.
        frozen: whether the normalisation's type ignores `training`.
    """
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    options: tuple[Any, ...] = (dtype, bn.eps, geometry)
    if storage != dtype:
        options = (*options, storage)
    cache = conv.__dict__.get(ATTRIBUTE)
    if cache is not None and cache.entry is not None:
        entry = cache.entry
        if entry.options == options and entry.norm is type(bn) and entry.snapshot.holds():
            return entry.value
    # Versions are read before the values: a write in between makes the entry stale, never wrong.
    inference = any(t is not None and t.is_inference() for t in sources(conv, bn))
    snapshot = None if inference else Snapshot(places(conv, bn))
    with torch.no_grad():
        scale, shift = affine(conv, bn, torch.float32)
        weight = conv.weight.detach()
        if storage != dtype:
            weight = weight.to(storage)
        value = onednn.fold(weight, scale, shift, dtype, geometry)
    if snapshot is not None:  # tensors made in inference mode have no version to go by
        if cache is None:
            cache = conv.__dict__.setdefault(ATTRIBUTE, Cache())
        cache.entry = Entry(options, snapshot, type(bn), frozen, value)
    return value
