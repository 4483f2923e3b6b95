"""`bn_add_act_backward`: ReLU's mask and BatchNorm's reductions in one pass over the gradient.

    dz = dout where the result passed the ReLU, else 0
    sums = (sum dz, sum dz (y - mean) [, sum dz (residual - residual_mean)])

dz is the gradient of both branches of the block at once ("Deep Residual Learning for Image
Recognition", equation 1). The sums are centred: without the mean they would cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _autocast, _checks, _training, _training_cpu
from ._training import MEAN, normalised, per_channel

SCHEMA = (
    "(Tensor dout, Tensor? out, Tensor y, Tensor norm, Tensor? residual, Tensor? residual_norm, "
    "str act) -> (Tensor, Tensor)"
)


def reductions(dz: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    """The sums of dz and of dz (y - mean) of each channel, of the rounded dz: [2, K]."""
    wide = dz.double()
    centred = y.double() - per_channel(norm[MEAN].double())
    sums = torch.stack((wide.sum((0, 2, 3)), (wide * centred).sum((0, 2, 3))))
    return sums.to(norm.dtype)


def _reference(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    dz = torch.empty_like(y).copy_(dout)
    if act == "relu":
        result = normalised(y, norm) if out is None else out
        # Not (result > 0): where the result is NaN, the gradient passes.
        dz.masked_fill_(result <= 0, 0)
    sums = reductions(dz, y, norm)
    if residual is not None and residual_norm is not None:
        sums = torch.cat((sums, reductions(dz, residual, residual_norm)[1:]))
    return dz, sums


_training.enter(
    "bn_add_act_backward",
    SCHEMA,
    _reference,
    "one pass, sums in fixed order",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    cpu=_training_cpu.bn_add_act_backward,
)


def bn_add_act_backward(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    *,
    act: str | None = "relu",
) -> tuple[Tensor, Tensor]:
    """Computes the gradient behind `bn_add_act`'s ReLU, and what its BatchNorms need of it.

    Args:
        dout: gradient of the result [N, K, P, Q]; float32, bfloat16, float16 or float64.
        out: the result, dtype of `dout`. None where there was no shortcut: the mask is then made
            of `y` and `norm` as forward was.
        y: the raw output that went in [N, K, P, Q].
        norm: [4, K] of its BatchNorm.
        residual: the projection's raw output [N, K, P, Q]; None for other shortcuts.
        residual_norm: [4, K] of its BatchNorm.
        act: "relu" or "none".

    Returns:
        dz [N, K, P, Q] in `y`'s dtype and layout; and in `norm`'s dtype [2, K], sum dz and
        sum dz (y - mean), with a third row for the projection. It has no derivative of its own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or `act` do not fit.
    """
    op = "bn_add_act_backward"
    dout, out, y, residual = _autocast.cast(dout, out, y, residual)
    y = _checks.check_activation_tensor(op, "y", y)
    dout = _checks.check_like(op, "dout", dout, y, y.shape)
    if out is not None:
        out = _checks.check_like(op, "out", out, y, y.shape)
    norm = _training.check_norm(op, "norm", norm, y, y.shape[1])
    if (residual is None) != (residual_norm is None):
        raise ValueError(f"{op}: residual and residual_norm are given together or not at all")
    if residual is not None:
        residual = _checks.check_like(op, "residual", residual, y, y.shape)
        residual_norm = _training.check_norm(op, "residual_norm", residual_norm, y, y.shape[1])
        if out is None:
            raise ValueError(f"{op}: out is needed where there is a residual")
    _checks.no_derivative(op, dout, y, norm)
    act = _checks.check_act(op, act)
    return _training.run(op, y, dout, out, y, norm, residual, residual_norm, act)
