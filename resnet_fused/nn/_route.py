"""The way of one conv-BN(-add)(-ReLU) through a fused module.

Real `nn.Conv2d` and BatchNorm modules hold the parameters. This decides for each call whether they
can be bypassed, by which implementation, and calls them themselves where anything about them is out
of the ordinary: hooks, parametrizations, subclasses, batch statistics, tracing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from .. import backends, ops
from ..ops import _autocast, onednn
from ..ops._checks import DTYPES
from ..ops._library import overload
from ..ops.conv_bn_act import wants_channels_last
from . import _prepared

# By name, so that torchvision and timm need not be imported to recognise theirs.
FROZEN_NORMS = frozenset(
    {
        "torchvision.ops.misc.FrozenBatchNorm2d",
        "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    }
)


@functools.cache
def _is_frozen_type(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" in FROZEN_NORMS


def is_norm(module: object) -> bool:
    """Whether a module is a normalisation that fuses: exactly one of the known types."""
    kind = type(module)
    return kind is nn.BatchNorm2d or kind is nn.SyncBatchNorm or _is_frozen_type(kind)


class Chain:
    """Convolutions of one block that run one after the other on `x`.

    It knows whether `x` is free of NaN, Inf and huge values, asked at most once: what follows from
    a bounded input stays bounded over `onednn.MAX_CHAIN` tame convolutions.
    """

    __slots__ = ("_bounded", "_made", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._bounded: bool | None = None
        self._made: Tensor | None = None

    def bounded(self, residual: Tensor | None = None) -> bool:
        """Whether the chain's input, and a residual that is not its own, are bounded."""
        if self._bounded is None:
            self._bounded = onednn.bounded(self.x)
        if not self._bounded:
            return False
        own = residual is None or residual is self.x or residual is self._made
        return own or onednn.bounded(residual)

    def made(self, y: Tensor) -> None:
        """Notes the output of a tame layer on bounded input."""
        self._made = y

    def unknown(self) -> None:
        """A layer ran on weights that are not known to be tame: nothing follows any more."""
        self._bounded = False


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    slots = module.__dict__
    return bool(
        slots["_forward_hooks"]
        or slots["_forward_pre_hooks"]
        or slots["_backward_hooks"]
        or slots["_backward_pre_hooks"]
        or "forward" in slots
    )


def _global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _structure(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why the modules themselves can't be bypassed, or None."""
    if type(conv) is not nn.Conv2d:
        return f"the convolution is a {type(conv).__name__}, not exactly nn.Conv2d"
    if not is_norm(bn):
        return f"the normalisation is a {type(bn).__name__}, no BatchNorm2d that is known"
    if has_hooks(conv) or has_hooks(bn):
        return "a hook or a forward of its own sits on one of its modules"
    if _global_hooks():
        return "global module hooks are registered"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} with mode {conv.padding_mode!r} is left to PyTorch"
    # `_buffers` rather than attributes: `nn.Module.__getattr__` is slow, and this runs each time.
    if bn._buffers["running_mean"] is None or bn._buffers["running_var"] is None:
        return "the BatchNorm keeps no running statistics, it always uses the batch's"
    if bn.training and not _is_frozen_type(type(bn)):
        return "training: batch statistics, PyTorch's own ops run"
    return None


def _call(x: Tensor, conv: nn.Module, residual: Tensor | None) -> str | None:
    """Why this call is left to the modules, or None."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    weight, device, dtype = conv._parameters["weight"], x.device, x.dtype
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions"
    if device != weight.device:
        return f"input on {device}, weight on {weight.device}: PyTorch reports it"
    if device.type not in ("cpu", "cuda"):
        return f"device {device.type} is left to PyTorch"
    if dtype != weight.dtype and _autocast.dtype_for(device.type) is None:
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


def conv_bn(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    act: nn.Module | None = None,
    residual: Tensor | None = None,
    *,
    chain: Chain | None = None,
    inner: bool = False,
    give_residual: bool = False,
) -> Tensor:
    """Computes act(bn(conv(x)) [+ residual]) by the implementation that serves the call.

    Args:
        x: [N, C, H, W].
        conv: usually an `nn.Conv2d`.
        bn: usually an `nn.BatchNorm2d`.
        act: an `nn.ReLU`, or None.
        residual: [N, K, P, Q], added before the activation.
        chain: the block's chain, so that its input is checked once; None checks `x` itself.
        inner: the output goes into the next fused convolution alone; its layout is free then.
        give_residual: nobody else can see `residual`: it may be overwritten.

    Returns:
        [N, K, P, Q], what the modules themselves would return up to rounding.
    """
    if torch.compiler.is_compiling() or isinstance(x, fx.Proxy):
        # Plain ops: the compiler fuses them, and an exported program needs no resnet_fused.
        return run_modules(x, conv, bn, act, residual)
    if act is not None and (type(act) is not nn.ReLU or has_hooks(act)):
        return act(conv_bn(x, conv, bn, None, residual, chain=chain, give_residual=give_residual))
    if torch.is_grad_enabled():
        # A step is likely to follow, and torch's fused optimisers leave no new version behind.
        conv.__dict__.pop(_prepared.ATTRIBUTE, None)
    reason = _structure(conv, bn) or _call(x, conv, residual)
    if reason is not None:
        y = run_modules(x, conv, bn, act, residual)
        if chain is not None:
            chain.unknown()
        if backends.is_recording():
            pattern = pattern_of(act, residual is not None)
            route = backends.Route(conv, bn, act, pattern, "-", "modules", reason)
            backends.record(route, x, residual, y)
        return y
    return _fused(x, conv, bn, act, residual, chain or Chain(x), inner, give_residual)


def _fused(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.Module,
    act: nn.Module | None,
    residual: Tensor | None,
    chain: Chain,
    inner: bool,
    give_residual: bool,
) -> Tensor:
    name = "none" if act is None else "relu"
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, *_prepared.sources(conv, bn))
    )
    dtype = _autocast.dtype_for(x.device.type) or x.dtype
    given = x, residual
    if x.dtype != dtype:
        x = x.to(dtype)
    if residual is not None and residual.dtype != dtype:
        residual = residual.to(dtype)
    call = backends.Call("conv_bn_act", x.device.type, dtype, grad, residual is not None, name)
    choice = backends.choose(call)
    folded = None
    if choice.implementation.name == "cpu":
        folded = _prepared.folded(conv, bn, dtype)
        reason = _unfit(folded, x)
        if reason is not None:
            choice, folded = backends.next_choice(call, choice, reason), None
    recording = backends.is_recording()
    if folded is not None:
        give = give_residual and not recording
        y = _onednn(x, conv, folded, residual, act is not None, chain, inner, give)
    else:
        y = _by_op(choice.implementation.name, x, conv, bn, residual, name, grad)
        chain.unknown()
    if recording:
        route = backends.Route(
            conv,
            bn,
            act,
            pattern_of(act, residual is not None),
            "conv_bn_act",
            choice.implementation.name,
            choice.why,
            choice.refused,
            choice.implementation.rounding,
        )
        backends.record(route, *given, y)
    return y


def _unfit(folded: onednn.Folded, x: Tensor) -> str | None:
    """Why these weights, or this input, are no case for oneDNN, or None."""
    if not folded.tame:
        return "folded weights that are huge or not finite"
    if not folded.serves(x):
        return "PyTorch does not give a convolution this small to oneDNN either"
    return None


def _by_op(
    implementation: str,
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.Module,
    residual: Tensor | None,
    act: str,
    grad: bool,
) -> Tensor:
    """The layer by `rf.ops.conv_bn_act`: with autograd, or by the implementation itself."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift = _prepared.affine(conv, bn, compute)
    weight = conv.weight.to(x.dtype)
    padding, stride, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
    if grad:
        return ops.conv_bn_act(
            x,
            weight,
            scale,
            shift,
            residual,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=conv.groups,
            act=act,
        )
    run = overload("conv_bn_act", implementation)
    geometry = (stride, padding, dilation, conv.groups, act)
    return run(x, weight, scale, shift, residual, *geometry)


def _onednn(
    x: Tensor,
    conv: nn.Conv2d,
    folded: onednn.Folded,
    residual: Tensor | None,
    relu: bool,
    chain: Chain,
    inner: bool,
    give_residual: bool,
) -> Tensor:
    # oneDNN's ReLU loses NaN: without the certainty that none can come, PyTorch's follows instead.
    keep_nan = not chain.bounded(residual)
    y = folded.run(x, residual, relu, keep_nan, give_residual)
    chain.made(y)
    if inner or wants_channels_last(chain.x, conv._parameters["weight"]):
        return y
    return y.contiguous()
