"""A layer's modules: whether they can be bypassed, and what it is to call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..ops import _autocast
from ..ops._checks import DTYPES

# By name, so that torchvision and timm need not be imported to recognise theirs.
FROZEN_NORMS = frozenset(
    {
        "torchvision.ops.misc.FrozenBatchNorm2d",
        "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    }
)


def is_frozen_type(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" in FROZEN_NORMS


def is_norm(module: object) -> bool:
    """Whether a module is a normalisation that fuses: exactly one of the known types."""
    kind = type(module)
    return kind is nn.BatchNorm2d or kind is nn.SyncBatchNorm or is_frozen_type(kind)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(hooked(module.__dict__))


def hooked(slots: dict[str, Any]) -> object:
    return (
        slots["_forward_hooks"]
        or slots["_forward_pre_hooks"]
        or slots["_backward_hooks"]
        or slots["_backward_pre_hooks"]
        or "forward" in slots
    )


def has_global_hooks() -> bool:
    """Whether hooks are registered for every module."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def structure(conv: nn.Module, bn: nn.Module, live: bool = False) -> str | None:
    """Why the modules themselves can't be bypassed, or None.

    Args:
        conv: the convolution.
        bn: the normalisation behind it.
        live: the batch's statistics are no reason.
    """
    if type(conv) is not nn.Conv2d:
        return f"the convolution is a {type(conv).__name__}, not exactly nn.Conv2d"
    if not is_norm(bn):
        return f"the normalisation is a {type(bn).__name__}, no BatchNorm2d that is known"
    if has_hooks(conv) or has_hooks(bn):
        return "a hook or a forward of its own sits on one of its modules"
    if has_global_hooks():
        return "global module hooks are registered"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} with mode {conv.padding_mode!r} is left to PyTorch"
    if live:
        return None
    # `_buffers` rather than attributes: `nn.Module.__getattr__` is slow, and this runs each time.
    if bn._buffers["running_mean"] is None or bn._buffers["running_var"] is None:
        return "the BatchNorm keeps no running statistics, it always uses the batch's"
    if bn.training and not is_frozen_type(type(bn)):
        return "training: batch statistics, PyTorch's own ops run"
    return None


def call_reason(x: Tensor, conv: nn.Module, residual: Tensor | None) -> str | None:
    """Why this call is left to the modules, or None."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    weight, device, dtype = conv._parameters["weight"], x.device, x.dtype
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions"
    if device != weight.device:
        return f"input on {device}, weight on {weight.device}: PyTorch reports it"
    if device.type not in ("cpu", "cuda"):
        return f"device {device.type} is left to PyTorch"
    as_given = _autocast.dtype_for(device.type) is None or torch.float64 in (dtype, weight.dtype)
    if dtype != weight.dtype and as_given:
        return f"input {dtype}, weight {weight.dtype}: PyTorch reports it"
    if dtype not in DTYPES:
        return f"dtype {dtype} is left to PyTorch"
    if x.shape[1] != conv.in_channels:
        return "the channels do not fit: PyTorch reports it"
    if residual is not None and residual.dtype != dtype:
        return "input and shortcut have different dtypes"
    return None


def run_modules(
    x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module | None, residual: Tensor | None
) -> Tensor:
    """The same by calling the modules: what an unfused block does."""
    y = bn(conv(x))
    if residual is not None:
        y = y + residual
    return y if act is None else act(y)


def pattern_of(act: nn.Module | None, residual: bool) -> str:
    """Name of the pattern: "conv+bn", "conv+bn+relu", "conv+bn+add", "conv+bn+add+relu"."""
    return "conv+bn" + ("+add" if residual else "") + ("+relu" if act is not None else "")
