"""`conv_bn_stats` by the emulated CUDA kernel: one more implementation beside `emulated`'s."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _cuda_stats, _results

OP = _cuda_stats.OP
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem_of(
    x: Tensor, norm: Tensor | None, weight: Tensor, y: Tensor, stats: Tensor, *geometry: Any
) -> Any:
    """The launch's problem, float32 in TF32; `geometry` is stride, padding, dilation, groups."""
    images = {"x": x, "weight": weight, "y": y}
    return emulated.load().ConvBnStats(
        dtype=emulated.TYPE_NAMES[x.dtype],
        allow_tf32=True,
        x_size=x.shape,
        weight_size=weight.shape,
        **dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True)),
        **{f"{name}_stride": emulated._strides(t) for name, t in images.items()},
        **{name: emulated._address(t) for name, t in images.items()},
        norm=emulated._address(norm),
        stats=emulated._address(stats),
    )


def conv_bn_stats(
    x: Tensor, norm: Tensor | None, weight: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    """The op, by the emulated kernel, in the order of its schema."""
    results = _results.FORMS[OP].empty(x, norm, weight, *geometry)
    if not results[0].numel():
        return results[0], results[1].zero_()
    guarded = dict(zip(("y", "stats"), map(emulated.Guarded, results), strict=True))
    written = {name: one.tensor for name, one in guarded.items()}
    images = (x, weight, written["y"])
    layout = [(tuple(t.shape), emulated._strides(t)) for t in images]
    key = (OP, x.dtype, *layout, *geometry, norm is None, x.data_ptr() % 16)
    problem = problem_of(x, norm, weight, *written.values(), *geometry)
    inputs = {"x": x, "norm": norm, "weight": weight}
    y, stats = emulated._run_planned(OP, problem, key, inputs, guarded)
    return y, stats


emulated.DTYPES[OP] = DTYPES
emulated._register(OP, conv_bn_stats)
