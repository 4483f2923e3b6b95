"""FLOPs and bytes of `conv_chain`."""

from __future__ import annotations

import torch

from resnet_fused._shapes import ChainShape

from .inference import Cost


def conv_chain_cost(case: ChainShape, dtype: torch.dtype) -> Cost:
    """The work of one ``conv_chain`` as one kernel: each tensor once.

    It reads what its first convolution reads, the shortcut (of a projection's source the pixels
    that it takes), all weights, and scale and shift in the accumulator's dtype; it writes the
    stored pixels of out, and next.

    Args:
        case: its sizes.
        dtype: of activations and convolution weights.
    """
    pixels = case.n * case.h * case.w
    stored = case.n * -(-case.h // case.out_stride) * -(-case.w // case.out_stride)
    read = (case.front or case.k) + (case.projected or case.c)
    weights = case.c * (case.k + case.projected + case.m) + 9 * case.k * case.front
    vectors = case.c * (2 if case.projected else 1) + case.m + (case.k if case.front else 0)
    moved = pixels * (read + case.m) + stored * case.c + weights
    return Cost(2 * pixels * weights, moved * dtype.itemsize + 2 * vectors * max(dtype.itemsize, 4))
