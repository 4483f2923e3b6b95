"""FLOPs and bytes of `stem` and `head`: every tensor once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from resnet_fused._shapes import StemShape

from .inference import Cost, _vector


def stem_cost(case: StemShape, dtype: torch.dtype) -> Cost:
    """The work of one ``stem``: images and weight read, the pooled activation written.

    Args:
        case: its sizes.
        dtype: of weight and result; the images' is the case's.
    """
    (n, c, h, w), (k, _, r, s) = case.shape, case.weight_shape
    stride, padding, *pool = case.geometry
    p, q = _slid((h, w), (r, s), stride, padding)
    out = n * k * math.prod(_slid((p, q), *pool))
    size = {"uint8": 1, "float32": 4}.get(case.images, dtype.itemsize)
    vectors = 2 * k + (2 * c if case.has_norm else 0)
    moved = n * c * h * w * size + (k * c * r * s + out) * dtype.itemsize
    return Cost(2 * n * k * p * q * c * r * s, moved + vectors * _vector(dtype))


def head_cost(shape: Sequence[int], classes: int, dtype: torch.dtype, *, bias: bool = True) -> Cost:
    """The work of one ``head`` on [N, C, H, W]: the pooling's additions are not counted."""
    n, c = shape[:2]
    moved = math.prod(shape) + classes * c + n * classes + (classes if bias else 0)
    return Cost(2 * n * c * classes, moved * dtype.itemsize)


def _slid(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    return [
        (size + 2 * pad - taps) // step + 1
        for size, taps, step, pad in zip(sizes, kernel, stride, padding, strict=True)
    ]
