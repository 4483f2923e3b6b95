"""Names of what a call runs, read from torch.profiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


# Ops that touch no data: they look at a tensor, or make room for one.
_PLUMBING = _aten(
    "_local_scalar_dense _nnpack_available _reshape_alias "
    "_to_copy _unsafe_view alias as_strided as_strided_ clone contiguous detach detach_ empty "
    "empty_like empty_strided expand expand_as flatten is_nonzero is_same_size item lift_fresh "
    "ones_like permute reshape resize_ resolve_conj resolve_neg result_type select set_ slice "
    "squeeze t to transpose unsqueeze view view_as zeros zeros_like"
)
# Ops that only move or set values: kernels where nothing that computes has called them.
_MOVES = _aten("copy_ fill_ zero_")


def traced(call: Callable[[int], Any], device: str) -> list[str]:
    """Runs a call once and names what it ran, in order, each name once.

    Args:
        call: run on operand set 0.
        device: "cuda" names the kernels of the GPU; "cpu" the ops that call no other op that
            computes: there an op's own loop is its kernel.

    Returns:
        Names such as "aten::mkldnn_convolution" or "void cudnn::ops::...".
    """
    # The profiler's own log would land between a command's lines.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        call(0)
        if device == "cuda":
            torch.cuda.synchronize()
    return kernel_names(found.events() or (), device)


def kernel_names(events: Iterable[Any], device: str) -> list[str]:
    """The names among a profiler's events; arguments as `traced`."""
    names: dict[str, None] = {}
    for event in events:
        if device == "cuda":
            if event.device_type == torch.autograd.DeviceType.CUDA and not _copies(event.name):
                names[event.name] = None
        elif event.cpu_parent is None:
            names.update(dict.fromkeys(_within(event)))
    return list(names)


def _within(event: Any) -> list[str]:
    """The kernels of an op on the CPU: those of the ops that it calls, or itself."""
    inner = [name for child in event.cpu_children for name in _within(child)]
    computes = "::" in event.name and not event.name.startswith("autograd::")
    if not computes or event.name in _PLUMBING or any(name not in _MOVES for name in inner):
        return inner
    return [event.name]


def _copies(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))
