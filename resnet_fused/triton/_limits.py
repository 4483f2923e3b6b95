"""What a device offers to a kernel, and whether Triton is there. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ._tiles import Limits

INTERPRETER_LIMITS = Limits(4, 232448, 90, "Triton's interpreter")
"""An H200's but for its multiprocessors: for few of them few, large tiles are chosen, which the
interpreter, a program at a time, gets through sooner."""

SWITCH = "RESNET_FUSED_PDL"
"""Environment variable: 0 leaves programmatic dependent launch out (see `_dependent`)."""

DEPENDENT = 90
"""The first compute capability, times ten, that has it."""


@functools.cache
def installed() -> bool:
    """Whether the triton package can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET, read once as Triton does."""
    return installed() and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def of_device(index: int) -> Limits:
    """The limits of a CUDA device."""
    found = torch.cuda.get_device_properties(index)
    capability = 10 * found.major + found.minor
    memory = found.shared_memory_per_block_optin
    return Limits(found.multi_processor_count, memory, capability, found.name)


def limits(device: torch.device) -> Limits:
    """The limits of a tensor's device; for the CPU those that the interpreter pretends."""
    if device.type != "cuda":
        return INTERPRETER_LIMITS
    return of_device(torch.cuda.current_device() if device.index is None else device.index)


def not_dependent(device: torch.device) -> str | None:
    """Why kernels on a device are not launched before the one ahead has ended, or None."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "false", "off"):
        return f"{SWITCH} switches it off"
    if interpreted():
        return "Triton's interpreter runs one kernel after the other"
    capability = limits(device).capability
    if capability < DEPENDENT:
        return f"sm_{capability} cannot, sm_{DEPENDENT} is the first that can"
    return None
