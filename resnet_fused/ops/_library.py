"""Registers ops with PyTorch: one schema an op, one overload an implementation, one fake.

`torch.ops.resnet_fused.conv_bn_act.cpu` and `.reference` share a schema; the overload is picked in
Python before dispatch, so that a compiled graph holds the one that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "resnet_fused"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines one overload of an op for every device, with its fake.

    Args:
        name: op and overload, such as "bn_act.reference".
        schema: arguments and result, "(Tensor x, ...) -> Tensor".
        body: the implementation. It is no composite for autograd: gradients come from an
            `autograd.Function` outside the op.
        fake: shapes, dtypes and strides of the result, for tracing.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def overload(op: str, implementation: str) -> Any:
    """The callable overload `torch.ops.resnet_fused.<op>.<implementation>`."""
    if implementation == "triton":
        from . import _triton

        _triton.load()
    return getattr(getattr(torch.ops.resnet_fused, op), implementation)
