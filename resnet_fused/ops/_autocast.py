"""Autocast for the ops: activations and conv weights follow it, per-channel vectors never do.

Casting scale, shift or running statistics to 16 bits would lose what BatchNorm's own float32
arithmetic keeps, so `torch.library.register_autocast`, which casts every tensor, is no use here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda")


def dtype_for(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device type, or None where it is off."""
    if device_type not in _DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype a layer works in on `x`: autocast's where that is on; float64 it leaves alone."""
    if x.dtype == torch.float64:
        return x.dtype
    return dtype_for(x.device.type) or x.dtype


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts activations and conv weights as autocast would: floating, but never float64.

    Args:
        *tensors: tensors of one device, or None; anything else is returned for the checks to name.
    """
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    dtype = dtype_for(first.device.type)
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.dtype.is_floating_point and t.dtype != torch.float64
        else t
        for t in tensors
    )
