"""`conv_bn_act_fp8` by the compiled extension: what its CUDA kernel takes, and what a launch does.

For GPUs of capability 9.0 alone: wgmma multiplies what TMA brings. What does not lie in
channels_last is copied there, and a result that does not is written by way of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cuda_plan, _results

OP = "conv_bn_act_fp8"
OPERANDS = ("x", "weight", "residual")
"""What a plan depends on, beside the geometry and the result."""


def problem_of(
    operands: Sequence[Tensor | None],
    geometry: Sequence[Any],
    out: Tensor,
    *,
    real: bool = True,
) -> _cuda_plan.Problem:
    """What a plan depends on; operands are copied to channels_last where they lie otherwise.

    Args:
        operands: as of `OPERANDS`, before any copy.
        geometry: stride, padding, dilation, groups.
        out: the result, or a tensor like it; the problem's own is in channels_last.
        real: False makes no copies, but what a plan takes for them.
    """
    adjacent = _cuda_plan.adjacent if real else _cuda_plan.adjacent_like
    made, notes = [], []
    for name, t in zip(OPERANDS, operands, strict=True):
        moved = t if t is None else adjacent(t, t.shape[1])
        if moved is not t:
            notes.append(f"{name} is copied to channels_last")
        made.append(moved)
    stride, padding, dilation, groups = geometry
    options = (list(stride), list(padding), list(dilation), groups)
    return _cuda_plan.Problem(OP, tuple(made), options, _target(out), tuple(notes))


def _target(out: Tensor) -> Tensor:
    """What the kernel writes: `out`, or a tensor like it in channels_last."""
    if out.shape[1] == 1 or out.stride(1) == 1:
        return out
    last = torch.channels_last
    return torch.empty(out.shape, dtype=out.dtype, device=out.device, memory_format=last)


def unfit(x: Tensor, weight: Tensor, residual: Tensor | None, options: Sequence[Any]) -> str | None:
    """Why no configuration that may be used takes a call, or None.

    Args:
        x: [N, C, H, W] on the GPU, as are the other tensors.
        weight: [K, C/groups, R, S].
        residual: [N, K, P, Q] or None.
        options: checked, the schema's arguments from stride on.
    """
    vectors = (None, None, None)  # on which no result's form depends
    out = _results.FORMS[OP].empty(x.to("meta"), weight.to("meta"), *vectors, *options)
    made = problem_of((x, weight, residual), options[:4], out, real=False)
    return _cuda_plan.refused(made, x.device)


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    residual_scale: float,
    out_scale: float,
    out_dtype: torch.dtype,
    *,
    wish: tuple[int, int] | None = None,
    dependent: bool = False,
    follows: bool = False,
) -> bool:
    """Writes act(scale conv(x, weight) + shift [+ residual_scale residual]) / out_scale into `out`.

    Args:
        x: [N, C, H, W] float8_e4m3fn; C a multiple of 16.
        weight: [K, C/groups, R, S], likewise.
        scale: [K] float32.
        shift: [K] float32.
        residual: [N, K, P, Q] float8_e4m3fn, or None.
        out: [N, K, P, Q] of `out_dtype`: float8_e4m3fn, bfloat16 or float16.
        stride: vertical, horizontal.
        padding: likewise.
        dilation: likewise.
        groups: number of groups.
        act: "relu" or "none".
        residual_scale: what a stored 1 of the residual is worth.
        out_scale: what a stored 1 of the output is worth.
        out_dtype: of `out`.
        wish: a configuration and splits in place of a choice among the admitted ones.
        dependent: as of `_cuda.launch_conv_bn_act`.
        follows: likewise.

    Returns:
        Whether the result was copied, by a kernel behind this one that does not wait.

    Raises:
        LookupError: no admitted configuration takes it.
        RuntimeError: the launch failed, or refused the wish.
    """
    given = (x, weight, residual)
    made = problem_of(given, (stride, padding, dilation, groups), out)
    image, filters, shortcut = made.operands
    # Behind a copy no kernel follows another: what it copies may be what is taken for constant.
    follows = follows and all(a is b for a, b in zip(given, made.operands, strict=True))
    _cuda_plan.raw(OP, "out")(
        image, filters, scale, shift, shortcut, *made.geometry, act == "relu", residual_scale,
        1.0 / out_scale, dependent, follows, *(wish or _cuda_plan.wanted(made)), made.out,
    )  # fmt: skip
    if made.out is not out:
        out.copy_(made.out)
    return made.out is not out
