"""Which configurations of a kernel a call may take."""

from __future__ import annotations

import torch

from .. import admission, backends


def names(op: str, implementation: str, device: torch.device) -> frozenset[str] | None:
    """Configurations that were admitted on a device; None where the user's word is enough.

    Args:
        op: "conv_bn_act".
        implementation: "triton" or "cuda".
        device: of the call's tensors.
    """
    if device.type != "cuda" or backends.requested()[0] != "auto":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return admission.verdict(op, implementation, index).configurations
