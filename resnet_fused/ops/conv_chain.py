"""`conv_chain`: the end of a bottleneck block and the beginning of the next one as one op.

    t    = x, or with a front  rnd(relu(front_scale * conv3x3(x, front_weight) + front_shift))
    out  = rnd(relu(scale * conv1x1(t, weight) + shift + shortcut))
    next = rnd(relu(next_scale * conv1x1(out, next_weight) + next_shift))

The blocks are those of "Deep Residual Learning for Image Recognition", figure 5 and equations 1 and
2. Both convolutions behind the 3x3 are 1x1, so no pixel needs its neighbours: a kernel that holds a
tile of pixels makes `out` a few channels at a time, stores them, and multiplies them on while they
are in registers. `out`, the widest tensor of the network, is written once and read by nobody else
but the next shortcut.

What is rounded to the tensors' dtype: the front's result, `out`, which the next convolution reads
rounded, and `next`. Sums, scale, shift and a kernel's projected shortcut stay in float32; where
convolutions run one after the other, the projection is rounded as it is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tuned, backends
from ..cases import ChainCase
from ..triton import _limits
from . import (
    _admitted,
    _autocast,
    _chain_plan,
    _checks,
    _cuda_chain,
    _cuda_plan,
    _e4m3,
    _entering,
    _results,
    _triton,
    _tuned_calls,
)
from ._library import overload
from .conv_bn_act import _call as call_of_conv
from .conv_bn_act import _choose as choose_conv

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor? projected, "
    "Tensor? projection_weight, Tensor? projection_scale, Tensor? projection_shift, "
    "Tensor? next_weight, Tensor? next_scale, Tensor? next_shift, Tensor? front_weight, "
    "Tensor? front_scale, Tensor? front_shift, int projection_stride, int out_stride, "
    "bool reverse) -> (Tensor, Tensor)"
)
OPERANDS = 15
"""How many of the arguments are tensors or None."""


def _conv(name: str | None, *operands: Any, stride: int = 1, padding: int = 0, act: str) -> Tensor:
    """conv_bn_act by one implementation, or by the one that it would choose itself."""
    geometry = ([stride] * 2, [padding] * 2, [1, 1], 1, act)
    x, weight, residual = operands[0], operands[1], operands[4]
    if name is None:
        choice = choose_conv(x, weight, call_of_conv(x, residual, act), geometry)
        name = choice.implementation.name
    return overload("conv_bn_act", name)(*operands, *geometry)


def _composed(name: str | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The convolutions one after the other."""
    x, weight, scale, shift, residual, projected, p_weight, p_scale, p_shift = arguments[:9]
    n_weight, n_scale, n_shift, f_weight, f_scale, f_shift, p_stride, out_stride, _ = arguments[9:]
    layout = _results.chain_wants_channels_last(x, weight, f_weight)
    if f_weight is not None:
        x = _conv(name, x, f_weight, f_scale, f_shift, None, padding=1, act="relu")
    if projected is not None:
        residual = _conv(
            name, projected, p_weight, p_scale, p_shift, None, stride=p_stride, act="none"
        )
    out = _conv(name, x, weight, scale, shift, residual, act="relu")
    if n_weight is None:
        following = out.new_empty((out.shape[0], 0, *out.shape[2:]))
    else:
        following = _conv(name, out, n_weight, n_scale, n_shift, None, act="relu")
    if out_stride > 1:
        out = out[:, :, ::out_stride, ::out_stride]
    return _laid_out(out, layout), _laid_out(following, layout)


def _laid_out(t: Tensor, channels_last: bool) -> Tensor:
    """`t` with the very strides of `_results.empty_like`, of which one channel has two choices."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    strides = torch.empty(t.shape, device="meta", memory_format=form).stride()
    t = t.contiguous(memory_format=form)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _composed("reference", *arguments)


def _parts(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _composed(None, *arguments)


_entering.enter(
    "conv_chain",
    SCHEMA,
    _reference,
    _parts,
    "_chain_checks",
    kernel="Triton, both products of a tile of pixels while it is in registers",
    by="conv_bn_act after conv_bn_act, each by the fastest that serves it",
    roundings=("fused", "parts", "stored_conv"),
    # Behind Triton's: on the GPU that both are predicted for, an H200, that multiplies by wgmma,
    # and mma.sync reaches 0.63 of its rate.
    cuda=_entering.Cuda(
        "hand-written CUDA, all products of a tile of pixels while it is on the chip",
        _cuda_chain.supports,
        _cuda_chain.launch,
        "_cuda_chain_checks",
    ),
)


def choose(arguments: tuple[Any, ...]) -> backends.Choice:
    """The implementation for checked arguments, in the schema's order, and why.

    A kernel that can't take these very sizes is left out, with its reason.
    """
    x = arguments[0]
    call = backends.Call("conv_chain", x.device.type, x.dtype, residual=True, index=x.device.index)
    choice = backends.choose(call)
    while (reason := unfit(choice.implementation.name, arguments)) is not None:
        choice = backends.next_choice(call, choice, reason)
    return choice


def unfit(implementation: str, arguments: tuple[Any, ...]) -> str | None:
    """Why an implementation that serves such calls can't take this very one, or None.

    Args:
        implementation: its name.
        arguments: checked, in the schema's order.
    """
    kernels = {"cuda": _cuda_chain.unfit, "triton": _unfit_triton}
    if implementation not in kernels:
        return None
    return _tuned_calls.parts_win(implementation, arguments) or kernels[implementation](arguments)


def _unfit_triton(arguments: tuple[Any, ...]) -> str | None:
    """Why no admitted configuration of the Triton kernel takes a call, or None."""
    from ..triton import _chain_tiles

    x = arguments[0]
    names = _triton.allowed("conv_chain", x.device)
    sizes = _chain_tiles.sizes_of(
        x, arguments[1], arguments[5], arguments[9], arguments[12], arguments[16], "ieee"
    )
    found = _chain_tiles.choose(sizes, _limits.limits(x.device), names)
    return found if isinstance(found, str) else None


class Answer(NamedTuple):
    """What `serves` says of a call.

    Attributes:
        reason: why no kernel takes it as a whole, or None. The op serves it then by its parts.
        wins: whether a kernel takes it and is predicted to be faster than the parts.
        why: one sentence, with the prediction where there is one.
        gain: microseconds that it is predicted to save on an H200, or by what tuning measured; of
            several ways to cut a graph the one that saves most is the best.
    """

    reason: str | None
    wins: bool
    why: str
    gain: float = 0.0


def serves(case: ChainCase, dtype: torch.dtype, device: torch.device) -> Answer:
    """Whether one kernel would take a call with these sizes, and is expected to be worth it.

    For whoever rewrites a graph: two convolutions that stand behind each other are as right, and
    where this does not win, as fast.

    Args:
        case: sizes of the call; its name and tags mean nothing here.
        dtype: of the activations; e4m3 asks for `conv_chain_fp8`.
        device: that it would run on.
    """
    op = _op_of(dtype)
    call = backends.Call(op, device.type, dtype, residual=True, index=device.index)
    choice = backends.choose(call)
    misfit = None
    while choice.implementation.name in backends.GPU_BACKENDS:
        name = choice.implementation.name
        found = _predicted(name, case, dtype, device)
        if not isinstance(found, str):
            return _answered(found, _tuned_calls.of_chain(name, case, dtype, device))
        misfit = misfit or found
        choice = backends.next_choice(call, choice, found)
    if misfit is not None:
        return Answer(misfit, False, f"no configuration: {misfit}")
    refused = dict(choice.refused)
    reason = next((refused[name] for name in backends.GPU_BACKENDS if name in refused), None)
    reason = reason or choice.why
    return Answer(reason, False, f"no kernel: {reason}")


def _op_of(dtype: torch.dtype) -> str:
    return _cuda_chain.FP8 if dtype is _e4m3.E4M3 else "conv_chain"


def _answered(found: _chain_plan.Prediction, tuned: _tuned.Tuned | None) -> Answer:
    """What tuning measured, else the prediction."""
    if tuned is None:
        return Answer(None, found.gain > 0, str(found), found.gain)
    wins = tuned.configuration != _tuned_calls.PARTS
    return Answer(None, wins, tuned.why, found.measured(tuned.gain if wins else 1.0))


def _predicted(
    implementation: str, case: ChainCase, dtype: torch.dtype, device: torch.device
) -> _chain_plan.Prediction | str:
    """What an implementation's kernel is predicted to save, or why it can't take the case."""
    names = _admitted.names(_op_of(dtype), implementation, device)
    if implementation == "cuda":
        return _chain_plan.predict_cuda(case, dtype, _cuda_plan.gpu(device), names)
    return _chain_plan.predict(case, dtype, _limits.limits(device), names)


def conv_chain(
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
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Computes a block's last convolution with its shortcut and ReLU, and the next block's first.

    All convolutions but the front's are 1x1, of one group, each followed by BatchNorm as scale and
    shift. Where no kernel takes the call, `conv_bn_act` runs one convolution after the other.

    Args:
        x: [N, K, H, W]; float32, bfloat16, float16 or float64, any layout (fastest in
            channels_last). With a front [N, B, H, W], what that reads.
        weight: [C, K, 1, 1], dtype of `x`, as are all activations and convolution weights.
        scale: [C], gamma * invstd; used in float32 (float64 when `x` is float64), as are the
            other scales and shifts.
        shift: [C], beta - mean * scale.
        residual: the shortcut [N, C, H, W], added before ReLU; this or `projected` is needed.
        projected: [N, D, P, Q] that the shortcut projects; `projection_weight`, `_scale` and
            `_shift` go with it. A kernel keeps the projection in float32; convolutions one after
            the other round it once.
        projection_weight: [C, D, 1, 1].
        projection_scale: [C].
        projection_shift: [C].
        projection_stride: of the projection; ceil(P / stride) is H, ceil(Q / stride) is W.
        next_weight: [M, C, 1, 1] of the convolution that reads `out`, rounded as it is stored;
            `next_scale` and `next_shift` go with it. None: there is none.
        next_scale: [M].
        next_shift: [M].
        front_weight: [K, B, 3, 3] of a convolution in front, stride 1, padding 1, with ReLU;
            `front_scale` and `front_shift` go with it. Its result is rounded to `x`'s dtype.
        front_scale: [K].
        front_shift: [K].
        out_stride: 1, or 2 to store the even rows and columns of `out` alone, where nobody but a
            convolution of stride 2 reads it. `next` has all pixels.
        reverse: walk over the batch from its end: what was written last is read first, out of the
            cache. Every result is the same.

    Returns:
        out [N, C, ceil(H / out_stride), ceil(W / out_stride)] and next [N, M, H, W] or None, in
        `x`'s dtype; channels_last where `x` or a weight before `out` is. They have no derivative.
        Under autocast activations and convolution weights are cast.

    Raises:
        RuntimeError: a gradient is wanted.
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.

    Example:
        >>> out, none = rf.ops.conv_chain(x, conv3.weight, scale, shift, residual=block_input)
    """
    arguments = _checked(
        (
            x, weight, scale, shift, residual, projected, projection_weight, projection_scale,
            projection_shift, next_weight, next_scale, next_shift, front_weight, front_scale,
            front_shift, projection_stride, out_stride, reverse,
        )
    )  # fmt: skip
    name = "reference"
    if not torch.compiler.is_compiling():
        name = choose(arguments).implementation.name
    out, following = overload("conv_chain", name)(*arguments)
    return out, None if next_weight is None else following


def _together(names: tuple[str, ...], given: tuple[object, ...]) -> bool:
    """Whether arguments that go together were given; all of them must be, or none."""
    missing = [name for name, value in zip(names, given, strict=True) if value is None]
    if missing and len(missing) < len(names):
        there = [name for name in names if name not in missing]
        raise ValueError(
            f"conv_chain: {', '.join(there)} came without {', '.join(missing)}; "
            "all of them or none is accepted"
        )
    return not missing


def _checked(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in the schema's order, checked, cast and per-channel values widened."""
    op = "conv_chain"
    x, weight, scale, shift, residual, projected, p_weight, p_scale, p_shift = arguments[:9]
    n_weight, n_scale, n_shift, f_weight, f_scale, f_shift, p_stride, *_ = arguments[9:]
    _check_options(*arguments[OPERANDS:])
    project = _together(
        ("projected", "projection_weight", "projection_scale", "projection_shift"),
        (projected, p_weight, p_scale, p_shift),
    )
    follow = _together(("next_weight", "next_scale", "next_shift"), (n_weight, n_scale, n_shift))
    front = _together(("front_weight", "front_scale", "front_shift"), (f_weight, f_scale, f_shift))
    if project == (residual is not None):
        given = "both were" if project else "neither was"
        raise ValueError(f"{op}: {given} given; either residual or projected is accepted")
    x, weight, residual, projected, p_weight, n_weight, f_weight = _autocast.cast(
        x, weight, residual, projected, p_weight, n_weight, f_weight
    )
    x = _checks.check_activation_tensor(op, "x", x)
    reads, whose = x.shape[1], "x"
    if front:
        f_weight = _weight("front_weight", f_weight, x, reads, whose, 3)
        f_scale, f_shift = _vectors("front_", f_scale, f_shift, x, f_weight)
        reads, whose = f_weight.shape[0], "front_weight's result"
    weight = _weight("weight", weight, x, reads, whose)
    scale, shift = _vectors("", scale, shift, x, weight)
    shape = [x.shape[0], weight.shape[0], *x.shape[2:]]
    if residual is not None:
        residual = _checks.check_like(op, "residual", residual, x, shape)
    if project:
        projected = _checks.check_like(op, "projected", projected, x, None)
        p_weight = _weight("projection_weight", p_weight, x, projected.shape[1], "projected")
        p_scale, p_shift = _vectors("projection_", p_scale, p_shift, x, p_weight)
        sides = [-(-side // p_stride) for side in projected.shape[2:]]
        made = [projected.shape[0], p_weight.shape[0], *sides]
        if made != shape:
            raise ValueError(
                f"{op}: projected {tuple(projected.shape)} and projection_weight "
                f"{tuple(p_weight.shape)} with projection_stride={p_stride} make {tuple(made)}; "
                f"the output's {tuple(shape)} is needed"
            )
    if follow:
        n_weight = _weight("next_weight", n_weight, x, weight.shape[0], "out")
        n_scale, n_shift = _vectors("next_", n_scale, n_shift, x, n_weight)
    checked = (
        x, weight, scale, shift, residual, projected, p_weight, p_scale, p_shift, n_weight,
        n_scale, n_shift, f_weight, f_scale, f_shift,
    )  # fmt: skip
    _checks.no_derivative(op, *(t for t in checked if t is not None))
    return (*checked, *arguments[OPERANDS:])


def _check_options(projection_stride: object, out_stride: object, reverse: object) -> None:
    for name, value, most in (
        ("projection_stride", projection_stride, None),
        ("out_stride", out_stride, 2),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 1 or (most is not None and value > most):
            accepted = "1 or more" if most is None else f"1 or {most}"
            raise ValueError(f"conv_chain: {name} is {value!r}; {accepted} is accepted")
    if not isinstance(reverse, bool):
        raise TypeError(f"conv_chain: reverse must be a bool, got {type(reverse).__name__}")


def _weight(
    name: str, weight: object, x: Tensor, channels: int, whose: str, size: int = 1
) -> Tensor:
    """Checks a convolution's weight [., channels, size, size] against what it reads."""
    weight = _checks.check_like("conv_chain", name, weight, x, None)
    if tuple(weight.shape[1:]) != (channels, size, size) or weight.shape[0] == 0:
        raise ValueError(
            f"conv_chain: {name} has shape {tuple(weight.shape)}; {whose} has {channels} "
            f"channels, so [1 or more, {channels}, {size}, {size}] is accepted"
        )
    return weight


def _vectors(
    prefix: str, scale: object, shift: object, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Checks the scale and shift of a convolution's output."""
    count = weight.shape[0]
    return (
        _checks.check_channel_vector("conv_chain", f"{prefix}scale", scale, x, count),
        _checks.check_channel_vector("conv_chain", f"{prefix}shift", shift, x, count),
    )
