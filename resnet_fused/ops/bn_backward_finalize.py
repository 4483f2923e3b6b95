"""`bn_backward_finalize`: the reductions of a BatchNorm's backward become three values a channel.

    dy = A dz + B y + C,  A = scale,  B = -scale invstd S2 / m,  C = -scale S1 / m - B mean

with S1 = sum dz = dbeta and S2 = invstd sum dz (y - mean) = dgamma: the same as
gamma invstd (dz - S1 / m - xhat S2 / m) of Ioffe and Szegedy, "Batch Normalization", section 3.
With frozen statistics B = C = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _training, _training_cpu
from ._training import INVSTD, MEAN, SCALE

SCHEMA = (
    "(Tensor sums, Tensor? all_sums, Tensor? total, Tensor norm, SymInt count, int row, "
    "bool frozen) -> (Tensor, Tensor, Tensor)"
)


def _reference(
    sums: Tensor,
    all_sums: Tensor | None,
    total: Tensor | None,
    norm: Tensor,
    count: int,
    row: int,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scale, mean, invstd = (norm[index].double() for index in (SCALE, MEAN, INVSTD))
    dgamma = invstd * sums[row].double()
    everywhere = sums if all_sums is None else all_sums
    m = max(1, count) if total is None else total.clamp(min=1)
    if frozen:
        b = c = torch.zeros_like(scale)
    else:
        b = -scale * invstd * (invstd * everywhere[row].double()) / m
        # C of the rounded B, whose error then cancels in B (y - mean).
        b = b.to(norm.dtype).double()
        c = -scale * everywhere[0].double() / m - b * mean
    coefficients = torch.stack((scale, b, c)).to(norm.dtype)
    return coefficients, dgamma.to(norm.dtype), sums[0].clone()


_training.enter(
    "bn_backward_finalize",
    SCHEMA,
    _reference,
    "sums to coefficients, in float64",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    cpu=_training_cpu.bn_backward_finalize,
)


def bn_backward_finalize(
    sums: Tensor,
    norm: Tensor,
    count: int,
    *,
    row: int = 1,
    frozen: bool = False,
    all_sums: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes the coefficients of dy = A dz + B y + C, and the gradients of gamma and beta.

    Args:
        sums: [2 or 3, K] of this rank, as `bn_add_act_backward` and `conv_bn_dgrad` return them.
        norm: [4, K] of the BatchNorm.
        count: elements a channel, m = N P Q.
        row: of `sums` that belongs to this BatchNorm: 1, or 2 for the projection's.
        frozen: the statistics were given, not the batch's: no gradient flows through them.
        all_sums: `sums` added up over all ranks; None is this rank's.
        total: float64 [1], elements a channel over all ranks; in place of `count`.

    Returns:
        [3, K] A, B, C; dgamma [K]; dbeta [K]: in `norm`'s dtype. The gradients are this rank's.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or `row` do not fit.
    """
    op = "bn_backward_finalize"
    if not isinstance(sums, Tensor) or sums.dim() != 2 or sums.shape[0] not in (2, 3):
        got = tuple(sums.shape) if isinstance(sums, Tensor) else type(sums).__name__
        raise ValueError(f"{op}: sums must be a tensor [2 or 3, K], got {got}")
    if sums.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: sums has dtype {sums.dtype}; float32 or float64 is accepted")
    if not isinstance(row, int) or not 1 <= row < sums.shape[0]:
        raise ValueError(f"{op}: row is {row!r}; 1 to {sums.shape[0] - 1} is accepted")
    norm = _training.check_norm(op, "norm", norm, sums, sums.shape[1])
    if all_sums is not None:
        meaning = "the sums of all ranks"
        shape = tuple(sums.shape)
        all_sums = _training.check_rows(op, "all_sums", all_sums, sums, shape, meaning)
    total = _training.check_total(op, total, sums)
    _training.check_count(op, count, total)
    _checks.no_derivative(op, sums, norm)
    sums = sums.contiguous()
    return _training.run(op, sums, sums, all_sums, total, norm, count, row, frozen)
