"""`stem`: a residual network's first layers as one op, from the image to the pooled activation.

    v   = rnd(a[c] * x + b[c])                          with `input_norm`, else x
    h   = rnd(relu(scale[k] * conv(v, weight)[k] + shift[k]))
    out = maxpool(h)

or, with `out_scale`, out = rnd(maxpool(h) / out_scale) in e4m3, of an h that is not rounded.

"Deep Residual Learning for Image Recognition", table 1: conv1, 7x7 with stride 2, and the 3x3 max
pooling with stride 2 in front of conv2_x. What the convolution writes is the network's second
largest tensor, and nobody else reads it. `input_norm` is what image pipelines do in a pass of their
own: bytes become numbers, less the mean, over the standard deviation. Padding is zero behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..triton import _limits, _tiles
from . import _autocast, _checks, _cuda_stem, _e4m3, _entering, _results, _training, _triton
from ._library import overload
from .bn_act_pool import check_pooling
from .conv_bn_act import _call as call_of_conv
from .conv_bn_act import _choose as choose_conv

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? input_norm, int[2] stride, "
    "int[2] padding, int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding, "
    "float? out_scale=None) -> Tensor"
)
Pair = int | Sequence[int]


def _read(x: Tensor, weight: Tensor, input_norm: Tensor | None) -> Tensor:
    """What the convolution reads [N, C, H, W], in the weight's dtype."""
    if input_norm is None:
        return x.to(weight.dtype)
    a, b = (_training.per_channel(row) for row in input_norm)
    return _training.fma(a, x.to(input_norm.dtype), b).to(weight.dtype)


def _composed(name: str | None, *arguments: Any) -> Tensor:
    """The layers one after the other; conv_bn_act by one implementation, or by its own choice."""
    x, weight, scale, shift, input_norm, stride, padding, *pool = arguments[:10]
    out_scale = arguments[10] if len(arguments) > 10 else None
    form = torch.channels_last if _results.wants_channels_last(x, weight) else None
    v = _read(x, weight, input_norm)
    geometry = (stride, padding, [1, 1], 1, "relu")
    if name is None:
        choice = choose_conv(v, weight, call_of_conv(v, None, "relu"), geometry)
        name = choice.implementation.name
    h = overload("conv_bn_act", name)(v, weight, scale, shift, None, *geometry)
    out = F.max_pool2d(h, *pool)
    if out_scale is not None:
        out = _e4m3.stored(out.float() / out_scale)
    return out.contiguous(memory_format=form or torch.contiguous_format)


def _reference(*arguments: Any) -> Tensor:
    return _composed("reference", *arguments)


def _parts(*arguments: Any) -> Tensor:
    return _composed(None, *arguments)


_entering.enter(
    "stem",
    SCHEMA,
    _reference,
    _parts,
    "_stem_checks",
    kernel="Triton, image to pooled activation in one kernel",
    by="conv_bn_act by the fastest that serves it, then PyTorch's pooling",
    roundings=("fused", "parts", "stored_conv"),
    # In front of Triton's where no record says otherwise: docs/stem.md predicts less time for it.
    cuda=_entering.Cuda(
        "hand-written CUDA, image to pooled activation in one kernel",
        _cuda_stem.supports,
        _cuda_stem.launch_stem,
        _cuda_stem.CHECKS,
        first=True,
    ),
)


def choose(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    pool: Sequence[list[int]],
    out_scale: float | None = None,
) -> backends.Choice:
    """The implementation for checked arguments, and why.

    A kernel that can't take these very sizes is left out, with its reason.

    Args:
        x: [N, C, H, W].
        weight: [K, C, R, S].
        stride: of the convolution, two ints.
        padding: likewise.
        pool: kernel, stride and padding of the pooling.
        out_scale: of a result in e4m3, or None.
    """
    call = backends.Call("stem", weight.device.type, weight.dtype, index=weight.device.index)
    choice = backends.choose(call)
    given = (x, weight, stride, padding, pool, out_scale)
    while (reason := unfit(*given, implementation=choice.implementation.name)) is not None:
        choice = backends.next_choice(call, choice, reason)
    return choice


def unfit(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    pool: Sequence[list[int]],
    out_scale: float | None = None,
    *,
    implementation: str = "triton",
) -> str | None:
    """Why no admitted configuration of a kernel takes a call, or None.

    The other arguments are those of `choose`.

    Args:
        x: see `choose`.
        weight: likewise.
        stride: likewise.
        padding: likewise.
        pool: likewise.
        out_scale: likewise.
        implementation: "triton" or "cuda"; any other one takes every call.
    """
    if implementation not in ("triton", "cuda"):
        return None
    if out_scale is not None and (reason := writes_no_e4m3(x.device)) is not None:
        return reason
    if implementation == "cuda":
        return _cuda_stem.unfit_stem(x, weight, stride, padding, pool, out_scale)
    from ..triton import _stem_tiles
    from ..triton._launch import precision

    sizes = _stem_tiles.sizes_of(
        x.shape, weight, stride, padding, pool, precision(weight.dtype), _stem_tiles.is_dense(x)
    )
    if isinstance(sizes, str):
        return sizes
    names = _triton.allowed("stem", weight.device)
    found = _stem_tiles.choose(sizes, _limits.limits(weight.device), names)
    return found if isinstance(found, str) else None


def writes_no_e4m3(device: torch.device) -> str | None:
    """Why the kernels write no e4m3 on a device, or None."""
    capability = _limits.limits(device).capability
    if capability >= _tiles.E4M3_CAPABILITY:
        return None
    return f"sm_{capability} converts nothing to e4m3, sm_{_tiles.E4M3_CAPABILITY} is the first"


def stem_input_norm(
    mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, *, uint8: bool = True
) -> Tensor:
    """The `input_norm` of `stem` that makes (x - mean) / std of an image.

    Args:
        mean: of each channel, of values from 0 to 1, as image pipelines give it.
        std: likewise.
        uint8: x holds bytes from 0 to 255; else values from 0 to 1.

    Returns:
        [2, C] float32: 1 / std and -mean / std, the former over 255 for bytes, computed in float64.

    Raises:
        ValueError: lengths differ, or a standard deviation is not positive and finite.

    Example:
        >>> norm = rf.ops.stem_input_norm([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    """
    rows = [torch.as_tensor(values, dtype=torch.float64) for values in (mean, std)]
    if rows[0].dim() != 1 or rows[0].shape != rows[1].shape or not rows[0].numel():
        raise ValueError(
            f"stem_input_norm: mean has shape {tuple(rows[0].shape)}, std {tuple(rows[1].shape)}; "
            "one value a channel is needed of each"
        )
    if not bool((rows[1] > 0).all() & rows[1].isfinite().all()):
        raise ValueError(f"stem_input_norm: std is {std!r}; positive numbers are accepted")
    factor = 1.0 / rows[1]
    return torch.stack((factor / 255 if uint8 else factor, -rows[0] * factor)).float()


def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    input_norm: Tensor | None = None,
    stride: Pair = 2,
    padding: Pair = 3,
    pool_kernel: Pair = 3,
    pool_stride: Pair = 2,
    pool_padding: Pair = 1,
    *,
    out_scale: float | None = None,
) -> Tensor:
    """Computes maxpool(relu(scale * conv(v, weight) + shift)), v = a * x + b with `input_norm`.

    Args:
        x: images [N, C, H, W]; uint8, float32 or the weight's dtype, any layout (fastest where the
            channels of a pixel are adjacent).
        weight: [K, C, R, S]; float32, bfloat16, float16 or float64. What the convolution reads and
            the result, but with `out_scale`, are of its dtype.
        scale: [K], gamma * invstd; used in float32 (float64 when `weight` is float64).
        shift: [K], beta - mean * scale; likewise.
        input_norm: [2, C], a factor and a summand a channel, used likewise; see `stem_input_norm`.
            The product and the sum are rounded once, to the weight's dtype. None: x itself, rounded
            to that; not for uint8.
        stride: of the convolution, an int or (vertical, horizontal), as are all that follow.
        padding: zeros on each side, behind `input_norm`.
        pool_kernel: the pooling's window, at most 255 taps.
        pool_stride: of the windows.
        pool_padding: at most half a window; no value, so never a maximum.
        out_scale: what a stored 1 of the result is worth, which is float8_e4m3fn then, rounded
            once and saturated at 448, as that of `conv_bn_act_fp8`. None: of the weight's dtype.

    Returns:
        [N, K, P, Q] in the weight's dtype, or float8_e4m3fn; channels_last where `x` or `weight`
        is. A window that holds a NaN gives NaN, as in torch. It has no derivative. Under autocast
        the weight is cast.

    Raises:
        RuntimeError: a gradient is wanted.
        TypeError: an argument has another type or dtype; uint8 without `input_norm`; `out_scale`
            with a weight in float64.
        ValueError: shapes, devices or windows do not fit; out_scale is not positive and finite.

    Example:
        >>> norm = rf.ops.stem_input_norm([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        >>> y = rf.ops.stem(images, conv1.weight, scale, shift, norm)
    """
    op = "stem"
    (weight,) = _autocast.cast(weight)
    weight = _checks.check_activation_tensor(op, "weight", weight)
    x = _check_images(x, weight, input_norm)
    stride, padding = (
        _checks.pair(op, "stride", stride, 1),
        _checks.pair(op, "padding", padding, 0),
    )
    conv = _checks.conv_output_shape(op, x, weight, stride, padding, [1, 1], 1)
    scale = _checks.check_channel_vector(op, "scale", scale, weight, weight.shape[0])
    shift = _checks.check_channel_vector(op, "shift", shift, weight, weight.shape[0])
    if input_norm is not None:
        input_norm = _check_input_norm(input_norm, weight)
    pool = check_pooling(op, conv[2:], pool_kernel, pool_stride, pool_padding, "pool_")
    if out_scale is not None:
        out_scale = _e4m3.check_scale(op, "out_scale", out_scale)
        if weight.dtype is torch.float64:
            raise TypeError(
                f"{op}: out_scale with a weight of float64; accepted are float32, bfloat16, float16"
            )
    _checks.no_derivative(op, x, weight, scale, shift)
    name = "reference"
    if not torch.compiler.is_compiling():
        name = choose(x, weight, stride, padding, pool, out_scale).implementation.name
    vectors = (scale, shift, input_norm)
    return overload(op, name)(x, weight, *vectors, stride, padding, *pool, out_scale)


def _check_images(x: object, weight: Tensor, input_norm: object) -> Tensor:
    """Checks the images against the weight; under autocast 16-bit ones are cast as it is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"stem: x must be a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"stem: x must have 4 dimensions, got {x.dim()} (shape {tuple(x.shape)})")
    if x.device != weight.device:
        raise ValueError(
            f"stem: x is on {x.device}, weight on {weight.device}; both must be on one"
        )
    halves = (torch.bfloat16, torch.float16)
    if x.dtype in halves and _autocast.dtype_for(x.device.type) is weight.dtype:
        x = x.to(weight.dtype)
    if x.dtype not in (torch.uint8, torch.float32, weight.dtype):
        raise TypeError(
            f"stem: x has dtype {x.dtype}; accepted are torch.uint8, torch.float32 and weight's "
            f"{weight.dtype}"
        )
    if x.dtype is torch.uint8 and input_norm is None:
        raise TypeError(
            "stem: x is uint8 without input_norm; give rf.ops.stem_input_norm(mean, std), or "
            "[2, C] of a factor and a summand a channel"
        )
    return x


def _check_input_norm(input_norm: object, weight: Tensor) -> Tensor:
    if not isinstance(input_norm, Tensor):
        raise TypeError(f"stem: input_norm must be a Tensor, got {type(input_norm).__name__}")
    if not input_norm.dtype.is_floating_point:
        raise TypeError(
            f"stem: input_norm has dtype {input_norm.dtype}; a floating-point dtype is needed"
        )
    if tuple(input_norm.shape) != (2, weight.shape[1]):
        raise ValueError(
            f"stem: input_norm has shape {tuple(input_norm.shape)}; (2, {weight.shape[1]}) is "
            "needed, a factor and a summand a channel"
        )
    if input_norm.device != weight.device:
        raise ValueError(
            f"stem: input_norm is on {input_norm.device}, weight on {weight.device}; both must be "
            "on one"
        )
    _checks.no_derivative("stem", input_norm)
    return input_norm.to(_training.compute_dtype(weight.dtype)).contiguous()
