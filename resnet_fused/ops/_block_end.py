"""Which way a block's end and the next block's first convolution take: one op, or two.

Two blocks in a row ask here in their forward pass, and `explain` with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import backends
from ..triton import _block_end, _limits, _tiles
from ..triton._launch import precision
from . import _cuda_block_end, _triton
from ._grad1x1 import fits_geometry
from ._words import Word

OP = "bn_add_act_conv_stats"
ENVIRONMENT = "RESNET_FUSED_BLOCK_END"
FOLDING = ("triton", "cuda")
"""Implementations that make both in one kernel."""


class Way(NamedTuple):
    """How a block's end is made.

    Attributes:
        folded: whether with the next block's first convolution, by `OP`.
        why: one clause; "" where the convolution is none that it could be folded into.
    """

    folded: bool
    why: str

    @property
    def how(self) -> str:
        """For `explain`."""
        return f"one op ({OP})" if self.folded else "two ops"


_word = Word(ENVIRONMENT)
preferring = _word.preferring


def possible(folds: bool) -> bool:
    """Whether `way` says yes to any blocks, whose kernels apply BatchNorm as they read or not."""
    return folds or backends.requested()[0] == "reference"


def refusal(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    out: Sequence[int],
    weight: Sequence[int],
    projected: bool,
) -> str | None:
    """Why no admitted configuration of a kernel takes a call, or None.

    Args:
        name: of `FOLDING`.
        device: of the tensors.
        dtype: of the activations.
        out: shape of the block's output, [N, C, H, W].
        weight: of the weights of the convolution behind it, [K, C, 1, 1].
        projected: whether the shortcut has a BatchNorm of its own.
    """
    if name == "cuda":
        return _cuda_block_end.refusal(device, dtype, out, weight[0], projected)
    product = product_of(device, dtype, out, weight, projected)
    return _block_end.unfit(product, _limits.limits(device), _triton.allowed(OP, device))


def _verdict(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    out: Sequence[int],
    weight: Sequence[int],
    projected: bool,
) -> tuple[bool, str]:
    """Whether a kernel of `FOLDING` is the better way by arithmetic, and why."""
    if name == "cuda":
        return _cuda_block_end.verdict(device, dtype, out, weight[0], projected)
    product = product_of(device, dtype, out, weight, projected)
    return _block_end.choose(product, _limits.limits(device), _triton.allowed(OP, device))


def product_of(
    device: torch.device,
    dtype: torch.dtype,
    out: Sequence[int],
    weight: Sequence[int],
    projected: bool,
) -> _tiles.Product:
    """The product of a call: shapes of a block's output and of the weight behind it."""
    n, channels, height, width = out
    return _block_end.product_of(
        n * height * width, channels, weight[0], dtype.itemsize, precision(dtype),
        projected=projected, capability=_limits.limits(device).capability,
    )  # fmt: skip


def way(
    device: torch.device,
    dtype: torch.dtype,
    out: Sequence[int],
    weight: Sequence[int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    *,
    folds: bool,
    projected: bool,
) -> Way:
    """Which way two blocks in a row take.

    The user's word comes first (`ENVIRONMENT`), then which of both is predicted to be faster
    (`triton._block_end.choose`, `_cuda_block_end.choose`). Who asks for the reference by name gets
    that of the one op.

    Args:
        device: of the tensors.
        dtype: of the activations.
        out: shape of the block's output, [N, C, H, W].
        weight: of the weights of the convolution behind it, [K, C / groups, R, S].
        geometry: its stride, padding, dilation, groups.
        folds: whether the blocks' kernels apply BatchNorm as they read.
        projected: whether the block's shortcut has a BatchNorm of its own.

    Raises:
        ValueError: the environment variable holds no word that is accepted.
    """
    stride, padding, _, groups = geometry
    if not fits_geometry(weight, stride, padding, groups) or not possible(folds):
        return Way(False, "")
    if backends.requested()[0] == "reference":
        return Way(True, "the reference is asked for by name")
    word = _word()
    if word == "never":
        return Way(False, f"{ENVIRONMENT} is {word}")
    choice = backends.choose(backends.Call(OP, device.type, dtype, index=device.index))
    name = choice.implementation.name
    if name not in FOLDING:
        reasons = [reason for other, reason in choice.refused if other in FOLDING]
        return Way(False, "; ".join(dict.fromkeys(reasons)) or choice.why)
    given = name, device, dtype, tuple(out), tuple(weight), projected
    if word == "always":
        reason = refusal(*given)
        return Way(reason is None, reason or f"{ENVIRONMENT} is {word}")
    return Way(*_verdict(*given))
