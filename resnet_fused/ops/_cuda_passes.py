"""Training's passes of the compiled extension on a GPU, as implementations of their ops.

A pass is the raw op that serves the CPU too: checks are one, and the device of its tensors decides
which kernel runs. The kernels are in csrc/kernels/.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _extension, admission, backends
from . import _passes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECKS = "_cuda_training_checks"
"""The module of `resnet_fused.ops` that holds their self-checks."""


def exists(op: str) -> bool:
    """Whether the extension holds a CUDA kernel of an op."""
    if not _extension.available():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fused::{op}_out", "CUDA")


def supports(call: backends.Call) -> str | None:
    """Why the CUDA kernel can't serve a call, or None."""
    if call.device != "cuda":
        return f"x is on {call.device}"
    if call.dtype not in DTYPES:
        return f"no CUDA kernel for {call.dtype}"
    if not _extension.available():
        return f"the compiled extension is missing: {_extension.why_not()}"
    if not _extension.has_cuda_kernels():
        return "the extension was built without nvcc"
    if not exists(call.op):
        return f"the extension holds no CUDA kernel of {call.op}: build it again"
    return admission.refusal(call, "cuda")


def launch(op: str) -> Callable[..., None]:
    """What runs an op's kernel, called with operands, results and options in this order.

    Args:
        op: its name.
    """
    found: Callable[..., None] = getattr(_passes, op)
    return found
