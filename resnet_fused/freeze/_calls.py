"""Steps that are PyTorch's own: how each is run, and which functions a saved engine may name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import _training, quantize_e4m3
from ._ir import Const, Ref, Step, fill

# A saved file holds names, never code: it can reach these functions and no other.
_TORCH = (
    "abs add addmm amax bmm cat ceil chunk clamp conv2d div exp flatten floor full_like "
    "log log_softmax matmul max_pool2d mean minimum maximum mul neg permute pow relu reshape "
    "rsqrt sigmoid softmax split sqrt squeeze stack sub sum tanh transpose unbind unsqueeze "
    "zeros_like"
)
_FUNCTIONAL = (
    "adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d batch_norm conv2d dropout elu gelu "
    "group_norm hardsigmoid hardswish hardtanh interpolate layer_norm leaky_relu linear "
    "log_softmax max_pool2d mish normalize pad pixel_shuffle relu relu6 selu sigmoid silu softmax "
    "softplus tanh"
)
_OPERATORS = "add eq floordiv ge getitem gt le lt matmul mod mul ne neg pow sub truediv"
_METHODS = (
    "abs add amax argmax chunk clamp contiguous dim div exp expand flatten float half bfloat16 "
    "double log log_softmax matmul mean mul neg numel permute pow relu repeat reshape rsqrt "
    "sigmoid size softmax split sqrt squeeze sub sum tanh to transpose unbind unflatten unsqueeze "
    "view"
)
_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT"})


def attribute(value: Any, name: str) -> Any:
    """`value.name`, for the few names that say what a tensor is.

    Raises:
        ValueError: another name.
    """
    if name not in _ATTRIBUTES:
        raise ValueError(f"attribute {name!r} is not among {', '.join(sorted(_ATTRIBUTES))}")
    return getattr(value, name)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"torch.nn.functional.{name}": getattr(F, name) for name in _FUNCTIONAL.split()},
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    "attribute": attribute,
}
METHODS = frozenset(_METHODS.split())
NAMES = {function: name for name, function in FUNCTIONS.items()}


def _pool(step: Step, x: Tensor) -> Tensor:
    o = step.options
    return F.max_pool2d(
        x, o["kernel"], o["stride"], o["padding"], o["dilation"], ceil_mode=o["ceil_mode"]
    )


def _linear(step: Step, x: Tensor) -> Tensor:
    return F.linear(x, step.tensors["weight"], step.tensors.get("bias"))


def _conv(step: Step, x: Tensor) -> Tensor:
    o, t = step.options, step.tensors
    return torch.conv2d(
        x, t["weight"], t.get("bias"), o["stride"], o["padding"], o["dilation"], o["groups"]
    )


def _norm(step: Step, x: Tensor) -> Tensor:
    t = step.tensors
    return F.batch_norm(
        x, t["mean"], t["var"], t.get("weight"), t.get("bias"), False, 0.0, step.options["eps"]
    )


def _images(step: Step, x: Tensor) -> Tensor:
    factor, summand = (_training.per_channel(row) for row in step.tensors["input_norm"])
    wide = _training.fma(factor, x.to(factor.dtype), summand)
    return wide.to(step.options["dtype"])


def _call(step: Step, *values: Any) -> Any:
    given = dict(zip(step.inputs, values, strict=True))

    def put(part: Ref | Const) -> Any:
        return given[part.value] if isinstance(part, Ref) else step.tensors[part.name]

    args, kwargs = fill(step.options["args"], put), fill(step.options["kwargs"], put)
    if isinstance(step.target, str):
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    assert step.target is not None
    return step.target(*args, **kwargs)


KINDS: dict[str, Callable[..., Any]] = {
    "add": lambda step, x, y: x + y,
    "avg_pool": lambda step, x: F.adaptive_avg_pool2d(x, step.options["size"]),
    "bn": _norm,
    "call": _call,
    "conv": _conv,
    "flatten": lambda step, x: torch.flatten(x, step.options["start"], step.options["end"]),
    "linear": _linear,
    "images": _images,
    "max_pool": _pool,
    "quantize": lambda step, x: quantize_e4m3(x, step.options["scale"]),
    "relu": lambda step, x: torch.relu(x),
}


def run(step: Step, values: Sequence[Any]) -> Any:
    """A step by PyTorch's own ops, or by its module.

    Args:
        step: of a kind that is PyTorch's.
        values: of its inputs, in order.
    """
    if step.module is not None:
        if step.options.get("guard"):  # it may write into what it is given
            values = [value.clone() for value in values]
        return step.module(*values)
    return KINDS[step.kind](step, *values)


def function(name: str) -> Callable[..., Any]:
    """The function of a name in a saved engine.

    Raises:
        ValueError: it is not one that a file may name.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"the file names the function {name!r}, which is not known here")
    return FUNCTIONS[name]
