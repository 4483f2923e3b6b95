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

from . import _checks


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


def _of_conv_dgrad(dy: Tensor, *rest: Any) -> Tensor:
    return empty_like(dy, rest[3], rest[4])


def _of_conv_wgrad(*rest: Any) -> Tensor:
    return torch.empty_like(rest[3])


def _of_bn_act(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class Form:
    """How an op's arguments, in the order of its schema, become those of a kernel's launch.

    Attributes:
        operands: names of the tensors that the kernel reads, and where they stand.
        options: the first of the arguments that say how: geometry, activation. The last ones.
        empty: makes the result, given all arguments.
    """

    operands: dict[str, int]
    options: int
    empty: Callable[..., Tensor]


FORMS = {
    "bn_act": Form({"x": 0, "scale": 1, "shift": 2, "residual": 3}, 4, _of_bn_act),
    "conv_bn_act": Form(
        {"x": 0, "weight": 1, "scale": 2, "shift": 3, "residual": 4}, 5, _of_conv_bn_act
    ),
    "conv_dgrad": Form({"dy": 0, "y": 1, "weight": 2, "scale": 3}, 6, _of_conv_dgrad),
    "conv_wgrad": Form({"dy": 0, "y": 1, "x": 2, "scale": 4}, 5, _of_conv_wgrad),
}


def body(op: str, launch: Callable[..., None]) -> Callable[..., Tensor]:
    """An implementation of an op, by a kernel that writes into its result.

    Args:
        op: a key of `FORMS`.
        launch: called as launch(*operands, result, *options).
    """
    form = FORMS[op]

    def run(*arguments: Any) -> Tensor:
        result = form.empty(*arguments)
        operands = [arguments[place] for place in form.operands.values()]
        launch(*operands, result, *arguments[form.options :])
        return result

    return run
