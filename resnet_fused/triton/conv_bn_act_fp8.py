"""`conv_bn_act_fp8` in Triton: `conv_bn_act`'s kernel with operands of e4m3.

The tile, its loops and its epilogue are the same; the sums of each step are added to float32 ones
(`_implicit.accumulate`), and the epilogue multiplies the shortcut and the result by their scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _tiles, conv_bn_act
from ._dependent import ALONE, Flow
from ._implicit import product_of as product_of


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
    plan: _tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
    flow: Flow = ALONE,
) -> None:
    """Writes act(scale conv(x, weight) + shift [+ residual_scale residual]) / out_scale into `out`.

    Args:
        x: [N, C, H, W] float8_e4m3fn, any layout, as of `conv_bn_act.launch`.
        weight: [K, C / groups, R, S], likewise.
        scale: [K] float32.
        shift: [K] float32.
        residual: [N, K, P, Q], e4m3, float32, bfloat16 or float16, or None.
        out: [N, K, P, Q] of `out_dtype`; overwritten.
        stride: (vertical, horizontal), as padding and dilation.
        padding: see stride.
        dilation: see stride.
        groups: of channels.
        act: "relu" or "none".
        residual_scale: what a stored 1 of the residual is worth.
        out_scale: what a stored 1 of the output is worth.
        out_dtype: of `out`.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
        flow: how the launch stands among those around it.

    Raises:
        LookupError: no configuration is left, as on GPUs that multiply no e4m3.
    """
    conv_bn_act.launch(
        x, weight, scale, shift, residual, out, stride, padding, dilation, groups, act,
        plan=plan, allowed=allowed, flow=flow, factors=(residual_scale, 1.0 / out_scale),
    )  # fmt: skip
