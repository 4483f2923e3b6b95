"""`head`: a residual network's last layers as one op, average pooling and the classifier.

    mean = rnd(sum over h, w of x[n, c, h, w] / (H W))
    out  = rnd(mean @ weight.T [+ bias])

"Deep Residual Learning for Image Recognition", table 1: average pool and fully connected layer. The
mean is summed in float32 in a fixed order and rounded once, as eager PyTorch's is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _autocast, _checks, _cuda_stem, _entering
from ._library import overload

SCHEMA = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean = x.mean((2, 3), dtype=wide).to(x.dtype)
    return F.linear(mean, weight, bias)


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


_entering.enter(
    "head",
    SCHEMA,
    _reference,
    _parts,
    "_stem_checks",
    kernel="Triton, pooled as the product reads it",
    by="PyTorch's pooling and linear",
    roundings=("fused", "fused", "fused"),
    cuda=_entering.Cuda(
        "hand-written CUDA, pooled once, then multiplied",
        _cuda_stem.supports,
        _cuda_stem.launch_head,
        _cuda_stem.CHECKS,
        first=True,
    ),
)


def choose(x: Tensor, weight: Tensor) -> backends.Choice:
    """The implementation for checked arguments, and why.

    Args:
        x: [N, C, H, W].
        weight: [classes, C].
    """
    call = backends.Call("head", x.device.type, x.dtype, index=x.device.index)
    choice = backends.choose(call)
    if choice.implementation.name == "cuda":
        reason = _cuda_stem.unfit_head(x, weight)
        if reason is not None:
            choice = backends.next_choice(call, choice, reason)
    return choice


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes linear(mean over height and width of x).

    Args:
        x: [N, C, H, W]; float32, bfloat16, float16 or float64, any layout (fastest in
            channels_last).
        weight: [classes, C], dtype of `x`.
        bias: [classes], dtype of `x`, or None.

    Returns:
        [N, classes] in `x`'s dtype, contiguous. It has no derivative. Under autocast all are cast.

    Raises:
        RuntimeError: a gradient is wanted.
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices do not fit.

    Example:
        >>> logits = rf.ops.head(x, fc.weight, fc.bias)
    """
    op = "head"
    x, weight, bias = _autocast.cast(x, weight, bias)
    x = _checks.check_activation_tensor(op, "x", x)
    if 0 in x.shape[2:]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; a mean needs one pixel or more")
    weight = _check_like("weight", weight, x, (None, x.shape[1]))
    if bias is not None:
        bias = _check_like("bias", bias, x, (weight.shape[0],))
    _checks.no_derivative(op, *(t for t in (x, weight, bias) if t is not None))
    name = "reference"
    if not torch.compiler.is_compiling():
        name = choose(x, weight).implementation.name
    return overload(op, name)(x, weight, bias)


def _check_like(name: str, t: object, x: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"head: {name} must be a Tensor, got {type(t).__name__}")
    if t.device != x.device:
        raise ValueError(f"head: {name} is on {t.device}, x on {x.device}; both must be on one")
    if t.dtype is not x.dtype:
        raise TypeError(f"head: {name} has dtype {t.dtype}, x has {x.dtype}; both must agree")
    fits = t.dim() == len(shape) and all(
        size is None or size == given for size, given in zip(shape, t.shape, strict=True)
    )
    if not fits:
        accepted = ", ".join("classes" if size is None else str(size) for size in shape)
        raise ValueError(f"head: {name} has shape {tuple(t.shape)}; [{accepted}] is needed")
    return t
