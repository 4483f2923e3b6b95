"""The unfused computation in float64, and the small helpers that bounds and checks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = ("none", "relu")

IntPair = int | tuple[int, int] | Sequence[int]


def pair(value: IntPair) -> tuple[int, int]:
    """(vertical, horizontal) of an int or a pair."""
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


def channels(v: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A [C] vector as [1, C, 1, 1], to go with [N, C, H, W]."""
    return v.to(dtype).view(1, -1, 1, 1)


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raises ValueError, naming the argument, unless ``value`` is among the accepted."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")


def check_like(name: str, given: Tensor, other: str, expected: Sequence[int]) -> None:
    """Raises ValueError, naming both, unless ``given`` has the expected shape."""
    if tuple(given.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}; {other} asks for {tuple(expected)}"
        )


def conv_bn_act_oracle(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    act: str = "relu",
) -> Tensor:
    """``act(scale * conv(x, weight) + shift [+ residual])`` in float64, of the values given.

    Args:
        x: [N, C, H, W], any floating dtype.
        weight: [K, C / groups, R, S].
        scale: [K], what BatchNorm multiplies with: gamma / sqrt(var + eps).
        shift: [K], what it adds: beta - mean * scale.
        residual: [N, K, P, Q] or None.
        stride: of the convolution, as are padding, dilation and groups.
        padding: zeros on each side; an infinite weight on a zero gives NaN, as in torch.
        dilation: distance of two taps.
        groups: groups of channels.
        act: "relu" (keeps NaN) or "none".

    Returns:
        [N, K, P, Q] float64.

    Raises:
        ValueError: for an unknown ``act`` or a residual of another shape than the output.
    """
    check_choice("act", act, ACTS)
    y = convolve(x.double(), weight.double(), stride, padding, dilation, groups)
    y = y.mul_(channels(scale)).add_(channels(shift))
    return finish(y, residual, act)


def bn_act_oracle(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, act: str = "relu"
) -> Tensor:
    """``act(scale * x + shift [+ residual])`` in float64; arguments as `conv_bn_act_oracle`."""
    check_choice("act", act, ACTS)
    return finish(x.double() * channels(scale) + channels(shift), residual, act)


def finish(y: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """Adds the residual and applies the activation, in place; torch's ReLU keeps NaN."""
    if residual is not None:
        check_like("residual", residual, "the output", y.shape)
        y = y.add_(residual.double())
    return y.relu_() if act == "relu" else y


def convolve(
    x: Tensor, weight: Tensor, stride: IntPair, padding: IntPair, dilation: IntPair, groups: int
) -> Tensor:
    """A convolution without bias, in the dtype of its operands."""
    return F.conv2d(x, weight, None, pair(stride), pair(padding), pair(dilation), groups)
