"""The results that ops allocate for their kernels, and which arguments those read.

Every kernel writes into a tensor that its op made here, so that the implementations agree in shape,
dtype and layout by construction; `body` makes an implementation of a kernel's launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _checks, _e4m3


def is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch's convolution takes `t` [N, C, H, W] for channels_last."""
    if t.is_contiguous():
        return False
    return t.is_contiguous(memory_format=torch.channels_last) or (
        t.shape[1] > 1 and t.stride(1) == 1
    )


def wants_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's output is channels_last: where x or weight is, as in PyTorch."""
    return is_channels_last(x) or is_channels_last(weight)


def empty_like(t: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised tensor of `shape` [N, C, H, W] with the dtype and on the device of `t`."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=form)


def _of_conv_bn_act(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    shape = _checks.conv_output_shape("conv_bn_act", x, weight, *rest[3:7])
    return empty_like(x, shape, wants_channels_last(x, weight))


def _of_conv_bn_act_fp8(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    shape = _checks.conv_output_shape("conv_bn_act_fp8", x, weight, *rest[3:7])
    form = torch.channels_last if wants_channels_last(x, weight) else torch.contiguous_format
    return torch.empty(shape, dtype=rest[-1], device=x.device, memory_format=form)


def _of_conv_dgrad(dy: Tensor, *rest: Any) -> Tensor:
    return empty_like(dy, rest[3], rest[4])


def _of_conv_wgrad(*rest: Any) -> Tensor:
    return torch.empty_like(rest[3])


def _of_bn_act(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _rows(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised per-channel values, in the dtype of the arithmetic on tensors like `like`."""
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=like.device)


def _of_conv_bn_stats(x: Tensor, norm: Tensor | None, weight: Tensor, *rest: Any) -> Any:
    shape = _checks.conv_output_shape("conv_bn_stats", x, weight, *rest[:4])
    y = empty_like(x, shape, wants_channels_last(x, weight))
    return y, _rows(x, 2, shape[1])


def _of_conv_bn_stats_finalize(x: Tensor, norm: Tensor | None, weight: Tensor, *rest: Any) -> Any:
    running_mean, geometry = rest[2], rest[5:9]
    y, stats = _of_conv_bn_stats(x, norm, weight, *geometry)
    rows = 0 if running_mean is None else 2
    kept = stats.new_empty((rows, stats.shape[1]), dtype=torch.float64)
    return y, stats, stats.new_empty((4, stats.shape[1])), kept


def _of_bn_finalize(stats: Tensor, *rest: Any) -> Tensor:
    return stats.new_empty((4, stats.shape[-1]))


def _of_bn_update_stats(*arguments: Any) -> None:
    """Nothing: it writes into arguments."""


def _of_bn_add_act(y: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(y)


def _of_bn_add_act_conv_stats(y: Tensor, *rest: Any) -> Any:
    out, weight = torch.empty_like(y), rest[3]
    return out, *_of_conv_bn_stats(out, None, weight, [1, 1], [0, 0], [1, 1], 1)


def _of_bn_add_act_backward(
    dout: Tensor, out: Tensor | None, y: Tensor, norm: Tensor, residual: Tensor | None, *rest: Any
) -> Any:
    return torch.empty_like(y), _rows(y, 2 if residual is None else 3, y.shape[1])


def _of_bn_backward_finalize(sums: Tensor, *rest: Any) -> Any:
    channels = sums.shape[1]
    return (
        sums.new_empty((3, channels)),
        sums.new_empty((channels,)),
        sums.new_empty((channels,)),
    )


def _of_conv_bn_dgrad(dz: Tensor, *rest: Any) -> Any:
    raw, input_size, channels_last = rest[4], rest[6], rest[7]
    dx = empty_like(dz, input_size, channels_last)
    return dx, _rows(dz, 0 if raw is None else 2, input_size[1])


def _of_conv_bn_dgrad_end(*rest: Any) -> Any:
    raw, residual = rest[6], rest[8]
    return torch.empty_like(raw), _rows(raw, 2 if residual is None else 3, raw.shape[1])


def _of_conv_bn_wgrad(*rest: Any) -> Tensor:
    return torch.empty_like(rest[5])


def _of_conv_bn_grad1x1(*rest: Any) -> Any:
    x, norm, parameter, channels_last = rest[3], rest[4], rest[7], rest[8]
    dx = empty_like(x, x.shape, channels_last)
    return dx, _rows(x, 0 if norm is None else 2, x.shape[1]), torch.empty_like(parameter)


def _of_conv_bn_grad1x1_end(*rest: Any) -> Any:
    return *_of_conv_bn_dgrad_end(*rest), torch.empty_like(rest[10])


def chain_wants_channels_last(x: Tensor, weight: Tensor, front_weight: Tensor | None) -> bool:
    """Whether the results of a `conv_chain` are: where x or a weight before `out` is."""
    front = front_weight is not None and is_channels_last(front_weight)
    return front or wants_channels_last(x, weight)


def _of_conv_chain(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    next_weight, front_weight, step = rest[7], rest[10], rest[14]
    layout = chain_wants_channels_last(x, weight, front_weight)
    n, _, h, w = x.shape
    out = empty_like(x, [n, weight.shape[0], -(-h // step), -(-w // step)], layout)
    filters = 0 if next_weight is None else next_weight.shape[0]
    return out, empty_like(x, [n, filters, h, w], layout)


def _of_bn_act_pool(y: Tensor, norm: Tensor, *rest: Any) -> Any:
    sizes = [
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in zip(y.shape[2:], *rest, strict=True)
    ]
    out = empty_like(y, [*y.shape[:2], *sizes], is_channels_last(y))
    return out, torch.empty_like(out, dtype=torch.uint8)


def _of_stem(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    stride, padding, *window = rest[3:8]
    shape = _checks.conv_output_shape("stem", x, weight, stride, padding, [1, 1], 1)
    sizes = [
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in zip(shape[2:], *window, strict=True)
    ]
    quantised = len(rest) > 8 and rest[8] is not None
    form = torch.channels_last if wants_channels_last(x, weight) else torch.contiguous_format
    dtype = _e4m3.E4M3 if quantised else weight.dtype
    return torch.empty([*shape[:2], *sizes], dtype=dtype, device=weight.device, memory_format=form)


def _of_head(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _of_bn_act_pool_backward(dout: Tensor, taps: Tensor, y: Tensor, *rest: Any) -> Any:
    return torch.empty_like(y), _rows(y, 2, y.shape[1])


@dataclass(frozen=True)
class Form:
    """How an op's arguments, in the order of its schema, become those of a kernel's launch.

    Attributes:
        operands: names of the tensors that the kernel reads, and where they stand.
        options: the first of the arguments that say how: geometry, activation. The last ones.
        empty: makes the result, or a tuple of results, given all arguments.
    """

    operands: dict[str, int]
    options: int
    empty: Callable[..., Any]


_END = {
    "dz": 0,
    "y": 1,
    "coefficients": 2,
    "weight": 3,
    "addend": 4,
    "out": 5,
    "raw": 6,
    "norm": 7,
    "residual": 8,
    "residual_norm": 9,
}
"""Of both ops that make the gradient behind a block's end."""
FORMS = {
    "bn_act": Form({"x": 0, "scale": 1, "shift": 2, "residual": 3}, 4, _of_bn_act),
    "conv_bn_act": Form(
        {"x": 0, "weight": 1, "scale": 2, "shift": 3, "residual": 4}, 5, _of_conv_bn_act
    ),
    "conv_bn_act_fp8": Form(
        {"x": 0, "weight": 1, "scale": 2, "shift": 3, "residual": 4}, 5, _of_conv_bn_act_fp8
    ),
    "conv_dgrad": Form({"dy": 0, "y": 1, "weight": 2, "scale": 3}, 6, _of_conv_dgrad),
    "conv_wgrad": Form({"dy": 0, "y": 1, "x": 2, "scale": 4}, 5, _of_conv_wgrad),
    "conv_bn_stats": Form({"x": 0, "norm": 1, "weight": 2}, 3, _of_conv_bn_stats),
    "conv_bn_stats_finalize": Form(
        {
            "x": 0,
            "norm": 1,
            "weight": 2,
            "gamma": 3,
            "beta": 4,
            "running_mean": 5,
            "running_var": 6,
            "num_batches_tracked": 7,
        },
        8,
        _of_conv_bn_stats_finalize,
    ),
    "bn_finalize": Form({"stats": 0, "total": 1, "gamma": 2, "beta": 3}, 4, _of_bn_finalize),
    "bn_update_stats": Form(
        {
            "stats": 0,
            "total": 1,
            "running_mean": 2,
            "running_var": 3,
            "num_batches_tracked": 4,
        },
        5,
        _of_bn_update_stats,
    ),
    "bn_add_act": Form({"y": 0, "norm": 1, "residual": 2, "residual_norm": 3}, 4, _of_bn_add_act),
    "bn_add_act_conv_stats": Form(
        {"y": 0, "norm": 1, "residual": 2, "residual_norm": 3, "weight": 4},
        5,
        _of_bn_add_act_conv_stats,
    ),
    "bn_add_act_backward": Form(
        {"dout": 0, "out": 1, "y": 2, "norm": 3, "residual": 4, "residual_norm": 5},
        6,
        _of_bn_add_act_backward,
    ),
    "bn_backward_finalize": Form(
        {"sums": 0, "all_sums": 1, "total": 2, "norm": 3}, 4, _of_bn_backward_finalize
    ),
    "bn_backward_apply": Form({"dz": 0, "y": 1, "coefficients": 2}, 3, _of_bn_add_act),
    "conv_bn_dgrad": Form(
        {"dz": 0, "y": 1, "coefficients": 2, "weight": 3, "addend": 4, "raw": 5, "norm": 6},
        9,
        _of_conv_bn_dgrad,
    ),
    "conv_bn_dgrad_end": Form(_END, 10, _of_conv_bn_dgrad_end),
    "conv_bn_wgrad": Form(
        {"dz": 0, "y": 1, "coefficients": 2, "x": 3, "norm": 4}, 6, _of_conv_bn_wgrad
    ),
    "conv_bn_grad1x1": Form(
        {"dz": 0, "y": 1, "coefficients": 2, "x": 3, "norm": 4, "weight": 5, "addend": 6},
        9,
        _of_conv_bn_grad1x1,
    ),
    "conv_bn_grad1x1_end": Form(_END, 11, _of_conv_bn_grad1x1_end),
    "conv_chain": Form(
        {
            "x": 0,
            "weight": 1,
            "scale": 2,
            "shift": 3,
            "residual": 4,
            "projected": 5,
            "projection_weight": 6,
            "projection_scale": 7,
            "projection_shift": 8,
            "next_weight": 9,
            "next_scale": 10,
            "next_shift": 11,
            "front_weight": 12,
            "front_scale": 13,
            "front_shift": 14,
        },
        15,
        _of_conv_chain,
    ),
    "bn_act_pool": Form({"y": 0, "norm": 1}, 2, _of_bn_act_pool),
    "bn_act_pool_backward": Form(
        {"dout": 0, "taps": 1, "y": 2, "norm": 3}, 4, _of_bn_act_pool_backward
    ),
    "stem": Form({"x": 0, "weight": 1, "scale": 2, "shift": 3, "input_norm": 4}, 5, _of_stem),
    "head": Form({"x": 0, "weight": 1, "bias": 2}, 3, _of_head),
}
FORMS["conv_chain_fp8"] = FORMS["conv_chain"]


def body(op: str, launch: Callable[..., None]) -> Callable[..., Any]:
    """An implementation of an op, by a kernel that writes into its result.

    Args:
        op: a key of `FORMS`.
        launch: called as launch(*operands, *results, *options).
    """
    form = FORMS[op]

    def run(*arguments: Any) -> Any:
        result = form.empty(*arguments)
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        operands = [arguments[place] for place in form.operands.values()]
        launch(*operands, *results, *arguments[form.options :])
        return result

    return run
