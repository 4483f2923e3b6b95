"""`bn_act_pool`: BatchNorm, ReLU and max pooling in one pass, the stem's second half.

    out = maxpool(relu(scale * y + shift)),  taps = which tap of each window won, one byte

"Deep Residual Learning for Image Recognition", table 1, conv1 and the 3x3/2 pooling of conv2_x.
PyTorch's rule picks the winner among the *rounded* values: the first maximum in the window's order,
and the last NaN. Eager PyTorch keeps the pooled-over activation and eight bytes a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import _autocast, _checks, _training, _training_cpu
from ._training import SCALE, SHIFT, normalised, per_channel
from .bn_add_act_backward import reductions

SCHEMA = "(Tensor y, Tensor norm, int[2] kernel, int[2] stride, int[2] padding) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor taps, Tensor y, Tensor norm, int[2] kernel, int[2] stride, "
    "int[2] padding) -> (Tensor, Tensor)"
)
MOST_TAPS = 255
Pair = int | Sequence[int]


def _reference(
    y: Tensor, norm: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    h = normalised(y, norm)
    out, index = torch.nn.functional.max_pool2d(h, kernel, stride, padding, return_indices=True)
    rows = torch.arange(out.shape[2], device=y.device).view(-1, 1) * stride[0] - padding[0]
    columns = torch.arange(out.shape[3], device=y.device) * stride[1] - padding[1]
    tap = (index // y.shape[3] - rows) * kernel[1] + index % y.shape[3] - columns
    return out, torch.empty_like(out, dtype=torch.uint8).copy_(tap)


def _backward(
    dout: Tensor,
    taps: Tensor,
    y: Tensor,
    norm: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    wide = _training.compute_dtype(y.dtype)
    n, channels, height, width = y.shape
    padded = [height + 2 * padding[0] + kernel[0], width + 2 * padding[1] + kernel[1]]
    dh = torch.zeros((n, channels, *padded), dtype=wide, device=y.device)
    p, q = dout.shape[2:]
    # Taps from the last to the first: a pixel then adds its windows in their own order.
    for tap in reversed(range(kernel[0] * kernel[1])):
        r, s = divmod(tap, kernel[1])
        place = dh[:, :, r : r + p * stride[0] : stride[0], s : s + q * stride[1] : stride[1]]
        place += torch.where(taps == tap, dout.to(wide), 0)
    inside = dh[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    dz = torch.empty_like(y).copy_(inside)
    dz.masked_fill_(normalised(y, norm) <= 0, 0)
    return dz, reductions(dz, y, norm)


_training.enter(
    "bn_act_pool",
    SCHEMA,
    _reference,
    "one pass, one byte a window",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    cpu=_training_cpu.bn_act_pool,
)
_training.enter(
    "bn_act_pool_backward",
    BACKWARD_SCHEMA,
    _backward,
    "gathered, in fixed order",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    cpu=_training_cpu.bn_act_pool_backward,
)


class _BnActPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, norm: Tensor, window: tuple[list[int], ...]) -> Tensor:
        out, taps = _training.run("bn_act_pool", y, y, norm, *window)
        ctx.save_for_backward(y, norm, taps)
        ctx.window = window
        ctx.mark_non_differentiable(taps)
        return out, taps

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        y, norm, taps = ctx.saved_tensors
        dz, sums = _training.run("bn_act_pool_backward", y, dout, taps, y, norm, *ctx.window)
        dy = (dz.to(norm.dtype) * per_channel(norm[SCALE])).to(y.dtype)
        dnorm = torch.zeros_like(norm)
        dnorm[SCALE] = sums[1] + norm[_training.MEAN] * sums[0]
        dnorm[SHIFT] = sums[0]
        return dy, dnorm, None


def bn_act_pool(
    y: Tensor,
    norm: Tensor,
    kernel: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
) -> tuple[Tensor, Tensor]:
    """Computes maxpool(relu(scale * y + shift)).

    Args:
        y: raw output of a convolution [N, K, H, W]; float32, bfloat16, float16 or float64.
        norm: [4, K] of its BatchNorm, as `bn_finalize` returns it.
        kernel: window, an int or (vertical, horizontal); at most 255 taps.
        stride: of the windows.
        padding: at most half a window.

    Returns:
        [N, K, P, Q] in `y`'s dtype and layout, and uint8 of that shape: r * S + s of the tap that
        won. Gradients flow to `y` and `norm`; a second derivative raises.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or the window do not fit.
    """
    op = "bn_act_pool"
    (y,) = _autocast.cast(y)
    y = _checks.check_activation_tensor(op, "y", y)
    norm = _training.check_norm(op, "norm", norm, y, y.shape[1])
    window = check_window(op, y, kernel, stride, padding)
    if torch.is_grad_enabled() and (y.requires_grad or norm.requires_grad):
        return _BnActPool.apply(y, norm, window)
    return _training.run(op, y, y, norm, *window)


def check_window(
    op: str, y: Tensor, kernel: Pair, stride: Pair, padding: Pair
) -> tuple[list[int], list[int], list[int]]:
    """Checks a pooling window against the tensor that it slides over."""
    return check_pooling(op, y.shape[2:], kernel, stride, padding)


def check_pooling(
    op: str, sizes: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, prefix: str = ""
) -> tuple[list[int], list[int], list[int]]:
    """Checks a pooling window against the height and width that it slides over.

    Args:
        op: name for the messages.
        sizes: height and width.
        kernel: what was given.
        stride: likewise.
        padding: likewise.
        prefix: of the arguments' names.
    """
    kernel = _checks.pair(op, f"{prefix}kernel", kernel, 1)
    stride = _checks.pair(op, f"{prefix}stride", stride, 1)
    padding = _checks.pair(op, f"{prefix}padding", padding, 0)
    if kernel[0] * kernel[1] > MOST_TAPS:
        raise ValueError(f"{op}: {prefix}kernel is {kernel}; at most {MOST_TAPS} taps are accepted")
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"{op}: {prefix}padding is {padding}; at most half of {prefix}kernel {kernel} is "
            "accepted"
        )
    if any(size + 2 * pad < span for size, pad, span in zip(sizes, padding, kernel, strict=True)):
        raise ValueError(f"{op}: {prefix}kernel {kernel} is larger than the padded {tuple(sizes)}")
    return kernel, stride, padding
