"""Readings of the machine: peak memory of a call, a GPU's clocks, time by layer. Nothing is set."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
_STARTS = (
    ("conv", re.compile(r"conv", re.IGNORECASE)),
    ("linear", re.compile(r"linear|addmm|matmul|::mm$")),
    ("pool", re.compile(r"pool|::mean")),
)
"""Kinds of `roofline.LayerCost` that begin a layer -> names of the profiler's outermost events."""


class Step(NamedTuple):
    """A layer as a profile shows it.

    Attributes:
        name: of the module.
        kind: of `roofline.LayerCost`: "conv", "linear" or "pool".
        shape: of a convolution's input.
        projection: whether it is a shortcut's.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    projection: bool = False


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call has in use at its peak above what was in use before it.

    On a GPU torch's allocator tells; on the CPU the kernel's mark of the process' resident memory,
    where it can be reset (Linux).

    Args:
        call: what to run, once.
        device: "cpu" or "cuda".

    Returns:
        The bytes, or None where nothing tells them; the call may not have been made then.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before)
    _give_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _give_back_freed_memory() -> None:
    """What was freed before and kept by the allocator would hide what a call needs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library than glibc
        return


def _status(field: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise KeyError(field)


def current_gpu() -> str:
    """What nvidia-smi and CUDA_VISIBLE_DEVICES call the GPU that torch is set to."""
    index, visible = torch.cuda.current_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)


def clocks(index: int | str = 0) -> dict[str, Any] | None:
    """A GPU's driver, clocks in MHz, power in W and temperature, as nvidia-smi tells them.

    Args:
        index: of the GPU, or its UUID.

    Returns:
        None without nvidia-smi or a GPU; a field that the device does not tell is None.
    """
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--id={index}", "--format=csv,noheader,nounits",
             f"--query-gpu={','.join(_SMI_FIELDS.values())}"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in said.strip().split(",")]
    if len(values) != len(_SMI_FIELDS):
        return None
    found = dict(zip(_SMI_FIELDS, values, strict=True))
    return {name: value if name == "driver" else _number(value) for name, value in found.items()}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def layer_seconds(
    call: Callable[[], Any], orders: Sequence[Sequence[Step]], device: str
) -> dict[str, float] | None:
    """Seconds of each layer in one call under torch's profiler, which slows small ones down.

    A layer begins with its convolution, pooling or matrix product; what follows (BatchNorm, ReLU,
    copies) is its own until the next begins. An add behind a projection belongs to the layer that
    ends the block. On a GPU it is the kernels' time, on the CPU that of the operators.

    Args:
        call: what to run, once.
        orders: the layers, in the orders in which they may run; the first that fits is taken.
        device: "cpu" or "cuda".

    Returns:
        Name -> seconds; None where the operators are those of no order (a compiler has merged
        them, or another library ran).
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as taken:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    outermost = sorted(
        (
            event
            for event in taken.events() or ()
            if event.cpu_parent is None and _is_operator(event)
        ),
        key=lambda event: event.time_range.start,
    )
    spent = [
        (event.name, next((shape for shape in event.input_shapes if len(shape) == 4), None),
         1e-6 * (event.device_time_total if device == "cuda" else event.cpu_time_total))
        for event in outermost
    ]  # fmt: skip
    return next((found for order in orders if (found := by_layer(spent, order)) is not None), None)


def by_layer(
    spent: Sequence[tuple[str, Sequence[int] | None, float]], order: Sequence[Step]
) -> dict[str, float] | None:
    """Shares operators out among layers.

    Args:
        spent: (operator, shape of its first image [N, C, H, W] or None, seconds), as they ran.
        order: the layers.

    Returns:
        Name -> seconds; None if these are not the operators of these layers.
    """
    found: dict[str, float] = {}
    steps, current = iter(order), None
    before: str | None = None  # the layer before a projection
    for operator, shape, seconds in spent:
        kind = next((kind for kind, name in _STARTS if name.search(operator)), None)
        if kind is not None:
            step = next(steps, None)
            if step is None or step.kind != kind:
                return None
            if kind == "conv" and shape is not None and tuple(shape) != step.shape:
                return None
            before = current if step.projection else None
            current = step.name
            found[current] = 0.0
        elif "::add" in operator and before is not None:
            current, before = before, None
        if current is not None:
            found[current] += seconds
    return found if next(steps, None) is None else None


def _is_operator(event: Any) -> bool:
    """Whether an event is an operator's, not a kernel's on the GPU or a call of CUDA's runtime."""
    return event.device_type == torch.autograd.DeviceType.CPU and "::" in event.name
