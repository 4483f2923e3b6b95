"""Which way the gradient between two blocks in a row takes: one op, two, or that of all three.

Two blocks in a row ask here in their forward pass, and `explain` with them. What they agree upon
there is kept to in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import backends
from ..triton import _end_gradient, _grad1x1_end, _limits
from ..triton import _grad1x1 as _merged
from ..triton._launch import precision
from . import _cuda_bn_dgrad_end, _cuda_grad1x1_end, _grad1x1, _triton
from ._words import Word

OP = "conv_bn_dgrad_end"
UNITED = "conv_bn_grad1x1_end"
"""The op that makes the weights' gradient of the convolution as well."""
ENVIRONMENT = "RESNET_FUSED_BLOCK_END_GRADIENT"


class Place(NamedTuple):
    """Where two blocks in a row meet.

    Attributes:
        device: of the tensors.
        dtype: of the activations.
        between: shape of the output of the block before, [N, C, H, W].
        weight: of the weights of the convolution behind it, [K, C / groups, R, S].
        geometry: that one's stride, padding, dilation, groups.
        projected: whether the block before has a projection, whose reductions are taken too.
        added: of how many rows and columns one has a shortcut's gradient added; 0: none has.
    """

    device: torch.device
    dtype: torch.dtype
    between: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int]
    projected: bool
    added: int


class Kernel(NamedTuple):
    """A kernel of `OP`, as `way` asks about it.

    Attributes:
        refusal: why no admitted configuration takes a place, or None.
        verdict: whether it is the better way by arithmetic, and why.
    """

    refusal: Callable[[Place], str | None]
    verdict: Callable[[Place], tuple[bool, str]]


def _refusal(place: Place) -> str | None:
    """Why no admitted configuration of the Triton kernel takes a place, or None."""
    case = _end_gradient.case_of(place.between, place.weight, place.geometry)
    product = _end_gradient.product_of(case, place.dtype.itemsize, precision(place.dtype))
    limits, names = _limits.limits(place.device), _triton.allowed(OP, place.device)
    return _end_gradient.unfit(product, limits, names)


def _merges(place: Place) -> bool:
    """Whether one kernel would make both gradients of the convolution."""
    return _grad1x1.way(
        place.device, place.dtype, place.between, place.weight, place.geometry, folds=True,
        masked=False,
    ).merged  # fmt: skip


def _verdict(place: Place) -> tuple[bool, str]:
    """Whether the Triton kernel is the better way by arithmetic, and why."""
    case = _end_gradient.case_of(place.between, place.weight, place.geometry)
    merged = _merges(place)
    limits, names = _limits.limits(place.device), _triton.allowed(OP, place.device)
    return _end_gradient.choose(
        case, place.dtype.itemsize, limits, names, precision=precision(place.dtype),
        projected=place.projected, added=added_elements(place),
        less=less_bytes(place, merged=merged), merged=merged,
    )  # fmt: skip


def added_elements(place: Place) -> int:
    """Elements of the shortcut's gradient."""
    if not place.added:
        return 0
    n, channels, *sides = place.between
    return n * channels * math.prod(-(-side // place.added) for side in sides)


def _cuda_refusal(place: Place) -> str | None:
    """Why no admitted configuration of the CUDA kernel takes a place, or None."""
    return _cuda_bn_dgrad_end.refusal(*place)


def _cuda_verdict(place: Place) -> tuple[bool, str]:
    """Whether the CUDA kernel is predicted to take fewer cycles, and why."""
    return _cuda_bn_dgrad_end.verdict(*place, merged=_merges(place))


ENDING: dict[str, Kernel] = {
    "triton": Kernel(_refusal, _verdict),
    "cuda": Kernel(_cuda_refusal, _cuda_verdict),
}
"""Implementations of `OP` in one kernel, by name."""


def _united_refusal(place: Place) -> str | None:
    """Why no admitted configuration of the Triton kernel of `UNITED` takes a place, or None."""
    sizes = place.weight[0], place.between[1], place.dtype.itemsize
    names = _triton.allowed(UNITED, place.device)
    served = _grad1x1_end.serves(*sizes, _limits.limits(place.device), names)
    return _grad1x1_end.unfit(*sizes) if served is None else None


def _united_verdict(place: Place) -> tuple[bool, str]:
    """Whether that kernel is the better way by arithmetic, and why."""
    case = _end_gradient.case_of(place.between, place.weight, place.geometry)
    return _end_gradient.unite(
        case, place.dtype.itemsize, _limits.limits(place.device),
        _triton.allowed(UNITED, place.device), projected=place.projected,
        added=added_elements(place),
    )  # fmt: skip


UNITING: dict[str, Kernel] = {
    "triton": Kernel(_united_refusal, _united_verdict),
    "cuda": Kernel(
        lambda place: _cuda_grad1x1_end.refusal(*place),
        lambda place: _cuda_grad1x1_end.verdict(*place),
    ),
}
"""Implementations of `UNITED` in one kernel, by name; `verdict` is against the best other way."""


class Way(NamedTuple):
    """How the gradient behind the ReLU of a block's end is made.

    Attributes:
        ended: whether with the gradient of the next block's first convolution, by `OP`.
        why: one clause; "" where there is nothing to say.
        united: whether with both gradients of that convolution, by `UNITED`; then ended, too.
    """

    ended: bool
    why: str
    united: bool = False

    @property
    def op(self) -> str:
        """That makes the gradient of the convolution's input."""
        return UNITED if self.united else OP if self.ended else "conv_bn_dgrad"

    @property
    def how(self) -> str:
        """For `explain`."""
        return f"one op ({self.op})" if self.ended else "two ops"


_word = Word(ENVIRONMENT)
preferring = _word.preferring


def less_bytes(place: Place, *, merged: bool) -> int:
    """Bytes that one op moves less than those in its place: what kernels' verdicts start from.

    The gradient between the blocks is neither written nor read. But where one kernel would make
    both gradients of the convolution (`conv_bn_grad1x1`), two read its operands now.

    Args:
        place: the place.
        merged: whether one kernel would.
    """
    size = place.dtype.itemsize
    saved = 2 * math.prod(place.between) * size
    if not merged:
        return saved
    n, channels, height, width = place.between
    return saved - _merged.again_bytes(
        n * height * width, place.weight[0], channels, size, affine=True, masked=False
    )


def possible(folds: bool) -> bool:
    """Whether `way` says yes to any place, by kernels that apply BatchNorm as they read or not."""
    wanted = backends.requested()[0]
    if wanted == "reference":
        return True
    return folds and bool(ENDING) and (wanted == "auto" or wanted in ENDING)


def unites() -> bool:
    """Whether a kernel of `UNITED` may be asked for: a backend without one is not warned about."""
    return bool(UNITING) and backends.requested()[0] in ("auto", *UNITING)


def _fits_united(place: Place) -> bool:
    """Whether one op may make all three gradients of a place."""
    stride, padding, _, groups = place.geometry
    return _grad1x1.fits_geometry(place.weight, stride, padding, groups)


def _united(place: Place) -> Way | None:
    """Where one kernel is to make all three gradients: the way; else None."""
    words = _word(), _grad1x1.wanted()
    if not _fits_united(place) or "never" in words or not unites():
        return None
    device = place.device
    choice = backends.choose(backends.Call(UNITED, device.type, place.dtype, index=device.index))
    kernel = UNITING.get(choice.implementation.name)
    if kernel is None or kernel.refusal(place) is not None:
        return None
    if words == ("always", "always"):
        return Way(True, f"{ENVIRONMENT} and {_grad1x1.ENVIRONMENT} are always", True)
    better, why = kernel.verdict(place)
    return Way(True, why, True) if better else None


def way(place: Place, *, folds: bool, trained: bool = True) -> Way:
    """Which way two blocks in a row take in backward.

    The user's word comes first (`ENVIRONMENT`, and for all three gradients from one kernel
    `_grad1x1.ENVIRONMENT`), then the kernels' own arithmetic. Who asks for the reference by name
    gets that of the one op.

    Args:
        place: where they meet.
        folds: whether the blocks' kernels apply BatchNorm as they read.
        trained: whether the gradient of the convolution's weights is wanted.

    Raises:
        ValueError: the environment variable holds no word that is accepted.
    """
    if not possible(folds):
        return Way(False, "")
    if backends.requested()[0] == "reference":
        return Way(True, "the reference is asked for by name", trained and _fits_united(place))
    word = _word()
    if word == "never":
        return Way(False, f"{ENVIRONMENT} is {word}")
    if trained and (united := _united(place)) is not None:
        return united
    device = place.device
    choice = backends.choose(backends.Call(OP, device.type, place.dtype, index=device.index))
    kernel = ENDING.get(choice.implementation.name)
    if kernel is None:
        reasons = [reason for name, reason in choice.refused if name in ENDING]
        return Way(False, "; ".join(dict.fromkeys(reasons)) or choice.why)
    reason = kernel.refusal(place)
    if reason is not None:
        return Way(False, reason)
    if word == "always":
        return Way(True, f"{ENVIRONMENT} is {word}")
    return Way(*kernel.verdict(place))
