"""Calls of training's Triton kernels for the gates: which there are, and how each op is launched.

A call's form names the operands that it has beside those that each call has: "norm", "affine"
(y and coefficients), "addend", "below" (raw and norm), "projected" (residual and residual_norm),
"float32" (the parameter's dtype) of the convolutions; "plain", "norm", "part" (fewer channels),
"out", "total" and so on of the others.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.cases import RESNET50_LAYERS, BnActCase, ConvCase
from resnet_fused.triton import _block_end, _tiles

FORMS = {
    "conv_bn_stats": ("norm", ""),
    "conv_bn_dgrad": ("affine addend below", "affine", "below", ""),
    "conv_bn_dgrad_end": ("affine addend projected", "affine addend", "affine", "addend"),
    "conv_bn_wgrad": ("affine norm", "affine", "norm", "", "affine norm float32"),
}
"""Of each convolution: the fullest one first, which every configuration is compiled for."""

GRAD1X1 = "conv_bn_grad1x1"
GRAD1X1_END = "conv_bn_grad1x1_end"
END = "bn_add_act_conv_stats"
CONVOLUTIONS = (*FORMS, GRAD1X1, GRAD1X1_END, END)

ELEMENTWISE = {
    "bn_add_act": ("plain", "norm", "part", ""),
    "bn_add_act_backward": ("out", "", "out projected"),
    "bn_backward_apply": ("",),
    "bn_act_pool": ("",),
    "bn_act_pool_backward": ("",),
}
VECTORS = {
    "bn_finalize": ("total gamma beta", ""),
    "bn_update_stats": ("total tracked cumulative", "", "tracked"),
    "bn_backward_finalize": ("total all", "", "frozen"),
}
OPS = (*CONVOLUTIONS, *ELEMENTWISE, *VECTORS)

WINDOW = ([3, 3], [2, 2], [1, 1])
"""The stem's pooling."""

WIDE = BnActCase("wide", 32, 256, 56, 56)
ODD = BnActCase("odd", 32, 65, 56, 56)
STEM = BnActCase("stem", 32, 64, 112, 112)
HUGE = BnActCase("huge", 4096, 256, 56, 56)
"""More than 2^31 elements: offsets of 64 bits."""
SHAPES = (WIDE, ODD, STEM)

SAMPLE = (("3x3_short", "bf16", "64x64_4w4s"), ("1x1_long", "bf16", "64x64_4w4s"))
"""What CI compiles of each convolution, in the fullest form: taps in one loop, and one tap."""

LAYOUTS = ("nhwc", "nchw", "sliced", "unaligned")
"""Of the passes; float16, which is bfloat16 but for conversions, in the first two."""

HALF = ("1x1_residual", "3x3_short")
"""Likewise the convolutions' shapes in float16."""

SAMPLE_FORMS = ("norm", "part", "out projected")
"""What CI compiles of the others beside the barest form."""

SAMPLE_ODD = ("bn_add_act_backward", "bn_act_pool_backward")
"""Those of which CI compiles single elements too."""

GRAD1X1_SHAPES = tuple(
    ConvCase(f"1x1_{c}_{k}", 32, c, size, size, k)
    for c, k, size in ((64, 64, 56), (64, 256, 56), (256, 64, 56), (256, 128, 56), (128, 512, 28))
)

GRAD1X1_END_FORMS = ("affine addend projected", "affine addend", "affine", "addend projected")
GRAD1X1_END_SHAPES = tuple(
    ConvCase(f"1x1_{c}_{k}", 32, c, size, size, k)
    for c, k, size in ((256, 64, 56), (256, 128, 56), (512, 128, 28), (136, 56, 9))
)

END_SHAPES = tuple(
    ConvCase(f"1x1_{c}_{k}_at{size}", 32, c, size, size, k)
    for c, k, size in ((256, 64, 56), (512, 256, 28), (2048, 512, 7), (208, 80, 9))
)
"""Of a block's end and the 1x1 convolution behind it; the last ends within a step."""

Spec = tuple[str, Any, str, str, str | None, bool, str]
"""Of a call: op, shape, type, layout, configuration, whether CI compiles it, form."""


def convolutions(shapes: Sequence[ConvCase], types: Iterable[str]) -> list[Spec]:
    """Calls of the convolutions.

    Args:
        shapes: what each configuration is compiled for.
        types: of operands.
    """
    found: list[Spec] = []
    for op, forms in FORMS.items():
        for kind in types:
            for tile in _tiles.TILES:
                for shape in shapes:
                    if kind == "fp16" and shape.name not in HALF:
                        continue
                    sample = (shape.name, kind, tile.name) in SAMPLE
                    found.append((op, shape, kind, "nhwc", tile.name, sample, forms[0]))
        for n in (1, 32, 256):
            layers = [dataclasses.replace(layer, n=n) for layer in RESNET50_LAYERS]
            found += [(op, layer, "bf16", "nhwc", None, False, forms[0]) for layer in layers]
        for form in forms:
            for shape in shapes:
                found.append((op, shape, "bf16", "nhwc", None, False, form))
                if form == forms[0]:
                    found.append((op, shape, "bf16", "nchw", None, False, form))
    for form in ("affine norm addend", "affine addend", "affine norm"):
        for shape in GRAD1X1_SHAPES:
            sample = form == "affine norm addend" and shape.name == "1x1_256_64"
            found.append((GRAD1X1, shape, "bf16", "nhwc", None, sample, form))
    for form in GRAD1X1_END_FORMS:
        for shape in GRAD1X1_END_SHAPES:
            sample = form == GRAD1X1_END_FORMS[0] and shape.name in ("1x1_256_64", "1x1_512_128")
            found.append((GRAD1X1_END, shape, "bf16", "nhwc", None, sample, form))
    return [*found, *_ends(types)]


def _ends(types: Iterable[str]) -> list[Spec]:
    """Calls of a block's end within the next block's first convolution."""
    found: list[Spec] = []
    for shape in END_SHAPES:
        for kind in types:
            for tile in _block_end.TILES:
                sample = (shape.c, kind, tile.name) == (512, "bf16", "64x64_4w4s")
                found += [
                    (END, shape, kind, "nhwc", tile.name, sample, form) for form in ("norm", "")
                ]
        for n in (1, 32, 256):
            one = dataclasses.replace(shape, n=n)
            found += [(END, one, "bf16", "nhwc", None, False, form) for form in ("norm", "")]
        found.append((END, shape, "bf16", "nchw", None, False, "norm"))
    return found


def passes() -> list[Spec]:
    """Calls of the ops of one pass, and of those over per-channel values."""
    found: list[Spec] = []
    for op, forms in ELEMENTWISE.items():
        for form in forms:
            for kind in ("bf16", "fp16", "tf32"):
                for layout in LAYOUTS[: 2 if kind == "fp16" else None]:
                    for shape in SHAPES:
                        usual = STEM if "pool" in op else WIDE
                        sample = (kind, layout) == ("bf16", "nhwc") and (
                            (shape is usual and form in ("", *SAMPLE_FORMS))
                            or (shape is ODD and form == forms[-1] and op in SAMPLE_ODD)
                        )
                        found.append((op, shape, kind, layout, None, sample, form))
            found.append((op, HUGE, "bf16", "nhwc", None, False, form))
    for op, forms in VECTORS.items():
        for form in forms:
            for shape in (WIDE, ODD):
                sample = shape is WIDE and form == forms[0]
                found.append((op, shape, "tf32", "nhwc", None, sample, form))
    return found


def launch(call: Any) -> None:
    """Calls an op's launch on tensors without memory.

    Args:
        call: of `_triton_cases.Call`.

    Raises:
        LookupError: the chooser does not offer the configuration for this call.
    """
    has = set(call.form.split())
    module = importlib.import_module(f"resnet_fused.triton.{call.op}")
    if call.op in VECTORS:
        module.launch(*_vectors(call.op, call.shape.c, has))
    elif call.op in ELEMENTWISE:
        module.launch(*_pass(call, has))
    else:
        allowed = None if call.tile is None else frozenset({call.tile})
        module.launch(*_convolution(call, has), allowed=allowed)


def _rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _convolution(call: Any, has: set[str]) -> tuple[Any, ...]:
    shape = call.shape
    x, weight = call.tensor(*shape.input_shape), call.tensor(*shape.weight_shape)
    below, output = call.tensor(*shape.input_shape), call.tensor(*shape.output_shape)
    dz, norm, sums = call.tensor(*shape.output_shape), _rows(4, shape.c), _rows(2, shape.c)
    where = shape.stride, shape.padding, shape.dilation, shape.groups
    if call.op == END:
        own = norm if "norm" in has else None
        return (
            x,
            norm,
            below,
            own,
            weight,
            call.tensor(*shape.input_shape),
            output,
            _rows(2, shape.k),
        )
    affine = (dz, output, _rows(3, shape.k)) if "affine" in has else (dz, None, None)
    normed = norm if has & {"norm", "below"} else None
    sums = _rows(0, shape.c) if normed is None else sums
    if "float32" in has:
        weight = weight.float()
    if call.op == "conv_bn_stats":
        return x, normed, weight, output, _rows(2, shape.k), *where
    if call.op == "conv_bn_wgrad":
        return *affine, x, normed, weight, *where
    addend = call.tensor(*shape.input_shape) if "addend" in has else None
    if call.op == GRAD1X1:
        return *affine, below, normed, weight, addend, x, sums, weight, 1
    if call.op in ("conv_bn_dgrad_end", GRAD1X1_END):
        own = (below, norm) if "projected" in has else (None, None)
        sums = _rows(2 + ("projected" in has), shape.c)
        end = (*affine, weight, addend, below, below, norm, *own, x, sums)
        return (*end, weight, 1) if call.op == GRAD1X1_END else (*end, 1, *where)
    raw = below if "below" in has else None
    return *affine, weight, addend, raw, normed, x, sums, 1, *where


def _pass(call: Any, has: set[str]) -> tuple[Any, ...]:
    n, c, h, w = call.shape.shape
    y, other, third, out, dz = (call.tensor(n, c, h, w) for _ in range(5))
    norm, sums = _rows(4, c), _rows(3 if "projected" in has else 2, c)
    if call.op == "bn_add_act":
        residual = call.tensor(n, c // 2, h, w) if "part" in has else other
        own = norm if "norm" in has else None
        offset = c // 4 if "part" in has else 0
        return y, norm, residual if has else None, own, out, offset, "relu"
    if call.op == "bn_backward_apply":
        return other, y, _rows(3, c), out
    if call.op == "bn_add_act_backward":
        projection = (third, norm) if "projected" in has else (None, None)
        return other, out if "out" in has else None, y, norm, *projection, dz, sums, "relu"
    small = call.tensor(n, c, h // 2, w // 2)
    taps = call.tensor(n, c, h // 2, w // 2, dtype=torch.uint8)
    if call.op == "bn_act_pool":
        return y, norm, small, taps, *WINDOW
    return small, taps, y, norm, dz, sums, *WINDOW


def _vectors(op: str, channels: int, has: set[str]) -> tuple[Any, ...]:
    stats, norm, vector = _rows(2, channels), _rows(4, channels), _rows(channels)
    total = _rows(1, dtype=torch.float64) if "total" in has else None
    if op == "bn_finalize":
        gamma, beta = (vector if name in has else None for name in ("gamma", "beta"))
        return stats, total, gamma, beta, norm, 1000, 1e-5
    if op == "bn_update_stats":
        tracked = _rows(dtype=torch.int64) if "tracked" in has else None
        momentum = None if "cumulative" in has else 0.1
        return stats, total, vector, vector, tracked, 1000, momentum
    every = stats if "all" in has else None
    results = _rows(3, channels), vector, vector
    return stats, every, total, norm, *results, 1000, 1, "frozen" in has
