"""oneDNN on the CPU: BN folded into the convolution's weights, add and ReLU as its post-ops.

Folding is done in float64 and rounded once, packing is oneDNN's own. Both cost more than a small
convolution, so layers keep the result (`nn/_prepared.py`).

oneDNN's ReLU gives 0 for NaN, where PyTorch's keeps it. Its post-op is used only where no NaN can
arise: the input's largest magnitude, times the largest sum of |weights| of an output channel,
bounds every sum, and a bound far from overflow leaves no room for Inf or NaN. The bound carries
over from layer to layer, so the input is read (`largest`) once for several of them. Without such a
bound the convolution runs without the post-op and PyTorch's ReLU follows.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from .. import backends
from . import _convolution

# Sums below this can't overflow on the way, with room for rounding.
LARGEST = 1e37
MAX_SHAPES = 2

_MKLDNN = torch.ops.mkldnn
_UNARY = _MKLDNN._convolution_pointwise.default
_ADD = _MKLDNN._convolution_pointwise.binary
_ADD_ = _MKLDNN._convolution_pointwise_.binary
_ONEDNN_PICKS = (
    torch._C._ConvBackend.Mkldnn,
    torch._C._ConvBackend.MkldnnEmpty,
    torch._C._ConvBackend.Empty,
)

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]


class Folded:
    """A convolution with BN folded in, packed for the input shapes that come again.

    oneDNN's blocked layout depends on the input's shape, and weights in another shape's layout are
    reordered in every call. So a shape is packed for when it comes the second time in a row, the
    last `MAX_SHAPES` of them are kept, and till then oneDNN reorders the plain weights, as it does
    for PyTorch.

    Attributes:
        weight: scale * weight [K, C/groups, R, S], dtype of the activations, channels_last.
        bias: the shift [K], float32.
        add_bias: the shift in the activations' dtype, the only one that oneDNN's add takes.
        gain: the largest sum of |weights| of an output channel.
        offset: the largest |shift|.
        geometry: padding, stride, dilation (two ints each) and groups, in oneDNN's order.
    """

    __slots__ = (
        "_last",
        "_packs",
        "_served",
        "add_bias",
        "bias",
        "gain",
        "geometry",
        "offset",
        "weight",
    )

    def __init__(self, weight: Tensor, bias: Tensor, geometry: Geometry) -> None:
        stride, padding, dilation, groups = geometry
        self.weight = weight
        self.bias = bias
        self.add_bias = bias.to(weight.dtype)
        self.gain = weight.abs().sum((1, 2, 3), dtype=torch.float64).max().item()
        self.offset = bias.abs().max().item()
        self.geometry = (padding, stride, dilation, groups)
        self._packs: dict[torch.Size, Tensor] = {}
        self._last: torch.Size | None = None
        self._served: dict[torch.Size, bool] = {}

    def serves(self, x: Tensor) -> bool:
        """Whether PyTorch, too, gives a convolution of `x` [N, C, H, W] to oneDNN.

        It keeps small ones for a kernel of its own, which is faster there and errs less.
        """
        served = self._served.get(x.shape)
        if served is None:
            padding, stride, dilation, groups = self.geometry
            served = pytorch_agrees(x, self.weight, (stride, padding, dilation, groups))
            if len(self._served) >= 64:
                self._served.clear()
            self._served[x.shape] = served
        return served

    @property
    def tame(self) -> bool:
        """Whether weights and shift are finite."""
        return math.isfinite(self.gain) and math.isfinite(self.offset)

    def packed_for(self, shape: torch.Size) -> Tensor | None:
        """The weights packed for an input shape that oneDNN serves, or None."""
        return self._packs.get(shape)

    def weight_for(self, x: Tensor) -> Tensor:
        """The weights to use for `x` [N, C, H, W]: packed if its shape has come before."""
        shape = x.shape
        packed = self._packs.get(shape)
        if packed is not None:
            return packed
        if shape != self._last or x.shape[0] == 0:
            self._last = shape
            return self.weight
        packed = self.pack(shape)
        packs = dict(self._packs)  # replaced whole: other threads may be reading it
        while len(packs) >= MAX_SHAPES:
            del packs[next(iter(packs))]
        packs[shape] = packed
        self._packs = packs
        return packed

    def pack(self, shape: torch.Size) -> Tensor:
        """The weights in oneDNN's layout for an input shape [N, C, H, W], N > 0."""
        return _MKLDNN._reorder_convolution_weight(
            self.weight.contiguous(), *self.geometry, list(shape)
        )

    def run(
        self, x: Tensor, residual: Tensor | None, relu: bool, keep_nan: bool, give: bool = False
    ) -> Tensor:
        """Computes act(conv(x) + shift [+ residual]) with the folded weights.

        Args:
            x: [N, C, H, W] in the weights' dtype.
            residual: [N, K, P, Q] in the same dtype, or None.
            relu: whether a ReLU follows.
            keep_nan: apply the ReLU as PyTorch's own, because NaN may come.
            give: the residual may be overwritten, and is what comes back. For one that nobody else
                can see, such as the output of a block's own downsample: no fresh memory is written.

        Returns:
            [N, K, P, Q] in channels_last.
        """
        if x.shape[0] == 0:
            padding, stride, dilation, _ = self.geometry
            return fake_output(x, self.weight, stride, padding, dilation)
        weight = self.weight_for(x)
        if not weight.is_mkldnn:
            # Packed weights always give a channels_last result; plain ones give x's layout.
            x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                weight = self._for_adding(x, weight)
        return self.run_with(weight, x, residual, relu, keep_nan, give)

    def run_with(
        self,
        weight: Tensor,
        x: Tensor,
        residual: Tensor | None,
        relu: bool,
        keep_nan: bool,
        give: bool = False,
    ) -> Tensor:
        """`run` with the weights that were picked for `x`, N > 0."""
        post_relu = relu and not keep_nan
        if residual is None:
            attr = "relu" if post_relu else "none"
            y = _UNARY(x, weight, self.bias, *self.geometry, attr, [], None)
        else:
            unary = "relu" if post_relu else None
            tail = (weight, self.add_bias, *self.geometry, "add", 1.0, unary, [], None)
            residual = channels_last(residual)
            if not give and (self.geometry[3] > 1 or residual.is_contiguous()):
                # With groups PyTorch's out-of-place form adds after a rounding; with one channel or
                # one pixel PyTorch 2.11's fails. In place both are oneDNN's own.
                residual = channels_last(residual.clone())
                give = True
            y = _ADD_(residual, x, *tail) if give else _ADD(x, residual, *tail)
        return y.relu_() if relu and keep_nan else y

    def _for_adding(self, x: Tensor, weight: Tensor) -> Tensor:
        # PyTorch lets oneDNN add only where it is sure of channels_last: with packed weights, or
        # strides that are not contiguous as well (one channel, or one pixel, would be).
        if weight.is_mkldnn or (self.geometry[3] == 1 and not x.is_contiguous()):
            return weight
        return self.pack(x.shape)


@functools.cache
def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself.

    oneDNN emulates it on other AVX-512 machines, slower than float32 is; a post-op
    takes the registers that the emulation needs.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _unavailable(call: backends.Call) -> str | None:
    if call.device != "cpu":
        return f"x is on {call.device}"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN is not in this PyTorch, or switched off (torch.backends.mkldnn)"
    if call.grad:
        return "a gradient is wanted: folded weights have none"
    return None


def supports(call: backends.Call) -> str | None:
    """Why oneDNN does not serve the call in the dtype of its activations, or None."""
    reason = _unavailable(call)
    if reason is not None or call.dtype == torch.float32:
        return reason
    if call.dtype == torch.bfloat16:
        return None if native_bfloat16() else "this CPU has no bfloat16 instructions"
    return f"oneDNN's post-ops are used for float32 and bfloat16, x is {call.dtype}"


def supports_in_float32(call: backends.Call) -> str | None:
    """Why 16-bit activations are not widened for a float32 convolution, or None."""
    reason = _unavailable(call)
    if reason is not None or call.dtype == torch.float16:
        return reason
    if call.dtype == torch.bfloat16:
        return "this CPU multiplies bfloat16 itself" if native_bfloat16() else None
    return f"it is for 16-bit activations, x is {call.dtype}"


def pytorch_agrees(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether PyTorch would give this convolution to oneDNN as well."""
    stride, padding, dilation, groups = geometry
    picked = torch._C._select_conv_backend(
        x, weight, None, stride, padding, dilation, False, [0, 0], groups
    )
    return picked in _ONEDNN_PICKS


def shape_fits(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """False where oneDNN has been seen to err.

    With one channel and a filter larger than the image without its padding, such as 6x2 pixels and
    a 3x4 filter; and of the shapes that `_convolution.errs` names.
    """
    window = x.shape[1] > 1 or all(
        spread * (taps - 1) < size
        for size, taps, spread in zip(x.shape[2:], weight.shape[2:], dilation, strict=True)
    )
    return window and not _convolution.errs(x, weight, stride, padding, dilation)


class _Kept(NamedTuple):
    """What `fold_once` remembers of one weight tensor."""

    mark: tuple[Any, ...]
    storage: StorageWeakRef
    scale: Tensor
    shift: Tensor
    folded: Folded


_kept = WeakIdKeyDictionary()


def fold_once(
    weight: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, geometry: Geometry
) -> Folded:
    """`fold`, or what it gave for the same weight tensor the last time.

    The same means: the very tensor at the same version in the same memory, and equal scale, shift,
    dtype and geometry. As everywhere, a write through `.data` is not seen (docs/caching.md).
    """
    if weight.is_inference():  # no version to go by
        return fold(weight, scale, shift, dtype, geometry)
    storage = weight.untyped_storage()
    place = (weight._version, storage._cdata, weight.storage_offset(), weight.stride())
    flat = tuple(tuple(part) for part in geometry[:3])
    mark = (*place, dtype, flat, geometry[3])
    kept = _kept.get(weight)
    if (
        kept is not None
        and kept.mark == mark
        and torch.equal(kept.scale, scale)
        and torch.equal(kept.shift, shift)
    ):
        return kept.folded
    folded = fold(weight, scale, shift, dtype, geometry)
    _kept[weight] = _Kept(mark, StorageWeakRef(storage), scale.clone(), shift.clone(), folded)
    return folded


def forget(weight: Tensor | None) -> None:
    """Drops what `fold_once` remembers of a weight tensor."""
    if weight is not None:
        _kept.pop(weight, None)


def fold(
    weight: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, geometry: Geometry
) -> Folded:
    """Folds scale into the weights: in float64, rounded once to `dtype`.

    Args:
        weight: [K, C/groups, R, S], floating.
        scale: [K].
        shift: [K].
        dtype: dtype of the activations, float32 or bfloat16.
        geometry: stride, padding, dilation (two ints each) and groups.
    """
    folded = (weight.double() * scale.double().view(-1, 1, 1, 1)).to(dtype)
    bias = shift.float()
    return Folded(folded.contiguous(memory_format=torch.channels_last), bias, geometry)


def channels_last(t: Tensor) -> Tensor:
    """`t` [N, C, H, W] in channels_last, with the strides that oneDNN expects of it.

    With one channel or one pixel a tensor is channels_last with other strides, too, which PyTorch
    2.11 can't describe to oneDNN.
    """
    t = t.contiguous(memory_format=torch.channels_last)
    _, c, h, w = t.shape
    strides = (c * h * w, 1, w * c, c)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def largest(x: Tensor) -> float:
    """A bound on |x|, at most sqrt(numel) times too large; inf or nan where x is not finite.

    The root of the sum of squares: one read of x at the memory's speed, no write.
    """
    if x.dtype == torch.float32:
        # BLAS reads fastest, and wants the elements in one row.
        flat = None
        if x.is_contiguous(memory_format=torch.channels_last):
            flat = x.permute(0, 2, 3, 1).view(-1)
        elif x.is_contiguous():
            flat = x.view(-1)
        if flat is not None:
            return math.sqrt(torch.dot(flat, flat).item())
    return torch.linalg.vector_norm(x, dtype=torch.float32).item()


def run_in_float32(folded: Folded, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """A convolution of 16-bit activations in float32, rounded once at the end.

    Args:
        folded: weights folded in float32.
        x: [N, C, H, W], 16 bits.
        residual: [N, K, P, Q], 16 bits, or None.
        relu: whether a ReLU follows.

    Returns:
        [N, K, P, Q] in `x`'s dtype, channels_last.
    """
    wide = x.float()
    shortcut = None if residual is None else residual.float()
    bound = largest(wide) * folded.gain + folded.offset
    if shortcut is not None:
        bound += largest(shortcut)
    # The widened shortcut is ours to overwrite.
    y = folded.run(wide, shortcut, relu, not bound < LARGEST, give=True)
    return y.to(x.dtype)


def fake_output(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """An empty [N, K, P, Q] in channels_last, which is what oneDNN writes."""
    spatial = [
        (size + 2 * pad - dil * (kernel - 1) - 1) // st + 1
        for size, kernel, st, pad, dil in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    shape = [x.shape[0], weight.shape[0], *spatial]
    return x.new_empty(shape).to(memory_format=torch.channels_last)
