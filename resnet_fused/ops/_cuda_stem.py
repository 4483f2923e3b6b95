"""The CUDA kernels of `stem` and `head` as implementations of their ops.

What a launch takes of them is planned as the convolutions' is, see `_cuda_plan`; a split of the
stem is a strip of the image, and the head has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from . import _cuda, _cuda_plan, _results, _tuned_calls

DTYPES = (torch.bfloat16, torch.float16)
CHECKS = "_cuda_stem_checks"


def supports(call: backends.Call) -> str | None:
    """Why the CUDA kernel can't serve a call, or None."""
    if call.device == "cuda" and call.dtype is torch.float32:
        return "the CUDA kernel multiplies bfloat16 and float16"
    return _cuda.supports(call)


def stem_problem(
    x: Tensor,
    weight: Tensor,
    geometry: Sequence[Sequence[int]],
    out: Tensor,
    input_norm: Tensor | None = None,
) -> _cuda_plan.Problem:
    """What a plan of `stem` depends on.

    Args:
        x: [N, C, H, W].
        weight: [K, C, R, S].
        geometry: stride, padding, and the pooling's kernel, stride and padding.
        out: [N, K, P, Q].
        input_norm: [2, C] or None: tuning tells calls with it from those without.
    """
    call = _tuned_calls.stem_call(x, weight, input_norm, geometry[0], geometry[1], geometry[3])
    pairs = tuple(list(pair) for pair in geometry)
    return _cuda_plan.Problem("stem", (x, weight), pairs, out, call=call)


def head_problem(
    x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None
) -> _cuda_plan.Problem:
    """What a plan of `head` depends on.

    Args:
        x: [N, C, H, W].
        weight: [classes, C].
        out: [N, classes].
        bias: [classes] or None: likewise.
    """
    call = _tuned_calls.head_call(x, weight, bias)
    return _cuda_plan.Problem("head", (x, weight), (), out, call=call)


def _ordinary(op: str, x: Tensor, weight: Tensor) -> bool:
    """Whether every configuration may be used, on sizes so far from every limit that one fits."""
    most = _cuda_plan.ORDINARY
    return max(x.numel(), weight.numel()) < most and _cuda_plan.complete(op, x.device)


def unfit_stem(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    pool: Sequence[list[int]],
    out_scale: float | None = None,
) -> str | None:
    """Why no configuration that may be used takes a call of `stem`, or None.

    Args:
        x: [N, C, H, W] on the GPU.
        weight: [K, C, R, S].
        stride: of the convolution.
        padding: likewise.
        pool: kernel, stride and padding of the pooling.
        out_scale: of a result in e4m3, which the GPU has instructions for, or None.
    """
    pair = [2, 2]
    usual = stride == pair and list(pool[0]) == [3, 3] and list(pool[1]) == pair
    usual &= weight.shape[2:] == (7, 7) and x.shape[1] <= 4 and list(pool[2]) == [1, 1]
    if usual and _ordinary("stem", x, weight) and max(padding) <= _cuda_plan.ORDINARY_GEOMETRY:
        return None
    out = _results.FORMS["stem"].empty(
        x.to("meta"), weight.to("meta"), None, None, None, stride, padding, *pool, out_scale
    )
    return _cuda_plan.refused(stem_problem(x, weight, (stride, padding, *pool), out), x.device)


def unfit_head(x: Tensor, weight: Tensor) -> str | None:
    """Why no configuration that may be used takes a call of `head`, or None.

    Args:
        x: [N, C, H, W] on the GPU.
        weight: [classes, C].
    """
    if _ordinary("head", x, weight) and 0 < x.shape[0] < 1 << 16:
        return None
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device="meta")
    return _cuda_plan.refused(head_problem(x, weight, out), x.device)


def launch_stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    input_norm: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    pool_kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    out_scale: float | None = None,
    *,
    wish: _cuda.Wish | None = None,
    dependent: bool = False,
    follows: bool = False,
) -> None:
    """Runs `stem` into a given output.

    Args:
        x: [N, C, H, W] uint8, float32 or the weight's dtype.
        weight: [K, C, 7, 7] bfloat16 or float16.
        scale: [K] float32.
        shift: [K] float32.
        input_norm: [2, C] float32, contiguous, or None.
        out: [N, K, P, Q], dtype of the weight, or float8_e4m3fn with `out_scale`; any layout.
        stride: of the convolution, as is padding.
        padding: see stride.
        pool_kernel: of the pooling, as are the two that follow.
        pool_stride: see pool_kernel.
        pool_padding: see pool_kernel.
        out_scale: what a stored 1 of the result is worth; None: 1.
        wish: a configuration and strips in place of a choice among the admitted ones.
        dependent: as of `_cuda.launch_conv_bn_act`.
        follows: likewise.

    Raises:
        LookupError: no admitted configuration takes it.
        RuntimeError: the launch failed, or refused the wish.
    """
    geometry = (stride, padding, pool_kernel, pool_stride, pool_padding)
    made = stem_problem(x, weight, geometry, out, input_norm)
    factor = 1.0 if out_scale is None else 1.0 / out_scale
    _cuda_plan.raw("stem", "out")(
        x, weight, scale, shift, input_norm, *made.geometry, factor, dependent, follows,
        *(wish or _cuda_plan.wanted(made)), out,
    )  # fmt: skip


def launch_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    wish: _cuda.Wish | None = None,
    dependent: bool = False,
    follows: bool = False,
) -> None:
    """Runs `head` into a given output.

    Args:
        x: [N, C, H, W] bfloat16 or float16.
        weight: [classes, C], dtype of x.
        bias: [classes], likewise, or None.
        out: [N, classes], likewise, contiguous.
        wish: a configuration, and 1, in place of a choice among the admitted ones.
        dependent: as of `_cuda.launch_conv_bn_act`.
        follows: likewise.

    Raises:
        LookupError: no admitted configuration takes it.
        RuntimeError: the launch failed, or refused the wish.
    """
    made = head_problem(x, weight, out, bias)
    adjacent = None if bias is None else bias.contiguous()
    _cuda_plan.raw("head", "out")(
        x, weight, adjacent, dependent, follows and adjacent is bias,
        *(wish or _cuda_plan.wanted(made)), out,
    )  # fmt: skip
