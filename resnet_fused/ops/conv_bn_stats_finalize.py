"""`conv_bn_stats_finalize`: a convolution whose output's BatchNorm is ready when it ends.

    y, stats = conv_bn_stats(x, weight, norm)
    rows = bn_finalize(stats, m, gamma, beta)            m = N P Q: scale, shift, mean, invstd
    running statistics = bn_update_stats(stats, m, ...)  in place

What these three ops compute, bit for bit, in one launch where the CUDA kernel serves: the blocks
that merge a channel's statistics finalize them too. It writes into its arguments, so it has no
gradient: who differentiates takes the three ops, and a node of `resnet_fused.nn` calls it below
autograd. With SyncBatchNorm the statistics of all ranks are exchanged before they are finalized.
Ioffe and Szegedy, "Batch Normalization", algorithm 1; "Deep Residual Learning for Image
Recognition", section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import _autocast, _checks, _cuda, _cuda_finalize, _entering, _finalize, _results, _training
from ._library import define, overload
from .bn_finalize import _check_running, bn_finalize
from .conv_bn_stats import conv_bn_stats

SCHEMA = (
    "(Tensor x, Tensor? norm, Tensor weight, Tensor? gamma, Tensor? beta, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, float eps, float? momentum) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def kept_of(running_mean: Tensor | None, running_var: Tensor | None, like: Tensor) -> Tensor:
    """The running statistics as they are: float64 [2, K], or [0, K] where there are none."""
    if running_mean is None or running_var is None:
        return like.new_empty((0, like.shape[1]), dtype=torch.float64)
    return torch.stack((running_mean.double(), running_var.double()))


def _composed(
    run: Any,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the three ops; run(op, *arguments). What is in place comes last."""
    *geometry, eps, momentum = options
    y, stats = run("conv_bn_stats", x, norm, weight, *geometry)
    count = y.numel() // max(1, y.shape[1])
    rows = run("bn_finalize", stats, None, gamma, beta, count, eps)
    kept = kept_of(running_mean, running_var, stats)
    if running_mean is not None:
        run(
            "bn_update_stats", stats, None, running_mean, running_var, num_batches_tracked, count,
            momentum,
        )  # fmt: skip
    return y, stats, rows, kept


def _parts(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _composed(lambda op, *given: _training.run(op, x, *given), x, *rest)


def _reference(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _composed(lambda op, *given: overload(op, "reference")(*given), x, *rest)


def _enter() -> None:
    op, fake = _finalize.OP, _results.FORMS[_finalize.OP].empty
    define(f"{op}.parts", SCHEMA, _parts, fake)
    define(f"{op}.reference", SCHEMA, _reference, fake)
    _cuda.declare(op, SCHEMA, fake, launch=_cuda_finalize.launch, checks=_cuda_finalize.CHECKS)
    kernel = "hand-written CUDA, conv_bn_stats' kernels, which finalize as they end"
    for name, asked, about, supports in (
        ("cuda", ("cuda",), kernel, _cuda.supports),
        ("parts", ("cpu", "cuda", "triton"), "three ops", _entering._supports_parts),
        ("reference", ("reference",), "plain PyTorch, any device and dtype", lambda call: None),
    ):
        backends.register(backends.Implementation(op, name, asked, about, supports, "fused"))


_enter()


def _checked(
    op: str, x: Tensor, channels: int, gamma: Any, beta: Any, eps: object
) -> tuple[Tensor | None, Tensor | None]:
    """Gamma and beta as the ops take them."""
    like = x.new_empty((2, 0), dtype=_training.compute_dtype(x.dtype))
    if gamma is not None:
        gamma = _checks.check_channel_vector(op, "gamma", gamma, like, channels)
    if beta is not None:
        beta = _checks.check_channel_vector(op, "beta", beta, like, channels)
    if not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps is {eps!r}; a number is needed")
    return gamma, beta


def _check_updated(
    op: str, x: Tensor, channels: int, mean: Any, var: Any, tracked: Any, momentum: Any
) -> None:
    """Checks what is written in place, before anything is."""
    if (mean is None) != (var is None):
        raise ValueError(f"{op}: running_mean and running_var are given together or not at all")
    if mean is not None:
        _check_running(op, x.new_empty((2, channels)), mean, var, tracked, momentum)
    elif tracked is not None:
        raise ValueError(f"{op}: num_batches_tracked is given without running_mean")


def conv_bn_stats_finalize(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes conv(relu(scale * x + shift), weight) and what its own BatchNorm is applied with.

    Args:
        x: [N, C, H, W]; float32, bfloat16, float16 or float64, as `conv_bn_stats` takes it.
        weight: [K, C/groups, R, S], dtype of `x`.
        norm: [4, C] of the layer before, as `bn_finalize` returns it; None reads `x` as it is.
        gamma: [K] of the layer itself; None is 1.
        beta: [K]; None is 0.
        stride: an int or (vertical, horizontal).
        padding: zeros on each side, an int or (vertical, horizontal).
        dilation: an int or (vertical, horizontal).
        groups: number of groups, as in `torch.nn.Conv2d`.
        eps: added to the variance.
        running_mean: [K], in place, as `bn_update_stats` updates it; None updates nothing.
        running_var: [K], likewise; given together with running_mean.
        num_batches_tracked: integer [], counted up by one first; only beside running_mean.
        momentum: None takes 1 / num_batches_tracked, the cumulative average.

    Returns:
        y [N, K, P, Q] in `x`'s dtype; [2, K], its mean and M2; and [4, K]: scale, shift, mean,
        invstd. All have gradients; where one is wanted the three ops compute them.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit, or there is one value a channel.

    Example:
        >>> y, stats, rows = rf.ops.conv_bn_stats_finalize(x, conv.weight, None, bn.weight, bn.bias)
    """
    op = _finalize.OP
    x, weight = _autocast.cast(x, weight)
    x = _checks.check_activation_tensor(op, "x", x)
    weight = _checks.check_like(op, "weight", weight, x, None)
    geometry = _training.geometry_of(op, stride, padding, dilation, groups)
    n, channels, *sizes = _checks.conv_output_shape(op, x, weight, *geometry)
    if norm is not None:
        norm = _training.check_norm(op, "norm", norm, x, x.shape[1])
    count = n * sizes[0] * sizes[1]
    gamma, beta = _checked(op, x, channels, gamma, beta, eps)
    _training.check_count(op, count, None, least=2)
    running = (running_mean, running_var, num_batches_tracked)
    _check_updated(op, x, channels, *running, momentum)
    tensors = [t for t in (x, norm, weight, gamma, beta) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y, stats = conv_bn_stats(
            x, weight, norm, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        rows = bn_finalize(
            stats, count, gamma, beta, eps=eps, running_mean=running_mean,
            running_var=running_var, num_batches_tracked=num_batches_tracked, momentum=momentum,
        )  # fmt: skip
        return y, stats, rows
    y, stats, rows, _ = _training.run(
        op, x, x, norm, weight, gamma, beta, *running, *geometry, eps, momentum
    )
    # What caches values made of these sees by their version that they are new.
    torch.autograd.graph.increment_version([t for t in running if t is not None])
    return y, stats, rows
