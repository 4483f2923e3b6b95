"""Whether an op of this package exists here and serves a place: what the rewrite rules ask."""

from __future__ import annotations

import importlib

import torch

from .. import backends, ops


def no_e4m3(device: torch.device) -> str | None:
    """Why `stem` writes no e4m3 on a device, or None."""
    return importlib.import_module("resnet_fused.ops.stem").writes_no_e4m3(device)


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a whole-graph op is not used, or None.

    On the CPU it would be a composition of the very calls that it replaces: nothing is gained by
    it, and the single steps keep their packed weights.

    Args:
        op: "stem", "head", "conv_chain" or "conv_chain_fp8".
        device: where the engine runs.
        dtype: of its activations.
    """
    if not hasattr(ops, op):
        return f"this version has no op {op}"
    if device.type == "cpu":
        return "on the CPU it is the same calls one after the other"
    call = backends.Call(op, device.type, dtype, index=device.index)
    choice = backends.choose(call)
    if choice.implementation.name in backends.GPU_BACKENDS:
        return None
    said = "; ".join(f"{name}: {reason}" for name, reason in choice.refused)
    return f"no kernel of {op} serves it: {said or choice.why}"
