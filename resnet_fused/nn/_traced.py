"""A conv-BN(-add)(-ReLU) while `torch.compile` or `torch.fx` traces it.

Plain ops by default: the compiler fuses them, and an exported program needs no resnet_fused. Where
Triton's kernel serves a residual block's layers and no gradient is wanted, torch.compile gets each
as one op, in which Inductor sees the kernel. A self-check never runs while something is traced, so
the kernel must be admitted already: run the model once, or have a record for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import _triton
from . import _prepared
from ._modules import has_hooks, run_modules, structure


@torch.compiler.assume_constant_result
def _implementation(device: str, index: int | None, dtype: torch.dtype) -> str:
    """The implementation that serves such calls: a constant of the graph."""
    call = backends.Call("conv_bn_act", device, dtype, index=index)
    name = backends.choose(call).implementation.name
    if name == "triton":
        _triton.load()
    if name == "triton" and not _triton.complete("conv_bn_act", torch.device(device, index)):
        return "modules"
    return name


def serves(x: Tensor) -> bool:
    """Whether a compiler, not an exporter, traces, and Triton takes layers on such an input."""
    if torch.compiler.is_exporting() or not torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return _implementation(x.device.type, x.device.index, x.dtype) == "triton"


def _fits(
    x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module | None, residual: Tensor | None
) -> bool:
    """Whether the call is one that the kernel takes."""
    if not serves(x):
        return False
    if act is not None and (type(act) is not nn.ReLU or has_hooks(act)):
        return False
    if structure(conv, bn) is not None:
        return False
    tensors = (x, residual, *_prepared.sources(conv, bn))
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if grad or x.dim() != 4 or x.dtype != conv.weight.dtype or x.shape[1] != conv.in_channels:
        return False
    return residual is None or residual.dtype == x.dtype


def conv_bn(
    x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module | None, residual: Tensor | None
) -> Tensor:
    """The layer in a traced program: Triton's op, or the modules."""
    if not _fits(x, conv, bn, act, residual):
        return run_modules(x, conv, bn, act, residual)
    scale, shift = _prepared.affine(conv, bn, torch.float32)
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    name = "none" if act is None else "relu"
    run = torch.ops.resnet_fused.conv_bn_act.triton
    return run(x, conv.weight, scale, shift, residual, *geometry, name)
