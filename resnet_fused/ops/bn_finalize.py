"""`bn_finalize`: a batch's statistics become scale and shift; `bn_update_stats`: the running ones.

    invstd = 1 / sqrt(M2 / m + eps);  scale = gamma * invstd;  shift = beta - mean * scale

m is the number of elements a channel. The shift is made of the rounded scale, so that the scale's
own error cancels in scale * (y - mean). The running variance is the unbiased M2 / (m - 1), as in
PyTorch. Ioffe and Szegedy, "Batch Normalization", algorithm 1; "Deep Residual Learning for Image
Recognition", section 3.4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import _checks, _training, _training_cpu

SCHEMA = (
    "(Tensor stats, Tensor? total, Tensor? gamma, Tensor? beta, SymInt count, float eps) -> Tensor"
)
UPDATE_SCHEMA = (
    "(Tensor stats, Tensor? total, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!)? num_batches_tracked, SymInt count, float? momentum) -> ()"
)


def _formula(
    stats: Tensor,
    total: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    count: int,
    eps: float,
) -> Tensor:
    mean, m2 = stats.double()
    m = max(1, count) if total is None else total.clamp(min=1)
    invstd = (m2 / m + eps).rsqrt()
    scale = invstd if gamma is None else gamma.double() * invstd
    scale = scale.to(stats.dtype)
    shift = -mean * scale.double()
    if beta is not None:
        shift = shift + beta.double()
    return torch.stack((scale, shift.to(stats.dtype), stats[0], invstd.to(stats.dtype)))


_training.enter(
    "bn_finalize",
    SCHEMA,
    _formula,
    "statistics to scale and shift, in float64",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    cpu=_training_cpu.bn_finalize,
)


def _update(
    stats: Tensor,
    total: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    count: int,
    momentum: float | None,
) -> None:
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if total is None and count == 0:
        return
    mean, m2 = stats.double()
    if momentum is None:
        # Without a counter PyTorch's factor is 0: nothing is averaged.
        factor = 0.0 if num_batches_tracked is None else 1.0 / num_batches_tracked.double()
    else:
        factor = momentum
    m = count if total is None else total
    variance = m2 / (m - 1)
    if total is not None:  # all ranks may be empty: known on the device alone
        mean = torch.where(total > 0, mean, running_mean.double())
        variance = torch.where(total > 0, variance, running_var.double())
    for running, batch in ((running_mean, mean), (running_var, variance)):
        kept = running.double()
        running.copy_((1 - factor) * kept + factor * batch)


_training.enter(
    "bn_update_stats",
    UPDATE_SCHEMA,
    _update,
    "running mean and variance, in place",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    mutates=("running_mean", "running_var", "num_batches_tracked"),
    cpu=_training_cpu.bn_update_stats,
)


class _BnFinalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, stats: Tensor, *rest: Any) -> Tensor:
        total, gamma, beta, count, eps = rest
        ctx.save_for_backward(stats, total, gamma, beta)
        ctx.options = count, eps
        return _training.run("bn_finalize", stats, stats, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dnorm: Tensor) -> tuple[Tensor | None, ...]:
        stats, total, gamma, beta = ctx.saved_tensors
        given = {0: stats, 2: gamma, 3: beta}
        with torch.enable_grad():
            leaves = {
                place: t.detach().requires_grad_()
                for place, t in given.items()
                if t is not None and ctx.needs_input_grad[place]
            }
            used = [leaves.get(place, given[place]) for place in given]
            norm = _formula(used[0], total, used[1], used[2], *ctx.options)
            found = torch.autograd.grad(norm, list(leaves.values()), dnorm, allow_unused=True)
        grads = dict(zip(leaves, found, strict=True))
        return tuple(grads.get(place) for place in range(6))


def merge_stats(counts: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Joins the statistics of several parts of a batch, in closed form and in their order.

    With pivot p, the first part's mean: mean = p + sum n_i (mean_i - p) / sum n_i and
    M2 = sum M2_i + sum n_i (mean_i - mean)^2, in float64.

    Args:
        counts: [parts] elements a channel of each part; 0 for an empty one.
        stats: [parts, 2, K] mean and M2.

    Returns:
        [2, K] in the dtype of `stats`, and the joined count: float64 [1].
    """
    n = counts.double().view(-1, 1)
    mean, m2 = stats[:, 0].double(), stats[:, 1].double()
    # An empty part's mean is no number of anybody's: it must not be the pivot.
    first = (n > 0).to(torch.int8).argmax(0, keepdim=True)
    pivot = mean.gather(0, first.expand(1, mean.shape[1]))
    total = n.sum(0)
    zero = torch.zeros((), dtype=torch.float64, device=n.device)
    offset = torch.where(n > 0, n * (mean - pivot), zero)
    joined = pivot[0] + offset.sum(0) / total.clamp(min=1)
    spread = torch.where(n > 0, m2 + n * (mean - joined).square(), zero).sum(0)
    return torch.stack((joined, spread)).to(stats.dtype), total


def bn_update_stats(
    stats: Tensor,
    count: int,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None = None,
    *,
    momentum: float | None = 0.1,
    total: Tensor | None = None,
) -> None:
    """Takes a batch's statistics into the running ones, in place, as `nn.BatchNorm2d` does.

    Args:
        stats: [2, K] mean and M2; see `conv_bn_stats`.
        count: elements a channel of this batch. 0 leaves both as they are.
        running_mean: [K], overwritten by (1 - f) running_mean + f mean.
        running_var: [K], likewise with the unbiased variance M2 / (count - 1).
        num_batches_tracked: integer [], counted up by one first; None counts nothing.
        momentum: f; None takes 1 / num_batches_tracked, the cumulative average.
        total: float64 [1], elements a channel over all ranks; in place of `count`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes do not fit, or there is one value a channel: it has no variance.
    """
    op = "bn_update_stats"
    stats, _ = _checked_stats(op, stats)
    total = _training.check_total(op, total, stats)
    _training.check_count(op, count, total, least=2)
    _check_running(op, stats, running_mean, running_var, num_batches_tracked, momentum)
    changed = [running_mean, running_var]
    if num_batches_tracked is not None:
        changed.append(num_batches_tracked)
    _training.run(
        op, stats, stats, total, running_mean, running_var, num_batches_tracked, count, momentum
    )
    # What caches values made of these sees by their version that they are new.
    torch.autograd.graph.increment_version(changed)


def _checked_stats(op: str, stats: object) -> tuple[Tensor, int]:
    if not isinstance(stats, Tensor) or stats.dim() != 2 or stats.shape[0] != 2:
        got = tuple(stats.shape) if isinstance(stats, Tensor) else type(stats).__name__
        raise ValueError(f"{op}: stats must be a tensor [2, K] of mean and M2, got {got}")
    if stats.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: stats has dtype {stats.dtype}; float32 or float64 is accepted")
    return stats.contiguous(), stats.shape[1]


def _check_running(
    op: str,
    stats: Tensor,
    running_mean: object,
    running_var: object,
    num_batches_tracked: object,
    momentum: object,
) -> None:
    """Checks what is written in place, before anything is."""
    shape = tuple(stats.shape[1:])
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if not isinstance(t, Tensor) or not t.dtype.is_floating_point or tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} is {_told(t)}; a floating tensor {shape} is needed")
        if t.device != stats.device:
            raise ValueError(f"{op}: {name} is on {t.device}, stats on {stats.device}")
    if num_batches_tracked is not None:
        t, name = num_batches_tracked, "num_batches_tracked"
        if not isinstance(t, Tensor) or t.dtype.is_floating_point or t.dim():
            raise ValueError(f"{op}: {name} is {_told(t)}; None or an integer tensor [] is needed")
        if t.device != stats.device:
            raise ValueError(f"{op}: {name} is on {t.device}, stats on {stats.device}")
    if momentum is not None and not isinstance(momentum, int | float):
        raise TypeError(f"{op}: momentum is {momentum!r}; None or a number is accepted")


def _told(t: object) -> str:
    """What was given, for a message: a tensor by dtype and shape."""
    return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)


def bn_finalize(
    stats: Tensor,
    count: int,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    total: Tensor | None = None,
) -> Tensor:
    """Makes scale and shift of a batch's statistics; updates the running ones where given.

    Args:
        stats: [2, K] mean and M2; see `conv_bn_stats`.
        count: elements a channel, m = N P Q.
        gamma: [K]; None is 1.
        beta: [K]; None is 0.
        eps: added to the variance.
        running_mean: [K], as `bn_update_stats`; None updates nothing.
        running_var: [K], likewise.
        num_batches_tracked: likewise.
        momentum: likewise.
        total: float64 [1], elements a channel over all ranks; in place of `count`.

    Returns:
        [4, K] in the dtype of `stats`: scale, shift, mean, invstd. Gradients flow to `stats`,
        `gamma` and `beta`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes do not fit, or there is one value a channel: it has no variance.
    """
    op = "bn_finalize"
    stats, channels = _checked_stats(op, stats)
    if gamma is not None:
        gamma = _checks.check_channel_vector(op, "gamma", gamma, stats, channels)
    if beta is not None:
        beta = _checks.check_channel_vector(op, "beta", beta, stats, channels)
    if not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps is {eps!r}; a number is needed")
    total = _training.check_total(op, total, stats)
    _training.check_count(op, count, total, least=2)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var are given together or not at all")
    if running_mean is not None:
        _check_running(op, stats, running_mean, running_var, num_batches_tracked, momentum)
    rest = (total, gamma, beta, count, eps)
    wanted = any(t is not None and t.requires_grad for t in (stats, gamma, beta))
    if torch.is_grad_enabled() and wanted:
        norm = _BnFinalize.apply(stats, *rest)
    else:
        norm = _training.run(op, stats, stats, *rest)
    if running_mean is not None and running_var is not None:
        bn_update_stats(
            stats.detach(), count, running_mean, running_var, num_batches_tracked,
            momentum=momentum, total=total,
        )  # fmt: skip
    return norm
