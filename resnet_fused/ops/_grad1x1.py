"""Which way a layer takes to both gradients of a 1x1 convolution: one op, or two.

The node of a layer asks here in its backward pass, and `explain` in its forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _tuned, backends
from ..triton import _grad1x1, _limits
from . import _cuda_grad1x1, _triton
from ._words import Word

OP = "conv_bn_grad1x1"
GEOMETRY = _cuda_grad1x1.GEOMETRY
MERGING = ("triton", "cuda")
"""Implementations that make both gradients in one kernel."""
ENVIRONMENT = "RESNET_FUSED_GRAD1X1"
TWO = "two ops"
"""In the place of a configuration in what tuning keeps: `conv_bn_dgrad` and `conv_bn_wgrad`."""


class Way(NamedTuple):
    """How the gradients of a convolution are made.

    Attributes:
        merged: whether `conv_bn_grad1x1` makes both.
        why: one clause; "" where the convolution is none that it could be asked of.
    """

    merged: bool
    why: str

    @property
    def how(self) -> str:
        """For `explain`."""
        return f"one op ({OP})" if self.merged else TWO


def fits_geometry(
    weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether weights [K, C / groups, R, S] are 1x1, stride 1, no padding, one group."""
    return (*weight[2:], *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)


_word = Word(ENVIRONMENT)
preferring = _word.preferring
wanted = _word.__call__
"""The user's word."""


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, x: Sequence[int], filters: int
) -> str | None:
    """Why no admitted configuration of a kernel takes a 1x1 convolution of stride 1, or None.

    Args:
        name: of `MERGING`.
        device: of the tensors.
        dtype: of the activations.
        x: shape of what the convolution reads, [N, C, H, W].
        filters: K.
    """
    if name == "cuda":
        return _cuda_grad1x1.refusal(device, dtype, x, filters)
    sizes = filters, x[1], dtype.itemsize
    served = _grad1x1.serves(*sizes, _limits.limits(device), _triton.allowed(OP, device))
    return _grad1x1.unfit(*sizes) if served is None else None


def _verdict(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    x: Sequence[int],
    filters: int,
    masked: bool,
) -> tuple[bool, str]:
    """Whether a kernel of `MERGING` is the better way by arithmetic, and why."""
    if name == "cuda":
        return _cuda_grad1x1.verdict(device, dtype, x, filters, masked=masked)
    n, channels, height, width = x
    sizes = n * height * width, filters, channels, dtype.itemsize
    limits, names = _limits.limits(device), _triton.allowed(OP, device)
    found = _grad1x1.choose(*sizes, limits, names, masked=masked)
    return found.config is not None, found.why


def way(
    device: torch.device,
    dtype: torch.dtype,
    x: Sequence[int],
    weight: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    *,
    folds: bool,
    masked: bool,
) -> Way:
    """Which way a node takes for a convolution of which both gradients are wanted.

    The user's word comes first (`ENVIRONMENT`), then what tuning measured on this GPU, then
    arithmetic: which of both moves fewer bytes (`triton._grad1x1.choose`), or takes fewer predicted
    cycles (`_cuda_grad1x1.choose`). Who asks for the reference by name gets that of the merged op.

    Args:
        device: of the tensors.
        dtype: of the activations.
        x: shape of what the convolution reads, [N, C, H, W].
        weight: its shape, [K, C / groups, R, S].
        geometry: stride, padding, dilation, groups.
        folds: whether the node's kernels apply BatchNorm as they read.
        masked: whether a BatchNorm and ReLU stand below.

    Raises:
        ValueError: the environment variable holds no word that is accepted.
    """
    stride, padding, _, groups = geometry
    if not fits_geometry(weight, stride, padding, groups):
        return Way(False, "")
    if backends.requested()[0] == "reference":
        return Way(True, "the reference is asked for by name")
    if not folds:
        return Way(False, "")
    word = _word()
    if word == "never":
        return _said(Way(False, f"{ENVIRONMENT} is {word}"), x, weight)
    choice = backends.choose(backends.Call(OP, device.type, dtype, index=device.index))
    name = choice.implementation.name
    if name not in MERGING:
        reasons = [reason for other, reason in choice.refused if other in MERGING]
        return _said(Way(False, "; ".join(dict.fromkeys(reasons)) or choice.why), x, weight)
    refused = refusal(name, device, dtype, x, weight[0])
    if refused is not None:
        return _said(Way(False, refused), x, weight)
    if word == "always":
        return _said(Way(True, f"{ENVIRONMENT} is {word}"), x, weight)
    tuned = _tuned.find(name, device, OP, dtype, x, weight, geometry, masked)
    if tuned is not None:
        return _said(Way(tuned.configuration != TWO, tuned.why), x, weight)
    return _said(Way(*_verdict(name, device, dtype, x, weight[0], masked)), x, weight)


def _said(found: Way, x: Sequence[int], weight: Sequence[int]) -> Way:
    _log(found, tuple(x), tuple(weight))
    return found


@functools.lru_cache(maxsize=1024)
def _log(found: Way, x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    """One line for each shape and way."""
    backends.logger.info(
        "both gradients of x %s, weight %s by %s: %s", x, weight, found.how, found.why
    )
