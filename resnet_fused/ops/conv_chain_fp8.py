"""`conv_chain_fp8`: `conv_chain` on e4m3 operands, as its convolutions give it one by one.

    t    = q(relu(front_scale * conv3x3(x, front_weight) + front_shift) / front_out_scale), or x
    s    = residual, or  q((projection_scale * conv1x1(projected) + projection_shift) /
           residual_scale)
    out  = q(relu(scale * conv1x1(t, weight) + shift + residual_scale * s) / out_scale)
    next = q(relu(next_scale * conv1x1(out, next_weight) + next_shift) / next_out_scale)

q rounds to e4m3, to nearest even, and saturates. Everything that the convolutions would store is
rounded as they store it, the projection too, so that a chain gives what `conv_bn_act_fp8` gives one
after the other, bit for bit where sums are exact: whether layers are chained is a matter of
time, never of an engine's classes. Scales of tensors are in the scales of channels, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import _checks, _cuda, _cuda_chain_fp8, _e4m3, _results
from ._library import define, overload
from .conv_bn_act_fp8 import choose as choose_conv

OP = "conv_chain_fp8"
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor? projected, "
    "Tensor? projection_weight, Tensor? projection_scale, Tensor? projection_shift, "
    "Tensor? next_weight, Tensor? next_scale, Tensor? next_shift, Tensor? front_weight, "
    "Tensor? front_scale, Tensor? front_shift, int projection_stride, int out_stride, "
    "float residual_scale, float out_scale, float next_out_scale, float front_out_scale) "
    "-> (Tensor, Tensor)"
)
OPERANDS = 15
"""How many of the arguments are tensors or None."""


def _composed(name: str | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The convolutions one after the other, by one implementation or each by its own."""
    x, weight, scale, shift, residual, projected, p_weight, p_scale, p_shift = arguments[:9]
    n_weight, n_scale, n_shift, f_weight, f_scale, f_shift, p_stride, out_stride = arguments[9:17]
    residual_scale, out_scale, next_out_scale, front_out_scale = arguments[17:]
    layout = _results.chain_wants_channels_last(x, weight, f_weight)

    def conv(x: Tensor, weights: Sequence[Any], residual: Tensor | None = None, **how: Any) -> Any:
        geometry = ([how.get("stride", 1)] * 2, [how.get("padding", 0)] * 2, [1, 1], 1)
        scales = how.get("residual_scale", 1.0), how["out_scale"]
        options = (*geometry, how.get("act", "relu"), *scales, _e4m3.E4M3)
        by = name or choose_conv(x, weights[0], residual, options).implementation.name
        return overload("conv_bn_act_fp8", by)(x, *weights, residual, *options)

    if f_weight is not None:
        x = conv(x, (f_weight, f_scale, f_shift), padding=1, out_scale=front_out_scale)
    if projected is not None:
        residual = conv(
            projected, (p_weight, p_scale, p_shift),
            stride=p_stride, act="none", out_scale=residual_scale,
        )  # fmt: skip
    out = conv(
        x, (weight, scale, shift), residual, residual_scale=residual_scale, out_scale=out_scale
    )
    following = out.new_empty((out.shape[0], 0, *out.shape[2:]))
    if n_weight is not None:
        following = conv(out, (n_weight, n_scale, n_shift), out_scale=next_out_scale)
    if out_stride > 1:
        out = out[:, :, ::out_stride, ::out_stride]
    return _laid_out(out, layout), _laid_out(following, layout)


def _laid_out(t: Tensor, channels_last: bool) -> Tensor:
    """`t` with the very strides of `_results.empty_like`, and memory of its own."""
    made = _results.empty_like(t, t.shape, channels_last)
    return t if t.stride() == made.stride() else made.copy_(t)


def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _composed("reference", *arguments)


def _parts(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _composed(None, *arguments)


def _supports_e4m3(call: backends.Call) -> str | None:
    if call.dtype is not _e4m3.E4M3:
        return f"x has dtype {call.dtype}; accepted is {_e4m3.E4M3}"
    wanted = backends.requested()[0]
    return f"x is on {call.device}" if wanted in ("cpu", "cuda") and wanted != call.device else None


_fake = _results.FORMS[OP].empty
_cuda.declare(OP, SCHEMA, _fake, launch=_cuda_chain_fp8.launch, checks="_cuda_chain_fp8_checks")
define(f"{OP}.parts", SCHEMA, _parts, _fake)
define(f"{OP}.reference", SCHEMA, _reference, _fake)
backends.register(
    backends.Implementation(
        OP,
        "cuda",
        ("cuda",),
        "hand-written CUDA for sm_90a, all products of a tile of pixels while it is on the chip",
        _cuda.supports,
        "fused",
    )
)
backends.register(
    backends.Implementation(
        OP,
        "parts",
        ("cpu", "cuda"),
        "conv_bn_act_fp8 after conv_bn_act_fp8, each by the fastest that serves it",
        _supports_e4m3,
        "fused",
    )
)
backends.register(
    backends.Implementation(
        OP,
        "reference",
        ("reference",),
        "plain PyTorch in float32, any device: for agreement, not for speed",
        _supports_e4m3,
        "fused",
    )
)


def choose(arguments: tuple[Any, ...]) -> backends.Choice:
    """The implementation for checked arguments, in the schema's order, and why.

    The kernel is left out, with its reason, where it can't take these very sizes.
    """
    x = arguments[0]
    call = backends.Call(OP, x.device.type, x.dtype, residual=True, index=x.device.index)
    choice = backends.choose(call)
    while choice.implementation.name == "cuda":
        reason = _cuda_chain_fp8.unfit(arguments)
        if reason is None:
            break
        choice = backends.next_choice(call, choice, reason)
    return choice


def conv_chain_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    projected: Tensor | None = None,
    projection_weight: Tensor | None = None,
    projection_scale: Tensor | None = None,
    projection_shift: Tensor | None = None,
    projection_stride: int = 1,
    next_weight: Tensor | None = None,
    next_scale: Tensor | None = None,
    next_shift: Tensor | None = None,
    front_weight: Tensor | None = None,
    front_scale: Tensor | None = None,
    front_shift: Tensor | None = None,
    out_stride: int = 1,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    next_out_scale: float = 1.0,
    front_out_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Computes a block's last convolution with its shortcut and ReLU, and the next block's first.

    Args:
        x: [N, K, H, W], with a front [N, B, H, W]; e4m3, as are all activations and filters.
        weight: [C, K, 1, 1].
        scale: [C] float32: x's scale times weight's times gamma * invstd; so are the others.
        shift: [C] float32, as are the other shifts.
        residual: the shortcut [N, C, H, W]; this or `projected` is needed.
        projected: [N, D, P, Q] that the shortcut projects; its weight, scale and shift go with it.
        projection_weight: [C, D, 1, 1].
        projection_scale: [C].
        projection_shift: [C].
        projection_stride: of the projection; ceil(P / stride) is H, ceil(Q / stride) is W.
        next_weight: [M, C, 1, 1] of the convolution that reads `out`, or None.
        next_scale: [M], as is next_shift.
        next_shift: see there.
        front_weight: [K, B, 3, 3] of a convolution in front, stride 1, padding 1, with ReLU.
        front_scale: [K].
        front_shift: [K].
        out_stride: 2 to store the even rows and columns of `out` alone.
        residual_scale: what a stored 1 of the shortcut is worth, be it given or projected.
        out_scale: likewise of out.
        next_out_scale: likewise of next.
        front_out_scale: likewise of what the front makes.

    Returns:
        out [N, C, ceil(H / out_stride), ceil(W / out_stride)] and next [N, M, H, W] or None, in
        e4m3: what `conv_bn_act_fp8` gives layer by layer. They have no derivative.

    Raises:
        RuntimeError: a gradient is wanted.
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices, scales or options do not fit.

    Example:
        >>> out, after = rf.ops.conv_chain_fp8(x, w3, s3, b3, residual=r, next_weight=w1, ...)
    """
    _check_strides(projection_stride, out_stride)
    operands = _checked(
        (
            x, weight, scale, shift, residual, projected, projection_weight, projection_scale,
            projection_shift, next_weight, next_scale, next_shift, front_weight, front_scale,
            front_shift,
        ),
        projection_stride,
    )  # fmt: skip
    scales = _checked_scales(
        residual_scale=residual_scale, out_scale=out_scale, next_out_scale=next_out_scale,
        front_out_scale=front_out_scale,
    )  # fmt: skip
    arguments = (*operands, projection_stride, out_stride, *scales)
    name = "reference"
    if not torch.compiler.is_compiling():
        name = choose(arguments).implementation.name
    made = overload(OP, name)(*arguments)
    return made[0], None if next_weight is None else made[1]


def _checked_scales(**given: object) -> list[float]:
    return [_e4m3.check_scale(OP, name, value) for name, value in given.items()]


def _check_strides(projection_stride: object, out_stride: object) -> None:
    for name, value, most in (
        ("projection_stride", projection_stride, None), ("out_stride", out_stride, 2),
    ):  # fmt: skip
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 1 or (most is not None and value > most):
            accepted = "1 or more" if most is None else f"1 or {most}"
            raise ValueError(f"{OP}: {name} is {value!r}; {accepted} is accepted")


def _checked(operands: tuple[Any, ...], projection_stride: int) -> tuple[Any, ...]:
    """The tensors in the schema's order, checked; per-channel values contiguous."""
    x, weight, scale, shift, residual, projected, *projection = operands[:9]
    following, front = operands[9:12], operands[12:15]
    project = _together("projection", (projected, *projection))
    follow, fronted = _together("next", following), _together("front", front)
    if project == (residual is not None):
        given = "both were" if project else "neither was"
        raise ValueError(f"{OP}: {given} given; either residual or projected is accepted")
    _image("x", x, x)
    channels, made = x.shape[1], [x, *_nothing(14)]
    if fronted:
        made[12:15] = _layer("front_", front, x, channels, 3)
        channels = front[0].shape[0]
    made[1:4] = _layer("", (weight, scale, shift), x, channels, 1)
    shape = [x.shape[0], weight.shape[0], *x.shape[2:]]
    if residual is not None:
        made[4] = _image("residual", residual, x, shape)
    if project:
        made[5] = _image("projected", projected, x)
        made[6:9] = _layer("projection_", projection, x, projected.shape[1], 1)
        sides = [-(-side // projection_stride) for side in projected.shape[2:]]
        got = [projected.shape[0], projection[0].shape[0], *sides]
        if got != shape:
            raise ValueError(
                f"{OP}: projected and projection_weight make {tuple(got)}; the output's "
                f"{tuple(shape)} is needed"
            )
    if follow:
        made[9:12] = _layer("next_", following, x, weight.shape[0], 1)
    _checks.no_derivative(OP, *(t for t in made if t is not None))
    return tuple(made)


def _nothing(count: int) -> list[Any]:
    return [None] * count


def _together(name: str, given: Sequence[object]) -> bool:
    """Whether arguments that go together were given; all of them must be, or none."""
    there = [value is not None for value in given]
    if any(there) != all(there):
        raise ValueError(f"{OP}: of {name}'s arguments all or none must be given")
    return all(there)


def _image(name: str, t: object, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Checks a tensor of four dimensions in e4m3."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{OP}: {name} must be a Tensor, got {type(t).__name__}")
    if t.dtype is not _e4m3.E4M3:
        raise TypeError(f"{OP}: {name} has dtype {t.dtype}; accepted is float8_e4m3fn")
    if t.dim() != 4 or (shape is not None and list(t.shape) != list(shape)):
        wanted = "4 dimensions" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{OP}: {name} has shape {tuple(t.shape)}; {wanted} is needed")
    if t.device != x.device:
        raise ValueError(f"{OP}: {name} is on {t.device}, x on {x.device}; both must be on one")
    return t


def _layer(prefix: str, given: Sequence[Any], x: Tensor, channels: int, size: int) -> list[Tensor]:
    """Checks a convolution's filters [., channels, size, size], its scale and its shift."""
    weight = _image(f"{prefix}weight", given[0], x)
    if tuple(weight.shape[1:]) != (channels, size, size) or weight.shape[0] == 0:
        raise ValueError(
            f"{OP}: {prefix}weight has shape {tuple(weight.shape)}; [1 or more, {channels}, "
            f"{size}, {size}] is accepted"
        )
    vectors = [
        _checks.check_channel_vector(OP, f"{prefix}{name}", t, x, weight.shape[0])
        for name, t in zip(("scale", "shift"), given[1:], strict=True)
    ]
    return [weight, *vectors]
