"""`conv_bn_grad1x1`: both gradients of a 1x1 convolution between two BatchNorms.

What `conv_bn_dgrad` and `conv_bn_wgrad` compute of the same operands, each of which is then read
once. Two of the three convolutions of a bottleneck are 1x1 ("Deep Residual Learning for Image
Recognition", figure 5), and the expanding one has the widest gradients of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import _grad1x1, _limits
from . import _autocast, _checks, _cuda_grad1x1, _results, _training, _triton
from ._grad1x1 import GEOMETRY, MERGING, refusal
from ._library import overload
from .conv_bn_dgrad import _reference as dgrad_reference
from .conv_bn_dgrad import check_affine
from .conv_bn_wgrad import _reference as wgrad_reference

SCHEMA = (
    "(Tensor dz, Tensor? y, Tensor? coefficients, Tensor x, Tensor? norm, Tensor weight, "
    "Tensor? addend, Tensor parameter, bool channels_last, int addend_stride) "
    "-> (Tensor, Tensor, Tensor)"
)


def _reference(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    parameter: Tensor,
    channels_last: bool,
    addend_stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    below = None if norm is None else x
    dx, sums = dgrad_reference(
        dz, y, coefficients, weight, addend, below, norm, list(x.shape), channels_last,
        addend_stride, *GEOMETRY,
    )  # fmt: skip
    return dx, sums, wgrad_reference(dz, y, coefficients, x, norm, parameter, *GEOMETRY)


_training.enter(
    "conv_bn_grad1x1",
    SCHEMA,
    _reference,
    "both products of a tile of pixels while it is in registers, sums merged in fixed order",
    triton="_training_checks_grad1x1",
    cuda=True,
    cuda_launch=_cuda_grad1x1.launch,
    cuda_checks=_cuda_grad1x1.CHECKS,
)


def unfit(dz: Tensor, channels: int) -> str | None:
    """Why no admitted configuration of the Triton kernel takes a call, or None.

    Args:
        dz: [N, K, H, W].
        channels: C.
    """
    names = _triton.allowed("conv_bn_grad1x1", dz.device)
    limits = _limits.limits(dz.device)
    sizes = dz.shape[1], channels, dz.element_size()
    return _grad1x1.unfit(*sizes) if _grad1x1.serves(*sizes, limits, names) is None else None


def conv_bn_grad1x1(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    addend_stride: int = 1,
    parameter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes both gradients of a 1x1 convolution, stride 1, no padding, one group.

    Where a kernel serves the call, in one pass over its operands; else by `conv_bn_dgrad` and
    `conv_bn_wgrad`, whose results these are.

    Args:
        dz: gradient behind the BatchNorm [N, K, H, W]; float32, bfloat16, float16 or float64.
        x: what the convolution read [N, C, H, W], dtype of `dz`; with `norm` the raw output below.
        weight: [K, C, 1, 1], dtype of `dz`.
        y: the convolution's raw output [N, K, H, W]. None: `dz` is the gradient of that itself.
        coefficients: [3, K] A, B, C of `bn_backward_finalize`; given with `y`.
        norm: [4, C] of the BatchNorm and ReLU below, through which `x` was read and by which the
            gradient is masked. None: neither is there.
        addend: [N, C, ceil(H / addend_stride), ceil(W / addend_stride)], dtype of `dz`: added to
            every addend_stride-th pixel of the gradient before it is rounded.
        addend_stride: see addend.
        parameter: [K, C, 1, 1], whose dtype (also float32) and strides the gradient gets. None:
            `weight`'s.

    Returns:
        dx [N, C, H, W] in `dz`'s dtype, channels_last where `x` or `weight` is; with `norm` [2, C]
        sums of it and of it times (x - mean), else [0, C]; dweight [K, C, 1, 1]. None has a
        derivative of its own.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or options do not fit.
    """
    op = "conv_bn_grad1x1"
    parameter = weight if parameter is None else parameter
    dz, x, weight, y, addend = _autocast.cast(dz, x, weight, y, addend)
    dz = _checks.check_activation_tensor(op, "dz", dz)
    x = _checks.check_like(op, "x", x, dz, None)
    weight = _checks.check_like(op, "weight", weight, dz, None)
    if tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; [K, C, 1, 1] is accepted")
    shape = _checks.conv_output_shape(op, x, weight, *GEOMETRY)
    dz = _checks.check_like(op, "dz", dz, dz, shape)
    parameter = check_parameter(op, parameter, weight)
    y, coefficients = check_affine(op, dz, y, coefficients)
    if norm is not None:
        norm = _training.check_norm(op, "norm", norm, dz, x.shape[1])
    if not isinstance(addend_stride, int) or addend_stride < 1:
        raise ValueError(f"{op}: addend_stride is {addend_stride!r}; 1 or more is accepted")
    if addend is not None:
        pixels = [-(-side // addend_stride) for side in x.shape[2:]]
        addend = _checks.check_like(op, "addend", addend, dz, [*x.shape[:2], *pixels])
    _checks.no_derivative(op, dz, x, weight)
    layout = _results.wants_channels_last(x, weight)
    if not torch.compiler.is_compiling():
        chosen = _training.choice(op, dz).implementation.name
        served = chosen in MERGING and not refusal(
            chosen, dz.device, dz.dtype, x.shape, dz.shape[1]
        )
        if served:
            return overload(op, chosen)(
                dz, y, coefficients, x, norm, weight, addend, parameter, layout, addend_stride
            )
    dx, sums = _training.run(
        "conv_bn_dgrad", dz, dz, y, coefficients, weight, addend, None if norm is None else x, norm,
        list(x.shape), layout, addend_stride, *GEOMETRY,
    )  # fmt: skip
    dweight = _training.run("conv_bn_wgrad", dz, dz, y, coefficients, x, norm, parameter, *GEOMETRY)
    return dx, sums, dweight


def check_parameter(op: str, parameter: object, weight: Tensor) -> Tensor:
    """Checks what gives the weights' gradient its dtype and strides."""
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{op}: parameter must be a Tensor, got {type(parameter).__name__}")
    if parameter.shape != weight.shape:
        raise ValueError(
            f"{op}: parameter has shape {tuple(parameter.shape)}, weight {tuple(weight.shape)}"
        )
    if parameter.dtype not in (weight.dtype, torch.float32):
        raise TypeError(
            f"{op}: parameter has dtype {parameter.dtype}; {weight.dtype}, or torch.float32, is "
            "accepted"
        )
    if parameter.device != weight.device:
        raise ValueError(f"{op}: parameter is on {parameter.device}, weight on {weight.device}")
    return parameter
