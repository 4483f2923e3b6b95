"""`bn_backward_apply`: the gradient of a convolution's raw output, written out.

    dy = A dz + B y + C

`conv_bn_dgrad` and `conv_bn_wgrad` take the same as they read. Where they would read it many times
over, as a 3x3 convolution's nine taps do, one pass of its own is cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _autocast, _checks, _training, _training_cpu

SCHEMA = "(Tensor dz, Tensor y, Tensor coefficients) -> Tensor"


def _reference(dz: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    return torch.empty_like(dz).copy_(_training.affine_gradient(dz, y, coefficients))


_training.enter(
    "bn_backward_apply",
    SCHEMA,
    _reference,
    "one pass",
    triton="_training_checks_elementwise",
    cuda_pass=True,
    cpu=_training_cpu.bn_backward_apply,
)


def bn_backward_apply(dz: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """Computes A dz + B y + C.

    Args:
        dz: gradient behind the BatchNorm [N, K, P, Q]; float32, bfloat16, float16 or float64.
        y: the raw output that went into it, dtype of `dz`.
        coefficients: [3, K] A, B, C of `bn_backward_finalize`.

    Returns:
        [N, K, P, Q] in `dz`'s dtype and layout: A dz + (B y + C) by two fused multiply-adds,
        rounded once. It has no derivative of its own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices do not fit.
    """
    op = "bn_backward_apply"
    dz, y = _autocast.cast(dz, y)
    dz = _checks.check_activation_tensor(op, "dz", dz)
    y = _checks.check_like(op, "y", y, dz, dz.shape)
    shape = (3, dz.shape[1])
    coefficients = _training.check_rows(op, "coefficients", coefficients, dz, shape, "A, B, C")
    _checks.no_derivative(op, dz, y, coefficients)
    return _training.run(op, dz, dz, y, coefficients)
