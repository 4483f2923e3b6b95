"""PyTorch's convolution and its gradients, kept from faults of oneDNN's on the CPU.

In bfloat16, on a CPU with AMX (PyTorch 2.15), one column of several results is wrong where the
filter has a stride, as a 3x3 convolution of stride 2 over 16 x 2 pixels; and where a row or column
of results reads padding alone, memory that is not its own is touched, up to the end of the process.
Such shapes are multiplied in float32.

Of a strided 1x1 convolution in channels_last with fewer input channels than oneDNN's kernel takes
at a time, the gradient of the weights is wrong, and memory that is not its own is overwritten
(https://github.com/uxlfoundation/oneDNN/issues/6035). The pixels that such a convolution reads are
a tensor of their own here, on which it has stride 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS = 16
"""That oneDNN's kernels take at a time, of a group: 16 with AVX-512, 8 with AVX2."""


def errs(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether a convolution is of the shapes of which oneDNN has been seen to err, or near them.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S].
        stride: (vertical, horizontal), as padding and dilation.
        padding: zeros on each side.
        dilation: of the taps.
    """
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu":
        return False
    sizes = zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True)
    for size, taps, pad, apart in sizes:
        if pad > apart * (taps - 1) or (taps > 1 and pad > 0 and size < apart):
            return True
    tall, wide = (
        (size + 2 * pad - apart * (taps - 1) - 1) // step
        for size, taps, pad, apart, step in zip(
            x.shape[2:], weight.shape[2:], padding, dilation, stride, strict=True
        )
    )
    return weight.shape[3] > 1 and stride[1] > 1 and wide == 0 and tall > 0


def output(
    x: Tensor, weight: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """The convolution [N, K, P, Q], in `x`'s dtype.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S], dtype of `x`.
        stride: (vertical, horizontal), as padding and dilation.
        padding: zeros on each side.
        dilation: of the taps.
        groups: of channels.
    """
    if errs(x, weight, stride, padding, dilation):
        y = torch.conv2d(x.float(), weight.float(), None, stride, padding, dilation, groups)
        return y.to(x.dtype)
    return torch.conv2d(x, weight, None, stride, padding, dilation, groups)


def _is_at_risk(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    _, channels, *taps = weight.shape
    return (
        channels < CHANNELS
        and taps == [1, 1]
        and max(stride) > 1
        and not any(padding)
        and x.device.type == "cpu"
    )


def weight_gradient(
    dy: Tensor, x: Tensor, weight: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """The gradient [K, C / groups, R, S] of a convolution's weight.

    Args:
        dy: gradient of its output [N, K, P, Q].
        x: its input [N, C, H, W], dtype of `dy`.
        weight: dtype of `dy`; its shape counts, its values do not.
        stride: (vertical, horizontal), as padding and dilation.
        padding: zeros on each side.
        dilation: of the taps.
        groups: of channels.
    """
    if _is_at_risk(x, weight, stride, padding):
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    _, dweight, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    return dweight


def input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """The gradient [N, C, H, W] of a convolution's input, of which shape and layout count.

    Args:
        dy: as for `weight_gradient`.
        x: likewise.
        weight: likewise.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        groups: likewise.
    """
    dx, _, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )
    return dx


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both, of one call where that may be.

    Args:
        dy: as for `weight_gradient`.
        x: likewise.
        weight: likewise.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        groups: likewise.
    """
    geometry = stride, padding, dilation, groups
    if _is_at_risk(x, weight, stride, padding):
        return input_gradient(dy, x, weight, *geometry), weight_gradient(dy, x, weight, *geometry)
    dx, dweight, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
    )
    return dx, dweight
