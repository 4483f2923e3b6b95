"""The way of one conv-BN(-add)(-ReLU) through a fused module.

Real `nn.Conv2d` and BatchNorm modules hold the parameters. This decides for each call whether they
can be bypassed, by which implementation, and calls them themselves where anything about them is out
of the ordinary: hooks, parametrizations, subclasses, batch statistics, tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from .. import backends, ops
from ..ops import _autocast, onednn
from ..ops._checks import DTYPES
from ..ops._library import overload
from ..ops.conv_bn_act import detail, unfit, wants_channels_last
from . import _prepared, _traced, _training_route
from ._modules import (
    call_reason,
    has_global_hooks,
    has_hooks,
    hooked,
    is_frozen_type,
    is_norm,
    pattern_of,
    run_modules,
    structure,
)


class Chain:
    """Convolutions that run one after the other, nobody else seeing what passes between them.

    Attributes:
        x: the input of the chain [N, C, H, W].
        bound: a bound on the magnitude of the next layer's input; None if nobody has looked.
        x_bound: that of `x`.
        residual_bound: that of a shortcut other than `x`.
        quick: nothing outside of the layers' own modules keeps them from oneDNN, so that each layer
            need look at those alone.
    """

    __slots__ = ("bound", "quick", "residual_bound", "x", "x_bound")

    def __init__(self, x: Tensor, bound: float | None = None, quick: bool | None = None) -> None:
        self.x = x
        self.bound = self.x_bound = bound
        self.residual_bound: float | None = None
        self.quick = nothing_special(x) if quick is None else quick

    def gives_channels_last(self, conv: nn.Module) -> bool:
        """Whether the chain's output is channels_last, as PyTorch's convolution would make it."""
        return wants_channels_last(self.x, conv._parameters["weight"])

    def advance(self, x: Tensor, residual: Tensor | None, folded: onednn.Folded) -> bool:
        """Bounds a layer's output by its input's bound.

        Returns:
            Whether it is far from overflow, so that no NaN can arise in it.
        """
        bound = self._after(x, residual, folded)
        if not bound < onednn.LARGEST and self.bound is not None:
            # Bounds that were carried over grow faster than the values: look at the values.
            self.bound = self.residual_bound = None
            if x is self.x or residual is self.x:
                self.x_bound = None
            bound = self._after(x, residual, folded)
        safe = bound < onednn.LARGEST
        self.bound = bound if safe else None
        return safe

    def _after(self, x: Tensor, residual: Tensor | None, folded: onednn.Folded) -> float:
        bound = self.x_bound if x is self.x else self.bound
        if bound is None:
            bound = onednn.largest(x)
            if x is self.x:
                self.x_bound = bound
        total = bound * folded.gain + folded.offset
        if residual is None:
            return total
        other = self.x_bound if residual is self.x else self.residual_bound
        if other is None:
            other = onednn.largest(residual)
            if residual is self.x:
                self.x_bound = other
        return total + other


def nothing_special(x: Tensor) -> bool:
    """Whether a plain call on plain data: what every layer of a chain would find out again."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not backends.is_recording()
        and not torch._C._is_any_autocast_enabled()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not has_global_hooks()
        and backends.choose(backends.Call("conv_bn_act", "cpu", x.dtype)).implementation.name
        == "cpu"
    )


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
    folded: onednn.Folded | None = None,
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
        folded: what `ready` has returned a moment ago, in a chain that is `quick`.

    Returns:
        [N, K, P, Q], what the modules themselves would return up to rounding.
    """
    if folded is not None and chain is not None:
        weight = folded.packed_for(x.shape)
        if weight is not None and (residual is None or residual.dtype is x.dtype):
            keep_nan = not chain.advance(x, residual, folded)
            y = folded.run_with(weight, x, residual, act is not None, keep_nan, give_residual)
            return y if inner or chain.gives_channels_last(conv) else y.contiguous()
    if torch.compiler.is_compiling() or isinstance(x, fx.Proxy):
        return _traced.conv_bn(x, conv, bn, act, residual)
    if act is not None and (type(act) is not nn.ReLU or has_hooks(act)):
        y = act(conv_bn(x, conv, bn, None, residual, chain=chain, give_residual=give_residual))
        if chain is not None:
            chain.bound = None
        return y
    if torch.is_grad_enabled():
        # A step is likely to follow, and torch's fused optimisers leave no new version behind.
        conv.__dict__.pop(_prepared.ATTRIBUTE, None)
    reason = structure(conv, bn) or call_reason(x, conv, residual)
    if reason is not None and is_norm(bn) and _training_route.is_live(bn):
        trained, reason = _training_route.run_layer(x, conv, bn, act, residual)
        if trained is not None:
            if chain is not None:
                chain.bound = None
            return trained
    if reason is not None:
        y = run_modules(x, conv, bn, act, residual)
        if chain is not None:
            chain.bound = None
        if backends.is_recording():
            pattern = pattern_of(act, residual is not None)
            route = backends.Route(conv, bn, act, pattern, "-", "modules", reason)
            backends.record(route, x, residual, y)
        return y
    return _fused(x, conv, bn, act, residual, chain or Chain(x), inner, give_residual)


def ready(
    conv: nn.Module, bn: nn.Module, act: nn.Module | None, dtype: torch.dtype
) -> onednn.Folded | None:
    """A layer's prepared weights, if its modules are as they were when they were made; else None.

    What `structure` and `_prepared.folded` would find, in fewer steps: in a network for one image
    the checks take as long as the small convolutions. `act` None stands for any.
    """
    layer, norm = conv.__dict__, bn.__dict__
    cache = layer.get(_prepared.ATTRIBUTE)
    entry = None if cache is None else cache.entry
    if entry is None or type(conv) is not nn.Conv2d or type(bn) is not entry.norm:
        return None
    geometry = (layer["stride"], layer["padding"], layer["dilation"], layer["groups"])
    if (
        hooked(layer)
        or hooked(norm)
        or (act is not None and (type(act) is not nn.ReLU or hooked(act.__dict__)))
        or (norm["training"] and not entry.frozen)
        or layer["padding_mode"] != "zeros"
        or entry.options != (dtype, norm["eps"], geometry)
        or not entry.snapshot.holds()
    ):
        return None
    return entry.value


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
    dtype = _autocast.arithmetic(x)
    given = x, residual
    if x.dtype != dtype:
        x = x.to(dtype)
    if residual is not None and residual.dtype != dtype:
        residual = residual.to(dtype)
    call = backends.Call(
        "conv_bn_act", x.device.type, dtype, grad, residual is not None, name, x.device.index,
        grad and any(t.requires_grad for t in _prepared.scale_sources(bn)),
    )  # fmt: skip
    choice = backends.choose(call)
    folded = None
    narrow = choice.implementation.name == "cpu32"
    if narrow or choice.implementation.name == "cpu":
        compute = torch.float32 if narrow else dtype
        folded = _prepared.folded(conv, bn, compute, dtype, is_frozen_type(type(bn)))
        reason = _unfit(folded, x, narrow)
        if reason is not None:
            choice, folded = backends.next_choice(call, choice, reason), None
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    while choice.implementation.name in backends.GPU_BACKENDS:
        reason = unfit(choice.implementation.name, x, conv.weight, geometry)
        if reason is None:
            break
        choice = backends.next_choice(call, choice, reason)
    recording = backends.is_recording()
    if folded is not None and narrow:
        y = onednn.run_in_float32(folded, x, residual, act is not None)
        y = y if inner or chain.gives_channels_last(conv) else y.contiguous()
        chain.bound = None
    elif folded is not None:
        give = give_residual and not recording
        y = _onednn(x, conv, folded, residual, act is not None, chain, inner, give)
    else:
        y = _by_op(choice.implementation.name, x, conv, bn, residual, name, grad)
        chain.bound = None
    if recording:
        more = detail(choice.implementation.name, x, conv.weight, residual, geometry)
        route = backends.Route(
            conv,
            bn,
            act,
            pattern_of(act, residual is not None),
            "conv_bn_act",
            choice.implementation.name,
            choice.why if more is None else f"{choice.why}; {more}",
            choice.refused,
            choice.implementation.rounding,
        )
        backends.record(route, *given, y)
    return y


def _unfit(folded: onednn.Folded, x: Tensor, narrow: bool) -> str | None:
    """Why these weights, or this input, are no case for oneDNN, or None."""
    if not folded.tame:
        return "folded weights that are huge or not finite"
    padding, stride, dilation, _ = folded.geometry
    if not onednn.shape_fits(x, folded.weight, stride, padding, dilation):
        return "a shape of which oneDNN has been seen to err"
    if not narrow and not folded.serves(x):
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
    scale, shift = _prepared.vectors(conv, bn, compute)
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
    keep_nan = not chain.advance(x, residual, folded)
    y = folded.run(x, residual, relu, keep_nan, give_residual)
    return y if inner or chain.gives_channels_last(conv) else y.contiguous()
